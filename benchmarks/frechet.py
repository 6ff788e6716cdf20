"""What a Frechet distance with its standard error costs where samples are fewer than dimensions: seconds, and memory.

    python benchmarks/frechet.py [--tiny] [--bootstrap 0] > frechet.json

Features are drawn at random, in float64; each case is a process of its own on one thread, and is killed after three minutes.
The floor is the product of the samples and the reference, 2 n m d FLOP, at the rate that this core reaches on products of
matrices in float64, and the features themselves in memory.
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

from sitkit.registry import metrics

# n samples, m reference points, d dimensions: 64 x 64 x 3 pixels of a set of 12,000, and Inception's features of 10,000.
CASES = ((300, 11_992, 12_288), (1000, 11_992, 12_288), (1000, 10_000, 2048))
PATIENCE = 180


def measure(n: int, m: int, d: int, bootstrap: int) -> dict[str, float]:
    """One distance, in this process."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    x, y = (torch.randn(k, d, generator=rng, dtype=torch.float64).mul_(scale) for k in (n, m))
    metric = metrics.create("frechet", bootstrap=bootstrap)
    clock, processor = time.perf_counter(), time.process_time()
    done = metric.compare(x, y)
    return {
        "value": done.value,
        "clock": time.perf_counter() - clock,
        "processor": time.process_time() - processor,
        "features_mib": 8 * (n + m) * d / 2**20,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
    }


def rate() -> float:
    """FLOP per processor second on products of matrices in float64."""
    a = torch.randn(1024, 1024, dtype=torch.float64)
    torch.mm(a, a)
    began = time.process_time()
    for _ in range(10):
        torch.mm(a, a)
    return 20 * 1024**3 / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a few points: does it run at all")
    parser.add_argument("--bootstrap", type=int, default=0)
    parser.add_argument("--case", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
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
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
            row |= json.loads(done.stdout)
        except subprocess.TimeoutExpired:
            row["killed_after"] = PATIENCE
        rows.append(row)
    machine = {"machine": platform.platform(), "torch": torch.__version__, "gflop_per_second": flops / 1e9}
    print(json.dumps({**machine, "cases": rows}, indent=2))


if __name__ == "__main__":
    main()
