"""A trained run: its configuration, its network, and the field that reads the network.

A run is a folder runs/<slug>-<training identity>/, or one file that `sitkit convert` wrote.  The samples and evaluations
of such a file go to runs/<slug>-<digest of its weights>/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sitkit.data.dataset import Examples, load_examples
from sitkit.data.described import from_description
from sitkit.models.autoencoder import median_std, modelled_shape, prepare_data
from sitkit.models.backbone import limited
from sitkit.registry import Component
from sitkit.registry.measures import Pairs
from sitkit.runs import diagnostics
from sitkit.runs.averages import load_weights
from sitkit.runs.changed_plugins import warn_of_changed_plugins
from sitkit.runs.config.identity import slug, training_identity
from sitkit.runs.config.mappings import merge
from sitkit.runs.config.records import DataRecord
from sitkit.runs.config.sampling_presets import read_preset
from sitkit.runs.config.schema import TRAINING_KEYS, Config, to_plain
from sitkit.runs.config.sources import Layer, SamplingFlags, flags_to_layer, locate, require_flags, validate
from sitkit.runs.one_file import read_run_header, weights_name
from sitkit.runs.run_folder import RunFolder, check_unchanged, find_run, locate_run, read_config_of, recorded_contents
from sitkit.runtime.archives import memory_left
from sitkit.runtime.distributed import device_of
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, read_record
from sitkit.transport.field import Field


@dataclass(frozen=True)
class Run:
    """A trained run: its configuration, its network, and the field that reads the network.

    Args:
        folder: the folder of its samples and evaluations.
        config: the configuration, with every default resolved.
        step: the step of the checkpoint.
        network: the network, by default with averaged (EMA) weights.
        field: the network read as velocity, score, data and noise.
        file: the one file that the run was loaded from; None for a run in a folder.
    """

    folder: Path
    config: Config
    step: int
    network: nn.Module
    field: Field
    file: Path | None = None

    def __repr__(self) -> str:
        return f"Run({self.source}, step {self.step}, weights {self.weights_name})"

    @functools.cached_property
    def identity(self) -> str:
        """The identity of the training, which determines the weights."""
        return training_identity(self.config, self.contents)

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """The fingerprints of the data and of the autoencoder, as the training recorded them."""
        return recorded_contents(self.source)

    @property
    def source(self) -> Path:
        """The folder or the one file that the run was loaded from."""
        return self.file or self.folder

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.field.device

    @property
    def weights_name(self) -> str:
        """The weights of the network, as in file names: "ema", "raw", or "ema-0.05" for a chosen average."""
        return weights_name(self.config)

    @property
    def examples(self) -> Examples:
        """The data set of the training.  Raises UserError if it is missing or has changed since the training."""
        try:
            examples, recorded = load_examples(self.config.data), _read_description(self.source)
        except UserError as error:
            words = "".join(f" If the data moved: --set data.{place}=NEW." for place in self.config.data.places())
            raise UserError(f"{error}{words}") from None
        if recorded is not None and recorded["fingerprint"] != examples.fingerprint:
            raise UserError(f"The data of {self.source} changed since it was trained: bring back the old ones.")
        return examples

    @functools.cached_property
    def data_description(self) -> Examples:
        """The description of the data that sampling needs; the data themselves may be missing."""
        return data_description(self.source, self.config)

    @functools.cached_property
    def labelled(self) -> Examples:
        """The description of the data with the counts of their classes, if they are known or the data are here."""
        described = self.data_description
        if described.num_classes and described.class_counts is None:
            # The description of a run of release 0.1 lacks them.
            with contextlib.suppress(UserError):
                return self.examples
        return described

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the states that the network models."""
        return modelled_shape(self.config.autoencoder, self.data_description)

    def velocity_losses(self) -> Pairs:
        """Return (t, L_t) pairs of the velocity loss, measured once on held-out data."""
        return diagnostics.velocity_losses(self)

    def path_curvature(self) -> Pairs:
        """Return (t, |x''(t)|) pairs of the paths of the unguided flow, measured once."""
        return diagnostics.curvatures(self)

    def data_std(self) -> float | None:
        """Return the median standard deviation of the pixels or latent channels of the data; None: not known."""
        std = self.data_description.std
        if std is None:
            # The description of a run of release 0.1 lacks it.
            with contextlib.suppress(UserError):
                std = median_std(self.config.autoencoder, self.examples)
        return std

    def load_field(self, name: str, step: int, weights: Literal["ema", "raw"]) -> Field:
        """Return the field of another run, which lies beside this one.

        Args:
            name: the full name of the other run.
            step: the step of its checkpoint.
            weights: "ema" or "raw".

        Returns:
            The field, on the device of this run.

        Raises:
            UserError: for a name that is not the full one, and for a run that models states of another shape.
        """
        other = load(name, step=step, weights=weights, device=str(self.device), root=self.folder.parent)
        _require_full_name(other.folder, name, "guidance.run")
        if other.shape != self.shape:
            raise UserError(f"guidance.run {name!r} models states of shape {other.shape}, this run {self.shape}.")
        return other.field

    def with_settings(self, over: Layer | Config) -> Run:
        """Return this run with other settings of sampling and evaluation.

        The weights are read again, of the same step and onto the same device, if sample.weights or sample.ema changed.

        Args:
            over: settings on top of the run's own, or a whole configuration of the same training.

        Returns:
            The run with the settings.

        Raises:
            UserError: for a setting that the training fixed, and for weights that the run neither keeps nor can rebuild.
        """
        config = _with_settings(self.source, self.config, over)
        run = dataclasses.replace(self, config=config)
        if run.weights_name == self.weights_name or not config.backbone.trainable:
            return run
        _, network = _read_network(self.source, config, self.data_description, self.step, str(self.device))
        return dataclasses.replace(run, network=network, field=dataclasses.replace(self.field, network=network))


def data_description(source: Path, config: Config) -> Examples:
    """Return the description of the data of a run's folder or file; the data themselves if there is no description.

    Vectors, as points in the plane, are loaded where possible: pictures of samples show them.
    """
    recorded = _read_description(source)
    if recorded is None:
        return load_examples(config.data)
    if len(recorded["shape"]) != 3:
        with contextlib.suppress(UserError):
            return load_examples(config.data)
    return from_description(recorded, str(getattr(config.data, "path", config.data.name)))


def _read_description(source: Path) -> dict[str, Any] | None:
    if source.is_file():
        return read_run_header(source)["data"]
    path = RunFolder(source).data
    remedy = "Copy it again, or remove it if the data are here."
    return read_record(path, DataRecord, "the description of data", remedy) if exists(path) else None


def fingerprints(config: Config) -> dict[str, str]:
    """Return the fingerprints of the data set and of the autoencoder's weights, to which the settings only point.

    Raises:
        UserError: for examples that the autoencoder cannot take.
    """
    data = prepare_data(config.data, config.autoencoder)
    return {"data": data.examples.fingerprint, "autoencoder": config.autoencoder.fingerprint()}


def use_threads(config: Config) -> None:
    """Set the number of torch's CPU threads to run.threads; without it torch decides."""
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)


def initial_network(
    config: Config,
    seed: int | None = None,
    data: Examples | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Return the network of a configuration with its initial weights.

    Args:
        config: the configuration.
        seed: the seed of the weights; by default the training seed.
        data: the data set, or its description if the network is trained; by default the data set is loaded.
        state: the weights that the network will be given, if there are any.  A network that is far larger is refused.
    """
    data = data if data is not None and config.backbone.trainable else load_examples(config.data)
    shape, left = modelled_shape(config.autoencoder, data), memory_left()
    # Tied weights are counted more often than they are stored.
    most = min(left // 4, left if state is None else 4 * sum(tensor.numel() for tensor in state.values()))
    place = f"the {left / 2**30:.1f} GiB of memory that are left" if most == left // 4 else "the weights of its run"
    message = f"the parameters of backbone {config.backbone.name!r} do not fit into {place}."
    with torch.random.fork_rng(devices=[]), limited(most, message):
        torch.manual_seed(config.train.seed if seed is None else seed)
        network = config.backbone.build(shape, data.num_classes)
    return config.backbone.prepare(network, interpolant=config.interp, target=config.target, examples=data)


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

    The training data may be missing.

    Args:
        run: a folder, a name, an identity or its beginning, "latest", one file, or hf://owner/name.
        weights: "ema" (the first average) or "raw"; by default as sample.weights and sample.ema say.
        ema: the decay of a stored average, or the relative width of an average to rebuild.
        step: the step of the checkpoint, by default the newest.
        device: "cpu", "cuda", "cuda:1", or "auto".
        settings: settings of sampling and evaluation, by dotted key.
        root: the folder of runs.

    Returns:
        The run.

    Raises:
        UserError: for a run that does not exist, has no checkpoint yet or only a damaged one, and for a setting that its
            training fixed.
    """
    source = locate_run(run, Path(root))
    config = read_config_of(source)
    if source.is_file():
        config = config.model_copy(update={"run": config.run.model_copy(update={"folder": Path(root)})})
    use_threads(config)
    if settings is not None or ema is not None:
        if not isinstance(settings, (Layer, Config)):
            settings = flags_to_layer({"ema": ema}, settings)
        config = _with_settings(source, config, settings)
    if weights is not None:
        sample = config.sample.model_copy(update={"weights": weights, "ema": None})
        config = config.model_copy(update={"sample": sample})
    if source.is_dir():
        warn_of_changed_plugins(source, config)
    data = data_description(source, config)
    step, network = _read_network(source, config, data, step, device)
    field, file = Field(network, config.interp, config.target, data.num_classes), None
    if source.is_file():
        weights_id = read_run_header(source)["fingerprints"]["weights"][:12]
        source, file = Path(root) / f"{slug(config)}-{weights_id}", source
    return Run(source, config, step, network, field, file)


def open_run(run: Run | str | Path, flags: Mapping[str, Any], verb: str) -> Run:
    """Return a run with the settings that the keyword arguments of a verb make.

    Args:
        run: a run, or a name that `load` accepts.
        flags: the keyword arguments, as in `SamplingFlags`.
        verb: the name of the verb, for errors.
    """
    require_flags(flags, SamplingFlags, verb)
    flags = dict(flags)
    preset, settings, step = (flags.pop(name, None) for name in ("preset", "settings", "step"))
    root = Path(flags.pop("runs", None) or "runs")
    layer = flags_to_layer(flags, settings)
    if preset is not None:
        base = read_preset(run.folder if isinstance(run, Run) else find_run(run, root), preset)
        layer = Layer(merge(base.values, layer.values), base.where | layer.where)
    device = flags.get("device")
    if not isinstance(run, Run):
        return load(run, settings=layer, root=root, step=step, device=device or "auto")
    if step in (None, run.step) and device in (None, str(run.device)):
        return run.with_settings(layer) if layer.values else run
    # Another checkpoint or device: the settings that the run has now stay below the new ones.
    settings, step = sampling_config(run.config, layer), run.step if step is None else step
    return load(run.source, settings=settings, root=run.folder.parent, step=step, device=device or str(run.device))


def _with_settings(source: Path, config: Config, over: Layer | Config) -> Config:
    """Return a run's configuration with other settings of sampling, and data or an autoencoder that moved.

    Raises UserError for a setting that the training fixed, and for a path with other content.
    """
    where = {} if isinstance(over, Config) else over.where
    given = over if isinstance(over, Config) else sampling_config(config, over)
    for key in TRAINING_KEYS:
        own, new = to_plain(getattr(config, key)), to_plain(getattr(given, key))
        part = getattr(given, key)
        places = part.places() if isinstance(part, Component) else ()
        if own | dict.fromkeys(places) != new | dict.fromkeys(places):
            raise UserError(
                f"{locate(where, [key])}{key} was fixed when {source} was trained: train another run with it."
            )
        recorded = recorded_contents(source).get(key) if own != new else None
        if recorded is not None and part.content() != recorded:
            raise UserError(
                f"{locate(where, [key])}{source} was trained on {key} of fingerprint {recorded[:12]}, and this is of "
                f"fingerprint {part.content()[:12]}: give the path of the same {key}, or train another run."
            )
    return given


def _read_network(source: Path, config: Config, data: Examples, step: int | None, device: str) -> tuple[int, nn.Module]:
    """Return (step, network on the device) with the weights that config.sample names."""
    if not source.is_file():
        check_unchanged(source, {"autoencoder": config.autoencoder.fingerprint()})
    if config.backbone.trainable:
        step, state, path = load_weights(source, config, step)
        network = initial_network(config, data=data, state=state)
        _load_state(network, state, path)
    else:
        step, network = 0, initial_network(config, data=data)
    return step, network.to(device_of(device)).eval().requires_grad_(False)


def start_from(network: nn.Module, name: str, root: Path) -> None:
    """Load the EMA weights of another run, of its newest checkpoint, into a network.

    Raises:
        UserError: for a run that does not exist, a name that is not the full one, or weights of another network.
    """
    folder = find_run(name, root)
    _require_full_name(folder, name, "train.init")
    config = read_config_of(folder)
    sample = config.sample.model_copy(update={"weights": "ema", "ema": None})
    _, state, source = load_weights(folder, config.model_copy(update={"sample": sample}), None)
    _load_state(network, state, source, "that train.init is to start")


def _require_full_name(folder: Path, name: str, setting: str) -> None:
    # A short name could mean another run tomorrow, and the identity that contains it would not change.
    if folder.name != Path(name).name:
        raise UserError(f"{setting} must name the run in full: {folder.name}, not {name!r}.")


def _load_state(network: nn.Module, state: Mapping[str, torch.Tensor], path: Path, which: str = "of its run") -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network {which}: {str(error).splitlines()[-1].strip()}") from None


def sampling_config(config: Config, over: Layer) -> Config:
    """Return a configuration with settings of sampling and evaluation on top.  Raises UserError with file, line and reason."""
    values = merge(config.plain(), over.values)
    sampler, name = values["sampler"], config.sampler.name
    changed = isinstance(sampler, Mapping) and sampler.get("name", name) != name
    if "sampler" in over.values and "diffusion" not in over.values and changed:
        # Another kind of sampler takes its own default w, as in a new configuration.
        del values["diffusion"]
    return validate(Config, values, over.where)
