"""Spans → answers → submission: the exact n-best span search, its merging over windows, and the files it ends in.

Run alone, it rewrites predictions and submission from the n-best files of a run, or makes those of several runs one:

    python postprocess.py outputs/boss/macbert outputs/boss/roberta --output_dir outputs/boss
"""

import argparse
import csv
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from files import UserError, printable, read_json, replacing_file, write_json
from options import Parser, command
from scoring import read_results, score_texts

MISSING = -1  # the character offset of a candidate that is not there
BRACKETS = dict(["「」", "『』", "《》", "〈〉", "（）", "()", "【】", "“”"])


def best_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    char_starts: torch.Tensor,
    char_ends: torch.Tensor,
    n_best_size: int,
    max_answer_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact `n_best_size` best distinct spans of each window, on the tensors' device.

    Candidates are all token spans whose two ends cover characters (`char_starts < char_ends`) and which hold at most
    `max_answer_length` tokens; score = start logit + end logit in float32. Of several token spans over the same
    characters (byte-level tokens of one Chinese character) the best counts. Ties go to the earlier start, then to the
    earlier end.

    Args: all [windows, tokens]; `char_starts`, `char_ends` in characters of the paragraph, end exclusive.

    Returns scores [windows, n_best_size], float32, falling, -inf where a window has fewer candidates; and spans
    [windows, n_best_size, 2], a candidate's first character and the one after its last, `MISSING` where there is none.
    """
    tokens = start_logits.shape[1]
    width = min(max_answer_length, tokens)
    usable = char_starts < char_ends
    starts = start_logits.float().masked_fill(~usable, -torch.inf)
    ends = end_logits.float().masked_fill(~usable, -torch.inf)
    # scores[row, i, l] is the span from token i to token i + l: only the band within max_answer_length is ever made.
    ends = torch.nn.functional.pad(ends, (0, width - 1), value=-torch.inf).unfold(1, width, 1)
    scores = (starts[:, :, None] + ends).flatten(1)
    share = _tokens_a_character(char_starts, char_ends, usable)
    kept = min(n_best_size * share, scores.shape[1])
    scores, flat = _stable_top(scores, kept)
    first, last = flat // width, (flat // width + flat % width).clamp_max(tokens - 1)
    spans = torch.stack([char_starts.gather(1, first), char_ends.gather(1, last)], dim=2)
    missing = scores == -torch.inf
    spans[missing] = MISSING
    if share > 1:
        scores, spans = _drop_repeats(scores, spans)
    lacking = max(0, n_best_size - scores.shape[1])
    scores = torch.nn.functional.pad(scores, (0, lacking), value=-torch.inf)
    spans = torch.nn.functional.pad(spans, (0, 0, 0, lacking), value=MISSING)
    return scores[:, :n_best_size], spans[:, :n_best_size]


def independent_spans(
    start_logits: torch.Tensor,
    end_logits: torch.Tensor,
    char_starts: torch.Tensor,
    char_ends: torch.Tensor,
    n_best_size: int,
    max_answer_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sample code's choice, as `best_spans` would return it: best start and best end of a window, independently.

    One candidate a window. Its text is empty where the end comes before the start; `max_answer_length` does not hold.
    """
    usable = char_starts < char_ends
    start_scores, first = start_logits.float().masked_fill(~usable, -torch.inf).max(dim=1, keepdim=True)
    end_scores, last = end_logits.float().masked_fill(~usable, -torch.inf).max(dim=1, keepdim=True)
    begin = char_starts.gather(1, first)
    spans = torch.stack([begin, torch.maximum(char_ends.gather(1, last), begin)], dim=2)
    scores = start_scores + end_scores
    spans[scores == -torch.inf] = MISSING
    lacking = n_best_size - 1
    return (
        torch.nn.functional.pad(scores, (0, lacking), value=-torch.inf),
        torch.nn.functional.pad(spans, (0, 0, 0, lacking), value=MISSING),
    )


@dataclass(frozen=True)
class Candidates:
    """Candidates of many questions, best first: question i has `[bounds[i], bounds[i + 1])` of the flat arrays.

    `spans` [candidates, 2] in characters of the paragraph, end exclusive; `scores` float32; `probabilities` sum to 1
    over a question's candidates.
    """

    bounds: np.ndarray
    spans: np.ndarray
    scores: np.ndarray
    probabilities: np.ndarray


def merge_windows(
    examples: np.ndarray, scores: np.ndarray, spans: np.ndarray, questions: int, n_best_size: int
) -> Candidates:
    """The `n_best_size` best candidates of every question over all its windows.

    A span seen in several windows counts once, with its best score. Ties go to the earlier start, then the earlier
    end, so the order of the windows does not matter.

    Args: `examples` [windows], the question of a window, below `questions`; `scores` [windows, n];
    `spans` [windows, n, 2], `MISSING` where there is no candidate.
    """
    present = spans[:, :, 0] != MISSING
    question = np.broadcast_to(examples[:, None], present.shape)[present]
    spans, scores = spans[present], scores[present].astype(np.float32)
    order = np.lexsort((-scores, spans[:, 1], spans[:, 0], question))
    question, spans, scores = question[order], spans[order], scores[order]
    new = np.ones(len(question), dtype=bool)
    new[1:] = (question[1:] != question[:-1]) | (spans[1:] != spans[:-1]).any(axis=1)
    question, spans, scores = question[new], spans[new], scores[new]
    order = np.lexsort((-scores, question))  # stable: ties stay in the order of start and end
    question, spans, scores = question[order], spans[order], scores[order]
    rank = np.arange(len(question)) - np.searchsorted(question, question)
    question, spans, scores = (values[rank < n_best_size] for values in (question, spans, scores))
    bounds = np.searchsorted(question, np.arange(questions + 1))
    return Candidates(bounds, spans, scores, _softmax(scores, bounds))


def nbest_lists(candidates: Candidates, contexts: Sequence[str]) -> Iterator[list[dict]]:
    """Each question's candidates, best first, as they stand in an n-best file.

    A candidate is its `text`, cut from the paragraph; `start` and `end` in characters, end exclusive; `score`; and
    `probability`. A question without any candidate (an empty paragraph) has an empty list.
    """
    starts, ends = candidates.spans[:, 0].tolist(), candidates.spans[:, 1].tolist()
    scores, probabilities = candidates.scores.tolist(), candidates.probabilities.tolist()
    for context, begin, end in zip(contexts, candidates.bounds, candidates.bounds[1:], strict=False):
        yield [
            {"text": context[starts[i] : ends[i]], "start": starts[i], "end": ends[i], "score": scores[i],
             "probability": probabilities[i]}
            for i in range(begin, end)
        ]  # fmt: skip


def best_texts(candidates: Candidates, contexts: Sequence[str]) -> list[str]:
    """Every question's answer by `choose`."""
    spans = candidates.spans.tolist()
    return [
        choose(context[start:end] for start, end in spans[first:last])
        for context, first, last in zip(contexts, candidates.bounds, candidates.bounds[1:], strict=False)
    ]


def choose(texts: Iterable[str]) -> str:
    """The answer among candidates' texts, best first: the best whose brackets are balanced, else the best.

    No gold answer of DRCD has a bracket without its other half. Empty without candidates.
    """
    first = None
    for text in texts:
        if is_balanced(text):
            return text
        first = text if first is None else first
    return first or ""


def is_balanced(text: str) -> bool:
    """Whether every bracket or quotation mark of `BRACKETS` in `text` has its other half, properly nested."""
    open_ones = []
    for char in text:
        if char in BRACKETS:
            open_ones.append(BRACKETS[char])
        elif char in BRACKETS.values() and (not open_ones or open_ones.pop() != char):
            return False
    return not open_ones


def write_answers(output_dir: Path, split: str, ids: Sequence[str], nbest: Sequence[list[dict]]) -> list[Path]:
    """Write `{split}_nbest_predictions.json`, `{split}_predictions.json` and, for the test split, `submission.csv`.

    Returns the paths. Each file is replaced as a whole.
    """
    paths = [output_dir / f"{split}_predictions.json", output_dir / f"{split}_nbest_predictions.json"]
    texts = {id_: choose(c["text"] for c in candidates) for id_, candidates in zip(ids, nbest, strict=True)}
    write_json(paths[0], texts)
    with replacing_file(paths[1]) as file:
        file.write("{")
        for number, (id_, candidates) in enumerate(zip(ids, nbest, strict=True)):
            line = f"{json.dumps(id_, ensure_ascii=False)}: {json.dumps(candidates, ensure_ascii=False)}"
            file.write(f"{',' if number else ''}\n{line}")
        file.write("\n}\n")
    if split == "test":
        paths.append(output_dir / "submission.csv")
        write_submission(paths[-1], texts)
    return paths


def write_submission(path: Path, texts: dict[str, str]) -> None:
    """Kaggle's CSV of the course: `ID,Answer`, ASCII commas deleted from the answers.

    Course ids are written in numerical order, ids of other data in the order of `texts`.
    """
    numbers = all(id_.isascii() and id_.isdigit() and len(id_) < 19 for id_ in texts)
    ids = sorted(texts, key=int) if numbers else list(texts)
    with replacing_file(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ID", "Answer"])
        writer.writerows([id_, texts[id_].replace(",", "")] for id_ in ids)


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    references = read_references(arguments.dataset_name) if arguments.dataset_name else None
    for split in common_splits(arguments.runs):
        nbests = {run: read_nbest(nbest_path(run, split)) for run in arguments.runs}
        nbest = ensemble(nbests, arguments.weights) if len(nbests) > 1 else nbests.popitem()[1]
        scored = split == "eval" and references is not None
        if scored and not (nbest and nbest.keys() <= references.keys() and any(references[id_] for id_ in nbest)):
            raise UserError(f"--dataset_name {arguments.dataset_name}: it does not have the questions of the runs")
        for path in write_answers(arguments.output_dir, split, list(nbest), list(nbest.values())):
            print(f"wrote {path}")
        if scored:
            score_and_note(arguments.output_dir, arguments.dataset_name, references, nbest)


def common_splits(runs: Sequence[Path]) -> list[str]:
    """The splits that all runs have answered, "eval" and "test"; raises UserError if there is none."""
    lacking = {
        split: [path for path in (nbest_path(run, split) for run in runs) if not path.exists()]
        for split in ("eval", "test")
    }
    if all(lacking.values()):
        path = lacking["test"][0]
        raise UserError(f"{path}: there is no such file; name output folders in which run_qa.py has answered questions")
    for split, paths in lacking.items():
        if 0 < len(paths) < len(runs):
            print(f"left out the {split} split: there is no {paths[0]}", file=sys.stderr)
    return [split for split, paths in lacking.items() if not paths]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Raises UserError for what does not fit together."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of runs, with their n-best files")
    parser.add_argument("--output_dir", type=Path, help="folder to write to (of a single run: its own)")
    parser.add_argument("--weights", type=float, nargs="+", help="weight of each run in an ensemble (all the same)")
    parser.add_argument("--dataset_name", help="dataset folder, to score the validation split by")
    arguments = parser.parse_args(argv)
    if len(arguments.runs) == 1:
        arguments.output_dir = arguments.output_dir or arguments.runs[0]
    if arguments.output_dir is None:
        raise UserError("--output_dir is missing: name a folder for the ensemble")
    arguments.weights = arguments.weights or [1.0] * len(arguments.runs)
    folders = [run.resolve() for run in arguments.runs]
    if len(folders) > 1 and arguments.output_dir.resolve() in folders:
        raise UserError("--output_dir is one of the runs, whose answers would be lost; name another folder")
    if len(set(folders)) < len(folders):
        raise UserError("the same run stands twice; give it a weight with --weights instead")
    if len(arguments.weights) != len(arguments.runs):
        raise UserError(f"--weights has {len(arguments.weights)} values for {len(arguments.runs)} runs")
    if not all(0 <= weight < float("inf") for weight in arguments.weights) or not sum(arguments.weights):
        raise UserError("--weights must be numbers from 0 on, and not all 0")
    return arguments


def ensemble(runs: dict[Path, dict[str, list[dict]]], weights: Sequence[float]) -> dict[str, list[dict]]:
    """The n-best lists of several runs as one: a span's probability is the weighted mean of what the runs give it.

    Runs meet as character spans, whatever their models, windows and vocabularies. `score` is the logarithm of the
    probability. Raises UserError if the runs do not answer the same questions over the same paragraphs.
    """
    (first, ids), *others = ((path, nbest.keys()) for path, nbest in runs.items())
    for path, own in others:
        if own != ids:
            odd = sorted(own ^ ids)[0]
            raise UserError(
                f"{path}: question {odd!r} is in only one of it and {first}; the runs need the same dataset"
            )
    merged = {}
    total = sum(weights)
    for id_ in ids:
        mixed: dict[tuple[int, int], float] = {}
        texts: dict[tuple[int, int], str] = {}
        for (path, nbest), weight in zip(runs.items(), weights, strict=True):
            for candidate in nbest[id_]:
                span = candidate["start"], candidate["end"]
                mixed[span] = mixed.get(span, 0.0) + weight / total * candidate["probability"]
                if texts.setdefault(span, candidate["text"]) != candidate["text"]:
                    raise UserError(
                        f"{path}: question {id_!r}: characters {span[0]} to {span[1]} are {candidate['text']!r}, "
                        f"elsewhere {texts[span]!r}; the runs need the same dataset"
                    )
        kept = max(len(nbest[id_]) for nbest in runs.values())
        best = sorted(mixed.items(), key=lambda item: (-item[1], item[0]))[:kept]
        merged[id_] = [
            {"text": texts[span], "start": span[0], "end": span[1], "score": math.log(max(p, sys.float_info.min)),
             "probability": p}
            for span, p in best
        ]  # fmt: skip
    return merged


def read_references(dataset_name: str) -> dict[str, list[str]]:
    """The reference answers of a dataset folder's validation split by id. Raises UserError if there are none."""
    try:
        examples = load_dataset(dataset_name, split="validation")
        return {str(row["id"]): row["answers"]["text"] for row in examples}
    except (OSError, ValueError, LookupError, TypeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {dataset_name}: no labelled validation split to be had: {reason}") from None


def score_and_note(
    output_dir: Path, dataset_name: str, references: dict[str, list[str]], nbest: dict[str, list[dict]]
) -> None:
    """Score the answers by a dataset's references, print the score and note both in `all_results.json`."""
    texts = [choose(candidate["text"] for candidate in candidates) for candidates in nbest.values()]
    scores = score_texts(texts, [references[id_] for id_ in nbest])
    figures = {f"eval_{name}": value for name, value in scores.items()} | {"eval_dataset": dataset_name}
    write_json(output_dir / "all_results.json", read_results(output_dir) | figures)
    print(f"validation: exact match {scores['exact_match']:.5f}, F1 {scores['f1']:.5f}")


def nbest_path(run: Path, split: str) -> Path:
    """Where a run's n-best file of a split ("eval" or "test") lies."""
    return run / f"{split}_nbest_predictions.json"


def read_nbest(path: Path) -> dict[str, list[dict]]:
    """The n-best lists by question id. Raises UserError naming file and id if one is not as `nbest_lists` made it."""
    nbest = read_json(path)
    if not isinstance(nbest, dict):
        raise UserError(f"{path}: must hold one object of question ids, holds a {type(nbest).__name__}")
    for id_, candidates in nbest.items():
        if not isinstance(candidates, list) or not all(map(_is_candidate, candidates)) or printable(id_) != id_:
            raise UserError(
                f"{path}: question {id_!r}: must be a list of candidates with text, start, end, score and probability"
            )
    return nbest


def _is_candidate(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and printable(value["text"]) == value["text"]  # JSON may hold halves of surrogate pairs, which no file takes
        and all(type(value.get(name)) is int and value[name] >= 0 for name in ("start", "end"))
        and all(type(value.get(name)) in (int, float) for name in ("score", "probability"))
        and abs(value["score"]) < 1e38  # float32; not NaN
        and 0 <= value["probability"] <= 1
    )


def _stable_top(scores: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` largest of each row and their places, equal ones by place. `torch.topk` leaves their order open."""
    top, places = scores.topk(kept, dim=1)
    least = top[:, -1:]
    # Where the last one kept has equals that were not kept, only a stable sort says which of them comes first.
    unclear = ((scores >= least).sum(dim=1) > kept) & (least[:, 0] > -torch.inf)
    if unclear.any():
        places[unclear] = scores[unclear].sort(dim=1, descending=True, stable=True).indices[:, :kept]
    places = places.sort(dim=1).values
    top, order = scores.gather(1, places).sort(dim=1, descending=True, stable=True)
    return top, places.gather(1, order)


def _tokens_a_character(char_starts: torch.Tensor, char_ends: torch.Tensor, usable: torch.Tensor) -> int:
    """How many token spans at most cover the same characters: 1 unless tokens share characters (byte-level ones)."""
    most = 1
    while True:
        shared = usable[:, most:] & usable[:, :-most] & (char_starts[:, most:] < char_ends[:, :-most])
        if not shared.any():
            return most * most
        most += 1


def _drop_repeats(scores: torch.Tensor, spans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's candidates with later ones of the same span made missing and moved to the end."""
    same = (spans[:, :, None] == spans[:, None, :]).all(dim=3)
    repeated = same.tril(diagonal=-1).any(dim=2)
    scores = scores.masked_fill(repeated, -torch.inf)
    spans = spans.masked_fill(repeated[:, :, None], MISSING)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores, spans.gather(1, order[:, :, None].expand_as(spans))


def _softmax(scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Softmax within each `[bounds[i], bounds[i + 1])`, whose first score is its largest."""
    counts = np.diff(bounds)
    best = np.repeat(scores[bounds[:-1][counts > 0]], counts[counts > 0]).astype(np.float64)
    exponential = np.exp(scores - best)
    total = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=exponential, minlength=len(counts))
    return exponential / np.repeat(total, counts)


if __name__ == "__main__":
    main()
