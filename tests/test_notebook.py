"""drcd_qa_colab.ipynb: its cells, top to bottom, reach a submission from a small sample; it is committed bare."""

import csv
import os
import shutil
import sys
from pathlib import Path

import conftest
import pytest
import yaml
from test_run_qa import course_json, save_model

import inference

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (requirements-dev.txt)")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (requirements-dev.txt)")
pytest.importorskip("ipykernel", reason="ipykernel is not installed (requirements-dev.txt)")

ROOT = Path(inference.__file__).parent
NOTEBOOK = ROOT / "drcd_qa_colab.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_its_parameters_name_what_is_there(notebook):
    given = {}
    exec(parameters(notebook).source, given)
    assert (ROOT / given["CONFIG"]).is_file() and not Path(given["OUTPUT_DIR"]).is_absolute()


def parameters(notebook):
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    return cell


def test_its_cells_reach_a_submission(notebook, tmp_path, monkeypatch):
    """The cells as they are; only the parameters are others. The scripts are found as in an unpacked checkout."""
    place = tmp_path / "drcd-qa"
    shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "data", "outputs", "tests", "__pycache__"))
    hw7 = tmp_path / "hw7"
    hw7.mkdir()
    for name, count, seed in (("train", 16, 11), ("dev", 8, 12), ("test", 9, 13)):
        content = course_json(conftest.random_examples(count, seed), labelled=name != "test")
        (hw7 / f"hw7_{name}.json").write_text(content, encoding="utf-8")
    save_model(tmp_path / "model", "bert")
    config = {"model_name_or_path": str(tmp_path / "model"), "max_seq_length": 64, "max_question_length": 16}
    config |= {"num_train_epochs": 1, "per_device_train_batch_size": 8}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    given = {"DATA_DIR": "hw7", "CONFIG": str(tmp_path / "tiny.yaml"), "OUTPUT_DIR": "outputs/tiny"}
    own = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in given.items()))
    notebook.cells.insert(notebook.cells.index(parameters(notebook)) + 1, own)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what the tests run with is installed already
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)

    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    with open(tmp_path / "outputs/tiny/submission.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ID", "Answer"] and [row[0] for row in rows[1:]] == list(map(str, range(9)))
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "dev: exact match 0." in printed and "submission.csv: 9 answers" in printed
