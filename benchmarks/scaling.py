"""The cost of dividing a training step: two processes under DDP and FSDP2 against one, with the same global batch.

    python benchmarks/scaling.py [--tiny] [--backbone sit-s/2] [--batch 8] [--steps 4] [--ranks 2] > scaling.json

Each case is its own torchrun with one thread per process (gloo on a CPU, nccl between GPUs); all cases run in turn, in
several rounds.  The lower bound for two processes is the case `apart`: two independent processes, each with half of the
batch, limited only by the cores and the memory of the machine.  The speed-up is relative to one process; the efficiency is
the speed-up divided by the number of processes.
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
from _shared import parser

from sitkit.runtime.distributed import ProcessGroup


def work(case: str, backbone: str, batch: int, steps: int) -> None:
    """Train in one process; the lead process prints the seconds of each step."""
    from train import latents, network_of

    import sitkit
    from sitkit.data.stream import batch as read
    from sitkit.models.autoencoder import Prepared
    from sitkit.runtime.distributed import joined
    from sitkit.training.ema import EMA
    from sitkit.training.objective import TrainingInputs, objective_of
    from sitkit.training.optimizer import Optimization
    from sitkit.training.parallel import Parallelized

    with joined() as group:
        shared = case in ("ddp", "fsdp")
        own_group = group if shared else ProcessGroup(0, 1, group.device)
        size = batch if shared or group.size == 1 else batch // group.size
        data, network = latents(max(64, batch)), network_of(backbone, group.device)
        parallel = "fsdp" if case == "fsdp" else "ddp"
        config = sitkit.Config.model_validate({"train": {"batch": size}, "run": {"parallel": parallel}})
        objective = objective_of(config, network, Prepared(data, data.shape, data.num_classes)).to(group.device)
        parallelized = Parallelized(objective, own_group, config.run.parallel, False)
        averages, optimization = EMA(network, (0.9999,)), Optimization(objective.parameters(), config.train)
        inputs_of = TrainingInputs(config, network, data, group.device, own_group.rank, own_group.size)
        seconds: list[float] = []
        for step in range(steps + 2):
            group.barrier()
            start_time = time.perf_counter()
            parallelized(*inputs_of(*read(data, 0, step, size, inputs_of.part)))[0].backward()
            optimization.step()
            averages.update(step + 1)
            if group.device.type == "cuda":
                torch.cuda.synchronize()
            group.barrier()
            seconds.append(time.perf_counter() - start_time)
        if group.lead:
            print(json.dumps(seconds[2:]))


def launch(case: str, ranks: int, backbone: str, batch: int, steps: int) -> list[float]:
    """Return the seconds of each step of one torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    words = ["--work", case, "--backbone", backbone, "--batch", str(batch), "--steps", str(steps)]
    process = subprocess.run(
        [*command, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if process.returncode:
        raise SystemExit(process.stderr)
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    """Run everything and print JSON."""
    benchmark = parser(__doc__, tiny="a small network and few steps, for a smoke test")
    benchmark.add_argument("--backbone", default="sit-s/2")
    benchmark.add_argument("--batch", type=int, default=8, help="of all processes together")
    benchmark.add_argument("--steps", type=int, default=4)
    benchmark.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()))
    benchmark.add_argument("--rounds", type=int, default=3)
    benchmark.add_argument("--work", help=argparse.SUPPRESS)
    options = benchmark.parse_args()
    if options.work:
        work(options.work, options.backbone, options.batch, options.steps)
        return
    backbone, batch, steps, rounds = options.backbone, options.batch, options.steps, options.rounds
    if options.tiny:
        backbone, batch, steps, rounds = "sit-xs/4", 4, 2, 1
    cases = {"one": 1, "apart": options.ranks, "ddp": options.ranks, "fsdp": options.ranks}
    seconds: dict[str, list[list[float]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, ranks in cases.items():
            seconds[case].append(launch(case, ranks, backbone, batch, steps))
    medians = {
        case: statistics.median(s for steps_of_round in rounds for s in steps_of_round)
        for case, rounds in seconds.items()
    }
    rows: dict[str, Any] = {
        case: {
            "processes": cases[case],
            "seconds": median,
            "images_per_second": batch / median,
            "speedup": medians["one"] / median,
            "efficiency": medians["one"] / median / cases[case],
            "over_floor": median / (medians["one"] if cases[case] == 1 else medians["apart"]),
        }
        for case, median in medians.items()
    }
    machine = {"platform": platform.platform(), "torch": torch.__version__, "cores": os.cpu_count()}
    report = {"machine": machine, "backbone": backbone, "global_batch": batch, "ways": rows, "seconds": seconds}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
