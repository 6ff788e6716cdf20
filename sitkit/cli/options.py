"""Options that several commands share.  A group of options is a dataclass, which `grouped` expands into single options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import typer
from rich.markup import escape

from sitkit.registry import Registry, registries
from sitkit.registry.settings_files import SettingsFiles
from sitkit.runtime.errors import UserError

MODEL, SAMPLING, DATA, RUNNING = "What is trained", "How it is sampled", "Data and metric", "Running"


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command that takes dataclasses of options: typer sees each field as an option of its own."""
    signature = inspect.signature(command, eval_str=True)
    hints = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters = []
    for name, parameter in signature.parameters.items():
        fields = inspect.signature(groups[name], eval_str=True).parameters.values() if name in groups else [parameter]
        parameters += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields]

    @functools.wraps(command)
    def expanded(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        command(**values)

    # Typer would prefer a type in `__annotations__` to the type of the signature.
    expanded.__annotations__ = {}
    expanded.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore[reportAttributeAccessIssue]
    return expanded


def complete(table: Registry[Any] | SettingsFiles) -> Callable[[str], list[tuple[str, str]]]:
    """Return the shell completion for the names of components, presets, or experiments."""
    return lambda incomplete: [(name, table.meaning(name)) for name in table if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Complete the names of runs in the default folder, for the shell."""
    names = sorted(path.parent.name for path in Path("runs").glob("*/config.yaml"))
    return [name for name in ("latest", *names) if name.startswith(incomplete)]


def component(plural: str, panel: str, more: str = "") -> Any:
    """Return an option that takes a component's name; its help says what each name means, then `more`."""
    registry = registries[plural]
    names = [name for name in registry.names() if name not in registry.presets()]
    # In docstrings two spaces end a sentence.  Typer prints each paragraph as a line.
    short = {name: shorten(registry.meaning(name).partition(".  ")[0], 80, placeholder=" ...") for name in names}
    meanings = [f"[bold]{name}[/]  {escape(meaning)}" for name, meaning in short.items()]
    if plural == "backbones":
        meanings.append("[bold]sit-{s,b,l,xl}/{2,4,8}[/], [bold]sit-xs/{1,2,4}[/]  presets of sit")
    text, completion = "\n\n".join([*meanings, *filter(None, [more])]), complete(registry)
    option = functools.partial(typer.Option, help=text, metavar="NAME", autocompletion=completion, show_default=False)
    return option(None, registry.flag, rich_help_panel=panel)


# Options of a panel of the help that are None by default.
model_option = functools.partial(typer.Option, None, rich_help_panel=MODEL)
sampling_option = functools.partial(typer.Option, None, rich_help_panel=SAMPLING)
running_option = functools.partial(typer.Option, None, rich_help_panel=RUNNING)

INTERP, TARGET = component("interpolants", MODEL), component("targets", MODEL)
AUTOENCODER = component("autoencoders", MODEL)
SAMPLER, DIFFUSION = component("samplers", SAMPLING), component("diffusions", SAMPLING)
GUIDANCE = component("guidances", SAMPLING)
SAMPLER_STEPS = sampling_option("--steps", help="Intervals of the sampler.")
EMA = sampling_option(
    "--ema", help="Which average of the weights: the decay of a stored one, or the relative width of one to rebuild."
)
STEP = sampling_option("--step", help="Step of the checkpoint, by default the newest.")
PRESET = sampling_option("--preset", help="Sampling settings that a search saved in the run.")
SETS = running_option("--set", help="Any setting, as in --set train.lr=2e-4.", metavar="KEY=VALUE")
RUNS = typer.Option(Path("runs"), "--runs", help="The folder of runs.", rich_help_panel=RUNNING)
RUNS_OR_FILE = running_option("--runs", help="The folder of runs.", show_default="runs")
DEVICE = running_option("--device", help="cpu, cuda, cuda:1, auto.")
CHANGED_PLUGIN = running_option(
    "--changed-plugin",
    metavar="redo|keep",
    help="If the source of a plugin changed since a run was trained: redo removes the run with its numbers and makes them "
    "again, keep uses them as they are.",
)
JSON = typer.Option(False, "--json", help="Machine-readable output.")
RUN = typer.Argument(
    "latest", metavar="RUN", help="Folder, name or identity of a run, or 'latest'.", autocompletion=complete_runs
)


@dataclass(frozen=True)
class TrainingOptions:
    """The components of a run, and the settings of its training."""

    interp: str | None = INTERP
    target: str | None = TARGET
    weight: str | None = component("weightings", MODEL)
    loss: str | None = component("losses", MODEL)
    timestep: str | None = component("timesteps", MODEL)
    coupling: str | None = component("couplings", MODEL)
    backbone: str | None = component("backbones", MODEL)
    autoencoder: str | None = AUTOENCODER
    data: str | None = component("datasets", DATA)
    sampler: str | None = SAMPLER
    diffusion: str | None = DIFFUSION
    guidance: str | None = GUIDANCE
    metric: str | None = component("metrics", DATA)
    steps: int | None = model_option("--steps", help="Optimiser steps.")
    seed: int | None = model_option("--seed", help="Training seed.")


@dataclass(frozen=True)
class SamplingOptions:
    """How the samples of a run are drawn."""

    sampler: str | None = SAMPLER
    diffusion: str | None = DIFFUSION
    guidance: str | None = GUIDANCE
    steps: int | None = SAMPLER_STEPS
    n: int | None = sampling_option("-n", help="Number of samples.")
    seed: int | None = sampling_option("--seed", help="Sample seed.")
    ema: float | None = EMA


@dataclass(frozen=True)
class SeedOptions:
    """The seeds of a study, as the user writes them."""

    seeds: str | None = typer.Option(
        None, "--seeds", metavar="0,1,2", help="Training seeds in place of the study's own."
    )
    sample_seeds: str | None = typer.Option(
        None, "--sample-seeds", metavar="0,1", help="Sampling seeds in place of the study's own."
    )

    def arguments(self) -> dict[str, Any]:
        """Return the seeds as keyword arguments of `ablate` and `check`.  Raises UserError that names the flag."""
        return {name: _seeds(text, f"--{name.replace('_', '-')}") for name, text in vars(self).items()}


def _seeds(text: str | None, flag: str) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise UserError(f"{flag} {text}: write whole numbers with commas, as in {flag} 0,1,2.") from None


@dataclass(frozen=True)
class RunningOptions:
    """Any setting, the folder of runs, and the device."""

    sets: list[str] | None = SETS
    runs: Path | None = RUNS_OR_FILE
    device: str | None = DEVICE

    def arguments(self, **flags: Any) -> dict[str, Any]:
        """Return `runs`, `device` and `settings` for a function that takes a run; settings come from `flags` and --set."""
        settings = layer({**flags, "device": self.device}, self.sets)
        return {"runs": self.runs or Path("runs"), "device": self.device, "settings": settings}

    def training_settings(self, **flags: Any) -> Any:
        """Return the settings from `flags`, --runs, --device and --set, for a training or a study."""
        runs = None if self.runs is None else str(self.runs)
        return layer({**flags, "runs": runs, "device": self.device}, self.sets, training=True)


def layer(flags: dict[str, Any], sets: list[str] | None, training: bool = False) -> Any:
    """Return the settings from the flags, then from --set; an error names the flag.

    training: whether --steps, --seed and --runs set the training rather than the sampling.
    """
    from sitkit.runs.config.sources import SAMPLING_SETTINGS, TRAINING_SETTINGS, flags_to_layer, read_assignments

    names = TRAINING_SETTINGS if training else SAMPLING_SETTINGS
    return flags_to_layer(flags, read_assignments(sets or []), names, lambda f: f"--{f}" if len(f) > 1 else f"-{f}")
