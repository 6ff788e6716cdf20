"""A run that tests of this room may change."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import copied, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a trained run, which a test may damage."""
    return copied(trained(), tmp_path / "runs")
