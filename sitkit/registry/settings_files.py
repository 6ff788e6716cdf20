"""Settings with names: presets, and experiments, that come with sitkit or with a plugin.

A plugin whose module is a package ships every `presets/NAME.yaml` and `experiments/NAME.yaml` in it.  Names are had as
components' are: of two plugins that bring one name neither is taken, and both are named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from sitkit.registry.plugin import Plugin, ensure_loaded
from sitkit.registry.registry import NameTable
from sitkit.runtime.errors import UserError, suggest


class Shelf(NameTable, Mapping[str, Path]):
    """Names to settings files of one kind, read-only outside this module."""

    def __init__(self, kind: str, plural: str) -> None:
        super().__init__(kind, plural)
        self._files: dict[str, Path] = {}
        shelves[plural] = self

    def put(self, path: Path, plugin: Plugin | None) -> None:
        """Take a file in by its name.  Raises Collision for a name that is taken."""
        self.claim(path.stem, str(path), plugin)
        self._files[path.stem] = path

    def drop(self, name: str) -> None:
        """Free a name and forget its file."""
        super().drop(name)
        del self._files[name]

    def origin(self, name: str) -> str:
        """The module that the file lies in."""
        plugin = self._plugins[name]
        return plugin.module if plugin else "sitkit"

    def meaning(self, name: str) -> str:
        """The first line of the comment that a file begins with."""
        with self[name].open(encoding="utf-8") as file:
            first = file.readline().strip()
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    def find(self, word: str | Path) -> Path:
        """A file by name, or by its own path.  Raises UserError with the nearest right name."""
        if str(word) in self:
            return self[str(word)]
        path = Path(word)
        if path.suffix in (".yaml", ".yml") or path.exists():
            return path
        known = f"{self.plural.capitalize()}: {', '.join(self)}." if len(self) else f"There are no {self.plural}."
        raise UserError(f"No {self.kind} or file {str(word)!r}.{suggest(str(word), list(self))} {known}")

    def __getitem__(self, name: str) -> Path:
        ensure_loaded()
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        ensure_loaded()
        return iter(self._files)

    def __len__(self) -> int:
        ensure_loaded()
        return len(self._files)


def stock(module: ModuleType, plugin: Plugin | None) -> None:
    """Take in the settings that lie beside a package's module.  Raises Collision for a name that is taken."""
    for folder in getattr(module, "__path__", ()):
        for shelf in shelves.values():
            for path in sorted(Path(folder, shelf.plural).glob("*.yaml")):
                shelf.put(path, plugin)


shelves: dict[str, Shelf] = {}
presets = Shelf("preset", "presets")
experiments = Shelf("experiment", "experiments")
