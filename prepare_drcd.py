"""Course JSON (`hw7_*.json`) or nested SQuAD JSON (DRCD, ODSQA, CMRC 2018) in, a SQuAD-schema dataset folder out.

    python prepare_drcd.py --data_dir ml2022spring-hw7 --output_dir data/drcd

Writes one Parquet file per split and a dataset card, so that `datasets.load_dataset("data/drcd")` opens the folder.
Every answer is checked against its paragraph; a record that cannot be used stops the run by name.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from huggingface_hub import HfApi

from files import UserError, printable, read_json, replacing_folder
from hub_errors import explained
from options import command, parse_options

COURSE_FILES = {"train": "hw7_train.json", "validation": "hw7_dev.json", "test": "hw7_test.json"}
ANSWERS = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
FEATURES = Features(
    {"id": Value("string"), "question": Value("string"), "context": Value("string"), "answers": ANSWERS}
)
COURSE_ANSWER = ("answer_text", "answer_start", "answer_end")  # answer_end is the last character, not one past it
SQUAD_ANSWER = ("text", "answer_start")
UNLABELLED = dict.fromkeys([*COURSE_ANSWER, "answers"])  # what a test record may leave out
ROW_GROUP = 10_000  # rows, about 15 MB: what a streaming reader holds at once
SHOWN_SKIPS = 5  # per split; the table has the count
LEGEND = """\
Lengths: characters, median / 90% / 99% / longest. moved: answers whose offset was wrong, set to the nearest occurrence.
renamed: ids that an earlier file of the split had. skipped: questions and single answers left out."""
CARD = """\
---
language: zh
task_categories: [question-answering]
configs:
- config_name: default
  description: Parquet SHA-256 {digest}
  data_files:
{splits}
---

# Chinese extractive question answering in the SQuAD schema

Made by `prepare_drcd.py` from {sources}.

```
{table}

{legend}
```

A question without an answer has empty lists. `answer_start` is a character offset into `context`.

## Licence

DRCD is CC BY-SA 3.0 and derived from Wikipedia. For ODSQA and the spoken (TTS) twins see their authors' terms.
Data made from other files keeps those files' licence.
"""


@dataclass
class PrepareOptions:
    data_dir: str | None = field(
        default=None, metadata={"help": f"Folder with any of {', '.join(COURSE_FILES.values())}."}
    )
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "JSON files joined into the train split, instead of data_dir's."}
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "JSON files joined into the validation split, instead of data_dir's."}
    )
    test_files: list[str] = field(
        default_factory=list, metadata={"help": "JSON files joined into the test split, instead of data_dir's."}
    )
    output_dir: str = field(
        default="data/drcd", metadata={"help": "Dataset folder to write; one that an earlier run wrote is replaced."}
    )
    skip_bad_records: bool = field(
        default=False, metadata={"help": "Leave out and count records that cannot be used, instead of stopping."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Dataset repository (user/name) to upload the folder to, card included."}
    )
    config: str | None = field(default=None, metadata={"help": "YAML file with any of these options; flags win."})


@command
def main(argv: Sequence[str] | None = None) -> None:
    (options,) = parse_options((PrepareOptions,), argv, "Prepare DRCD-like JSON files as a dataset folder.")
    sources = split_sources(options)
    output = replaceable_folder(options.output_dir)
    summaries = []
    with replacing_folder(output) as folder:
        for split, paths in sources.items():
            rows, counts = read_split(split, paths, options.skip_bad_records)
            write_rows(rows, folder / f"{split}.parquet")
            summaries.append(summary(split, rows, counts))
        table = pd.DataFrame(summaries).to_string(index=False)
        (folder / "README.md").write_text(card(sources, table, folder), encoding="utf-8")
    print(table, LEGEND, f"Written to {printable(options.output_dir)}", sep="\n")
    if options.push_to_hub is not None:
        push(output, options.push_to_hub)


def split_sources(options: PrepareOptions) -> dict[str, list[Path]]:
    """The files of each split that has any. Raises UserError if there are none, or none in `data_dir`."""
    sources = {}
    if options.data_dir is not None:
        found = {split: Path(options.data_dir, name) for split, name in COURSE_FILES.items()}
        sources = {split: [path] for split, path in found.items() if path.exists()}
        if not sources:
            raise UserError(f"{options.data_dir}: no such folder, or none of {', '.join(COURSE_FILES.values())} in it")
    for split in COURSE_FILES:
        if names := getattr(options, f"{split}_files"):
            sources[split] = [Path(name) for name in names]
    if not sources:
        raise UserError("nothing to read: give --data_dir, --train_files, --validation_files or --test_files")
    return {split: sources[split] for split in COURSE_FILES if split in sources}


def replaceable_folder(path: str) -> Path:
    """`path`, links followed. Raises UserError if anything stands there that an earlier run did not write."""
    folder = Path(os.path.realpath(path))
    if printable(str(folder)) != str(folder):  # pyarrow cannot open it
        raise UserError(f"{printable(path)}: is not a UTF-8 name; give another --output_dir")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{path}: is a file; give another --output_dir")
    present = sorted(folder.iterdir()) if folder.exists() else []
    ours = {"README.md", ".gitattributes", *(f"{split}.parquet" for split in COURSE_FILES)}
    foreign = [file for file in present if file.name not in ours or not file.is_file()]
    readme = folder / "README.md"
    if present and (foreign or not readme.is_file() or b"prepare_drcd.py" not in readme.read_bytes()):
        name = (foreign or present)[0].name
        raise UserError(f"{path}: holds {name!r}, not from this script; give another --output_dir or empty it")
    return folder


class BadRecord(Exception):
    """A question or an answer that cannot be used; the message says why."""


def read_split(split: str, paths: Sequence[Path], skip_bad: bool) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The rows (`FEATURES`) of a split's files, and how many were moved, renamed and skipped.

    Raises UserError naming file and record at the first bad one (unless `skip_bad`), and if no row is left.
    """
    rows, ids, counts = [], set(), {"moved": 0, "renamed": 0, "skipped": 0}
    for path in paths:
        own_ids = set()
        for place, read, raw, parent in records(path):
            try:
                row, moved, bad = read(UNLABELLED | raw if split == "test" and isinstance(raw, dict) else raw, parent)
                if row["id"] in own_ids:
                    raise BadRecord("an earlier record of this file has the same id")
            except BadRecord as error:
                row, moved, bad = None, 0, [error]
            for error in bad:
                named = f" (id {excerpt(raw['id'])})" if isinstance(raw, dict) and "id" in raw else ""
                if not skip_bad:
                    raise UserError(f"{path}: {place}{named}: {error}; correct it, or pass --skip_bad_records")
                counts["skipped"] += 1
                if counts["skipped"] <= SHOWN_SKIPS:
                    print(f"skipped {path}: {place}{named}: {error}", file=sys.stderr)
            if row:
                own_ids.add(row["id"])
                counts["moved"] += moved
                counts["renamed"] += row["id"] in ids
                while row["id"] in ids:
                    row["id"] = f"{printable(path.stem)}-{row['id']}"
                ids.add(row["id"])
                rows.append(row)
    if not rows:
        names = ", ".join(map(str, paths))
        raise UserError(f"{split} split: no usable question in {names} ({counts['skipped']} skipped)")
    return rows, counts


def records(path: Path) -> Iterator[tuple[str, Callable, Any, Any]]:
    """The place of each record in a file, the function that reads it, and that function's two arguments.

    The format is told by content. Raises UserError for any other.
    """
    value = read_json(path)
    keys = value if isinstance(value, dict) else {}
    if isinstance(keys.get("questions"), list) and isinstance(keys.get("paragraphs"), list):
        for i, raw in enumerate(keys["questions"]):
            yield f"questions[{i}]", read_course, raw, keys["paragraphs"]
    elif isinstance(keys.get("data"), list):
        for i, article in enumerate(keys["data"]):
            for j, paragraph in enumerate(children(article, "paragraphs")):
                for k, raw in enumerate(children(paragraph, "qas")):
                    yield f"data[{i}].paragraphs[{j}].qas[{k}]", read_squad, raw, paragraph
    else:
        raise UserError(f"{path}: neither course JSON ('questions' and 'paragraphs') nor SQuAD JSON (a 'data' list)")


def children(node: Any, key: str) -> list[Any]:
    """`node[key]` if that is a list; else one None, which is then read, and reported, as a bad record."""
    found = node.get(key) if isinstance(node, dict) else None
    return found if isinstance(found, list) else [None]


def read_course(raw: Any, paragraphs: list[Any]) -> tuple[dict[str, Any], int, list[BadRecord]]:
    """`read_question` for a question of the course's files."""
    number = checked(raw, "paragraph_id", int)
    if not 0 <= number < len(paragraphs):
        raise BadRecord(f"paragraph_id {excerpt(number)} is unknown: the file has {len(paragraphs)} paragraphs, from 0")
    return read_question(raw, "question_text", {"context": paragraphs[number]}, [raw], COURSE_ANSWER)


def read_squad(raw: Any, paragraph: Any) -> tuple[dict[str, Any], int, list[BadRecord]]:
    """`read_question` for a question of nested SQuAD JSON."""
    references = checked(raw, "answers", list, type(None)) or []
    return read_question(raw, "question", paragraph, references, SQUAD_ANSWER)


def read_question(
    raw: dict, key: str, paragraph: Any, references: Iterable[Any], names: Sequence[str]
) -> tuple[dict[str, Any], int, list[BadRecord]]:
    """The row of a question, how many of its answers were moved, and what is wrong with those left out.

    Raises BadRecord if the question cannot be used, or has reference answers but none that can.
    """
    name, question = str(checked(raw, "id", int, str)), checked(raw, key, str)
    context = checked(paragraph, "context", str)
    texts, starts, moved, bad = [], [], 0, []
    for reference in references:
        try:
            answer = read_answer(reference, context, names)
        except BadRecord as error:
            bad.append(error)
        else:
            if answer:
                texts.append(answer[0])
                starts.append(answer[1])
                moved += answer[1] != reference["answer_start"]
    if bad and not texts:
        raise bad[0]
    answers = {"text": texts, "answer_start": starts}
    return {"id": name, "question": question, "context": context, "answers": answers}, moved, bad


def read_answer(raw: Any, context: str, names: Sequence[str]) -> tuple[str, int] | None:
    """The text and first character of a reference answer, None if it is unlabelled. Raises BadRecord.

    `names` are the keys of its text and offsets. The text is the authority: a last character must be an integer, but
    is not compared with it. Unlabelled are null, an empty text and, as in the course's test file, "null" as offset.
    """
    text, start, *_ = (checked(raw, name) for name in names)
    if text in (None, "") or (text == "null" and type(start) is not int):
        return None
    text, start, *_ = (checked(raw, name, str if name == names[0] else int) for name in names)
    found = nearest(context, text, start)
    if found is None:
        first = max(start, 0)
        there, around = context[first : first + len(text)], context[max(first - 10, 0) : first + len(text) + 10]
        raise BadRecord(
            f"answer {excerpt(text)} is nowhere in its paragraph; at answer_start {excerpt(start)} stands "
            f"{excerpt(there)}, in {excerpt(around)}"
        )
    return text, found


def nearest(context: str, text: str, start: int) -> int | None:
    """Where `text` occurs in `context` with the least distance to `start` (the earlier of two), None if nowhere."""
    start = min(max(start, 0), len(context))
    before, after = context.rfind(text, 0, start + len(text)), context.find(text, start)
    if before < 0 or after < 0:
        return None if before == after else max(before, after)
    return before if start - before <= after - start else after


def checked(raw: Any, key: str, *kinds: type) -> Any:
    """`raw[key]`, of exactly one of the `kinds` (true is no int) and valid Unicode, else raises BadRecord."""
    if not isinstance(raw, dict):
        raise BadRecord(f"must be an object with {key!r}, is {excerpt(raw)}")
    if key not in raw:
        raise BadRecord(f"{key!r} is missing")
    value = raw[key]
    if kinds and type(value) not in kinds:
        raise BadRecord(f"{key!r} must be {' or '.join(kind.__name__ for kind in kinds)}, is {excerpt(value)}")
    if type(value) is str and printable(value) != value:  # Parquet and tokenizers take UTF-8 only
        raise BadRecord(f"{key!r} is not valid Unicode (half a surrogate pair): {excerpt(value)}")
    return value


def excerpt(value: Any) -> str:
    """`value` as Python writes it, cut to what an error line can bear."""
    try:
        text = repr(value)
    except RecursionError:  # JSON is read some levels deeper
        text = f"a {type(value).__name__} nested too deep"
    return text if len(text) <= 80 else f"{text[:80]}…"


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a split's Parquet file, of which no more than a row group is in memory; its schema carries the features."""
    schema = FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            writer.write_table(pa.Table.from_pylist(rows[start : start + ROW_GROUP], schema))


def summary(split: str, rows: Sequence[dict[str, Any]], counts: dict[str, int]) -> dict[str, Any]:
    """One line of the table, keyed by column."""
    contexts = {row["context"] for row in rows}
    return {
        "split": split,
        "questions": len(rows),
        "paragraphs": len(contexts),
        "labelled": sum(bool(row["answers"]["text"]) for row in rows),
        **counts,
        "paragraph length": percentiles(contexts),
        "question length": percentiles(row["question"] for row in rows),
    }


def percentiles(texts: Iterable[str]) -> str:
    """Median, 90th and 99th percentile and longest, in characters; each is the length of one of the texts."""
    lengths = np.percentile([len(text) for text in texts], [50, 90, 99, 100], method="inverted_cdf")
    return " / ".join(map(str, lengths))


def card(sources: dict[str, list[Path]], table: str, folder: Path) -> str:
    """The dataset card (README.md) of the Parquet files in `folder`; its front matter names them to `load_dataset`.

    `load_dataset` looks a folder up in its cache by last name and front matter only. Without the files' digest there,
    it would answer with the rows of an earlier folder of the same name.
    """
    digest = hashlib.sha256(b"".join((folder / f"{split}.parquet").read_bytes() for split in sources)).hexdigest()
    splits = "\n".join(f"  - split: {split}\n    path: {split}.parquet" for split in sources)
    named = (f"`{printable(path.name)}` ({split})" for split, paths in sources.items() for path in paths)
    return CARD.format(digest=digest, splits=splits, sources=", ".join(named), table=table, legend=LEGEND)


def push(folder: Path, repository: str) -> None:
    """Upload the folder as a dataset repository. Raises UserError, without any token, if that fails."""
    kept = f"the local folder {folder} is kept, and the same command again pushes it"
    with explained(f"not pushed to {repository}", kept):
        url = HfApi().create_repo(repository, repo_type="dataset", exist_ok=True)
        HfApi().upload_folder(repo_id=url.repo_id, repo_type="dataset", folder_path=folder)
    print(f"Pushed to {url}")


if __name__ == "__main__":
    main()
