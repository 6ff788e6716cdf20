"""Measurements on a trained run that a component may use, and a stand-in for plans before training."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Pairs = tuple[tuple[float, float], ...]


class Measures(Protocol):
    """A trained run as `Component.bind` sees it."""

    @property
    def field(self) -> Any:
        """The `Field` of the run's network."""

    def velocity_losses(self) -> Pairs:
        """Return (t, L_t) pairs: the velocity loss at time t, summed over dimensions."""
        ...

    def path_curvature(self) -> Pairs:
        """Return (t, |x''(t)|) pairs: the root mean square curvature of the paths of the unguided flow."""
        ...

    def data_std(self) -> float | None:
        """Return the median standard deviation of the pixels or latent channels of the data; None: not known."""
        ...

    def load_field(self, name: str, step: int, weights: Literal["ema", "raw"]) -> Any:
        """Return the `Field` of another run in the same folder.

        Args:
            name: the name of the run's folder.
            step: the step of the checkpoint.
            weights: an average ("ema") or the trained weights ("raw").
        """


class Untrained:
    """Finite positive values instead of measurements on a network, for plans but not for samples.

    Args:
        std: the median standard deviation of the data; None: not known.
    """

    field: Any = None
    std: float | None = None

    def __init__(self, std: float | None = None) -> None:
        self.std = std

    def velocity_losses(self) -> Pairs:
        """Return a loss of 1 at every time."""
        return ((0.0, 1.0), (1.0, 1.0))

    path_curvature = velocity_losses

    def data_std(self) -> float | None:
        """Return the given standard deviation of the data."""
        return self.std

    def load_field(self, name: str, step: int, weights: str) -> Any:
        """Return None: there is no network yet."""


UNTRAINED = Untrained()
