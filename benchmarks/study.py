"""The cost of the study engine beside the work itself: a study that is done, and the plan of a large study.

    python benchmarks/study.py [--tiny] > study.json

Each row is its own process, `python -m sitkit ...` as a user starts it, with all of its imports.  The lower bound beside it
is a process that only imports what every study needs (torch, pydantic, sitkit).
Goals: 200 cells that are done answer in less than 3 s; 10,000 cells are planned in less than 10 s and 500 MB.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from _shared import parser

# The preset `points`, as small as it can be.
SETTINGS = """{
  data: {law: moons, size: 200}, backbone: {hidden_size: 8, depth: 1}, train: {steps: 2, batch: 16, ema: 0.9},
  sample: {n: 16}, run: {sample_every: 0} }"""
# Run a command, and print its wall-clock seconds, its processor seconds and its peak memory as JSON.
WATCH = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
record = {"status": status, "clock": seconds, "processor": used.ru_utime + used.ru_stime, "mb": used.ru_maxrss * 1024 / 1e6}
print(json.dumps(record))
"""
FLOOR = ("-c", "import torch, pydantic, sitkit.runs.config.schema")


def study(rows: int, columns: int, seeds: int) -> str:
    """Return a study of rows times seeds trainings, each sampled in `columns` ways."""
    lines = ["base: points", f"set: {SETTINGS}", "rows:"]
    lines += [f"  - {{label: row {i}, train: {{lr: {1e-4 * (i + 1):g}}}}}" for i in range(rows)]
    lines += ["grid:", f"  sampler.steps: {list(range(2, 2 + columns))}", f"seeds: {list(range(seeds))}"]
    return "\n".join(lines) + "\n"


def usage(folder: Path, *words: str) -> dict[str, float]:
    """Return the time and the memory of `python WORDS` in a folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", WATCH, sys.executable, *words]
    process = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    record = json.loads(process.stdout.splitlines()[-1])
    if record["status"] != 0:
        raise SystemExit(process.stderr)
    return record


def repeated(folder: Path, repeats: int, *words: str) -> dict[str, Any]:
    """Return the median of several runs of a command, and each of them."""
    runs = [usage(folder, *words) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in ("clock", "processor", "mb")} | {"runs": runs}


def main() -> None:
    """Print the measurements as JSON."""
    tiny = parser(__doc__).parse_args().tiny
    done, planned, repeats = ((2, 2, 1), (4, 5, 5), 1) if tiny else ((10, 10, 2), (100, 10, 10), 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "done.yaml").write_text(study(*done))
        (folder / "planned.yaml").write_text(study(*planned))
        record: dict[str, Any] = {
            "machine": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "load": os.getloadavg()[0],
            },
            "cells": {"done": done[0] * done[1] * done[2], "planned": planned[0] * planned[1] * planned[2]},
            "floor": repeated(folder, repeats, *FLOOR),
            "the work itself, once": usage(folder, "-m", "sitkit", "ablate", "done.yaml"),
        }
        commands = {
            "ablate, all done": ("ablate", "done.yaml"),
            "explain, one number": ("explain", "done:1"),
            "ablate --dry-run": ("ablate", "planned.yaml", "--dry-run", "--json"),
            "check": ("check", "planned.yaml", "--json"),
        }
        record |= {name: repeated(folder, repeats, "-m", "sitkit", *words) for name, words in commands.items()}
    json.dump(record, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
