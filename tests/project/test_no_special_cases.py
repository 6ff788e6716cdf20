"""What a component needs or can do is said by its class, not by a check of its class or name elsewhere."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import sitkit
from sitkit.registry import registries

PACKAGE = Path(sitkit.__file__).parent

# (file, class or name) -> why this place may know it.
ALLOWED = {
    ("runs/exchange/convert.py", "SiTBackbone"): "the official code has this network alone",
    ("runs/exchange/export.py", "SiTBackbone"): "the official code has this network alone",
    ("solvers/multistep.py", "KL"): "an exact step of the SDE is known for this w alone",
}


def classes() -> dict[str, Path]:
    """Every registered class of the package, with its file."""
    known = {cls for registry in registries.values() for cls in registry.values()}
    return {cls.__name__: Path(inspect.getfile(cls)) for cls in known if cls.__module__.startswith("sitkit.")}


def special_cases(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Checks over a class of another file, and comparisons of `.name` with the name of a component."""
    names = {name for registry in registries.values() for name in registry.names()}
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            for part in ast.walk(node.args[1]):
                name = ast.unparse(part)
                if name in known and known[name] != path:
                    yield name, node.lineno
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and side.attr == "name" for side in sides):
                literals = (part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant))
                yield from ((str(value), node.lineno) for value in literals if value in names)


def test_no_code_knows_a_component_by_its_class_or_name() -> None:
    known, used = classes(), set()
    for path in PACKAGE.rglob("*.py"):
        file = path.relative_to(PACKAGE).as_posix()
        for name, line in special_cases(path, known):
            assert (file, name) in ALLOWED, (
                f"sitkit/{file}:{line} checks for {name!r}: give the base class an attribute"
            )
            used.add((file, name))
    assert used == set(ALLOWED)


def test_a_special_case_is_found(tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text('a = isinstance(x, KL | None)\nb = c.sampler.name in ("heun", "euler")\n')
    assert list(special_cases(path, classes())) == [("KL", 1), ("heun", 2), ("euler", 2)]
