"""The span search and its merging against brute force; the files as Kaggle and pandas read them."""

import json
import os

import numpy as np
import pandas
import pytest
import torch

from postprocess import (
    MISSING,
    best_spans,
    best_texts,
    choose,
    independent_spans,
    main,
    merge_windows,
    nbest_lists,
    read_nbest,
    write_answers,
    write_submission,
)

CASES = int(os.environ.get("SPAN_CASES", "400"))  # of each kind; the variable asks for a longer look


def random_windows(generator, windows, tokens, kind):
    """Logits and offsets of windows; `kind` "ties" has few distinct logits, "bytes" several tokens a character."""
    logits = generator.normal(size=(2, windows, tokens)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    char_starts = np.zeros((windows, tokens), dtype=np.int64)
    char_ends = np.zeros((windows, tokens), dtype=np.int64)
    for window in range(windows):
        begin, end = sorted(generator.integers(0, tokens + 1, size=2))
        step = generator.integers(0, 2, size=end - begin) if kind == "bytes" else np.ones(end - begin, dtype=np.int64)
        starts = generator.integers(0, 4) + np.cumsum(step)
        char_starts[window, begin:end] = starts
        char_ends[window, begin:end] = starts + (generator.random(end - begin) > 0.1)  # some cover nothing
    return logits, char_starts, np.where(char_ends > char_starts, char_ends, 0), char_starts * (char_ends > char_starts)


def oracle(logits, char_starts, char_ends, example, questions, n_best_size, max_answer_length):
    """Every candidate of every window, one by one; the best score of a span counts."""
    best = [{} for _ in range(questions)]
    for window, question in enumerate(example):
        for i in range(logits.shape[2]):
            for j in range(i, min(i + max_answer_length, logits.shape[2])):
                if char_starts[window, i] < char_ends[window, i] and char_starts[window, j] < char_ends[window, j]:
                    span = int(char_starts[window, i]), int(char_ends[window, j])
                    score = logits[0, window, i] + logits[1, window, j]
                    best[question][span] = max(best[question].get(span, -np.inf), score)
    return [sorted(spans.items(), key=lambda item: (-item[1], item[0]))[:n_best_size] for spans in best]


def search(logits, char_starts, char_ends, n_best_size, max_answer_length, choice=best_spans):
    tensors = [torch.from_numpy(values) for values in (logits[0], logits[1], char_starts, char_ends)]
    return choice(*tensors, n_best_size, max_answer_length)


@pytest.mark.parametrize("kind", ["plain", "ties", "bytes"])
def test_search_and_merge_equal_brute_force(kind):
    """Candidates, their order and their scores, over windows, padding, ties and tokens that share characters."""
    generator = np.random.default_rng(len(kind))
    for _ in range(CASES):
        windows, tokens = int(generator.integers(1, 6)), int(generator.integers(1, 14))
        n_best_size, max_answer_length = int(generator.integers(1, 25)), int(generator.integers(1, 16))
        logits, _, char_ends, char_starts = random_windows(generator, windows, tokens, kind)
        example = generator.integers(0, 3, size=windows)
        scores, spans = search(logits, char_starts, char_ends, n_best_size, max_answer_length)
        assert scores.shape == (windows, n_best_size) and spans.shape == (windows, n_best_size, 2)
        assert scores.dtype == torch.float32
        found = merge_windows(example, scores.numpy(), spans.numpy(), 3, n_best_size)
        expected = oracle(logits, char_starts, char_ends, example, 3, n_best_size, max_answer_length)
        for question, candidates in enumerate(expected):
            place = slice(found.bounds[question], found.bounds[question + 1])
            assert [tuple(span) for span in found.spans[place].tolist()] == [span for span, _ in candidates]
            assert found.scores[place].tolist() == [score for _, score in candidates]
            if candidates:
                assert found.probabilities[place].sum() == pytest.approx(1)


def textbook_best(logits, char_starts, char_ends, max_answer_length):
    """The best score by the Transformers example: the 20 best starts times the 20 best ends of each window."""
    best = -np.inf
    for window in range(logits.shape[1]):
        starts, ends = (np.argsort(values[window])[-1:-21:-1] for values in logits)
        for i in starts:
            for j in ends:
                covered = all(char_starts[window, k] < char_ends[window, k] for k in (i, j))
                if covered and i <= j < i + max_answer_length:
                    best = max(best, logits[0, window, i] + logits[1, window, j])
    return best


def test_the_best_score_is_never_below_the_textbook_searchs():
    generator = np.random.default_rng(20)
    higher = 0
    for _ in range(CASES // 4):
        tokens, max_answer_length = int(generator.integers(1, 90)), int(generator.integers(1, 30))
        logits, _, char_ends, char_starts = random_windows(generator, 3, tokens, "plain")
        scores, _ = search(logits, char_starts, char_ends, 1, max_answer_length)
        textbook = textbook_best(logits, char_starts, char_ends, max_answer_length)
        assert scores.max().item() >= textbook
        higher += scores.max().item() > textbook
    assert higher  # and sometimes the textbook search misses the best span


def test_padding_and_order_of_windows_change_nothing():
    generator = np.random.default_rng(7)
    logits, _, char_ends, char_starts = random_windows(generator, 8, 12, "ties")
    example = np.array([0, 1, 0, 2, 2, 1, 0, 0])
    scores, spans = search(logits, char_starts, char_ends, 5, 4)
    whole = merge_windows(example, scores.numpy(), spans.numpy(), 3, 5)
    order = generator.permutation(8)
    wide = [np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 9)]) for values in (logits, char_starts, char_ends)]
    scores, spans = search(*wide, 5, 4)
    again = merge_windows(example[order], scores.numpy()[order], spans.numpy()[order], 3, 5)
    for name in ("bounds", "spans", "scores", "probabilities"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))


def test_half_precision_logits_are_added_in_float32():
    start, end = torch.tensor([[2048.0, 0.0]], dtype=torch.float16), torch.tensor([[1.0, 0.0]], dtype=torch.float16)
    scores, _ = best_spans(start, end, torch.tensor([[0, 1]]), torch.tensor([[1, 2]]), 1, 2)
    assert scores.item() == 2049.0  # 2048 in float16


def test_the_independent_choice_is_empty_where_the_end_comes_first():
    char_starts, char_ends = torch.tensor([[0, 0, 1, 2]]), torch.tensor([[0, 1, 2, 3]])
    start, end = torch.tensor([[9.0, 0.0, 0.0, 2.0]]), torch.tensor([[9.0, 3.0, 0.0, 0.0]])
    scores, spans = independent_spans(start, end, char_starts, char_ends, 3, 2)
    assert spans.tolist() == [[[2, 2], [MISSING, MISSING], [MISSING, MISSING]]]
    assert scores[0, 0] == 5
    scores, spans = independent_spans(end, start, char_starts, char_ends, 1, 2)
    assert spans.tolist() == [[[0, 3]]]


def candidates_of(spans, scores):
    return merge_windows(np.zeros(1, dtype=int), np.array([scores]), np.array([spans]), 2, 5)


def test_texts_are_cut_from_the_paragraph():
    candidates = candidates_of([[2, 4], [0, 1]], [1.0, 2.0])
    assert best_texts(candidates, ["甲乙丙丁", "無"]) == ["甲", ""]
    first, second = nbest_lists(candidates, ["甲乙丙丁", "無"])
    assert [c["text"] for c in first] == ["甲", "丙丁"] and second == []
    assert (first[1]["start"], first[1]["end"], first[1]["score"]) == (2, 4, 1.0)


@pytest.mark.parametrize(
    ("texts", "answer"),
    [
        (["《紅樓夢", "《紅樓夢》", "紅樓夢"], "《紅樓夢》"),
        (["紅樓夢》", "「紅》"], "紅樓夢》"),
        (["甲（乙）", "乙"], "甲（乙）"),
        (["」「", "「甲『乙』」"], "「甲『乙』」"),
        (["「甲『乙」』", "乙"], "乙"),
        (["1)", "1"], "1"),
        ([], ""),
    ],
)
def test_the_answer_is_the_best_candidate_with_balanced_brackets(texts, answer):
    assert choose(texts) == answer
    context = "".join(texts)
    ends = np.cumsum([len(text) for text in texts], dtype=int).tolist()
    spans = [[end - len(text), end] for text, end in zip(texts, ends, strict=True)]
    merged = candidates_of(spans or [[MISSING, MISSING]], np.arange(len(spans) or 1)[::-1].astype(float).tolist())
    assert best_texts(merged, [context, ""])[0] == answer


ODD = [
    '他說"是"',
    "1,234,567",
    "第一行\n第二行",
    "=SUM(A1)",
    "全形，逗號",
    "",
    "'",
    " 前後 ",
    "a\r\nb",
    "a\rb",
    "+1",
    "-1",
    "@a",
    "NA",
    "null",
    '"',
]


def test_pandas_reads_the_submission_as_it_was_meant(tmp_path):
    texts = {str(number): text for number, text in reversed(list(enumerate(ODD * 2)))}
    write_submission(tmp_path / "submission.csv", texts)
    table = pandas.read_csv(tmp_path / "submission.csv", keep_default_na=False, lineterminator="\n")
    assert list(table.columns) == ["ID", "Answer"]
    assert table.ID.tolist() == list(range(2 * len(ODD)))  # numerical order, not 0, 1, 10, 11
    assert table.Answer.tolist() == [text.replace(",", "") for text in ODD * 2]
    plain = pandas.read_csv(tmp_path / "submission.csv", dtype=str, keep_default_na=False)  # and with its defaults
    assert plain.Answer.tolist() == table.Answer.tolist()
    lines = (tmp_path / "submission.csv").read_bytes()
    assert "3,=SUM(A1)\n4,全形，逗號\n5,\n".encode() in lines  # quoted only where it must be


def test_ids_of_other_data_keep_their_order(tmp_path):
    write_submission(tmp_path / "submission.csv", {"b-2": "x", "a": "y", "10": "z"})
    assert (tmp_path / "submission.csv").read_text() == "ID,Answer\nb-2,x\na,y\n10,z\n"


def test_the_command_rewrites_a_runs_files_without_the_model(tmp_path, capsys):
    nbest = list(nbest_lists(candidates_of([[2, 4], [0, 1]], [1.0, 2.0]), ["甲乙,丁", "無"]))
    written = write_answers(tmp_path / "run", "test", ["7", "5"], nbest)
    before = {path.name: path.read_bytes() for path in written}
    assert json.loads(before["test_predictions.json"]) == {"7": "甲", "5": ""}
    assert before["submission.csv"].decode() == "ID,Answer\n5,\n7,甲\n"
    main([str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    assert "submission.csv" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "must hold one object"),
        ('{"q": 3}', "question 'q'"),
        ('{"q": [{"text": "x", "start": 0, "end": 1, "score": NaN, "probability": 1}]}', "question 'q'"),
        ('{"q": [{"text": "x", "start": true, "end": 1, "score": 0, "probability": 1}]}', "question 'q'"),
        ('{"q": [{"text": "x", "start": 0, "end": 2, "score": 0, "probability": 1}]}', "question 'q'"),
        ('{"q": [], "q": []}', "the key 'q' stands twice"),
        ('{"q": ', "not JSON"),
    ],
)
def test_a_broken_nbest_file_is_named(tmp_path, capsys, content, message):
    (tmp_path / "test_nbest_predictions.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "test_nbest_predictions.json" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["test_nbest_predictions.json"]


def test_a_folder_without_nbest_files_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "there is no such file" in capsys.readouterr().err


def test_scoring_a_run_again_keeps_its_other_figures(tmp_path, capsys):
    import datasets

    one = member(tmp_path, "one", [(0, 1)], [1.0])
    (tmp_path / "one" / "all_results.json").write_text('{"train_loss": 1.5}')
    rows = {"id": ["0"], "question": ["q"], "context": ["甲乙丙丁"], "answers": [{"text": ["甲"], "answer_start": [0]}]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "validation.parquet")
    main([one, "--dataset_name", str(tmp_path / "data")])
    assert json.loads((tmp_path / "one" / "all_results.json").read_text()) == {
        "train_loss": 1.5,
        "eval_exact_match": 1.0,
        "eval_f1": 1.0,
    }
    with pytest.raises(SystemExit):
        main([one, "--dataset_name", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")])
    assert "no labelled validation split" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_split_that_not_all_runs_answered_is_left_out(tmp_path, capsys):
    one, two = (member(tmp_path, name, [(0, 1)], [1.0]) for name in ("one", "two"))
    (tmp_path / "two" / "eval_nbest_predictions.json").unlink()
    main([one, two, "--output_dir", str(tmp_path / "out")])
    assert "left out the eval split" in capsys.readouterr().err
    assert not (tmp_path / "out/eval_predictions.json").exists() and (tmp_path / "out/submission.csv").exists()


def member(folder, name, spans, probabilities):
    """A run's folder with one question over 甲乙丙丁 and an eval n-best file."""
    text = "甲乙丙丁"
    nbest = [
        {"text": text[start:end], "start": start, "end": end, "score": 0.0, "probability": p}
        for (start, end), p in zip(spans, probabilities, strict=True)
    ]
    for split in ("eval", "test"):
        write_answers(folder / name, split, ["0"], [nbest])
    return str(folder / name)


def test_an_ensemble_is_the_weighted_mean_of_probabilities(tmp_path):
    one = member(tmp_path, "one", [(0, 1), (1, 2)], [0.6, 0.4])
    two = member(tmp_path, "two", [(1, 2), (2, 4)], [0.9, 0.1])
    three = member(tmp_path, "three", [(2, 4)], [1.0])
    main([one, two, three, "--output_dir", str(tmp_path / "same")])
    (merged,) = read_nbest(tmp_path / "same" / "eval_nbest_predictions.json").values()
    assert [(c["text"], pytest.approx(c["probability"])) for c in merged] == [("乙", 1.3 / 3), ("丙丁", 1.1 / 3)]
    main([one, two, three, "--output_dir", str(tmp_path / "weighted"), "--weights", "1", "1", "2"])
    (merged,) = read_nbest(tmp_path / "weighted" / "eval_nbest_predictions.json").values()
    assert [(c["text"], pytest.approx(c["probability"])) for c in merged] == [("丙丁", 2.1 / 4), ("乙", 1.3 / 4)]
    assert (tmp_path / "weighted/submission.csv").read_text(encoding="utf-8") == "ID,Answer\n0,丙丁\n"
    main([two, one, three, "--output_dir", str(tmp_path / "order")])
    same, order = (tmp_path / name / "test_nbest_predictions.json" for name in ("same", "order"))
    assert same.read_bytes() == order.read_bytes()


def test_runs_that_do_not_belong_together_are_refused(tmp_path, capsys):
    one = member(tmp_path, "one", [(0, 1)], [1.0])
    two = member(tmp_path, "two", [(0, 1)], [1.0])
    other = tmp_path / "other"
    write_answers(other, "test", ["0"], [[]])
    write_answers(other, "eval", ["1"], [[]])
    write_answers(
        tmp_path / "text", "eval", ["0"], [[{"text": "x", "start": 0, "end": 1, "score": 0, "probability": 1}]]
    )
    write_answers(tmp_path / "text", "test", ["0"], [[]])
    for runs, message in (
        ([one, str(other)], "question '0' is in only one of"),
        ([one, str(tmp_path / "text")], "characters 0 to 1 are 'x', elsewhere '甲'"),
        ([one, str(tmp_path / "none")], "none/test_nbest_predictions.json: there is no such file"),
        ([one, one], "the same run stands twice"),
        ([one, two, "--weights", "1"], "--weights has 1 values for 2 runs"),
        ([one, two, "--weights", "1", "nan"], "--weights must be numbers from 0 on"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*runs, "--output_dir", str(tmp_path / "out")])
        assert stop.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main([one, two])
    assert "--output_dir is missing" in capsys.readouterr().err


def test_reading_gives_what_was_written(tmp_path):
    nbest = list(nbest_lists(candidates_of([[2, 4], [0, 1]], [1.0, 2.0]), ["甲乙丙丁", "無"]))
    write_answers(tmp_path, "eval", ["a", "b"], nbest)
    assert list(read_nbest(tmp_path / "eval_nbest_predictions.json").values()) == nbest
    assert not (tmp_path / "submission.csv").exists()


def test_nothing_is_written_if_anything_is_refused(tmp_path, capsys):
    one = member(tmp_path, "one", [(0, 1)], [1.0])
    (tmp_path / "one/test_nbest_predictions.json").write_text("{")
    with pytest.raises(SystemExit):
        main([one, "--output_dir", str(tmp_path / "out")])
    assert "not JSON" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_weights_without_a_finite_sum_are_refused(tmp_path, capsys):
    runs = [member(tmp_path, name, [(0, 1)], [1.0]) for name in ("one", "two")]
    with pytest.raises(SystemExit):
        main([*runs, "--output_dir", str(tmp_path / "out"), "--weights", "1e308", "1e308"])
    assert "--weights must be numbers from 0 on" in capsys.readouterr().err
