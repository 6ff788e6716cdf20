"""Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 ends the process with one line at any moment.

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
from typing import NoReturn

from sitkit.runtime import stops

# The message says one of these about the stopped work, before the command that does the work again.
CONTINUE = "what is done is kept. Continue with"
BEGIN_AGAIN = "nothing is written. Begin again with"
# After a second signal, in place of CONTINUE.
AT_ONCE = "the work since the last save is lost. Continue with"


def stop_at_once() -> None:
    """From now on each of these signals prints a line and ends the process, except inside `resumable`.

    An exception could be swallowed by an import that catches every exception, or turned into another error.  A process
    that was started with a signal ignored still ignores it, as under nohup.
    """
    for number in stops.SIGNALS:
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _stop)


def status_of(signum: int) -> int:
    """Return the exit status that a shell gives to a process that a signal ended."""
    return 128 + signum


def _stop(signum: int, frame: FrameType | None) -> None:
    _end(signum, "stopped.")


def _end(signum: int, line: str) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{line}\n".encode(errors="backslashreplace"))
    os._exit(status_of(signum))


@contextmanager
def resumable(state: str = CONTINUE) -> Iterator[None]:
    """While this is active, a signal ends the process with a message: `state`, and the command that continues the work.

    The first signal lets the work save what it has.  A second one ends the process at once.
    """
    pressed: list[int] = []

    def press(signum: int) -> None:
        pressed.append(signum)
        stops.stop(signum)

    def press_again(signum: int) -> None:
        lost = AT_ONCE if state == CONTINUE else state
        _end(signum, f"stopped at once; {lost}: {_command()}")

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        with stops.stopping(press, press_again, 0.0 if alone else stops.REPEATED):
            yield
    except BaseException as error:
        # A library may have turned the KeyboardInterrupt into another error.
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        from sitkit.cli import console

        console.note(f"\nstopped; {state}: {_command()}")
        signum = error.signum if isinstance(error, stops.Stopped) else (pressed or [signal.SIGINT])[0]
        sys.exit(status_of(signum))


def _command() -> str:
    from sitkit.runtime.files import visible

    size = os.environ.get("WORLD_SIZE", "1")
    start = ["sitkit"] if size == "1" else ["torchrun", f"--nproc-per-node={size}", "-m", "sitkit"]
    return visible(shlex.join([*start, *sys.argv[1:]]))
