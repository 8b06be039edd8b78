"""Which score to compare candidates of several windows by, and whether to touch the best answer afterwards.

For trained runs: exact match on the validation split
- by raw sums of start and end logit (the order of a softmax over all windows of a question is the same)
- by log-softmax over each window first
- by the summed probability of all candidates with the same text
- with unbalanced brackets completed or cut off, or with the best balanced candidate instead: how many wrong answers
  become right, and how many right ones wrong

    python benchmarks/span_scores.py --data data/sample/dataset outputs/ladder/random-1 outputs/ladder/random-2
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from metrics.drcd.drcd import exact_match
from postprocess import BRACKETS, best_spans, choose, merge_windows, nbest_lists
from windows import Collator, build_features, make_layout

CLOSING = {closing: opening for opening, closing in BRACKETS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="trained runs")
    parser.add_argument("--data", default="data/sample/dataset", help="dataset folder with a validation split")
    parser.add_argument("--max_answer_length", type=int, default=50)
    arguments = parser.parse_args()
    examples = load_dataset(arguments.data, split="validation")
    contexts, gold = examples["context"][:], [answers["text"] for answers in examples["answers"]]
    columns = ["raw sums", "window log-softmax", "same text, raw", "same text, window"]
    print(f"{'exact match':<28}" + "".join(f"{name:>20}" for name in columns))
    touched = {"brackets completed or cut": np.zeros(2, int), "best balanced candidate": np.zeros(2, int)}
    for run in arguments.runs:
        raw, normalised = candidates(run, examples, arguments.max_answer_length)
        raw, normalised = (list(nbest_lists(found, contexts)) for found in (raw, normalised))
        answers = [best(raw), best(normalised), same_text(raw), same_text(normalised)]
        print(f"{run:<28}" + "".join(f"{right(texts, gold).mean():>20.4f}" for texts in answers), flush=True)
        before = right(answers[0], gold)
        for name, texts in (
            ("brackets completed or cut", [repaired(nbest, c) for nbest, c in zip(raw, contexts, strict=True)]),
            ("best balanced candidate", [choose(candidate["text"] for candidate in nbest) for nbest in raw]),
        ):
            after = right(texts, gold)
            touched[name] += [(after & ~before).sum(), (before & ~after).sum()]
    for name, (mended, broken) in touched.items():
        print(f"{name}: {mended} wrong answers made right, {broken} right ones made wrong")


def candidates(run: str, examples: Dataset, max_answer_length: int):
    """The merged candidates of a run's model by raw sums and by log-softmax over each window."""
    tokenizer = AutoTokenizer.from_pretrained(run)
    model = AutoModelForQuestionAnswering.from_pretrained(run, dtype=torch.float32).eval()
    layout = make_layout(tokenizer, **model.config.qa_windows)
    rows = Dataset(build_features(examples[:], list(range(len(examples))), tokenizer, layout, "stride", False))
    rows, collate, found = rows.sort("length").with_format("numpy"), Collator(tokenizer), []
    for begin in range(0, len(rows), 32):
        batch = collate([rows[i] for i in range(begin, min(begin + 32, len(rows)))])
        example, char_starts, char_ends = (batch.pop(name) for name in ("example", "char_starts", "char_ends"))
        with torch.no_grad():
            output = model(**batch)
        seen = batch["attention_mask"].bool()
        logits = [values.masked_fill(~seen, -torch.inf) for values in (output.start_logits, output.end_logits)]
        both = [
            best_spans(*each, char_starts, char_ends, 20, max_answer_length)
            for each in (logits, [values.log_softmax(dim=1) for values in logits])
        ]
        found.append([example, *both[0], *both[1]])
    example, *values = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return [merge_windows(example, *values[i : i + 2], len(examples), 20) for i in (0, 2)]


def right(texts: list[str], gold: list[list[str]]) -> np.ndarray:
    return np.array([exact_match(text, answers) for text, answers in zip(texts, gold, strict=True)])


def best(nbests: list[list[dict]]) -> list[str]:
    return [nbest[0]["text"] if nbest else "" for nbest in nbests]


def same_text(nbests: list[list[dict]]) -> list[str]:
    """The text with the largest sum of probabilities."""
    texts = []
    for nbest in nbests:
        sums: dict[str, float] = {}
        for candidate in nbest:
            sums[candidate["text"]] = sums.get(candidate["text"], 0.0) + candidate["probability"]
        texts.append(max(sums, key=sums.get) if sums else "")
    return texts


def unbalanced(text: str) -> tuple[str, str]:
    """The closing brackets without an opening one in `text`, and the opening ones without a closing one."""
    opened, closed = [], []
    for char in text:
        if char in BRACKETS:
            opened.append(char)
        elif char in CLOSING:
            if opened and opened[-1] == CLOSING[char]:
                opened.pop()
            else:
                closed.append(char)
    return "".join(closed), "".join(opened)


def repaired(nbest: list[dict], context: str) -> str:
    """The best candidate; its missing bracket taken from beside it in the paragraph, else the odd one cut off."""
    if not nbest:
        return ""
    text, start, end = (nbest[0][name] for name in ("text", "start", "end"))
    closed, opened = unbalanced(text)
    if opened and context[end : end + 1] == BRACKETS[opened[-1]]:
        return text + context[end]
    if closed and start and context[start - 1] == CLOSING[closed[0]]:
        return context[start - 1] + text
    if opened and text[0] == opened[0]:
        return text[1:]
    if closed and text[-1] == closed[-1]:
        return text[:-1]
    return text


if __name__ == "__main__":
    main()
