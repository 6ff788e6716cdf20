"""The base classes of metrics: from samples and a reference to a number with its standard error and caveats."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from sitkit.evaluation.extractors.extractor import Extractor, Pixels
from sitkit.registry import Component
from sitkit.runtime.errors import UserError, WorkFailed, require_within

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sitkit.evaluation.extractors.extractor import Extraction


class Measurement(NamedTuple):
    """The result of a metric.

    Attributes:
        value: the metric, in the metric's unit.
        stderr: its standard error over the samples; None if it is not estimated.
        notes: caveats for the reader, one sentence each.
    """

    value: float
    stderr: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric(Component):
    """Base class: a number that says how good a set of samples is.

    Attributes:
        lower_is_better: False for a metric to be maximised.
        unit: unit of the value, for tables and plots.
    """

    lower_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""

    @property
    def measures_real_data(self) -> bool:
        """Whether the metric can be computed of real examples in place of samples."""
        return True

    @property
    def reads_data(self) -> bool:
        """Whether the value needs the data set; False if it uses the samples alone, or a file of statistics."""
        return True

    @abstractmethod
    def measure(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        """Compare samples with a reference set.

        Equal arguments give equal results, and the global random state does not change.

        Args:
            samples: (n, *shape); images are NCHW in [-1, 1].
            reference: (m, *shape), of the same shape.
            seed: seed of the resamples and subsets of a metric that needs them.

        Returns:
            The value, its standard error and caveats.

        Raises:
            UserError: the two sets cannot be compared.
            WorkFailed: a sample is not finite.
        """

    def real(self, reference: Tensor, n: int, *, seed: int = 0) -> float:
        """Return the metric of n random points of the reference against the others: the value of real data at n samples.

        Metrics of finite sets are biased, so a perfect model does not reach the ideal value; compare with this value.

        Args:
            reference: (m, *shape), with m above n.
            n: the number of points that take the place of the samples.
            seed: the seed of the choice, and of the metric.

        Returns:
            The value.

        Raises:
            UserError: the sets are too small for the metric.
        """
        return self.measure(*divided(reference, n, seed), seed=seed).value


@dataclass(frozen=True)
class FeatureMetric(Metric):
    """Base class: a metric of the features of the two sets.

    Attributes:
        reads: which output of the extractor the metric uses: "features", "spatial" or "logits".
        features: the extractor.
    """

    reads: ClassVar[str] = "features"
    features: Extractor = field(default_factory=Pixels)

    def measure(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        """Compare the features of samples with the features of a reference set.

        Args:
            samples, reference, seed: as in `Metric.measure`.

        Returns:
            The value, its standard error and caveats.
        """
        return self.compare(*self._extracted(samples, reference), seed=seed)

    def real(self, reference: Tensor, n: int, *, seed: int = 0) -> float:
        """Return the metric of n random points of the reference against the others.

        Args:
            reference, n, seed: as in `Metric.real`.

        Returns:
            The value.
        """
        return self.value(*self._extracted(*divided(reference, n, seed)), seed=seed)

    def _extracted(self, samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        require_comparable(samples, reference)
        extraction = self.features.build(None, torch.device("cpu"), None)
        self.require(extraction)
        return extraction(samples)[self.reads].double(), extraction(reference)[self.reads].double()

    def require(self, extraction: Extraction) -> None:
        """Raise UserError for an extractor without the output that the metric reads."""
        if self.reads not in extraction.outputs:
            gives = ", ".join(extraction.outputs)
            raise UserError(f"{self.name} reads {self.reads}; features {self.features.name!r} give {gives}.")

    @abstractmethod
    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        """Compare features.

        Args:
            samples: features of the samples, (n, d), float64 on the CPU.
            reference: features of the reference, (m, d), float64 on the CPU.
            seed: as in `measure`.

        Returns:
            The value, its standard error and caveats.
        """

    def value(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
        """Return the value of `compare` without its standard error, equal up to rounding.

        Args:
            samples, reference, seed: as in `compare`.

        Returns:
            The value.
        """
        return self.compare(samples, reference, seed=seed).value


def generator(seed: int) -> Generator:
    """Return a new random generator on the CPU.

    Args:
        seed: the seed.

    Returns:
        The generator.
    """
    import torch

    return torch.Generator().manual_seed(seed)


def divided(reference: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return n random rows, and the other rows in random order."""
    import torch

    order = torch.randperm(len(reference), generator=generator(seed)).to(reference.device)
    return reference[order[:n]], reference[order[n:]]


def bootstrap_error(statistic: Callable[[Tensor], float], samples: Tensor, resamples: int, seed: int) -> float:
    """Return the standard deviation of `statistic` over resamples of the rows with replacement."""
    import torch

    rng = generator(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=rng) for _ in range(resamples))
    return float(torch.tensor([statistic(samples[rows]) for rows in draws], dtype=torch.float64).std())


def require_resamples(bootstrap: int) -> None:
    """Raise ValueError unless `bootstrap` is 0 (no standard error) or 2 to 1,000,000."""
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap must be 0 (off) or at least 2 resamples; got {bootstrap}.")
    require_within(0, 10**6, bootstrap=bootstrap)


def require_comparable(samples: Tensor, reference: Tensor) -> None:
    """Raise an error for sets of different shapes, sets of fewer than 2 points, and values that are not finite."""
    if samples.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"The samples are of shape {tuple(samples.shape[1:])} and the reference of {tuple(reference.shape[1:])}. "
            "Measure against the data set that the model was trained on, at its size."
        )
    for what, x in (("samples", samples), ("reference points", reference)):
        if len(x) < 2:
            raise UserError(f"A metric needs at least 2 {what}; got {len(x)}. Ask for more.")
        bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten()
        if len(bad):
            raise WorkFailed(f"{len(bad)} of {len(x)} {what} hold NaN or Inf, the first at index {int(bad[0])}.")
