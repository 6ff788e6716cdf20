"""Batches by (seed, step), read ahead: while the network works on a batch, threads read and decode the next batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from sitkit.data.dataset import Examples

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


DataBatch: TypeAlias = "tuple[Tensor, Tensor, np.ndarray]"
Item = TypeVar("Item")
Read = TypeVar("Read")


def feed(
    examples: Examples,
    seed: int,
    steps: Iterable[int],
    size: int,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 2,
    pin: bool = False,
) -> contextlib.AbstractContextManager[Iterator[DataBatch]]:
    """Return a context manager that gives `batch(examples, seed, step, size, part)` for each of `steps`, in order.

    workers: the number of threads that read ahead.  pin: put the batches into page-locked memory, from which a copy to a
    GPU does not block.
    """

    def read(step: int) -> DataBatch:
        x, y, positions = batch(examples, seed, step, size, part)
        return (x.pin_memory(), y.pin_memory(), positions) if pin else (x, y, positions)

    return read_ahead(read, steps, workers)


@contextlib.contextmanager
def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], workers: int) -> Iterator[Iterator[Read]]:
    """Yield an iterator over read(item) of each item, in order.

    Each of `workers` threads reads one item, and the same number of items is ready: 2 * workers items are in memory.  With
    0 workers the calling thread reads an item when it needs it.  An error in a thread is raised when its item is needed.
    At the end no thread remains: reads that have not begun are dropped, and reads that have begun are waited for.
    """
    if workers < 0:
        raise ValueError(f"workers must be at least 0; got {workers}.")
    if workers == 0:
        yield map(read, items)
        return
    pool = ThreadPoolExecutor(workers, "sitkit-feed")
    try:
        rest = iter(items)
        waiting = deque(pool.submit(read, item) for item in itertools.islice(rest, 2 * workers))
        yield _in_order(waiting, (pool.submit(read, item) for item in rest))
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(waiting: deque[Future[Read]], later: Iterator[Future[Read]]) -> Iterator[Read]:
    """Yield the results in the order of their items; after each result one more read begins."""
    while waiting:
        ready = waiting.popleft().result()
        waiting.extend(itertools.islice(later, 1))
        yield ready


def batch(examples: Examples, seed: int, step: int, size: int, part: tuple[int, int] = (0, 1)) -> DataBatch:
    """Return batch `step` of an endless stream: x (size, *shape), y (size,) int64, positions (size,).

    Position p = step * size + i of the stream is place p mod n of permutation p // n of the n training examples (the order
    of the data set itself if it has one).  So each epoch has every example once, and the stream is the same for every size.
    part: (rank, ranks) reads the positions from rank * size // ranks to (rank + 1) * size // ranks; the parts of all ranks
    in order are the batch.
    Raises ValueError for step < 0, size < 1, seed < 0, or a part outside 0 <= rank < ranks <= size.
    """
    import numpy as np
    import torch

    from sitkit.runtime.rng import DATA, sample_keys, words

    if step < 0 or size < 1:
        raise ValueError(f"needs step >= 0 and size >= 1; got {step} and {size}.")
    rank, ranks = part
    if not 0 <= rank < ranks <= size:
        raise ValueError(f"part must be (rank, ranks), 0 <= rank < ranks <= size = {size}; got {part}.")
    positions = step * size + np.arange(rank * size // ranks, (rank + 1) * size // ranks)
    index = indices(examples, seed, positions)
    keys = words(sample_keys(seed, torch.from_numpy(positions)), torch.zeros(1, dtype=torch.int64), 1, DATA)
    return examples.read(index, keys.flatten().numpy()), torch.from_numpy(examples.labels[index]), positions


def indices(examples: Examples, seed: int, positions: np.ndarray) -> np.ndarray:
    """Return the examples at these positions of the stream: (b,) -> (b,) int64 indices."""
    import numpy as np

    epochs, places = np.divmod(positions, len(examples.train))
    index = np.empty(len(positions), np.int64)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        index[now] = _order(examples, seed, int(epoch))[places[now]]
    return index


@functools.lru_cache(maxsize=8)
def _order(examples: Examples, seed: int, epoch: int) -> np.ndarray:
    import numpy as np

    if examples.order is not None:
        return examples.order(seed, epoch)
    order = examples.train[np.random.default_rng((seed, epoch)).permutation(len(examples.train))]
    order.setflags(write=False)
    return order
