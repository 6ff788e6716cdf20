"""What sharing a training step costs: two processes under DDP and FSDP2 against one, the global batch the same.

    python benchmarks/scaling.py [--tiny] [--backbone sit-s/2] [--batch 8] [--steps 4] [--ranks 2] > scaling.json

Each way is a torchrun of its own with one thread a process (gloo on a CPU, nccl between GPUs), several rounds of all of them in
turn.  The floor of two processes is two that do half the batch each beside one another and share nothing: what the machine's
cores and memory allow.  Speed-ups are over one process; the efficiency is the speed-up over the number of processes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from sitkit.runtime.distributed import ProcessGroup


def work(how: str, backbone: str, batch: int, steps: int) -> None:
    """A process's part: prints the seconds of a step, by the lead."""
    from train import latents, network_of

    from sitkit.data.stream import batch as read
    from sitkit.models.autoencoder import Prepared
    from sitkit.runs.config.sources import Layer, assemble
    from sitkit.runtime.distributed import joined
    from sitkit.training.ema import EMA
    from sitkit.training.objective import TrainingInputs, objective_of
    from sitkit.training.optimizer import Optimization
    from sitkit.training.parallel import Parallelized

    with joined() as group:
        shared = how in ("ddp", "fsdp")
        lone = group if shared else ProcessGroup(0, 1, group.device)
        size = batch if shared or group.size == 1 else batch // group.size
        data, network = latents(max(64, batch)), network_of(backbone, group.device)
        config = assemble([Layer({"train": {"batch": size}, "run": {"parallel": "fsdp" if how == "fsdp" else "ddp"}})])
        objective = objective_of(config, network, Prepared(data, data.shape, data.num_classes)).to(group.device)
        parallelized = Parallelized(objective, lone, config.run.parallel, False)
        averages, optimization = EMA(network, (0.9999,)), Optimization(objective.parameters(), config.train)
        inputs_of = TrainingInputs(config, network, data, group.device, lone.rank, lone.size)
        seconds: list[float] = []
        for step in range(steps + 2):
            group.barrier()
            began = time.perf_counter()
            parallelized(*inputs_of(*read(data, 0, step, size, inputs_of.part)))[0].backward()
            optimization.step()
            averages.update(step + 1)
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            group.barrier()
            seconds.append(time.perf_counter() - began)
        if group.lead:
            print(json.dumps(seconds[2:]))


def launched(how: str, ranks: int, backbone: str, batch: int, steps: int) -> list[float]:
    """Seconds of each step of one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    words = ["--work", how, "--backbone", backbone, "--batch", str(batch), "--steps", str(steps)]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Run everything and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a small network and few steps, for a smoke test")
    parser.add_argument("--backbone", default="sit-s/2")
    parser.add_argument("--batch", type=int, default=8, help="of all processes together")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work, asked.backbone, asked.batch, asked.steps)
        return
    backbone, batch, steps, rounds = asked.backbone, asked.batch, asked.steps, asked.rounds
    if asked.tiny:
        backbone, batch, steps, rounds = "sit-xs/4", 4, 2, 1
    ways = {"one": 1, "apart": asked.ranks, "ddp": asked.ranks, "fsdp": asked.ranks}
    seconds: dict[str, list[list[float]]] = {how: [] for how in ways}
    for _ in range(rounds):
        for how, ranks in ways.items():
            seconds[how].append(launched(how, ranks, backbone, batch, steps))
    medians = {how: statistics.median(s for each in rounds for s in each) for how, rounds in seconds.items()}
    rows: dict[str, Any] = {
        how: {
            "processes": ways[how],
            "seconds": median,
            "images_per_second": batch / median,
            "speedup": medians["one"] / median,
            "efficiency": medians["one"] / median / ways[how],
            "over_floor": median / (medians["one"] if ways[how] == 1 else medians["apart"]),
        }
        for how, median in medians.items()
    }
    machine = {"platform": platform.platform(), "torch": torch.__version__, "cores": os.cpu_count()}
    report = {"machine": machine, "backbone": backbone, "global_batch": batch, "ways": rows, "seconds": seconds}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
