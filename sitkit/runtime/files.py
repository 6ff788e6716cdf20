"""Atomic writes, and JSON.

A file is written beside its final name, flushed to the disk and renamed.  A process that is killed at any moment leaves the
old file or the new one.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import NotWritten, UserError, unreadable

if TYPE_CHECKING:
    from pydantic import BaseModel

# Names of devices of Windows; they are reserved with every ending, too.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)

# Control characters but line end and tab, characters that turn the direction of a text, and halves of characters.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def file_name(text: str, longest: int = 120) -> str:
    """Return a text as the name of a file or a folder that every system accepts; unchanged if it is such a name.

    Windows refuses < > : " / \\ | ? * and control characters, a dot or space at the end, and the names of devices.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "-", text)[:longest].rstrip(". ")
    return f"_{name}" if not name or _DEVICE.match(name) else name


def visible(text: str) -> str:
    """Return a text with its control characters written out (\\x1b), except for line ends and tabs.

    A name in a file may hold any character, and a terminal obeys some: they clear the screen, or change the order of what is
    read.
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write a file atomically; text is UTF-8.  Missing folders are created.  Raises WorkFailed if the write fails."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(data.encode() if isinstance(data, str) else data)


def update_file(path: str | Path, data: bytes | str) -> None:
    """Write a file unless it already has these bytes, so that its time of writing changes with its content alone."""
    content = data.encode() if isinstance(data, str) else data
    with contextlib.suppress(OSError):
        if Path(path).read_bytes() == content:
            return
    write_file(path, content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name to write to; afterwards its bytes are flushed to the disk and the file replaces `path`."""
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        # safetensors makes a file that only its owner can read; the umask decides instead.
        fresh.chmod(mode)
        _flush(fresh)
        os.replace(fresh, path)
        # Without this a power cut may undo the renaming.
        _flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NotWritten(f"{path} could not be written: {error.strerror or error}.") from error
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and its renames need no flush.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """Return plain values as strict JSON, the keys in their order.

    JSON has no NaN or infinity, but the record of a failed run may hold them: they become the strings "NaN", "Infinity"
    and "-Infinity", which float() reads.
    """
    return json.dumps(_spell(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spell(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell(v) for v in value]
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write `to_json(value)`, indented, atomically and with a newline at its end."""
    write_file(path, to_json(value, indent=2) + "\n")


def exists(path: Path) -> bool:
    """Return whether there is a file or a folder.  Raises UserError for a link to nothing and if the system cannot say it."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there.") from None
        return False
    except OSError as error:
        raise unreadable(path, error) from None
    return True


def listed(folder: Path, pattern: str) -> list[Path]:
    """Return the paths in a folder that fit a pattern, sorted by name; none without the folder.

    Path.glob takes a folder that cannot be read for an empty one; this raises UserError with the system's reason.
    """
    if not exists(folder):
        return []
    try:
        return sorted(folder / name for name in os.listdir(folder) if fnmatch.fnmatchcase(name, pattern))
    except OSError as error:
        raise unreadable(folder, error) from None


def read_bytes(path: str | Path) -> bytes:
    """Return the bytes in a file.  Raises UserError that names the file and the system's reason."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise unreadable(path, error) from None


def read_text(path: str | Path) -> str:
    """Return the text in a file.  Raises UserError that names the file and the system's reason."""
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: byte {error.start} is {error.object[error.start]:#x}.") from None


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file.  Raises UserError that names the file and the line of a fault."""
    return parse_json(read_text(path), path)


def parse_json(text: str, place: object) -> Any:
    """Return the value of a JSON text.  Raises UserError that names the place and the line of a fault."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}:{error.lineno}: not JSON: {error.msg}.") from None
    except (ValueError, RecursionError):
        raise UserError(
            f"{place}: not JSON that can be read: a number is too long, or lists are nested too deeply."
        ) from None


def read_row(line: bytes) -> dict[str, Any] | None:
    """Return the row in a line of metrics.jsonl; None for a line that is cut short, damaged, or has no step."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 2**63 else None


def read_record(path: str | Path, model: type[BaseModel], what: str, remedy: str = "") -> dict[str, Any]:
    """Return the record in a JSON file, as it is written.  Raises UserError that names the file and the keys of a fault.

    Args:
        path: the file.
        model: the keys that a record has at least, and the types of their values.
        what: the noun for the record in errors.
        remedy: a sentence that says what to do about a damaged record.
    """
    return checked_record(read_json(path), model, str(path), what, remedy)


def checked_record(value: Any, model: type[BaseModel], place: str, what: str, remedy: str = "") -> dict[str, Any]:
    """Return a plain value that is a record; `place` is its name in errors.  Raises as `read_record`."""
    from pydantic import ValidationError

    try:
        model.model_validate(value)
    except ValidationError as error:
        faults = error.errors()
        lacks = sorted(".".join(map(str, fault["loc"])) for fault in faults if fault["type"] == "missing")
        if not isinstance(value, dict) or len(lacks) > len(model.model_fields) // 2:
            raise UserError(f"{place} is not {what}. {remedy}".rstrip()) from None
        key, reason = ".".join(map(str, faults[0]["loc"])), faults[0]["msg"].removeprefix("Value error, ").rstrip(".")
        fault = f"lacks {', '.join(lacks)}" if lacks else f"has a wrong value: {key}: {reason}"
        raise UserError(f"{place} {fault}: it is of an older sitkit, or damaged. {remedy}".rstrip()) from None
    return value


def plain_name(name: str) -> str:
    """Return a name that a record gives to a file or folder beside it.  Raises ValueError for a path out of its folder."""
    if not name or name != Path(name).name or "\\" in name or name == ".." or not name.isprintable():
        raise ValueError(f"a plain name is needed, without folders; got {name!r}.")
    return name


def inside(folder: Path, name: str) -> Path:
    """Return the path that a record names in a folder.  Raises UserError if a link leads from it out of the folder."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} leads to {path.resolve()}, out of {folder}: a record names files of its folder alone.")
    return path
