"""app.py as a person meets it: a real browser types, clicks and reads; nothing leaves the machine."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import conftest
import pytest

import inference

pytest.importorskip("gradio", reason="gradio is not installed (requirements-app.txt)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ROOT = Path(inference.__file__).parent
QUESTION = "誰創作《紅樓夢》？"
PARAGRAPH = "<b id=evil>&amp;</b>\n" + "".join(conftest.passages(12, 3))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place") / "outputs" / "tiny"
    tokenizer = conftest.make_tokenizer("bert")
    tokenizer.save_pretrained(folder)
    random_model = conftest.make_model("bert", tokenizer)
    random_model.config.qa_windows = {"max_seq_length": 64, "max_question_length": 16, "doc_stride": 20}
    random_model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    """Where app.py listens, started in the folder above `outputs`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "app.log"
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port)}
    environment.pop("GRADIO_SERVER_NAME", None)
    with open(log, "w") as file:
        app = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py")],
            cwd=model.parent.parent,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    url, patience = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            break
        except OSError:
            assert app.poll() is None and time.monotonic() < patience, log.read_text()
            time.sleep(0.2)
    yield url
    app.terminate()
    app.wait(timeout=30)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # Without a sandbox, since continuous integration runs as root; the page is the project's own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, open; at the end, everything that it has asked for came from the machine itself."""
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("websocket", lambda socket: requests.append(socket.url))
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    page.close()
    outside = [url for url in requests if urlsplit(url).scheme not in ("data", "blob")]
    assert len(outside) > 3 and {urlsplit(url).hostname for url in outside} == {"127.0.0.1"}


def type_in(page, context, question):
    page.fill("#context textarea", context)
    page.fill("#question textarea, #question input", question)
    page.click("#ask")


def test_the_answer_is_marked_in_the_passage_and_a_rival_when_it_is_chosen(page, model):
    type_in(page, PARAGRAPH, QUESTION)
    page.wait_for_selector("#passage mark")
    expected = inference.Reader(model).answer(QUESTION, PARAGRAPH)
    assert page.text_content("#passage mark") == expected.text
    assert page.text_content("#passage p") == PARAGRAPH
    before = "() => document.querySelector('#passage p').firstChild.textContent"
    assert page.evaluate(before) == PARAGRAPH[: expected.start]
    assert expected.text in page.inner_text("#answer")
    assert page.locator("#evil").count() == 0  # markup in a paragraph is only text
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, third = expected.nbest[0], expected.nbest[2]
    cell = page.locator("#nbest [data-testid=cell-0-0]")
    assert cell.inner_text().strip() == first["text"].strip()
    page.locator("#nbest [data-testid=cell-2-0]").click()
    page.wait_for_function(f"text => ({before})() == text", arg=PARAGRAPH[: third["start"]])
    assert page.text_content("#passage mark") == third["text"]


@pytest.mark.parametrize(
    ("context", "question", "told"),
    [(PARAGRAPH, " ", "the question is empty"), ("", QUESTION, "the paragraph is empty")],
)
def test_what_is_missing_is_said_in_words(page, context, question, told):
    type_in(page, context, question)
    assert told in page.wait_for_selector("[role=alert]").inner_text()
    assert page.locator("#passage").count() == 0


def test_a_model_that_is_not_there_is_said_in_words(page):
    page.fill("#model input", "./nowhere")
    page.press("#model input", "Enter")
    type_in(page, PARAGRAPH, QUESTION)
    assert "./nowhere: cannot be loaded: there is no such folder" in page.wait_for_selector("[role=alert]").inner_text()


def test_an_example_fills_the_form(page):
    page.locator("tr", has_text=re.compile("朱淑儀")).first.click()
    page.wait_for_function("document.querySelector('#context textarea').value.includes('南洲居士')")
