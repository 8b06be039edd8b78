"""make_sample.py: the course's format, splits that share nothing to remember, the same bytes for a seed."""

import json
import random
import re

import pytest
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import make_sample
from files import UserError

WINDOW = 48  # tokens of a passage that one window of the demonstration holds
SMALL = ["--train_passages", "12", "--dev_passages", "4", "--test_passages", "4"]
PAIRS = ["《》", "「」"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample") / "made"
    make_sample.main(["--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def splits(folder):
    return {split: json.loads((folder / f"hw7_{split}.json").read_text("utf-8")) for split in ("train", "dev", "test")}


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_rows_have_the_courses_fields_and_order(splits, split):
    rows, paragraphs = splits[split]["questions"], splits[split]["paragraphs"]
    fields = ["id", "paragraph_id", "question_text", "answer_text", "answer_start", "answer_end"]
    assert all(list(row) == fields for row in rows)
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert {row["paragraph_id"] for row in rows} == set(range(len(paragraphs)))


@pytest.mark.parametrize("split", ["train", "dev"])
def test_answer_end_is_inclusive(splits, split):
    for row in splits[split]["questions"]:
        paragraph = splits[split]["paragraphs"][row["paragraph_id"]]
        assert paragraph[row["answer_start"] : row["answer_end"] + 1] == row["answer_text"] != ""


def test_test_has_no_answers_first_none_then_null(splits):
    rows = splits["test"]["questions"]
    answers = [{row["answer_text"], row["answer_start"], row["answer_end"]} for row in rows]
    labelled = answers.index({"null"})
    assert 0 < labelled < len(rows)
    assert answers == [{None}] * labelled + [{"null"}] * (len(rows) - labelled)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_no_passage_and_no_name_stands_in_training(splits, split):
    """Names are what is left of a passage's facts and fillers once years, numbers and trades are taken away."""
    seen = "\n".join([*splits["train"]["paragraphs"], *(row["question_text"] for row in splits["train"]["questions"])])
    stem = f"[{''.join(make_sample.STEM[0])}](?:[{''.join(make_sample.STEM[1])}]|[㐀-䶵])"
    given = f"[{make_sample.SURNAMES}][{make_sample.GIVEN[0]}](?:[{make_sample.GIVEN[1]}]|[㐀-䶵])"
    endings = "|".join(ending for kind, ends in make_sample.ENDINGS.items() if kind != "work" for ending in ends)
    patterns = [f"{stem}(?:{endings})", given, "《[^》]+》", "[A-Z][a-z]+ [A-Z][a-z]+"]
    names = {name for text in splits[split]["paragraphs"] for name in re.findall("|".join(patterns), text)}
    assert len(names) > 300
    assert not [name for name in names if name in seen]
    assert not set(splits[split]["paragraphs"]) & set(splits["train"]["paragraphs"])


def test_dev_answers_but_years_numbers_and_trades_are_new(splits):
    seen = "\n".join(splits["train"]["paragraphs"])
    answers = {row["answer_text"] for row in splits["dev"]["questions"]}
    common = {text for text in answers if re.fullmatch(r"[0-9０-９,，]+|.*年", text)} | set(make_sample.TRADES)
    assert not [answer for answer in answers - common if answer in seen]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_most_passages_are_longer_than_a_window(splits, tokenizer, split):
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in splits[split]["paragraphs"]]
    assert sum(length > WINDOW for length in lengths) / len(lengths) >= 0.5
    assert max(lengths) <= make_sample.MAX_LENGTH


@pytest.mark.parametrize("split", ["train", "dev"])
def test_answers_are_as_awkward_as_the_courses(splits, tokenizer, split):
    rows = splits[split]["questions"]
    answers = [row["answer_text"] for row in rows]
    passages = [splits[split]["paragraphs"][row["paragraph_id"]] for row in rows]
    unknown = [tokenizer.unk_token_id in tokenizer(answer)["input_ids"] for answer in answers]
    assert 0.01 < sum(unknown) / len(rows) < 0.1
    assert any(passage.count(answer) > 1 for passage, answer in zip(passages, answers, strict=True))
    assert any(row["answer_start"] == 0 for row in rows)
    for mark in (",", "，", "《", "「", " "):
        assert any(mark in answer for answer in answers), mark
    for opening, closing in PAIRS:
        assert all(answer.count(opening) == answer.count(closing) for answer in answers)


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path):
    for name, seed in (("one", "1"), ("again", "1"), ("other", "2")):
        make_sample.main(["--output_dir", str(tmp_path / name), "--seed", seed, *SMALL])
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    one, other = contents(tmp_path / "one"), contents(tmp_path / "other")
    assert one["hw7_dev.json"] != other["hw7_dev.json"]
    assert one["model/model.safetensors"] != other["model/model.safetensors"]


def test_tokenizer_is_fast_and_knows_only_training_text(splits, tokenizer):
    assert tokenizer.is_fast
    seen = "".join([*splits["train"]["paragraphs"], *(row["question_text"] for row in splits["train"]["questions"])])
    learned = set(tokenizer.get_vocab()) - set(make_sample.SPECIAL)
    assert {token.removeprefix("##") for token in learned} <= set(seen.lower())
    assert tokenizer.tokenize("1,200冊") == ["1", ",", "2", "##0", "##0", "冊"]


def test_model_loads_and_fits_its_tokenizer(folder, tokenizer):
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert model.num_parameters() < 1_000_000
    assert model(**tokenizer("誰？", "林志明。", return_tensors="pt")).start_logits.isfinite().all()


def test_an_own_folder_is_replaced_a_foreign_one_refused(tmp_path, capsys):
    own, foreign = tmp_path / "own", tmp_path / "foreign"
    make_sample.main(["--output_dir", str(own), *SMALL])
    make_sample.main(["--output_dir", str(own), "--seed", "8", *SMALL])
    assert json.loads((own / "sample.json").read_text("utf-8"))["seed"] == 8
    foreign.mkdir()
    (foreign / "hw7_train.json").write_text("the course's own", "utf-8")
    with pytest.raises(SystemExit) as stop:
        make_sample.main(["--output_dir", str(foreign), *SMALL])
    assert stop.value.code == 2
    assert "--output_dir" in capsys.readouterr().err
    assert (foreign / "hw7_train.json").read_text("utf-8") == "the course's own"


@pytest.mark.parametrize("option", ["--train_passages", "--dev_passages", "--test_passages", "--questions"])
def test_a_size_below_one_is_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as stop:
        make_sample.main(["--output_dir", str(tmp_path / "made"), option, "0"])
    assert stop.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_running_out_of_names_is_said(monkeypatch):
    names = make_sample.Names(random.Random(0))
    monkeypatch.setattr(names, "compose", lambda kind: "金山縣")
    assert names.draw("place") == "金山縣"
    with pytest.raises(UserError, match="no place is left"):
        names.draw("place")


@pytest.mark.parametrize(("number", "text"), [(1, "一"), (10, "十"), (11, "十一"), (20, "二十"), (78, "七十八")])
def test_chinese_number(number, text):
    assert make_sample.chinese_number(number) == text
