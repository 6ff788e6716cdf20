"""What the study engine costs beside the work itself: a study that is all done, and the planning of a large one.

    python benchmarks/study.py [--tiny] > study.json

Each row is a process of its own, `python -m sitkit ...` as a person starts it, with everything that it imports.  The floor
beside it is a process that imports what no study can do without (torch, pydantic, sitkit) and ends.
Wanted: 200 done cells answer in under 3 s; 10,000 cells are planned in under 10 s and under 500 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE = """
data: {name: points, law: moons, size: 200}
backbone: {name: mlp, hidden_size: 8, depth: 1}
train: {steps: 2, batch: 16, lr: 1e-3, ema: 0.9}
sample: {n: 16, labels: none}
metric: sliced-wasserstein
run: {sample_every: 0}
"""
# Runs a command and prints its wall-clock seconds, its processor seconds and its peak memory as JSON.
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
    lines = ["base: base.yaml", "rows:"]
    lines += [f"  - {{label: row {i}, train: {{lr: {1e-4 * (i + 1):g}}}}}" for i in range(rows)]
    lines += ["grid:", f"  sampler.steps: {list(range(2, 2 + columns))}", f"seeds: {list(range(seeds))}"]
    return "\n".join(lines) + "\n"


def watched(folder: Path, *words: str) -> dict[str, float]:
    """What `python WORDS` takes in a folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    run = [sys.executable, "-c", WATCH, sys.executable, *words]
    done = subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    if told["status"] != 0:
        raise SystemExit(done.stderr)
    return told


def measured(folder: Path, repeats: int, *words: str) -> dict[str, Any]:
    """The median of several runs of a command, and each of them."""
    runs = [watched(folder, *words) for _ in range(repeats)]
    keys = ("clock", "processor", "mb")
    return {key: statistics.median(run[key] for run in runs) for key in keys} | {"runs": runs}


def main() -> None:
    """Print the measurements as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes, to see that it runs")
    tiny = parser.parse_args().tiny
    done, planned, repeats = ((2, 2, 1), (4, 5, 5), 1) if tiny else ((10, 10, 2), (100, 10, 10), 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base.yaml").write_text(BASE)
        (folder / "done.yaml").write_text(study(*done))
        (folder / "planned.yaml").write_text(study(*planned))
        first = watched(folder, "-m", "sitkit", "ablate", "done.yaml")
        told = {
            "machine": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                "load": os.getloadavg()[0],
            },
            "cells": {"done": done[0] * done[1] * done[2], "planned": planned[0] * planned[1] * planned[2]},
            "floor": measured(folder, repeats, *FLOOR),
            "the work itself, once": first,
            "ablate, all done": measured(folder, repeats, "-m", "sitkit", "ablate", "done.yaml"),
            "explain, one number": measured(folder, repeats, "-m", "sitkit", "explain", "done:1"),
            "ablate --dry-run": measured(
                folder, repeats, "-m", "sitkit", "ablate", "planned.yaml", "--dry-run", "--json"
            ),
            "check": measured(folder, repeats, "-m", "sitkit", "check", "planned.yaml", "--json"),
        }
    json.dump(told, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
