"""The layout: imports go downwards, heavy libraries are imported in few files, and a list of names needs no torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import sitkit

PACKAGE = Path(sitkit.__file__).parent

PUBLIC: list[str] = vars(sitkit)["__all__"]
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_imports_obey_the_contracts_of_the_project() -> None:
    """The contracts in pyproject.toml: the order of the rooms, and the files that may import a library."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_exists(name: str) -> None:
    assert getattr(sitkit, name) is not None
    assert name in dir(sitkit)


def test_public_names_are_listed_once_and_in_order() -> None:
    assert len(set(PUBLIC)) == len(PUBLIC)
    with pytest.raises(AttributeError, match="No sitkit attribute nothing"):
        _ = sitkit.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_every_module_and_its_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.name != "__main__.py":
        assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


def test_every_module_can_be_imported() -> None:
    for path in MODULES:
        if path.name != "__main__.py":
            importlib.import_module(module_of(path))


HEAVY = ("torch", "numpy", "mlflow", "optuna", "matplotlib", "sklearn", "scipy", "PIL", "torchsde", "torchdiffeq")


@pytest.mark.parametrize(
    ("what", "also"),
    [
        ("import sitkit", ()),
        ("import sitkit.registry as r; [x.names() for x in r.registries.values()]", ()),
        ("import sitkit.registry as r; [c.__doc__ for x in r.registries.values() for c in x.values()]", ()),
        ("import sitkit.cli.commands", ("pydantic",)),
    ],
)
def test_listing_names_imports_nothing_heavy(what: str, also: tuple[str, ...]) -> None:
    watched = (*HEAVY, *also)
    code = f"import sys; {what}; print([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_a_collection_of_helpers() -> None:
    """Code lies in the module of the noun that it serves."""
    for path in MODULES:
        words = set(path.stem.split("_"))
        assert not words & {"util", "utils", "helper", "helpers", "common", "misc", "manager", "factory"}, path


ROOMS = [
    "cli", "data", "evaluation", "models", "presets", "registry", "results", "runs", "runtime", "solvers", "studies",
    "testing", "training", "transport",
]  # fmt: skip
CODE_IN_INIT = {
    "", "cli", "cli/commands", "registry", "registry/scaffold", "results/report", "studies/executors", "studies/search",
    "testing",
}  # fmt: skip


def test_the_rooms_are_those_of_the_layout() -> None:
    top = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert sorted(path.name for path in top if path.is_dir()) == ROOMS
    assert {path.name for path in top if path.is_file()} == {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}


@pytest.mark.parametrize("room", sorted({path.parent for path in MODULES}), ids=lambda room: room.name)
def test_a_room_has_at_most_twelve_files(room: Path) -> None:
    assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 12


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_no_file_is_above_400_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_init_files_are_docstrings() -> None:
    """All but those of the public names and of the packages that offer a name."""
    inits = {
        path.parent.relative_to(PACKAGE).as_posix().removeprefix("."): ast.parse(path.read_text(encoding="utf-8"))
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert len(inits) > 12
    assert {room for room, tree in inits.items() if len(tree.body) != 1 or not ast.get_docstring(tree)} <= CODE_IN_INIT
