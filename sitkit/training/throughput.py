"""How fast training goes: images per second, and the share of the machine's arithmetic that the model puts to use."""

from __future__ import annotations

import functools
import time

import torch

from sitkit.runtime.distributed import ProcessGroup

# A training step is the forward pass and twice as much again backward.
PASSES = 3


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of the best of a few square matrix products on this device, a multiply-add counting two.

    It is what matrix products reach here, not what a data sheet says: 4096^3 on CUDA, 512^3 on a CPU with as many threads
    as torch may use now.  float32 on CUDA is measured with or without TF32 as it is set when first asked for.
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
    """Images per second since the last reading, and model FLOPs utilisation: their useful FLOPs over the peak of all devices.

    flops: of one forward pass for one image, or None where nobody counted them; what a backward pass recomputes
    (checkpointing) is not counted.
    """

    def __init__(self, flops: int | None, group: ProcessGroup, dtype: torch.dtype) -> None:
        self.flops, self.device = flops, group.device
        self.peak = peak_flops(group.device, dtype) * group.size if flops is not None else 0.0
        self.since = time.monotonic()

    def read(self, images: int) -> dict[str, float]:
        """{"images_per_second", "mfu", "memory_gib"} of the images since the last reading; the last is CUDA's peak."""
        now = time.monotonic()
        rate, self.since = images / (now - self.since), now
        known = {} if self.flops is None else {"mfu": PASSES * self.flops * rate / self.peak}
        if self.device.type == "cuda":
            known["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return {"images_per_second": rate} | known
