"""The real client against a Hub on loopback: pushed, loaded back, resumed from, and what faults leave behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import hub_server
import pytest
import test_run_qa
import yaml
from hub_server import CUT, TOKEN, HubServer
from test_run_qa import ROOT, assert_same_answers, nbest_of, options_of, same_weights, weights

import hub
import hub_errors

place = test_run_qa.place
REPOSITORY = "somebody/reader"
RUN = [*test_run_qa.SHORT, "--save_strategy", "steps", "--save_steps", "3", "--disable_tqdm", "true"]
PUSH = ["--push_to_hub", "--hub_model_id"]
ON_CHECKPOINTS = ["--hub_strategy", "checkpoint", "--hub_always_push", "true"]
# Import costs seconds, so one process runs the scripts of a machine, each by its `main(argv)`.
WORKER = """
import importlib, json, os, sys, traceback
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    script, argv = json.loads(line)
    code = 0
    try:
        importlib.import_module(script).main(argv)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    print(code, file=replies, flush=True)
"""


@dataclass
class Machine:
    """An empty folder with a cache and a login of its own, and what the scripts that ran there have said."""

    hub: HubServer
    folder: Path
    token: str | None = TOKEN
    said: str = ""
    process: subprocess.Popen = field(init=False)

    def __post_init__(self):
        self.folder.mkdir()
        environment = os.environ | self.hub.environment(self.folder / "home", self.token)
        environment["PYTHONPATH"] += f":{ROOT}"
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=self.folder,
                env=environment,
            )

    def run(self, script, *argv) -> int:
        """The exit code of a script; `said` is its output."""
        begin = (self.folder / "log").stat().st_size
        self.process.stdin.write(json.dumps([script, list(map(str, argv))]) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        self.said = (self.folder / "log").read_bytes()[begin:].decode()
        return code

    def must(self, script, *argv) -> str:
        assert self.run(script, *argv) == 0, self.said
        return self.said

    def refused(self, script, *argv) -> str:
        """The one line on stderr by which a script refuses."""
        assert self.run(script, *argv) == 2, self.said
        assert "Traceback" not in self.said and self.said.count("error: ") == 1
        return self.said.splitlines()[-1]


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Makes machines, and switches them off at the end."""
    made = []

    def make(hub, **options):
        made.append(Machine(hub, tmp_path_factory.mktemp("machine") / "m", **options))
        return made[-1]

    yield make
    for machine in made:
        machine.process.kill()
        machine.process.communicate()


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def healthy(server):
    yield
    server.heal()


@pytest.fixture(scope="module")
def first(server, machines):
    return machines(server, token=None)


@pytest.fixture(scope="module")
def second(server, machines):
    return machines(server)


def command(place, out, repository=REPOSITORY):
    return options_of(place, out, *RUN, *PUSH, repository)


@pytest.fixture(scope="module")
def pushed(place, server, first):
    """The folder of a run that was pushed when it ended; the token came as a flag."""
    out = first.folder / "outputs/reader"
    said = first.must("run_qa", *command(place, out), "--hub_token", TOKEN)
    assert f"pushed to {server.url}/{REPOSITORY}/commit/" in said
    return out


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_a_reader_needs_is_pushed_once_and_nothing_else(place, server, first, pushed):
    repository = server.repositories[f"models/{REPOSITORY}"]
    assert set(repository.files) == {
        *(".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("all_results.json", "submission.csv"),
        *(f"{split}_{kind}predictions.json" for split in ("eval", "test") for kind in ("", "nbest_")),
    }
    for name, content in repository.files.items():
        assert name == ".gitattributes" or content == (pushed / name).read_bytes()
    assert b"## How to ask it" in repository.files["README.md"]
    commits = len(repository.commits)
    before = (pushed / "model.safetensors").stat().st_mtime_ns
    said = first.must("run_qa", *command(place, pushed))
    assert "is trained already" in said and f"/commit/{repository.commits[-1][0]}" in said
    assert len(repository.commits) == commits or changed(repository) == {"all_results.json"}  # seconds of evaluation
    assert (pushed / "model.safetensors").stat().st_mtime_ns == before


def changed(repository):
    (_, _, before), (_, _, after) = repository.commits[-2:]
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def test_make_push_uploads_the_same_and_again_nothing(server, pushed, tmp_path):
    binaries = Path(sys.executable).parent
    environment = os.environ | server.environment(tmp_path / "home")

    def make(*arguments):
        given = ["make", "-o", ".venv/installed", "push", f"BIN={binaries}", *arguments]
        return subprocess.run(given, cwd=ROOT, env=environment, capture_output=True, text=True)

    for _ in range(2):
        done = make(f"RUN={pushed}", "REPO=somebody/by-make")
        assert done.returncode == 0, done.stderr
        mine, its = (server.repositories[f"models/somebody/{name}"] for name in ("by-make", "reader"))
        assert set(mine.files) == set(its.files) and len(mine.commits) == 2
    (tmp_path / "ensemble").mkdir()
    (tmp_path / "ensemble/submission.csv").write_text("ID,Answer\n")
    done = make(f"RUN={tmp_path / 'ensemble'}", "REPO=somebody/ensemble")
    assert done.returncode != 0 and "holds no model that could be loaded" in done.stderr
    assert "models/somebody/ensemble" not in server.repositories


def test_loaded_back_in_an_empty_place_it_gives_the_same_answers(place, pushed, second):
    again = ["--model_name_or_path", REPOSITORY, "--dataset_name", place / "data/drcd", "--do_eval", "--do_predict"]
    second.must("run_qa", *again)
    for split in ("eval", "test"):
        assert_same_answers(nbest_of(pushed, split), nbest_of(second.folder / "outputs/reader", split))
    mine, its = (
        json.loads((out / "all_results.json").read_text()) for out in (pushed, second.folder / "outputs/reader")
    )
    assert [mine[f"eval_{name}"] for name in ("exact_match", "f1")] == [
        its[f"eval_{name}"] for name in ("exact_match", "f1")
    ]
    line = second.refused("run_qa", *again, "--output_dir", second.folder / "new", *PUSH, REPOSITORY)
    assert "holds no trained model to push" in line


FAULTS = {
    "expired token": ("whoami|repos/create|preupload|commit", 401, "log in by `hf auth login`"),
    "no right to write": ("commit", 403, "one that may write to this repository"),
    "out of order": ("preupload|commit", 503, "the Hub is out of order (503): try again later"),
    "connection cut midway": ("commit", CUT, "the connection to the Hub broke"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_the_run_is_kept_and_can_be_pushed_again(place, server, first, pushed, fault):
    where, what, advice = FAULTS[fault]
    out, repository = first.folder / f"outputs/{what}", f"somebody/fault-{what}".lower()
    shutil.copytree(pushed, out)
    server.fail(where, what)
    line = first.refused("run_qa", *command(place, out, repository))
    assert advice in line and repository in line and str(out) in line
    kept = contents(out)
    for name in ("model.safetensors", "checkpoint-16/optimizer.pt", "submission.csv"):
        assert kept[Path(name)] == (pushed / name).read_bytes()
    server.heal()
    said = first.must("run_qa", *command(place, out, repository))
    assert "is trained already" in said
    files = server.repositories[f"models/{repository}"].files
    assert files["model.safetensors"] == (pushed / "model.safetensors").read_bytes()
    assert set(files) == set(server.repositories[f"models/{REPOSITORY}"].files)


def test_without_access_a_run_does_not_begin_and_short_faults_are_not_felt(place, server, first, pushed):
    out = first.folder / "outputs/late"
    for where, what, repository in [("whoami", 401, REPOSITORY), ("repos", 403, "somebody/late"), ("who", CUT, "late")]:
        server.fail(where, what)
        line = first.refused("run_qa", *command(place, out, repository))
        assert f"--push_to_hub: no access to the repository {repository}" in line and not out.exists()
        server.heal()
    shutil.copytree(pushed, out)
    for what in (503, CUT):
        server.fail("commit", what, times=1)
    first.must("run_qa", *command(place, out, "somebody/late"))
    assert len(server.repositories["models/somebody/late"].commits) == 2


def test_failing_uploads_do_not_touch_the_training(place, server, second, pushed):
    """The first two of seven saves cannot be pushed; training ends as ever, and the repository holds the last save."""
    out = second.folder / "outputs/unlucky"
    server.fail("commit", 403, times=2)
    said = second.must("run_qa", *command(place, out, "somebody/unlucky"), *ON_CHECKPOINTS)
    assert said.count("was not pushed to somebody/unlucky") == 2 and "2 uploads of checkpoints" in said
    assert same_weights(weights(pushed), weights(out)) and nbest_of(pushed) == nbest_of(out)
    assert not list(out.glob(".push-*"))
    files = server.repositories["models/somebody/unlucky"].files
    assert json.loads(files["last-checkpoint/trainer_state.json"])["global_step"] == 16
    assert not [name for name in files if name.endswith("training_args.bin")]


@pytest.fixture(scope="module")
def killed(place, server, tmp_path_factory):
    """The Hub holds the checkpoint of step 12 of a run that was then killed, its machine gone."""
    folder = tmp_path_factory.mktemp("gone")
    server.fail("commit", 503, spared=5)  # saves at 3, 6, 8, 9, 12
    argv = [*command(place, "outputs/run", "somebody/moving"), *ON_CHECKPOINTS]
    process = test_run_qa.run_process(*argv, cwd=folder, env=os.environ | server.environment(folder / "home"))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        repository = server.repositories.get("models/somebody/moving")
        if repository and len(repository.commits) == 6:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    server.heal()
    assert repository.commits[-1][1] == "Training, step 12"
    shutil.rmtree(folder)
    return repository


RESUME = [*ON_CHECKPOINTS, "--resume_from_checkpoint", "last-checkpoint"]


def test_a_run_goes_on_elsewhere_from_the_hub_to_the_same_weights(place, server, second, pushed, killed):
    best = json.loads(killed.files["last-checkpoint/trainer_state.json"])["best_model_checkpoint"]
    assert Path(best).name == "checkpoint-8"  # so that the best one, too, must come from the Hub
    out = second.folder / "outputs/moved"
    said = second.must("run_qa", *command(place, out, "somebody/moving"), *RESUME)
    assert "going on from checkpoint-12, from the Hub" in said and f"resuming from {out / 'checkpoint-12'}" in said
    assert same_weights(weights(pushed), weights(out))
    for split in ("eval", "test"):
        assert nbest_of(pushed, split) == nbest_of(out, split)
    assert (out / "checkpoint-8/model.safetensors").read_bytes() == killed.files["best-checkpoint/model.safetensors"]
    scores = [json.loads((folder / "all_results.json").read_text())["eval_exact_match"] for folder in (pushed, out)]
    assert scores[0] == scores[1] and not list(out.glob("checkpoint-3"))
    said = second.must("run_qa", *command(place, out, "somebody/moving"), *RESUME)
    assert "from the Hub" not in said and "is trained already" in said


def test_what_cannot_be_gone_on_from_is_told(place, server, second, killed, tmp_path):
    def files_of(name, files):
        server.repositories[f"models/somebody/{name}"] = hub_server.Repository()
        server.repositories[f"models/somebody/{name}"].commit(name, files)

    def without(name):
        return {path: content for path, content in killed.commits[5][2].items() if path != name}

    whole = without(None)
    state = json.loads(whole["last-checkpoint/trainer_state.json"])
    escaping = json.dumps(state | {"global_step": "../../x"}).encode()
    files_of("bare", {"README.md": b""})
    files_of("cut", without("last-checkpoint/optimizer.pt"))
    files_of("bestless", without("best-checkpoint/model.safetensors"))
    files_of("nameless", without("last-checkpoint/run.json"))
    files_of("escaping", whole | {"last-checkpoint/trainer_state.json": escaping})
    files_of("whole", whole)
    for name, message in {
        "bare": "has no last-checkpoint",
        "cut": "not a complete checkpoint",
        "bestless": "the best-checkpoint of its run is missing",
        "nameless": "not a complete checkpoint of a run",
        "escaping": "has no number",
        "none": "cannot be had",
    }.items():
        resume = ["--hub_model_id", f"somebody/{name}", "--resume_from_checkpoint", "last-checkpoint"]
        line = second.refused("run_qa", *options_of(place, tmp_path / name, *RUN, *resume))
        assert message in line and not (tmp_path / name / "run.json").exists()
    line = second.refused("run_qa", *options_of(place, tmp_path / "new", *RUN, *resume[2:]))
    assert "name its repository by --hub_model_id" in line
    resume = ["--hub_model_id", "somebody/whole", "--resume_from_checkpoint", "last-checkpoint"]
    line = second.refused("run_qa", *options_of(place, tmp_path / "other", *RUN, "--seed", 7, *resume))
    assert "was begun with other options (seed: 42 there, 7 now)" in line


def test_the_card_says_all_and_its_code_answers_as_the_run_did(place, server, pushed, tmp_path):
    """In an empty folder with nothing of this project: the best span of every test question, of one window or many."""
    text = (pushed / "README.md").read_text(encoding="utf-8")
    results = json.loads((pushed / "all_results.json").read_text())
    head = yaml.safe_load(text.split("---\n")[1])
    (measured,) = head["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in measured["metrics"]} == {
        name: results[f"eval_{name}"] for name in ("exact_match", "f1")
    }
    for name in ("exact_match", "f1"):
        assert f"| {name} | {results[f'eval_{name}']:.5f} |" in text
    for part in ("## Licence", "## Limits", "Kaggle", "transformers 5", "torch 2", f'NAME = "{REPOSITORY}"'):
        assert part in text
    assert str(place) not in text and "base_model" not in head and "license" not in head
    (snippet,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    course = json.loads((place / "hw7_test.json").read_text(encoding="utf-8"))
    asked = [(q["question_text"], course["paragraphs"][q["paragraph_id"]]) for q in course["questions"]]
    (tmp_path / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    (tmp_path / "card.md").write_text(text, encoding="utf-8")
    more = """
import json, huggingface_hub
card = huggingface_hub.ModelCard.load("card.md")
card.validate()
print(json.dumps([[metric.metric_type for metric in card.data.eval_results]]))
asked = json.load(open("asked.json"))
print(json.dumps([len(tokenizer(paragraph, add_special_tokens=False)["input_ids"]) for _, paragraph in asked]))
print(json.dumps([answer(*pair) for pair in asked]))
"""
    done = subprocess.run(
        [sys.executable, "-c", snippet + more],
        cwd=tmp_path,
        env=os.environ | server.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metrics, lengths, answers = map(json.loads, done.stdout.splitlines()[1:])
    assert metrics == [["exact_match", "f1"]]
    assert answers == [candidates[0]["text"] for candidates in nbest_of(pushed).values()]
    room = 64 - 16 - 3
    assert any(length <= room for length in lengths) and any(length > 2 * room for length in lengths)


def test_a_dataset_is_pushed_through_faults_and_trained_on_from_the_hub(place, machines, tmp_path):
    """With files that go by LFS: the connection breaks while one of them is uploaded."""
    with HubServer(lfs=True) as server:
        machine = machines(server)
        prepare = ["--data_dir", place, "--output_dir", "data/drcd", "--push_to_hub", "somebody/drcd"]
        for where, what, advice in [("PUT /lfs", CUT, "the connection to the Hub broke"), *FAULTS.values()]:
            server.fail(where, what)
            line = machine.refused("prepare_drcd", *prepare)
            assert advice in line and "the local folder" in line and "same command again" in line
            assert contents(machine.folder / "data/drcd") == contents(place / "data/drcd")
            assert TOKEN not in machine.said
            server.heal()
        for _ in range(2):
            assert f"Pushed to {server.url}/datasets/somebody/drcd" in machine.must("prepare_drcd", *prepare)
        repository = server.repositories["datasets/somebody/drcd"]
        assert len(repository.commits) == 2
        assert {
            Path(name): repository.files[name] for name in repository.files if name != ".gitattributes"
        } == contents(place / "data/drcd")
        run = ["--model_name_or_path", place / "model", "--dataset_name", "somebody/drcd", "--output_dir", "out"]
        machine.must("run_qa", *run, *RUN, *PUSH, "somebody/by-lfs")
        assert len(nbest_of(machine.folder / "out")) == 20
        card = yaml.safe_load((machine.folder / "out/README.md").read_text(encoding="utf-8").split("---\n")[1])
        assert card["datasets"] == ["somebody/drcd"]
        files = server.repositories["models/somebody/by-lfs"].files
        assert files["model.safetensors"] == (machine.folder / "out/model.safetensors").read_bytes()


def test_the_token_is_nowhere(server, first, second, pushed):
    """Of all that the tests above wrote, said and pushed; run last."""
    line = first.refused("run_qa", f"--hub_tokn={TOKEN}")
    assert "did you mean '--hub_token'" in line
    assert (pushed / "training_args.bin").exists()
    for machine in (first, second):
        files = contents(machine.folder)
        assert files[Path("log")] or machine is second
        assert not [path for path, content in files.items() if TOKEN.encode() in content]
    for repository in server.repositories.values():
        assert not [name for name, content in repository.files.items() if TOKEN.encode() in content]


def test_every_fault_is_told_in_a_line_without_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of another shape")
    for error in (ValueError(f"bad\nheader Bearer {TOKEN}"), OSError("of another shape"), RuntimeError(f"x{TOKEN}x")):
        told = hub_errors.reason(error)
        assert TOKEN not in told and "another shape" not in told and "\n" not in told and "***" in told


def test_what_is_staged_outlives_its_checkpoint(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for name in ("model.safetensors", "optimizer.pt", "training_args.bin"):
        (tmp_path / "checkpoint-3" / name).write_text(name)
    staged = hub.stage(tmp_path, 3, None, hub.HubStrategy.ALL_CHECKPOINTS)
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert set(contents(staged)) == {Path("checkpoint-3/model.safetensors"), Path("checkpoint-3/optimizer.pt")}
