"""The laws: sitkit's own components obey them, and every law can be broken."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sitkit
from sitkit.data.dataset import Dataset, Examples, in_memory
from sitkit.evaluation.extractors.extractor import Extraction, Extractor
from sitkit.evaluation.metrics.metric import Measurement, Metric
from sitkit.models.backbone import Backbone
from sitkit.models.loss import Batch, Loss
from sitkit.registry import Component, Registry, registries
from sitkit.runtime.errors import UserError
from sitkit.solvers.ode import FixedStepODE, Tableau
from sitkit.solvers.sampler import Problem
from sitkit.testing import Law, NotShown, laws_of, obey, parametrize_with_laws
from sitkit.transport.coupling import Coupling
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.interpolant import Coefficients, Interpolant, Linear
from sitkit.transport.target import Target
from sitkit.transport.timestep import Timestep
from sitkit.transport.weighting import Weighting

# Components that need a connection, a minute, files of the user or a trained run.
LEFT_OUT = {"run-classifier", "inception", "dinov2", "sit", "sd-vae", "adapted"}
# Samplers that take long; test_sampler and test_multistep check them too.
SLOW = {"euler-maruyama", "stochastic-heun", "dpm++-2m-sde", "unipc"}


def ours() -> Iterator[Component]:
    """Yield a component for every name that needs no field, and a small SiT."""
    for registry in registries.values():
        for name in registry.names():
            if name in LEFT_OUT | SLOW or name in registry.presets() or registry.plugin(name) is not None:
                continue
            try:
                yield registry.create(name)
            except UserError:
                continue
    yield sitkit.backbones.create("sit-xs/2")
    yield sitkit.timesteps.create("adapted", curvature=((0.1, 1.0), (0.5, 4.0), (0.9, 0.25)))


@parametrize_with_laws(*ours())
def test_our_own_components_obey_the_laws(law: Law) -> None:
    law.check()


@pytest.mark.slow
@parametrize_with_laws(
    *(sitkit.samplers.create(name) for name in sorted(SLOW)), sitkit.extractors.create("run-classifier")
)
def test_slow_components_obey_the_laws(law: Law) -> None:
    law.check()


def test_every_kind_has_laws_of_its_own() -> None:
    common = {law.name for law in laws_of(sitkit.interpolants.create("linear"))} & {
        law.name for law in laws_of(sitkit.targets.create("velocity"))
    }
    assert common == {"registered", "explained", "frozen", "typed", "recorded"}
    for registry in registries.values():
        laws = laws_of(any_of(registry))
        assert {law.name for law in laws} - common, registry.plural
        assert all(law.meaning for law in laws)


def any_of(registry: Registry[Any]) -> Component:
    """Return a component of a kind: the first that needs no field, or texts alone."""
    for name in registry.names():
        needed = [
            f for f in dataclasses.fields(registry[name]) if f.default is f.default_factory is dataclasses.MISSING
        ]
        with contextlib.suppress(UserError):
            return registry.create(name, **{f.name: "x" for f in needed})
    raise AssertionError(registry.plural)


# Each of these breaks the laws that it is listed with in BREAKS, and no law of every component.


@dataclass(frozen=True)
class Slow(Interpolant):
    """A path whose rate is not the derivative."""

    def coefficients(self, t: Tensor) -> Coefficients:
        c = Linear().coefficients(t)
        return c._replace(d_alpha=1.01 * c.d_alpha)


@dataclass(frozen=True)
class Halfway(Interpolant):
    """A path that ends before the data."""

    def coefficients(self, t: Tensor) -> Coefficients:
        one = t.new_ones(t.shape)
        return Coefficients(0.5 * t, 1 - t, 0.5 * one, -one)


@dataclass(frozen=True)
class Untyped(Interpolant):
    """A field that takes anything."""

    power: Any = 1

    def coefficients(self, t: Tensor) -> Coefficients:
        return Linear().coefficients(t)


@dataclass(frozen=True)
class Singular(Target):
    """x itself, which does not determine data and noise."""

    def weights(self, c: Coefficients) -> tuple[Tensor, Tensor]:
        return c.alpha, c.sigma


@dataclass(frozen=True)
class Negative(Weighting):
    """A weight below zero."""

    def weight(self, c: Coefficients, target: Target) -> Tensor:
        return -torch.ones_like(c.alpha)


@dataclass(frozen=True)
class Backwards(Timestep):
    """A map that falls."""

    def map(self, u: Tensor) -> Tensor:
        return 1 - u


@dataclass(frozen=True)
class Doubling(Coupling):
    """The first noise for all rows."""

    def pair(self, data: Tensor, noise: Tensor, y: Tensor) -> Tensor:
        return noise[:1].expand_as(noise)


@dataclass(frozen=True)
class Doubled(Diffusion):
    """A form that norm does not multiply."""

    def w(self, t: Tensor, c: Coefficients) -> Tensor:
        return c.sigma


@dataclass(frozen=True)
class Liar(FixedStepODE):
    """Euler's method, which declares order 2."""

    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))


@dataclass(frozen=True)
class Cheap(FixedStepODE):
    """The midpoint method, whose plan has half of its evaluations."""

    order: ClassVar[int] = 2
    method: ClassVar[str] = "midpoint"
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))


@dataclass(frozen=True)
class Shifted(FixedStepODE):
    """Samples beside the data."""

    order: ClassVar[int] = 1
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))

    def integrate(self, problem: Problem) -> Tensor:
        states = super().integrate(problem)
        return torch.cat((states[:-1], states[-1:] + 0.1))


class Net(nn.Module):
    """A linear map with a fault."""

    def __init__(self, fault: str, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.class_dropout, self.fault = num_classes, 0.1, fault
        self.scale, self.unused = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(1))
        self.label = nn.Embedding(num_classes + 1, 1)
        self.seen = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        wide = (-1, *[1] * (x.ndim - 1))
        time = 0 if self.fault == "blind to t" else t.reshape(wide)
        out = self.scale * x + time + self.label(y).reshape(wide)
        if self.fault == "reads its batch":
            out = out + out.mean(0)
        if self.fault == "random":
            out = out + torch.randn(())
        if self.fault == "remembers":
            self.seen += 1
            out = out + self.seen
        return out if self.fault == "dead weight" else out + self.unused


@dataclass(frozen=True)
class Faulty(Backbone):
    """A backbone with a fault."""

    fault: str = ""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        if self.fault == "own seed":
            torch.manual_seed(0)
        return Net(self.fault, num_classes)


@dataclass(frozen=True)
class Averaged(Loss):
    """A loss that each example shares with its batch."""

    def per_example(self, batch: Batch) -> Tensor:
        square = (batch.network(batch.noise, batch.t, batch.y) - batch.data).square().flatten(1).mean(1)
        return square.mean().expand_as(square)


@dataclass(frozen=True)
class Detached(Loss):
    """A loss that teaches nothing."""

    def per_example(self, batch: Batch) -> Tensor:
        square = (batch.network(batch.noise, batch.t, batch.y).detach() - batch.data).square().flatten(1).mean(1)
        return square.requires_grad_()


@dataclass(frozen=True)
class Restless(Loss):
    """A loss that draws from torch's generator."""

    def per_example(self, batch: Batch) -> Tensor:
        x = torch.randn_like(batch.noise)
        return (batch.network(x, batch.t, batch.y) - batch.data).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Loud(Dataset):
    """Images beyond [-1, 1]."""

    def load(self) -> Examples:
        import numpy as np

        return in_memory(np.full((20, 1, 4, 4), 3, np.float32), None, (), holdout=self.holdout)


@dataclass(frozen=True)
class Changing(Dataset):
    """Other examples each time."""

    def load(self) -> Examples:
        values = torch.rand(20, 2).numpy()
        return in_memory(values, None, (), holdout=self.holdout)


@dataclass(frozen=True)
class Inverted(Metric):
    """A distance for which larger values are declared better."""

    lower_is_better: ClassVar[bool] = False

    def measure(self, samples: Tensor, reference: Tensor, *, seed: int = 0) -> Measurement:
        return Measurement(float((samples.mean() - reference.mean()).abs()))


@dataclass(frozen=True)
class Contrast(Extractor):
    """Features that depend on the other images."""

    def build(self, data: Examples | None, device: torch.device, cache: Any, progress: Any = None) -> Extraction:
        return Extraction("contrast", ("features",), lambda x: {"features": x.flatten(1) - x.flatten(1).mean(0)})


BREAKS: list[tuple[str, type[Component], dict[str, Any], set[str], str]] = [
    ("interpolants", Slow, {}, {"derivatives"}, "d_alpha is the derivative of alpha"),
    ("interpolants", Halfway, {}, {"ends"}, r"alpha\(1\) = 1"),
    ("interpolants", Untyped, {}, {"typed"}, "the field power takes anything"),
    ("targets", Singular, {}, {"invertible"}, "not 0 inside"),
    ("weightings", Negative, {}, {"positive"}, "positive and finite"),
    ("timesteps", Backwards, {}, {"increasing"}, r"t\(0\) = 0"),
    ("couplings", Doubling, {}, {"pairing"}, "a permutation of the noise"),
    ("diffusions", Doubled, {}, {"scaled"}, "norm multiplies the whole of w"),
    ("samplers", Liar, {}, {"order"}, r"declares order 2, shows 1\.0"),
    ("samplers", Cheap, {}, {"cost"}, "the plan foretells the NFE"),
    ("samplers", Shifted, {}, {"marginals", "order"}, "samples of N"),
    ("backbones", Faulty, {"fault": "reads its batch"}, {"each-row-alone"}, "alone"),
    ("backbones", Faulty, {"fault": "random"}, {"conditioned", "each-row-alone", "saved"}, "nothing inside is random"),
    ("backbones", Faulty, {"fault": "blind to t"}, {"conditioned"}, "depends on t"),
    ("backbones", Faulty, {"fault": "remembers"}, {"conditioned", "each-row-alone"}, "nothing inside is random"),
    ("backbones", Faulty, {"fault": "dead weight"}, {"trainable"}, "no gradient reaches unused"),
    ("backbones", Faulty, {"fault": "own seed"}, {"seeded"}, "other seeds, other weights"),
    ("losses", Averaged, {}, {"per-example"}, "does not depend on its batch"),
    ("losses", Detached, {}, {"teaches"}, "a gradient reaches the network"),
    ("losses", Restless, {}, {"per-example", "reproducible"}, "batch"),
    ("datasets", Loud, {}, {"examples"}, r"images lie within \[-1, 1\]"),
    ("datasets", Changing, {}, {"rereadable"}, "the same fingerprint"),
    ("metrics", Inverted, {}, {"measures", "refused-sets"}, "the right distribution scores"),
    ("extractors", Contrast, {}, {"vectors"}, "of an image alone"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plural", "cls", "fields", "broken", "said"),
    BREAKS,
    ids=[f"{cls.__name__}-{'-'.join(fields.values())}" for _, cls, fields, _, _ in BREAKS],
)
def test_each_law_can_be_broken_and_its_error_says_how(
    plural: str, cls: type[Component], fields: dict[str, Any], broken: set[str], said: str
) -> None:
    registry = registries[plural]
    registry.register("faulty")(cls)
    try:
        component = registry.create("faulty", **fields)
        failed: dict[str, str] = {}
        for law in laws_of(component):
            try:
                law.check()
            except NotShown:
                continue
            except AssertionError as error:
                failed[law.name] = str(error)
        assert broken <= set(failed), failed
        with pytest.raises(AssertionError, match=said):
            obey(component)
        assert not {"registered", "explained", "frozen", "recorded"} & set(failed), failed
    finally:
        del registry._claims["faulty"]
