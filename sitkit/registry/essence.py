"""What identifies a component or a group of settings: its name, its version, its plugin, and what differs from the defaults."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from sitkit.registry.registry import Component, registries
from sitkit.runtime.errors import UserError


def essence(
    component: Component, *, content: str | None = None, packages: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what identifies a component, as plain values for identities.

    Args:
        component: a registered component.
        content: the fingerprint of what its places hold; by default it is computed, and a place that cannot be read counts
            by its path.
        packages: the packages of plugins as `origins` recorded them before components had versions; by default those of
            now, and the versions of the components.

    Returns:
        Its name; its version unless that is 1; the package and version of its plugin; the fingerprint of its places; and
        the fields that differ from their defaults.
    """
    kind, package = _registration(component)
    found: dict[str, Any] = {"name": component.name}
    if packages is not None:
        package = packages.get(f"{kind} {component.name}")
    elif component.version != 1:
        found["version"] = component.version
    if package:
        found["package"] = package
    places = tuple(place for place in component.places() if getattr(component, place) is not None)
    if places and content is None:
        with contextlib.suppress(UserError):
            content = component.content()
    if places and content is not None:
        found["content"] = content
    known = places if content is not None else ()
    fields = [field for field in dataclasses.fields(component) if field.init and field.name not in known]
    return found | differing(((f.name, getattr(component, f.name), _default(f)) for f in fields), packages)


def differing(values: Iterable[tuple[str, Any, Any]], packages: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the values that identities have, as plain values.

    Args:
        values: (name, value, default); the default is `dataclasses.MISSING` if there is none.
        packages: as in `essence`.

    Returns:
        The values that are not the default, and components with a version or a package.
    """
    found = {}
    for name, value, default in values:
        plain = _identifying(value, packages)
        if _marked(plain) or plain != _identifying(default, packages):
            found[name] = plain
    return found


def _marked(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_marked, value))
    return isinstance(value, dict) and bool({"version", "package"} & value.keys() or any(map(_marked, value.values())))


def _identifying(value: Any, packages: Mapping[str, str] | None) -> Any:
    if isinstance(value, Component):
        return essence(value, packages=packages)
    return [_identifying(part, packages) for part in value] if isinstance(value, (tuple, list)) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _registration(component: Component) -> tuple[str, str | None]:
    """Return the kind of a component, and the package and version of the plugin that registered it."""
    for registry in registries.values():
        if component.name in registry and registry[component.name] is type(component):
            plugin = registry.plugin(component.name)
            return registry.kind, str(plugin) if plugin else None
    return "", None
