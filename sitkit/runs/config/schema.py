"""The settings of a run: one tree of typed, frozen models.

Defaults < file < command line < ablation cell, all through `merge`.  A YAML file has every setting of the flags under the
same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from sitkit.data.dataset import Dataset
from sitkit.evaluation.metrics.metric import Metric
from sitkit.models.autoencoder import Autoencoder
from sitkit.models.backbone import Backbone
from sitkit.models.loss import Loss
from sitkit.registry import Component, registries, spec
from sitkit.runs.config.mappings import merge
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import Guidance
from sitkit.solvers.sampler import Sampler, SolveSpec
from sitkit.transport.coupling import Coupling
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Target
from sitkit.transport.timestep import Timestep
from sitkit.transport.weighting import Weighting

# Bounds far above every use: a larger number is a slip, and would fail in the middle of the work.
MOST_STEPS = 10**12
MOST_EXAMPLES = 2**24
MOST_SAMPLES = 10**9
MOST_SEED = 2**63 - 1  # the range of a seed in torch, in files and in the tracker


class Settings(BaseModel):
    """A group of settings: typed, frozen, unknown keys refused; true and false are no numbers.

    Class attribute `version`: raise it when the meaning of a default changes, as in a component.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: ClassVar[int] = 1

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        known = cls.model_fields[str(info.field_name)].annotation
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, bool) for part in parts) and "bool" not in str(known):
            raise ValueError(f"is true or false, and needs another value; got {value}.")
        return value


class TrainSettings(Settings):
    """Optimisation: AdamW and EMA.  The defaults are the paper's (SiT appendix E, DiT), TF32 as in its code.

    batch: examples of one step, over all processes together.  accumulate: the number of parts of each process's batch.
    lr rises linearly over `warmup` steps, stays, and falls over the last `decay` (a fraction) of all steps to lr_end with
    the shape `schedule`; "constant" never falls.  clip: the largest norm of the gradient.
    precision: the type of the network's products and activations; weights, optimiser and loss are float32.
    tf32: float32 products in TF32 on GPUs that have it.
    nonfinite: a step with a gradient that is not finite stops the training, or is skipped.
    init: the full name of a run whose EMA weights the training starts from.
    ema: one decay or several; samples use the first by default.  ema_warmup: the decay of step k is at most
    (1 + k) / (10 + k), so that the average of a short training holds none of its initial weights; the paper has none.
    posthoc: relative widths of power-function averages to snapshot (EDM2 keeps 0.05 and 0.1), from which `sample.ema`
    rebuilds any other; every posthoc_every steps, by default a 32nd of the training, in posthoc_dtype.
    """

    steps: int = Field(400_000, ge=0, le=MOST_STEPS)
    batch: int = Field(256, ge=1, le=MOST_EXAMPLES)
    accumulate: int = Field(1, ge=1, le=MOST_EXAMPLES)
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    decay: float = Field(1.0, gt=0, le=1)
    lr_end: float = Field(0.0, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = Field(0, ge=0, le=MOST_STEPS)
    clip: float | None = Field(None, gt=0, allow_inf_nan=False)
    nonfinite: Literal["stop", "skip"] = "stop"
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = True
    ema: float | tuple[float, ...] = 0.9999
    ema_warmup: bool = True
    posthoc: tuple[float, ...] = ()
    posthoc_every: int | None = Field(None, ge=1, le=MOST_STEPS)
    posthoc_dtype: Literal["float32", "float16"] = "float32"
    init: str | None = None
    seed: int = Field(0, ge=0, le=MOST_SEED)

    @model_validator(mode="after")
    def _fit(self) -> TrainSettings:
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate must divide batch; got {self.accumulate} and {self.batch}.")
        if self.posthoc and not self.steps:
            raise ValueError("posthoc averages what a training makes, and steps is 0: leave posthoc out.")
        if self.schedule == "constant" and (self.decay, self.lr_end) != (1.0, 0.0):
            raise ValueError("decay and lr_end belong to schedule 'linear' or 'cosine'; it is 'constant'.")
        return self

    @field_validator("betas")
    @classmethod
    def _averages(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"give two decays, each at least 0 and below 1; got {list(betas)}.")
        return betas

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


LABEL_RULES = ("balanced", "data", "random", "none")


class SampleSettings(Settings):
    """The number of samples, their seed, weights and labels.

    labels: "balanced", the classes in turn; "data", as often as in the data; "random", every class with equal
    probability; each draws the classes that have examples.  "none" draws without labels.  A class or a list of classes, as
    numbers or names, draws these in turn.
    batch: samples in one solve on an accelerator; a CPU takes blocks of a fixed size, so that `batch` changes no digit.
    ema: the average of the weights, by default the first of train.ema: one of its decays, or the relative width of a
    power-function average, rebuilt from the snapshots of train.posthoc.
    """

    n: int = Field(64, ge=1, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, le=MOST_SEED)
    weights: Literal["ema", "raw"] = "ema"
    ema: float | None = Field(None, ge=0, lt=1)
    labels: Literal["balanced", "data", "random", "none"] | tuple[int | str, ...] = "balanced"
    batch: int = Field(256, ge=1, le=MOST_EXAMPLES)

    @field_validator("labels", mode="before")
    @classmethod
    def _classes(cls, labels: Any) -> Any:
        if isinstance(labels, str) and labels not in LABEL_RULES:
            if near := get_close_matches(labels, LABEL_RULES, 1, 0.8):
                raise ValueError(
                    f"{labels!r} is no rule. Did you mean {near[0]!r}? Rules are {', '.join(LABEL_RULES)}; a class of that "
                    f"name is written as [{labels}]."
                )
            return (labels,)
        return (labels,) if isinstance(labels, int) and not isinstance(labels, bool) else labels

    @model_validator(mode="after")
    def _averaged(self) -> SampleSettings:
        if self.ema is not None and self.weights == "raw":
            raise ValueError(f"ema = {self.ema} chooses an average, and weights = 'raw' wants none: leave one out.")
        return self


class RunSettings(Settings):
    """Settings that change no result beyond rounding: folders, the interval of checkpoints and logs, the device.

    threads: CPU threads of torch.  workers: threads that read batches ahead, in each process; 0 reads a batch when it is
    needed.  compile: torch.compile of the training step; "auto" compiles on CUDA only.
    parallel: each process under torchrun holds the whole network ("ddp") or a part of it ("fsdp").
    keep: the number of checkpoints.  keep_samples: whether an evaluation stores its samples beside their features; by
    default if all together are at most 1 GiB.
    track: whether the run is sent to MLflow.  log_model: whether the trained network is sent too, as a model with signature.
    """

    folder: Path = Path("runs")
    device: str = "auto"
    threads: int | None = Field(None, ge=1, le=4096)
    workers: int = Field(2, ge=0, le=4096)
    compile: Literal["auto"] | bool = "auto"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    log_every: int = Field(50, ge=1, le=MOST_STEPS)
    checkpoint_every: int = Field(1000, ge=1, le=MOST_STEPS)
    sample_every: int = Field(1000, ge=0, le=MOST_STEPS)
    keep: int = Field(2, ge=1, le=MOST_STEPS)
    keep_samples: bool | None = None
    track: bool = True
    log_model: bool = False


class Config(Settings):
    """All settings of a training, its samples and their evaluation."""

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
    def _defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        values = merge(DEFAULTS, {k: v for k, v in values.items() if v is not None})
        # A wrong target or sampler is reported with its place when its own field is checked.
        with suppress(UserError):
            usual = registries["targets"].parse(values["target"]).weighting
            values["weight"] = merge(usual, values.get("weight", usual))
        with suppress(UserError):
            form = registries["samplers"].parse(values["sampler"]).default_diffusion()
            values["diffusion"] = merge(spec(form), values["diffusion"]) if "diffusion" in values else form
        with suppress(UserError):
            if _is_older(values):
                values = merge(values, {"train": {"ema_warmup": False}})
                if registries["targets"].parse(values["target"]).floor:
                    values = merge(values, {"weight": {"floor": 0.0}})
        return values

    @field_validator("metric", mode="before")
    @classmethod
    def _one_or_more(cls, metric: Any) -> Any:
        return metric if isinstance(metric, (list, tuple)) else [metric]

    @property
    def solve_spec(self) -> SolveSpec:
        """The settings on which the plan of a sampler depends."""
        return SolveSpec(self.interp, self.target, self.diffusion, self.guidance)

    def plain(self) -> dict[str, Any]:
        """Return the configuration as plain values, every default resolved; files and identities are made of them."""
        return {key: to_plain(value) for key, value in self}


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


def _is_older(values: Mapping[str, Any]) -> bool:
    """Whether release 0.1 wrote a configuration: it has every setting of `train` but this one, and weights had no floor."""
    train = values.get("train")
    return isinstance(train, Mapping) and set(TrainSettings.model_fields) - set(train) == {"ema_warmup"}


SAMPLING_KEYS = ("sampler", "diffusion", "guidance", "sample", "metric", "run")
# Every other setting determines the weights.
TRAINING_KEYS = tuple(key for key in Config.model_fields if key not in SAMPLING_KEYS)


def to_plain(value: Any) -> Any:
    """Return a component, a group of settings or a value as plain values for YAML and JSON."""
    if isinstance(value, Component):
        return spec(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Path):
        return str(value)
    return [to_plain(part) for part in value] if isinstance(value, (list, tuple)) else value
