"""Settings files of plugins: train, ablate, check and list find them, in installed packages alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import call, enter, run

from sitkit.registry.settings_files import experiments, presets
from sitkit.runtime.errors import UserError


def ship(site: Path, plugin: str, **files: str) -> None:
    """Write a plugin without components but with settings files, as `presets_NAME="text"`."""
    package = site / f"sitkit_{plugin}"
    package.mkdir()
    (package / "__init__.py").write_text('"""Settings."""\n')
    for name, text in files.items():
        folder, _, stem = name.partition("_")
        (package / folder).mkdir(exist_ok=True)
        (package / folder / f"{stem}.yaml").write_text(text)
    enter(site, plugin)


def test_settings_files_of_a_plugin_are_listed(installed: Path, tmp_path: Path) -> None:
    done = run("sitkit", "list", "--json", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    found = {entry["name"]: entry for entry in (*listed["presets"], *listed["experiments"])}
    assert set(found) == {"digits", "imagenet256", "points", "digits-poly", "poly-power"}
    assert found["digits-poly"]["from"] == found["poly-power"]["from"] == "sitkit_poly"
    assert found["digits"]["from"] == "sitkit"
    assert found["digits-poly"]["meaning"].startswith("The preset `digits` with the polynomial path")
    plugins = json.loads(run("sitkit", "plugin", "list", "--json", site=installed, cwd=tmp_path).stdout)
    assert {s["name"] for s in plugins[0]["settings"]} == {"digits-poly", "poly-power"}


def test_train_and_ablate_take_them_by_name(installed: Path, tmp_path: Path) -> None:
    tiny = ["backbone.depth=1", "backbone.hidden_size=32", "backbone.num_heads=2", "train.batch=4", "train.steps=2",
            "run.track=false", "run.sample_every=0"]  # fmt: skip
    sets = [word for setting in tiny for word in ("--set", setting)]
    (tmp_path / "mine.yaml").write_text("interp: {power: 3}\n")
    # A file goes on top of the preset: it sets a field of the preset's interpolant.
    done = run("sitkit", "train", "mine.yaml", "--preset", "digits-poly", *sets, site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (config,) = tmp_path.glob("runs/*/config.yaml")
    assert "name: poly\n  power: 3" in config.read_text()
    done = run("sitkit", "ablate", "poly-power", "--dry-run", "--json", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)
    # Four powers, three seeds, two columns; each run is trained once for both columns.
    assert len(cells) == 24 and len({cell["run"] for cell in cells}) == 12
    (tmp_path / "study.yaml").write_text("base: digits-poly\nrows: [{label: a, sampler: {steps: 3}}]\n")
    done = run("sitkit", "ablate", "study.yaml", "--dry-run", site=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_settings_files_are_tested(tmp_path: Path) -> None:
    ship(
        tmp_path, "wrong",
        presets_odd="# Odd.\ntrain: {stepz: 3}\n",
        presets_fine="data: digits\n",
        experiments_never="rows: [{label: a, sampler: heun, diffusion: kl}]\n",
        experiments_seek="objective: {metric: frechet}\nspace: {sampler: [heun, euler]}\n",
    )  # fmt: skip
    done = run("sitkit", "plugin", "test", "wrong", "--json", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    verdicts = {verdict["subject"]: verdict for verdict in json.loads(done.stdout)[0]["verdicts"]}
    assert verdicts["preset fine"]["outcome"] == verdicts["experiment seek"]["outcome"] == "holds"
    assert "odd.yaml:2: unknown key 'train.stepz'. Did you mean 'steps'?" in verdicts["preset odd"]["reason"]
    assert "never.yaml:1: " in verdicts["experiment never"]["reason"]
    assert "diffusion 'kl' makes an SDE" in verdicts["experiment never"]["reason"]


def test_a_name_that_two_plugins_claim_belongs_to_neither(tmp_path: Path) -> None:
    ship(tmp_path, "first", presets_mine="data: digits\n", experiments_only="rows: [{label: a}]\n")
    ship(tmp_path, "second", presets_mine="data: points\n")
    ship(tmp_path, "third", presets_digits="data: points\n")
    done = run("sitkit", "list", "--json", site=tmp_path, cwd=tmp_path)
    assert done.returncode == 0
    listed = json.loads(done.stdout)
    assert [entry["name"] for entry in listed["presets"]] == ["digits", "imagenet256", "points"]
    assert not listed["experiments"], "and nothing else of a plugin that failed is left"
    assert (
        "Plugin 'first' (sitkit_first) did not load: preset 'mine' is also registered by sitkit_second." in done.stderr
    )
    assert "Plugin 'second'" in done.stderr and "is already registered by sitkit_first." in done.stderr
    assert "Plugin 'third'" in done.stderr and "is already registered by sitkit." in done.stderr
    # If one of them is left out, the other loads.
    alone = run("sitkit", "list", "presets", "--json", site=tmp_path, cwd=tmp_path, plugins="second")
    assert "mine" in alone.stdout and not alone.stderr


def test_installed_packages_alone_are_searched_and_an_unknown_name_is_refused(tmp_path: Path) -> None:
    assert set(presets) == {"digits", "imagenet256", "points"} and not list(experiments)
    for files, word, says in (
        (
            presets,
            "digts",
            r"No preset or file 'digts'\. Did you mean 'digits'\? Presets: digits, imagenet256, points\.",
        ),
        (experiments, "table6", r"No experiment or file 'table6'\. There are no experiments\."),
    ):
        with pytest.raises(UserError, match=says):
            files.find(word)
    refused = call("train", "--preset", "digts")
    assert refused.status == 2 and "Did you mean 'digits'?" in refused.err
    assert presets.find(tmp_path) == tmp_path, "what exists is a file of one's own"
