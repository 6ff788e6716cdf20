"""Evaluating a run: samples against the data, each number with its recipe beside it."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sitkit import checkpoint
from sitkit.config import flat, identity
from sitkit.data.dataset import Dataset
from sitkit.metrics.metric import Metric
from sitkit.progress import Event, Progress, silent
from sitkit.registry import spec
from sitkit.run import METRICS, Run, environment, examples
from sitkit.sample import Drawn, sample, sampling_identity
from sitkit.tracking import Tracker, run_id


class Evaluation(NamedTuple):
    """A number, its yardstick (the metric between two random halves of the data), and everything it depends on."""

    path: Path
    record: dict[str, Any]

    @property
    def value(self) -> float:
        return float(self.record["value"])


def evaluate(run: Run, progress: Progress = silent) -> list[Evaluation]:
    """Every metric of the configuration on the run's samples against all its data; what is done is not done again."""
    done = []
    drawn: Drawn | None = None
    new = False
    for metric in run.config.metric:
        path = run.folder / "evaluations" / f"{evaluation_identity(run, metric)}.json"
        if not path.is_file():
            drawn = drawn or sample(run, progress)
            checkpoint.write_json(path, _measure(run, metric, drawn))
            new = True
        done.append(Evaluation(path, checkpoint.read_json(path)))
    if new and drawn is not None and run.config.run.track:
        _track(run, drawn, done, progress)
    return done


def _track(run: Run, drawn: Drawn, done: list[Evaluation], progress: Progress) -> None:
    """The numbers as a child of the training's run: its curves are one point each."""
    row: dict[str, Any] = {"step": run.step, "time": time.time(), "nfe": drawn.record["nfe"]}
    for evaluation in done:
        name = evaluation.record["metric"]["name"]
        row |= {name: evaluation.value, f"{name}_halves": evaluation.record["halves"]}
    checkpoint.write(drawn.folder / METRICS, checkpoint.to_json(row) + "\n")
    tracker = Tracker(
        drawn.folder,
        name=f"{run.folder.name} {drawn.folder.name}",
        params=flat(drawn.record["recipe"]),
        tags={"sitkit.kind": "evaluation", "sitkit.identity": drawn.folder.name},
        artifacts=("*.png", "record.json"),
        parent=run_id(run.folder),
        on_warning=lambda text: progress(Event("evaluate", message=text)),
    )
    with tracker:
        pass


def evaluation_identity(run: Run, metric: Metric) -> str:
    """What determines the number: the sampling, the metric and the reference data."""
    return identity(sampling_identity(run.config, run.step), spec(metric), run.examples.fingerprint)


def _measure(run: Run, metric: Metric, drawn: Drawn) -> dict[str, Any]:
    data = run.examples
    measured = metric.measure(drawn.x, reference(run.config.data.source()))
    halves = metric.halves(reference(run.config.data.source()))
    return {
        "metric": spec(metric),
        "value": measured.value,
        "stderr": measured.stderr,
        "halves": halves.value,
        "notes": list(measured.notes),
        "n": len(drawn.x),
        "reference": {"data": spec(run.config.data), "n": len(data), "fingerprint": data.fingerprint},
        "run": run.folder.name,
        "samples": drawn.folder.name,
        "sampling": {k: v for k, v in drawn.record.items() if k != "environment"},
        "environment": environment(torch.device("cpu")),
    }


@functools.lru_cache(maxsize=2)
def reference(dataset: Dataset) -> Tensor:
    """All examples of a data set, (n, *shape) float32."""
    import numpy as np

    data = examples(dataset)
    return data.read(np.arange(len(data)))
