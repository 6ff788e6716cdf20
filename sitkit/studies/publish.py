"""A study in MLflow: one run with its tables and its report, and below it the runs of its trainings, and of their cells."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sitkit.results.report import REPORT, report
from sitkit.results.study_results import FILE, StudyResults, read_results, runs_of
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.tracking.sync import METRICS, TrackedRun, is_sent
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, inside, read_bytes, read_json, to_json, write_file, write_json
from sitkit.runtime.progress import Event, Progress, silent

DIGEST = "published.json"
STUDY_ARTIFACTS = ("table.*", FILE, REPORT)


@contextlib.contextmanager
def published(folder: Path, results: StudyResults, progress: Progress = silent) -> Iterator[None]:
    """Show a study in MLflow as running while a block works on it, above the runs of its trainings and cells.

    The block leaves its results in the folder; they, the tables and the report are sent at the end of the block.
    """
    with _tracker(folder, results, progress):
        yield
        _write(folder)


def publish(folder: Path, progress: Progress = silent) -> None:
    """Write a study's report and send the results in its folder to MLflow, unless this is done already.

    The study's metrics are the numbers of cells that are done and that have failed, and the mean of each row and column.
    Its trainings become its children unless another study has them; all of its runs have the tag sitkit.study.<name>, and
    those of cells their row, column and seed.  If the tracker is down, there is a warning, and the same command sends
    everything later.
    """
    if _write(folder) or not is_sent(folder):
        with _tracker(folder, read_results(folder), progress):
            pass


def _write(folder: Path) -> bool:
    """Write the report and the metrics of the results in a folder; return False if they are written already."""
    digest = hashlib.sha256(read_bytes(folder / FILE)).hexdigest()
    with contextlib.suppress(UserError):
        if read_json(folder / DIGEST) == digest:
            return False
    report(folder)
    rows = read_bytes(folder / METRICS) if exists(folder / METRICS) else b""
    row = {"step": rows.count(b"\n"), "time": time.time(), **_numbers(read_results(folder))}
    write_file(folder / METRICS, rows + f"{to_json(row)}\n".encode())
    write_json(folder / DIGEST, digest)
    return True


def _tracker(folder: Path, results: StudyResults, progress: Progress) -> Tracker:
    folder.mkdir(parents=True, exist_ok=True)
    tracked = TrackedRun(
        folder,
        results.title or folder.name,
        params={key: getattr(results, key) for key in ("file", "base", "seeds", "sample_seeds")},
        tags={"sitkit.kind": "study", f"sitkit.study.{folder.name}": "true"},
        patterns=STUDY_ARTIFACTS,
        children=_children(folder, results),
    )
    return Tracker(tracked, on_warning=lambda text: progress(Event("ablate", message=text)))


def _numbers(results: StudyResults) -> dict[str, float]:
    states = [cell.state for cell in results.cells]
    counts = {"cells/done": states.count("done"), "cells/failed": states.count("failed")}
    metric = "-".join(results.lower_is_better)
    return counts | {f"{metric}/{s.row}/{s.column or 'value'}": s.mean for s in results.estimates}


def _children(folder: Path, results: StudyResults) -> dict[Path, dict[str, Any]]:
    """Return the folders of the study's trainings, then of its cells, with the tags of each."""
    runs, tag = runs_of(folder, results), {f"sitkit.study.{folder.name}": "true"}
    trainings: dict[Path, dict[str, Any]] = {}
    cells: dict[Path, dict[str, Any]] = {}
    for cell in results.cells:
        if cell.run is None:
            continue
        trainings[runs / cell.run] = tag
        if cell.samples is not None:
            tags = {f"sitkit.{key}": str(getattr(cell, key)) for key in ("row", "column", "seed")}
            with contextlib.suppress(UserError):  # A link out of the run is not sent.
                cells[inside(RunFolder(runs / cell.run).samples, cell.samples)] = tag | tags
    return trainings | cells
