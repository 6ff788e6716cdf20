"""The command convert: other codes' checkpoints in, runs out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.runtime.errors import UserError


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE.pt|RUN", help="A published checkpoint, or a run to export.")],
    kind: Annotated[
        str | None, typer.Option("--from", help="sit, repa or dit, where the file does not tell.", metavar="CODE")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FILE|hf://OWNER/NAME",
            help="Export a run: to NAME.safetensors, one file that `sitkit sample` takes; to NAME.pt, as the official code "
            "reads it; to hf://OWNER/NAME on the Hugging Face hub.",
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository made on the hub is private.")] = False,
    ema: options.Ema = None,
    step: options.Step = None,
    sets: options.Sets = None,
    heads: Annotated[int | None, typer.Option("--heads", help="Attention heads of a size that is no preset.")] = None,
    vae: Annotated[
        str | None,
        typer.Option("--vae", help="Autoencoder of the latents, a folder or a hub name; none leaves latents."),
    ] = None,
    runs: options.Folder = Path("runs"),
) -> None:
    """Make a run of a published checkpoint; or of a run one file, a checkpoint for published code, or a repository on the hub."""
    if to is not None:
        if kind or heads or vae:
            raise UserError("--from, --heads and --vae belong to an import; --to exports.")
        from sitkit.runs.exchange.export import export

        exported = export(source, to, private=private, step=step, settings=options.layer({"ema": ema}, sets), runs=runs)
        console.say(f"{'uploaded' if to.startswith('hf://') else 'written '}  {exported.address}")
        for note in exported.notes:
            console.err.print(note, markup=False)
        if not to.endswith(".pt"):
            console.say(f"next      sitkit sample {shlex.quote(to)}")
        return
    if private or sets or ema is not None or step is not None:
        raise UserError("--private, --ema, --step and --set belong to an export: add --to.")
    from sitkit.runs.exchange.convert import convert as verb

    imported = verb(source, code=kind, heads=heads, vae=vae, runs=runs)
    for note in imported.notes:
        console.err.print(note, markup=False)
    console.say(f"run       {imported.folder}")
    console.say(f"next      sitkit sample {shlex.quote(str(imported.folder))}")
