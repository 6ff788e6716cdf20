"""The cost of a training step: images per second, MFU and peak memory for each size, against a plain loop.

    python benchmarks/train.py [--tiny] [--sizes sit-s/2,sit-b/2] [--batch 8] [--pairs 5] > train.json

The lower bound of a step is the time of its matrix products, at the rate of such products on this machine, plus the time
to move the bytes of the optimizer and of the average, at the rate of a copy.  The baseline trains the same network as
published research code does: a float32 loop (TF32 on CUDA) with torch's default AdamW, an average updated by a loop in
Python, no compilation.  It is compared with the steps of sitkit, eager and compiled, in float32 and in bfloat16
(train.precision: bf16).  All run in this process, one step of each in turn, and the medians of the ratios of neighbouring
steps are reported.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _shared import machine, parser
from torch import nn

import sitkit
from sitkit import Examples, in_memory
from sitkit.data.stream import batch as read
from sitkit.models.autoencoder import Prepared
from sitkit.runtime.distributed import ProcessGroup
from sitkit.training.ema import EMA
from sitkit.training.objective import TrainingInputs, objective_of
from sitkit.training.optimizer import Optimization
from sitkit.training.parallel import Parallelized, tf32
from sitkit.training.throughput import PASSES, peak_flops

SHAPE, CLASSES, LR, DECAY = (4, 32, 32), 1000, 1e-4, 0.9999
# float32 numbers moved for each parameter: AdamW reads four and writes three, the average reads two and writes one.
MOVED = 10


def latents(n: int) -> Examples:
    """Return random latents of the size of ImageNet latents at 256 pixels."""
    values = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0)).numpy()
    labels = (torch.arange(n) % CLASSES).numpy()
    return in_memory(values, labels, tuple(map(str, range(CLASSES))), holdout=0.0)


def network_of(size: str, device: torch.device) -> nn.Module:
    """Return the network with no zero weights, so that no matrix product is trivial."""
    torch.manual_seed(0)
    network = sitkit.backbones.create(size).build(SHAPE, CLASSES).to(device)
    for parameter in network.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.train()


def baseline(network: nn.Module, data: Examples, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a training step of linear / velocity written as in published code."""
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, weight_decay=0)
    values, labels = data.read(data.train), torch.from_numpy(data.labels)
    position = 0

    def step() -> None:
        nonlocal position
        rows = torch.arange(position, position + batch) % len(values)
        position += batch
        x1, y = values[rows].to(device), labels[rows].to(device)
        y = torch.where(torch.rand(batch, device=device) < 0.1, CLASSES, y)
        x0, t = torch.randn_like(x1), torch.rand(batch, device=device)
        wide = t.reshape(-1, 1, 1, 1)
        loss = (network(wide * x1 + (1 - wide) * x0, t, y) - (x1 - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
                mean.mul_(DECAY).add_(weight, alpha=1 - DECAY)
        loss.item()

    return step


def ours(
    network: nn.Module, data: Examples, batch: int, device: torch.device, compiled: bool, precision: str
) -> Callable[[], None]:
    """Return the step of sitkit's training loop, without its log and its files."""
    settings = {"batch": batch, "lr": LR, "ema": DECAY, "precision": precision}
    config = sitkit.Config.model_validate({"train": settings})
    objective = objective_of(config, network, Prepared(data, SHAPE, CLASSES))
    group = ProcessGroup(0, 1, device)
    parallelized = Parallelized(objective, group, "ddp", compiled)
    optimization, averages = Optimization(objective.parameters(), config.train), EMA(network, (DECAY,))
    inputs_of = TrainingInputs(config, network, data, device)
    steps = 0

    def step() -> None:
        nonlocal steps
        parallelized(*inputs_of(*read(data, 0, steps, batch)))[0].backward()
        optimization.step()
        steps += 1
        averages.update(steps)

    return step


def timed(step: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Return the seconds of one step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_time = time.perf_counter()
    for _ in range(repeat):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start_time) / repeat


def measure(size: str, batch: int, pairs: int, repeat: int, device: torch.device, compile_too: bool) -> dict[str, Any]:
    """Measure one size: every variant beside the baseline, one step of each in turn."""
    data = latents(max(64, batch))
    plain = network_of(size, device)
    # For each variant: whether it is compiled, and its precision.  The baseline is float32, TF32 on CUDA.
    variants = {
        f"{'compiled' if compiled else 'eager'} {precision}": (compiled, precision)
        for precision in (("bf16",) if device.type == "cuda" else ("fp32", "bf16"))
        for compiled in ((False, True) if compile_too else (False,))
    }
    steps = {"baseline": baseline(plain, data, batch, device)}
    steps |= {name: ours(network_of(size, device), data, batch, device, *how) for name, how in variants.items()}
    memory: dict[str, float] = {}
    for name, step in steps.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed(step, device, 2)
        if device.type == "cuda":
            memory[name] = torch.cuda.max_memory_allocated(device) / 2**30
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(pairs):
        for name, step in steps.items():
            seconds[name].append(timed(step, device, repeat))
    flops = PASSES * (sitkit.backbones.create(size).flops(SHAPE) or 0) * batch
    numbers = sum(p.numel() for p in plain.parameters())
    moved = MOVED * 4 * numbers

    def row(name: str) -> dict[str, float]:
        median, bf16 = statistics.median(seconds[name]), name in variants and variants[name][1] == "bf16"
        rate = peak_flops(device, torch.bfloat16 if bf16 else torch.float32)
        floor = flops / rate + moved / bandwidth(device)
        return {
            "seconds": median,
            "images_per_second": batch / median,
            "matmul_flops": rate,
            "mfu": flops / median / rate,
            "floor": floor,
            "over_floor": median / floor,
            "over_baseline": statistics.median(a / b for a, b in zip(seconds[name], seconds["baseline"], strict=True)),
        } | ({"peak_gib": memory[name]} if name in memory else {})

    return {
        "size": size,
        "batch": batch,
        "parameters": numbers,
        "floor": {"flops": flops, "bytes": moved},
        "variants": {name: row(name) for name in steps},
        "seconds": seconds,
    }


def parts(size: str, batch: int, device: torch.device) -> dict[str, float]:
    """Return the seconds of each part of an eager step, the best of three."""
    data, network = latents(max(64, batch)), network_of(size, device)
    config = sitkit.Config.model_validate({"train": {"batch": batch}})
    objective = objective_of(config, network, Prepared(data, SHAPE, CLASSES))
    inputs_of = TrainingInputs(config, network, data, device)
    optimization, averages = Optimization(objective.parameters(), config.train), EMA(network, (DECAY,))
    inputs = inputs_of(*read(data, 0, 0, batch))
    best: dict[str, float] = {}
    for _ in range(3):
        losses: list[torch.Tensor] = []
        pieces: dict[str, Callable[[], object]] = {
            "inputs": lambda: inputs_of(*read(data, 0, 0, batch)),
            "forward": lambda losses=losses: losses.append(objective(*inputs)[0]),
            "backward": lambda losses=losses: losses[0].backward(),
            "optimiser": optimization.step,
            "average": lambda: averages.update(2),
        }
        for name, piece in pieces.items():
            best[name] = min(best.get(name, float("inf")), timed(piece, device, 1))
    return best


def bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a copy, counting reads and writes."""
    a = torch.zeros(2**26 if device.type == "cuda" else 2**24, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(timed(lambda: b.copy_(a), device, 1) for _ in range(5))


def main() -> None:
    """Run everything and print JSON."""
    cuda = torch.cuda.is_available()
    benchmark = parser(__doc__)
    benchmark.add_argument("--sizes", default="sit-s/2,sit-b/2,sit-l/2,sit-xl/2" if cuda else "sit-s/2")
    benchmark.add_argument("--batch", type=int, default=64 if cuda else 8)
    benchmark.add_argument("--pairs", type=int, default=7)
    benchmark.add_argument("--no-compile", action="store_true")
    options = benchmark.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    sizes, batch, pairs = options.sizes.split(","), options.batch, options.pairs
    if options.tiny:
        sizes, batch, pairs = ["sit-xs/4"], 4, 2
    with tf32(True):
        report = {
            "machine": machine() | {"device": torch.cuda.get_device_name() if cuda else "cpu"},
            "sizes": [
                measure(size, batch, pairs, 5 if cuda else 1, device, not (options.no_compile or options.tiny))
                for size in sizes
            ],
            "parts": parts(sizes[0], batch, device),
        }
    report["own_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
