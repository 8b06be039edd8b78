"""What each lever of the course buys: the baselines' recipes on the generated sample, one lever a row.

Trains the small model of the sample from scratch with the windows and schedules of the simple, medium and strong
recipes, several seeds each, and evaluates it with their ways of choosing a span; the boss rung is an ensemble. Prints
the ladder and writes `outputs/ladder/ladder.json`: rows with `name`, `exact_match_mean`, `exact_match_std` (over
seeds), `interval` (95%, bootstrap over seeds and questions), `seeds` and `exact_match` (one value a seed).

    make ladder
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from files import UserError
from options import command

CONFIG = Path(__file__).parent.parent / "configs" / "ladder.yaml"
SIDE_BY_SIDE, OVERLAPPING = ["--doc_stride", "48"], ["--doc_stride", "12"]  # of windows of 48 paragraph tokens
INDEPENDENT, JOINT = ["--span_choice", "independent"], ["--span_choice", "joint"]
CENTERED, RANDOM = ["--train_windows", "centered"], ["--train_windows", "random"]
CONSTANT, LINEAR = ["--lr_scheduler_type", "constant", "--warmup_steps", "0"], ["--lr_scheduler_type", "linear"]

# One model is trained for each of these and each seed.
TRAININGS = {"constant": CENTERED + CONSTANT, "decay": CENTERED + LINEAR, "random": RANDOM + LINEAR}

# The ladder: name, which of the models, how its windows lie and its spans are chosen.
RUNGS = [
    ("simple (the sample code)", "constant", SIDE_BY_SIDE + INDEPENDENT),
    ("  + linear learning-rate decay", "decay", SIDE_BY_SIDE + INDEPENDENT),
    ("medium: + overlapping windows", "decay", OVERLAPPING + INDEPENDENT),
    ("  + random training windows", "random", OVERLAPPING + INDEPENDENT),
    ("strong: + joint span search", "random", OVERLAPPING + JOINT),
]
ENSEMBLE = "boss: + ensemble of {} seeds"
ENSEMBLE_SIZE = 3


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/sample"), help="folder of make_sample.py, prepared")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ladder"))
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    started = time.monotonic()
    seeds = range(1, arguments.seeds + 1)
    climb(arguments.data, arguments.output_dir, seeds)
    rows = [row(name, [right(arguments.output_dir / folder(number, seed), arguments.data) for seed in seeds])
            for number, (name, *_) in enumerate(RUNGS)]  # fmt: skip
    boss = [ensemble(arguments.output_dir, seeds, first, arguments.data) for first in seeds]
    rows.append(row(ENSEMBLE.format(min(ENSEMBLE_SIZE, len(seeds))), boss))
    (arguments.output_dir / "ladder.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    print(f"\n{'exact match on the dev set of the sample':<42}{'mean':>8}{'std':>8}   95% interval")
    for each in rows:
        low, high = each["interval"]
        print(
            f"{each['name']:<42}{each['exact_match_mean']:>8.4f}{each['exact_match_std']:>8.4f}   "
            f"{low:.4f} to {high:.4f}"
        )
    print(f"{len(seeds)} seeds a rung, {(time.monotonic() - started) / 60:.1f} minutes, {os.cpu_count()} cores")


def climb(data: Path, output_dir: Path, seeds: range) -> None:
    """Train and evaluate every rung with every seed, a process a core and a thread a process."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("spawn")  # fork would copy the threads' locks
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        jobs = {
            pool.submit(train_and_evaluate, data, output_dir, training, seed): f"{training}, seed {seed}"
            for seed, training in itertools.product(seeds, TRAININGS)
        }
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            print(f"{done}/{len(jobs)} trained: {jobs[job]}", flush=True)


def train_and_evaluate(data: Path, output_dir: Path, training: str, seed: int) -> None:
    """Train one model (unless a run before did) and answer the dev set on every rung that uses it."""
    import run_qa

    model = output_dir / f"{training}-{seed}"
    shared = ["--config", CONFIG, "--dataset_name", data / "dataset", "--disable_tqdm", "true"]
    train = ["--model_name_or_path", data / "model", "--output_dir", model, "--seed", seed, "--do_train"]
    commands = [shared + train + TRAININGS[training]]
    for number, (_, own, evaluation) in enumerate(RUNGS):
        if own == training:
            answer = ["--model_name_or_path", model, "--output_dir", output_dir / folder(number, seed), "--do_eval"]
            commands.append(shared + answer + evaluation)
    log = output_dir / f"{training}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        for command in commands:
            try:
                run_qa.main(list(map(str, command)))
            except SystemExit:
                raise UserError(f"{training}, seed {seed}, did not end well: see {log}") from None


def folder(number: int, seed: int) -> str:
    """Where the answers of a rung lie."""
    return f"rung-{number}-{seed}"


def ensemble(output_dir: Path, seeds: range, first: int, data: Path) -> np.ndarray:
    """`right` of the ensemble of `ENSEMBLE_SIZE` strong models from seed `first` on, around the end."""
    import postprocess

    last = len(RUNGS) - 1
    members = [(first - 1 + i) % len(seeds) + 1 for i in range(min(ENSEMBLE_SIZE, len(seeds)))]
    runs = [str(output_dir / folder(last, seed)) for seed in members]
    with contextlib.redirect_stdout(None):
        postprocess.main([*runs, "--output_dir", str(output_dir / f"boss-{first}")])
    return right(output_dir / f"boss-{first}", data)


def right(run: Path, data: Path) -> np.ndarray:
    """Which dev questions a run answers exactly, [questions]."""
    from metrics.drcd.drcd import exact_match

    predictions = json.loads((run / "eval_predictions.json").read_text(encoding="utf-8"))
    course = json.loads((data / "hw7_dev.json").read_text(encoding="utf-8"))
    return np.array([exact_match(predictions[str(q["id"])], [q["answer_text"]]) for q in course["questions"]])


def row(name: str, outcomes: list[np.ndarray]) -> dict:
    """A row of the ladder from `right` of every seed."""
    table = np.stack(outcomes).astype(float)
    generator = np.random.default_rng(0)
    seeds, questions = table.shape
    means = [
        table[generator.integers(seeds, size=seeds)][:, generator.integers(questions, size=questions)].mean()
        for _ in range(2000)
    ]
    return {
        "name": name.strip(),
        "exact_match_mean": table.mean(),
        "exact_match_std": table.mean(axis=1).std(ddof=1) if seeds > 1 else 0.0,
        "interval": np.percentile(means, [2.5, 97.5]).tolist(),
        "seeds": list(range(1, seeds + 1)),
        "exact_match": table.mean(axis=1).tolist(),
    }


if __name__ == "__main__":
    main()
