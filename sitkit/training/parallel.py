"""How an objective is laid out over devices: compiled, replicated (DDP) or sharded (FSDP2), and its state made whole.

Either way a checkpoint is one file with whole tensors, so that any number of processes continues it.  They are made
whole one at a time and kept in the lead's main memory alone: a GPU never holds more than its shards and one tensor, but
the lead's machine needs room for the whole state (weights, averages, two moments: 16 bytes a parameter), and each
process reads the file for itself and keeps only its shards.
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
    """An objective on its devices: called as the objective is, with gradients averaged over the processes."""

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
            # The compiler lays the gradient of the patches' convolution out its own way: DDP copies a few KB a step, and warns.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            compile_(self.module)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(*inputs)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Where gradients are summed without being exchanged, but for the last part of a step."""
        for module in self.sharded:
            module.set_requires_gradient_sync(last)
        replicated = self.module is not self.objective
        return self.module.no_sync() if replicated and not last else contextlib.nullcontext()


def compile_(module: nn.Module) -> None:
    """Compile a module in place, for the one shape that training has."""
    # The tanh of a GELU through exp, off by 1e-7 where libm's is exact: the step is shorter by a fortieth on a CPU.
    tanh = "cpp.use_decompose_tanh"
    module.compile(dynamic=False, options={tanh: True} if tanh in torch._inductor.list_options() else None)


def _shard(objective: Objective, group: ProcessGroup, compiled: bool) -> list[Any]:
    """Shard each block of the network's lists of modules, then the rest; each block is compiled by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A view of the network's output is fine: nothing here changes one in place.
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
    """All of a tensor that may be sharded.  Every process must call it, in the same order."""
    return getattr(tensor, "full_tensor", lambda: tensor)()


def gathered(tensors: Mapping[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Whole tensors in the lead's main memory; elsewhere nothing is kept."""
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if group.lead:
            kept[name] = full.detach().cpu()
    return kept


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, where `like` is sharded; else the tensor."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within it float32 products on CUDA are, or are not, computed in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
