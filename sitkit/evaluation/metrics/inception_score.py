"""The inception score: the certainty of a classifier for each sample, and the diversity of the classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, final

from sitkit.evaluation.extractors.extractor import Extractor
from sitkit.evaluation.extractors.pretrained import Inception
from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement
from sitkit.registry import metrics
from sitkit.runtime.errors import require_within

if TYPE_CHECKING:
    from torch import Tensor


@final
@metrics.register("inception-score")
@dataclass(frozen=True)
class InceptionScore(FeatureMetric):
    """exp E KL(p(class | x) || p(class)), from 1 to the number of classes; the reference is not used.

    The standard error comes from the delta method, within the parts. The bias is positive in small parts.

    Args:
        split: the number of samples of a part. The score is the mean over parts in order of the index, as in published
            scores; the last part may be smaller.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 4; parts of 5,000 as in ADM's evaluator.
    """

    lower_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = "classes"
    reads: ClassVar[str] = "logits"
    features: Extractor = field(default_factory=Inception)
    split: int = 5000

    def __post_init__(self) -> None:
        require_within(2, 10**9, split=self.split)

    @property
    def reads_data(self) -> bool:
        """Whether the data set is needed: the score depends on the samples only."""
        return False

    def compare(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        parts = [inception_score(part) for part in samples.split(self.split)]
        value = sum(score for score, _ in parts) / len(parts)
        return Measurement(value, math.sqrt(sum(error**2 for _, error in parts)) / len(parts))


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Return the score of logits (n, classes), and its standard error.

    The influence of a sample on the logarithm is KL(p(class | x) || p(class)) less its mean: the weight of the sample in
    p(class) adds nothing to first order.
    """
    import torch

    log_p = torch.log_softmax(logits.double(), 1)
    p = log_p.exp()
    divergence = (p * (log_p - p.mean(0).log())).sum(1)
    score = math.exp(float(divergence.mean()))
    spread = float(divergence.std()) if len(logits) > 1 else 0.0
    return score, score * spread / math.sqrt(len(logits))
