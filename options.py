"""Options of every script: defaults, then `--config FILE.yaml`, then flags; errors in one line, exit code 2."""

import argparse
import datetime
import difflib
import functools
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser

from files import UserError, masked, one_line, read_text


def command(main: Callable[[Sequence[str] | None], Any]) -> Callable[[Sequence[str] | None], Any]:
    """Let `main(argv)` end bad input with one line on stderr and exit code 2 instead of a traceback."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> Any:
        for stream in (sys.stdout, sys.stderr):  # Chinese on a terminal that is not UTF-8; names that are not
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv)
        except UserError as error:
            message = str(error)
        except OSError as error:  # a full disk, an unwritable folder
            message = f"{error.filename or 'input/output'}: {error.strerror or error}"
        print(f"error: {one_line(masked(message))}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    return wrapper


MOST_VALUES = 10_000  # that one key of a config may stand for, aliases written out


class Parser(HfArgumentParser):
    """`HfArgumentParser` whose errors are `UserError`s and whose options must be written out in full."""

    def __init__(self, dataclass_types: Iterable[type] = (), **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


def parse_options(dataclass_types: Sequence[type], argv: Sequence[str] | None, description: str) -> tuple[Any, ...]:
    """One instance of each dataclass, filled from its defaults, `--config FILE.yaml`, then the flags in `argv`.

    A YAML key is turned into the flag of the same name and put before the command line's, so that both go through
    the same types and choices, and the later one wins. `null` leaves the default.

    One of the dataclasses has the field `config`. Raises UserError for an unknown key or flag, naming the nearest
    valid one, and for a value of a wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any("\0" in argument for argument in argv):
        raise UserError("an option holds a NUL character")
    parser = Parser(dataclass_types, description=description)
    known, _ = _config_parser().parse_known_args(argv)
    flags = config_to_flags(known.config, known.member, option_names(parser)) if known.config else []
    if dashes := [flag for flag in flags + argv if flag == "--" or flag.endswith("=--")]:  # argparse makes it a list
        raise UserError(f"{dashes[0]}: `--` is no value of an option")
    try:
        *values, unknown = parser.parse_args_into_dataclasses(
            flags + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # what a dataclass's own checks raise
        raise UserError(str(error) or type(error).__name__) from None
    if unknown:
        raise UserError(unknown_name("option", unknown[0], [f"--{name}" for name in option_names(parser)]))
    return tuple(values)


def config_to_flags(path: str, member: str | None, names: Sequence[str]) -> list[str]:
    """The flags that say what the YAML file at `path` says, for one of its `members` where it has such.

    A config of several runs has the key `members`: name → the options in which that run differs. Keys must be among
    `names`. Raises UserError for others, and for a member that is not there or not chosen.
    """
    config = read_config(path)
    members = config.pop("members", None)
    if members is not None:
        if not isinstance(members, dict) or not all(isinstance(own, dict) for own in members.values()):
            raise UserError(f"{path}: members: must hold `name: {{option: value}}` lines")
        members = {str(name): own for name, own in members.items()}
        if member not in members:
            raise UserError(f"{path} holds the members {', '.join(members)}; choose one with --member")
        config |= members[member]
    flags = []
    for key, value in config.items():
        if key not in names or key in ("config", "member"):
            raise UserError(f"{path}: {unknown_name('key', str(key), names)}")
        if isinstance(value, list):
            if not value:
                raise UserError(
                    f"{path}: {key}: is an empty list; leave the key out (for no reports: `report_to: none`)"
                )
            items = [_flag_value(path, key, item) for item in value]
            if dashed := [item for item in items if item.startswith("-")]:
                raise UserError(
                    f"{path}: {key}: {dashed[0]!r} in a list looks like a flag; it may not begin with a dash"
                )
            flags += [f"--{key}", *items]
        elif value is False and key.endswith("_strategy"):
            flags.append(f"--{key}=no")  # YAML reads a bare `no` as false
        elif value is not None:
            flags.append(f"--{key}={_flag_value(path, key, value)}")
    return flags


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty one). Raises UserError if it is anything else."""
    try:
        config = yaml.load(read_text(path), _Loader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: not YAML: {where}{error.problem}") from None
    except RecursionError:
        raise UserError(f"{path}: not YAML: its brackets are nested too deep") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold `option: value` lines, holds a {type(config).__name__}")
    return config


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """The long names of a parser's options, without the dashes."""
    return [flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def unknown_name(kind: str, name: str, names: Sequence[str]) -> str:
    """`unknown option '--doc_strid'; did you mean '--doc_stride'?`"""
    nearest = difflib.get_close_matches(name.split("=")[0], names, n=1, cutoff=0.5)
    return f"unknown {kind} {name!r}" + (f"; did you mean {nearest[0]!r}?" if nearest else "; --help lists them")


def _config_parser() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--config")
    parser.add_argument("--member")
    return parser


class _Loader(yaml.SafeLoader):
    """SafeLoader which refuses a key given twice, where it takes the last, and merges that multiply without end."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, TypeError, AttributeError):  # a date like 2024-13-45; `!!bool x`
            kind = node.tag.rsplit(":", 1)[-1]
            problem = f"{str(node.value)[:80]!r} is no {kind}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem="its aliases stand for too many values", problem_mark=node.start_mark)


def _flag_value(path: str, key: str, value: Any) -> str:
    if isinstance(value, dict):
        if _written_out(value, {}) > MOST_VALUES:
            raise UserError(f"{path}: {key}: its aliases stand for too many values, or for themselves")
        try:
            return json.dumps(value, ensure_ascii=False, default=_scalar)
        except (TypeError, ValueError) as error:  # a date as a key; an integer of thousands of digits
            raise UserError(f"{path}: {key}: {error}") from None
    try:
        return _scalar(value)
    except TypeError:
        raise UserError(f"{path}: {key}: a list may hold texts and numbers only") from None
    except ValueError as error:
        raise UserError(f"{path}: {key}: {error}") from None


def _scalar(value: Any) -> str:
    if not isinstance(value, str | int | float | datetime.date):
        raise TypeError(f"must hold texts and numbers, holds a {type(value).__name__}")
    return str(value)


def _written_out(value: Any, known: dict[int, float]) -> float:
    """How many values `value` holds, at any depth, with every alias written out; infinite for an alias of itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(value)]
