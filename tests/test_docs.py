"""What README, Makefile and configs say can be done."""

import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

import arguments
import hub
import inference
import make_sample
import options
import postprocess
import prepare_drcd
import report

ROOT = Path(options.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M)
BLOCKS = [block for language, block in FENCED if not language]
COMMANDS = sorted({line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()})
IN_TEXT = re.findall(r"`(make [^`]*|python [^`]*|accelerate launch [^`]*)`", README)
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
AT_HEAD = [line[2:].strip() for path in (ROOT / "configs").rglob("*.yaml") for line in path.read_text().splitlines()
           if re.match(r"#\s+accelerate launch", line)]  # fmt: skip
RUN_OPTIONS = (arguments.RunOptions, arguments.RunArguments)


def strip_launcher(words):
    """The script's words of an accelerate command; the launcher's own configs must load."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    for flag, value in itertools.pairwise(words[:script]):
        if flag == "--config_file":
            assert isinstance(load_config_from_file(str(ROOT / value)), ClusterConfig)
    return words[script:]


@pytest.mark.parametrize("command", sorted({*COMMANDS, *IN_TEXT, *AT_HEAD}))
def test_every_command_is_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "make":
        plan = subprocess.run([*words[:1], "-n", *words[1:]], capture_output=True, text=True, cwd=ROOT)
        assert plan.returncode == 0, plan.stderr
        return
    words = strip_launcher(words) if words[0] == "accelerate" else words[1:]
    script, *flags = words
    if script == "-m":
        assert flags == shlex.split("pip install -r requirements.txt -c constraints.txt")
    elif script == "run_qa.py":
        options.parse_options(RUN_OPTIONS, [flag for flag in flags if flag != "--help"], "")
    elif script == "prepare_drcd.py":
        options.parse_options((prepare_drcd.PrepareOptions,), flags, "")
    elif script == "make_sample.py":
        options.parse_options((make_sample.SampleOptions,), flags, "")
    elif script == "postprocess.py":
        postprocess.parse_arguments(flags)
    elif script == "inference.py":
        inference.parse_arguments(flags)
    elif script == "app.py":
        pytest.importorskip("gradio")
        __import__("app").parse_arguments(flags)
    elif script == "report.py":
        report.parse_arguments(flags)
    else:
        assert script.startswith("benchmarks/") and (ROOT / script).exists(), command


def test_both_languages_of_the_readme_hold_the_same_commands_figures_and_links():
    other = (ROOT / "README.zh-TW.md").read_text(encoding="utf-8")
    assert re.findall(r"^```.*?^```$", other, flags=re.S | re.M) == re.findall(
        r"^```.*?^```$", README, flags=re.S | re.M
    )
    in_text = re.compile(r"`((?:make |python |accelerate launch |--)[^`]*)`")
    assert {" ".join(text.split()) for text in in_text.findall(other)} == {
        " ".join(text.split()) for text in in_text.findall(README)
    }
    for pattern in (r"\]\(((?!README)[^)]*)\)", r"\d\.\d{3,}"):
        assert sorted(re.findall(pattern, other)) == sorted(re.findall(pattern, README))
    assert len(re.findall("^#", other, flags=re.M)) == len(re.findall("^#", README, flags=re.M))


def test_make_push_leaves_out_what_a_run_leaves_out():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert sorted(re.findall(r'--exclude "?([^\s"]+)"?', makefile)) == sorted(hub.NOT_PUSHED)


def test_no_figure_is_left_open():
    for path in (*ROOT.glob("*.md"), *(ROOT / "configs").glob("*.yaml")):
        assert not re.findall(
            r"[A-Z]+_(?:TABLE|MINUTES|EM|SIMPLE|BOSS|LINE|TEXT)\w*", path.read_text(encoding="utf-8")
        ), path


def test_contributing_maps_every_script():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lacking = [path.name for path in ROOT.glob("*.py") if f"`{path.name}`" not in text]
    assert not lacking


def test_every_file_named_in_the_readme_is_there():
    made = ("outputs/", "data/", "hw7")
    for name in re.findall(r"`((?:configs|benchmarks|metrics)/[\w./-]+|\w+\.(?:py|yaml|txt))`", README):
        assert name.startswith(made) or (ROOT / name).exists(), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads(path):
    members = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("members") or {None: None}
    for member in members:
        more = ["--member", member] if member else []
        run, _ = options.parse_options(RUN_OPTIONS, ["--config", str(path), *more], "")
        assert run.model_name_or_path and run.max_seq_length
        assert run.max_seq_length - run.max_question_length - 3 >= run.doc_stride


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_accelerate_config_is_known_to_accelerate(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes > 1
    given = launch_command_parser().parse_args(["--config_file", str(path), "run_qa.py", "--seed", "3"])
    launched, *_ = _validate_launch_command(given)
    assert launched.multi_gpu and not launched.use_cpu and launched.mixed_precision == "no"
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port"):
        assert getattr(launched, name) == getattr(config, name), name
    assert (launched.training_script, launched.training_script_args) == ("run_qa.py", ["--seed", "3"])
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert keys.keys() <= ClusterConfig.__dataclass_fields__.keys()


def test_make_alone_lists_the_targets():
    listed = subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT).stdout
    for target in (
        "setup",
        "demo",
        "test",
        "lint",
        "data",
        "simple",
        "medium",
        "strong",
        "boss",
        "push",
        "app",
        "report",
        "clean",
    ):
        assert re.search(rf"^{target} ", listed, flags=re.M)


def test_every_option_of_the_project_has_help_and_there_are_not_too_many():
    fields = arguments.RunOptions.__dataclass_fields__
    assert len(fields) <= 25
    assert all(field.metadata.get("help") for field in fields.values())


def test_the_scripts_help_works(capsys):
    scripts = ("run_qa", "prepare_drcd", "make_sample", "postprocess", "inference", "report")
    for main in (__import__(name).main for name in scripts):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        assert stop.value.code == 0
    assert "--doc_stride" in capsys.readouterr().out
