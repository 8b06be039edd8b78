"""run_qa.py end to end on a tiny model: what it writes, what it refuses, and what must not change an answer."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, CanineConfig, CanineTokenizer

import prepare_drcd
import resume
import run_qa
import scoring
import splits
import trainer
import windows
from postprocess import choose

ROOT = Path(run_qa.__file__).parent
WINDOWS = ["--max_seq_length", "64", "--max_question_length", "16", "--doc_stride", "20"]
SHORT = [*WINDOWS, "--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--save_total_limit", "9"]


def course_json(examples, labelled=True):
    contexts = list(dict.fromkeys(examples["context"]))
    questions = [
        {
            "id": int(id_),
            "paragraph_id": contexts.index(context),
            "question_text": question,
            "answer_text": answers["text"][0] if labelled else None,
            "answer_start": answers["answer_start"][0] if labelled else None,
            "answer_end": answers["answer_start"][0] + len(answers["text"][0]) - 1 if labelled else None,
        }
        for id_, question, context, answers in zip(*examples.values(), strict=True)
    ]
    return json.dumps({"questions": questions, "paragraphs": contexts}, ensure_ascii=False)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with `model` (random BERT) and `data/drcd` (60 train, 30 dev, 20 test questions)."""
    folder = tmp_path_factory.mktemp("place")
    for name, count, seed in (("train", 60, 11), ("dev", 30, 12), ("test", 20, 13)):
        content = course_json(conftest.random_examples(count, seed), labelled=name != "test")
        (folder / f"hw7_{name}.json").write_text(content, encoding="utf-8")
    prepare_drcd.main(["--data_dir", str(folder), "--output_dir", str(folder / "data/drcd")])
    save_model(folder / "model", "bert")
    return folder


def save_model(folder, family):
    tokenizer = conftest.make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    conftest.make_model(family, tokenizer).save_pretrained(folder)


def options_of(place, out, *more, model=None):
    model = model or place / "model"
    return ["--model_name_or_path", model, "--dataset_name", place / "data/drcd", "--output_dir", out, *more]


def run(*arguments):
    run_qa.main([str(argument) for argument in arguments])


def run_process(*arguments, launcher=(sys.executable,), **kwargs):
    command = [*launcher, str(ROOT / "run_qa.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def nbest_of(folder, split="test"):
    return json.loads((folder / f"{split}_nbest_predictions.json").read_text(encoding="utf-8"))


def assert_same_answers(one, other):
    """The same texts and spans in the same order; scores within 1e-5."""
    assert one.keys() == other.keys()
    for id_, candidates in one.items():
        for mine, its in zip(candidates, other[id_], strict=True):
            assert (mine["text"], mine["start"], mine["end"]) == (its["text"], its["start"], its["end"])
            assert mine["score"] == pytest.approx(its["score"], abs=1e-5)


@pytest.fixture(scope="session")
def trained(place, tmp_path_factory):
    """The folder of a run of 16 steps in two epochs, with a checkpoint every 3 steps."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(*options_of(place, out, *SHORT, "--save_strategy", "steps", "--save_steps", "3", "--logging_steps", "1"))
    return out


def test_a_run_writes_all_it_promises(place, trained):
    results = json.loads((trained / "all_results.json").read_text())
    assert 0 <= results["eval_exact_match"] <= results["eval_f1"] <= 1
    assert results["eval_samples"] == 30 and results["test_samples"] == 20
    contexts = {}
    for split, count in (("eval", 30), ("test", 20)):
        predictions = json.loads((trained / f"{split}_predictions.json").read_text(encoding="utf-8"))
        name = {"eval": "dev", "test": "test"}[split]
        course = json.loads((place / f"hw7_{name}.json").read_text(encoding="utf-8"))
        contexts = {str(q["id"]): course["paragraphs"][q["paragraph_id"]] for q in course["questions"]}
        assert list(predictions) == list(map(str, range(count)))
        for id_, candidates in nbest_of(trained, split).items():
            assert predictions[id_] == choose(candidate["text"] for candidate in candidates)
            assert len(candidates) <= 20
            for candidate in candidates:
                assert candidate["text"] == contexts[id_][candidate["start"] : candidate["end"]] != ""
            assert sum(candidate["probability"] for candidate in candidates) == pytest.approx(1)
    with open(trained / "submission.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["ID", "Answer"], *([id_, text.replace(",", "")] for id_, text in predictions.items())]
    assert AutoTokenizer.from_pretrained(trained).is_fast
    AutoModelForQuestionAnswering.from_pretrained(trained)
    card = (trained / "README.md").read_text(encoding="utf-8")
    assert f"{results['eval_exact_match']:.5f}" in card and "exact_match" in card
    assert resume.stored_run(trained)["finished"]
    assert scoring.noted_dataset(trained) == str(place / "data/drcd")
    assert "<h2>Training</h2>" in (trained / "report.html").read_text(encoding="utf-8")


def test_checkpoints_come_by_steps_as_well_as_epochs_and_the_best_is_kept(trained):
    """60 questions in batches of 8 are 8 steps an epoch."""
    found = {int(path.name.split("-")[1]) for path in resume.checkpoints(trained)}
    assert found == {3, 6, 8, 9, 12, 15, 16}
    state = json.loads((trained / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_exact_match"] for entry in state["log_history"] if "eval_loss" in entry}
    assert set(scores) >= {8, 16}
    best = Path(state["best_model_checkpoint"])
    assert scores[int(best.name.split("-")[1])] == max(scores.values())
    assert same_weights(weights(trained), weights(best))


def test_the_log_holds_loss_train_exact_match_rate_and_speed(trained):
    state = json.loads((trained / "trainer_state.json").read_text())
    logs = [entry for entry in state["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == list(range(1, 17))
    for entry in logs:
        assert 0 <= entry["train_exact_match"] <= 1 and entry["questions_per_second"] > 0
    peak, warm = 3e-5, 2  # 0.1 of 16 steps, rounded up
    expected = [peak * min((step - 1) / warm, (16 - (step - 1)) / (16 - warm)) for step in range(1, 17)]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(expected, rel=1e-6)
    scheduler = torch.load(trained / "checkpoint-16" / "scheduler.pt", weights_only=True)
    assert scheduler["_last_lr"] == [0.0] * len(scheduler["_last_lr"])


@pytest.mark.parametrize("family", ["electra", "roberta", "deberta", "xlm-roberta"])
def test_every_family_of_models_trains_and_answers(place, tmp_path, family):
    save_model(tmp_path / "model", family)
    out = tmp_path / "out"
    few = ["--max_train_samples", "12", "--max_eval_samples", "5", "--max_predict_samples", "5"]
    run(*options_of(place, out, *SHORT, *few, "--train_windows", "stride", model=tmp_path / "model"))
    assert len(nbest_of(out)) == 5 and all(len(candidates) == 20 for candidates in nbest_of(out).values())


def test_evaluation_and_prediction_alone_from_a_trained_folder(place, trained, tmp_path):
    """The windows of training are used without being named again."""
    run(
        "--model_name_or_path", trained, "--dataset_name", place / "data/drcd", "--do_predict", "--output_dir", tmp_path
    )
    assert nbest_of(tmp_path) == nbest_of(trained)
    assert not (tmp_path / "eval_predictions.json").exists() and not (tmp_path / "model.safetensors").exists()
    run("--model_name_or_path", trained, "--dataset_name", place / "data/drcd", "--do_eval", "--output_dir", tmp_path)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_exact_match"] == json.loads((trained / "all_results.json").read_text())["eval_exact_match"]
    assert "test_samples" in results  # of the call before


def test_batch_size_padding_and_sampler_change_no_answer(place, trained, tmp_path):
    for number, more in enumerate(
        [
            ["--per_device_eval_batch_size", "1"],
            ["--per_device_eval_batch_size", "7", "--train_sampling_strategy", "group_by_length"],
            ["--preprocessing_num_workers", "2", "--dataloader_num_workers", "1"],
            ["--dataloader_drop_last", "true", "--eval_do_concat_batches", "false", "--batch_eval_metrics", "true"],
        ]
    ):
        out = tmp_path / str(number)
        run(*options_of(place, out, "--do_predict", *more, model=trained))
        assert_same_answers(nbest_of(trained), nbest_of(out))


def test_two_processes_answer_as_one(place, trained, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    process = run_process(*options_of(place, tmp_path, "--do_eval", "--do_predict", model=trained), launcher=launcher)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("everything is in") == 1  # only the main process reports
    for split in ("eval", "test"):
        assert_same_answers(nbest_of(trained, split), nbest_of(tmp_path, split))
    mine, its = (json.loads((out / "all_results.json").read_text()) for out in (trained, tmp_path))
    assert mine["eval_exact_match"] == its["eval_exact_match"] and mine["eval_f1"] == pytest.approx(its["eval_f1"])


def test_the_command_of_the_readme_needs_nothing_else(place, tmp_path):
    """`accelerate launch run_qa.py --model_name_or_path MODEL` beside data/drcd."""
    shutil.copytree(place / "data", tmp_path / "data")
    shutil.copytree(place / "model", tmp_path / "tiny-bert")
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    process = run_process("--model_name_or_path", "tiny-bert", launcher=launcher, cwd=tmp_path)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert (tmp_path / "outputs/tiny-bert/submission.csv").exists()
    assert "validation: exact match" in output and "outputs/tiny-bert" in output


def test_accumulated_gradients_are_those_of_one_batch(place, tmp_path):
    """One SGD step from 4 x 8 and from 1 x 32 rows: the weights move the same way."""
    one_step = [*WINDOWS, "--max_steps", "1", "--optim", "sgd", "--max_grad_norm", "0", "--warmup_steps", "0"]
    one_step += ["--learning_rate", "10", "--do_train", "--eval_strategy", "no"]
    for name, batch, accumulation in (("whole", 32, 1), ("parts", 8, 4)):
        more = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation]
        run(*options_of(place, tmp_path / name, *one_step, *more))
    start, whole, parts = (weights(folder) for folder in (place / "model", tmp_path / "whole", tmp_path / "parts"))
    moved = torch.cat([(whole[name] - start[name]).flatten() for name in start])
    differ = torch.cat([(whole[name] - parts[name]).flatten() for name in start])
    assert moved.norm() > 0.1
    assert differ.norm() / moved.norm() < 1e-5


def test_killed_in_training_it_ends_where_it_would_have(place, trained, tmp_path):
    """SIGKILL in the second epoch; the same command goes on from the last checkpoint, to the same weights."""
    command = options_of(place, tmp_path, *SHORT, "--save_strategy", "steps", "--save_steps", "3")
    process = run_process(*command, "--logging_steps", "1")
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint-12" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not resume.stored_run(tmp_path)["finished"]
    run(*command, "--logging_steps", "1")
    assert same_weights(weights(trained), weights(tmp_path))
    assert nbest_of(trained) == nbest_of(tmp_path)


def test_a_checkpoint_may_be_named_to_go_on_from(place, trained, tmp_path, capsys):
    command = options_of(place, tmp_path / "out", *SHORT, "--save_strategy", "steps", "--save_steps", "3", "--do_train")
    run(*command, "--resume_from_checkpoint", trained / "checkpoint-9")
    assert same_weights(weights(trained / "checkpoint-16"), weights(tmp_path / "out/checkpoint-16"))
    assert not (tmp_path / "out/checkpoint-9").exists()
    with pytest.raises(SystemExit):
        run(*options_of(place, tmp_path / "new", *SHORT), "--resume_from_checkpoint", tmp_path / "nowhere")
    assert "not a complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_broken_checkpoint_is_passed_over(trained, tmp_path, caplog, name, damage):
    for step in (3, 6):
        shutil.copytree(trained / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    assert resume.last_complete_checkpoint(tmp_path, [1, 2]) == tmp_path / "checkpoint-6"
    assert resume.last_complete_checkpoint(tmp_path, [2]) is None  # these were written by one process
    path = tmp_path / "checkpoint-6" / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) - 9] if damage == "cut" else b"")
    assert resume.last_complete_checkpoint(tmp_path, [1]) == tmp_path / "checkpoint-3"


def test_a_finished_run_is_not_trained_again(place, trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    changed = (out / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "checkpoint-16")
    run(*options_of(place, out, *SHORT, "--save_strategy", "steps", "--save_steps", "3"))
    assert (out / "model.safetensors").stat().st_mtime_ns == changed
    assert not (out / "checkpoint-16").exists()
    assert nbest_of(out) == nbest_of(trained)


def test_other_options_do_not_continue_a_run(place, trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run(*options_of(place, out, *SHORT, "--learning_rate", "1e-4", "--seed", "7"))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "learning_rate: 3e-05 there, 0.0001 now" in error and "seed: 42 there, 7 now" in error
    assert "save_steps" not in error  # shapes no weights
    assert sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*")) == before
    # The same batch in smaller steps is the same run.
    run(*options_of(place, out, *SHORT, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"))
    run(*options_of(place, out, *SHORT, "--learning_rate", "1e-4", "--seed", "7", "--fresh_start"))
    assert not same_weights(weights(out), weights(trained))
    assert {path.name for path in resume.checkpoints(out)} == {"checkpoint-8", "checkpoint-16"}


def test_a_half_precision_checkpoint_trains_in_float32_and_fp16_without_a_gpu_warns(place, tmp_path):
    model = AutoModelForQuestionAnswering.from_pretrained(place / "model").half()
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "half")
    assert all(value.dtype == torch.float16 for value in weights(tmp_path / "half").values())
    out = tmp_path / "out"
    process = run_process(*options_of(place, out, *SHORT, "--fp16", "--max_steps", "2", model=tmp_path / "half"))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    if not torch.accelerator.is_available():
        assert output.count("fp16 needs a GPU and there is none: running in float32") == 1
    assert all(value.dtype == torch.float32 for value in weights(out).values())


def test_without_a_validation_split_the_last_model_is_kept(place, tmp_path):
    data = tmp_path / "data"
    prepare_drcd.main(["--train_files", str(place / "hw7_train.json"), "--output_dir", str(data)])
    run("--model_name_or_path", place / "model", "--dataset_name", data, "--output_dir", tmp_path / "out", *SHORT)
    assert resume.stored_run(tmp_path / "out")["finished"]
    assert same_weights(weights(tmp_path / "out"), weights(tmp_path / "out/checkpoint-16"))


def test_the_breakdown_covers_the_dev_set(trained):
    results = json.loads((trained / "all_results.json").read_text(encoding="utf-8"))
    for kinds in results["eval_breakdown"].values():
        assert sum(values["questions"] for values in kinds.values()) == 30
        right = sum(values["questions"] * values["exact_match"] for values in kinds.values())
        assert right / 30 == pytest.approx(results["eval_exact_match"])
    assert set(results["eval_breakdown"]["paragraph"]) == {"one window", "several windows"}


def test_final_training_takes_train_and_dev_and_claims_no_score(place, tmp_path, capsys):
    out = tmp_path / "out"
    run(*options_of(place, out, *SHORT, "--train_on_validation", "--max_steps", "12"))
    results = json.loads((out / "all_results.json").read_text())
    assert not [name for name in results if name.startswith("eval")]
    assert results["epoch"] == 1.0  # 12 steps of 8 are the 60 train and 30 dev questions once
    assert len(nbest_of(out)) == 20 and not (out / "eval_predictions.json").exists()
    assert "exact_match" not in (out / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        run(*options_of(place, tmp_path / "no", "--train_on_validation", "--do_train", "--do_eval"))
    assert "leaves no questions to evaluate on" in capsys.readouterr().err


def test_a_member_of_a_config_has_its_own_folder(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared = f"dataset_name: {place / 'data/drcd'}\nmax_steps: 1\nmax_predict_samples: 3\n"
    members = f"members:\n  one: {{model_name_or_path: {place / 'model'}, seed: 1}}\n"
    (tmp_path / "pair.yaml").write_text(shared + members, encoding="utf-8")
    run("--config", "pair.yaml", "--member", "one", "--do_train", "--do_predict", *WINDOWS)
    assert len(nbest_of(tmp_path / "outputs/pair/one")) == 3


def broken_dataset(place, tmp_path, split, change):
    """A copy of the data with one split's Parquet table changed."""
    import pyarrow.parquet as pq

    data = tmp_path / "broken"
    shutil.copytree(place / "data/drcd", data)
    table = change(pq.read_table(data / f"{split}.parquet").replace_schema_metadata(None))
    pq.write_table(table, data / f"{split}.parquet")
    card = (data / "README.md").read_text(encoding="utf-8")
    (data / "README.md").write_text(card.replace("SHA-256 ", f"SHA-256 {time.time_ns()}"), encoding="utf-8")
    return data


def with_answers(values):
    """A change of a table: the same few answers in every row."""
    import pyarrow as pa

    def change(table):
        column = pa.array(values * len(table))
        return table.set_column(table.schema.get_field_index("answers"), "answers", column)

    return change


REFUSED = {
    "unknown option": (["--doc_strid", "9"], "unknown option '--doc_strid'; did you mean '--doc_stride'?"),
    "abbreviated option": (["--doc_s", "9"], "unknown option '--doc_s'; did you mean '--doc_stride'?"),
    "wrong type": (["--n_best_size", "many"], "argument --n_best_size/--n-best-size: invalid int value: 'many'"),
    "wrong choice": (["--span_choice", "x"], "argument --span_choice/--span-choice: invalid choice: 'x'"),
    "wrong value": (["--max_answer_length", "0"], "--max_answer_length is 0, must be at least 1"),
    "wrong Trainer value": (["--eval_strategy", "often"], "often"),
    "no such model": (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: cannot be loaded"),
    "no such dataset": (["--dataset_name", "./nowhere"], "--dataset_name ./nowhere: cannot be opened as a dataset"),
    "stride too large": ([*WINDOWS[:4], "--doc_stride", "46"], "--doc_stride is 46, must lie between 1 and 45"),
    "stride not positive": ([*WINDOWS[:4], "--doc_stride", "0"], "--doc_stride is 0, must lie between 1 and 45"),
    "no room": ([*WINDOWS[:2], "--max_question_length", "61"], "--max_question_length 61 leaves no room"),
    "longer than the model": (["--max_seq_length", "129"], "--max_seq_length is 129, the model takes at most 128"),
    "no batch": (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size is 0, must be at least 1"),
    "no rate": (["--learning_rate", "nan"], "--learning_rate is nan, must be at least 0"),
    "no such metric": (["--metric_for_best_model", "em"], "--metric_for_best_model is 'em', must be one of"),
    "no answers": (["--prediction_loss_only", "true"], "--prediction_loss_only leaves no answers to score"),
    "no step": (["--save_strategy", "steps", "--save_steps", "0"], "--save_steps is 0.0, must be above 0"),
    "NUL": (["--dataset_name", "a\0b"], "an option holds a NUL character"),
    "no such config": (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_options_get_one_line_and_exit_code_2(place, tmp_path, capsys, case):
    more, message = REFUSED[case]
    with pytest.raises(SystemExit) as stop:
        run(*options_of(place, tmp_path / "out", *more))
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("split", "change", "more", "message"),
    [
        ("train", lambda table: table.slice(0, 0), [], "train.parquet is empty"),
        ("validation", lambda table: table.drop_columns(["context"]), [], "lacks the column 'context'"),
        ("test", lambda table: table.take([0, 0]), [], "the same id stands twice"),
        ("validation", with_answers([{"text": ["zz"], "answer_start": [0]}]), [], "'zz' does not stand at character 0"),
        ("train", with_answers([{"text": ["a", "b"], "answer_start": [0]}]), [], "in different numbers"),
        ("validation", None, ["--do_eval"], "--do_eval needs the split 'validation'"),
    ],
)
def test_bad_datasets_are_refused(place, tmp_path, capsys, split, change, more, message):
    if change is None:
        data = tmp_path / "broken"
        prepare_drcd.main(["--train_files", str(place / "hw7_train.json"), "--output_dir", str(data)])
    else:
        data = broken_dataset(place, tmp_path, split, change)
    with pytest.raises(SystemExit) as stop:
        run("--model_name_or_path", place / "model", "--dataset_name", data, "--output_dir", tmp_path / "out", *more)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": "a"}, "answers must be an object of two lists"),
        ({"answers": [{"text": "a", "answer_start": 0}]}, "answers must be an object of two lists"),
        ({"answers": {"text": "a", "answer_start": 0}}, "answers must be an object of two lists"),
        ({"answers": {"text": ["a"]}}, "answers must be an object of two lists"),
        ({"answers": {"text": ["a"], "answer_start": [None]}}, "does not stand at character None"),
        ({"answers": {"text": [None], "answer_start": [0]}}, "'None' does not stand"),
        ({"answers": {"text": ["a"], "answer_start": [-3]}}, "does not stand at character -3"),
        ({"question": 3}, "its question must be a text"),
        ({"context": ["x"]}, "its context must be a text"),
        ({"id": [1]}, "its id must be a text or a whole number"),
        ({}, None),
    ],
)
def test_rows_that_are_not_of_the_squad_schema(change, message):
    row = {"id": 1, "question": "q", "context": "abc", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}
    reason = splits.unusable(row | change)
    assert reason is None if message is None else message in reason


def test_a_model_without_a_usable_tokenizer_is_refused(place, tmp_path, capsys):
    bare, slow = tmp_path / "bare", tmp_path / "slow"
    AutoModelForQuestionAnswering.from_pretrained(place / "model").save_pretrained(bare)
    CanineTokenizer().save_pretrained(slow)
    CanineConfig(**conftest.SMALL, num_hash_buckets=8).save_pretrained(slow)
    for folder, message in ((bare, "tokenizer"), (slow, "slow")):
        with pytest.raises(SystemExit) as stop:
            run(*options_of(place, tmp_path / "out", "--do_predict", model=folder))
        assert stop.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and str(folder) in error and message in error


def test_an_unfinished_run_or_another_models_does_not_answer(place, trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "run.json").write_text((out / "run.json").read_text().replace('"finished": true', '"finished": false'))
    shutil.copytree(place / "model", tmp_path / "other")
    for model, message in ((place / "model", "is not trained to its end"), (tmp_path / "other", "holds a run of")):
        with pytest.raises(SystemExit):
            run(*options_of(place, out, "--do_predict", model=model))
        assert message in capsys.readouterr().err
    assert nbest_of(out) == nbest_of(trained)
    run(*options_of(place, trained, "--do_predict", model=f"{place / 'model'}/"))  # another spelling of the same
    assert nbest_of(out) == nbest_of(trained)


def test_a_fresh_start_keeps_no_figure_of_the_run_before(place, trained, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    run(*options_of(place, out, *WINDOWS, "--fresh_start", "--max_steps", "2", "--do_train", "--eval_strategy", "no"))
    assert not [name for name in json.loads((out / "all_results.json").read_text()) if name.startswith("eval")]
    assert "exact_match" not in (out / "README.md").read_text(encoding="utf-8")
    assert not list(out.glob("*predictions.json")) and not (out / "submission.csv").exists()


def test_logits_that_are_not_finite_are_no_answers(place, tmp_path, capsys):
    model = AutoModelForQuestionAnswering.from_pretrained(place / "model")
    torch.nn.init.constant_(model.qa_outputs.bias, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(tmp_path / "nan")
    with pytest.raises(SystemExit):
        run(*options_of(place, tmp_path / "out", "--do_predict", model=tmp_path / "nan"))
    assert "logits are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out" / "submission.csv").exists()


def test_a_moved_run_still_finds_its_best_checkpoint(trained, tmp_path):
    out = tmp_path / "moved"
    shutil.copytree(trained, out)
    state = json.loads((out / "checkpoint-16/trainer_state.json").read_text())
    name = Path(state["best_model_checkpoint"]).name
    state["best_model_checkpoint"] = f"elsewhere/{name}"
    (out / "checkpoint-16/trainer_state.json").write_text(json.dumps(state))
    resume.relocate_best(out / "checkpoint-16")
    state = json.loads((out / "checkpoint-16/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(out / name)


def test_a_share_of_all_steps_may_say_when_to_save(place, tmp_path):
    out = tmp_path / "out"
    steps = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "0.25", "--do_train"]
    run(*options_of(place, out, *SHORT[:-2], "--save_total_limit", "9", *steps))
    assert {path.name for path in resume.checkpoints(out)} == {f"checkpoint-{step}" for step in (2, 4, 6, 8)}


def test_a_test_split_without_answers_beside_splits_with_them(place, tmp_path):
    data = broken_dataset(place, tmp_path, "test", lambda table: table.drop_columns(["answers"]))
    out = tmp_path / "out"
    run("--model_name_or_path", place / "model", "--dataset_name", data, "--output_dir", out, "--do_predict", *WINDOWS)
    assert len(nbest_of(out)) == 20


def test_as_a_process_bad_input_is_one_line_without_a_traceback(place, tmp_path):
    process = run_process("--model_name_or_path", place / "model", "--dataset_name", tmp_path / "none", cwd=tmp_path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in output and "cannot be opened as a dataset: there is no such folder" in output
    assert os.listdir(tmp_path) == []


def test_the_default_dataset_is_never_sought_on_the_hub(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(splits, "load_dataset", lambda name: pytest.fail(f"opened {name}"))
    with pytest.raises(SystemExit):
        run("--model_name_or_path", place / "model")
    assert "--dataset_name data/drcd: cannot be opened as a dataset: there is no such folder" in capsys.readouterr().err


def test_files_that_are_no_runs_are_neither_deleted_nor_written_over(place, tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "report.py").write_text("mine")
    with pytest.raises(SystemExit):
        run(*options_of(place, tmp_path, *WINDOWS, "--max_steps", "2", "--do_train", "--eval_strategy", "no"))
    assert "holds README.md, which is no run's" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"README.md": "mine", "report.py": "mine"}


def test_padding_changes_neither_loss_nor_what_counts_as_right(place, tmp_path):
    """The same rows alone and beside longer ones, with a model whose logits are highest at padding."""
    starts, ends = torch.tensor([[9.0, 0.0, 1.0]]), torch.tensor([[0.0, 5.0, 1.0]])
    label = torch.tensor([0]), torch.tensor([1])
    padded = [torch.nn.functional.pad(logits, (0, 7), value=-torch.inf) for logits in (starts, ends)]
    assert torch.equal(trainer.span_loss(starts, ends, *label), trainer.span_loss(*padded, *label))
    without = torch.tensor([windows.NO_LABEL])
    assert trainer.span_loss(starts, ends, without, without) == 0
