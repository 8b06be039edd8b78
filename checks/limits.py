"""Prepare 100 times the course's dev file and answer 20,000 questions, each in a process whose memory is limited.

    python checks/limits.py --course_data folder/of/hw7_dev.json

Without `--course_data`, the generated sample is repeated until it has as many questions. The limit is RLIMIT_DATA: the
private memory that a process may write to (heap, stacks, anonymous maps; not mapped files). Beyond it every allocation
fails, as a process that takes more than the limit shows first. Peak RSS counts mapped files and libraries as well;
it is at least what this script itself had in memory when it started the process.
Exit code 1 if a process fails.
"""

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

ROOT = Path(__file__).parent.parent
PREPARED, ANSWERED = 413_100, 20_000  # questions
PREPARE_LIMIT, ANSWER_LIMIT = 4096, 2048  # MiB
WINDOWS = ["--max_seq_length", "128", "--max_question_length", "32", "--n_best_size", "20"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--course_data", type=Path, help="folder with the course's hw7_dev.json (the sample)")
    course_data = parser.parse_args().course_data
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        subprocess.run([sys.executable, ROOT / "make_sample.py", "--output_dir", folder / "sample"], check=True)
        save_model(folder / "sample/model", folder / "model")
        source = (course_data or folder / "sample") / "hw7_dev.json"
        for name, questions, labelled in (("prepared", PREPARED, True), ("answered", ANSWERED, False)):
            size = repeat(source, questions, labelled, folder / f"{name}.json")
            print(f"{name}: {questions:,} questions, {size / 2**20:.0f} MiB of JSON from {source.name}", flush=True)
        greedy = ["-c", f"bytearray({PREPARE_LIMIT * 2**20})"]
        codes = [
            not limited("a process that takes the limit", PREPARE_LIMIT, *greedy),
            limited("prepare_drcd.py", PREPARE_LIMIT, "prepare_drcd.py", "--validation_files", folder / "prepared.json",
                    "--output_dir", folder / "large"),
            limited("prepare_drcd.py of those to answer", PREPARE_LIMIT, "prepare_drcd.py", "--test_files",
                    folder / "answered.json", "--output_dir", folder / "dataset"),
            limited("run_qa.py --do_predict", ANSWER_LIMIT, "run_qa.py", "--model_name_or_path", folder / "model",
                    "--dataset_name", folder / "dataset", "--output_dir", folder / "out", "--do_predict", *WINDOWS),
        ]  # fmt: skip
        answers = folder / "out/test_predictions.json"
        answered = len(json.loads(answers.read_text(encoding="utf-8"))) if answers.exists() else 0
        print(f"{answered:,} questions answered")
    return int(any(codes) or answered != ANSWERED)


def save_model(source: Path, target: Path) -> None:
    """Save a BERT of random weights with one layer of 32 units, and the tokenizer of `source`."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(tokenizer), **shape))
    for part in (tokenizer, model):
        part.save_pretrained(target)


def repeat(source: Path, count: int, labelled: bool, target: Path) -> int:
    """Write the questions of a course file again and again, `count` in all; the size of the file in bytes.

    Every question has an id of its own, and the paragraphs of every copy end differently.
    """
    data = json.loads(source.read_text(encoding="utf-8-sig"))
    paragraphs, questions = [], []
    for copy in itertools.count():
        if len(questions) >= count:
            break
        for row in data["questions"]:
            own = {"id": len(questions), "paragraph_id": row["paragraph_id"] + len(paragraphs)}
            questions.append(row | own if labelled else own | {"question_text": row["question_text"]})
        paragraphs += [f"{paragraph}（第{copy}份）" for paragraph in data["paragraphs"]]
    with open(target, "w", encoding="utf-8") as file:
        json.dump({"questions": questions[:count], "paragraphs": paragraphs}, file, ensure_ascii=False)
    return target.stat().st_size


def limited(name: str, limit: int, *arguments: str | Path) -> int:
    """Run Python in the project's folder with at most `limit` MiB to write to, print what it took; its exit code."""
    calm = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | calm,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**20,) * 2),
    )
    errors = process.stderr.read().decode("utf-8", "replace")
    _, status, used = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    said = f" ({errors.strip().splitlines()[-1][:120]})" if code and errors.strip() else ""
    peak = used.ru_maxrss / 1024
    print(f"{name}: limit {limit} MiB, exit code {code}{said}, peak RSS {peak:.0f} MiB, {seconds:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
