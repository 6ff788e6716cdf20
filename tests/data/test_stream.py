"""Batches read ahead are the batches of `batch`, in order; errors are raised and threads end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sitkit.data.dataset import Examples, in_memory
from sitkit.data.stream import batch, feed
from sitkit.runtime.errors import WorkFailed


def examples(n: int = 50, pause: float = 0.0) -> Examples:
    """Return numbered images; the time of a read differs from batch to batch, so that threads overtake each other."""
    images = np.random.default_rng(0).integers(0, 256, (n, 1, 2, 3), dtype=np.uint8)
    plain = in_memory(images, np.arange(n) % 7, tuple("abcdefg"), holdout=0.1, flip=True)

    def read(index: np.ndarray, keys: np.ndarray | None) -> torch.Tensor:
        time.sleep(pause * (int(index[0]) % 5))
        return plain.read(index, keys)

    return dataclasses.replace(plain, reader=read)


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sitkit-feed")]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("part", [(0, 1), (1, 3)])
def test_read_ahead_changes_no_batch(workers: int, part: tuple[int, int]) -> None:
    data = examples(pause=0.001)
    with feed(data, 3, range(7, 30), 8, part=part, workers=workers) as batches:
        batches_read = list(batches)
    assert len(batches_read) == 23
    for step, (x, y, positions) in zip(range(7, 30), batches_read, strict=True):
        truth = batch(data, 3, step, 8, part)
        assert torch.equal(x, truth[0]) and torch.equal(y, truth[1]) and np.array_equal(positions, truth[2])
    assert not ours()


@given(st.integers(1, 40), st.integers(0, 20), st.data())
def test_the_parts_of_all_ranks_are_the_batch(size: int, step: int, more: st.DataObject) -> None:
    ranks = more.draw(st.integers(1, size))
    data = examples()
    whole, parts = batch(data, 1, step, size), [batch(data, 1, step, size, (r, ranks)) for r in range(ranks)]
    assert torch.equal(whole[0], torch.cat([x for x, _, _ in parts]))
    assert torch.equal(whole[1], torch.cat([y for _, y, _ in parts]))
    assert np.array_equal(whole[2], np.concatenate([positions for _, _, positions in parts]))
    sizes = {len(x) for x, _, _ in parts}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("part", [(-1, 2), (2, 2), (0, 5), (0, 0)])
def test_an_impossible_part_is_refused(part: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= rank < ranks <= size = 4"):
        batch(examples(), 0, 0, 4, part)


def test_reading_ahead_is_limited() -> None:
    plain, started = examples(), []
    reads = threading.Semaphore(0)

    def read(index: np.ndarray, keys: np.ndarray | None) -> torch.Tensor:
        started.append(len(started))
        reads.release()
        return plain.read(index, keys)

    with feed(dataclasses.replace(plain, reader=read), 0, itertools.count(), 4, workers=2) as batches:
        for _ in range(4):  # Before the first batch is needed, two threads read two batches each, and wait.
            assert reads.acquire(timeout=30)
        assert not reads.acquire(timeout=0.05)
        next(batches)
        assert reads.acquire(timeout=30)
        assert not reads.acquire(timeout=0.05)
    assert len(started) == 5


@pytest.mark.parametrize("workers", [0, 3])
def test_an_error_is_raised_where_its_batch_is_needed(workers: int) -> None:
    plain = examples()
    fault = batch(plain, 0, 6, 4)[1]

    def read(index: np.ndarray, keys: np.ndarray | None) -> torch.Tensor:
        if np.array_equal(plain.labels[index], fault.numpy()):
            raise WorkFailed("folder/17.png: truncated")
        return plain.read(index, keys)

    batches_read = 0
    with (
        pytest.raises(WorkFailed, match=r"folder/17\.png"),
        feed(dataclasses.replace(plain, reader=read), 0, itertools.count(), 4, workers=workers) as batches,
    ):
        for _ in batches:
            batches_read += 1
    assert batches_read == 6 and not ours()


def test_negative_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 0"), feed(examples(), 0, range(1), 4, workers=-1):
        pass


def test_ctrl_c_ends_the_process_at_once() -> None:
    code = """if True:
        import itertools, signal, threading
        from sitkit.data.stream import feed
        from sitkit.registry import datasets
        # Python ignores ctrl-C if its parent does, as in a background job of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        data = datasets.create("points", size=100).load()
        try:
            with feed(data, 0, itertools.count(), 8, workers=4) as batches:
                for i, _ in enumerate(batches):
                    if i == 3:
                        print("begun", flush=True)
        except KeyboardInterrupt:
            print("threads", sum(t.name.startswith("sitkit-feed") for t in threading.enumerate()), flush=True)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    os.kill(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert out == "threads 0\n" and process.returncode == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory is pinned for a GPU")
def test_pinned_batches_are_the_same() -> None:
    data = examples()
    with feed(data, 0, range(4), 8, pin=True) as batches:
        for step, (x, y, _) in enumerate(batches):
            assert x.is_pinned() and y.is_pinned() and torch.equal(x, batch(data, 0, step, 8)[0])
