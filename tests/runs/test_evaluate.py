"""Evaluations: each number can be computed again from the files beside it."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits
from support import call, copied, finish, start, tiny, trained, wait

from sitkit.registry import metrics
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.evaluate import Evaluation, evaluate, evaluation_identity, measure_run
from sitkit.runs.run import Run, load
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.training.train import run_training


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("evaluated")
    return {base: copied(trained(base), root) for base in ("digits", "points")}


def opened(folder: Path, *settings: str) -> Run:
    return load(folder, settings=read_assignments(["sampler.steps=4", "sample.n=300", *settings]))


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), from the eigenvalues of the product itself."""
    s1, s2 = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(s1 @ s2).astype(complex)).real  # pyright: ignore[reportAttributeAccessIssue]
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * roots.sum())


def test_the_number_is_computed_again_from_the_samples(folders: dict[str, Path]) -> None:
    (evaluation,) = measure_run(opened(folders["digits"]))
    record = evaluation.record
    with np.load(folders["digits"] / "samples" / record["samples"] / "samples.npz") as arrays:
        samples = arrays["images"].reshape(300, 64) / 127.5 - 1
    pixels = np.asarray(load_digits(return_X_y=True)[0]) / 8 - 1
    # Three pixels of the digits never change, so S1 S2 is singular: eigenvalues of 1e-16 have roots of 1e-8, 64 of them.
    # The samples went through float32: 2^-24 of values up to 1 in sums of squares of size 10.
    assert evaluation.value == pytest.approx(frechet(samples, pixels), abs=2e-5)
    assert record["n"] == 300 and record["reference"]["n"] == 1797
    assert record["metric"]["name"] == "frechet" and record["metric"]["features"]["name"] == "pixels"
    assert record["run"] == folders["digits"].name and record["sampling"]["nfe"] == 8
    assert record["sampling"]["recipe"]["sampler"]["steps"] == 4


def test_the_value_of_real_data_is_at_the_n_of_the_samples(folders: dict[str, Path]) -> None:
    (evaluation,) = measure_run(opened(folders["digits"]))
    data = load(folders["digits"]).examples
    metric = metrics.create("frechet")
    assert evaluation.real == metric.real(data.read(np.arange(len(data))), 300)
    assert evaluation.real_n == evaluation.n == 300
    assert evaluation.real is not None and 0 < evaluation.real < evaluation.value
    old = {key: value for key, value in evaluation.record.items() if key not in ("real", "real_n")}
    read = Evaluation(evaluation.path, old | {"halves": 0.5})
    assert (read.real, read.real_n) == (0.5, 898)


def test_a_number_on_disk_is_not_measured_again(folders: dict[str, Path]) -> None:
    run = opened(folders["points"], "sample.seed=5")
    (first,) = measure_run(run)
    before = {path: path.stat().st_mtime_ns for path in folders["points"].rglob("*") if path.is_file()}
    # Not even the samples are needed.
    shutil.rmtree(folders["points"] / "samples" / first.record["samples"])
    (again,) = measure_run(run)
    assert again == first
    assert not (folders["points"] / "samples" / first.record["samples"]).exists()
    assert first.path.stat().st_mtime_ns == before[first.path]


def test_several_metrics_share_one_sampling(folders: dict[str, Path]) -> None:
    run = opened(folders["points"], "metric=[sliced-wasserstein, mmd, frechet]", "sample.seed=6")
    evaluations = measure_run(run)
    assert [e.record["metric"]["name"] for e in evaluations] == ["sliced-wasserstein", "mmd", "frechet"]
    assert len({e.path for e in evaluations}) == 3 and len({e.record["samples"] for e in evaluations}) == 1
    assert all(e.path == folders["points"] / "evaluations" / f"{evaluation_identity(run, m)}.json"
               for e, m in zip(evaluations, run.config.metric, strict=True))  # fmt: skip
    assert all(read_json(e.path) == e.record for e in evaluations)
    (mmd,) = measure_run(opened(folders["points"], "metric=mmd", "sample.seed=6"))
    assert mmd == evaluations[1]


def test_identities_follow_the_sampling_the_metric_and_the_reference(folders: dict[str, Path]) -> None:
    base = opened(folders["points"])
    metric = base.config.metric[0]
    others = [
        evaluation_identity(opened(folders["points"], words), metric)
        for words in ("sample.seed=9", "sample.n=299", "sampler.steps=5", "sample.weights=raw")
    ]
    others.append(evaluation_identity(base, metrics.create("sliced-wasserstein", projections=32)))
    others.append(evaluation_identity(dataclasses.replace(base, step=39), metric))
    assert len({evaluation_identity(base, metric), *others}) == 7
    assert evaluation_identity(opened(folders["points"], "sample.batch=9"), metric) == evaluation_identity(base, metric)


def test_samples_of_a_part_of_the_path_are_drawn_and_never_measured(tmp_path: Path) -> None:
    """From unit noise at t = 0.5 the samples are wider than the data, so they are drawn only with `partial`."""
    run = copied(trained("points"), tmp_path)
    part = ("--set", "sampler.t0=0.5", "--set", "sampler.steps=4", "--set", "sample.n=40")
    refused = call("sample", run, *part)
    assert (
        refused.status == 2 and "does not lead from noise to data" in refused.err and "sampler.partial" in refused.err
    )
    partial = (*part, "--set", "sampler.partial=true")
    assert call("sample", run, *partial).status == 0
    (samples,) = (run / "samples").glob("*/record.json")
    record = read_json(samples)
    assert record["recipe"]["sampler"]["partial"] is True and record["times"][0] == 0.5
    measured = call("evaluate", run, *partial)
    assert measured.status == 2 and "no metric measures them" in measured.err
    assert not list((run / "evaluations").glob("*.json"))


def test_a_sample_too_small_to_measure_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="at least 2 samples"):
        measure_run(opened(folders["points"], "sample.n=1"))
    assert not [p for p in (folders["points"] / "evaluations").glob("*") if p.read_text() == ""]


# Shared and interrupted work ----------------------------------------------------------------------------------------

# Three shards of points, and 300 of the classifier's steps left out: its features are what crosses processes.
SHARED = ("sampler.steps=200", "sample.n=1300", "sample.seed=7", "run.track=false")
METRICS = '[{"name": "frechet", "features": {"name": "run-classifier", "steps": 5, "width": 8}}, {"name": "mmd"}]'


def test_without_labels_classes_are_drawn_as_often_as_in_the_data(tmp_path: Path) -> None:
    """9 of 10 examples are of class 0: balanced labels would make 4 of 10 samples of another class."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=pixels, labels=np.repeat([0, 1], (36, 4)))
    data = f"data={{name: npz, path: {tmp_path / 'd.npz'}}}"
    folder = run_training(tiny(tmp_path / "runs", data, "train.steps=0", base="digits"))
    settings = {"sampler": {"name": "euler", "steps": 1}, "run.track": False}

    messages: list[str] = []

    def measured(**labels: str) -> Evaluation:
        (found,) = evaluate(
            folder,
            metric="mmd",
            n=20,
            settings={**settings, **labels},
            progress=lambda event: messages.append(event.message),
        )
        return found

    as_data, balanced = measured(), measured(**{"sample.labels": "balanced"})
    notes = [[note for note in found.record["notes"] if "40%" in note] for found in (as_data, balanced)]
    assert as_data.record["labels"] == "data" and notes[0] == []
    assert sum("the frequencies of the data (sample.labels=data)" in message for message in messages) == 1
    assert balanced.record["labels"] == "balanced" and len(notes[1]) == 1
    before = set(folder.glob("evaluations/*"))
    for found in (as_data, balanced):
        assert call(*found.record["command"][1:], "--set", "run.track=false").status == 0
    assert set(folder.glob("evaluations/*")) == before, "the command of a number gives the number"
    # The digits' classes differ from balanced ones by 0.6 %, which is left as it is.
    (digits,) = evaluate(copied(trained("digits"), tmp_path), metric="mmd", n=20, settings=settings)
    assert digits.record["labels"] == "balanced"


def numbers(folder: Path) -> list[tuple[str, float, float | None, float]]:
    """The numbers of an evaluation, sorted by metric."""
    records = [read_json(path) for path in (folder / "evaluations").glob("*.json")]
    return sorted((r["metric"]["name"], r["value"], r["stderr"], r["real"]) for r in records)


def words(folder: Path, *settings: str) -> list[str]:
    each = (*SHARED, f"metric={METRICS}", *settings)
    return ["evaluate", str(folder), "--device", "cpu", *(word for text in each for word in ("--set", text))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float, float | None, float]]:
    """The numbers of one process with batches of 16."""
    folder = copied(trained("points"), tmp_path_factory.mktemp("alone"))
    assert call(*words(folder, "sample.batch=16")).status == 0
    return numbers(folder)


def test_batches_of_fifty_and_features_alone_give_the_same_digits(
    alone: list[tuple[str, float, float | None, float]], tmp_path: Path
) -> None:
    folder = copied(trained("points"), tmp_path)
    assert call(*words(folder, "sample.batch=50", "run.keep_samples=false")).status == 0
    assert numbers(folder) == alone and len(alone) == 2
    assert not list(folder.rglob("samples.npz")) and list(folder.rglob("samples/*/grid.png"))
    assert not list(folder.rglob("shards")) and len(list(folder.rglob("samples/*/features-*.safetensors"))) == 2


def test_two_ranks_give_the_same_digits(alone: list[tuple[str, float, float | None, float]], tmp_path: Path) -> None:
    folder = copied(trained("points"), tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sitkit"]
    process = subprocess.run([*command, *words(folder)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert numbers(folder) == alone


def test_killed_between_shards_and_run_again_it_gives_the_same_digits(
    alone: list[tuple[str, float, float | None, float]], tmp_path: Path
) -> None:
    folder = copied(trained("points"), tmp_path)
    kills = 0
    for wanted in (1, 2):
        process = start(*words(folder), cwd=tmp_path)
        wait(process, lambda wanted=wanted: len(list(folder.rglob("shards/*.safetensors"))) >= wanted)
        if process.poll() is None:
            process.kill()
            kills += 1
        finish(process)
    assert kills == 2 and not numbers(folder)
    shards = {path: path.stat().st_mtime_ns for path in folder.rglob("shards/*.safetensors")}
    assert len(shards) >= 2
    assert call(*words(folder)).status == 0 and numbers(folder) == alone


def test_the_command_in_a_record_measures_the_same_number(folders: dict[str, Path], tmp_path: Path) -> None:
    (evaluation,) = measure_run(
        opened(folders["points"], "sample.seed=3", "sampler=euler", "sampler.steps=4", "metric=mmd")
    )
    again = copied(trained("points"), tmp_path)
    line = [str(again) if word == str(folders["points"]) else word for word in evaluation.record["command"][1:]]
    assert call(*line, "--set", "run.track=false").status == 0
    record = read_json(again / "evaluations" / evaluation.path.name)
    assert (record["value"], record["stderr"], record["samples"]) == (
        evaluation.value, evaluation.record["stderr"], evaluation.record["samples"],
    )  # fmt: skip
    assert record["seeds"] == {"train": 0, "sample": 3, "metric": 0} and record["labels"] == "none"
    assert record["checkpoint"]["step"] == 40 and record["nfe"] == 4 and "diff" in record["environment"]["git"]
