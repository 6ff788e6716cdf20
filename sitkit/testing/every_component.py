"""The laws of every component: how it is named, explained, checked and recorded."""

from __future__ import annotations

import dataclasses
import json
import pickle

from sitkit.registry import Component, build, registries, spec
from sitkit.runtime.errors import UserError
from sitkit.testing.law import law, lawful


class _Nothing:
    """A value that no field takes."""


@lawful(Component)
def registered(component: Component) -> None:
    """One registry holds it, by the name that it bears."""
    who = f"{type(component).__name__}"
    law(bool(component.name), f"{who}: a component has the name it is registered by")
    homes = [r for r in registries.values() if component.name in r and r[component.name] is type(component)]
    law(len(homes) == 1, f"{who}: one registry holds it by its name {component.name!r}; {len(homes)} do")
    try:
        homes[0].create(f"{component.name}-")
    except UserError as error:
        law(f"No {homes[0].kind} named '{component.name}-'" in str(error), f"{who}: a misspelt name is refused by name")
    else:
        raise AssertionError(f"{who}: a name that is nearly its own is another's; it answers to {component.name!r}-")


@lawful(Component)
def explained(component: Component) -> None:
    """The first line of its docstring says what it is."""
    first = (type(component).__doc__ or "").strip().partition("\n")[0]
    # A dataclass without docstring gets its signature as one.
    told = first and not first.startswith(f"{type(component).__name__}(")
    law(bool(told), f"{type(component).__name__}: the first line of the docstring says what it is")


@lawful(Component)
def frozen(component: Component) -> None:
    """Its fields cannot be set, it can be hashed, and another process can be given it."""
    who = f"{type(component).__name__}"
    for field in dataclasses.fields(component):
        try:
            setattr(component, field.name, getattr(component, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{who}: a component is frozen; decorate it with @dataclass(frozen=True)")
    hash(component)
    law(pickle.loads(pickle.dumps(component)) == component, f"{who}: what is sent to another process arrives as it was")


@lawful(Component)
def typed(component: Component) -> None:
    """A wrong value, and a field that it has not, are refused in one line that names the field."""
    who = f"{type(component).__name__}"
    given = {f.name: getattr(component, f.name) for f in dataclasses.fields(component) if f.init}
    for name in given:
        try:
            build(type(component), {**given, name: _Nothing()}, who)
        except UserError as error:
            law(name in str(error), f"{who}: the refusal of a wrong {name} names it; it says {error}")
        else:
            raise AssertionError(f"{who}: the field {name} takes anything: give it a type that says what it takes")
    try:
        build(type(component), {**given, "no_such_field": 1}, who)
    except UserError as error:
        law("no_such_field" in str(error), f"{who}: the refusal of an unknown field names it; it says {error}")


@lawful(Component)
def recorded(component: Component) -> None:
    """What is recorded of it is plain JSON, and read again it is the same component."""
    who = f"{type(component).__name__}"
    homes = [r for r in registries.values() if component.name in r and r[component.name] is type(component)]
    law(len(homes) == 1, f"{who}: one registry holds it by its name {component.name!r}; {len(homes)} do")
    again = homes[0].parse(spec(component))
    law(again == component, f"{who}: what is recorded builds the same component; {spec(component)} gives {again}")
    try:
        text = json.dumps(spec(component))
    except TypeError as error:
        raise AssertionError(f"{who}: what is recorded is plain JSON: {error}") from None
    law(homes[0].parse(json.loads(text)) == component, f"{who}: what is written as JSON builds the same component")


def check_component(component: Component) -> None:
    """It is registered, explained, frozen, typed, and its plain form, read again, is the same component."""
    for check in (registered, explained, frozen, typed, recorded):
        check(component)
