"""What a run is: a folder with its configuration, curves, checkpoints, samples and evaluations.

A run is a folder runs/<slug>-<training identity>/, whose files `sitkit.runs.run_folder` names, or one file that
`sitkit convert` wrote, whose samples and evaluations go to runs/<slug>-<digest of its weights>/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sitkit.data.dataset import Examples, load_examples
from sitkit.data.described import from_description
from sitkit.models.autoencoder import modelled_shape, prepare_data
from sitkit.runs import averages, diagnostics
from sitkit.runs.checkpoint import checkpoints, latest_checkpoint, step_of
from sitkit.runs.config.identity import slug, training_identity
from sitkit.runs.config.mappings import merge
from sitkit.runs.config.sampling_presets import read_preset
from sitkit.runs.config.schema import TRAINING_KEYS, Config
from sitkit.runs.config.sources import (
    SAMPLING_SETTINGS,
    Layer,
    SamplingFlags,
    flags_to_layer,
    locate,
    require_flags,
    to_yaml,
    validate,
)
from sitkit.runs.one_file import SCHEME, download, read_run_header, settings_of_file, weights_name, weights_of_file
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.distributed import device_of
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.files import read_json, write_file
from sitkit.runtime.tensors import load_tensors, read_header
from sitkit.transport.field import Field


@dataclass(frozen=True)
class Run:
    """A trained run: its configuration, its network (EMA unless asked otherwise) and the field that reads it.

    folder: where its samples and evaluations go.  file: the one file that it was loaded from, if it was.
    """

    folder: Path
    config: Config
    step: int
    network: nn.Module
    field: Field
    file: Path | None = None

    @property
    def identity(self) -> str:
        """What determines the weights."""
        return training_identity(self.config)

    @property
    def source(self) -> Path:
        """What it was loaded from, as `load` takes it: its folder, or the one file."""
        return self.file or self.folder

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.field.device

    @property
    def weights_name(self) -> str:
        """Which weights the network has, as names of files say it: "ema", "raw", or "ema-0.05" where one was chosen."""
        return weights_name(self.config)

    @property
    def examples(self) -> Examples:
        """The data set that the run was trained on.  Raises UserError where it is gone, or is another one by now."""
        found, known = load_examples(self.config.data), _described(self.source)
        if known is not None and known["fingerprint"] != found.fingerprint:
            raise UserError(f"The data of {self.source} changed since it was trained: bring back the old ones.")
        return found

    @functools.cached_property
    def data_description(self) -> Examples:
        """What sampling must know of the data, which may be gone; points are read where they can be, to be drawn over."""
        return data_description(self.source, self.config)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what the network models."""
        return modelled_shape(self.config.autoencoder, self.data_description)

    def velocity_losses(self) -> tuple[tuple[float, float], ...]:
        """Return (t, L_t) pairs of the velocity loss, measured once on held-out data."""
        return diagnostics.velocity_losses(self)

    def path_curvature(self) -> tuple[tuple[float, float], ...]:
        """Return (t, |x''(t)|) pairs of the paths of the unguided flow, measured once."""
        return diagnostics.curvatures(self)

    def load_field(self, name: str, step: int, weights: Literal["ema", "raw"]) -> Field:
        """Return the field of another run, which lies beside this one, at a step and with "ema" or "raw" weights.

        Raises:
            UserError: for a name that is not the run's full name, and for a run that models states of another shape.
        """
        other = load(name, step=step, weights=weights, device=str(self.device), root=self.folder.parent)
        if other.folder.name != Path(name).name:
            # A short name could mean another run tomorrow, and the samples' identity would not change with it.
            raise UserError(f"guidance.run must name the run in full: {other.folder.name}, not {name!r}.")
        if other.shape != self.shape:
            raise UserError(f"guidance.run {name!r} models states of shape {other.shape}, this run {self.shape}.")
        return other.field

    def with_settings(self, over: Layer | Config) -> Run:
        """Return this run with other settings of sampling and evaluation.

        The weights are read again, of the same step and onto the same device, if sample.weights or sample.ema changed.

        Args:
            over: settings on top of the run's own, or a whole configuration that names the same training.

        Raises:
            UserError: for a setting that the training fixed, and for weights that the run neither keeps nor can rebuild.
        """
        config = _changed(self.source, self.config, over)
        run = dataclasses.replace(self, config=config)
        if run.weights_name == self.weights_name or not config.backbone.trainable:
            return run
        _, network = _read_network(self.source, config, self.data_description, self.step, str(self.device))
        return dataclasses.replace(run, network=network, field=dataclasses.replace(self.field, network=network))


def data_description(source: Path, config: Config) -> Examples:
    """The data of a run's folder or file as far as they are described there; the data themselves where they are not."""
    known = _described(source)
    if known is None:
        return load_examples(config.data)
    if len(known["shape"]) != 3:
        with contextlib.suppress(UserError):
            return load_examples(config.data)
    return from_description(known, str(getattr(config.data, "path", config.data.name)))


def _described(source: Path) -> dict[str, Any] | None:
    if source.is_file():
        return read_run_header(source)["data"]
    path = RunFolder(source).data
    return read_json(path) if path.is_file() else None


def folder_of(config: Config) -> Path:
    """Where the run of a configuration lives."""
    return config.run.folder / f"{slug(config)}-{training_identity(config)}"


def fingerprints(config: Config) -> dict[str, str]:
    """What a run depends on that its configuration only points to: the data, and an autoencoder's weights.

    Raises UserError for examples that the autoencoder cannot take.
    """
    data = prepare_data(config.data, config.autoencoder)
    return {"data": data.examples.fingerprint, "autoencoder": config.autoencoder.fingerprint()}


def check_unchanged(folder: Path, marks: Mapping[str, str]) -> None:
    """Raise UserError where a run was begun with data or an autoencoder of other fingerprints than `marks`."""
    recorded = RunFolder(folder).read_environment()
    for what, mark in marks.items():
        if recorded.get(what, mark) != mark:
            raise UserError(
                f"The {what} of {folder} changed since it was begun: give the old {what}, or remove the folder."
            )


def use_threads(config: Config) -> None:
    """Let torch use run.threads threads on a CPU, if set; otherwise as many as it likes."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def build_network(config: Config, seed: int | None = None, known: Examples | None = None) -> nn.Module:
    """The network of a configuration, with its initial weights drawn from the training seed.

    known: what is known of the data, enough for a network that is trained; by default they are loaded.
    """
    data = known if known is not None and config.backbone.trainable else load_examples(config.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed if seed is None else seed)
        network = config.backbone.build(modelled_shape(config.autoencoder, data), data.num_classes)
    return config.backbone.prepare(network, interpolant=config.interp, target=config.target, examples=data)


def write_config(folder: Path, config: Config) -> None:
    """config.yaml: every setting resolved."""
    write_file(RunFolder(folder).config, to_yaml(config.plain()))


def find_run(name: str | Path, root: Path) -> Path:
    """The folder of a run by path, by name, by the start of its identity, or "latest".

    Raises UserError that names the nearest run, or how to make one.
    """
    path = Path(name)
    if RunFolder(path).config.is_file():
        return path
    if path.is_file():
        read_run_header(path)  # Raises for a pickle, a damaged file, a checkpoint, or one that is not of sitkit.
        raise UserError(f"{path} is a run in one file, and this needs a run's folder.")
    if path.suffix == ".safetensors":
        raise UserError(f"There is no file {path}.")
    known = {run.name: run for run in run_folders(root)}
    if str(name) == "latest" and known:
        return max(known.values(), key=lambda run: RunFolder(run).config.stat().st_mtime)
    if path.name in known and path.parent in (Path(), root):
        return known[path.name]
    short = [run for run in known.values() if run.name.rpartition("-")[2].startswith(str(name))]
    if len(short) == 1:
        return short[0]
    if not known:
        raise UserError(f"There are no runs in {root}: make one with `sitkit train`.")
    if len(short) > 1:
        raise UserError(f"{str(name)!r} is the start of several runs: {', '.join(run.name for run in short)}.")
    near = suggest(path.name, [*known, "latest"])
    raise UserError(f"No run {str(name)!r} in {root}.{near} `sitkit runs` lists them; 'latest' is the newest.")


def run_folders(root: Path) -> list[Path]:
    """The run folders under a root, by name."""
    return sorted(path.parent for path in Path(root).glob("*/config.yaml"))


def located(name: str | Path, root: Path) -> Path:
    """What a run is loaded from: the one file that has this path or lies on the hub (hf://owner/name), else a folder.

    Raises UserError as `find` does, and where the hub has no such file or cannot be reached.
    """
    if str(name).startswith(SCHEME):
        return download(str(name))
    if Path(name).is_file():
        read_run_header(Path(name))
        return Path(name)
    return find_run(name, root)


def read_config_of(source: Path) -> Config:
    """The configuration written in a run's folder, or in its one file.

    Raises UserError that names what is missing or wrong in it, and the package that a component came from.
    """
    from sitkit.runs.config.sources import read_yaml

    layer = Layer(settings_of_file(source)) if source.is_file() else read_yaml(RunFolder(source).config)
    try:
        return validate(Config, layer.values, layer.where)
    except UserError as error:
        raise UserError(f"{error}{_from_a_package(source, str(error))}", error.path) from None


def _from_a_package(source: Path, message: str) -> str:
    """Where the component that a message misses came from when the run was made, and how to have it again."""
    made = read_run_header(source) if source.is_file() else RunFolder(source).read_environment()
    for component, package in made.get("components", {}).items():
        kind, _, name = component.partition(" ")
        if f"No {kind} named {name!r}." in message:
            return f" {source.name} was made with {package}: pip install {package.replace(' ', '==')}"
    return ""


def load(
    run: str | Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    ema: float | None = None,
    step: int | None = None,
    device: str = "auto",
    settings: Layer | Config | Mapping[str, Any] | None = None,
    root: str | Path = "runs",
) -> Run:
    """Load a trained run: its configuration, its network, and the field that reads the network.

    Its data need not be there.

    Args:
        run: a folder, a name, an identity or its beginning, "latest", one file, or hf://owner/name.
        weights: "ema" (the first average) or "raw"; by default what sample.weights and sample.ema say.
        ema: the decay of a stored average, or the relative width of one to rebuild.
        step: the step of the checkpoint, by default the newest.
        device: "cpu", "cuda", "cuda:1", or "auto".
        settings: settings of sampling and evaluation, by dotted key.
        root: the folder of runs.

    Raises:
        UserError: for a run that is not there, has no checkpoint yet or a damaged one, and for a setting that its
            training fixed.
    """
    source = located(run, Path(root))
    config = read_config_of(source)
    if source.is_file():
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": Path(root)})})
    use_threads(config)
    if settings is not None or ema is not None:
        if not isinstance(settings, (Layer, Config)):
            settings = flags_to_layer({"ema": ema}, settings, SAMPLING_SETTINGS)
        config = _changed(source, config, settings)
    if weights is not None:
        chosen = config.sample.model_copy(update={"weights": weights, "ema": None})
        config = config.model_copy(update={"sample": chosen})
    known = data_description(source, config)
    at, network = _read_network(source, config, known, step, device)
    field, file = Field(network, config.interp, config.target, known.num_classes), None
    if source.is_file():
        weights_id = read_run_header(source)["fingerprints"]["weights"][:12]
        source, file = Path(root) / f"{slug(config)}-{weights_id}", source
    return Run(source, config, at, network, field, file)


def open_run(run: Run | str | Path, flags: Mapping[str, Any], verb: str) -> Run:
    """Return a run with the settings that the keyword arguments of a verb make; `flags` as in `SamplingFlags`."""
    require_flags(flags, SamplingFlags, verb)
    flags = dict(flags)
    preset, settings, step = (flags.pop(name, None) for name in ("preset", "settings", "step"))
    root = Path(flags.pop("runs", None) or "runs")
    layer = flags_to_layer(flags, settings, SAMPLING_SETTINGS)
    if preset is not None:
        base = read_preset(run.folder if isinstance(run, Run) else find_run(run, root), preset)
        layer = Layer(merge(base.values, layer.values), base.where | layer.where)
    device = flags.get("device")
    if not isinstance(run, Run):
        return load(run, settings=layer, root=root, step=step, device=device or "auto")
    if step in (None, run.step) and device in (None, str(run.device)):
        return run.with_settings(layer) if layer.values else run
    # Another checkpoint or device: the settings that the run has now stay below the new ones.
    settings, at = sampling_config(run.config, layer), run.step if step is None else step
    return load(run.source, settings=settings, root=run.folder.parent, step=at, device=device or str(run.device))


@dataclass(frozen=True)
class RunSummary:
    """A line of `sitkit runs`: how far the training of a run is, and its numbers.

    Attributes:
        folder: the folder of the run.
        step, steps: the step of the newest checkpoint, and the steps of the whole training.
        samplings, evaluations: the number of sample sets and of evaluations on disk.
        values: (metric, value) of the first three evaluations.
    """

    folder: Path
    step: int
    steps: int
    samplings: int
    evaluations: int
    values: tuple[tuple[str, float], ...]


def list_runs(root: str | Path = "runs") -> list[RunSummary]:
    """Return a summary of each run in a folder, sorted by name.

    Args:
        root: the folder of runs.

    Raises:
        UserError: for a run whose configuration cannot be read.
    """
    summaries = []
    for folder in run_folders(Path(root)):
        saved = checkpoints(RunFolder(folder).checkpoints)
        records = [read_json(path) for path in sorted(RunFolder(folder).evaluations.glob("*.json"))]
        values = [(r["metric"]["name"], float(r["value"])) for r in records if {"value", "metric"} <= r.keys()]
        summaries.append(
            RunSummary(
                folder=folder,
                step=step_of(saved[-1]) if saved else 0,
                steps=read_config_of(folder).train.steps,
                samplings=len(list(folder.glob("samples/*/record.json"))),
                evaluations=len(records),
                values=tuple(values[:3]),
            )
        )
    return summaries


def _changed(source: Path, config: Config, over: Layer | Config) -> Config:
    """The configuration of a run with other settings.  Raises UserError for a setting that the training fixed."""
    if isinstance(over, Config):
        own, plain, where = config.plain(), over.plain(), {}
        fixed = [key for key in TRAINING_KEYS if plain[key] != own[key]]
    else:
        fixed, where = [key for key in TRAINING_KEYS if key in over.values], over.where
    if fixed:
        raise UserError(
            f"{locate(where, fixed[:1])}{fixed[0]} was fixed when {source} was trained: train another run with it."
        )
    return over if isinstance(over, Config) else sampling_config(config, over)


def _read_network(
    source: Path, config: Config, known: Examples, step: int | None, device: str
) -> tuple[int, nn.Module]:
    """(step, network on the device) with the weights that config.sample names."""
    network, at = build_network(config, known=known), 0
    if not source.is_file():
        check_unchanged(source, {"autoencoder": config.autoencoder.fingerprint()})
    if config.backbone.trainable:
        at, state, path = load_weights(source, config, step)
        _fill(network, state, path)
    return at, network.to(device_of(device)).eval().requires_grad_(False)


def start_from(network: nn.Module, name: str, root: Path) -> None:
    """Give a network the EMA weights of another run, the newest it has.

    Raises UserError for a run that is not there, that is not named in full, or whose network has other weights.
    """
    folder = find_run(name, root)
    if folder.name != Path(name).name:
        # A short name could mean another run tomorrow, and the training's identity would not change with it.
        raise UserError(f"train.init must name the run in full: {folder.name}, not {name!r}.")
    config = read_config_of(folder)
    sample = config.sample.model_copy(update={"weights": "ema", "ema": None})
    _, state, source = load_weights(folder, config.model_copy(update={"sample": sample}), None)
    _fill(network, state, source, "that train.init is to start")


def sampling_config(config: Config, over: Layer) -> Config:
    """Return a configuration with settings of sampling and evaluation on top.  Raises UserError with file, line and reason."""
    values = merge(config.plain(), over.values)
    if "sampler" in over.values and "diffusion" not in over.values and "name" in values["sampler"]:
        # Another kind of sampler takes its own default w, as it would from the start.
        changed = values["sampler"]["name"] != config.sampler.name
        values = {k: v for k, v in values.items() if not (changed and k == "diffusion")}
    return validate(Config, values, over.where)


def checkpoint_at(folder: Path, step: int | None = None) -> Path:
    """The newest whole checkpoint of a run, or the one at a step."""
    found = checkpoints(RunFolder(folder).checkpoints)
    if step is not None:
        for path in found:
            if step_of(path) == step:
                return path
        raise UserError(
            f"{folder} has no checkpoint at step {step}; it has {', '.join(p.stem for p in found) or 'none'}."
        )
    damaged: list[str] = []
    newest = latest_checkpoint(RunFolder(folder).checkpoints, damaged.append)
    if newest is None and found:
        read_header(found[-1])  # Raises, with what is wrong with it.
    for text in damaged:
        warnings.warn(text, stacklevel=2)
    if newest is None:
        again = shlex.join(["sitkit", "train", str(RunFolder(folder).config)])
        raise UserError(f"{folder} has no checkpoint yet: continue its training with `{again}`.")
    return newest


def load_weights(source: Path, config: Config, step: int | None = None) -> tuple[int, dict[str, torch.Tensor], Path]:
    """Return (step, state of the network, path of the file) of the weights of a run that config.sample names.

    source: the run's folder or its one file.  step: by default the newest.
    Raises UserError for an average that the run neither keeps nor can rebuild.
    """
    if source.is_file():
        return *weights_of_file(source, config, step), source
    decays, chosen = config.train.ema_decays, config.sample.ema
    if chosen is not None and chosen not in decays:
        if chosen > averages.WIDEST:
            raise UserError(
                f"sample.ema: {source} keeps no average of decay {chosen}, only of {', '.join(map(str, decays))}; "
                "up to 0.2887 it is the relative width of a power-function average."
            )
        return *averages.rebuild(source, chosen, step), RunFolder(source).snapshots
    path = checkpoint_at(source, step)
    header, tensors = load_tensors(path)
    prefix = (
        "model." if config.sample.weights == "raw" else averages.prefix(decays, decays[0] if chosen is None else chosen)
    )
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return int(header["step"]), state, path


def _fill(network: nn.Module, state: Mapping[str, torch.Tensor], path: Path, which: str = "of its run") -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network {which}: {str(error).splitlines()[-1].strip()}") from None
