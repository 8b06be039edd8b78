"""The report of a run: what it counts, what it refuses, and how it looks to a browser without a network."""

import base64
import hashlib
import html.parser
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from scipy import stats

import report
import scoring
from files import UserError

EVIL = '</script><img src=x onerror="document.title=1"><!-- 《書》\u2028 & \'"'
PASSAGE = "陳澄波於1895年生於嘉義，\U00020000是畫家。他又名《嘉義街外》。" + EVIL + "林玉山生於1907年。" + "文" * 100


def candidate(start, end, probability, context=PASSAGE):
    return {"text": context[start:end], "start": start, "end": end, "score": 0.0, "probability": probability}


def place(text, context=PASSAGE):
    return context.index(text), context.index(text) + len(text)


# Gold answer, the two best candidates, and what is wrong with the first
CASES = [
    ("陳澄波", ["陳澄波", "陳"], ""),
    ("1895年", ["1895", "1895年"], "too short"),
    ("嘉義", ["生於嘉義", "林玉山"], "too long"),
    ("\U00020000是畫家", ["，\U00020000是", "\U00020000是畫家"], "shifted"),
    ("《嘉義街外》", ["《嘉義街外", "《嘉義街"], "unbalanced bracket"),
    ("林玉山", ["陳澄波", "林玉山"], "wrong place"),
]


@pytest.fixture
def dataset(tmp_path):
    """A dataset folder of `CASES` and one question whose answer will be empty."""
    rows = [(f"{gold}？誰", gold) for gold, *_ in CASES] + [("1907年是什麼？", "1907年")]
    columns = {
        "id": [str(number) for number in range(len(rows))],
        "question": [question for question, _ in rows],
        "context": [PASSAGE] * len(rows),
        "answers": [{"text": [gold], "answer_start": [PASSAGE.index(gold)]} for _, gold in rows],
    }
    (tmp_path / "data").mkdir()
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "data/validation.parquet"))
    return tmp_path / "data"


def make_run(folder, candidates, dataset=None, history=None):
    folder.mkdir()
    nbest = {str(number): found for number, found in enumerate(candidates)}
    (folder / "eval_nbest_predictions.json").write_text(json.dumps(nbest, ensure_ascii=False), encoding="utf-8")
    if dataset:
        scoring.note_dataset(folder, str(dataset))
    if history:
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder


@pytest.fixture
def run(tmp_path, dataset):
    history = [
        {"epoch": 1.0, "loss": 2.0, "learning_rate": 1e-3, "train_exact_match": 0.2},
        {"epoch": 1.0, "eval_loss": 1.5, "eval_exact_match": 0.3, "eval_f1": 0.5},
        {"epoch": 2.0, "loss": float("nan"), "learning_rate": 0.0, "train_exact_match": 0.8},
        {"epoch": 2.0, "eval_loss": 1.0, "eval_exact_match": 0.6, "eval_f1": 0.7},
    ]
    answers = [[candidate(*place(text), 0.75 - 0.5 * rank) for rank, text in enumerate(texts)] for _, texts, _ in CASES]
    return make_run(tmp_path / "one", [*answers, []], dataset, history)


@pytest.fixture
def other(tmp_path, dataset):
    """All right but the first question."""
    answers = [[candidate(*place(gold), 1.0)] for gold, *_ in CASES] + [[candidate(*place("1907年"), 1.0)]]
    answers[0] = [candidate(*place("林玉山"), 1.0)]
    return make_run(tmp_path / "two", answers, dataset)


class Page(html.parser.HTMLParser):
    """What a page would load or run, and its embedded data."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.inside = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "script"

    def handle_data(self, data):
        if self.inside:
            self.scripts[-1] += data


def write(folder, dataset, other=None):
    examples = report.read_examples(str(dataset))
    report.write_report(report.read_run(folder), examples, other and report.read_run(other))


def page_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_every_wrong_answer_is_of_one_kind(run, dataset):
    table = report.judge(report.read_examples(str(dataset)), report.read_run(run).nbest)
    assert list(table.error) == [*(kind for *_, kind in CASES), "empty"]
    assert list(table["rank"]) == [0, 1, -1, 1, -1, 1, -1]
    assert list(table.chosen) == [0] * 6 + [-1]
    assert list(table.exact_match) == [True] + [False] * 6


def test_the_kind_is_that_of_the_nearest_reference():
    gold = [(0, 2), (10, 14)]
    assert report.error_kind("字字字", 10, 13, gold) == "too short"
    assert report.error_kind("字字字", 3, 6, gold) == "wrong place"
    assert report.error_kind("字字", 2, 4, [(0, 2)]) == "wrong place"  # they touch
    generator = random.Random(0)
    for _ in range(500):
        start, at = generator.randrange(9), generator.randrange(9)
        end, to = start + generator.randint(1, 5), at + generator.randint(1, 5)
        shared = len(set(range(start, end)) & set(range(at, to)))
        kind = report.error_kind("字" * (end - start), start, end, [(at, to)])
        assert (kind == "wrong place") == (shared == 0)
        assert (kind == "too long") == (shared == to - at)
        assert (kind == "too short") == (shared == end - start < to - at)


def test_the_right_text_at_another_place_is_right_and_counted():
    context = "嘉義與臺南，嘉義。"
    rows = {"id": ["0"], "question": ["哪裡？"], "context": [context]}
    examples = Dataset.from_dict(rows | {"answers": [{"text": ["嘉義"], "answer_start": [6]}]})
    table = report.judge(examples, {"0": [candidate(0, 2, 1.0, context)]})
    assert (table.error[0], bool(table.elsewhere[0])) == ("", True)


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 30), (47, 619), (3000, 4131)])
def test_wilson_is_scipys(right, count):
    known = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert report.wilson(right / count, count) == pytest.approx((known.low, known.high))


def test_questions_in_clusters_count_less():
    right = np.random.default_rng(1).random(400) < 0.7
    alone = report.clustered_interval(right, np.arange(400))
    assert alone == pytest.approx(report.wilson(right.mean(), 400), abs=2e-4)
    # Each question four times over in one cluster says no more than the question alone.
    fourfold = report.clustered_interval(np.repeat(right, 4), np.repeat(np.arange(400), 4))
    assert fourfold == pytest.approx(alone, abs=2e-4)
    assert report.clustered_interval([True] * 12, [0, 1, 2] * 4) == report.wilson(1.0, 3)


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(2).random(900)
    half = 1.96 * values.std() / 30
    low, high = report.bootstrap_interval(values, np.arange(900))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 8)
    assert report.bootstrap_interval(values, np.arange(900)) == (low, high)
    assert report.bootstrap_interval([0.5, 0.5], [0, 1]) == (0.5, 0.5)


@pytest.mark.parametrize(("one", "two"), [(0, 0), (1, 0), (5, 5), (12, 3), (347, 12), (900, 1000)])
def test_mcnemar_is_scipys_binomial_test(one, two):
    assert report.mcnemar(one, two) == pytest.approx(stats.binomtest(one, one + two).pvalue if one + two else 1.0)


def test_a_spoken_paragraph_is_in_the_cluster_of_its_text():
    ids = ["0", "1", "2", "3115", "3116"]
    questions, contexts = ["誰？", "何時？", "哪裡？", "誰？", "多少？"], ["甲林", "甲林", "乙城", "丙林", "丙林"]
    texts = ["林", "甲", "城", "林", "丙"]
    answers = [{"text": [t], "answer_start": [c.index(t)]} for t, c in zip(texts, contexts, strict=True)]
    rows = Dataset.from_dict({"id": ids, "question": questions, "context": contexts, "answers": answers})
    assert list(report.clusters(contexts, report.question_table(rows, texts))) == [0, 0, 1, 0, 0]


def test_two_runs_are_compared(run, other, dataset):
    examples = report.read_examples(str(dataset))
    tables = [report.judge(examples, report.read_run(folder).nbest) for folder in (run, other)]
    found = report.compare(*tables)
    assert found["counts"] == {"became right": 1, "became wrong": 6, "both wrong": 0, "both right": 0}
    assert found["gain"] == pytest.approx(-5 / 7) and found["p"] == pytest.approx(2 * 8 / 2**7)
    write(run, dataset, other)
    data = json.loads(Page(page_of(run)).scripts[0])
    assert [case["outcome"] for case in data["cases"]] == ["became right"] + ["became wrong"] * 6
    assert data["runs"] == ["one", "two"]


def test_the_page_holds_its_data_and_nothing_of_it_is_read_as_html(run, dataset):
    write(run, dataset)
    text = page_of(run)
    page = Page(text)
    data = json.loads(page.scripts[0])
    assert data["paragraphs"] == [PASSAGE] and len(data["cases"]) == 6  # shared by the questions
    for case, (gold, texts, error) in zip(data["cases"], CASES[1:], strict=False):
        spans = [PASSAGE[start:end] for start, end, _ in case["answers"][0]["nbest"]]
        assert (PASSAGE[slice(*case["gold"][0])], spans, case["answers"][0]["error"]) == (gold, texts, error)
    assert len(page.scripts) == 2 and "<img" not in text
    for tag, attributes in page.tags:
        assert tag not in ("img", "iframe", "object")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|https?:", text.replace(page.scripts[0], ""))
    policy = next(tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert "<b>6</b> <small>of 7</small>" in text and "Exact match and F1" in text
    assert "nan" not in text.replace(page.scripts[0], "").lower().split("<body>")[1]


def test_a_folders_name_is_not_read_as_html(tmp_path, run, dataset):
    folder = tmp_path / "<b onclick=x>&"
    run.rename(folder)
    write(folder, dataset)
    assert not [tag for tag, attributes in Page(page_of(folder)).tags if "onclick" in attributes]


def test_the_plots_are_pictures(run, other, capsys):
    report.main([str(run), "--compare", str(other)])
    told = capsys.readouterr().out
    for name in ("report_breakdown.png", "report_training.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG") and f"wrote {run / name}\n" in told
    report.main([str(other)])  # an ensemble's folder has no training log
    assert "Training" not in page_of(other) and not (other / "report_training.png").exists()


@pytest.mark.parametrize("wrong", ["no n best", "no dataset", "other questions", "other paragraph", "not a state",
                                   "other run's questions", "unlabelled"])  # fmt: skip
def test_what_cannot_be_reported_is_refused_and_nothing_is_written(run, other, dataset, tmp_path, capsys, wrong):
    more = []
    nbest = run / "eval_nbest_predictions.json"
    found = json.loads(nbest.read_text(encoding="utf-8"))
    if wrong == "no n best":
        nbest.unlink()
    elif wrong == "no dataset":
        (run / ".eval_dataset").unlink()
    elif wrong == "other questions":
        nbest.write_text(json.dumps(found | {"99": []}), encoding="utf-8")
    elif wrong == "other paragraph":
        nbest.write_text(json.dumps(found | {"0": [candidate(0, 3, 1.0, "別的文")]}), encoding="utf-8")
    elif wrong == "not a state":
        (run / "trainer_state.json").write_text('{"log_history": 3}')
    elif wrong == "other run's questions":
        (other / "eval_nbest_predictions.json").write_text("{}")
        more = ["--compare", str(other)]
    elif wrong == "unlabelled":
        (tmp_path / "none").mkdir()
        DatasetDict({"test": Dataset.from_dict({"id": ["0"]})})["test"].to_parquet(tmp_path / "none/test.parquet")
        more = ["--dataset_name", str(tmp_path / "none")]
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(SystemExit) as stop:
        report.main([str(run), *more])
    *progress, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message.startswith("error: ") and str(tmp_path) in message
    assert not any("error" in line or "Traceback" in line for line in progress)
    assert sorted(path.name for path in run.iterdir()) == before


def test_a_history_without_figures_is_refused(tmp_path):
    (tmp_path / "trainer_state.json").write_text("[]")
    with pytest.raises(UserError, match="log_history"):
        report.read_history(tmp_path / "trainer_state.json")


def test_ticks_are_round():
    assert report.ticks(0, 8) == [0, 2, 4, 6, 8]
    for top in (1e-5, 0.003, 0.7, 1.0, 3.14, 17, 4000):
        found = report.ticks(0, top)
        assert 2 <= len(found) <= 7 and found[0] == 0 and found[-1] <= top * 1.000001


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_shows_it_without_a_network(browser, run, other, dataset, width, scheme):
    write(run, dataset, other)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    events = []
    page.on("console", lambda message: events.append(message.text))
    page.on("pageerror", lambda error: events.append(str(error)))
    page.on("request", lambda request: events.append(request.url) if not request.url.startswith("data:") else None)
    page.goto((run / "report.html").as_uri())
    cases = page.locator(".case")
    assert cases.count() == 7
    page.select_option("#error", "too short")
    assert cases.count() == 1 and "1 of 7" in page.inner_text("#count")
    marks = cases.locator(".passage mark")
    assert [(mark.inner_text(), mark.get_attribute("class")) for mark in marks.all()] == [
        ("1895", "gold run-0 run-1"), ("年", "gold run-1"),
    ]  # fmt: skip
    page.select_option("#error", "shifted")  # beyond a character of two UTF-16 units
    assert [mark.inner_text() for mark in marks.all()] == ["，", "\U00020000是", "畫家"]
    page.click("button[type=reset]")
    page.select_option("#outcome", "became right")
    assert cases.count() == 1 and cases.locator(".badge").first.inner_text() == "became right"
    cases.get_by_text("whole passage").click()
    assert cases.locator(".passage").inner_text().replace("\u2028", "") == PASSAGE.replace("\u2028", "")
    page.click("button[type=reset]")
    page.fill("#search", "是什麼")
    page.wait_for_timeout(400)
    assert cases.count() == 1 and cases.locator("h3").inner_text() == "1907年是什麼？"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.title().startswith("one against two")
    assert events == [(run / "report.html").as_uri()]
    page.close()


def test_rows_come_by_fifty(browser, tmp_path):
    count = 120
    columns = {
        "id": list(map(str, range(count))),
        "question": ["誰？"] * count,
        "context": ["林玉山"] * count,
        "answers": [{"text": ["林"], "answer_start": [0]}] * count,
    }
    run = make_run(tmp_path / "run", [[candidate(1, 2, 1.0, "林玉山")]] * count)
    report.write_report(report.read_run(run), Dataset.from_dict(columns))
    page = browser.new_page()
    page.goto(Path(run / "report.html").as_uri())
    seen = [page.locator(".case").count()]
    while page.locator("#more").is_visible():
        page.click("#more")
        seen.append(page.locator(".case").count())
    assert seen == [50, 100, 120]
    page.close()
