"""Commands on plugins: plugin new, plugin list, plugin test."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import resumable
from sitkit.registry import owned, registries, registry_of
from sitkit.registry.settings_files import settings_files

plugin = typer.Typer(no_args_is_help=True, help="Packages that add components: write one, list them, test them.")
app.add_typer(plugin, name="plugin")
STYLES = {"broken": "bold red", "not shown": "dim", "left out": "dim"}


def _kinds(incomplete: str) -> list[tuple[str, str]]:
    return [(r.kind, r.purpose) for r in registries.values() if r.kind.startswith(incomplete)]


def _packages(incomplete: str) -> list[str]:
    from sitkit.registry.loading import find_plugins

    return [found.package for found in find_plugins() if found.package.startswith(incomplete)]


@plugin.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the component: lower-case words, as in my-path.")],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="\n\n".join(f"[bold]{r.kind}[/]  {escape(r.purpose)}" for r in registries.values()),
            autocompletion=_kinds,
            show_default=False,
        ),
    ],
    into: Annotated[Path, typer.Option("--into", help="The folder that the package's folder is made in.")] = Path(),
    json: options.Json = False,
) -> None:
    """Write a package that installs, registers a component of a kind, and tests it by the laws of that kind."""
    from sitkit.registry.scaffold import new_plugin

    written = new_plugin(name, registry_of(kind), into)
    folder = written[0].parent
    if json:
        console.as_json({"package": folder.name, "folder": str(folder), "files": [str(path) for path in written]})
        return
    for path in written:
        console.say(f"wrote     {path}")
    console.say(f"next      pip install -e {shlex.quote(str(folder))}   |   sitkit plugin test {folder.name}")


@plugin.command(name="list")
def list_(json: options.Json = False) -> None:
    """The plugins that are installed, what they bring, and what became of each when it was loaded."""
    from sitkit.registry.loading import load_plugins
    from sitkit.registry.plugin import installed
    from sitkit.testing.plugins import plugin_state

    load_plugins()
    entries: list[dict[str, Any]] = []
    for found in installed:
        state, reason = plugin_state(found)
        brought = owned(found)
        entries.append({
            "name": found.name, "package": found.package, "version": found.version, "module": found.module,
            "state": state, "reason": reason, "kinds": list(dict.fromkeys(r.kind for r, _ in brought)),
            "components": [{"kind": r.kind, "name": name, "meaning": r.meaning(name)} for r, name in brought],
            "settings": [
                {"kind": files.kind, "name": name, "meaning": files.meaning(name)}
                for files in settings_files.values()
                for name in files.names_of(found)
            ],
        })  # fmt: skip
    if json:
        console.as_json(entries)
    elif entries:
        rows = [
            (e["name"], e["package"], e["version"], Text(e["state"], style=STYLES.get(e["state"], "")),
             e["reason"] or ", ".join(f"{c['kind']} {c['name']}" for c in (*e["components"], *e["settings"])))
            for e in entries
        ]  # fmt: skip
        console.table(("plugin", "package", "version", "state", "brings"), rows)
    else:
        console.say("no plugin is installed: write one with `sitkit plugin new NAME --kind KIND`.")


@plugin.command()
def test(
    packages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PACKAGE...", help="Installed plugins.", show_default="all of them", autocompletion=_packages
        ),
    ] = None,
    json: options.Json = False,
) -> None:
    """Try the laws on installed plugins, by closed-form truth where there is one; exit 1 if a law is broken."""
    from sitkit.testing.plugins import plugins_named, test_plugin

    chosen = plugins_named(packages or [])
    with resumable("nothing is written. Begin again with"), console.progress() as progress:
        found = [test_plugin(one, progress) for one in chosen]
    if json:
        console.as_json([
            {"plugin": asdict(one.plugin), "ok": not one.failures, "verdicts": [asdict(v) for v in one.verdicts]}
            for one in found
        ])  # fmt: skip
    elif not found:
        console.say("no plugin is installed.")
    else:
        for one in found:
            subjects = list(dict.fromkeys(verdict.subject for verdict in one.verdicts))
            for subject in subjects:
                rows = [
                    (v.law, Text(v.outcome, style=STYLES.get(v.outcome, "")), v.reason if v.reason else v.meaning)
                    for v in one.verdicts
                    if v.subject == subject
                ]
                console.table(("law", "", ""), rows, f"{one.plugin}: {subject}")
    for one in found:
        for verdict in one.failures:
            console.error(f"{one.plugin.package}, {verdict.subject}, {verdict.law}: {verdict.reason}")
    counts = Counter(verdict.outcome for one in found for verdict in one.verdicts)
    console.err.print(f"{counts['holds']} laws hold, {counts['not shown']} not shown here, {counts['broken']} broken")
    if counts["broken"]:
        raise typer.Exit(1)
