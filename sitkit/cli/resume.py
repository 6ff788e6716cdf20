"""Ctrl-C in the middle of work."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sitkit.cli import console


@contextmanager
def resumable(done: str = "what is done is kept. Continue with") -> Iterator[None]:
    """Ctrl-C ends with what became of the work, and the command that continues."""
    try:
        yield
    except KeyboardInterrupt:
        size = os.environ.get("WORLD_SIZE", "1")
        start = ["sitkit"] if size == "1" else ["torchrun", f"--nproc-per-node={size}", "-m", "sitkit"]
        command = shlex.join([*start, *sys.argv[1:]])
        console.err.print(f"\nstopped; {done}: {command}", markup=False)
        raise typer.Exit(1) from None
