"""Two and four of each command at once in one folder: each ends as one alone would, and what they leave is the same."""

from __future__ import annotations

import random
from pathlib import Path

from command import Command
from count import Count, spread
from stops import Undisturbed
from work import differences, ends

# The message of a training that finds another process at work on its run.
BUSY = "is being trained by another process"


def together(root: Path, trials: int, draw: random.Random) -> Count:
    """Start commands at moments that differ by up to 300 ms, and compare the end with that of one command."""
    known, count = Undisturbed(root), Count()
    pairs = [(name, number) for name in known.places for number in (2, 4)]
    for trial, (name, number) in enumerate(spread(pairs, trials)):
        place = known.places[name]
        folder, commands = place.fresh(known.folder), []
        for _ in range(number):
            commands.append(Command(place.words, folder))
            commands[-1].watch(draw.uniform(0, 0.3))
        before, what = count.sum, f"{number} x {name}, trial {trial}"
        for command in commands:
            ended = command.end()
            busy = ended.status == 2 and BUSY in ended.err
            count.check(ended, what, (2,) if busy else (0,))
        count.trials += 1 - number
        if count.sum == before and (unequal := differences(ends(folder), known.ends[name])):
            count.note("unequal", f"{what}: {', '.join(unequal[:4])}")
    return count
