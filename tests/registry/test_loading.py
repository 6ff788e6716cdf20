"""Plugins: installed by pip, broken, with names in common, abstract, left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ABSTRACT, GOOD, POLY, put, run


def test_an_installed_plugin_is_listed_with_its_package(installed: Path, tmp_path: Path) -> None:
    done = run("sitkit", "list", "interpolants", "--json", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)["interpolants"]}
    assert list(entries) == ["linear", "gvp", "vp-sbdm", "ddpm", "poly"]
    assert entries["poly"]["from"] == "sitkit_poly" and entries["poly"]["fields"] == "power=2.0"
    assert "alpha = 1 - (1 - t)^power" in entries["poly"]["meaning"]


def test_an_installed_plugin_is_shown_and_drawn(installed: Path, tmp_path: Path) -> None:
    done = run("sitkit", "show", "interpolant", "poly", "--set", "power=3", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "interpolant poly   (--interp poly, from sitkit_poly)" in done.stdout and "power" in done.stdout
    assert (tmp_path / "interpolant-poly.png").read_bytes()[:4] == b"\x89PNG"


def test_an_installed_plugin_trains(installed: Path, tmp_path: Path) -> None:
    tiny = ["backbone.depth=1", "backbone.hidden_size=32", "backbone.num_heads=2", "train.batch=4", "run.track=false",
            "run.sample_every=0"]  # fmt: skip
    sets = [word for setting in ["interp.power=3", *tiny] for word in ("--set", setting)]
    done = run("sitkit", "train", "--interp", "poly", "--steps", "2", *sets, site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.glob("runs/*/config.yaml")
    assert "poly" in config.read_text() and "power: 3" in config.read_text()
    record = json.loads((config.parent / "environment.json").read_text())
    assert record["plugins"] == {"poly": "sitkit-poly 0.1.0"}
    assert record["components"] == {"interpolant poly": "sitkit-poly 0.1.0"}
    # Without the plugin the error names the package that the run needs, and the line of its settings.
    for missing, note in ((None, ""), ("", "SITKIT_PLUGINS leaves out poly.")):
        site = installed if missing == "" else tmp_path
        refused = run("sitkit", "sample", "latest", site=site, cwd=tmp_path, plugins=missing)
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        assert "config.yaml:" in refused.stderr and "No interpolant named 'poly'." in refused.stderr
        assert "was made with sitkit-poly 0.1.0: pip install sitkit-poly==0.1.0" in refused.stderr
        assert note in refused.stderr


def test_a_plugins_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    done = run("pytest", "-q", "-p", "no:cacheprovider", str(POLY / "tests"), site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_a_plugin_can_be_left_out(installed: Path, tmp_path: Path) -> None:
    for plugins, there in (("", False), ("another", False), ("poly", True), ("another, poly", True)):
        done = run("sitkit", "list", "interpolants", "--json", site=installed, cwd=tmp_path, plugins=plugins)
        names = [entry["name"] for entry in json.loads(done.stdout)["interpolants"]]
        assert ("poly" in names) == there
        # A listed plugin is used, or a warning says that it is not installed.
        assert ("'another'" in done.stderr) == ("another" in plugins), done.stderr


BROKEN = {
    "raises": (GOOD.format(name="half") + "\n1 / 0\n", "ZeroDivisionError: division by zero"),
    "exits": ("import sys; sys.exit(3)\n", "SystemExit: 3"),
    "misses": ("import a_module_that_is_not_there\n", "No module named 'a_module_that_is_not_there'"),
    "typo": ("def (\n", "SyntaxError"),
    "stops": ("class Stop(BaseException): ...\nraise Stop('now')\n", "Stop: now"),
    "vague": (ABSTRACT, "interpolant 'vague' (sitkit_vague.Vague) is abstract: it lacks coefficients"),
    "clash": (
        GOOD.format(name="linear"),
        "interpolant 'linear' (sitkit_clash.Good) is already registered by sitkit.transport.interpolant",
    ),
    "twice": (
        GOOD.format(name="same") * 2,
        "interpolant 'same' (sitkit_twice.Good) is already registered by sitkit_twice",
    ),
}


@pytest.mark.parametrize("plugin", BROKEN)
def test_a_broken_plugin_is_named_on_every_command_and_the_rest_works(plugin: str, tmp_path: Path) -> None:
    source, reason = BROKEN[plugin]
    put(tmp_path, plugin, source)
    put(tmp_path, "works", GOOD.format(name="works"))
    # For one plugin a command of each kind: it lists, it builds, it is refused, it names no component.
    more = (("show", "interpolant", "works", "--json"), 0), (("show", "interpolant", "half"), 2), (("runs",), 0)
    for command, status in ((("list", "interpolants", "--json"), 0), *(more if plugin == "raises" else ())):
        done = run("sitkit", *command, site=tmp_path, cwd=tmp_path)
        assert done.returncode == status, done.stderr
        assert f"Plugin '{plugin}' (sitkit_{plugin}) did not load: " in done.stderr, command
        assert reason in done.stderr and f"Uninstall sitkit-{plugin}, or leave '{plugin}' out" in done.stderr
        assert "Traceback" not in done.stderr
        if command[0] == "list":
            names = [entry["name"] for entry in json.loads(done.stdout)["interpolants"]]
            assert names == ["linear", "gvp", "vp-sbdm", "ddpm", "works"], "and what it had registered before is gone"


@pytest.mark.parametrize("rivals", [("first", "second"), ("first", "second", "third")])
def test_plugins_with_a_name_in_common_are_all_broken_and_all_named(rivals: tuple[str, ...], tmp_path: Path) -> None:
    for plugin in rivals:
        put(tmp_path, plugin, GOOD.format(name="mine") + GOOD.format(name=f"only-{plugin}"))
    put(tmp_path, "works", GOOD.format(name="works"))
    done = run("sitkit", "list", "interpolants", "--json", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 0
    names = [entry["name"] for entry in json.loads(done.stdout)["interpolants"]]
    assert names == ["linear", "gvp", "vp-sbdm", "ddpm", "works"], "nothing of a plugin that did not load is left"
    for plugin in rivals:
        assert f"Plugin '{plugin}' (sitkit_{plugin}) did not load: interpolant 'mine'" in done.stderr
        assert f"Uninstall sitkit-{plugin}" in done.stderr
    assert "interpolant 'mine' (sitkit_second.Good) is already registered by sitkit_first." in done.stderr
    assert "interpolant 'mine' is also registered by sitkit_second." in done.stderr
    refused = run("sitkit", "train", "--interp", "mine", "--steps", "1", site=tmp_path, cwd=tmp_path)
    assert refused.returncode == 2 and "No interpolant named 'mine'" in refused.stderr
    # If all but one are left out, that one loads.
    alone = run("sitkit", "list", "interpolants", "--json", site=tmp_path, cwd=tmp_path, plugins="second")
    assert {entry["name"] for entry in json.loads(alone.stdout)["interpolants"]} >= {"mine", "only-second"}
    assert not alone.stderr


def test_a_plugin_may_import_another_and_each_owns_its_own_names(tmp_path: Path) -> None:
    """`above` is loaded first and imports `base`; a plugin that fails later keeps the names of the other."""
    put(tmp_path, "base", GOOD.format(name="base"))
    put(tmp_path, "above", "import sitkit_base\n" + GOOD.format(name="above") + "\n1 / 0\n")
    done = run("sitkit", "list", "interpolants", "--json", site=tmp_path, cwd=tmp_path)
    entries = {entry["name"]: entry for entry in json.loads(done.stdout)["interpolants"]}
    assert "above" not in entries and entries["base"]["from"] == "sitkit_base"
    assert "Plugin 'above'" in done.stderr and "Plugin 'base'" not in done.stderr


def test_an_unknown_name_mentions_the_plugin_that_did_not_load(tmp_path: Path) -> None:
    put(tmp_path, "raises", BROKEN["raises"][0])
    done = run("sitkit", "train", "--interp", "half", "--steps", "1", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "No interpolant named 'half'" in done.stderr and "Plugin 'raises'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_entry_point_that_names_no_module_is_named(tmp_path: Path) -> None:
    put(tmp_path, "works", GOOD.format(name="works"))
    for number, value in enumerate(("not a module!", "", "1:2:3")):
        put(tmp_path, f"odd{number}", "")
        (points,) = (tmp_path / f"sitkit_odd{number}-1.0.dist-info").glob("entry_points.txt")
        points.write_text(f"[sitkit.plugins]\nodd{number} = {value}\n")
    done = run("sitkit", "plugin", "list", "--json", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    states = {entry["name"]: entry["state"] for entry in json.loads(done.stdout)}
    assert states == {"works": "loaded", "odd0": "broken", "odd1": "broken", "odd2": "broken"}


def test_what_a_plugin_prints_at_import_is_not_in_the_output(tmp_path: Path) -> None:
    put(tmp_path, "loud", "print('hello')\n" + GOOD.format(name="loud"))
    done = run("sitkit", "list", "interpolants", "--json", site=tmp_path, cwd=tmp_path)
    assert "loud" in [entry["name"] for entry in json.loads(done.stdout)["interpolants"]] and "hello" in done.stderr


def test_an_import_that_never_ends_is_named_and_given_up(tmp_path: Path) -> None:
    put(tmp_path, "endless", "import time\nwhile True: time.sleep(1)\n")
    put(tmp_path, "works", GOOD.format(name="works"))
    code = """if True:
        from sitkit.registry import interpolants, loading
        from sitkit.registry.plugin import broken
        loading.SLOW = 0.2
        loading.load_plugins(1.0)
        print("works" in interpolants, *broken)
    """
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "SITKIT_PLUGINS": "endless,works"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("True Plugin 'endless' (sitkit_endless) did not load: "), done.stderr
    assert "TimeoutError: its import did not end within 1 s." in done.stdout
    assert "Plugin 'endless' (sitkit_endless) is still being imported after 0.2 s." in done.stderr
