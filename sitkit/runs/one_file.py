"""A run as one file: the weights of one average, its settings, and fingerprints of all that it depends on.

    tensors    the network's state, by its own names; autoencoder/..., the state of one that came from a folder
    metadata   sitkit: JSON of the step, which weights they are, the settings but for `run`, what sampling must know of the
               data, fingerprints of training, data, autoencoder and weights, and the packages that the components came from

It is safetensors, so nothing in it is run, and other tools read the weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sitkit.data.described import description
from sitkit.models.autoencoder import PACKED
from sitkit.registry import origins
from sitkit.runs import checkpoint
from sitkit.runs.config.schema import Config
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from sitkit.runs.run import Run

KIND = "run"


def write(run: Run, path: Path) -> Path:
    """Write a run, with the weights that it was loaded with and the settings that it has now, to one file.

    Raises UserError for a network that is given rather than trained, and WorkFailed where the file cannot be written.
    """
    if not run.config.backbone.trainable:
        raise UserError(f"backbone {run.config.backbone.name!r} has no weights to export: it is made of the data.")
    state = {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}
    config = {key: value for key, value in run.config.plain().items() if key != "run"}
    told = {
        "format": 1, "kind": KIND, "step": run.step, "weights": run.average, "config": config,
        "data": description(run.outline),
        "fingerprints": {
            "training": run.identity, "data": run.outline.fingerprint,
            "autoencoder": run.config.autoencoder.fingerprint(), "weights": digest(state),
        },
        "components": origins(),
    }  # fmt: skip
    packed = run.config.autoencoder.packed()
    if packed is not None:
        told["autoencoder"] = packed[0]
        state |= {f"{PACKED}{name}": tensor for name, tensor in packed[1].items()}
    checkpoint.save(path, state, told)
    return path


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of a network's state: names, types, shapes and values."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def average(config: Config) -> str:
    """Which weights a configuration samples with: "ema", "raw", or "ema-0.05" where one was chosen."""
    chosen = config.sample
    return chosen.weights if chosen.ema is None else f"{chosen.weights}-{chosen.ema!r}"


def header(path: Path) -> dict[str, Any]:
    """What the file says of itself.  Raises UserError for one that is damaged, a pickle, or no run in one file."""
    told = checkpoint.header(path)
    if told.get("kind") != KIND:
        raise UserError(
            f"{path} is a checkpoint; give the folder of its run: {path.parent.parent}. "
            "`sitkit convert RUN --to NAME.safetensors` makes one file of a run."
        )
    if told["format"] != 1:
        raise UserError(f"{path} is of format {told['format']}, which this sitkit does not read: upgrade it.")
    return told


def settings(path: Path) -> dict[str, Any]:
    """The settings in the file; an autoencoder that it holds is found in it, wherever the file now lies."""
    told = header(path)
    found = told["config"]
    return (
        found | {"autoencoder": found["autoencoder"] | {"path": str(path.resolve())}}
        if "autoencoder" in told
        else found
    )


def state(path: Path, config: Config, step: int | None) -> tuple[int, dict[str, Tensor], str]:
    """(step, the network's state, its digest) of a file.

    Raises UserError where it holds other weights than `config` or `step` ask for, where its autoencoder is not the one
    that it was made with, and where the weights are not those that it was written with.
    """
    told, tensors = checkpoint.load(path)
    marks = told["fingerprints"]
    if average(config) != told["weights"]:
        raise UserError(f"{path} holds the weights {told['weights']!r} alone, not {average(config)!r}.")
    if step not in (None, told["step"]):
        raise UserError(f"{path} holds step {told['step']} alone, not step {step}.")
    if config.autoencoder.fingerprint() != marks["autoencoder"]:
        raise UserError(f"{path}: the autoencoder {config.autoencoder} is not the one that it was made with.")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(PACKED)}
    if digest(tensors) != marks["weights"]:
        raise UserError(f"{path}: the weights are not those that were written there: copy it again.")
    return int(told["step"]), tensors, marks["weights"]
