"""Evaluating a run: samples against the data, each number with its recipe beside it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from sitkit.data.dataset import load_examples
from sitkit.evaluation.extractors.extractor import Extraction, Extractor
from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement, Metric, require_comparable
from sitkit.evaluation.reference import Reference
from sitkit.registry import spec
from sitkit.runs.config.identity import file_digest, number_identity, sampling_identity
from sitkit.runs.config.mappings import flat
from sitkit.runs.environment import environment
from sitkit.runs.one_file import weights_fingerprint
from sitkit.runs.run import Run, read_config_of
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample import sample
from sitkit.runs.sample_set import SampleSet, keeps_samples
from sitkit.runs.tracking.sync import METRICS, run_id
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.distributed import joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json, to_json, write_file, write_json
from sitkit.runtime.progress import Event, Progress, silent

# What the metrics draw at random (bootstrap, directions, subsets, halves) comes from this seed.
SEED = 0


class Evaluation(NamedTuple):
    """A number, its yardstick (the metric between two random halves of the data), and everything it depends on."""

    path: Path
    record: dict[str, Any]

    @property
    def value(self) -> float:
        return float(self.record["value"])


def evaluate(run: Run, progress: Progress = silent) -> list[Evaluation]:
    """Every metric of the configuration on one set of the run's samples; what is done is not done again.

    Ranks under torchrun, or several processes on one folder, share the work.  On a CPU the numbers are the same to the last
    digit for any batch and number of processes, and after any kill.
    Raises UserError before any sample is drawn for a metric that cannot be had.
    """
    folder = RunFolder(run.folder).evaluations
    paths = {metric: folder / f"{evaluation_identity(run, metric)}.json" for metric in run.config.metric}
    missing = [metric for metric, path in paths.items() if not path.is_file()]
    if missing:
        with joined(run.config.run.device) as world:
            eyes = _extractions(run, missing, progress)
            keep = keeps_samples(run.config, missing)
            costly = tuple(eye for extractor, eye in eyes.items() if extractor.learnt or not keep)
            drawn = sample(run, progress, keep=keep, extractions=costly)
            reference = Reference(load_examples(run.config.data.source()), run.folder.parent / "references")
            first = world.rank * len(missing) // world.size
            for metric in missing[first:] + missing[:first]:
                path = paths[metric]
                with FileLock(drawn.folder / f".{path.stem}.lock"):
                    if not path.is_file():
                        write_json(path, _measure(run, metric, drawn, eyes, reference, progress))
            if world.lead and run.config.run.track:
                _track(run, drawn, [Evaluation(path, read_json(path)) for path in paths.values()], progress)
    return [Evaluation(path, read_json(path)) for path in paths.values()]


def _extractions(run: Run, wanted: list[Metric], progress: Progress) -> dict[Extractor, Extraction]:
    """The extractors of the metrics, ready for work."""
    seen = load_examples(run.config.data.source())
    eyes: dict[Extractor, Extraction] = {}
    for metric in wanted:
        if isinstance(metric, FeatureMetric):
            if metric.features not in eyes:
                eyes[metric.features] = metric.features.build(
                    seen, run.device, run.folder.parent / "extractors", progress
                )
            metric.require(eyes[metric.features])
    if any(metric.reads_data for metric in wanted) and not len(seen):
        # Data that are not here say so when they are read.
        seen.read(np.arange(0))
    if run.config.sample.n < 2:
        raise UserError(f"A metric needs at least 2 samples; got {run.config.sample.n}. Ask for more.")
    return eyes


def title(record: dict[str, Any]) -> str:
    """The metric of a record by name, with its features unless they are the values themselves."""
    metric = record["metric"]
    features = metric.get("features", {}).get("name", "pixels")
    return metric["name"] if features == "pixels" else f"{metric['name']}-{features}"


def _track(run: Run, drawn: SampleSet, done: list[Evaluation], progress: Progress) -> None:
    """The numbers as a child of the training's run: its curves are one point each."""
    row: dict[str, Any] = {"step": run.step, "time": time.time(), "nfe": drawn.record["nfe"]}
    for evaluation in done:
        name = title(evaluation.record)
        row |= {name: evaluation.value}
        if evaluation.record["halves"] is not None:
            row |= {f"{name}_halves": evaluation.record["halves"]}
    write_file(drawn.folder / METRICS, to_json(row) + "\n")
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
    return number_identity(sampling_identity(run.config, run.step), spec(metric), run.examples.fingerprint)


def command(run: Run, metric: Metric) -> list[str]:
    """The words that get the number again, in a folder where the run's path is what it is here."""
    config, written = run.config.plain(), read_config_of(run.source).plain()
    settings: dict[str, Any] = {
        key: config[key] for key in ("sampler", "diffusion", "guidance") if config[key] != written[key]
    }
    for key, value in config["sample"].items():
        if key not in ("n", "batch") and value != written["sample"].get(key):
            settings[f"sample.{key}"] = value
    settings["metric"] = [spec(metric)]
    words = ["sitkit", "evaluate", str(run.source), "--step", str(run.step), "-n", str(run.config.sample.n)]
    words += ["--device", run.device.type]
    for key, value in settings.items():
        words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def _measure(
    run: Run,
    metric: Metric,
    drawn: SampleSet,
    eyes: dict[Extractor, Extraction],
    reference: Reference,
    progress: Progress,
) -> dict[str, Any]:
    data, config = reference.data, run.config
    if isinstance(metric, FeatureMetric):
        eye, learnt = eyes[metric.features], metric.features.learnt
        samples = drawn.features(eye)[metric.reads].double()
        # Where the data are not read, nor perhaps here, the samples stand in their place.
        target = reference.features(eye, learnt, progress)[metric.reads].double() if metric.reads_data else samples
        require_comparable(samples, target)
        measured = metric.compare(samples, target, seed=SEED)
        # Gigabytes, of pixels: the halves need as many.
        del samples, target
        features = {"fingerprint": eye.fingerprint, **eye.record}
    else:
        eye, learnt, features = None, False, None
        measured: Measurement = metric.measure(drawn.x, reference.x(), seed=SEED)
    file = getattr(metric, "reference", None)
    return {
        "metric": spec(metric),
        "value": measured.value,
        "stderr": measured.stderr,
        "halves": reference.halves(metric, eye, learnt),
        "notes": list(measured.notes),
        "n": drawn.n,
        "reference": {
            "data": spec(config.data.source()), "n": reference.n, "fingerprint": data.fingerprint,
            "file": file, "sha256": file_digest(file) if file else None,
        },
        "features": features,
        "run": run.folder.name,
        "training": run.identity,
        "data": run.examples.fingerprint,
        "checkpoint": {
            "step": run.step, "weights": run.weights_name, "fingerprint": weights_fingerprint(run.network.state_dict()),
        },
        "samples": drawn.folder.name,
        "labels": config.sample.model_dump(mode="json")["labels"],
        "seeds": {"train": config.train.seed, "sample": config.sample.seed, "metric": SEED},
        "nfe": drawn.record["nfe"],
        "rounding": drawn.record["rounding"],
        "sampling": drawn.record,
        "trained": RunFolder(run.folder).read_environment() or None,
        "environment": environment(run.device),
        "command": command(run, metric),
    }  # fmt: skip
