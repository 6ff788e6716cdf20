"""Ctrl-C ends the process with one line at any moment.

This module imports little, since it must be active before the imports of the other modules.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# A shell gives this exit status to a process that ctrl-C ended.
STOPPED = 130
# The message says one of these about the stopped work, before the command that does the work again.
CONTINUE = "what is done is kept. Continue with"
BEGIN_AGAIN = "nothing is written. Begin again with"


def stop_at_once() -> None:
    """From now on ctrl-C prints a line and ends the process, except inside `resumable`.

    A KeyboardInterrupt could be swallowed by an import that catches every exception, or turned into another error.  A
    process that was started with SIGINT ignored still ignores it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def _stop(signum: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped.\n")
    os._exit(STOPPED)


@contextmanager
def resumable(state: str = CONTINUE) -> Iterator[None]:
    """While this is active, ctrl-C ends the process with a message: `state`, and the command that continues the work."""
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
        # A library may have turned the KeyboardInterrupt into another error.
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        from sitkit.cli import console

        size = os.environ.get("WORLD_SIZE", "1")
        start = ["sitkit"] if size == "1" else ["torchrun", f"--nproc-per-node={size}", "-m", "sitkit"]
        command = shlex.join([*start, *sys.argv[1:]])
        console.err.print(f"\nstopped; {state}: {command}", markup=False)
        sys.exit(STOPPED)
