"""prepare_drcd.py: both formats, every kind of bad record, and a folder that is replaced whole or not at all."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub.errors import HFValidationError
from hypothesis import given
from hypothesis import strategies as st

import prepare_drcd

PARAGRAPH = "臺北市是中華民國的首都，臺北市位於臺灣北部。"
REPOSITORY = Path(prepare_drcd.__file__).parent


def course_record(**changes):
    record = {"id": 0, "paragraph_id": 0, "question_text": "首都是哪裡？", "answer_text": "臺北市"}
    return record | {"answer_start": 0, "answer_end": 2} | changes


def course(*records, paragraphs=(PARAGRAPH,)):
    return {"questions": list(records), "paragraphs": list(paragraphs)}


def squad_record(*answers, **changes):
    answers = [{"id": "1", "text": text, "answer_start": start} for text, start in answers]
    return {"id": "1-1", "question": "首都是哪裡？", "answers": answers} | changes


def squad(*records, context=PARAGRAPH):
    return {"version": "1.3", "data": [{"title": "臺北", "paragraphs": [{"context": context, "qas": list(records)}]}]}


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Call with contents by split (one, or a list of them) and flags; gives the dataset and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(*flags, **splits):
        argv = list(flags)
        for split, contents in splits.items():
            argv.append(f"--{split}_files")
            for i, content in enumerate(contents if isinstance(contents, list) else [contents]):
                Path(f"{split}{i}.json").write_text(json.dumps(content), encoding="utf-8")
                argv.append(f"{split}{i}.json")
        prepare_drcd.main(argv)
        printed = capsys.readouterr()
        return load_dataset("data/drcd"), printed

    return run


@pytest.fixture
def refuse(prepare, tmp_path, capsys):
    """Like `prepare` for a run that must end with exit code 2 and one line; gives the line. Nothing is left behind."""

    def run(*flags, **splits):
        with pytest.raises(SystemExit) as end:
            prepare(*flags, **splits)
        printed = capsys.readouterr()
        assert end.value.code == 2
        assert not printed.out
        lines = printed.err.splitlines()
        assert all(line.startswith("skipped ") for line in lines[:-1]) and lines[-1].startswith("error: ")
        assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob("data/.*"))
        return lines[-1]

    return run


def figures(printed):
    """The table's first numbers by split: questions, paragraphs, labelled, moved, renamed, skipped."""
    lines = (line.split() for line in printed.out.splitlines())
    return {line[0]: tuple(map(int, line[1:7])) for line in lines if line[0] in prepare_drcd.COURSE_FILES}


def test_both_formats_become_the_same_rows(prepare):
    dataset, printed = prepare(
        train=course(course_record(id=7)), validation=squad(squad_record(("臺北市", 0), ("臺北", 0), id="7"))
    )
    assert dataset["train"].features == dataset["validation"].features == prepare_drcd.FEATURES
    row = {"id": "7", "question": "首都是哪裡？", "context": PARAGRAPH}
    assert dataset["train"][0] == row | {"answers": {"text": ["臺北市"], "answer_start": [0]}}
    assert dataset["validation"][0] == row | {"answers": {"text": ["臺北市", "臺北"], "answer_start": [0, 0]}}
    assert figures(printed) == {"train": (1, 1, 1, 0, 0, 0), "validation": (1, 1, 1, 0, 0, 0)}
    assert "Written to data/drcd" in printed.out and not printed.err


def test_course_folder_needs_no_list_of_files(prepare, tmp_path):
    for name, count in {"hw7_dev.json": 2, "hw7_test.json": 3}.items():
        tmp_path.joinpath(name).write_text(json.dumps(course(*[course_record(id=i) for i in range(count)])))
    dataset, _ = prepare("--data_dir", ".")
    assert dataset.num_rows == {"validation": 2, "test": 3}
    dataset, _ = prepare("--data_dir", ".", test=course(course_record()))
    assert dataset.num_rows == {"validation": 2, "test": 1}


def test_byte_order_mark(prepare, tmp_path):
    tmp_path.joinpath("bom.json").write_text(json.dumps(squad(squad_record(("臺北市", 0)))), encoding="utf-8-sig")
    assert prepare("--train_files", "bom.json")[0].num_rows == {"train": 1}


@pytest.mark.parametrize("fields", [(None,) * 3, ("null",) * 3, ("", 0, -1), ("", None, None), (None, 1, 1)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_unlabelled_course_records(prepare, split, fields):
    changes = dict(zip(prepare_drcd.COURSE_ANSWER, fields, strict=True))
    dataset, printed = prepare(**{split: course(course_record(**changes))})
    assert dataset[split].features == prepare_drcd.FEATURES
    assert dataset[split][0]["answers"] == {"text": [], "answer_start": []}
    assert figures(printed)[split] == (1, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("answers", [[], None, [{"text": "", "answer_start": -1}], [{"text": None, "answer_start": 0}]])
def test_unlabelled_squad_records(prepare, answers):
    dataset, _ = prepare(train=squad(squad_record(answers=answers)))
    assert dataset["train"][0]["answers"] == {"text": [], "answer_start": []}


def test_the_word_null_can_be_an_answer(prepare):
    record = course_record(answer_text="null", answer_start=2, answer_end=5)
    dataset, _ = prepare(train=course(record, paragraphs=["值是null。"]))
    assert dataset["train"][0]["answers"] == {"text": ["null"], "answer_start": [2]}


def test_test_records_may_lack_answer_fields_and_text(prepare):
    bare = {"id": 3, "paragraph_id": 0, "question_text": ""}
    dataset, _ = prepare(
        test=[course(bare, paragraphs=[""]), squad(without(squad_record(), "answers"), context="臺灣")]
    )
    assert dataset["test"]["id"][:] == ["3", "1-1"]
    assert dataset["test"][0] == {"id": "3", "question": "", "context": "", "answers": {"text": [], "answer_start": []}}


def test_ids_are_kept_as_text(prepare):
    ids = [0, 10**30, "1147-5-1", "", -1]
    dataset, _ = prepare(train=course(*[course_record(id=value) for value in ids]))
    assert dataset["train"]["id"][:] == [str(value) for value in ids]


def test_ids_of_an_earlier_file_are_renamed(prepare):
    one, two = course(course_record(id=1), course_record(id=2)), squad(squad_record(("臺北", 0), id="1"))
    dataset, printed = prepare(train=[one, two, two], test=one)
    assert dataset["train"]["id"][:] == ["1", "2", "train1-1", "train2-1"]
    assert dataset["test"]["id"][:] == ["1", "2"]
    assert figures(printed)["train"] == (4, 1, 4, 0, 2, 0)


def test_renamed_ids_stay_unique(prepare, tmp_path):
    tmp_path.joinpath("again").mkdir()
    again = [course_record(id="train0-1"), course_record(id=1)]
    tmp_path.joinpath("again", "train0.json").write_text(json.dumps(course(*again)))
    tmp_path.joinpath("train0.json").write_text(json.dumps(course(course_record(id=1))))
    dataset, _ = prepare("--train_files", "train0.json", "again/train0.json")
    assert dataset["train"]["id"][:] == ["1", "train0-1", "train0-train0-1"]


@pytest.mark.parametrize("end", [0, 2, 3, -1])
def test_text_is_the_authority_over_answer_end(prepare, end):
    dataset, printed = prepare(train=course(course_record(answer_end=end)))
    assert dataset["train"][0]["answers"] == {"text": ["臺北市"], "answer_start": [0]}
    assert figures(printed)["train"] == (1, 1, 1, 0, 0, 0)


@pytest.mark.parametrize(("start", "place"), [(-5, 0), (1, 0), (6, 0), (7, 12), (11, 12), (99, 12), (10**40, 12)])
def test_wrong_offsets_move_to_the_nearest_occurrence(prepare, start, place):
    dataset, printed = prepare(
        train=course(course_record(answer_start=start)),
        validation=squad(squad_record(("臺北市", start), ("臺北市", 0))),
    )
    assert dataset["train"][0]["answers"]["answer_start"] == [place]
    assert dataset["validation"][0]["answers"]["answer_start"] == [place, 0]
    assert figures(printed) == {"train": (1, 1, 1, 1, 0, 0), "validation": (1, 1, 1, 1, 0, 0)}


@given(st.text("甲乙", max_size=12), st.text("甲乙", min_size=1, max_size=3), st.integers(-15, 20))
def test_nearest_is_the_nearest(context, text, start):
    places = [i for i in range(len(context)) if context[i : i + len(text)] == text]
    assert prepare_drcd.nearest(context, text, start) == min(places, key=lambda i: (abs(i - start), i), default=None)


GOOD_COURSE = course_record(id="good")
GOOD_SQUAD = squad_record(("臺北市", 0), id="good")
BAD_COURSE = {
    **{f"no {key}": (without(course_record(), key), repr(key)) for key in course_record()},
    "not an object": (5, "must be an object"),
    "id true": (course_record(id=True), "'id' must be int or str, is True"),
    "id fraction": (course_record(id=1.0), "'id' must be int or str, is 1.0"),
    "id null": (course_record(id=None), "'id' must be int or str"),
    "id surrogate": (course_record(id="\ud800"), "not valid Unicode"),
    "id twice": (course_record(id="good"), "an earlier record of this file has the same id"),
    "paragraph_id beyond": (course_record(paragraph_id=3), "paragraph_id 3 is unknown: the file has 3 paragraphs"),
    "paragraph_id negative": (course_record(paragraph_id=-1), "paragraph_id -1 is unknown"),
    "paragraph_id true": (course_record(paragraph_id=True), "'paragraph_id' must be int"),
    "paragraph_id text": (course_record(paragraph_id="0"), "'paragraph_id' must be int, is '0'"),
    "paragraph number": (course_record(paragraph_id=1), "'context' must be str, is 5"),
    "paragraph surrogate": (course_record(paragraph_id=2), "'context' is not valid Unicode"),
    "question list": (course_record(question_text=["問"]), "'question_text' must be str"),
    "question surrogate": (course_record(question_text="\udc00"), "'question_text' is not valid Unicode"),
    "answer number": (course_record(answer_text=3), "'answer_text' must be str, is 3"),
    "answer surrogate": (course_record(answer_text="\ud83d"), "'answer_text' is not valid Unicode"),
    "answer elsewhere": (
        course_record(answer_text="高雄"),
        "answer '高雄' is nowhere in its paragraph; at answer_start 0",
    ),
    "null with offset": (course_record(answer_text="null"), "answer 'null' is nowhere"),
    "start true": (course_record(answer_start=True), "'answer_start' must be int, is True"),
    "start fraction": (course_record(answer_start=0.0), "'answer_start' must be int, is 0.0"),
    "start null": (course_record(answer_start=None), "'answer_start' must be int, is None"),
    "end text": (course_record(answer_end="2"), "'answer_end' must be int, is '2'"),
    "end null": (course_record(answer_end=None), "'answer_end' must be int, is None"),
}
BAD_SQUAD = {
    **{f"no {key}": (without(squad_record(), key), f"{key!r} is missing") for key in squad_record()},
    "not an object": (None, "must be an object"),
    "id fraction": (squad_record(id=0.5), "'id' must be int or str"),
    "id twice": (squad_record(id="good"), "an earlier record of this file has the same id"),
    "question null": (squad_record(question=None), "'question' must be str"),
    "question surrogate": (squad_record(question="\ud800"), "'question' is not valid Unicode"),
    "answers object": (squad_record(answers={"text": ["臺北市"]}), "'answers' must be list or NoneType"),
    "answer text": (squad_record(answers=["臺北市"]), "must be an object with 'text', is '臺北市'"),
    "answer without text": (squad_record(answers=[{"answer_start": 0}]), "'text' is missing"),
    "answer without start": (squad_record(answers=[{"text": "臺北市"}]), "'answer_start' is missing"),
    "answer start text": (squad_record(("臺北市", "0")), "'answer_start' must be int, is '0'"),
    "no answer placed": (squad_record(("高雄", 3), ("臺南", 0)), "answer '高雄' is nowhere in its paragraph"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_COURSE.values(), ids=BAD_COURSE)
def test_bad_course_records_stop_or_are_skipped(prepare, refuse, bad, message):
    content = course(GOOD_COURSE, bad, paragraphs=[PARAGRAPH, 5, "\ud800"])
    line = refuse(train=content)
    assert "train0.json: questions[1]" in line and message in line and "--skip_bad_records" in line
    if isinstance(bad, dict) and "id" in bad:
        assert f"(id {bad['id']!r})" in line
    dataset, printed = prepare("--skip_bad_records", train=content)
    assert dataset["train"]["id"][:] == ["good"] and figures(printed)["train"] == (1, 1, 1, 0, 0, 1)
    assert printed.err.startswith("skipped train0.json: questions[1]") and message in printed.err


@pytest.mark.parametrize(("bad", "message"), BAD_SQUAD.values(), ids=BAD_SQUAD)
def test_bad_squad_records_stop_or_are_skipped(prepare, refuse, bad, message):
    line = refuse(train=squad(GOOD_SQUAD, bad))
    assert "train0.json: data[0].paragraphs[0].qas[1]" in line and message in line
    dataset, printed = prepare("--skip_bad_records", train=squad(GOOD_SQUAD, bad))
    assert dataset["train"]["id"][:] == ["good"] and figures(printed)["train"] == (1, 1, 1, 0, 0, 1)


@pytest.mark.parametrize("article", [None, {}, {"paragraphs": 1}, {"paragraphs": [{"context": "臺"}]}])
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_squad_structure_is_a_bad_record(prepare, refuse, article, split):
    content = squad(GOOD_SQUAD)
    content["data"].append(article)
    assert "data[1].paragraphs[0].qas[0]: must be an object" in refuse(**{split: content})
    assert figures(prepare("--skip_bad_records", **{split: content})[1])[split] == (1, 1, 1, 0, 0, 1)


@pytest.mark.parametrize("context", [None, 3, "\ud800"])
def test_bad_squad_context_loses_each_of_its_questions(prepare, refuse, context):
    content = squad(GOOD_SQUAD)
    content["data"] += squad(squad_record(id="a"), squad_record(id="b"), context=context)["data"]
    assert "'context'" in refuse(train=content)
    assert figures(prepare("--skip_bad_records", train=content)[1])["train"] == (1, 1, 1, 0, 0, 2)


def test_error_shows_both_texts_and_the_surroundings(refuse):
    line = refuse(train=course(course_record(answer_text="高雄市", answer_start=12)))
    assert (
        "answer '高雄市'" in line
        and "at answer_start 12 stands '臺北市', in '市是中華民國的首都，臺北市位於臺灣北部。'" in line
    )


def test_one_bad_reference_of_several_is_left_out(prepare, refuse):
    content = squad(squad_record(("臺北市", 0), ("高雄", 0), ("首都", 0)))
    assert "answer '高雄' is nowhere" in refuse(train=content)
    dataset, printed = prepare("--skip_bad_records", train=content)
    assert dataset["train"][0]["answers"] == {"text": ["臺北市", "首都"], "answer_start": [0, 9]}
    assert figures(printed)["train"] == (1, 1, 1, 1, 0, 1)


def test_long_skip_lists_are_cut(prepare):
    _, printed = prepare("--skip_bad_records", train=course(GOOD_COURSE, *[5] * 20))
    assert len(printed.err.splitlines()) == prepare_drcd.SHOWN_SKIPS
    assert figures(printed)["train"] == (1, 1, 1, 0, 0, 20)


@pytest.mark.parametrize("content", [[], 5, {}, {"questions": []}, {"data": {}}, {"questions": {}, "paragraphs": []}])
@pytest.mark.parametrize("flags", [(), ("--skip_bad_records",)])
def test_other_formats_stop(refuse, content, flags):
    assert "train1.json: neither course JSON" in refuse(*flags, train=[course(GOOD_COURSE), content])


def test_unreadable_files_stop(refuse, tmp_path):
    tmp_path.joinpath("broken.json").write_text('{"data": [')
    assert "broken.json: not JSON" in refuse("--skip_bad_records", "--train_files", "broken.json")
    assert "none.json: no such file" in refuse("--train_files", "none.json")


@pytest.mark.parametrize("content", [course(), squad(), {"data": []}, course(5)])
def test_an_empty_split_stops(refuse, content):
    line = refuse("--skip_bad_records", train=course(GOOD_COURSE), validation=content)
    assert "validation split: no usable question in validation0.json" in line


def test_nothing_to_read(refuse, tmp_path):
    assert "--data_dir" in refuse()
    assert "none of hw7_train.json" in refuse("--data_dir", str(tmp_path))
    assert "none of hw7_train.json" in refuse("--data_dir", str(tmp_path / "missing"))
    assert "--train_files" in refuse("--train_file", "a.json")


def test_an_error_leaves_the_old_dataset(prepare, tmp_path, capsys):
    prepare(train=course(GOOD_COURSE), test=course(GOOD_COURSE))
    before = {path.name: path.read_bytes() for path in tmp_path.joinpath("data/drcd").iterdir()}
    with pytest.raises(SystemExit):
        prepare(train=course(course_record(id="new")), test=course(5))
    after = {path.name: path.read_bytes() for path in tmp_path.joinpath("data/drcd").iterdir()}
    assert before == after and sorted(before) == ["README.md", "test.parquet", "train.parquet"]
    assert os.listdir(tmp_path / "data") == ["drcd"]


def test_an_older_dataset_is_replaced_whole_and_bytes_repeat(prepare, tmp_path):
    folder = tmp_path / "data/drcd"
    prepare(train=course(GOOD_COURSE), test=course(GOOD_COURSE))
    first = folder.joinpath("train.parquet").read_bytes(), folder.joinpath("README.md").read_bytes()
    dataset, _ = prepare(validation=course(course_record(id="new")))
    assert dataset.num_rows == {"validation": 1} and dataset["validation"][0]["id"] == "new"
    assert sorted(os.listdir(folder)) == ["README.md", "validation.parquet"]
    folder.joinpath(".gitattributes").touch()  # as in a clone from the Hub
    prepare(train=course(GOOD_COURSE), test=course(GOOD_COURSE))
    assert (folder.joinpath("train.parquet").read_bytes(), folder.joinpath("README.md").read_bytes()) == first


@pytest.mark.parametrize(
    "names", [["README.md", "thesis.txt"], ["README.md"], ["train.parquet"], ["README.md", "train.parquet/"]]
)
def test_foreign_folders_are_kept(tmp_path, monkeypatch, capsys, names):
    monkeypatch.chdir(tmp_path)
    Path("in.json").write_text(json.dumps(course(GOOD_COURSE)))
    Path("mine").mkdir()
    text = "mine" if names == ["README.md"] else "Made by `prepare_drcd.py`"
    for name in names:
        Path("mine", name).mkdir() if name.endswith("/") else Path("mine", name).write_text(text)
    for target in ("mine", "in.json", ".", "\udcff"):
        with pytest.raises(SystemExit) as end:
            prepare_drcd.main(["--train_files", "in.json", "--output_dir", target])
        assert end.value.code == 2 and "give another --output_dir" in capsys.readouterr().err
    assert sorted(os.listdir("mine")) == sorted(name.strip("/") for name in names)
    assert sorted(os.listdir()) == ["in.json", "mine"]


def test_a_linked_output_folder_stays_a_link(prepare, tmp_path):
    tmp_path.joinpath("disk").mkdir()
    tmp_path.joinpath("data").mkdir()
    tmp_path.joinpath("data/drcd").symlink_to(tmp_path / "disk")
    assert prepare(train=course(GOOD_COURSE))[0].num_rows == {"train": 1}
    assert tmp_path.joinpath("data/drcd").is_symlink()


def test_card(prepare, tmp_path):
    prepare(train=squad(squad_record(("臺北市", 0))))
    card = tmp_path.joinpath("data/drcd/README.md").read_text(encoding="utf-8")
    assert "`train0.json` (train)" in card and "CC BY-SA 3.0" in card and str(tmp_path) not in card
    assert "22 / 22 / 22 / 22" in card and "6 / 6 / 6 / 6" in card


def test_percentiles_are_lengths_of_the_texts():
    assert prepare_drcd.percentiles("字" * n for n in range(1, 201)) == "100 / 180 / 198 / 200"


class FakeHub:
    """Stands in for HfApi: keeps what it is asked to upload, or raises `error`."""

    error, uploads = None, []

    def create_repo(self, repository, **options):
        if self.error:
            raise self.error
        return type("Url", (str,), {"repo_id": f"me/{repository}"})(f"https://hub/{repository}")

    def upload_folder(self, **options):
        self.uploads.append(options | {"files": sorted(os.listdir(options["folder_path"]))})


def test_push_uploads_the_folder_with_its_card(prepare, monkeypatch):
    monkeypatch.setattr(prepare_drcd, "HfApi", FakeHub)
    _, printed = prepare("--push_to_hub", "drcd", train=course(GOOD_COURSE))
    upload = FakeHub.uploads.pop()
    assert (upload["repo_id"], upload["repo_type"]) == ("me/drcd", "dataset")
    assert upload["files"] == ["README.md", "train.parquet"] and "Pushed to https://hub/drcd" in printed.out


@pytest.mark.parametrize(
    "error",
    [
        OSError("Token hf_abcdefghijklmnopqSECRET is invalid"),
        RuntimeError("Illegal header value b'Bearer SECRET\n'"),
        HFValidationError("Repo id must be in the form 'name': 'hf_SECRETabcdefghijklmnopq/a/b'"),
        ConnectionError(),
    ],
)
def test_a_failed_push_keeps_the_folder_and_the_token(prepare, monkeypatch, capsys, error):
    monkeypatch.setattr(prepare_drcd, "HfApi", type("Broken", (FakeHub,), {"error": copy.copy(error)}))
    with pytest.raises(SystemExit) as end:
        prepare("--push_to_hub", "me/drcd", train=course(GOOD_COURSE))
    line = capsys.readouterr().err
    assert end.value.code == 2 and "not pushed to me/drcd" in line and "is kept" in line
    assert "SECRET" not in line and len(line.splitlines()) == 1
    assert load_dataset("data/drcd").num_rows == {"train": 1}


def test_as_a_program(tmp_path):
    tmp_path.joinpath("試題.json").write_text(json.dumps(course(5)), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "prepare_drcd.py"), "--train_files", "試題.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: 試題.json: questions[0]: must be an object with 'paragraph_id', is 5; "
        "correct it, or pass --skip_bad_records"
    ]
