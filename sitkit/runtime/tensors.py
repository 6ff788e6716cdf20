"""Tensors in one safetensors file with a JSON header.  Pickles are refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import UserError
from sitkit.runtime.files import replacing, to_json

if TYPE_CHECKING:
    from torch import Tensor


HEADER_KEY = "sitkit"


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with the header as JSON under its metadata key "sitkit".

    Tensors may be on any device, strided, or share memory (tied weights); each is written in full.  Equal tensors and
    headers give equal bytes.  Raises WorkFailed if the write fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {HEADER_KEY: to_json(header)}
    with replacing(Path(path)) as fresh:
        try:
            save_file(_separate(tensors), fresh, metadata)
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


def load_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors (on the CPU) of a checkpoint.

    Raises UserError for a file that is missing, cut short, a pickle, or without sitkit's header.
    """
    with open_tensors(Path(path)) as file:
        return header_of(file, path), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_header(path: str | Path) -> dict[str, Any]:
    """Return the header of a checkpoint without its tensors.  Checks the file's length; raises as `load_tensors`."""
    with open_tensors(Path(path)) as file:
        return header_of(file, path)


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Yield a safetensors file to read tensors from one at a time.  Raises UserError as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}.") from None
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        size = path.stat().st_size
        # Checked only now: the length at the start of a valid safetensors file may look like the magic of a pickle.
        if _pickled(path):
            raise UserError(
                f"{path} is a pickle ({size:,} bytes, as torch.save writes). Reading a pickle runs code from it, so "
                "sitkit refuses it. Give a .safetensors file from the checkpoints folder of a run."
            ) from None
        raise UserError(
            f"The checkpoint {path} is damaged or cut short ({size:,} bytes): {error}. "
            "Use an older one beside it, or copy it again."
        ) from None


def _pickled(path: Path) -> bool:
    """Whether the file begins like a zip archive (torch.save) or a pickle of protocol 2 to 5."""
    with path.open("rb") as file:
        magic = file.read(4)
    return magic == b"PK\x03\x04" or (magic[:1] == b"\x80" and magic[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def header_of(file: Any, path: str | Path) -> dict[str, Any]:
    """Return the header of an open checkpoint.  Raises UserError for a file without it."""
    text = (file.metadata() or {}).get(HEADER_KEY)
    if text is None:
        raise UserError(
            f"{path} is a safetensors file without sitkit's header. "
            "Give a .safetensors file from the checkpoints folder of a run."
        )
    return json.loads(text)
