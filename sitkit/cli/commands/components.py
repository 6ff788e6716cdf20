"""Commands on components and this machine: list, show, certify, doctor."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import resumable
from sitkit.registry import registries, registry_of, spec
from sitkit.registry.settings_files import settings_files
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from sitkit.registry import Component


@app.command(name="list")
def list_(
    registry: Annotated[
        str | None, typer.Argument(help="interpolants, targets, ..., presets, experiments, or all.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List every component, those of plugins included, and the presets and experiments."""
    groups = [files for files in settings_files.values() if registry in (None, files.plural, files.kind)]
    chosen = (
        []
        if registry and groups
        else [registry_of(registry, settings_files)]
        if registry
        else list(registries.values())
    )
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
        files.plural: [
            {"name": name, "meaning": files.meaning(name), "path": str(files[name]), "from": files.origin(name)}
            for name in files
        ]
        for files in groups
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
    for files in groups:
        rows = [(e["name"], e["meaning"], "" if e["from"] == "sitkit" else e["from"]) for e in entries[files.plural]]
        if rows:
            console.table((files.plural, "", "plugin"), rows)
        elif registry:
            console.say(
                f"no {files.plural}: plugins bring them.  Commands take a file in place of a name, as in "
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
        str | None, typer.Option("--run", help="A run on which what kl-eta or the grid 'adapted' needs is measured.")
    ] = None,
    runs: options.Folder = Path("runs"),
    picture: Annotated[
        Path | None, typer.Option("--picture", help="The file of the plot.", show_default="KIND-NAME.png")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show a component: its formula, source and fields, and a plot if it has one."""
    from inspect import getdoc

    from sitkit.runs.config.sources import read_assignments
    from sitkit.runtime.files import file_name

    chosen = registry_of(registry)
    if name not in chosen:
        chosen[name]
    fields = read_assignments(sets or []).values
    component: Component | None = None
    try:
        component = chosen.create(name, **fields)
    except UserError:
        # A field without default, such as a path, may be missing.  The component is shown without values then.
        if fields:
            raise
    interps: list[str] = []
    if run is not None and component is not None:
        from sitkit.runs.run import load
        from sitkit.solvers.guidance import Guidance

        trained = load(run, root=runs)
        interps = [trained.config.interp.name]
        component = component if isinstance(component, Guidance) else component.bind(trained)
    if json:
        console.as_json({"name": name, "doc": getdoc(chosen[name]), "fields": spec(component) if component else None})
        return
    console.say(f"{chosen.kind} {name}   ({chosen.flag} {name}, from {chosen.origin(name)})\n")
    console.say(getdoc(chosen[name]) or "")
    console.say("")
    values = {k: v for k, v in (spec(component) if component else {}).items() if k != "name"}
    if values:
        console.table(("field", "value"), [(k, _in_short(v)) for k, v in values.items()])
    from sitkit.evaluation.component_plots import draw_component

    if component is not None:
        path = picture or Path(file_name(f"{chosen.kind}-{name}.png"))
        if draw_component(component, path, interps):
            console.say(f"\npicture   {path}")


def _in_short(value: Any) -> Any:
    if isinstance(value, dict):
        return value["name"]
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 8 else value


@app.command()
def certify(
    interp: options.Interp = None,
    target: options.Target = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    quick: Annotated[bool, typer.Option("--quick", help="64 steps and 500 samples: under two minutes.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="The folder of the certificate.")] = Path("certificates"),
    json: options.Json = False,
) -> None:
    """Check every combination, those of plugins included, against closed-form truth; exit 1 if one is wrong."""
    from sitkit.testing.certify import certificate_to_plain
    from sitkit.testing.certify import certify as verb

    with resumable("nothing is written. Begin again with"), console.progress() as progress:
        done = verb(
            interp=interp,
            target=target,
            sampler=sampler,
            diffusion=diffusion,
            quick=quick,
            out=folder,
            progress=progress,
        )
    if json:
        console.as_json(certificate_to_plain(done))
    else:
        refused: dict[tuple[str, str], int] = {}
        for verdict in done.verdicts:
            if verdict.verdict == "refused":
                what = dataclasses.replace(verdict.cell, target="")
                refused[str(what), verdict.reason] = refused.get((str(what), verdict.reason), 0) + 1
        rows = [(what, count, reason) for (what, reason), count in refused.items()]
        if rows:
            console.table(("refused", "targets", "reason"), rows)
        orders: dict[str, list[float]] = {}
        for order in done.orders:
            orders.setdefault(f"{order.sampler} ({order.declared})", []).append(order.observed)
        if orders:
            spread = [(name, f"{min(seen):.2f} to {max(seen):.2f}") for name, seen in orders.items()]
            console.table(("sampler (declared order)", "observed"), spread)
        console.say(f"certificate  {folder / 'certificate.json'}   {folder / 'certificate.png'}")
    for line in done.wrong:
        console.error(line)
    wrong = done.count("wrong")
    console.err.print(
        f"{done.count('right')} right, {done.count('refused')} refused, {wrong} wrong, {done.seconds:.0f} s"
    )
    if done.wrong:
        raise typer.Exit(1)


@app.command()
def doctor(json: options.Json = False) -> None:
    """Check versions, devices, plugins and the tracking store, and say how to install what is missing; exit 1 if one is broken."""
    from sitkit.testing.doctor import examine_machine

    findings = examine_machine()
    if json:
        console.as_json([asdict(finding) for finding in findings])
    else:
        rows = [(finding.area, finding.name, finding.state, finding.detail, finding.remedy) for finding in findings]
        console.table(("", "what", "state", "", "what to do"), rows)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
