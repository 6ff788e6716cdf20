"""The command convert: other codes' checkpoints in, runs out."""

from __future__ import annotations

import shlex
from pathlib import Path

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.runtime.errors import UserError


@app.command()
def convert(
    source: str = typer.Argument(metavar="FILE.pt|RUN", help="A published checkpoint, or a run to export."),
    kind: str | None = typer.Option(
        None, "--from", help="sit, repa or dit, where the file does not tell.", metavar="CODE"
    ),
    to: str | None = typer.Option(
        None,
        "--to",
        metavar="FILE|hf://OWNER/NAME",
        help="Export a run: to NAME.safetensors, one file that `sitkit sample` takes; to NAME.pt, as the official code "
        "reads it; to hf://OWNER/NAME on the Hugging Face hub.",
    ),
    private: bool = typer.Option(False, "--private", help="A repository made on the hub is private."),
    ema: float | None = options.EMA,
    step: int | None = options.STEP,
    sets: list[str] | None = options.SETS,
    heads: int | None = typer.Option(None, "--heads", help="Attention heads of a size that is no preset."),
    vae: str | None = typer.Option(
        None, "--vae", help="Autoencoder of the latents, a folder or a hub name; none leaves latents."
    ),
    runs: Path = options.RUNS,
) -> None:
    """Make a run of a published checkpoint; or of a run one file, a checkpoint for published code, or a repository on the hub."""
    if to is not None:
        if kind or heads or vae:
            raise UserError("--from, --heads and --vae belong to an import; --to exports.")

        exported = sitkit.export(
            source, to, private=private, step=step, settings=options.layer({"ema": ema}, sets), runs=runs
        )
        result, notes = {"uploaded" if to.startswith("hf://") else "written": exported.address}, exported.notes
        next_source = None if to.endswith(".pt") else to
    else:
        if private or sets or ema is not None or step is not None:
            raise UserError("--private, --ema, --step and --set belong to an export: add --to.")

        imported = sitkit.convert(source, code=kind, heads=heads, vae=vae, runs=runs)
        result, notes, next_source = {"run": imported.folder}, imported.notes, str(imported.folder)
    for note in notes:
        console.err.print(note, markup=False)
    console.facts(**result, next=next_source and f"sitkit sample {shlex.quote(next_source)}")
