"""A run as one file, on the Hugging Face hub, or in the layout of the official code."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sitkit.data.described import description
from sitkit.models.autoencoder import PACKED
from sitkit.models.backbone import SiTBackbone
from sitkit.registry import origins
from sitkit.runs.config.identity import label
from sitkit.runs.diagnostics import fitted
from sitkit.runs.one_file import HUB_FILE, KIND, parse_address, upload, weights_fingerprint
from sitkit.runs.run import Run
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import replacing
from sitkit.runtime.tensors import save_tensors

if TYPE_CHECKING:
    from sitkit.runs.run import Run


def write_run(run: Run, path: Path) -> Path:
    """Write a run, with the weights that it was loaded with and the settings that it has now, to one file.

    Raises UserError for a network that is given rather than trained, and WorkFailed where the file cannot be written.
    """
    if not run.config.backbone.trainable:
        raise UserError(f"backbone {run.config.backbone.name!r} has no weights to export: it is made of the data.")
    state = {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}
    config = {key: value for key, value in run.config.plain().items() if key != "run"}
    told = {
        "format": 1, "kind": KIND, "step": run.step, "weights": run.weights_name, "config": config,
        "data": description(run.data_description),
        "fingerprints": {
            "training": run.identity, "data": run.data_description.fingerprint,
            "autoencoder": run.config.autoencoder.fingerprint(), "weights": weights_fingerprint(state),
        },
        "components": origins(),
    }  # fmt: skip
    packed = run.config.autoencoder.packed()
    if packed is not None:
        told["autoencoder"] = packed[0]
        state |= {f"{PACKED}{name}": tensor for name, tensor in packed[1].items()}
    save_tensors(path, state, told)
    return path


def export(run: Run, path: Path) -> Path:
    """A run as one file that samples on its own: with what its sampler, grid and w need to be measured of it.

    Raises UserError where it cannot be written so, or what is measured on data and they are gone.
    """
    ready = {"sampler": fitted(run.config.sampler, run), "diffusion": fitted(run.config.diffusion, run)}
    return write_run(run.with_settings(run.config.model_copy(update=ready)), path)


def push(run: Run, address: str, *, private: bool = False) -> str:
    """A run as one file, with a card, in a repository of the Hugging Face hub; returns its web address.

    Raises UserError before any upload for what `export` refuses, WorkFailed where the hub does not take it.
    """
    parse_address(address)
    with tempfile.TemporaryDirectory() as folder:
        file = export(run, Path(folder) / HUB_FILE)
        return upload(file, card(run, address), address, private=private)


def card(run: Run, address: str) -> str:
    """The README of a run on the hub: what it is, and how to sample it."""
    config, marks = run.config, f"training {run.identity}, data {run.data_description.fingerprint[:12]}"
    made = ", ".join(label(part) for part in (config.interp, config.target, config.weight, config.backbone))
    return f"""---
library_name: sitkit
pipeline_tag: {"unconditional-image-generation" if run.data_description.is_image else "other"}
---

# {address.rpartition("/")[2]}

A scalable interpolant transformer trained by sitkit: {made}, on {label(config.data)}, step {run.step}, weights {run.weights_name}.

```sh
sitkit sample {address} -n 64
```

```python
import sitkit

run = sitkit.load("{address}")
readings = run.field.read(x, t, y)  # velocity, score, data, noise
```

The settings are in the metadata of `{HUB_FILE}`. Fingerprints: {marks}.
"""


def export_official(run: Run, path: Path) -> Path:
    """A run's weights as the official code reads them: torch.save of {"ema": state}, names and shapes as they are.

    Raises UserError for a network that the official code does not have.
    """
    backbone = run.config.backbone
    if not isinstance(backbone, SiTBackbone) or backbone.time_scale != 1.0 or backbone.qk_norm:
        raise UserError(
            "The official code has no such network: it needs backbone 'sit' with time_scale 1 and no qk_norm."
        )
    with replacing(path) as fresh:
        torch.save({"ema": {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}}, fresh)
    return path
