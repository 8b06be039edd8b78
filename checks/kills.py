"""Kill training 25 times with SIGKILL and resume it: it must end with the weights of the run that nobody killed.

    python checks/kills.py

Trains a very small BERT with dropout on the generated sample (random windows, an evaluation an epoch, the best model
kept), in runs of one process, of one process with two data workers, and of two processes (gloo) with two data workers
each. A run is killed several times, each time at a random place of the next part of its steps: half of the time while
a checkpoint is being written, at a random one of its files, half of the time anywhere. After the last kill the same
command trains to the end. The table says where every kill fell, by what the processes had printed and by what lies in
the folder after their death. Exit code 1 if a run's weights differ or too few of the kills fell where they should.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

sys.path.insert(0, str(Path(__file__).parent.parent))

import resume

ROOT = Path(__file__).parent.parent
BATCH, EPOCHS, SAVE_STEPS = 16, 4, 2
RUNS = [(1, 0, 8), (1, 2, 7), (2, 2, 10)]  # processes, data workers of each, kills
LEAST_INCOMPLETE = 8  # kills while the newest checkpoint is incomplete
LEAST_LATE = 5  # kills of two processes in the middle of the second epoch or a later one
PATIENCE = 300  # seconds in which a run must come to the place where it is to be killed
# The files of a checkpoint in the order in which they are begun; at the last, it is complete a moment later.
STAGES = ["", "config.json", "model.safetensors", "tokenizer.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth"]
CALM = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Training:
    """A training command and the file its output goes to."""

    folder: Path
    output_dir: Path
    processes: int
    workers: int

    def start(self) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        options = {
            **{"model_name_or_path": self.folder / "model", "dataset_name": self.folder / "sample/dataset"},
            **{"output_dir": self.output_dir, "max_seq_length": 67, "max_question_length": 16, "doc_stride": 24},
            **{"num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH // self.processes},
            **{"learning_rate": 1e-3, "train_windows": "random", "save_strategy": "steps", "save_steps": SAVE_STEPS},
            **{"logging_steps": 1, "disable_tqdm": "true", "dataloader_num_workers": self.workers},
        }
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, *(launcher if self.processes > 1 else []), str(ROOT / "run_qa.py"), *flags]
        with open(self.log, "w", encoding="utf-8") as log:
            cache = {"HF_HOME": str(self.folder / "cache")}
            return subprocess.Popen(
                [*command, "--do_train"], stdout=log, stderr=subprocess.STDOUT, env=os.environ | CALM | cache
            )

    @property
    def log(self) -> Path:
        return self.output_dir.with_suffix(".log")

    def finish(self) -> None:
        """Train to the end. Raises RuntimeError with the output if that fails."""
        if self.start().wait() != 0:
            raise RuntimeError(self.log.read_text(encoding="utf-8"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the places to kill at (1)")
    draw = random.Random(parser.parse_args().seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        steps = EPOCHS * -(-make_sample(folder) // BATCH)
        references = {}
        for processes in {processes for processes, _, _ in RUNS}:
            whole = Training(folder, folder / f"whole-{processes}", processes, 0)
            whole.finish()
            references[processes] = load_file(whole.output_dir / "model.safetensors")
        rows = []
        for number, (processes, workers, kills) in enumerate(RUNS):
            training = Training(folder, folder / f"killed-{number}", processes, workers)
            rows += killed_run(training, kills, steps, references[processes], draw)
    table = pd.DataFrame(rows)
    table.insert(0, "kill", range(1, len(table) + 1))
    print(table.to_string(index=False))
    late = ((table["processes"] == 2) & (table["epoch"] > 1) & (table["epoch"] % 1 != 0)).sum()
    incomplete = (table["newest checkpoint"] == "incomplete").sum()
    print(
        f"{len(table)} kills, {incomplete} with the newest checkpoint incomplete, {late} of two processes with two "
        f"data workers each in mid-epoch 2 or later; {(table['identical'] == 'yes').sum()} in runs that ended with "
        f"identical weights; {time.monotonic() - began:.0f} s"
    )
    return int(incomplete < LEAST_INCOMPLETE or late < LEAST_LATE or (table["identical"] != "yes").any())


def make_sample(folder: Path) -> int:
    """Write the sample, as a dataset, and the model to train; the number of training questions."""
    sizes = ["--train_passages", "80", "--dev_passages", "10", "--test_passages", "2"]
    for script, *flags in (
        ["make_sample.py", "--output_dir", folder / "sample", *sizes],
        ["prepare_drcd.py", "--data_dir", folder / "sample", "--output_dir", folder / "sample/dataset"],
    ):
        subprocess.run([sys.executable, ROOT / script, *flags], check=True, stdout=subprocess.DEVNULL)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sample/model")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )  # and BERT's own dropout of 0.1, so that the random state decides the weights
    BertForQuestionAnswering(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return len(json.loads((folder / "sample/hw7_train.json").read_text(encoding="utf-8"))["questions"])


def killed_run(training: Training, kills: int, steps: int, reference: dict, draw: random.Random) -> list[dict]:
    """Train with so many kills in between; a table row for each kill."""
    first = steps // EPOCHS + 1 if training.processes > 1 else 1
    last = steps - 4 * SAVE_STEPS  # enough checkpoints are left for the last kill to hit one
    bounds = [first + (last - first) * part // kills for part in range(kills + 1)]
    rows = []
    for kill in range(kills):
        least_step = draw.randint(bounds[kill], bounds[kill + 1] - 1)
        while_saving = bool(kill % 2)
        wait = wait_for_stage(draw.choice(STAGES)) if while_saving else wait_for_moment(draw.uniform(0, 0.3))
        rows.append(start_and_kill(training, least_step, wait))
        print(f"{training.output_dir.name}: kill {kill + 1} of {kills}: {rows[-1]}", file=sys.stderr, flush=True)
        if kill:
            rows[-2]["resumed from"] = resumed_from(training.log)
    training.finish()
    rows[-1]["resumed from"] = resumed_from(training.log)
    weights = load_file(training.output_dir / "model.safetensors")
    same = weights.keys() == reference.keys() and all(torch.equal(weights[name], reference[name]) for name in weights)
    return [row | {"identical": "yes" if same else "NO"} for row in rows]


def start_and_kill(training: Training, least_step: int, wait: Callable[[Path], bool]) -> dict:
    """Start training, kill it when `wait` is over for a checkpoint of `least_step` or later, and say where it was."""
    before = set(resume.checkpoints(training.output_dir))
    process = training.start()
    deadline = time.monotonic() + PATIENCE
    ranks: list[psutil.Process] = []
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            kill_tree(process, ranks)
            raise RuntimeError(f"not killed in time:\n{training.log.read_text(encoding='utf-8')}")
        new = [path for path in resume.checkpoints(training.output_dir) if path not in before]
        reached = [path for path in new if step_of(path) >= least_step]
        if not ranks and new:  # found early, for listing processes takes longer than writing a checkpoint
            ranks = psutil.Process(process.pid).children() if training.processes > 1 else [psutil.Process(process.pid)]
        if reached and wait(reached[0]):
            break
        time.sleep(0.0005)
    kill_tree(process, ranks)
    newest = resume.checkpoints(training.output_dir)[0]
    whole = resume.is_complete(newest, training.processes)
    epochs = re.findall(r"'loss': .*'epoch': '?([\d.]+)", training.log.read_text(encoding="utf-8", errors="replace"))
    return {
        "processes": training.processes,
        "workers": training.workers,
        "step": step_of(newest),
        "epoch": float(epochs[-1]),
        "newest checkpoint": "complete" if whole else "incomplete",
        "its files": len(list(newest.iterdir())),
    }


def wait_for_stage(name: str) -> Callable[[Path], bool]:
    """Over when a checkpoint is begun and has the file `name` (none: at once), and is not complete yet.

    If the first checkpoint that it is asked about gets complete unseen, any incomplete state of a later one will do.
    """
    first: list[Path] = []

    def over(checkpoint: Path) -> bool:
        first[:] = first or [checkpoint]
        begun = not name or checkpoint != first[0] or any(checkpoint.glob(name))
        return begun and not (checkpoint / "trainer_state.json").exists()

    return over


def wait_for_moment(seconds: float) -> Callable[[Path], bool]:
    """Over so many seconds after the first call."""
    until: list[float] = []

    def over(checkpoint: Path) -> bool:
        until[:] = until or [time.monotonic() + seconds]
        return time.monotonic() >= until[0]

    return over


def kill_tree(process: subprocess.Popen, ranks: list[psutil.Process]) -> None:
    """SIGKILL a process and all below it. The `ranks` are stopped first: none goes on while the others are listed."""
    for rank in ranks:
        os.kill(rank.pid, signal.SIGSTOP)
    family = psutil.Process(process.pid).children(recursive=True)
    for one in [process, *family]:
        try:
            os.kill(one.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    while any(map(alive, family)):
        time.sleep(0.01)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; orphans that nobody has buried yet do not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def resumed_from(log: Path) -> str:
    """The checkpoint's name from a log; "the start" if there was none to go on from."""
    found = re.search(r"resuming from .*?(checkpoint-\d+)", log.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else "the start"


if __name__ == "__main__":
    sys.exit(main())
