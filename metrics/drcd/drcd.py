"""Exact match as Kaggle counts it in the course, and F1 over characters."""

from collections import Counter

import datasets
import evaluate

_DESCRIPTION = """Scores of extracted Chinese answers, as shares between 0 and 1, means over the questions.

`exact_match`: the answer is one of the reference answers. The course's Kaggle page deletes ASCII commas on both sides;
nothing else is normalised (DRCD's own script also drops punctuation and case: its numbers are not comparable).
`f1`: characters that answer and reference share (with multiplicity), against the better fitting reference; ASCII
commas deleted as well."""

_INPUTS = """
Args:
    predictions: list of answers (str)
    references: list of lists of reference answers (str), at least one a question
"""


class Drcd(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=features)

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {
            "exact_match": sum(exact_match(prediction, answers) for prediction, answers in pairs) / len(pairs),
            "f1": sum(character_f1(prediction, answers) for prediction, answers in pairs) / len(pairs),
        }


def exact_match(prediction: str, answers: list[str]) -> bool:
    """Whether a prediction is one of the reference answers, ASCII commas deleted on both sides."""
    return without_commas(prediction) in map(without_commas, answers)


def character_f1(prediction: str, answers: list[str]) -> float:
    """Share of common characters with the best fitting reference answer, ASCII commas deleted on both sides."""
    return max(_overlap(without_commas(prediction), without_commas(answer)) for answer in answers)


def without_commas(text: str) -> str:
    """`text` without ASCII commas, which the course deletes because a submission is a CSV file."""
    return text.replace(",", "")


def _overlap(prediction: str, answer: str) -> float:
    """Harmonic mean of the shares of characters of each that the other has too; 1 if both are empty."""
    if not prediction or not answer:
        return float(prediction == answer)
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer))
