"""Docstrings of the public names have one form: a sentence, then Args, Returns and Raises."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import sitkit

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Source|Note):", re.MULTILINE)


def section(docstring: str, *names: str) -> str:
    """Return the text of a section of a docstring, empty where there is none."""
    parts = SECTION.split(docstring)
    return "\n".join(text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name in names)


def parameters(function: Any) -> list[str]:
    """Return the names of the parameters of a function that a caller gives."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("self", "cls") and not name.startswith("_") and parameter.kind != parameter.VAR_KEYWORD
    ]


def missing_of(place: str, docstring: str | None, names: list[str], returns: bool) -> Iterator[str]:
    """Yield what the docstring of a function or a class lacks."""
    text = inspect.cleandoc(docstring or "")
    if not re.match(r"\S[^\n]*(\n[^\n]+)*?[.:](\s|$)", text):
        yield f"{place}: no first sentence"
    args = section(text, "Args", "Attributes")
    for name in names:
        if not re.search(rf"^\s+(\w+, )*\*?{name}(, \w+)*:", args, re.MULTILINE):
            yield f"{place}: no Args for {name}"
    if returns and not section(text, "Returns", "Yields"):
        yield f"{place}: no Returns"


def gives(function: Any) -> bool:
    """Whether the annotation of a function names something that it returns."""
    return str(inspect.signature(function).return_annotation) not in ("None", "Self")


def missing() -> Iterator[str]:
    """Yield what the docstrings of the public names lack; methods count from three parameters on."""
    for name in vars(sitkit)["__all__"]:
        thing = getattr(sitkit, name)
        if inspect.isclass(thing):
            fields = []
            if dataclasses.is_dataclass(thing):
                fields = [field.name for field in dataclasses.fields(thing) if not field.name.startswith("_")]
            elif issubclass(thing, tuple):
                fields = list(getattr(thing, "_fields", ()))
            inherited = {field for base in thing.__mro__[1:] for field in getattr(base, "__dataclass_fields__", {})}
            yield from missing_of(name, thing.__doc__, [field for field in fields if field not in inherited], False)
            for method, function in vars(thing).items():
                if inspect.isfunction(function) and not method.startswith("_") and len(parameters(function)) > 2:
                    yield from missing_of(f"{name}.{method}", function.__doc__, parameters(function), gives(function))
        elif inspect.isfunction(thing):
            yield from missing_of(name, thing.__doc__, parameters(thing), gives(thing))


def test_an_incomplete_docstring_is_noticed() -> None:
    def scale(x: float, *, by: float) -> float:
        """Return x times a factor.

        Args:
            x: any number
        """
        return x * by

    found = list(missing_of("scale", scale.__doc__, parameters(scale), gives(scale)))
    assert found == ["scale: no Args for by", "scale: no Returns"]


def test_public_docstrings_are_complete() -> None:
    assert list(missing()) == []
