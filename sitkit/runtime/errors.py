"""Errors that a user reads, and the nearest right name for a wrong one."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any


class UserError(ValueError):
    """A request that cannot be met, found before any work: says what, where and what to do instead.

    path leads from the value that was asked for to the key in it that is wrong, so that its line can be named.
    """

    def __init__(self, message: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class WorkFailed(RuntimeError):
    """Work that was possible but went wrong (a loss that is not finite, a store that cannot be written)."""


def require_at_least(least: int, **values: float) -> None:
    """Raise ValueError for the first of the named values that is below `least` or not a number."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")


def suggest(word: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """The sentence " Did you mean 'x'?" for the nearest known word, or nothing."""

    def nearness(other: str) -> tuple[float, bool, int]:
        # Of two that share as much, rather the one that begins alike, or is as long.
        return SequenceMatcher(None, other, word).ratio(), other[:1] == word[:1], -abs(len(other) - len(word))

    near = max(known, key=nearness, default="")
    return f" Did you mean {near!r}?" if near and nearness(near)[0] >= 0.5 else ""
