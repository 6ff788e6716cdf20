"""Ablations: what is missing of a study is trained and measured, and its table written.

Every cell is checked before the first one trains.  Run again, it continues: what has its identity on disk is not done
again, and a changed cell is done alone.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sitkit.runs.config.sources import TRAINING_SETTINGS, Layer, flags_to_layer
from sitkit.runtime import distributed
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.progress import Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.studies.cost import require_cells
from sitkit.studies.executors import Executor, InProcess, Local, Ray
from sitkit.studies.publish import publish, published
from sitkit.studies.scheduler import Work
from sitkit.studies.status import StudyOutcome, StudyStatus
from sitkit.studies.study import Seeds
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import Task

# Seconds after which the tables are written anew while work goes on.
REFRESH = 60.0


def ablate(
    study: str | Path,
    *,
    base: str | None = None,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
    keep_going: bool = False,
    workers: int | None = None,
    executor: Executor | None = None,
    runs: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Layer | None = None,
    progress: Progress | None = None,
) -> StudyOutcome:
    """Train and measure every missing cell of a study, and write its table.

    Args:
        study: a file, as experiments/table6.yaml, or the name of an experiment.
        base: a preset or file in place of the study's own base.
        seeds, sample_seeds: training and sampling seeds in place of the study's own.
        keep_going: whether the other cells are measured where some are impossible.
        workers: processes at a time on this machine; 1 by default.
        executor: where the work is done, in place of `workers`.
        runs, device: the folder of runs; where the work is done.
        settings: any setting, by dotted key.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Returns:
        The results and the folder of the table.  In a notebook they show the table.

    Raises:
        UserError: before any work, for a cell that is impossible.
    """
    over = flags_to_layer({"runs": runs, "device": device}, settings, TRAINING_SETTINGS)
    if executor is None and workers is not None and workers > 1:
        executor = Local(workers)
    with reporting(progress) as report:
        return run_study(
            study, over, base, seeds=seeds, sample_seeds=sample_seeds, keep_going=keep_going, executor=executor,
            progress=report,
        )  # fmt: skip


def run_study(
    path: Path | str,
    over: Layer | None = None,
    base: str | None = None,
    *,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
    keep_going: bool = False,
    executor: Executor | None = None,
    progress: Progress = silent,
    watch: Callable[[StudyStatus, Work], None] = lambda board, work: None,
) -> StudyOutcome:
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
    board = StudyStatus(plan)
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
            work.do(executor or InProcess(), ended)
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
