"""The settings of a run: one tree of typed, frozen models.

Defaults < file < command line < ablation cell, all through `merge`.  Everything a flag can say, a YAML file says by the
same name.  YAML is 1.2 and read safely; an error names file, line, key and the nearest right name.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
    ema: one decay or several; samples use the first by default.  posthoc: relative widths of power-function averages
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
    track: whether the run is sent to MLflow.  log_model: whether the trained network is sent too, as a model with signature.
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

    @property
    def solve_spec(self) -> SolveSpec:
        """The settings on which the plan of a sampler depends."""
        return SolveSpec(self.interp, self.target, self.diffusion, self.guidance)

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
TRAINING_KEYS = (
    "interp",
    "target",
    "weight",
    "loss",
    "timestep",
    "coupling",
    "backbone",
    "autoencoder",
    "data",
    "train",
)


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return spec(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value
