"""Kills and signals at random moments over all long commands; then the same command again, which must end as if undisturbed."""

from __future__ import annotations

import random
import shlex
import signal
from pathlib import Path

from command import Command, Ended, done, run
from count import Count, spread
from work import Place, differences, ends, places

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Undisturbed:
    """What each command leaves when nothing disturbs it, the time that it takes, its writes and the sizes of its files."""

    def __init__(self, root: Path) -> None:
        self.folder, self.places = root / "trial", places(root / "places")
        self.ends: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}
        self.writes: dict[str, int] = {}
        self.sizes: dict[str, list[int]] = {}
        for name, place in self.places.items():
            # In the folder of the trials: records hold absolute paths.
            folder = place.fresh(self.folder)
            ended = done(place.words, folder)
            self.ends[name], self.seconds[name], self.writes[name] = ends(folder), ended.seconds, ended.writes
            self.sizes[name] = [path.stat().st_size for path in folder.rglob("*")]


def disturb(place: Place, folder: Path, number: int, draw: random.Random, known: Undisturbed, name: str) -> Ended:
    """Start a command and send it a signal: half of the time within 100 ms after a random write, else at a random time."""
    command = Command(place.words, folder)
    if draw.random() < 0.5:
        write = draw.randint(1, max(1, known.writes[name]))
        command.watch(60, lambda: command.writes >= write)
        command.watch(draw.uniform(0, 0.1))
    else:
        command.watch(draw.uniform(0, known.seconds[name]))
    command.send(number)
    return command.end()


def again(count: Count, words: tuple[str, ...], folder: Path, what: str, right: dict[str, str]) -> None:
    """Run a command to its end after a fault, and compare what it leaves with `right`."""
    ended = run(words, folder)
    count.trials -= 1  # The trial is counted once.
    if count.check(ended, f"{what}, again", (0,)) and (unequal := differences(ends(folder), right)):
        count.note("unequal", f"{what}: {', '.join(unequal[:4])}")


def kills(root: Path, trials: int, draw: random.Random) -> Count:
    """Kill commands (SIGKILL), and run each again."""
    known, count = Undisturbed(root), Count()
    for trial, name in enumerate(spread(list(known.places), trials)):
        place = known.places[name]
        folder = place.fresh(known.folder)
        ended = disturb(place, folder, signal.SIGKILL, draw, known, name)
        count.trials += 1
        if ended.status not in (0, -signal.SIGKILL):
            count.note("status", f"{name} {trial}: status {ended.status} before the kill")
        again(count, place.words, folder, f"{name} killed, trial {trial}", known.ends[name])
    return count


def signals(root: Path, trials: int, draw: random.Random) -> Count:
    """Send each of four signals to each command, and run the line that it prints."""
    known, count = Undisturbed(root), Count()
    pairs = [(name, number) for number in SIGNALS for name in known.places]
    for trial, (name, number) in enumerate(spread(pairs, trials)):
        place = known.places[name]
        folder = place.fresh(known.folder)
        ended = disturb(place, folder, number, draw, known, name)
        what = f"{name}, {number.name}, trial {trial}"
        count.check(ended, what, (0, 128 + number))
        words = place.words
        if ended.status == 128 + number:
            stopped = [line for line in ended.err.splitlines() if line.startswith("stopped")]
            if len(stopped) != 1:
                count.note("status", f"{what}: {len(stopped)} lines say that it stopped")
            elif "sitkit " in stopped[0]:
                words = tuple(shlex.split(stopped[0].partition(": ")[2])[1:])
        again(count, words, folder, what, known.ends[name])
    return count
