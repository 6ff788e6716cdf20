"""`sitkit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app
from sitkit.registry import UserError


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE.pt|RUN", help="A published checkpoint, or a run to export.")],
    kind: Annotated[
        str | None, typer.Option("--from", help="sit or repa, where the file does not tell.", metavar="CODE")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Export a run's EMA weights to this .pt, as the official code reads it.")
    ] = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Attention heads of a size that is no preset.")] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Autoencoder of the latents, a folder or a hub name; none leaves latents."),
    ] = None,
    runs: options.Folder = Path("runs"),
) -> None:
    """Make a run of a published checkpoint, or a checkpoint for published code of a run."""
    if to is not None:
        if kind or heads or vae:
            raise UserError("--from, --heads and --vae belong to an import; --to exports.")
        from sitkit.convert import export_official
        from sitkit.run import load

        console.say(f"written   {export_official(load(source, root=runs, device='cpu'), to)}")
        return
    from sitkit.convert import import_checkpoint

    done = import_checkpoint(Path(source), runs, kind, heads, vae)
    for note in done.notes:
        console.err.print(note, markup=False)
    console.say(f"run       {done.folder}")
    console.say(f"next      sitkit sample {done.folder}")
