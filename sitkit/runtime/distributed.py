"""The process group: ranks under torchrun, or a single process.

`torchrun --nproc-per-node=N -m sitkit train ...` starts N processes with the same command line.  Each joins the group and
does its part; rank 0 alone, the lead, writes files, draws bars and tracks.  Collectives use gloo on the CPU and nccl
between GPUs.  Without torchrun the functions of this file do nothing.
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

Shared = TypeVar("Shared")

# The key under which the first process that fails stores its rank, before the others notice that it is gone.
_FAILED = "sitkit/failed"
_PATIENCE = 20.0


@dataclass(frozen=True)
class ProcessGroup:
    """This process among the others.  All processes must call the collectives in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def lead(self) -> bool:
        """Whether this process writes files and messages for all."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Return this process's part of the numbers below `total`: contiguous, in order of rank, sizes differ by 1 at most."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            # The tensor is on the CPU: gloo does not wait for a GPU.
            dist.all_reduce(torch.zeros(1))

    def gather(self, value: Shared) -> list[Shared]:
        """Return the values of all processes by rank at the lead, and an empty list in the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.lead else None
        dist.gather_object(value, values)
        return values or []

    def broadcast(self, value: Shared) -> Shared:
        """Return the lead's value in every process, for a decision that must be the same in all."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def any(self, value: bool) -> bool:
        """Return in every process whether the value is true in any of them."""
        if self.size == 1:
            return value
        largest = torch.tensor(int(value))
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return bool(largest)

    def mean(self, value: Tensor) -> Tensor:
        """Return in every process the mean of a tensor over the processes; the tensor itself does not change."""
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size


def size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str) -> torch.device:
    """Return a device by name; "auto" is CUDA if the machine has it, and under torchrun each process's own GPU.

    Raises UserError for a device that the machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and size() > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        # A tensor on "meta" has no values.
        torch.zeros(1, device=device).cpu()
    # torch raises errors of many types, as ModuleNotFoundError for a device whose package is missing.
    except Exception:
        count, other = torch.accelerator.device_count(), torch.accelerator.current_accelerator()
        devices = ["cpu", *(f"{other.type}:{number}" for number in range(count) if other)]
        raise UserError(f"device {name!r} is not usable on this machine; usable: {', '.join(devices)}.") from None
    return device


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[ProcessGroup]:
    """Yield the process group for the time of a piece of work; nested calls share it.

    An error in one process ends the work in all.  The first process that fails raises its error, with its rank if it is
    not the lead; the others end with SystemExit.  If a process was killed and gave no reason, WorkFailed is raised.
    Raises UserError for a device that the machine does not have.
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
            # torchrun ends all processes once the first has ended: that must be the process with the error message.
            time.sleep(_PATIENCE)
            raise SystemExit(1) from None
        if _lost(error):
            raise WorkFailed(
                f"Another of the {size()} processes ended without a message (killed, or its machine is gone). "
                "Saved files are kept: run the same command again."
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
        # torchrun, which keeps the store, is gone: no other process can answer.
        return True


def _lost(error: Exception) -> bool:
    """Whether a collective failed because a peer is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "nccl" in text or "connection closed by peer" in text or "connection reset" in text)
    )
