"""Flags that several commands share, and the settings that they set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from rich.markup import escape

from sitkit.registry import Registry, registries
from sitkit.registry.settings_files import settings_files

MODEL, SAMPLING, DATA, RUNNING = "What is trained", "How it is sampled", "Data and metric", "Running"


def _choices(registry: Registry[Any]) -> Callable[[str], list[tuple[str, str]]]:
    def complete(incomplete: str) -> list[tuple[str, str]]:
        return [(name, registry.meaning(name)) for name in registry.names() if name.startswith(incomplete)]

    return complete


def component(plural: str, panel: str, more: str = "") -> Any:
    """Return an option that takes a component's name; its help says what each name means, then `more`."""
    registry = registries[plural]
    names = [name for name in registry.names() if name not in registry.presets()]
    # In docstrings two spaces end a sentence.  Typer prints each paragraph as a line.
    short = {name: shorten(registry.meaning(name).partition(".  ")[0], 80, placeholder=" ...") for name in names}
    meanings = [f"[bold]{name}[/]  {escape(meaning)}" for name, meaning in short.items()]
    if plural == "backbones":
        meanings.append("[bold]sit-{s,b,l,xl}/{2,4,8}[/], [bold]sit-xs/{1,2,4}[/]  presets of sit")
    return typer.Option(
        registry.flag,
        help="\n\n".join([*meanings, *filter(None, [more])]),
        metavar="NAME",
        rich_help_panel=panel,
        autocompletion=_choices(registry),
        show_default=False,
    )


def complete_files(plural: str) -> Callable[[str], list[tuple[str, str]]]:
    """Return the shell completion for names of presets or experiments."""
    files = settings_files[plural]
    return lambda incomplete: [(name, files.meaning(name)) for name in files if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Complete the names of runs in the default folder, for the shell."""
    names = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    return [name for name in ("latest", *names) if name.startswith(incomplete)]


Interp = Annotated[str | None, component("interpolants", MODEL)]
Target = Annotated[str | None, component("targets", MODEL)]
Weight = Annotated[str | None, component("weightings", MODEL)]
Loss = Annotated[str | None, component("losses", MODEL)]
Timestep = Annotated[str | None, component("timesteps", MODEL)]
Coupling = Annotated[str | None, component("couplings", MODEL)]
Backbone = Annotated[str | None, component("backbones", MODEL)]
Autoencoder = Annotated[str | None, component("autoencoders", MODEL)]
Data = Annotated[str | None, component("datasets", DATA)]
Metric = Annotated[str | None, component("metrics", DATA)]
Metrics = Annotated[list[str] | None, component("metrics", DATA, "Repeat it, or name several with commas.")]
Features = Annotated[str | None, component("extractors", DATA)]
Sampler = Annotated[str | None, component("samplers", SAMPLING)]
Diffusion = Annotated[str | None, component("diffusions", SAMPLING)]
Guidance = Annotated[str | None, component("guidances", SAMPLING)]
SamplerSteps = Annotated[
    int | None, typer.Option("--steps", help="Intervals of the sampler.", rich_help_panel=SAMPLING)
]
Count = Annotated[int | None, typer.Option("-n", help="Number of samples.", rich_help_panel=SAMPLING)]
Seed = Annotated[int | None, typer.Option("--seed", help="Sample seed.", rich_help_panel=SAMPLING)]
Ema = Annotated[
    float | None,
    typer.Option(
        "--ema",
        help="Which average of the weights: the decay of a stored one, or the relative width of one to rebuild.",
        rich_help_panel=SAMPLING,
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", help="Step of the checkpoint, by default the newest.", rich_help_panel=SAMPLING)
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Sampling settings that a search saved in the run.",
        rich_help_panel=SAMPLING,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting, as in --set train.lr=2e-4.", metavar="KEY=VALUE", rich_help_panel=RUNNING),
]
Folder = Annotated[Path, typer.Option("--runs", help="The folder of runs.", rich_help_panel=RUNNING)]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, auto.", rich_help_panel=RUNNING)]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="Folder, name or identity of a run, or 'latest'.",
        show_default=True,
        autocompletion=complete_runs,
    ),
]


def layer(flags: Mapping[str, Any], sets: list[str] | None, training: bool = False) -> Any:
    """Return the settings from the flags, then from --set.

    training: whether --steps, --seed and --runs set the training rather than the sampling.
    """
    from sitkit.runs.config.sources import SAMPLING_SETTINGS, TRAINING_SETTINGS, flags_to_layer, read_assignments

    names = TRAINING_SETTINGS if training else SAMPLING_SETTINGS
    return flags_to_layer(flags, read_assignments(sets or []), names, lambda f: f"--{f}" if len(f) > 1 else f"-{f}")
