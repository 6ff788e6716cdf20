"""Tables of names and of the plugins that claim them; components and settings files use the same rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sitkit.registry.plugin import Plugin, ensure_loaded, loading
from sitkit.runtime.errors import UserError


@dataclass(frozen=True)
class Claim:
    """The registration of one name.

    Args:
        value: a component class, a `Preset`, or the path of a settings file.
        where: the place of the value, for messages.
        origin: the module that registered it, for messages.
        plugin: the plugin that registered it; None for sitkit and for the user's own code.
    """

    value: Any
    where: str
    origin: str
    plugin: Plugin | None


class NameTable:
    """Names of one kind, each with its claims.

    Several plugins may claim a name while they are imported.  `sitkit.registry.loading` then withdraws the names of every
    plugin that shares a claim with another; after that each name has one claim.
    """

    def __init__(self, kind: str, plural: str) -> None:
        self.kind, self.plural = kind, plural
        self._claims: dict[str, list[Claim]] = {}

    def claim(self, name: str, claim: Claim) -> None:
        """Add a claim.  Raises UserError for a name that is registered, unless plugins are imported and share it."""
        earlier = self._claims.setdefault(name, [])
        if earlier and (loading.current is None or {c.plugin for c in earlier} & {None, claim.plugin}):
            raise UserError(self.taken(name, claim))
        earlier.append(claim)

    def taken(self, name: str, claim: Claim) -> str:
        """Return the message that an earlier claim has the name."""
        return f"{self.kind} {name!r} ({claim.where}) is already registered by {self._claims[name][0].origin}."

    def withdraw(self, plugin: Plugin) -> None:
        """Remove the claims of a plugin that did not load."""
        kept = {name: [c for c in claims if c.plugin != plugin] for name, claims in self._claims.items()}
        self._claims = {name: claims for name, claims in kept.items() if claims}

    def conflicts(self) -> Iterator[tuple[Plugin, str]]:
        """Yield each plugin that shares a name with another plugin, with the reason."""
        for name, (first, *others) in self._claims.items():
            for other in others:
                if first.plugin and other.plugin:
                    yield first.plugin, f"{self.kind} {name!r} is also registered by {other.plugin.module}."
                    yield other.plugin, self.taken(name, other)

    def origin(self, name: str) -> str:
        """Return the module that registered `name`."""
        return self._claims[name][0].origin

    def names_of(self, plugin: Plugin) -> list[str]:
        """Return the names that a plugin registered."""
        return [name for name, claims in self._claims.items() if claims[0].plugin == plugin]

    def plugin(self, name: str) -> Plugin | None:
        """Return the plugin that registered `name`; None for sitkit's own."""
        ensure_loaded()
        return self._claims[name][0].plugin

    def names(self) -> list[str]:
        """Return every name, in the order of registration."""
        return list(self._values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._values()

    def _values(self) -> dict[str, Any]:
        ensure_loaded()
        return {name: claims[0].value for name, claims in self._claims.items()}
