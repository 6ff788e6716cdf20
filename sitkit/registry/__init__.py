"""Registries of components by name, and the plugins that add more."""

from sitkit.registry.essence import differing, essence
from sitkit.registry.loading import load_plugins
from sitkit.registry.plugin import Plugin
from sitkit.registry.registry import (
    Component,
    Preset,
    Registry,
    autoencoders,
    backbones,
    build,
    couplings,
    datasets,
    diffusions,
    extractors,
    guidances,
    interpolants,
    losses,
    metrics,
    origins,
    owned,
    registries,
    registry_of,
    samplers,
    spec,
    targets,
    timesteps,
    weightings,
)

__all__ = [
    "Component", "Plugin", "Preset", "Registry", "autoencoders", "backbones", "build", "couplings", "datasets",
    "differing", "diffusions", "essence", "extractors", "guidances", "interpolants", "load_plugins", "losses", "metrics",
    "origins", "owned", "registries", "registry_of", "samplers", "spec", "targets", "timesteps", "weightings",
]  # fmt: skip
