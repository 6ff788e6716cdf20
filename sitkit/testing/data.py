"""The laws of data sets, metrics and extractors."""

from __future__ import annotations

import torch
from torch import Tensor

from sitkit.data.dataset import Dataset
from sitkit.evaluation.extractors.extractor import Extraction, Extractor
from sitkit.evaluation.metrics.metric import Measurement, Metric
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.testing.law import NotShown, close, law, lawful, not_shown_if_refused


@lawful(Dataset)
def examples(dataset: Dataset) -> None:
    """Finite float32 examples of one shape, images within [-1, 1], with labels that have names."""
    import numpy as np

    data, who = dataset.load(), dataset.name
    law(len(data) > 0, f"{who}: there are examples")
    index = np.arange(min(8, len(data)))
    x = data.read(index)
    law(x.shape == (len(index), *data.shape), f"{who}: examples have the declared shape {data.shape}")
    law(x.dtype == torch.float32, f"{who}: examples are float32; they are {x.dtype}")
    law(x.isfinite(), f"{who}: examples are finite")
    law(not data.is_image or bool((x.abs() <= 1).all()), f"{who}: images lie within [-1, 1]")
    labels = torch.as_tensor(data.labels)
    law(labels.shape == (len(data),) and labels.dtype == torch.int64, f"{who}: labels are (n,) int64")
    law((labels >= 0) & (labels < max(1, data.num_classes)), f"{who}: each label has a name")


@lawful(Dataset)
def split(dataset: Dataset) -> None:
    """Each example is either trained on or held out."""
    data = dataset.load()
    both = torch.cat([torch.as_tensor(data.train), torch.as_tensor(data.heldout)])
    law(len(data.train) > 0, f"{dataset.name}: there are examples to train on")
    complete = torch.equal(both.sort().values, torch.arange(len(data)))
    law(complete, f"{dataset.name}: each example is either trained on or held out")


@lawful(Dataset)
def rereadable(dataset: Dataset) -> None:
    """A second load gives the same data; for equal keys an example is the same alone and in any batch."""
    import numpy as np

    data, again = dataset.load(), dataset.load()
    who, index = dataset.name, np.arange(min(6, len(data)))
    law(data.fingerprint == again.fingerprint, f"{who}: a second load has the same fingerprint")
    random_keys = np.arange(len(index), dtype=np.int64) * 7919 + 3
    for keys in (None, random_keys):
        batch = data.read(index, keys)
        law(batch == again.read(index, keys), f"{who}: an example is the same for the same key")
        alone = data.read(index[2:3], None if keys is None else keys[2:3])
        law(batch[2:3] == alone, f"{who}: an example is the same alone and in a batch")


def _sets(rows: int = 240) -> tuple[Tensor, Tensor, Tensor]:
    """Return two sets of small images with one distribution, and a set with another."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(3 * rows, 1, 8, 8, generator=generator) / 4).clamp(-1, 1).split(rows)
    return first, second, (third + 0.5).clamp(-1, 1)


def _measure(metric: Metric, samples: Tensor, reference: Tensor) -> Measurement:
    with not_shown_if_refused():
        return metric.measure(samples, reference)


@lawful(Metric)
def measures(metric: Metric) -> None:
    """Samples with the reference's distribution score better than others, and the score is finite."""
    reference, equal, other = _sets()
    good, bad = _measure(metric, equal, reference), _measure(metric, other, reference)
    who = metric.name
    for value in (good.value, bad.value):
        law(abs(value) < float("inf"), f"{who}: finite; it is {value}")
    law(good.stderr is None or good.stderr >= 0, f"{who}: a standard error is not negative; it is {good.stderr}")
    better = good.value < bad.value if metric.lower_is_better else good.value > bad.value
    law(better, f"{who}: the right distribution scores {good.value:.4g}, another {bad.value:.4g}")


@lawful(Metric)
def repeatable(metric: Metric) -> None:
    """Equal sets give equal scores, and torch's own generator is not used."""
    reference, samples, _ = _sets()
    first = _measure(metric, samples, reference)
    torch.rand(3)
    state = torch.random.get_rng_state()
    law(_measure(metric, samples, reference) == first, f"{metric.name}: equal sets, equal scores")
    law(torch.equal(state, torch.random.get_rng_state()), f"{metric.name}: torch's generator is not used")


@lawful(Metric)
def refused_sets(metric: Metric) -> None:
    """Sets of different shapes raise UserError, samples that are not finite raise WorkFailed."""
    reference, samples, _ = _sets(40)
    _measure(metric, samples, reference)
    damaged = samples.clone()
    damaged[3] = float("nan")
    for wrong, error, message in (
        (samples[..., :4], UserError, "samples of another shape than the reference raise UserError"),
        (damaged, WorkFailed, "samples that are not finite raise WorkFailed"),
    ):
        try:
            metric.measure(wrong, reference)
        except error:
            continue
        raise AssertionError(f"{metric.name}: {message}")


def _extraction(extractor: Extractor) -> tuple[Extraction, Tensor]:
    digits = datasets.create("digits").load()
    with not_shown_if_refused():
        return extractor.build(digits, torch.device("cpu"), None), digits.read(digits.heldout[:6])


@lawful(Extractor)
def vectors(extractor: Extractor) -> None:
    """Each output is a finite vector for each example; it depends on that example alone and is not random."""
    ready, x = _extraction(extractor)
    who, whole = extractor.name, ready(x)
    law(bool(ready.fingerprint), f"{who}: it has a fingerprint")
    for name in ready.outputs:
        law(name in whole, f"{who}: gives {name}, as it declares")
        rows = whole[name]
        law(rows.ndim == 2 and len(rows) == len(x), f"{who}: {name} is (n, d); it is {tuple(rows.shape)}")
        law(rows.isfinite(), f"{who}: {name} is finite")
        law((rows[0] != rows[1]).any(), f"{who}: {name} differs between two images")
        close(ready(x[2:3])[name], rows[2:3], 1e-4, f"{who}: {name} of an image alone")
        law(ready(x)[name] == rows, f"{who}: {name} is the same each time")


@lawful(Extractor)
def fingerprinted(extractor: Extractor) -> None:
    """A second build has the same fingerprint and gives the same values."""
    if extractor.learnt:
        raise NotShown(f"{extractor.name} would have to be trained twice")
    (first, x), (again, _) = _extraction(extractor), _extraction(extractor)
    law(first.fingerprint == again.fingerprint, f"{extractor.name}: a second build has the same fingerprint")
    values, others = first(x), again(x)
    law(all(torch.equal(values[name], others[name]) for name in values), f"{extractor.name}: and the same values")
