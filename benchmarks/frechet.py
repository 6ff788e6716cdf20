"""The cost of a Frechet distance with its standard error for fewer samples than dimensions: seconds and memory.

    python benchmarks/frechet.py [--tiny] [--bootstrap 0] > frechet.json

The features are random numbers in float64.  Each case runs in its own process on one thread, and is killed after three
minutes.  The lower bound of the time is the product of the samples and the reference, 2 n m d FLOP, at the rate of matrix
products in float64 on this core.  The lower bound of the memory is the size of the features.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

import torch
from _shared import parser

import sitkit

# n samples, m reference points, d dimensions: 64 x 64 x 3 pixels of 12,000 images, and Inception features of 10,000.
CASES = ((300, 11_992, 12_288), (1000, 11_992, 12_288), (1000, 10_000, 2048))
TIMEOUT = 180


def measure(n: int, m: int, d: int, bootstrap: int) -> dict[str, float]:
    """Measure one distance in this process."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64).mul_(scale) for k in (n, m))
    metric = sitkit.metrics.create("frechet", bootstrap=bootstrap)
    clock, processor = time.perf_counter(), time.process_time()
    distance = metric.compare(x, y)
    return {
        "value": distance.value,
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "features_mib": 8 * (n + m) * d / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    }


def rate() -> float:
    """Return the FLOP per processor second of matrix products in float64."""
    a = torch.randn(1024, 1024, dtype=torch.float64)
    torch.mm(a, a)
    start_time = time.process_time()
    for _ in range(10):
        torch.mm(a, a)
    return 20 * 1024**3 / (time.process_time() - start_time)


def main() -> None:
    """Measure every case and print JSON."""
    benchmark = parser(__doc__, tiny="a few points, for a smoke test")
    benchmark.add_argument("--bootstrap", type=int, default=0)
    benchmark.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    options = benchmark.parse_args()
    torch.set_num_threads(1)
    if options.case:
        n, m, d = options.case
        print(json.dumps(measure(n, m, d, options.bootstrap)))
        return
    flops, rows = rate(), []
    for n, m, d in ((20, 50, 100),) if options.tiny else CASES:
        command = [sys.executable, __file__, "--bootstrap", str(options.bootstrap), "--case", *map(str, (n, m, d))]
        row = {"n": n, "m": m, "d": d, "floor_seconds": 2 * n * m * d / flops}
        try:
            process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
            row |= json.loads(process.stdout)
        except subprocess.TimeoutExpired:
            row["killed_after"] = TIMEOUT
        rows.append(row)
    machine = {"machine": platform.platform(), "torch": torch.__version__, "gflop_per_second": flops / 1e9}
    print(json.dumps({**machine, "cases": rows}, indent=2))


if __name__ == "__main__":
    main()
