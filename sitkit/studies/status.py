"""The status of a study: which cells have a number on disk, and which tasks are left."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sitkit.results.study_results import FACTS, CellResult, StudyResults, with_estimates, write_results
from sitkit.results.table import as_csv, as_latex, as_markdown
from sitkit.runs.checkpoint import checkpoints, step_of
from sitkit.runs.config.identity import label
from sitkit.runs.config.schema import Config
from sitkit.runs.evaluate import real_of
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample import LABELS
from sitkit.runtime.errors import LeftOut, UserError
from sitkit.runtime.files import update_file
from sitkit.studies.study import Cell, Refused, StudyPlan, describe_setting
from sitkit.studies.tasks import ResultLocation, Task, find_measurement, locations_of, trained


@dataclass(frozen=True)
class StudyOutcome:
    """The results of a study, with their table.

    Attributes:
        plan: the study and its cells.
        results: the state and the number of each cell, and the estimates of each row and column.
        folder: the folder of results.json and of the tables.
    """

    plan: StudyPlan
    results: StudyResults
    folder: Path

    def __repr__(self) -> str:
        done = sum(cell.state == "done" for cell in self.results.cells)
        return f"StudyOutcome({self.results.title or self.folder.name}, {done} of {len(self.results.cells)} cells, {self.folder})"

    def _repr_markdown_(self) -> str:
        return as_markdown(self.results)


@dataclass(frozen=True)
class CellStatus:
    """What of a cell is on disk.

    number: of the cell, from 1.  measurement: the identity of its number; equal for cells that are the same.
    state: its number is there; its training is complete; its training has begun; or nothing is there.
    step: of its newest checkpoint.
    """

    number: int
    row: str
    column: str
    seed: int
    sample_seed: int
    run: str
    measurement: str
    state: Literal["measured", "trained", "begun", "todo"]
    step: int


class StudyStatus:
    """The cells of a plan with the locations of their numbers, and what of them is on disk."""

    def __init__(self, plan: StudyPlan) -> None:
        self.plan = plan
        self.runs = plan.cells[0].config.run.folder if plan.cells else Path("runs")
        self.folder = self.runs.parent / "studies" / plan.name
        self.located = list(zip(plan.cells, locations_of(cell.config for cell in plan.cells), strict=True))
        self._columns = {entry.column for entry in plan.entries}

    def cells(self) -> list[CellStatus]:
        """Return the status of each possible cell, in order."""
        finished: dict[str, bool] = {}
        steps: dict[str, int] = {}
        broken = LeftOut()
        for run, config in self.trainings().items():
            finished[run], steps[run] = False, 0
            with broken.noting():
                finished[run] = trained(config)
                steps[run] = max(map(step_of, checkpoints(RunFolder(self.runs / run).checkpoints)), default=0)
        statuses = []
        for number, (cell, place) in enumerate(self.located, 1):
            step = steps[place.run]
            state = "trained" if finished[place.run] else "begun" if step else "todo"
            with broken.noting():
                if find_measurement(cell.config, place) is not None:
                    state = "measured"
            names = cell.row, cell.column, cell.seed, cell.sample_seed, place.run, place.measurement
            statuses.append(CellStatus(number, *names, state, step))
        for text in dict.fromkeys(broken):
            warnings.warn(text, stacklevel=2)
        return statuses

    def trainings(self) -> dict[str, Config]:
        """Return a configuration of each training by the folder of its run."""
        return {place.run: cell.config for cell, place in self.located}

    def missing(self) -> list[Task]:
        """Return the tasks to do, each once: a training, the measurements that wait for it, the next training."""
        tasks: dict[str, Task] = {}
        for cell, place in self.located:
            if place.measurement not in tasks and not _on_disk(
                lambda cell=cell, place=place: find_measurement(cell.config, place)
            ):
                for task in _tasks(cell, place):
                    tasks.setdefault(task.key, task)
        # A training comes before its measurements, which come in the order of the cells.
        order = {key: i for i, key in enumerate(tasks)}
        todo = [task for task in tasks.values() if task.kind == "measure" or not _on_disk(lambda task=task: task.done)]
        return sorted(todo, key=lambda task: order[task.after or task.key])

    def results(self, failed: Mapping[str, str]) -> StudyResults:
        """Return the results of each cell; `failed` holds the reasons of failed tasks by key."""
        plan, study, located = self.plan, self.plan.study, iter(self.located)
        notes = dict.fromkeys(study_notes(plan))
        cells = [
            CellResult(
                row=entry.row, column=entry.column, seed=None, sample_seed=None, state="refused", failure=entry.reason
            )
            if isinstance(entry, Refused)
            else self._result(*next(located), failed, notes)
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
                notes=tuple(notes),
                cells=tuple(cells),
            )
        )

    def _result(
        self, cell: Cell, place: ResultLocation, failed: Mapping[str, str], notes: dict[str, None]
    ) -> CellResult:
        """Return the result of a cell, and add what its record says of the classes to the notes."""
        shown = [key for key in self.plan.study.show if key not in FACTS and key not in self._columns]
        known: dict[str, Any] = {
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "sample_seed": cell.sample_seed,
            "reference": cell.reference,
            "metric": cell.config.metric[0].name,
            "run": place.run,
            "samples": place.samples,
            "shown": {key: describe_setting(cell.config, key) for key in shown},
        }
        try:
            measurement = find_measurement(cell.config, place)
        except UserError as error:
            return CellResult(**known, state="failed", failure=str(error))
        if measurement is not None:
            path, record = measurement
            notes |= dict.fromkeys(note for note in record["notes"] if note.startswith(LABELS))
            known |= {key: record.get(key) for key in ("samples", "value", "stderr", "n")} | {"real": real_of(record)}
            return CellResult(**known, state="done", evaluation=path, nfe=record["sampling"]["nfe"])
        for task in _tasks(cell, place):
            if task.key in failed:
                return CellResult(**known, state="failed", failure=failed[task.key], log=task.log)
        return CellResult(**known, state="todo")

    def write(self, failed: Mapping[str, str]) -> StudyOutcome:
        """Write the results and the tables; `failed` as in `results`."""
        results = self.results(failed)
        write_results(self.folder, results)
        update_file(self.folder / "table.csv", as_csv(results))
        update_file(self.folder / "table.md", as_markdown(results))
        update_file(self.folder / "table.tex", as_latex(results))
        return StudyOutcome(self.plan, results, self.folder)


def _on_disk(find: Callable[[], object]) -> bool:
    """Return whether a result is found; one that cannot be read is not, and its task fails with the reason."""
    try:
        return bool(find())
    except UserError:
        return False


def _tasks(cell: Cell, place: ResultLocation) -> tuple[Task, Task]:
    return Task("train", cell.config, place), Task("measure", cell.config, place)


def _in_order(values: Any) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def study_notes(plan: StudyPlan) -> list[str]:
    """Return the setting of our numbers, and how it differs from the setting of the reference numbers."""
    if not plan.cells:
        return []
    config = plan.cells[0].config
    metric = config.metric[0]
    features = getattr(metric, "features", None)
    notes = [
        f"{metric.name}{f' on {label(features)}' if features is not None else ''} of {label(config.data)}, "
        f"{config.sample.n} samples; {label(config.backbone)}, {config.train.steps} steps of {config.train.batch}."
    ]
    references = [cell for cell in plan.cells if cell.reference is not None]
    sources = _in_order(cell.reference.source for cell in references if cell.reference and cell.reference.source)
    if references:
        of = f": {'; '.join(sources)}" if sources else ""
        notes.append(f"In brackets: published numbers{of}. {_differences(references)}")
    return notes


def _differences(cells: list[Cell]) -> str:
    """Return how the cells differ from the settings of their reference numbers."""
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
