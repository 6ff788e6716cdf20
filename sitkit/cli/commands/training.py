"""Commands that train a run and encode data: train, encode."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.options import complete
from sitkit.registry import datasets
from sitkit.registry.settings_files import presets
from sitkit.runtime.errors import UserError, suggest


@app.command()
@options.grouped
def train(
    *,
    config: str | None = typer.Argument(
        None, metavar="CONFIG", help="A preset or a YAML file.", show_default="digits", autocompletion=complete(presets)
    ),
    preset: str | None = options.running_option(
        "--preset",
        metavar="NAME",
        help="A preset to start from (`sitkit list presets`); CONFIG changes it.",
        autocompletion=complete(presets),
    ),
    training: options.TrainingOptions,
    restart: bool = options.running_option(
        "--restart", help="Train again from step 0: remove the run's checkpoints, samples and numbers first."
    ),
    changed_plugin: str | None = options.CHANGED_PLUGIN,
    running: options.RunningOptions,
) -> None:
    """Train a combination of components; the same command again continues."""

    settings = running.training_settings(**vars(training))
    name, below = config or preset or "digits", preset if config else None
    flags = {"preset": below, "settings": settings, "restart": restart, "changed_plugin": changed_plugin}
    folder = console.call(sitkit.train, name, **flags).folder
    previews = sorted((folder / "previews").glob("*.png"))
    words = shlex.quote(str(folder))
    console.facts(
        run=folder,
        pictures=previews[-1] if previews else None,
        next=f"sitkit sample {words}   |   sitkit evaluate {words}",
    )


@app.command()
def encode(
    data: str = typer.Argument(
        metavar="DATA", help="An .npz, a folder of images, a data set's name, or a YAML file of settings."
    ),
    autoencoder: str | None = options.AUTOENCODER,
    out: Path | None = typer.Option(
        None, "--out", help="The folder of the latents.", show_default="latents/DATA-AUTOENCODER-IDENTITY"
    ),
    per_shard: int = typer.Option(1024, "--per-shard", min=1, help="Examples per file."),
    dtype: str = typer.Option("float32", "--dtype", help="Type of the latents on disk: float32 or float16."),
    sets: list[str] | None = options.SETS,
    device: str | None = options.DEVICE,
    json: bool = options.JSON,
) -> None:
    """Encode a data set into latents to train on; the same command again continues.

    Several processes that run it at the same time divide the work.
    """
    from sitkit.runs.config.sources import Layer, assemble

    if dtype not in ("float32", "float16"):
        raise UserError(f"--dtype {dtype}: no such type on disk. Known: float32, float16.")
    defaults = Layer({"autoencoder": "sd-vae"})
    config = assemble([defaults, _settings(data), options.layer({"autoencoder": autoencoder}, sets)])
    files = {"out": out, "per_shard": per_shard, "dtype": dtype, "device": device or config.run.device}
    encoded = console.call(sitkit.encode, config.data, autoencoder=config.autoencoder, **files)
    record = encoded.record
    if json:
        return console.as_json(record | {"path": encoded.folder})
    statistics = zip(record["statistics"]["mean"], record["statistics"]["std"], strict=True)
    component = record["autoencoder"]["component"]
    fields = " ".join(f"--set autoencoder.{key}={value}" for key, value in component.items() if key != "name")
    words = (
        f"--data latents --set data.path={shlex.quote(str(encoded.folder))} --autoencoder {component['name']} {fields}"
    )
    size = f"{sum(record['rows'])} examples, {record['shape']} each, and their mirror images"
    console.facts(
        latents=f"{encoded.folder}   {size}",
        channels="  ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in statistics),
        next=f"sitkit train {words}".rstrip(),
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
