"""Policy as test: imports go downwards, heavy libraries stay behind their fences, listing names needs no torch."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sitkit

PACKAGE = Path(sitkit.__file__).parent

# From the ground up; a module may import from its own layer and from those before it.
LAYERS: dict[str, tuple[str, ...]] = {
    "registry": ("loading", "registry", "shipped", "progress", "checkpoint"),
    "algebra": (
        "interpolant", "target", "weighting", "timestep", "coupling", "diffusion", "loss", "noise", "mixture", "span",
    ),
    "parts": ("backbones", "data", "autoencoder"),
    "fields": ("field", "guidance", "sampler", "stepindex", "multistep", "likelihood"),
    "choices": ("metrics", "config", "picture", "chart", "show", "testing"),
    "runs": (
        "provenance", "posthoc", "tracking", "tracker", "world", "share", "npz", "drawn", "reference", "bundle", "hub", "run", "preset", "space", "compare", "study",
    ),
    "training": ("objective", "parallel", "learning", "ema", "throughput", "guard", "state"),
    "verbs": (
        "scaffold", "conformance", "executor", "dispatch", "losscurve", "curvature", "train", "sample", "evaluate", "density",
        "results", "table", "cost", "task", "ablate", "check", "number", "explain", "difference", "verify", "search",
        "certify", "encode", "report", "served", "publish", "doctor", "convert",
    ),
    "doors": ("cli", "__main__", "__init__"),
}  # fmt: skip

FENCES = {
    "mlflow": {"tracking", "served"},
    "optuna": {"search"},
    "ray": {"executor"},
    "typer": {"cli"},
    "rich": {"cli"},
    "diffusers": {"autoencoder"},
    "datasets": {"data"},
    "huggingface_hub": {"hub"},
    "transformers": {"metrics"},
    "torch_fidelity": {"metrics"},
    "torchdiffeq": {"sampler", "likelihood"},
    "torchsde": {"sampler", "stepindex"},
    "matplotlib": {"picture"},
    "jinja2": {"report"},
    "sklearn": {"data", "metrics"},
}

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def part_of(module: str) -> str:
    """sitkit.data.digits -> data; sitkit itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


PARTS = {part_of(module_of(path)) for path in MODULES}


def imported(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, at the top or within a function, but for those named for type checkers alone."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for child in block.body
        for node in ast.walk(child)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: absolute imports only"
            inner = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module in PACKAGES else [node.module]
            )
            found += [(name, node.lineno) for name in inner if name]
    return found


# `from sitkit import span` imports a module, `from sitkit.registry import UserError` does not.
PACKAGES = {module_of(path) for path in MODULES if path.name == "__init__.py"}


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_go_downwards_only(path: Path) -> None:
    height = {part: i for i, parts in enumerate(LAYERS.values()) for part in parts}
    here = part_of(module_of(path))
    assert here in height, f"{module_of(path)} has no layer: put it where it belongs in LAYERS"
    if here == "__init__":
        # Public names are imported when first used.
        assert not [name for name, _ in imported(path) if name.startswith("sitkit")]
        return
    for name, line in imported(path):
        if name.partition(".")[0] != "sitkit":
            continue
        there = part_of(name) if part_of(name) in PARTS else "__init__"
        assert there in height, f"{name} has no layer: put it where it belongs in LAYERS"
        assert height[there] <= height[here], f"{path}:{line}: {here} is below {name} and may not import it"


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_libraries_stay_behind_their_fences(path: Path) -> None:
    here = part_of(module_of(path))
    for name, line in imported(path):
        library = name.partition(".")[0]
        assert here in FENCES.get(library, {here}), f"{path}:{line}: {library} belongs in {', '.join(FENCES[library])}"


@pytest.mark.parametrize("name", sitkit.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(sitkit, name) is not None
    assert name in dir(sitkit)


def test_public_names_are_listed_once_and_in_order() -> None:
    assert len(set(sitkit.__all__)) == len(sitkit.__all__)
    assert set(sitkit._LAZY) == set(sitkit.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sitkit.nothing  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_every_module_says_what_it_is_and_its_public_names_say_it_too(path: Path) -> None:
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
        ("from sitkit.cli.commands import app", ("pydantic",)),
    ],
)
def test_listing_names_imports_nothing_heavy(what: str, also: tuple[str, ...]) -> None:
    watched = (*HEAVY, *also)
    code = f"import sys; {what}; print([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_drawers() -> None:
    """Things live with the noun they serve."""
    for path in MODULES:
        words = set(path.stem.split("_"))
        assert not words & {"util", "utils", "helper", "helpers", "common", "misc", "manager", "factory"}, path
