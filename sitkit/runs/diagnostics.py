"""Measurements on a trained run that components need: velocity loss (`kl-eta`) and path curvature (grid `adapted`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from sitkit.data.dataset import SPLIT_SEED, Examples
from sitkit.models.autoencoder import Autoencoder, Identity, modelled
from sitkit.registry.measures import Pairs
from sitkit.runs.config.records import MeasuredPairs
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, read_record, write_json
from sitkit.solvers.ode import Heun
from sitkit.transport import interval
from sitkit.transport.field import Field
from sitkit.transport.target import Velocity
from sitkit.transport.weighting import VelocitySpace

if TYPE_CHECKING:
    from sitkit.runs.run import Run

TIMES, DRAWS, MAX_LOSS_EXAMPLES, LOSS_BATCH = 33, 4, 1000, 500
INTERVALS, CURVATURE_PATHS, PATH_SEED = 64, 64, 0


def _stored(run: Run, name: str, key: str, measure: Callable[[], dict[str, Sequence[float]]]) -> Pairs:
    """Return (t, value) pairs from the file of a measurement beside the run's checkpoint, measured if there is none."""
    path = run.folder / f"{name}-{run.weights_name}-{run.step:08d}.json"
    if not exists(path):
        write_json(path, measure())
    return read_pairs(path, key)


def read_pairs(path: Path, key: str) -> Pairs:
    """Return (t, value) pairs of the measurement in a file.  Raises UserError for a damaged file, with the remedy."""
    remedy = "Remove it, and it is measured again."
    record = read_record(path, MeasuredPairs, "the record of a measurement", remedy)
    values = record.get(key)
    numbers = [value for value in values if type(value) in (int, float)] if isinstance(values, list) else []
    if numbers != values or len(numbers) != len(record["times"]):
        raise UserError(f"{path} has no number {key!r} for each of its times. {remedy}")
    return tuple(zip(record["times"], numbers, strict=True))


def heldout_examples(run: Run, quantity: str, most: int) -> tuple[Examples, np.ndarray]:
    """Return a run's data set and the indices of its held-out examples, of more than `most` a fixed random subset.

    The subset is random over all classes; a smaller one is a part of a larger one.  Raises UserError if none is held out.
    """
    data = run.examples
    if not len(data.heldout):
        raise UserError(
            f"the {quantity} is measured on held-out data, and the run held none out: set data.holdout above 0."
        )
    if len(data.heldout) <= most:
        return data, data.heldout
    return data, np.random.default_rng(SPLIT_SEED).permutation(data.heldout)[:most]


def velocity_losses(run: Run) -> Pairs:
    """Return (t, L_t) of a run, L_t = E |v_theta(x_t, t, y) - d_alpha data - d_sigma noise|^2 summed over dimensions.

    Measured on at most 1,000 held-out examples with 4 noises each at 33 times within the interval where the velocity can
    be read, smoothed, and stored with the run.  Score and noise predictions are converted first, as in SiT section 2.5.
    """

    def measure() -> dict[str, Sequence[float]]:
        examples = heldout_examples(run, "velocity loss", MAX_LOSS_EXAMPLES)
        times, losses = loss_curve(run.field, *examples, run.config.autoencoder)
        return {"times": times, "raw": losses, "smoothed": smooth(losses)}

    return _stored(run, "velocity-loss", "smoothed", measure)


def loss_curve(
    field: Field, data: Examples, index: np.ndarray, autoencoder: Autoencoder = Identity()
) -> tuple[list[float], list[float]]:
    """Return times and the velocity loss at each, summed over dimensions; equal for equal weights (fixed noise seed).

    autoencoder: encodes the examples, unless they are latents already.
    """
    ends = interval.derive_interval(field.interpolant, field.target, None, steps=1)
    low, high = interval.trainable_interval(field.interpolant, Velocity(), VelocitySpace())
    times = torch.linspace(max(ends.t0, low), min(ends.t1, high), TIMES, dtype=torch.float64)
    keys = rng.sample_keys(0, torch.arange(len(index) * DRAWS))
    parts = [
        data.read(index[first : first + LOSS_BATCH]).to(field.device) for first in range(0, len(index), LOSS_BATCH)
    ]
    x = torch.cat([modelled(autoencoder, data, part).cpu() for part in parts])
    x = x.repeat(DRAWS, *[1] * (x.ndim - 1))
    y = torch.from_numpy(data.labels[index]).repeat(DRAWS)
    losses = []
    for t in times:
        total = 0.0
        for first in range(0, len(x), LOSS_BATCH):
            part = slice(first, first + LOSS_BATCH)
            total += float(_squared_errors(field, x[part], y[part], keys[part], t).sum())
        losses.append(total / len(x))
    return times.tolist(), losses


@torch.no_grad()
def _squared_errors(field: Field, x: Tensor, y: Tensor, keys: Tensor, t: Tensor) -> Tensor:
    x, y, keys = (value.to(field.device) for value in (x, y, keys))
    noise = rng.normal(keys, tuple(x.shape[1:]), rng.TRAINING)
    c = field.interpolant.at(t, x)
    c = type(c)(*(value.to(x) for value in c))
    reading = field.read(c.alpha * x + c.sigma * noise, t.to(x), y)
    error = reading.velocity - (c.d_alpha * x + c.d_sigma * noise)
    return error.double().square().flatten(1).sum(1)


def smooth(losses: list[float]) -> list[float]:
    """Return the geometric mean with weights 1, 2, 1 over neighbours, so that one noisy time does not dent w."""
    logs = np.log(np.maximum(losses, np.finfo(float).tiny))
    padded = np.concatenate((logs[:1], logs, logs[-1:]))
    return np.exp((padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4).tolist()


def curvatures(run: Run) -> Pairs:
    """Return (t, |x''|) along 64 paths of a run's unguided flow, with the classes in turn, stored with the run."""

    def measure() -> dict[str, Sequence[float]]:
        index = torch.arange(CURVATURE_PATHS)
        x = rng.normal(rng.sample_keys(PATH_SEED, index).to(run.device), run.shape, rng.INITIAL)
        classes = run.labelled.present_classes
        y = torch.tensor(classes)[index % len(classes)] if classes else None
        times, values = zip(*path_curvature(run.field, x, y), strict=True)
        return {"times": times, "curvature": values}

    return _stored(run, "curvature", "curvature", measure)


def path_curvature(field: Field, x: Tensor, y: Tensor | None = None) -> Pairs:
    """Return (t, |x''(t)|) at the 63 times between 64 even intervals of the flow from noise x (b, *shape), labels y (b,).

    x'' is the second difference of the states of a solve by heun over h^2, so that the network is evaluated in the solve
    alone; |x''| is its root mean square over the batch and the dimensions.
    """
    ends = interval.derive_interval(field.interpolant, field.target, None, steps=1)
    solution = Heun(steps=INTERVALS, t0=ends.t0, t1=ends.t1).sample(field, x, y, trajectory=True)
    states = solution.trajectory
    assert states is not None
    h = (ends.t1 - ends.t0) / INTERVALS
    curve = []
    for i, t in enumerate(solution.times[1:-1].tolist()):
        bend = (states[i].double() - 2 * states[i + 1].double() + states[i + 2].double()) / h**2
        curve.append((t, float(bend.square().mean().sqrt())))
    return tuple(curve)
