"""How long work tells how far it is: verbs call a function with an event, the command line draws it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Event(NamedTuple):
    """Work `stage` is at `done` of `total`, with numbers to show; or, with a message, something to say.

    task: of which task of a study, where several may be going on.
    """

    stage: str
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = {}
    message: str = ""
    task: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Show nothing."""
