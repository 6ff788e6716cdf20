"""The report of a study: its table, the numbers behind the table, and samples."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sitkit.results.report.charts import interval_chart
from sitkit.results.report.figures import CostPoint, cost_chart, path_charts, training_charts, training_curve
from sitkit.results.report.page import Chart, Charts, Code, Facts, Notes, Page, PagePart, Section, Table
from sitkit.results.report.run import (
    EQUAL_PLACES,
    REAL,
    TrainingRecord,
    environment_facts,
    metric_name,
    notes_on_left_out,
    read_evaluations,
    read_training,
)
from sitkit.results.report.sample_sheets import MAX_SHEETS, sample_parts
from sitkit.results.reproduce import evaluate_command
from sitkit.results.study_results import CellResult, StudyResults, evaluation_of, read_results, runs_of
from sitkit.results.table import TableCell, format_estimate, grid, number, number_cell
from sitkit.runs.config.identity import label
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample_set import RECORD
from sitkit.runtime.errors import LeftOut
from sitkit.runtime.files import exists, inside

MAX_CURVES = 8
Records = Mapping[str, Mapping[str, Any]]


def study_page(folder: Path) -> Page:
    """Return the page of the study in a folder. Raises UserError if its results.json cannot be read."""
    results = read_results(folder)
    runs = runs_of(folder, results)
    broken, trainings = LeftOut(), {}
    files: dict[Path, str] = {}
    for cell in results.cells:
        with broken.noting():
            if cell.evaluation:
                files[evaluation_of(runs, cell)] = cell.evaluation
    records = {files[path]: record for path, record in read_evaluations(files, broken).items()}
    names = list(dict.fromkeys(cell.run for cell in results.cells if cell.run))
    for name in names:
        with broken.noting():
            if exists(RunFolder(runs / name).config):
                trainings[name] = read_training(runs / name, broken)
    columns = f" and {len(results.columns)} columns" if len(results.columns) > 1 else ""
    lead = (
        f"{len(results.rows)} rows{columns}, {len(results.cells)} cells from {len(names)} trainings, "
        f"{len(results.seeds)} training seed{'s' * (len(results.seeds) != 1)}. {results.source}"
    )
    seed = min(results.seeds, default=0)
    samples, paths = _samples(results, runs, trainings, broken), _paths(trainings, records, broken)
    summary = [Facts(_facts(results, records, len(names))), *_alarms(results), *notes_on_left_out(broken)]
    sections = [
        Section("Summary", "", summary),
        Section(
            "Table", "The results of the study. Click a heading to sort.", [_table(results), *_comparison(results)]
        ),
        Section("Quality and cost", "Evaluations of the network for one sample.", _costs(results)),
        Section("Samples", f"Of training seed {seed}. {EQUAL_PLACES}", samples),
        Section("Training", "Losses of different targets have different units.", _losses(results, trainings, seed)),
        Section("Path", "Time runs from noise, t = 0, to data, t = 1.", paths),
        Section("Failures", "", _failures(results)),
        Section("Every number", "Each with the command that reproduces it.", [_numbers(results, runs, records)]),
        Section("Again", "", [Code("Run or continue the study", shlex.join(results.command))]),
        Section("Environment", "", [Facts(environment_facts(r["environment"])) for r in list(records.values())[:1]]),
    ]
    return Page(results.title or folder.name, "Study", lead, sections)


def _facts(results: StudyResults, records: Records, trainings: int) -> dict[str, str]:
    states = [cell.state for cell in results.cells]
    metrics = dict.fromkeys(metric_name(record) for record in records.values())
    sizes = sorted({cell.n for cell in results.cells if cell.n is not None})
    costs = sorted({cell.nfe for cell in results.cells if cell.nfe is not None})
    facts = {
        "cells done": f"{states.count('done')} of {len(states)}",
        "trainings": str(trainings),
        "training seeds": ", ".join(map(str, results.seeds)),
        "metric": "; ".join(metrics) or "\u2013",
        "samples a cell": ", ".join(map(number, sizes)) or "\u2013",
        "evaluations a sample": ", ".join(map(number, costs)) or "\u2013",
    }
    for estimate in results.estimates:
        if estimate.standing in ("best", "lead"):
            lead = "lowest mean" if _better(results) == "Lower" else "highest mean"
            words = "best" if estimate.standing == "best" else lead
            name = f"{estimate.column}: {words}" if estimate.column else words
            facts[name] = f"{estimate.row}, {format_estimate(estimate.mean, estimate.stderr)}"
    return facts


def _better(results: StudyResults) -> str:
    return "Lower" if all(results.lower_is_better.values()) else "Higher"


def _alarms(results: StudyResults) -> list[Notes]:
    count = len(results.failures)
    todo = sum(cell.state == "todo" for cell in results.cells)
    messages = [f"{count} of {len(results.cells)} cells have no number: see Failures."] if count else []
    messages += [f"{todo} cells are not done: {shlex.join(results.command)} continues."] if todo else []
    return [Notes(messages, alarm=True)] if messages else []


def _table(results: StudyResults) -> Table:
    table = grid(results)
    rows = [
        [TableCell(row), *(cell if cell.text else cell._replace(text="\u2013") for cell in line)]
        for row, line in table.rows
    ]
    numbers = {column or "value" for column in results.columns}
    columns = ["row", *(f"#{column}" if column in numbers else column for column in table.columns)]
    notes = [note.replace("In brackets: published numbers:", "Published:") for note in table.notes]
    return Table(results.title or "Results", columns, rows, notes)


def _comparison(results: StudyResults) -> list[Charts]:
    """The table as dots with their errors, unless it is shown as curves against the cost."""
    if len(results.estimates) < 2 or _cost_curves(results):
        return []
    metric = "; ".join(results.lower_is_better)
    svg = interval_chart(results.estimates, label=f"{metric} of every row", xlabel=metric)
    caption = f"{_better(results)} is better; bars are standard errors."
    return [Charts([Chart(svg, f"{metric} of every row", caption)])]


def _cost_curves(results: StudyResults) -> dict[str, list[CostPoint]]:
    """The points of each row if its columns differ in the number of evaluations; else none."""
    costs = {(cell.row, cell.column): cell.nfe for cell in results.cells if cell.nfe is not None}
    curves: dict[str, list[CostPoint]] = {}
    for estimate in results.estimates:
        nfe = costs.get((estimate.row, estimate.column))
        if nfe is not None:
            curves.setdefault(estimate.row, []).append((nfe, estimate.mean, estimate.stderr))
    distinct = [len({nfe for nfe, *_ in points}) == len(points) > 1 for points in curves.values()]
    return curves if all(distinct) else {}


def _costs(results: StudyResults) -> list[Charts]:
    curves = _cost_curves(results)
    if not curves:
        return []
    caption = f"{_better(results)} is better; bars are standard errors over seeds."
    charts = [cost_chart(curves, "; ".join(results.lower_is_better), caption=caption)]
    published: dict[str, set[CostPoint]] = {}
    for cell in results.cells:
        if cell.reference and cell.nfe:
            published.setdefault(cell.row, set()).add((cell.nfe, cell.reference.number, None))
    if published:
        sources = "; ".join(dict.fromkeys(cell.reference.source for cell in results.cells if cell.reference))
        charts.append(cost_chart(published, "published number", "the published curves", sources))
    return [Charts(charts)]


def _firsts(results: StudyResults) -> list[CellResult]:
    """The first cell that is done of every row and column."""
    first: dict[tuple[str, str], CellResult] = {}
    for cell in results.cells:
        if cell.state == "done":
            first.setdefault((cell.row, cell.column), cell)
    return list(first.values())


def _samples(
    results: StudyResults, runs: Path, trainings: Mapping[str, TrainingRecord], broken: LeftOut
) -> list[PagePart]:
    cells = _firsts(results)
    samples = []
    for cell in cells[:MAX_SHEETS]:
        with broken.noting():
            folder = inside(RunFolder(runs / (cell.run or "")).samples, cell.samples or "")
            if (folder / RECORD).is_file():
                caption = f"{number(cell.value, 3)} at {cell.nfe} evaluations"
                samples.append((folder, f"{cell.row}, {cell.column}" if cell.column else cell.row, caption))
    config = next((training.config for training in trainings.values()), None)
    return sample_parts(config, samples, len(cells), "are in the folders of the runs.", broken)


def _losses(results: StudyResults, trainings: Mapping[str, TrainingRecord], seed: int) -> list[Charts]:
    """The loss of one training for each model, named by the first row that uses it."""
    named: dict[str, TrainingRecord] = {}
    for cell in _firsts(results):
        training = trainings.get(cell.run or "")
        if training is not None and training not in named.values():
            named.setdefault(cell.row, training)
    curves = [training_curve(name, training.rows, "loss") for name, training in list(named.items())[:MAX_CURVES]]
    charts = training_charts(curves, "loss", f"Training seed {seed}.")
    return [Charts(charts)] if charts else []


def _paths(trainings: Mapping[str, TrainingRecord], records: Records, broken: LeftOut) -> list[Charts]:
    by_path: dict[str, tuple[TrainingRecord, list[Mapping[str, Any]]]] = {}
    for record in records.values():
        training = trainings.get(record["run"])
        if training is not None:
            by_path.setdefault(label(training.config.interp), (training, []))[1].append(record)
    groups = by_path.values()
    charts = [c for training, group in groups for c in path_charts(training.folder, training.config, group, broken)]
    return [Charts(charts)] if charts else []


def _failures(results: StudyResults) -> list[Table]:
    words = {"refused": "impossible", "failed": "failed"}
    rows = [
        {
            "row": TableCell(cell.row),
            "column": TableCell(cell.column),
            "#seed": number_cell(cell.seed),
            "state": TableCell(words[cell.state], mark="failed"),
            "reason": TableCell(cell.failure or ""),
            "log": TableCell(cell.log or "\u2013"),
        }
        for cell in results.failures
    ]
    return [Table.of("Cells without a number", rows)] if rows else []


def _numbers(results: StudyResults, runs: Path, records: Records) -> Table:
    several = len(results.sample_seeds) > 1
    rows = [
        {
            "row": TableCell(cell.row),
            "column": TableCell(cell.column),
            "#seed": number_cell(cell.seed),
            **({"#sampling seed": number_cell(cell.sample_seed)} if several else {}),
            "#value": _value(cell),
            "#error": number_cell(cell.stderr, 2),
            "#real": number_cell(cell.real),
            "#n": number_cell(cell.n),
            "#NFE": number_cell(cell.nfe),
            "again": _command(cell, runs, records),
        }
        for cell in results.cells
    ]
    caveats = dict.fromkeys(note for record in records.values() for note in record["notes"])
    notes = [f"error: standard error over the samples of the cell.  {REAL}", *caveats]
    return Table.of(f"All {len(rows)} cells", rows, notes, folded=len(rows) > 24)


def _value(cell: CellResult) -> TableCell:
    if cell.state == "done":
        return number_cell(cell.value)
    return TableCell(cell.state, "", "failed" if cell.state in ("failed", "refused") else "")


def _command(cell: CellResult, runs: Path, records: Records) -> TableCell:
    record = records.get(cell.evaluation or "")
    return TableCell("command", code=evaluate_command(runs / str(cell.run), record)) if record else TableCell("\u2013")
