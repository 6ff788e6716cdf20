"""sitkit: which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    from sitkit.run import load
    from sitkit.sampler import Sample, Sampler
    from sitkit.target import Target
    from sitkit.timestep import Timestep
    from sitkit.weighting import Weighting

__version__ = "0.1.0"

# Public names are imported when first used, so that `import sitkit` and `sitkit list` are quick.
_LAZY = {
    "Autoencoder": "sitkit.autoencoder",
    "Backbone": "sitkit.backbones.backbone",
    "Batch": "sitkit.loss",
    "Coefficients": "sitkit.interpolant",
    "Component": "sitkit.registry",
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
    "Registry": "sitkit.registry",
    "Sample": "sitkit.sampler",
    "Sampler": "sitkit.sampler",
    "Target": "sitkit.target",
    "Timestep": "sitkit.timestep",
    "UserError": "sitkit.registry",
    "Weighting": "sitkit.weighting",
    "WorkFailed": "sitkit.registry",
    "autoencoders": "sitkit.registry",
    "backbones": "sitkit.registry",
    "couplings": "sitkit.registry",
    "datasets": "sitkit.registry",
    "diffusions": "sitkit.registry",
    "extractors": "sitkit.registry",
    "guidances": "sitkit.registry",
    "interpolant_loss": "sitkit.loss",
    "interpolants": "sitkit.registry",
    "load": "sitkit.run",
    "log_prob": "sitkit.likelihood",
    "losses": "sitkit.registry",
    "metrics": "sitkit.registry",
    "samplers": "sitkit.registry",
    "targets": "sitkit.registry",
    "timesteps": "sitkit.registry",
    "weightings": "sitkit.registry",
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
