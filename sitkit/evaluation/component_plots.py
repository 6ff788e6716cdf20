"""Plots of components."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sitkit.evaluation import plots
from sitkit.evaluation.plots import Curve
from sitkit.models.exact import Exact
from sitkit.registry import Component, diffusions, interpolants
from sitkit.registry.measures import UNTRAINED
from sitkit.runtime.rng import INITIAL, normal, sample_keys
from sitkit.solvers.sampler import Sampler
from sitkit.transport.closed_form import sample_law, three_gaussians
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.field import Field
from sitkit.transport.interpolant import Interpolant
from sitkit.transport.target import Velocity
from sitkit.transport.timestep import Timestep

# The view ends at this multiple of the 90% quantile of w, because w may diverge at an end.
REACH = 2.0
PLOTTED = ("constant", "sigma", "decreasing", "increasing-decreasing", "kl")


def draw_component(component: Component, path: Path, interps: Sequence[str] = ()) -> bool:
    """Plot an interpolant, a diffusion, a grid, or a sampler's paths to closed-form samples; False for other kinds.

    interps: the interpolants with which a diffusion is shown; by default all.
    """
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    if isinstance(component, Diffusion | Timestep) and component.bind(UNTRAINED) is not component:
        return False
    if isinstance(component, Interpolant):
        c = component.coefficients(t)
        forms = [Curve(name, t, diffusions.create(name).w(t, c)) for name in PLOTTED]
        plots.interpolant(component, path, forms)
    elif isinstance(component, Diffusion):
        curves = [
            Curve(name, t, component.w(t, interpolants.create(name).coefficients(t)))
            for name in interps or interpolants.names()
        ]
        title, ylabel = f"w(t) of {component.name}", "w (variance per unit time)"
        plots.curves(curves, path, title=title, xlabel="t (0 noise, 1 data)", ylabel=ylabel, reach=REACH)
    elif isinstance(component, Timestep):
        curves = [Curve("t(u)", t, component.map(t)), Curve("uniform", t, t)]
        plots.curves(curves, path, title=f"grid {component.name}", xlabel="u = i / steps", ylabel="t (0 noise, 1 data)")
    elif isinstance(component, Sampler):
        law, path_of = three_gaussians(), interpolants.create("linear")
        ideal = Field(Exact(law, path_of, Velocity()), path_of, Velocity())
        keys = sample_keys(0, torch.arange(400))
        start = normal(keys, (2,), INITIAL)
        sample = component.sample(ideal, start, seeds=keys, trajectory=True)
        title = f"{component.name} on three Gaussians, linear, {sample.nfe} evaluations"
        plots.scatter(sample.x, sample_law(law, 1000, 1)[0], path, sample.trajectory, title)
    else:
        return False
    return True
