"""Guidance: weights sum to one, evaluations are counted and planned, formulas by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sitkit.models.exact import Exact
from sitkit.registry import guidances, interpolants, targets
from sitkit.runtime.errors import UserError
from sitkit.solvers.guidance import ClassifierFree, Guidance, Unguided
from sitkit.testing import obey
from sitkit.transport.closed_form import Mixture
from sitkit.transport.field import Counted, Field


def usable() -> list[Guidance]:
    """Return the guidances that need only one network; the others raise UserError."""
    usable_guidances = []
    for name in guidances.names():
        try:
            guidance = guidances.create(name)
            guidance.guide(by_label, 4)
        except UserError:
            continue
        usable_guidances.append(guidance)
    return usable_guidances


def by_label(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return (1 + y) x, so that the branches differ."""
    return (1 + y.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1)) * x


def test_built_ins_are_checked() -> None:
    assert {"none", "cfg"} <= {guidance.name for guidance in usable()}


@pytest.mark.parametrize("guidance", usable(), ids=lambda guidance: guidance.name)
def test_laws(guidance: Guidance) -> None:
    obey(guidance)


@given(
    st.floats(0, 10),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda pair: (min(pair), max(pair))),
    st.none() | st.integers(1, 3),
)
def test_laws_of_cfg_for_any_fields(scale: float, interval: tuple[float, float], channels: int | None) -> None:
    obey(ClassifierFree(scale, interval, channels), "branches")


def guided(guidance: Guidance, time: float = 0.5) -> Tensor:
    """The factor by which each of three channels of ones is multiplied, labels 0 and 2, null class 4."""
    x = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    t = torch.full((2,), time, dtype=torch.float64)
    return guidance.guide(by_label, 4)(x, t, torch.tensor([0, 2]))[:, :, 0, 0]


def test_cfg_by_hand() -> None:
    """null + s (conditional - null): 5 + 1.5 (1 - 5) = -1 and 5 + 1.5 (3 - 5) = 2."""
    assert guided(ClassifierFree(1.5)).tolist() == [[-1.0] * 3, [2.0] * 3]
    assert guided(ClassifierFree(1.5, channels=1)).tolist() == [[-1.0, 1.0, 1.0], [2.0, 3.0, 3.0]]
    assert guided(ClassifierFree(0.0)).tolist() == [[5.0] * 3] * 2
    assert guided(ClassifierFree(1.0)).tolist() == guided(Unguided()).tolist() == [[1.0] * 3, [3.0] * 3]


def test_cfg_guides_within_its_interval_only() -> None:
    guidance = ClassifierFree(1.5, interval=(0.2, 0.6))
    for time, inside in ((0.1, False), (0.2, True), (0.6, True), (0.61, False)):
        assert guided(guidance, time)[0, 0] == (-1.0 if inside else 1.0)
        assert guidance.evaluations(time) == 1 + inside


def test_scale_one_and_outside_the_interval_spend_one() -> None:
    calls = Counted(by_label)
    for guidance in (ClassifierFree(1.0), ClassifierFree(2.0, interval=(0.8, 1.0))):
        guidance.guide(calls, 4)(torch.ones(2, 1), torch.full((2,), 0.5), torch.tensor([0, 1]))
    assert calls.rows == 4


@pytest.mark.parametrize("path", interpolants.names())
@pytest.mark.parametrize("name", targets.names())
def test_guiding_the_prediction_guides_every_reading_alike(name: str, path: str) -> None:
    """All readings are affine in the prediction with offsets that depend on x, and the weights sum to one."""
    interpolant, target = interpolants.create(path), targets.create(name)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 2])
    plain = Field(by_label, interpolant, target, 4)
    mixed = plain.through(ClassifierFree(1.5).guide(by_label, 4)).read(x, 0.6, y)
    conditional, null = plain.read(x, 0.6, y), plain.read(x, 0.6)
    for ours, first, second in zip(mixed, conditional, null, strict=True):
        # Readings at t = 0.6 are below 100, and each has a handful of roundings.
        torch.testing.assert_close(ours, second + 1.5 * (first - second), rtol=1e-12, atol=1e-12)


def test_the_exact_network_of_a_labelled_law_can_be_guided() -> None:
    """null + 2 (conditional - null) of the data readings of two points at -1 and 1, which at t = 0 are -1, 1 and 0."""
    one = torch.ones(2, dtype=torch.float64)
    points = Mixture(one, torch.stack((-one[:1], one[:1])), 1e-4 * one.reshape(2, 1, 1), torch.tensor([0, 1]))
    interpolant, target = interpolants.create("linear"), targets.create("data")
    network = Exact(points, interpolant, target)
    guided = ClassifierFree(2.0).guide(network, network.num_classes)
    x = torch.zeros(2, 1, dtype=torch.float64)
    assert guided(x, 0 * one, torch.tensor([0, 1])).flatten().tolist() == pytest.approx([-2.0, 2.0])


def test_cfg_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(UserError, match=r"needs class labels.*guidance 'none'"):
        ClassifierFree().guide(by_label, 0)
    network = Counted(by_label)
    network.class_dropout = 0.0
    with pytest.raises(UserError, match="class_dropout > 0"):
        ClassifierFree().guide(network, 4)


@pytest.mark.parametrize("fields", [{"interval": (0.6, 0.2)}, {"interval": (0, 2)}, {"channels": 0}])
def test_impossible_fields(fields: dict[str, object]) -> None:
    with pytest.raises(UserError, match="guidance 'cfg'.*must be"):
        guidances.create("cfg", **fields)
