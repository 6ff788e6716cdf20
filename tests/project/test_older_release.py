"""Files that sitkit 0.1 made: the code of today continues, samples, measures, verifies and reports them.

The files, and how they were made, are in release-0.1/README.md.  Beside them expected*.json keep what 0.1 itself gives for
them; `SITKIT_GOLDEN=write pytest tests/project/test_older_release.py` writes those anew, and is for the code of 0.1 alone.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sameness
from support import call

RELEASE = Path(__file__).parent / "release-0.1"
# Release 0.1 had no warm-up of averages, which is the default now.
NO_WARMUP = ("--set", "train.ema_warmup=false")
# The second way in which the finished run was sampled.
SDE = ("--sampler", "euler-maruyama", "--steps", "6", "--seed", "1")


@pytest.fixture
def older(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a folder, or a file, of the older release, go where the copy is, and return where that is."""
    source = RELEASE / request.param
    if source.is_dir():
        shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    else:
        shutil.copy(source, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_of(root: Path) -> Path:
    """Return the folder of the only run."""
    (config,) = root.glob("runs/*/config.yaml")
    return config.parent


def times(root: Path) -> dict[str, int]:
    """Return when each file under a folder was last written; locks hold nothing."""
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != ".lock")
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in files}


def drawn(*words: str | Path) -> dict[str, Any]:
    """Draw samples; return where they are, their hash, and the levels of the first image."""
    record = sameness.answer("sample", *words)
    arrays = sameness.samples(Path(record["path"]))
    return {
        "path": record["path"], "nfe": record["nfe"], "labels": arrays["labels"].tolist(),
        "sha256": sameness.digest(arrays.items()), "first image": arrays["images"][0].ravel().tolist(),
    }  # fmt: skip


def same_samples(now: dict[str, Any], kept: dict[str, Any], recorded: dict[str, str]) -> None:
    """Compare samples: to the last bit on the same machine, within a few levels of 255 elsewhere.

    Results that are made now are named by the identities of now, in the same folder.
    """
    assert Path(now["path"]).parent == Path(kept["path"]).parent
    for key in ("nfe", "labels"):
        assert now[key] == kept[key]
    sameness.same(now["first image"], kept["first image"], recorded, 0, abs=sameness.LEVELS)
    if sameness.machine() == recorded:
        assert now["sha256"] == kept["sha256"]


def measured(*words: str | Path) -> dict[str, Any]:
    """Measure; return the values of each metric, and where each is."""
    found = sameness.answer("evaluate", *words)
    return {
        "paths": [e["path"] for e in found],
        "values": {f"{e['metric']['name']} {key}": e[key] for e in found for key in ("value", "stderr", "halves")},
    }


def verified(name: str | Path) -> list[dict[str, Any]]:
    """Verify numbers; return the names, what was, what is, and the verdicts."""
    left = call("verify", name, "--json")
    assert left.status in (0, 1), left
    parts = ("name", "path", "was", "now", "verdict", "samples", "reason")
    return [{key: number[key] for key in parts} for number in json.loads(left.out)]


def same_verdicts(now: list[dict[str, Any]], kept: list[dict[str, Any]], recorded: dict[str, str]) -> None:
    """Compare what `verify` says; on another machine a number may differ in its last digits, and the verdict with it."""
    for number, old in zip(now, kept, strict=True):
        assert [number[key] for key in ("name", "path", "was")] == [old[key] for key in ("name", "path", "was")]
        sameness.same(number["now"], old["now"], recorded, sameness.VALUE, abs=1 / 32)
        if sameness.machine() == recorded:
            assert number == old and number["verdict"] == "same"


def reported(name: str | Path, path: Path) -> None:
    """Report, and require an HTML file that is whole."""
    sameness.done("report", name)
    page = path.read_text(encoding="utf-8")
    assert "<html" in page and page.rstrip().endswith("</html>")


@pytest.mark.parametrize("older", ["stopped"], indirect=True)
def test_a_stopped_training_goes_on(older: Path) -> None:
    run = run_of(older)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000010.safetensors"]
    sameness.done("train", "base.yaml", *NO_WARMUP)
    lines = sameness.read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21)) and run_of(older) == run
    state, _ = sameness.tensors(run / "checkpoints/step-00000020.safetensors")
    now = {
        "machine": sameness.machine(),
        "run": run.name,
        "losses": [line["loss"] for line in lines[10:]],
        "checkpoint": sameness.digest(state.items()),
        "samples": drawn("latest"),
    }
    kept = sameness.golden("expected-stopped", now, RELEASE)
    assert now["run"] == kept["run"]
    sameness.same(now["losses"], kept["losses"], kept["machine"], sameness.LOSS)
    same_samples(now["samples"], kept["samples"], kept["machine"])
    if sameness.machine() == kept["machine"]:
        assert now["checkpoint"] == kept["checkpoint"]
        # The training that was never stopped ends with the same bits.
        whole, _ = sameness.tensors(run_of(RELEASE / "finished") / "checkpoints/step-00000020.safetensors")
        assert sameness.digest(whole.items()) == now["checkpoint"]


@pytest.mark.parametrize("older", ["finished"], indirect=True)
def test_a_finished_run_is_sampled_measured_verified_and_reported(older: Path) -> None:
    run, before = run_of(older), times(older)
    again = {"ode": drawn("latest"), "sde": drawn("latest", *SDE)}
    numbers = measured("latest", "-n", "32", "--metric", "frechet,precision")
    sameness.done("train", "base.yaml", *NO_WARMUP)
    # Existing results are reused and not written again.
    after = times(older)
    # The files of the settings have what this release adds.
    rewritten = {
        (run / name).relative_to(older).as_posix() for name in ("config.yaml", "data.json", "environment.json")
    }
    assert {name for name in before if after[name] != before[name]} <= rewritten
    description = (run / "data.json").relative_to(older)
    assert (older / description).read_bytes() == (RELEASE / "finished" / description).read_bytes()
    assert {name for name in after if "/samples/" in name or "/evaluations/" in name} <= set(before)
    verdicts = verified(run.name)
    reported("latest", run / "report.html")
    for part in ("samples", "evaluations"):
        shutil.rmtree(run / part)
    now = {
        "machine": sameness.machine(),
        "found": {"samples": again, "numbers": numbers},
        "samples": {
            "ode": drawn("latest"),
            "sde": drawn("latest", *SDE),
            "guided": drawn("latest", "-n", "16", "--guidance", "cfg", "--steps", "3"),
        },
        "numbers": measured("latest", "-n", "32", "--metric", "frechet,precision"),
        "verified": verdicts,
    }
    kept = sameness.golden("expected-finished", now, RELEASE)
    assert sameness.plain(now["found"]) == kept["found"]
    for name, found in now["samples"].items():
        same_samples(found, kept["samples"][name], kept["machine"])
    sameness.same(now["numbers"]["values"], kept["numbers"]["values"], kept["machine"], sameness.VALUE, abs=1 / 32)
    same_verdicts(now["verified"], kept["verified"], kept["machine"])


@pytest.mark.parametrize("older", ["study"], indirect=True)
def test_a_finished_study_is_found_whole_verified_and_reported(older: Path) -> None:
    before = times(older / "runs")
    dry = sameness.answer("ablate", "two-paths.yaml", *NO_WARMUP, "--dry-run")
    assert [cell["state"] for cell in dry] == ["measured"] * 4
    results = sameness.answer("ablate", "two-paths.yaml", *NO_WARMUP)
    assert times(older / "runs") == before
    now = {
        "machine": sameness.machine(),
        "dry run": dry,
        "results": results,
        "tables": {
            p.name: p.read_text(encoding="utf-8") for p in sorted((older / "studies/two-paths").glob("table.*"))
        },
        "verified": verified("two-paths"),
    }
    reported("two-paths", older / "studies/two-paths/report.html")
    kept = sameness.golden("expected-study", now, RELEASE)
    assert results["command"] == [*kept["results"]["command"], *NO_WARMUP]
    kept["results"]["command"] = results["command"]
    for key in ("dry run", "tables"):
        assert sameness.plain(now[key]) == kept[key]
    # The numbers are read, not computed; their statistics are computed.
    sameness.same(sameness.plain(now["results"]), kept["results"], kept["machine"], 1e-9)
    same_verdicts(now["verified"], kept["verified"], kept["machine"])


@pytest.mark.parametrize("older", ["exported.safetensors"], indirect=True)
def test_an_exported_file_is_sampled_and_measured(older: Path) -> None:
    now = {
        "machine": sameness.machine(),
        "samples": {
            "ode": drawn("exported.safetensors", "-n", "16"),
            "sde": drawn("exported.safetensors", "-n", "16", *SDE),
        },
        "numbers": measured("exported.safetensors", "-n", "32", "--metric", "frechet"),
    }
    kept = sameness.golden("expected-exported", now, RELEASE)
    for name, found in now["samples"].items():
        same_samples(found, kept["samples"][name], kept["machine"])
    sameness.same(now["numbers"]["values"], kept["numbers"]["values"], kept["machine"], sameness.VALUE, abs=1 / 32)
