"""sitkit: which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sitkit.data.dataset import Dataset
    from sitkit.evaluation.extractors.extractor import Extractor
    from sitkit.evaluation.metrics.metric import Metric
    from sitkit.models.autoencoder import Autoencoder
    from sitkit.models.backbone import Backbone
    from sitkit.models.loss import Batch, Loss, interpolant_loss
    from sitkit.registry import (
        Component,
        Registry,
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
    from sitkit.runs.run import load
    from sitkit.runtime.errors import UserError, WorkFailed
    from sitkit.solvers.guidance import Guidance
    from sitkit.solvers.log_density import log_prob
    from sitkit.solvers.sampler import Sample, Sampler
    from sitkit.transport.coupling import Coupling
    from sitkit.transport.diffusion import Diffusion
    from sitkit.transport.field import Field, Readings
    from sitkit.transport.interpolant import Coefficients, Interpolant
    from sitkit.transport.target import Target
    from sitkit.transport.timestep import Timestep
    from sitkit.transport.weighting import Weighting

__version__ = "0.1.0"

# Public names are imported when first used, so that `import sitkit` and `sitkit list` are quick.
_LAZY = {
    "Autoencoder": "sitkit.models.autoencoder",
    "Backbone": "sitkit.models.backbone",
    "Batch": "sitkit.models.loss",
    "Coefficients": "sitkit.transport.interpolant",
    "Component": "sitkit.registry",
    "Coupling": "sitkit.transport.coupling",
    "Dataset": "sitkit.data.dataset",
    "Diffusion": "sitkit.transport.diffusion",
    "Extractor": "sitkit.evaluation.extractors.extractor",
    "Field": "sitkit.transport.field",
    "Guidance": "sitkit.solvers.guidance",
    "Interpolant": "sitkit.transport.interpolant",
    "Loss": "sitkit.models.loss",
    "Metric": "sitkit.evaluation.metrics.metric",
    "Readings": "sitkit.transport.field",
    "Registry": "sitkit.registry",
    "Sample": "sitkit.solvers.sampler",
    "Sampler": "sitkit.solvers.sampler",
    "Target": "sitkit.transport.target",
    "Timestep": "sitkit.transport.timestep",
    "UserError": "sitkit.runtime.errors",
    "Weighting": "sitkit.transport.weighting",
    "WorkFailed": "sitkit.runtime.errors",
    "autoencoders": "sitkit.registry",
    "backbones": "sitkit.registry",
    "couplings": "sitkit.registry",
    "datasets": "sitkit.registry",
    "diffusions": "sitkit.registry",
    "extractors": "sitkit.registry",
    "guidances": "sitkit.registry",
    "interpolant_loss": "sitkit.models.loss",
    "interpolants": "sitkit.registry",
    "load": "sitkit.runs.run",
    "log_prob": "sitkit.solvers.log_density",
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
