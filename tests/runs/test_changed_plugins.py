"""A plugin whose source changes under the same name and version: results of the old source are not given as the new one's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from support import GOOD, HEADER, STUDY, flags, put, run, tiny, write_study

import sitkit
from sitkit.registry.plugin import Plugin
from sitkit.runs.changed_plugins import changed_plugins, settle_changed_plugins, warn_of_changed_number
from sitkit.runtime.errors import UserError

SAID = "The source of plugin 'bend' (sitkit-bend 1.0) changed since"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the installed plugin sitkit-bend, which registers the interpolant `bend`."""
    folder = tmp_path / "site"
    folder.mkdir()
    put(folder, "bend", GOOD.format(name="bend"))
    return folder


def change(site: Path) -> None:
    """Change a formula of the plugin; its name and its version stay."""
    text = GOOD.format(name="bend").replace("coefficients(t)", "coefficients(t * 1)")
    (site / "sitkit_bend.py").write_text(HEADER + text)


def said(error: str) -> str:
    """Return an error or a warning as one line."""
    return " ".join(error.split())


def test_a_run_of_another_source_is_named_refused_kept_or_made_again(site: Path, tmp_path: Path) -> None:
    train = ("sitkit", "train", "points", *flags("train.steps=4"), "--interp", "bend")
    assert run(*train, site=site, cwd=tmp_path).returncode == 0
    (config,) = tmp_path.glob("runs/*/config.yaml")
    recorded = json.loads((config.parent / "environment.json").read_text())["plugin_sources"]
    change(site)
    (checkpoint,) = config.parent.glob("checkpoints/*.safetensors")
    before = checkpoint.stat().st_mtime_ns
    refused = run(*train, site=site, cwd=tmp_path)
    assert refused.returncode == 2 and f"{SAID} {config.parent.name} was trained" in said(refused.stderr)
    assert "--changed-plugin redo" in said(refused.stderr) and checkpoint.stat().st_mtime_ns == before
    for words in (("sample", "latest", "-n", "4", "--steps", "2"), ("report", "latest")):
        done = run("sitkit", *words, site=site, cwd=tmp_path)
        assert done.returncode == 0 and SAID in said(done.stderr), (words, done.stderr)
    assert "sitkit-bend 1.0) changed since" in (config.parent / "report.html").read_text()
    kept = run(*train, "--changed-plugin", "keep", site=site, cwd=tmp_path)
    assert kept.returncode == 0 and SAID in said(kept.stderr) and checkpoint.stat().st_mtime_ns == before
    again = run(*train, "--changed-plugin", "redo", site=site, cwd=tmp_path)
    assert again.returncode == 0 and checkpoint.stat().st_mtime_ns != before
    assert json.loads((config.parent / "environment.json").read_text())["plugin_sources"] != recorded
    assert not (config.parent / "samples").exists() and len(list((tmp_path / "runs").iterdir())) == 1


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(UserError, match=r"changed_plugin 'drop': no such choice. Known: redo, keep"):
        settle_changed_plugins([], "drop")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", ["sampler", "metric"])
def test_a_component_of_another_source_is_named_when_its_result_is_used_again(kind: str, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    component = config.sampler if kind == "sampler" else config.metric[0]
    name = component.name
    plugin = Plugin("mine", type(component).__module__, "sitkit-mine", "1.0")
    registry = sitkit.samplers if kind == "sampler" else sitkit.metrics
    claims = registry._claims[name]
    now = {"plugin_sources": {"mine": plugin.source_digest()}}
    then = {"plugin_sources": {"mine": "0" * 64}}
    registry._claims[name] = [dataclasses.replace(claims[0], plugin=plugin)]
    try:
        assert changed_plugins(now, [component]) == [] == changed_plugins({}, [component])
        assert changed_plugins(then, [component]) == ["plugin 'mine' (sitkit-mine 1.0)"]
        record = {"environment": then, "sampling": {"environment": then}}
        with pytest.warns(UserWarning, match="source of plugin 'mine'"):
            warn_of_changed_number(record, config, config.metric[0])
    finally:
        registry._claims[name] = claims


def test_a_study_over_runs_of_another_source_stops(site: Path, tmp_path: Path) -> None:
    write_study(tmp_path, STUDY.replace("gvp", "bend").replace("[3, 6]", "[3]").replace(', "6": 2', ""))
    study = ("sitkit", "ablate", "study.yaml", "--set", "train.steps=4")
    done = run(*study, site=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/evaluations/*.json")}
    assert len(records) == 2
    change(site)
    refused = run(*study, site=site, cwd=tmp_path)
    assert refused.returncode == 2 and SAID in said(refused.stderr) and "more runs" not in said(refused.stderr)
    kept = run(*study, "--changed-plugin", "keep", site=site, cwd=tmp_path)
    assert kept.returncode == 0 and SAID in said(kept.stderr)
    assert {path: path.stat().st_mtime_ns for path in records} == records
    again = run(*study, "--changed-plugin", "redo", site=site, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    remade = {path.parent.parent.name.split("-")[1] for path in records if path.stat().st_mtime_ns != records[path]}
    assert remade == {"bend"}
