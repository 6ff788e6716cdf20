"""The benchmarks run with --tiny and print their numbers as JSON; benchmarks/RESULTS.md has the results."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

FOLDER = ROOT / "benchmarks"
LONG = {"encode", "feeding", "gpu", "sampling", "scaling", "study", "train"}
# The numbers that each benchmark must print, as paths into its JSON.
NUMBERS = {
    "encode": ("encode.images_per_second", "encode.baseline_images_per_second", "encode.processor_ratio"),
    "error_rates": ("paired.0.trials", "column.1.trials", "metrics.0.all.ratio", "metrics.7.equal.ratio"),
    "feeding": ("need.images_per_second", "read_ahead_by_threads.latents.2.over_need", "bare_loop_over_the_folder.images_per_second"),
    "frechet": ("cases.0.processor", "cases.0.floor_seconds", "cases.0.peak_mib"),
    "gpu": ("training.eager.mfu", "training.eager.over_baseline", "sampling.heun.images_per_second", "sampling.euler-maruyama.images_per_second"),
    "sampling": ("overhead.processor.ratio", "peak_mib_by_steps.8"),
    "scaling": ("ways.ddp.speedup", "ways.fsdp.efficiency", "ways.apart.seconds"),
    "startup": ("seconds.sitkit --help.over_import_torch", "seconds.python -c pass.processor"),
    "study": ("floor.processor", "ablate, all done.processor", "ablate --dry-run.mb", "check.clock", "cells.planned"),
    "train": ("sizes.0.variants.eager fp32.over_baseline", "sizes.0.variants.eager bf16.mfu", "parts.forward"),
}  # fmt: skip


def names() -> list[Any]:
    stems = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
    return [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in stems]


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize("name", names())
def test_it_runs_and_prints_its_numbers(name: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", "--tiny"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert all(math.isfinite(number) for number in numbers(report))
    for path in NUMBERS.get(name, ()):
        value: Any = report
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert value > 0, path
    assert not list(tmp_path.iterdir()), "the benchmark leaves files behind"
