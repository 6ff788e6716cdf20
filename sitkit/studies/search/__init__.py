"""A search over how to sample a run: Optuna proposes, `sitkit.runs.evaluate` measures, fresh seeds confirm.

Nothing is trained and nothing measured twice.  What cannot give right samples is refused before any work, with its
reason kept.  Several processes or machines may share a study; one that is killed loses nothing, for the same command
goes on with the study and takes up what the dead left.  This is the only package that imports optuna.

    runs/<run>/searches/<name>.db  .json  .csv  .png          runs/<run>/presets/<name>.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock

from sitkit.runs.config.sources import Layer
from sitkit.runs.run import Run, open_run
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name
from sitkit.runtime.progress import Progress
from sitkit.runtime.progress_bar import reporting
from sitkit.studies.search.confirm import SearchOutcome, conclude, describe_choice
from sitkit.studies.search.evaluator import Evaluator
from sitkit.studies.search.space import read_search
from sitkit.studies.search.trials import SEARCHES, open_study, work

__all__ = ["SearchOutcome", "describe_choice", "search"]


def search(
    run: Run | str | Path,
    space: Path | str,
    *,
    trials: int | None = None,
    storage: str | None = None,
    runs: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Layer | None = None,
    progress: Progress | None = None,
) -> SearchOutcome:
    """Search how to sample a run: measure trials, confirm the best on fresh seeds, and compare the winner with the run's own way.

    Processes that share a study share its number of trials; the same call continues a search that was stopped.  A file
    that is changed in space, objective, screen or seed begins another study in the same database.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        space: a YAML file of axes, as experiments/search.yaml.
        trials: the number of measured trials, in place of the file's.
        storage: the URL of an Optuna storage, in place of the file's.
        runs, device, settings: as in `sample`.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Raises:
        UserError: before any work, for a mistake in the file, and where every trial is refused.
    """
    run = open_run(run, {"runs": runs, "device": device, "settings": settings}, "search")
    with reporting(progress) as report:
        return _search(run, space, trials, storage, report)


def _search(run: Run, space: Path | str, trials: int | None, storage: str | None, progress: Progress) -> SearchOutcome:
    quest, axes = read_search(space, run.config)
    name = file_name(Path(space).stem)
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
