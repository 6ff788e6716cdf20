"""Work divided with lock files: each part once, an error or a removed folder does no harm."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from sitkit.runtime.locks import divide_work


def test_every_part_is_made_once_by_a_free_worker(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []

    def make(who: str, i: int) -> None:
        made.append((who, i))
        (tmp_path / str(i)).touch()

    workers = [
        threading.Thread(
            target=divide_work,
            args=(
                20,
                lambda i: (tmp_path / str(i)).exists(),
                lambda i, who=who: make(who, i),
                tmp_path / "locks",
                first,
            ),
        )
        for who, first in (("a", 0), ("b", 10))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(i for _, i in made) == list(range(20))


def test_the_work_begins_with_the_given_part(tmp_path: Path) -> None:
    done: list[int] = []
    divide_work(4, done.__contains__, done.append, tmp_path, first=2)
    assert done == [2, 3, 0, 1]


def test_an_error_is_raised_and_the_part_is_free_again(tmp_path: Path) -> None:
    done: list[int] = []

    def fail(i: int) -> None:
        raise FileNotFoundError("the work's own")

    with pytest.raises(FileNotFoundError, match="the work's own"):
        divide_work(1, done.__contains__, fail, tmp_path)
    divide_work(1, done.__contains__, done.append, tmp_path)
    assert done == [0]


def test_a_removed_folder_ends_the_wait(tmp_path: Path) -> None:
    """The worker of the last part removes the folder with the lock that another waits for."""
    locks, whole, begun = tmp_path / "locks", tmp_path / "whole", threading.Event()
    locks.mkdir()

    def other() -> None:
        with FileLock(locks / "00000.lock", thread_local=False):
            begun.set()
            # Long enough for the wait to begin; if it has not begun, the test passes as well.
            threading.Event().wait(0.3)
            whole.touch()
            shutil.rmtree(locks)

    worker = threading.Thread(target=other)
    worker.start()
    assert begun.wait(60)
    made: list[int] = []
    divide_work(1, lambda i: whole.exists(), made.append, locks)
    worker.join(60)
    assert made == []
