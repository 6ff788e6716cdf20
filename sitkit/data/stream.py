"""Batches read ahead: while the network works on one, threads read and decode the next."""

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
    """The batches of `steps`, in order, as `read_ahead` gives them: each is `batch(examples, seed, step, size, part)`.

    pin: in page-locked memory, from which a copy to a GPU need not wait.
    """

    def read(step: int) -> DataBatch:
        x, y, positions = batch(examples, seed, step, size, part)
        return (x.pin_memory(), y.pin_memory(), positions) if pin else (x, y, positions)

    return read_ahead(read, steps, workers)


@contextlib.contextmanager
def read_ahead(read: Callable[[Item], Read], items: Iterable[Item], workers: int) -> Iterator[Iterator[Read]]:
    """read(item) of each item, in order, whatever `workers` is.

    workers threads each read one item, and as many more lie ready: twice `workers` are held in memory.  0 reads in the
    calling thread when an item is asked for.  What goes wrong in a thread is raised where its item is asked for.  On
    leaving, no thread is left: reads that have not begun are dropped, and those that have are waited for.
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
    """What was begun first comes first; each item that is taken lets one more begin."""
    while waiting:
        ready = waiting.popleft().result()
        waiting.extend(itertools.islice(later, 1))
        yield ready


def batch(examples: Examples, seed: int, step: int, size: int, part: tuple[int, int] = (0, 1)) -> DataBatch:
    """Batch `step` of an endless stream: x (size, *shape), y (size,) int64, positions (size,).

    Position p = step * size + i of the stream is place p mod n of permutation p // n of the n training examples, the data
    set's own where it has an order: each epoch has every example once, and the stream is the same for every size.
    part = (rank, ranks) reads rank's run of neighbouring positions, from rank * size // ranks on: the parts of all ranks,
    one after another, are the batch.
    Raises ValueError for step < 0, size < 1, seed < 0, or a part that is not 0 <= rank < ranks <= size.
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
    drawn = words(sample_keys(seed, torch.from_numpy(positions)), torch.zeros(1, dtype=torch.int64), 1, DATA)
    return examples.read(index, drawn.flatten().numpy()), torch.from_numpy(examples.labels[index]), positions


def indices(examples: Examples, seed: int, positions: np.ndarray) -> np.ndarray:
    """Which examples stand at these positions of the stream: (b,) -> (b,) int64."""
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
