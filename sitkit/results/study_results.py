"""What a study leaves on disk: studies/<name>/results.json, and table.csv, .md and .tex made from it.

    title, source, file, base          of the study as it was read; base is null for the file's own
    command                            the words that do it again, where it was started
    runs                               the folder of runs, relative to the folder of results.json
    rows, columns                      their names in the order of the file
    seeds, sample_seeds                every training and sampling seed of the cells
    show                               what the printed tables show beside or instead of all columns
    lower_is_better                    for each metric of the cells
    notes                              what a reader must know: metric, size, and how the references' setting differs
    cells                              one for each row, column, training seed and sampling seed:
        row, column, seed, sample_seed
        reference                      {number, source, setting}, or null
        metric
        state                          "done", "failed" (tried, went wrong), "refused" (impossible), "todo"
        run                            folder within `runs`
        samples                        their identity: the folder <run>/samples/<samples>
        evaluation                     path within `runs` of the number's own record, null until it is there
        value, stderr, halves          the number, its error within the cell, and real data's own score
        n, nfe                         samples, network evaluations a sample
        failure, log                   reason, and the log of the task within `runs`; null where nothing went wrong
        shown                          the settings that `show` names, as text
    estimates                          one for each row and column with a number: {row, column, mean, stderr, low, high,
                                       units, of, standing}; units of `of` ("training
                                       seeds", ...) were repeated; standing is "best" (better than every other row of the
                                       column), "close" (not distinguishable from the column's best), "lead" (the
                                       column's best by its mean alone), or ""

A refused cell has no seeds of its own: seed and sample_seed are null.  A number that is not finite is the string "NaN",
"Infinity" or "-Infinity".
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any, Literal

from sitkit.results.statistics import CellValue, Ranking, estimate, rank
from sitkit.runs.config.schema import Settings
from sitkit.runs.config.sources import validate
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name, read_json, to_json, update_file

FILE, STUDIES = "results.json", "studies"


class ReferenceNumber(Settings):
    """A published number, where it was published, and what it was measured with."""

    number: float
    source: str
    setting: dict[str, Any]


class CellResult(Settings):
    """A cell and what is known of its number."""

    row: str
    column: str
    seed: int | None
    sample_seed: int | None
    reference: ReferenceNumber | None = None
    metric: str = ""
    state: Literal["done", "failed", "refused", "todo"]
    run: str | None = None
    samples: str | None = None
    evaluation: str | None = None
    value: float | None = None
    stderr: float | None = None
    halves: float | None = None
    n: int | None = None
    nfe: int | None = None
    failure: str | None = None
    log: str | None = None
    shown: dict[str, str] = {}


class RowEstimate(Settings):
    """The mean of a row in a column over its seeds, its interval, and how it stands among the rows."""

    row: str
    column: str
    mean: float
    stderr: float | None
    low: float
    high: float
    units: int
    of: str
    standing: Literal["best", "close", "lead", ""]


class StudyResults(Settings):
    """A study's cells and what is known of them."""

    title: str
    source: str
    file: str
    base: str | None
    command: tuple[str, ...]
    runs: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    seeds: tuple[int, ...]
    sample_seeds: tuple[int, ...]
    show: tuple[str, ...] = ()
    lower_is_better: dict[str, bool] = {}
    notes: tuple[str, ...] = ()
    cells: tuple[CellResult, ...]
    estimates: tuple[RowEstimate, ...] = ()

    @property
    def failures(self) -> list[CellResult]:
        """The cells that went wrong or cannot be."""
        return [cell for cell in self.cells if cell.state in ("failed", "refused")]

    def of(self, row: str, column: str) -> list[CellResult]:
        """The cells of a row and column, seeds in order."""
        return [cell for cell in self.cells if (cell.row, cell.column) == (row, column)]


def cell_values(cells: list[CellResult]) -> list[CellValue]:
    """The numbers that are there."""
    return [
        CellValue(cell.seed or 0, cell.sample_seed or 0, cell.value, cell.stderr)
        for cell in cells
        if cell.state == "done" and cell.value is not None
    ]


def ranked(cells: dict[str, list[CellResult]], lower_is_better: dict[str, bool]) -> Ranking | None:
    """How rows with these cells compare; None where they have no numbers of one metric to compare."""
    metrics = {cell.metric for group in cells.values() for cell in group if cell.state == "done"}
    if len(metrics) != 1:
        return None
    return rank({row: cell_values(group) for row, group in cells.items()}, lower_is_better[metrics.pop()])


def with_estimates(results: StudyResults) -> StudyResults:
    """The results with means, errors and standings."""
    columns: dict[str, dict[str, list[CellResult]]] = {column: {} for column in results.columns}
    for cell in results.cells:
        columns[cell.column].setdefault(cell.row, []).append(cell)
    order = {column: ranked(rows, results.lower_is_better) for column, rows in columns.items()}
    told = []
    for row, column in itertools.product(results.rows, results.columns):
        numbers = cell_values(columns[column].get(row, []))
        if numbers:
            standing = _standing(order[column], row)
            told.append(RowEstimate(row=row, column=column, standing=standing, **estimate(numbers)._asdict()))
    return results.model_copy(update={"estimates": tuple(told)})


def _standing(order: Ranking | None, row: str) -> Literal["best", "close", "lead", ""]:
    if order is None:
        return ""
    if row == order.best:
        return "best" if order.significant else "lead"
    return "close" if row in order.close else ""


def write_results(folder: Path, results: StudyResults) -> Path:
    """results.json in a study's folder."""
    path = folder / FILE
    update_file(path, to_json(results.model_dump(), indent=2) + "\n")
    return path


def read_results(path: Path | str) -> StudyResults:
    """The results in a file or in a study's folder.  Raises UserError that names the file and what is wrong with it."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    told = read_json(file)
    try:
        return validate(StudyResults, told, {})
    except UserError as error:
        raise UserError(f"{file} is not the results of a study: {error}") from None


def runs_of(path: Path | str, results: StudyResults) -> Path:
    """The folder of runs that results.json, or its folder, speaks of."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return Path(os.path.normpath(folder / results.runs))


def find_study(target: str | Path, root: Path) -> Path | None:
    """The folder of a study by folder, by its file, or by name; None where there is none."""
    name = Path(target)
    studies = root.parent / STUDIES
    for folder in (name, *(studies / file_name(text) for text in (name.name, name.stem))):
        if (folder / FILE).is_file():
            return folder
    if name.suffix in (".yaml", ".yml") and name.is_file():
        raise UserError(f"{name} has no results in {studies} yet: sitkit ablate {name} makes them.")
    return None


# What `show` may name beside columns and settings.
FACTS = ("n", "nfe")
