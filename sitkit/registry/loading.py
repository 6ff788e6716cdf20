"""Find the installed plugins, and load them and the built-in components.

A plugin is a package with an entry point in the group ``sitkit.plugins`` that names a module.  The import of that module
registers its components; the settings files beside it are registered too (`sitkit.registry.settings_files`).  Only
installed entry points load, never a path.  SITKIT_PLUGINS unset: all; empty: none; "a,b": these two.  A plugin that fails
is listed in `broken` and its names are withdrawn; the others load.  Two plugins that claim the same name are both broken,
because the name would be ambiguous.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from types import FrameType

from sitkit.registry.plugin import BrokenPlugin, Plugin, broken, installed, left_out, loaded, loaders, loading
from sitkit.registry.registry import registries
from sitkit.registry.settings_files import register_files, settings_files
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
# Seconds after which the plugin that is being imported is named.
SLOW = 10.0


def find_plugins() -> Iterator[Plugin]:
    """Yield the installed plugins in the order of their names."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        valid = point.pattern.match(point.value)
        module = valid["module"] if valid else point.value
        package, version = (point.dist.name, point.dist.version) if point.dist else (module, "?")
        yield Plugin(point.name, module, package, version)


def load_plugins(limit: float | None = None) -> None:
    """Import the built-in modules, then every installed plugin that SITKIT_PLUGINS allows.  Once.

    Args:
        limit: seconds after which the import of a plugin is given up, so that the plugin is broken; by default none.
    """
    with loading.lock:
        if loading.started:
            return
        loading.started = True
        for module in BUILTINS:
            importlib.import_module(module)
        register_files(importlib.import_module("sitkit"), None)
        only = os.environ.get("SITKIT_PLUGINS")
        allowed = None if only is None else [name.strip() for name in only.split(",") if name.strip()]
        installed.extend(find_plugins())
        left_out.extend(plugin for plugin in installed if allowed is not None and plugin.name not in allowed)
        candidates = [plugin for plugin in installed if plugin not in left_out]
        reasons = {plugin: reason for plugin in candidates if (reason := _import(plugin, limit))}
        for table in (*registries.values(), *settings_files.values()):
            for plugin, reason in table.conflicts():
                reasons.setdefault(plugin, reason)
        for plugin in candidates:
            if plugin in reasons:
                _withdraw(plugin)
                broken.append(BrokenPlugin(plugin, reasons[plugin]))
                warnings.warn(str(broken[-1]), stacklevel=3)
            else:
                loaded[plugin.name] = plugin
        _warn_of_names_without_plugin(allowed or [])


def _warn_of_names_without_plugin(allowed: list[str]) -> None:
    names = [plugin.name for plugin in installed]
    for name in allowed:
        if name not in names:
            known = f"Installed: {', '.join(names)}." if names else "No plugin is installed."
            message = f"SITKIT_PLUGINS names {name!r}, which is not installed.{suggest(name, names)} {known}"
            warnings.warn(message, stacklevel=3)


def _import(plugin: Plugin, limit: float | None) -> str:
    """Import a plugin's module and register its files.  Return the reason if it failed, else ""."""
    loading.current = plugin
    try:
        # What a plugin prints would be in the middle of a command's JSON.
        with contextlib.redirect_stdout(sys.stderr), _named_if_slow(plugin), _given_up_after(limit):
            register_files(importlib.import_module(plugin.module), plugin)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _withdraw(plugin)
        return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}."
    finally:
        loading.current = None
    return ""


@contextlib.contextmanager
def _named_if_slow(plugin: Plugin) -> Iterator[None]:
    message = f"Plugin {plugin.name!r} ({plugin.module}) is still being imported after {SLOW:g} s."
    timer = threading.Timer(SLOW, warnings.warn, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _given_up_after(limit: float | None) -> Iterator[None]:
    """Raise TimeoutError in the block after a time, where the system has a timer for the main thread."""
    if limit is None or not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"its import did not end within {limit:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _withdraw(plugin: Plugin) -> None:
    for table in (*registries.values(), *settings_files.values()):
        table.withdraw(plugin)


loaders.append(load_plugins)
