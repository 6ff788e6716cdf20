"""The laws of every component: its name, its explanation, its checks and its record."""

from __future__ import annotations

import dataclasses
import json
import pickle
from typing import Any

from sitkit.registry import Component, Registry, build, registries, spec
from sitkit.runtime.errors import UserError
from sitkit.testing.law import law, lawful


class _Nothing:
    """A value that no field takes."""


def _registry_with(component: Component) -> Registry[Any]:
    homes = [r for r in registries.values() if component.name in r and r[component.name] is type(component)]
    who = type(component).__name__
    law(len(homes) == 1, f"{who}: one registry holds it by its name {component.name!r}; {len(homes)} do")
    return homes[0]


@lawful(Component)
def registered(component: Component) -> None:
    """Exactly one registry holds it, by its name."""
    who = type(component).__name__
    law(bool(component.name), f"{who}: a component has the name that it is registered by")
    registry = _registry_with(component)
    try:
        registry.create(f"{component.name}-")
    except UserError as error:
        right = f"No {registry.kind} named '{component.name}-'" in str(error)
        law(right, f"{who}: the refusal of a misspelt name quotes the name")
    else:
        raise AssertionError(f"{who}: a misspelt name is refused; it answers to {component.name!r}-")


@lawful(Component)
def explained(component: Component) -> None:
    """The first line of its docstring says what it is."""
    who = type(component).__name__
    first = (type(component).__doc__ or "").strip().partition("\n")[0]
    # A dataclass without a docstring gets its signature as one.
    explains = first and not first.startswith(f"{who}(")
    law(bool(explains), f"{who}: the first line of the docstring says what it is")


@lawful(Component)
def frozen(component: Component) -> None:
    """Its fields cannot be set, it can be hashed, and it can be sent to another process."""
    who = type(component).__name__
    for field in dataclasses.fields(component):
        try:
            setattr(component, field.name, getattr(component, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{who}: a component is frozen; decorate it with @dataclass(frozen=True)")
    hash(component)
    law(pickle.loads(pickle.dumps(component)) == component, f"{who}: another process receives an equal component")


@lawful(Component)
def typed(component: Component) -> None:
    """A wrong value and an unknown field are refused in one line that names the field."""
    who = type(component).__name__
    given = {f.name: getattr(component, f.name) for f in dataclasses.fields(component) if f.init}
    for name in given:
        try:
            build(type(component), {**given, name: _Nothing()}, who)
        except UserError as error:
            law(name in str(error), f"{who}: the refusal of a wrong {name} names the field; it says {error}")
        else:
            raise AssertionError(f"{who}: the field {name} takes anything: give it a type that says what it takes")
    try:
        build(type(component), {**given, "no_such_field": 1}, who)
    except UserError as error:
        law("no_such_field" in str(error), f"{who}: the refusal of an unknown field names it; it says {error}")


@lawful(Component)
def recorded(component: Component) -> None:
    """Its record is plain JSON, and the record builds the same component again."""
    who, registry = type(component).__name__, _registry_with(component)
    again = registry.parse(spec(component))
    law(again == component, f"{who}: the record builds the same component; {spec(component)} gives {again}")
    try:
        text = json.dumps(spec(component))
    except TypeError as error:
        raise AssertionError(f"{who}: the record is plain JSON: {error}") from None
    law(registry.parse(json.loads(text)) == component, f"{who}: the record as JSON builds the same component")
