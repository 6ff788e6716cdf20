"""YAML 1.2 as plain values with the line of every key.

Nothing in it is executed.  A text is looked through before any value is made of it: a text that multiplies by its aliases,
nests without end or has a number of thousands of digits is refused at once.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping
from typing import Any

from sitkit.runtime.errors import UserError

# Bounds far above every file of settings.
LONGEST_TEXT = 10**6
MOST_VALUES = 20_000
DEEPEST = 32
LONGEST_NUMBER = 100
_WHOLE = re.compile(r"[-+]?(0[xo])?[0-9a-fA-F_]+")


class NotYaml(UserError):
    """A text that is not YAML."""


def parse_yaml(text: str, place: str) -> tuple[Any, dict[str, str]]:
    """Return the plain value of a YAML text, and the place "place:line" of each dotted key.

    Args:
        text: the text.
        place: the name of the text in errors: its file.

    Returns:
        The value, None for an empty text; and the places.

    Raises:
        NotYaml: for a text that is not YAML.
        UserError: for YAML that is not read: a tag, a merge key, a key that is not a word or is given twice, and what exceeds
            the bounds of this module.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        _require_plain(text, place)
        tree = YAML(typ="rt").load(text)
    except YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f":{mark.line + 1}" if mark else ""
        raise NotYaml(f"{place}{line}: {problem or ' '.join(str(error).split())}.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise NotYaml(f"{place}: {error}.") from None
    where: dict[str, str] = {}
    return _unwrap(tree, place, "", where), where


def _require_plain(text: str, place: str) -> None:
    """Raise UserError for YAML that is not read.  The events of the text are counted, an alias as all that it stands for."""
    from ruamel.yaml import YAML, events

    if len(text) > LONGEST_TEXT:
        raise UserError(f"{place}: a text of {len(text):,} characters; settings have at most {LONGEST_TEXT:,}.")
    for number, line in enumerate(text.splitlines(), 1):
        # The parser is slow for a line that opens hundreds of brackets.
        if line.count("[") + line.count("{") > DEEPEST and _open_brackets(line) > DEEPEST:
            raise UserError(f"{place}:{number}: lists and keys are nested more than {DEEPEST} deep.")
    values, key = 0, ""
    sizes: dict[str, int] = {}
    # A frame for each list and mapping that is open: its anchor, the count before it, and the keys of a mapping.
    frames: list[tuple[str | None, int, set[str] | None]] = []
    # Whether the next node of the mapping that is open is a key.
    key_next: list[bool] = []
    for event in YAML(typ="rt", pure=True).parse(text):
        here = f"{place}:{event.start_mark.line + 1}"
        if isinstance(event, events.DocumentStartEvent) and event.version not in (None, (1, 2)):
            raise UserError(f"{here}: YAML {'.'.join(map(str, event.version))} is not read: YAML is 1.2 here.")
        if isinstance(event, (events.SequenceEndEvent, events.MappingEndEvent)):
            anchor, before, _ = frames.pop()
            key_next.pop()
            if anchor is not None:
                sizes[anchor] = values - before
            continue
        if not isinstance(event, events.NodeEvent):
            continue
        keys = frames[-1][2] if frames else None
        if keys is not None:
            if key_next[-1]:
                key = _new_key(event, keys, here)
            key_next[-1] = not key_next[-1]
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise UserError(
                f"{here}: {f'{key}: ' if key else ''}the tag {str(tag)!r} is not read: write a plain value."
            )
        if isinstance(event, events.AliasEvent):
            if event.anchor not in sizes and any(frame[0] == event.anchor for frame in frames):
                raise UserError(f"{here}: *{event.anchor} stands for a value that holds it: write the value out.")
            values += sizes.get(event.anchor, 0)
        else:
            values += 1
        if isinstance(event, events.ScalarEvent):
            if event.anchor is not None:
                sizes[event.anchor] = 1
            if event.style is None and len(event.value) > LONGEST_NUMBER and _WHOLE.fullmatch(event.value):
                raise UserError(f"{here}: a number of {len(event.value):,} digits; write at most {LONGEST_NUMBER}.")
        elif not isinstance(event, events.AliasEvent):
            frames.append((event.anchor, values - 1, set() if isinstance(event, events.MappingStartEvent) else None))
            key_next.append(True)
        if len(frames) > DEEPEST:
            raise UserError(f"{here}: lists and keys are nested more than {DEEPEST} deep.")
        if values > MOST_VALUES:
            raise UserError(
                f"{here}: more than {MOST_VALUES:,} values, counting each alias (*name) as what it stands for."
            )


def _open_brackets(line: str) -> int:
    """Return the largest number of brackets that are open at one time."""
    return max(itertools.accumulate((c in "[{") - (c in "]}") for c in line))


def _new_key(event: Any, keys: set[str], here: str) -> str:
    """Add a key to those before it and return it.  Raises UserError if it is not a word, a merge key, or one of them."""
    from ruamel.yaml import events

    if not isinstance(event, events.ScalarEvent):
        raise UserError(f"{here}: a key must be a word, not a list, a mapping or an alias.")
    if event.value == "<<" and event.style is None:
        raise UserError(f"{here}: merge keys (<<) are not read: write the settings out.")
    if event.value in keys:
        raise UserError(f"{here}: duplicate key {event.value!r}: leave one out.")
    keys.add(event.value)
    return event.value


def _unwrap(node: Any, place: str, key: str, where: dict[str, str]) -> Any:
    """Return plain values of ruamel's tree, and record the line of each."""
    if isinstance(node, Mapping):
        plain = {}
        for name, value in node.items():
            full = f"{key}.{name}" if key else str(name)
            where[full] = f"{place}:{node.lc.key(name)[0] + 1}"  # pyright: ignore[reportAttributeAccessIssue]
            plain[str(name)] = _unwrap(value, place, full, where)
        return plain
    if isinstance(node, list):
        for i in range(len(node)):
            where[f"{key}.{i}"] = f"{place}:{node.lc.item(i)[0] + 1}"  # pyright: ignore[reportAttributeAccessIssue]
        return [_unwrap(value, place, f"{key}.{i}", where) for i, value in enumerate(node)]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return plain values as YAML that `parse_yaml` reads back, keys in their order."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(dict(values), text)
    return text.getvalue()
