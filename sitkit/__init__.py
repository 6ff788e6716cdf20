"""sitkit: which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sitkit.registry import (
    Component,
    Registry,
    UserError,
    WorkFailed,
    autoencoders,
    backbones,
    couplings,
    datasets,
    diffusions,
    extractors,
    guidances,
    interpolants,
    losses,
    metrics,
    samplers,
    targets,
    timesteps,
    weightings,
)

if TYPE_CHECKING:
    from sitkit.autoencoder import Autoencoder
    from sitkit.backbones.backbone import Backbone
    from sitkit.coupling import Coupling
    from sitkit.data.dataset import Dataset
    from sitkit.diffusion import Diffusion
    from sitkit.field import Field, Readings
    from sitkit.guidance import Guidance
    from sitkit.interpolant import Coefficients, Interpolant
    from sitkit.likelihood import log_prob
    from sitkit.loss import Batch, Loss, interpolant_loss
    from sitkit.metrics.features import Extractor
    from sitkit.metrics.metric import Metric
    from sitkit.run import load
    from sitkit.sampler import Sample, Sampler
    from sitkit.target import Target
    from sitkit.timestep import Timestep
    from sitkit.weighting import Weighting

__version__ = "0.1.0"

# Public names that need torch or numpy are imported when first used, so that `import sitkit` and `sitkit list` are quick.
_LAZY = {
    "Autoencoder": "sitkit.autoencoder",
    "Backbone": "sitkit.backbones.backbone",
    "Batch": "sitkit.loss",
    "Coefficients": "sitkit.interpolant",
    "Coupling": "sitkit.coupling",
    "Dataset": "sitkit.data.dataset",
    "Diffusion": "sitkit.diffusion",
    "Extractor": "sitkit.metrics.features",
    "Field": "sitkit.field",
    "Guidance": "sitkit.guidance",
    "Interpolant": "sitkit.interpolant",
    "Loss": "sitkit.loss",
    "Metric": "sitkit.metrics.metric",
    "Readings": "sitkit.field",
    "Sample": "sitkit.sampler",
    "Sampler": "sitkit.sampler",
    "Target": "sitkit.target",
    "Timestep": "sitkit.timestep",
    "Weighting": "sitkit.weighting",
    "interpolant_loss": "sitkit.loss",
    "load": "sitkit.run",
    "log_prob": "sitkit.likelihood",
}

__all__ = [
    "Autoencoder",
    "Backbone",
    "Batch",
    "Coefficients",
    "Component",
    "Coupling",
    "Dataset",
    "Diffusion",
    "Extractor",
    "Field",
    "Guidance",
    "Interpolant",
    "Loss",
    "Metric",
    "Readings",
    "Registry",
    "Sample",
    "Sampler",
    "Target",
    "Timestep",
    "UserError",
    "Weighting",
    "WorkFailed",
    "autoencoders",
    "backbones",
    "couplings",
    "datasets",
    "diffusions",
    "extractors",
    "guidances",
    "interpolant_loss",
    "interpolants",
    "load",
    "log_prob",
    "losses",
    "metrics",
    "samplers",
    "targets",
    "timesteps",
    "weightings",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sitkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
