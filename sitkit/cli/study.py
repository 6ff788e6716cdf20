"""Commands on studies: doing them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app
from sitkit.cli.interrupt import resumable
from sitkit.runtime.errors import UserError, suggest

if TYPE_CHECKING:
    from sitkit.results.study_results import Results
    from sitkit.results.table import Grid
    from sitkit.studies.executors import Executor

SeedList = Annotated[
    str | None, typer.Option("--seeds", metavar="0,1,2", help="Training seeds in place of the study's own.")
]
SampleSeedList = Annotated[
    str | None, typer.Option("--sample-seeds", metavar="0,1", help="Sampling seeds in place of the study's own.")
]
Base = Annotated[str | None, typer.Option("--base", help="A preset or file in place of the study's own base.")]


def seed_list(text: str | None, flag: str) -> tuple[int, ...] | None:
    """ "0,1,2" as numbers.  Raises UserError that names the flag."""
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text}: write whole numbers with commas, as in {flag} 0,1,2.") from None


@app.command()
def ablate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A study, as experiments/table6.yaml, or an experiment's name (`sitkit list experiments`).",
            autocompletion=options.complete_files("experiments"),
        ),
    ],
    base: Base = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print cells and trainings, do nothing.")] = False,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", "-k", help="Do the other cells where some are impossible.")
    ] = False,
    seeds: SeedList = None,
    sample_seeds: SampleSeedList = None,
    executor: Annotated[
        str,
        typer.Option(
            "--executor",
            metavar="local|ray|ray://HOST:PORT",
            help="Where the work is done: on this machine; on the Ray cluster of RAY_ADDRESS or of this machine, started "
            "if there is none; on the one named.",
            rich_help_panel=options.RUNNING,
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Processes at a time, to which the GPUs are dealt out.",
            show_default="1, on Ray as many as it has room for",
            rich_help_panel=options.RUNNING,
        ),
    ] = None,
    cpus: Annotated[
        float | None,
        typer.Option("--cpus", min=0, help="CPUs of a task on Ray.", show_default="1", rich_help_panel=options.RUNNING),
    ] = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus",
            min=0,
            help="GPUs of a task on Ray.",
            show_default="1 where it has any",
            rich_help_panel=options.RUNNING,
        ),
    ] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Train and measure every cell of a study; run again, it continues.

    Run in several places at once on one folder, they share the work.
    """
    from sitkit.results.study_results import runs_of
    from sitkit.results.table import grid
    from sitkit.studies.ablate import Board
    from sitkit.studies.ablate import ablate as verb
    from sitkit.studies.study import read_study
    from sitkit.studies.tasks import trained

    over = options.layer({"run.folder": str(runs), "run.device": device}, sets)
    chosen = seed_list(seeds, "--seeds"), seed_list(sample_seeds, "--sample-seeds")
    if dry_run:
        plan = read_study(file, over, base, *chosen)
        if not keep_going:
            plan.require()
        board = Board(plan)
        trainings = {place.training: cell.config for cell, place in zip(plan.cells, board.places, strict=True)}
        done = {training: trained(config) for training, config in trainings.items()}
        rows = [
            (i + 1, cell.row, cell.column, cell.seed, cell.sample_seed, place.run,
             "measured" if board.measurements.find(place) else "trained" if done[place.training] else "")
            for i, (cell, place) in enumerate(zip(plan.cells, board.places, strict=True))
        ]  # fmt: skip
        names = ("cell", "row", "column", "seed", "sample_seed", "run", "state")
        if json:
            console.as_json([dict(zip(names, row, strict=True)) for row in rows])
        else:
            console.table(("cell", "row", "column", "seeds", "run", "state"),
                          [(*row[:3], f"{row[3]}, {row[4]}", *row[5:]) for row in rows])  # fmt: skip
            console.say(f"{len(rows)} cells from {len(done)} trainings")
        return
    from sitkit.cli.live import overview

    with resumable(), overview() as (progress, watch):
        outcome = verb(
            file, over, base, seeds=chosen[0], sample_seeds=chosen[1], keep_going=keep_going,
            executor=_executor(executor, workers, cpus, gpus), progress=progress, watch=watch,
        )  # fmt: skip
    results = outcome.results
    if json:
        from sitkit.results.study_results import FILE

        console.as_json(results.model_dump() | {"path": str(outcome.folder / FILE)})
    else:
        print_table(grid(results))
        console.say(f"table     {outcome.folder / 'table.csv'}   table.md   table.tex")
    print_failures(results, runs_of(outcome.folder, results))


def _executor(name: str, workers: int | None, cpus: float | None, gpus: float | None) -> Executor:
    from sitkit.studies.executors import Here, Local, Ray

    if name == "ray" or name.startswith("ray://"):
        return Ray(None if name == "ray" else name, 1 if cpus is None else cpus, gpus, workers)
    if name != "local":
        raise UserError(
            f"--executor {name}: no such executor.{suggest(name, ['local', 'ray'])} Known: local, ray, ray://HOST:PORT."
        )
    for flag, value in (("--cpus", cpus), ("--gpus", gpus)):
        if value is not None:
            raise UserError(f"{flag} {value:g} is of --executor ray; --executor local divides what there is.")
    return Here() if workers in (None, 1) else Local(workers)


STYLES = {"best": "bold green", "close": "dim", "failed": "red"}


def print_table(drawn: Grid) -> None:
    """A study's table: bold the best where it is significant, dim what is not distinguishable from it, red what failed."""
    from rich.text import Text

    rows = []
    for row, line in drawn.rows:
        cells: list[object] = [row]
        for shown in line:
            text = Text(shown.text, style=STYLES.get(shown.mark, ""))
            cells.append(text.append(f" [{shown.reference}]", style="not bold cyan") if shown.reference else text)
        rows.append(cells)
    console.table(("", *drawn.columns), rows, drawn.title, drawn.notes)


def print_failures(results: Results, runs: Path) -> None:
    """Each cell that went wrong on standard error, with its log in the folder of runs; exit status 1 if there is one."""
    for cell in results.failures:
        if cell.state == "refused":
            console.error(cell.failure)
            continue
        where = ", ".join(filter(None, (cell.row, cell.column)))
        console.error(f"{where}, seed {cell.seed}: {cell.failure} Log: {runs / str(cell.log)}")
    if results.failures:
        raise typer.Exit(1)
