"""`sitkit doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app


@app.command()
def doctor(json: options.Json = False) -> None:
    """Versions, devices, plugins, the tracking store, and the line that brings what is missing; exit 1 if something is broken."""
    from sitkit.testing.doctor import examine

    found = examine()
    if json:
        console.as_json([asdict(finding) for finding in found])
    else:
        rows = [(finding.area, finding.name, finding.state, finding.detail, finding.remedy) for finding in found]
        console.table(("", "what", "state", "", "what to do"), rows)
    if any(finding.state == "broken" for finding in found):
        raise typer.Exit(1)
