"""A tenth of each drill of benchmarks/faults: no traceback, no hang, no wrong number, no program that a file started."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

FAULTS = ROOT / "benchmarks" / "faults"
DRILLS = ("kills", "signals", "disk", "damages", "inputs", "hostile", "together", "tracker")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("drill", DRILLS)
def test_a_drill_finds_no_fault(drill: str, tmp_path: Path) -> None:
    command = [sys.executable, FAULTS, drill, "--share", "0.1"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert process.returncode == 0, process.stderr
    counts = json.loads(process.stdout)["drills"][drill]
    assert counts["trials"] > 0
    assert counts["faults"] == []


def test_every_drill_is_here() -> None:
    process = subprocess.run([sys.executable, FAULTS, "--help"], capture_output=True, text=True, check=True)
    assert ", ".join(DRILLS) in " ".join(process.stdout.split())
