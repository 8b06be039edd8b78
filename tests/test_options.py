"""Defaults, then YAML, then flags; names that do not exist are refused with the nearest that does."""

from dataclasses import dataclass, field

import pytest

from files import UserError, read_json, replacing_file, replacing_folder, write_json
from options import command, parse_options


@dataclass
class Options:
    config: str | None = None
    member: str | None = None
    doc_stride: int = 128
    learning_rate: float = 1e-5
    name: str | None = None
    fp16: bool = False
    files: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.doc_stride < 1:
            raise ValueError("--doc_stride must be at least 1")


def parse(tmp_path, yaml, *flags):
    path = tmp_path / "config.yaml"
    path.write_text(yaml, encoding="utf-8")
    (options,) = parse_options((Options,), ["--config", str(path), *flags], "")
    return options


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    options = parse(
        tmp_path, "doc_stride: 9\nlearning_rate: 3e-5\nfp16: true\nname: -x\nfiles: [a, b]", "--doc_stride", "7"
    )
    assert (options.doc_stride, options.learning_rate, options.fp16) == (7, 3e-5, True)
    assert (options.name, options.files) == ("-x", ["a", "b"])
    assert parse(tmp_path, "fp16: true", "--fp16", "false").fp16 is False
    assert parse(tmp_path, "# nothing").doc_stride == parse(tmp_path, "doc_stride: null").doc_stride == 128


MERGES = "name:\n  a0: &a0 {x: 1}\n" + "".join(
    f"  a{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}, *a{i}, *a{i}]}}\n" for i in range(20)
)
BOMB = "fp16: true\nname:\n  a0: &a0 {x: 1}\n" + "".join(
    f"  a{i + 1}: &a{i + 1} {{k: *a{i}, l: *a{i}, m: *a{i}, n: *a{i}}}\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("doc_strid: 9", "config.yaml: unknown key 'doc_strid'; did you mean 'doc_stride'?"),
        ("zzz: 9", "unknown key 'zzz'; --help lists them"),
        ("1: 9", "unknown key '1'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("doc_stride: 2.5", "invalid int value: '2.5'"),
        ("doc_stride: many", "invalid int value: 'many'"),
        ("doc_stride: 0", "--doc_stride must be at least 1"),
        ("files: [[a]]", "files: a list may hold texts and numbers only"),
        ("- doc_stride", "must hold `option: value` lines"),
        ("doc_stride: 'a", "config.yaml: not YAML: line"),
        ("d: 2024-13-45", "not YAML"),
        ("[" * 5000, "not YAML"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("\x00", "not YAML"),
        ("name: a\ndoc_stride: 3\nname: b", "config.yaml: not YAML: line 3: the key 'name' stands twice"),
        ("members: {a: {name: x, name: y}}", "line 1: the key 'name' stands twice"),
        (BOMB, "name: its aliases stand for too many values"),
        (MERGES, "its aliases stand for too many values"),
        ("name: &a {b: *a}", "name: its aliases stand for too many values, or for themselves"),
        ("files: []", "files: is an empty list; leave the key out"),
        ("files: [--fp16]", "'--fp16' in a list looks like a flag"),
        ("name: {2024-01-01: 1}", "name: keys must be str"),
        ("doc_stride: !!bool x", "line 1: 'x' is no bool"),
        (f"doc_stride: 0x{'f' * 5000}", "doc_stride: Exceeds the limit"),
        ("name: --", "`--` is no value of an option"),
        ("members: 3", "members: must hold"),
        ("members: {a: {}, b: {}}", "holds the members a, b; choose one with --member"),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path, yaml, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, yaml)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_members_differ_from_what_they_share(tmp_path):
    yaml = "doc_stride: 9\nmembers:\n  a: {learning_rate: 1.0}\n  b: {doc_stride: 8}\n"
    a, b = (parse(tmp_path, yaml, "--member", name, "--learning_rate", "2") for name in "ab")
    assert (a.doc_stride, a.learning_rate, b.doc_stride) == (9, 2, 8)
    with pytest.raises(UserError, match="choose one with --member"):
        parse(tmp_path, yaml, "--member", "c")


@pytest.mark.parametrize("flag", ["--doc_s=3", "--doc_strid", "stray"])
def test_unknown_and_abbreviated_flags(flag):
    with pytest.raises(UserError, match="unknown option"):
        parse_options((Options,), [flag], "")


def test_commands_end_in_one_line_and_exit_code_2(capsys):
    @command
    def main(argv):
        raise argv

    for error, message in (
        (UserError("a.json: record 3: no text"), "error: a.json: record 3: no text\n"),
        (OSError(28, "No space left on device", "/x"), "error: /x: No space left on device\n"),
        (UserError("\udcff"), "error: \\udcff\n"),
        (UserError("甲\n乙\x1b[31m"), "error: 甲\\n乙\\x1b[31m\n"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(error)
        assert stop.value.code == 2 and capsys.readouterr().err == message


def test_files_and_folders_are_replaced_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"甲": 1})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "甲": 1\n}\n'
    with pytest.raises(KeyboardInterrupt), replacing_file(tmp_path / "a.json") as file:
        file.write("half")
        raise KeyboardInterrupt
    with replacing_folder(tmp_path / "d") as folder:
        (folder / "one").write_text("1")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "d") as folder:
        (folder / "two").write_text("2")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "d", "one"]
    assert "甲" in (tmp_path / "a.json").read_text(encoding="utf-8")
    with replacing_folder(tmp_path / "d") as folder:
        (folder / "two").write_text("2")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["two"]
    with pytest.raises(UserError), replacing_folder(tmp_path / "a.json"):
        pass


def test_folders_made_for_one_that_is_not_finished_are_gone(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "a/b/c"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_json_that_says_something_twice_or_holds_half_a_surrogate_pair(tmp_path):
    (tmp_path / "a.json").write_text('[{"k": 1, "l": 2, "k": 3}]')
    with pytest.raises(UserError, match="not usable JSON: the key 'k' stands twice"):
        read_json(tmp_path / "a.json")
    write_json(tmp_path / "b.json", {"甲": "\udcff"})
    assert read_json(tmp_path / "b.json") == {"甲": "\udcff"}
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match="nested too deep"):
        write_json(tmp_path / "c.json", deep)
    assert not (tmp_path / "c.json").exists()
