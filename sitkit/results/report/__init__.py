"""Reports: one HTML file about a run or a study, which opens from disk without a network."""

from __future__ import annotations

import datetime
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from sitkit.results.report.page import Page
from sitkit.results.report.run import run_page
from sitkit.results.report.study import study_page
from sitkit.results.study_results import find_study
from sitkit.runs.run_folder import find_run
from sitkit.runtime.files import write_file

REPORT = "report.html"


def report(target: str | Path = "latest", *, to: str | Path | None = None, runs: str | Path = "runs") -> Path:
    """Write one HTML file about a run or a study, and return its path.

    Args:
        target: a run by folder, name, identity or "latest"; a study by folder, file or name.
        to: the file of the page; by default report.html in the folder of the run or study.
        runs: the folder of runs.

    Returns:
        The path of the page.

    Raises:
        UserError: the target is neither a run nor a study.
    """
    study = find_study(target, Path(runs))
    folder = study or find_run(target, Path(runs))
    page = study_page(folder) if study else run_page(folder)
    path = Path(to) if to is not None else folder / REPORT
    write_file(path, html(page))
    return path


def html(page: Page) -> str:
    """Return the page with the version of sitkit and the date."""
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return replace(page, made={"sitkit": version("sitkit"), "written": today}).html()
