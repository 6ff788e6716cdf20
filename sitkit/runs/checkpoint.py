"""Checkpoints: one safetensors file per step, and the state of an optimizer as tensors.

A checkpoint has its description as JSON in the safetensors header.  Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.runs.config.records import CheckpointRecord
from sitkit.runtime.errors import Unreadable, UserError
from sitkit.runtime.files import checked_record, listed, parse_json
from sitkit.runtime.tensors import OLDER_FILE, load_tensors, read_header

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


OPTIMIZER = "optimizer."
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the whole state of an optimizer as tensors named "optimizer.<parameter's number>.<key>".

    Values that are not tensors (learning rates, betas, counters) are JSON in the bytes of "optimizer.json", which keeps
    Python's floats exactly: an optimizer that is loaded from it takes the same steps.
    """
    import torch

    full = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for number, state in full["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIMIZER}{number}.{key}"] = value
            else:
                plain.setdefault(str(number), {})[key] = value
    text = json.dumps({"groups": full["param_groups"], "state": plain})
    tensors[f"{OPTIMIZER}json"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return tensors


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` wrote into an optimizer; other names in `tensors` are ignored.

    Raises:
        UserError: without such a state, and for the state of other parameters.
    """
    try:
        text = bytes(tensors[f"{OPTIMIZER}json"].tolist())
    except KeyError:
        raise UserError("The checkpoint holds no state of an optimizer, so training cannot continue from it.") from None
    plain = parse_json(text.decode(errors="replace"), "The optimizer's state in the checkpoint")
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
    """Raise UserError for a state of other parameters: torch accepts wrong shapes and fails at the next step."""
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
    """Return the files step-00000500.safetensors of a folder, sorted by step; none if there is no folder.

    Raises UserError for a folder that cannot be read.
    """
    return sorted((path for path in listed(Path(folder), "step-*") if _NAME.fullmatch(path.name)), key=step_of)


def checkpoint_file(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a folder."""
    return folder / f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint by the name of its file."""
    return int(path.stem.rpartition("-")[2])


def header_of_checkpoint(path: Path) -> dict[str, Any]:
    """Return the header of a checkpoint or a snapshot.  Raises UserError if it is damaged."""
    return checked_record(
        read_header(path), CheckpointRecord, f"The header of {path}", "that of a checkpoint", OLDER_FILE
    )


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors of a checkpoint or a snapshot.  Raises UserError if it is damaged."""
    header_of_checkpoint(path)
    return load_tensors(path)


def latest_checkpoint(folder: str | Path, on_warning: Callable[[str], object] = warnings.warn) -> Path | None:
    """Return the newest undamaged checkpoint of a folder; a warning names each newer one that is damaged.

    Args:
        folder: the folder of the checkpoints.
        on_warning: takes the sentence on a damaged checkpoint.

    Returns:
        The file; None if there is no checkpoint.

    Raises:
        UserError: if checkpoints are there and none can be used, or if the newest cannot be read.
    """
    damaged: list[UserError] = []
    for path in reversed(checkpoints(folder)):
        try:
            header_of_checkpoint(path)
        except Unreadable:
            raise
        except UserError as error:
            damaged.append(error)
        else:
            for error in damaged:
                on_warning(f"{error} It is passed over for the one before it.")
            return path
    if damaged:
        again = shlex.join(["sitkit", "train", str(Path(folder).parent / "config.yaml"), "--restart"])
        raise UserError(f"{damaged[0]} No checkpoint of {folder} can be used; `{again}` trains again from step 0.")
    return None


def prune_checkpoints(folder: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` undamaged checkpoints, and the partial files of killed processes.

    A damaged checkpoint is not counted, or it would take the place of the undamaged one that a run continues from.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1; got {keep}.")
    undamaged = [path for path in checkpoints(folder) if _undamaged(path)]
    # safetensors writes to a file of its own, .tmpXXXXXX, before it renames it.
    partial = [path for pattern in ("step-*.safetensors.tmp-*", ".tmp??????") for path in Path(folder).glob(pattern)]
    for path in (*undamaged[:-keep], *partial):
        path.unlink(missing_ok=True)


def _undamaged(path: Path) -> bool:
    try:
        header_of_checkpoint(path)
    except UserError:
        return False
    return True
