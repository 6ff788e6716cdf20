"""The command convert: other codes' checkpoints in, runs out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

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
        _export(source, to, private, step, options.layer({"sample.ema": ema}, sets), runs)
        return
    if private or sets or ema is not None or step is not None:
        raise UserError("--private, --ema, --step and --set belong to an export: add --to.")
    from sitkit.runs.exchange.convert import import_checkpoint

    done = import_checkpoint(Path(source), runs, kind, heads, vae)
    for note in done.notes:
        console.err.print(note, markup=False)
    console.say(f"run       {done.folder}")
    console.say(f"next      sitkit sample {shlex.quote(str(done.folder))}")


def _export(source: str, to: str, private: bool, step: int | None, over: Any, runs: Path) -> None:
    remote = to.startswith("hf://")
    if private and not remote:
        raise UserError("--private belongs to an upload: --to hf://OWNER/NAME.")
    if not remote and Path(to).suffix not in (".safetensors", ".pt"):
        raise UserError(f"--to {to}: give a .safetensors, a .pt for the official code, or hf://OWNER/NAME.")
    from sitkit.runs.exchange.export import export, export_official, push
    from sitkit.runs.run import load

    run = load(source, root=runs, device="cpu", step=step, over=over)
    if remote:
        console.say(f"uploaded  {push(run, to, private=private)}")
    elif to.endswith(".pt"):
        console.say(f"written   {export_official(run, Path(to))}")
        return
    else:
        console.say(f"written   {export(run, Path(to))}")
    if run.config.autoencoder.packed() is None and (weights := getattr(run.config.autoencoder, "path", None)):
        console.err.print(
            f"Latents are decoded by {weights} of the hub, which is named in the file, not held.", markup=False
        )
    console.say(f"next      sitkit sample {shlex.quote(to)}")
