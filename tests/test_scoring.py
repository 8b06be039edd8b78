"""Scores as Kaggle counts them, and their breakdown."""

import numpy as np
import pytest
from datasets import Dataset

from scoring import bands, breakdown, breakdown_table, question_kind, score_texts


def test_exact_match_deletes_ascii_commas_and_nothing_else():
    texts = ["1,234", "1234", "１，２", "《書》", "ab", "x"]
    references = [["1234"], ["1,2,34"], ["１２"], ["書"], ["AB"], ["y", "x"]]
    assert score_texts(texts, references)["exact_match"] == pytest.approx(3 / 6)


def test_f1_is_over_characters_and_the_best_reference_counts():
    assert score_texts(["甲乙丙"], [["乙丙丁"]])["f1"] == pytest.approx(2 / 3)
    assert score_texts(["甲甲"], [["甲"]])["f1"] == pytest.approx(2 / 3)
    assert score_texts(["1,2"], [["12"]])["f1"] == 1
    assert score_texts(["", "甲"], [["甲"], ["乙", "甲乙"]])["f1"] == pytest.approx((0 + 2 / 3) / 2)


def test_questions_without_references_are_left_out():
    assert score_texts(["甲", "乙"], [["甲"], []]) == {"exact_match": 1, "f1": 1}


def examples(ids, questions, answers):
    return Dataset.from_dict(
        {
            "id": ids,
            "question": questions,
            "context": ["甲" * 150 + (answer or "") for answer in answers],
            "answers": [
                {"text": [answer] if answer else [], "answer_start": [150] if answer else []} for answer in answers
            ],
        }
    )


def test_the_breakdown_counts_every_labelled_question_once_in_each_dimension():
    rows = examples(["0", "1", "3115", "3116"], ["誰？", "何時？", "誰？", "多少？"], ["林", "三年", "林", None])
    table = breakdown(rows, ["林", "三年", "錯", ""], np.array([1, 2, 1, 1]), np.array([True, False, True, True]))
    assert table["source"] == {
        "spoken": {"questions": 1, "exact_match": 0.0, "f1": 0.0},
        "text": {"questions": 2, "exact_match": 1.0, "f1": 1.0},
    }
    assert table["twins"] == {"text right, spoken wrong": {"questions": 1}}
    assert table["paragraph"]["several windows"]["questions"] == 1
    assert table["answer"]["across windows"] == {"questions": 1, "exact_match": 1.0, "f1": 1.0}
    assert {kind: values["questions"] for kind, values in table["question asks"].items()} == {
        "when 何時": 1,
        "who 誰": 2,
    }
    assert "answer length" not in table  # one kind only
    for dimension in ("source", "question asks", "paragraph", "answer"):
        assert sum(values["questions"] for values in table[dimension].values()) == 3
    assert "text right, spoken wrong" in breakdown_table(table)


def test_other_numberings_do_not_pass_for_the_courses():
    for ids in (["0", "1"], ["0", "9999"], ["a", "3115"]):
        table = breakdown(examples(ids, ["誰？"] * 2, ["林", "王"]), ["林", "王"], np.ones(2, int), np.ones(2, bool))
        assert "source" not in table and "twins" not in table


@pytest.mark.parametrize(
    ("question", "kind"),
    [("誰發明了它", "who 誰"), ("他哪一年出生", "when 何時"), ("位於哪裡", "where 哪裡"), ("有幾座", "how many 多少"),
     ("為何失敗", "why 為什麼"), ("是什麼", "what 什麼"), ("是哪座山", "which 哪"), ("首都是?", "other")],
)  # fmt: skip
def test_question_words(question, kind):
    assert question_kind(question) == kind


def test_bands():
    assert bands([1, 2, 3, 4, 5], [2, 4]) == ["1. up to 2", "1. up to 2", "2. 3 to 4", "2. 3 to 4", "3. over 4"]
