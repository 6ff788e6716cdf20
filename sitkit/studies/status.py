"""The status of a study: which cells have a number on disk, and which tasks are left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitkit.results.study_results import (
    FACTS,
    CellResult,
    StudyResults,
    with_estimates,
    write_results,
)
from sitkit.results.table import as_csv, as_latex, as_markdown
from sitkit.runs.config.identity import ResultLocation, label, locations_of
from sitkit.runtime.files import update_file
from sitkit.studies.study import Cell, Refused, StudyPlan, describe_setting
from sitkit.studies.tasks import Measurements, Task


@dataclass(frozen=True)
class StudyOutcome:
    """A study's results and the folder that they were written to."""

    plan: StudyPlan
    results: StudyResults
    folder: Path

    def _repr_markdown_(self) -> str:
        return as_markdown(self.results)


class StudyStatus:
    """The cells of a plan, where their numbers come from, and what of it is on disk."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.runs = plan.cells[0].config.run.folder if plan.cells else Path("runs")
        self.folder = self.runs.parent / "studies" / plan.name
        self.places = locations_of(cell.config for cell in plan.cells)
        self.measurements = Measurements(self.runs)
        self._columns = {entry.column for entry in plan.entries}

    def missing(self) -> list[Task]:
        """What is to be done, each once: a training, the measurements that it makes possible, the next training."""
        tasks: dict[str, Task] = {}
        for cell, place in zip(self.plan.cells, self.places, strict=True):
            if place.measurement in tasks or self.measurements.find(place) is not None:
                continue
            for task in (Task("train", cell.config, place), Task("measure", cell.config, place)):
                tasks.setdefault(task.key, task)
        trainings = [task for task in tasks.values() if task.kind == "train"]
        after: dict[str, list[Task]] = {task.key: [] for task in trainings}
        for task in tasks.values():
            if task.after is not None:
                after[task.after].append(task)
        return [
            task for training in trainings for task in (*(() if training.done else (training,)), *after[training.key])
        ]

    def results(self, failed: Mapping[str, str]) -> StudyResults:
        """What is known of each cell; `failed` holds the reasons of the tasks that went wrong, by key."""
        plan = self.plan
        study = plan.study
        placed = iter(zip(plan.cells, self.places, strict=True))
        cells = [
            CellResult(
                row=entry.row, column=entry.column, seed=None, sample_seed=None, state="refused", failure=entry.reason
            )
            if isinstance(entry, Refused)
            else self._result(*next(placed), failed)
            for entry in plan.entries
        ]
        return with_estimates(
            StudyResults(
                title=study.title,
                source=study.source,
                file=str(plan.file),
                base=plan.base,
                command=plan.command,
                runs=os.path.relpath(self.runs, self.folder),
                rows=_in_order(entry.row for entry in plan.entries),
                columns=_in_order(entry.column for entry in plan.entries),
                seeds=_in_order(cell.seed for cell in plan.cells),
                sample_seeds=_in_order(cell.sample_seed for cell in plan.cells),
                show=study.show,
                lower_is_better={m.name: m.lower_is_better for cell in plan.cells for m in cell.config.metric[:1]},
                notes=tuple(study_notes(plan)),
                cells=tuple(cells),
            )
        )

    def _result(self, cell: Cell, place: ResultLocation, failed: Mapping[str, str]) -> CellResult:
        known: dict[str, Any] = {
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "sample_seed": cell.sample_seed,
            "reference": cell.reference,
            "metric": cell.config.metric[0].name,
            "run": place.run,
            "samples": place.samples,
            "shown": {
                key: describe_setting(cell.config, key)
                for key in self.plan.study.show
                if key not in FACTS and key not in self._columns
            },
        }
        found = self.measurements.find(place)
        if found is not None:
            path, record = found
            known |= {key: record.get(key) for key in ("value", "stderr", "halves", "n")}
            return CellResult(**known, state="done", evaluation=path, nfe=record["sampling"]["nfe"])
        for task in (Task("train", cell.config, place), Task("measure", cell.config, place)):
            if task.key in failed:
                return CellResult(**known, state="failed", failure=failed[task.key], log=task.log)
        return CellResult(**known, state="todo")

    def write(self, failed: Mapping[str, str]) -> StudyOutcome:
        """Write the results and the tables."""
        results = self.results(failed)
        write_results(self.folder, results)
        update_file(self.folder / "table.csv", as_csv(results))
        update_file(self.folder / "table.md", as_markdown(results))
        update_file(self.folder / "table.tex", as_latex(results))
        return StudyOutcome(self.plan, results, self.folder)


def _in_order(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def study_notes(plan: StudyPlan) -> list[str]:
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
                ours = describe_setting(cell.config, key)
            except AttributeError:
                ours = describe_setting(cell.config, f"metric.0.{key}") if hasattr(cell.config.metric[0], key) else "-"
            if ours != str(theirs):
                differing[f"{key} {ours} (theirs {theirs})"] = None
    if not stated:
        return "Another data set, size and metric: only the order can be compared."
    if not differing:
        return "Measured with the same settings, as far as those are stated."
    return f"Ours differ in {'; '.join(differing)}."
