"""Points in the plane whose law a person sees at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from sitkit.data.dataset import Dataset, in_memory
from sitkit.registry import datasets

if TYPE_CHECKING:
    import numpy as np

    from sitkit.data.dataset import Examples


@final
@datasets.register("points")
@dataclass(frozen=True)
class Points(Dataset):
    """Points in the plane, on the scale of [-1, 1]^2, labelled by their part: a square, a moon, a Gaussian, a spiral.

    noise is the standard deviation, in each coordinate, of the Gaussian that is added; None is the law's own:
    checkerboard 0, moons 0.03, eight-gaussians 0.1, two-spirals 0.02.
    """

    law: Literal["checkerboard", "moons", "eight-gaussians", "two-spirals"] = "checkerboard"
    size: int = 20000
    seed: int = 0
    noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"size must be at least 1; got {self.size}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}.")
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be at least 0 and finite; got {self.noise}.")

    def load(self) -> Examples:
        import numpy as np

        draw, part, parts, own_noise = {
            "checkerboard": (_checkerboard, "square", 8, 0.0),
            "moons": (_moons, "moon", 2, 0.03),
            "eight-gaussians": (_eight_gaussians, "gaussian", 8, 0.1),
            "two-spirals": (_two_spirals, "spiral", 2, 0.02),
        }[self.law]
        rng = np.random.default_rng(self.seed)
        labels = rng.integers(parts, size=self.size)
        centres = np.stack(draw(rng.random((2, self.size)), labels), axis=1)
        noise = own_noise if self.noise is None else self.noise
        values = (centres + noise * rng.standard_normal(centres.shape)).astype(np.float32)
        return in_memory(values, labels, tuple(f"{part} {k}" for k in range(parts)), holdout=self.holdout)


# Each law: (u, label) -> (x, y), with u (2, n) uniform on [0, 1) and label (n,).
def _checkerboard(u: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    row, pair = label // 2, label % 2
    return (2 * pair + row % 2 + u[0]) / 2 - 1, (row + u[1]) / 2 - 1


def _moons(u: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    angle, side = math.pi * u[0], 1 - 2 * label
    return (2 * side * np.cos(angle) - side) / 3, (2 * side * np.sin(angle) - side / 2) / 3


def _eight_gaussians(u: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    angle = math.pi / 4 * label
    return np.cos(angle), np.sin(angle)


def _two_spirals(u: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    # The radius grows with the angle, and the square root spreads the points evenly along the arm.
    radius = np.sqrt(u[0])
    angle = 3 * math.pi * radius + math.pi * label
    return radius * np.cos(angle), radius * np.sin(angle)
