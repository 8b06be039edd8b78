"""Fine-tune a model for Chinese extractive question answering, score it, and answer the test questions.

Reads a dataset in the SQuAD schema (`prepare_drcd.py` makes one of the course files) and a model with a fast tokenizer;
writes the trained model, predictions, n-best lists, `submission.csv` and `all_results.json` to the output folder.

    accelerate launch run_qa.py --model_name_or_path hfl/chinese-macbert-large
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
import yaml
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging

import resume
from arguments import RunArguments, RunOptions
from card import write_card
from files import UserError, read_json, write_json
from options import command, parse_options
from postprocess import Candidates, best_texts, merge_windows, nbest_lists, write_answers
from scoring import breakdown, breakdown_table, read_results, score_texts
from trainer import QuestionAnsweringTrainer
from windows import Collator, Layout, TrainingWindows, build_features, make_layout

logger = logging.get_logger("run_qa")

SPLIT_OF = {"train": "train", "eval": "validation", "predict": "test"}
WINDOW_OPTIONS = {"max_seq_length": 512, "max_question_length": 64, "doc_stride": None}


@command
def main(argv: Sequence[str] | None = None) -> None:
    options, arguments = parse_options((RunOptions, RunArguments), argv, __doc__)
    output_dir = choose_output_dir(options, arguments)
    dataset = load_splits(options, arguments)
    shaping = resume.shape(options, arguments, dataset["train"]) if "train" in arguments.steps else None
    trained = is_trained(options, shaping, output_dir)
    results = read_results(output_dir)

    set_seed(arguments.seed)
    tokenizer, model = load_model(output_dir if trained else options.model_name_or_path, options.trust_remote_code)
    layout = choose_layout(options, tokenizer, model)
    features = {step: make_features(step, dataset, options, arguments, tokenizer, layout) for step in arguments.steps}
    trainer = make_trainer(options, arguments, dataset, features, tokenizer, model, layout)

    if "train" in features and not trained:
        results = train(trainer, output_dir, shaping, options.fresh_start)
    for step in ("eval", "predict"):
        if step in arguments.steps:
            results |= answer(trainer, step, dataset[SPLIT_OF[step]], features[step], output_dir)
    if trainer.is_world_process_zero():
        finish(options, arguments, results, dataset, output_dir, trainer)
    trainer.end()


def choose_output_dir(options: RunOptions, arguments: RunArguments) -> Path:
    """`--output_dir`, else `outputs/` and the name of the config (and its member), else of the model."""
    if options.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: name a model folder or Hub id, e.g. bert-base-chinese")
    if Path(options.model_name_or_path).is_dir():  # `model/` is `model`
        options.model_name_or_path = str(Path(options.model_name_or_path))
    named = Path(options.config).stem if options.config else Path(options.model_name_or_path).resolve().name
    if not arguments.output_dir:
        arguments.output_dir = str(Path("outputs", named, options.member or ""))
    return Path(arguments.output_dir)


def load_splits(options: RunOptions, arguments: RunArguments) -> DatasetDict:
    """The splits of the steps asked for, or of all steps whose split exists; `arguments.steps` is set to them.

    Raises UserError for a dataset that cannot be opened and for a split that is missing, empty, lacks a column, has no
    labels where it needs them, or holds an id twice.
    """
    name = options.dataset_name
    found = open_dataset(name)
    if options.train_on_validation:
        found = join_for_training(found, arguments.steps, name)
    missing = [step for step in arguments.steps if SPLIT_OF[step] not in found]
    if missing:
        raise UserError(
            f"--do_{missing[0]} needs the split {SPLIT_OF[missing[0]]!r}; {name} has only {', '.join(found) or 'none'}"
        )
    arguments.steps = arguments.steps or [step for step, split in SPLIT_OF.items() if split in found]
    if not arguments.steps:
        raise UserError(f"{name} has none of the splits train, validation, test; it has {', '.join(found) or 'none'}")
    limits = [options.max_train_samples, options.max_eval_samples, options.max_predict_samples]
    splits = DatasetDict()
    for (step, split), limit in zip(SPLIT_OF.items(), limits, strict=True):
        # Training is scored on the validation split as it goes, also when no evaluation is asked for afterwards.
        in_training = step == "eval" and "train" in arguments.steps and arguments.eval_strategy != "no"
        if step in arguments.steps or (in_training and split in found):
            splits[split] = check_split(found[split], split, f"{name}, split {split!r}", limit)
    if "train" not in arguments.steps or "validation" not in splits:
        arguments.without_evaluation()
    return splits


def join_for_training(found: DatasetDict, steps: Sequence[str], name: str) -> DatasetDict:
    """The dataset with train and validation as one train split, and so nothing left to evaluate on.

    Raises UserError if one of the two is missing, or if `steps`, the steps asked for, hold the evaluation.
    """
    if not {"train", "validation"} <= set(found):
        raise UserError(f"--train_on_validation needs the splits train and validation; {name} has {', '.join(found)}")
    if "eval" in steps:
        raise UserError("--train_on_validation leaves no questions to evaluate on: drop it or --do_eval")
    for split in ("train", "validation"):
        found[split] = check_split(found[split], split, f"{name}, split {split!r}", None)
    rows = found["validation"].map(lambda row: {"id": f"validation-{row['id']}"})  # ids differ within a split
    joined = DatasetDict(found | {"train": concatenate_datasets([found["train"], rows.cast(found["train"].features)])})
    del joined["validation"]
    return joined


def open_dataset(name: str) -> DatasetDict:
    """The dataset in a folder or on the Hub. Raises UserError if there is none."""
    if not name:
        raise UserError("--dataset_name is empty; name a folder of prepare_drcd.py or a Hub id")
    try:
        # The default is a folder, never the Hub's repository of that name.
        refuse_missing_folder(name, name == RunOptions.dataset_name)
        return load_dataset(name)
    except (OSError, ValueError, DatasetsError, yaml.YAMLError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        for path in Path(name).glob("**/*.parquet"):
            with contextlib.suppress(ValueError):  # not Parquet: the reason says so
                if parquet.read_metadata(path).num_rows == 0:
                    reason = f"{path.relative_to(name)} is empty"
        raise UserError(
            f"--dataset_name {name}: cannot be opened as a dataset: {reason}. Make one with "
            "`python prepare_drcd.py --data_dir FOLDER_OF_THE_COURSE_FILES` or `make data DATA_DIR=...`"
        ) from None


def refuse_missing_folder(name: str, is_folder: bool = False) -> None:
    """Raise FileNotFoundError for what can only be a folder, by its spelling or `is_folder`, and is not there."""
    if (is_folder or name.startswith((".", "/", "~"))) and not Path(name).is_dir():
        raise FileNotFoundError("there is no such folder")


def check_split(rows: Dataset, split: str, where: str, limit: int | None) -> Dataset:
    """The split with string ids, at most `limit` rows, and for training only the questions with an answer."""
    needed = ["id", "question", "context", *(["answers"] if split != "test" else [])]
    # A column that one of several splits lacks is opened as one of nothing but None.
    lacking = [name for name in needed if name not in rows.column_names or (len(rows) and None in rows[name][:])]
    if lacking:
        raise UserError(f"{where}: lacks the column {lacking[0]!r}, or a value in it; needed are {', '.join(needed)}")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    if len(rows) == 0:
        raise UserError(f"{where}: is empty")
    if split == "test" and "answers" in rows.column_names and None in rows["answers"][:]:
        rows = rows.remove_columns("answers")  # other splits have the column, this one's file does not
    for row in rows:
        if reason := unusable(row):
            raise UserError(f"{where}: question {row['id']!r}: {reason}")
    if rows.features["id"].dtype != "string":
        rows = rows.cast_column("id", Value("string"))
    if len(set(rows["id"])) < len(rows):
        raise UserError(f"{where}: the same id stands twice; predictions are kept by id, so ids must differ")
    if split == "test":
        return rows
    labelled = [number for number, answers in enumerate(rows["answers"]) if answers["text"]]
    if not labelled:
        raise UserError(f"{where}: no question has an answer, there is nothing to learn or to score")
    if split == "train" and len(labelled) < len(rows):
        logger.warning(f"{where}: {len(rows) - len(labelled)} questions without an answer are left out of training")
        rows = rows.select(labelled)
    return rows


def unusable(row: dict[str, Any]) -> str | None:
    """What is wrong with a row of the SQuAD schema, None if nothing is."""
    if not isinstance(row["id"], str | int):
        return "its id must be a text or a whole number"
    for name in ("question", "context"):
        if not isinstance(row[name], str):
            return f"its {name} must be a text, is {str(row[name])[:40]!r}"
    answers = row.get("answers", {"text": [], "answer_start": []})
    if not isinstance(answers, dict) or not all(isinstance(answers.get(key), list) for key in ("text", "answer_start")):
        return "its answers must be an object of two lists, `text` and `answer_start`"
    if len(answers["text"]) != len(answers["answer_start"]):
        return "its answers have texts and offsets in different numbers"
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        whole = isinstance(text, str) and isinstance(start, int) and start >= 0
        if not whole or not row["context"].startswith(text, start):
            return f"its answer {str(text)[:40]!r} does not stand at character {start!r} of its context"
    return None


def is_trained(options: RunOptions, shaping: dict[str, Any] | None, output_dir: Path) -> bool:
    """Whether the model to answer with lies in the output folder: this run's, trained to its end.

    `shaping` is the `resume.shape` of a run that trains, None for one that does not. Raises UserError if the folder is
    another run's.
    """
    if shaping is None:
        stored = resume.stored_run(output_dir)
        asked = Path(options.model_name_or_path).resolve()
        if stored is None or asked.is_relative_to(output_dir.resolve()):
            return False
        begun_with = stored["options"].get("model_name_or_path")
        if begun_with != options.model_name_or_path:
            raise UserError(f"{output_dir} holds a run of {begun_with}; name another --output_dir for these answers")
        if not stored["finished"]:
            raise UserError(
                f"{output_dir} is not trained to its end: train it first, by the same command without --do_"
            )
        return True
    if options.fresh_start:
        return False
    finished = resume.is_finished(output_dir, shaping)
    if finished:
        logger.warning(f"{output_dir} is trained already and is not trained again (--fresh_start would)")
    return finished


def load_model(name: str | Path, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and model, in float32 whatever the checkpoint's precision, from a folder or the Hub.

    Raises UserError if they cannot be had, or if the tokenizer is slow and so knows no character offsets.
    """
    try:
        refuse_missing_folder(str(name))
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, config=config, trust_remote_code=trust_remote_code)
        model = AutoModelForQuestionAnswering.from_pretrained(
            name, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (
        *(OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, HfHubHTTPError, SafetensorError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--model_name_or_path {name}: cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer ({type(tokenizer).__name__}) is slow and does not say "
            "which characters a token covers; choose a model with a fast tokenizer (a tokenizer.json)"
        )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(
            f"--model_name_or_path {name}: there is no tokenizer in it (no tokenizer.json or vocab.txt); save the "
            "tokenizer of the model it was trained from beside it"
        )
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer, model


def choose_layout(options: RunOptions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Layout:
    """Window lengths: what was asked for, else what the checkpoint was trained with, else the defaults.

    They are noted in the model's config, so that a trained model answers with the windows it was trained on.
    """
    stored = getattr(model.config, "qa_windows", None)
    if not isinstance(stored, dict) or not all(type(stored.get(name)) is int for name in WINDOW_OPTIONS):
        stored = {}
    given = {name: getattr(options, name) for name in WINDOW_OPTIONS}
    lengths = {name: stored.get(name, default) if given[name] is None else given[name]
               for name, default in WINDOW_OPTIONS.items()}  # fmt: skip
    if given["doc_stride"] is None and (given["max_seq_length"] or given["max_question_length"]):
        lengths["doc_stride"] = None  # a stored stride belongs to the stored lengths
    longest = max_positions(model)
    if given["max_seq_length"] is None:
        lengths["max_seq_length"] = min(lengths["max_seq_length"], longest)
    elif given["max_seq_length"] > longest:
        raise UserError(f"--max_seq_length is {given['max_seq_length']}, the model takes at most {longest} tokens")
    layout = make_layout(tokenizer, **lengths)
    model.config.qa_windows = lengths | {"doc_stride": layout.doc_stride}
    return layout


def max_positions(model: PreTrainedModel) -> int:
    """The longest input of a model in tokens, as its position embeddings allow (2**20 where nothing limits it)."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return 2**20
    # RoBERTa and its kin count positions from the padding id on: 514 embeddings serve 512 tokens.
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((getattr(table, "padding_idx", None) for table in tables), None)
    return positions if padding is None else positions - padding - 1


def make_features(
    step: str,
    dataset: DatasetDict,
    options: RunOptions,
    arguments: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
) -> Dataset | TrainingWindows:
    """The windows of a step's split (`windows.build_features`), cached by `datasets`; longest first but in training."""
    rows = dataset[SPLIT_OF[step]]
    with arguments.main_process_first(desc=f"windows of {SPLIT_OF[step]}"):
        features = rows.map(
            build_features,
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            num_proc=options.preprocessing_num_workers,
            fn_kwargs={
                "tokenizer": tokenizer,
                "layout": layout,
                "windows": options.train_windows if step == "train" else "stride",
                "labels": step != "predict",
            },
            desc=f"windows of {SPLIT_OF[step]}",
        )
        if step != "train":
            return features.sort("length", reverse=True)
    return TrainingWindows(features, layout, arguments.seed, options.negative_window_ratio)


def make_trainer(
    options: RunOptions,
    arguments: RunArguments,
    dataset: DatasetDict,
    features: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    layout: Layout,
) -> QuestionAnsweringTrainer:
    """The Trainer over the features, which scores the validation split by `exact_match` and `f1`."""
    if "validation" in dataset and "eval" not in features:
        features = features | {"eval": make_features("eval", dataset, options, arguments, tokenizer, layout)}
    train_rows = features.get("train")
    return QuestionAnsweringTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer, 8 if arguments.fp16 or arguments.bf16 else 1),
        train_dataset=train_rows,
        eval_dataset=features.get("eval"),
        processing_class=tokenizer,
        compute_metrics=functools.partial(score, dataset["validation"], options.n_best_size)
        if "validation" in dataset
        else None,
        n_best_size=options.n_best_size,
        max_answer_length=options.max_answer_length,
        span_choice=options.span_choice,
        questions_a_row=len(dataset["train"]) / len(train_rows) if train_rows is not None else 1.0,
    )


def train(
    trainer: QuestionAnsweringTrainer, output_dir: Path, shaping: dict[str, Any], fresh_start: bool
) -> dict[str, float]:
    """Train from the start or from the last complete checkpoint, and save the model that the run ends with."""
    if trainer.is_world_process_zero():
        resume.begin(output_dir, shaping, fresh_start, trainer.args.world_size)
    trainer.accelerator.wait_for_everyone()
    processes = resume.stored_run(output_dir)["processes"]
    checkpoint = resume.last_complete_checkpoint(output_dir, processes)
    if trainer.args.resume_from_checkpoint is not None:
        checkpoint = Path(trainer.args.resume_from_checkpoint)
        if not any(resume.is_complete(checkpoint, number) for number in processes):
            raise UserError(f"--resume_from_checkpoint {checkpoint}: not a complete checkpoint of such a run")
    if checkpoint is not None:
        logger.warning(f"resuming from {checkpoint}")
        if trainer.is_world_process_zero():
            resume.relocate_best(checkpoint)
        trainer.accelerator.wait_for_everyone()
    metrics = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        resume.finish(output_dir)
    return metrics


def answer(
    trainer: QuestionAnsweringTrainer, step: str, examples: Dataset, features: Dataset, output_dir: Path
) -> dict[str, float]:
    """Find the answers of a split, write their files, and return the metrics (`eval_...` or `test_...`)."""
    prefix = "eval" if step == "eval" else "test"
    trainer.compute_metrics = None
    output = trainer.predict(features, metric_key_prefix=prefix)
    candidates = merge(examples, trainer.n_best_size, output.predictions)
    metrics = dict(output.metrics)
    references = [answers["text"] for answers in examples["answers"]] if "answers" in examples.column_names else []
    if any(references):
        texts = best_texts(candidates, examples["context"][:])
        metrics |= {f"{prefix}_{name}": value for name, value in score_texts(texts, references).items()}
    metrics[f"{prefix}_samples"] = len(examples)
    trainer.log(dict(metrics))
    if step == "eval":
        metrics["eval_breakdown"] = breakdown(examples, texts, *window_facts(features))
    if trainer.is_world_process_zero():
        nbest = list(nbest_lists(candidates, examples["context"][:]))
        write_answers(output_dir, prefix, examples["id"][:], nbest)
    return metrics


def window_facts(features: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """For every question of labelled features: its number of windows, and whether one holds the whole answer."""
    columns = features.with_format("numpy")
    example = columns["example"][:]
    holds = columns["start_positions"][:] >= columns["context_start"][:]  # else the label is on [CLS]
    return np.bincount(example), np.bincount(example, weights=holds) > 0


def merge(examples: Dataset, n_best_size: int, predictions: tuple[Any, Any, Any]) -> Candidates:
    """The candidates of every question of a split, from the Trainer's predictions over its windows."""
    example, scores, spans = predictions
    return merge_windows(example, scores, spans, len(examples), n_best_size)


def score(examples: Dataset, n_best_size: int, prediction: EvalPrediction) -> dict[str, float]:
    """`exact_match` and `f1` of the best answers in a Trainer's predictions; on every process, as all need the best."""
    candidates = merge(examples, n_best_size, prediction.predictions)
    texts = best_texts(candidates, examples["context"][:])
    return score_texts(texts, [answers["text"] for answers in examples["answers"]])


def finish(
    options: RunOptions,
    arguments: RunArguments,
    results: dict[str, float],
    dataset: DatasetDict,
    output_dir: Path,
    trainer: QuestionAnsweringTrainer,
) -> None:
    """Write `all_results.json` and the model card, and print what was written where, and the scores."""
    write_json(output_dir / "all_results.json", results)
    if "train" in arguments.steps:
        write_card(output_dir, options, arguments, results, trainer.model.config.qa_windows)
    print_summary(output_dir, arguments.steps, results, dataset)


def print_summary(output_dir: Path, steps: Sequence[str], results: dict[str, float], dataset: DatasetDict) -> None:
    """The closing lines of a run: five questions with answers, the scores, and the files."""
    print()
    if "eval" in steps:
        examples, predictions = dataset["validation"], read_json(output_dir / "eval_predictions.json")
        for row in examples.select(range(min(5, len(examples)))):
            gold = " / ".join(dict.fromkeys(row["answers"]["text"]))
            print(f"{row['question']}\n    answer: {predictions[row['id']]}    gold: {gold}")
        print(f"\n{breakdown_table(results['eval_breakdown'])}")
        print(f"\nvalidation: exact match {results['eval_exact_match']:.5f}, F1 {results['eval_f1']:.5f}")
    if "test_exact_match" in results and "predict" in steps:
        print(f"test: exact match {results['test_exact_match']:.5f}, F1 {results['test_f1']:.5f}")
    print(f"everything is in {output_dir}:")
    told = {
        "model.safetensors": "the trained model, with its tokenizer and card",
        "all_results.json": "all figures of the run",
        "eval_predictions.json": "answers of the validation split (eval_nbest_predictions.json: the n best)",
        "test_predictions.json": "answers of the test split (test_nbest_predictions.json: the n best)",
        "submission.csv": "the submission",
    }
    for name, what in told.items():
        if (output_dir / name).exists():
            print(f"    {name:<24}{what}")


if __name__ == "__main__":
    main()
