"""Parallel training: compile the objective, replicate it (DDP) or shard it (FSDP2), and gather its state.

A checkpoint is always one file with whole tensors, so any number of processes can continue it.  Tensors are gathered one
at a time into the main memory of the lead: a GPU holds its shards and one tensor at most, but the machine of the lead
needs memory for the whole state (weights, averages, two moments: 16 bytes per parameter).  To continue, each process reads
the file and keeps only its shards.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sitkit.runtime.distributed import ProcessGroup
from sitkit.training.objective import Objective


class Parallelized:
    """An objective on its devices, with the call of the objective and gradients averaged over the processes."""

    def __init__(self, objective: Objective, group: ProcessGroup, how: Literal["ddp", "fsdp"], compiled: bool) -> None:
        self.objective, self.sharded = objective, []
        self.module: Any = objective
        if group.size > 1 and how == "fsdp":
            self.sharded = _shard(objective, group, compiled)
            return
        if group.size > 1:
            from torch.nn.parallel import DistributedDataParallel

            devices = [group.device] if group.device.type == "cuda" else None
            self.module = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
        if compiled:
            # The compiler chooses the strides of the gradient of the patch convolution: DDP copies a few KB a step, and warns.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            compile_(self.module)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients are summed and, except in the last part of a step, not exchanged."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last)
        replicated = self.module is not self.objective
        return self.module.no_sync() if replicated and not last else contextlib.nullcontext()


def compile_(module: nn.Module) -> None:
    """Compile a module in place, for the single shape of a training."""
    # The tanh of a GELU through exp, with an error of 1e-7: a step on a CPU is shorter by 1/40 than with that of libm.
    tanh = "cpp.use_decompose_tanh"
    module.compile(dynamic=False, options={tanh: True} if tanh in torch._inductor.list_options() else None)


def _shard(objective: Objective, group: ProcessGroup, compiled: bool) -> list[Any]:
    """Shard each block of the network's lists of modules, then the rest; each block is compiled by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A view of the output of the network is safe: no code here changes a view in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(group.device.type, (group.size,))
    roots = [module for module in (objective.network, objective.parts) if module is not None]
    for root in roots:
        for child in root.modules():
            if isinstance(child, nn.ModuleList):
                for block in child:
                    if compiled:
                        compile_(block)
                    fully_shard(block, mesh=mesh)
        fully_shard(root, mesh=mesh)
    return roots


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded.  Every process must call it, in the same order."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def gathered(tensors: Mapping[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Return whole tensors in main memory on the lead, and nothing on the other processes."""
    tensors_of_lead: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if group.lead:
            tensors_of_lead[name] = full.detach().cpu()
    return tensors_of_lead


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of this process of a whole tensor if `like` is sharded, else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Set, within the block, whether float32 products on CUDA use TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
