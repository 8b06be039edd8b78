"""A full disk and a folder that cannot be written to: one clear line, and nothing that was there is lost."""

import hashlib
import json
import re
import subprocess

import conftest
import pytest

import make_sample
import prepare_drcd
import resume
import run_qa

FILL = "filling"  # takes the room that a test wants taken


@pytest.fixture
def disk(tmp_path):
    """A file system of 16 MB of its own, mounted at a folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        pytest.skip(f"no small disk can be mounted to be filled: {str(reason).strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    sizes = ["--train_passages", "12", "--dev_passages", "3", "--test_passages", "3"]
    make_sample.main(["--output_dir", str(folder), *sizes])
    prepare_drcd.main(["--data_dir", str(folder), "--output_dir", str(folder / "dataset")])
    tokenizer = conftest.make_tokenizer("bert")
    for part in (tokenizer, conftest.make_model("bert", tokenizer)):
        part.save_pretrained(folder / "tiny")
    return folder


def mount(*arguments):
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True, text=True)


def leave(disk, size):
    """Fill the disk but for so many bytes."""
    (disk / FILL).unlink(missing_ok=True)
    free = subprocess.run(["df", "--output=avail", "-B1", str(disk)], capture_output=True, text=True).stdout.split()[1]
    (disk / FILL).write_bytes(bytes(max(0, int(free) - size)))


def state(folder):
    """Every file but the filling, with the digest of what is in it."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != FILL
    }


def refusal(main, argv, capsys):
    """The one error line of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in argv])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    return errors[0]


def training(sample, out):
    options = ["--model_name_or_path", sample / "tiny", "--dataset_name", sample / "dataset", "--output_dir", out]
    options += ["--max_seq_length", "48", "--max_question_length", "16", "--max_steps", "6", "--do_train"]
    return [*options, "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--save_total_limit", 9]


@pytest.mark.parametrize("room", [0.02, 0.3, 0.5, 0.7, 0.9])
def test_training_on_a_disk_that_fills_up_loses_no_checkpoint_and_goes_on(sample, disk, tmp_path, capsys, room):
    """Room for one checkpoint and a share of the next, so that another file of it is the one that fails."""
    whole, out = tmp_path / "whole", disk / "out"
    run_qa.main([str(argument) for argument in training(sample, whole)])
    size = sum(path.stat().st_size for path in (whole / "checkpoint-2").iterdir())
    leave(disk, int(size * (1 + room)) + 40_000)
    assert f"error: {out}: cannot be written: " in refusal(run_qa.main, training(sample, out), capsys)
    assert resume.last_complete_checkpoint(out, [1]) == out / "checkpoint-2"
    leave(disk, 15_000_000)
    run_qa.main([str(argument) for argument in training(sample, out)])
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_answers_and_datasets_stay_as_they_were_on_a_full_disk(sample, disk, capsys):
    run_qa.main([str(argument) for argument in training(sample, disk / "out")])
    answers = ["--model_name_or_path", disk / "out", "--dataset_name", sample / "dataset", "--output_dir", disk / "out"]
    answers += ["--do_eval", "--do_predict"]
    dataset = ["--data_dir", sample, "--output_dir", disk / "dataset"]
    again = ["--output_dir", disk / "sample", "--train_passages", "2", "--dev_passages", "1", "--test_passages", "1"]
    commands = ((run_qa.main, answers), (prepare_drcd.main, dataset), (make_sample.main, again))
    for main, argv in commands:
        main([str(argument) for argument in argv])
    before = state(disk)
    for main, argv in commands:
        leave(disk, 8192)
        assert re.search("cannot be written: .*No space left on device", refusal(main, argv, capsys))
        assert state(disk) == before
    assert json.loads((disk / "out/eval_predictions.json").read_text(encoding="utf-8"))


def test_a_folder_that_cannot_be_written_to(sample, disk, capsys):
    """Read-only, for root may write to every folder whatever its mode."""
    run_qa.main([str(argument) for argument in training(sample, disk / "out")])
    before = state(disk)
    mount("-o", "remount,ro", disk)
    answers = ["--model_name_or_path", disk / "out", "--dataset_name", sample / "dataset", "--output_dir", disk / "out"]
    for main, argv in (
        (run_qa.main, [*training(sample, disk / "out"), "--fresh_start"]),
        (run_qa.main, training(sample, disk / "new")),
        (run_qa.main, [*answers, "--do_predict"]),
        (prepare_drcd.main, ["--data_dir", sample, "--output_dir", disk / "dataset"]),
        (make_sample.main, ["--output_dir", disk / "sample"]),
    ):
        assert "Read-only file system" in (error := refusal(main, argv, capsys)) and str(disk) in error
    assert state(disk) == before
