"""Files read with one clear error and written whole or not at all. Everything is UTF-8."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
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


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, a byte-order mark dropped. Raises UserError if it is missing or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{path}: cannot be read: {error}") from None


def read_json(path: str | Path) -> Any:
    """The value of a JSON file. Raises UserError if it is missing, not UTF-8 or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets nested too deep
        raise UserError(f"{path}: not usable JSON: {error}") from None


def refuse_missing_folder(name: str, is_folder: bool = False) -> None:
    """Raise FileNotFoundError for what can only be a folder, by its spelling or `is_folder`, and is not there."""
    if (is_folder or name.startswith((".", "/", "~"))) and not Path(name).is_dir():
        raise FileNotFoundError("there is no such folder")


@contextmanager
def replacing_file(path: str | Path, newline: str | None = None, binary: bool = False) -> Iterator[IO]:
    """A UTF-8 text file, or a binary one, to write; `path` is replaced by it in one step when the block ends well.

    Until then, and after an error, `path` is as it was. `newline` is `open`'s.
    """
    path = Path(path)
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

    An older folder at `path` is deleted only after the new one stands. After an error `path` is as it was.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, not a folder; choose another place")
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


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as indented JSON, Chinese characters as they are."""
    with replacing_file(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
