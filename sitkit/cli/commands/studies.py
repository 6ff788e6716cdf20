"""Commands on studies: check, ablate, search."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.console import short
from sitkit.cli.interrupt import resumable
from sitkit.registry.settings_files import experiments
from sitkit.runtime.errors import UserError, suggest

if TYPE_CHECKING:
    from sitkit.results.study_results import StudyResults
    from sitkit.results.table import Grid
    from sitkit.studies.check import CellForecast, CheckReport
    from sitkit.studies.cost import Cost
    from sitkit.studies.executors import Executor
    from sitkit.studies.status import StudyStatus
    from sitkit.studies.study import Refused


BASE = typer.Option(None, "--base", help="A preset or file in place of the study's own base.")


@app.command()
@options.grouped
def ablate(
    *,
    file: Path = typer.Argument(
        metavar="FILE",
        help="A study, as experiments/table6.yaml, or an experiment's name (`sitkit list experiments`).",
        autocompletion=options.complete(experiments),
    ),
    base: str | None = BASE,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print cells and trainings, do nothing."),
    keep_going: bool = typer.Option(False, "--keep-going", "-k", help="Do the other cells if some are impossible."),
    seeds: options.SeedOptions,
    executor: str = typer.Option(
        "local",
        "--executor",
        rich_help_panel=options.RUNNING,
        metavar="local|ray|ray://HOST:PORT",
        help="Where the work is done: on this machine; on the Ray cluster of RAY_ADDRESS or of this machine, which is "
        "started if none runs; or on the named cluster.",
    ),
    workers: int | None = options.running_option(
        "--workers",
        min=1,
        help="Number of processes; the GPUs are divided among them.",
        show_default="1; on Ray as many as fit",
    ),
    cpus: float | None = options.running_option("--cpus", min=0, help="CPUs of a task on Ray.", show_default="1"),
    gpus: float | None = options.running_option(
        "--gpus", min=0, help="GPUs of a task on Ray.", show_default="1 if the cluster has any"
    ),
    changed_plugin: str | None = options.CHANGED_PLUGIN,
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Train and measure every cell of a study; the same command again continues.

    Several processes that run it on one folder at the same time divide the work.
    """
    from sitkit.results.study_results import FILE, runs_of
    from sitkit.results.table import grid
    from sitkit.studies.ablate import run_study, study_status

    arguments = {"base": base, "settings": running.training_settings(), **seeds.arguments()}
    if dry_run:
        _print_status(study_status(file, keep_going, **arguments), json)
        return
    from sitkit.cli.live import live_view

    with resumable(), live_view() as (progress, attach):
        jobs = _executor(executor, workers, cpus, gpus)
        arguments |= {"keep_going": keep_going, "executor": jobs, "changed_plugin": changed_plugin}
        outcome = run_study(file, progress=progress, attach=attach, **arguments)
    results = outcome.results
    if json:
        console.as_json(results.model_dump() | {"path": outcome.folder / FILE})
    else:
        print_table(grid(results))
        console.facts(table=f"{outcome.folder / 'table.csv'}   table.md   table.tex")
    print_failures(results, runs_of(outcome.folder, results))


def _print_status(status: StudyStatus, json: bool) -> None:
    """Print the cells of a study and what of each is on disk."""
    rows = [
        (c.number, c.row, c.column, c.seed, c.sample_seed, c.run, c.state if c.state in ("measured", "trained") else "")
        for c in status.cells()
    ]
    names = ("cell", "row", "column", "seed", "sample_seed", "run", "state")
    if json:
        return console.as_json([dict(zip(names, row, strict=True)) for row in rows])
    cells = [(*row[:3], f"{row[3]}, {row[4]}", *row[5:]) for row in rows]
    console.table(("cell", "row", "column", "seeds", "run", "state"), cells)
    console.say(f"{len(rows)} cells from {len(status.trainings())} trainings")


def _executor(name: str, workers: int | None, cpus: float | None, gpus: float | None) -> Executor:
    from sitkit.studies.executors import InProcess, Local, Ray

    if name == "ray" or name.startswith("ray://"):
        return Ray(None if name == "ray" else name, 1 if cpus is None else cpus, gpus, workers)
    if name != "local":
        raise UserError(
            f"--executor {name}: no such executor.{suggest(name, ['local', 'ray'])} Known: local, ray, ray://HOST:PORT."
        )
    for flag, value in (("--cpus", cpus), ("--gpus", gpus)):
        if value is not None:
            raise UserError(
                f"{flag} {value:g} belongs to --executor ray; --executor local divides the CPUs and GPUs of this machine."
            )
    return InProcess() if workers in (None, 1) else Local(workers)


STYLES = {"best": "bold green", "close": "dim", "failed": "red"}


def print_table(table: Grid) -> None:
    """Print the table of a study.

    A value that is significantly the best is bold, a value that cannot be distinguished from the best is dim, and a
    failed cell is red.
    """
    from rich.text import Text

    rows = []
    for row, line in table.rows:
        cells: list[object] = [row]
        for shown in line:
            text = Text(shown.text, style=STYLES.get(shown.mark, ""))
            cells.append(text.append(f" [{shown.reference}]", style="not bold cyan") if shown.reference else text)
        rows.append(cells)
    console.table(("", *table.columns), rows, table.title, table.notes)


def print_failures(results: StudyResults, runs: Path) -> None:
    """Print each failed cell and its log in the folder of runs on standard error.  Exit with status 1 if a cell failed."""
    for cell in results.failures:
        where = ", ".join(filter(None, (cell.row, cell.column)))
        message = f"{where}, seed {cell.seed}: {cell.failure} Log: {runs / str(cell.log)}"
        console.error(cell.failure if cell.state == "refused" else message)
    if results.failures:
        raise typer.Exit(1)


FIGURES = (
    "weights: parameters; FLOPs: of one evaluation for one sample; training, sampling: memory on one device; "
    "run, samples: on disk, of a run's checkpoints and of a cell"
)


@app.command()
@options.grouped
def check(
    *,
    file: str = typer.Argument(metavar="FILE", help="A study; or a configuration, a preset, a run's folder."),
    base: str | None = BASE,
    seeds: options.SeedOptions,
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Show what each cell will do and cost, and what is done already; exit 2 if a cell is impossible.  Nothing is computed."""

    report = sitkit.check(file, base=base, settings=running.training_settings(), **seeds.arguments())
    if json:
        console.as_json(report)
    else:
        _print_checked(report)
    _print_refused(report.refused)
    if report.refused:
        raise typer.Exit(2)


def _print_checked(report: CheckReport) -> None:
    from sitkit.transport.interval import weight_note

    solves: defaultdict[tuple[Any, ...], list[CellForecast]] = defaultdict(list)
    costs: defaultdict[tuple[str, ...], list[CellForecast]] = defaultdict(list)
    for cell in report.cells:
        solves[cell.row, cell.column, cell.times, cell.nfe].append(cell)
        costs[_cost(cell.cost)].append(cell)
    reasons = [reason for cell in report.cells for reason in cell.singular]
    marks = {reason: f"({number})" for number, reason in enumerate(dict.fromkeys(reasons), 1)}
    rows = []
    for (row, column, (t0, t1), nfe), cells in solves.items():
        times = " ".join([f"{t0:.3g} to {t1:.4g}", *(marks[reason] for reason in cells[0].singular)])
        rows.append((_range(cells), row, column, times, "adaptive" if nfe is None else nfe, _states(cells)))
    if not rows:
        return
    notes = [f"{mark} {reason}" for reason, mark in marks.items()]
    console.table(("cell", "row", "column", "t", "NFE", "state"), rows, notes=notes)
    for t0, t1 in dict.fromkeys(cell.training for cell in report.cells if cell.training != (0.0, 1.0)):
        console.say(f"trained on t from {t0:.6g} to {t1:.6g}: target or weight is singular beyond")
    for note in filter(None, dict.fromkeys(weight_note(*cell.largest_weight) for cell in report.cells)):
        console.say(note)
    console.say("")
    rows = [(_range(cells), *cost) for cost, cells in costs.items()]
    names = ("cell", "states", "weights", "FLOPs", "training", "sampling", "run", "samples")
    console.table(names, rows, notes=[FIGURES])
    work = "" if report.flops is None else f", {scaled(report.flops, 'FLOPs')}"
    console.say(
        f"to do: {report.trainings[1]} of {report.trainings[0]} trainings, {report.measurements[1]} of "
        f"{report.measurements[0]} measurements{work}, {scaled(report.disk, 'B')} on disk"
    )


def _range(cells: list[CellForecast]) -> str:
    """Return the numbers of cells as intervals, as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(cell.number for cell in cells):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _print_refused(refused: list[Refused]) -> None:
    """Print each reason once, with the number of cells that it makes impossible."""
    from sitkit.studies.study import refused_at

    causes: defaultdict[str, list[Refused]] = defaultdict(list)
    for cell in refused:
        which = refused_at("", cell.row, cell.column, "")
        causes[cell.reason.rpartition(which)[2] if which else cell.reason].append(cell)
    for cells in causes.values():
        more = f" The same for {len(cells) - 1} more of the cells." if len(cells) > 1 else ""
        console.error(f"{cells[0].reason}{more}")


def _states(cells: list[CellForecast]) -> str:
    words = [cell.state if cell.state != "begun" else f"at step {cell.step}" for cell in cells]
    return ", ".join(word if len(cells) == 1 else f"{count} {word}" for word, count in Counter(words).items())


def _cost(cost: Cost) -> tuple[str, ...]:
    memory = [
        scaled(size, "B") for size in (cost.training_memory, cost.sampling_memory, cost.checkpoints, cost.samples)
    ]
    return "x".join(map(str, cost.shape)), scaled(cost.parameters), scaled(cost.flops), *memory


def scaled(count: int | None, unit: str = "") -> str:
    """Return a count with a prefix of its unit, as 1.2 GB or 725 k; "-" for None."""
    if count is None:
        return "-"
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count} {unit}".strip()


@app.command()
@options.grouped
def search(
    *,
    run: str = typer.Argument(metavar="RUN", help="Folder, name or identity of a run, or 'latest'."),
    file: Path = typer.Argument(metavar="FILE", help="A search, as experiments/search.yaml, or an experiment's name."),
    trials: int | None = typer.Option(None, "--trials", help="Settings to measure, by all processes together."),
    storage: str | None = typer.Option(
        None, "--storage", help="Optuna's database URL.", show_default="a file in the run's folder"
    ),
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Search for the best way to sample a run.

    The same command again continues; several processes that run it at the same time divide the work.
    """
    from sitkit.runtime.files import read_json

    outcome = console.call(sitkit.search, run, file, trials=trials, storage=storage, **running.arguments())
    if json:
        return console.as_json(read_json(outcome.record) | {"path": outcome.record})
    rows = [
        (trial, short(estimate.mean), short(estimate.stderr, 2), nfe, short(seconds, 3), setting)
        for trial, estimate, nfe, seconds, setting in outcome.rows()
    ]
    confirm = outcome.search.confirm
    counts = ", ".join(f"{count} trials {kind}" for kind, count in outcome.counts.items() if count)
    notes = [
        f"mean and standard error over {len(confirm.seeds)} seeds of {confirm.n} samples; {counts}",
        *(f"{count} refused: {reason}" for reason, count in list(outcome.refused.items())[:5]),
    ]
    console.table(("trial", "metric", "stderr", "NFE", "s/sample", "setting"), rows, outcome.search.title, notes)
    console.say(outcome.verdict)
    console.facts(picture=outcome.picture, trials=outcome.table, record=outcome.record)
    if outcome.preset is not None:
        words = shlex.join([str(outcome.preset.parents[1]), "--preset", outcome.preset.stem])
        console.facts(next=f"sitkit sample {words}")
