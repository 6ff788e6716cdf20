"""What components need of a trained run: how much its paths bend, for the grid `adapted`, and its loss, for kl-eta."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from sitkit.registry import Component
from sitkit.runs import checkpoint
from sitkit.runs.diagnostics import velocity_losses
from sitkit.runs.run import Run
from sitkit.runtime import rng
from sitkit.solvers.sampler import Heun, Sampler
from sitkit.transport import interval
from sitkit.transport.diffusion import KLEta
from sitkit.transport.field import Field
from sitkit.transport.timestep import Adapted

INTERVALS, PATHS, SEED = 64, 64, 0

C = TypeVar("C", bound=Component)


def fitted(component: C, run: Run) -> C:
    """A component with what it needs of the run, measured once: the grid adapted's curvature, kl-eta's velocity loss."""
    lacking: dict[str, Any] = {}
    if isinstance(component, KLEta) and not component.losses:
        lacking = {"losses": velocity_losses(run)}
    elif isinstance(component, Adapted) and not component.curvature:
        lacking = {"curvature": curvatures(run)}
    elif isinstance(component, Sampler) and isinstance(grid := getattr(component, "grid", None), Adapted):
        lacking = {"grid": fitted(grid, run)}
    return dataclasses.replace(component, **lacking)


def curvatures(run: Run) -> tuple[tuple[float, float], ...]:
    """(t, |x''|) of a run along 64 paths of its unguided flow, classes in turn, stored beside the checkpoint it belongs to."""
    path = run.folder / f"curvature-{run.average}-{run.step:08d}.json"
    if not path.is_file():
        device = next(iter(run.network.parameters()), torch.empty(0)).device
        index = torch.arange(PATHS)
        x = rng.normal(rng.sample_keys(SEED, index).to(device), run.shape, rng.INITIAL)
        y = index % run.field.null_class if run.field.null_class else None
        times, values = zip(*measure(run.field, x, y), strict=True)
        checkpoint.write_json(path, {"times": times, "curvature": values})
    stored = checkpoint.read_json(path)
    return tuple(zip(stored["times"], stored["curvature"], strict=True))


def measure(field: Field, x: Tensor, y: Tensor | None = None) -> tuple[tuple[float, float], ...]:
    """(t, |x''(t)|) at the 63 times between 64 even intervals of the flow from noise x (b, ...), labels y (b,) or None.

    x'' is the second difference of the states of a solve by heun over h^2, so that nothing is asked of the network beyond
    the solve; |x''| its root mean square over the batch and the dimensions.
    """
    ends = interval.derive(field.interpolant, field.target, None, steps=1)
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
