"""Faults: kills, signals, full disks, damaged, made-up and hostile files, several processes, a bad tracking server.

    python benchmarks/faults [DRILL ...] [--count N | --share 0.1] [--seed 0] [--tiny] > faults.json

Each drill prints its counts as JSON; the last lines, on standard error, are the table of RESULTS.md.  Goal: 0 faults.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "SITKIT_PLUGINS": "", "NO_COLOR": "1", "COLUMNS": "400"}
os.environ.pop("MLFLOW_TRACKING_URI", None)

# The drills: module, function, and the trials of a whole run; the slow tests run a tenth.
DRILLS = {
    "kills": ("stops", "kills", 200),
    "signals": ("stops", "signals", 28),
    "disk": ("disk", "full", 60),
    "damages": ("damages", "damages", 800),
    "inputs": ("inputs", "inputs", 10_000),
    "hostile": ("hostile", "hostile", 157),
    "together": ("together", "together", 14),
    "tracker": ("tracker", "tracker", 8),
}


def main() -> None:
    """Run the drills, print their counts as JSON and the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"{', '.join(DRILLS)}; by default all")
    parser.add_argument("--count", type=int, help="trials of each drill")
    parser.add_argument("--share", type=float, default=1.0, help="share of the trials of a whole run")
    parser.add_argument("--tiny", action="store_true", help="a fiftieth of the trials, for a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    unknown = set(options.drills) - DRILLS.keys()
    if unknown:
        parser.error(f"no such drill: {', '.join(sorted(unknown))}; known: {', '.join(DRILLS)}")
    # Imported only now: numpy reads the number of threads at its import.
    command, table = importlib.import_module("command"), importlib.import_module("count")
    command.preload()
    report, rows = {}, []
    for name in options.drills or DRILLS:
        module, function, whole = DRILLS[name]
        drill = getattr(importlib.import_module(module), function)
        trials = options.count or max(1, round(whole * (0.02 if options.tiny else options.share)))
        # TemporaryDirectory would remove the folder at the end of each forked process.
        folder = Path(tempfile.mkdtemp(prefix="sitkit-faults-"))
        began = time.perf_counter()
        try:
            count = drill(folder, trials, random.Random(f"{name} {options.seed}"))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = time.perf_counter() - began
        report[name] = dataclasses.asdict(count) | {"seconds": seconds}
        numbers = [f"{getattr(count, kind)}" for kind in table.KINDS]
        rows.append(f"| {name} | {count.trials:,} | {' | '.join(numbers)} | {seconds:.0f} |")
        print(rows[-1], *count.faults, sep="\n", file=sys.stderr, flush=True)
    machine = {"platform": platform.platform(), "python": platform.python_version(), "load": os.getloadavg()[0]}
    print(json.dumps({"machine": machine, "seed": options.seed, "drills": report}, indent=2))
    head = ["drill", "trials", *table.KINDS, "seconds"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}", *rows, sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
