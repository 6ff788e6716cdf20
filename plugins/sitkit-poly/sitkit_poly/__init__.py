"""A polynomial path between noise and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from sitkit import Coefficients, Interpolant, interpolants

if TYPE_CHECKING:
    from torch import Tensor


@final
@interpolants.register("poly")
@dataclass(frozen=True)
class Poly(Interpolant):
    """alpha = 1 - (1 - t)^power, sigma = 1 - t^power.  Power 1 is `linear`; with a larger power the noise stays longer.

    The simpler pair alpha = t^power, sigma = (1 - t)^power does not work: for power > 1, its determinant
    d_alpha sigma - alpha d_sigma is zero at both ends, where the velocity is then undefined.  The determinant of this
    path is `power` at both ends and positive between them.

    Args:
        power: the exponent, at least 1.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1; got {self.power}.")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return exactly (0, 1) at t = 0 and (1, 0) at t = 1; near the ends, expm1 is more accurate than 1 - t^power."""
        p, s = self.power, 1 - t
        alpha, sigma = -(p * (-t).log1p()).expm1(), -(p * t.log()).expm1()
        return Coefficients(alpha, sigma, p * s ** (p - 1), -p * t ** (p - 1))
