"""Progress of long work: functions report events, and a function of the caller shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Event(NamedTuple):
    """One report of a piece of work: `done` of `total` units of a stage, or a message.

    Attributes:
        stage: the name of the stage, as "train", "sample", "features".
        done, total: units of the stage (steps, samples, ...); total is 0 for an event that is only a message.
        values: numbers to show beside the bar, by name, as {"loss": 0.12}.
        message: a line for the user.
        task: the task of a study that the event belongs to; several may run at once.
    """

    stage: str
    done: int = 0
    total: int = 0
    values: Mapping[str, float] = {}
    message: str = ""
    task: str = ""


Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Show nothing: `progress=sitkit.silent`.

    Args:
        event: the event that is ignored.
    """
