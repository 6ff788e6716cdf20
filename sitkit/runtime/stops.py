"""Signals that ask a process to stop: ctrl-C, and those that clusters, containers and closed terminals send.

All of them do the same.  This module imports little, since the command line needs it before the imports of other modules.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if name in signal.Signals.__members__
)

# Seconds within which torchrun repeats the signal that its processes receive from the terminal.
REPEATED = 5.0


class Stopped(KeyboardInterrupt):
    """A signal asks this process to stop; `signum` is its number.  It is treated as ctrl-C everywhere."""

    def __init__(self, signum: int = signal.SIGINT) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def stop(signum: int) -> NoReturn:
    """Raise Stopped."""
    raise Stopped(signum)


class _Request:
    """What the active blocks of `stopping` share: the time of the first signal, and what a second one does."""

    blocks: int = 0
    first: float | None = None
    second: Callable[[int], object] = staticmethod(stop)
    patience: float = 0.0


@contextlib.contextmanager
def stopping(
    first: Callable[[int], object] = stop, second: Callable[[int], object] | None = None, patience: float = 0.0
) -> Iterator[None]:
    """While this is active, the first signal of SIGNALS calls `first` and a later one `second`, with its number.

    Blocks inside this one share the time of the first signal; `second` and `patience` hold for them too.  A signal that this
    process ignores stays ignored.  Outside the main thread nothing changes.

    Args:
        first: what the first signal does; by default it raises Stopped.
        second: what a later signal does; by default as in the block around this one, or else it raises Stopped.
        patience: seconds after the first signal within which others are ignored, because they repeat the same request.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if _Request.first is None:
            _Request.first = now
            first(signum)
        elif now - _Request.first >= _Request.patience:
            _Request.second(signum)

    around = _Request.second, _Request.patience
    _Request.blocks += 1
    _Request.second = second or _Request.second
    _Request.patience = max(patience, _Request.patience)
    before = {
        number: signal.signal(number, handle)
        for number in SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _Request.second, _Request.patience = around
        _Request.blocks -= 1
        if not _Request.blocks:
            _Request.first = None


@contextlib.contextmanager
def noted(patience: float = 0.0) -> Iterator[list[int]]:
    """Yield a list that receives the number of the first signal, so that a loop can stop between two steps."""
    signals: list[int] = []
    with stopping(signals.append, patience=patience):
        yield signals
