"""The command line and the machine's description that every benchmark shares."""

from __future__ import annotations

import argparse
import platform
from typing import Any

import torch


def parser(
    description: str | None, tiny: str = "seconds instead of minutes, for a smoke test"
) -> argparse.ArgumentParser:
    """Return a parser with the first line of a module's docstring and the flag --tiny."""
    first_line = description.splitlines()[0] if description else None
    benchmark = argparse.ArgumentParser(description=first_line)
    benchmark.add_argument("--tiny", action="store_true", help=tiny)
    return benchmark


def machine() -> dict[str, Any]:
    """Return the platform, the version of torch and the number of its threads."""
    return {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()}
