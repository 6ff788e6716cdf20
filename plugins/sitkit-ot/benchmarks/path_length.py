"""Path lengths, and samples of few steps, of models trained with and without an optimal-transport coupling.

    python plugins/sitkit-ot/benchmarks/path_length.py [--steps 500] [--seeds 3] [--out FILE.json]

Trains the same perceptron on the checkerboard with each coupling, unlabelled (pairs across the whole batch) and labelled
(pairs within each label).  Prints two numbers, each as mean and standard error over the training seeds.  The path length
is the mean over 2,000 samples of the integral of |v(x_t, t)|^2 dt along the model's own ODE, solved by Heun's method in
50 steps.  The other number is the sliced Wasserstein distance between the data and 2,000 samples of 4 Euler steps.
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
from sitkit import Run, normal, sample_keys

N = 2000
# The purpose of a draw: 1 is the noise from which sitkit's own samples start.
INITIAL = 1
# For each kind of data: the settings of the run, and those of the coupling `pot`.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unlabelled": ({"backbone.class_dropout": 1.0, "sample.labels": "none"}, {"name": "pot", "by_class": False}),
    "labelled": ({"backbone.class_dropout": 0.1, "sample.labels": "balanced"}, {"name": "pot"}),
}


def start(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the noise (N, 2), the labels (N,) of the run's samples, and the samples' keys (N,)."""
    keys = sample_keys(1, torch.arange(N))
    classes = run.examples.num_classes
    y = torch.arange(N) % classes if run.config.sample.labels == "balanced" else torch.full((N,), classes)
    return normal(keys, (2,), INITIAL), y, keys


def path_length(run: Run) -> float:
    """Return the mean over samples of the integral of |v|^2 dt, by the rectangle rule on the 50 steps of the solve."""
    noise, y, keys = start(run)
    result = sitkit.samplers.create("heun", steps=50).sample(run.field, noise, y, seeds=keys, trajectory=True)
    assert result.trajectory is not None
    total = torch.zeros(N)
    with torch.no_grad():
        for x, t, h in zip(result.trajectory, result.times.tolist(), result.times.diff().tolist(), strict=False):
            total += h * run.field.read(x, t, y).velocity.square().sum(1)
    return float(total.mean())


def distance(run: Run) -> float:
    """Return the sliced Wasserstein distance between the data and samples of 4 Euler steps."""
    noise, y, keys = start(run)
    result = sitkit.samplers.create("euler", steps=4).sample(run.field, noise, y, seeds=keys)
    return sitkit.metrics.create("sliced-wasserstein").measure(result.x, run.examples.read(run.examples.train)).value


def summary(values: list[float]) -> dict[str, Any]:
    """Mean, standard error and the values themselves."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "stderr": error, "values": values}


def train(settings: dict[str, Any], coupling: dict[str, Any], steps: int, seed: int, folder: str) -> Run:
    """Train the perceptron of the preset `points` in a folder."""
    fixed = {
        "train.batch": 256, "train.ema": 0.99, "run.track": False, "run.sample_every": 0, "run.threads": 1,
        "run.folder": folder, "coupling": coupling,
    }  # fmt: skip
    return sitkit.train("points", steps=steps, seed=seed, settings={**settings, **fixed}, progress=sitkit.silent)


def main() -> None:
    """Train every case, and print a table and the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {"steps": options.steps, "seeds": options.seeds, "cases": {}}
    print("| data | coupling | path length | 4 Euler steps |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case, (settings, pot) in CASES.items():
            for coupling in ({"name": "independent"}, pot):
                runs = [train(settings, coupling, options.steps, seed, folder) for seed in range(options.seeds)]
                row = {
                    "path_length": summary([path_length(run) for run in runs]),
                    "four_euler_steps": summary([distance(run) for run in runs]),
                }
                record["cases"][f"{case}, {coupling['name']}"] = row
                cells = [f"{value['mean']:.4f} +- {value['stderr'] or float('nan'):.4f}" for value in row.values()]
                print(f"| {case} | {coupling['name']} | {' | '.join(cells)} |", flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
