"""Tensors in one safetensors file with a JSON header.  Pickles are refused.

The header holds a digest of itself and of the tensors.  It is checked when the tensors are read, once in a process for each
file, size and time of modification.  Files of sitkit 0.1 have no digest and are read without the check.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import UserError, unreadable
from sitkit.runtime.files import parse_json, replacing, to_json

if TYPE_CHECKING:
    from torch import Tensor


HEADER_KEY, DIGEST_KEY = "sitkit", "digest"
OLDER_FILE = "Remove it to use an older one beside it, or copy it again."
# The files whose digest this process has checked: device, inode, size and time of modification.
_checked: set[tuple[int, ...]] = set()


def digest_of(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of a text and of the names, types, shapes and values of tensors."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with the header and a digest as JSON under its metadata key "sitkit".

    Tensors may be on any device, strided, or share memory (tied weights); each is written in full.  Equal tensors and
    headers give equal bytes.  Raises WorkFailed if the write fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    separate = _separate(tensors)
    metadata = {HEADER_KEY: to_json({**header, DIGEST_KEY: digest_of(separate, to_json(header))})}
    with replacing(Path(path)) as fresh:
        try:
            save_file(separate, fresh, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, contiguous and each in its own memory, as safetensors requires."""
    memory: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in memory:
            tensor = tensor.clone()
        memory.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def load_tensors(
    path: str | Path, what: str = "checkpoint", remedy: str = OLDER_FILE
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors (on the CPU, memory-mapped) of a checkpoint.

    Args:
        path: the file.
        what: the noun for the file in errors.
        remedy: what to do about a damaged file, for errors.

    Returns:
        The header and the tensors by name.

    Raises:
        UserError: for a file that is missing, cut short, changed since it was written, a pickle, or without sitkit's header.
    """
    with open_tensors(Path(path), what, remedy) as file:
        header = _content(file, path)
        tensors = _Parts(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        recorded, stat = header.pop(DIGEST_KEY, None), Path(path).stat()
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if recorded is not None and state not in _checked:
            if digest_of(tensors, to_json(header)) != recorded:
                raise UserError(f"The {what} {path} is damaged: its content changed since it was written. {remedy}")
            _checked.add(state)
        return header, tensors


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a checkpoint without its tensors.  Checks the file's length; raises as `load_tensors`."""
    with open_tensors(Path(path)) as file:
        return header_of(file, path)


@contextlib.contextmanager
def open_tensors(path: Path, what: str = "checkpoint", remedy: str = OLDER_FILE) -> Iterator[Any]:
    """Yield a safetensors file to read tensors from one at a time.  Raises UserError as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        # safetensors calls every file that it cannot open or read a missing one.
        with path.open("rb") as file:
            file.read(8)
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.") from None
    except OSError as error:
        raise unreadable(f"The {what} {path}", error) from None
    except SafetensorError as error:
        size = path.stat().st_size
        # Checked only now: the length at the start of a valid safetensors file may look like the magic of a pickle.
        if _pickled(path):
            raise UserError(
                f"{path} is a pickle ({size:,} bytes, as torch.save writes). Reading a pickle runs code from it, so "
                "sitkit refuses it. Give a .safetensors file from the checkpoints folder of a run."
            ) from None
        raise UserError(f"The {what} {path} is damaged or cut short ({size:,} bytes): {error}. {remedy}") from None


def _pickled(path: Path) -> bool:
    """Whether the file begins like a zip archive (torch.save) or a pickle of protocol 2 to 5."""
    with path.open("rb") as file:
        magic = file.read(4)
    return magic == b"PK\x03\x04" or (magic[:1] == b"\x80" and magic[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def header_of(file: Any, path: str | Path) -> dict[str, Any]:
    """Return the header of an open checkpoint.  Raises UserError for a file without it."""
    header = _content(file, path)
    header.pop(DIGEST_KEY, None)
    return header


def _content(file: Any, path: str | Path) -> dict[str, Any]:
    text = (file.metadata() or {}).get(HEADER_KEY)
    if text is None:
        raise UserError(
            f"{path} is a safetensors file without sitkit's header. "
            "Give a .safetensors file from the checkpoints folder of a run."
        )
    header = parse_json(text, f"The header of {path}")
    if not isinstance(header, dict):
        raise UserError(f"The header of {path} is not the description of its tensors: copy the file again.")
    return _Parts(path, header)


class _Parts(dict[str, Any]):
    """The header or the tensors of a file; a part that is missing is a UserError that names the file."""

    def __init__(self, path: object, parts: Mapping[str, Any]) -> None:
        super().__init__(parts)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise UserError(f"{self.path} lacks {name}: it is of an older sitkit, or damaged. Copy it again.")
