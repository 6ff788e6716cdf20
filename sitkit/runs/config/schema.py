"""What a run is made of, as people write it: one tree, one merge, one build.

Defaults < file < command line < ablation cell, all through `merge`.  Everything a flag can say, a YAML file says by the
same name.  YAML is 1.2 and read safely; an error names file, line, key and the nearest right name.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sitkit.data.dataset import Dataset
from sitkit.evaluation.metrics.metric import Metric
from sitkit.models.autoencoder import Autoencoder
from sitkit.models.backbone import Backbone
from sitkit.models.loss import Loss
from sitkit.registry import Component, Registry, registries, spec
from sitkit.registry.settings_files import presets
from sitkit.runtime.errors import UserError, suggest
from sitkit.solvers.guidance import Guidance
from sitkit.solvers.sampler import Sampler
from sitkit.transport.coupling import Coupling
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target
from sitkit.transport.timestep import Timestep
from sitkit.transport.weighting import Weighting


class Settings(BaseModel):
    """A group of settings: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainSettings(Settings):
    """Optimisation: AdamW and EMA.  The defaults are the paper's (SiT appendix E, DiT), TF32 as in its code.

    batch: examples of one step, over all processes together; accumulate: in how many parts each process takes its share.
    lr rises linearly over `warmup` steps, stays, and falls over the last `decay` of all steps to lr_end as `schedule`
    says; "constant" never falls.  clip: the largest norm of the gradient.  precision: the network's products and
    activations; weights, optimiser and loss are float32.  tf32: float32 products in TF32 where the GPU has it.
    nonfinite: whether a step whose gradient is not finite stops the training or changes nothing.
    init: the full name of a run whose EMA weights training starts from.
    ema: one decay or several, the first of which samples by default.  posthoc: relative widths of power-function averages
    to snapshot (EDM2 keeps 0.05 and 0.1), from which `sample.ema` rebuilds any other; every posthoc_every steps, by
    default a 32nd of the training, in posthoc_dtype.
    """

    steps: int = Field(400_000, ge=0)
    batch: int = Field(256, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay: float = Field(1.0, gt=0, le=1)
    lr_end: float = Field(0.0, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = Field(0, ge=0)
    clip: float | None = Field(None, gt=0)
    nonfinite: Literal["stop", "skip"] = "stop"
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = True
    ema: float | tuple[float, ...] = 0.9999
    posthoc: tuple[float, ...] = ()
    posthoc_every: int | None = Field(None, ge=1)
    posthoc_dtype: Literal["float32", "float16"] = "float32"
    init: str | None = None
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fit(self) -> TrainSettings:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch; got {self.accumulate} and {self.batch}.")
        if self.posthoc and not self.steps:
            raise ValueError("posthoc averages what a training makes, and steps is 0: leave posthoc out.")
        if self.schedule == "constant" and (self.decay, self.lr_end) != (1.0, 0.0):
            raise ValueError("decay and lr_end belong to schedule 'linear' or 'cosine'; it is 'constant'.")
        return self

    @field_validator("ema")
    @classmethod
    def _decays(cls, ema: float | tuple[float, ...]) -> float | tuple[float, ...]:
        decays = ema if isinstance(ema, tuple) else (ema,)
        if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(f"give one decay or several different ones, each at least 0 and below 1; got {ema}.")
        return ema

    @field_validator("posthoc")
    @classmethod
    def _widths(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(widths)) < len(widths) or not all(0 < width <= 12**-0.5 for width in widths):
            raise ValueError(
                f"give different relative widths, each above 0 and at most 0.2887, as [0.05, 0.1]; got {list(widths)}."
            )
        return widths

    @property
    def ema_decays(self) -> tuple[float, ...]:
        """The decays of the exponential averages, the default one first."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)


class SampleSettings(Settings):
    """How many samples, from which seed and weights, with which labels.

    batch: samples at once on an accelerator; a CPU takes blocks of a fixed size, so that it changes no digit there.
    ema: which average, by default the first of train.ema: one of its decays, or the relative width of a power-function
    average, rebuilt from the snapshots of train.posthoc.
    """

    n: int = Field(64, ge=1)
    seed: int = Field(0, ge=0)
    weights: Literal["ema", "raw"] = "ema"
    ema: float | None = Field(None, ge=0, lt=1)
    labels: Literal["balanced", "random", "none"] | tuple[int, ...] = "balanced"
    batch: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _averaged(self) -> SampleSettings:
        if self.ema is not None and self.weights == "raw":
            raise ValueError(f"ema = {self.ema} chooses an average, and weights = 'raw' wants none: leave one out.")
        return self


class RunSettings(Settings):
    """What changes no result beyond rounding: where things go, how often they are written, on what they are computed.

    workers: threads that read batches ahead, in each process; 0 reads when a batch is wanted.
    compile: torch.compile of the training step; "auto" is on CUDA alone.  parallel: how processes under torchrun share
    the training: each holds the whole network ("ddp") or a slice of it ("fsdp").  keep_samples: whether an evaluation
    stores its samples beside their features; unset, where all together are at most 1 GiB.
    track: whether MLflow is told of it.  log_model: whether it gets the trained network too, as a model with signature.
    """

    folder: Path = Path("runs")
    device: str = "auto"
    threads: int | None = Field(None, ge=1)
    workers: int = Field(2, ge=0)
    compile: Literal["auto"] | bool = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    log_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    sample_every: int = Field(1000, ge=0)
    keep: int = Field(2, ge=1)
    keep_samples: bool | None = None
    track: bool = True
    log_model: bool = False


class Config(Settings):
    """Everything that a training, a sampling and an evaluation depend on."""

    interp: Interpolant
    target: Target
    weight: Weighting
    loss: Loss
    timestep: Timestep
    coupling: Coupling
    backbone: Backbone
    autoencoder: Autoencoder
    data: Dataset
    train: TrainSettings = TrainSettings.model_validate({})
    sampler: Sampler
    diffusion: Diffusion
    guidance: Guidance
    sample: SampleSettings = SampleSettings.model_validate({})
    metric: tuple[Metric, ...]
    run: RunSettings = RunSettings.model_validate({})

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        given = merge(DEFAULTS, {k: v for k, v in given.items() if v is not None})
        # A wrong target or sampler is reported with its place when its own field is checked.
        with suppress(UserError):
            given = {"weight": registries["targets"].parse(given["target"]).weighting, **given}
        with suppress(UserError):
            sampler = registries["samplers"].parse(given["sampler"])
            given = {"diffusion": sampler.default_diffusion(), **given}
        return given

    @field_validator("metric", mode="before")
    @classmethod
    def _one_or_more(cls, metric: Any) -> Any:
        return metric if isinstance(metric, (list, tuple)) else [metric]

    def plain(self) -> dict[str, Any]:
        """The configuration as plain values, every default resolved: what is written, hashed and read back."""
        return {key: _plain(value) for key, value in self}


DEFAULTS: dict[str, Any] = {
    "interp": "linear",
    "target": "velocity",
    "loss": "interpolant",
    "timestep": "uniform",
    "coupling": "independent",
    "backbone": "sit-b/2",
    "autoencoder": "identity",
    "data": "digits",
    "sampler": "heun",
    "guidance": "none",
    "metric": "frechet",
}
TRAINING = ("interp", "target", "weight", "loss", "timestep", "coupling", "backbone", "autoencoder", "data", "train")


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return spec(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def identity(*parts: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of plain values: equal values, equal identity."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(values, Mapping):
        return {key: values}
    return {k: v for name, value in values.items() for k, v in flat(value, f"{key}.{name}" if key else name).items()}


def training_identity(config: Config) -> str:
    """What determines the weights: data, model, loss, optimiser and training seed, and nothing else."""
    plain = config.plain()
    return identity({key: plain[key] for key in TRAINING})


def slug(config: Config) -> str:
    """A readable name for a run, safe as a folder name on every system whatever its components are called."""
    return readable(label(c) for c in (config.data, config.interp, config.target, config.backbone))


def readable(words: Iterable[str]) -> str:
    """Words as lower-case letters and digits of ASCII with single hyphens between them, 80 at most; "run" where none is left."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")[:80].strip("-") or "run"


def label(component: Component) -> str:
    """The shortest name of a component: a preset's where its fields match one, else its own."""
    plain = spec(component)
    for registry in registries.values():
        if component.name in registry and isinstance(component, registry[component.name]):
            for name, preset in registry.presets().items():
                if preset.of == component.name and preset.fields and spec(registry.create(name)) == plain:
                    return name
    return component.name


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`, for every source alike.

    A part that changes its name keeps none of the old one's fields; a part that keeps its name keeps them.
    """
    if isinstance(base, Mapping) and isinstance(over, str):
        over = {"name": over}
    if isinstance(base, str) and isinstance(over, Mapping):
        base = {"name": base}
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if "name" in base and over.get("name", base["name"]) != base["name"]:
        return dict(over)
    return {**base, **{k: merge(base.get(k), v) for k, v in over.items()}}


@dataclass(frozen=True)
class Layer:
    """Settings from one source, and where each dotted key came from ("file:line", "--flag")."""

    values: dict[str, Any]
    where: dict[str, str] = field(default_factory=dict)


def assemble(layers: Sequence[Layer]) -> Config:
    """The configuration that the layers make together, later ones on top.  Raises UserError with where and what instead."""
    values: Any = {}
    where: dict[str, str] = {}
    for layer in layers:
        values = merge(values, layer.values)
        # A plain value takes the place of a mapping, and of the lines of what was in it.
        leaves = tuple(f"{key}." for key in flat(layer.values))
        where = {key: place for key, place in where.items() if not key.startswith(leaves)} | layer.where
    return validate(Config, values, where)


def validate(model: type[Any], values: Mapping[str, Any], where: Mapping[str, str]) -> Any:
    """The model made of plain values; the first thing wrong with them is a UserError that says where it stands."""
    try:
        return model.model_validate(values)
    except UserError:
        raise
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
            # A flag that bears the key's name has named it.
            named = re.sub(r"\.\d+$", "", key)
            named = place == f"--{named}: " or place.startswith(f"--set {named}=")
            message = f"{key}: " * bool(key and not named) + first["msg"].removeprefix("Value error, ").removeprefix(
                "Input "
            )
            if first["type"] not in ("value_error", "missing"):
                message += f"; got {first['input']!r}."
        raise UserError(f"{place}{message}") from None


def locate(where: Mapping[str, str], path: Sequence[str]) -> str:
    """ "file:line: " of the most precise place known for a key, or nothing."""
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
    """A YAML 1.2 file as plain values with the line of every key.  Raises UserError that names file and line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    if text is None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(_no_file(Path(path))) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}.") from None
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}:{line}: {error.problem}.") from None
    except YAMLError as error:
        raise UserError(f"{path}: {error}") from None
    if tree is None:
        return Layer({}, {})
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected keys and values, got {'a list' if isinstance(tree, list) else repr(tree)}.")
    where: dict[str, str] = {}
    return Layer(_unwrap(tree, str(path), "", where), where)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML that `read_yaml` reads back, keys in their order."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(dict(values), text)
    return text.getvalue()


def _unwrap(node: Any, path: str, key: str, where: dict[str, str]) -> Any:
    """Plain values from ruamel's tree, noting the line of each.  Raises UserError for a tag: nothing is built from one."""
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag is not None:
        raise UserError(
            f"{locate(where, key.split('.'))}{key or path}: the tag {tag!r} is not read: write a plain value."
        )
    if isinstance(node, Mapping):
        plain = {}
        for name, value in node.items():
            full = f"{key}.{name}" if key else str(name)
            where[full] = f"{path}:{node.lc.key(name)[0] + 1}"  # pyright: ignore[reportAttributeAccessIssue]
            plain[str(name)] = _unwrap(value, path, full, where)
        return plain
    if isinstance(node, list):
        for i in range(len(node)):
            where[f"{key}.{i}"] = f"{path}:{node.lc.item(i)[0] + 1}"  # pyright: ignore[reportAttributeAccessIssue]
        return [_unwrap(value, path, f"{key}.{i}", where) for i, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _no_file(path: Path) -> str:
    near = suggest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
    return f"There is no file {path}.{near}"


def read_config(name: str | Path) -> Layer:
    """A preset by name, or a file by path.  Raises UserError with the nearest right name."""
    return read_yaml(presets.find(name))


def read_value(text: str) -> Any:
    """A value as YAML 1.2 reads it: 1e-4 is a number, true a truth value, [1, 2] a list."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value = YAML(typ="rt").load(text)
    except YAMLError:
        return text
    return _unwrap(value, "", "", {})


def read_assignments(assignments: Sequence[str], flag: str = "--set") -> Layer:
    """key=value pairs with dotted keys.  Raises UserError for what is no such pair."""
    values: Any = {}
    where: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"{flag} {text}: write key=value, as in {flag} train.lr=2e-4.")
        nested: Any = read_value(value)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        values = merge(values, nested)
        where[key] = f"{flag} {text}"
    return Layer(values, where)


def component_keys() -> dict[str, Registry[Any]]:
    """Which top-level keys take a component, and from which registry."""
    flags = {registry.flag.removeprefix("--"): registry for registry in registries.values()}
    return {key: flags[key] for key in (*DEFAULTS, "weight", "diffusion")}
