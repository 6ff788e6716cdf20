"""Commands on components and this machine: list, show, certify, doctor."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import BEGIN_AGAIN
from sitkit.registry import Registry, registries, registry_of, spec
from sitkit.registry.settings_files import settings_files
from sitkit.runtime.errors import UserError

if TYPE_CHECKING:
    from sitkit.registry import Component


@app.command(name="list")
def list_(
    registry: str | None = typer.Argument(None, help="interpolants, targets, ..., presets, experiments, or all."),
    json: bool = options.JSON,
) -> None:
    """List every component, those of plugins included, and the presets and experiments."""
    tables: list[Any] = [files for files in settings_files.values() if registry in (None, files.plural, files.kind)]
    if registry is None:
        tables = [*registries.values(), *tables]
    elif not tables:
        tables = [registry_of(registry, settings_files)]
    entries = {table.plural: [_entry(table, name) for name in table] for table in tables}
    if json:
        return console.as_json(entries)
    for table in tables:
        details = ["fields"] if isinstance(table, Registry) else []
        rows = [
            (e["name"], e["meaning"], *(e[key] for key in details), "" if e["from"] == "sitkit" else e["from"])
            for e in entries[table.plural]
        ]
        if rows:
            console.table((table.plural, "", *details, "plugin"), rows, getattr(table, "flag", ""))
        elif registry:
            console.say(
                f"no {table.plural}: plugins bring them.  Commands take a file in place of a name, as in "
                "`sitkit ablate experiments/table6.yaml`."
            )


def _entry(table: Any, name: str) -> dict[str, str]:
    details = {"fields": _fields(table, name)} if isinstance(table, Registry) else {"path": str(table[name])}
    return {"name": name, "meaning": table.meaning(name), **details, "from": table.origin(name).partition(".")[0]}


def _fields(registry: Any, name: str) -> str:
    if name in registry.presets():
        return ""
    words = []
    for f in dataclasses.fields(registry[name]):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        words.append(f.name if default is MISSING else f"{f.name}={getattr(default, 'name', default)}")
    return " ".join(words)


@app.command()
def show(
    registry: str = typer.Argument(help="interpolant, target, diffusion, timestep, ..."),
    name: str = typer.Argument(help="The component's name."),
    sets: list[str] | None = typer.Option(None, "--set", metavar="FIELD=VALUE", help="A field of the component."),
    run: str | None = typer.Option(
        None, "--run", help="A run on which what kl-eta or the grid 'adapted' needs is measured."
    ),
    runs: Path = options.RUNS,
    picture: Path | None = typer.Option(None, "--picture", help="The file of the plot.", show_default="KIND-NAME.png"),
    json: bool = options.JSON,
) -> None:
    """Show a component: its formula, source and fields, and a plot if it has one."""
    from inspect import getdoc

    from sitkit.runs.config.sources import read_assignments
    from sitkit.runtime.files import file_name

    chosen = registry_of(registry)
    doc = getdoc(chosen[name]) or ""
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
        from sitkit.solvers.guidance import Guidance

        trained = sitkit.load(run, root=runs)
        interps = [trained.config.interp.name]
        component = component if isinstance(component, Guidance) else component.bind(trained)
    if json:
        return console.as_json({"name": name, "doc": doc, "fields": spec(component) if component else None})
    console.say(f"{chosen.kind} {name}   ({chosen.flag} {name}, from {chosen.origin(name)})\n")
    console.say(f"{doc}\n")
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
    interp: str | None = options.INTERP,
    target: str | None = options.TARGET,
    sampler: str | None = options.SAMPLER,
    diffusion: str | None = options.DIFFUSION,
    quick: bool = typer.Option(False, "--quick", help="64 steps and 500 samples: under two minutes."),
    folder: Path = typer.Option(Path("certificates"), "--out", help="The folder of the certificate."),
    json: bool = options.JSON,
) -> None:
    """Check every combination, those of plugins included, against closed-form truth; exit 1 if one is wrong."""
    from sitkit.testing.certify import certificate_to_plain

    names = {"interp": interp, "target": target, "sampler": sampler, "diffusion": diffusion}
    certificate = console.call(sitkit.certify, **names, quick=quick, out=folder, state=BEGIN_AGAIN)
    if json:
        console.as_json(certificate_to_plain(certificate))
    else:
        refusals = [v for v in certificate.verdicts if v.verdict == "refused"]
        counts = Counter((str(dataclasses.replace(v.cell, target="")), v.reason) for v in refusals)
        if counts:
            rows = [(cell, count, reason) for (cell, reason), count in counts.items()]
            console.table(("refused", "targets", "reason"), rows)
        orders: dict[str, list[float]] = {}
        for order in certificate.orders:
            orders.setdefault(f"{order.sampler} ({order.declared})", []).append(order.observed)
        if orders:
            rows = [(name, f"{min(values):.2f} to {max(values):.2f}") for name, values in orders.items()]
            console.table(("sampler (declared order)", "observed"), rows)
        console.say(f"certificate  {folder / 'certificate.json'}   {folder / 'certificate.png'}")
    for line in certificate.wrong:
        console.error(line)
    summary = ", ".join(f"{certificate.count(verdict)} {verdict}" for verdict in ("right", "refused", "wrong"))
    console.note(f"{summary}, {certificate.seconds:.0f} s")
    if certificate.wrong:
        raise typer.Exit(1)


@app.command()
def doctor(json: bool = options.JSON) -> None:
    """Check versions, devices, plugins and the tracking store, and say how to install what is missing; exit 1 if one is broken."""
    from sitkit.testing.doctor import examine_machine

    findings = examine_machine()
    if json:
        console.as_json(findings)
    else:
        rows = [(finding.area, finding.name, finding.state, finding.detail, finding.remedy) for finding in findings]
        console.table(("", "what", "state", "", "what to do"), rows)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
