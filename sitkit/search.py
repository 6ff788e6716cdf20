"""A search over how to sample a run: Optuna proposes, `sitkit.evaluate` measures, fresh seeds confirm.

Nothing is trained and nothing measured twice.  What cannot give right samples is refused before any work, with its
reason kept.  Several processes or machines may share a study; one that is killed loses nothing, for the same command
goes on with the study and takes up what the dead left.  This is the only module that imports optuna.

    runs/<run>/searches/<name>.db  .json  .csv  .png          runs/<run>/presets/<name>.yaml
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, final

import optuna
import torch
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning, TrialPruned
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, Trial, TrialState

from sitkit import checkpoint, picture
from sitkit.config import Config, Layer, identity
from sitkit.curvature import fitted
from sitkit.evaluate import evaluate
from sitkit.preset import write_preset
from sitkit.progress import Event, Progress, silent
from sitkit.registry import UserError, WorkFailed, spec
from sitkit.run import Run, adapted, load
from sitkit.sample import sampling_identity, sampling_recipe
from sitkit.space import Axis, Search, in_force, layer_of, metric_of, read_search, shown, within

FOLDER = "searches"
# So many trials in a row that measure nothing new end a search: the space is exhausted, or impossible.
BARREN = 100
# Trials drawn at random before TPE has something to go by.
STARTUP = 10
POLL = 0.5
# The picture ends at so many times the worst confirmed value.
OUTLIER = 3.0


class Measured(NamedTuple):
    """A setting measured on some seeds: the metric's values, evaluations and seconds a sample; `trial` -1: the run's own."""

    trial: int
    chosen: dict[str, Any]
    config: Config
    values: tuple[float, ...]
    nfe: int
    seconds: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def stderr(self) -> float:
        """Standard error of the mean over seeds."""
        return statistics.stdev(self.values) / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Outcome:
    """What a search found.  counts: trials measured, repeated, refused, failed; `verdict` is one sentence."""

    search: Search
    counts: dict[str, int]
    refused: dict[str, int]
    confirmed: list[Measured]
    reference: Measured
    winner: Measured | None
    verdict: str
    record: Path
    table: Path
    picture: Path
    preset: Path | None


def search(
    run: Run, path: Path | str, *, trials: int | None = None, storage: str | None = None, progress: Progress = silent
) -> Outcome:
    """Bring the study of a file to `trials` measured ones, confirm the best and compare the winner with the run's own way.

    trials, storage: instead of the file's.  Processes that share a study share its number of trials.  The study belongs
    to the run, its checkpoint, its own setting, the space, the objective, the screen and the seed: a file changed in
    these begins another one in the same database.
    Raises UserError before any work for what is wrong in the file, and where every trial is refused.
    """
    quest, axes = read_search(path, run.config)
    name = checkpoint.file_name(Path(path).stem)
    wanted = quest.trials if trials is None else trials
    if wanted < 1:
        raise UserError(f"trials must be at least 1; got {wanted}.")
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    bench = Bench(run, quest, axes, progress)
    study = open_study(bench, name, storage or quest.storage)
    work(study, bench, wanted)
    # Processes that share a study end together; what the first confirms, the others read.
    with FileLock(run.folder / FOLDER / f"{name}.lock"):
        return conclude(study, bench, name)


class Bench:
    """What a trial is tried on: the run with each kind of weights, at a size and seed."""

    def __init__(self, run: Run, quest: Search, axes: list[Axis], progress: Progress) -> None:
        self.run, self.quest, self.axes, self.progress = run, quest, axes, progress
        self.metric = metric_of(quest)
        self._runs = {(run.config.sample.weights, run.config.sample.ema): run}

    def at(self, config: Config) -> Run:
        """The run with this configuration and the weights it asks for."""
        weights, ema = config.sample.weights, config.sample.ema
        if (weights, ema) not in self._runs:
            device = next(iter(self.run.network.parameters()), torch.empty(0)).device
            over = Layer({"sample": {"weights": weights, "ema": ema}})
            self._runs[weights, ema] = load(self.run.source, step=self.run.step, device=str(device), over=over)
        return dataclasses.replace(self._runs[weights, ema], config=config)

    def setting(self, chosen: Mapping[str, Any], n: int, seed: int) -> Config:
        """The run's configuration with these settings, to draw n samples from a seed and measure the search's metric."""
        config = adapted(self.run.config, layer_of(chosen))
        drawn = config.sample.model_copy(update={"n": n, "seed": seed})
        return config.model_copy(update={"sample": drawn, "metric": (self.metric,)})

    def cost(self, config: Config) -> int | None:
        """Evaluations a sample, None where an adaptive solver will tell.  Raises UserError for what cannot be right."""
        run = self.at(config)
        sampler, diffusion = fitted(config.sampler, run), fitted(config.diffusion, run)
        return sampler.plan(config.interp, config.target, diffusion, config.guidance).nfe

    def afford(self, chosen: dict[str, Any], budget: int) -> dict[str, Any]:
        """The settings with as many steps as a budget of evaluations allows."""
        config = self.setting(chosen, 2, 0)
        if not hasattr(config.sampler, "steps"):
            return chosen
        run = self.at(config)
        config = config.model_copy(update={"sampler": fitted(config.sampler, run)})
        return {**chosen, "sampler.steps": within(config, fitted(config.diffusion, run), budget)}

    def measure(self, config: Config) -> tuple[float, int, float]:
        """The metric, evaluations and seconds a sample."""
        said = self.progress
        record = evaluate(self.at(config), lambda event: said(event) if event.message else None)[0].record
        return float(record["value"]), int(record["sampling"]["nfe"]), record["sampling"]["seconds"] / record["n"]

    def confirm(self, trial: int, chosen: dict[str, Any], seeds: Sequence[int]) -> Measured:
        """A setting measured with each of the seeds, at the confirmation's size."""
        configs = [self.setting(chosen, self.quest.confirm.n, seed) for seed in seeds]
        each = [self.measure(config) for config in configs]
        seconds = statistics.fmean(second for *_, second in each)
        return Measured(trial, chosen, configs[0], tuple(v for v, *_ in each), max(nfe for _, nfe, _ in each), seconds)

    def better(self, a: float, b: float) -> bool:
        """Whether a is the better value of the metric."""
        return a < b if self.metric.lower_is_better else a > b


def open_study(bench: Bench, name: str, storage: str | None) -> optuna.Study:
    """The study in its database, both made if they are not there."""
    run, quest = bench.run, bench.quest
    folder = run.folder / FOLDER
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


class Surplus(Exception):
    """The trials that were asked for are measured or being measured by others."""


def work(study: optuna.Study, bench: Bench, wanted: int) -> None:
    """Run trials until the study has `wanted` measured ones; what others are at is waited for, what the dead left redone."""
    objective = Objective(study, bench, wanted)
    waiting = False
    while True:
        all_trials = study.get_trials(deepcopy=False)
        done = distinct(all_trials)
        best = _best(done, bench)
        bench.progress(Event("search", min(len(done), wanted), wanted, {} if best is None else {"best": best}))
        if len(done) >= wanted:
            return
        barren = _barren(all_trials)
        if barren >= BARREN:
            _exhausted(all_trials, done, barren, bench)
            return
        running = [trial for trial in all_trials if trial.state == TrialState.RUNNING]
        with quiet():
            if len(done) + len(running) < wanted:
                waiting = False
                study.optimize(objective, n_trials=1, catch=(Surplus,))
                continue
            if not waiting:
                waiting = True
                bench.progress(Event("search", message=f"waiting for {len(running)} trials of other processes."))
            fail_stale_trials(study)
        _bury(study, running, timedelta(seconds=3 * bench.quest.heartbeat))
        time.sleep(POLL)


def measured(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those asked for: finished, and not a setting measured before."""
    return trial.state == TrialState.COMPLETE and "repeats" not in trial.user_attrs


def distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The measured trials, of two that are one setting the first: processes may hit on it at the same time."""
    first: dict[str, FrozenTrial] = {}
    for trial in filter(measured, trials):
        first.setdefault(trial.user_attrs["sampling"], trial)
    return list(first.values())


def _bury(study: optuna.Study, running: Sequence[FrozenTrial], grace: timedelta) -> None:
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
        if measured(trial):
            break
        count += trial.state == TrialState.PRUNED or "repeats" in trial.user_attrs
    return count


def _exhausted(trials: Sequence[FrozenTrial], done: Sequence[FrozenTrial], barren: int, bench: Bench) -> None:
    if not done:
        reason = next((t.user_attrs["reason"] for t in reversed(trials) if "reason" in t.user_attrs), "")
        raise UserError(f"none of {barren} settings of this space can be sampled; the last one: {reason}")
    bench.progress(
        Event("search", message=f"{barren} trials in a row brought nothing new: the search ends at {len(done)}.")
    )


def _best(done: Sequence[FrozenTrial], bench: Bench) -> float | None:
    values = [trial.values[0] for trial in done]
    return (min if bench.metric.lower_is_better else max)(values) if values else None


@final
class Objective:
    """One trial: settings proposed, refused before any work or measured; what is known of it is kept with the trial."""

    def __init__(self, study: optuna.Study, bench: Bench, wanted: int) -> None:
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
            raise Surplus

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
        known = {shown(choice): choice for choice in axis.choices}
        return known[trial.suggest_categorical(axis.key, list(known))]
    low, high, log, step = axis.range.low, axis.range.high, axis.range.log, axis.range.step
    if axis.range.whole:
        return trial.suggest_int(axis.key, int(low), int(high), step=int(step or 1), log=log)
    return trial.suggest_float(axis.key, low, high, step=step, log=log)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (value, cost), both the less the better, no other one beats in both; by cost, one of each."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][0] < points[kept[-1]][0]:
            kept.append(i)
    return kept


def candidates(done: Sequence[FrozenTrial], bench: Bench) -> list[FrozenTrial]:
    """The trials to confirm: the best by the metric, or of the front as many, spread evenly from its cheapest to its best."""
    sign, most = (1 if bench.metric.lower_is_better else -1), bench.quest.confirm.best
    if bench.quest.objective.against is None:
        return sorted(done, key=lambda trial: sign * trial.values[0])[:most]
    best = [done[i] for i in front([(sign * trial.values[0], trial.values[1]) for trial in done])]
    if len(best) <= most:
        return best
    if most == 1:
        return best[-1:]
    return [best[round(k * (len(best) - 1) / (most - 1))] for k in range(most)]


def conclude(study: optuna.Study, bench: Bench, name: str) -> Outcome:
    """Confirm, choose, compare, and write what was found."""
    run, quest = bench.run, bench.quest
    trials = study.get_trials(deepcopy=False)
    done = distinct(trials)
    chosen = candidates(done, bench)
    whole = len(chosen) + 2
    bench.progress(Event("confirm", 0, whole))
    reference = bench.confirm(-1, _own(bench), quest.confirm.seeds)
    confirmed = []
    for number, trial in enumerate(chosen):
        bench.progress(Event("confirm", number + 1, whole))
        confirmed.append(bench.confirm(trial.number, trial.user_attrs["chosen"], quest.confirm.seeds))
    bench.progress(Event("confirm", whole - 1, whole))
    eligible = [setting for setting in confirmed if setting.nfe <= reference.nfe]
    sign = 1 if bench.metric.lower_is_better else -1
    winner = min(eligible, key=lambda setting: sign * setting.mean, default=None)
    comparison = compare(bench, winner, reference)
    bench.progress(Event("confirm", whole, whole))
    folder = run.folder / FOLDER
    preset = write_preset(run.folder, name, winner.config, comparison["verdict"]) if winner else None
    paths = {kind: folder / f"{name}.{kind}" for kind in ("json", "csv", "png")}
    counts, refused = tally(trials)
    checkpoint.write(paths["csv"], as_csv(trials, bench))
    draw(done, confirmed, reference, bench, paths["png"])
    record = {
        "run": run.folder.name,
        "training": run.identity,
        "step": run.step,
        "search": quest.model_dump(mode="json", exclude={"storage"}),
        "study": study.study_name,
        "counts": counts,
        "refused": refused,
        "metric": spec(bench.metric),
        "confirmed": [_row(setting) for setting in confirmed],
        "reference": _row(reference),
        "winner": None if winner is None else winner.trial,
        **comparison,
    }
    checkpoint.write_json(paths["json"], record)
    verdict = str(comparison["verdict"])
    return Outcome(
        quest, counts, refused, confirmed, reference, winner, verdict, paths["json"], paths["csv"], paths["png"], preset
    )


def _own(bench: Bench) -> dict[str, Any]:
    """The run's own setting, with more steps where the search was given more evaluations than it spends."""
    budget = bench.quest.objective.nfe
    spent = bench.cost(bench.setting({}, 2, 0))
    return {} if budget is None or spent is None or spent >= budget else bench.afford({}, budget)


def compare(bench: Bench, winner: Measured | None, reference: Measured) -> dict[str, Any]:
    """Winner and reference on seeds that chose neither, seed by seed: common noise drops out of the difference."""
    what = bench.metric.name
    if winner is None:
        verdict = f"No confirmed setting spends at most the {reference.nfe} evaluations of the run's own: no winner."
        return {"beats": False, "verdict": verdict}
    fresh = bench.quest.confirm.fresh
    ours, theirs = (bench.confirm(m.trial, m.chosen, fresh) for m in (winner, reference))
    gaps = [a - b for a, b in zip(ours.values, theirs.values, strict=True)]
    gap, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    gain = -gap if bench.metric.lower_is_better else gap
    beats = gain > 2 * error and gain > 0
    verdict = (
        f"{describe(winner.chosen)} {'beats' if beats else 'does not beat'} the run's own setting "
        f"({describe(reference.chosen) or 'as it is'}) by more than two standard errors: "
        f"{what} {ours.mean:.4g} ± {ours.stderr:.2g} "
        f"at {ours.nfe} evaluations against {theirs.mean:.4g} ± {theirs.stderr:.2g} at {theirs.nfe}, "
        f"difference {gap:.4g} ± {error:.2g} over {len(fresh)} fresh seeds of {bench.quest.confirm.n} samples."
    )
    return {
        "beats": beats,
        "verdict": verdict,
        "fresh": {
            "seeds": list(fresh),
            "winner": _row(ours),
            "reference": _row(theirs),
            "difference": gap,
            "stderr": error,
        },
    }


def describe(chosen: Mapping[str, Any]) -> str:
    """ "heun steps=25 grid=power(rho=2), cfg scale=1.5, raw" """
    roots: dict[str, list[str]] = {}
    for key, value in chosen.items():
        root, _, field = key.partition(".")
        if key != "nfe":
            words = roots.setdefault(root, [])
            words.append(f"{field}={_short(value)}" if field and root != "sample" else _short(value))
    return ", ".join(" ".join(words) if root in chosen or root == "sample" else f"{root} {' '.join(words)}"
                     for root, words in roots.items())  # fmt: skip


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{k}={_short(v)}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}{f'({rest})' if rest else ''}"
    return f"{value:.4g}" if isinstance(value, float) else str(shown(value)).replace(" ", "")


def _row(setting: Measured) -> dict[str, Any]:
    return {
        "trial": None if setting.trial < 0 else setting.trial,
        "chosen": setting.chosen,
        "values": list(setting.values),
        "mean": setting.mean,
        "stderr": setting.stderr,
        "nfe": setting.nfe,
        "seconds": setting.seconds,
    }


def tally(trials: Sequence[FrozenTrial]) -> tuple[dict[str, int], dict[str, int]]:
    """How many trials were measured, repeated, refused and failed; and how many were refused for each reason."""
    done = distinct(trials)
    kinds = [trial.user_attrs.get("kind") for trial in trials if trial.state == TrialState.PRUNED]
    with quiet():
        retried = [trial for trial in trials if RetryHeartbeatStaleTrialCallback.retry_history(trial)]
    counts = {
        "measured": len(done),
        "repeated": sum(t.state == TrialState.COMPLETE for t in trials) - len(done),
        "refused": kinds.count("refused"),
        "failed": kinds.count("failed"),
        "taken over": len({t.number for t in done} & {t.number for t in retried}),
    }
    reasons: dict[str, int] = {}
    for trial in trials:
        if trial.user_attrs.get("kind") == "refused":
            reasons[trial.user_attrs["reason"]] = reasons.get(trial.user_attrs["reason"], 0) + 1
    return counts, reasons


def as_csv(trials: Sequence[FrozenTrial], bench: Bench) -> str:
    """One line a trial: what was chosen, what came of it."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.user_attrs.get("chosen", {}) if key != "nfe"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first = {trial.number for trial in distinct(trials)}
    writer.writerow(["trial", "state", bench.metric.name, "nfe", "seconds", *keys, "reason"])
    for trial in trials:
        known = trial.user_attrs
        state = known.get("kind") or (
            "measured" if trial.number in first else "repeated" if trial.state == TrialState.COMPLETE else "given up"
        )
        value = trial.values[0] if trial.state == TrialState.COMPLETE else ""
        chosen = [shown(known.get("chosen", {}).get(key, "")) for key in keys]
        writer.writerow(
            [
                trial.number,
                state,
                value,
                known.get("nfe", ""),
                known.get("seconds", ""),
                *chosen,
                known.get("reason", ""),
            ]
        )
    return text.getvalue()


def draw(
    done: Sequence[FrozenTrial], confirmed: Sequence[Measured], reference: Measured, bench: Bench, path: Path
) -> None:
    """The metric against its cost: every trial, the confirmed front with its errors, the run's own setting."""
    import numpy as np

    against, quest = bench.quest.objective.against, bench.quest
    figure, (ax,) = picture.canvas(1, (8, 5))

    # Along the trials' numbers where there is one objective: what is confirmed stands at its own trial.
    costs: dict[str | None, Callable[[Measured], float]] = {
        "nfe": lambda s: s.nfe,
        "seconds": lambda s: s.seconds,
        None: lambda s: s.trial,
    }
    cost = costs[against]
    x = [float(t.number if against is None else t.values[1]) for t in done]
    picture.dots(ax, np.array([x, [t.values[0] for t in done]]).T, picture.INK, f"trials, n = {quest.screen.n}")
    for i, (label, settings) in enumerate(
        ((f"confirmed, n = {quest.confirm.n}", sorted(confirmed, key=cost)), ("the run's own setting", [reference]))
    ):
        means, errors = [s.mean for s in settings], [s.stderr for s in settings]
        # A line only along a front: between trials there is nothing.
        style: dict[str, Any] = {"fmt": "o" if against is None else "o-", "color": picture.COLOURS[i], "capsize": 3}
        ax.errorbar([cost(s) for s in settings], means, errors, label=label, **style)
    found = [s.mean for s in (*confirmed, reference)]
    values = [*(t.values[0] for t in done), *found]
    if min(values) > 0 and max(values) > 5 * min(values):
        ax.set_yscale("log")
        picture.plain_ticks(ax.yaxis)
    outside = 0
    if bench.metric.lower_is_better:
        # A setting that fails altogether would flatten the rest.
        top = OUTLIER * max(found)
        outside = sum(value > top for value in values)
        ax.set_ylim(top=min(top, ax.get_ylim()[1]))
    unit = f" ({bench.metric.unit})" if bench.metric.unit else ""
    label = {"nfe": "network evaluations a sample", "seconds": "seconds a sample", None: "trial (-1: the run's own)"}
    title = quest.title or f"{len(done)} trials on {bench.run.folder.name}"
    picture.heading(ax, title + (f" ({outside} trials lie above)" if outside else ""))
    picture.label_axes(ax, label[against], f"{bench.metric.name}{unit}")
    ax.legend(fontsize=10, framealpha=0.9, edgecolor="none", markerscale=1.5)
    picture.save(figure, path)
