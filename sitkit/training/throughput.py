"""The speed of training: images per second, and the fraction of the peak FLOPs that the model uses (MFU)."""

from __future__ import annotations

import functools
import time

import torch

from sitkit.runtime.distributed import ProcessGroup

# A training step costs three forward passes: the backward pass costs two.
PASSES = 3


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs per second of the fastest of a few square matrix products; a multiply-add counts as two.

    The value is measured on this device, not taken from a data sheet: 4096^3 on CUDA, 512^3 on a CPU with the current
    number of threads of torch.  float32 on CUDA uses TF32 if it is allowed at the first call.
    """
    n, tries = (4096, 20) if device.type == "cuda" else (512, 5)
    a, b = torch.randn(2, n, n, device=device, dtype=torch.float32).to(dtype)
    return 2 * n**3 / min(_seconds(a, b) for _ in range(tries))


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.device.type != "cuda":
        began = time.perf_counter()
        torch.matmul(a, b)
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    torch.matmul(a, b)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


class Throughput:
    """Images per second, and model FLOPs utilisation (MFU): the FLOPs of the model over the peak of all devices.

    flops: those of a forward pass for one image, or None if they are not known; recomputation in a backward pass
    (checkpointing) does not count.
    """

    def __init__(self, flops: int | None, group: ProcessGroup, dtype: torch.dtype) -> None:
        self.flops, self.device = flops, group.device
        self.peak = peak_flops(group.device, dtype) * group.size if flops is not None else 0.0
        self.since = time.monotonic()

    def read(self, images: int) -> dict[str, float]:
        """Return {"images_per_second", "mfu", "memory_gib"} since the last call; the last is the peak memory on CUDA."""
        now = time.monotonic()
        rate, self.since = images / (now - self.since), now
        rates = {} if self.flops is None else {"mfu": PASSES * self.flops * rate / self.peak}
        if self.device.type == "cuda":
            rates["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return {"images_per_second": rate} | rates
