"""Output of the command line: plain values for JSON, lines, and numbers of a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from sitkit.cli import console
from sitkit.runtime.progress import Event


class Pair(NamedTuple):
    event: Event
    paths: tuple[Path, ...]


def test_records_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    console.as_json({"pair": Pair(Event("train", 1, 2), (Path("a"), Path("b")))})
    event = {"stage": "train", "done": 1, "total": 2, "values": {}, "message": "", "task": ""}
    assert json.loads(capsys.readouterr().out) == {"pair": {"event": event, "paths": ["a", "b"]}}


def test_a_fact_without_a_value_has_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.facts(run=Path("runs/a"), picture=None, recipe="b")
    assert capsys.readouterr().out == "run       runs/a\nrecipe    b\n"


def test_no_control_character_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\x07\r\u202eb"
    for show in (
        console.error,
        console.warn,
        console.say,
        console.note,
        lambda text: console.table([text], [[text]], text, [text]),
    ):
        show(hostile)
    shown = capsys.readouterr()
    assert not set(shown.out + shown.err) & set("\x1b\x07\r\u202e") and "x1b" in shown.out and "x1b" in shown.err


def test_numbers_of_a_table_have_few_digits() -> None:
    assert [console.short(1.23456), console.short(0.0123, 2), console.short(None)] == ["1.235", "0.012", "-"]


def test_a_verb_gets_a_function_for_its_progress() -> None:
    def verb(number: int, *, progress: console.Progress, factor: int) -> int:
        progress(Event("work", 1, 1))
        return number * factor

    assert console.call(verb, 3, factor=2) == 6
