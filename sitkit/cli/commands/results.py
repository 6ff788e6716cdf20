"""Commands on numbers that exist: explain, verify, diff, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.console import plain
from sitkit.cli.interrupt import resumable

if TYPE_CHECKING:
    from sitkit.results.verify import Verification


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
    from sitkit.results.diff import describe_difference
    from sitkit.results.explain import code
    from sitkit.results.explain import explain as verb

    told = verb(result, runs=runs)
    if json:
        console.as_json([plain(one) for one in told])
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
            console.say(f"  {key:10} {describe_difference(value)}")
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
    from sitkit.results.verify import difference
    from sitkit.results.verify import verify as verb

    with resumable("nothing is written. Begin again with"), console.progress() as progress:
        verdicts = verb(result, runs=runs, device=device, progress=progress)
    if json:
        console.as_json(
            [plain(verdict) | {"path": str(verdict.path), "gap": difference(verdict)} for verdict in verdicts]
        )
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


def _told(verdict: Verification) -> str:
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
    from sitkit.results.diff import diff as verb

    told = verb(a, b, runs=runs)
    if json:
        console.as_json(plain(told))
        return
    if told.differences:
        affects = {d: f"{d.affects}{' (rounding)' if d.rounding else ''}" for d in told.differences}
        console.table(("", told.a, told.b, "affects"), [(d.key, d.a, d.b, affects[d]) for d in told.differences])
    else:
        console.say("Nothing that is recorded differs.")
    console.say(told.verdict)


@app.command()
def report(
    target: Annotated[
        str,
        typer.Argument(metavar="STUDY|RUN", help="A study's file, name or folder; a run's folder, name or identity."),
    ] = "latest",
    to: Annotated[
        Path | None, typer.Option("--to", help="Where the page goes.", show_default="report.html in its folder")
    ] = None,
    runs: options.Folder = Path("runs"),
    json: options.Json = False,
) -> None:
    """Write one HTML file about a run or a study: it opens from disk, needs no network, and can be sent to anyone."""
    from sitkit.results.report import report as verb

    path = verb(target, runs=runs, to=to)
    if json:
        console.as_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        console.say(f"report    {path}   {path.stat().st_size / 1e6:.2g} MB")
