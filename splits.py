"""A dataset in the SQuAD schema, from a folder or the Hub → the checked splits of a run."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import yaml
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError
from transformers.utils import logging

from arguments import RunArguments, RunOptions
from files import UserError, refuse_missing_folder

logger = logging.get_logger(__name__)

SPLIT_OF = {"train": "train", "eval": "validation", "predict": "test"}


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
    except (OSError, ValueError, RuntimeError, DatasetsError, yaml.YAMLError) as error:  # RuntimeError: it is a script
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        for path in Path(name).glob("**/*.parquet"):
            with contextlib.suppress(ValueError):  # not Parquet: the reason says so
                if parquet.read_metadata(path).num_rows == 0:
                    reason = f"{path.relative_to(name)} is empty"
        raise UserError(
            f"--dataset_name {name}: cannot be opened as a dataset: {reason}. Make one with "
            "`python prepare_drcd.py --data_dir FOLDER_OF_THE_COURSE_FILES` or `make data DATA_DIR=...`"
        ) from None


def check_split(rows: Dataset, split: str, where: str, limit: int | None) -> Dataset:
    """The split with string ids, at most `limit` rows, and for training only the questions with an answer."""
    needed = ["id", "question", "context", *(["answers"] if split != "test" else [])]
    # A column that one of several splits lacks is opened as one of nothing but None.
    lacking = [name for name in needed if name not in rows.column_names or has_gaps(rows, name)]
    if lacking:
        raise UserError(f"{where}: lacks the column {lacking[0]!r}, or a value in it; needed are {', '.join(needed)}")
    rows = rows.select(range(min(limit or len(rows), len(rows))))
    if len(rows) == 0:
        raise UserError(f"{where}: is empty")
    if split == "test" and "answers" in rows.column_names and has_gaps(rows, "answers"):
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


def has_gaps(rows: Dataset, name: str) -> bool:
    """Whether a column lacks a value anywhere; its texts are not loaded at once."""
    batches = rows.select_columns(name).with_format("arrow").iter(1000)
    return any(batch[name].null_count for batch in batches)


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
