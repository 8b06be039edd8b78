"""inference.Reader: the same answers as run_qa.py's files, from any thread, and errors in words."""

import io
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import conftest
import pytest
from test_run_qa import assert_same_answers, course_json, nbest_of, run
from transformers import BertConfig, BertForMaskedLM

import inference
import prepare_drcd
import windows
from files import UserError
from postprocess import choose

QA_WINDOWS = {"max_seq_length": 64, "max_question_length": 16, "doc_stride": 20}


@pytest.fixture(scope="module")
def examples():
    """Questions about paragraphs of up to some 200 characters, and one of thousands."""
    columns = conftest.random_examples(24, 17)
    columns["context"][0] = "".join(conftest.passages(30, 18))
    columns["answers"][0] = {"text": [columns["context"][0][:2]], "answer_start": [0]}
    return columns


@pytest.fixture(scope="module")
def data(examples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "hw7_test.json").write_text(course_json(examples, labelled=False), encoding="utf-8")
    prepare_drcd.main(["--test_files", str(folder / "hw7_test.json"), "--output_dir", str(folder / "dataset")])
    return folder / "dataset"


def save_model(folder, family):
    tokenizer = conftest.make_tokenizer(family)
    model = conftest.make_model(family, tokenizer)
    model.config.qa_windows = QA_WINDOWS
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="module")
def reader(bert_folder):
    return inference.Reader(bert_folder)


@pytest.mark.parametrize("family", conftest.FAMILIES)
def test_answers_are_those_of_run_qa(family, examples, data, tmp_path):
    """Windows hold 45 tokens of the paragraph, so the candidates of several compete for most answers."""
    model = save_model(tmp_path / "model", family)
    run("--model_name_or_path", model, "--dataset_name", data, "--output_dir", tmp_path / "out", "--do_predict")
    written = nbest_of(tmp_path / "out")
    answers = inference.Reader(model, batch_size=5).answer_batch(examples["question"], examples["context"])
    assert_same_answers(dict(zip(examples["id"], (answer.nbest for answer in answers), strict=True)), written)
    assert max(candidate["start"] for candidate in answers[0].nbest) > 2000
    for answer, context, nbest in zip(answers, examples["context"], written.values(), strict=True):
        assert answer.text == choose(candidate["text"] for candidate in nbest) == context[answer.start : answer.end]
        mine = {"text": answer.text, "start": answer.start, "end": answer.end}
        assert mine | {"score": answer.score, "probability": answer.probability} in answer.nbest


def test_one_paragraph_serves_a_list_of_questions(reader):
    questions, context = ["誰創辦", "何時"], "".join(conftest.TEXT)
    assert reader.answer_batch(questions, context) == [reader.answer(question, context) for question in questions]
    assert reader.answer_batch([], context) == []


def test_threads_that_share_a_reader_take_turns_at_its_tokenizer(reader, monkeypatch):
    """Two threads in one fast tokenizer cut each other's texts to wrong lengths, without an error."""
    contexts = conftest.passages(12, 5)
    alone = [reader.answer("誰創辦", context) for context in contexts]
    inside, most = [], []

    def build_features(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.005)
        built = windows.build_features(*args, **kwargs)
        inside.pop()
        return built

    monkeypatch.setattr(inference, "build_features", build_features)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda context: reader.answer("誰創辦", context), contexts))
    assert together == alone and most == [1] * len(contexts)


@pytest.mark.parametrize(
    ("question", "context", "told"),
    [
        (" \n", "臺北", "the question is empty"),
        ("誰", "　", "the paragraph is empty"),
        ("誰", None, "the paragraph must be a text"),
        ("誰", "臺\ud83d", "the paragraph holds half a surrogate pair"),
    ],
)
def test_what_cannot_be_answered_is_refused(reader, question, context, told):
    with pytest.raises(UserError, match=told):
        reader.answer(question, context)


def test_the_odd_one_of_a_batch_is_named(reader):
    with pytest.raises(UserError, match=r"^question 2 is empty"):
        reader.answer_batch(["誰", ""], ["臺北", "臺北"])
    with pytest.raises(UserError, match="2 questions for 1 paragraphs"):
        reader.answer_batch(["誰", "誰"], ["臺北"])
    with pytest.raises(UserError, match="a list of questions"):
        reader.answer_batch("誰", "臺北")


def test_a_paragraph_without_candidates_has_an_empty_answer(reader):
    answer = reader.answer("誰", "\x00\x01")
    assert (answer.text, answer.start, answer.end, answer.probability, answer.nbest) == ("", 0, 0, 0.0, [])


def test_a_model_that_has_not_learnt_to_answer_is_refused(tmp_path):
    conftest.make_tokenizer("bert").save_pretrained(tmp_path)
    BertForMaskedLM(BertConfig(vocab_size=200, max_position_embeddings=128, **conftest.SMALL)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a BertForMaskedLM, which has not learnt to answer"):
        inference.Reader(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        inference.Reader("./nowhere")


def test_the_command_prints_the_answer_then_the_best(bert_folder, reader, tmp_path, capsys, monkeypatch):
    context = conftest.TEXT[1]
    (tmp_path / "paragraph.txt").write_text(context, encoding="utf-8")
    asked = [str(bert_folder), "--question", "誰創作", "--n_best_size", "3"]
    inference.main([*asked, "--context_file", str(tmp_path / "paragraph.txt")])
    printed = capsys.readouterr().out.splitlines()
    answer = inference.Reader(bert_folder, n_best_size=3).answer("誰創作", context)
    assert printed[0] == answer.text and len(printed) == 4
    assert all(candidate["text"] in line for candidate, line in zip(answer.nbest, printed[1:], strict=True))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(context.encode())))
    inference.main(asked)
    assert capsys.readouterr().out.splitlines() == printed
    with pytest.raises(SystemExit) as stop:
        inference.main([*asked, "--question", "", "--context_file", str(tmp_path / "paragraph.txt")])
    assert stop.value.code == 2 and "error: the question is empty" in capsys.readouterr().err
