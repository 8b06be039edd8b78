"""run_qa.py in several processes: two on one machine, and two machines, which are network namespaces with a link."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import psutil
import pytest
from test_run_qa import assert_same_answers, nbest_of

import prepare_drcd
import resume
import run_qa

ROOT = Path(run_qa.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
OPTIONS = ["--max_seq_length", "64", "--max_question_length", "16", "--doc_stride", "24", "--learning_rate", "1e-3"]
OPTIONS += ["--max_steps", "8", "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "4"]
STRANGER = 12345  # group of the second machine's files


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A dataset of paragraphs of all lengths, and a model without dropout."""
    folder = tmp_path_factory.mktemp("sample")
    for split, count in (("train", 64), ("validation", 20), ("test", 20)):
        examples = conftest.random_examples(count, seed=count)
        paragraphs = [
            {"context": context, "qas": [{"id": id_, "question": question, "answers": [
                {"text": answers["text"][0], "answer_start": answers["answer_start"][0]}]}]}
            for id_, question, context, answers in zip(*examples.values(), strict=True)
        ]  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")
    files = [text for split in ("train", "validation", "test")
             for text in (f"--{split}_files", str(folder / f"{split}.json"))]  # fmt: skip
    prepare_drcd.main([*files, "--output_dir", str(folder / "dataset")])
    tokenizer = conftest.make_tokenizer("bert")
    for part in (tokenizer, conftest.make_model("bert", tokenizer)):
        part.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def one(sample, tmp_path_factory):
    """The run of one process."""
    out = tmp_path_factory.mktemp("one") / "run"
    run_qa.main(command(sample, out, batch=16))
    return out


@pytest.fixture
def link():
    """Two network namespaces: of each, its name and its end of the link between them, at 10.77.0.1 and 10.77.0.2."""
    ends = [(f"qa{os.getpid()}{end}", f"qa{end}{os.getpid()}") for end in "ab"]
    (first, device), (second, other) = ends
    setup = [f"ip netns add {first}", f"ip netns add {second}"]
    setup += [f"ip link add {device} netns {first} type veth peer name {other} netns {second}"]
    for number, (name, end) in enumerate(ends, 1):
        setup += [f"ip -n {name} address add 10.77.0.{number}/24 dev {end}"]
        setup += [f"ip -n {name} link set {end} up", f"ip -n {name} link set lo up"]
    try:
        for line in setup:
            try:
                subprocess.run(line.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = getattr(error, "stderr", None) or error
                pytest.skip(f"no network namespaces to be two machines: `{line}`: {str(reason).strip()}")
        yield ends
    finally:
        for name, _ in ends:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def command(sample, out, *more, batch):
    options = ["--model_name_or_path", sample / "model", "--dataset_name", sample / "dataset", "--output_dir", out]
    return list(map(str, [*options, *OPTIONS, "--per_device_train_batch_size", batch, *more]))


def start(*arguments, launcher, **kwargs):
    script = [str(ROOT / "run_qa.py"), *map(str, arguments)]
    kwargs["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.get("env", {})
    return subprocess.Popen([*launcher, *script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def two_processes(*arguments):
    return [start(*arguments, launcher=[*TORCHRUN, "--standalone", "--nproc_per_node", "2"])]


def two_machines(*arguments, link):
    nodes = []
    for rank, (name, device) in enumerate(link):
        nodes.append(
            start(
                *arguments,
                launcher=["ip", "netns", "exec", name, *TORCHRUN, *node(rank, "10.77.0.1")],
                env={"GLOO_SOCKET_IFNAME": device},
                group=STRANGER if rank else None,
            )
        )
    return nodes


def node(rank, address):
    return ["--nnodes", "2", "--node_rank", str(rank), "--master_addr", address, "--master_port", "29631"]


def ends_of(processes, seconds=240):
    """Exit code and output of every process."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def losses_of(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize("launch", ["two processes", "two machines"])
def test_they_train_and_answer_as_one(sample, one, tmp_path, request, launch):
    """Half the batch in each of two: the losses of one process; of that model, the answers of one process."""
    out = tmp_path / "out"
    arguments = command(sample, out, "--do_train", "--do_eval", "--do_predict", batch=8)
    if launch == "two machines":
        processes = two_machines(*arguments, link=request.getfixturevalue("link"))
    else:
        processes = two_processes(*arguments)
    ends = ends_of(processes)
    assert [code for code, _ in ends] == [0] * len(processes), ends
    assert sum(output.count("everything is in") for _, output in ends) == 1  # only the main process reports
    assert len(losses_of(one)) == 8 and losses_of(out) == pytest.approx(losses_of(one), abs=1e-4)
    run_qa.main(command(sample, tmp_path / "again", "--do_eval", "--do_predict", "--model_name_or_path", out, batch=8))
    for split in ("eval", "test"):
        assert_same_answers(nbest_of(tmp_path / "again", split), nbest_of(out, split))
    mine, its = (json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("out", "again"))
    assert mine["eval_exact_match"] == its["eval_exact_match"] and mine["eval_f1"] == pytest.approx(its["eval_f1"])
    if launch == "two machines":  # the second one writes nothing but its random state
        written = {path.name for path in out.rglob("*") if path.stat().st_gid == STRANGER}
        assert written <= {"rng_state_1.pth", "checkpoint-4", "checkpoint-8"} and "rng_state_1.pth" in written


def test_when_one_of_two_dies_the_job_ends_with_a_message(sample, tmp_path):
    out = tmp_path / "out"
    (job,) = two_processes(*command(sample, out, "--do_train", "--max_steps", "100000", batch=8))
    deadline = time.monotonic() + 120
    while not resume.checkpoints(out) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = psutil.Process(job.pid).children()
    os.kill(next(rank.pid for rank in ranks if rank.environ()["RANK"] == "1"), signal.SIGKILL)
    ((code, output),) = ends_of([job], seconds=60)
    assert code == 1 and "Signal 9 (SIGKILL) received" in output
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


def test_machines_without_a_shared_disk_are_told_so(sample, one, tmp_path):
    """The same relative folder from two working directories, each with a copy of the same run."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        shutil.copytree(one, machine / "out")
    before = sorted(tmp_path.rglob("*"))
    arguments, nodes = command(sample, "out", batch=8), []
    for rank, machine in enumerate(machines):
        nodes.append(start(*arguments, launcher=[*TORCHRUN, *node(rank, "127.0.0.1")], cwd=machine))
    for code, output in ends_of(nodes):
        assert code == 1 and "error: out is not one folder for all processes: number 1 of 2 (from 0)" in output, output
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_first_machine_refuses_ends_all_of_them(sample, tmp_path):
    """Only the first process looks for files of others in the folder, behind which the second one must not wait."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "submission.csv").write_text("mine", encoding="utf-8")
    arguments = command(sample, out, "--do_train", batch=8)
    nodes = [start(*arguments, launcher=[*TORCHRUN, *node(rank, "127.0.0.1")]) for rank in range(2)]
    for code, output in ends_of(nodes, seconds=120):
        assert code == 1 and "error: " in output and "holds submission.csv, which is no run's" in output, output
    assert [path.name for path in out.iterdir()] == ["submission.csv"]
