"""Nothing that comes with a model, a checkpoint or a dataset is run, and no name leads out of its folder."""

import os
import shutil

import conftest
import pytest
import torch
from datasets import Dataset
from test_run_qa import WINDOWS, save_model

import run_qa


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `model`, `data` (8 training questions) and `run`, a run of two steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("security")
    (folder / "data").mkdir()
    Dataset.from_dict(conftest.random_examples(8, seed=1)).to_parquet(folder / "data/train.parquet")
    save_model(folder / "model", "bert")
    run_qa.main(options_of(folder, folder / "run"))
    return folder


def options_of(place, out, model=None):
    named = ["--model_name_or_path", str(model or place / "model"), "--dataset_name", str(place / "data")]
    steps = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "4"]
    return [*named, "--output_dir", str(out), *WINDOWS, *steps]


def refused(argv, capsys):
    """The error line of a run that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run_qa.main([str(argument) for argument in argv])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(place, tmp_path, capsys, name):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-2")
    state = (tmp_path / "run/run.json").read_text(encoding="utf-8")
    (tmp_path / "run/run.json").write_text(state.replace('"finished": true', '"finished": false'), encoding="utf-8")
    torch.save(Evil(tmp_path / "pwned"), tmp_path / "run/checkpoint-1" / name)
    argv = options_of(place, tmp_path / "run")
    if name == "training_args.bin":  # nothing reads it
        run_qa.main(argv)
    else:
        assert "checkpoint-1 holds other objects than tensors and is not loaded" in refused(argv, capsys)
    assert not (tmp_path / "pwned").exists()
    torch.load(tmp_path / "run/checkpoint-1" / name, weights_only=False)
    assert (tmp_path / "pwned").exists()  # so it is a working one


def test_a_pickle_for_weights_is_not_run(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    torch.save(Evil(tmp_path / "pwned"), tmp_path / "model/pytorch_model.bin")
    assert "cannot be loaded" in refused(options_of(place, tmp_path / "out", tmp_path / "model"), capsys)
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_is_not_run(place, tmp_path, capsys):
    shutil.copytree(place / "model", tmp_path / "model")
    auto = (
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForQuestionAnswering": "evil.M"}}'
    )
    (tmp_path / "model/config.json").write_text(auto)
    (tmp_path / "model/evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n")
    error = refused(options_of(place, tmp_path / "out", tmp_path / "model"), capsys)
    assert "trust_remote_code" in error and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["script.py", "rows.pkl"])
def test_a_dataset_with_code_is_not_run(place, tmp_path, capsys, name):
    data = tmp_path / "script"
    data.mkdir()
    if name == "rows.pkl":
        torch.save(Evil(tmp_path / "pwned"), data / name)
    else:
        (data / name).write_text(f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n")
    error = refused([*options_of(place, tmp_path / "out"), "--dataset_name", data], capsys)
    assert "cannot be opened as a dataset" in error and not (tmp_path / "pwned").exists()


NAMES = [
    "../../x",
    "a/../../../x",
    "a/b/c",
    "..",
    "a\nb",
    "\udcff",
    "a b",
    "C:\\x",
    "file:///etc",
    "--",
    "x" * 300,
    "a/..",
    "~",
]


@pytest.mark.parametrize("option", ["--model_name_or_path", "--dataset_name"])
@pytest.mark.parametrize("name", NAMES)
def test_odd_names_are_refused_and_leave_nothing(place, tmp_path, monkeypatch, capsys, option, name):
    here = tmp_path / "one/two/three"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    named = {"--model_name_or_path": str(place / "model"), "--dataset_name": str(place / "data")} | {option: name}
    refused([f"{flag}={value}" for flag, value in named.items()], capsys)
    assert {path.name for path in tmp_path.rglob("*")} == {"one", "two", "three"}
    assert not list((tmp_path / "one").glob("**/*.*"))
