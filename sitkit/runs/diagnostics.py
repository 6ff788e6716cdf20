"""The loss of a trained run as a function of time: what kl-eta needs, and a diagnosis of the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import Examples
from sitkit.evaluation import plots
from sitkit.evaluation.plots import Curve
from sitkit.runs import checkpoint
from sitkit.runs.run import Run
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.transport import interval
from sitkit.transport.field import Field
from sitkit.transport.target import Velocity
from sitkit.transport.weighting import VelocitySpace

TIMES, DRAWS, MOST, BATCH = 33, 4, 1000, 500


def velocity_losses(run: Run) -> tuple[tuple[float, float], ...]:
    """(t, L_t) of a run, L_t = E |v_theta(x_t, t, y) - d_alpha data - d_sigma noise|^2 summed over dimensions.

    Measured on at most 1,000 held-out examples with 4 noises each at 33 times within the span where the velocity can be
    read, smoothed, and stored with the run beside the checkpoint it belongs to.  Score and noise predictions are
    converted first, as in SiT section 2.5.
    """
    path = run.folder / f"velocity-loss-{run.average}-{run.step:08d}.json"
    if not path.is_file():
        data = run.examples
        index = data.heldout[:MOST]
        if not len(index):
            raise UserError(
                "the velocity loss is measured on held-out data, and the run held none out: set data.holdout above 0."
            )
        measured = measure(run.field, data, index)
        checkpoint.write_json(path, {"times": measured[0], "raw": measured[1], "smoothed": smooth(measured[1])})
    stored = checkpoint.read_json(path)
    return tuple(zip(stored["times"], stored["smoothed"], strict=True))


def draw(runs: Sequence[Run], path: Path) -> list[Curve]:
    """The velocity losses of runs against time, one curve a run, in one picture: which target errs where.

    The curves are in the same units whatever is predicted, so runs on one interpolant may be compared at every t.
    """
    names = labels(runs)
    curves = [
        Curve(name, *(list(column) for column in zip(*velocity_losses(run), strict=True)))
        for name, run in zip(names, runs, strict=True)
    ]
    plots.curves(
        curves,
        path,
        title="velocity loss of held-out data",
        xlabel="t (0 noise, 1 data)",
        ylabel="L_t = E |v_theta - v|^2 (summed over dimensions)",
        logy=True,
    )
    return curves


def labels(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart: the target, interpolant and target, or the folder."""
    found: list[str] = []
    for name in (
        lambda run: run.config.target.name,
        lambda run: f"{run.config.interp.name} {run.config.target.name}",
        lambda run: run.folder.name,
    ):
        found = [name(run) for run in runs]
        if len(set(found)) == len(found):
            break
    return found


def measure(field: Field, data: Examples, index: np.ndarray) -> tuple[list[float], list[float]]:
    """Times and the velocity loss at each, summed over dimensions; equal for equal weights (noise has its own seed)."""
    device = next(iter(getattr(field.network, "parameters", list)()), torch.empty(0)).device
    ends = interval.derive(field.interpolant, field.target, None, steps=1)
    low, high = interval.trainable(field.interpolant, Velocity(), VelocitySpace())
    times = torch.linspace(max(ends.t0, low), min(ends.t1, high), TIMES, dtype=torch.float64)
    keys = rng.sample_keys(0, torch.arange(len(index) * DRAWS))
    x = data.read(index).repeat(DRAWS, *[1] * len(data.shape))
    y = torch.from_numpy(data.labels[index]).repeat(DRAWS)
    losses = []
    for t in times:
        total = 0.0
        for first in range(0, len(x), BATCH):
            part = slice(first, first + BATCH)
            total += float(_errors(field, x[part].to(device), y[part].to(device), keys[part].to(device), t).sum())
        losses.append(total / len(x))
    return times.tolist(), losses


@torch.no_grad()
def _errors(field: Field, x: Tensor, y: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    draws = rng.normal(keys, tuple(x.shape[1:]), rng.TRAINING)
    c = field.interpolant.at(t, x)
    c = type(c)(*(value.to(x) for value in c))
    reading = field.read(c.alpha * x + c.sigma * draws, t.to(x), y)
    error = reading.velocity - (c.d_alpha * x + c.d_sigma * draws)
    return error.double().square().flatten(1).sum(1)


def smooth(losses: list[float]) -> list[float]:
    """The geometric mean with weights 1, 2, 1 over neighbours, so that one noisy time does not dent w."""
    logs = np.log(np.maximum(losses, np.finfo(float).tiny))
    padded = np.concatenate((logs[:1], logs, logs[-1:]))
    return np.exp((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).tolist()
