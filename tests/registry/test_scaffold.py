"""A new plugin of every kind: it installs, obeys the laws, passes its own tests, and is formatted and typed."""

from __future__ import annotations

import json
import keyword
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import call, enter, install, run

from sitkit.registry import registries
from sitkit.registry.scaffold import LONGEST, NAME, class_name, new_plugin
from sitkit.runtime.errors import UserError
from sitkit.testing.plugins import LIGHT, LOADS

KINDS = [registry.kind for registry in registries.values()]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of a new plugin "a-KIND" of each kind, each with the metadata that pip writes."""
    parent = tmp_path_factory.mktemp("packages")
    folders = []
    for registry in registries.values():
        folders.append(new_plugin(f"a-{registry.kind}", registry, parent)[0].parent)
        enter(folders[-1], f"a-{registry.kind}")
    return folders


@pytest.fixture(scope="module")
def site(packages: list[Path]) -> str:
    """Return all of them as a search path."""
    return os.pathsep.join(map(str, packages))


def test_a_new_plugin_of_every_kind_is_lawful(site: str, tmp_path: Path) -> None:
    done = run("sitkit", "plugin", "test", "--json", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {entry["plugin"]["name"]: entry for entry in json.loads(done.stdout)}
    assert set(found) == {f"a-{kind}" for kind in KINDS}
    for kind in KINDS:
        laws = {verdict["law"]: verdict for verdict in found[f"a-{kind}"]["verdicts"]}
        assert {verdict["outcome"] for verdict in laws.values()} == {"holds"}, laws
        # Two laws of the package, the law "filled", five of every component, and those of its kind.
        assert {LOADS[0], LIGHT[0], "filled", "registered", "typed", "recorded"} < set(laws) and len(laws) > 8
        assert {verdict["subject"] for verdict in laws.values()} == {"package", f"{kind} a-{kind}"}


@pytest.mark.slow
def test_the_tests_of_a_new_plugin_pass(packages: list[Path], site: str, tmp_path: Path) -> None:
    tests = [str(folder / "tests") for folder in packages]
    done = run("pytest", "-q", "-p", "no:cacheprovider", *tests, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 18 * len(KINDS) and "skipped" not in done.stdout


def test_a_new_plugin_is_formatted_for_names_of_any_length(packages: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("ruff")
    for registry in registries.values():
        new_plugin("x" * 10 + "-yz" * 7 + "w", registry, tmp_path / registry.kind)
    for parent in (packages[0].parent, tmp_path):
        for words in (["check"], ["format", "--check"]):
            ruff = [sys.executable, "-m", "ruff", *words, "--no-cache", str(parent)]
            done = subprocess.run(ruff, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_new_plugin_is_typed(packages: list[Path], site: str) -> None:
    pytest.importorskip("pyright")
    path = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(packages[0].parent)],
        capture_output=True, text=True, cwd=packages[0].parent, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0 and "0 errors, 0 warnings" in done.stdout, done.stdout


def test_a_new_plugin_installs_by_pip_and_can_be_used(tmp_path: Path) -> None:
    made = call("plugin", "new", "sitkit-grown", "--kind", "backbone", "--into", tmp_path)
    assert made.status == 0 and f"pip install -e {tmp_path / 'sitkit-grown'}" in made.out, made
    installed = tmp_path / "site"
    install(installed, tmp_path / "sitkit-grown")
    assert (installed / "sitkit_grown" / "py.typed").exists() and (installed / "sitkit_grown" / "network.py").exists()
    metadata = next(installed.glob("sitkit_grown-*.dist-info")) / "METADATA"
    assert f"Requires-Dist: sitkit>={version('sitkit')}" in metadata.read_text()
    tiny = ["--set", "backbone.channels=4", "--set", "backbone.depth=1", "--set", "train.batch=4", "--set", "run.track=false",
            "--set", "run.sample_every=0"]  # fmt: skip
    for words in (
        ("plugin", "list"),
        ("plugin", "test", "sitkit-grown"),
        ("train", "--backbone", "grown", "--steps", "2", *tiny),
    ):
        done = run("sitkit", *words, site=installed, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "grown" in done.stdout
    tests = run("pytest", "-q", "-p", "no:cacheprovider", tmp_path / "sitkit-grown", site=installed, cwd=tmp_path)
    assert tests.returncode == 0 and "passed" in tests.stdout, tests.stdout


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("My Path", "interpolant", "Did you mean 'my-path'?"),
        ("my_path", "interpolant", "Did you mean 'my-path'?"),
        ("", "interpolant", "is not a valid name"),
        ("9lives", "interpolant", "Did you mean 'lives'?"),
        ("a--b", "interpolant", "Did you mean 'a-b'?"),
        ("x" * (LONGEST + 1), "interpolant", f"{LONGEST} characters at most"),
        ("../elsewhere", "interpolant", "Did you mean 'elsewhere'?"),
        ("linear", "interpolant", "interpolant 'linear' is already registered by sitkit.transport.interpolant"),
        ("interpolant", "interpolant", "the class Interpolant, which sitkit has"),
        ("feature", "metric", "the class FeatureMetric, which sitkit has"),
        ("mine", "interpolants-of-mine", "No registry 'interpolants-of-mine'. Did you mean 'interpolants'?"),
    ],
)
def test_invalid_names_are_refused_before_any_file_is_written(name: str, kind: str, says: str, tmp_path: Path) -> None:
    done = call("plugin", "new", name, "--kind", kind, "--into", tmp_path)
    assert done.status == 2 and says in " ".join(done.err.split()), done
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    first = new_plugin("mine", registries["targets"], tmp_path)
    before = {path: path.read_bytes() for path in first}
    with pytest.raises(UserError, match="exists and is not overwritten"):
        new_plugin("mine", registries["targets"], tmp_path)
    assert {path: path.read_bytes() for path in first} == before


@given(st.from_regex(NAME, fullmatch=True).filter(lambda name: len(name) <= LONGEST), st.sampled_from(KINDS))
def test_every_name_makes_a_class_or_is_refused(name: str, kind: str) -> None:
    registry = next(registry for registry in registries.values() if registry.kind == kind)
    try:
        cls = class_name(name, registry)
    except UserError:
        return
    assert cls.isidentifier() and not keyword.iskeyword(cls) and cls.lower().endswith(kind)


def test_help_says_what_each_kind_is() -> None:
    said = " ".join(call("plugin", "new", "--help").out.replace("│", " ").split())
    for registry in registries.values():
        assert f"{registry.kind} {registry.purpose}" in said
