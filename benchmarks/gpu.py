"""Correctness, and the speed of training and sampling, on one large GPU in under eight minutes.

    python benchmarks/gpu.py [--tiny] [--batch 256] > gpu.json

First correctness: the network in bfloat16, in TF32 and compiled is compared with float32 eager; the same samples are drawn
in batches of another size; and a training that continues from a checkpoint is compared with one that was not stopped.

Then training of sit-xl/2 at 4 x 32 x 32 in bfloat16, eager and compiled: images per second, MFU relative to the rate of
large matrix products on this device, and the ratio to the baseline of benchmarks/train.py (TF32, eager, an average updated
by a loop in Python).  Each variant runs alone on the device with the largest batch that fits, found by halving --batch.

Then sampling: images per second of heun and euler-maruyama, against a plain loop with the same number of network calls.
A short table on stderr ends the output.

With --tiny, everything runs with a small network on any device, as a smoke test on a CPU.  A part that fails is recorded,
and the other parts run.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _shared import machine, parser
from safetensors.torch import load_file
from sampling import compared
from torch import Tensor, nn
from train import CLASSES, SHAPE, baseline, latents, network_of, ours, timed

import sitkit
from sitkit.training.parallel import tf32
from sitkit.training.throughput import PASSES, peak_flops

# The goals for sit-xl/2 on one H100 or H200.
WANTED = {"mfu": 0.55, "over_baseline": 3.0}


def inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, t and y for a network."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, *SHAPE, generator=g), torch.rand(batch, generator=g)
    return x.to(device), t.to(device), torch.randint(0, CLASSES, (batch,), generator=g).to(device)


def error(ours: Tensor, truth: Tensor) -> float:
    """Return the root mean square of the difference, divided by that of the truth."""
    return float((ours.double() - truth.double()).square().mean().sqrt() / truth.double().square().mean().sqrt())


def verdict(value: float, bound: float) -> dict[str, Any]:
    """Return an error, its bound, and whether the error is within the bound."""
    return {"error": value, "bound": bound, "right": value <= bound}


def network_right(size: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Compare the network's predictions in TF32, in bfloat16 and compiled with float32 eager."""
    network, arguments = network_of(size, device).eval(), inputs(8, device)
    bounds = {"tf32": 5e-3, "bf16": 3e-2, "compiled": 1e-4}
    with torch.no_grad(), tf32(False):
        truth = network(*arguments)
        errors: dict[str, float] = {}
        with tf32(True):
            errors["tf32"] = error(network(*arguments), truth)
        with torch.autocast(device.type, torch.bfloat16):
            errors["bf16"] = error(network(*arguments), truth)
        if compiled:
            errors["compiled"] = error(torch.compile(network)(*arguments), truth)
    return {name: verdict(value, bounds[name]) for name, value in errors.items()}


def samples_right(size: str, device: torch.device) -> dict[str, Any]:
    """Compare the same samples drawn in batches of 8 and of 3; matrix products of another shape round differently."""
    field = field_of(network_of(size, device).eval().requires_grad_(False))
    keys = torch.arange(8, device=device)
    x, _, y = inputs(8, device)
    results = {}
    for name in ("heun", "euler-maruyama"):
        sampler = sitkit.samplers.create(name, steps=8)
        with tf32(False):
            whole = sampler.sample(field, x, y, seeds=keys).x
            parts = [sampler.sample(field, x[rows], y[rows], seeds=keys[rows]).x for rows in torch.arange(8).split(3)]
        results[name] = verdict(error(torch.cat(parts), whole), 1e-3)
        results[name]["right"] &= bool(whole.isfinite().all())
    return results


def resume_right(device: torch.device) -> dict[str, Any]:
    """Compare the weights after 20 steps with those after 10 steps and 10 more from the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "train.steps": 20, "train.batch": 16, "run.checkpoint_every": 10, "run.sample_every": 0, "run.track": False,
            "run.compile": False, "run.device": str(device),
            "backbone": {"name": "sit", "patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2},
        }  # fmt: skip
        whole, continued = (
            sitkit.configure("digits", settings=settings | {"run.folder": f"{folder}/{name}"})
            for name in ("whole", "continued")
        )
        run = sitkit.train(whole, progress=sitkit.silent).folder
        half, last = sorted((run / "checkpoints").iterdir())
        checkpoints = Path(folder) / "continued" / run.name / "checkpoints"
        checkpoints.mkdir(parents=True)
        shutil.copy(half, checkpoints)
        sitkit.train(continued, progress=sitkit.silent)
        expected, weights = load_file(last), load_file(checkpoints / last.name)
    names = [name for name in expected if name.startswith("model.") and expected[name].any()]
    return {"continued": verdict(max(error(weights[name], expected[name]) for name in names), 1e-6)}


def field_of(network: nn.Module, bf16: bool = False) -> sitkit.Field:
    """Return the network as a linear / velocity field; `bf16` evaluates it in bfloat16."""

    def in_bf16(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return network(x, t, y)

    path, target = sitkit.interpolants.create("linear"), sitkit.targets.create("velocity")
    return sitkit.Field(in_bf16 if bf16 else network, path, target, CLASSES)


def training(size: str, batch: int, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    """Return the images per second of the steps of the baseline and of sitkit, each alone on the device."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    variants: dict[str, tuple[bool, str] | None] = {"baseline": None, "eager": (False, precision)}
    variants |= {"compiled": (True, precision)} if compiled else {}
    results: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        results[name] = largest_batch(size, batch, device, rounds, variant)
        free()
    rate = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    flops = PASSES * (sitkit.backbones.create(size).flops(SHAPE) or 0)
    for row in results.values():
        row["mfu"] = flops * row["images_per_second"] / rate
        row["over_baseline"] = row["images_per_second"] / results["baseline"]["images_per_second"]
    return results


def largest_batch(
    size: str, batch: int, device: torch.device, rounds: int, variant: tuple[bool, str] | None
) -> dict[str, Any]:
    """Return the median step of one variant, alone on the device; the batch is halved until it fits."""
    try:
        network, data = network_of(size, device), latents(max(64, batch))
        step = (
            baseline(network, data, batch, device) if variant is None else ours(network, data, batch, device, *variant)
        )
        timed(step, device, 3)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = [timed(step, device, 1) for _ in range(rounds)]
    except torch.OutOfMemoryError:
        if batch == 1:
            raise
    else:
        median = statistics.median(seconds)
        row = {"batch": batch, "seconds": median, "images_per_second": batch / median}
        return row | ({"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if device.type == "cuda" else {})
    # This is outside the handler, because its traceback would keep the tensors.
    network = step = None
    free()
    return largest_batch(size, batch // 2, device, rounds, variant)


def free() -> None:
    """Free the device's memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sampling(size: str, batch: int, steps: int, pairs: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Return the images per second of each sampler, against a plain loop with as many calls of the same network."""
    cuda = device.type == "cuda"
    network = network_of(size, device).eval().requires_grad_(False)
    if compiled:
        network.compile(dynamic=False)
    field = field_of(network, bf16=cuda)
    x, t, y = inputs(batch, device)
    results: dict[str, Any] = {}
    for name in ("heun", "euler-maruyama"):
        sampler = sitkit.samplers.create(name, steps=steps)
        nfe = sampler.sample(field, x, y, seeds=range(batch)).nfe

        def plain_loop(calls: int = nfe) -> None:
            with torch.no_grad():
                for _ in range(calls):
                    field.network(x, t, y)

        def ours(sampler: Any = sampler) -> None:
            sampler.sample(field, x, y, seeds=range(batch))

        plain_loop(2)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(pairs):
            for work, times in zip((ours, plain_loop), seconds, strict=True):
                times.append(timed(work, device, 1))
        row = compared("clock", *seconds)["clock"]
        results[name] = {"steps": steps, "nfe": nfe, "batch": batch, "images_per_second": batch / row["seconds"], **row}
    return results


def record(report: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """Run one part and record its results and seconds, or its error."""
    start_time = time.perf_counter()
    try:
        report[name] = work()
    except Exception as error_of_part:
        traceback.print_exc(file=sys.stderr)
        report[name] = {
            "failed": str(error_of_part).splitlines()[0] if str(error_of_part) else type(error_of_part).__name__
        }
    report["seconds"][name] = time.perf_counter() - start_time
    free()


def table(report: dict[str, Any], size: str) -> list[str]:
    """Return the results, one line each."""
    lines = [f"device            {report['machine']['device']}"]
    for part in ("network", "samples", "resume"):
        for name, row in report["correctness"].get(part, {}).items():
            size_of_error = f"{row['error']:.2g} of {row['bound']:.2g}" if isinstance(row, dict) else str(row)
            right = isinstance(row, dict) and row["right"]
            lines.append(f"{'right' if right else 'WRONG':<18}{part} {name}: {size_of_error}")
    for name, row in report["training"].items():
        if isinstance(row, dict):
            lines.append(
                f"train             {size} {name}, batch {row['batch']}: {row['images_per_second']:.4g} images/s, "
                f"MFU {row['mfu']:.1%}, {row['over_baseline']:.2f} times the baseline"
            )
    lines.append(
        f"goal              MFU {WANTED['mfu']:.0%} of {report['machine']['matmul_tflops']:.3g} TFLOP/s, the rate of matrix "
        f"products, {WANTED['over_baseline']:.0f} times the baseline"
    )
    for name, row in report["sampling"].items():
        if isinstance(row, dict):
            lines.append(
                f"sample            {name}, {row['steps']} steps, batch {row['batch']}: {row['images_per_second']:.4g} "
                f"images/s, {row['ratio']:.3f} times the time of the network calls alone"
            )
    failed = [name for name in ("correctness", "training", "sampling") if "failed" in report[name]]
    lines += [f"FAILED            {name}: {report[name]['failed']}" for name in failed]
    lines.append(f"seconds           {sum(report['seconds'].values()):.0f}")
    return lines


def main() -> None:
    """Run everything, print JSON, and a table on stderr."""
    cuda = torch.cuda.is_available()
    benchmark = parser(__doc__, tiny="a small network, for a smoke test on a CPU")
    benchmark.add_argument("--batch", type=int, default=256, help="of the training step; halved until it fits")
    options = benchmark.parse_args()
    if not cuda and not options.tiny:
        raise SystemExit("This machine has no GPU. Use --tiny for a smoke test on a CPU.")
    device = torch.device("cuda" if cuda else "cpu")
    size, batch, rounds, steps = "sit-xl/2", options.batch, 15, 50
    if options.tiny:
        size, batch, rounds, steps = "sit-xs/4", 4, 2, 3
    report: dict[str, Any] = {
        "machine": {
            **machine(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "matmul_tflops": peak_flops(device, torch.bfloat16 if cuda else torch.float32) / 1e12,
        },
        "wanted": WANTED,
        "seconds": {},
        "correctness": {},
    }

    def right() -> dict[str, Any]:
        parts = {
            "network": lambda: network_right(size, device, cuda),
            "samples": lambda: samples_right("sit-xs/4" if options.tiny else "sit-s/2", device),
            "resume": lambda: resume_right(device),
        }
        return {part: check() for part, check in parts.items()}

    record(report, "correctness", right)
    with tf32(True):
        record(report, "training", lambda: training(size, batch, device, rounds, cuda))
        record(report, "sampling", lambda: sampling(size, min(batch, 64), steps, 2, device, cuda))
    print(json.dumps(report, indent=2))
    lines = table(report, size)
    print("\n".join(lines), file=sys.stderr)
    if any(line.startswith(("WRONG", "FAILED")) for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
