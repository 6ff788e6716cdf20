"""Commands that train a run and encode data: train, encode."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import resumable
from sitkit.registry import datasets
from sitkit.runtime.errors import UserError, suggest


@app.command()
def train(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="A preset or a YAML file.",
            show_default="digits",
            autocompletion=options.complete_files("presets"),
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help="A preset to start from (`sitkit list presets`); CONFIG changes it.",
            rich_help_panel=options.RUNNING,
            autocompletion=options.complete_files("presets"),
        ),
    ] = None,
    interp: options.Interp = None,
    target: options.Target = None,
    weight: options.Weight = None,
    loss: options.Loss = None,
    timestep: options.Timestep = None,
    coupling: options.Coupling = None,
    backbone: options.Backbone = None,
    autoencoder: options.Autoencoder = None,
    data: options.Data = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    guidance: options.Guidance = None,
    metric: options.Metric = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimiser steps.", rich_help_panel=options.MODEL)
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Training seed.", rich_help_panel=options.MODEL)] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
) -> None:
    """Train a combination of components; the same command again continues."""
    from sitkit.training.train import train as verb

    flags = {
        "interp": interp, "target": target, "weight": weight, "loss": loss, "timestep": timestep, "coupling": coupling,
        "backbone": backbone, "autoencoder": autoencoder, "data": data, "sampler": sampler, "diffusion": diffusion,
        "guidance": guidance, "metric": metric, "steps": steps, "seed": seed, "runs": str(runs), "device": device,
    }  # fmt: skip
    settings = options.layer(flags, sets, training=True)
    with resumable(), console.progress() as progress:
        folder = verb(
            config or preset or "digits", preset=preset if config else None, settings=settings, progress=progress
        ).folder
    console.say(f"run       {folder}")
    previews = sorted((folder / "previews").glob("*.png"))
    if previews:
        console.say(f"pictures  {previews[-1]}")
    which = shlex.quote(str(folder))
    console.say(f"next      sitkit sample {which}   |   sitkit evaluate {which}")


@app.command()
def encode(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="An .npz, a folder of images, a data set's name, or a YAML file of settings."
        ),
    ],
    autoencoder: options.Autoencoder = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder of the latents.", show_default="latents/DATA-AUTOENCODER-IDENTITY"),
    ] = None,
    per_shard: Annotated[int, typer.Option("--per-shard", min=1, help="Examples per file.")] = 1024,
    dtype: Annotated[str, typer.Option("--dtype", help="Type of the latents on disk: float32 or float16.")] = "float32",
    sets: options.Sets = None,
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Encode a data set into latents to train on; the same command again continues, and several processes divide the work."""
    from sitkit.models.encode import encode as verb
    from sitkit.runs.config.sources import Layer, assemble

    if dtype not in ("float32", "float16"):
        raise UserError(f"--dtype {dtype}: no such type on disk. Known: float32, float16.")
    base = _settings(data)
    defaults = Layer({"autoencoder": "sd-vae"})
    config = assemble([defaults, base, options.layer({"autoencoder": autoencoder}, sets)])
    with resumable(), console.progress() as progress:
        done = verb(
            config.data,
            autoencoder=config.autoencoder,
            out=out,
            per_shard=per_shard,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            device=device or config.run.device,
            progress=progress,
        )
    index = done.record
    if json:
        console.as_json(index | {"path": str(done.folder)})
        return
    statistics = zip(index["statistics"]["mean"], index["statistics"]["std"], strict=True)
    console.say(
        f"latents   {done.folder}   {sum(index['rows'])} examples, {index['shape']} each, and their mirror images"
    )
    console.say("channels  " + "  ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in statistics))
    component = index["autoencoder"]["component"]
    fields = " ".join(f"--set autoencoder.{key}={value}" for key, value in component.items() if key != "name")
    where = shlex.quote(str(done.folder))
    console.say(
        f"next      sitkit train --data latents --set data.path={where} --autoencoder {component['name']} {fields}".rstrip()
    )


def _settings(data: str) -> Any:
    """Return the settings that the argument DATA stands for: a file, a folder, or the name of a data set."""
    from sitkit.runs.config.sources import Layer, read_config

    path = Path(data).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return read_config(data)
    if path.suffix == ".npz":
        return Layer({"data": {"name": "npz", "path": data}})
    if path.is_dir():
        return Layer({"data": {"name": "image-folder", "path": data}})
    if data in datasets:
        return Layer({"data": data})
    raise UserError(
        f"{data}: no such folder, .npz, YAML file or data set.{suggest(data, datasets.names())} "
        f"Data sets: {', '.join(datasets)}."
    )
