"""Commands on what a number is: before it is there, how it was made, whether it comes again, how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app
from sitkit.cli.interrupt import resumable
from sitkit.cli.study import Base, SampleSeedList, SeedList, seed_list

if TYPE_CHECKING:
    from sitkit.results.verify import Verdict
    from sitkit.studies.check import Checked, Outlook
    from sitkit.studies.cost import Cost
    from sitkit.studies.study import Refused


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
    from sitkit.studies.check import read_plan

    over = options.layer({"run.folder": str(runs), "run.device": device}, sets)
    chosen = seed_list(seeds, "--seeds"), seed_list(sample_seeds, "--sample-seeds")
    found = verb(read_plan(file, over, base, *chosen))
    if json:
        console.as_json(_plain(found))
    else:
        _print_checked(found)
    _print_refused(found.refused)
    if found.refused:
        raise typer.Exit(2)


def _plain(value: Any) -> Any:
    """Named tuples as mappings."""
    if hasattr(value, "_asdict"):
        return {key: _plain(v) for key, v in value._asdict().items()}
    if hasattr(value, "__dataclass_fields__"):
        return {key: _plain(getattr(value, key)) for key in value.__dataclass_fields__}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _print_checked(found: Checked) -> None:
    groups: dict[tuple[Any, ...], list[Outlook]] = {}
    costs: dict[tuple[str, ...], list[Outlook]] = {}
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


def _range(cells: list[Outlook]) -> str:
    """Numbers of cells: 1-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(cell.number for cell in cells):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


def _span(cell: Outlook, notes: dict[str, str]) -> str:
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


def _states(cells: list[Outlook]) -> str:
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


Result = Annotated[
    str,
    typer.Argument(
        metavar="RESULT",
        help="A number's file or identity; RUN or RUN:METRIC; STUDY, STUDY:ROW, STUDY:ROW:COLUMN:SEED, or STUDY:CELL.",
    ),
]


@app.command()
def explain(result: Result, runs: options.Folder = Path("runs"), json: options.Json = False) -> None:
    """The command that makes a number again, and what made it: code, data, seeds, settings, machine."""
    from sitkit.results.diff import in_words
    from sitkit.results.explain import code
    from sitkit.results.explain import explain as verb
    from sitkit.results.lookup import numbers

    told = [verb(number) for number in numbers(result, runs)]
    if json:
        console.as_json([_plain(one) for one in told])
        return
    for one in told:
        error = "" if one.stderr is None else f" ± {float(one.stderr):.2g}"
        halves = "" if one.halves is None else f", halves of the data {float(one.halves):.4g}"
        console.say(f"{one.name}")
        console.say(f"  value      {one.metric} {one.value}{error} ({one.n} samples at {one.nfe} evaluations{halves})")
        console.say(f"  record     {one.path}")
        console.say(f"  seeds      {', '.join(f'{name} {seed}' for name, seed in one.seeds.items())}")
        console.say(f"  data       {one.data['fingerprint'][:12]}, reference of {one.data['reference']['n']} examples")
        weights = [one.checkpoint["weights"], f"at step {one.checkpoint['step']}"]
        console.say(f"  weights    {' '.join([*weights, str(one.checkpoint.get('fingerprint') or '')[:12]])}")
        for key, value in one.settings.items():
            console.say(f"  {key:10} {in_words(value)}")
        console.say(f"  rounding   {one.rounding}")
        for stage, what in one.stages.items():
            console.say(f"  {stage:10} {code(what)}")
        for name, package in one.plugins.items():
            console.say(f"  plugin     {name}: pip install {package.replace(' ', '==')}")
        for what, command in one.commands.items():
            console.say(f"  {what + ' again':15} {command}")


@app.command()
def verify(
    result: Result,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Sample and measure again from the checkpoint, and compare to the last digit; exit 1 where a number differs."""
    from sitkit.results.lookup import numbers
    from sitkit.results.verify import gap
    from sitkit.results.verify import verify as verb

    found = numbers(result, runs)
    with resumable("nothing is written. Begin again with"), console.progress() as progress:
        verdicts = verb(found, device, progress)
    if json:
        console.as_json([_plain(verdict) | {"path": str(verdict.path), "gap": gap(verdict)} for verdict in verdicts])
    else:
        console.table(
            ("number", "was", "now", "verdict"),
            [(v.name, v.was["value"], "-" if v.now is None else v.now["value"], v.verdict) for v in verdicts],
        )
        same = sum(verdict.verdict == "same" for verdict in verdicts)
        console.say(f"{same} of {len(verdicts)} numbers are the same to the last digit")
    for verdict in verdicts:
        if verdict.verdict == "impossible":
            console.error(f"{verdict.name}: {verdict.reason}")
        elif verdict.verdict == "differs":
            console.error(f"{verdict.name} differs{f': {verdict.reason}' if verdict.reason else ''}. {_told(verdict)}")
    if any(verdict.verdict != "same" for verdict in verdicts):
        raise typer.Exit(1)


def _told(verdict: Verdict) -> str:
    values = [
        f"{key} was {verdict.was[key]}, is {verdict.now[key]}"
        for key in verdict.was
        if verdict.now is not None and verdict.was[key] != verdict.now[key]
    ]
    since = [f"{d.key}: {d.a} -> {d.b}" for d in verdict.differences if d.affects != "nothing"]
    return f"{'; '.join(values)}. Since then: {'; '.join(since) or 'nothing that is recorded'}."


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A run, or a number as `sitkit explain` takes it.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")],
    runs: options.Folder = Path("runs"),
    json: options.Json = False,
) -> None:
    """What differs between two runs or numbers, which stage each difference enters, and whether it can explain the results."""
    from sitkit.results.diff import differences

    told = differences(a, b, runs)
    if json:
        console.as_json(_plain(told))
        return
    if told.differences:
        affects = {d: f"{d.affects}{' (rounding)' if d.rounding else ''}" for d in told.differences}
        console.table(("", told.a, told.b, "affects"), [(d.key, d.a, d.b, affects[d]) for d in told.differences])
    else:
        console.say("Nothing that is recorded differs.")
    console.say(told.verdict)
