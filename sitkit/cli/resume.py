"""Ctrl-C in the middle of work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from sitkit.cli import console


@contextmanager
def resumable() -> Iterator[None]:
    """Ctrl-C ends with the command that continues."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["sitkit", *sys.argv[1:]])
        console.err.print(f"\nstopped; what is done is kept. Continue with: {command}", markup=False)
        raise typer.Exit(1) from None
