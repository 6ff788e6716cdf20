"""Evaluation of a run: its samples against the data, each number with the settings that it depends on."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np
from filelock import FileLock

from sitkit.data.dataset import load_examples
from sitkit.evaluation.extractors.extractor import Extraction, Extractor
from sitkit.evaluation.metrics.metric import FeatureMetric, Measurement, Metric, require_comparable
from sitkit.evaluation.reference import Reference
from sitkit.registry import essence, extractors, spec
from sitkit.runs.changed_plugins import warn_of_changed_number
from sitkit.runs.config.identity import number_identity, sampling_identity
from sitkit.runs.config.mappings import flat
from sitkit.runs.config.records import NumberRecord
from sitkit.runs.config.sources import Layer, SamplingFlags, Spec, flags_to_layer
from sitkit.runs.environment import environment
from sitkit.runs.run import Run, open_run
from sitkit.runs.run_folder import RunFolder, find_number, read_config_of
from sitkit.runs.sample import draw_samples, label_notes
from sitkit.runs.sample_set import SampleSet, keeps_samples
from sitkit.runs.tracking.sync import METRICS, TrackedRun, run_id
from sitkit.runs.tracking.tracker import Tracker
from sitkit.runtime.distributed import joined
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import exists, read_record, to_json, write_file, write_json
from sitkit.runtime.hashing import file_digest
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import digest_of
from sitkit.solvers.sampler import Sampler

MAX_SAMPLES = 50_000
AS_IN_DATA = (
    "classes are drawn with the frequencies of the data (sample.labels=data): balanced ones would bias the number."
)
# The seed of the random parts of metrics (bootstrap, directions, subsets, real examples).
SEED = 0


@dataclass(frozen=True)
class Evaluation:
    """A number of a run on disk: evaluations/<identity>.json.

    Args:
        path: the file.
        record: the content of the file: the value, and everything that it depends on.
    """

    path: Path
    record: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the record of a number.  Raises UserError for a damaged one, with the command that measures it again."""
        again = shlex.join(["sitkit", "evaluate", str(path.parent.parent)])
        remedy = f"Remove it, and measure the number again by `{again}` with its settings."
        return cls(path, read_record(path, NumberRecord, "the record of a number", remedy))

    @property
    def value(self) -> float:
        """The value of the metric."""
        return float(self.record["value"])

    @property
    def stderr(self) -> float | None:
        """The standard error of the value; None for a metric without one."""
        return self.record["stderr"]

    @property
    def real(self) -> float | None:
        """The same metric of `real_n` random examples against the others; None for a metric that does not measure data."""
        return real_of(self.record)

    @property
    def real_n(self) -> int:
        """The number of examples of `real`: n, or half of the data if that is fewer."""
        return self.record.get("real_n", self.record["reference"]["n"] // 2)

    @property
    def n(self) -> int:
        """The number of samples."""
        return self.record["n"]

    @property
    def nfe(self) -> int:
        """Evaluations of the network per sample."""
        return self.record["nfe"]

    @property
    def metric(self) -> str:
        """The name of the metric, with its features unless they are the values themselves."""
        metric = self.record["metric"]
        features = metric.get("features", {}).get("name", "pixels")
        return metric["name"] if features == "pixels" else f"{metric['name']}-{features}"

    def __repr__(self) -> str:
        stderr = "" if self.stderr is None else f" ± {self.stderr:.2g}"
        return f"Evaluation({self.metric} = {self.value:.4g}{stderr}, n = {self.n}, NFE = {self.nfe})"


def real_of(record: Mapping[str, Any]) -> float | None:
    """Return the value of real data in a record; records of sitkit 0.1 have it at half of the data, as "halves".

    Args:
        record: the record of a number.

    Returns:
        The value; None for a metric that does not measure data.
    """
    return record["real"] if "real" in record else record.get("halves")


def evaluate(
    run: Run | str | Path = "latest",
    *,
    metric: Spec[Metric] | Sequence[Spec[Metric]] | None = None,
    features: Spec[Extractor] | None = None,
    progress: Progress | None = None,
    **flags: Unpack[SamplingFlags],
) -> list[Evaluation]:
    """Measure samples of a run against its data, or return the numbers that are on disk already.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        metric: one metric or several; names may be joined by commas.  By default those of the run.
        features: the extractor in whose feature space every metric compares.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: as in `sample`.  Without `n` as many samples are drawn as there are examples, at most 50,000.  Without
            `sample.labels` classes are drawn as often as in the data where balanced ones would bias the number.

    Returns:
        One evaluation a metric: its value with a standard error, and the record.

    Raises:
        UserError: before any sample is drawn, for a metric that cannot be computed.
        WorkFailed: for samples that are not finite.
    """
    run = open_run(run, flags, "evaluate")
    if metric is not None or features is not None:
        run = run.with_settings(flags_to_layer({"metric": _named_metrics(metric, features, run)}))
    given, defaults = flags_to_layer({}, flags.get("settings")).values.get("sample", {}), dict[str, Any]()
    if flags.get("n") is None and "n" not in given:
        defaults["n"] = min(len(run.examples) or MAX_SAMPLES, MAX_SAMPLES)
    unlike = "labels" not in given and _unlike_data(run)
    if unlike:
        defaults["labels"] = "data"
    run = run.with_settings(Layer({"sample": defaults}))
    with reporting(progress) as report:
        if unlike:
            report(Event("evaluate", message=AS_IN_DATA))
        return measure_run(run, report)


def _unlike_data(run: Run) -> bool:
    """Whether labels are balanced, and the classes of the data are not."""
    return run.config.sample.labels == "balanced" and bool(label_notes(run.config, run.labelled))


def _named_metrics(
    metric: Spec[Metric] | Sequence[Spec[Metric]] | None, features: Spec[Extractor] | None, run: Run
) -> list[Any]:
    """Return the metrics as settings, each with the features; by default those of the run."""
    several = metric if isinstance(metric, (list, tuple)) else [] if metric is None else [metric]
    metrics = [part for item in several for part in (item.split(",") if isinstance(item, str) else [item])]
    metrics = [part.strip() if isinstance(part, str) else part for part in metrics]
    metrics = metrics or [default.name for default in run.config.metric]
    if features is None:
        return metrics
    named = [part if isinstance(part, Mapping) else {"name": getattr(part, "name", part)} for part in metrics]
    return [{**part, "features": spec(extractors.parse(features))} for part in named]


def measure_run(run: Run, progress: Progress = silent) -> list[Evaluation]:
    """Measure every metric of the configuration on one set of the run's samples; numbers on disk are read.

    Ranks under torchrun, or several processes on one folder, share the work.  On a CPU the numbers are the same to the last
    digit for any batch and number of processes, and after any kill.

    Raises:
        UserError: before any sample is drawn, for a metric that cannot be measured.
    """
    paths = {
        metric: find_number(run.folder, evaluation_identity(run, metric), run.config, run.contents)
        for metric in run.config.metric
    }
    missing = [metric for metric, path in paths.items() if not exists(path)]
    for metric, path in paths.items():
        if metric not in missing:
            warn_of_changed_number(Evaluation.read(path).record, run.config, metric)
    if missing:
        with joined(run.config.run.device) as group:
            extractions = _extractions(run, missing, progress)
            keep = keeps_samples(run.config, missing)
            stored = tuple(e for extractor, e in extractions.items() if extractor.learnt or not keep)
            samples = draw_samples(run, progress, keep=keep, extractions=stored)
            reference = Reference(load_examples(run.config.data.source()), run.folder.parent / "references")
            first = group.rank * len(missing) // group.size
            for metric in missing[first:] + missing[:first]:
                path = paths[metric]
                with FileLock(samples.folder / f".{path.stem}.lock"):
                    if not exists(path):
                        write_json(path, _measure(run, metric, samples, extractions, reference, progress))
            if group.lead and run.config.run.track:
                _track(run, samples, [Evaluation.read(path) for path in paths.values()], progress)
    return [Evaluation.read(path) for path in paths.values()]


def _extractions(run: Run, metrics: list[Metric], progress: Progress) -> dict[Extractor, Extraction]:
    """Return the extractors of the metrics, built.  Raises UserError for a metric that cannot be measured."""
    require_measurable(run.config.sample.n, run.config.sampler)
    data = load_examples(run.config.data.source())
    extractions: dict[Extractor, Extraction] = {}
    for metric in metrics:
        if isinstance(metric, FeatureMetric):
            if metric.features not in extractions:
                folder = run.folder.parent / "extractors"
                extractions[metric.features] = metric.features.build(data, run.device, folder, progress)
            metric.require(extractions[metric.features])
    if any(metric.reads_data for metric in metrics) and not len(data):
        data.read(np.arange(0))  # Raises, with the reason why the data are missing.
    return extractions


def require_measurable(n: int, sampler: Sampler) -> None:
    """Raise UserError if no metric can measure samples.

    Args:
        n: the number of samples.
        sampler: their sampler.
    """
    if n < 2:
        raise UserError(f"A metric needs at least 2 samples; got {n}. Ask for more.")
    if sampler.partial:
        raise UserError(
            "Samples of a part of the path are not data, so no metric measures them: leave sampler.partial unset."
        )


def _track(run: Run, samples: SampleSet, evaluations: list[Evaluation], progress: Progress) -> None:
    """Send the numbers to MLflow as a child of the training's run, each a curve of one point."""
    row: dict[str, Any] = {"step": run.step, "time": time.time(), "nfe": samples.record["nfe"]}
    for evaluation in evaluations:
        row[evaluation.metric] = evaluation.value
        if evaluation.real is not None:
            row[f"{evaluation.metric}_real"] = evaluation.real
    write_file(samples.folder / METRICS, to_json(row) + "\n")
    tracked = TrackedRun(
        samples.folder,
        f"{run.folder.name} {samples.folder.name}",
        params=flat(samples.record["recipe"]),
        tags={"sitkit.kind": "evaluation", "sitkit.identity": samples.folder.name},
        patterns=("*.png", "record.json"),
        parent=run_id(run.folder),
    )
    with Tracker(tracked, on_warning=lambda text: progress(Event("evaluate", message=text))):
        pass


def evaluation_identity(run: Run, metric: Metric) -> str:
    """Return the identity of a number: that of the samples, the metric and the reference data.

    Raises UserError for a missing file of reference statistics.
    """
    if (file := getattr(metric, "reference", None)) is not None and not Path(file).expanduser().is_file():
        raise UserError(f"{file}: there is no such file of reference statistics.")
    samples = sampling_identity(run.config, run.step, run.identity)
    return number_identity(samples, essence(metric), run.examples.fingerprint)


def command(run: Run, metric: Metric) -> list[str]:
    """Return the command that measures the number again, from a folder with the same relative path to the run."""
    config, written = run.config.plain(), read_config_of(run.source).plain()
    settings = {key: config[key] for key in ("sampler", "diffusion", "guidance") if config[key] != written[key]}
    sample = {key: value for key, value in config["sample"].items() if value != written["sample"].get(key)}
    if _unlike_data(run):
        sample["labels"] = "balanced"  # Not the default of `evaluate` for these data.
    settings |= {f"sample.{key}": value for key, value in sample.items() if key not in ("n", "batch")}
    settings["metric"] = [spec(metric)]
    words = ["sitkit", "evaluate", str(run.source), "--step", str(run.step), "-n", str(run.config.sample.n)]
    words += ["--device", run.device.type]
    return words + [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]


def _measure(
    run: Run,
    metric: Metric,
    samples: SampleSet,
    extractions: dict[Extractor, Extraction],
    reference: Reference,
    progress: Progress,
) -> dict[str, Any]:
    """Measure a metric of samples and return its record."""
    config, extraction, learned, features = run.config, None, False, None
    if isinstance(metric, FeatureMetric):
        extraction, learned = extractions[metric.features], metric.features.learnt
        x = samples.features(extraction)[metric.reads].double()
        # A metric that does not read the data takes the samples in their place: the data may be missing.
        target = reference.features(extraction, learned, progress)[metric.reads].double() if metric.reads_data else x
        require_comparable(x, target)
        measured = metric.compare(x, target, seed=SEED)
        del x, target  # Gigabytes, for pixels: the value of real data needs as many.
        features = {"fingerprint": extraction.fingerprint, **extraction.record}
    else:
        measured: Measurement = metric.measure(samples.x, reference.x(), seed=SEED)
    file = getattr(metric, "reference", None)
    return {
        "identity": evaluation_identity(run, metric),
        "metric": spec(metric),
        "value": measured.value,
        "stderr": measured.stderr,
        "real": reference.real(metric, extraction, learned, samples.n),
        "real_n": reference.real_n(samples.n),
        "notes": [*measured.notes, *label_notes(config, run.labelled)],
        "n": samples.n,
        "reference": {
            "data": spec(config.data.source()), "n": reference.n, "fingerprint": reference.data.fingerprint,
            "file": file, "sha256": file_digest(file) if file else None,
        },
        "features": features,
        "run": run.folder.name,
        "training": run.identity,
        "data": run.examples.fingerprint,
        "checkpoint": {
            "step": run.step, "weights": run.weights_name, "fingerprint": digest_of(run.network.state_dict()),
        },
        "samples": samples.folder.name,
        "labels": config.sample.model_dump(mode="json")["labels"],
        "seeds": {"train": config.train.seed, "sample": config.sample.seed, "metric": SEED},
        "nfe": samples.record["nfe"],
        "rounding": samples.record["rounding"],
        "sampling": samples.record,
        "trained": RunFolder(run.folder).read_environment() or None,
        "environment": environment(run.device),
        "command": command(run, metric),
    }  # fmt: skip
