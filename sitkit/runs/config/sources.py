"""Settings from files, presets and flags, and the configuration that they make together.

YAML is 1.2 and nothing in it is executed; an error names file, line, key and the nearest right name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar, Unpack

from pydantic import BaseModel, ValidationError

from sitkit.registry import Component, Registry, essence, registries
from sitkit.registry.settings_files import presets
from sitkit.runs.config.mappings import flat, merge, nest
from sitkit.runs.config.plain_yaml import NotYaml, parse_yaml
from sitkit.runs.config.schema import DEFAULTS, Config, to_plain
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.files import exists, read_text

if TYPE_CHECKING:
    from sitkit.data.dataset import Dataset
    from sitkit.evaluation.metrics.metric import Metric
    from sitkit.models.autoencoder import Autoencoder
    from sitkit.models.backbone import Backbone
    from sitkit.models.loss import Loss
    from sitkit.solvers.guidance import Guidance
    from sitkit.solvers.sampler import Sampler
    from sitkit.transport.coupling import Coupling
    from sitkit.transport.diffusion import Diffusion
    from sitkit.transport.interpolant import Interpolant
    from sitkit.transport.target import Target
    from sitkit.transport.timestep import Timestep
    from sitkit.transport.weighting import Weighting


@dataclass(frozen=True)
class Layer:
    """Settings from one source, and the place of each dotted key ("file:line", "--flag")."""

    values: dict[str, Any]
    where: dict[str, str] = field(default_factory=dict)


def assemble(layers: Sequence[Layer]) -> Config:
    """Return the configuration of layers, later ones on top.  Raises UserError with the place and the remedy."""
    values: Any = {}
    where: dict[str, str] = {}
    for layer in layers:
        values = merge(values, layer.values)
        # A plain value replaces a mapping, and the places of the keys in it.
        leaves = tuple(f"{key}." for key in flat(layer.values))
        where = {key: place for key, place in where.items() if not key.startswith(leaves)} | layer.where
    return validate(Config, values, where)


def replaced(layers: Sequence[Layer]) -> list[str]:
    """Return a sentence for each component that a later layer replaces together with settings of an earlier one."""
    values: Any = {}
    notes = []
    for layer in layers:
        before, values = values, merge(values, layer.values)
        for key, registry in component_keys().items():
            old, new = before.get(key), values.get(key)
            lost = flat(old).keys() - flat(new).keys() if isinstance(old, Mapping) else set()
            if not lost:
                continue
            # A resolved configuration has every field; one with its default is no loss.  The files of data are not read.
            try:
                known = flat(essence(registry.parse(old), content=""))
            except UserError:  # A setting that does not exist is replaced by one that does.
                continue
            name = new["name"] if isinstance(new, Mapping) else new
            asked = registry.presets()[name].fields if name in registry.presets() else {}
            fields = ", ".join(f"{field} = {known[field]}" for field in known if field in lost - asked.keys())
            if fields:
                place = locate(layer.where, [key])
                notes.append(f"{place}{key} {name!r} takes the place of {old['name']!r} and of its {fields}.")
    return notes


def validate(model: type[Any], values: Mapping[str, Any], where: Mapping[str, str]) -> Any:
    """Return the model of plain values.  Raises UserError for the first wrong value, with its place."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        place = locate(where, [*path, *getattr(first.get("ctx", {}).get("error"), "path", ())])
        key = ".".join(path)
        if first["type"] == "extra_forbidden" and len(path) > 1 and path[-1] == "name":
            # `merge` reads a word as the name of a component.
            message = f"{'.'.join(path[:-1])} is a group of settings, not a name; got {first['input']!r}."
        elif first["type"] == "extra_forbidden":
            known = _fields(model, path[:-1])
            message = f"unknown key {key!r}.{suggest(path[-1], known)} Known here: {', '.join(known)}."
        else:
            # A flag with the name of the key has named it.
            named = re.sub(r"\.\d+$", "", key)
            named = place == f"--{named}: " or place.startswith(f"--set {named}=")
            message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
            message = f"{key}: {message}" if key and not named else message
            if first["type"] not in ("value_error", "missing"):
                message += f"; got {first['input']!r}."
        raise UserError(f"{place}{message}") from None


def locate(where: Mapping[str, str], path: Sequence[str]) -> str:
    """Return "file:line: " of the most precise place that is known for a key, or ""."""
    for length in range(len(path), 0, -1):
        key = ".".join(path[:length])
        if key in where:
            return f"{where[key]}: "
    # A key may have been set only through a deeper one.
    prefix = ".".join(path) + "."
    return next((f"{place}: " for key, place in where.items() if path and key.startswith(prefix)), "")


def _fields(model: type[Any], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def read_yaml(path: Path | str, text: str | None = None) -> Layer:
    """Return a YAML 1.2 file as plain values with the line of every key.

    Args:
        path: the file.
        text: the content, if the file is not to be read.

    Raises:
        UserError: with file and line.
    """
    if text is None:
        file = Path(path)
        if not exists(file):
            near = suggest(file.name, [p.name for p in file.parent.glob("*.y*ml")])
            raise UserError(f"There is no file {file}.{near}")
        text = read_text(file)
    tree, where = parse_yaml(text, str(path))
    if tree is None:
        return Layer({}, {})
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {'a list' if isinstance(tree, list) else repr(tree)}.")
    return Layer(tree, where)


def read_config(name: str | Path) -> Layer:
    """Return the settings of a preset by name, or of a file by path.  Raises UserError with the nearest right name."""
    return read_yaml(presets.find(name))


def read_value(text: str, place: str = "value") -> Any:
    """Return a value as YAML 1.2 reads it: 1e-4 is a number, true a truth value, [1, 2] a list; else the text.

    Raises UserError that begins with the place for YAML that is not read.
    """
    try:
        return parse_yaml(text, place)[0]
    except NotYaml:
        return text


def read_assignments(assignments: Sequence[str], flag: str = "--set") -> Layer:
    """Return key=value pairs with dotted keys as a layer.  Raises UserError if an item is not of the form key=value."""
    values: Any = {}
    where: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{flag} {text}: write key=value, as in {flag} train.lr=2e-4.")
        values = merge(values, nest({key: read_value(value, f"{flag} {key}")}))
        where[key] = f"{flag} {text}"
    return Layer(values, where)


def component_keys() -> dict[str, Registry[Any]]:
    """Return the top-level keys that take a component, each with its registry."""
    flags = {registry.flag.removeprefix("--"): registry for registry in registries.values()}
    return {key: flags[key] for key in (*DEFAULTS, "weight", "diffusion")}


ComponentT = TypeVar("ComponentT", bound=Component)
Spec: TypeAlias = ComponentT | str | Mapping[str, Any]
"""A component, its name, or a mapping with `name` and fields."""


class _PlaceFlags(TypedDict, total=False):
    steps: int | None
    runs: str | Path | None
    device: str | None
    settings: Mapping[str, Any] | Layer | None


class _SolverFlags(TypedDict, total=False):
    preset: str | None
    sampler: Spec[Sampler] | None
    diffusion: Spec[Diffusion] | None
    guidance: Spec[Guidance] | None
    seed: int | None


class TrainingFlags(_SolverFlags, _PlaceFlags, total=False):
    """The keyword arguments of `configure` and `train`: the flags of `sitkit train`."""

    interp: Spec[Interpolant] | None
    target: Spec[Target] | None
    weight: Spec[Weighting] | None
    loss: Spec[Loss] | None
    timestep: Spec[Timestep] | None
    coupling: Spec[Coupling] | None
    backbone: Spec[Backbone] | None
    autoencoder: Spec[Autoencoder] | None
    data: Spec[Dataset] | None
    metric: Spec[Metric] | None


class WeightsFlags(_PlaceFlags, total=False):
    """The keyword arguments of `likelihood` that choose the weights of a run, where it is, and its settings."""

    ema: float | None
    step: int | None


class SamplingFlags(_SolverFlags, WeightsFlags, total=False):
    """The keyword arguments of `sample` and `evaluate`: the flags of `sitkit sample`."""

    n: int | None


# The settings that a flag sets, where its name differs.
TRAINING_SETTINGS = {"steps": "train.steps", "seed": "train.seed", "runs": "run.folder", "device": "run.device"}
SAMPLING_SETTINGS = {
    "steps": "sampler.steps", "n": "sample.n", "seed": "sample.seed", "ema": "sample.ema", "device": "run.device",
}  # fmt: skip


def flags_to_layer(
    flags: Mapping[str, Any],
    settings: Mapping[str, Any] | Layer | None = None,
    names: Mapping[str, str] = SAMPLING_SETTINGS,
    place: Callable[[str], str] = "{}=".format,
) -> Layer:
    """Return the settings that flags and then `settings` make; a flag that is None is left out.

    Args:
        flags: values by the flag's name; components may be given as objects.
        settings: settings by dotted key, or a layer, on top of the flags.
        names: the setting that a flag sets, where its name differs; by default those of sampling.
        place: how an error names a flag.
    """
    keys = {flag: names.get(flag, flag) for flag, value in flags.items() if value is not None}
    values = {key: to_plain(flags[flag]) for flag, key in keys.items()}
    where = {key: place(flag) for flag, key in keys.items()}
    if not isinstance(settings, Layer):
        plain = {key: to_plain(value) for key, value in (settings or {}).items()}
        settings = Layer(nest(plain), {key: f"settings[{key!r}]" for key in plain})
    return Layer(merge(nest(values), settings.values), where | settings.where)


def require_flags(flags: Mapping[str, Any], known: type[Any], verb: str) -> None:
    """Raise UserError for a keyword argument that a function does not have, with the nearest right name."""
    names = list(known.__annotations__)
    for flag in flags:
        if flag not in names:
            raise UserError(f"{verb} has no argument {flag!r}.{suggest(flag, names)} Known: {', '.join(names)}.")


def configure(config: Config | str | Path = "digits", **flags: Unpack[TrainingFlags]) -> Config:
    """Return the configuration of a run.

    Args:
        config: a configuration, the name of a preset, or a YAML file; the base of everything else.
        flags: the flags of `sitkit train` by name: components (`interp`, `target`, `weight`, `loss`, `timestep`,
            `coupling`, `backbone`, `autoencoder`, `data`, `sampler`, `diffusion`, `guidance`, `metric`) as a name, a
            mapping with `name` and fields, or an object; `steps` (optimizer steps), `seed` (training seed), `runs` (the
            folder of runs), `device`; `preset`, a preset below `config`; `settings`, any setting by its dotted key, as in
            {"train.lr": 1e-3}.

    Returns:
        The configuration with every default resolved.

    Raises:
        UserError: for a name or a setting that does not exist or does not fit, with its place and the nearest right name.
    """
    return assemble(layers_of(config, flags))


def layers_of(config: Config | str | Path, flags: TrainingFlags) -> list[Layer]:
    """Return the layers of a configuration, for `assemble`; the arguments are those of `configure`."""
    require_flags(flags, TrainingFlags, "configure")
    flags = flags.copy()
    preset, settings = flags.pop("preset", None), flags.pop("settings", None)
    layers = [] if preset is None else [read_config(preset)]
    layers.append(Layer(config.plain()) if isinstance(config, Config) else read_config(config))
    return [*layers, flags_to_layer(flags, settings, TRAINING_SETTINGS)]
