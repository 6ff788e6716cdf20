"""Run a study: train and evaluate every missing cell, then write the table.

Every cell is checked before the first training.  Run again, a study continues: results on disk are reused, and only changed
cells are computed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Unpack

from sitkit.runs.changed_plugins import ChangedPlugin, settle_changed_plugins
from sitkit.runs.config.sources import require_flags
from sitkit.runs.run_folder import remove_results, training_lock
from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.progress import Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.studies.cost import require_cells
from sitkit.studies.executors import Executor, InProcess, Local, Ray
from sitkit.studies.publish import publish, published
from sitkit.studies.scheduler import Work
from sitkit.studies.status import StudyOutcome, StudyStatus
from sitkit.studies.study import StudyFlags
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import Task

# Seconds between two writes of the tables during the work.
REFRESH = 60.0


def ablate(
    study: str | Path,
    *,
    dry_run: bool = False,
    keep_going: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    changed_plugin: ChangedPlugin | None = None,
    progress: Progress | None = None,
    **flags: Unpack[StudyFlags],
) -> StudyOutcome:
    """Train and measure every missing cell of a study, and write its table.

    Args:
        study: a file, as experiments/table6.yaml, or the name of an experiment.
        dry_run: return what is on disk already, and do nothing.
        keep_going: measure the other cells if some are impossible.
        workers: processes at a time on this machine; 1 by default.
        executor: where the work is done, in place of `workers`.
        changed_plugin: what to do if the source of a plugin changed since a run of the study was trained: "redo" removes
            such runs with their numbers and makes them again, "keep" uses them as they are.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: the flags of `sitkit ablate` by name: `base` (a preset or file in place of the study's own base), `seeds` and
            `sample_seeds` (training and sampling seeds in place of the study's own), `runs` (the folder of runs),
            `device`, `settings` (any setting by its dotted key).

    Returns:
        The results and the folder of the table.  In a notebook they show the table.

    Raises:
        UserError: before any work, for a cell that is impossible, and if the source of a plugin changed and
            `changed_plugin` does not say what to do.
    """
    require_flags(flags, StudyFlags, "ablate")
    if dry_run:
        status = study_status(study, keep_going, **flags)
        return StudyOutcome(status.plan, status.results({}), status.folder)
    if executor is None and workers is not None and workers > 1:
        executor = Local(workers)
    with reporting(progress) as report:
        options = {"keep_going": keep_going, "executor": executor, "changed_plugin": changed_plugin}
        return run_study(study, **options, progress=report, **flags)


def study_status(study: str | Path, keep_going: bool = False, **flags: Unpack[StudyFlags]) -> StudyStatus:
    """Return the cells of a study and what of them is on disk.  Raises UserError as `ablate` does."""
    plan = read_study(study, **flags)
    if not keep_going or not plan.cells:
        plan.require()
    return StudyStatus(plan)


def run_study(
    study: str | Path,
    *,
    keep_going: bool = False,
    executor: Executor | None = None,
    changed_plugin: ChangedPlugin | None = None,
    progress: Progress = silent,
    attach: Callable[[StudyStatus, Work], None] = lambda status, work: None,
    **flags: Unpack[StudyFlags],
) -> StudyOutcome:
    """Do the missing tasks of a study and write its table to studies/<file's name>/.

    executor: where the work is done, by default in this process.  Other processes and machines may do the same study at
    the same time: each task is done by one of them.  attach: called with the work before it begins, to show it.
    changed_plugin: as in `ablate`.
    Raises UserError before any work if a cell is impossible; with keep_going that cell is a row with its reason, and the
    others are done.  A cell that fails does not stop the others.  Raises WorkFailed if an executor reports cells as done
    that are not in the folder.
    """
    if distributed.size() > 1:
        raise UserError(
            "torchrun's processes would share each task of the study, and `sitkit ablate` gives each task to one process: "
            "use --workers, or --executor ray.  A training that `torchrun -m sitkit train` has done is not done again."
        )
    status = study_status(study, keep_going, **flags)
    stale = settle_changed_plugins((cell.config for cell, _ in status.located), changed_plugin)
    for folder in stale:
        with training_lock(folder):
            remove_results(folder)
    tasks = status.missing()
    if not keep_going and not isinstance(executor, Ray):
        # The data may lie on the cluster alone.
        wanted = {task.place.measurement for task in tasks}
        require_cells([cell for cell, place in status.located if place.measurement in wanted])
    work = Work(tasks, progress)
    attach(status, work)
    written = time.monotonic()

    def on_end(task: Task) -> None:
        nonlocal written
        if time.monotonic() - written > REFRESH:
            status.write(work.failed)
            written = time.monotonic()

    tracked = any(cell.config.run.track for cell in status.plan.cells)
    with published(status.folder, status.results({}), progress) if tasks and tracked else contextlib.nullcontext():
        try:
            work.do(executor or InProcess(), on_end)
        finally:
            outcome = status.write(work.failed)
        lost = sum(cell.state == "todo" for cell in outcome.results.cells)
        if lost:
            raise WorkFailed(
                f"{lost} cells were done where {status.runs.absolute()} is another folder, and are not in this one: "
                "every machine must see the same folder under the same name.  The same command does them again."
            )
    if tracked and not tasks:
        publish(outcome.folder, progress)
    return outcome
