"""Checkpoints of published code as runs.

The official SiT has sitkit's parameter names, shapes, direction of time and signs, so its weights are not changed.  In
the other codes time runs from data to noise: REPA's is s - t with s = 1, DiT's timestep 999 - 1000 t.  A layer absorbs this:

    cos((s - t) f) = cos sf cos tf + sin sf sin tf,   sin((s - t) f) = sin sf cos tf - cos sf sin tf,
    a rotation of the features of t, so  W <- W R  in t_embedder.mlp.0.

REPA's velocity is noise - data: final_layer.linear changes its sign.  DiT predicts noise on the path of `ddpm`, with a
backbone of time_scale 1000; its variance outputs are kept and not read.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitkit.models.backbone import SiTBackbone
from sitkit.models.sit import MAX_PERIOD
from sitkit.registry import backbones, targets
from sitkit.runs.checkpoint import checkpoint_file
from sitkit.runs.config.sources import Layer, assemble
from sitkit.runs.run_folder import RunFolder, folder_of, write_config
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import save_tensors

INTERPOLANTS = {"linear": "linear", "gvp": "gvp", "vp": "vp-sbdm", "cosine": "gvp"}
LABEL_TABLE = "y_embedder.embedding_table.weight"
# The tensors whose shapes determine the architecture.
ARCHITECTURE_TENSORS = (
    "x_embedder.proj.weight",
    "pos_embed",
    "final_layer.linear.weight",
    LABEL_TABLE,
    "blocks.0.mlp.fc1.weight",
)
# Parts of names that torch.compile, DDP, FSDP and checkpointing add.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# The number of DiT's timesteps; the first has the least noise.
TIMESTEPS = 1000
VAE = "stabilityai/sd-vae-ft-"
VAE_FACTOR = 8
PROJECTORS = "projectors."


class Imported(NamedTuple):
    """The folder of the run, and notes on what the file left open."""

    folder: Path
    notes: tuple[str, ...]


def convert(
    checkpoint: str | Path,
    *,
    code: str | None = None,
    heads: int | None = None,
    classes: int | None = None,
    vae: str | None = None,
    runs: Path = Path("runs"),
) -> Imported:
    """Make a run of a published checkpoint (.pt of SiT, REPA, DiT or fast-DiT); it samples without its training data.

    Args:
        checkpoint: the file.  Nothing in it is executed.
        code: "sit", "repa" or "dit"; by default what the file says.
        heads: heads of attention; by default those of the preset with the same width and depth.
        classes: number of classes; by default what the file says, or one less than the label table has rows.
        vae: folder or hub name of the autoencoder that decodes latents, or "none"; by default the official one for
            states of four channels.
        runs: the folder of runs.

    Returns:
        The folder of the run, and a note for each decision that the file left open.

    Raises:
        UserError: for a file that is not such a checkpoint or holds anything but tensors and settings, and for a network
            that cannot be converted exactly.
    """
    path = Path(checkpoint)
    content = read_pickle(path)
    args = vars(content["args"]) if isinstance(content.get("args"), argparse.Namespace) else {}
    states = {k: v for k, v in content.items() if k in ("model", "ema") and isinstance(v, Mapping)} or {"ema": content}
    states = {kind: _tensors(state, path) for kind, state in states.items()}
    newest = "ema" if "ema" in states else "model"
    for name in ARCHITECTURE_TENSORS:
        if name not in states[newest]:
            raise UserError(f"{path}: no SiT network: it has no {name}.")
    projectors = any(name.startswith(PROJECTORS) for state in states.values() for name in state)
    published = CODES[_code_of(path, code, args, projectors)]
    notes = [f"{path.name}: read as a checkpoint of {published.title}."]
    if projectors:
        notes.append("REPA's projectors are left out: only its training needs them.")
    states = {kind: {n: t for n, t in s.items() if not n.startswith(PROJECTORS)} for kind, s in states.items()}
    backbone, shape = _architecture(states[newest], heads, path)
    table = _label_table(path, len(states[newest][LABEL_TABLE]), classes, args)
    states = {kind: table.complete(state) for kind, state in states.items()}
    backbone |= table.fields
    notes += table.notes
    settings, remarks = published.settings(path, args)
    notes += remarks
    if vae is None and shape[0] == 4:
        vae = VAE + str(args.get("vae", "ema"))
    elif shape[0] == 4 and vae == "none":
        notes.append("without an autoencoder the samples are latents.")
    config = assemble([_layer(path, runs, backbone, shape, table.classes, vae), Layer(settings)])
    with torch.device("meta"):
        network = config.backbone.build(shape, table.classes)
    for state in states.values():
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise UserError(f"{path}: no SiT network: {str(error).splitlines()[-1].strip()}") from None
    states = {kind: published.weights(state) for kind, state in states.items()}
    folder = folder_of(config)
    step = int(content["steps"]) if isinstance(content.get("steps"), int) else 0
    tensors = {f"ema.{name}": t for name, t in states[newest].items()}
    tensors |= {f"model.{name}": t for name, t in states.get("model", states[newest]).items()}
    header = {"format": 1, "step": step, "config": config.plain(), "origin": path.name}
    save_tensors(checkpoint_file(RunFolder(folder).checkpoints, step), tensors, header)
    write_config(folder, config)
    return Imported(folder, tuple(notes))


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a file of torch.save: tensors, plain values and argparse.Namespace.  Raises UserError for anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if start[:4] != b"PK\x03\x04" and start[:1] != b"\x80":
        # For example a page of HTML, a pointer of Git LFS, or an empty file.
        raise UserError(f"{path} is no file of torch.save: it begins with {start!r}. Was it downloaded whole?")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        request = re.search(r"(?:GLOBAL|Unsupported (?:class|global):?) ([\w.]+)", str(error))
        raise UserError(
            f"{path} is refused: its pickle asks for {request[1] if request else 'code'}, and only tensors, plain values and "
            "argparse.Namespace are read. Nothing in it was run."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        # The first sentence of torch's message; the rest guesses.
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"{path} is no file of torch.save, or is cut short: {reason}.") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint or the state of a network.")
    return dict(content)


def _tensors(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None or not state:
        raise UserError(f"{path} holds no state of a network: {wrong!r} is no tensor.")
    tensors = {_unwrapped(name): tensor.float() for name, tensor in state.items()}
    if len(tensors) < len(state):
        twice = next(name for name in tensors if sum(_unwrapped(other) == name for other in state) > 1)
        raise UserError(f"{path} holds {twice} twice, with and without the prefix of a wrapper.")
    return tensors


def _unwrapped(name: str) -> str:
    """Return the name of a tensor in the network itself, without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _code_of(path: Path, code: str | None, args: Mapping[str, Any], projectors: bool) -> str:
    if code not in (None, *CODES):
        raise UserError(f"--from {code}: known are {', '.join(CODES)}.")
    model = str(args.get("model", "")) or path.name
    named = next((known for known in ("sit", "dit") if model.lower().startswith(known)), None)
    code = code or ("repa" if projectors or "enc_type" in args else named)
    if code is None:
        raise UserError(
            f"{path} does not say which code it is of, and they have the same names: add --from sit, repa or dit."
        )
    return code


def _architecture(state: Mapping[str, Tensor], heads: int | None, path: Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return (fields of the backbone, shape of the states) by the shapes of the tensors."""
    patches, positions, head, table, fc1 = (state[name] for name in ARCHITECTURE_TENSORS)
    axes = (patches.ndim, positions.ndim, head.ndim, table.ndim, fc1.ndim)
    if axes != (4, 3, 2, 2, 2):
        raise UserError(f"{path}: no SiT network: its tensors have {axes} axes where a SiT's have (4, 3, 2, 2, 2).")
    hidden, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    side = math.isqrt(positions.shape[1])
    # The highest number of a block; the check of all names reports a missing one.
    depth = 1 + max(int(block[1]) for name in state if (block := re.match(r"blocks\.(\d+)\.", name)))
    if any(".q_norm." in name for name in state):
        raise UserError(f"{path}: its queries and keys are normalised by LayerNorm, and sitkit's qk_norm is RMSNorm.")
    for name in backbones.presets():
        preset = backbones.create(name)
        if isinstance(preset, SiTBackbone) and (preset.hidden_size, preset.depth) == (hidden, depth):
            heads = heads or preset.num_heads
    if heads is None:
        raise UserError(
            f"{path}: of width {hidden} and depth {depth} no preset is known: add --heads N, which the tensors do not determine."
        )
    fields = {
        "name": "sit", "patch_size": patch, "hidden_size": hidden, "depth": depth, "num_heads": heads,
        "mlp_ratio": _ratio(fc1.shape[0], hidden), "learn_sigma": head.shape[0] == 2 * patch * patch * channels,
    }  # fmt: skip
    return fields, (channels, side * patch, side * patch)


def _ratio(inner: int, hidden: int) -> float:
    """Return the ratio of two widths for which int(hidden * ratio) is the inner width."""
    ratio = inner / hidden
    # The product of a rounded ratio may lie just below the whole number.
    return ratio if int(hidden * ratio) == inner else math.nextafter(ratio, math.inf)


class LabelTable(NamedTuple):
    """What a label table of a file means: the number of classes, and whether it has the row of the null class.

    `fields` are those of the backbone that follow, `notes` are for the reader.
    """

    classes: int
    null_row: bool
    fields: dict[str, float]
    notes: tuple[str, ...]

    def complete(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors with a row of zeros for the null class, if there is none: it is never read."""
        if self.null_row:
            return state
        rows = state[LABEL_TABLE]
        return state | {LABEL_TABLE: torch.cat([rows, rows.new_zeros(1, rows.shape[1])])}


def _label_table(path: Path, rows: int, asked: int | None, args: Mapping[str, Any]) -> LabelTable:
    """Return what a label table with that number of rows means: the caller decides, else the file, else rows - 1 classes."""
    stated = args.get("num_classes")
    # REPA states the probability with which its training drops a label; without it the table has no row for no label.
    dropout = args.get("cfg_prob")
    classes = stated if asked is None and isinstance(stated, int) else asked
    if classes is None and dropout == 0:
        classes = rows
    if classes is None:
        note = f"the file does not say how many classes it has: {rows} label rows are {rows - 1} classes and no label."
        return LabelTable(rows - 1, True, {}, (f"{note} Without a row for no label, add --classes {rows}.",))
    if classes not in (rows - 1, rows):
        who = "--classes says" if asked is not None else "its settings say"
        raise UserError(
            f"{path}: its label table has {rows} rows and {who} {classes} classes: "
            f"add --classes {rows - 1}, with a row for no label, or --classes {rows}, without."
        )
    if classes == rows:
        note = "no row for no label (trained without label dropout): guidance and labels 'none' are refused."
        return LabelTable(classes, False, {"class_dropout": 0.0}, (f"its label table has {note}",))
    return LabelTable(classes, True, {"class_dropout": dropout} if isinstance(dropout, (int, float)) else {}, ())


def _layer(
    path: Path, runs: Path, backbone: Mapping[str, Any], shape: tuple[int, ...], classes: int, vae: str | None
) -> Layer:
    """Return the settings that follow from the tensors and the flags."""
    autoencoder: dict[str, Any] = {"name": "identity"}
    if vae not in (None, "none"):
        autoencoder = {"name": "sd-vae", "path": vae}
        shape = (3, shape[1] * VAE_FACTOR, shape[2] * VAE_FACTOR)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
    data = {
        "name": "absent", "shape": list(shape), "num_classes": classes, "origin": f"{path.name} {digest}", "holdout": 0,
    }  # fmt: skip
    return Layer({"backbone": dict(backbone), "autoencoder": autoencoder, "data": data, "run": {"folder": str(runs)}})


def _stated_path(path: Path, args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (settings, notes) by the arguments that SiT and REPA store."""
    kind, prediction = str(args.get("path_type", "linear")).lower(), str(args.get("prediction", "velocity"))
    if kind not in INTERPOLANTS:
        raise UserError(f"{path}: its path {kind!r} is unknown here; known: {', '.join(INTERPOLANTS)}.")
    target = "velocity" if prediction == "v" else prediction
    if target not in targets:
        raise UserError(f"{path}: its prediction {prediction!r} is unknown here; known: v, {', '.join(targets)}.")
    missing = [key for key in ("path_type", "prediction") if key not in args]
    note = f"the file does not say {' and '.join(missing)}: linear and velocity are assumed, as in the published ones."
    return {"interp": INTERPOLANTS[kind], "target": target}, [note] * bool(missing)


def _ddpm(path: Path, args: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return (settings, notes) of DiT."""
    note = "noise prediction on DDPM's linear betas, 1,000 levels: interpolant ddpm."
    return {"interp": "ddpm", "target": "noise", "backbone": {"time_scale": TIMESTEPS}}, [note]


def _turned(state: Mapping[str, Tensor], s: float) -> dict[str, Tensor]:
    """Return the weights of the network (x, t) -> network(x, s - t)."""
    w = state["t_embedder.mlp.0.weight"].double()
    half = w.shape[1] // 2
    angle = s * torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float64) / half)
    cos, sin = w[:, :half], w[:, half:]
    turned = [cos * angle.cos() + sin * angle.sin(), cos * angle.sin() - sin * angle.cos()]
    return {**state, "t_embedder.mlp.0.weight": torch.cat(turned, 1).float()}


def _negated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the network of opposite sign."""
    return {**state, **{name: -state[name] for name in ("final_layer.linear.weight", "final_layer.linear.bias")}}


class PublishedCode(NamedTuple):
    """A published code: its title, its settings (path, args) -> (settings, notes), and its weights in sitkit's network."""

    title: str
    settings: Callable[[Path, Mapping[str, Any]], tuple[dict[str, Any], list[str]]]
    weights: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


CODES = {
    "sit": PublishedCode("SiT", _stated_path, dict),
    "repa": PublishedCode("REPA", _stated_path, lambda state: _negated(_turned(state, 1))),
    "dit": PublishedCode("DiT", _ddpm, lambda state: _turned(state, TIMESTEPS - 1)),
}
