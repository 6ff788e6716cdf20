"""The results of a study on disk: studies/<name>/results.json, from which table.csv, .md and .tex are made.

    title, source, file, base          of the study as it was read; base is null for the base in the file
    command                            the words of the command, for the folder in which it was started
    runs                               the folder of runs, relative to the folder of results.json
    rows, columns                      their names in the order of the file
    seeds, sample_seeds                every training and sampling seed of the cells
    show                               the columns of the printed tables, if not all columns
    lower_is_better                    for each metric of the cells
    notes                              sentences for the reader: metric, size, and how the references were measured
    cells                              a cell for each row, column, training seed and sampling seed:
        row, column, seed, sample_seed
        reference                      {number, source, setting}, or null
        metric
        state                          "done", "failed" (with an error), "refused" (impossible), "todo"
        run                            folder within `runs`
        samples                        the identity of the samples: the folder <run>/samples/<samples>
        evaluation                     path within `runs` of the record of the number; null until it exists
        value, stderr, real            the number, its error within the cell, and the metric of n real examples
        n, nfe                         samples, and network evaluations per sample
        failure, log                   reason, and the log of the task within `runs`; null without a failure
        shown                          the settings in `show`, as text
    estimates                          an `Estimate` for each row and column with a number

In a refused cell seed and sample_seed are null. A number that is not finite is the string "NaN", "Infinity" or
"-Infinity".
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field

from sitkit.results.statistics import Estimate, Ranking, SeedPair, estimate, rank
from sitkit.runs.config.records import PathWithin, PlainName
from sitkit.runs.config.schema import Settings
from sitkit.runs.config.sources import validate
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name, inside, read_json, to_json, update_file

FILE, STUDIES = "results.json", "studies"


class PublishedNumber(Settings):
    """A published number, its source, and the settings that it was measured with."""

    number: float
    source: str
    setting: dict[str, Any]


class CellResult(Settings):
    """A cell of a study, with its number if it is done."""

    row: str
    column: str
    seed: int | None
    sample_seed: int | None
    reference: PublishedNumber | None = None
    metric: str = ""
    state: Literal["done", "failed", "refused", "todo"]
    run: PlainName | None = None
    samples: PlainName | None = None
    evaluation: PathWithin | None = None
    value: float | None = None
    stderr: float | None = None
    real: float | None = Field(default=None, validation_alias=AliasChoices("real", "halves"))
    n: int | None = None
    nfe: int | None = None
    failure: str | None = None
    log: PathWithin | None = None
    shown: dict[str, str] = {}


class StudyResults(Settings):
    """The results of a study: its cells and the estimates of its rows."""

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
    estimates: tuple[Estimate, ...] = ()

    @property
    def failures(self) -> list[CellResult]:
        """The cells that failed or were refused."""
        return [cell for cell in self.cells if cell.state in ("failed", "refused")]


def numbers_by_seed(cells: list[CellResult]) -> dict[SeedPair, Estimate]:
    """Return the numbers of the cells that are done."""
    return {
        (cell.seed or 0, cell.sample_seed or 0): Estimate(cell.value, cell.stderr)
        for cell in cells
        if cell.state == "done" and cell.value is not None
    }


def ranked(cells: dict[str, list[CellResult]], lower_is_better: dict[str, bool]) -> Ranking | None:
    """Return how the rows compare; None unless the cells that are done have the same metric."""
    metrics = {cell.metric for group in cells.values() for cell in group if cell.state == "done"}
    if len(metrics) != 1:
        return None
    return rank({row: numbers_by_seed(group) for row, group in cells.items()}, lower_is_better[metrics.pop()])


def with_estimates(results: StudyResults) -> StudyResults:
    """Return the results with the estimates of every row and column."""
    columns: dict[str, dict[str, list[CellResult]]] = {column: {} for column in results.columns}
    for cell in results.cells:
        columns[cell.column].setdefault(cell.row, []).append(cell)
    rankings = {column: ranked(rows, results.lower_is_better) for column, rows in columns.items()}
    estimates = []
    for row, column in itertools.product(results.rows, results.columns):
        ranking, numbers = rankings[column], numbers_by_seed(columns[column].get(row, []))
        if numbers:
            place = {"row": row, "column": column, "standing": ranking.standing(row) if ranking else ""}
            estimates.append(dataclasses.replace(estimate(numbers), **place))
    return results.model_copy(update={"estimates": tuple(estimates)})


def write_results(folder: Path, results: StudyResults) -> Path:
    """Write results.json in the folder of a study, and return its path."""
    path = folder / FILE
    update_file(path, to_json(results.model_dump(), indent=2) + "\n")
    return path


def read_results(path: Path | str) -> StudyResults:
    """Return the results in a file or in the folder of a study. Raises UserError that names the file and the error."""
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    values = read_json(file)
    try:
        return validate(StudyResults, values, {})
    except UserError as error:
        raise UserError(f"{file} is not the results of a study: {error}") from None


def evaluation_of(runs: Path, cell: CellResult) -> Path:
    """Return the file of a cell's number in the folder of runs.  Raises UserError if a link leads out of its run."""
    run, _, rest = str(cell.evaluation).partition("/")
    return inside(runs / run, rest)


def runs_of(path: Path | str, results: StudyResults) -> Path:
    """Return the folder of runs of the results in a file or folder."""
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    return Path(os.path.normpath(folder / results.runs))


def find_study(target: str | Path, root: Path) -> Path | None:
    """Return the folder of a study by folder, file or name; None if there is no such study."""
    name = Path(target)
    studies = root.parent / STUDIES
    for folder in (name, *(studies / file_name(text) for text in (name.name, name.stem))):
        if (folder / FILE).is_file():
            return folder
    if name.suffix in (".yaml", ".yml") and name.is_file():
        raise UserError(f"{name} has no results in {studies} yet: sitkit ablate {name} computes them.")
    return None


# The names that `show` may have beside columns and settings.
FACTS = ("n", "nfe")
