"""Plugins: installed packages that extend sitkit, and the state of their loading.

`sitkit.registry.loading` adds the function that loads them; registries call `ensure_loaded` before they look up a name.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Plugin:
    """An entry point of an installed package.

    Args:
        name: the name of the entry point.
        module: the module that it names.
        package: the name of the package.
        version: the version of the package.
    """

    name: str
    module: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.package} {self.version}"

    def owns(self, module: str) -> bool:
        """Whether a module is the plugin's module or lies in it."""
        return module == self.module or module.startswith(f"{self.module}.")

    def source_digest(self) -> str:
        """Return the SHA-256 of the plugin's Python files, the same for an editable install and a wheel."""
        return _source_digest(self.module)


@functools.cache
def _source_digest(module: str) -> str:
    # Read once in a process: the code in memory is that of its start.
    package = find_spec(module)
    file = Path(package.origin) if package and package.origin else None
    files = [] if file is None else [file] if file.name != "__init__.py" else file.parent.rglob("*.py")
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        name = path.relative_to(file.parent) if file else path
        digest.update(b"%s\0%d\0%s" % (name.as_posix().encode(), len(content), content))
    return digest.hexdigest()


@dataclass(frozen=True)
class BrokenPlugin:
    """A plugin that did not load, and the reason."""

    plugin: Plugin
    reason: str

    def __str__(self) -> str:
        name = self.plugin.name
        return (
            f"Plugin {name!r} ({self.plugin.module}) did not load: {self.reason} "
            f"Uninstall {self.plugin.package}, or leave {name!r} out of SITKIT_PLUGINS."
        )


@dataclass
class Loading:
    """The state of loading.

    Args:
        lock: held during loading.
        started: whether loading has begun.
        current: the plugin that is being imported.
    """

    lock: threading.RLock = field(default_factory=threading.RLock)
    started: bool = False
    current: Plugin | None = None


loading = Loading()
loaders: list[Callable[[], None]] = []
installed: list[Plugin] = []
loaded: dict[str, Plugin] = {}
broken: list[BrokenPlugin] = []
left_out: list[Plugin] = []


def owner(module: str) -> Plugin | None:
    """Return the plugin that owns a registration from a module; None for sitkit itself and for the user's own code."""
    for plugin in installed:
        if plugin.owns(module):
            return plugin
    return None if module.partition(".")[0] == "sitkit" else loading.current


def ensure_loaded() -> None:
    """Load the built-in components and the installed plugins, once."""
    for load in loaders:
        load()
