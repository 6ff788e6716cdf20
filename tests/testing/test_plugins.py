"""`sitkit plugin test` and `list`: each fault of a plugin is named in a line, and does no harm to other commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import ABSTRACT, GOOD, ROOT, call, install, put, run

PLUGINS = ROOT / "plugins"

LIAR = """
from typing import ClassVar
from sitkit.solvers.ode import FixedStepODE, Tableau

@sitkit.samplers.register("liar")
@dataclass(frozen=True)
class Liar(FixedStepODE):
    "Euler's method, said to be of order 2."
    order: ClassVar[int] = 2
    tableau: ClassVar[Tableau] = Tableau(c=(0.0,), a=((),), b=(1.0,))
    steps: int = 100
"""
CRASHES = """
@sitkit.interpolants.register("crashes")
@dataclass(frozen=True)
class Crashes(Interpolant):
    "A path that raises an error."
    def coefficients(self, t):
        return t.no_such_thing
"""
NEEDY = """
@sitkit.interpolants.register("needy")
@dataclass(frozen=True)
class Needy(Interpolant):
    "A path with a field that must be given."
    power: float
    def coefficients(self, t):
        return Linear().coefficients(t)
"""
FILLED = (
    NEEDY.replace("needy", "filled")
    + """
    @classmethod
    def test_fields(cls):
        return {"power": 1.0}, {"power": 2.0}
"""
)
HEAVY = "import torch\n" + GOOD.format(name="heavy")

# A fault of a plugin, the source, and the message.
BAD = {
    "raises": (GOOD.format(name="half") + "\n1 / 0\n", "package, loads: ZeroDivisionError: division by zero."),
    "vague": (ABSTRACT, "package, loads: interpolant 'vague' (sitkit_vague.Vague) is abstract: it lacks coefficients."),
    "clash": (
        GOOD.format(name="linear"),
        "package, loads: interpolant 'linear' (sitkit_clash.Good) is already registered by sitkit.transport.interpolant.",
    ),
    "liar": (LIAR, "sampler liar, order: liar: declares order 2, shows 1.0"),
    "crashes": (CRASHES, "interpolant crashes, ends: AttributeError: 'Tensor' object has no attribute 'no_such_thing'"),
    "needy": (NEEDY, "interpolant needy, filled: interpolant needy: power: Field required"),
    "heavy": (HEAVY, "package, light: sitkit_heavy: it imports torch: do so inside the functions that need it"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All the bad plugins together, and a good one."""
    site = tmp_path_factory.mktemp("bad")
    for plugin, (source, _) in BAD.items():
        put(site, plugin, source)
    put(site, "good", GOOD.format(name="good"))
    put(site, "filled", FILLED)
    return site


@pytest.fixture(scope="module")
def verdicts(bad: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """Return the records of `sitkit plugin test --json` by plugin, and the lines of its errors."""
    process = run("sitkit", "plugin", "test", "--json", site=bad, cwd=tmp_path_factory.mktemp("here"))
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    records = {entry["plugin"]["name"]: entry for entry in json.loads(process.stdout)}
    return records, [line for line in process.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("plugin", BAD)
def test_a_fault_is_named_in_a_line(plugin: str, verdicts: tuple[dict[str, Any], list[str]]) -> None:
    records, errors = verdicts
    lines = [line for line in errors if line.startswith(f"error: sitkit-{plugin}, ")]
    assert any(BAD[plugin][1] in line for line in lines), lines
    assert len(lines) == sum(v["outcome"] == "broken" for v in records[plugin]["verdicts"])
    assert all(len(line) < 400 for line in lines)
    assert not records[plugin]["ok"]
    if plugin not in ("crashes", "needy"):
        assert len(lines) == 1, "it has no other fault"


def test_an_error_in_one_law_does_not_stop_the_others(verdicts: tuple[dict[str, Any], list[str]]) -> None:
    good = verdicts[0]["good"]
    assert good["ok"] and {v["outcome"] for v in good["verdicts"]} == {"holds"}
    outcomes = {v["law"]: v["outcome"] for v in verdicts[0]["crashes"]["verdicts"]}
    assert outcomes["typed"] == "holds" and outcomes["ends"] == outcomes["derivatives"] == "broken"


@pytest.mark.parametrize(
    ("words", "says"),
    [(("--help",), "evaluate"), (("list", "samplers"), "heun"), (("show", "sampler", "heun", "--json"), "heun")],
)
def test_broken_plugins_do_no_harm_to_other_commands(
    words: tuple[str, ...], says: str, bad: Path, tmp_path: Path
) -> None:
    done = run("sitkit", *words, site=bad, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert says in done.stdout


def test_plugins_are_listed_with_their_state_and_reason(bad: Path, tmp_path: Path) -> None:
    done = run("sitkit", "plugin", "list", "--json", site=bad, cwd=tmp_path, plugins="good,raises,liar")
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)}
    states = {name: entry["state"] for name, entry in entries.items()}
    assert states == {name: "left out" for name in entries} | {"good": "loaded", "liar": "loaded", "raises": "broken"}
    assert entries["raises"]["reason"] == "ZeroDivisionError: division by zero." and not entries["raises"]["kinds"]
    assert entries["liar"]["kinds"] == ["sampler"] and entries["liar"]["package"] == "sitkit-liar"
    assert entries["good"]["version"] == "1.0" and not entries["good"]["reason"]
    (component,) = entries["good"]["components"]
    assert component == {"kind": "interpolant", "name": "good", "meaning": "A path."}
    table = run("sitkit", "plugin", "list", site=bad, cwd=tmp_path, plugins="good,raises")
    assert "ZeroDivisionError" in table.stdout and "interpolant good" in table.stdout


def test_the_instances_have_the_fields_of_test_fields(verdicts: tuple[dict[str, Any], list[str]]) -> None:
    filled = verdicts[0]["filled"]
    assert filled["ok"] and {v["subject"] for v in filled["verdicts"]} == {
        "package", "interpolant filled", "interpolant filled (power=1.0)", "interpolant filled (power=2.0)",
    }  # fmt: skip


def test_a_plugin_that_is_not_installed_or_left_out_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "good", GOOD.format(name="good"))
    for word, plugins, says in (
        ("sitkit-goood", None, "No plugin 'sitkit-goood' is installed. Did you mean 'sitkit-good'?"),
        ("sitkit-good", "", "SITKIT_PLUGINS leaves out 'sitkit-good'"),
    ):
        done = run("sitkit", "plugin", "test", word, site=tmp_path, cwd=tmp_path, plugins=plugins)
        assert done.returncode == 2 and says in done.stderr, done.stderr


def test_without_plugins_the_list_says_how_to_write_one() -> None:
    assert "sitkit plugin new NAME --kind KIND" in call("plugin", "list").out


@pytest.mark.slow
def test_the_five_plugins_of_the_repository_install_together_and_obey_the_laws(tmp_path: Path) -> None:
    pytest.importorskip("ot")
    pytest.importorskip("diffusers")
    site = tmp_path / "site"
    install(site, *sorted(PLUGINS.iterdir()))
    done = run("sitkit", "plugin", "test", "--json", site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {entry["plugin"]["package"]: entry for entry in json.loads(done.stdout)}
    assert set(found) == {"sitkit-meanflow", "sitkit-ot", "sitkit-poly", "sitkit-repa", "sitkit-unet"}
    assert {v["outcome"] for entry in found.values() for v in entry["verdicts"]} == {"holds"}
