"""Pages that are generated from the code: commands, components, the reference of public names, the gallery.

A hook of mkdocs.  The build fails where a public name has no docstring, so that the reference has no holes.
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
from sitkit.registry import Registry, registries

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
    drawn = pictures(Path(tempfile.mkdtemp(prefix="sitkit-gallery-")))
    pages = {
        "cli.md": cli_page(),
        "components.md": components_page(),
        "gallery.md": gallery_page(drawn),
        "reference/index.md": reference_index(names),
    }
    pages |= {f"reference/{group}.md": reference_page(group, names) for group in GROUPS}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in drawn.values():
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


class PublicName(NamedTuple):
    """A name of the stub, the module that defines it, its group in the reference, and its docstring."""

    name: str
    module: str
    group: str
    doc: str


def public_names() -> list[PublicName]:
    """The names that `sitkit/__init__.pyi` states."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return [
        PublicName(name.name, f"sitkit.{node.module}", group_of(name.name, str(node.module)), docstring_of(name.name))
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]


def group_of(name: str, module: str) -> str:
    """The group of a public name, by what it is and by the room that defines it."""
    thing, room = getattr(sitkit, name), module.split(".")[0]
    if name in MATHEMATICS:
        return "mathematics"
    if module == "registry.registry" and name != "Component":
        return "registries"
    if room in ("training", "runs", "studies", "results", "testing", "runtime") or module == "models.encode":
        return "verbs" if (inspect.isfunction(thing) and room != "runtime") or name == "Run" else "data"
    return "extend"


def docstring_of(name: str) -> str:
    """The docstring of a public name; of a registry, its kind."""
    thing = getattr(sitkit, name)
    if isinstance(thing, Registry):
        return f"Components of the kind `{thing.kind}`; the flag is `{thing.flag}`."
    return inspect.getdoc(thing) or "" if inspect.isclass(thing) or inspect.isfunction(thing) else "A type."


def first_line(text: str | None) -> str:
    """The first line of a docstring."""
    return (text or "").strip().splitlines()[0] if text else ""


def cell(text: str) -> str:
    """Text that may stand in a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def components_page() -> str:
    """Every registry with its names, meanings and fields."""
    import dataclasses

    lines = [
        "# Components",
        "",
        "Every name that a flag, a YAML file or a plugin can use, as `sitkit list` prints it.",
        "",
    ]
    for registry in registries.values():
        lines += [f"## {registry.plural} {{ #{registry.plural} }}", "", f"`{registry.flag} NAME`", ""]
        lines += ["| name | meaning | fields |", "|---|---|---|"]
        presets = registry.presets()
        for name in registry.names():
            known = [] if name in presets else [f.name for f in dataclasses.fields(registry[name]) if f.init]
            lines.append(f"| `{name}` | {cell(registry.meaning(name))} | {', '.join(f'`{key}`' for key in known)} |")
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    """Every command with its arguments and flags, read from the application itself."""
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
    """The section of a command, then those of the commands in it."""
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
    """A line for each public name, in groups."""
    lines = ["# Reference", "", "Import every name from `sitkit`.", ""]
    for group, title in GROUPS.items():
        lines += [f"## [{title}]({group}.md)", "", "| name | meaning |", "|---|---|"]
        lines += [f"| `{name.name}` | {cell(first_line(name.doc))} |" for name in names if name.group == group]
        lines.append("")
    return "\n".join(lines)


def reference_page(group: str, names: list[PublicName]) -> str:
    """The docstrings of a group."""
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
    """(registry, name) to the picture of `sitkit show`, drawn now, for every component that has one."""
    from sitkit.evaluation.component_plots import draw_component

    drawn = {}
    for plural in GALLERY:
        registry = registries[plural]
        for name in registry.names():
            path = folder / f"{plural}-{name.replace('/', '-')}.png"
            if name not in registry.presets() and draw_component(registry.create(name), path):
                drawn[plural, name] = path
    return drawn


def gallery_page(drawn: dict[tuple[str, str], Path]) -> str:
    """Formulas, grids and samplers as `sitkit show` draws them."""
    lines = ["# Gallery", "", "Drawn by `sitkit show` when this page was built.", ""]
    for plural, title in GALLERY.items():
        lines += [f"## {title}", ""]
        for (other, name), path in drawn.items():
            if other == plural:
                command = f"sitkit show {registries[plural].kind} {name}"
                lines += [f"`{command}`", "", f"![{command}](pictures/{path.name}){{ width=720 }}", ""]
    return "\n".join(lines)
