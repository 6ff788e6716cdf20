"""Named settings: presets and experiments of sitkit and of plugins.

A plugin whose module is a package provides each `presets/NAME.yaml` and `experiments/NAME.yaml` in it.  Names follow the
rule for components: if two plugins provide the same name, neither is registered and the error names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from sitkit.registry.name_table import Claim, NameTable
from sitkit.registry.plugin import Plugin
from sitkit.runtime.errors import UserError, suggest


class SettingsFiles(NameTable, Mapping[str, Path]):
    """Names to YAML files of one kind, read-only outside this module."""

    def __init__(self, kind: str, plural: str) -> None:
        super().__init__(kind, plural)
        settings_files[plural] = self

    def meaning(self, name: str) -> str:
        """Return the first line of the comment at the top of a file."""
        with self[name].open(encoding="utf-8") as file:
            first = file.readline().strip()
        return first.removeprefix("#").strip() if first.startswith("#") else ""

    def find(self, word: str | Path) -> Path:
        """Return a file by its name or path.  Raises UserError with the nearest right name."""
        if str(word) in self:
            return self[str(word)]
        path = Path(word)
        if path.suffix in (".yaml", ".yml") or path.exists():
            return path
        known = f"{self.plural.capitalize()}: {', '.join(self)}." if len(self) else f"There are no {self.plural}."
        raise UserError(f"No {self.kind} or file {str(word)!r}.{suggest(str(word), list(self))} {known}")

    def __getitem__(self, name: str) -> Path:
        return self._values()[name]


def register_files(module: ModuleType, plugin: Plugin | None) -> None:
    """Register the settings files beside a package's module.  Raises UserError for a name that sitkit itself has."""
    origin = plugin.module if plugin else "sitkit"
    for folder in getattr(module, "__path__", ()):
        for files in settings_files.values():
            for path in sorted(Path(folder, files.plural).glob("*.yaml")):
                files.claim(path.stem, Claim(path, str(path), origin, plugin))


settings_files: dict[str, SettingsFiles] = {}
presets = SettingsFiles("preset", "presets")
experiments = SettingsFiles("experiment", "experiments")
