"""Ctrl-C, whenever it comes.  What this imports is quick: ctrl-C during the rest is its business too."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# The status that a shell gives to what ctrl-C ended.
STOPPED = 130


def stop_at_once() -> None:
    """From now on ctrl-C ends the process with a line, but for what is `resumable`.

    As an exception it would be lost in an import that catches everything, or come out of it as another error.  A process
    that was started to ignore ctrl-C still does.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped.\n")
    os._exit(STOPPED)


@contextmanager
def resumable(done: str = "what is done is kept. Continue with") -> Iterator[None]:
    """Ctrl-C ends with what became of the work, and the command that continues."""
    pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is _stop:
        signal.signal(signal.SIGINT, press)
    try:
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
    except BaseException as error:
        # What the work imports may make another error of it.
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        from sitkit.cli import console

        size = os.environ.get("WORLD_SIZE", "1")
        start = ["sitkit"] if size == "1" else ["torchrun", f"--nproc-per-node={size}", "-m", "sitkit"]
        command = shlex.join([*start, *sys.argv[1:]])
        console.err.print(f"\nstopped; {done}: {command}", markup=False)
        sys.exit(STOPPED)
