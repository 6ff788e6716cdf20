"""What the site takes from the code itself: command pages, component tables, module reference, the gallery's pictures.

A hook of mkdocs.  The build fails where a public name has no docstring, so that the reference has no holes.
"""

from __future__ import annotations

import ast
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import sitkit
from sitkit.registry import registries

PACKAGE = Path(sitkit.__file__).parent
GALLERY = {
    "interpolants": "Interpolants: alpha, sigma, their rates, and w along them",
    "diffusions": "Diffusion coefficients w(t) on each interpolant",
    "timesteps": "Time grids and training densities",
    "samplers": "Samplers on three Gaussians whose field is known in closed form",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and pictures to the site."""
    modules = public_modules()
    missing = [name for path in modules.values() for name in undocumented(path)]
    if missing:
        raise PluginError("public names without a docstring:\n" + "\n".join(missing))
    drawn = pictures(Path(tempfile.mkdtemp(prefix="sitkit-gallery-")))
    pages = {
        "cli.md": cli_page(),
        "components.md": components_page(),
        "gallery.md": gallery_page(drawn),
        "reference/index.md": reference_index(modules),
    }
    pages |= {f"reference/{name}.md": f"# {name}\n\n::: {name}\n" for name in modules}
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for path in drawn.values():
        files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files


def public_modules() -> dict[str, Path]:
    """Dotted names of the modules that the reference shows, by name; the command line has pages of its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts[-1].startswith("_") or "cli" in parts or any(part in ("templates", "presets") for part in parts):
            continue
        found[".".join(parts)] = path
    return found


def undocumented(path: Path) -> list[str]:
    """ "file:line: name" of each public function, class and method without a docstring; overrides are documented above."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    holes = [] if ast.get_docstring(tree) else [f"{path}:1: the module"]
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            holes.append(f"{path}:{node.lineno}: {node.name}")
    return holes


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
        "What a flag can say, a YAML file can say by the same name.",
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


def reference_index(modules: dict[str, Path]) -> str:
    """A line for each module."""
    lines = ["# Modules", "", "| module | |", "|---|---|"]
    for name, path in modules.items():
        meaning = cell(first_line(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))))
        lines.append(f"| [`{name}`]({name}.md) | {meaning} |")
    return "\n".join(lines) + "\n"


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
