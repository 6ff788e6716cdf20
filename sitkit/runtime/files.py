"""Atomic writes, and JSON.

A file is written beside its final name, flushed to the disk and renamed.  A process that is killed at any moment leaves the
old file or the new one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sitkit.runtime.errors import UserError, WorkFailed

# Names of devices of Windows; they are reserved with every ending, too.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def file_name(text: str, longest: int = 120) -> str:
    """Return a text as the name of a file or a folder that every system accepts; unchanged if it is such a name.

    Windows refuses < > : " / \\ | ? * and control characters, a dot or space at the end, and the names of devices.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "-", text)[:longest].rstrip(". ")
    return f"_{name}" if not name or _DEVICE.match(name) else name


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
            raise WorkFailed(f"{path} could not be written: {error.strerror or error}.") from error
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


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file.  Raises UserError that names the file and the line of a fault."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not JSON: it is not text in UTF-8.") from None
