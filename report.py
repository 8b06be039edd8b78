"""The report of a run: one file that opens in any browser, offline, and its plots as pictures.

Reads the n-best file of a run's evaluation (of an ensemble too), its training log where it has one, and the validation
split it was scored on; writes `report.html`, `report_breakdown.png` and `report_training.png` beside them. With
`--compare OTHER` it also shows which answers became right and which became wrong since the other run.

    python report.py outputs/strong --compare outputs/medium
"""

import argparse
import base64
import hashlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from datasets import Dataset

from files import UserError, read_json, replacing_file
from metrics.drcd.drcd import exact_match
from options import Parser, command
from postprocess import choose, is_balanced, nbest_path, read_nbest
from scoring import DIMENSIONS, noted_dataset, question_table, twin_outcomes
from splits import check_split, open_dataset

TEMPLATES = Path(__file__).parent / "templates"
Z = NormalDist().inv_cdf(0.975)
DRAWS = 2000  # of the bootstrap

# What can be wrong with an answer; of several that hold, the first.
ERRORS = {
    "empty": "no text at all",
    "unbalanced bracket": "a bracket or quotation mark without its other half",
    "too long": "holds the gold answer and characters around it",
    "too short": "a part of the gold answer",
    "shifted": "begins or ends inside the gold answer, and reaches out of it on one side",
    "wrong place": "has no character in common with the gold answer's place",
}
OUTCOMES = ["became right", "became wrong", "both wrong", "both right"]
TITLES = {
    "source": "Text or spoken",
    "question asks": "What the question asks for",
    "answer length": "Answer length (characters)",
    "paragraph length": "Paragraph length (characters)",
}


@dataclass(frozen=True)
class Run:
    """What a run's folder says: the n best of every question it answered, and its training log (of an ensemble: [])."""

    folder: Path
    name: str
    nbest: dict[str, list[dict]]
    history: list[dict[str, Any]]


@command
def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    run = read_run(arguments.run)
    other = read_run(arguments.compare) if arguments.compare else None
    examples = read_examples(arguments.dataset_name or noted_dataset(arguments.run))
    for path in [write_report(run, examples, other), *write_plots(run, examples, other)]:
        print(f"wrote {path}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output folder of a run, with eval_nbest_predictions.json")
    parser.add_argument("--compare", type=Path, help="another run's folder, scored on the same questions")
    parser.add_argument("--dataset_name", help="the dataset it was scored on (the one noted when it was scored)")
    return parser.parse_args(argv)


def read_run(folder: Path) -> Run:
    """The run in a folder. Raises UserError if its n-best file or its training log is missing or something else."""
    path = nbest_path(folder, "eval")
    if not path.exists():
        raise UserError(f"{path}: there is no such file; let run_qa.py evaluate the run first (--do_eval)")
    state = folder / "trainer_state.json"
    history = read_history(state) if state.exists() else []
    return Run(folder, folder.resolve().name, read_nbest(path), history)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The log of a Trainer's state file, its non-finite figures left out. Raises UserError if it holds none."""
    state = read_json(path)
    log = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise UserError(f"{path}: not the state of a Trainer, has no list `log_history`; delete it, or train again")
    return [
        {name: value for name, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        for entry in log
    ]


def read_examples(dataset_name: str) -> Dataset:
    """The validation split of a dataset. Raises UserError if there is no labelled one."""
    found = open_dataset(dataset_name)
    if "validation" not in found:
        raise UserError(f"--dataset_name {dataset_name}: has no validation split, only {', '.join(found)}")
    return check_split(found["validation"], "validation", f"{dataset_name}, split 'validation'", None)


def answered(run: Run, examples: Dataset) -> Dataset:
    """The labelled examples that a run answered, in the dataset's order.

    Raises UserError if the run answered others, or if a candidate's characters are not its text.
    """
    ids = set(examples["id"][:])
    if strange := [id_ for id_ in run.nbest if id_ not in ids]:
        raise UserError(
            f"{run.folder}: question {strange[0]!r} is not in the dataset; name the one of the run with --dataset_name"
        )
    chosen = [
        number
        for number, (id_, answers) in enumerate(zip(examples["id"][:], examples["answers"][:], strict=True))
        if id_ in run.nbest and answers["text"]
    ]
    if not chosen:
        raise UserError(f"{run.folder}: answered no question that has a reference answer; there is nothing to report")
    rows = examples.select(chosen)
    for id_, context in zip(rows["id"][:], rows["context"][:], strict=True):
        for candidate in run.nbest[id_]:
            if context[candidate["start"] : candidate["end"]] != candidate["text"]:
                raise UserError(
                    f"{run.folder}: question {id_!r}: {candidate['text'][:40]!r} does not stand at character "
                    f"{candidate['start']} of its paragraph; name the dataset of the run with --dataset_name"
                )
    return rows


def judge(examples: Dataset, nbest: dict[str, list[dict]]) -> pd.DataFrame:
    """`scoring.question_table` of a run's answers, and of each answer: `error`, `chosen`, `rank`, `elsewhere`.

    `error` is one of `ERRORS`, "" for a right answer; `chosen` the place of the answer among its candidates, `rank`
    that of the best right one, from 0, -1 for none; `elsewhere` whether it is right, at a place that is not the gold's.
    """
    lists = [nbest[id_] for id_ in examples["id"][:]]
    texts = [choose(candidate["text"] for candidate in candidates) for candidates in lists]
    table = question_table(examples, texts)
    facts = []
    for candidates, text, answers, right in zip(lists, texts, examples["answers"][:], table.exact_match, strict=True):
        gold = gold_spans(answers)
        chosen = next((i for i, candidate in enumerate(candidates) if candidate["text"] == text), -1)
        start, end = (candidates[chosen]["start"], candidates[chosen]["end"]) if chosen >= 0 else (0, 0)
        facts.append(
            {
                "error": "" if right else error_kind(text, start, end, gold),
                "chosen": chosen,
                "rank": next((i for i, c in enumerate(candidates) if exact_match(c["text"], answers["text"])), -1),
                "elsewhere": bool(right) and not any(start < to and at < end for at, to in gold),
            }
        )
    table = table.join(pd.DataFrame(facts))
    table["cluster"] = clusters(examples["context"][:], table)
    return table


def gold_spans(answers: dict[str, list]) -> list[tuple[int, int]]:
    """The distinct places of the reference answers in characters, end exclusive."""
    pairs = zip(answers["text"], answers["answer_start"], strict=True)
    return list(dict.fromkeys((start, start + len(text)) for text, start in pairs))


def error_kind(text: str, start: int, end: int, gold: Sequence[tuple[int, int]]) -> str:
    """Which of `ERRORS` a wrong answer is: `text`, at characters `start` to `end` (exclusive).

    Of several reference answers the one that shares most characters with it counts.
    """
    if not text:
        return "empty"
    if not is_balanced(text):
        return "unbalanced bracket"
    at, to = max(gold, key=lambda span: min(end, span[1]) - max(start, span[0]))
    if min(end, to) <= max(start, at):
        return "wrong place"
    if start <= at and to <= end:
        return "too long"
    return "too short" if at <= start and end <= to else "shifted"


def clusters(contexts: Sequence[str], table: pd.DataFrame) -> np.ndarray:
    """The cluster of each question: its paragraph, a spoken paragraph being that of its text.

    Answers in one paragraph stand or fall together, and so do those to a question asked over a text and spoken, so
    that questions are not independent; clusters nearly are.
    """
    paragraph, _ = pd.factorize(np.asarray(contexts, dtype=object))
    text_of = {}
    for twin, source, number in zip(table.twin, table.source, paragraph, strict=True):
        if source == "text":
            text_of.setdefault(twin, number)
    home = {}
    for twin, source, number in zip(table.twin, table.source, paragraph, strict=True):
        if source == "spoken" and twin in text_of:
            home.setdefault(number, text_of[twin])
    return np.array([home.get(number, number) for number in paragraph])


def wilson(share: float, count: float) -> tuple[float, float]:
    """The 95% score interval of a share of `count` independent trials (Wilson 1927)."""
    middle = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_interval(right: Sequence[bool], cluster: Sequence[int]) -> tuple[float, float]:
    """Wilson's 95% interval of the share of `right`, for as many independent questions as the clusters are worth.

    The number of questions is divided by the design effect (Kish 1965): the variance of the share between clusters,
    over what it would be of independent questions, 1 at least. Where all are right or all wrong it cannot be estimated,
    and every cluster counts as one question.
    """
    right = np.asarray(right, dtype=float)
    codes, found = pd.factorize(np.asarray(cluster))
    share, count, groups = float(right.mean()), len(right), len(found)
    if groups == 1 or share in (0.0, 1.0):
        return wilson(share, groups)
    excess = np.bincount(codes, right - share)
    variance = groups / (groups - 1) * float(excess @ excess) / count**2
    return wilson(share, min(count, share * (1 - share) / variance) if variance else count)


def bootstrap_interval(values: Sequence[float], cluster: Sequence[int]) -> tuple[float, float]:
    """The 95% percentile interval of the mean of `values`, clusters drawn with replacement; always the same."""
    codes, found = pd.factorize(np.asarray(cluster))
    sums, counts = np.bincount(codes, np.asarray(values, dtype=float)), np.bincount(codes)
    drawn = np.random.default_rng(0).integers(0, len(found), (DRAWS, len(found)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(one: int, other: int) -> float:
    """The exact two-sided p of McNemar's test, of the questions that only `one` and only the `other` run got right."""
    total = one + other
    tail = sum(math.comb(total, count) for count in range(min(one, other) + 1))
    return min(1.0, 2 * tail / 2**total)


def outcomes(run: pd.DataFrame, other: pd.DataFrame) -> list[str]:
    """Which of `OUTCOMES` each question is, from the other run to this one."""
    names = {(True, False): "became right", (False, True): "became wrong"}
    names |= {(False, False): "both wrong", (True, True): "both right"}
    return [names[bool(new), bool(old)] for new, old in zip(run.exact_match, other.exact_match, strict=True)]


def compare(run: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """How two runs' tables differ: the count of each outcome, the gain in exact match and its interval, and p."""
    found = outcomes(run, other)
    counts = {name: found.count(name) for name in OUTCOMES}
    gain = run.exact_match.astype(float) - other.exact_match.astype(float)
    return {
        "counts": counts,
        "gain": float(gain.mean()),
        "interval": bootstrap_interval(gain, run.cluster),
        "p": mcnemar(counts["became right"], counts["became wrong"]),
    }


def by_kind(tables: Sequence[pd.DataFrame]) -> dict[str, list[dict[str, Any]]]:
    """Dimension → its kinds, each with `kind`, `questions` and, a run each, `scores`: exact match, interval, F1.

    A dimension with a single kind is left out. Kinds stand in the order of their names, question words by frequency.
    """
    dimensions = {}
    for dimension in DIMENSIONS:
        kinds = sorted(tables[0][dimension].dropna().unique())
        if dimension == "question asks":
            kinds.sort(key=lambda kind: -(tables[0][dimension] == kind).sum())
        if len(kinds) < 2:
            continue
        dimensions[dimension] = []
        for kind in kinds:
            groups = [table[table[dimension] == kind] for table in tables]
            scores = [scores_of(group) for group in groups]
            name = re.sub(r"^\d+\. ", "", kind)
            dimensions[dimension].append({"kind": name, "questions": len(groups[0]), "scores": scores})
    return dimensions


def scores_of(table: pd.DataFrame) -> dict[str, Any]:
    """Exact match, its interval, and F1 over a table's questions."""
    return {
        "exact_match": float(table.exact_match.mean()),
        "interval": clustered_interval(table.exact_match, table.cluster),
        "f1": float(table.f1.mean()),
    }


def panels(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The training curves that a log holds: `title`, `percent`, and `lines` of a name and points (epoch, value)."""
    found = []
    for title, percent, names in (
        ("Loss", False, {"train": "loss", "dev": "eval_loss"}),
        ("Exact match and F1", True, {"train exact match": "train_exact_match", "dev exact match": "eval_exact_match",
                          "dev F1": "eval_f1"}),
        ("Learning rate", False, {"learning rate": "learning_rate"}),
    ):  # fmt: skip
        lines = {
            name: [(entry["epoch"], entry[key]) for entry in history if key in entry and "epoch" in entry]
            for name, key in names.items()
        }
        lines = {name: points for name, points in lines.items() if points}
        if max(map(len, lines.values()), default=0) > 1:
            title = "Exact match" if percent and "dev F1" not in lines else title
            found.append({"title": title, "percent": percent, "lines": lines})
    return found


def ticks(low: float, high: float, wished: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, about `wished` of them."""
    rough = (high - low) / wished or 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [step * number for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def table_data(examples: Dataset, runs: Sequence[Run], tables: Sequence[pd.DataFrame]) -> dict[str, Any]:
    """What the page's script shows: the questions that a run answered wrongly, each paragraph once.

    Places are in characters (code points) of the paragraph, end exclusive.
    """
    shown = np.flatnonzero(~np.logical_and.reduce([table.exact_match for table in tables])).tolist()
    rows = examples.select(shown).to_list()
    places = {context: place for place, context in enumerate(dict.fromkeys(row["context"] for row in rows))}
    changes = outcomes(*tables) if len(tables) == 2 else []
    records = [table.to_dict("records") for table in tables]
    cases = []
    for number, row in zip(shown, rows, strict=True):
        answers = []
        for run, facts in zip(runs, records, strict=True):
            candidates = run.nbest[row["id"]]
            fact = facts[number]
            answers.append(
                {
                    "error": fact["error"],
                    "chosen": fact["chosen"],
                    "rank": fact["rank"],
                    "f1": round(fact["f1"], 3),
                    "nbest": [[c["start"], c["end"], float(f"{c['probability']:.3g}")] for c in candidates],
                }
            )
        cases.append(
            {
                "id": row["id"],
                "question": row["question"],
                "paragraph": places[row["context"]],
                "asks": records[0][number]["question asks"],
                "gold": gold_spans(row["answers"]),
                "outcome": changes[number] if changes else "",
                "answers": answers,
            }
        )
    return {"runs": [run.name for run in runs], "paragraphs": list(places), "cases": cases}


def render(runs: Sequence[Run], examples: Dataset, tables: Sequence[pd.DataFrame]) -> str:
    """The page. What comes from data or file names reaches it escaped, and no script runs but the page's own."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    environment.filters |= {"percent": "{:.1%}".format, "number": "{:,}".format, "short": "{:.3g}".format}
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    table = tables[0]
    return environment.get_template("report.html.j2").render(
        runs=runs,
        scores=[scores_of(table) | {"f1_interval": bootstrap_interval(table.f1, table.cluster)} for table in tables],
        questions=len(table),
        clusters=table.cluster.nunique(),
        wrong=[int((~table.exact_match).sum()) for table in tables],
        elsewhere=[int(table.elsewhere.sum()) for table in tables],
        twins=twin_outcomes(table),
        dimensions=by_kind(tables),
        titles=TITLES,
        errors=[(kind, what, [int((table.error == kind).sum()) for table in tables]) for kind, what in ERRORS.items()],
        training=[(run.name, panels(run.history)) for run in runs if panels(run.history)],
        comparison=compare(*tables) if len(tables) == 2 else None,
        ticks=ticks,
        data=table_data(examples, runs, tables),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
    )


def judged(run: Run, examples: Dataset, other: Run | None) -> tuple[list[Run], Dataset, list[pd.DataFrame]]:
    """The runs, the examples that they answered, and a table of each. Raises UserError if they answered different ones.

    Runs of the same name are told apart by their paths.
    """
    runs = [run, other] if other else [run]
    if other and other.nbest.keys() != run.nbest.keys():
        odd = sorted(other.nbest.keys() ^ run.nbest.keys())[0]
        raise UserError(f"{other.folder}: question {odd!r} is in only one of it and {run.folder}")
    if other and other.name == run.name:
        runs = [Run(one.folder, str(one.folder), one.nbest, one.history) for one in runs]
    rows = [answered(one, examples) for one in runs][-1]  # the same of both
    return runs, rows, [judge(rows, one.nbest) for one in runs]


def write_report(run: Run, examples: Dataset, other: Run | None = None) -> Path:
    """Write `report.html` into a run's folder, and return its path. `examples` hold the questions it answered.

    Raises UserError if they do not, or if the other run answered different questions; nothing is written then.
    """
    page = render(*judged(run, examples, other))
    with replacing_file(run.folder / "report.html") as file:
        file.write(page)
    return run.folder / "report.html"


def write_plots(run: Run, examples: Dataset, other: Run | None = None) -> list[Path]:
    """Write the breakdown and the training curves of a run as PNG into its folder, and return the paths."""
    runs, _, tables = judged(run, examples, other)
    figures = {"report_breakdown.png": plot_breakdown(by_kind(tables), [one.name for one in runs])}
    if curves := panels(run.history):
        figures["report_training.png"] = plot_training(curves)
    for name, picture in figures.items():
        with replacing_file(run.folder / name, binary=True) as file:
            file.write(picture)
    return [run.folder / name for name in figures]


def plot_breakdown(dimensions: dict[str, list[dict[str, Any]]], names: Sequence[str]) -> bytes:
    """A PNG of exact match and its interval by kind of question, one panel a dimension, one mark a run."""
    heights = [len(kinds) for kinds in dimensions.values()] or [1]
    figure = new_figure(6.4, 0.9 + 0.32 * sum(heights) + 0.75 * len(heights))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (dimension, kinds) in zip(axes, dimensions.items(), strict=False):
        for number, (name, mark) in enumerate(zip(names, "oD", strict=False)):
            shares = np.array([kind["scores"][number]["exact_match"] for kind in kinds])
            bounds = np.array([kind["scores"][number]["interval"] for kind in kinds])
            axis.errorbar(
                100 * shares, np.arange(len(kinds)) + 0.24 * number, fmt=mark, capsize=2, markersize=5, label=name,
                xerr=100 * np.abs(bounds.T - shares), color=COLORS[number], markerfacecolor="white" if number else None,
            )  # fmt: skip
        # Matplotlib's own font has no Chinese: "who 誰" becomes "who".
        labels = [f"{re.sub(r'[^ -~]+', '', kind['kind']).strip()}  (n = {kind['questions']:,})" for kind in kinds]
        axis.set_yticks(np.arange(len(kinds)) + 0.12 * (len(names) - 1), labels)
        axis.set_ylim(len(kinds) - 0.4, -0.6)
        axis.set_xlim(0, 102)
        axis.set_title(TITLES[dimension], loc="left")
    axes[-1].set_xlabel("exact match (%), 95% interval")
    if len(names) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return as_png(figure)


def plot_training(curves: Sequence[dict[str, Any]]) -> bytes:
    """A PNG of the training curves, one panel beside the other."""
    figure = new_figure(3.6 * len(curves), 2.9)
    for axis, panel in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        for number, (name, points) in enumerate(panel["lines"].items()):
            x, y = np.array(points).T
            style = {"linestyle": ["-", "--", ":"][number], "marker": "o" if len(points) < 15 else "", "markersize": 3}
            axis.plot(x, y * (100 if panel["percent"] else 1), label=name, color=COLORS[number], **style)
        axis.set_title(f"{panel['title']}{' (%)' if panel['percent'] else ''}", loc="left")
        axis.set_xlabel("epoch")
        axis.set_ylim(bottom=0)
        if len(panel["lines"]) > 1:
            axis.legend()
    return as_png(figure)


COLORS = ["#1f5fbf", "#b3470b", "#6b3fa0"]  # as in templates/report.css


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of a size in inches. Imported here: report.html does without."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {
        "font.size": 9, "axes.titlesize": 9, "axes.titleweight": "bold", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.color": "#e3e5e8", "axes.axisbelow": True,
        "legend.frameon": False, "text.parse_math": False,
    }  # fmt: skip
    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file, 200 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=200)
    return file.getvalue()


if __name__ == "__main__":
    main()
