"""How long the paths of a model are, and what it samples in few steps, with and without an optimal-transport coupling.

    python plugins/sitkit-ot/benchmarks/path_length.py [--steps 500] [--seeds 3] [--out FILE.json]

Trains the same perceptron on the checkerboard with each coupling, unlabelled (pairs across the whole batch) and labelled (pairs
within each label), and gives, as mean and standard error over the training seeds: the path length, the mean over 2,000 samples of
the integral of |v(x_t, t)|^2 dt along the model's own ODE, solved by Heun's method in 50 steps; and the sliced Wasserstein distance
to the data of 2,000 samples of 4 Euler steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import sitkit
from sitkit.runs.config.sources import assemble, read_assignments, read_config
from sitkit.runs.run import Run, load
from sitkit.runtime.rng import INITIAL, normal, sample_keys
from sitkit.training.train import run_training

N = 2000
CASES = {
    "unlabelled": ["backbone.class_dropout=1.0", "sample.labels=none"],
    "labelled": ["backbone.class_dropout=0.1", "sample.labels=balanced"],
}
COUPLINGS = {
    "independent": ["coupling=independent"],
    "pot": ["coupling=pot"],
}


def start(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise (N, 2), labels as the run's samples have them, and the samples' keys."""
    keys = sample_keys(1, torch.arange(N))
    classes = run.examples.num_classes
    y = torch.arange(N) % classes if run.config.sample.labels == "balanced" else torch.full((N,), classes)
    return normal(keys, (2,), INITIAL), y, keys


def path_length(run: Run) -> float:
    """The mean over samples of the integral of |v|^2 dt, by the rectangle rule on the solve's 50 steps."""
    noise, y, keys = start(run)
    drawn = sitkit.samplers.create("heun", steps=50).sample(run.field, noise, y, seeds=keys, trajectory=True)
    assert drawn.trajectory is not None
    total = torch.zeros(N)
    with torch.no_grad():
        for x, t, h in zip(drawn.trajectory, drawn.times.tolist(), drawn.times.diff().tolist(), strict=False):
            total += h * run.field.read(x, t, y).velocity.square().sum(1)
    return float(total.mean())


def distance(run: Run) -> float:
    """The sliced Wasserstein distance to the data of samples of 4 Euler steps."""
    noise, y, keys = start(run)
    drawn = sitkit.samplers.create("euler", steps=4).sample(run.field, noise, y, seeds=keys)
    return sitkit.metrics.create("sliced-wasserstein").measure(drawn.x, run.examples.read(run.examples.train)).value


def told(values: list[float]) -> dict[str, Any]:
    """Mean, standard error and the values themselves."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "values": values}


def main() -> None:
    """Train every case, and print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"steps": given.steps, "seeds": given.seeds, "cases": {}}
    print("| data | coupling | path length | 4 Euler steps |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case, settings in CASES.items():
            for name, coupling in COUPLINGS.items():
                lengths, distances = [], []
                for seed in range(given.seeds):
                    words = [
                        *settings, *coupling, *(["coupling.by_class=false"] if case == "unlabelled" and "pot" in name else []),
                        f"train.steps={given.steps}", "train.batch=256", "train.ema=0.99", f"train.seed={seed}", "run.track=false",
                        "run.sample_every=0", "run.threads=1", f"run.folder={folder}",
                    ]  # fmt: skip
                    run = load(run_training(assemble([read_config("points"), read_assignments(words)])))
                    lengths.append(path_length(run))
                    distances.append(distance(run))
                row = {"path_length": told(lengths), "four_euler_steps": told(distances)}
                record["cases"][f"{case}, {name}"] = row
                shown = [f"{told['mean']:.4f} +- {told['stderr'] or float('nan'):.4f}" for told in row.values()]
                print(f"| {case} | {name} | {' | '.join(shown)} |", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
