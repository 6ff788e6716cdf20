"""The trials of a search: Optuna proposes them, they are refused or measured, and several processes share them."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, final

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, StorageInternalError, TrialPruned
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from sitkit.runs.config.identity import sampling_essence, sampling_identity
from sitkit.runs.config.schema import Config
from sitkit.runs.run import Run
from sitkit.runtime.errors import NotWritten, Unreadable, UserError, WorkFailed
from sitkit.runtime.hashing import identity
from sitkit.runtime.progress import Event
from sitkit.studies.search.evaluator import Evaluator
from sitkit.studies.search.space import Axis, in_force, plain_choice

SEARCHES = "searches"
# A search stops after this number of trials in a row without a new measurement: the space is exhausted or infeasible.
MAX_UNPRODUCTIVE = 100
# Trials at random before TPE models the past ones.
STARTUP = 10
POLL = 0.5
# Seconds to wait for another process that writes to a database.
PATIENCE = 60.0


def open_study(evaluator: Evaluator, name: str, storage: str | None) -> optuna.Study:
    """Return the Optuna study in its database; make both if they do not exist."""
    run, spec = evaluator.run, evaluator.spec
    folder = run.folder / SEARCHES
    folder.mkdir(parents=True, exist_ok=True)
    url = storage or database_url(folder / f"{name}.db")
    parts = spec.model_dump(mode="json", include={"objective", "space", "screen", "seed"})
    first = "minimize" if evaluator.metric.lower_is_better else "maximize"
    try:
        # Two processes that make the tables at the same time would crash each other.
        with FileLock(folder / f"{name}.db.lock"), quiet():
            database = RDBStorage(
                url,
                # SQLite's own 5 s are too few where several processes write.
                engine_kwargs={"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else {},
                heartbeat_interval=spec.heartbeat,
                grace_period=3 * spec.heartbeat,
            )
            return optuna.create_study(
                storage=database,
                study_name=f"{name}-{identity(run.identity, sampling_essence(run.config, run.step), parts)}",
                directions=[first, "minimize"] if spec.objective.against else [first],
                load_if_exists=True,
                sampler=ByNumber(spec.seed),
            )
    except ImportError as error:
        reason = str(error).rstrip(". ")
        raise UserError(f"storage {_public(url)!r} needs its driver: {reason}.") from None
    except Exception as error:
        raise WorkFailed(f"The study at {_public(url)} cannot be opened: {_first_line(error)}") from None


@contextlib.contextmanager
def stored(run: Run) -> Iterator[None]:
    """Turn a failure of the database, as on a full disk, into WorkFailed with one line."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = _first_line(error.__cause__ or error)
        raise WorkFailed(
            f"The search of {run.folder} stopped at its database: {cause} The same command continues."
        ) from None


def _first_line(error: BaseException) -> str:
    """Return the reason of a library in one sentence."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{line.rstrip('.')}."


def database_url(path: Path) -> str:
    """Return the address of a database file, in which %, ? and # of its path are quoted."""
    return URL.create("sqlite", database=str(path.resolve())).render_as_string()


def _public(url: str) -> str:
    """Return the address without user and password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence Optuna's warnings of its experimental parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@final
class ByNumber(optuna.samplers.BaseSampler):
    """Optuna's TPE with a generator of its own for each trial, seeded by the trial's place.

    The place is the number of trials before it that did not fail, so that the trial after a dead one takes its place and
    proposes what that one did.  A single generator would begin again after a restart and propose past settings; two
    processes of one study would propose the same ones.  After a proposal that repeats an earlier one, the next is drawn at
    random: in a space of few settings TPE alone would repeat it again and again.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sampler: optuna.samplers.BaseSampler = self._make(0, STARTUP)

    @quiet()
    def _make(self, place: int, startup: int) -> optuna.samplers.BaseSampler:
        seed = int(identity(self._seed, place)[:8], 16)
        # `group` models settings that exist only with some choices apart from the rest.
        return optuna.samplers.TPESampler(
            n_startup_trials=startup, seed=seed, multivariate=True, group=True, constant_liar=True
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        before = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number and t.state != TrialState.FAIL]
        past = [t for t in before if t.state.is_finished()]
        startup = len(before) + 1 if past and "repeats" in past[-1].user_attrs else STARTUP
        self._sampler = self._make(len(before), startup)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


class EnoughTrials(Exception):
    """Raised when the requested number of trials is measured or in progress in other processes."""


def run_trials(study: optuna.Study, evaluator: Evaluator, wanted: int) -> None:
    """Run trials until the study has `wanted` measured ones.

    Trials of other processes are waited for; those of dead processes fail, and the next trials take their places.
    """
    with _alive(evaluator.run.folder / SEARCHES) as process:
        _run_trials(study, TrialObjective(study, evaluator, wanted, process), evaluator, wanted)


@contextlib.contextmanager
def _alive(folder: Path) -> Iterator[str]:
    """Yield the name of a file that this process locks, so that others see whether it lives."""
    path = folder / f".process-{uuid.uuid4().hex}.lock"
    try:
        with FileLock(path):
            yield path.name
    finally:
        path.unlink(missing_ok=True)


def _run_trials(study: optuna.Study, objective: TrialObjective, evaluator: Evaluator, wanted: int) -> None:
    waiting = False
    while True:
        _fail_dead_trials(study, evaluator)
        trials = study.get_trials(deepcopy=False)
        measured = distinct(trials)
        evaluator.progress(Event("search", min(len(measured), wanted), wanted, _best(measured, evaluator)))
        if len(measured) >= wanted:
            return
        unproductive = _unproductive(trials)
        if unproductive >= MAX_UNPRODUCTIVE:
            _report_exhausted(trials, len(measured), unproductive, evaluator)
            return
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        with quiet():
            # A trial that has just begun may be of a process that died then: the next proposal depends on whether it did.
            if len(measured) + len(running) < wanted and all(map(_begun, running)):
                waiting = False
                study.optimize(objective, n_trials=1, catch=(EnoughTrials,))
                continue
            if not waiting:
                waiting = True
                evaluator.progress(Event("search", message=f"waiting for {len(running)} trials of other processes."))
            fail_stale_trials(study)
        time.sleep(POLL)


def is_measured(trial: FrozenTrial) -> bool:
    """Return whether a trial is finished and its setting was not measured before."""
    return trial.state == TrialState.COMPLETE and "repeats" not in trial.user_attrs


def distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the measured trials; of two with the same setting the first, since two processes may propose it at a time."""
    first: dict[str, FrozenTrial] = {}
    for trial in filter(is_measured, trials):
        first.setdefault(trial.user_attrs["sampling"], trial)
    return list(first.values())


def _begun(trial: FrozenTrial) -> bool:
    """Return whether the objective of a trial was called."""
    return "process" in trial.user_attrs


def _fail_dead_trials(study: optuna.Study, evaluator: Evaluator) -> None:
    """End the trials of dead processes, which for Optuna would run until their heartbeat is missed, or for ever.

    A process is dead if its lock is free.  A process of another machine may have its lock in a folder that this one
    does not see; Optuna's heartbeat decides about it.
    """
    grace = timedelta(seconds=3 * evaluator.spec.heartbeat)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        begun, start = _begun(trial), trial.datetime_start
        lock = evaluator.run.folder / SEARCHES / trial.user_attrs.get("process", "")
        if (begun and lock.is_file() and _free(lock)) or (not begun and start and datetime.now() - start > grace):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _free(lock: Path) -> bool:
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _unproductive(trials: Sequence[FrozenTrial]) -> int:
    """Return the number of trials that ended since the last new measurement, without those of dead processes."""
    since = itertools.takewhile(lambda trial: not is_measured(trial), reversed(trials))
    return sum(trial.state in (TrialState.PRUNED, TrialState.COMPLETE) for trial in since)


def _report_exhausted(trials: Sequence[FrozenTrial], measured: int, count: int, evaluator: Evaluator) -> None:
    if not measured:
        reason = next((t.user_attrs["reason"] for t in reversed(trials) if "reason" in t.user_attrs), "")
        raise UserError(f"none of {count} settings of this space can be sampled; the last one: {reason}")
    text = f"{count} trials in a row brought nothing new: the search ends at {measured}."
    evaluator.progress(Event("search", message=text))


def _best(measured: Sequence[FrozenTrial], evaluator: Evaluator) -> dict[str, float]:
    values = [trial.values[0] for trial in measured]
    return {"best": (min if evaluator.metric.lower_is_better else max)(values)} if values else {}


@final
class TrialObjective:
    """One trial: propose settings, refuse them before any work or measure them, and keep the facts with the trial."""

    def __init__(self, study: optuna.Study, evaluator: Evaluator, wanted: int, process: str) -> None:
        self.study, self.evaluator, self.wanted, self.process = study, evaluator, wanted, process

    def __call__(self, trial: Trial) -> float | tuple[float, float]:
        trial.set_user_attr("process", self.process)
        self._require_missing(trial)
        chosen: dict[str, Any] = {}
        screen = self.evaluator.spec.screen
        try:
            chosen = self._choose(trial)
            config = self.evaluator.setting(chosen, screen.n, screen.seed)
            self._within_budget(self.evaluator.cost(config))
            trial.set_user_attr("chosen", chosen)
            self._note_repeat(trial, config)
            value, nfe, seconds = self.evaluator.measure(config)
            self._within_budget(nfe)
        except (NotWritten, Unreadable):
            # A full disk is no fault of the setting.
            raise
        except UserError as error:
            raise self._prune(trial, chosen, "refused", error) from None
        except WorkFailed as error:
            raise self._prune(trial, chosen, "failed", error) from None
        if not math.isfinite(value):
            raise self._prune(trial, chosen, "failed", WorkFailed(f"{self.evaluator.metric.name} is {value}."))
        trial.set_user_attr("nfe", nfe)
        trial.set_user_attr("seconds", seconds)
        against = self.evaluator.spec.objective.against
        return value if against is None else (value, nfe if against == "nfe" else seconds)

    def _require_missing(self, trial: Trial) -> None:
        """Raise EnoughTrials if earlier trials suffice: two processes may both see that one is missing."""
        before = [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number]
        if len(distinct(before)) + sum(t.state == TrialState.RUNNING for t in before) >= self.wanted:
            raise EnoughTrials

    def _choose(self, trial: Trial) -> dict[str, Any]:
        """Return the settings that are in force, outer ones first, and the steps that a budget of evaluations allows."""
        evaluator, budget = self.evaluator, self.evaluator.spec.objective.nfe
        chosen: dict[str, Any] = {}
        for axis in evaluator.axes:
            if in_force(evaluator.setting(chosen, 2, 0), axis.key):
                chosen[axis.key] = proposed(trial, axis)
        free = all(axis.key != "sampler.steps" for axis in evaluator.axes)
        limit = chosen.get("nfe", budget if free else None)
        return chosen if limit is None else evaluator.within_budget(chosen, limit)

    def _within_budget(self, nfe: int | None) -> None:
        budget = self.evaluator.spec.objective.nfe
        if budget is not None and nfe is not None and nfe > budget:
            raise UserError(f"spends {nfe} evaluations a sample; objective.nfe allows {budget}.")

    def _note_repeat(self, trial: Trial, config: Config) -> None:
        key = sampling_identity(config, self.evaluator.run.step, self.evaluator.run.identity)
        trial.set_user_attr("sampling", key)
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.user_attrs.get("sampling") == key and other.number != trial.number:
                # Its value comes from disk again, for Optuna's model; it does not count as a new trial.
                trial.set_user_attr("repeats", other.number)
                return

    @staticmethod
    def _prune(trial: Trial, chosen: Mapping[str, Any], kind: str, error: Exception) -> TrialPruned:
        trial.set_user_attr("chosen", dict(chosen) or trial.params)
        trial.set_user_attr("kind", kind)
        trial.set_user_attr("reason", str(error))
        return TrialPruned(str(error))


def proposed(trial: Trial, axis: Axis) -> Any:
    """Return Optuna's value for an axis."""
    if axis.range is None:
        choices = {plain_choice(choice): choice for choice in axis.choices}
        return choices[trial.suggest_categorical(axis.key, list(choices))]
    low, high, log, step = axis.range.low, axis.range.high, axis.range.log, axis.range.step
    if axis.range.whole:
        return trial.suggest_int(axis.key, int(low), int(high), step=int(step or 1), log=log)
    return trial.suggest_float(axis.key, low, high, step=step, log=log)
