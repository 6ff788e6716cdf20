"""The laws of what is learnt from and of what measures it: data sets, metrics and extractors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sitkit.data.dataset import Dataset
from sitkit.evaluation.extractors.extractor import Extraction, Extractor
from sitkit.evaluation.metrics.metric import Metric
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.testing.law import NotShown, close, law, lawful


@lawful(Dataset)
def examples(dataset: Dataset) -> None:
    """Finite float32 examples of one shape, images within [-1, 1], with labels that have names."""
    import numpy as np

    found, who = dataset.load(), dataset.name
    law(len(found) > 0, f"{who}: there are examples")
    index = np.arange(min(8, len(found)))
    x = found.read(index)
    law(x.shape == (len(index), *found.shape), f"{who}: examples are of the shape {found.shape} that is said")
    law(x.dtype == torch.float32, f"{who}: examples are float32; they are {x.dtype}")
    law(x.isfinite(), f"{who}: examples are finite")
    law(not found.is_image or bool((x.abs() <= 1).all()), f"{who}: images lie within [-1, 1]")
    labels = torch.as_tensor(found.labels)
    law(labels.shape == (len(found),) and labels.dtype == torch.int64, f"{who}: labels are (n,) int64")
    law((labels >= 0) & (labels < max(1, found.num_classes)), f"{who}: each label has a name")


@lawful(Dataset)
def split(dataset: Dataset) -> None:
    """What is held out is never trained on; together they are every example."""
    found = dataset.load()
    both = torch.cat([torch.as_tensor(found.train), torch.as_tensor(found.heldout)])
    law(len(found.train) > 0, f"{dataset.name}: there is something to train on")
    law(
        torch.equal(both.sort().values, torch.arange(len(found))),
        f"{dataset.name}: each example is either trained on or held out",
    )


@lawful(Dataset)
def rereadable(dataset: Dataset) -> None:
    """The same again when it is loaded again; an example is read alike alone and in any batch, for equal keys."""
    import numpy as np

    found, again = dataset.load(), dataset.load()
    who, index = dataset.name, np.arange(min(6, len(found)))
    law(found.fingerprint == again.fingerprint, f"{who}: loaded again it has the same fingerprint")
    keys = np.arange(len(index), dtype=np.int64) * 7919 + 3
    for drawn in (None, keys):
        whole = found.read(index, drawn)
        law(whole == again.read(index, drawn), f"{who}: read again, an example is the same for the same key")
        alone = found.read(index[2:3], None if drawn is None else drawn[2:3])
        law(whole[2:3] == alone, f"{who}: read alone, an example is the same as in a batch")


def _sets(rows: int = 240) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of one law of small images, and a sample of another law."""
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(3 * rows, 1, 8, 8, generator=generator) / 4).clamp(-1, 1)
    first, second, third = drawn.split(rows)
    return first, second, (third + 0.5).clamp(-1, 1)


def _measured(metric: Metric, samples: Tensor, reference: Tensor) -> Any:
    try:
        return metric.measure(samples, reference)
    except UserError as error:
        raise NotShown(str(error)) from None


@lawful(Metric)
def measures(metric: Metric) -> None:
    """A sample of the reference's own law scores better than one of another law, and the score is finite."""
    reference, alike, other = _sets()
    good, bad = _measured(metric, alike, reference), _measured(metric, other, reference)
    who = metric.name
    for value in (good.value, bad.value):
        law(abs(value) < float("inf"), f"{who}: finite; it is {value}")
    law(good.stderr is None or good.stderr >= 0, f"{who}: a standard error is not negative; it is {good.stderr}")
    better = good.value < bad.value if metric.lower_is_better else good.value > bad.value
    law(better, f"{who}: the right law scores {good.value:.4g}, another {bad.value:.4g}")


@lawful(Metric)
def repeatable(metric: Metric) -> None:
    """Equal sets give equal scores, and torch's own generator is left alone."""
    reference, alike, _ = _sets()
    first = _measured(metric, alike, reference)
    torch.rand(3)
    state = torch.random.get_rng_state()
    law(_measured(metric, alike, reference) == first, f"{metric.name}: equal sets, equal scores")
    law(torch.equal(state, torch.random.get_rng_state()), f"{metric.name}: torch's generator is left alone")


@lawful(Metric)
def refused_sets(metric: Metric) -> None:
    """Sets of different shapes are a UserError, samples that are not finite a WorkFailed."""
    reference, alike, _ = _sets(40)
    _measured(metric, alike, reference)
    try:
        metric.measure(alike[..., :4], reference)
    except UserError:
        pass
    else:
        raise AssertionError(f"{metric.name}: samples of another shape than the reference are refused")
    spoilt = alike.clone()
    spoilt[3] = float("nan")
    try:
        metric.measure(spoilt, reference)
    except WorkFailed:
        pass
    else:
        raise AssertionError(f"{metric.name}: samples that are not finite fail the work")


def _extraction(extractor: Extractor) -> tuple[Extraction, Tensor]:
    digits = datasets.create("digits").load()
    try:
        return extractor.build(digits, torch.device("cpu"), None), digits.read(digits.heldout[:6])
    except UserError as error:
        raise NotShown(str(error)) from None


@lawful(Extractor)
def vectors(extractor: Extractor) -> None:
    """Each output is a finite vector for each example, of that example alone, the same each time."""
    ready, x = _extraction(extractor)
    who, whole = extractor.name, ready(x)
    law(bool(ready.fingerprint), f"{who}: it has a fingerprint")
    for name in ready.outputs:
        law(name in whole, f"{who}: gives {name}, as it says")
        rows = whole[name]
        law(rows.ndim == 2 and len(rows) == len(x), f"{who}: {name} is (n, d); it is {tuple(rows.shape)}")
        law(rows.isfinite(), f"{who}: {name} is finite")
        law((rows[0] != rows[1]).any(), f"{who}: {name} tells two images apart")
        close(ready(x[2:3])[name], rows[2:3], 1e-4, f"{who}: {name} of an image alone")
        law(ready(x)[name] == rows, f"{who}: {name} is the same each time")


@lawful(Extractor)
def fingerprinted(extractor: Extractor) -> None:
    """Built again, it has the same fingerprint and gives the same values."""
    if extractor.learnt:
        raise NotShown(f"{extractor.name} would have to be learnt twice")
    (first, x), (again, _) = _extraction(extractor), _extraction(extractor)
    law(first.fingerprint == again.fingerprint, f"{extractor.name}: built again it has the same fingerprint")
    law(all(torch.equal(a, again(x)[name]) for name, a in first(x).items()), f"{extractor.name}: and the same values")
