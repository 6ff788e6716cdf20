"""The counts of a drill, and what is written down of each fault that it finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from command import Ended

T = TypeVar("T")

# The longest list of faults that is printed.
MOST = 40


@dataclass
class Count:
    """The trials of a drill and the faults in them; goal: every number but `trials` is 0.

    tracebacks: commands that ended with one.  hangs: commands that did not end.  wrong: other numbers than the right ones,
    with status 0 and without a warning.  unequal: files or numbers at the end that differ from those of an undisturbed
    command.  running: runs that MLflow calls RUNNING though no command works on them.  programs: programs started by a
    file.  status: an exit status or a message that is not the right one.
    """

    trials: int = 0
    tracebacks: int = 0
    hangs: int = 0
    wrong: int = 0
    unequal: int = 0
    running: int = 0
    programs: int = 0
    status: int = 0
    faults: list[str] = field(default_factory=list)

    def note(self, kind: str, what: str) -> None:
        """Count a fault and write it down."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.faults) < MOST:
            self.faults.append(f"{kind}: {what}")

    def check(self, ended: Ended, what: str, statuses: tuple[int, ...] = (0, 1, 2)) -> bool:
        """Count a trial, and what its end shows.  Return whether it ended as it should."""
        self.trials += 1
        before = len(self.faults), self.sum
        if ended.programs:
            self.note("programs", f"{what}: {', '.join(ended.programs)}")
        last = (ended.err.strip().splitlines() or ["no message"])[-1][:200]
        if ended.status is None:
            self.note("hangs", f"{what}: {ended.err[-1500:]}")
        elif ended.traceback:
            self.note("tracebacks", f"{what}: status {ended.status}: {ended.err[-400:]}")
        elif ended.status not in statuses:
            self.note("status", f"{what}: status {ended.status}: {last}")
        elif ended.status in (1, 2) and not any(line.startswith("error:") for line in ended.lines):
            self.note("status", f"{what}: status {ended.status} without an error: {last}")
        return before[1] == self.sum

    @property
    def sum(self) -> int:
        """The number of faults."""
        return sum(getattr(self, kind) for kind in KINDS)


KINDS = [item.name for item in dataclasses.fields(Count) if item.name not in ("trials", "faults")]


def spread(items: Sequence[T], trials: int) -> list[T]:
    """Return an item for each trial: all in turn, or some at equal distances if there are fewer trials than items."""
    step = max(1.0, len(items) / trials)
    return [items[int(trial * step) % len(items)] for trial in range(trials)]
