"""Progress: a callback receives the events, a terminal shows a bar after two seconds, a log shows nothing."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from sitkit.runtime import progress_bar
from sitkit.runtime.progress import Event, silent


class Terminal(io.StringIO):
    """A file that declares itself a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_callback_receives_the_events() -> None:
    events: list[Event] = []
    with progress_bar.reporting(events.append) as report:
        report(Event("train", 1, 2))
    assert events == [Event("train", 1, 2)]


@pytest.mark.parametrize("show", [progress_bar.bars, progress_bar.log_lines])
def test_no_control_character_of_an_event_reaches_the_terminal(show: Any) -> None:
    """A bar itself writes escape sequences of colours and of the cursor, and no bell, title or cleared screen."""
    screen, hostile = Terminal(), "a\x1b[2J\x1b]0;b\x07c\u202e[red]"
    with show(Console(file=screen, width=200, highlight=False)) as report:
        report(Event(hostile, 1, 2, {hostile: 1.0}, hostile, hostile))
    text = screen.getvalue()
    assert "\x1b[2J" not in text and not set(text) & set("\x07\u202e") and "\\x07" in text and "[red]" in text


def test_nothing_is_shown_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar.reporting(None) as report:
        assert report is silent


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (60.0, False)])
def test_a_terminal_shows_a_bar_once_the_work_is_long(
    delay: float, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress_bar, "DELAY", delay)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar.reporting(None) as report:
        report(Event("train", 0, 20))
        report(Event("train", 20, 20, {"loss": 0.25}))
    assert ("20/20" in screen.getvalue() and "loss 0.25" in screen.getvalue()) == shown
    assert bool(screen.getvalue()) == shown


def test_a_stage_that_begins_again_has_one_bar() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120, force_terminal=True, color_system=None)
    with progress_bar.bars(console) as report:
        for done in (5, 10, 1):
            report(Event("sample", done, 10))
    last = screen.getvalue().rpartition("sample")[2]
    assert "1/10" in last and "10/10" not in last


def test_a_log_has_a_line_for_the_end_of_each_stage() -> None:
    screen = io.StringIO()
    with progress_bar.log_lines(Console(file=screen, width=120), every=60.0) as report:
        for done in (1, 2, 3, 3):
            report(Event("sample", done, 3, {"images/s": 12.5}))
    assert screen.getvalue().splitlines() == ["sample 1/3 images/s 12.5", "sample 3/3 images/s 12.5"]


def test_a_message_is_printed_at_once_even_for_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar.reporting(None) as report:
        report(Event("train", message="continuing at step 500."))
    assert "continuing at step 500." in screen.getvalue()
