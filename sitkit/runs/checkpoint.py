"""Files that are whole or absent: atomic writes, JSON, and checkpoints as one safetensors file.

A file is written beside its final name, flushed to the disk and renamed, so a kill at any moment leaves the old
file or the new one.  A checkpoint carries its description as JSON in the safetensors header.  Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import read_header

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


OPTIMIZER = "optimizer."
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The whole state of an optimizer as tensors named "optimizer.<parameter's number>.<key>".

    Values that are not tensors (learning rates, betas, counters) are JSON in the bytes of "optimizer.json"; Python's floats
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
    plain = json.loads(text)
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in plain["state"].items()}
    for name, tensor in tensors.items():
        if name.startswith(OPTIMIZER) and name != f"{OPTIMIZER}json":
            number, _, key = name.removeprefix(OPTIMIZER).partition(".")
            state.setdefault(int(number), {})[key] = tensor
    _check_fit(optimizer, plain["groups"], state)
    groups = [
        {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for group, now in zip(plain["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_fit(optimizer: Optimizer, groups: list[dict[str, Any]], state: Mapping[int, Mapping[str, Any]]) -> None:
    """Refuse a state of other parameters: torch takes wrong shapes without a word and fails at the next step."""
    sizes, stored = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in groups]
    if sizes != stored:
        raise UserError(f"The optimizer's state is for groups of {stored} parameters; the model has {sizes}.")
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


def checkpoint_file(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a folder."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by the name of its file."""
    return int(path.stem.rpartition("-")[2])


def latest_checkpoint(folder: str | Path, on_warning: Callable[[str], object] = warnings.warn) -> Path | None:
    """The newest whole checkpoint of a folder, or None; each newer one that is damaged is named in a warning."""
    for path in reversed(checkpoints(folder)):
        try:
            read_header(path)
        except UserError as error:
            on_warning(f"{error} It is passed over for the one before it.")
        else:
            return path
    return None


def prune_checkpoints(folder: str | Path, keep: int) -> None:
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
        read_header(path)
    except UserError:
        return False
    return True
