"""A run as one file, on the Hugging Face hub, or in the layout of the official code."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sitkit.data.described import description
from sitkit.models.autoencoder import PACKED
from sitkit.models.backbone import SiTBackbone
from sitkit.registry import origins
from sitkit.runs.config.identity import label
from sitkit.runs.config.sources import Layer
from sitkit.runs.one_file import HUB_FILE, KIND, SCHEME, parse_address, upload
from sitkit.runs.run import Run, open_run
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import replacing
from sitkit.runtime.tensors import digest_of, save_tensors


def _write_run(run: Run, path: Path) -> Path:
    """Write the weights and the settings of a run to one file.

    Raises UserError for a network without trained weights, and WorkFailed if the file cannot be written.
    """
    if not run.config.backbone.trainable:
        raise UserError(f"backbone {run.config.backbone.name!r} has no weights to export: it is made of the data.")
    state = {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}
    config = {key: value for key, value in run.config.plain().items() if key != "run"}
    header = {
        "format": 1, "kind": KIND, "step": run.step, "weights": run.weights_name, "config": config,
        "data": description(run.data_description),
        "fingerprints": {
            "training": run.identity, "data": run.data_description.fingerprint,
            "autoencoder": run.config.autoencoder.fingerprint(), "weights": digest_of(state),
        },
        "components": origins(),
    }  # fmt: skip
    packed = run.config.autoencoder.packed()
    if packed is not None:
        header["autoencoder"] = packed[0]
        state |= {f"{PACKED}{name}": tensor for name, tensor in packed[1].items()}
    save_tensors(path, state, header)
    return path


class Exported(NamedTuple):
    """The path or the web address of an exported run, and a note if its autoencoder is not part of the file."""

    address: str
    notes: tuple[str, ...]


def export(
    run: Run | str | Path,
    to: str | Path,
    *,
    private: bool = False,
    ema: float | None = None,
    step: int | None = None,
    settings: Mapping[str, Any] | Layer | None = None,
    runs: Path = Path("runs"),
) -> Exported:
    """Write a run to one file that samples on its own, to a checkpoint of the official code, or to the Hugging Face hub.

    The file holds the measurements on the run that the sampler, its grid and w need.

    Args:
        run: a run, or its name in `runs`.
        to: NAME.safetensors, one file; NAME.pt, as the official code reads it; or hf://OWNER/NAME.
        private: whether a repository that is made on the hub is private.
        ema: the average of the weights, as sample.ema.
        step: the step of the checkpoint, by default the newest, or that of `run`.
        settings: settings of sampling with dotted keys, stored in the file.
        runs: the folder of runs.

    Returns:
        The path or the web address, and a note if the autoencoder is not part of the file.

    Raises:
        UserError: before any upload, for a run that cannot be written so.
        WorkFailed: if the file cannot be written or the hub does not take it.
    """
    to = str(to)
    remote = to.startswith(SCHEME)
    if private and not remote:
        raise UserError("--private belongs to an upload: --to hf://OWNER/NAME.")
    if not remote and Path(to).suffix not in (".safetensors", ".pt"):
        raise UserError(f"--to {to}: give a .safetensors, a .pt for the official code, or hf://OWNER/NAME.")
    flags = {"ema": ema, "step": step, "settings": settings, "runs": runs}
    run = open_run(run, flags if isinstance(run, Run) else flags | {"device": "cpu"}, "export")
    if to.endswith(".pt"):
        return Exported(str(_write_official(run, Path(to))), ())
    if remote:
        parse_address(to)
    measured = {"sampler": run.config.sampler.bind(run), "diffusion": run.config.diffusion.bind(run)}
    run = run.with_settings(run.config.model_copy(update=measured))
    autoencoder, notes = run.config.autoencoder, ()
    if autoencoder.packed() is None and (weights := getattr(autoencoder, "path", None)):
        notes = (f"Latents are decoded by {weights} of the hub, which is named in the file, not held.",)
    if not remote:
        return Exported(str(_write_run(run, Path(to))), notes)
    with tempfile.TemporaryDirectory() as folder:
        file = _write_run(run, Path(folder) / HUB_FILE)
        return Exported(upload(file, card(run, to), to, private=private), notes)


def card(run: Run, address: str) -> str:
    """Return the README of a run on the hub: its components, and how to sample it."""
    config, fingerprints = run.config, f"training {run.identity}, data {run.data_description.fingerprint[:12]}"
    parts = ", ".join(label(part) for part in (config.interp, config.target, config.weight, config.backbone))
    return f"""---
library_name: sitkit
pipeline_tag: {"unconditional-image-generation" if run.data_description.is_image else "other"}
---

# {address.rpartition("/")[2]}

A scalable interpolant transformer trained by sitkit: {parts}, on {label(config.data)}, step {run.step}, weights {run.weights_name}.

```sh
sitkit sample {address} -n 64
```

```python
import sitkit

run = sitkit.load("{address}")
readings = run.field.read(x, t, y)  # velocity, score, data, noise
```

The settings are in the metadata of `{HUB_FILE}`. Fingerprints: {fingerprints}.
"""


def _write_official(run: Run, path: Path) -> Path:
    """Write the weights of a run as the official code reads them: torch.save of {"ema": state}.

    Raises UserError for a network that the official code does not have.
    """
    backbone = run.config.backbone
    if not isinstance(backbone, SiTBackbone) or backbone.time_scale != 1.0 or backbone.qk_norm:
        raise UserError(
            "The official code has no such network: it needs backbone 'sit' with time_scale 1 and no qk_norm."
        )
    with replacing(path) as file:
        torch.save({"ema": {name: tensor.cpu() for name, tensor in run.network.state_dict().items()}}, file)
    return path
