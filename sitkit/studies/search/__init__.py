"""A search over how to sample a run: Optuna proposes, `sitkit.runs.evaluate` measures, fresh seeds confirm.

Nothing is trained and nothing is measured twice.  A setting that cannot give right samples is refused before any work,
with its reason.  Several processes or machines may share a study; a process that is killed loses nothing, because the same
command continues the study with the trials of dead processes: it ends with the same trials.  Only this package imports optuna.

    runs/<run>/searches/<name>.db  .json  .csv  .png          runs/<run>/presets/<name>.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import optuna
from filelock import FileLock

from sitkit.runs.config.sources import SamplingFlags
from sitkit.runs.run import Run, open_run
from sitkit.runtime.errors import require_within
from sitkit.runtime.files import file_name
from sitkit.runtime.progress import Progress
from sitkit.runtime.progress_bar import reporting
from sitkit.studies.search.confirm import SearchOutcome, conclude
from sitkit.studies.search.evaluator import Evaluator
from sitkit.studies.search.space import MOST_TRIALS, read_search
from sitkit.studies.search.trials import SEARCHES, open_study, run_trials, stored

__all__ = ["SearchOutcome", "search"]


def search(
    run: Run | str | Path,
    space: Path | str,
    *,
    trials: int | None = None,
    storage: str | None = None,
    progress: Progress | None = None,
    **flags: Unpack[SamplingFlags],
) -> SearchOutcome:
    """Search for the best way to sample a run.

    Trials are measured, the best are confirmed on fresh seeds, and the winner is compared with the run's own setting.
    Processes that share a study share its number of trials; the same call continues a search that was stopped.  A file
    with another space, objective, screen or seed begins another study in the same database.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        space: a YAML file of axes, as experiments/search.yaml, or the name of an experiment.
        trials: the number of measured trials, in place of the file's.
        storage: the URL of an Optuna storage, in place of the file's; by default a file in the run's folder.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: the setting that the search starts from: `runs`, `device`, `settings` and the others of `sample`.

    Returns:
        The confirmed settings, the winner, and the verdict of its comparison with the run's own setting.

    Raises:
        UserError: before any work, for a mistake in the file, and if every trial is refused.
    """
    run = open_run(run, flags, "search")
    spec, axes = read_search(space, run.config)
    name = file_name(Path(space).stem)
    wanted = spec.trials if trials is None else trials
    require_within(1, MOST_TRIALS, trials=wanted)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    with reporting(progress) as report:
        evaluator = Evaluator(run, spec, axes, report)
        study = open_study(evaluator, name, storage or spec.storage)
        with stored(run):
            run_trials(study, evaluator, wanted)
            # Processes that share a study end together: the first confirms, the others read its numbers.
            with FileLock(run.folder / SEARCHES / f"{name}.lock"):
                return conclude(study, evaluator, name)
