"""Settings of all tests: a single thread, the same hypothesis examples on every run, no telemetry."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Several workers share few cores, so each has one thread.  Sums then also have the same order on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Installed plugins must not change a test; tests of plugins install their own.
os.environ["SITKIT_PLUGINS"] = ""
torch.set_num_threads(1)

# deadline: the first call of an operation may be slow on a busy machine.
settings.register_profile("sitkit", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("sitkit")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sitkit-poly and install it with pip into a folder that has nothing else."""
    # The import must come after the variables above are set.
    from support import POLY, install

    site = tmp_path_factory.mktemp("site")
    install(site, POLY)
    return site
