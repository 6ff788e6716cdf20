"""Files that are whole or absent: atomic writes, and JSON.

A file is written beside its final name, flushed to the disk and renamed.  A kill at any moment leaves the old file or the
new one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import UserError, WorkFailed

if TYPE_CHECKING:
    pass


# A device's name is one with any ending, too.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def file_name(text: str, longest: int = 120) -> str:
    """The text as the name of a file or a folder on every system: itself, wherever it is one.

    Windows takes none of < > : " / \\ | ? * and control characters, no dot or space at the end, and no device's name.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "-", text)[:longest].rstrip(". ")
    return f"_{name}" if not name or _DEVICE.match(name) else name


def write_file(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or nothing; text is UTF-8.  Missing folders are made.  Raises WorkFailed where it cannot."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(data.encode() if isinstance(data, str) else data)


def update_file(path: str | Path, data: bytes | str) -> None:
    """`write`, unless the file is there with these very bytes: who looks at when it was written sees no change."""
    wanted = data.encode() if isinstance(data, str) else data
    with contextlib.suppress(OSError):
        if Path(path).read_bytes() == wanted:
            return
    write_file(path, wanted)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; on leaving, its bytes are on the disk and it takes the place of `path`."""
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.touch()
        mode = fresh.stat().st_mode
        yield fresh
        # safetensors puts a file of its own there, which nobody else may read whatever the umask says.
        fresh.chmod(mode)
        _flush(fresh)
        os.replace(fresh, path)
        # Without this a power cut may undo the renaming, though not tear the file.
        _flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WorkFailed(f"{path} could not be written: {error.strerror or error}.") from error
        raise


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder, and its renames need no flush.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes, keys in the order given.

    JSON has no NaN or infinity, and a run that went wrong must still be written down: they become the strings
    "NaN", "Infinity" and "-Infinity", which float() reads back.
    """
    return json.dumps(_spelt(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _spelt(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spelt(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelt(v) for v in value]
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write `to_json(value)` for people to read, atomically and with a newline at its end."""
    write_file(path, to_json(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.  Raises UserError that names the file, and the line of what is wrong in it."""
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
