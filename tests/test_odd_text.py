"""Text that a tokenizer normalises away still comes back as the paragraph's own characters."""

import unicodedata

import pytest
import torch
from conftest import make_tokenizer
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from postprocess import best_spans, best_texts, merge_windows
from windows import Collator, build_features, make_layout

LENGTHS = {"max_seq_length": 32, "max_question_length": 10, "doc_stride": 7}
TOKENIZERS = {family: make_tokenizer(family) for family in ("bert", "roberta", "xlm-roberta")}
PIECES = [
    *(
        "臺北市",
        "圖書館",
        "《紅樓夢》",
        "（",
        "）",
        "，",
        "１９５２",
        "1,234",
        "Café",
        "cafe\u0301",
        "TAMSUI",
        "naïve",
        "ﬁ",
        "İ",
    ),
    *("\u0301", "\u20dd", "\u200b", "\u200d", "\ufeff", "\u202e", "שלום", "مرحبا", "😀", "👩\u200d👧", "🇹🇼", "𠀋", "ß"),
    *("\r\n", "\n", "\t", " ", "\u3000", "\u00a0", "\u2028", "\x00", "\x07", "\x85", "\ufffd", "\uffff", "\ue000"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)


def gold_answer(tokenizer, question, context, start, end, lengths=LENGTHS):
    """What comes back if the model is right: logits of 1 at the labels of every window, the best span's text.

    None where no window holds the whole answer, which then has no place to be right at.
    """
    layout = make_layout(tokenizer, **lengths)
    answers = {"text": [context[start:end]], "answer_start": [start]}
    batch = {"id": ["0"], "question": [question], "context": [context], "answers": [answers]}
    rows = Dataset(build_features(batch, [0], tokenizer, layout, "stride", True)).with_format("numpy")
    inputs = Collator(tokenizer)([rows[i] for i in range(len(rows))])
    assert inputs["input_ids"].shape[1] <= lengths["max_seq_length"]
    gold = [
        torch.zeros(inputs["input_ids"].shape).scatter_(
            1, inputs[name].clamp_max(inputs["input_ids"].shape[1] - 1)[:, None], 1.0
        )
        * (inputs["char_ends"] > 0)
        for name in ("start_positions", "end_positions")
    ]
    if not gold[0].any():
        return None
    scores, spans = best_spans(*gold, inputs["char_starts"], inputs["char_ends"], 1, 32)
    candidates = merge_windows(inputs["example"].numpy(), scores.numpy(), spans.numpy(), 1, 1)
    return best_texts(candidates, [context])[0]


def by_hand(tokenizer, context, start, end):
    """The characters of all tokens that touch the answer, white space at the tokens' edges left out, and combining
    marks behind a token that no token covers taken in.

    And how many tokens these are (more than there are where they do not cover all of the answer).
    """
    encoded = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    tokens = []
    for first, last in encoded["offset_mapping"]:
        while first < last and context[first].isspace():
            first += 1
        while first < last and context[last - 1].isspace():
            last -= 1
        tokens.append((first, last))
    covered = {place for first, last in tokens for place in range(first, last)}
    for number, (first, last) in enumerate(tokens):
        while first < last < len(context) and last not in covered and unicodedata.category(context[last])[0] == "M":
            last += 1
        tokens[number] = (first, last)
    touching = [(first, last) for first, last in tokens if first < last and first < end and start < last]
    if not touching:
        return None, 0
    places = [tokens.index(touching[0]), len(tokens) - 1 - tokens[::-1].index(touching[-1])]
    # An answer's first or last character that no token covers (a combining one) may lie beyond a window's edge.
    covered = touching[0][0] <= start and end <= touching[-1][1]
    return context[touching[0][0] : touching[-1][1]], places[1] - places[0] + 1 if covered else len(tokens) + 99


@pytest.mark.parametrize("family", TOKENIZERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(question=texts, context=texts, data=st.data())
@example(question="", context="字", data=None)
@example(question="問" * 5000, context="開館於１９５２年", data=None)
def test_a_right_model_gives_the_paragraphs_own_characters(family, question, context, data):
    tokenizer = TOKENIZERS[family]
    if not context.strip():
        return
    start = data.draw(st.integers(0, len(context) - 1)) if data else 0
    end = data.draw(st.integers(start + 1, min(len(context), start + 12))) if data else len(context)
    while start < end and context[start].isspace():  # an answer's own edges are no white space
        start += 1
    while start < end and context[end - 1].isspace():
        end -= 1
    expected, tokens = by_hand(tokenizer, context, start, end)
    found = gold_answer(tokenizer, question, context, start, end)
    if expected is None:
        assert found is None or found in context
    elif tokens <= LENGTHS["doc_stride"]:  # so short that some window holds it
        assert found == expected
    else:
        assert found in (None, expected)


@pytest.mark.parametrize(
    ("text", "at"), [("Café２館", 0), ("館\u200b藏cafe\u0301", 50_000), ("《Tamsui😀𠀋》", 99_980)]
)
def test_an_answer_anywhere_in_100_000_characters(bert, text, at):
    filler = "臺北市立圖書館，位於大安區。" * 8000
    context = f"{filler[:at]}，{text}，{filler}"[:100_000]
    start = context.index(f"，{text}，") + 1
    lengths = {"max_seq_length": 128, "max_question_length": 32, "doc_stride": 64}
    assert gold_answer(bert, "何時？" * 500, context, start, start + len(text), lengths) == text
