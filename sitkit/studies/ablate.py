"""Ablations: what is missing of a study is trained and measured, and its table written.

Every cell is checked before the first one trains.  Run again, it continues: what has its identity on disk is not done
again, and a changed cell is done alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sitkit.results.study_results import ReferenceNumber, Result, Results, with_estimates, write_results
from sitkit.results.table import as_csv, as_latex, as_markdown
from sitkit.runs import checkpoint
from sitkit.runs.config.schema import Layer, label
from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.progress import Progress, silent
from sitkit.studies.cost import require_cells
from sitkit.studies.executors import Executor, Here, Ray
from sitkit.studies.publish import publish, published
from sitkit.studies.scheduler import Work
from sitkit.studies.study import FACTS, Cell, Plan, Refused, Seeds, describe, read_study
from sitkit.studies.tasks import Measurements, Place, Task, places

# Seconds after which the tables are written anew while work goes on.
REFRESH = 60.0


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
    executor: Executor | None = None,
    progress: Progress = silent,
    watch: Callable[[Board, Work], None] = lambda board, work: None,
) -> Outcome:
    """Do what is missing of a study and write its table to studies/<file's name>/.

    executor: where the work is done, by default in this process.  Other processes and machines may do the same study at
    the same time: each task is one's.  watch: called with the work before it begins, to look at it while it goes on.
    Raises UserError before any work if a cell is impossible; with keep_going that cell is a row with its reason, and the
    others are done.  A cell that goes wrong does not stop the others.  Raises WorkFailed where an executor says that cells
    are done that are not in the folder.
    """
    if distributed.size() > 1:
        raise UserError(
            "torchrun's processes would share each task of the study, and `sitkit ablate` gives each task to one process: "
            "use --workers, or --executor ray.  A training that `torchrun -m sitkit train` has done is not done again."
        )
    plan = read_study(path, over, base, seeds, sample_seeds)
    if not keep_going or not plan.cells:
        plan.require()
    board = Board(plan)
    tasks = board.missing()
    if not keep_going and not isinstance(executor, Ray):
        # The data may lie on the cluster alone.
        wanted = {task.place.measurement for task in tasks}
        require_cells(cell for cell, place in zip(plan.cells, board.places, strict=True) if place.measurement in wanted)
    work = Work(tasks, progress)
    watch(board, work)
    written = time.monotonic()

    def ended(task: Task) -> None:
        nonlocal written
        if time.monotonic() - written > REFRESH:
            board.write(work.failed)
            written = time.monotonic()

    tracked = any(cell.config.run.track for cell in plan.cells)
    with published(board.folder, board.results({}), progress) if tasks and tracked else contextlib.nullcontext():
        try:
            work.do(executor or Here(), ended)
        finally:
            outcome = board.write(work.failed)
        lost = sum(cell.state == "todo" for cell in outcome.results.cells)
        if lost:
            raise WorkFailed(
                f"{lost} cells were done where {board.runs.absolute()} is another folder, and are not in this one: "
                "every machine must see the same folder under the same name.  The same command does them again."
            )
    if tracked and not tasks:
        publish(outcome.folder, progress)
    return outcome


class Board:
    """The cells of a plan, where their numbers come from, and what of it is on disk."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.runs = plan.cells[0].config.run.folder if plan.cells else Path("runs")
        self.folder = self.runs.parent / "studies" / plan.name
        self.places = places(cell.config for cell in plan.cells)
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
                command=plan.command,
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
        found = self.measurements.find(place)
        if found is not None:
            path, record = found
            known |= {key: record.get(key) for key in ("value", "stderr", "halves", "n")}
            return Result(**known, state="done", evaluation=path, nfe=record["sampling"]["nfe"])
        for task in (Task("train", cell.config, place), Task("measure", cell.config, place)):
            if task.key in failed:
                return Result(**known, state="failed", failure=failed[task.key], log=task.log)
        return Result(**known, state="todo")

    def write(self, failed: Mapping[str, str]) -> Outcome:
        """Write the results and the tables."""
        results = self.results(failed)
        write_results(self.folder, results)
        checkpoint.update(self.folder / "table.csv", as_csv(results))
        checkpoint.update(self.folder / "table.md", as_markdown(results))
        checkpoint.update(self.folder / "table.tex", as_latex(results))
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
        return "Measured with the same settings, as far as those are stated."
    return f"Ours differ in {'; '.join(differing)}."
