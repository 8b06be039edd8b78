"""Options of every script: defaults, then `--config FILE.yaml`, then flags; errors in one line, exit code 2."""

import argparse
import difflib
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser

from files import UserError, masked, printable, read_text


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
        print(f"error: {printable(masked(message))}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    return wrapper


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
    try:
        *values, unknown = parser.parse_args_into_dataclasses(
            flags + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # what a dataclass's own checks raise
        raise UserError(str(error)) from None
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
        if member not in members:
            raise UserError(f"{path} holds the members {', '.join(map(str, members))}; choose one with --member")
        config |= members[member]
    flags = []
    for key, value in config.items():
        if key not in names or key in ("config", "member"):
            raise UserError(f"{path}: {unknown_name('key', str(key), names)}")
        if isinstance(value, list):
            flags += [f"--{key}", *(_flag_value(path, key, item) for item in value)]
        elif value is False and key.endswith("_strategy"):
            flags.append(f"--{key}=no")  # YAML reads a bare `no` as false
        elif value is not None:
            flags.append(f"--{key}={_flag_value(path, key, value)}")
    return flags


def read_config(path: str) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty one). Raises UserError if it is anything else."""
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{path}: not YAML: {where}{error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date like 2024-13-45
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


def _flag_value(path: str, key: str, value: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, list) or value is None:
        raise UserError(f"{path}: {key}: a list may hold texts and numbers only")
    return str(value)
