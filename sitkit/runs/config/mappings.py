"""Nested mappings of settings: merged, and flattened to dotted keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sitkit.registry import registries
from sitkit.runs.config.plain_yaml import DEEPEST
from sitkit.runtime.errors import UserError


def flat(values: Any, key: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted keys."""
    if not isinstance(values, Mapping):
        return {key: values}
    return {k: v for name, value in values.items() for k, v in flat(value, f"{key}.{name}" if key else name).items()}


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dotted keys as nested mappings, later ones on top.  Raises UserError for a key of many parts."""
    values: Any = {}
    for key, value in settings.items():
        if key.count(".") >= DEEPEST:
            raise UserError(f"{key[:40]}...: keys are nested more than {DEEPEST} deep.")
        for part in reversed(key.split(".")):
            value = {part: value}
        values = merge(values, value)
    return values


def merge(base: Any, over: Any) -> Any:
    """Return `over` on top of `base`.

    A component that keeps its name keeps its fields.  Of two presets of one component, the new one keeps the fields that no
    preset of the component sets.  Another component keeps no field of the old one.
    """
    if isinstance(base, Mapping) and isinstance(over, str):
        over = {"name": over}
    if isinstance(base, str) and isinstance(over, Mapping):
        base = {"name": base}
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if "name" in base and over.get("name", base["name"]) != base["name"]:
        return {**_common(base, over["name"]), **over}
    return {**base, **{k: merge(base.get(k), v) for k, v in over.items()}}


def _common(fields: Mapping[str, Any], name: Any) -> dict[str, Any]:
    """Return the fields of a component that stay if another preset of the same component takes its place."""
    old = fields["name"]
    for registry in registries.values() if isinstance(old, str) and isinstance(name, str) else ():
        if old in registry and name in registry and registry[old] is registry[name]:
            presets = [preset for other, preset in registry.presets().items() if registry[other] is registry[name]]
            of_presets = {"name", *(field for preset in presets for field in preset.fields)}
            return {field: value for field, value in fields.items() if field not in of_presets}
    return {}
