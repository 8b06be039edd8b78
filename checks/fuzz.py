"""Bad and odd input for every script: each must end in the right result, or in one line and exit code 2.

Four kinds of input: course JSON and nested SQuAD JSON for prepare_drcd.py, YAML configs with flags for run_qa.py (which
then stops at a dataset that is not there), n-best files for postprocess.py. What the right result is, and whether there
is one, is worked out again here, record by record, from what each script promises. After exit code 2 every file must be
as it was, and none more.

    python checks/fuzz.py --cases 2000 --subprocesses 8

A case depends on its kind and number alone. The first that fails is printed with its folder, which is kept, and the
exit code is 1; `--kinds course --first_case 17 --cases 1` runs it again.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).parent.parent
SHARED_MEMORY = Path("/dev/shm")  # where there is one, thousands of small files cost no disk
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    HOME = tempfile.mkdtemp(prefix="fuzz-home-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
    os.environ["HF_HOME"] = HOME  # the caches of `datasets` and `evaluate`, deleted at the end

import datasets  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import yaml  # noqa: E402

import postprocess  # noqa: E402
import prepare_drcd  # noqa: E402
import run_qa  # noqa: E402
from arguments import RunArguments, RunOptions  # noqa: E402
from metrics.drcd.drcd import exact_match  # noqa: E402
from options import parse_options  # noqa: E402


class Failure(Exception):
    """What a case did that it must not do."""


@dataclass
class Case:
    """A command line over files. `check(code, printed, error)` raises Failure if it ended otherwise than promised."""

    main: Callable[[Sequence[str]], Any]
    argv: list[str]
    files: dict[str, bytes]
    check: Callable[[int, str, str], None]


def same(found: Any, wanted: Any, what: str) -> None:
    if found != wanted:
        raise Failure(f"{what}: is {found!r:.2000}, must be {wanted!r:.2000}")


# ---------------------------------------------------------------------------------------------------------- odd text

PIECES = [
    *("臺北市", "是", "中華民國", "的首都", "，", "。", "《紅樓夢》", "「", "」", "（", "）", "甲", "乙", "丙", "丁"),
    *("A", "bc", "Café", "cafe\u0301", "１２３", "123", "1,234,567", " ", "\u3000", "\u00a0", "\t", "\n", "\r", "\r\n"),
    *("\u200b", "\u200d", "\u200e", "\ufeff", "\u202e", "\u0300", "\u20dd", "\u2028", "\x85", "\x00", "\x07"),
    *("\x1b[31m"),
    *("😀", "👩‍👩‍👧", "🇹🇼", "𠀋", "\U0010ffff", "\uffff", "\ue000", "שלום", "مرحبا", "ﷺ", "ﬁ", "İ", "ß", "Å", "Å"),
    *('"', "'", ",", "=", "+", "-", "@", "\\", "/", "null", "NA", "nan", "None", "{", "}", "[", "]", "(", ")"),
    *("%s", "<b>"),
]  # fmt: skip
WHOLE = [None, True, False, 0, 1, -1, 3, 2**31, -(2**31) - 1, 2**63, 10**30, -(10**30), 10**400]
BROKEN = [0.0, 1.5, -0.0, 1e308, math.nan, math.inf, -math.inf, "\ud800", "a\udc00", "\ud83d", [], {}, [[]], [None]]
TEXTS = ["", "null", "0", "-1", "\x00", "true", {"text": "甲"}, {"": ""}, ["a", "b"], [{}], {"data": []}]
RAW = "@@RAW@@"  # in its place a text is written that is no value of Python's


TOO_DEEP = "nested too deep"  # how deep a script can read is its own affair


def odd_text(rng: random.Random, most: int = 30) -> str:
    if rng.random() < 0.0005:
        return "".join(rng.choices(PIECES, k=100)) * (100_000 // 100)
    return "".join(rng.choices(PIECES, k=rng.choice([0, 1, 1, 2, 3, 5, rng.randrange(most)])))


def nasty(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice([*WHOLE, *BROKEN, *TEXTS, RAW, odd_text(rng)]))


def raw_json(rng: random.Random) -> str:
    """A piece of text in a JSON value's place: nesting as deep as the parser goes and deeper, numbers without end."""
    deep = rng.choice([3, 100, rng.randrange(900, 1000), rng.randrange(800, 1000), 5000, 100_000])
    return rng.choice(
        [
            *("[" * deep, "[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep, "9" * 4300, "9" * 4301, "-" * 9),
            *("1e999", "-1e999", "NaN", "Infinity", "-Infinity", "1E400", "0x10", "01", ".5", "'a'", "undefined", ""),
            *(
                '"\\ud83d\\ude00"',
                '"\\ude00\\ud83d"',
                '"\\u0000"',
                '"\\x41"',
                '"a\nb"',
                '{"a":1,"a":1}',
                "/**/1",
                "nul",
            ),
        ]
    )


def mutated(rng: random.Random, value: Any, times: int) -> Any:
    """`value` with some of its parts, at any depth, replaced, left out, doubled or moved."""
    for _ in range(times):
        holders, stack = [], [value]
        while stack:
            node = stack.pop()
            if isinstance(node, dict | list) and node:
                holders.append(node)
                stack += node.values() if isinstance(node, dict) else node
        if not holders:
            return nasty(rng)
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        action = rng.randrange(8)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, list):
            holder.append(json.loads(json.dumps(holder[key])))
        elif action == 2:
            holder[key] = [holder[key]]
        elif action == 3:
            holder[key] = str(holder[key])
        elif action == 4 and isinstance(holder[key], int | float) and abs(holder[key]) < 10**18:
            holder[key] += rng.choice([1, -1, 0.5, 1000, -1000])
        elif action == 5 and isinstance(holder, dict):
            holder[rng.choice([odd_text(rng), key + " ", "\ud800", key.upper()])] = holder.pop(key)
        else:
            holder[key] = nasty(rng)
    return value


def json_bytes(rng: random.Random, value: Any, broken: bool) -> bytes:
    """`value` as a JSON file in one of many spellings; where `broken`, damaged as a file or a text may be."""
    indent, ascii_only = rng.choice([None, None, 1]), rng.random() < 0.5
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).replace("\n", rng.choice(["\n", "\r\n", "\r"]))
    text = text.replace(f'"{RAW}"', raw_json(rng))
    damage = rng.randrange(12) if broken else -1
    if damage == 0:
        text = text[: rng.randrange(len(text) + 1)]
    elif damage == 1:
        text += rng.choice(["}", "\x00", "{}", " \n", "#", "\ufeff", "\x1a"])
    elif damage == 2 and (keys := list(re.finditer(r'"[^"\\]*": ', text))):
        key = rng.choice(keys)
        text = f"{text[: key.start()]}{key.group()}0, {text[key.start() :]}"
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    if damage in (3, 4, 5):
        place = rng.randrange(len(data) + 1)
        data = (
            data[:place]
            + rng.choice([b"\xff", b"\x00", b"\xc3", b'"', b"\\", b",", b"\n"])
            + data[place + damage % 2 :]
        )
    elif damage == 6:
        data = rng.choice(
            [b"", b" ", b"null", b"\xef\xbb\xbf", b"[]", b"{}", b"\x80", text.encode("utf-16", "replace")]
        )
    return data


def parsed(data: bytes) -> Any:
    """The value of a JSON file; ValueError or RecursionError if it is none, or if an object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError
        return dict(pairs)

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(3000)  # what nests almost too deep for the script must not do so for its check
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique)
    finally:
        sys.setrecursionlimit(limit)


def is_text(value: Any) -> bool:
    return type(value) is str and not any("\ud800" <= char <= "\udfff" for char in value)


# ------------------------------------------------------------------------------------------- course JSON, SQuAD JSON


def course_value(rng: random.Random, unlabelled: float) -> Any:
    paragraphs = [odd_text(rng) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.2:
        paragraphs.append(rng.choice(paragraphs))
    questions = []
    for number in range(rng.choice([0, 1, 1, 2, 3, 5, 8])):
        paragraph = rng.randrange(len(paragraphs))
        text, start = odd_answer(rng, paragraphs[paragraph])
        end = start + len(text) - 1 + rng.choice([0, 0, 0, 1, -1])
        if rng.random() < unlabelled:
            text, start, end = rng.choice([(None, None, None), ("null", "null", "null"), ("", 0, -1)])
        questions.append(
            {"id": odd_id(rng, number), "paragraph_id": paragraph, "question_text": odd_text(rng, 12),
             "answer_text": text, "answer_start": start, "answer_end": end}
        )  # fmt: skip
    return {"questions": questions, "paragraphs": paragraphs}


def squad_value(rng: random.Random, unlabelled: float) -> Any:
    articles = []
    for i in range(rng.choice([0, 1, 1, 2])):
        paragraphs = []
        for j in range(rng.choice([0, 1, 1, 2])):
            context = odd_text(rng)
            qas = []
            for k in range(rng.choice([0, 1, 1, 2, 4])):
                answers = []
                for _ in range(rng.choice([0, 1, 1, 2, 3])):
                    text, start = odd_answer(rng, context)
                    answers.append({"id": "1", "text": text, "answer_start": start})
                references = rng.choice([[], None]) if rng.random() < unlabelled else answers
                qas.append({"id": odd_id(rng, f"{i}-{j}-{k}"), "question": odd_text(rng, 12), "answers": references})
            paragraphs.append({"context": context, "id": j, "qas": qas})
        articles.append({"title": odd_text(rng, 4), "paragraphs": paragraphs})
    return {"version": rng.choice(["1.3", 1.3]), "data": articles}


def odd_answer(rng: random.Random, context: str) -> tuple[str, int]:
    if not context or rng.random() < 0.03:
        return rng.choice(PIECES), rng.choice([0, -1, 7, 10**30])
    start = rng.randrange(len(context))
    text = context[start : start + rng.randint(1, 6)]
    moved = start + rng.choice([1, -1, 5, -(10**9), 10**30]) if rng.random() < 0.15 else start
    return text, moved


def odd_id(rng: random.Random, number: Any) -> Any:
    return rng.choice([number, number, str(number), number, 10**30, odd_text(rng)]) if rng.random() < 0.1 else number


def json_case(rng: random.Random, folder: Path, make: Callable[[random.Random, float], Any]) -> Case:
    """One or two splits of one or two files each, some mutated, over no, an older or a foreign folder."""
    broken, skip = rng.random() < 0.6, rng.random() < 0.5
    files, sources, argv = {}, {}, ["--skip_bad_records"] if skip else []
    for split in rng.sample(["train", "validation", "test"], rng.choice([1, 1, 2])):
        names = [f"{split}{i}{rng.choice(['', ' 試', '.a'])}.json" for i in range(rng.choice([1, 1, 1, 2]))]
        for name in names:
            value = make(rng, 0.8 if split == "test" else 0.1)
            if broken and rng.random() < 0.7:
                value = mutated(rng, value, rng.choice([0, 1, 1, 2, 4]))
            files[name] = json_bytes(rng, value, broken and rng.random() < 0.4)
        sources[split] = names
        argv += [f"--{split}_files", *names]
    output = rng.choice(["out", "a/b/out", "data/drcd"])
    argv += [] if output == "data/drcd" else ["--output_dir", output]
    before = rng.random()
    if before < 0.2:
        files[f"{output}/README.md"] = b"Made by `prepare_drcd.py`"
        files[f"{output}/train.parquet"] = b"old"
    if 0.19 < before < 0.22:
        files[f"{output}/mine.txt"] = b"mine"
    given = {name: files[name] for names in sources.values() for name in names}
    expected = {split: expected_rows(split, names, given, skip) for split, names in sources.items()}
    refused = any(rows is None for rows in expected.values()) or f"{output}/mine.txt" in files

    def check(code: int, printed: str, error: str) -> None:
        if code == 2 and TOO_DEEP in error:
            return
        same(code, 2 if refused else 0, "exit code")
        if refused:
            return
        lines = [line.split() for line in printed.splitlines()]
        for split, (rows, counts) in expected.items():
            table = pq.read_table(folder / output / f"{split}.parquet")
            same(table.to_pylist(), rows, f"rows of {split}")
            for row in rows:
                for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True):
                    same(row["context"][start : start + len(text)], text, "text at its offset")
            labelled = sum(bool(row["answers"]["text"]) for row in rows)
            figures = [len(rows), len({row["context"] for row in rows}), labelled, *counts]
            same([list(map(int, line[1:7])) for line in lines if line[:1] == [split]], [figures], f"table of {split}")
        present = {path.name for path in (folder / output).iterdir()}
        same(present, {"README.md", *(f"{split}.parquet" for split in expected)}, "files")
        if rng.random() < 0.01:
            opened = datasets.load_dataset(str(folder / output))
            for split, (rows, _) in expected.items():
                same(opened[split].to_list(), rows, f"load_dataset of {split}")
                same(opened[split].features, prepare_drcd.FEATURES, "features")

    return Case(prepare_drcd.main, argv, files, check)


def expected_rows(
    split: str, names: Sequence[str], files: dict[str, bytes], skip: bool
) -> tuple[list[dict[str, Any]], tuple[int, int, int]] | None:
    """A split's rows and its counts of moved, renamed and skipped; None where prepare_drcd.py must refuse it."""
    rows, used, moved, renamed, skipped = [], set(), 0, 0, 0
    for name in names:
        try:
            value = parsed(files[name])
        except (ValueError, RecursionError):
            return None
        here: set[str] = set()
        if not isinstance(value, dict):
            return None
        if type(value.get("questions")) is list and type(value.get("paragraphs")) is list:
            found = [expected_course(raw, value["paragraphs"], split) for raw in value["questions"]]
        elif type(value.get("data")) is list:
            found = []
            for article in value["data"]:
                for paragraph in parts(article, "paragraphs"):
                    found += [expected_squad(raw, paragraph, split) for raw in parts(paragraph, "qas")]
        else:
            return None
        for row, away, bad in found:
            if row and row["id"] in here:
                row, bad = None, 1
            if bad and not skip:
                return None
            skipped += bad
            if row:
                here.add(row["id"])
                moved += away
                renamed += row["id"] in used
                while row["id"] in used:
                    row["id"] = f"{name.removesuffix('.json')}-{row['id']}"
                used.add(row["id"])
                rows.append(row)
    return (rows, (moved, renamed, skipped)) if rows else None


def parts(node: Any, key: str) -> list[Any]:
    return node[key] if isinstance(node, dict) and type(node.get(key)) is list else [None]


Found = tuple[dict[str, Any] | None, int, int]  # a row or none; answers moved; what was left out
BAD: Found = (None, 0, 1)


def expected_course(raw: Any, paragraphs: list[Any], split: str) -> Found:
    if not isinstance(raw, dict) or type(raw.get("paragraph_id")) is not int:
        return BAD
    if not 0 <= raw["paragraph_id"] < len(paragraphs):
        return BAD
    names = ("answer_text", "answer_start", "answer_end")
    raw = dict.fromkeys(names) | raw if split == "test" else raw
    return expected_question(raw, "question_text", paragraphs[raw["paragraph_id"]], [raw], names)


def expected_squad(raw: Any, paragraph: Any, split: str) -> Found:
    if not isinstance(raw, dict) or not isinstance(paragraph, dict):
        return BAD
    references = raw.get("answers", None if split == "test" else 0)
    if references is not None and type(references) is not list:
        return BAD
    return expected_question(raw, "question", paragraph.get("context"), references or [], ("text", "answer_start"))


def expected_question(raw: dict, key: str, context: Any, references: list[Any], names: Sequence[str]) -> Found:
    if not (type(raw.get("id")) is int or is_text(raw.get("id"))) or not is_text(raw.get(key)) or not is_text(context):
        return BAD
    texts, starts, moved, bad = [], [], 0, 0
    for reference in references:
        answer = expected_answer(reference, context, names)
        if answer == "bad":
            bad += 1
        elif answer:
            texts.append(answer[0])
            starts.append(answer[1])
            moved += answer[1] != reference["answer_start"]
    if bad and not texts:
        return BAD
    answers = {"text": texts, "answer_start": starts}
    return {"id": str(raw["id"]), "question": raw[key], "context": context, "answers": answers}, moved, bad


def expected_answer(reference: Any, context: str, names: Sequence[str]) -> tuple[str, int] | str | None:
    if not isinstance(reference, dict) or not all(name in reference for name in names):
        return "bad"
    values = [reference[name] for name in names]
    if any(type(value) is str and not is_text(value) for value in values):
        return "bad"
    text, start, *_ = values
    if text is None or text == "" or (text == "null" and type(start) is not int):
        return None
    if type(text) is not str or not all(type(value) is int for value in values[1:]):
        return "bad"
    places, place = [], context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return (text, min(places, key=lambda i: (abs(i - start), i))) if places else "bad"


# ------------------------------------------------------------------------------------------------- YAML with flags

GOOD = {
    "max_seq_length": [16, 384], "max_question_length": [1, 64], "doc_stride": [1, 128], "n_best_size": [1, 20],
    "max_answer_length": [1, 30], "span_choice": ["joint", "independent"], "train_windows": ["random", "stride"],
    "negative_window_ratio": [0, 0.5, 1.0], "max_train_samples": [1, 10**6], "learning_rate": [1e-5, 0.1],
    "num_train_epochs": [1, 2.5], "seed": [0, 2**32 - 1], "fp16": [True, False], "per_device_train_batch_size": [1, 64],
    "warmup_steps": [0, 0.1, 100], "lr_scheduler_type": ["linear", "cosine"], "weight_decay": [0, 0.01],
    "eval_strategy": ["epoch", "steps"], "train_on_validation": [True, False], "run_name": ["甲 乙", "-x", "a: b", "#"],
    "gradient_accumulation_steps": [1, 8], "report_to": [["none"], "none"], "logging_steps": [1, 0.5],
}  # fmt: skip
# A value of these that is none of its type must be refused, in a file as in a flag.
WRONG = {
    name: values
    for names, values in {
        "max_seq_length doc_stride seed": ["many", 1.5, "1e3", True, {"a": 1}, "２.5", 10**30],
        "n_best_size max_answer_length max_train_samples": [0, -1, -(10**30), "x", "nan"],
        "per_device_train_batch_size gradient_accumulation_steps": [0, -1, 10**30, "inf"],
        "learning_rate negative_window_ratio weight_decay": ["nan", "inf", -1, -math.inf, "x", 1e300],
        "num_train_epochs warmup_steps logging_steps save_steps": ["nan", "inf", "x", -1.5, 1e300],
        "span_choice train_windows eval_strategy lr_scheduler_type optim": ["often", 3, "", 1.5],
        "fp16 trust_remote_code": ["maybe", 2, 1.5, "\x01"],
        "report_to": [["wandb?"], "nothing"],
        "lr_scheduler_kwargs": ["{", "[]", "x", {"none_such": 1}, {1: 2}],
        "max_grad_norm label_smoothing_factor": ["nan", "x", 1e300],
        "adam_beta1": [1, -0.5, "nan"],
        "save_total_limit": ["x", 1.5, 10**30],
        "dataloader_num_workers": [-1, 10**30, "x"],
        "preprocessing_num_workers": [0, -3, 10**30],
        "max_steps": ["x", 10**30],
        "data_seed": [-1, 10**30, "x"],
        "torch_compile_mode": ["fastest"],
        "metric_for_best_model": ["em"],
        "deepspeed": ["nowhere.json", "{"],
    }.items()
    for name in names.split()
}
YAML_TEXT = [
    "!!python/object/apply:os.system ['touch pwned']", "!!python/object/new:os.system ['touch pwned']",
    "!!python/name:os.system", "!!python/module:os", "!!binary AAAA", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x",
    "2024-13-45", "2024-01-01", "2024-01-01T00:00:00Z", "0o17", "0x" + "f" * 5000, "9" * 5000, "1:2:3", ".inf",
    ".nan", "~",
    "*nowhere", "&a [*a]", "&a {b: *a}", "!x y", "!!int x", "!!float []", "'", '"', "|", ">", "%", "@", "`", "? ",
    "- ", "[",
    "{", "}", ",", "\t", "\x00", "\x07", "\ud800", "{[a]: 1}", "{? {a: 1} : 2}", "{2024-01-01: 1}", "{a: 1, a: 2}",
    "{<<: 3}", "{<<: [1]}", "[1, [2]]", "[" * 3000, "{a: " * 3000, "no", "yes", "on", "null", "''", "- a\n- b",
    "=", "<<",
    "{<<: {a: 1}}", "[null]", "[~, 1]", "!!str 1", "!!bool x", "!!null x", "'a\n b'", "\u2028", "\ufeff", "\x85", "#",
]  # fmt: skip
HARMS = [
    *("wrong value", "wrong flag", "key twice", "unknown key", "unknown flag", "odd YAML", "odd YAML", "odd flags"),
    *("bomb"),
    *("members", "damage", None, None),
]  # fmt: skip
BOMBS = [
    "\n".join(
        ["lr_scheduler_kwargs:", "  a0: &a0 {x: 1, y: 2}"]
        + [f"  a{i + 1}: &a{i + 1} {rung.format(i)}" for i in range(9)]
    )
    for rung in (
        "{{" + ", ".join(f"k{j}: *a{{0}}" for j in range(9)) + "}}",
        "[" + ", ".join(["*a{0}"] * 9) + "]",
        "{{<<: [" + ", ".join(["*a{0}"] * 9) + "]}}",
    )
] + ["lr_scheduler_kwargs: &a {b: *a}", "label_names: &a [*a]"]
ODD_FLAGS = [
    "--",
    "-",
    "--=",
    "--config",
    "--member",
    "-h",
    "stray",
    "--doc_s",
    "--\x00",
    "\x00",
    "\udcff",
    "a\nb",
    "",
    "--fp16",
]


STOPPED = "--dataset_name ./nowhere: cannot be opened as a dataset: there is no such folder"


def config_case(rng: random.Random, folder: Path) -> Case:
    """A YAML file and flags over it; where nothing is wrong with them, the run stops only at its dataset."""
    wanted = {name: copy.deepcopy(rng.choice(GOOD[name])) for name in rng.sample(list(GOOD), rng.randrange(6))}
    flagged = {name: rng.choice(GOOD[name]) for name in rng.sample(list(GOOD), rng.randrange(4))}
    harm = rng.choice(HARMS)
    wrong = rng.choice(list(WRONG))
    if harm in ("wrong value", "wrong flag"):
        wanted.pop(wrong, None)
        flagged.pop(wrong, None)
    if harm == "wrong value":
        wanted[wrong] = rng.choice(WRONG[wrong])
    lines = [yaml_line(name, value) for name, value in wanted.items()]
    flags = [flag for name, value in flagged.items() for flag in as_flags(rng, name, value)]
    message = {"wrong value": wrong, "wrong flag": wrong, "unknown key": "unknown key", "bomb": ": "}.get(harm, "")
    if harm == "wrong flag":
        flags += as_flags(rng, wrong, rng.choice(WRONG[wrong]))
    elif harm == "key twice":
        name = rng.choice(list(GOOD))
        lines = [yaml_line(name, rng.choice(GOOD[name])), *lines, yaml_line(name, rng.choice(GOOD[name]))]
        lines = [*dict.fromkeys(lines[:-1]), lines[-1]]
        message = f"the key '{name}' stands twice"
    elif harm == "unknown key":
        odd = rng.choice(["doc_strid", "zzz", "甲", "1", "config", "~", "1.5", "2024-01-01"])
        lines.insert(rng.randrange(len(lines) + 1), f"{odd}: 3")
    elif harm == "unknown flag":
        flags.append(rng.choice(["--doc_strid=3", "--zzz", "--max_seq=3", "--甲"]))
        message = "unknown option"
    elif harm == "odd YAML":
        others = ["members", "zzz", "dataset_name", "output_dir", "label_names", "accelerator_config"]
        lines.append(f"{rng.choice([*GOOD, *WRONG, *others])}: {rng.choice(YAML_TEXT)}")
    elif harm == "odd flags":
        flags += [rng.choice([*ODD_FLAGS, f"--{rng.choice(list(GOOD))}={rng.choice(YAML_TEXT)}"]) for _ in range(3)]
    elif harm == "bomb":
        lines = [rng.choice(BOMBS)]
    elif harm == "members":
        members = {odd_text(rng, 3): mutated(rng, dict(wanted), 1) for _ in range(3)}
        lines.append("members: " + json.dumps(rng.choice([members, mutated(rng, members, 2)])))
        flags += ["--member", rng.choice([*map(str, members), "a", ""])]
    data = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")
    if harm == "damage":
        place = rng.randrange(len(data) + 1)
        more = rng.choice([b"\xff", b"\x00", b"\t", b"'", b"{", b":", b"- ", b"\xef\xbb\xbf", b"", b"*", b"&"])
        data = data[:place] + more + data[place:] * rng.randrange(2)
    elif rng.random() < 0.1:
        data = b"\xef\xbb\xbf" + data
    elif rng.random() < 0.1:
        data = data.replace(b"\n", b"\r\n")
    argv = ["--model_name_or_path", "./none", "--config", "run 甲.yaml", "--dataset_name", "./nowhere", *flags]

    def check(code: int, printed: str, error: str) -> None:
        if code == 0:
            same(bool({"-h", "--help"} & {*flags}), True, "a run without a dataset: help was asked for")
            return
        if harm is None and STOPPED not in error:
            raise Failure("nothing is wrong with the options")
        if message and (STOPPED in error or message.lower() not in error.lower()):
            raise Failure(f"the error must be about {message!r}")
        if harm is None:
            with contextlib.redirect_stderr(io.StringIO()), inside(folder):
                parts = parse_options((RunOptions, RunArguments), argv, "")
            for name, value in (wanted | flagged).items():
                found = next(getattr(part, name) for part in parts if hasattr(part, name))
                if name not in ("fp16", "report_to"):  # float32 without a GPU; a list, without "none"
                    same(getattr(found, "value", found), value, f"--{name}")

    return Case(run_qa.main, argv, {"run 甲.yaml": data}, check)


def yaml_line(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}, allow_unicode=True, default_flow_style=True, width=10**9)[1:-2]


def as_flags(rng: random.Random, name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return [f"--{name}={text}"] if text.startswith("-") or rng.random() < 0.5 else [f"--{name}", text]


# -------------------------------------------------------------------------------------------------------- n-best files

csv.field_size_limit(2**31 - 1)  # a field may be a whole paragraph
CANDIDATE = ("text", "start", "end", "score", "probability")
REFERENCES = {str(number): ["甲,乙", "丙"] if number % 2 else [] for number in range(4)}


def nbest_value(rng: random.Random, contexts: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    value = {}
    for id_, context in contexts.items():
        count = rng.choice([0, 1, 2, 3, 6])
        spans = {tuple(sorted(rng.choices(range(len(context) + 1), k=2))) for _ in range(count)}
        weights = [rng.random() for _ in spans]
        value[id_] = [
            {"text": context[start:end], "start": start, "end": end, "score": rng.choice([math.log(w), 0, -3.5]),
             "probability": w / sum(weights)}
            for (start, end), w in sorted(zip(spans, weights, strict=True), key=lambda pair: -pair[1])
        ]  # fmt: skip
    return value


def nbest_case(rng: random.Random, folder: Path) -> Case:
    """The folders of one to three runs, as they were written or mutated; alone or as an ensemble, sometimes scored."""
    broken, scored = rng.random() < 0.5, rng.random() < 0.05
    runs = [f"run {number}" for number in range(rng.choice([1, 1, 2, 3]))]
    files, argv = {}, list(runs)
    ids = rng.choice([["0", "1", "2", "3"], ["7", "10", "9"], [*{odd_text(rng, 3) for _ in range(3)}], ["a"], []])
    ids = ["0", "1", "3"] if scored else ids
    contexts = {id_: odd_text(rng) for id_ in ids}
    for split in rng.choice([["eval", "test"], ["eval"], ["test"]]):
        for run in runs:
            value = nbest_value(rng, contexts)
            if broken and rng.random() < 0.5:
                value = mutated(rng, value, rng.choice([0, 1, 1, 3]))
            if rng.random() < 0.97:
                files[f"{run}/{split}_nbest_predictions.json"] = json_bytes(rng, value, broken and rng.random() < 0.3)
    weights = [1.0] * len(runs)
    if rng.random() < 0.3:
        weights = [rng.choice([1, 2, 0.5, 0, 3e-300]) for _ in runs]
        if broken and rng.random() < 0.3:
            weights = [rng.choice([-1, math.nan, math.inf, 0, "x", 1e308, "9" * 400]) for _ in runs]
        argv += ["--weights", *map(str, weights)]
    output = "out" if len(runs) > 1 or rng.random() < 0.5 else runs[0]
    if output == "out":
        argv += ["--output_dir", output]
    if rng.random() < 0.2:
        for name in ("eval_predictions.json", "submission.csv"):
            files[f"{output}/{name}"] = b"old"
    if scored:
        figures = {"train_loss": 1.5, "甲": rng.choice(["\ud800", None, [1]])}
        figures = json_bytes(rng, mutated(rng, figures, 1) if broken else figures, broken and rng.random() < 0.3)
        files |= {f"{output}/all_results.json": figures} if rng.random() < 0.5 else {}
        argv += ["--dataset_name", dataset_of_references()]
    expected = expected_answers(runs, files, weights, scored, output)

    def check(code: int, printed: str, error: str) -> None:
        if code == 2 and TOO_DEEP in error:
            return
        same(code, 2 if expected is None else 0, "exit code")
        for split, nbest in (expected or {}).items():
            found = json.loads((folder / output / f"{split}_nbest_predictions.json").read_text(encoding="utf-8"))
            same(list(found), list(nbest), "questions")
            for id_, candidates in nbest.items():
                kept = [{name: c[name] for name in CANDIDATE if name != "score"} for c in candidates]
                same([{name: c[name] for name in c if name != "score"} for c in found[id_]], kept, "candidates")
            texts = {id_: expected_choice([c["text"] for c in found[id_]]) for id_ in found}
            predictions = json.loads((folder / output / f"{split}_predictions.json").read_text(encoding="utf-8"))
            same(predictions, texts, "predictions")
            if split == "test":
                check_submission(folder / output / "submission.csv", texts)
            elif scored:
                gold = [(texts[id_], REFERENCES[id_]) for id_ in texts if REFERENCES[id_]]
                share = sum(exact_match(text, answers) for text, answers in gold) / len(gold)
                old = json.loads(files.get(f"{output}/all_results.json", b"{}").decode("utf-8-sig"))
                noted = json.loads((folder / output / "all_results.json").read_text(encoding="utf-8"))
                same(repr({**old, "eval_exact_match": share}), repr({k: noted[k] for k in noted if k != "eval_f1"}), "")

    return Case(postprocess.main, argv, files, check)


def expected_answers(
    runs: list[str], files: dict[str, bytes], weights: list[Any], scored: bool, output: str
) -> dict[str, dict[str, list[dict[str, Any]]]] | None:
    """The n-best lists to be written, by split and question; None where postprocess.py must refuse."""
    try:
        weights = [float(weight) for weight in weights]
    except ValueError:
        return None
    if not all(0 <= weight < math.inf for weight in weights) or not 0 < sum(weights) < math.inf:
        return None
    expected = {}
    for split in ("eval", "test"):
        names = [f"{run}/{split}_nbest_predictions.json" for run in runs]
        if not all(name in files for name in names):
            continue
        try:
            values = [parsed(files[name]) for name in names]
        except (ValueError, RecursionError):
            return None
        if not all(isinstance(value, dict) and all(map(is_nbest, value.items())) for value in values):
            return None
        if any(value.keys() != values[0].keys() for value in values):
            return None
        if len(values) == 1:
            expected[split] = values[0]
        else:
            expected[split] = {}
            for id_ in values[0]:
                joined: dict[tuple[int, int], dict[str, Any]] = {}
                for value, weight in zip(values, weights, strict=True):
                    for c in value[id_]:
                        span = joined.setdefault((c["start"], c["end"]), c | {"probability": 0.0})
                        if span["text"] != c["text"]:
                            return None
                        span["probability"] += weight / sum(weights) * c["probability"]
                kept = max(len(value[id_]) for value in values)
                expected[split][id_] = [
                    joined[span] for span in sorted(joined, key=lambda s: (-joined[s]["probability"], s))
                ][:kept]
    if not expected:
        return None
    if scored and "eval" in expected:
        known = expected["eval"].keys() <= REFERENCES.keys()
        if not known or not any(REFERENCES[id_] for id_ in expected["eval"]):
            return None
        with contextlib.suppress(KeyError):
            try:
                if not isinstance(parsed(files[f"{output}/all_results.json"]), dict):
                    return None
            except (ValueError, RecursionError):
                return None
    return expected


def is_nbest(item: tuple[str, Any]) -> bool:
    id_, candidates = item
    if not is_text(id_) or not isinstance(candidates, list):
        return False
    for c in candidates:
        if not isinstance(c, dict) or not {*CANDIDATE} <= c.keys():
            return False
        if not is_text(c["text"]) or type(c["start"]) is not int or type(c["end"]) is not int or c["start"] < 0:
            return False
        if c["end"] - c["start"] != len(c["text"]):
            return False
        if type(c["score"]) not in (int, float) or not -1e38 < c["score"] < 1e38:
            return False
        if type(c["probability"]) not in (int, float) or not 0 <= c["probability"] <= 1 + 1e-6:
            return False
    return len({(c["start"], c["end"]) for c in candidates}) == len(candidates)


def expected_choice(texts: list[str]) -> str:
    """The first text whose brackets cancel out, pair by pair; else the first."""
    pairs = ["「」", "『』", "《》", "〈〉", "（）", "()", "【】", "“”"]
    for text in texts:
        left = "".join(char for char in text if char in "".join(pairs))
        while any(pair in left for pair in pairs):
            for pair in pairs:
                left = left.replace(pair, "")
        if not left:
            return text
    return texts[0] if texts else ""


def check_submission(path: Path, texts: dict[str, str]) -> None:
    """`csv` and pandas read the answers, less ASCII commas, in the order of the ids."""
    course = all(id_.isascii() and id_.isdigit() and len(id_) < 19 for id_ in texts)
    wanted = [[id_, texts[id_].replace(",", "")] for id_ in (sorted(texts, key=int) if course else texts)]
    with open(path, encoding="utf-8", newline="") as file:
        same(list(csv.reader(file)), [["ID", "Answer"], *wanted], "submission")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    same([["ID", "Answer"], *table.values.tolist()], [list(table.columns), *wanted], "submission by pandas")


def dataset_of_references() -> str:
    """A dataset folder whose validation split has `REFERENCES`; made once a process."""
    folder = Path(os.environ["HF_HOME"], "references")
    if not folder.exists():
        folder.mkdir(parents=True)
        rows = [
            {
                "id": id_,
                "question": "",
                "context": "甲,乙丙",
                "answers": {"text": texts, "answer_start": [0] * len(texts)},
            }
            for id_, texts in REFERENCES.items()
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "validation.parquet")
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- running

KINDS: dict[str, Callable[[random.Random, Path], Case]] = {
    "course": lambda rng, folder: json_case(rng, folder, course_value),
    "squad": lambda rng, folder: json_case(rng, folder, squad_value),
    "config": config_case,
    "nbest": nbest_case,
}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The folder as the working directory (`contextlib.chdir` of Python 3.11)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file under a folder with its content, and every folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def run_case(kind: str, number: int, folder: Path, as_process: bool = False) -> int:
    """Run one case in an empty folder; its exit code. Raises Failure, and whatever the script lets escape."""
    case = KINDS[kind](random.Random(f"{kind} {number}"), folder)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    before = snapshot(folder)
    code, printed, error = (call_process if as_process else call)(case, folder)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    if "Traceback" in error or code not in (0, 2) or len(lines) != (code == 2):
        raise Failure(f"exit code {code}, {len(lines)} error lines:\n{error}")
    if code == 2:
        if not error.endswith("\n") or not error.splitlines()[-1].startswith("error: "):
            raise Failure(f"the error is not the last line:\n{error}")
        same(snapshot(folder), before, "files after exit code 2")
    case.check(code, printed, lines[0] if lines else "")
    return code


def call(case: Case, folder: Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script's `main` in this process."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2)]
    environment, code = dict(os.environ), 0
    with inside(folder), contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            case.main(case.argv)
        except SystemExit as stop:
            code = 0 if stop.code is None else stop.code
    if os.environ != environment:  # the Trainer's arguments leave notes there
        os.environ.clear()
        os.environ.update(environment)
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode("utf-8") for stream in streams)


def call_process(case: Case, folder: Path) -> tuple[int, str, str]:
    """The same of the script as a process of its own."""
    script = sys.modules[case.main.__module__].__file__
    # Of odd flags, those that a process cannot be given: with NUL or half a surrogate pair that stands for no byte.
    argv = [argument for argument in case.argv if "\0" not in argument and not re.search("[\ud800-\udc7f]", argument)]
    done = subprocess.run([sys.executable, script, *argv], cwd=folder, capture_output=True)
    return done.returncode, *(stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))


def run_cases(kind: str, numbers: range, work: Path, as_process: bool = False) -> dict[int, int]:
    """Run cases of a kind under `work`; how many ended in which exit code. SystemExit(1) at the first failure."""
    codes: dict[int, int] = {}
    for number in numbers:
        folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{number}-", dir=work))
        try:
            code = run_case(kind, number, folder, as_process)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{kind}-{number}-"))
            case = KINDS[kind](random.Random(f"{kind} {number}"), folder)
            print(f"FAILED {kind} {number}: {type(error).__name__}: {error}")
            print(
                f"its files: {kept}; its command: {shlex.join(case.argv).encode('utf-8', 'backslashreplace').decode()}"
            )
            for name, content in case.files.items():
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                (kept / name).write_bytes(content)
                print(f"--- {name}, {len(content)} bytes: {content[:2000]!r}")
            again = f"--kinds {kind} --first_case {number} --cases 1" + " --subprocesses 4" * as_process
            print(f"again: python checks/fuzz.py {again}", flush=True)
            raise SystemExit(1) from (None if isinstance(error, Failure) else error)
        codes[code] = codes.get(code, 0) + 1
        shutil.rmtree(folder)
        if number % 500 == 499:
            shutil.rmtree(Path(os.environ["HF_HOME"], "datasets"), ignore_errors=True)
    return codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--cases", type=int, default=2000, help="cases of each kind, each a call of the script's main")
    parser.add_argument("--subprocesses", type=int, default=0, help="cases in all that run as whole processes too")
    parser.add_argument("--first_case", type=int, default=0, help="number of the first case of each kind")
    options = parser.parse_args()
    # What stands in the input must not be taken for the checker's own trouble: any text can be printed.
    sys.stdout.reconfigure(errors="backslashreplace")
    share = -(-options.subprocesses // len(options.kinds))
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as work:
        try:
            for kind in options.kinds:
                for count, as_process in ((options.cases, False), (share, True)):
                    started = time.perf_counter()
                    numbers = range(options.first_case, options.first_case + count)
                    codes = run_cases(kind, numbers, Path(work), as_process)
                    if count:
                        what = "processes" if as_process else "calls"
                        told = ", ".join(f"{codes[code]} with exit code {code}" for code in sorted(codes))
                        print(f"{kind}: {count} {what} in {time.perf_counter() - started:.0f} s: {told}", flush=True)
        finally:
            shutil.rmtree(HOME, ignore_errors=True)
    print("no failure")


if __name__ == "__main__":
    main()
