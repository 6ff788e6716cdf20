"""The report of one run: what was trained, how it went, what it draws, and how good that is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sitkit.evaluation.plots import Curve
from sitkit.registry import metrics
from sitkit.registry.measures import UNTRAINED, Untrained
from sitkit.results.report.charts import lines
from sitkit.results.report.page import (
    Chart,
    Charts,
    Code,
    Facts,
    Notes,
    Page,
    Section,
    Sheets,
    Table,
    Value,
    number,
    one_line,
)
from sitkit.results.report.sample_sheets import MOST_SHEETS, data_sheet, sample_sheet
from sitkit.results.reproduce import evaluate_command, train_command
from sitkit.runs.checkpoint import checkpoints, step_of
from sitkit.runs.config.identity import label
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import to_yaml
from sitkit.runs.evaluate import Evaluation
from sitkit.runs.run_folder import RunFolder, read_config_of
from sitkit.runs.sample_set import RECORD
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.runtime.tensors import open_tensors

SKIPPED = ("step", "time")
EQUAL_PLACES = "Equal places hold equal noise and labels, so that what differs is the way of sampling."


class Trained(NamedTuple):
    """What a run's folder says of its training: configuration, steps done, logged rows, environment."""

    folder: Path
    config: Config
    step: int
    rows: list[dict[str, Any]]
    environment: dict[str, Any]


def read_training(folder: Path) -> Trained:
    """The training in a folder, as far as it has come."""
    found = checkpoints(RunFolder(folder).checkpoints)
    path = RunFolder(folder).environment
    return Trained(
        folder,
        read_config_of(folder),
        step_of(found[-1]) if found else 0,
        list(read_rows(RunFolder(folder).metrics)),
        read_json(path) if path.exists() else {},
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl; one that is still being written, or is torn, is passed over."""
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def run_page(folder: Path) -> Page:
    """The page of the run in a folder.  Raises UserError where its configuration cannot be read."""
    trained = read_training(folder)
    config = trained.config
    records = [Evaluation.read(path).record for path in sorted(RunFolder(folder).evaluations.glob("*.json"))]
    records.sort(key=lambda r: (r["metric"]["name"], r["sampling"]["nfe"], r["value"]))
    whole = trained.step >= config.train.steps or not config.backbone.trainable
    lead = (
        f"{label(config.backbone)} on {label(config.data)}: interpolant {label(config.interp)}, {label(config.target)} "
        f"prediction with the error measured in {label(config.weight)} space, "
        + (f"{number(trained.step)} steps of {config.train.batch}." if whole else "not finished.")
    )
    sections = [
        Section("Summary", "", [Facts(_facts(trained, records)), *_alarms(trained, whole)]),
        Section("Results", "Each number with the command that makes it again.", _results(folder, records)),
        Section("Quality and cost", "Evaluations of the network for one sample.", _against_nfe(records)),
        Section("Training", "The mean of each logged stretch of steps.", _curves([trained])),
        Section("Samples", EQUAL_PLACES, _samples(trained)),
        Section("Path", "Time runs from noise, t = 0, to data, t = 1.", paths([config], forms_of(trained, records))),
        Section("Configuration", "", _configuration(trained)),
        Section("Environment", "", [Facts(environment_facts(trained.environment))] if trained.environment else []),
    ]  # fmt: skip
    return Page(folder.name, "Run", lead, sections)


def _facts(trained: Trained, records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    config, rows = trained.config, trained.rows
    facts = {
        "data": one_line(_spec(config, "data")),
        "interpolant": one_line(_spec(config, "interp")),
        "target": one_line(_spec(config, "target")),
        "weight": one_line(_spec(config, "weight")),
        "backbone": label(config.backbone) + parameters(trained.folder),
        "optimiser": f"AdamW, lr {config.train.lr:g}, batch {config.train.batch}",
        "steps": f"{number(trained.step)} of {number(config.train.steps)}",
        "training seed": str(config.train.seed),
    }
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), (int, float))]
    if losses:
        facts["last loss"] = number(losses[-1])
    if len(rows) > 1:
        facts["time"] = duration(sum(stretches(rows)))
    for record in records[:1]:
        values = [r["value"] for r in records if r["metric"] == record["metric"]]
        facts[f"best {metric_name(record)}"] = number(min(values) if lower_is_better(record) else max(values))
    return facts


def _spec(config: Config, key: str) -> dict[str, Any]:
    return config.plain()[key]


def stretches(rows: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Seconds between logged rows, without the pauses between two commands (ten times the usual)."""
    gaps = [b["time"] - a["time"] for a, b in zip(rows, rows[1:], strict=False) if b["time"] > a["time"]]
    usual = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    yield from (gap for gap in gaps if gap <= 10 * usual)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def parameters(folder: Path) -> str:
    """How many weights the newest checkpoint's network has, in words; nothing where there is no checkpoint."""
    found = checkpoints(RunFolder(folder).checkpoints)
    if not found:
        return ""
    with open_tensors(found[-1]) as file:
        count = sum(math.prod(file.get_slice(k).get_shape()) for k in file.keys() if k.startswith("model."))  # noqa: SIM118
    return f", {count / 1e6:.3g} M parameters"


def _alarms(trained: Trained, whole: bool) -> list[Notes]:
    config = trained.config
    said = []
    if not whole:
        said.append(
            f"The training has come to step {trained.step} of {config.train.steps}: {train_command(trained.folder)} continues it."
        )
    bad = next(
        (r for r in trained.rows if isinstance(r.get("loss"), str) or not math.isfinite(r.get("loss", 0.0))), None
    )
    if bad:
        said.append(f"The loss was {bad['loss']} at step {bad['step']}.")
    return [Notes(said, alarm=True)] if said else []


def metric_name(record: Mapping[str, Any]) -> str:
    """A metric with the features it is measured in, and with the file where that stands in for the data."""
    metric = record["metric"]
    features, file = metric.get("features", {}).get("name"), metric.get("reference")
    name = f"{metric['name']} on {features}" if features else metric["name"]
    return f"{name} against {Path(file).name}" if file else name


def lower_is_better(record: Mapping[str, Any]) -> bool:
    """Which way a record's metric points; downwards where its plugin is not here to say."""
    name = record["metric"]["name"]
    return metrics[name].lower_is_better if name in metrics else True


def sampling_name(recipe: Mapping[str, Any]) -> str:
    """A way of sampling in a few words."""
    parts = [recipe["sampler"]["name"]]
    if recipe["diffusion"]["name"] != "zero":
        parts.append(recipe["diffusion"]["name"])
    if recipe["guidance"]["name"] != "none":
        parts.append(one_line(recipe["guidance"]))
    sample = recipe["sample"]
    if sample["weights"] != "ema":
        parts.append(sample["weights"])
    if sample.get("ema") is not None:
        parts.append(f"ema {sample['ema']:g}")
    if sample.get("labels", "balanced") != "balanced":
        labels = sample["labels"]
        parts.append(f"labels {labels if isinstance(labels, str) else ' '.join(map(str, labels))}")
    return ", ".join(parts)


def _results(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[Table | Notes]:
    if not records:
        return [Notes([f"Nothing was measured yet: sitkit evaluate {folder}."])]
    rows = []
    for record in records:
        recipe = record["sampling"]["recipe"]
        rows.append([
            Value(metric_name(record)),
            Value(number(record["value"]), record["value"]),
            Value(number(record["stderr"], 2), record["stderr"]),
            Value(number(record["halves"]), record["halves"]),
            Value(sampling_name(recipe)),
            Value(number(record["sampling"]["nfe"]), record["sampling"]["nfe"]),
            Value(number(record["n"]), record["n"]),
            Value(str(recipe["sample"]["seed"]), recipe["sample"]["seed"]),
            Value("command", code=evaluate_command(folder, record)),
        ])  # fmt: skip
    columns = ("metric", "#value", "#error", "#halves", "sampling", "#NFE", "#n", "#seed", "again")
    notes = ["error: standard error over the samples.  halves: the same metric between two random halves of the data.",
             *dict.fromkeys(note for record in records for note in record["notes"])]  # fmt: skip
    return [Table("Every evaluation of this run", columns, rows, notes)]


def _against_nfe(records: Sequence[Mapping[str, Any]]) -> list[Charts]:
    """A chart for each metric that was measured at several costs, a curve for each way of sampling."""
    charts = []
    for name in dict.fromkeys(map(metric_name, records)):
        curves: dict[str, dict[int, tuple[float, float | None]]] = {}
        better = "Lower"
        for record in records:
            if metric_name(record) == name:
                better = "Lower" if lower_is_better(record) else "Higher"
                way = sampling_name(record["sampling"]["recipe"])
                curves.setdefault(way, {})[record["sampling"]["nfe"]] = (record["value"], record["stderr"])
        if sum(map(len, curves.values())) > len(curves):
            svg = nfe_chart({k: [(n, *v) for n, v in sorted(at.items())] for k, at in curves.items()}, name)
            charts.append(Chart(svg, f"{name} against evaluations", f"{better} is better; bars are standard errors."))
    return [Charts(charts)] if charts else []


def nfe_chart(curves: Mapping[str, Sequence[tuple[int, float, float | None]]], metric: str) -> str:
    """A metric against evaluations a sample, a curve for each name of (NFE, value, standard error)."""
    series = [
        Curve(
            name,
            [nfe for nfe, _, _ in points],
            [value for _, value, _ in points],
            None if any(error is None for *_, error in points) else [error or 0.0 for *_, error in points],
        )
        for name, points in curves.items()
    ]
    values = [value for curve in curves.values() for _, value, _ in curve]
    return lines(
        series, label=f"{metric} against evaluations", xlabel="evaluations a sample (NFE)", ylabel=metric,
        logx=True, logy=needs_log_axis(values),
    )  # fmt: skip


def _curves(runs: Sequence[Trained]) -> list[Charts]:
    trained = runs[0]
    names = dict.fromkeys(k for row in trained.rows for k, v in row.items() if k not in SKIPPED and _is_number(v))
    charts = []
    for name in names:
        points = [(row["step"], row[name]) for row in trained.rows if _is_number(row.get(name))]
        if len(points) > 1:
            curve = Curve(name, [s for s, _ in points], [v for _, v in points])
            title = name.replace("_", " ")
            svg = lines([curve], label=f"{title} against training steps", xlabel="training step", ylabel=title,
                              logy=needs_log_axis([v for _, v in points]))  # fmt: skip
            charts.append(Chart(svg, title))
    return [Charts(charts)] if charts else []


def needs_log_axis(values: Sequence[float]) -> bool:
    """Whether positive values differ so much that they need a logarithmic axis."""
    return min(values) > 0 and max(values) > 10 * min(values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _samples(trained: Trained) -> list[Sheets | Notes]:
    folders = sorted(
        (path.parent for path in trained.folder.glob("samples/*/record.json")), key=lambda path: path.stat().st_mtime
    )
    if not folders:
        return [Notes([f"Nothing was drawn yet: sitkit sample {trained.folder}."])]
    sheets = [sheet for sheet in [data_sheet(trained.config)] if sheet]
    for folder in folders[:MOST_SHEETS]:
        record = read_json(folder / RECORD)
        if not {"recipe", "nfe"} <= record.keys():
            raise UserError(
                f"{folder / RECORD} lacks its recipe, as it is of an older sitkit or damaged: remove {folder}."
            )
        recipe = record["recipe"]
        caption = f"{record['nfe']} evaluations, seed {recipe['sample']['seed']}"
        sheet = sample_sheet(folder, sampling_name(recipe), caption)
        sheets += [sheet] if sheet else []
    rest = len(folders) - MOST_SHEETS
    return [Sheets(sheets), *([Notes([f"{rest} more samplings are in the run's folder."])] if rest > 0 else [])]


def forms_of(trained: Trained, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The w that the run was sampled with, kl-eta with the loss that was measured for it."""
    from sitkit.registry import diffusions

    seen = {json.dumps(record["sampling"]["recipe"]["diffusion"]): None for record in records}
    found = [diffusions.parse(json.loads(text)) for text in seen] or [trained.config.diffusion]
    return [form.bind(StoredMeasures(trained.folder)) for form in found]


class StoredMeasures(Untrained):
    """The velocity loss that lies in a run's folder; no pairs where none was measured."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def velocity_losses(self) -> tuple[tuple[float, float], ...]:
        """Return (t, L_t) pairs of the latest checkpoint that they were measured for."""
        measured = sorted(self.folder.glob("velocity-loss-*.json"))
        losses = read_json(measured[-1]) if measured else {"times": [], "smoothed": []}
        return tuple(zip(losses["times"], losses["smoothed"], strict=True))


def paths(configs: Sequence[Config], forms: Sequence[Any]) -> list[Charts]:
    """alpha, sigma and their rates of each interpolant, and the w of each diffusion on it, against time."""
    import torch

    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    charts = []
    for interp in {label(config.interp): config.interp for config in configs}.values():
        c = interp.coefficients(t)
        name, x = label(interp), "t (0 noise, 1 data)"
        both = [Curve("alpha", t, c.alpha), Curve("sigma", t, c.sigma)]
        charts.append(
            Chart(lines(both, label=f"alpha and sigma of {name}", xlabel=x, ylabel=""), f"{name}: coefficients")
        )
        rates = [Curve("d alpha / dt", t, c.d_alpha), Curve("d sigma / dt", t, c.d_sigma)]
        charts.append(
            Chart(
                lines(rates, label=f"rates of {name}", xlabel=x, ylabel="per unit time", clipped=True),
                f"{name}: rates",
            )
        )
        drawn = [form for form in forms if form.stochastic and form.bind(UNTRAINED) is form]
        if drawn:
            curves = [Curve(form.name, t, form.w(t, c)) for form in drawn]
            svg = lines(curves, label=f"w(t) on {name}", xlabel=x, ylabel="w", clipped=True)
            charts.append(
                Chart(svg, f"{name}: diffusion coefficient w", "What diverges at an end leaves the view there.")
            )
    return [Charts(charts)] if charts else []


def _configuration(trained: Trained) -> list[Code]:
    return [
        Code("Train it again", train_command(trained.folder)),
        Code("config.yaml", to_yaml(trained.config.plain()), folded=True),
    ]


def environment_facts(environment: Mapping[str, Any]) -> dict[str, str]:
    """Code, machine and packages that the numbers depend on."""
    git = environment.get("git") or {}
    facts = {"commit": f"{git['commit'][:12]}{', with uncommitted changes' if git.get('dirty') else ''}"} if git else {}
    for key in ("device", "threads", "python", "platform"):
        if environment.get(key) is not None:
            facts[key] = str(environment[key])
    plugins = environment.get("plugins") or {}
    if plugins:
        facts["plugins"] = ", ".join(map(str, plugins))
    return facts | {k: v for k, v in (environment.get("packages") or {}).items() if v}
