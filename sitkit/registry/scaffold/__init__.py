"""Write a new plugin: a package that registers one component and tests it with the laws of its kind."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template

from sitkit.registry import Registry
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import write_file

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PREFIX = "sitkit-"
# The longest name for which the lines of all templates fit the line length.
LONGEST = 32

# A command that uses a component of a kind; the other kinds are used by `sitkit train`.
USES = {
    "autoencoder": "sitkit train --autoencoder $name",
    "dataset": "sitkit train points --data $name",
    "diffusion": "sitkit sample latest --sampler euler-maruyama --diffusion $name",
    "extractor": "sitkit evaluate latest --metric frechet --features $name",
    "guidance": "sitkit sample latest --guidance $name",
    "metric": "sitkit evaluate latest --metric $name",
    "sampler": "sitkit sample latest --sampler $name",
    "target": "sitkit train --target $name --weight velocity",
}
CERTIFIED = ("interpolant", "target", "sampler", "diffusion")


def new_plugin(name: str, registry: Registry, parent: Path) -> list[Path]:
    """Write the package sitkit-NAME.

    Args:
        name: the name of the component and of the entry point, with or without "sitkit-".
        registry: the registry of the component's kind.
        parent: the folder for the package.

    Returns:
        The paths of its files, pyproject.toml first.

    Raises:
        UserError: the name is not valid or not free, or the folder exists; nothing is overwritten.
    """
    name = name.removeprefix(PREFIX)
    cls = class_name(name, registry)
    module, folder = f"sitkit_{name.replace('-', '_')}", parent / f"{PREFIX}{name}"
    if folder.exists():
        raise UserError(f"{folder} exists and is not overwritten: choose another name or --into FOLDER.")
    use = USES.get(registry.kind, f"sitkit train {registry.flag} $name")
    if registry.kind in CERTIFIED:
        use += f"\nsitkit certify {registry.flag} $name --quick"
    words = {
        "name": name,
        "kind": registry.kind,
        "a_kind": f"{'an' if registry.kind[0] in 'aeiou' else 'a'} {registry.kind}",
        "package": folder.name,
        "module": module,
        "cls": cls,
        "use": Template(use).substitute(name=name),
        "version": version("sitkit"),
    }
    templates = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"{module}/__init__.py": f"{registry.kind}.py",
        f"{module}/network.py": f"{registry.kind}.network.py",
        f"tests/test_{module.removeprefix('sitkit_')}.py": f"{registry.kind}.test.py",
    }
    # All files are rendered before the first is written.
    texts = {path: text for path, template in templates.items() if (text := _render(template, words)) is not None}
    texts[f"{module}/py.typed"] = ""
    for path, text in texts.items():
        write_file(folder / path, text)
    return [folder / path for path in texts]


def class_name(name: str, registry: Registry) -> str:
    """Return the name of the class: "MyPathInterpolant" for "my-path".  Raises UserError for an invalid or registered name."""
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        near = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        hint = f" Did you mean {near!r}?" if NAME.fullmatch(near) else ""
        raise UserError(
            f"{name!r} is not a valid name: write lower-case words of a to z and 0 to 9, "
            f"as in 'my-path', {LONGEST} characters at most.{hint}"
        )
    if name in registry:
        raise UserError(
            f"{registry.kind} {name!r} is already registered by {registry.origin(name)}: choose another name."
        )
    kind = registry.kind.capitalize()
    cls = "".join(word.capitalize() for word in name.split("-")).removesuffix(kind) + kind
    own = vars(sys.modules[registry.base_class.__module__]).keys() | {other.__name__ for other in registry.values()}
    if cls in own:
        raise UserError(f"{name!r} would make the class {cls}, which sitkit has: choose another name.")
    return cls


def _render(template: str, words: dict[str, str]) -> str | None:
    source = files("sitkit.registry.scaffold") / "templates" / f"{template}.tmpl"
    return Template(source.read_text(encoding="utf-8")).substitute(words) if source.is_file() else None
