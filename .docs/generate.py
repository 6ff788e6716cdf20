"""A hook of mkdocs: pages from the code (commands, components, reference of public names, gallery) and from the README.

The build fails if a public name has no docstring, so the reference is complete.
"""

from __future__ import annotations

import ast
import inspect
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import sitkit
from sitkit import Registry

PACKAGE = Path(sitkit.__file__).parent
GROUPS = {
    "verbs": "Commands as functions",
    "data": "Data of the commands",
    "mathematics": "Mathematics",
    "extend": "To extend: base classes and what their methods take",
    "registries": "Registries",
}
MATHEMATICS = (
    "Field", "Readings", "Coefficients", "log_prob", "interpolant_loss", "sample_keys", "normal", "uniform",
)  # fmt: skip
GALLERY = {
    "interpolants": "Interpolants: alpha, sigma, their rates, and w along them",
    "diffusions": "Diffusion coefficients w(t) on each interpolant",
    "timesteps": "Time grids and training densities",
    "samplers": "Samplers on three Gaussians whose field is known in closed form",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and pictures to the site."""
    names = public_names()
    missing = [f"{name.module}.{name.name}" for name in names if not name.doc]
    if missing:
        raise PluginError("public names without a docstring:\n" + "\n".join(missing))
    plots = pictures(Path(tempfile.mkdtemp(prefix="sitkit-gallery-")))
    pages = {
        "cli.md": cli_page(),
        "components.md": components_page(),
        "gallery.md": gallery_page(plots),
        "tree.md": tree_page(),
        "reference/index.md": reference_index(names),
    }
    pages |= {f"reference/{group}.md": reference_page(group, names) for group in GROUPS}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in plots.values():
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


class PublicName(NamedTuple):
    """A public name, the module that defines it, its group in the reference, and its docstring."""

    name: str
    module: str
    group: str
    doc: str


def public_names() -> list[PublicName]:
    """Return the names of `sitkit/__init__.pyi`, in its order."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return [
        PublicName(name.name, f"sitkit.{node.module}", group_of(name.name, str(node.module)), docstring_of(name.name))
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]


def group_of(name: str, module: str) -> str:
    """Return the group of a public name: it depends on its type and on the room that defines it."""
    thing, room = getattr(sitkit, name), module.split(".")[0]
    if name in MATHEMATICS:
        return "mathematics"
    if module == "registry.registry" and name != "Component":
        return "registries"
    if room in ("training", "runs", "studies", "results", "testing", "runtime") or module == "models.encode":
        return "verbs" if (inspect.isfunction(thing) and room != "runtime") or name == "Run" else "data"
    return "extend"


def docstring_of(name: str) -> str:
    """Return the docstring of a public name; for a registry, its kind and its flag."""
    thing = getattr(sitkit, name)
    if isinstance(thing, Registry):
        return f"Components of the kind `{thing.kind}`; the flag is `{thing.flag}`."
    return inspect.getdoc(thing) or "" if inspect.isclass(thing) or inspect.isfunction(thing) else "A type."


def tree_page() -> str:
    """Return the section of the README that has the tree of files."""
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    return (
        "---\nhide: [toc]\n---\n\n# Where things are" + text.partition("## Where things are")[2].partition("\n## ")[0]
    )


def first_line(text: str | None) -> str:
    """Return the first line of a docstring."""
    return (text or "").strip().splitlines()[0] if text else ""


def cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def registries() -> list[Registry[Any]]:
    """Return the registries, in the order of the public names."""
    things = [getattr(sitkit, name.name) for name in public_names()]
    return [thing for thing in things if isinstance(thing, Registry)]


def components_page() -> str:
    """Return the page of all registries with their names, meanings and fields."""
    import dataclasses

    lines = [
        "# Components",
        "",
        "Every name that a flag, a YAML file or a plugin can use, as `sitkit list` prints it.",
        "",
    ]
    for registry in registries():
        lines += [f"## {registry.plural} {{ #{registry.plural} }}", "", f"`{registry.flag} NAME`", ""]
        lines += ["| name | meaning | fields |", "|---|---|---|"]
        presets = registry.presets()
        for name in registry.names():
            known = [] if name in presets else [f.name for f in dataclasses.fields(registry[name]) if f.init]
            lines.append(f"| `{name}` | {cell(registry.meaning(name))} | {', '.join(f'`{key}`' for key in known)} |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """Return the page of all commands with their arguments and flags, read from the application."""
    from typer.main import get_command

    from sitkit.cli.commands import app

    lines = [
        "# Command line",
        "",
        "Every flag has a key of the same name in a YAML file.",
        "",
    ]
    return "\n".join(lines + commands(get_command(app), "sitkit", 2)) + "\n"


def commands(command: Any, name: str, level: int) -> list[str]:
    """Return the section of a command, then the sections of its subcommands."""
    lines: list[str] = []
    if name != "sitkit":
        lines += [
            f"{'#' * level} {name}",
            "",
            (command.help or "").strip(),
            "",
            "```text",
            usage(command, name),
            "```",
            "",
        ]
        flags = [p for p in command.params if p.param_type_name == "option"]
        if flags:
            lines += ["| flag | meaning |", "|---|---|"]
            lines += [f"| `{', '.join(p.opts)}` | {cell(p.help or '')} |" for p in flags]
            lines.append("")
    for inner, sub in getattr(command, "commands", {}).items():
        lines += commands(sub, f"{name} {inner}", level + (name != "sitkit"))
    return lines


def usage(command: Any, name: str) -> str:
    """ "sitkit sample [OPTIONS] [RUN]" """
    arguments = []
    for p in command.params:
        if p.param_type_name == "argument":
            word = p.metavar or p.name.upper()
            arguments.append(word if p.required else f"[{word}]")
    return " ".join([name, "[OPTIONS]", *arguments])


def reference_index(names: list[PublicName]) -> str:
    """Return the page with one line for each public name, in groups."""
    lines = ["# Reference", "", "Import every name from `sitkit`.", ""]
    for group, title in GROUPS.items():
        lines += [f"## [{title}]({group}.md)", "", "| name | meaning |", "|---|---|"]
        lines += [f"| `{name.name}` | {cell(first_line(name.doc))} |" for name in names if name.group == group]
        lines.append("")
    return "\n".join(lines)


def reference_page(group: str, names: list[PublicName]) -> str:
    """Return the page with the docstrings of a group."""
    lines = [f"# {GROUPS[group]}", ""]
    for name in names:
        if name.group == group and group == "registries" and name.name != "Registry":
            lines += [f"## {name.name}", "", name.doc, f"[Its components](../components.md#{name.name}).", ""]
        elif name.group == group:
            lines += [
                f"## {name.name}",
                "",
                f"::: {name.module}.{name.name}",
                "    options:",
                "      heading_level: 3",
                "",
            ]
    return "\n".join(lines)


def pictures(folder: Path) -> dict[tuple[str, str], Path]:
    """Draw the picture of `sitkit show` for every component that has one; the keys are (registry, name)."""
    from sitkit.evaluation.component_plots import draw_component

    plots = {}
    for plural in GALLERY:
        registry = getattr(sitkit, plural)
        for name in registry.names():
            path = folder / f"{plural}-{name.replace('/', '-')}.png"
            if name not in registry.presets() and draw_component(registry.create(name), path):
                plots[plural, name] = path
    return plots


def gallery_page(plots: dict[tuple[str, str], Path]) -> str:
    """Return the page of the pictures of interpolants, diffusions, grids and samplers."""
    lines = ["# Gallery", "", "Drawn by `sitkit show` when this page was built.", ""]
    for plural, title in GALLERY.items():
        lines += [f"## {title}", ""]
        for (other, name), path in plots.items():
            if other == plural:
                command = f"sitkit show {getattr(sitkit, plural).kind} {name}"
                lines += [f"`{command}`", "", f"![{command}](pictures/{path.name}){{ width=720 }}", ""]
    return "\n".join(lines)
