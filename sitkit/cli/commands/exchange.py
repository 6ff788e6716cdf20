"""The command convert: import a checkpoint of another code as a run, or export a run."""

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
    kind: str | None = typer.Option(None, "--from", help="sit, repa or dit, if the file does not say.", metavar="CODE"),
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
    heads: int | None = typer.Option(None, "--heads", help="Attention heads of a network whose size is not a preset."),
    classes: int | None = typer.Option(
        None, "--classes", min=0, help="Classes of the network, if the file does not say."
    ),
    vae: str | None = typer.Option(
        None, "--vae", help="Autoencoder of the latents, a folder or a hub name; none leaves latents."
    ),
    runs: Path = options.RUNS,
) -> None:
    """Import a published checkpoint as a run; or export a run as one file, as a checkpoint of published code, or to the hub."""
    if to is not None:
        if kind or heads or vae or classes is not None:
            raise UserError("--from, --heads, --classes and --vae belong to an import; --to exports.")

        exported = sitkit.export(
            source, to, private=private, step=step, settings=options.layer({"ema": ema}, sets), runs=runs
        )
        result, notes = {"uploaded" if to.startswith("hf://") else "written": exported.address}, exported.notes
        next_source = None if to.endswith(".pt") else to
    else:
        if private or sets or ema is not None or step is not None:
            raise UserError("--private, --ema, --step and --set belong to an export: add --to.")

        imported = sitkit.convert(source, code=kind, heads=heads, classes=classes, vae=vae, runs=runs)
        result, notes, next_source = {"run": imported.folder}, imported.notes, str(imported.folder)
    for note in notes:
        console.note(note)
    console.facts(**result, next=next_source and f"sitkit sample {shlex.quote(next_source)}")
