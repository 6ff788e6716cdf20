"""The time to start: importing sitkit, --help and list, beside an empty interpreter and `import torch`.

    python benchmarks/startup.py [--tiny] > startup.json

Each command runs in its own process; all commands run in turn, in several rounds, and the medians are reported.  The lower
bound is `python -c pass`.  The import of torch is measured too: a command that needs torch takes at least that long, and
the commands that only list or explain do not need it.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time

from _shared import parser

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import sitkit": ["-c", "import sitkit"],
    "sitkit --help": ["-m", "sitkit", "--help"],
    "sitkit train --help": ["-m", "sitkit", "train", "--help"],
    "sitkit list": ["-m", "sitkit", "list"],
}
FLOOR, HEAVY = "python -c pass", "import torch"


def seconds_of(words: list[str]) -> tuple[float, float]:
    """Return the seconds of a process, by the clock and of the processor."""
    before, start_time = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start_time, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Run everything and print JSON."""
    benchmark = parser(__doc__, tiny="one round, for a smoke test")
    benchmark.add_argument("--rounds", type=int, default=7)
    options = benchmark.parse_args()
    rounds = 1 if options.tiny else options.rounds
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for words in COMMANDS.values():
        # The first start compiles the byte code.
        seconds_of(words)
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            seconds[name].append(seconds_of(words))
    medians = {
        name: [statistics.median(column) for column in zip(*rounds_of, strict=True)]
        for name, rounds_of in seconds.items()
    }
    rows = {
        name: {
            "clock": wall,
            "processor": cpu,
            "over_floor": cpu / medians[FLOOR][1],
            "over_import_torch": cpu / medians[HEAVY][1],
        }
        for name, (wall, cpu) in medians.items()
    }
    machine = {"platform": platform.platform(), "python": platform.python_version()}
    print(json.dumps({"machine": machine, "rounds": rounds, "seconds": rows, "floor": FLOOR}, indent=2))


if __name__ == "__main__":
    main()
