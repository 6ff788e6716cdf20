"""Measurements on a trained run that components need: velocity loss (`kl-eta`) and path curvature (grid `adapted`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import Examples
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.solvers.ode import Heun
from sitkit.transport import interval
from sitkit.transport.field import Field
from sitkit.transport.target import Velocity
from sitkit.transport.weighting import VelocitySpace

if TYPE_CHECKING:
    from sitkit.runs.run import Run

TIMES, DRAWS, MAX_LOSS_EXAMPLES, LOSS_BATCH = 33, 4, 1000, 500


def velocity_losses(run: Run) -> tuple[tuple[float, float], ...]:
    """(t, L_t) of a run, L_t = E |v_theta(x_t, t, y) - d_alpha data - d_sigma noise|^2 summed over dimensions.

    Measured on at most 1,000 held-out examples with 4 noises each at 33 times within the span where the velocity can be
    read, smoothed, and stored with the run beside the checkpoint it belongs to.  Score and noise predictions are
    converted first, as in SiT section 2.5.
    """
    path = run.folder / f"velocity-loss-{run.weights_name}-{run.step:08d}.json"
    if not path.is_file():
        data = run.examples
        index = data.heldout[:MAX_LOSS_EXAMPLES]
        if not len(index):
            raise UserError(
                "the velocity loss is measured on held-out data, and the run held none out: set data.holdout above 0."
            )
        measured = loss_curve(run.field, data, index)
        write_json(path, {"times": measured[0], "raw": measured[1], "smoothed": smooth(measured[1])})
    stored = read_json(path)
    return tuple(zip(stored["times"], stored["smoothed"], strict=True))


def loss_curve(field: Field, data: Examples, index: np.ndarray) -> tuple[list[float], list[float]]:
    """Times and the velocity loss at each, summed over dimensions; equal for equal weights (noise has its own seed)."""
    ends = interval.derive_interval(field.interpolant, field.target, None, steps=1)
    low, high = interval.trainable_interval(field.interpolant, Velocity(), VelocitySpace())
    times = torch.linspace(max(ends.t0, low), min(ends.t1, high), TIMES, dtype=torch.float64)
    keys = rng.sample_keys(0, torch.arange(len(index) * DRAWS))
    x = data.read(index).repeat(DRAWS, *[1] * len(data.shape))
    y = torch.from_numpy(data.labels[index]).repeat(DRAWS)
    losses = []
    for t in times:
        total = 0.0
        for first in range(0, len(x), LOSS_BATCH):
            part = slice(first, first + LOSS_BATCH)
            total += float(
                _squared_errors(
                    field, x[part].to(field.device), y[part].to(field.device), keys[part].to(field.device), t
                ).sum()
            )
        losses.append(total / len(x))
    return times.tolist(), losses


@torch.no_grad()
def _squared_errors(field: Field, x: Tensor, y: Tensor, keys: Tensor, t: Tensor) -> Tensor:
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


INTERVALS, CURVATURE_PATHS, PATH_SEED = 64, 64, 0


def curvatures(run: Run) -> tuple[tuple[float, float], ...]:
    """(t, |x''|) of a run along 64 paths of its unguided flow, classes in turn, stored beside the checkpoint it belongs to."""
    path = run.folder / f"curvature-{run.weights_name}-{run.step:08d}.json"
    if not path.is_file():
        index = torch.arange(CURVATURE_PATHS)
        x = rng.normal(rng.sample_keys(PATH_SEED, index).to(run.device), run.shape, rng.INITIAL)
        y = index % run.field.null_class if run.field.null_class else None
        times, values = zip(*path_curvature(run.field, x, y), strict=True)
        write_json(path, {"times": times, "curvature": values})
    stored = read_json(path)
    return tuple(zip(stored["times"], stored["curvature"], strict=True))


def path_curvature(field: Field, x: Tensor, y: Tensor | None = None) -> tuple[tuple[float, float], ...]:
    """(t, |x''(t)|) at the 63 times between 64 even intervals of the flow from noise x (b, ...), labels y (b,) or None.

    x'' is the second difference of the states of a solve by heun over h^2, so that nothing is asked of the network beyond
    the solve; |x''| its root mean square over the batch and the dimensions.
    """
    ends = interval.derive_interval(field.interpolant, field.target, None, steps=1)
    solver = Heun(steps=INTERVALS, t0=ends.t0, t1=ends.t1)
    drawn = solver.sample(field, x, y, trajectory=True)
    assert drawn.trajectory is not None
    h = (ends.t1 - ends.t0) / INTERVALS
    found = []
    for t, (before, here, after) in zip(drawn.times[1:-1].tolist(), _triples(drawn.trajectory), strict=True):
        bend = (before.double() - 2 * here.double() + after.double()) / h**2
        found.append((t, float(bend.square().mean().sqrt())))
    return tuple(found)


def _triples(states: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(states[:-2], states[1:-1], states[2:], strict=True)
