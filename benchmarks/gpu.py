"""Everything that one large GPU is asked for, in under eight minutes: is it right there, how fast does it train and sample.

    python benchmarks/gpu.py [--tiny] [--batch 256] > gpu.json

First correctness: the network in bfloat16, TF32 and compiled against float32 eager, the same samples in batches of another size,
a training that is continued from a checkpoint against one that ran through.  Then training sit-xl/2 at 4 x 32 x 32 in bfloat16,
eager and compiled: images per second, MFU against the rate that large matrix products reach on this device, and the ratio to the
baseline of benchmarks/train.py (TF32, eager, an average kept by a loop in Python).  Each has the device to itself and the largest
batch that fits, halved from --batch on.  Then sampling, images per second by heun and euler-maruyama, against a bare loop of as
many network calls.  A short table comes last, on stderr.

--tiny does all of it with a small network on whatever there is, so that a CPU shows that it runs.  Whatever fails is written down
and the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from sampling import compared
from torch import Tensor, nn
from train import CLASSES, SHAPE, baseline, latents, network_of, ours, timed

import sitkit
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.sources import assemble, read_assignments, read_config
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.tensors import load_tensors
from sitkit.training.parallel import tf32
from sitkit.training.throughput import PASSES, peak_flops
from sitkit.training.train import run_training

# Wanted of sit-xl/2 on one H100 or H200.
WANTED = {"mfu": 0.55, "over_baseline": 3.0}


def inputs(batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, y for a network."""
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, *SHAPE, generator=g), torch.rand(batch, generator=g)
    return x.to(device), t.to(device), torch.randint(0, CLASSES, (batch,), generator=g).to(device)


def error(ours: Tensor, truth: Tensor) -> float:
    """The root mean square of the difference over that of the truth."""
    return float((ours.double() - truth.double()).square().mean().sqrt() / truth.double().square().mean().sqrt())


def network_right(size: str, device: torch.device, compiled: bool) -> dict[str, Any]:
    """The network's prediction in each way of computing it, against float32 eager without TF32."""
    network, given = network_of(size, device).eval(), inputs(8, device)
    bounds = {"tf32": 5e-3, "bf16": 3e-2, "compiled": 1e-4}
    with torch.no_grad(), tf32(False):
        truth = network(*given)
        found: dict[str, float] = {}
        with tf32(True):
            found["tf32"] = error(network(*given), truth)
        with torch.autocast(device.type, torch.bfloat16):
            found["bf16"] = error(network(*given), truth)
        if compiled:
            found["compiled"] = error(torch.compile(network)(*given), truth)
    return {name: {"error": off, "bound": bounds[name], "right": off <= bounds[name]} for name, off in found.items()}


def samples_right(size: str, device: torch.device) -> dict[str, Any]:
    """Sample i is sample i in batches of 8 and of 3: equal up to rounding of products of another shape."""
    field = field_of(network_of(size, device).eval().requires_grad_(False))
    keys = torch.arange(8, device=device)
    x, _, y = inputs(8, device)
    found = {}
    for name in ("heun", "euler-maruyama"):
        sampler = sitkit.samplers.create(name, steps=8)
        with tf32(False):
            whole = sampler.sample(field, x, y, seeds=keys).x
            parts = [sampler.sample(field, x[rows], y[rows], seeds=keys[rows]).x for rows in torch.arange(8).split(3)]
        off = error(torch.cat(parts), whole)
        finite = bool(whole.isfinite().all())
        found[name] = {"error": off, "bound": 1e-3, "right": finite and off <= 1e-3}
    return found


def resume_right(device: torch.device) -> dict[str, Any]:
    """Compare the weights after 20 steps with those after 10 steps and 10 more from the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        settings = read_assignments(
            [
                "train.steps=20", "train.batch=16", "run.checkpoint_every=10", "run.sample_every=0", "run.track=false",
                "run.compile=false", f"run.device={device}", f"run.folder={folder}/whole",
                "backbone={name: sit, patch_size: 4, hidden_size: 32, depth: 1, num_heads: 2}",
            ]
        )  # fmt: skip
        whole = run_training(assemble([read_config("digits"), settings]))
        half, last = checkpoints(RunFolder(whole).checkpoints)
        elsewhere = read_assignments([f"run.folder={folder}/continued"])
        begun = RunFolder(whole.parent.with_name("continued") / whole.name).checkpoints
        begun.mkdir(parents=True)
        shutil.copy(half, begun)
        run_training(assemble([read_config("digits"), settings, elsewhere]))
        ran, continued = (load_tensors(path)[1] for path in (last, begun / last.name))
    off = max(error(continued[name], ran[name]) for name in ran if name.startswith("model.") and ran[name].any())
    return {"continued": {"error": off, "bound": 1e-6, "right": off <= 1e-6}}


def field_of(network: nn.Module, halved: bool = False) -> sitkit.Field:
    """The network as a linear / velocity field, in bfloat16 where asked."""

    def halves(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return network(x, t, y)

    path, target = sitkit.interpolants.create("linear"), sitkit.targets.create("velocity")
    return sitkit.Field(halves if halved else network, path, target, CLASSES)


def training(size: str, batch: int, device: torch.device, rounds: int, compiled: bool) -> dict[str, Any]:
    """Images per second of the baseline's step and of sitkit's, each alone on the device, with the batch that fits."""
    halved = "bf16" if device.type == "cuda" else "fp32"
    ways: dict[str, tuple[bool, str] | None] = {"baseline": None, "eager": (False, halved)}
    ways |= {"compiled": (True, halved)} if compiled else {}
    found: dict[str, dict[str, Any]] = {}
    for name, how in ways.items():
        found[name] = fitting(size, batch, device, rounds, how)
        free()
    rate = peak_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    flops = PASSES * (sitkit.backbones.create(size).flops(SHAPE) or 0)
    for row in found.values():
        row["mfu"] = flops * row["images_per_second"] / rate
        row["over_baseline"] = row["images_per_second"] / found["baseline"]["images_per_second"]
    return found


def fitting(size: str, batch: int, device: torch.device, rounds: int, how: tuple[bool, str] | None) -> dict[str, Any]:
    """One way to train, alone, with the batch halved until it fits: its median step."""
    try:
        network, data = network_of(size, device), latents(max(64, batch))
        step = baseline(network, data, batch, device) if how is None else ours(network, data, batch, device, *how)
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
    # Outside the handler, whose traceback would keep the tensors.
    network = step = None
    free()
    return fitting(size, batch // 2, device, rounds, how)


def free() -> None:
    """Give the device's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sampling(size: str, batch: int, steps: int, pairs: int, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Images per second by sampler, against a bare loop with as many calls of the same network."""
    cuda = device.type == "cuda"
    network = network_of(size, device).eval().requires_grad_(False)
    if compiled:
        network.compile(dynamic=False)
    field = field_of(network, halved=cuda)
    x, t, y = inputs(batch, device)
    found: dict[str, Any] = {}
    for name in ("heun", "euler-maruyama"):
        sampler = sitkit.samplers.create(name, steps=steps)
        nfe = sampler.sample(field, x, y, seeds=range(batch)).nfe

        def bare(calls: int = nfe) -> None:
            with torch.no_grad():
                for _ in range(calls):
                    field.network(x, t, y)

        def ours(sampler: Any = sampler) -> None:
            sampler.sample(field, x, y, seeds=range(batch))

        bare(2)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(pairs):
            for work, kept in zip((ours, bare), seconds, strict=True):
                kept.append(timed(work, device, 1))
        row = compared("clock", *seconds)["clock"]
        found[name] = {"steps": steps, "nfe": nfe, "batch": batch, "images_per_second": batch / row["seconds"], **row}
    return found


def tried(report: dict[str, Any], name: str, work: Callable[[], Any]) -> None:
    """A part's findings and seconds, or what went wrong in it."""
    began = time.perf_counter()
    try:
        report[name] = work()
    except Exception as problem:
        traceback.print_exc(file=sys.stderr)
        report[name] = {"failed": str(problem).splitlines()[0] if str(problem) else type(problem).__name__}
    report["seconds"][name] = time.perf_counter() - began
    free()


def table(report: dict[str, Any], size: str) -> list[str]:
    """The findings, a line each."""
    lines = [f"device            {report['machine']['device']}"]
    for part in ("network", "samples", "resume"):
        for name, row in report["correctness"].get(part, {}).items():
            off = f"{row['error']:.2g} of {row['bound']:.2g}" if isinstance(row, dict) else str(row)
            right = isinstance(row, dict) and row["right"]
            lines.append(f"{'right' if right else 'WRONG':<18}{part} {name}: {off}")
    for name, row in report["training"].items():
        if isinstance(row, dict):
            lines.append(
                f"train             {size} {name}, batch {row['batch']}: {row['images_per_second']:.4g} images/s, "
                f"MFU {row['mfu']:.1%}, {row['over_baseline']:.2f} times the baseline"
            )
    lines.append(
        f"wanted            MFU {WANTED['mfu']:.0%} of the {report['machine']['matmul_tflops']:.3g} TFLOP/s that products "
        f"reach, {WANTED['over_baseline']:.0f} times the baseline"
    )
    for name, row in report["sampling"].items():
        if isinstance(row, dict):
            lines.append(
                f"sample            {name}, {row['steps']} steps, batch {row['batch']}: {row['images_per_second']:.4g} "
                f"images/s, {row['ratio']:.3f} times the network's calls alone"
            )
    failed = [name for name in ("correctness", "training", "sampling") if "failed" in report[name]]
    lines += [f"FAILED            {name}: {report[name]['failed']}" for name in failed]
    lines.append(f"seconds           {sum(report['seconds'].values()):.0f}")
    return lines


def main() -> None:
    """Run everything, print JSON, and a table on stderr."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a small network, for a smoke test on a CPU")
    parser.add_argument("--batch", type=int, default=256, help="of the training step; halved until it fits")
    asked = parser.parse_args()
    if not cuda and not asked.tiny:
        raise SystemExit("there is no GPU here: --tiny shows on a CPU that it runs.")
    device = torch.device("cuda" if cuda else "cpu")
    size, batch, rounds, steps = "sit-xl/2", asked.batch, 15, 50
    if asked.tiny:
        size, batch, rounds, steps = "sit-xs/4", 4, 2, 3
    report: dict[str, Any] = {
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "torch": torch.__version__,
            "matmul_tflops": peak_flops(device, torch.bfloat16 if cuda else torch.float32) / 1e12,
        },
        "wanted": WANTED,
        "seconds": {},
        "correctness": {},
    }

    def right() -> dict[str, Any]:
        parts = {
            "network": lambda: network_right(size, device, cuda),
            "samples": lambda: samples_right("sit-xs/4" if asked.tiny else "sit-s/2", device),
            "resume": lambda: resume_right(device),
        }
        return {part: check() for part, check in parts.items()}

    tried(report, "correctness", right)
    with tf32(True):
        tried(report, "training", lambda: training(size, batch, device, rounds, cuda))
        tried(report, "sampling", lambda: sampling(size, min(batch, 64), steps, 2, device, cuda))
    print(json.dumps(report, indent=2))
    lines = table(report, size)
    print("\n".join(lines), file=sys.stderr)
    if any(line.startswith(("WRONG", "FAILED")) for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
