"""Batches read ahead: while the network works on one, threads read and decode the next."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from sitkit.data.dataset import batch

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from sitkit.data.dataset import Examples

Batch: TypeAlias = "tuple[Tensor, Tensor, np.ndarray]"
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
) -> contextlib.AbstractContextManager[Iterator[Batch]]:
    """The batches of `steps`, in order, as `read_ahead` gives them: each is `batch(examples, seed, step, size, part)`.

    pin: in page-locked memory, from which a copy to a GPU need not wait.
    """

    def read(step: int) -> Batch:
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
