"""Work that processes divide among themselves through a folder: each part is done once, and a dead worker's again.

Who does a part holds the lock on a file.  The system frees the lock of a process that ends, however it ends, so nothing
has to be cleaned up, no process needs to know of another, and ranks under torchrun, jobs on several machines with one
file system, or a single process all run the same lines.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout


def divide_work(
    count: int, done: Callable[[int], bool], make: Callable[[int], None], locks: Path, first: int = 0
) -> None:
    """Return once parts 0 to count - 1 are done, having called `make` for those that no other process was at.

    done: whether a part is there, so that it is asked again after a lock was waited for.  locks: the folder for the locks'
    files.  first: the part to begin with, so that many processes do not crowd on one.
    An error in `make` is raised as it is; the part is then another's to do.
    """

    def tried(i: int, wait: bool = False) -> bool:
        return make_once(locks / f"{i:05d}.lock", lambda: done(i), lambda: make(i), wait)

    left = [i for i in ((first + k) % count for k in range(count)) if not done(i)]
    while left:
        made = [i for i in left if tried(i)]
        left = [i for i in left if not done(i)]
        if left and not made:
            # Everything that is left is being done by others: wait for the first of them to end or die.
            tried(left[0], wait=True)
            left = [i for i in left if not done(i)]


def make_once(lock: Path, done: Callable[[], bool], make: Callable[[], None], wait: bool = False) -> bool:
    """Whether `make` was called: not where the part is done, nor, unless we wait for it, where another process is at it.

    lock: the file whose lock whoever makes the part holds.
    """
    if done():
        return False
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=-1 if wait else 0)
    try:
        held.acquire()
    except (Timeout, FileNotFoundError):
        # Another process is at it, or has put everything together and removed the folder while we waited.
        return False
    try:
        if done():
            return False
        make()
        return True
    finally:
        held.release()
