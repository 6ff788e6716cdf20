"""Which installed packages extend sitkit, and what became of each when it was loaded.

A plugin is a package with an entry point in the group ``sitkit.plugins`` that names a module; importing that module
registers its components, and the settings that lie beside it are taken in (`sitkit.registry.settings_files`).  Only installed entry
points load, never a path.  SITKIT_PLUGINS unset: all; empty: none; "a,b": these.  A plugin that fails is named in
`broken`, what it had registered is dropped, and the rest goes on.  Two plugins that claim one name are both broken:
which of them was meant, nobody can know.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points

from sitkit.registry.plugin import BrokenPlugin, Plugin, broken, installed, left_out, loaded, loading
from sitkit.registry.registry import Collision, registries
from sitkit.registry.settings_files import shelves, stock
from sitkit.runtime.errors import UserError, suggest

BUILTINS = (
    "sitkit.transport.interpolant",
    "sitkit.transport.target",
    "sitkit.transport.weighting",
    "sitkit.models.loss",
    "sitkit.transport.timestep",
    "sitkit.transport.coupling",
    "sitkit.transport.diffusion",
    "sitkit.solvers.guidance",
    "sitkit.solvers.ode",
    "sitkit.solvers.sde",
    "sitkit.solvers.multistep",
    "sitkit.models.backbone",
    "sitkit.data.described",
    "sitkit.data.digits",
    "sitkit.data.npz",
    "sitkit.data.folder",
    "sitkit.data.hub",
    "sitkit.data.latents",
    "sitkit.data.toy",
    "sitkit.models.autoencoder",
    "sitkit.evaluation.extractors.classifier",
    "sitkit.evaluation.metrics.frechet",
    "sitkit.evaluation.metrics.kernel",
    "sitkit.evaluation.metrics.precision_recall",
    "sitkit.evaluation.extractors.pretrained",
    "sitkit.evaluation.metrics.inception_score",
    "sitkit.evaluation.metrics.sliced_wasserstein",
)
GROUP = "sitkit.plugins"


def find_plugins() -> Iterator[Plugin]:
    """The installed plugins, by name."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        package, version = (point.dist.name, point.dist.version) if point.dist else (point.module, "?")
        yield Plugin(point.name, point.module, package, version)


def load_plugins() -> None:
    """Import the built-in modules, then every installed plugin that SITKIT_PLUGINS allows.  Once."""
    with loading.lock:
        if loading.started:
            return
        loading.started = True
        for module in BUILTINS:
            importlib.import_module(module)
        stock(importlib.import_module("sitkit"), None)
        only = os.environ.get("SITKIT_PLUGINS")
        allowed = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
        installed.extend(find_plugins())
        for plugin in installed:
            if allowed is None or plugin.name in allowed:
                _load(plugin)
            else:
                left_out.append(plugin)
        _warn_of_names_without_plugin(allowed or [])


def _warn_of_names_without_plugin(allowed: list[str]) -> None:

    names = [plugin.name for plugin in installed]
    for name in allowed:
        if name not in names:
            has = f"Installed: {', '.join(names)}." if names else "None is installed."
            message = f"SITKIT_PLUGINS names {name!r}, which is no installed plugin.{suggest(name, names)} {has}"
            warnings.warn(message, stacklevel=3)


def _load(plugin: Plugin) -> None:

    if any(plugin == other.plugin for other in broken):
        # Another plugin imported its module, and one of its names was contested.
        return
    loading.current = plugin
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
        loading.current = None


def _break(plugin: Plugin, reason: str) -> None:

    for names in (*registries.values(), *shelves.values()):
        names.forget(plugin)
    broken.append(BrokenPlugin(plugin, reason))
    warnings.warn(str(broken[-1]), stacklevel=4)


loading.load = load_plugins
