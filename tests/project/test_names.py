"""No public name is defined in two modules: a name says which thing is meant."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import sitkit

PACKAGE = Path(sitkit.__file__).parent


def defined_names(path: Path) -> list[str]:
    """Public functions, classes and constants at the top level of a module, registered components apart."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not any("register" in ast.unparse(decorator) for decorator in node.decorator_list):
                names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def test_no_public_name_is_defined_in_two_modules() -> None:
    modules: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        # The functions of the command line have the names of the commands, as the functions that they call.
        if path.relative_to(PACKAGE).parts[0] != "cli":
            for name in defined_names(path):
                modules[name].append(path.relative_to(PACKAGE).as_posix())
    assert len(modules) > 500
    shared = {name: places for name, places in modules.items() if len(places) > 1}
    assert shared == {}
