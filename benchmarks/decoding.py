"""How much of an exact score each way of decoding can reach, on labelled data, whatever the model.

Feeds gold logits (1 at the answer's first and last token of every window that holds it, 0 elsewhere), with more and
more noise added, through
- the sample code's decoding: windows side by side, best start and best end independently, text decoded from tokens
- the textbook search at its defaults: 384 tokens, overlap 128, the 20 best starts times the 20 best ends, at most 30
  tokens
- this project at its configs
and prints the share of exact matches, as Kaggle counts them; without noise it is the share that can be reached at all.

    python benchmarks/decoding.py --data data/drcd --tokenizer bert-base-chinese
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import RunOptions
from metrics.drcd.drcd import exact_match
from options import read_config
from postprocess import best_texts, merge_windows
from trainer import SPAN_CHOICES
from windows import Collator, build_features, make_layout

ROOT = Path(__file__).parent.parent
NOISES = [0.0, 0.1, 0.2, 0.3, 0.4]  # standard deviations; the gold logit is 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/drcd", help="dataset folder with a validation split")
    parser.add_argument("--tokenizer", default="bert-base-chinese", help="Hub id, folder, or a vocab.txt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    examples = load_dataset(arguments.data, split="validation")
    tokenizer = load_tokenizer(arguments.tokenizer)
    print(f"{len(examples)} questions; exact match with noise of standard deviation")
    print(f"{'':<34}" + "".join(f"{noise:>8}" for noise in NOISES))
    for name, decode in ways(tokenizer).items():
        shares = [share(examples, decode(examples, noise, arguments.seed)) for noise in NOISES]
        print(f"{name:<34}" + "".join(f"{value:>8.4f}" for value in shares), flush=True)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer by Hub id or folder, or a BERT one of a WordPiece vocabulary file."""
    if not name.endswith("vocab.txt"):
        return AutoTokenizer.from_pretrained(name)
    tokens = Path(name).read_text(encoding="utf-8").splitlines()
    return BertTokenizerFast(vocab={token: number for number, token in enumerate(tokens)})


def ways(tokenizer: PreTrainedTokenizerBase) -> dict:
    """The ways of decoding by name: functions of examples, noise and seed that return one text a question."""
    found = {
        "sample code (150, stride 150)": lambda *a: sample_code(tokenizer, *a),
        "textbook (384, overlap 128)": lambda *a: textbook(tokenizer, *a),
    }
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        config = read_config(str(path))
        if path.stem != "demo":
            found[f"this project, {path.stem}.yaml"] = lambda *a, config=config: ours(tokenizer, config, *a)
    return found


def share(examples: Dataset, texts: list[str]) -> float:
    """The share of texts that are a reference answer, ASCII commas deleted."""
    return float(
        np.mean([exact_match(text, gold["text"]) for text, gold in zip(texts, examples["answers"], strict=True)])
    )


def batches(tokenizer, examples, noise, seed, **lengths):
    """Windows of the examples in batches, with gold logits plus noise: (batch, start logits, end logits)."""
    layout = make_layout(tokenizer, **lengths)
    table = build_features(examples[:], list(range(len(examples))), tokenizer, layout, "stride", True)
    rows, collate = Dataset(table).with_format("numpy"), Collator(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    for begin in range(0, len(rows), 256):
        batch = collate([rows[i] for i in range(begin, min(begin + 256, len(rows)))])
        # A window without the answer is labelled on [CLS], which covers no character: it gets no gold.
        gold = [
            torch.zeros(batch["input_ids"].shape).scatter_(1, batch[name][:, None], 1.0) * (batch["char_ends"] > 0)
            for name in ("start_positions", "end_positions")
        ]
        start, end = (logits + noise * torch.randn(logits.shape, generator=generator) for logits in gold)
        yield batch, start, end


def ours(tokenizer, config, examples, noise, seed) -> list[str]:
    """This project's search with a config's windows, limits and choice of span."""
    lengths = {name: config[name] for name in ("max_seq_length", "max_question_length", "doc_stride")}
    own = {name: config[name] for name in ("max_answer_length", "span_choice") if name in config}
    options = RunOptions(**own)
    search, longest = SPAN_CHOICES[options.span_choice], options.max_answer_length
    found = []
    for batch, start, end in batches(tokenizer, examples, noise, seed, **lengths):
        scores, spans = search(start, end, batch["char_starts"], batch["char_ends"], 1, longest)
        found.append((batch["example"].numpy(), scores.numpy(), spans.numpy()))
    candidates = merge_windows(*map(np.concatenate, zip(*found, strict=True)), len(examples), 1)
    return best_texts(candidates, examples["context"][:])


def sample_code(tokenizer, examples, noise, seed) -> list[str]:
    """The course notebook's: best window by the sum of its best start and best end, text by decoding tokens."""
    best, texts = np.full(len(examples), -np.inf), [""] * len(examples)
    for batch, start, end in batches(
        tokenizer, examples, noise, seed, max_seq_length=213, max_question_length=60, doc_stride=150
    ):
        for i, example in enumerate(batch["example"].tolist()):
            length = int(batch["attention_mask"][i].sum())
            first, last = int(start[i, :length].argmax()), int(end[i, :length].argmax())
            score = float(start[i, first] + end[i, last])
            if score > best[example]:
                best[example] = score
                ids = batch["input_ids"][i, first : last + 1]
                texts[example] = tokenizer.decode(ids).replace(" ", "")
    return texts


def textbook(tokenizer, examples, noise, seed) -> list[str]:
    """The search of the Transformers example: top 20 starts times top 20 ends, at most 30 tokens, text by offsets."""
    best, texts = np.full(len(examples), -np.inf), [""] * len(examples)
    contexts = examples["context"][:]
    for batch, start, end in batches(
        tokenizer, examples, noise, seed, max_seq_length=384, max_question_length=64, doc_stride=384 - 64 - 3 - 128
    ):
        for i, example in enumerate(batch["example"].tolist()):
            start_row, end_row = start[i].numpy(), end[i].numpy()
            starts, ends = (np.argsort(logits)[-1:-21:-1].tolist() for logits in (start_row, end_row))
            covered = (batch["char_ends"][i] > 0).tolist()
            pairs = [(a, b) for a in starts for b in ends if covered[a] and covered[b] and a <= b < a + 30]
            if not pairs:
                continue
            first, last = max(pairs, key=lambda pair: start_row[pair[0]] + end_row[pair[1]])
            if start_row[first] + end_row[last] > best[example]:
                best[example] = start_row[first] + end_row[last]
                texts[example] = contexts[example][batch["char_starts"][i, first] : batch["char_ends"][i, last]]
    return texts


if __name__ == "__main__":
    main()
