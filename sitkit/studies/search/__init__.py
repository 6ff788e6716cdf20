"""A search over how to sample a run: Optuna proposes, `sitkit.runs.evaluate` measures, fresh seeds confirm.

Nothing is trained and nothing measured twice.  What cannot give right samples is refused before any work, with its
reason kept.  Several processes or machines may share a study; one that is killed loses nothing, for the same command
goes on with the study and takes up what the dead left.  This is the only package that imports optuna.

    runs/<run>/searches/<name>.db  .json  .csv  .png          runs/<run>/presets/<name>.yaml
"""

from __future__ import annotations

from pathlib import Path

import optuna
from filelock import FileLock

from sitkit.runs.run import Run
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name
from sitkit.runtime.progress import Progress, silent
from sitkit.studies.search.confirm import SearchOutcome, conclude, describe_choice
from sitkit.studies.search.evaluator import Evaluator
from sitkit.studies.search.space import read_search
from sitkit.studies.search.trials import SEARCHES, open_study, work

__all__ = ["SearchOutcome", "describe_choice", "search"]


def search(
    run: Run, path: Path | str, *, trials: int | None = None, storage: str | None = None, progress: Progress = silent
) -> SearchOutcome:
    """Bring the study of a file to `trials` measured ones, confirm the best and compare the winner with the run's own way.

    trials, storage: instead of the file's.  Processes that share a study share its number of trials.  The study belongs
    to the run, its checkpoint, its own setting, the space, the objective, the screen and the seed: a file changed in
    these begins another one in the same database.
    Raises UserError before any work for what is wrong in the file, and where every trial is refused.
    """
    quest, axes = read_search(path, run.config)
    name = file_name(Path(path).stem)
    wanted = quest.trials if trials is None else trials
    if wanted < 1:
        raise UserError(f"trials must be at least 1; got {wanted}.")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    bench = Evaluator(run, quest, axes, progress)
    study = open_study(bench, name, storage or quest.storage)
    work(study, bench, wanted)
    # Processes that share a study end together; what the first confirms, the others read.
    with FileLock(run.folder / SEARCHES / f"{name}.lock"):
        return conclude(study, bench, name)
