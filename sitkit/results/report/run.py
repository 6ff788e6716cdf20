"""The report of one run: its training, its samples, and their quality."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sitkit.registry import metrics
from sitkit.results.report import figures
from sitkit.results.report.page import Charts, Code, Facts, Notes, Page, PagePart, Section, Table
from sitkit.results.report.sample_sheets import MAX_SHEETS, sample_parts
from sitkit.results.reproduce import evaluate_command, train_command
from sitkit.results.table import TableCell, number, number_cell
from sitkit.runs.changed_plugins import changed_since_training, warn_of_changed_plugins
from sitkit.runs.checkpoint import latest_checkpoint, step_of
from sitkit.runs.config.identity import label
from sitkit.runs.config.plain_yaml import to_yaml
from sitkit.runs.config.schema import Config
from sitkit.runs.evaluate import Evaluation, real_of
from sitkit.runs.run_folder import RunFolder, read_config_of
from sitkit.runs.sample_set import RECORD, read_samples_record
from sitkit.runtime.errors import LeftOut
from sitkit.runtime.files import exists, listed, read_bytes, read_row
from sitkit.runtime.tensors import open_tensors

NOT_CURVES = ("step", "time")
EQUAL_PLACES = "Equal places have equal noise and labels, so differences come from the sampling alone."
REAL = "real: the same metric of n random examples of the data (at most half of them) against the others."


class TrainingRecord(NamedTuple):
    """The training of a run as its folder records it: configuration, newest checkpoint, logged rows, environment."""

    folder: Path
    config: Config
    checkpoint: Path | None
    rows: list[dict[str, Any]]
    environment: dict[str, Any]

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        return step_of(self.checkpoint) if self.checkpoint else 0


def read_training(folder: Path, broken: LeftOut) -> TrainingRecord:
    """Return the record of the training in a folder, finished or not; `broken` receives checkpoints that are passed over."""
    run, config = RunFolder(folder), read_config_of(folder)
    warn_of_changed_plugins(folder, config)
    newest = None
    with broken.noting():
        newest = latest_checkpoint(run.checkpoints, broken.append)
    rows: list[dict[str, Any]] = []
    with broken.noting():
        rows += _read_rows(run.metrics)
    return TrainingRecord(folder, config, newest, rows, run.read_environment())


def read_evaluations(paths: Iterable[Path], broken: LeftOut) -> dict[Path, dict[str, Any]]:
    """Return the records of the numbers in files; `broken` receives those that cannot be read."""
    records: dict[Path, dict[str, Any]] = {}
    for path in paths:
        with broken.noting():
            records[path] = Evaluation.read(path).record
    return records


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl, without rows that are incomplete."""
    if exists(path):
        yield from filter(None, map(read_row, read_bytes(path).splitlines()))


def run_page(folder: Path) -> Page:
    """Return the page of the run in a folder. Raises UserError if its configuration cannot be read."""
    broken, records = LeftOut(), []
    training = read_training(folder, broken)
    config = training.config
    with broken.noting():
        records = [*read_evaluations(listed(RunFolder(folder).evaluations, "*.json"), broken).values()]
    records.sort(key=lambda r: (r["metric"]["name"], r["sampling"]["nfe"], r["value"]))
    finished = training.step >= config.train.steps or not config.backbone.trainable
    lead = (
        f"{label(config.backbone)} on {label(config.data)}: interpolant {label(config.interp)}, {label(config.target)} "
        f"prediction with the error measured in {label(config.weight)} space, "
        + (f"{number(training.step)} steps of {config.train.batch}." if finished else "not finished.")
    )
    environment = [Facts(environment_facts(training.environment))] if training.environment else []
    samples, paths = _samples(training, broken), figures.path_charts(folder, config, records, broken)
    sections = [
        Section(
            "Summary", "", [Facts(_facts(training, records)), *_alarms(training, finished), *notes_on_left_out(broken)]
        ),
        Section("Results", "Each number with the command that reproduces it.", _results(folder, records)),
        Section("Quality and cost", "Evaluations of the network for one sample.", _costs(records)),
        Section("Training", "The mean of each logged interval of steps.", _curves(training)),
        Section("Samples", EQUAL_PLACES, samples),
        Section("Path", "Time runs from noise, t = 0, to data, t = 1.", [Charts(paths)]),
        Section("Configuration", "", _configuration(training)),
        Section("Environment", "", environment),
    ]
    return Page(folder.name, "Run", lead, sections)


def notes_on_left_out(broken: LeftOut) -> list[Notes]:
    """Return the files that a page goes on without, and warn of each."""
    messages = [*dict.fromkeys(broken)]
    for text in messages:
        warnings.warn(text, stacklevel=2)
    return [Notes(messages, alarm=True)] if messages else []


def _facts(training: TrainingRecord, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    config, rows, plain = training.config, training.rows, training.config.plain()
    facts = {
        "data": _one_line(plain["data"]),
        "interpolant": _one_line(plain["interp"]),
        "target": _one_line(plain["target"]),
        "weight": _one_line(plain["weight"]),
        "backbone": label(config.backbone) + _parameters(training.checkpoint),
        "optimiser": f"AdamW, lr {config.train.lr:g}, batch {config.train.batch}",
        "steps": f"{number(training.step)} of {number(config.train.steps)}",
        "training seed": str(config.train.seed),
    }
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
    if losses:
        facts["last loss"] = number(losses[-1])
    if len(rows) > 1:
        facts["time"] = _duration(sum(_intervals(rows)))
    for record in records[:1]:
        values = [r["value"] for r in records if r["metric"] == record["metric"]]
        facts[f"best {metric_name(record)}"] = number(min(values) if lower_is_better(record) else max(values))
    return facts


def _one_line(component: Mapping[str, Any]) -> str:
    """A component's plain values in one line: its name, then its fields that are set."""
    texts = {
        key: _one_line(value) if isinstance(value, Mapping) else value if isinstance(value, str) else json.dumps(value)
        for key, value in component.items()
        if value is not None
    }
    name = texts.pop("name", "")
    rest = ", ".join(f"{key} {text}" for key, text in texts.items())
    return f"{name} ({rest})" if rest else name


def _intervals(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Seconds between logged rows, without the pauses between two commands (above ten times the median)."""
    gaps = [b["time"] - a["time"] for a, b in zip(rows, rows[1:], strict=False) if b["time"] > a["time"]]
    median = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    return [gap for gap in gaps if gap <= 10 * median]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _parameters(checkpoint: Path | None) -> str:
    """The number of weights of the network in a checkpoint; "" without a checkpoint."""
    if checkpoint is None:
        return ""
    with open_tensors(checkpoint) as file:
        count = sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith("model."))  # noqa: SIM118
    return f", {count / 1e6:.3g} M parameters"


def _alarms(training: TrainingRecord, finished: bool) -> list[Notes]:
    changed = changed_since_training(training.folder, training.config)
    messages = [changed] if changed else []
    if not finished:
        progress = f"The training has reached step {training.step} of {training.config.train.steps}"
        messages.append(f"{progress}: {train_command(training.folder)} continues it.")
    for row in training.rows:
        if not figures.is_finite_number(row.get("loss", 0.0)):
            messages.append(f"The loss was {row['loss']} at step {row['step']}.")
            break
    return [Notes(messages, alarm=True)] if messages else []


def metric_name(record: Mapping[str, Any]) -> str:
    """Return the name of a record's metric with its features, and with the file of statistics that replaces the data."""
    metric = record["metric"]
    features, file = metric.get("features", {}).get("name"), metric.get("reference")
    name = f"{metric['name']} on {features}" if features else metric["name"]
    return f"{name} against {Path(file).name}" if file else name


def lower_is_better(record: Mapping[str, Any]) -> bool:
    """Return the direction of a record's metric; True if the metric's plugin is not installed."""
    name = record["metric"]["name"]
    return metrics[name].lower_is_better if name in metrics else True


def sampling_name(recipe: Mapping[str, Any]) -> str:
    """Return a short name of the settings of sampling."""
    parts = [recipe["sampler"]["name"]]
    if recipe["diffusion"]["name"] != "zero":
        parts.append(recipe["diffusion"]["name"])
    if recipe["guidance"]["name"] != "none":
        parts.append(_one_line(recipe["guidance"]))
    sample = recipe["sample"]
    if sample["weights"] != "ema":
        parts.append(sample["weights"])
    if sample.get("ema") is not None:
        parts.append(f"ema {sample['ema']:g}")
    labels = sample.get("labels", "balanced")
    if labels != "balanced":
        parts.append(f"labels {labels if isinstance(labels, str) else ' '.join(map(str, labels))}")
    return ", ".join(parts)


def _results(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[PagePart]:
    if not records:
        return [Notes([f"There are no numbers yet: sitkit evaluate {folder}."])]
    rows = [
        {
            "metric": TableCell(metric_name(record)),
            "#value": number_cell(record["value"]),
            "#error": number_cell(record["stderr"], 2),
            "#real": number_cell(real_of(record)),
            "sampling": TableCell(sampling_name(record["sampling"]["recipe"])),
            "#NFE": number_cell(record["sampling"]["nfe"]),
            "#n": number_cell(record["n"]),
            "#seed": TableCell(str(seed := record["sampling"]["recipe"]["sample"]["seed"]), seed),
            "again": TableCell("command", code=evaluate_command(folder, record)),
        }
        for record in records
    ]
    caveats = dict.fromkeys(note for record in records for note in record["notes"])
    notes = [f"error: standard error over the samples.  {REAL}", *caveats]
    return [Table.of("Every evaluation of this run", rows, notes)]


def _costs(records: Sequence[Mapping[str, Any]]) -> list[Charts]:
    """A chart for each metric that was measured at several costs, with a curve for each way of sampling."""
    charts = []
    for name in dict.fromkeys(map(metric_name, records)):
        curves: dict[str, dict[int, figures.CostPoint]] = {}
        of_metric = [record for record in records if metric_name(record) == name]
        for record in of_metric:
            nfe = record["sampling"]["nfe"]
            points = curves.setdefault(sampling_name(record["sampling"]["recipe"]), {})
            points[nfe] = (nfe, record["value"], record["stderr"])
        if any(len(points) > 1 for points in curves.values()):
            better = "Lower" if lower_is_better(of_metric[-1]) else "Higher"
            charts.append(
                figures.cost_chart({way: points.values() for way, points in curves.items()}, name, better=better)
            )
    return [Charts(charts)] if charts else []


def _curves(training: TrainingRecord) -> list[Charts]:
    keys = dict.fromkeys(key for row in training.rows for key in row if key not in NOT_CURVES)
    charts = []
    for key in keys:
        charts += figures.training_charts([figures.training_curve(key, training.rows, key)], key.replace("_", " "))
    return [Charts(charts)] if charts else []


def _samples(training: TrainingRecord, broken: LeftOut) -> list[PagePart]:
    files = sorted(RunFolder(training.folder).samples.glob(f"*/{RECORD}"), key=lambda path: path.parent.stat().st_mtime)
    if not files:
        return [Notes([f"There are no samples yet: sitkit sample {training.folder}."])]
    samples = []
    for path in files[:MAX_SHEETS]:
        with broken.noting():
            record = read_samples_record(path)
            caption = f"{record['nfe']} evaluations, seed {record['recipe']['sample']['seed']}"
            samples.append((path.parent, sampling_name(record["recipe"]), caption))
    return sample_parts(training.config, samples, len(files), "sets of samples are in the run's folder.", broken)


def _configuration(training: TrainingRecord) -> list[Code]:
    return [
        Code("Train it again", train_command(training.folder)),
        Code("config.yaml", to_yaml(training.config.plain()), folded=True),
    ]


def environment_facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return code, machine and packages that the numbers depend on."""
    git = environment.get("git") or {}
    facts = {"commit": f"{git['commit'][:12]}{', with uncommitted changes' if git.get('dirty') else ''}"} if git else {}
    for key in ("device", "threads", "python", "platform"):
        if environment.get(key) is not None:
            facts[key] = str(environment[key])
    plugins = environment.get("plugins") or {}
    if plugins:
        facts["plugins"] = ", ".join(map(str, plugins))
    return facts | {k: v for k, v in (environment.get("packages") or {}).items() if v}
