"""Checkpoints of published code as runs; runs as theirs, as one file, and on the Hugging Face hub.

The official SiT has sitkit's parameter names, shapes, direction of time and signs, so its weights are taken as they are.
Elsewhere time runs from data to noise: REPA's is s - t with s = 1, DiT's timestep 999 - 1000 t.  A layer absorbs that:

    cos((s - t) f) = cos sf cos tf + sin sf sin tf,   sin((s - t) f) = sin sf cos tf - cos sf sin tf,
    a rotation of the features of t, so  W <- W R  in t_embedder.mlp.0.

REPA's velocity is noise - data: final_layer.linear changes its sign.  DiT predicts noise on the path of `ddpm`, with a
backbone of time_scale 1000; what it learnt of the variance is kept and not read.

Sources: Ma et al. 2024 (SiT, arXiv 2401.08740), Yu et al. 2024 (REPA, arXiv 2410.06940), Peebles and Xie 2022 (DiT, arXiv
2212.09748), Jin and Xie 2024 (fast-DiT), with their code.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitkit.models.backbone import SiTBackbone
from sitkit.models.sit import MAX_PERIOD
from sitkit.registry import backbones, targets
from sitkit.runs.checkpoint import checkpoint_file
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import Layer, assemble
from sitkit.runs.run import folder_of, write_config
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import save_tensors

INTERPOLANTS = {"linear": "linear", "gvp": "gvp", "vp": "vp-sbdm", "cosine": "gvp"}
CODES = {"sit": "SiT", "repa": "REPA", "dit": "DiT"}
# The tensors that tell the architecture.
ARCHITECTURE_TENSORS = (
    "x_embedder.proj.weight", "pos_embed", "final_layer.linear.weight", "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
)  # fmt: skip
# DiT's timesteps, of which the first is the least noise.
TIMESTEPS = 1000
VAE = "stabilityai/sd-vae-ft-"
VAE_FACTOR = 8


class Imported(NamedTuple):
    """The folder of the run, and what was decided on the way, a line each."""

    folder: Path
    notes: tuple[str, ...]


def import_checkpoint(
    path: Path, runs: Path, source: str | None = None, heads: int | None = None, vae: str | None = None
) -> Imported:
    """A run of a .pt file of SiT, REPA, DiT or fast-DiT, under `runs`: it samples, without the data it was trained on.

    source: "sit", "repa" or "dit", by default as the file tells.  heads: of attention, by default the preset's of that width and
    depth.  vae: folder or hub name of the autoencoder that decodes latents, or "none"; by default the official one for
    four channels.  Raises UserError for a file that is no such checkpoint, holds anything but tensors and settings
    (nothing in it is run), or is of a network that cannot be taken exactly.
    """
    held = read_pickle(path)
    args = vars(held["args"]) if isinstance(held.get("args"), argparse.Namespace) else {}
    states = {k: v for k, v in held.items() if k in ("model", "ema") and isinstance(v, Mapping)} or {"ema": held}
    states = {kind: _tensors(state, path) for kind, state in states.items()}
    for name in ARCHITECTURE_TENSORS:
        if name not in newest_of(states):
            raise UserError(f"{path}: no SiT network: it has no {name}.")
    source = _source(path, source, args, states)
    notes = [f"{path.name}: read as a checkpoint of {CODES[source]}."]
    dropped = sorted({name.partition(".")[0] for s in states.values() for name in s if name.startswith("projectors.")})
    if dropped:
        notes.append("REPA's projectors are left out: they serve its training alone.")
    states = {kind: {n: t for n, t in s.items() if not n.startswith("projectors.")} for kind, s in states.items()}
    backbone, shape, classes = _architecture(newest_of(states), heads, path)
    if source == "dit":
        backbone |= {"time_scale": TIMESTEPS}
    missing = [key for key in ("path_type", "prediction") if key not in args]
    if source == "dit":
        notes.append("noise prediction on DDPM's linear betas, 1,000 levels: interpolant ddpm.")
    elif missing:
        notes.append(f"the file does not say {' and '.join(missing)}: taken for linear, velocity, as those published.")
    config = _config(path, runs, source, args, backbone, shape, classes, vae)
    if config.autoencoder.name == "identity" and shape[0] == 4:
        notes.append("without an autoencoder the samples are latents.")
    network = blank_network(config)
    for state in states.values():
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{path}: no SiT network: {str(error).splitlines()[-1].strip()}") from None
    if source == "repa":
        states = {kind: _negated(_turned(state, 1)) for kind, state in states.items()}
    elif source == "dit":
        states = {kind: _turned(state, TIMESTEPS - 1) for kind, state in states.items()}
    folder = folder_of(config)
    step = int(held["steps"]) if isinstance(held.get("steps"), int) else 0
    tensors = {f"ema.{name}": t for name, t in newest_of(states).items()}
    tensors |= {f"model.{name}": t for name, t in states.get("model", newest_of(states)).items()}
    header = {"format": 1, "step": step, "config": config.plain(), "origin": path.name}
    save_tensors(checkpoint_file(RunFolder(folder).checkpoints, step), tensors, header)
    write_config(folder, config)
    return Imported(folder, tuple(notes))


def newest_of(states: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The averaged weights where there are some, else the only ones."""
    return states["ema"] if "ema" in states else states["model"]


def blank_network(config: Config) -> torch.nn.Module:
    """The network of a configuration, on no device: to check names and shapes against."""
    with torch.device("meta"):
        data: Any = config.data
        side = [s // VAE_FACTOR for s in data.shape[1:]] if config.autoencoder.name == "sd-vae" else data.shape[1:]
        channels = 4 if config.autoencoder.name == "sd-vae" else data.shape[0]
        return config.backbone.build((channels, *side), data.num_classes)


def read_pickle(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors, plain values and argparse.Namespace; anything else is refused, unrun."""
    try:
        with path.open("rb") as file:
            begins = file.read(40)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if begins[:4] != b"PK\x03\x04" and begins[:1] != b"\x80":
        # A page of HTML in the file's place, a pointer of Git LFS, nothing at all.
        raise UserError(f"{path} is no file of torch.save: it begins with {begins!r}. Was it downloaded whole?")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?) ([\w.]+)", str(error))
        raise UserError(
            f"{path} is refused: its pickle asks for {asked[1] if asked else 'code'}, and only tensors, plain values and "
            "argparse.Namespace are read. Nothing in it was run."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        # Of torch's words the first sentence: the rest guesses.
        told = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{path} is no file of torch.save, or is cut short: {told}.") from None
    if not isinstance(held, Mapping):
        raise UserError(f"{path} holds a {type(held).__name__}, not a checkpoint or the state of a network.")
    return dict(held)


def _tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None or not state:
        raise UserError(f"{path} holds no state of a network: {wrong!r} is no tensor.")
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}


def _source(path: Path, asked: str | None, args: Mapping[str, Any], states: Mapping[str, Mapping[str, Tensor]]) -> str:
    if asked not in (None, *CODES):
        raise UserError(f"--from {asked}: known are {', '.join(CODES)}.")
    model = str(args.get("model", "")) or path.name
    repa = any(name.startswith("projectors.") for state in states.values() for name in state) or "enc_type" in args
    told = "repa" if repa else next((code for code in ("sit", "dit") if model.lower().startswith(code)), None)
    if asked is None and told is None:
        raise UserError(
            f"{path} does not say which code it is of, and they have the same names: add --from sit, repa or dit."
        )
    return asked or str(told)


def _architecture(
    state: Mapping[str, Tensor], heads: int | None, path: Path
) -> tuple[dict[str, Any], tuple[int, ...], int]:
    """(fields of the backbone, shape of the states, number of classes), read off the shapes of the tensors."""
    patches, positions, head, table, fc1 = (state[name] for name in ARCHITECTURE_TENSORS)
    axes = (patches.ndim, positions.ndim, head.ndim, table.ndim, fc1.ndim)
    if axes != (4, 3, 2, 2, 2):
        raise UserError(f"{path}: no SiT network: its tensors have {axes} axes where a SiT's have (4, 3, 2, 2, 2).")
    hidden, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    side = math.isqrt(positions.shape[1])
    # Of a block that is missing the depth tells, and the check of all names then says which.
    depth = 1 + max(int(block[1]) for name in state if (block := re.match(r"blocks\.(\d+)\.", name)))
    if any(".q_norm." in name for name in state):
        raise UserError(f"{path}: its queries and keys are normalised by LayerNorm, and sitkit's qk_norm is RMSNorm.")
    for name in backbones.presets():
        preset = backbones.create(name)
        if isinstance(preset, SiTBackbone) and (preset.hidden_size, preset.depth) == (hidden, depth):
            heads = heads or preset.num_heads
    if heads is None:
        raise UserError(
            f"{path}: of width {hidden} and depth {depth} no preset is known: add --heads N, which no tensor tells."
        )
    fields = {
        "name": "sit", "patch_size": patch, "hidden_size": hidden, "depth": depth, "num_heads": heads,
        "mlp_ratio": fc1.shape[0] / hidden, "learn_sigma": head.shape[0] == 2 * patch * patch * channels,
    }  # fmt: skip
    return fields, (channels, side * patch, side * patch), table.shape[0] - 1


def _config(
    path: Path, runs: Path, source: str, args: Mapping[str, Any], backbone: Mapping[str, Any],
    shape: tuple[int, ...], classes: int, vae: str | None,
) -> Config:  # fmt: skip
    kind, prediction = str(args.get("path_type", "linear")).lower(), str(args.get("prediction", "velocity"))
    if kind not in INTERPOLANTS:
        raise UserError(f"{path}: its path {kind!r} is unknown here; known: {', '.join(INTERPOLANTS)}.")
    if vae is None and shape[0] == 4:
        vae = VAE + str(args.get("vae", "ema"))
    autoencoder: dict[str, Any] = {"name": "identity"}
    if vae not in (None, "none"):
        autoencoder = {"name": "sd-vae", "path": vae}
        shape = (3, shape[1] * VAE_FACTOR, shape[2] * VAE_FACTOR)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    data = {
        "name": "absent",
        "shape": list(shape),
        "num_classes": classes,
        "origin": f"{path.name} {digest}",
        "holdout": 0,
    }
    path_of, target = INTERPOLANTS[kind], "velocity" if prediction == "v" else prediction
    if target not in targets:
        raise UserError(f"{path}: its prediction {prediction!r} is unknown here; known: v, {', '.join(targets)}.")
    if source == "dit":
        path_of, target = "ddpm", "noise"
    values = {
        "interp": path_of, "target": target, "backbone": dict(backbone),
        "autoencoder": autoencoder, "data": data, "run": {"folder": str(runs)},
    }  # fmt: skip
    return assemble([Layer(values)])


def _turned(state: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    """The weights for which network(x, t) is network'(x, s - t) of those given."""
    w = state["t_embedder.mlp.0.weight"].double()
    half = w.shape[1] // 2
    angle = s * torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = w[:, :half], w[:, half:]
    turned = [cos * angle.cos() + sin * angle.sin(), cos * angle.sin() - sin * angle.cos()]
    return {**state, "t_embedder.mlp.0.weight": torch.cat(turned, 1).float()}


def _negated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the network of opposite sign."""
    return {**state, **{name: -state[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}}
