"""Which installed packages extend sitkit, and what became of each when it was loaded.

A plugin is a package with an entry point in the group ``sitkit.plugins`` that names a module; importing that module
registers its components, and the settings that lie beside it are taken in (`sitkit.shipped`).  Only installed entry
points load, never a path.  SITKIT_PLUGINS unset: all; empty: none; "a,b": these.  A plugin that fails is named in
`broken`, what it had registered is dropped, and the rest goes on.  Two plugins that claim one name are both broken:
which of them was meant, nobody can know.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points

BUILTINS = (
    "sitkit.interpolant",
    "sitkit.target",
    "sitkit.weighting",
    "sitkit.loss",
    "sitkit.timestep",
    "sitkit.coupling",
    "sitkit.diffusion",
    "sitkit.guidance",
    "sitkit.sampler",
    "sitkit.multistep",
    "sitkit.backbones",
    "sitkit.autoencoder",
    "sitkit.data",
    "sitkit.metrics",
)
GROUP = "sitkit.plugins"


@dataclass(frozen=True)
class Plugin:
    """An entry point: its name, the module that it names, and the package that brings it."""

    name: str
    module: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def owns(self, module: str) -> bool:
        """Whether a module is the plugin's, or lies in it."""
        return module == self.module or module.startswith(f"{self.module}.")


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that did not load, and why."""

    plugin: Plugin
    reason: str

    def __str__(self) -> str:
        name = self.plugin.name
        return (
            f"Plugin {name!r} ({self.plugin.module}) did not load: {self.reason} "
            f"Uninstall {self.plugin.package}, or leave {name!r} out of SITKIT_PLUGINS."
        )


@dataclass
class _Loading:
    lock: threading.RLock = field(default_factory=threading.RLock)
    started: bool = False
    current: Plugin | None = None


_loading = _Loading()
installed: list[Plugin] = []
loaded: dict[str, Plugin] = {}
broken: list[BrokenPlugin] = []
left_out: list[Plugin] = []


def find() -> Iterator[Plugin]:
    """The installed plugins, by name."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "?")
        yield Plugin(point.name, point.module, package, version)


def load_plugins() -> None:
    """Import the built-in modules, then every installed plugin that SITKIT_PLUGINS allows.  Once."""
    with _loading.lock:
        if _loading.started:
            return
        _loading.started = True
        from sitkit.shipped import stock

        for module in BUILTINS:
            importlib.import_module(module)
        stock(importlib.import_module("sitkit"), None)
        only = os.environ.get("SITKIT_PLUGINS")
        allowed = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
        installed.extend(find())
        for plugin in installed:
            if allowed is None or plugin.name in allowed:
                _load(plugin)
            else:
                left_out.append(plugin)
        _warn_of_names_without_plugin(allowed or [])


def _warn_of_names_without_plugin(allowed: list[str]) -> None:
    from sitkit.registry import suggest

    names = [plugin.name for plugin in installed]
    for name in allowed:
        if name not in names:
            has = f"Installed: {', '.join(names)}." if names else "None is installed."
            message = f"SITKIT_PLUGINS names {name!r}, which is no installed plugin.{suggest(name, names)} {has}"
            warnings.warn(message, stacklevel=3)


def owner(module: str) -> Plugin | None:
    """The plugin that a registration from this module belongs to; None for sitkit itself and for the user's own code."""
    for plugin in installed:
        if plugin.owns(module):
            return plugin
    return None if module.partition(".")[0] == "sitkit" else _loading.current


def _load(plugin: Plugin) -> None:
    from sitkit.registry import Collision, UserError
    from sitkit.shipped import stock

    if any(plugin == other.plugin for other in broken):
        # Another plugin imported its module, and one of its names was contested.
        return
    _loading.current = plugin
    try:
        stock(importlib.import_module(plugin.module), plugin)
    except Collision as error:
        _break(plugin, str(error))
        if error.holder is not None:
            error.names.contest(error.name)
            loaded.pop(error.holder.name, None)
            _break(error.holder, f"{error.names.kind} {error.name!r} is also registered by {plugin.module}.")
    except (Exception, SystemExit) as error:
        _break(plugin, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}.")
    else:
        loaded[plugin.name] = plugin
    finally:
        _loading.current = None


def _break(plugin: Plugin, reason: str) -> None:
    from sitkit.registry import registries
    from sitkit.shipped import shelves

    for names in (*registries.values(), *shelves.values()):
        names.forget(plugin)
    broken.append(BrokenPlugin(plugin, reason))
    warnings.warn(str(broken[-1]), stacklevel=4)
