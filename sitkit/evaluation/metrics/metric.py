"""What a metric is: samples and a reference in, a number with its standard error and its caveats out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from sitkit.evaluation.extractors.extractor import Extractor, Pixels
from sitkit.registry import Component
from sitkit.runtime.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from sitkit.evaluation.extractors.extractor import Extraction


class Measurement(NamedTuple):
    """A value, its standard error over the samples (None: not estimated), and what a reader must know of it."""

    value: float
    stderr: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric(Component):
    """A number that says how good a set of samples is."""

    lower_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = ""

    @property
    def has_halves(self) -> bool:
        """Whether the metric between two halves of the reference can be had."""
        return True

    @property
    def reads_data(self) -> bool:
        """Whether the data are read for the value: not for one of the samples alone, or against a file."""
        return True

    @abstractmethod
    def measure(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        """samples (n, *shape) against reference (m, *shape); images in [-1, 1], NCHW.

        Equal arguments give equal results, and the global random state is left alone.
        Raises UserError for sets that cannot be compared, WorkFailed for samples that are not finite.
        """

    def halves(self, reference: Tensor, *, seed: int = 0) -> Measurement:
        """The metric between two random halves of the reference: what real data score at m / 2 samples.

        Metrics of finite sets are biased, so even a perfect model misses the ideal value; this is the yardstick.
        Each half has m / 2 points, so it lies above the floor of m samples against all m.
        """
        first, second = random_halves(reference, seed)
        return self.measure(first, second, seed=seed)


@dataclass(frozen=True)
class FeatureMetric(Metric):
    """A metric that sees the two sets only through one kind of an extractor's outputs, named in `reads`."""

    reads: ClassVar[str] = "features"
    features: Extractor = field(default_factory=Pixels)

    def measure(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        return self.compare(*self._extracted(samples, reference), seed=seed)

    def halves(self, reference: Tensor, *, seed: int = 0) -> Measurement:
        return Measurement(self.value(*self._extracted(*random_halves(reference, seed)), seed=seed))

    def _extracted(self, samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        require_comparable(samples, reference)
        extraction = self.features.build(None, torch.device("cpu"), None)
        self.require(extraction)
        return extraction(samples)[self.reads].double(), extraction(reference)[self.reads].double()

    def require(self, extraction: Extraction) -> None:
        """Refuse an extractor that does not give what the metric reads."""
        if self.reads not in extraction.outputs:
            gives = ", ".join(extraction.outputs)
            raise UserError(f"{self.name} reads {self.reads}; features {self.features.name!r} give {gives}.")

    @abstractmethod
    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        """The metric from features: samples (n, d) and reference (m, d), float64 on the CPU."""

    def value(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> float:
        """The value of `compare` alone, equal to rounding: all that `halves` needs."""
        return self.compare(samples, reference, seed=seed).value


def generator(seed: int) -> Generator:
    """A CPU generator of its own."""
    import torch

    return torch.Generator().manual_seed(seed)


def random_halves(reference: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint random sets of m // 2 rows each."""
    import torch

    half = len(reference) // 2
    order = torch.randperm(len(reference), generator=generator(seed)).to(reference.device)
    return reference[order[:half]], reference[order[half : 2 * half]]


def bootstrap_error(statistic: Callable[[Tensor], float], samples: Tensor, resamples: int, seed: int) -> float | None:
    """Standard deviation of `statistic` over resamples of the rows with replacement; None where resamples is 0."""
    import torch

    if resamples == 0:
        return None
    rng = generator(seed)
    draws = (torch.randint(len(samples), (len(samples),), generator=rng) for _ in range(resamples))
    return float(torch.tensor([statistic(samples[rows]) for rows in draws], dtype=torch.float64).std())


def require_resamples(bootstrap: int) -> None:
    """0 means no standard error; a single resample has none to give."""
    if bootstrap < 0 or bootstrap == 1:
        raise ValueError(f"bootstrap must be 0 (off) or at least 2 resamples; got {bootstrap}.")


def require_comparable(samples: Tensor, reference: Tensor) -> None:
    """Refuse sets of different shapes, sets too small to have a spread, and values that are not finite."""
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
