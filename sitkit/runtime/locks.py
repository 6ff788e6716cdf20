"""Divide work among processes with lock files: each part is done once, and the parts of a dead process are redone.

The process that does a part holds the lock on a file.  The system frees the lock of a process that ends for any reason.
Ranks under torchrun, jobs on several machines with one file system, and a single process use the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from sitkit.runtime.errors import UserError


class Busy(UserError):
    """Another process does the work."""


@contextlib.contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold the lock on a file.  Raises Busy with the reason if another process holds it."""
    try:
        lock = FileLock(path, timeout=0).acquire()
    except Timeout:
        raise Busy(reason) from None
    with lock:
        yield


def divide_work(
    count: int, done: Callable[[int], bool], make: Callable[[int], None], locks: Path, first: int = 0
) -> None:
    """Do parts 0 to count - 1 together with the other processes that call this, and return once all are done.

    Args:
        count: the number of parts.
        done: whether a part is done; it is called again after a wait for a lock.
        make: does one part.  An error in it is raised; another process may then do the part.
        locks: the folder for the lock files.
        first: the part to begin with, so that the processes begin with different parts; 0 by default.
    """

    def make_part(i: int, wait: bool = False) -> bool:
        return make_once(locks / f"{i:05d}.lock", lambda: done(i), lambda: make(i), wait)

    parts = [(first + k) % count for k in range(count)]
    while parts := [i for i in parts if not done(i)]:
        made = [i for i in parts if make_part(i)]
        if not made:
            # Other processes do all remaining parts: wait until the first of them ends.
            make_part(parts[0], wait=True)


def make_once(lock: Path, done: Callable[[], bool], make: Callable[[], None], wait: bool = False) -> bool:
    """Do one part under its lock.

    Args:
        lock: the lock file of the part.
        done: whether the part is done.
        make: does the part.
        wait: wait for a process that holds the lock; False by default.

    Returns:
        Whether `make` was called.  It is not if the part is done, or if another process holds the lock and `wait` is False.
    """
    if done():
        return False
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except (Timeout, FileNotFoundError):
        # Another process does the part, or finished the work and removed the folder during the wait.
        return False
    try:
        if done():
            return False
        make()
        return True
    finally:
        held.release()
