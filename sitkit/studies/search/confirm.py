"""The end of a search: confirm the best trials on fresh seeds, compare the winner with the run's own setting, write files."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sitkit.evaluation import plots
from sitkit.registry import spec
from sitkit.results.statistics import LEVEL, Comparison, Estimate, paired
from sitkit.runs.config.sampling_presets import write_preset
from sitkit.runtime.files import write_file, write_json
from sitkit.runtime.progress import Event
from sitkit.studies.search.evaluator import Evaluator, TrialResult
from sitkit.studies.search.space import Search, plain_choice
from sitkit.studies.search.trials import SEARCHES, distinct, quiet

# The picture ends at this multiple of the worst confirmed value.
OUTLIER = 3.0


@dataclass(frozen=True)
class SearchOutcome:
    """The result of a search.

    Attributes:
        search: the search as its file says it.
        counts: the number of trials by their end: measured, repeated, refused, failed, taken over.
        refused: the number of refused trials by reason.
        confirmed: the best trials, measured again on the seeds of the confirmation.
        reference: the run's own setting, measured in the same way.
        winner: the best confirmed setting that spends at most the evaluations of the run's own; None if there is none.
        verdict: one sentence: does the winner beat the run's own setting?
        record, table, picture: the files of the result (JSON), of the trials (CSV), and of their plot (PNG).
        preset: the winner's settings in a file, as `sample(preset=...)` takes it; None without a winner.
    """

    search: Search
    counts: dict[str, int]
    refused: dict[str, int]
    confirmed: list[TrialResult]
    reference: TrialResult
    winner: TrialResult | None
    verdict: str
    record: Path
    table: Path
    picture: Path
    preset: Path | None

    def rows(self) -> list[tuple[str, Estimate, int, float, str]]:
        """Return trial, estimate, NFE, seconds per sample and setting of the confirmed trials and of the run's own setting."""
        return [
            (
                "own" if result is self.reference else str(result.trial),
                result.estimate,
                result.nfe,
                result.seconds,
                "winner: " * (result is self.winner) + (describe_choice(result.chosen) or "the run's own setting"),
            )
            for result in (*self.confirmed, self.reference)
        ]

    def __repr__(self) -> str:
        return f"SearchOutcome({self.verdict} {self.record})"

    def _repr_markdown_(self) -> str:
        rows = [
            f"| {trial} | {estimate.mean:.4g} ± {estimate.stderr or 0:.2g} | {nfe} | {setting} |"
            for trial, estimate, nfe, _, setting in self.rows()
        ]
        metric = self.search.objective.metric
        return "\n".join([f"| trial | {metric} | NFE | setting |", "|---|---|---|---|", *rows, "", self.verdict])


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto front of (value, cost), both minimised, by rising cost; of equal points one."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][0] < points[kept[-1]][0]:
            kept.append(i)
    return kept


def candidates(measured: Sequence[FrozenTrial], evaluator: Evaluator) -> list[FrozenTrial]:
    """Return the trials to confirm.

    They are the best by the metric, or as many of the front, spread evenly from its cheapest to its best.
    """
    sign, most = (1 if evaluator.metric.lower_is_better else -1), evaluator.spec.confirm.best
    if evaluator.spec.objective.against is None:
        return sorted(measured, key=lambda trial: sign * trial.values[0])[:most]
    best = [measured[i] for i in front([(sign * trial.values[0], trial.values[1]) for trial in measured])]
    if len(best) <= most:
        return best
    if most == 1:
        return best[-1:]
    return [best[round(k * (len(best) - 1) / (most - 1))] for k in range(most)]


def conclude(study: optuna.Study, evaluator: Evaluator, name: str) -> SearchOutcome:
    """Confirm the best trials, choose the winner, compare it with the run's own setting, and write the result."""
    trials = study.get_trials(deepcopy=False)
    reference, confirmed = confirm_candidates(candidates(distinct(trials), evaluator), evaluator)
    winner = choose_winner(confirmed, reference.nfe, evaluator.metric.lower_is_better)
    comparison = compare(evaluator, winner, reference)
    counts, refused = tally(trials)
    folder, verdict = evaluator.run.folder, str(comparison["verdict"])
    record, table, picture = (folder / SEARCHES / f"{name}.{kind}" for kind in ("json", "csv", "png"))
    preset = write_preset(folder, name, winner.config, verdict) if winner else None
    outcome = SearchOutcome(
        evaluator.spec, counts, refused, confirmed, reference, winner, verdict, record, table, picture, preset
    )
    write_file(outcome.table, trials_csv(trials, evaluator))
    draw_search(distinct(trials), outcome, evaluator)
    write_json(outcome.record, record_of(outcome, evaluator, study.study_name) | comparison)
    evaluator.progress(Event("confirm", len(confirmed) + 2, len(confirmed) + 2))
    return outcome


def confirm_candidates(trials: Sequence[FrozenTrial], evaluator: Evaluator) -> tuple[TrialResult, list[TrialResult]]:
    """Measure the run's own setting and each trial on the seeds of the confirmation."""
    settings = [(-1, _own_setting(evaluator)), *((trial.number, trial.user_attrs["chosen"]) for trial in trials)]
    results = []
    for i, (number, chosen) in enumerate(settings):
        evaluator.progress(Event("confirm", i, len(settings) + 1))
        results.append(evaluator.confirm(number, chosen, evaluator.spec.confirm.seeds))
    evaluator.progress(Event("confirm", len(settings), len(settings) + 1))
    return results[0], results[1:]


def _own_setting(evaluator: Evaluator) -> dict[str, Any]:
    """The run's own setting, with more steps if the search allows more evaluations than it spends."""
    budget = evaluator.spec.objective.nfe
    spent = evaluator.cost(evaluator.setting({}, 2, 0))
    return {} if budget is None or spent is None or spent >= budget else evaluator.within_budget({}, budget)


def choose_winner(confirmed: Sequence[TrialResult], nfe: int, lower_is_better: bool) -> TrialResult | None:
    """Return the best of the settings that spend at most `nfe` evaluations, or None."""
    eligible = [setting for setting in confirmed if setting.nfe <= nfe]
    return (min if lower_is_better else max)(eligible, key=lambda setting: setting.estimate.mean, default=None)


def compare(evaluator: Evaluator, winner: TrialResult | None, reference: TrialResult) -> dict[str, Any]:
    """Compare the winner and the run's own setting on fresh seeds, which chose neither."""
    metric, fresh = evaluator.metric, evaluator.spec.confirm.fresh
    if winner is None:
        verdict = f"No confirmed setting spends at most the {reference.nfe} evaluations of the run's own: no winner."
        return {"beats": False, "verdict": verdict}
    ours, theirs = (evaluator.confirm(setting.trial, setting.chosen, fresh) for setting in (winner, reference))
    test, beats = judge(ours, theirs, metric.lower_is_better)
    verdict = (
        f"{describe_choice(winner.chosen)} {'beats' if beats else 'does not beat'} the run's own setting "
        f"({describe_choice(reference.chosen) or 'as it is'}) in a paired t-test at level {LEVEL}: "
        f"{metric.name} {ours.estimate.mean:.4g} ± {ours.estimate.stderr:.2g} at {ours.nfe} evaluations "
        f"against {theirs.estimate.mean:.4g} ± {theirs.estimate.stderr:.2g} at {theirs.nfe}, "
        f"difference {test.difference:.4g}, {1 - LEVEL:.0%} interval {test.low:.4g} to {test.high:.4g}, p = {test.p:.2g}, "
        f"over {len(fresh)} fresh seeds of {evaluator.spec.confirm.n} samples."
    )
    numbers = {key: getattr(test, key) for key in ("difference", "stderr", "low", "high", "p")}
    seeds = {"seeds": list(fresh), "winner": result_record(ours), "reference": result_record(theirs)}
    return {"beats": beats, "verdict": verdict, "fresh": seeds | numbers}


def judge(winner: TrialResult, reference: TrialResult, lower_is_better: bool) -> tuple[Comparison, bool]:
    """Compare two settings by Student's paired t-test over their seeds; True if the winner is significantly better.

    Seeds share their noise, so the test uses the differences seed by seed. It is two-sided at LEVEL: a tie is called a
    win with probability LEVEL / 2.
    """
    test = paired(winner.numbers, reference.numbers)
    better = test.difference < 0 if lower_is_better else test.difference > 0
    return test, better and test.p is not None and test.p <= LEVEL


def describe_choice(chosen: Mapping[str, Any]) -> str:
    """Return chosen settings as text: "heun steps=25 grid=power(rho=2), cfg scale=1.5, raw"."""
    roots: dict[str, list[str]] = {}
    for key, value in chosen.items():
        root, _, field = key.partition(".")
        if key != "nfe":
            words = roots.setdefault(root, [])
            words.append(f"{field}={_short(value)}" if field and root != "sample" else _short(value))
    titles = {root: "" if root in chosen or root == "sample" else f"{root} " for root in roots}
    return ", ".join(titles[root] + " ".join(words) for root, words in roots.items())


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{k}={_short(v)}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}{f'({rest})' if rest else ''}"
    return f"{value:.4g}" if isinstance(value, float) else str(plain_choice(value)).replace(" ", "")


def result_record(setting: TrialResult) -> dict[str, Any]:
    """Return the record of a measured setting."""
    return {
        "trial": None if setting.trial < 0 else setting.trial,
        "chosen": setting.chosen,
        "values": list(setting.values),
        "mean": setting.estimate.mean,
        "stderr": setting.estimate.stderr,
        "nfe": setting.nfe,
        "seconds": setting.seconds,
    }


def record_of(outcome: SearchOutcome, evaluator: Evaluator, study: str) -> dict[str, Any]:
    """Return the record of a search, without the comparison on fresh seeds."""
    return {
        "run": evaluator.run.folder.name,
        "training": evaluator.run.identity,
        "step": evaluator.run.step,
        "search": outcome.search.model_dump(mode="json", exclude={"storage"}),
        "study": study,
        "counts": outcome.counts,
        "refused": outcome.refused,
        "metric": spec(evaluator.metric),
        "confirmed": [result_record(setting) for setting in outcome.confirmed],
        "reference": result_record(outcome.reference),
        "winner": None if outcome.winner is None else outcome.winner.trial,
    }


def tally(trials: Sequence[FrozenTrial]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of trials by their end, and the number of refused trials by reason."""
    measured = distinct(trials)
    ends = [trial.user_attrs.get("kind") for trial in trials if trial.state == TrialState.PRUNED]
    with quiet():
        counts = {
            "measured": len(measured),
            "repeated": sum(t.state == TrialState.COMPLETE for t in trials) - len(measured),
            "refused": ends.count("refused"),
            "failed": ends.count("failed"),
            "taken over": sum(t.state == TrialState.FAIL and "sampling" in t.user_attrs for t in trials),
        }
    return counts, dict(Counter(t.user_attrs["reason"] for t in trials if t.user_attrs.get("kind") == "refused"))


def trials_csv(trials: Sequence[FrozenTrial], evaluator: Evaluator) -> str:
    """Return a table with a line for each trial: its end, its numbers, and its settings."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.user_attrs.get("chosen", {}) if key != "nfe"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    first = {trial.number for trial in distinct(trials)}
    writer.writerow(["trial", "state", evaluator.metric.name, "nfe", "seconds", *keys, "reason"])
    for trial in trials:
        record, complete = trial.user_attrs, trial.state == TrialState.COMPLETE
        state = record.get("kind") or ("measured" if trial.number in first else "repeated" if complete else "given up")
        numbers = [trial.values[0] if complete else "", record.get("nfe", ""), record.get("seconds", "")]
        chosen = [plain_choice(record.get("chosen", {}).get(key, "")) for key in keys]
        writer.writerow([trial.number, state, *numbers, *chosen, record.get("reason", "")])
    return text.getvalue()


# The cost of a setting by what the metric is weighed against: how to read it, and the label of its axis.
COSTS: dict[str | None, tuple[Callable[[TrialResult], float], str]] = {
    "nfe": (lambda setting: setting.nfe, "network evaluations a sample"),
    "seconds": (lambda setting: setting.seconds, "seconds a sample"),
    None: (lambda setting: setting.trial, "trial (-1: the run's own)"),
}


def draw_search(measured: Sequence[FrozenTrial], outcome: SearchOutcome, evaluator: Evaluator) -> None:
    """Draw the metric against its cost: every trial, the confirmed settings with their errors, the run's own setting."""
    import numpy as np

    search, metric = outcome.search, evaluator.metric
    cost, cost_label = COSTS[search.objective.against]
    figure, (ax,) = plots.canvas(1, (8, 5))
    # A single objective has no cost: trials lie along their numbers, and a confirmed setting at its own trial.
    alone = search.objective.against is None
    x = [float(t.number if alone else t.values[1]) for t in measured]
    plots.dots(ax, np.array([x, [t.values[0] for t in measured]]).T, plots.INK, f"trials, n = {search.screen.n}")
    confirmed = (f"confirmed, n = {search.confirm.n}", sorted(outcome.confirmed, key=cost))
    for i, (label, settings) in enumerate((confirmed, ("the run's own setting", [outcome.reference]))):
        means, errors = [s.estimate.mean for s in settings], [s.estimate.stderr or 0.0 for s in settings]
        # A line joins the points of a front only: there is nothing between single trials.
        style: dict[str, Any] = {"fmt": "o" if alone else "o-", "color": plots.COLOURS[i], "capsize": 3}
        ax.errorbar([cost(s) for s in settings], means, errors, label=label, **style)
    means = [s.estimate.mean for s in (*outcome.confirmed, outcome.reference)]
    values = [*(t.values[0] for t in measured), *means]
    if min(values) > 0 and max(values) > 5 * min(values):
        ax.set_yscale("log")
        plots.plain_ticks(ax.yaxis)
    outside = 0
    if metric.lower_is_better:
        # A setting that fails altogether would flatten the rest.
        top = OUTLIER * max(means)
        outside = sum(value > top for value in values)
        ax.set_ylim(top=min(top, ax.get_ylim()[1]))
    title = search.title or f"{len(measured)} trials on {evaluator.run.folder.name}"
    plots.heading(ax, title + (f" ({outside} trials lie above)" if outside else ""))
    plots.label_axes(ax, cost_label, metric.name + (f" ({metric.unit})" if metric.unit else ""))
    ax.legend(fontsize=10, framealpha=0.9, edgecolor="none", markerscale=1.5)
    plots.save(figure, outcome.picture)
