"""Points drawn from laws that are known: a Gaussian mixture, and four shapes in the plane."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from sitkit.data.dataset import MOST_POINTS, Dataset, Examples, in_memory
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, require_within

if TYPE_CHECKING:
    import numpy as np

    from sitkit.transport.closed_form import Mixture

# The number of points of each law by default.
TOY_SIZE = 20_000


@final
@datasets.register("gaussian-mixture")
@dataclass(frozen=True)
class GaussianMixture(Dataset):
    """Points of R^dim from sum_k weights_k N(means_k, covariances_k), whose velocity and score have a closed form.

    The seed draws the parameters that are not given: means from N(0, spread^2); covariances with random axes and standard
    deviations log-uniform from width / 2 to 2 width.  By default all components have the same weight.  groups: the label of
    each component, by default a label of its own.  `Examples.law` is the `sitkit.transport.closed_form.Mixture`.
    """

    dim: int = 2
    components: int = 4
    size: int = TOY_SIZE
    seed: int = 0
    spread: float = 1.0
    width: float = 0.2
    weights: tuple[float, ...] = ()
    means: tuple[tuple[float, ...], ...] = ()
    covariances: tuple[tuple[tuple[float, ...], ...], ...] = ()
    groups: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, 2**16, dim=self.dim, components=self.components)
        require_within(1, MOST_POINTS, size=self.size)
        require_within(0, 2**63 - 1, seed=self.seed)
        if not 0 <= self.spread < math.inf:
            raise ValueError(f"spread must be at least 0 and finite; got {self.spread}.")
        if not 0 < self.width < math.inf:
            raise ValueError(f"width must be positive and finite; got {self.width}.")
        for name in ("weights", "means", "covariances", "groups"):
            given = len(getattr(self, name))
            if given not in (0, self.components):
                raise ValueError(f"{name} has {given} entries, but components = {self.components}: make them equal.")
        rows = (*self.means, *(row for matrix in self.covariances for row in (matrix, *matrix)))
        if any(len(row) != self.dim for row in rows):
            raise ValueError(f"means must have dim = {self.dim} numbers each, and covariances dim rows of dim numbers.")

    def mixture(self) -> Mixture:
        """Return the law.  Raises UserError if the given numbers define none."""
        import numpy as np
        import torch

        from sitkit.transport.closed_form import Mixture

        k = self.components
        try:
            return Mixture(
                torch.tensor(self.weights or (1.0,) * k, dtype=torch.float64),
                torch.from_numpy(np.array(self.means, np.float64) if self.means else self._means()),
                torch.from_numpy(np.array(self.covariances, np.float64) if self.covariances else self._covariances()),
                torch.tensor(self.groups or tuple(range(k))),
            )
        except ValueError as error:
            raise UserError(f"dataset 'gaussian-mixture': {error}") from None

    def _means(self) -> np.ndarray:
        import numpy as np

        return self.spread * np.random.default_rng((self.seed, 0)).standard_normal((self.components, self.dim))

    def _covariances(self) -> np.ndarray:
        import numpy as np

        rng = np.random.default_rng((self.seed, 1))
        axes, _ = np.linalg.qr(rng.standard_normal((self.components, self.dim, self.dim)))
        deviations = self.width * 2 ** rng.uniform(-1, 1, (self.components, 1, self.dim))
        covariances = (axes * deviations**2) @ axes.swapaxes(1, 2)
        return (covariances + covariances.swapaxes(1, 2)) / 2

    def load(self) -> Examples:
        import numpy as np

        from sitkit.runtime.archives import require_memory
        from sitkit.transport.closed_form import sample_law

        # Of a matrix for each component, and of the points, some copies are in memory together.
        require_memory(24 * (self.components * self.dim**2 + self.size * self.dim), "dataset 'gaussian-mixture'")
        law = self.mixture()
        x, y = sample_law(law, self.size, self.seed)
        names = tuple(f"group {label}" for label in range(law.num_classes))
        return in_memory(x.numpy().astype(np.float32), y.numpy(), names, holdout=self.holdout, law=law)


@final
@datasets.register("points")
@dataclass(frozen=True)
class Points(Dataset):
    """Points in the plane, on the scale of [-1, 1]^2, labelled by their part: a square, a moon, a Gaussian, a spiral.

    noise: the standard deviation, in each coordinate, of the Gaussian noise that is added; by default checkerboard 0,
    moons 0.03, eight-gaussians 0.1, two-spirals 0.02.
    """

    law: Literal["checkerboard", "moons", "eight-gaussians", "two-spirals"] = "checkerboard"
    size: int = TOY_SIZE
    seed: int = 0
    noise: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(1, MOST_POINTS, size=self.size)
        require_within(0, 2**63 - 1, seed=self.seed)
        if self.noise is not None and not 0 <= self.noise < math.inf:
            raise ValueError(f"noise must be at least 0 and finite; got {self.noise}.")

    def load(self) -> Examples:
        import numpy as np

        from sitkit.runtime.archives import require_memory

        draw, part, parts, own_noise = {
            "checkerboard": (_checkerboard, "square", 8, 0.0),
            "moons": (_moons, "moon", 2, 0.03),
            "eight-gaussians": (_eight_gaussians, "gaussian", 8, 0.1),
            "two-spirals": (_two_spirals, "spiral", 2, 0.02),
        }[self.law]
        require_memory(100 * self.size, "dataset 'points'")
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
