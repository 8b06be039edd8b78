"""Files read with one clear error and written whole or not at all. Everything is UTF-8."""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


class UserError(Exception):
    """Something the user can put right. The message names the file or option and says what to do.

    Scripts turn it into one line on stderr and exit code 2 (`options.command`).
    """


def printable(text: str) -> str:
    r"""`text` as UTF-8 can hold it: halves of surrogate pairs, from JSON or a file name, become `\udcff`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    r"""`text` with every character that is none to look at (a line end, half a surrogate pair) as `\n` or `\udcff`."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def masked(text: str) -> str:
    """`text` with tokens of the Hub blotted out, whether they look like one or are the one in use."""
    own = os.environ.get("HF_TOKEN", "").strip()
    text = text.replace(own, "***") if own else text
    return re.sub(r"Bearer\s+[^\s'\"]+|hf_[A-Za-z0-9]{20,}", "***", text)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, a byte-order mark dropped. Raises UserError if it is missing or not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            # Piece by piece: decoded whole, a file with one emoji takes 8 times its size before it is shrunk to fit.
            return "".join(iter(lambda: file.read(2**20), ""))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text (byte {_first_undecodable(path)}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises UserError if it is missing, not UTF-8 or not JSON, or has a key twice."""
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a key twice; an integer of thousands of digits
        raise UserError(f"{path}: not usable JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: not usable JSON: its brackets are nested too deep") from None


def refuse_missing_folder(name: str, is_folder: bool = False) -> None:
    """Raise FileNotFoundError for what can only be a folder, by its spelling or `is_folder`, and is not there."""
    if (is_folder or name.startswith((".", "/", "~"))) and not Path(name).is_dir():
        raise FileNotFoundError("there is no such folder")


_NO_WRITING = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO")}


def failed_write(error: Exception) -> str | None:
    """Why a file could not be written, as on a full disk or in an unwritable folder; None if `error` is another one.

    Libraries in Rust (safetensors, tokenizers) raise errors of their own that end in `(os error 28)`; `torch.save`
    raises a RuntimeError that may not even say so much.
    """
    if isinstance(error, OSError):
        return (error.strerror or str(error)) if error.errno in _NO_WRITING else None
    if "(os error " in str(error):
        return str(error)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("torch.serialization", "save"):
            return "not all of a file could be written, as when the disk is full"
    return None


@contextmanager
def naming_writes(path: str | Path) -> Iterator[None]:
    """Raise UserError naming `path` in place of whatever a library raises that cannot write there."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := failed_write(error)) is None:
            raise
        raise UserError(
            f"{path}: cannot be written: {reason}; what was there is kept: make room or choose another folder, and "
            "give the same command again"
        ) from error


@contextmanager
def replacing_file(path: str | Path, newline: str | None = None, binary: bool = False) -> Iterator[IO]:
    """A UTF-8 text file, or a binary one, to write; `path` is replaced by it in one step when the block ends well.

    Until then, and after an error, `path` is as it was. `newline` is `open`'s. Raises UserError if it cannot be
    written.
    """
    path = Path(path)
    with naming_writes(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") if binary else open(handle, "w", encoding="utf-8", newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would hide the file from the user's group
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path` when the block ends without an error.

    An older folder at `path` is deleted only after the new one stands. After an error `path` is as it was, and folders
    that were made to hold it are gone. Raises UserError if it cannot be written.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; choose another place")
    with naming_writes(path):
        made = [parent for parent in path.parents if not parent.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        try:
            yield new
            if path.exists():
                path.rename(old)
            try:
                new.rename(path)
            except BaseException:
                if old.exists():
                    old.rename(path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if not path.exists():
                with contextlib.suppress(OSError):  # somebody else has put something there
                    for parent in made:
                        parent.rmdir()


def link_folder(source: Path, target: Path, ignore: Sequence[str]) -> None:
    """Make `target` a copy of a folder, but for names like those in `ignore`, of hard links where there can be any."""

    def link(file: str, place: str) -> None:
        try:
            os.link(file, place)
        except OSError:  # other disks, file systems without links
            shutil.copy2(file, place)

    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*ignore), copy_function=link)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, Chinese characters as they are, halves of surrogate pairs escaped.

    Raises UserError if it is nested too deep.
    """
    try:
        with replacing_file(path) as file:
            file.reconfigure(errors="backslashreplace")  # which is JSON's own escape
            json.dump(value, file, ensure_ascii=False, indent=2)
            file.write("\n")
    except RecursionError:
        raise UserError(f"{path}: what it is to hold is nested too deep") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return value


def _first_undecodable(path: str | Path) -> int:
    try:
        Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return error.start
    return 0  # it was changed meanwhile


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
