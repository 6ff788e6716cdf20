"""Commands on studies: check, ablate, search."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.console import plain
from sitkit.cli.interrupt import resumable
from sitkit.runtime.errors import UserError, suggest

if TYPE_CHECKING:
    from sitkit.results.study_results import StudyResults
    from sitkit.results.table import Grid
    from sitkit.studies.check import CellForecast, CheckReport
    from sitkit.studies.cost import Cost
    from sitkit.studies.executors import Executor
    from sitkit.studies.study import Refused


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
    from sitkit.studies.ablate import run_study as verb
    from sitkit.studies.status import StudyStatus
    from sitkit.studies.study_file import read_study
    from sitkit.studies.tasks import trained

    over = options.layer({"runs": str(runs), "device": device}, sets, training=True)
    chosen = seed_list(seeds, "--seeds"), seed_list(sample_seeds, "--sample-seeds")
    if dry_run:
        plan = read_study(file, over, base, *chosen)
        if not keep_going:
            plan.require()
        board = StudyStatus(plan)
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
    from sitkit.cli.live import live_view

    with resumable(), live_view() as (progress, watch):
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
    from sitkit.studies.executors import InProcess, Local, Ray

    if name == "ray" or name.startswith("ray://"):
        return Ray(None if name == "ray" else name, 1 if cpus is None else cpus, gpus, workers)
    if name != "local":
        raise UserError(
            f"--executor {name}: no such executor.{suggest(name, ['local', 'ray'])} Known: local, ray, ray://HOST:PORT."
        )
    for flag, value in (("--cpus", cpus), ("--gpus", gpus)):
        if value is not None:
            raise UserError(f"{flag} {value:g} is of --executor ray; --executor local divides what there is.")
    return InProcess() if workers in (None, 1) else Local(workers)


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


def print_failures(results: StudyResults, runs: Path) -> None:
    """Each cell that went wrong on standard error, with its log in the folder of runs; exit status 1 if there is one."""
    for cell in results.failures:
        if cell.state == "refused":
            console.error(cell.failure)
            continue
        where = ", ".join(filter(None, (cell.row, cell.column)))
        console.error(f"{where}, seed {cell.seed}: {cell.failure} Log: {runs / str(cell.log)}")
    if results.failures:
        raise typer.Exit(1)


FIGURES = (
    "weights: parameters; FLOPs: of one evaluation for one sample; training, sampling: memory on one device; "
    "run, samples: on disk, of a run's checkpoints and of a cell"
)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A study; or a configuration, a preset, a run's folder.")],
    base: Base = None,
    seeds: SeedList = None,
    sample_seeds: SampleSeedList = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """What each cell will do and cost, and what is done already; exit 2 where one cannot be.  Nothing is computed."""
    from sitkit.studies.check import check as verb

    over = options.layer({"runs": str(runs), "device": device}, sets, training=True)
    chosen = seed_list(seeds, "--seeds"), seed_list(sample_seeds, "--sample-seeds")
    found = verb(file, base=base, seeds=chosen[0], sample_seeds=chosen[1], settings=over)
    if json:
        console.as_json(plain(found))
    else:
        _print_checked(found)
    _print_refused(found.refused)
    if found.refused:
        raise typer.Exit(2)


def _print_checked(found: CheckReport) -> None:
    groups: dict[tuple[Any, ...], list[CellForecast]] = {}
    costs: dict[tuple[str, ...], list[CellForecast]] = {}
    notes: dict[str, str] = {}
    for cell in found.cells:
        groups.setdefault((cell.row, cell.column, cell.times, cell.nfe), []).append(cell)
        costs.setdefault(_cost(cell.cost), []).append(cell)
        for why in cell.singular:
            notes.setdefault(why, f"({len(notes) + 1})")
    rows = [
        (_range(cells), row, column, _span(cells[0], notes), "adaptive" if nfe is None else nfe, _states(cells))
        for (row, column, _, nfe), cells in groups.items()
    ]
    if not rows:
        return
    console.table(
        ("cell", "row", "column", "t", "NFE", "state"), rows, notes=[f"{m} {why}" for why, m in notes.items()]
    )
    for t0, t1 in dict.fromkeys(cell.training for cell in found.cells if cell.training != (0.0, 1.0)):
        console.say(f"trained on t from {t0:.6g} to {t1:.6g}: target or weight is singular beyond")
    console.say("")
    rows = [(_range(cells), *cost) for cost, cells in costs.items()]
    names = ("cell", "states", "weights", "FLOPs", "training", "sampling", "run", "samples")
    console.table(names, rows, notes=[FIGURES])
    work = "" if found.flops is None else f", {scaled(found.flops, 'FLOPs')}"
    console.say(
        f"to do: {found.trainings[1]} of {found.trainings[0]} trainings, {found.measurements[1]} of "
        f"{found.measurements[0]} measurements{work}, {scaled(found.disk, 'B')} on disk"
    )


def _range(cells: list[CellForecast]) -> str:
    """Numbers of cells: 1-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(cell.number for cell in cells):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _span(cell: CellForecast, notes: dict[str, str]) -> str:
    t0, t1 = cell.times
    return " ".join([f"{t0:.3g} to {t1:.4g}", *(notes[why] for why in cell.singular)])


def _print_refused(refused: list[Refused]) -> None:
    """Each reason once, with how many cells it stops."""
    from sitkit.studies.study import refused_at

    causes: dict[str, list[Refused]] = {}
    for cell in refused:
        which = refused_at("", cell.row, cell.column, "")
        cause = cell.reason.rpartition(which)[2] if which else cell.reason
        causes.setdefault(cause, []).append(cell)
    for cells in causes.values():
        more = f" The same for {len(cells) - 1} more of the cells." if len(cells) > 1 else ""
        console.error(f"{cells[0].reason}{more}")


def _states(cells: list[CellForecast]) -> str:
    words = [cell.state if cell.state != "begun" else f"at step {cell.step}" for cell in cells]
    counts = {word: words.count(word) for word in words}
    return ", ".join(word if len(cells) == 1 else f"{count} {word}" for word, count in counts.items())


def _cost(cost: Cost) -> tuple[str, ...]:
    memory = (cost.training_memory, cost.sampling_memory)
    return (
        "x".join(map(str, cost.shape)),
        scaled(cost.parameters),
        "-" if cost.flops is None else scaled(cost.flops),
        *("-" if count is None else scaled(count, "B") for count in memory),
        scaled(cost.checkpoints, "B"),
        scaled(cost.samples, "B"),
    )


def scaled(count: int, unit: str = "") -> str:
    """A count as people read it: 1.2 GB, 725 k."""
    for prefix, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {prefix}{unit}"
    return f"{count} {unit}".strip()


@app.command()
def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder, name or identity of a run, or 'latest'.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A search, as experiments/search.yaml, or an experiment's name.")
    ],
    trials: Annotated[
        int | None, typer.Option("--trials", help="Settings to measure, by all processes together.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Optuna's database URL.", show_default="a file in the run's folder")
    ] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Search for the best way to sample a run; run again, or beside itself, it continues."""
    from sitkit.studies.search import describe_choice
    from sitkit.studies.search import search as verb

    with resumable(), console.progress() as progress:
        found = verb(
            run,
            file,
            trials=trials,
            storage=storage,
            runs=runs,
            device=device,
            settings=options.layer({}, sets),
            progress=progress,
        )
    if json:
        from sitkit.runtime.files import read_json

        console.as_json(read_json(found.record) | {"path": str(found.record)})
        return
    rows = [
        (
            "own" if setting is found.reference else setting.trial,
            f"{setting.estimate.mean:.4g}",
            f"{setting.estimate.stderr:.2g}",
            setting.nfe,
            f"{setting.seconds:.3g}",
            ("winner: " if setting is found.winner else "")
            + (describe_choice(setting.chosen) or "the run's own setting"),
        )
        for setting in (*found.confirmed, found.reference)
    ]
    seeds = found.search.confirm.seeds
    notes = [
        f"mean and standard error over {len(seeds)} seeds of {found.search.confirm.n} samples; "
        + ", ".join(f"{count} trials {kind}" for kind, count in found.counts.items() if count),
        *(f"{count} refused: {reason}" for reason, count in list(found.refused.items())[:5]),
    ]
    console.table(("trial", "metric", "stderr", "NFE", "s/sample", "setting"), rows, found.search.title, notes)
    console.say(found.verdict)
    console.say(f"picture   {found.picture}\ntrials    {found.table}\nrecord    {found.record}")
    if found.preset is not None:
        console.say(
            f"next      sitkit sample {shlex.quote(str(found.preset.parents[1]))} --preset {shlex.quote(found.preset.stem)}"
        )
