"""The command that writes a page about a run or a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app


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

    path = verb(target, runs, to)
    if json:
        console.as_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        console.say(f"report    {path}   {path.stat().st_size / 1e6:.2g} MB")
