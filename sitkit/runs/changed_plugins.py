"""Plugins whose installed source differs from the source that made a result, and what happens to such results.

The environment of a training, of samples and of a number records the digest of each plugin's source (`plugin_sources`).  A
plugin counts if it brings a component that the result depends on.  Records of sitkit 0.1 have no digests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from sitkit.registry import Component, registration_of
from sitkit.registry.plugin import Plugin
from sitkit.runs.config.schema import TRAINING_KEYS, Config
from sitkit.runs.run_folder import RunFolder, folder_of
from sitkit.runtime.errors import UserError

CHOICES = ("redo", "keep")
ChangedPlugin = Literal["redo", "keep"]


def changed_plugins(record: Mapping[str, Any], values: Iterable[Any]) -> list[str]:
    """Return the plugins of components whose source has changed since a record was made, each as a phrase.

    Args:
        record: the environment of the result.
        values: the components that the result depends on; other values are passed over.
    """
    recorded = record.get("plugin_sources") or {}
    plugins = {plugin for value in values for plugin in _plugins_of(value)}
    return [
        f"plugin {plugin.name!r} ({plugin})"
        for plugin in sorted(plugins, key=lambda plugin: plugin.name)
        if recorded.get(plugin.name, plugin.source_digest()) != plugin.source_digest()
    ]


def _plugins_of(value: Any) -> set[Plugin]:
    """Return the plugins that registered a component and the components in its fields."""
    if isinstance(value, (list, tuple)):
        return {plugin for part in value for plugin in _plugins_of(part)}
    if not isinstance(value, Component):
        return set()
    found = {plugin for field in dataclasses.fields(value) for plugin in _plugins_of(getattr(value, field.name))}
    _, plugin = registration_of(value)
    return found | ({plugin} if plugin else set())


def changed_since_training(folder: Path, config: Config) -> str:
    """Return a sentence on the plugins that changed since a run was trained; "" if none did or the folder is no run's."""
    record = RunFolder(folder).read_environment()
    changed = changed_plugins(record, [getattr(config, key) for key in TRAINING_KEYS])
    return _sentence(changed, f"{folder.name} was trained")


def _sentence(changed: list[str], event: str) -> str:
    return f"The source of {' and of '.join(changed)} changed since {event} with it." if changed else ""


def warn_of_changed_plugins(folder: Path, config: Config) -> None:
    """Warn if a plugin changed since a run was trained."""
    if message := changed_since_training(folder, config):
        warnings.warn(message, stacklevel=3)


def warn_of_changed_samples(record: Mapping[str, Any], config: Config) -> None:
    """Warn if a plugin of the sampler, the diffusion or the guidance changed since samples with this record were drawn."""
    changed = changed_plugins(record.get("environment") or {}, [config.sampler, config.diffusion, config.guidance])
    if changed:
        warnings.warn(_sentence(changed, "these samples were drawn"), stacklevel=3)


def warn_of_changed_number(record: Mapping[str, Any], config: Config, metric: Component) -> None:
    """Warn if a plugin of the metric or of the sampling changed since a number with this record was measured."""
    if changed := changed_plugins(record.get("environment") or {}, [metric]):
        warnings.warn(_sentence(changed, f"{metric.name} was measured"), stacklevel=3)
    warn_of_changed_samples(record["sampling"], config)


def settle_changed_plugins(configs: Iterable[Config], choice: ChangedPlugin | None) -> list[Path]:
    """Refuse, keep or return the runs of configurations that were trained with another source of a plugin.

    Args:
        configs: configurations of trainings.
        choice: "redo" returns such runs, "keep" warns.

    Returns:
        The folders of the runs to train again.

    Raises:
        UserError: for a run that was trained with another source, without a choice.
    """
    if choice not in (None, *CHOICES):
        raise UserError(f"changed_plugin {choice!r}: no such choice. Known: {', '.join(CHOICES)}.")
    folders = {folder_of(config): config for config in configs}
    stale: dict[Path, str] = {}
    for folder, config in folders.items():
        # The work on a run that cannot be read says so itself.
        with contextlib.suppress(UserError):
            if text := changed_since_training(folder, config):
                stale[folder] = text
    if stale and choice is None:
        more = f" The same for {len(stale) - 1} more runs." if len(stale) > 1 else ""
        raise UserError(
            f"{next(iter(stale.values()))}{more} Give --changed-plugin redo to remove such runs with their numbers and make "
            "them again, or --changed-plugin keep to use them as they are."
        )
    if choice == "redo":
        return list(stale)
    for text in stale.values():
        warnings.warn(text, stacklevel=3)
    return []
