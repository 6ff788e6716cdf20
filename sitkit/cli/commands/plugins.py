"""Commands on plugins: plugin new, plugin list, plugin test."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.text import Text

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import BEGIN_AGAIN, resumable
from sitkit.registry import owned, registries, registry_of
from sitkit.registry.settings_files import settings_files

plugin = typer.Typer(no_args_is_help=True, help="Packages that add components: write one, list them, test them.")
app.add_typer(plugin, name="plugin")
# Seconds that `plugin list` gives to the import of each plugin.
LIST_LIMIT = 60.0
STYLES = {"broken": "bold red", "not shown": "dim", "left out": "dim"}


def _kinds(incomplete: str) -> list[tuple[str, str]]:
    return [(r.kind, r.purpose) for r in registries.values() if r.kind.startswith(incomplete)]


def _packages(incomplete: str) -> list[str]:
    from sitkit.registry.loading import find_plugins

    return [plugin.package for plugin in find_plugins() if plugin.package.startswith(incomplete)]


@plugin.command()
def new(
    name: str = typer.Argument(metavar="NAME", help="Name of the component: lower-case words, as in my-path."),
    kind: str = typer.Option(
        ...,
        "--kind",
        metavar="KIND",
        help="\n\n".join(f"[bold]{r.kind}[/]  {escape(r.purpose)}" for r in registries.values()),
        autocompletion=_kinds,
        show_default=False,
    ),
    into: Path = typer.Option(Path(), "--into", help="The folder that the package's folder is made in."),
    json: bool = options.JSON,
) -> None:
    """Write a package that can be installed, with a component of a kind and a test of the laws of that kind."""
    from sitkit.registry.scaffold import new_plugin

    written = new_plugin(name, registry_of(kind), into)
    folder = written[0].parent
    if json:
        return console.as_json({"package": folder.name, "folder": folder, "files": written})
    for path in written:
        console.facts(wrote=path)
    console.facts(next=f"pip install -e {shlex.quote(str(folder))}   |   sitkit plugin test {folder.name}")


@plugin.command(name="list")
def list_(json: bool = options.JSON) -> None:
    """List the installed plugins, their components, and whether each one loaded."""
    from sitkit.registry.loading import load_plugins
    from sitkit.registry.plugin import installed
    from sitkit.testing.plugins import plugin_state

    load_plugins(LIST_LIMIT)
    entries: list[dict[str, Any]] = []
    for package in installed:
        state, reason = plugin_state(package)
        components = owned(package)
        files = [(table, name) for table in settings_files.values() for name in table.names_of(package)]
        entries.append({
            **console.plain(package), "state": state, "reason": reason, "kinds": list(dict.fromkeys(r.kind for r, _ in components)),
            "components": [{"kind": r.kind, "name": name, "meaning": r.meaning(name)} for r, name in components],
            "settings": [{"kind": t.kind, "name": name, "meaning": t.meaning(name)} for t, name in files],
        })  # fmt: skip
    if json:
        console.as_json(entries)
    elif entries:
        rows = []
        for entry in entries:
            brings = ", ".join(f"{part['kind']} {part['name']}" for part in (*entry["components"], *entry["settings"]))
            words = (entry["name"], entry["package"], entry["version"])
            rows.append((*words, _styled(entry["state"]), entry["reason"] or brings))
        console.table(("plugin", "package", "version", "state", "brings"), rows)
    else:
        console.say("no plugin is installed: write one with `sitkit plugin new NAME --kind KIND`.")


def _styled(state: str) -> Text:
    return Text(state, style=STYLES.get(state, ""))


@plugin.command()
def test(
    packages: list[str] | None = typer.Argument(
        None, metavar="PACKAGE...", help="Installed plugins.", show_default="all of them", autocompletion=_packages
    ),
    json: bool = options.JSON,
) -> None:
    """Test the laws on installed plugins, against closed-form truth where it is known; exit 1 if a law is broken."""
    from sitkit.testing.plugins import plugins_named, test_plugin

    chosen = plugins_named(packages or [])
    with resumable(BEGIN_AGAIN), console.progress() as progress:
        results = [test_plugin(package, progress) for package in chosen]
    if json:
        console.as_json([
            {"plugin": result.plugin, "ok": not result.failures, "verdicts": result.verdicts} for result in results
        ])  # fmt: skip
    elif not results:
        console.say("no plugin is installed.")
    else:
        for result in results:
            for subject in dict.fromkeys(law.subject for law in result.verdicts):
                laws = [law for law in result.verdicts if law.subject == subject]
                rows = [(law.law, _styled(law.outcome), law.reason or law.meaning) for law in laws]
                console.table(("law", "", ""), rows, f"{result.plugin}: {subject}")
    for result in results:
        for law in result.failures:
            console.error(f"{result.plugin.package}, {law.subject}, {law.law}: {law.reason}")
    counts = Counter(law.outcome for result in results for law in result.verdicts)
    console.note(f"{counts['holds']} laws hold, {counts['not shown']} not shown here, {counts['broken']} broken")
    if counts["broken"]:
        raise typer.Exit(1)
