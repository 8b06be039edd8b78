"""`--report_to tensorboard`: what TensorBoard then shows of a run, and that it lies in the run's folder."""

import json

import pytest
from test_run_qa import WINDOWS, options_of, place, run  # noqa: F401

reading = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
)


def test_tensorboard_shows_loss_rate_and_scores(place, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    more = [
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "8",
        "--logging_steps",
        "1",
        "--eval_strategy",
        "steps",
    ]
    run(*options_of(place, out, *WINDOWS, *more, "--eval_steps", "2", "--report_to", "tensorboard"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder,) = {path.parent for path in out.glob("runs/*/events.out.tfevents.*")}  # one curve of all their files
    shown = reading.EventAccumulator(str(folder)).Reload()

    def curve(tag):
        return [(point.step, pytest.approx(point.value, rel=1e-5)) for point in shown.Scalars(tag)]

    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for name, steps in (("loss", 4), ("learning_rate", 4), ("train_exact_match", 4), ("questions_per_second", 4)):
        assert curve(f"train/{name}") == [(entry["step"], entry[name]) for entry in log if name in entry]
        assert len(curve(f"train/{name}")) == steps
    for name in ("exact_match", "f1", "loss"):
        scored = [(entry["step"], entry[f"eval_{name}"]) for entry in log if "eval_loss" in entry]
        assert curve(f"eval/{name}")[: len(scored)] == scored and scored[0][0] == 2
