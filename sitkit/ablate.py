"""Ablations: a file of rows and axes, crossed; one training for each model, one sampling for each setting, one table.

    base: digits                                   # a preset, or a file
    set: {sampler: euler-maruyama}                 # settings of every cell
    rows: [{label: Linear, interp: linear, paper: {kl: 33.6}}]
    columns: {kl: {diffusion: kl}}                 # named settings, crossed with the rows
    grid: {train.lr: [1e-3, 1e-4]}                 # axes, all crossed
    seeds: [0, 1, 2]                               # training seeds
    bases: {imagenet256: {set: {...}}}             # what another base changes in the study

Every cell is checked before the first one trains.  Run again, it continues: what has its identity on disk is not done
again, and a changed cell is done alone.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, field_validator

from sitkit import checkpoint
from sitkit.config import (
    Config,
    Layer,
    Settings,
    assemble,
    label,
    locate,
    merge,
    read_config,
    read_yaml,
    training_identity,
    validate,
)
from sitkit.diffusion import KLEta
from sitkit.evaluate import evaluate
from sitkit.progress import Event, Progress, silent
from sitkit.registry import UserError, WorkFailed, suggest
from sitkit.run import CHECKPOINTS, folder_of, load
from sitkit.train import train

Reference = float | Mapping[str, float] | None


class Study(Settings):
    """An ablation as people write it.

    rows: settings with a `label`, in `paper` a reference number, or one for each column, and in `columns` settings of the
    row in one column alone.
    columns: settings by name.  grid: dotted keys and the values to cross.  bases: for each base that the study can run on,
    the keys of the study that it changes (set, columns, metric, ...).  source: where the reference numbers come from.
    """

    title: str = ""
    source: str = ""
    base: str = "digits"
    set: dict[str, Any] = {}
    bases: dict[str, dict[str, Any]] = {}
    rows: tuple[dict[str, Any], ...] = Field(({},), min_length=1)
    columns: dict[str, dict[str, Any]] = {}
    grid: dict[str, tuple[Any, ...]] = {}
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    metric: str | dict[str, Any] | None = None

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"each seed once; got {list(seeds)}.")
        return seeds


@dataclass(frozen=True)
class Cell:
    """One number to be had: a row, a value for each axis, a seed, and the configuration they make."""

    row: str
    column: str
    seed: int
    config: Config
    paper: float | None


class Result(NamedTuple):
    """A cell with its record, or with the reason why it has none."""

    cell: Cell
    record: dict[str, Any] | None
    failure: str = ""


@dataclass(frozen=True)
class Table:
    """The outcome: every cell's result and where the table was written."""

    study: Study
    results: list[Result]
    folder: Path

    @property
    def failures(self) -> list[Result]:
        """Cells that went wrong."""
        return [result for result in self.results if result.record is None]


def read_study(path: Path | str, over: Layer | None = None, base: str | None = None) -> tuple[Study, list[Cell]]:
    """The study in a file and its cells, each checked; `base` in place of the file's own.

    Raises UserError with file, line and reason for the first cell that cannot be.
    """
    layer = read_yaml(path)
    study: Study = validate(Study, layer.values, layer.where)
    where = dict(layer.where)
    name = base or study.base
    if name in study.bases:
        inside = f"bases.{name}."
        where |= {k.removeprefix(inside): v for k, v in layer.where.items() if k.startswith(inside)}
        study = validate(Study, merge(layer.values, study.bases[name]), where)
    try:
        layers = [read_config(_beside(Path(path), name)), Layer(study.set, _within(where, "set"))]
    except UserError as error:
        raise UserError(f"{'--base: ' if base else locate(where, ['base'])}{error}") from None
    if study.metric is not None:
        layers.append(Layer({"metric": study.metric}, where))
    if over is not None:
        layers.append(over)
    columns = _columns(study, where)
    titles: dict[str, int] = {}
    cells = []
    for (i, row), (column, chosen) in itertools.product(enumerate(study.rows), columns.items()):
        place = locate(where, ["rows", str(i)]) or f"{path}: "
        settings = {k: v for k, v in row.items() if k not in ("label", "paper", "columns")}
        here = Layer(settings, _within(where, f"rows.{i}"))
        own = Layer(_own(row, column, place, columns), _within(where, f"rows.{i}.columns.{column}"))
        config = assemble([*layers, here, chosen, own])
        title = str(row.get("label") or _name(settings, config) or "base")
        if titles.setdefault(title, i) != i:
            raise UserError(f"{place}two rows are called {title!r}: give each a label of its own.")
        paper = _reference(row.get("paper"), column, place, columns)
        for seed in study.seeds:
            seeded = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
            cell = Cell(title, column, seed, seeded, paper)
            _check(cell, place)
            cells.append(cell)
    return study, cells


def _within(where: Mapping[str, str], key: str) -> dict[str, str]:
    return {k.removeprefix(f"{key}."): v for k, v in where.items() if k.startswith(f"{key}.")}


def _columns(study: Study, where: Mapping[str, str]) -> dict[str, Layer]:
    """Settings by the name of the column: the named columns crossed with the axes of the grid."""
    columns: dict[str, Layer] = {}
    for named, values in itertools.product(study.columns or {"": {}}, itertools.product(*study.grid.values())):
        settings: Any = study.columns.get(named, {})
        lines = _within(where, f"columns.{named}")
        for key, value in zip(study.grid, values, strict=True):
            nested: Any = value
            for part in reversed(key.split(".")):
                nested = {part: nested}
            settings = merge(settings, nested)
            lines[key] = where.get(f"grid.{key}", "")
        title = ", ".join(filter(None, (named, *map(_value_name, values))))
        columns[title] = Layer(settings, lines)
    return columns


def _own(row: Mapping[str, Any], column: str, place: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a row sets in one column alone."""
    own = row.get("columns") or {}
    if not isinstance(own, Mapping) or not all(isinstance(settings, Mapping) for settings in own.values()):
        raise UserError(f"{place}columns of a row are settings for each column; got {own!r}.")
    for key in own:
        if key not in columns:
            raise UserError(f"{place}the row sets {key!r}.{suggest(key, columns)} Columns: {'; '.join(columns)}.")
    return dict(own.get(column, {}))


def _beside(study: Path, base: str) -> str:
    """A base that is a file is found beside the study."""
    beside = study.parent / base
    return str(beside) if Path(base).suffix in (".yaml", ".yml") and beside.exists() else base


def _name(settings: Mapping[str, Any], config: Config) -> str:
    named = [getattr(config, key) for key in settings if key in Config.model_fields]
    return " ".join(label(c) if hasattr(c, "name") else str(c) for c in named)


def _value_name(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}{f'({rest})' if rest else ''}"
    return str(value)


def _reference(paper: Any, column: str, place: str, columns: Mapping[str, Any]) -> float | None:
    if paper is None or isinstance(paper, (int, float)):
        return paper
    if not isinstance(paper, Mapping):
        raise UserError(f"{place}paper is a number, or a number for each column; got {paper!r}.")
    for key in paper:
        if key not in columns:
            raise UserError(
                f"{place}paper has a number for {key!r}.{suggest(key, columns)} Columns: {'; '.join(columns)}."
            )
    return paper.get(column)


def _check(cell: Cell, place: str) -> None:
    config = cell.config
    diffusion = config.diffusion
    if isinstance(diffusion, KLEta) and not diffusion.losses:
        # Known only after training; any finite loss tells whether the rest of the cell can be.
        diffusion = dataclasses.replace(diffusion, losses=((0.0, 1.0), (1.0, 1.0)))
    try:
        config.sampler.plan(config.interp, config.target, diffusion, config.guidance)
    except UserError as error:
        raise UserError(f"{place}row {cell.row!r}{f', {cell.column}' if cell.column else ''}: {error}") from None


def trainings(cells: Sequence[Cell]) -> dict[str, Config]:
    """The distinct trainings of the cells, by identity."""
    return {training_identity(cell.config): cell.config for cell in cells}


def trained(config: Config) -> bool:
    """Whether the training of a configuration is complete on disk."""
    if not config.backbone.trainable:
        return (folder_of(config) / "config.yaml").is_file()
    found = checkpoint.checkpoints(folder_of(config) / CHECKPOINTS)
    try:
        return bool(found) and checkpoint.header(found[-1])["step"] == config.train.steps
    except UserError:
        return False


def ablate(path: Path | str, over: Layer | None = None, base: str | None = None, progress: Progress = silent) -> Table:
    """Do what is missing of a study and write its table to studies/<file's name>/.

    Raises UserError before any work if a cell is impossible.  A cell that goes wrong does not stop the others.
    """
    study, cells = read_study(path, over, base)
    failed: dict[str, str] = {}
    missing = {key: config for key, config in trainings(cells).items() if not trained(config)}
    for number, (key, config) in enumerate(missing.items()):
        progress(
            Event(
                "ablate",
                number,
                len(missing),
                message=f"training {number + 1} of {len(missing)}: {folder_of(config).name}",
            )
        )
        try:
            train(config, progress)
        except WorkFailed as error:
            failed[key] = str(error)
            progress(Event("ablate", message=f"{folder_of(config).name} failed: {error}"))
    results = []
    for number, cell in enumerate(cells):
        key = training_identity(cell.config)
        progress(Event("cells", number, len(cells)))
        if key in failed:
            results.append(Result(cell, None, failed[key]))
            continue
        try:
            results.append(Result(cell, _measure(cell, progress)))
        except (UserError, WorkFailed) as error:
            results.append(Result(cell, None, str(error)))
    progress(Event("cells", len(cells), len(cells)))
    folder = cells[0].config.run.folder.parent / "studies" / "-".join(filter(None, (Path(path).stem, base)))
    checkpoint.write(folder / "table.csv", as_csv(results))
    checkpoint.write(folder / "table.md", as_markdown(study, results))
    return Table(study, results, folder)


def _measure(cell: Cell, progress: Progress) -> dict[str, Any]:
    run = load(folder_of(cell.config), weights=cell.config.sample.weights, device=cell.config.run.device)
    run = dataclasses.replace(run, config=cell.config)
    return evaluate(run, progress)[0].record


COLUMNS = (
    "row",
    "column",
    "seed",
    "metric",
    "value",
    "stderr",
    "halves",
    "n",
    "nfe",
    "paper",
    "run",
    "samples",
    "failure",
)


def as_csv(results: Sequence[Result]) -> str:
    """One line a cell, in the order of the file: nothing in it depends on when or how often the study was run."""
    text = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell, record, failure in results:
        line: dict[str, Any] = {
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "paper": cell.paper,
            "failure": failure,
        }
        if record is not None:
            line |= {k: record[k] for k in ("value", "stderr", "halves", "n", "run", "samples")}
            line |= {"metric": record["metric"]["name"], "nfe": record["sampling"]["nfe"]}
        writer.writerow(line)
    return text.getvalue()


def grouped(results: Sequence[Result]) -> dict[str, dict[str, list[Result]]]:
    """Results by row and column, seeds together."""
    rows: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        rows.setdefault(result.cell.row, {}).setdefault(result.cell.column, []).append(result)
    return rows


def summary(results: Sequence[Result]) -> str:
    """The mean over seeds, with its standard error where there is more than one; the paper's number in brackets."""
    values = [result.record["value"] for result in results if result.record is not None]
    if not values:
        return "failed"
    text = f"{statistics.fmean(values):.3g}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g}"
    paper = results[0].cell.paper
    return f"{text} [{paper:g}]" if paper is not None else text


def footnotes(study: Study, results: Sequence[Result]) -> list[str]:
    """What a reader must know: the metric and its yardstick, the sample's size, the source of the numbers in brackets."""
    records = [result.record for result in results if result.record is not None]
    notes = []
    if records:
        first = records[0]
        config = results[0].cell.config
        notes.append(
            f"{first['metric']['name']} on {first['metric'].get('features', {}).get('name', 'points')} of {label(config.data)}, "
            f"{first['n']} samples, {config.train.steps} steps of {config.train.batch}; "
            f"between two random halves of the data: {first['halves']:.3g}."
        )
    if study.source:
        notes.append(f"In brackets: {study.source}. Another data set, size and metric: only the order can be compared.")
    return notes


def as_markdown(study: Study, results: Sequence[Result]) -> str:
    """The table, one line a row of the study and one column for each combination of the grid."""
    rows = grouped(results)
    columns = list(dict.fromkeys(result.cell.column for result in results))
    lines = [f"# {study.title}\n"] if study.title else []
    lines.append("| | " + " | ".join(column or "value" for column in columns) + " |")
    lines.append("|---|" + "---|" * len(columns))
    for row, cells in rows.items():
        lines.append(f"| {row} | " + " | ".join(summary(cells[column]) for column in columns) + " |")
    return "\n".join([*lines, "", *footnotes(study, results)]) + "\n"
