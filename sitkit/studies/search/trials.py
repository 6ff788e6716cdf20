"""The trials of a search: proposed by Optuna, refused or measured, in a study that processes share."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, final

import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, TrialPruned
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from sitkit.runs.config.identity import sampling_identity, sampling_recipe
from sitkit.runs.config.schema import Config
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.hashing import identity
from sitkit.runtime.progress import Event
from sitkit.studies.search.evaluator import Evaluator
from sitkit.studies.search.space import Axis, in_force, plain_choice

SEARCHES = "searches"
# So many trials in a row that measure nothing new end a search: the space is exhausted, or impossible.
MAX_UNPRODUCTIVE = 100
# Trials drawn at random before TPE has something to go by.
STARTUP = 10
POLL = 0.5


def open_study(bench: Evaluator, name: str, storage: str | None) -> optuna.Study:
    """The study in its database, both made if they are not there."""
    run, quest = bench.run, bench.quest
    folder = run.folder / SEARCHES
    folder.mkdir(parents=True, exist_ok=True)
    url = storage or f"sqlite:///{(folder / f'{name}.db').resolve().as_posix()}"
    parts = quest.model_dump(mode="json", include={"objective", "space", "screen", "seed"})
    study_name = f"{name}-{identity(run.identity, sampling_recipe(run.config, run.step), parts)}"
    first = "minimize" if bench.metric.lower_is_better else "maximize"
    # SQLite's own 5 s are too few where several processes write.
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    try:
        # Two processes that make the tables at once would crash each other.
        with FileLock(folder / f"{name}.db.lock"), quiet():
            database = RDBStorage(
                url,
                engine_kwargs=patience,
                heartbeat_interval=quest.heartbeat,
                grace_period=3 * quest.heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
            return optuna.create_study(
                storage=database,
                study_name=study_name,
                directions=[first, "minimize"] if quest.objective.against else [first],
                load_if_exists=True,
                sampler=ByNumber(quest.seed),
            )
    except ImportError as error:
        reason = str(error).rstrip(". ")
        raise UserError(f"storage {_public(url)!r} needs its driver: {reason}.") from None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkFailed(f"The study at {_public(url)} cannot be opened: {reason}") from None


def _public(url: str) -> str:
    """The address without user and password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna's remarks on its experimental parts, left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@final
class ByNumber(optuna.samplers.BaseSampler):
    """Optuna's TPE with a generator of its own for each trial, seeded by the trial's number.

    One generator for all would begin again after a restart and propose what was tried; two processes of one study would
    propose alike.  After a proposal that was made before, the next one is drawn at random: TPE alone would make it again
    and again in a space of few settings.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._now: optuna.samplers.BaseSampler = self._make(0, STARTUP)

    def _make(self, number: int, startup: int) -> optuna.samplers.BaseSampler:
        seed = int(identity(self._seed, number)[:8], 16)
        # `group` models settings that exist only with some choices apart from the rest.
        with quiet():
            return optuna.samplers.TPESampler(
                n_startup_trials=startup, seed=seed, multivariate=True, group=True, constant_liar=True
            )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        past = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        self._now = self._make(trial.number, trial.number + 1 if past and "repeats" in past[-1].user_attrs else STARTUP)
        self._now.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._now.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._now.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._now.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._now.after_trial(study, trial, state, values)


class EnoughTrials(Exception):
    """The trials that were asked for are measured or being measured by others."""


def work(study: optuna.Study, bench: Evaluator, wanted: int) -> None:
    """Run trials until the study has `wanted` measured ones; what others are at is waited for, what the dead left redone."""
    objective = TrialObjective(study, bench, wanted)
    waiting = False
    while True:
        all_trials = study.get_trials(deepcopy=False)
        done = distinct(all_trials)
        best = _best(done, bench)
        bench.progress(Event("search", min(len(done), wanted), wanted, {} if best is None else {"best": best}))
        if len(done) >= wanted:
            return
        barren = _barren(all_trials)
        if barren >= MAX_UNPRODUCTIVE:
            _exhausted(all_trials, done, barren, bench)
            return
        running = [trial for trial in all_trials if trial.state == TrialState.RUNNING]
        with quiet():
            if len(done) + len(running) < wanted:
                waiting = False
                study.optimize(objective, n_trials=1, catch=(EnoughTrials,))
                continue
            if not waiting:
                waiting = True
                bench.progress(Event("search", message=f"waiting for {len(running)} trials of other processes."))
            fail_stale_trials(study)
        _fail_dead_trials(study, running, timedelta(seconds=3 * bench.quest.heartbeat))
        time.sleep(POLL)


def is_measured(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: finished, and not a setting measured before."""
    return trial.state == TrialState.COMPLETE and "repeats" not in trial.user_attrs


def distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The measured trials, of two that are one setting the first: processes may hit on it at the same time."""
    first: dict[str, FrozenTrial] = {}
    for trial in filter(is_measured, trials):
        first.setdefault(trial.user_attrs["sampling"], trial)
    return list(first.values())


def _fail_dead_trials(study: optuna.Study, running: Sequence[FrozenTrial], grace: timedelta) -> None:
    """End trials whose process died before its first sign of life: Optuna would take them to be running for ever."""
    for trial in running:
        begun = trial.datetime_start
        # A trial taken over carries what the dead one was given, so the mark is its own number.
        marked = trial.user_attrs.get("begun") == trial.number
        if not marked and begun is not None and datetime.now() - begun > grace:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _barren(trials: Sequence[FrozenTrial]) -> int:
    """How many finished trials since the last that measured something, those taken over from the dead left out."""
    count = 0
    for trial in reversed(trials):
        if is_measured(trial):
            break
        count += trial.state == TrialState.PRUNED or "repeats" in trial.user_attrs
    return count


def _exhausted(trials: Sequence[FrozenTrial], done: Sequence[FrozenTrial], barren: int, bench: Evaluator) -> None:
    if not done:
        reason = next((t.user_attrs["reason"] for t in reversed(trials) if "reason" in t.user_attrs), "")
        raise UserError(f"none of {barren} settings of this space can be sampled; the last one: {reason}")
    bench.progress(
        Event("search", message=f"{barren} trials in a row brought nothing new: the search ends at {len(done)}.")
    )


def _best(done: Sequence[FrozenTrial], bench: Evaluator) -> float | None:
    values = [trial.values[0] for trial in done]
    return (min if bench.metric.lower_is_better else max)(values) if values else None


@final
class TrialObjective:
    """One trial: settings proposed, refused before any work or measured; what is known of it is kept with the trial."""

    def __init__(self, study: optuna.Study, bench: Evaluator, wanted: int) -> None:
        self.study, self.bench, self.wanted = study, bench, wanted

    def __call__(self, trial: Trial) -> float | tuple[float, float]:
        self._not_surplus(trial)
        chosen: dict[str, Any] = {}
        screen = self.bench.quest.screen
        try:
            chosen = self._choose(trial)
            config = self.bench.setting(chosen, screen.n, screen.seed)
            self._within_budget(self.bench.cost(config))
            trial.set_user_attr("chosen", chosen)
            trial.set_user_attr("begun", trial.number)
            self._note_repeat(trial, config)
            value, nfe, seconds = self.bench.measure(config)
            self._within_budget(nfe)
        except UserError as error:
            raise self._prune(trial, chosen, "refused", error) from None
        except WorkFailed as error:
            raise self._prune(trial, chosen, "failed", error) from None
        if not math.isfinite(value):
            raise self._prune(trial, chosen, "failed", WorkFailed(f"{self.bench.metric.name} is {value}."))
        trial.set_user_attr("nfe", nfe)
        trial.set_user_attr("seconds", seconds)
        against = self.bench.quest.objective.against
        return value if against is None else (value, nfe if against == "nfe" else seconds)

    def _not_surplus(self, trial: Trial) -> None:
        """Two processes may both find one trial missing; numbers are in order, so the later one sees that it is not."""
        before = [t for t in self.study.get_trials(deepcopy=False) if t.number < trial.number]
        if len(distinct(before)) + sum(t.state == TrialState.RUNNING for t in before) >= self.wanted:
            raise EnoughTrials

    def _choose(self, trial: Trial) -> dict[str, Any]:
        """The settings that are in force, outer ones first, and the steps that a budget of evaluations allows."""
        bench, budget = self.bench, self.bench.quest.objective.nfe
        chosen: dict[str, Any] = {}
        for axis in bench.axes:
            if in_force(bench.setting(chosen, 2, 0), axis.key):
                chosen[axis.key] = proposed(trial, axis)
        free = all(axis.key != "sampler.steps" for axis in bench.axes)
        limit = chosen.get("nfe", budget if free else None)
        return chosen if limit is None else bench.afford(chosen, limit)

    def _within_budget(self, nfe: int | None) -> None:
        budget = self.bench.quest.objective.nfe
        if budget is not None and nfe is not None and nfe > budget:
            raise UserError(f"spends {nfe} evaluations a sample; objective.nfe allows {budget}.")

    def _note_repeat(self, trial: Trial, config: Config) -> None:
        key = sampling_identity(config, self.bench.run.step)
        trial.set_user_attr("sampling", key)
        for other in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if other.user_attrs.get("sampling") == key and other.number != trial.number:
                # Its value is told again, from disk, for the sake of Optuna's model; it is no new trial.
                trial.set_user_attr("repeats", other.number)
                return

    @staticmethod
    def _prune(trial: Trial, chosen: Mapping[str, Any], kind: str, error: Exception) -> TrialPruned:
        trial.set_user_attr("chosen", dict(chosen) or trial.params)
        trial.set_user_attr("kind", kind)
        trial.set_user_attr("reason", str(error))
        return TrialPruned(str(error))


def proposed(trial: Trial, axis: Axis) -> Any:
    """Optuna's value for an axis."""
    if axis.range is None:
        known = {plain_choice(choice): choice for choice in axis.choices}
        return known[trial.suggest_categorical(axis.key, list(known))]
    low, high, log, step = axis.range.low, axis.range.high, axis.range.log, axis.range.step
    if axis.range.whole:
        return trial.suggest_int(axis.key, int(low), int(high), step=int(step or 1), log=log)
    return trial.suggest_float(axis.key, low, high, step=step, log=log)
