"""One measurement of bench.py in a fresh process: peak memory of answering questions, or seconds to the first step.

python benchmarks/probe.py {ours,reference} {predict,train} DATASET_FOLDER MODEL_FOLDER CACHE_FOLDER
"""
# ruff: noqa: E402

import os
import sys
import time

STARTED = time.time()
side, what, dataset_folder, model_folder, cache_folder = sys.argv[1:]
os.environ["HF_HOME"] = cache_folder  # before the libraries are imported

import contextlib
import ctypes
import gc
import json
import threading
from pathlib import Path

import psutil
import pyarrow
from datasets import load_dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))


def main() -> None:
    with contextlib.redirect_stdout(sys.stderr):
        result = {"predict": predict, "train": train}[what]()
    print(json.dumps(result))


def predict() -> dict[str, float]:
    """`peak_mib`: the most memory in use until the answers are written, over that after loading model and dataset."""
    if side == "ours":
        from arguments import RunArguments, RunOptions
        from model import choose_layout, load_model
        from options import parse_options
        from run_qa import answer, load_splits, make_features, make_trainer

        options, arguments = parse_options((RunOptions, RunArguments), run_flags("--do_predict"), "")
        dataset = load_splits(options, arguments)
        tokenizer, model = load_model(model_folder, False)
        before = memory_now()
        layout = choose_layout(tokenizer, model)
        features = {"predict": make_features("predict", dataset, options, arguments, tokenizer, layout)}
        trainer = make_trainer(options, arguments, dataset, features, tokenizer, model, layout)
        answer(trainer, "predict", dataset["test"], features["predict"], Path(arguments.output_dir))
    else:
        import textbook

        examples = load_dataset(dataset_folder, split="test")
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForQuestionAnswering.from_pretrained(model_folder)
        before = memory_now()
        rows = examples.map(textbook.evaluation_features, batched=True, remove_columns=examples.column_names,
                            fn_kwargs={"tokenizer": tokenizer})  # fmt: skip
        plain = TrainingArguments(cache_folder, report_to=[], disable_tqdm=True, per_device_eval_batch_size=64)
        textbook.evaluate(textbook.make_trainer(model, plain), examples, rows, Path(cache_folder))
    private = max(PRIVATE) - PRIVATE[0]
    return {"peak_mib": (peak_memory() - before) / 2**20, "private_mib": private / 2**20}


def train() -> dict[str, float]:
    """`seconds` from the start of this process to the end of the first training step."""
    if side == "ours":
        import run_qa

        run_qa.QuestionAnsweringTrainer.__init__ = with_callback(run_qa.QuestionAnsweringTrainer.__init__)
        with contextlib.suppress(FirstStep):
            run_qa.main(run_flags("--do_train", "--eval_strategy", "no", "--fresh_start"))
    else:
        import textbook

        examples = load_dataset(dataset_folder, split="train")
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        model = AutoModelForQuestionAnswering.from_pretrained(model_folder)
        rows = examples.map(textbook.training_features, batched=True, remove_columns=examples.column_names,
                            fn_kwargs={"tokenizer": tokenizer})  # fmt: skip
        plain = TrainingArguments(cache_folder, report_to=[], disable_tqdm=True)
        trainer = textbook.make_trainer(model, plain, rows)
        trainer.add_callback(StopAtFirstStep())
        with contextlib.suppress(FirstStep):
            trainer.train()
    return {"seconds": time.time() - STARTED}


PRIVATE: list[int] = []  # bytes, from `memory_now` on


class FirstStep(BaseException):
    """Raised when the first training step is done."""


class StopAtFirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise FirstStep


def with_callback(init):
    def wrapped(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.add_callback(StopAtFirstStep())

    return wrapped


def run_flags(*more: str) -> list[str]:
    return ["--model_name_or_path", model_folder, "--dataset_name", dataset_folder,
            "--output_dir", f"{cache_folder}/run", "--report_to", "none", "--disable_tqdm", "true", *more]  # fmt: skip


def memory_now() -> int:
    """Bytes of this process in memory; the peak is counted from here on, also of what is no mapped file (Linux).

    What loading has freed goes back to the system first: it would hide as much of what comes after.
    """
    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    threading.Thread(target=watch_private, daemon=True).start()
    return psutil.Process().memory_info().rss


def watch_private() -> None:
    """Note the private memory every few milliseconds: the system keeps no peak of it."""
    while True:
        info = psutil.Process().memory_info()
        PRIVATE.append(info.rss - info.shared)
        time.sleep(0.005)


def peak_memory() -> int:
    """The most bytes in memory since `memory_now`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
