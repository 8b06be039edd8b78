"""Spans → answers → submission: the exact n-best span search, its merging over windows, and the files it ends in.

Run alone, it rewrites predictions and submission from the n-best files of a run, or makes those of several runs one:

    python postprocess.py outputs/boss/macbert outputs/boss/roberta --output_dir outputs/boss
"""

import argparse
import csv
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetsError

from files import UserError, printable, read_json, replacing_file, write_json
from options import Parser, command
from scoring import note_dataset, read_results, score_texts

CANDIDATE = ("text", "start", "end", "score", "probability")  # the keys of one in an n-best file
_MERGED_TOGETHER = 1000  # questions
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
    share = _tokens_a_character(char_starts, char_ends, usable)
    # Each of the n best spans has one of the n starts whose own best span scores highest (of equal ones the earliest):
    # if not, the best spans of those n starts would all come before it. Only those starts' spans are ever made.
    ends = torch.nn.functional.pad(ends, (0, width - 1), value=-torch.inf)
    best_of_start = starts + torch.nn.functional.max_pool1d(ends[:, None], width, stride=1)[:, 0]
    first = _best(best_of_start, n_best_size * share)[1].sort(dim=1).values  # so that earlier spans stand first
    last = first[:, :, None] + torch.arange(width, device=first.device)
    scores = (starts.gather(1, first)[:, :, None] + ends.gather(1, last.flatten(1)).view_as(last)).flatten(1)
    scores, flat = _best(scores, n_best_size * share)
    first, last = first.gather(1, flat // width), last.flatten(1).gather(1, flat).clamp_max(tokens - 1)
    spans = torch.stack([char_starts.gather(1, first), char_ends.gather(1, last)], dim=2).int()
    spans = spans.masked_fill((scores == -torch.inf)[:, :, None], MISSING)
    if share > 1:
        scores, spans = _drop_repeats(scores, spans)
    lacking = max(0, n_best_size - scores.shape[1])
    if lacking:
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
    order = np.argsort(examples, kind="stable")
    parts = []
    for first in range(0, questions, _MERGED_TOGETHER):  # sorting takes several times the memory of what it sorts
        stop = min(first + _MERGED_TOGETHER, questions)
        own = order[slice(*np.searchsorted(examples, (first, stop), sorter=order))]
        parts.append(_merge_windows(examples[own] - first, scores[own], spans[own], stop - first, n_best_size))
    if not parts:
        return _merge_windows(examples, scores, spans, 0, n_best_size)
    bounds = np.cumsum(np.concatenate([[0], *(np.diff(part.bounds) for part in parts)]))
    columns = ([getattr(part, name) for part in parts] for name in ("spans", "scores", "probabilities"))
    return Candidates(bounds, *map(np.concatenate, columns))


def _merge_windows(
    examples: np.ndarray, scores: np.ndarray, spans: np.ndarray, questions: int, n_best_size: int
) -> Candidates:
    present = spans[:, :, 0] != MISSING
    question = np.broadcast_to(examples[:, None], present.shape)[present]
    start, end = spans[:, :, 0][present], spans[:, :, 1][present]
    places = int(end.max(initial=0)) + 1
    key = np.ravel_multi_index((question, start, end), (questions, places, places))  # in order of all three
    order = np.argsort(key)
    key, scores = key[order], scores[present].astype(np.float32)[order]
    new = np.flatnonzero(np.diff(key, prepend=-1))  # where another span begins
    key, scores = key[new], np.maximum.reduceat(scores, new) if len(new) else scores
    question, start, end = np.unravel_index(key, (questions, places, places))
    bounds = np.searchsorted(question, np.arange(questions + 1))
    order = np.argsort(question * 2**32 - _ordered_integers(scores), kind="stable")  # ties stay by start and end
    order = order[np.arange(len(order)) - bounds[question] < n_best_size]
    bounds = np.concatenate([[0], np.cumsum(np.minimum(np.diff(bounds), n_best_size))])
    spans, scores = np.stack([start, end], axis=1)[order], scores[order]
    return Candidates(bounds, spans.astype(np.int32), scores, _softmax(scores, bounds))


def nbest_lists(candidates: Candidates, contexts: Iterable[str]) -> Iterator[list[dict]]:
    """Each question's candidates, best first, as they stand in an n-best file.

    A candidate is its `text`, cut from the paragraph; `start` and `end` in characters, end exclusive; `score`; and
    `probability`. A question without any candidate (an empty paragraph) has an empty list.
    """
    bounds = candidates.bounds.tolist()
    values = candidates.spans, candidates.scores, candidates.probabilities
    for context, first, last in zip(contexts, bounds, bounds[1:], strict=False):
        own = (column[first:last].tolist() for column in values)
        yield [
            {"text": context[start:end], "start": start, "end": end, "score": score, "probability": probability}
            for (start, end), score, probability in zip(*own, strict=True)
        ]


def best_texts(candidates: Candidates, contexts: Iterable[str]) -> list[str]:
    """Every question's answer by `choose`."""
    bounds = candidates.bounds.tolist()
    return [
        choose(context[start:end] for start, end in candidates.spans[first:last].tolist())
        for context, first, last in zip(contexts, bounds, bounds[1:], strict=False)
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


def write_answers(output_dir: Path, split: str, ids: Iterable[str], nbest: Iterable[list[dict]]) -> list[Path]:
    """Write `{split}_nbest_predictions.json`, `{split}_predictions.json` and, for the test split, `submission.csv`.

    The n-best lists are written as they come, and only the answers of all questions are held. Returns the paths. Each
    file is replaced as a whole.
    """
    paths = [nbest_path(output_dir, split), output_dir / f"{split}_predictions.json"]
    encode = json.JSONEncoder(ensure_ascii=False).encode
    texts = {}
    with replacing_file(paths[0]) as file:
        for id_, candidates in zip(ids, nbest, strict=True):
            file.write(f"{',' if texts else '{'}\n{encode(id_)}: {encode(candidates)}")
            texts[id_] = choose(candidate["text"] for candidate in candidates)
        file.write("\n}\n" if texts else "{}\n")
    write_json(paths[1], texts)
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
        # Only the characters of its line end are quoted by the writer, and a bare "\r" needs it as well.
        lines = types.SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        writer = csv.writer(lines, lineterminator="\r\n")
        writer.writerow(["ID", "Answer"])
        writer.writerows([id_, texts[id_].replace(",", "")] for id_ in ids)


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    references = read_references(arguments.dataset_name) if arguments.dataset_name else None
    splits = {}
    for split in common_splits(arguments.runs):
        nbests = {run: read_nbest(nbest_path(run, split)) for run in arguments.runs}
        splits[split] = ensemble(nbests, arguments.weights) if len(nbests) > 1 else nbests.popitem()[1]
    scored = splits.get("eval") if references is not None else None
    if scored is not None:
        read_results(arguments.output_dir)  # all that can be refused is, before anything is written
        if not (scored and scored.keys() <= references.keys() and any(references[id_] for id_ in scored)):
            raise UserError(f"--dataset_name {arguments.dataset_name}: it does not have the questions of the runs")
    for split, nbest in splits.items():
        for path in write_answers(arguments.output_dir, split, nbest, nbest.values()):
            print(f"wrote {path}")
    if scored is not None:
        score_and_note(arguments.output_dir, arguments.dataset_name, references, scored)


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
    if not all(weight >= 0 for weight in arguments.weights) or not 0 < sum(arguments.weights) < math.inf:
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
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {dataset_name}: no labelled validation split to be had: {reason}") from None


def score_and_note(
    output_dir: Path, dataset_name: str, references: dict[str, list[str]], nbest: dict[str, list[dict]]
) -> None:
    """Score the answers by a dataset's references, print the score and note it in `all_results.json`."""
    texts = [choose(candidate["text"] for candidate in candidates) for candidates in nbest.values()]
    scores = score_texts(texts, [references[id_] for id_ in nbest])
    figures = {f"eval_{name}": value for name, value in scores.items()}
    write_json(output_dir / "all_results.json", read_results(output_dir) | figures)
    note_dataset(output_dir, dataset_name)
    print(f"validation: exact match {scores['exact_match']:.5f}, F1 {scores['f1']:.5f}")


def nbest_path(run: Path, split: str) -> Path:
    """Where a run's n-best file of a split ("eval" or "test") lies."""
    return run / f"{split}_nbest_predictions.json"


def read_nbest(path: Path) -> dict[str, list[dict]]:
    """The n-best lists by question id, without any further keys of a candidate.

    Raises UserError naming file and id if one is not as `nbest_lists` made it.
    """
    nbest = read_json(path)
    if not isinstance(nbest, dict):
        raise UserError(f"{path}: must hold one object of question ids, holds a {type(nbest).__name__}")
    for id_, candidates in nbest.items():
        if not isinstance(candidates, list) or not all(map(_is_candidate, candidates)) or printable(id_) != id_:
            raise UserError(
                f"{path}: question {id_!r}: must be a list of candidates with text, start, end, score and probability"
            )
        if len({(candidate["start"], candidate["end"]) for candidate in candidates}) < len(candidates):
            raise UserError(f"{path}: question {id_!r}: two of its candidates are the same characters")
    return {id_: [{name: c[name] for name in CANDIDATE} for c in candidates] for id_, candidates in nbest.items()}


def _is_candidate(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("text"), str)
        and printable(value["text"]) == value["text"]  # JSON may hold halves of surrogate pairs, which no file takes
        and all(type(value.get(name)) is int and value[name] >= 0 for name in ("start", "end"))
        and all(type(value.get(name)) in (int, float) for name in ("score", "probability"))
        and abs(value["score"]) < 1e38  # float32; not NaN
        and 0 <= value["probability"] <= 1 + 1e-6  # an ensemble's sum of products may be off by a rounding error
        and value["end"] - value["start"] == len(value["text"])
    )


def _best(scores: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `kept` largest of each row, falling, and their places; of equal ones those of the earliest places, first."""
    kept = min(kept, scores.shape[1])
    top, places = scores.topk(min(kept + 1, scores.shape[1]), dim=1)
    # `topk` leaves the order of equals open, and which of them it takes: a stable sort tells.
    tied = ((top[:, 1:] == top[:, :-1]) & (top[:, 1:] > -torch.inf)).any(dim=1)
    if tied.any():
        top[tied], places[tied] = (part[:, : top.shape[1]] for part in scores[tied].sort(descending=True, stable=True))
    return top[:, :kept], places[:, :kept]


def _tokens_a_character(char_starts: torch.Tensor, char_ends: torch.Tensor, usable: torch.Tensor) -> int:
    """How many token spans at most cover the same characters: 1 unless tokens share characters (byte-level ones)."""
    most = 1
    while True:
        shared = usable[:, most:] & (char_starts[:, most:] < char_ends[:, :-most])  # 0 is the end of unusable ones
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


def _ordered_integers(scores: np.ndarray) -> np.ndarray:
    """Whole numbers below 2 ** 31 in the order of float32 `scores`, by their bits: they sort much faster."""
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 makes -0 the 0 that it equals
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _softmax(scores: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Softmax within each `[bounds[i], bounds[i + 1])`, whose first score is its largest."""
    counts = np.diff(bounds)
    best = np.repeat(scores[bounds[:-1][counts > 0]], counts[counts > 0]).astype(np.float64)
    exponential = np.exp(scores - best)
    total = np.bincount(np.repeat(np.arange(len(counts)), counts), weights=exponential, minlength=len(counts))
    return exponential / np.repeat(total, counts)


if __name__ == "__main__":
    main()
