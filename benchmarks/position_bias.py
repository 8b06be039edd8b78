"""Where in its window the answer stands in training, and what a trained run makes of answers that stand elsewhere.

For each run: train exact match (mean of the last fifth of the log), dev exact match, and by fifths of the window, from
its first to its last paragraph token: the share of training answers that stand there, and the exact match of the run on
dev answers that stand there, every dev answer looked at in the one window, of those side by side, that holds it.

    python benchmarks/position_bias.py --data data/sample/dataset outputs/ladder/decay-1 outputs/ladder/random-1
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from metrics.drcd.drcd import exact_match
from postprocess import best_spans
from windows import Collator, TrainingWindows, build_features, make_layout

FIFTHS = np.linspace(0, 1, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="trained runs")
    parser.add_argument("--data", default="data/sample/dataset", help="dataset folder with train and validation split")
    arguments = parser.parse_args()
    data = load_dataset(arguments.data)
    for run in arguments.runs:
        options = json.loads((run / "run.json").read_text(encoding="utf-8"))["options"]
        tokenizer = AutoTokenizer.from_pretrained(run)
        model = AutoModelForQuestionAnswering.from_pretrained(run, dtype=torch.float32).eval()
        lengths = model.config.qa_windows
        trained = training_places(data["train"], tokenizer, lengths, options)
        side_by_side = lengths | {"doc_stride": make_layout(tokenizer, **lengths).room}
        places, right = dev_places(data["validation"], tokenizer, model, side_by_side)
        fifth = np.clip(np.digitize(places, FIFTHS) - 1, 0, 4)
        print(f"\n{run}: {options['train_windows']} windows, train exact match {train_exact_match(run):.4f}, dev exact "
              f"match {right.mean():.4f} over {len(right)} answers that one window holds whole")  # fmt: skip
        print("fifth of the window    " + "".join(f"{number:>9}" for number in range(1, 6)))
        print(
            "training answers       " + "".join(f"{v:>9.3f}" for v in np.histogram(trained, FIFTHS)[0] / len(trained))
        )
        print("dev answers            " + "".join(f"{(fifth == i).mean():>9.3f}" for i in range(5)))
        print("dev exact match        " + "".join(f"{right[fifth == i].mean():>9.4f}" for i in range(5)))


def training_places(examples: Dataset, tokenizer, lengths: dict, options: dict) -> np.ndarray:
    """The middle of each training answer in its window, from 0 to 1, in three epochs, of paragraphs longer than it."""
    layout = make_layout(tokenizer, **lengths)
    table = build_features(examples[:], list(range(len(examples))), tokenizer, layout, options["train_windows"], True)
    rows = TrainingWindows(Dataset(table), layout, options["seed"], options["negative_window_ratio"])
    drawn = [rows[number] for number in range(3 * len(rows))]
    full = [row for row in drawn if len(row["input_ids"]) - row["context_start"] - len(layout.after) == layout.room]
    return np.concatenate([place(row, layout.room) for row in full])


def place(row: dict, room: int) -> np.ndarray:
    """The middle of a row's answer in its window, from 0 to 1; none where the label is on [CLS]."""
    first, last = (int(row[name]) - int(row["context_start"]) for name in ("start_positions", "end_positions"))
    return np.array([(first + last + 1) / 2 / room] if first >= 0 else [])


def dev_places(examples: Dataset, tokenizer, model, lengths: dict) -> tuple[np.ndarray, np.ndarray]:
    """The middle of each dev answer in the window that holds it, and whether the model finds it in that window."""
    layout = make_layout(tokenizer, **lengths)
    table = build_features(examples[:], list(range(len(examples))), tokenizer, layout, "stride", True)
    rows, collate = Dataset(table).with_format("numpy"), Collator(tokenizer)
    rows = [row for row in rows if row["start_positions"] >= row["context_start"]]
    rows = [row for row in rows if len(row["input_ids"]) - row["context_start"] - len(layout.after) == layout.room]
    places, right = np.concatenate([place(row, layout.room) for row in rows]), []
    for begin in range(0, len(rows), 64):
        batch = collate(rows[begin : begin + 64])
        offsets = batch["char_starts"], batch["char_ends"]
        names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
        with torch.no_grad():
            output = model(**{name: batch[name] for name in names})
        _, spans = best_spans(output.start_logits, output.end_logits, *offsets, 1, 50)
        for example, (start, end) in zip(batch["example"].tolist(), spans[:, 0].tolist(), strict=True):
            row = examples[example]
            right.append(exact_match(row["context"][start:end], row["answers"]["text"]))
    return places, np.array(right)


def train_exact_match(run: Path) -> float:
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    values = [entry["train_exact_match"] for entry in log if "train_exact_match" in entry]
    return float(np.mean(values[-max(1, len(values) // 5) :]))


if __name__ == "__main__":
    main()
