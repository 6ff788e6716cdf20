"""The processes that share one piece of work: their ranks under torchrun, or the one process that there is.

`torchrun --nproc-per-node=N -m sitkit train ...` starts N processes with the same command line.  Each joins the world,
does its part, and only the lead (rank 0) writes files, draws bars and tracks.  Collectives are gloo's on the CPU and
nccl's between GPUs.  Without torchrun everything here does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sitkit.runtime.errors import UserError, WorkFailed

T = TypeVar("T")

# Where the first process to fail leaves its rank, before its peers can notice that it is gone.
_FAILED = "sitkit/failed"
_PATIENCE = 20.0


@dataclass(frozen=True)
class ProcessGroup:
    """This process among its peers.  Every collective must be called by all of them, in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def lead(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """The numbers below `total` that are this process's: contiguous, in order of rank, sizes differing by at most 1."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            # Through gloo, so that nothing waits for a GPU.
            dist.all_reduce(torch.zeros(1))

    def gather(self, value: T) -> list[T]:
        """Every process's value by rank, at the lead; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.lead else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: T) -> T:
        """The lead's value, everywhere: a decision that all must take alike."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def any(self, value: bool) -> bool:
        """Whether it is true in any process, everywhere."""
        if self.size == 1:
            return value
        told = torch.tensor(int(value))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, everywhere; the tensor itself is left alone."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size


def size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str) -> torch.device:
    """The device by name; "auto" is CUDA where there is one, under torchrun each process's own.

    Raises UserError for one that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from None
    return device


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[ProcessGroup]:
    """This process's place in the world, for as long as a piece of work takes; works within one another share it.

    Whatever ends the work in one process ends it in all, and one of them says why: the first to fail raises its error,
    with its rank if it is not the lead; the others leave with SystemExit.  Where a peer was killed and could say
    nothing, WorkFailed says that.  Raises UserError for a device that is not there.
    """
    if size() == 1:
        yield ProcessGroup(0, 1, device_of(device))
        return
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_leave)
    rank = dist.get_rank()
    try:
        group = ProcessGroup(rank, size(), device_of(device))
        if group.device.type == "cuda":
            torch.cuda.set_device(group.device)
        yield group
    except Exception as error:
        if not _first_to_fail(rank):
            # torchrun ends every process as soon as one has ended: let the one that speaks be that one.
            time.sleep(_PATIENCE)
            raise SystemExit(1) from None
        if _lost(error):
            raise WorkFailed(
                f"Another of the {size()} processes ended without a word (killed, or its machine is gone). "
                "What was saved is kept: run the same command again."
            ) from error
        if isinstance(error, UserError | WorkFailed) and rank > 0:
            raise type(error)(f"rank {rank} of {size()}: {error}") from error
        raise


def _leave() -> None:
    if dist.is_initialized():
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _first_to_fail(rank: int) -> bool:
    store = dist.distributed_c10d._get_default_store()
    try:
        return int(store.compare_set(_FAILED, "", str(rank))) == rank
    except (RuntimeError, ValueError):
        # torchrun, who keeps the store, is gone: nobody else can be asked.
        return True


def _lost(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "nccl" in text or "connection closed by peer" in text or "connection reset" in text)
    )
