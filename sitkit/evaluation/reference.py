"""The reference set of the metrics: features of a data set, computed once for all runs of a folder.

runs/references/<hash>.safetensors      features, for an extractor that is a network
runs/references/real-<hash>.json        a metric of real examples against the others

A hash covers the fingerprints of the data and the extractor and the numbers of examples, so a file is never out of date.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from sitkit.data.dataset import SPLIT_SEED, Examples
from sitkit.evaluation.extractors.extractor import Extraction
from sitkit.evaluation.metrics.metric import FeatureMetric, Metric, divided
from sitkit.registry import essence, spec
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.hashing import identity
from sitkit.runtime.locks import divide_work
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.tensors import load_tensors, save_tensors

# Maximum number of reference examples; larger data sets are subsampled with a fixed seed.
MAX_REFERENCE = 100_000
# Two sets of two examples each: a metric compares sets of at least two.
SMALLEST = 4
# Examples whose features are computed and stored together.
PART = 2048


@dataclass(frozen=True, eq=False)
class Reference:
    """The examples of a data set as a reference set. `folder` is the cache of its features."""

    data: Examples
    folder: Path

    @functools.cached_property
    def index(self) -> np.ndarray:
        """The indices of the reference examples: all, or MAX_REFERENCE at random."""
        n = len(self.data)
        if n <= MAX_REFERENCE:
            return np.arange(n)
        return np.sort(np.random.default_rng(SPLIT_SEED).permutation(n)[:MAX_REFERENCE])

    @property
    def n(self) -> int:
        """The number of reference examples."""
        return len(self.index)

    def x(self) -> Tensor:
        """Return the examples, (n, *shape) float32."""
        return self.data.read(self.index)

    def features(self, extraction: Extraction, learnt: bool, progress: Progress = silent) -> Mapping[str, Tensor]:
        """Return every output of an extractor for the reference; several processes share the work.

        learnt: whether a network computes the outputs, so that they are stored in a file.
        """
        return _features(self, extraction, progress) if learnt else extraction(self.x())

    def real_n(self, n: int) -> int:
        """Return how many examples take the place of n samples: n, or half of the reference if that is fewer."""
        return min(n, self.n // 2)

    def real(self, metric: Metric, extraction: Extraction | None, learnt: bool, n: int) -> float | None:
        """Return the metric of `real_n(n)` random examples against the others: the value of real data at n samples.

        None for a metric that does not measure real data, and if the reference is too small for the metric.
        """
        if not metric.measures_real_data or self.n < SMALLEST:
            return None
        n = self.real_n(n)
        features = extraction.fingerprint if extraction else ""
        path = self.folder / f"real-{identity(essence(metric), self.data.fingerprint, features, self.n, n)}.json"
        value = _stored(path)
        if value is None:
            try:
                if isinstance(metric, FeatureMetric) and extraction is not None:
                    parts = divided(self.features(extraction, learnt)[metric.reads], n, 0)
                    value = metric.value(*(part.double() for part in parts))
                else:
                    value = metric.real(self.x(), n)
            except UserError:
                # The metric itself was measured: only these sets are too small, as for k neighbours among k points.
                return None
            write_json(path, {"value": value, "metric": spec(metric), "data": self.data.fingerprint, "n": n})
        return value if math.isfinite(value) else None


def _stored(path: Path) -> float | None:
    """Return the number in a file; None for a file that is missing or damaged."""
    with contextlib.suppress(UserError, LookupError, TypeError, ValueError, OverflowError):
        return float(read_json(path)["value"])
    return None


def _features(reference: Reference, extraction: Extraction, progress: Progress) -> Mapping[str, Tensor]:
    data, index = reference.data, reference.index
    path = reference.folder / f"{identity(data.fingerprint, extraction.fingerprint, len(index))}.safetensors"
    parts = path.with_suffix("")
    count = -(-len(index) // PART)

    def part(i: int) -> Path:
        return parts / f"{i:05d}.safetensors"

    def make(i: int) -> None:
        save_tensors(part(i), extraction(data.read(index[i * PART : (i + 1) * PART])), {})
        progress(Event("reference", min((i + 1) * PART, len(index)), len(index)))

    if not path.is_file():
        divide_work(count, lambda i: path.is_file() or part(i).is_file(), make, parts)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                outputs = [load_tensors(part(i))[1] for i in range(count)]
                joined = {name: torch.cat([output[name] for output in outputs]) for name in extraction.outputs}
                record = {"data": data.fingerprint, "features": extraction.fingerprint, "n": len(index)}
                save_tensors(path, joined, record)
            shutil.rmtree(parts, ignore_errors=True)
    return load_tensors(path)[1]
