"""Answers → scores: exact match and F1 over a split, and broken down by what makes a question easy or hard."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pandas as pd
from datasets import Dataset

from files import UserError, read_json, read_text, replacing_file
from metrics.drcd.drcd import character_f1, exact_match

Breakdown = dict[str, dict[str, dict[str, float]]]
METRIC = Path(__file__).parent / "metrics" / "drcd"
_DATASET_NOTE = ".eval_dataset"
DIMENSIONS = ["source", "question asks", "answer length", "paragraph length"]

# The course numbers its dev questions: text ones first, then their spoken twins, machine-read and recognised again.
FIRST_SPOKEN, LAST_SPOKEN = 3115, 4130

# What a question asks for, by the first of these found in it.
QUESTION_WORDS = {
    "who 誰": "誰|何人|哪位|哪一位",
    "when 何時": "何時|幾時|哪年|何年|哪一年|哪天|哪一天|什麼時候|幾年|幾月|哪個月|哪個世紀|何月|何日",
    "where 哪裡": "哪裡|哪里|哪兒|何處|何地|什麼地方|哪個國家|哪國|哪座城市|哪個城市",
    "how many 多少": "多少|幾",
    "why 為什麼": "為什麼|為何|為甚麼|原因",
    "how 如何": "如何|怎麼|怎樣",
    "which 哪": "哪|何",
    "what 什麼": "什麼|甚麼|啥",
}


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `f1` (metrics/drcd), shares between 0 and 1, over the questions that have references."""
    labelled = [(text, answers) for text, answers in zip(texts, references, strict=True) if answers]
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return metric.compute(
        predictions=[text for text, _ in labelled], references=[list(answers) for _, answers in labelled]
    )


def read_results(output_dir: Path) -> dict[str, Any]:
    """The figures that `output_dir` holds already. Raises UserError if its `all_results.json` is something else."""
    path = output_dir / "all_results.json"
    results = read_json(path) if path.exists() else {}
    if not isinstance(results, dict):
        raise UserError(f"{path}: not the figures of a run; delete it, or choose another --output_dir")
    return results


def note_dataset(output_dir: Path, dataset_name: str) -> None:
    """Note by which dataset the answers in `output_dir` were scored, in a hidden file: it may be a path, which is
    nobody else's business where the folder is published."""
    with replacing_file(output_dir / _DATASET_NOTE) as file:
        file.write(dataset_name)


def noted_dataset(output_dir: Path) -> str:
    """The dataset of `note_dataset`. Raises UserError if there is no note."""
    path = output_dir / _DATASET_NOTE
    if not path.exists():
        raise UserError(f"{output_dir}: it is not known by which dataset it was scored; name it with --dataset_name")
    return read_text(path)


def breakdown(examples: Dataset, texts: Sequence[str], windows: np.ndarray, whole: np.ndarray) -> Breakdown:
    """Scores by kind of question: dimension → kind → `questions`, `exact_match`, `f1`.

    `windows` [questions] is the number of windows of a question's paragraph, `whole` [questions] whether one of them
    holds the whole answer. Lengths are characters, of the first reference answer. Questions without references are left
    out, and so is a dimension with a single kind.
    """
    table = question_table(examples, texts)
    table["paragraph"] = np.where(windows == 1, "one window", "several windows")
    table["answer"] = np.where(whole, "whole in a window", "across windows")
    table = table[table.labelled]
    rows = {}
    for dimension in [*DIMENSIONS, "paragraph", "answer"]:
        groups = table.groupby(dimension)
        if len(groups) > 1:
            rows[dimension] = {
                str(kind): {"questions": len(own), "exact_match": own.exact_match.mean(), "f1": own.f1.mean()}
                for kind, own in groups
            }
    if twins := twin_outcomes(table):
        rows["twins"] = {kind: {"questions": count} for kind, count in twins.items()}
    return rows


def question_table(examples: Dataset, texts: Sequence[str]) -> pd.DataFrame:
    """One row a question: its kind in each of `DIMENSIONS`, `exact_match`, `f1` of its answer in `texts`, `labelled`.

    Lengths are characters, of the first reference answer. A question without references scores nothing. `twin` is the
    same for the same question and answers, which stand twice in the course's dev set: over a text and its spoken twin.
    """
    answers = [row["text"] for row in examples["answers"][:]]
    return pd.DataFrame(
        {
            "source": spoken_kinds(examples),
            "question asks": [question_kind(question) for question in examples["question"][:]],
            "answer length": bands([len(found[0]) if found else 0 for found in answers], [2, 4, 8, 16]),
            "paragraph length": bands([len(context) for context in examples["context"][:]], [100, 300, 400, 500, 700]),
            "exact_match": [bool(gold) and exact_match(text, gold) for text, gold in zip(texts, answers, strict=True)],
            "f1": [character_f1(text, gold) if gold else 0.0 for text, gold in zip(texts, answers, strict=True)],
            "labelled": [bool(gold) for gold in answers],
            "twin": list(zip(examples["question"][:], map(tuple, answers), strict=True)),
        }
    )


def twin_outcomes(table: pd.DataFrame) -> dict[str, int]:
    """How often a question over a text and over its spoken twin was answered how; empty without such pairs."""
    pairs = table[table.source == "text"].merge(table[table.source == "spoken"], on="twin")
    if not len(pairs):
        return {}
    outcome = pairs.exact_match_x.map({True: "text right, ", False: "text wrong, "}) + pairs.exact_match_y.map(
        {True: "spoken right", False: "spoken wrong"}
    )
    return {kind: int(count) for kind, count in outcome.value_counts().items()}


def spoken_kinds(examples: Dataset) -> list[str | None]:
    """ "text" or "spoken" for every question where the course's numbering tells, else None for all."""
    ids = [int(id_) if id_.isascii() and id_.isdigit() else LAST_SPOKEN + 1 for id_ in examples["id"][:]]
    if not ids or max(ids) > LAST_SPOKEN or max(ids) < FIRST_SPOKEN:
        return [None] * len(ids)
    return ["text" if number < FIRST_SPOKEN else "spoken" for number in ids]


def question_kind(question: str) -> str:
    """What a question asks for, by its question word; "other" without one."""
    return next((kind for kind, words in QUESTION_WORDS.items() if re.search(words, question)), "other")


def bands(lengths: Sequence[int], edges: Sequence[int]) -> list[str]:
    """The band of each length between edges, named so that they sort: `1. up to 2`, `2. 3 to 4`, ..."""
    names = [f"1. up to {edges[0]}"]
    names += [f"{i + 2}. {low + 1} to {high}" for i, (low, high) in enumerate(itertools.pairwise(edges))]
    names.append(f"{len(edges) + 1}. over {edges[-1]}")
    return [names[place] for place in np.searchsorted(edges, lengths)]


def breakdown_table(rows: Breakdown) -> str:
    """The breakdown as lines of text, shares with four digits."""
    lines = [
        {"by": dimension, "kind": kind} | values for dimension, kinds in rows.items() for kind, values in kinds.items()
    ]
    return pd.DataFrame(lines).to_string(index=False, float_format="{:.4f}".format, na_rep="") if lines else ""
