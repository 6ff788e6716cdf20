"""The wheel: it is built, checked, installed into an empty environment, and used as the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import sitkit


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Return the output of a command; if the command fails, the test fails with the output."""
    hidden = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=hidden | environment, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.mark.docs
def test_the_wheel_runs_the_first_command_of_the_readme(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    wheel, source = sorted((tmp_path / "dist").iterdir(), key=lambda path: path.suffix != ".whl")
    assert sitkit.__version__ in wheel.name and sitkit.__version__ in source.name
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=tmp_path)
    first = re.search(r"<!-- command: try -->\n```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S)
    assert first is not None and first[1].count("-e .") == 1
    away = tmp_path / "away"
    away.mkdir()
    run("bash", "-euo", "pipefail", "-c", first[1].replace("-e .", str(wheel)), cwd=away)
    (run_folder,) = (path.parent for path in (away / "runs").glob("*/config.yaml"))
    assert list(run_folder.glob("samples/*/grid.png")) and list(run_folder.glob("evaluations/*.json"))
    held = run(away / ".venv/bin/python", "-c", "import sitkit; print(sitkit.__file__)", cwd=away)
    assert str(away) in held
