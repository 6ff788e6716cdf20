"""Files that are whole or absent: atomic writes, JSON, and checkpoints as one safetensors file.

A file is written beside its final name, flushed to the disk and renamed, so a kill at any moment leaves the old
file or the new one.  A checkpoint carries its description as JSON in the safetensors header.  Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

KEY = "sitkit"
OPTIMIZER = "optimizer."
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
# A device's name is one with any ending, too.
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)


def file_name(text: str, longest: int = 120) -> str:
    """The text as the name of a file or a folder on every system: itself, wherever it is one.

    Windows takes none of < > : " / \\ | ? * and control characters, no dot or space at the end, and no device's name.
    """
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "-", text)[:longest].rstrip(". ")
    return f"_{name}" if not name or _DEVICE.match(name) else name


def write(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or nothing; text is UTF-8.  Missing folders are made.  Raises WorkFailed where it cannot."""
    with replacing(Path(path)) as fresh:
        fresh.write_bytes(data.encode() if isinstance(data, str) else data)


def update(path: str | Path, data: bytes | str) -> None:
    """`write`, unless the file is there with these very bytes: who looks at when it was written sees no change."""
    wanted = data.encode() if isinstance(data, str) else data
    with contextlib.suppress(OSError):
        if Path(path).read_bytes() == wanted:
            return
    write(path, wanted)


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
    write(path, to_json(value, indent=2) + "\n")


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


def save(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """One safetensors file, the header as JSON under its metadata key "sitkit"; whole or absent.

    Tensors of any device, strided or sharing memory (tied weights), are written each in full.  Equal tensors and
    headers give equal bytes.  Raises WorkFailed where the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {KEY: to_json(header)}
    with replacing(Path(path)) as fresh:
        try:
            save_file(_separate(tensors), fresh, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor on the CPU, contiguous and in memory of its own, as safetensors demands."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def load(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors on the CPU) of a checkpoint.

    Raises UserError for a file that is missing, cut short, a pickle, or not of sitkit.
    """
    with opened(Path(path)) as file:
        return described(file, path), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def header(path: str | Path) -> dict[str, Any]:
    """The header of a checkpoint, without its tensors.  The file's length is checked; raises as `load` does."""
    with opened(Path(path)) as file:
        return described(file, path)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file to read tensors from, one at a time.  Raises UserError as `load` does."""
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
        # Asked only now, because the length that begins a sound safetensors file may look like a pickle's magic.
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
    """Whether the file begins as a zip archive (torch.save) or a pickle of protocol 2 to 5 does."""
    with path.open("rb") as file:
        magic = file.read(4)
    return magic == b"PK\x03\x04" or (magic[:1] == b"\x80" and magic[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"))


def described(file: Any, path: str | Path) -> dict[str, Any]:
    """The header of an open checkpoint.  Raises UserError for a file that is not of sitkit."""
    text = (file.metadata() or {}).get(KEY)
    if text is None:
        raise UserError(
            f"{path} is a safetensors file without sitkit's header. "
            "Give a .safetensors file from the checkpoints folder of a run."
        )
    return json.loads(text)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The whole state of an optimizer as tensors named "optimizer.<parameter's number>.<key>".

    What is no tensor (learning rates, betas, counters) is JSON in the bytes of "optimizer.json"; Python's floats
    survive that exactly, so an optimizer loaded from it takes the very same steps.
    """
    import torch

    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, state in whole["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER}{number}.{key}"] = value
            else:
                plain.setdefault(str(number), {})[key] = value
    text = json.dumps({"groups": whole["param_groups"], "state": plain})
    tensors[f"{OPTIMIZER}json"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return tensors


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that `optimizer_tensors` wrote; other names in `tensors` are left alone.

    Raises UserError where there is no such state, or where it belongs to other parameters.
    """
    try:
        text = bytes(tensors[f"{OPTIMIZER}json"].tolist())
    except KeyError:
        raise UserError("The checkpoint holds no state of an optimizer, so training cannot continue from it.") from None
    told = json.loads(text)
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in told["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER) and name != f"{OPTIMIZER}json":
            number, _, key = name.removeprefix(OPTIMIZER).partition(".")
            state.setdefault(int(number), {})[key] = tensor
    _check_fit(optimizer, told["groups"], state)
    groups = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for group, now in zip(told["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_fit(optimizer: Optimizer, groups: list[dict[str, Any]], state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a state of other parameters: torch takes wrong shapes without a word and fails at the next step."""
    sizes, told = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in groups]
    if sizes != told:
        raise UserError(f"The optimizer's state is for groups of {told} parameters; the model has {sizes}.")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state.items():
        shape = tuple(parameters[number].shape)
        for key, value in values.items():
            if key != "step" and hasattr(value, "shape") and tuple(value.shape) != shape:
                raise UserError(
                    f"The optimizer's state is of another model: {key} of parameter {number} has shape "
                    f"{tuple(value.shape)}, the parameter {shape}."
                )


def checkpoints(folder: str | Path) -> list[Path]:
    """The files step-00000500.safetensors of a folder, by step; none where there is no folder."""
    found = [(int(match[1]), path) for path in Path(folder).glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(folder: str | Path, on_warning: Callable[[str], object] = warnings.warn) -> Path | None:
    """The newest whole checkpoint of a folder, or None; each newer one that is damaged is named in a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            header(path)
        except UserError as error:
            on_warning(f"{error} It is passed over for the one before it.")
        else:
            return path
    return None


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what kills left half-written.

    A damaged checkpoint is not counted, or it would push out the sound one that a run continues from.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}.")
    whole = [path for path in checkpoints(folder) if _sound(path)]
    for path in whole[:-keep]:
        path.unlink(missing_ok=True)
    # safetensors writes to a file of its own, .tmpXXXXXX, before it has the name that it was given.
    for pattern in ("step-*.safetensors.tmp-*", ".tmp??????"):
        for path in Path(folder).glob(pattern):
            path.unlink(missing_ok=True)


def _sound(path: Path) -> bool:
    try:
        header(path)
    except UserError:
        return False
    return True
