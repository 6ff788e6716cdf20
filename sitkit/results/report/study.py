"""The report of a study: its table as it was concluded, the numbers behind it, and what they look like."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sitkit.evaluation.plots import Curve
from sitkit.results.report.charts import Interval, intervals, lines
from sitkit.results.report.page import (
    Chart,
    Charts,
    Code,
    Facts,
    Notes,
    Page,
    PagePart,
    Section,
    Sheets,
    Table,
    Value,
    number,
)
from sitkit.results.report.run import (
    EQUAL_PLACES,
    Trained,
    environment_facts,
    forms_of,
    metric_name,
    needs_log_axis,
    nfe_chart,
    paths,
    read_training,
)
from sitkit.results.report.sample_sheets import MOST_SHEETS, data_sheet, sample_sheet
from sitkit.results.reproduce import evaluate_command
from sitkit.results.study_results import CellResult, StudyResults, read_results, runs_of
from sitkit.results.table import format_estimate, grid
from sitkit.runs.config.identity import label
from sitkit.runs.evaluate import Evaluation
from sitkit.runs.run_folder import RunFolder

MARKS: Mapping[str, Any] = {"best": "best", "close": "grey", "failed": "failed"}
MOST_CURVES = 8


def study_page(folder: Path) -> Page:
    """The page of the study whose results.json lies in a folder.  Raises UserError where it cannot be read."""
    results = read_results(folder)
    runs = runs_of(folder, results)
    records = {
        cell.evaluation: Evaluation.read(runs / cell.evaluation).record for cell in results.cells if cell.evaluation
    }
    trained = {name: read_training(runs / name) for name in _runs(results) if (RunFolder(runs / name).config).is_file()}
    columns = f" and {len(results.columns)} columns" if len(results.columns) > 1 else ""
    lead = (
        f"{len(results.rows)} rows{columns}, {len(results.cells)} cells from {len(_runs(results))} trainings, "
        f"{len(results.seeds)} training seed{'s' * (len(results.seeds) != 1)}. {results.source}"
    )
    sections = [
        Section("Summary", "", [Facts(_facts(results, records)), *_alarms(results)]),
        Section("Table", "As the study concluded it. Every heading sorts.", [_table(results), *_comparison(results)]),
        Section("Quality and cost", "Evaluations of the network for one sample.", _against_nfe(results)),
        Section("Samples", f"Of training seed {min(results.seeds, default=0)}. {EQUAL_PLACES}", _samples(results, runs, trained)),
        Section("Training", "Losses of different targets are in different units.", _losses(results, trained)),
        Section("Path", "Time runs from noise, t = 0, to data, t = 1.", _paths(trained, records)),
        Section("Failures", "", _failures(results)),
        Section("Every number", "Each with the command that makes it again.", [_numbers(results, runs, records)]),
        Section("Again", "", [Code("Run, or continue, the study", shlex.join(results.command))]),
        Section("Environment", "", _environment(records)),
    ]  # fmt: skip
    return Page(results.title or folder.name, "Study", lead, sections)


def _runs(results: StudyResults) -> list[str]:
    return list(dict.fromkeys(cell.run for cell in results.cells if cell.run))


def _facts(results: StudyResults, records: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    states = [cell.state for cell in results.cells]
    metrics = dict.fromkeys(metric_name(record) for record in records.values())
    sizes = sorted({cell.n for cell in results.cells if cell.n is not None})
    spent = sorted({cell.nfe for cell in results.cells if cell.nfe is not None})
    facts = {
        "cells done": f"{states.count('done')} of {len(states)}",
        "trainings": str(len(_runs(results))),
        "training seeds": ", ".join(map(str, results.seeds)),
        "metric": "; ".join(metrics) or "\u2013",
        "samples a cell": ", ".join(number(n) for n in sizes) or "\u2013",
        "evaluations a sample": ", ".join(number(n) for n in spent) or "\u2013",
    }
    for standing in results.estimates:
        if standing.standing in ("best", "lead"):
            words = "best" if standing.standing == "best" else "lowest mean" if _lower(results) else "highest mean"
            facts[f"{standing.column}: {words}" if standing.column else words] = (
                f"{standing.row}, {format_estimate(standing.mean, standing.stderr)}"
            )
    return facts


def _lower(results: StudyResults) -> bool:
    return all(results.lower_is_better.values())


def _alarms(results: StudyResults) -> list[Notes]:
    count = len(results.failures)
    todo = sum(cell.state == "todo" for cell in results.cells)
    said = [f"{count} of {len(results.cells)} cells have no number: see Failures."] if count else []
    said += [f"{todo} cells are still to be done: {shlex.join(results.command)} continues."] if todo else []
    return [Notes(said, alarm=True)] if said else []


def _table(results: StudyResults) -> Table:
    shown = grid(results)
    means = {(s.row, s.column): s.mean for s in results.estimates}
    rows = [
        [
            Value(row),
            *(
                Value(
                    cell.text or "\u2013",
                    means.get((row, "" if column == "value" else column), "" if column in results.columns else None),
                    MARKS.get(cell.mark, ""),
                    f"published {cell.reference}" if cell.reference else "",
                )
                for column, cell in zip(shown.columns, line, strict=True)
            ),
        ]
        for row, line in shown.rows
    ]
    numbers = {column or "value" for column in results.columns}
    columns = ["row", *(f"#{column}" if column in numbers else column for column in shown.columns)]
    return Table(
        results.title or "Results",
        columns,
        rows,
        [note.replace("In brackets: published numbers:", "Published:") for note in shown.notes],
    )


def _comparison(results: StudyResults) -> list[Charts]:
    """The table as dots with their errors, unless it is curves against evaluations."""
    if len(results.estimates) < 2 or _curves(results):
        return []
    values = [Interval(s.row, s.column, s.mean, s.stderr) for s in results.estimates]
    metric = "; ".join(results.lower_is_better)
    better = "Lower" if _lower(results) else "Higher"
    svg = intervals(values, label=f"{metric} of every row", xlabel=metric)
    return [Charts([Chart(svg, f"{metric} of every row", f"{better} is better; bars are standard errors.")])]


def _curves(results: StudyResults) -> dict[str, list[tuple[int, float, float | None]]]:
    """The points of each row whose columns differ in evaluations; none where columns differ in anything else."""
    spent = {(cell.row, cell.column): cell.nfe for cell in results.cells if cell.nfe is not None}
    curves: dict[str, list[tuple[int, float, float | None]]] = {}
    for s in results.estimates:
        nfe = spent.get((s.row, s.column))
        if nfe is not None:
            curves.setdefault(s.row, []).append((nfe, s.mean, s.stderr))
    rising = [len({nfe for nfe, *_ in points}) == len(points) > 1 for points in curves.values()]
    return {row: sorted(points) for row, points in curves.items()} if rising and all(rising) else {}


def _against_nfe(results: StudyResults) -> list[Charts]:
    curves, metric = _curves(results), "; ".join(results.lower_is_better)
    if not curves:
        return []
    better = "Lower" if _lower(results) else "Higher"
    charts = [
        Chart(
            nfe_chart(curves, metric),
            f"{metric} against evaluations",
            f"{better} is better; bars are standard errors over seeds.",
        )
    ]
    published: dict[str, list[tuple[int, float, float | None]]] = {}
    for cell in results.cells:
        point = (cell.nfe or 0, cell.reference.number, None) if cell.reference and cell.nfe else None
        if point and point not in published.setdefault(cell.row, []):
            published[cell.row].append(point)
    published = {row: sorted(points) for row, points in published.items() if points}
    if published:
        sources = "; ".join(dict.fromkeys(cell.reference.source for cell in results.cells if cell.reference))
        charts.append(Chart(nfe_chart(published, "published number"), "the published curves", sources))
    return [Charts(charts)]


def _firsts(results: StudyResults) -> Iterator[CellResult]:
    """The first seed's cell of every row and column."""
    seen = set()
    for cell in results.cells:
        if cell.state == "done" and (cell.row, cell.column) not in seen:
            seen.add((cell.row, cell.column))
            yield cell


def _samples(results: StudyResults, runs: Path, trained: Mapping[str, Trained]) -> list[PagePart]:
    cells = list(_firsts(results))
    shown: list[PagePart] = []
    sheets = [sheet for run in list(trained.values())[:1] if (sheet := data_sheet(run.config))]
    for cell in cells[:MOST_SHEETS]:
        folder = RunFolder(runs / (cell.run or "")).samples / (cell.samples or "")
        caption = f"{number(cell.value, 3)} at {cell.nfe} evaluations"
        title = f"{cell.row}, {cell.column}" if cell.column else cell.row
        if (folder / "record.json").is_file() and (sheet := sample_sheet(folder, title, caption)):
            sheets.append(sheet)
    if sheets:
        shown.append(Sheets(sheets))
    if len(cells) > MOST_SHEETS:
        shown.append(Notes([f"{len(cells) - MOST_SHEETS} more are in the folders of the runs."]))
    return shown


def _losses(results: StudyResults, trained: Mapping[str, Trained]) -> list[Charts]:
    """The loss of one training for each model, named by the first row that uses it."""
    named: dict[str, Trained] = {}
    for cell in _firsts(results):
        run = trained.get(cell.run or "")
        if run is not None and run not in named.values():
            named.setdefault(cell.row, run)
    curves = []
    for name, run in list(named.items())[:MOST_CURVES]:
        points = [(row["step"], row["loss"]) for row in run.rows if isinstance(row.get("loss"), float)]
        if len(points) > 1:
            curves.append(Curve(name, [s for s, _ in points], [v for _, v in points]))
    if not curves:
        return []
    logarithmic = needs_log_axis([float(v) for curve in curves for v in curve.values])
    svg = lines(curves, label="training losses", xlabel="training step", ylabel="loss", logy=logarithmic)
    seed = min(results.seeds, default=0)
    return [Charts([Chart(svg, "loss", f"Training seed {seed}.")])]


def _paths(trained: Mapping[str, Trained], records: Mapping[str, Mapping[str, Any]]) -> list[Charts]:
    by_path: dict[str, tuple[Trained, list[Mapping[str, Any]]]] = {}
    for record in records.values():
        run = trained.get(record["run"])
        if run is not None:
            by_path.setdefault(label(run.config.interp), (run, []))[1].append(record)
    charts: list[Chart] = []
    for run, of_path in by_path.values():
        charts += [c for part in paths([run.config], forms_of(run, of_path)) for c in part.charts]
    return [Charts(charts)] if charts else []


def _failures(results: StudyResults) -> list[Table]:
    words = {"refused": "impossible", "failed": "went wrong"}
    rows = [
        [
            Value(cell.row),
            Value(cell.column),
            Value(number(cell.seed), cell.seed),
            Value(words[cell.state], mark="failed"),
            Value(cell.failure or ""),
            Value(cell.log or "\u2013"),
        ]
        for cell in results.failures
    ]
    return [Table("Cells without a number", ("row", "column", "#seed", "state", "reason", "log"), rows)] if rows else []


def _numbers(results: StudyResults, runs: Path, records: Mapping[str, Mapping[str, Any]]) -> Table:
    several = len(results.sample_seeds) > 1
    rows = []
    for cell in results.cells:
        record = records.get(cell.evaluation or "")
        rows.append([
            Value(cell.row), Value(cell.column), Value(number(cell.seed), cell.seed),
            *([Value(number(cell.sample_seed), cell.sample_seed)] if several else []),
            Value(number(cell.value) if cell.state == "done" else cell.state, cell.value if cell.value is not None else "",
                  "failed" if cell.state in ("failed", "refused") else ""),
            Value(number(cell.stderr, 2), cell.stderr), Value(number(cell.halves), cell.halves), Value(number(cell.n), cell.n),
            Value(number(cell.nfe), cell.nfe),
            Value("command", code=evaluate_command(runs / str(cell.run), record)) if record else Value("\u2013"),
        ])  # fmt: skip
    columns = [
        "row",
        "column",
        "#seed",
        *(["#sampling seed"] if several else []),
        "#value",
        "#error",
        "#halves",
        "#n",
        "#NFE",
        "again",
    ]
    notes = ["error: standard error over the samples of the cell.  halves: the same metric between two random halves of the data.",
             *dict.fromkeys(note for record in records.values() for note in record["notes"])]  # fmt: skip
    return Table(f"All {len(rows)} cells", columns, rows, notes, folded=len(rows) > 24)


def _environment(records: Mapping[str, Mapping[str, Any]]) -> Sequence[PagePart]:
    first = next(iter(records.values()), None)
    return [Facts(environment_facts(first["environment"]))] if first else []
