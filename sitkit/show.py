"""Pictures of components: what a formula looks like."""

from __future__ import annotations

from pathlib import Path

import torch

from sitkit import picture
from sitkit.diffusion import Diffusion, KLEta
from sitkit.interpolant import Interpolant
from sitkit.picture import Curve
from sitkit.registry import Component, diffusions, interpolants
from sitkit.timestep import Timestep

PLOTTED = ("constant", "sigma", "decreasing", "increasing-decreasing", "kl")


def draw(component: Component, path: Path) -> bool:
    """Plot an interpolant (alpha, sigma, their rates, w), a diffusion on every interpolant, or a grid; False for others."""
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    if isinstance(component, Interpolant):
        c = component.coefficients(t)
        forms = [Curve(name, t, diffusions.create(name).w(t, c)) for name in PLOTTED]
        picture.interpolant(component, path, forms)
    elif isinstance(component, Diffusion):
        if isinstance(component, KLEta) and not component.losses:
            return False
        curves = [
            Curve(name, t, component.w(t, interpolants.create(name).coefficients(t))) for name in interpolants.names()
        ]
        picture.curves(curves, path, title=f"w(t) of {component.name}", xlabel="t (0 noise, 1 data)", ylabel="w")
    elif isinstance(component, Timestep):
        curves = [Curve("t(u)", t, component.map(t)), Curve("uniform", t, t)]
        picture.curves(
            curves, path, title=f"grid {component.name}", xlabel="u = i / steps", ylabel="t (0 noise, 1 data)"
        )
    else:
        return False
    return True
