"""The commands that repeat a training or compute a number again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def train_command(folder: Path) -> str:
    """Return the command that trains or continues the run in a folder."""
    return f"sitkit train {shlex.quote(str(folder / 'config.yaml'))} --runs {shlex.quote(str(folder.parent))}"


def evaluate_command(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the command of a number's record, for the present folder of its run."""
    program, verb, _, *rest = record["command"]
    return shlex.join([program, verb, str(folder), *rest])
