"""Errors with messages for users, and the nearest right name for a misspelt one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any


class UserError(ValueError):
    """A request that cannot be met, refused before any work.  The message says what is wrong, where, and what to do instead.

    Args:
        message: the message for the user.
        path: the keys that lead to the wrong value in the settings, so that the message can name its line.
    """

    def __init__(self, message: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.path = path


class Unreadable(UserError):
    """A file or a folder that is there and that the system does not let this process read."""


def unreadable(path: object, error: OSError) -> Unreadable:
    """Return the error of a path that cannot be read, with the system's reason."""
    return Unreadable(f"{path} cannot be read: {error.strerror or error}.")


class LeftOut(list[str]):
    """What a page or a table goes on without: a sentence for each file that could not be read."""

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """End the block at a file that cannot be read, and note the reason."""
        try:
            yield
        except (UserError, OSError) as error:
            self.append(f"{error} It is left out.")


class WorkFailed(RuntimeError):
    """Work that was possible but failed, as a loss that is not finite or a disk that is full."""


class NotWritten(WorkFailed):
    """A file that could not be written, as on a full disk."""


def require_within(least: int, most: float, **values: float) -> None:
    """Raise UserError for the first of the named values that is below `least`, above `most` or not a number."""
    for name, value in values.items():
        if not value >= least:
            raise UserError(f"{name} must be at least {least}; got {value}.")
        if value > most:
            raise UserError(f"{name} must be at most {most:,}; got {value:,}.")


def require_positive(**values: float) -> None:
    """Raise UserError for the first of the named values that is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise UserError(f"{name} must be positive; got {value:g}.")


def suggest(word: str, known: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """Return the sentence " Did you mean 'x'?" for the nearest known word, or ""."""

    def nearness(other: str) -> tuple[float, bool, int]:
        # Between two equally similar words the same first letter decides, then the length.
        return SequenceMatcher(None, other, word).ratio(), other[:1] == word[:1], -abs(len(other) - len(word))

    near = max(known, key=nearness, default="")
    return f" Did you mean {near!r}?" if near and nearness(near)[0] >= 0.5 else ""
