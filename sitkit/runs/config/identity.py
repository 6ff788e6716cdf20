"""Identities of a training, of samples and of numbers: hashes of the settings that each depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitkit.registry import Component, registries, spec
from sitkit.runs.config.schema import TRAINING_KEYS, Config
from sitkit.runtime.errors import UserError
from sitkit.runtime.hashing import hyphenated, identity


def training_identity(config: Config) -> str:
    """Return the identity of a training: data, model, loss, optimiser and training seed, and nothing else."""
    plain = config.plain()
    return identity({key: plain[key] for key in TRAINING_KEYS})


def slug(config: Config) -> str:
    """Return a readable name for a run, safe as a folder name on every system for any names of components."""
    return hyphenated(label(c) for c in (config.data, config.interp, config.target, config.backbone))


def label(component: Component) -> str:
    """Return the name of the preset that a component matches, else the component's own name."""
    plain = spec(component)
    for registry in registries.values():
        if component.name in registry and isinstance(component, registry[component.name]):
            for name, preset in registry.presets().items():
                if preset.of == component.name and preset.fields and spec(registry.create(name)) == plain:
                    return name
    return component.name


def sampling_identity(config: Config, step: int, training: str | None = None) -> str:
    """Return the identity of samples: the training, the checkpoint's step, sampler, w, guidance, weights, seed, n, labels.

    Args:
        config: the configuration.
        step: the step of the checkpoint.
        training: the identity of the training, if it is known already.
    """
    return identity(training or training_identity(config), sampling_recipe(config, step))


def sampling_recipe(config: Config, step: int) -> dict[str, Any]:
    """Return everything beyond the training that a sample depends on, as plain values."""
    settings = config.sample.model_dump(mode="json")
    if not config.sampler.couples_batch:
        # Only the steps of an adaptive solver depend on the rest of the batch.
        del settings["batch"]
    return {
        "step": step,
        "sampler": spec(config.sampler),
        "diffusion": spec(config.diffusion),
        "guidance": spec(config.guidance),
        "sample": settings,
    }


def number_identity(samples: str, metric: Mapping[str, Any], data: str) -> str:
    """Return the identity of a number by those of its samples and data, and the metric as plain values.

    Raises:
        UserError: for a missing file of reference statistics.
    """
    file = metric.get("reference")
    return identity(samples, metric, data, *([file_digest(file)] if file else []))


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file of reference statistics.  Raises UserError if it is missing."""
    try:
        stat = Path(path).stat()
    except OSError:
        raise UserError(f"{path}: there is no such file of reference statistics.") from None
    return _sha256_of(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=16)
def _sha256_of(path: str, *state: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class ResultLocation:
    """The identities of a cell's number: its training, its run's folder name, its samples, its measurement, its metric."""

    training: str
    run: str
    samples: str
    measurement: str
    metric: str


def location_of(config: Config) -> ResultLocation:
    """Return the identities of the number of a configuration."""
    return locations_of([config])[0]


def locations_of(configs: Iterable[Config]) -> list[ResultLocation]:
    """Return the identities of the number of each configuration; common parts are computed once."""
    known: dict[Any, Any] = {}

    def once(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        try:
            if key not in known:
                known[key] = make()
            return known[key]
        except TypeError:
            # A component with a field that has no hash, as a plugin may have.
            return make()

    locations = []
    for config in configs:
        step, metric = final_step(config), config.metric[0]
        training = tuple(getattr(config, name) for name in TRAINING_KEYS)
        sampling = (*training, config.sampler, config.diffusion, config.guidance, config.sample)
        key, name = once(training, lambda config=config: (training_identity(config), slug(config)))
        samples = once(sampling, lambda c=config, step=step, key=key: sampling_identity(c, step, key))
        plain = once((metric,), lambda metric=metric: spec(metric))
        measurement = once((*sampling, metric), lambda samples=samples, plain=plain: identity(samples, plain))
        locations.append(ResultLocation(key, f"{name}-{key}", samples, measurement, json.dumps(plain, sort_keys=True)))
    return locations


def final_step(config: Config) -> int:
    """Return the step of the last checkpoint of a finished training; 0 for a network that is not trained."""
    return config.train.steps if config.backbone.trainable else 0
