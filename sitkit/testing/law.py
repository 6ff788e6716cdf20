"""What a law is, and the one list of them: for each kind of component the functions that raise where it is broken."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sitkit.registry import Component, build

Check = TypeVar("Check", bound=Callable[[Any], None])
_LAWS: dict[type[Component], list[Callable[[Any], None]]] = {}


class NotShown(unittest.SkipTest):
    """A law that could be neither shown nor refuted here, and why (weights that are not on this machine)."""


@dataclass(frozen=True)
class Law:
    """A law for one component: `check` raises AssertionError where it is broken, NotShown where it cannot be tried."""

    component: Component
    name: str
    meaning: str
    function: Callable[[Any], None]

    def check(self) -> None:
        """Raise AssertionError with the law's name, the place and the numbers where the component breaks it."""
        self.function(self.component)

    def __str__(self) -> str:
        return f"{self.component.name}-{self.name}"


def lawful(kind: type[Component]) -> Callable[[Check], Check]:
    """Decorator: a law of every component of a kind, named by its function and explained by its first line."""

    def add(function: Check) -> Check:
        _LAWS.setdefault(kind, []).append(function)
        return function

    return add


def laws_of(component: Component) -> list[Law]:
    """The laws that a component must obey: those of every component, then those of its kind."""
    return [
        Law(component, f.__name__.strip("_").replace("_", "-"), (f.__doc__ or "").splitlines()[0], f)
        for kind, functions in sorted(_LAWS.items(), key=lambda item: item[0] is not Component)
        if isinstance(component, kind)
        for f in functions
    ]


def obey(component: Component) -> None:
    """Check every law of a component, those that cannot be shown here left out."""
    for law in laws_of(component):
        try:
            law.check()
        except NotShown:
            continue


def examples_of(cls: type[Component], what: str) -> list[Component]:
    """A component for each of `cls.test_fields()`.  Raises UserError where those leave a field without value."""
    return [build(cls, fields, what) for fields in cls.test_fields()]


def parametrize_with_laws(*components: Component) -> Any:
    """pytest's decorator that gives a test each law of these components, as the argument `law`.

    @parametrize_with_laws(sitkit.interpolants.create("poly", power=3))
    def test_laws(law: Law) -> None:
        law.check()
    """
    import pytest

    return pytest.mark.parametrize("law", [law for c in components for law in laws_of(c)], ids=str)


def law(holds: bool | Tensor, message: str) -> None:
    """AssertionError with the message unless the law holds."""
    if not bool(torch.as_tensor(holds).all()):
        raise AssertionError(message)


def close(ours: Tensor, truth: Tensor, tolerance: float, message: str) -> None:
    """AssertionError unless |ours - truth| <= tolerance (1 + |truth|) everywhere."""
    ours, truth = ours.detach(), truth.detach()
    off = (ours - truth).abs() / (1 + truth.abs())
    law(off.isfinite() & (off <= tolerance), f"{message}: off by {float(off.max()):.3g}, tolerated {tolerance:.3g}")
