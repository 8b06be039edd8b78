"""Windows against the tokenizers' own pair encoding, labels against a search by hand, draws against uniformity."""

from pathlib import Path

import numpy as np
import pytest
from conftest import passages, random_examples
from datasets import Dataset, Value, load_from_disk
from scipy.stats import chisquare

import windows
from files import UserError
from windows import (
    NO_LABEL,
    Collator,
    EvaluationWindows,
    TrainingWindows,
    build_features,
    draw_start,
    make_layout,
    split_features,
)

LENGTHS = {"max_seq_length": 48, "max_question_length": 12, "doc_stride": 9}


def features(examples, tokenizer, windows="stride", labels=True, **lengths):
    layout = make_layout(tokenizer, **(LENGTHS | lengths))
    indices = list(range(len(examples["id"])))
    table = build_features(examples, indices, tokenizer, layout, windows, labels)
    return Dataset(table), layout


def test_a_window_is_what_the_tokenizer_makes_of_the_pair(tokenizer):
    """Where question and paragraph fit, a row equals the tokenizer's own encoding of the pair, whatever the family."""
    for context in passages(20, seed=1, most=1):
        examples = {"id": ["0"], "question": ["誰創辦 café？"], "context": [context], "answers": [None]}
        rows, _ = features(examples, tokenizer, labels=False, max_seq_length=128)
        own = tokenizer(examples["question"][0], context)
        assert len(rows) == 1
        for name in ("input_ids", "token_type_ids"):
            assert (name in rows.column_names) == (name in tokenizer.model_input_names)
            if name in rows.column_names:
                assert rows[0][name] == own[name]


def test_windows_start_doc_stride_apart_and_cover_the_paragraph(tokenizer):
    """Whatever the question's length, window i holds the paragraph's tokens from i * doc_stride on."""
    examples = random_examples(30, seed=2)
    rows, layout = features(examples, tokenizer, labels=False)
    after = len(layout.after)
    for number, context in enumerate(examples["context"]):
        tokens = tokenizer(context, add_special_tokens=False)["input_ids"]
        own = [row for row in rows if row["example"] == number]
        starts = range(0, max(1, len(tokens) - layout.room + layout.doc_stride), layout.doc_stride)
        assert len(own) == len(starts)
        for row, start in zip(own, starts, strict=True):
            context_tokens = row["input_ids"][row["context_start"] : len(row["input_ids"]) - after]
            assert context_tokens == tokens[start : start + layout.room]
            assert row["length"] == len(row["input_ids"]) <= LENGTHS["max_seq_length"]
        assert own[-1]["input_ids"][-after - 1] == tokens[-1]


def test_windows_are_those_of_return_overflowing_tokens(tokenizer):
    """Of the paragraph alone, with the overlap that `doc_stride` leaves."""
    examples = random_examples(30, seed=2)
    rows, layout = features(examples, tokenizer, labels=False)
    several = 0
    for number, context in enumerate(examples["context"]):
        own = tokenizer(
            context,
            add_special_tokens=False,
            truncation=True,
            max_length=layout.room,
            stride=layout.room - layout.doc_stride,
            return_overflowing_tokens=True,
        )["input_ids"]
        found = [
            row["input_ids"][row["context_start"] : len(row["input_ids"]) - len(layout.after)]
            for row in rows
            if row["example"] == number
        ]
        assert found == own
        several += len(own) > 1
    assert several > 10


def test_questions_are_cut_and_paragraphs_without_tokens_get_one_window(bert):
    examples = {"id": ["0", "1"], "question": ["誰" * 50, ""], "context": ["", " \u3000\n"], "answers": [None, None]}
    rows, _ = features(examples, bert, labels=False)
    assert [len(row["input_ids"]) for row in rows] == [12 + 3, 3]
    assert not any(end for row in rows for end in row["char_ends"])


def expected_label(row, layout, start, end):
    """First and last token by a walk over the row's characters, `[CLS]` where the window lacks a part of the answer."""
    covering = [
        position
        for position, (begin, stop) in enumerate(zip(row["char_starts"], row["char_ends"], strict=True))
        if begin < stop and begin < end and start < stop
    ]
    if not covering:
        return None
    covered = {c for p in covering for c in range(row["char_starts"][p], row["char_ends"][p])}
    return (covering[0], covering[-1]) if {start, end - 1} <= covered else (layout.cls_position, layout.cls_position)


def test_labels_stand_on_the_whole_answer_or_on_cls(tokenizer):
    """Every label agrees with a walk over characters; an answer that begins or ends in white space has no walk."""
    examples = random_examples(150, seed=3)
    rows, layout = features(examples, tokenizer)
    checked = on_answer = 0
    for row in rows:
        answer = examples["answers"][row["example"]]
        text, start = answer["text"][0], answer["answer_start"][0]
        expected = expected_label(row, layout, start, start + len(text))
        if text[0].isspace() or text[-1].isspace() or expected is None:
            continue
        got = row["start_positions"], row["end_positions"]
        # A SentencePiece "▁" in front may cover the answer's first character too: either of the two tokens is right.
        if row["char_starts"][got[0]] == row["char_starts"][expected[0]]:
            got = (expected[0], got[1])
        assert got == expected
        checked += 1
        on_answer += got[0] != layout.cls_position
    assert checked > 200 and on_answer > 100 and on_answer < checked


def test_answer_text_by_offsets_is_the_paragraphs_own(tokenizer):
    """`[UNK]`, accents, case, full-width digits and spaces come back as they stand in the paragraph."""
    context = "在 Tamsui 的 Café 於２０１２年開幕，《紅樓夢》😀展出。"
    for text in ("Café", "２０１２年", "《紅樓夢》", "😀", "Tamsui"):
        start = context.index(text)
        examples = {
            "id": ["0"],
            "question": ["何時"],
            "context": [context],
            "answers": [{"text": [text], "answer_start": [start]}],
        }
        rows, _ = features(examples, tokenizer, max_seq_length=128)
        row = rows[0]
        assert context[row["char_starts"][row["start_positions"]] : row["char_ends"][row["end_positions"]]] == text


def test_a_question_without_an_answer_is_not_labelled(bert):
    examples = random_examples(3, seed=4)
    examples["answers"][1] = {"text": [], "answer_start": []}
    rows, _ = features(examples, bert)
    for row in rows:
        assert (row["start_positions"] == NO_LABEL) == (row["example"] == 1)


@pytest.mark.parametrize("windows", ["centered", "random"])
def test_one_window_a_question(tokenizer, windows):
    """Both hold the whole answer; a centred answer is in the middle unless the paragraph ends."""
    examples = random_examples(60, seed=5)
    rows, layout = features(examples, tokenizer, windows=windows)
    assert rows["example"][:] == list(range(60))
    data = TrainingWindows(rows, layout, seed=0, negative_window_ratio=0.0)
    for number in range(60):
        row = data[number]
        assert len(row["input_ids"]) == row["length"] <= LENGTHS["max_seq_length"]
        assert len(row["char_starts"]) == len(row["input_ids"])
        context, answer = examples["context"][number], examples["answers"][number]
        text, start = answer["text"][0], answer["answer_start"][0]
        if text != text.strip() or row["start_positions"] == layout.cls_position:
            continue  # white space; or an answer of more tokens than the window has
        first, last = int(row["start_positions"]), int(row["end_positions"])
        assert row["char_starts"][first] <= start and start + len(text) <= row["char_ends"][last]
        context_end = len(row["input_ids"]) - len(layout.after)
        before, behind = first - row["context_start"], context_end - 1 - last
        at_begin = row["char_starts"][row["context_start"] : context_end].min() == 0
        at_end = row["char_ends"].max() >= len(context.rstrip())
        if windows == "centered" and not (at_begin or at_end):
            assert abs(int(before) - int(behind)) <= 1


def test_the_drawn_window_depends_on_seed_epoch_and_row_alone(bert):
    examples = random_examples(40, seed=6)
    rows, layout = features(examples, bert, windows="random")
    one, same, other = (TrainingWindows(rows, layout, seed, 0.3) for seed in (1, 1, 2))
    numbers = list(range(3 * 40))
    first = [one[n]["input_ids"].tolist() for n in numbers]
    again = [row["input_ids"].tolist() for row in same.__getitems__(numbers[::-1])][::-1]
    assert first == again
    assert first != [other[n]["input_ids"].tolist() for n in numbers]
    assert first[:40] != first[40:80]


def test_window_starts_are_uniform_over_those_that_hold_the_answer():
    generator = np.random.default_rng(0)
    tokens, room, first, last = 60, 20, 25, 29
    draws = np.array([draw_start(generator, tokens, room, first, last, 0.0) for _ in range(20_000)])
    counts = np.bincount(draws, minlength=tokens - room + 1)
    assert counts[:10].sum() == counts[26:].sum() == 0
    assert chisquare(counts[10:26]).pvalue > 1e-3
    draws = np.array([draw_start(generator, tokens, room, first, last, 0.25) for _ in range(20_000)])
    holds = (draws >= 10) & (draws <= 25)
    assert chisquare([holds.sum(), (~holds).sum()], [15_000, 5_000]).pvalue > 1e-3
    assert chisquare(np.bincount(draws[~holds], minlength=41)[[*range(10), *range(26, 41)]]).pvalue > 1e-3


def test_draws_at_the_edges():
    generator = np.random.default_rng(0)
    assert {draw_start(generator, 10, 9, 0, 0, 0.0) for _ in range(50)} == {0}
    assert {draw_start(generator, 10, 9, 9, 9, 0.0) for _ in range(50)} == {1}
    assert {draw_start(generator, 10, 9, 4, 5, 1.0) for _ in range(50)} == {0, 1}  # every start holds it
    assert {draw_start(generator, 10, 9, 0, 0, 1.0) for _ in range(50)} == {1}
    assert {draw_start(generator, 10, 4, 1, 8, 0.0) for _ in range(200)} == set(range(7))  # no window holds it
    assert {draw_start(generator, 10, 4, -5, -5, 0.5) for _ in range(200)} == set(range(7))


def test_batches_are_padded_to_their_longest_row(bert):
    rows, layout = features(random_examples(5, seed=7), bert)
    batch = Collator(bert)([rows.with_format("numpy")[i] for i in range(4)])
    longest = max(len(rows[i]["input_ids"]) for i in range(4))
    assert {tuple(value.shape) for value in batch.values()} == {(4, longest), (4,)}
    for i in range(4):
        length = len(rows[i]["input_ids"])
        assert batch["attention_mask"][i].tolist() == [1] * length + [0] * (longest - length)
        assert batch["input_ids"][i].tolist() == rows[i]["input_ids"] + [bert.pad_token_id] * (longest - length)
        assert batch["char_ends"][i, length:].sum() == 0
    assert Collator(bert, 64)([rows.with_format("numpy")[0]])["input_ids"].shape == (1, 64)
    assert Collator(bert, 64, layout.max_seq_length)([rows.with_format("numpy")[0]])["input_ids"].shape == (1, 48)


def stored(rows, folder):
    """The rows as `datasets` caches them: in a file that memory is mapped to."""
    rows.save_to_disk(folder)
    return load_from_disk(folder)


def test_evaluation_windows_are_all_rows_longest_first_in_each_part(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "_SORTED_TOGETHER", 8)
    rows = stored(features(random_examples(20, seed=8), tokenizer)[0], tmp_path)
    found = EvaluationWindows(rows)
    assert len(found) == len(rows) > 3 * 8
    batches = [found.__getitems__(list(range(i, min(i + 4, len(found))))) for i in range(0, len(found), 4)]
    read = [row for batch in batches for row in batch]
    for first in range(0, len(rows), 8):
        lengths = [int(row["length"]) for row in read[first : first + 8]]
        assert lengths == sorted(rows[first : first + 8]["length"], reverse=True)
    plain = [{name: np.asarray(value).tolist() for name, value in row.items()} for row in read]
    assert sorted(plain, key=str) == sorted(rows.to_list(), key=str)
    assert found[0]["length"] == max(rows[:8]["length"])  # an earlier part can be asked for again


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads what Linux says of its mapped files")
def test_evaluation_windows_let_go_of_what_they_have_read(tmp_path):
    count, length = 12_000, 500
    numbers = np.arange(count * length, dtype=np.uint16).reshape(count, length)
    rows = Dataset.from_dict({"input_ids": list(numbers), "example": range(count), "length": [length] * count})
    found = EvaluationWindows(stored(rows, tmp_path))
    for first in range(0, count, 32):
        found.__getitems__(list(range(first, min(first + 32, count))))
    size = sum(path.stat().st_size for path in tmp_path.glob("*.arrow"))
    told = Path("/proc/self/smaps").read_text()
    kept = [int(part.split("Rss:")[1].split()[0]) * 1024 for part in told.split(str(tmp_path))[1:]]
    assert 0 < sum(kept) < size / 3


def test_features_have_the_smallest_type_that_holds_them(bert, tmp_path):
    examples = Dataset.from_dict(random_examples(5, seed=9)).cast_column("id", Value("string"))
    layout = make_layout(bert, **LENGTHS)
    small = split_features(examples, bert, layout, "stride", True)
    assert small.features["input_ids"].feature.dtype == small.features["char_ends"].feature.dtype == "uint8"
    long = examples.map(lambda row: {"context": row["context"] + "字" * 70_000})
    wide = split_features(long, bert, layout, "stride", True)
    assert wide.features["char_ends"].feature.dtype == "uint32"
    assert max(wide.with_format("numpy")["char_ends"][-1]) > 65_535


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"doc_stride": 0}, "--doc_stride is 0, must lie between 1 and 33"),
        ({"doc_stride": 34}, "--doc_stride is 34, must lie between 1 and 33"),
        ({"max_question_length": 45}, "--max_question_length 45 leaves no room"),
        ({"max_question_length": 0}, "--max_question_length is 0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(bert, lengths, message):
    with pytest.raises(UserError, match=message):
        make_layout(bert, **(LENGTHS | lengths))


def test_the_default_stride_is_two_thirds_of_the_window(bert):
    assert make_layout(bert, 48, 12, None).doc_stride == 22
    assert make_layout(bert, 16, 12, None).doc_stride == 1
