"""Identities of a training, of samples and of numbers: hashes of the settings that each depends on.

A component counts by its name, its version and plugin, and the fields that differ from their defaults; a group of settings
by what differs from the defaults.  So a field that a release adds changes no identity while it has its default.  A path of
data counts by the fingerprint of the data.  Release 0.1 hashed every field: `run_folder` finds what it left.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from sitkit.data.dataset import load_examples
from sitkit.models.autoencoder import median_std
from sitkit.registry import Component, differing, essence, registries, spec
from sitkit.runs.config.schema import TRAINING_KEYS, Config, SampleSettings, Settings
from sitkit.runtime.errors import UserError
from sitkit.runtime.hashing import hyphenated, identity
from sitkit.transport.interval import finite_ends

Packages = Mapping[str, str]


def training_identity(
    config: Config, contents: Mapping[str, str] | None = None, packages: Packages | None = None
) -> str:
    """Return the identity of a training: data, model, loss, optimiser and training seed, and nothing else.

    Args:
        config: the configuration.
        contents: the fingerprints of "data" and "autoencoder"; by default they are computed.
        packages: the packages of plugins that a record of release 0.1 has; by default the installed ones.
    """
    return identity(dict(_training(config, contents or {}, packages)))


def _training(config: Config, contents: Mapping[str, str], packages: Packages | None) -> Iterator[tuple[str, Any]]:
    for key in TRAINING_KEYS:
        value, field = getattr(config, key), Config.model_fields[key]
        if not isinstance(value, Component):
            part = _group(value, packages)
            if part:
                yield key, part
        elif field.is_required():
            yield key, essence(value, content=contents.get(key), packages=packages)
        else:
            yield from differing([(key, value, field.get_default(call_default_factory=True))], packages).items()
    finite = finite_ends(config.interp, config.target, config.weight)
    # Release 0.1 moved the times of an end without a finite loss; now all times are scaled.
    if packages is None and not all(finite):
        yield "finite_ends", list(finite)


def _group(group: Settings, packages: Packages | None, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what identifies a group of settings: its version unless that is 1, and what differs from the defaults."""
    version = {"version": group.version} if group.version != 1 and packages is None else {}
    fields = ((name, field) for name, field in type(group).model_fields.items() if name not in leave_out)
    missing = dataclasses.MISSING
    values = (
        (name, getattr(group, name), missing if f.is_required() else f.get_default(call_default_factory=True))
        for name, f in fields
    )
    return version | differing(values, packages)


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
    return identity(training or training_identity(config), sampling_essence(config, step))


def sampling_essence(config: Config, step: int, packages: Packages | None = None) -> dict[str, Any]:
    """Return what identifies samples beyond the training, as plain values; packages: as in `training_identity`."""
    parts = {key: essence(getattr(config, key), packages=packages) for key in ("sampler", "diffusion", "guidance")}
    return {"step": step, "sample": _group(config.sample, packages, _unused(config))} | parts


def recorded_samples(config: Config, recipe: Mapping[str, Any], training: str, packages: Packages | None) -> list[str]:
    """Return the identities of the samples of a recipe in a record; the other arguments as in `training_identity`.

    There are two: a setting that the sampler now derives to the same value is also the one that is not set.
    Raises UserError for a component that does not exist, and ValueError for a setting that does not.
    """
    parts = {key: registries[f"{key}s"].parse(recipe[key]) for key in ("sampler", "diffusion", "guidance")}
    sample = SampleSettings.model_validate(recipe["sample"])
    drawn = config.model_copy(update={**parts, "sample": sample})
    std = None
    if drawn.sampler.stochastic:
        with contextlib.suppress(UserError):
            std = median_std(config.autoencoder, load_examples(config.data))
    same = [drawn, drawn.model_copy(update={"sampler": drawn.sampler.without_derived(drawn.solve_spec, std)})]
    return [identity(training, sampling_essence(each, recipe["step"], packages)) for each in same]


def _unused(config: Config) -> tuple[str, ...]:
    # Only the steps of an adaptive solver depend on the rest of the batch.
    return () if config.sampler.couples_batch else ("batch",)


def sampling_recipe(config: Config, step: int) -> dict[str, Any]:
    """Return everything beyond the training that a sample depends on, as plain values for records."""
    return {
        "step": step,
        "sampler": spec(config.sampler),
        "diffusion": spec(config.diffusion),
        "guidance": spec(config.guidance),
        "sample": config.sample.model_dump(mode="json", exclude=set(_unused(config))),
    }


def number_identity(samples: str, metric: Mapping[str, Any], data: str) -> str:
    """Return the identity of a number by those of its samples and data, and the essence of its metric."""
    return identity(samples, metric, data)


def final_step(config: Config) -> int:
    """Return the step of the last checkpoint of a finished training; 0 for a network that is not trained."""
    return config.train.steps if config.backbone.trainable else 0
