"""The cost of sampling beyond the network: time against a plain loop, and memory against the number of steps.

    python benchmarks/sampling.py [--tiny] > sampling.json

The lower bound of a step is one network call.  The baseline makes the same number of network calls on the same state, and
otherwise only the Euler-Maruyama update with torch.randn.  Both run in this process, in turn, and the median of the ratios
is reported.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _shared import machine, parser
from torch import Tensor, nn

import sitkit

SHAPE = (4, 32, 32)


def baseline(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
    """Sample by a plain Euler-Maruyama loop for linear / velocity with w = sigma."""
    end = 0.96
    h = end / steps
    for i in range(steps):
        t = i * h
        v = network(x, torch.full((len(x),), t), y)
        score = (t * v - x) / (1 - t)
        x = x + h * (v + (1 - t) / 2 * score) + ((1 - t) * h) ** 0.5 * torch.randn_like(x)
    return x


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of the work, by the clock and of the processor.

    Other work on the machine changes the clock seconds, but hardly the processor seconds.
    """
    start_time = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start_time[0], time.process_time() - start_time[1]


def overhead(batch: int, steps: int, pairs: int, backbone: str) -> dict[str, Any]:
    """Return the time of sitkit's euler-maruyama (through torchsde) over that of the baseline with as many network calls."""
    torch.manual_seed(0)
    network = sitkit.backbones.create(backbone).build(SHAPE, 1000).eval()
    field = sitkit.Field(network, sitkit.interpolants.create("linear"), sitkit.targets.create("velocity"))
    # The last step is one of the steps of sitkit; the last call of the loop corresponds to it.
    sampler = sitkit.samplers.create("euler-maruyama", steps=steps, last_step="tweedie")
    x, y = torch.randn(batch, *SHAPE), torch.zeros(batch, dtype=torch.int64)
    ours, theirs = [], []
    with torch.no_grad():
        baseline(network, x, y, 1)
        for _ in range(pairs):
            ours.append(timed(lambda: sampler.sample(field, x, y, seeds=range(batch))))
            theirs.append(timed(lambda: baseline(network, x, y, steps)))
    calls = sampler.sample(field, x, y, seeds=range(batch)).nfe
    return {
        "backbone": backbone,
        "batch": batch,
        "network_calls": calls,
        **compared("clock", [wall for wall, _ in ours], [wall for wall, _ in theirs]),
        **compared("processor", [cpu for _, cpu in ours], [cpu for _, cpu in theirs]),
    }


def compared(clock: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Return the medians of both and of the ratios of neighbouring runs, and every ratio."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    medians = [statistics.median(values) for values in (ours, theirs, ratios)]
    return {clock: dict(zip(("seconds", "baseline_seconds", "ratio"), medians, strict=True)) | {"ratios": ratios}}


def peak(steps: int, batch: int) -> int:
    """Return the peak resident memory in MiB of a process that samples an SDE in `steps` steps with one convolution.

    VmHWM is the peak of that process alone; ru_maxrss of getrusage would start at the peak of the parent process.
    """
    code = (
        "import torch, sitkit; torch.manual_seed(0)\n"
        "conv = torch.nn.Conv2d(4, 4, 3, padding=1)\n"
        "path, target = sitkit.interpolants.create('linear'), sitkit.targets.create('velocity')\n"
        "field = sitkit.Field(lambda x, t, y: conv(x), path, target, 1)\n"
        f"sampler = sitkit.samplers.create('euler-maruyama', steps={steps})\n"
        f"sampler.sample(field, torch.randn({batch}, 4, 32, 32), seeds=range({batch}))\n"
        "print(int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) // 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run everything and print JSON."""
    tiny = parser(__doc__).parse_args().tiny
    report = {
        "machine": machine(),
        "overhead": overhead(2, 4, 2, "sit-xs/4") if tiny else overhead(8, 10, 5, "sit-s/2"),
        "peak_mib_by_steps": {n: peak(n, 4 if tiny else 64) for n in ((4, 8) if tiny else (25, 250, 500))},
        "floor": "one network call a step",
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
