"""This project against what a user would run instead (textbook.py), side by side in one run on one machine and model.

Writes `outputs/bench/bench.json`: rows of `name`, `ours`, `reference`, `unit`, `ratio` (above 1 = ours is better), the
medians of alternating rounds. Memory and start-up are measured in fresh processes (probe.py).

    python benchmarks/bench.py --dataset_name data/drcd --tokenizer bert-base-chinese

Needs a dataset with labelled validation split; nothing else of it is used. On a GPU (`--device cuda`) the model has the
shape of macbert-large and rows about the device come on top.
"""

import argparse
import contextlib
import functools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, disable_progress_bars, load_dataset
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent))

import textbook
from decoding import load_tokenizer
from gpu import gpu

from arguments import RunArguments
from files import write_json
from postprocess import best_spans, best_texts, merge_windows, nbest_lists, write_answers
from run_qa import merge
from scoring import score_texts
from trainer import QuestionAnsweringTrainer
from windows import Collator, EvaluationWindows, Layout, TrainingWindows, make_layout, split_features

SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
QUESTION = 64  # tokens kept for a question
SHARED = 64  # tokens that hold the longest answer looked for, of 50
LEARNING_SECONDS = (30, 60)
NOTEBOOK = {"room": 150, "doc_stride": 37}  # the notebook's medium setting


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bars()
    logging.set_verbosity_error()
    examples = load_dataset(arguments.dataset_name, split="validation")
    tokenizer = load_tokenizer(arguments.tokenizer)
    set_seed(0)
    model = make_model(tokenizer, LARGE if arguments.device == "cuda" else SMALL)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, examples, tokenizer, model, Path(folder))
        for measure in (features, spans, training, learning, evaluation, memory, startup, gpu):
            if not arguments.only or measure.__name__ in arguments.only:
                for row in measure(bench):
                    rows.append(row)
                    print(f"{row['name']:<64}{row['ratio']:>7.2f}x{row['ours']:>12.5g}{row['reference']:>12.5g}  "
                          f"{row['unit']}", flush=True)  # fmt: skip
    write_json(arguments.output_dir / "bench.json", rows)
    print(f"wrote {arguments.output_dir / 'bench.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default="data/sample/dataset", help="dataset with a validation split")
    parser.add_argument("--tokenizer", default="data/sample/model", help="Hub id, folder, or a vocab.txt")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds, of which the medians count")
    parser.add_argument("--questions", type=int, default=300, help="questions of training and evaluation")
    parser.add_argument("--num_proc", type=int, help="worker processes of the feature building (none)")
    parser.add_argument(
        "--only", nargs="*", help="features, spans, training, learning, evaluation, memory, startup, gpu"
    )
    return parser.parse_args()


class Bench:
    """What the measurements share: the options, the labelled examples, tokenizer, model, and a folder to write in."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        examples: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        model: BertForQuestionAnswering,
        folder: Path,
    ):
        self.arguments, self.examples, self.tokenizer = arguments, examples, tokenizer
        self.model, self.folder = model.to(arguments.device), folder
        self.few = examples.shuffle(seed=0).select(range(min(arguments.questions, len(examples))))

    root = Path(__file__).parent.parent

    def row(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return row(*args, **kwargs)

    def layout(self, max_seq_length: int = 512, shared: int = textbook.OVERLAP) -> Layout:
        """This project's windows of so many tokens; neighbours share 128 as the reference's do, or `shared`."""
        return make_layout(self.tokenizer, max_seq_length, QUESTION, max_seq_length - QUESTION - 3 - shared)

    def seconds(self, runs: dict[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, float]:
        """Median seconds of each of `runs` over alternating rounds, after one that does not count."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range((rounds or self.arguments.rounds) + 1):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if self.arguments.device == "cuda":
                    torch.cuda.synchronize()
                if number:
                    times[name].append(time.perf_counter() - started)
        return {name: statistics.median(values) for name, values in times.items()}

    def faster(self, name: str, work: float, ours: Callable[[], Any], reference: Callable[[], Any]) -> dict[str, Any]:
        """A row of `work` questions a second."""
        seconds = self.seconds({"ours": ours, "reference": reference})
        return row(name, "questions/s", work / seconds["ours"], work / seconds["reference"])


def row(name: str, unit: str, ours: float, reference: float, less_is_better: bool = False) -> dict[str, Any]:
    """A row of `bench.json`."""
    ratio = reference / ours if less_is_better else ours / reference
    return {"name": name, "ours": ours, "reference": reference, "unit": unit, "ratio": ratio}


def make_model(tokenizer: PreTrainedTokenizerBase, shape: dict[str, Any]) -> BertForQuestionAnswering:
    """A BERT of a real shape with random weights: it costs what a trained one does."""
    return BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **shape))


def features(bench: Bench) -> list[dict]:
    """Rows ready for the Trainer, on as many worker processes as the other side."""
    examples, tokenizer, workers = bench.examples, bench.tokenizer, bench.arguments.num_proc

    def build(length: int, labels: bool) -> TrainingWindows | EvaluationWindows:
        # A dataset out of the cache would be no measurement.
        fresh = examples.with_format(None)
        fresh._fingerprint = f"{time.perf_counter_ns():x}"
        layout = bench.layout(length)
        rows = split_features(fresh, tokenizer, layout, "stride", labels, workers)
        return TrainingWindows(rows, layout, 0, 0.1) if labels else EvaluationWindows(rows)

    def reference(function: Callable) -> Dataset:
        return examples.map(function, batched=True, remove_columns=examples.column_names, num_proc=workers,
                            fn_kwargs={"tokenizer": tokenizer}, load_from_cache_file=False)  # fmt: skip

    return [
        bench.faster(f"features, {kind}, {length} tokens", len(examples),
                     lambda length=length, labels=labels: build(length, labels),
                     lambda function=function: reference(function))
        for kind, labels, function in (
            ("training", True, textbook.training_features),
            ("evaluation", False, textbook.evaluation_features),
        )
        for length in (384, 512)
    ]  # fmt: skip


def spans(bench: Bench) -> list[dict]:
    """Logits like a trained model's (noise, and a peak at the answer) to candidates, and on to written files."""
    examples = bench.examples
    rows = EvaluationWindows(
        split_features(examples, bench.tokenizer, bench.layout(textbook.MAX_LENGTH), "stride", True)
    )
    device = torch.device(bench.arguments.device)

    def batches_of(size: int) -> list[dict[str, torch.Tensor]]:
        found = []
        for first in range(0, len(rows), size):
            batch = Collator(bench.tokenizer)(rows.__getitems__(list(range(first, min(first + size, len(rows))))))
            for name in ("start", "end"):
                positions = batch[f"{name}_positions"].numpy()
                batch[f"{name}_logits"] = peaked(batch["attention_mask"].shape[1], positions)
            found.append({name: values.to(device) for name, values in batch.items()})
        return found

    def map_textbook(function: Callable) -> Dataset:
        return examples.map(function, batched=True, remove_columns=examples.column_names,
                            fn_kwargs={"tokenizer": bench.tokenizer})  # fmt: skip

    labels = map_textbook(textbook.training_features).with_format("numpy")
    table = map_textbook(textbook.evaluation_features)
    logits = tuple(peaked(textbook.MAX_LENGTH, labels[f"{name}_positions"][:]).numpy() for name in ("start", "end"))

    def candidates(batches: list[dict[str, torch.Tensor]]) -> Any:
        found = [
            (batch["example"], *best_spans(batch["start_logits"], batch["end_logits"], batch["char_starts"],
                                           batch["char_ends"], textbook.N_BEST, textbook.MAX_ANSWER))
            for batch in batches
        ]  # fmt: skip
        arrays = [np.concatenate([part.cpu().numpy() for part in parts]) for parts in zip(*found, strict=True)]
        return merge_windows(*arrays, len(examples), textbook.N_BEST)

    def files(batches: list[dict[str, torch.Tensor]]) -> None:
        write_answers(bench.folder, "eval", examples["id"], nbest_lists(candidates(batches), examples["context"]))

    def reference_files() -> None:
        textbook.write_predictions(bench.folder, textbook.search_spans(examples, table, logits))

    def reference() -> None:
        textbook.search_spans(examples, table, logits)

    found = []
    for size in (256, RunArguments(output_dir=str(bench.folder)).per_device_eval_batch_size):
        for name, ours, theirs in (("candidates", candidates, reference), ("written files", files, reference_files)):
            run = functools.partial(ours, batches_of(size))
            found.append(bench.faster(f"spans, logits to {name}, {size} windows a batch", len(examples), run, theirs))
    return found


def peaked(width: int, positions: np.ndarray) -> torch.Tensor:
    """Logits [rows, width] like a trained model's: normal noise, and 8 at the label, falling off around it."""
    noise = np.random.default_rng(0).normal(size=(len(positions), width))
    distance = np.abs(np.arange(width) - positions[:, None])
    return torch.from_numpy((noise + 8 * np.exp(-distance / 2) * (positions > 0)[:, None]).astype(np.float32))


def training(bench: Bench) -> list[dict]:
    """An epoch of the Trainer in equal precision: all windows on both sides, and one random window a question.

    All windows once with the reference's overlap, and once with as much as the longest answer needs to stand whole in
    one of them.

    On a CPU with one layer of bert-base and half the questions, without dropout in the attention: with it, a CPU's
    attention is not fused, writes out matrices of tokens by tokens, and takes a third of the time on both sides.
    """
    cuda = bench.arguments.device == "cuda"
    shape = BASE | {"num_hidden_layers": 1, "attention_probs_dropout_prob": 0.0}
    model = bench.model if cuda else make_model(bench.tokenizer, shape)
    few = bench.few if cuda else bench.few.select(range(-(-len(bench.few) // 2)))
    reference_rows = few.map(
        textbook.training_features, batched=True, remove_columns=few.column_names,
        fn_kwargs={"tokenizer": bench.tokenizer},
    )  # fmt: skip
    reference = textbook.make_trainer(model, training_arguments(bench, TrainingArguments), reference_rows)
    trainers = {"reference": reference}
    for windows, shared in (("stride", SHARED), ("stride", textbook.OVERLAP), ("random", textbook.OVERLAP)):
        layout = bench.layout(shared=shared)
        rows = split_features(few, bench.tokenizer, layout, windows, True)
        data = TrainingWindows(rows, layout, seed=0, negative_window_ratio=0.1)
        own = training_arguments(bench, RunArguments, train_sampling_strategy="group_by_length", eval_strategy="no")
        what = "one random window" if windows == "random" else f"all windows, sharing {shared}"
        trainers[what] = own_trainer(model, bench.tokenizer, own, data)
    seconds = bench.seconds(
        {name: quiet(trainer) for name, trainer in trainers.items()}, min(3, bench.arguments.rounds)
    )
    rates = {name: len(few) / value for name, value in seconds.items()}
    theirs = rates.pop("reference")
    return [row(f"training, 512 tokens, {what}", "questions/s", rate, theirs) for what, rate in rates.items()]


def learning(bench: Bench) -> list[dict]:
    """What half a minute and a minute of training have taught, each begun anew."""
    return [learned(bench, seconds) for seconds in LEARNING_SECONDS]


def learned(bench: Bench, seconds: float) -> dict[str, Any]:
    """Dev exact match after so much training, one random window a question against all windows, padded.

    The generated sample's model from random weights at the demo's rate, held constant; windows of 128 tokens
    on both sides.
    """
    folder = Path("data/sample")
    sample, tokenizer = load_dataset(str(folder / "dataset")), load_tokenizer(str(folder / "model"))
    layout = make_layout(tokenizer, 128, 16, 64)
    common = {"learning_rate": 1.5e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 32,
              "num_train_epochs": 1000}  # fmt: skip
    found = {}
    for side in ("ours", "reference"):
        set_seed(0)
        model = BertForQuestionAnswering.from_pretrained(folder / "model")
        if side == "ours":
            rows = split_features(sample["train"], tokenizer, layout, "random", True)
            data = TrainingWindows(rows, layout, seed=0, negative_window_ratio=0.1)
            trainer = own_trainer(
                model, tokenizer, training_arguments(bench, RunArguments, eval_strategy="no", **common), data
            )
        else:
            lengths = {"tokenizer": tokenizer, "max_length": 128, "overlap": 48}
            rows = sample["train"].map(textbook.training_features, batched=True, fn_kwargs=lengths,
                                       remove_columns=sample["train"].column_names)  # fmt: skip
            trainer = textbook.make_trainer(model, training_arguments(bench, TrainingArguments, **common), rows)
        trainer.add_callback(StopAfter(seconds))
        quiet(trainer)()
        rows = EvaluationWindows(split_features(sample["validation"], tokenizer, layout, "stride", False))
        answers = own_trainer(model, tokenizer, training_arguments(bench, RunArguments, eval_strategy="no"), None)
        candidates = merge(sample["validation"], 20, answers.predict(rows).predictions)
        texts = best_texts(candidates, sample["validation"]["context"])
        found[side] = score_texts(texts, [gold["text"] for gold in sample["validation"]["answers"]])["exact_match"]
    return row(f"dev exact match on the sample after {seconds} s of training", "exact match", **found)


class StopAfter(TrainerCallback):
    """Ends training after so many seconds."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.perf_counter() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.perf_counter() > self.end


def own_trainer(
    model: BertForQuestionAnswering, tokenizer: PreTrainedTokenizerBase, own: RunArguments, data: Any
) -> QuestionAnsweringTrainer:
    """This project's Trainer over training rows."""
    collate = Collator(tokenizer, own.pad_to_multiple_of)
    return QuestionAnsweringTrainer(model, own, collate, data, n_best_size=20, max_answer_length=50)


def quiet(trainer: Any) -> Callable[[], None]:
    """Its training, without the figures that the Trainer prints at the end."""

    def run() -> None:
        with contextlib.redirect_stdout(None):
            trainer.train()

    return run


def training_arguments(bench: Bench, kind: type[TrainingArguments], **more: Any) -> TrainingArguments:
    """One epoch without checkpoints or logs, the same batch and precision for both sides."""
    half = {"bf16": True} if bench.arguments.device == "cuda" else {}
    usual = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-5}
    return kind(
        output_dir=str(bench.folder), save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        log_level="error", dataloader_pin_memory=False, **half, **(usual | more),
    )  # fmt: skip


def evaluation(bench: Bench) -> list[dict]:
    """From features in the cache to written answers, against the batched textbook way and the notebook's."""
    count = len(bench.few)
    few = bench.few.remove_columns("answers")
    rows = EvaluationWindows(split_features(few, bench.tokenizer, bench.layout(), "stride", False))
    ours = own_trainer(bench.model, bench.tokenizer, training_arguments(bench, RunArguments, eval_strategy="no"), None)
    table = few.map(
        textbook.evaluation_features, batched=True, remove_columns=few.column_names,
        fn_kwargs={"tokenizer": bench.tokenizer},
    )  # fmt: skip
    reference = textbook.make_trainer(bench.model, training_arguments(bench, TrainingArguments))
    notebook = textbook.NotebookQuestions(few, bench.tokenizer, **NOTEBOOK)

    def answer() -> None:
        candidates = merge(few, 20, ours.predict(rows).predictions)
        write_answers(bench.folder, "test", few["id"], nbest_lists(candidates, few["context"]))

    return [
        bench.faster("evaluation, against batches of padded windows", count, answer,
                     lambda: textbook.evaluate(reference, few, table, bench.folder)),
        bench.faster("evaluation, against one question at a time (150, stride 37)", count, answer,
                     lambda: textbook.notebook_answers(bench.model, bench.tokenizer, notebook)),
    ]  # fmt: skip


def memory(bench: Bench) -> list[dict]:
    """Peak host memory of answering 200, 2,000 and 20,000 questions with a tiny model, over that with all loaded.

    Once with the pages of mapped files that were read (the features' cache; the system takes them back when it needs
    them), once without.
    """
    peaks, sides = {}, ("ours", "reference")
    for times in (1, 10, 100):
        dataset = repeated(bench, 200 * times)
        for side in sides:
            found = [probe(bench, side, "predict", dataset) for _ in range(min(3, bench.arguments.rounds))]
            peaks[side, times] = {name: statistics.median(one[name] for one in found) for name in found[0]}
    rows = []
    for name, kind in (("peak_mib", "all"), ("private_mib", "without mapped files")):
        for times in (1, 10, 100):
            figures = {side: peaks[side, times][name] for side in sides}
            rows.append(row(f"memory, {200 * times} questions, {kind}", "MiB", **figures, less_is_better=True))
        for times in (10, 100):
            figures = {side: peaks[side, times][name] / peaks[side, 1][name] for side in sides}
            rows.append(
                row(f"memory, growth to {200 * times} questions, {kind}", "times", **figures, less_is_better=True)
            )
    return rows


def startup(bench: Bench) -> list[dict]:
    """Seconds from the start of a process to the end of its first training step, features not cached and cached."""
    dataset = repeated(bench, 2000)
    found = []
    cache = bench.folder / "cache"
    for name in ("first start", "features cached"):
        seconds: dict[str, list[float]] = {"ours": [], "reference": []}
        for _ in range(min(3, bench.arguments.rounds)):
            for side in seconds:
                if name == "first start":
                    shutil.rmtree(cache / side, ignore_errors=True)
                seconds[side].append(probe(bench, side, "train", dataset, cache / side)["seconds"])
        figures = {side: statistics.median(values) for side, values in seconds.items()}
        found.append(row(f"start to first step, {name}", "s", **figures, less_is_better=True))
    return found


def repeated(bench: Bench, count: int) -> Path:
    """A dataset folder of `count` validation questions, repeated with other ids as often as needed."""
    folder = bench.folder / f"questions-{count}"
    if not folder.exists():
        copies = -(-count // len(bench.examples))
        rows = concatenate_datasets([bench.examples] * copies).select(range(count))
        rows = rows.map(lambda row, number: {"id": str(number)}, with_indices=True)
        rows.to_parquet(folder / "train.parquet")
        rows.remove_columns("answers").to_parquet(folder / "test.parquet")
        shutil.copy(folder / "train.parquet", folder / "validation.parquet")
        bench.tokenizer.save_pretrained(bench.folder / "tiny")
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        make_model(bench.tokenizer, shape).save_pretrained(bench.folder / "tiny")
    return folder


def probe(bench: Bench, side: str, what: str, dataset: Path, cache: Path | None = None) -> dict[str, float]:
    """What probe.py measures in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "probe.py"), side, what, str(dataset),
               str(bench.folder / "tiny"), str(cache or tempfile.mkdtemp(dir=bench.folder))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
