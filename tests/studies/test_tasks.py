"""What a task's log says became of it, whatever else was printed there."""

from __future__ import annotations

from pathlib import Path

import pytest

from sitkit.studies.tasks import FAILED, failure, note

EARLY, LATE = "2000-01-01T00:00:00.000+00:00", "2999-01-01T00:00:00.000+00:00"


@pytest.mark.parametrize("printed", ["", "a line\n", "unfinished", "two\nunfinished", "2026-11-28T20:41:07.1"])
def test_a_failure_is_found_whatever_is_printed_around_it(printed: str, tmp_path: Path) -> None:
    log = tmp_path / "logs" / "train.log"

    def tell(text: str) -> None:
        with log.open("a") as file:
            file.write(text)

    note(log, "start")
    tell(printed)
    note(log, f"{FAILED} no memory: two\nlines")
    noted = log.read_text()
    tell(printed)
    assert failure(log, EARLY) == "no memory: two lines"
    assert failure(log, LATE) is None
    # What is begun again has not failed.
    note(log, "start")
    assert failure(log, EARLY) is None
    # Each entry is a line of its own, and nothing that was printed is lost.
    assert [line.split(" ", 3)[3] for line in log.read_text().splitlines() if line.count(" ") > 2] == [
        "start", f"{FAILED} no memory: two lines", "start",
    ]  # fmt: skip
    assert log.read_text().startswith(f"{noted}{printed}")


def test_no_log_is_no_failure(tmp_path: Path) -> None:
    assert failure(tmp_path / "train.log", EARLY) is None
