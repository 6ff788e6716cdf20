"""Rescaled cfg, cfg-zero and autoguidance: formulas by hand, identities, the same meaning for every target, counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from torch import Tensor

from sitkit.models.exact import Exact
from sitkit.registry import guidances, interpolants, samplers, targets
from sitkit.registry.measures import Untrained
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.identity import sampling_identity
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.run import load
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample import draw_samples
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierFreeZero,
    Guidance,
    Unguided,
    velocity_gains,
)
from sitkit.solvers.ode import AdaptiveODE
from sitkit.solvers.sampler import SolveSpec
from sitkit.testing import obey
from sitkit.training.train import run_training
from sitkit.transport import closed_form
from sitkit.transport.field import Counted, Field

PATHS, PREDICTIONS = interpolants.names(), targets.names()
# A pair of two-class laws in four dimensions: the second is what a weaker network would have learned.
MEANS = torch.tensor([[0.9, -0.4, 0.3, 0.1], [-0.7, 0.6, -0.2, 0.5]], dtype=torch.float64)
SPREADS = torch.tensor([0.05, 0.2, 0.1, 0.3], dtype=torch.float64)


def law(scale: float = 1.0) -> closed_form.Mixture:
    covariances = torch.diag(SPREADS * scale).expand(2, 4, 4)
    return closed_form.Mixture(torch.tensor([0.6, 0.4]), MEANS, covariances, torch.tensor([0, 1]))


def field(path: str = "linear", target: str = "velocity", scale: float = 1.0) -> Field:
    interpolant, predicted = interpolants.create(path), targets.create(target)
    network = Exact(law(scale), interpolant, predicted)
    network.class_dropout = 0.1
    return Field(network, interpolant, predicted, 2)


def points(n: int = 5) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.arange(n) % 2


on_every_path_and_target = pytest.mark.parametrize(("path", "target"), list(product(PATHS, PREDICTIONS)))


def velocities(guidance: Guidance, plain: Field, x: Tensor, t: float, y: Tensor) -> Tensor:
    """The guided velocity, as a sampler reads it."""
    gains = velocity_gains(plain.interpolant, plain.target)
    guided = guidance.guide(plain.network, plain.null_class, gains)
    return plain.through(guided).read(x, torch.tensor(t, dtype=torch.float64), y).velocity


def branches(plain: Field, x: Tensor, t: float, y: Tensor) -> tuple[Tensor, Tensor]:
    time = torch.tensor(t, dtype=torch.float64)
    return plain.read(x, time, y).velocity, plain.read(x, time).velocity


def at_three_times(path: str, target: str) -> Iterator[tuple[Callable[[Guidance], Tensor], Tensor, Tensor]]:
    """At each of three times: the guided velocity as a function of the guidance, the conditional and the null velocity."""
    plain, (x, y) = field(path, target), points()
    for t in (0.1, 0.5, 0.9):
        yield partial(velocities, plain=plain, x=x, t=t, y=y), *branches(plain, x, t, y)


class TwoRuns(Untrained):
    """A run of one field, with a second run of another field."""

    def __init__(self, field: Field, other: Field) -> None:
        self.field, self.other = field, other

    def load_field(self, name: str, step: int, weights: str) -> Field:
        return self.other


def bound(guidance: Autoguidance, strong: Field, weak: Field) -> Guidance:
    return guidance.bind(TwoRuns(strong, weak))


scales = st.floats(0, 10)
intervals = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair)))


@given(scales, intervals, st.none() | st.integers(1, 3), st.floats(0, 1))
def test_laws_of_cfg(scale: float, interval: tuple[float, float], channels: int | None, rescale: float) -> None:
    obey(ClassifierFree(scale, interval, channels, rescale), "branches")


@given(scales, intervals)
def test_laws_of_cfg_zero(scale: float, interval: tuple[float, float]) -> None:
    obey(ClassifierFreeZero(scale, interval), "branches")


@on_every_path_and_target
def test_gains_read_a_prediction_as_the_field_does(path: str, target: str) -> None:
    plain, (x, y) = field(path, target), points()
    for t in (0.05, 0.4, 0.99):
        time = torch.full((5,), t, dtype=torch.float64)
        p, q = velocity_gains(plain.interpolant, plain.target)(x, time)
        ours = p * plain.network(x, time, y) + q * x
        # Readings below 100 in float64, less the 1 / alpha = 400 digits of vp-sbdm at t = 0.05.
        torch.testing.assert_close(ours, plain.read(x, time, y).velocity, rtol=1e-10, atol=1e-10)


@on_every_path_and_target
def test_rescale_by_hand(path: str, target: str) -> None:
    """rescale sets the standard deviation of the guided velocity, for every target; the direction is that of cfg."""
    for guided, conditional, null in at_three_times(path, target):
        mixed = null + 3.0 * (conditional - null)
        ratio = conditional.std(1, correction=0) / mixed.std(1, correction=0)
        assert (ratio - 1).abs().max() > 0.1
        for rescale in (0.0, 0.3, 1.0):
            ours = guided(ClassifierFree(3.0, rescale=rescale))
            truth = mixed * (1 + rescale * (ratio - 1))[:, None]
            torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.std(1, correction=0), conditional.std(1, correction=0), rtol=1e-9, atol=0)


def test_rescale_zero_is_plain_cfg() -> None:
    plain, (x, y) = field(), points()
    t = torch.full((5,), 0.5, dtype=torch.float64)
    p = plain.network
    both = p(x, t, torch.full_like(y, 2)) + 2.5 * (p(x, t, y) - p(x, t, torch.full_like(y, 2)))
    # One batched call: another batch size may round in the last bit.
    torch.testing.assert_close(ClassifierFree(2.5).guide(p, 2)(x, t, y), both, rtol=0, atol=1e-14)


def test_rescale_without_contrast_does_nothing() -> None:
    """States of one number have standard deviation 0: nothing to restore, and no NaN."""

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x + y[:, None]

    x, t, y = torch.ones(2, 1), torch.full((2,), 0.5), torch.tensor([0, 1])
    ours = ClassifierFree(2.0, rescale=1.0).guide(network, 4)(x, t, y)
    assert ours[:, 0].tolist() == [5 + 2 * (1 - 5), 5 + 2 * (2 - 5)]


@on_every_path_and_target
def test_cfg_zero_by_hand(path: str, target: str) -> None:
    """s null + scale (conditional - s null) on velocities, with s the projection, for every target."""
    for guided, conditional, null in at_three_times(path, target):
        s = ((conditional * null).sum(1) / null.square().sum(1))[:, None]
        assert (s - 1).abs().max() > 0.1
        ours = guided(ClassifierFreeZero(3.0))
        torch.testing.assert_close(ours, s * null + 3.0 * (conditional - s * null), rtol=1e-9, atol=1e-9)
        # The added velocity is orthogonal to the null velocity.
        assert ((ours - conditional) * null).sum(1).abs().max() < 1e-8


def test_cfg_zero_ignores_a_null_branch_of_the_wrong_size() -> None:
    """Where null = k conditional, s null is the conditional, and guidance of any scale leaves it."""

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.where(y[:, None] == 2, 0.3, 1.0) * x

    x, y = points()
    t = torch.full((5,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(ClassifierFreeZero(7.0).guide(network, 2)(x, t, y), x, rtol=1e-14, atol=0)
    assert (ClassifierFree(7.0).guide(network, 2)(x, t, y) - x).abs().max() > 1


@on_every_path_and_target
def test_zero_until_stands_still_at_no_cost(path: str, target: str) -> None:
    plain, (x, y) = field(path, target), points()
    guidance = ClassifierFreeZero(2.0, zero_until=0.2)
    calls = Counted(plain.network)
    # The terms that cancel are below 100 in float64.
    assert velocities(guidance, plain.through(calls), x, 0.1, y).abs().max() < 1e-11
    assert calls.rows == 0
    assert velocities(guidance, plain, x, 0.2, y).abs().min() > 1e-6
    sampler = samplers.create("euler", steps=20)
    result = sampler.sample(plain.through(calls), x, y, guidance=guidance, trajectory=True)
    assert calls.rows == 5 * result.nfe
    assert result.nfe == sampler.plan(SolveSpec(plain.interpolant, plain.target, None, guidance)).nfe
    still = int((result.times < 0.2 - 1e-9).sum())
    assert result.nfe == 2 * (20 - still)
    assert result.trajectory is not None
    torch.testing.assert_close(result.trajectory[still], x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "guidance", [ClassifierFree(2.0, rescale=0.7), ClassifierFreeZero(2.0), ClassifierFreeZero(2.0, zero_until=0.15)]
)
def test_samples_are_the_same_for_every_target(guidance: Guidance, path: str) -> None:
    x, y = points()
    sampler = samplers.create("heun", steps=20, t0=0.02, t1=0.98, partial=True)
    ends = [sampler.sample(field(path, target), x, y, guidance=guidance).x for target in PREDICTIONS]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-9)


def test_autoguidance_by_hand() -> None:
    """weak + scale (strong - weak) with the same label in both; scale 1 is the strong network and 0 the weak one."""
    strong, weak, (x, y) = field(), field(scale=2.0), points()
    t = torch.full((5,), 0.5, dtype=torch.float64)
    good, poor = strong.network(x, t, y), weak.network(x, t, y)
    assert (good - poor).abs().max() > 0.1
    for scale in (0.0, 1.0, 2.5):
        guided = bound(Autoguidance(scale, run="a", step=1), strong, weak).guide(strong.network, 2)(x, t, y)
        torch.testing.assert_close(guided, poor + scale * (good - poor), rtol=0, atol=1e-14)
    outside = bound(Autoguidance(2.5, (0.6, 1.0), run="a", step=1), strong, weak).guide(strong.network, 2)
    assert torch.equal(outside(x, t, y), good)


def test_autoguidance_by_itself_changes_nothing() -> None:
    """A weak network equal to the strong one: weights sum to one."""
    plain, (x, y) = field(), points()
    t = torch.full((5,), 0.3, dtype=torch.float64)
    guided = bound(Autoguidance(4.0, run="a", step=1), plain, plain).guide(plain.network, 2)
    torch.testing.assert_close(guided(x, t, y), plain.network(x, t, y), rtol=0, atol=1e-14)


def test_autoguidance_names_the_missing_settings() -> None:
    plain = field()

    with pytest.raises(UserError, match="needs a second network"):
        samplers.create("euler", steps=2).sample(plain, points()[0], guidance=Autoguidance(run="a", step=1))
    for lacking in (Autoguidance(), Autoguidance(run="a"), Autoguidance(step=3)):
        with pytest.raises(UserError, match=r"needs guidance\.run.*guidance\.step"):
            lacking.bind(TwoRuns(plain, plain))
    for what, other in (
        ("interpolant", field("gvp")),
        ("target", field(target="noise")),
        ("number of classes", Field(plain.network, plain.interpolant, plain.target, 7)),
    ):
        with pytest.raises(UserError, match=f"another {what}"):
            Autoguidance(run="a", step=1).bind(TwoRuns(plain, other))
    for plainly in (Unguided(), ClassifierFree(), ClassifierFreeZero()):
        assert plainly.bind(TwoRuns(plain, plain)) is plainly


@pytest.mark.parametrize("name", samplers.names())
def test_evaluations_are_counted_and_planned(name: str) -> None:
    """Of both networks, in every sampler, with and without an interval."""
    x, y = points(3)
    kind = samplers[name]
    few: dict[str, Any] = {} if issubclass(kind, AdaptiveODE) else {"steps": 10}
    sampler = samplers.create(name, **few)
    for interval in ((0.0, 1.0), (0.2, 0.7)):
        strong, weak = field(), field(scale=2.0)
        calls, others = Counted(strong.network), Counted(weak.network)
        auto = bound(Autoguidance(1.5, interval, run="a", step=1), strong, weak.through(others))
        for guidance in (
            ClassifierFree(2.0, interval, rescale=0.5),
            ClassifierFreeZero(2.0, interval, zero_until=0.1),
            auto,
        ):
            calls.rows = others.rows = 0
            planned = sampler.plan(SolveSpec(strong.interpolant, strong.target, None, guidance)).nfe
            result = sampler.sample(strong.through(calls), x, y, guidance=guidance, seeds=range(3))
            assert calls.rows + others.rows == 3 * result.nfe
            assert (others.rows > 0) == (guidance is auto)
            assert planned in (None, result.nfe)
            assert bool(result.x.isfinite().all())


@pytest.mark.parametrize("name", ["cfg", "cfg-zero"])
def test_branches_are_one_call_where_memory_allows_and_two_where_not(name: str) -> None:
    """The same samples and NFE; the batch that did not fit is tried once."""
    (x, y), whole = points(3), field()
    sizes: list[int] = []

    def small(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return whole.network(x, t, y)

    sampler = samplers.create("heun", steps=4)
    guidance = guidances.create(name, scale=2.0)
    joint, split = (
        sampler.sample(net, x, y, guidance=guidance, seeds=range(3)) for net in (whole, whole.through(small))
    )
    assert sizes == [6] + [3] * 16
    assert joint.nfe == split.nfe == 16
    torch.testing.assert_close(joint.x, split.x, rtol=1e-12, atol=1e-12)


def test_a_network_beside_another_counts_on_the_same_meter() -> None:
    counted = Counted(lambda x, t, y: x, 2)
    x, t, y = torch.ones(2, 1), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    other = counted.beside(lambda x, t, y: 3 * x)
    assert other(x, t, y).tolist() == [[3.0], [3.0]]
    counted(x, t, y)
    assert counted.nfe == 2


def test_a_run_is_guided_by_its_own_earlier_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path, "run.checkpoint_every=20", "train.lr=1e-2", "train.ema=0.5")
    folder = run_training(config)
    assert [path.stem[-2:] for path in checkpoints(RunFolder(folder).checkpoints)] == ["20", "40"]

    def sample(*settings: str) -> tuple[Tensor, dict[str, Any], str]:
        over = read_assignments(["sampler.steps=4", "sample.n=8", *settings])
        run = load(folder, settings=over, root=tmp_path)
        made = draw_samples(run)
        assert made.folder.name == sampling_identity(run.config, run.step)
        return made.x, made.record, made.folder.name

    auto = ("guidance=autoguidance", f"guidance.run={folder.name}")
    plain, record, _ = sample()
    ours, guided, early = sample(*auto, "guidance.step=20", "guidance.scale=2.5")
    assert guided["nfe"] == 2 * record["nfe"]
    assert guided["recipe"]["guidance"] == {
        "name": "autoguidance", "scale": 2.5, "interval": [0.0, 1.0], "run": folder.name, "step": 20, "weights": "ema",
    }  # fmt: skip
    assert (ours - plain).abs().max() > 1e-3
    # Its own newest checkpoint is the same network: weights sum to one, in float32 over 8 evaluations.
    itself, _, late = sample(*auto, "guidance.step=40", "guidance.scale=2.5")
    torch.testing.assert_close(itself, plain, rtol=0, atol=1e-5)
    assert early != late
    for settings, reason in (
        (auto, "needs guidance.run"),
        ((*auto, "guidance.step=30"), "no checkpoint at step 30"),
        (("guidance=autoguidance", "guidance.run=latest", "guidance.step=20"), "name the run in full"),
        (("guidance=autoguidance", "guidance.run=nobody", "guidance.step=20"), "No run 'nobody'"),
    ):
        with pytest.raises(UserError, match=reason):
            sample(*settings)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("cfg", {"rescale": 1.5}, r"rescale must lie in \[0, 1\]"),
        ("cfg-zero", {"zero_until": 1.0}, r"zero_until must lie in \[0, 1\)"),
        ("cfg-zero", {"interval": (0.6, 0.2)}, "interval must be"),
        ("autoguidance", {"weights": "best"}, "weights"),
        ("autoguidance", {"interval": (0.6, 0.2)}, "interval must be"),
    ],
)
def test_impossible_fields(name: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        guidances.create(name, **fields)


def test_cfg_zero_needs_the_null_class() -> None:
    with pytest.raises(UserError, match="'cfg-zero' needs class labels"):
        ClassifierFreeZero().guide(lambda x, t, y: x, 0)
