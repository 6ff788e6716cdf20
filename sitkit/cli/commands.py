"""The commands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.certify import certify
from sitkit.cli.interrupt import resumable
from sitkit.registry import extractors, registries, registry_of, spec
from sitkit.registry.settings_files import shelves
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from sitkit.registry import Component

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much.",
)


def _version(asked: bool) -> None:
    if asked:
        import sitkit

        console.say(f"sitkit {sitkit.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


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
            help="A preset to start from (`sitkit list presets`); CONFIG goes on top of it.",
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
    """Train a combination; the same command again continues it."""
    from sitkit.runs.config.schema import assemble, read_config
    from sitkit.training.train import train as verb

    flags = {
        "interp": interp, "target": target, "weight": weight, "loss": loss, "timestep": timestep, "coupling": coupling,
        "backbone": backbone, "autoencoder": autoencoder, "data": data, "sampler": sampler, "diffusion": diffusion,
        "guidance": guidance, "metric": metric, "train.steps": steps, "train.seed": seed, "run.folder": str(runs),
        "run.device": device,
    }  # fmt: skip
    named = [name for name in (preset, config) if name is not None] or ["digits"]
    settings = assemble([*map(read_config, named), options.layer(flags, sets)])
    with resumable(), console.progress() as progress:
        folder = verb(settings, progress)
    console.say(f"run       {folder}")
    previews = sorted((folder / "previews").glob("*.png"))
    if previews:
        console.say(f"pictures  {previews[-1]}")
    which = shlex.quote(str(folder))
    console.say(f"next      sitkit sample {which}   |   sitkit evaluate {which}")


def _loaded(
    run: str,
    runs: Path,
    sets: list[str] | None,
    flags: dict[str, Any],
    preset: str | None = None,
    step: int | None = None,
) -> Any:
    from sitkit.runs.config.sampling_presets import read_preset
    from sitkit.runs.config.schema import Layer, merge
    from sitkit.runs.run import find, load

    over = options.layer(flags, sets)
    if preset is not None:
        base = read_preset(find(run, runs), preset)
        over = Layer(merge(base.values, over.values), base.where | over.where)
    return load(run, over=over, root=runs, step=step, device=flags.get("run.device") or "auto")


@app.command()
def sample(
    run: options.RunName = "latest",
    preset: options.PresetName = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    guidance: options.Guidance = None,
    steps: options.SamplerSteps = None,
    n: options.Count = None,
    seed: options.Seed = None,
    ema: options.Ema = None,
    step: options.Step = None,
    adm: Annotated[
        Path | None,
        typer.Option("--adm", help="Also write the samples as ADM's evaluator reads them.", metavar="OUT.npz"),
    ] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Draw samples of a run: a picture, an .npz, and the recipe.  The same command again continues it."""
    from sitkit.runs.sample import sample as verb
    from sitkit.runs.sample import write_adm

    flags = _sampling_flags(sampler, diffusion, guidance, steps, n, seed, ema, device)
    trained = _loaded(run, runs, sets, flags, preset, step)
    if adm is not None and not trained.outline.is_image:
        raise UserError(f"--adm writes images; this run models examples of shape {trained.outline.shape}.")
    with resumable(), console.progress() as progress:
        drawn = verb(trained, progress)
        if adm is not None:
            write_adm(drawn, adm)
    if json:
        console.as_json(drawn.record | {"path": str(drawn.folder)})
        return
    console.say(f"samples   {drawn.folder / 'samples.npz'}   {drawn.n} at {drawn.record['nfe']} evaluations each")
    if adm is not None:
        console.say(f"ADM       {adm}")
    if (drawn.folder / "grid.png").is_file():
        console.say(f"picture   {drawn.folder / 'grid.png'}")
    console.say(f"recipe    {drawn.folder / 'record.json'}")


def _sampling_flags(
    sampler: str | None, diffusion: str | None, guidance: str | None, steps: int | None, n: int | None,
    seed: int | None, ema: float | None, device: str | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "sampler": sampler, "diffusion": diffusion, "guidance": guidance, "sampler.steps": steps, "sample.n": n,
        "sample.seed": seed, "sample.ema": ema, "run.device": device,
    }  # fmt: skip


@app.command()
def evaluate(
    run: options.RunName = "latest",
    preset: options.PresetName = None,
    metric: options.Metrics = None,
    features: options.Features = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    guidance: options.Guidance = None,
    steps: options.SamplerSteps = None,
    n: options.Count = None,
    seed: options.Seed = None,
    ema: options.Ema = None,
    step: options.Step = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure a run's samples against its data, beside what two random halves of the data score.

    Without -n as many samples are drawn as there are examples, at most 50,000; they are drawn once for all metrics.  Run
    again, it continues, and `torchrun --nproc-per-node=N -m sitkit evaluate ...` shares the work.
    """
    from sitkit.runs.evaluate import evaluate as verb

    flags = _sampling_flags(sampler, diffusion, guidance, steps, n, seed, ema, device)
    flags["metric"] = _metrics(metric, features, run, runs)
    trained = _loaded(run, runs, sets, flags, preset, step)
    if n is None and not any(text.startswith("sample.n=") for text in sets or []):
        from dataclasses import replace

        drawn = trained.config.sample.model_copy(update={"n": min(len(trained.examples) or 50_000, 50_000)})
        trained = replace(trained, config=trained.config.model_copy(update={"sample": drawn}))
    with resumable(), console.progress() as progress:
        done = verb(trained, progress)
    if json:
        console.as_json([evaluation.record | {"path": str(evaluation.path)} for evaluation in done])
        return
    rows = [
        (
            evaluation.record["metric"]["name"],
            evaluation.record["metric"].get("features", {}).get("name", ""),
            f"{evaluation.value:.4g}",
            "-" if evaluation.record["stderr"] is None else f"{evaluation.record['stderr']:.2g}",
            "-" if evaluation.record["halves"] is None else f"{evaluation.record['halves']:.4g}",
            evaluation.record["n"],
            evaluation.record["sampling"]["nfe"],
        )
        for evaluation in done
    ]
    notes = [note for evaluation in done for note in evaluation.record["notes"]]
    for record in (evaluation.record for evaluation in done):
        if record["reference"]["file"]:
            notes.append(f"{record['metric']['name']}: against the statistics in {record['reference']['file']}.")
    if any(evaluation.record["halves"] is not None for evaluation in done):
        notes.append("halves: the same metric between two random halves of the data.")
    seen = {e.record["metric"]["features"]["name"]: e.record["features"] for e in done if e.record["features"]}
    for name, told in seen.items():
        if "accuracy" in told:
            accuracy = "unknown" if told["accuracy"] is None else f"{told['accuracy']:.4g}"
            notes.append(f"{name}: accuracy on {told['heldout']} held-out examples {accuracy}.")
    console.table(
        ("metric", "features", "value", "stderr", "halves", "n", "NFE"), rows, notes=list(dict.fromkeys(notes))
    )
    for evaluation in done:
        console.say(f"recipe    {evaluation.path}")


def _metrics(metric: list[str] | None, features: str | None, run: str, runs: Path) -> Any:
    """The metrics that were named, one or more, with the features that were; None if neither was."""
    from sitkit.runs.run import located, read_config_of

    names = [name.strip() for text in metric or [] for name in text.split(",")]
    if features is None:
        return names[0] if len(names) == 1 else names or None
    if not names:
        names = [chosen.name for chosen in read_config_of(located(run, runs)).metric]
    try:
        extractors.parse(features)
    except UserError as error:
        raise UserError(f"--features: {error}") from None
    each: list[Any] = [{"name": name, "features": features} for name in names]
    return each[0] if len(each) == 1 else each


app.command()(certify)


@app.command(name="list")
def list_(
    registry: Annotated[
        str | None, typer.Argument(help="interpolants, targets, ..., presets, experiments, or all.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Every component that can be named, plugins included, and the settings that have names."""
    files = [shelf for shelf in shelves.values() if registry in (None, shelf.plural, shelf.kind)]
    chosen = [] if registry and files else [registry_of(registry, shelves)] if registry else list(registries.values())
    entries = {
        r.plural: [
            {
                "name": name,
                "meaning": r.meaning(name),
                "fields": _fields(r, name),
                "from": r.origin(name).partition(".")[0],
            }
            for name in r.names()
        ]
        for r in chosen
    }
    entries |= {
        shelf.plural: [
            {"name": name, "meaning": shelf.meaning(name), "path": str(shelf[name]), "from": shelf.origin(name)}
            for name in shelf
        ]
        for shelf in files
    }
    if json:
        console.as_json(entries)
        return
    for r in chosen:
        rows = [
            (e["name"], e["meaning"], e["fields"], "" if e["from"] == "sitkit" else e["from"])
            for e in entries[r.plural]
        ]
        console.table((r.plural, "", "fields", "plugin"), rows, f"{r.flag}")
    for shelf in files:
        rows = [(e["name"], e["meaning"], "" if e["from"] == "sitkit" else e["from"]) for e in entries[shelf.plural]]
        if rows:
            console.table((shelf.plural, "", "plugin"), rows)
        elif registry:
            console.say(
                f"no {shelf.plural}: plugins bring them.  Commands take a file in place of a name, as in "
                "`sitkit ablate experiments/table6.yaml`."
            )


def _fields(registry: Any, name: str) -> str:
    from dataclasses import MISSING, fields

    if name in registry.presets():
        return ""
    shown = []
    for f in fields(registry[name]):
        if f.default is MISSING and f.default_factory is MISSING:
            shown.append(f.name)
        else:
            default = f.default if f.default is not MISSING else f.default_factory()  # pyright: ignore[reportCallIssue]
            shown.append(f"{f.name}={getattr(default, 'name', default)}")
    return " ".join(shown)


@app.command()
def show(
    registry: Annotated[str, typer.Argument(help="interpolant, target, diffusion, timestep, ...")],
    name: Annotated[str, typer.Argument(help="The component's name.")],
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field of the component.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="A run on which to measure what kl-eta or the grid 'adapted' needs.")
    ] = None,
    runs: options.Folder = Path("runs"),
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Where the plot goes.", show_default="KIND-NAME.png")
    ] = None,
    json: options.Json = False,
) -> None:
    """One component: its formula, source and fields, and a plot where there is one."""
    from inspect import getdoc

    from sitkit.runs.checkpoint import file_name
    from sitkit.runs.config.schema import read_assignments

    chosen = registry_of(registry)
    if name not in chosen:
        chosen[name]
    fields = read_assignments(sets or []).values
    component: Component | None = None
    try:
        component = chosen.create(name, **fields)
    except UserError:
        # A component may have a field without default (a path); it is shown all the same unless fields were given.
        if fields:
            raise
    interps: list[str] = []
    if run is not None and component is not None:
        from sitkit.runs.curvature import fitted
        from sitkit.runs.run import load

        trained = load(run, root=runs)
        component, interps = fitted(component, trained), [trained.config.interp.name]
    if json:
        console.as_json({"name": name, "doc": getdoc(chosen[name]), "fields": spec(component) if component else None})
        return
    console.say(f"{chosen.kind} {name}   ({chosen.flag} {name}, from {chosen.origin(name)})\n")
    console.say(getdoc(chosen[name]) or "")
    console.say("")
    values = {k: v for k, v in (spec(component) if component else {}).items() if k != "name"}
    if values:
        console.table(("field", "value"), [(k, _in_short(v)) for k, v in values.items()])
    from sitkit.evaluation.component_plots import draw

    if component is not None:
        path = picture or Path(file_name(f"{chosen.kind}-{name}.png"))
        if draw(component, path, interps):
            console.say(f"\npicture   {path}")


def _in_short(value: Any) -> Any:
    if isinstance(value, dict):
        return value["name"]
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value


@app.command()
def runs(
    runs: options.Folder = Path("runs"),
    json: options.Json = False,
) -> None:
    """The runs on disk and how far they are."""
    from sitkit.runs import checkpoint
    from sitkit.runs.run import read_config_of
    from sitkit.runs.run import runs as folders

    rows = []
    for folder in folders(runs):
        found = checkpoint.checkpoints(folder / "checkpoints")
        step = int(found[-1].stem.rpartition("-")[2]) if found else 0
        total = read_config_of(folder).train.steps
        evaluations = [checkpoint.read_json(path) for path in sorted((folder / "evaluations").glob("*.json"))]
        told = [e for e in evaluations if {"value", "metric"} <= e.keys()]
        best = ", ".join(f"{float(e['value']):.4g} {e['metric']['name']}" for e in told[:3])
        rows.append({"run": str(folder), "step": step, "of": total, "samplings": len(list(folder.glob("samples/*/record.json"))),
                     "evaluations": len(evaluations), "first": best})  # fmt: skip
    if json:
        console.as_json(rows)
    elif rows:
        shown = [
            (
                Path(row["run"]).name if runs == Path("runs") else row["run"],
                f"{row['step']}/{row['of']}",
                "; ".join(
                    [
                        *filter(None, [row["first"]]),
                        *(f"{row[what]} {what}" for what in ("samplings", "evaluations") if row[what]),
                    ]
                ),
            )
            for row in rows
        ]
        console.table(("run", "step", ""), shown, cut=True)
    else:
        console.say(f"no runs in {runs}: make one with `sitkit train`.")


# Commands in files of their own, which take `app` from here.
import sitkit.cli.check  # noqa: E402
import sitkit.cli.convert  # noqa: E402
import sitkit.cli.doctor  # noqa: E402
import sitkit.cli.encode  # noqa: E402
import sitkit.cli.plugin  # noqa: E402
import sitkit.cli.report  # noqa: E402
import sitkit.cli.search  # noqa: E402
import sitkit.cli.study  # noqa: E402, F401
