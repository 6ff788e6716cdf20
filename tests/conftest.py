"""Settings for every test: one thread each, the same hypothesis examples on every run, nothing sent anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Several workers on few cores: one thread each.  Sums then also have one order, on any machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What else is installed on the machine changes no test: those that are about plugins bring their own.
os.environ["SITKIT_PLUGINS"] = ""
torch.set_num_threads(1)

# deadline: the first call of an operation is slow on a busy machine, which says nothing of the law under test.
settings.register_profile("sitkit", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("sitkit")


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sitkit-poly, built and installed by pip into a folder of its own: nothing else goes there."""
    # Only now: what it imports must find the variables above.
    from support import POLY, install

    site = tmp_path_factory.mktemp("site")
    install(site, POLY)
    return site
