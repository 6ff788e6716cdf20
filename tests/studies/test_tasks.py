"""The log of a task has its end, whatever output is around it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sitkit.studies.tasks import FAILED, failure, note

EARLY, LATE = "2000-01-01T00:00:00.000+00:00", "2999-01-01T00:00:00.000+00:00"


@pytest.mark.parametrize("printed", ["", "a line\n", "unfinished", "two\nunfinished", "2026-11-28T20:41:07.1"])
def test_a_failure_is_read_whatever_output_is_around_it(printed: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "train.log"

    def print_to_log(text: str) -> None:
        with log.open("a") as file:
            file.write(text)

    note(log, "start")
    print_to_log(printed)
    note(log, f"{FAILED} no memory: two\nlines")
    noted = log.read_text()
    print_to_log(printed)
    assert failure(log, EARLY) == "no memory: two lines"
    assert failure(log, LATE) is None
    # A task that begins again has not failed.
    note(log, "start")
    assert failure(log, EARLY) is None
    # Each entry is a line of its own, and no output is lost.
    assert [line.split(" ", 3)[3] for line in log.read_text().splitlines() if line.count(" ") > 2] == [
        "start", f"{FAILED} no memory: two lines", "start",
    ]  # fmt: skip
    assert log.read_text().startswith(f"{noted}{printed}")


def test_without_a_log_there_is_no_failure(tmp_path: Path) -> None:
    assert failure(tmp_path / "train.log", EARLY) is None
