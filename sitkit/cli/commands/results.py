"""Commands on results on disk: explain, verify, diff, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import BEGIN_AGAIN

if TYPE_CHECKING:
    from sitkit.results.verify import Verification


RESULT = typer.Argument(
    metavar="RESULT",
    help="A number's file or identity; RUN or RUN:METRIC; STUDY, STUDY:ROW, STUDY:ROW:COLUMN:SEED, or STUDY:CELL.",
)


@app.command()
def explain(result: str = RESULT, runs: Path = options.RUNS, json: bool = options.JSON) -> None:
    """Show the command that computes a number again, and its origin: code, data, seeds, settings, machine."""
    from sitkit.results.diff import describe_difference
    from sitkit.results.explain import code

    numbers = sitkit.explain(result, runs=runs)
    if json:
        return console.as_json(numbers)
    for number in numbers:
        error = "" if number.stderr is None else f" ± {float(number.stderr):.2g}"
        real = "" if number.real is None else f", real data {float(number.real):.4g}"
        value = f"{number.metric} {number.value}{error} ({number.n} samples at {number.nfe} evaluations{real})"
        checkpoint, data = number.checkpoint, number.data
        fingerprint = str(checkpoint.get("fingerprint") or "")[:12]
        lines = [
            ("value", value),
            ("record", number.path),
            ("seeds", ", ".join(f"{name} {seed}" for name, seed in number.seeds.items())),
            ("data", f"{data['fingerprint'][:12]}, reference of {data['reference']['n']} examples"),
            ("weights", f"{checkpoint['weights']} at step {checkpoint['step']} {fingerprint}"),
            *((key, describe_difference(setting)) for key, setting in number.settings.items()),
            ("rounding", number.rounding),
            *((stage, code(versions)) for stage, versions in number.stages.items()),
            *(
                ("plugin", f"{name}: pip install {package.replace(' ', '==')}")
                for name, package in number.plugins.items()
            ),
        ]
        console.say(number.name)
        for name, line in lines:
            console.say(f"  {name:10} {line}")
        for stage, command in number.commands.items():
            console.say(f"  {stage + ' again':15} {command}")


@app.command()
def verify(
    result: str = RESULT, runs: Path = options.RUNS, device: str | None = options.DEVICE, json: bool = options.JSON
) -> None:
    """Sample and measure again from the checkpoint, and compare to the last digit; exit 1 if a number differs."""
    from sitkit.results.verify import difference

    verdicts = console.call(sitkit.verify, result, runs=runs, device=device, state=BEGIN_AGAIN)
    if json:
        console.as_json([console.plain(verdict) | {"gap": difference(verdict)} for verdict in verdicts])
    else:
        rows = [(v.name, v.was["value"], "-" if v.now is None else v.now["value"], v.verdict) for v in verdicts]
        console.table(("number", "was", "now", "verdict"), rows)
        same = sum(verdict.verdict == "same" for verdict in verdicts)
        console.say(f"{same} of {len(verdicts)} numbers are the same to the last digit")
    for verdict in verdicts:
        if verdict.verdict == "impossible":
            console.error(f"{verdict.name}: {verdict.reason}")
        elif verdict.verdict == "differs":
            console.error(
                f"{verdict.name} differs{f': {verdict.reason}' if verdict.reason else ''}. {_changes(verdict)}"
            )
    if any(verdict.verdict != "same" for verdict in verdicts):
        raise typer.Exit(1)


def _changes(verdict: Verification) -> str:
    values = [
        f"{key} was {verdict.was[key]}, is {verdict.now[key]}"
        for key in verdict.was
        if verdict.now is not None and verdict.was[key] != verdict.now[key]
    ]
    since = [f"{d.key}: {d.a} -> {d.b}" for d in verdict.differences if d.affects != "nothing"]
    return f"{'; '.join(values)}. Since then: {'; '.join(since) or 'nothing that is recorded'}."


@app.command()
def diff(
    a: str = typer.Argument(metavar="A", help="A run, or a number as `sitkit explain` takes it."),
    b: str = typer.Argument(metavar="B", help="Another of the same kind."),
    runs: Path = options.RUNS,
    json: bool = options.JSON,
) -> None:
    """Show what differs between two runs or numbers, the stage of each difference, and whether it can explain the results."""

    result = sitkit.diff(a, b, runs=runs)
    if json:
        return console.as_json(result)
    if result.differences:
        rows = [(d.key, d.a, d.b, f"{d.affects}{' (rounding)' if d.rounding else ''}") for d in result.differences]
        console.table(("", result.a, result.b, "affects"), rows)
    else:
        console.say("Nothing that is recorded differs.")
    console.say(result.verdict)


@app.command()
def report(
    target: str = typer.Argument(
        "latest", metavar="STUDY|RUN", help="A study's file, name or folder; a run's folder, name or identity."
    ),
    to: Path | None = typer.Option(None, "--to", help="Where the page goes.", show_default="report.html in its folder"),
    runs: Path = options.RUNS,
    json: bool = options.JSON,
) -> None:
    """Write one HTML file about a run or a study: it opens from disk, needs no network, and can be sent to anyone."""

    path = sitkit.report(target, runs=runs, to=to)
    if json:
        return console.as_json({"report": path, "bytes": path.stat().st_size})
    console.facts(report=f"{path}   {path.stat().st_size / 1e6:.2g} MB")
