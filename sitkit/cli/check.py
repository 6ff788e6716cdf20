"""Commands on what a number is: before it is there, how it was made, whether it comes again, how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app
from sitkit.cli.study import Base, SampleSeedList, SeedList, seed_list

if TYPE_CHECKING:
    from sitkit.check import Checked, Outlook
    from sitkit.study import Refused


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
    from sitkit.check import check as verb
    from sitkit.check import read_plan

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
    costs: dict[Any, list[Outlook]] = {}
    notes: dict[str, str] = {}
    for cell in found.cells:
        groups.setdefault((cell.row, cell.column, cell.times, cell.nfe), []).append(cell)
        costs.setdefault(cell.cost, []).append(cell)
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
    rows = [
        (
            _range(cells),
            "x".join(map(str, cost.shape)),
            f"{cost.parameters / 1e6:.4g} M",
            _or_dash(cost.flops, lambda flops: f"{flops / 1e9:.3g}"),
            _or_dash(cost.training_memory, size),
            _or_dash(cost.sampling_memory, size),
            size(cost.checkpoints),
            size(cost.samples),
        )
        for cost, cells in costs.items()
    ]
    names = ("cell", "states", "parameters", "GFLOPs", "to train", "to sample", "checkpoints", "samples")
    console.table(
        names, rows, notes=["GFLOPs of one evaluation; memory to train and sample on one device; disk a run, a cell"]
    )
    work = "" if found.flops is None else f", {found.flops / 1e15:.3g} PFLOPs"
    console.say(
        f"to do: {found.trainings[1]} of {found.trainings[0]} trainings, {found.measurements[1]} of "
        f"{found.measurements[0]} measurements{work}, {size(found.disk)} on disk"
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
    from sitkit.study import refused_at

    causes: dict[str, list[Refused]] = {}
    for cell in refused:
        which = refused_at("", cell.row, cell.column, "")
        cause = cell.reason.rpartition(which)[2] if which else cell.reason
        causes.setdefault(cause, []).append(cell)
    for cells in causes.values():
        more = f" The same for {len(cells) - 1} more cells." if len(cells) > 1 else ""
        console.error(f"{cells[0].reason}{more}")


def _states(cells: list[Outlook]) -> str:
    words = [cell.state if cell.state != "begun" else f"at step {cell.step}" for cell in cells]
    counts = {word: words.count(word) for word in words}
    return ", ".join(word if len(cells) == 1 else f"{count} {word}" for word, count in counts.items())


def _or_dash(value: Any, shown: Any) -> str:
    return "-" if value is None else shown(value)


def size(count: int) -> str:
    """Bytes as people read them: 1.2 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
