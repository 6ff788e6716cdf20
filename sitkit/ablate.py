"""Ablations: what is missing of a study is trained and measured, and its table written.

Every cell is checked before the first one trains.  Run again, it continues: what has its identity on disk is not done
again, and a changed cell is done alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitkit import checkpoint
from sitkit.config import Layer, label
from sitkit.evaluate import evaluate
from sitkit.progress import Event, Progress, silent
from sitkit.publish import publish
from sitkit.registry import UserError, WorkFailed
from sitkit.results import ReferenceNumber, Result, Results, with_estimates, write_results
from sitkit.run import load
from sitkit.study import FACTS, Cell, Plan, Refused, Seeds, describe, read_study
from sitkit.table import as_csv, as_latex, as_markdown
from sitkit.task import Place, Shelf, Task, note, places, trained
from sitkit.train import train


@dataclass(frozen=True)
class Outcome:
    """A study's results and the folder that they were written to."""

    plan: Plan
    results: Results
    folder: Path


def ablate(
    path: Path | str,
    over: Layer | None = None,
    base: str | None = None,
    *,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
    keep_going: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Do what is missing of a study and write its table to studies/<file's name>/.

    Raises UserError before any work if a cell is impossible; with keep_going that cell is a row with its reason, and the
    others are done.  A cell that goes wrong does not stop the others.
    """
    plan = read_study(path, over, base, seeds, sample_seeds)
    if not keep_going or not plan.cells:
        plan.require()
    board = Board(plan)
    failed: dict[str, str] = {}
    for task in board.missing():
        if task.after in failed:
            continue
        progress(Event("ablate", message=task.name))
        log = board.runs / task.log
        note(log, "start")
        try:
            if task.kind == "train":
                train(task.config, progress)
            else:
                run = load(board.runs / task.run, weights=task.config.sample.weights, device=task.config.run.device)
                evaluate(dataclasses.replace(run, config=task.config), progress)
        except (UserError, WorkFailed) as error:
            failed[task.key] = str(error)
            note(log, f"failed: {error}")
            progress(Event("ablate", message=f"{task.name} failed: {error}"))
        else:
            note(log, "done")
        board.shelf.forget(task.run)
    outcome = board.write(failed)
    if any(cell.config.run.track for cell in plan.cells):
        publish(outcome.folder, progress)
    return outcome


class Board:
    """The cells of a plan, where their numbers come from, and what of it is on disk."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runs = plan.cells[0].config.run.folder if plan.cells else Path("runs")
        self.folder = self.runs.parent / "studies" / plan.name
        self.places = places(plan.cells)
        self.shelf = Shelf(self.runs)

    def missing(self) -> list[Task]:
        """What is to be done: trainings first, then the measurements, each once."""
        trainings: dict[str, Task] = {}
        measurements: dict[str, Task] = {}
        for cell, place in zip(self.plan.cells, self.places, strict=True):
            if place.measurement in measurements or self.shelf.find(place) is not None:
                continue
            if place.training not in trainings:
                trainings[place.training] = Task(place.training, "train", place.run, cell.config)
            measurements[place.measurement] = Task(
                place.measurement, "measure", place.run, cell.config, after=place.training
            )
        return [*(task for task in trainings.values() if not trained(task.config)), *measurements.values()]

    def results(self, failed: Mapping[str, str]) -> Results:
        """What is known of each cell; `failed` holds the reasons of the tasks that went wrong, by key."""
        plan = self.plan
        study = plan.study
        placed = iter(zip(plan.cells, self.places, strict=True))
        cells = [
            Result(
                row=entry.row, column=entry.column, seed=None, sample_seed=None, state="refused", failure=entry.reason
            )
            if isinstance(entry, Refused)
            else self._result(*next(placed), failed)
            for entry in plan.entries
        ]
        return with_estimates(
            Results(
                title=study.title,
                source=study.source,
                file=str(plan.file),
                base=plan.base,
                runs=os.path.relpath(self.runs, self.folder),
                rows=_in_order(entry.row for entry in plan.entries),
                columns=_in_order(entry.column for entry in plan.entries),
                seeds=_in_order(cell.seed for cell in plan.cells),
                sample_seeds=_in_order(cell.sample_seed for cell in plan.cells),
                show=study.show,
                lower_is_better={m.name: m.lower_is_better for cell in plan.cells for m in cell.config.metric[:1]},
                notes=tuple(notes(plan)),
                cells=tuple(cells),
            )
        )

    def _result(self, cell: Cell, place: Place, failed: Mapping[str, str]) -> Result:
        reference = cell.reference
        known: dict[str, Any] = {
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "sample_seed": cell.sample_seed,
            "reference": ReferenceNumber(**dataclasses.asdict(reference)) if reference else None,
            "metric": cell.config.metric[0].name,
            "run": place.run,
            "samples": place.samples,
            "shown": {
                key: describe(cell.config, key)
                for key in self.plan.study.show
                if key not in FACTS and key not in self._columns
            },
        }
        found = self.shelf.find(place)
        if found is not None:
            path, record = found
            known |= {key: record.get(key) for key in ("value", "stderr", "halves", "n")}
            return Result(**known, state="done", evaluation=path, nfe=record["sampling"]["nfe"])
        for task in (
            Task(place.training, "train", place.run, cell.config),
            Task(place.measurement, "measure", place.run, cell.config),
        ):
            if task.key in failed:
                return Result(**known, state="failed", failure=failed[task.key], log=task.log)
        return Result(**known, state="todo")

    @property
    def _columns(self) -> set[str]:
        return {entry.column for entry in self.plan.entries}

    def write(self, failed: Mapping[str, str]) -> Outcome:
        """Write the results and the tables."""
        results = self.results(failed)
        write_results(self.folder, results)
        checkpoint.write(self.folder / "table.csv", as_csv(results))
        checkpoint.write(self.folder / "table.md", as_markdown(results))
        checkpoint.write(self.folder / "table.tex", as_latex(results))
        return Outcome(self.plan, results, self.folder)


def _in_order(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def notes(plan: Plan) -> list[str]:
    """What our numbers were measured with, and how that differs from the setting of the references."""
    if not plan.cells:
        return []
    config = plan.cells[0].config
    metric = config.metric[0]
    features = getattr(metric, "features", None)
    told = [
        f"{metric.name}{f' on {label(features)}' if features is not None else ''} of {label(config.data)}, "
        f"{config.sample.n} samples; {label(config.backbone)}, {config.train.steps} steps of {config.train.batch}."
    ]
    references = [cell for cell in plan.cells if cell.reference is not None]
    sources = _in_order(cell.reference.source for cell in references if cell.reference and cell.reference.source)
    if references:
        of = f": {'; '.join(sources)}" if sources else ""
        told.append(f"In brackets: published numbers{of}. {_differences(references)}")
    return told


def _differences(cells: list[Cell]) -> str:
    """How the cells differ from the settings that their references were measured with."""
    differing: dict[str, None] = {}
    stated = False
    for cell in cells:
        assert cell.reference is not None
        for key, theirs in cell.reference.setting.items():
            stated = True
            try:
                ours = describe(cell.config, key)
            except AttributeError:
                ours = describe(cell.config, f"metric.0.{key}") if hasattr(cell.config.metric[0], key) else "-"
            if ours != str(theirs):
                differing[f"{key} {ours} (theirs {theirs})"] = None
    if not stated:
        return "Another data set, size and metric: only the order can be compared."
    if not differing:
        return "Measured with the same settings."
    return f"Ours differ in {'; '.join(differing)}."
