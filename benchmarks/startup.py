"""What starting costs: importing sitkit, --help and list, beside an empty interpreter and `import torch`.

    python benchmarks/startup.py [--tiny] > startup.json

Each command is a process of its own, all of them in turn, several rounds; medians are reported.  The floor is `python -c
pass`.  Importing torch stands beside them because everything that needs it must wait so long: what lists and explains does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import sitkit": ["-c", "import sitkit"],
    "sitkit --help": ["-m", "sitkit", "--help"],
    "sitkit train --help": ["-m", "sitkit", "train", "--help"],
    "sitkit list": ["-m", "sitkit", "list"],
}
FLOOR, HEAVY = "python -c pass", "import torch"


def spent(words: list[str]) -> tuple[float, float]:
    """Seconds of a process by the clock, and of the processor."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="one round, for a smoke test")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    rounds = 1 if asked.tiny else asked.rounds
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for words in COMMANDS.values():
        # A first start compiles what later ones find.
        spent(words)
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            seconds[name].append(spent(words))
    medians = {
        name: [statistics.median(column) for column in zip(*each, strict=True)] for name, each in seconds.items()
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
