"""What a law is, and the list of all laws: functions that raise if a component of their kind breaks them."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sitkit.registry import Component, build
from sitkit.runtime.errors import UserError, suggest

Check = TypeVar("Check", bound=Callable[[Any], None])
_LAWS: dict[type[Component], list[Callable[[Any], None]]] = {}


class NotShown(unittest.SkipTest):
    """Raised by a law that cannot be tested on this machine, with the reason (pretrained weights are missing)."""


@contextlib.contextmanager
def not_shown_if_refused() -> Iterator[None]:
    """Raise NotShown for a UserError within: a component may refuse the case with which a law tests it."""
    try:
        yield
    except UserError as error:
        raise NotShown(str(error)) from None


@dataclass(frozen=True)
class Law:
    """A law for one component.

    Args:
        component: the component that must obey the law.
        name: the name of the law, as "marginals".
        meaning: one sentence that says what the law demands.
        function: the function that tests a component and raises AssertionError if the law is broken.
    """

    component: Component
    name: str
    meaning: str
    function: Callable[[Any], None]

    def check(self) -> None:
        """Test the law.

        Raises:
            AssertionError: the component breaks the law; the message says which law, where, and the numbers.
            NotShown: the law cannot be tested on this machine.
        """
        self.function(self.component)

    def __str__(self) -> str:
        return f"{self.component.name}-{self.name}"


def lawful(kind: type[Component]) -> Callable[[Check], Check]:
    """Return a decorator that adds a function to the laws of a kind.  Its name and its first line describe the law."""

    def add(function: Check) -> Check:
        _LAWS.setdefault(kind, []).append(function)
        return function

    return add


def laws_of(component: Component) -> list[Law]:
    """Return the laws that a component must obey.

    Args:
        component: a component of any kind.

    Returns:
        The laws of every component, then those of its kind.
    """
    return [
        Law(component, f.__name__.strip("_").replace("_", "-"), (f.__doc__ or "").splitlines()[0], f)
        for kind, functions in sorted(_LAWS.items(), key=lambda item: item[0] is not Component)
        if isinstance(component, kind)
        for f in functions
    ]


def obey(component: Component, *names: str) -> None:
    """Check that a component obeys its laws.  Laws that cannot be tested on this machine are passed over.

    Args:
        component: a component of any kind.
        names: the names of the laws to check, as "ends", "derivatives"; all laws of the component by default.

    Raises:
        AssertionError: the component breaks a law; the message says which law, where, and the numbers.
        UserError: the component has no law with one of the names.
    """
    laws = {law.name: law for law in laws_of(component)}
    for name in names or laws:
        if name not in laws:
            raise UserError(f"No law {name!r} of {component.name!r}.{suggest(name, laws)} Known: {', '.join(laws)}.")
        with contextlib.suppress(NotShown):
            laws[name].check()


def examples_of(cls: type[Component], what: str) -> list[Component]:
    """Return a component for each of `cls.test_fields()`.

    Args:
        cls: a class of components.
        what: the name of the class for messages, as "sampler heun".

    Returns:
        The components, in the order of `test_fields`.

    Raises:
        UserError: a field has neither a default nor a value in `test_fields`.
    """
    return [build(cls, fields, what) for fields in cls.test_fields()]


def parametrize_with_laws(*components: Component) -> Any:
    """Return a pytest decorator that runs a test once for each law of the components, as the argument `law`.

    Args:
        components: components of any kinds.

    Returns:
        A decorator:

            @parametrize_with_laws(sitkit.interpolants.create("poly", power=3))
            def test_laws(law: Law) -> None:
                law.check()
    """
    import pytest

    return pytest.mark.parametrize("law", [law for c in components for law in laws_of(c)], ids=str)


def law(holds: bool | Tensor, message: str) -> None:
    """Raise AssertionError with a message unless the law holds.

    Args:
        holds: a truth value, or a tensor of them that must all be true.
        message: the message of the error.
    """
    if not bool(torch.as_tensor(holds).all()):
        raise AssertionError(message)


def close(ours: Tensor, truth: Tensor, tolerance: float, message: str) -> None:
    """Raise AssertionError unless |ours - truth| <= tolerance (1 + |truth|) for every entry.

    Args:
        ours: the values to check.
        truth: the right values, of a shape that broadcasts to that of `ours`.
        tolerance: the largest error, relative to 1 + |truth|.
        message: the beginning of the error's message; the largest error and the tolerance follow.
    """
    ours, truth = ours.detach(), truth.detach()
    off = (ours - truth).abs() / (1 + truth.abs())
    law(off.isfinite() & (off <= tolerance), f"{message}: off by {float(off.max()):.3g}, tolerated {tolerance:.3g}")
