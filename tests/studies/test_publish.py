"""A study in MLflow: its trainings are below it, their cells below them; everything is sent once the tracker is up."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest
from support import call

from sitkit.results.study_results import read_results, runs_of
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.tracking import store, sync
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.progress import Event
from sitkit.studies.ablate import run_study

INIT = Tracker.__init__.__kwdefaults__ or {}
BASE = """
data: {name: points, law: checkerboard, size: 400}
backbone: {name: mlp, hidden_size: 16, depth: 1}
train: {steps: 4, batch: 8, lr: 1e-3}
sampler: {name: heun, steps: 2}
sample: {n: 50, labels: none}
metric: sliced-wasserstein
run: {threads: 1, sample_every: 0, log_every: 2}
"""
STUDY = """
title: "Two by two"
base: base.yaml
rows: [{label: Linear, interp: linear}, {label: GVP, interp: gvp}]
columns: {"4": {sampler: {steps: 2}}, "8": {sampler: {steps: 4}}}
"""


def test_a_study_is_nested_and_tagged_and_sent_later_if_the_tracker_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    words = ("ablate", tmp_path / "study.yaml", "--runs", tmp_path / "runs")
    folder = tmp_path / "studies" / "study"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    result = call(*words)
    assert result.status == 0, result.err
    assert f"MLflow at {address} did not take the run" in result.err
    assert (folder / "report.html").is_file() and sync.run_id(folder) is None

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    result = call(*words)
    # MLflow says by itself that it makes a database, where this is the first one of the process.
    assert result.status == 0 and "did not take the run" not in result.err, result.err
    client = store.make_client(uri)
    runs: dict[str, Any] = {
        r.info.run_id: r for r in client.search_runs([e.experiment_id for e in client.search_experiments()])
    }
    assert len(runs) == 1 + 2 + 4
    study = sync.run_id(folder)
    assert study is not None
    by_parent: dict[str, set[str]] = {}
    for run in runs.values():
        assert run.data.tags["sitkit.study.study"] == "true" and run.info.status == "FINISHED"
        by_parent.setdefault(run.data.tags.get("mlflow.parentRunId", ""), set()).add(run.info.run_id)
    results = read_results(folder)
    place = runs_of(folder, results)
    assert by_parent[""] == {study}
    assert by_parent[study] == {sync.run_id(place / str(cell.run)) for cell in results.cells}
    for cell in results.cells:
        sampling = place / str(cell.run) / "samples" / str(cell.samples)
        run = runs[str(sync.run_id(sampling))]
        assert run.info.run_id in by_parent[str(sync.run_id(place / str(cell.run)))]
        assert (run.data.tags["sitkit.row"], run.data.tags["sitkit.column"]) == (cell.row, cell.column)
        assert run.data.tags["sitkit.identity"] == cell.samples
        assert runs[study].data.metrics[f"sliced-wasserstein/{cell.row}/{cell.column}"] == pytest.approx(cell.value)
    assert {a.path for a in client.list_artifacts(study)} == {
        "report.html",
        "results.json",
        "table.csv",
        "table.md",
        "table.tex",
    }
    assert runs[study].data.metrics["cells/done"] == 4

    # Nothing is sent twice, and the report is not written again.
    before = (folder / "report.html").stat().st_mtime_ns, (folder / "metrics.jsonl").read_bytes()
    assert call(*words).status == 0
    assert before == ((folder / "report.html").stat().st_mtime_ns, (folder / "metrics.jsonl").read_bytes())
    assert len(client.search_runs([e.experiment_id for e in client.search_experiments()])) == 7


def test_a_study_is_in_mlflow_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run is RUNNING, above the training that is done, before the others are; FINISHED at the end."""
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(STUDY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr(Tracker.__init__, "__kwdefaults__", {**INIT, "interval": 0.05})
    client = store.make_client(f"sqlite:///{tmp_path}/mlflow.db")
    folder, states = tmp_path / "studies" / "study", []

    def look(event: Event) -> None:
        # The first samples: one training is done, and the tracker has all the time it wants.
        if event.stage != "sample" or states:
            return
        until = time.monotonic() + 60
        while not states and time.monotonic() < until:
            study = sync.run_id(folder)
            under = client.search_runs(
                [e.experiment_id for e in client.search_experiments()], f"tags.`mlflow.parentRunId` = '{study}'"
            )
            if study is not None and under:
                states.append((client.get_run(study).info.status, len(under)))
            time.sleep(0.05)

    run_study(tmp_path / "study.yaml", settings=read_assignments([f"run.folder={tmp_path / 'runs'}"]), progress=look)
    assert states == [("RUNNING", 1)]
    study = client.get_run(str(sync.run_id(folder)))
    assert study.info.status == "FINISHED" and study.data.metrics["cells/done"] == 4
    assert "report.html" in {a.path for a in client.list_artifacts(study.info.run_id)}
