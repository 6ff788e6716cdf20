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
    """alpha = 1 - (1 - t)^power, sigma = 1 - t^power: `linear` at power 1, and noise that stays longer above it.

    The simpler pair alpha = t^power, sigma = (1 - t)^power would not do: its d_alpha sigma - alpha d_sigma vanishes at
    both ends for power > 1, and no velocity could be read there.  Here it is `power` at both ends and positive between.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1; got {self.power}.")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Exactly (0, 1) at t = 0 and (1, 0) at t = 1; expm1 keeps the digits that 1 - t^power loses near them."""
        p, s = self.power, 1 - t
        alpha, sigma = -(p * (-t).log1p()).expm1(), -(p * t.log()).expm1()
        return Coefficients(alpha, sigma, p * s ** (p - 1), -p * t ** (p - 1))
