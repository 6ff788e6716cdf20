"""What a search found: the best trials confirmed on fresh seeds, compared with the run's own way, written and drawn."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from sitkit.evaluation import plots
from sitkit.registry import spec
from sitkit.results.statistics import LEVEL, Comparison, paired
from sitkit.runs.config.sampling_presets import write_preset
from sitkit.runtime.files import write_file, write_json
from sitkit.runtime.progress import Event
from sitkit.studies.search.evaluator import Evaluator, TrialResult
from sitkit.studies.search.space import Search, plain_choice
from sitkit.studies.search.trials import SEARCHES, distinct, quiet

# The picture ends at so many times the worst confirmed value.
OUTLIER = 3.0


@dataclass(frozen=True)
class SearchOutcome:
    """What a search found.  counts: trials measured, repeated, refused, failed; `verdict` is one sentence."""

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


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (value, cost), both the less the better, no other one beats in both; by cost, one of each."""
    order = sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][0] < points[kept[-1]][0]:
            kept.append(i)
    return kept


def candidates(done: Sequence[FrozenTrial], bench: Evaluator) -> list[FrozenTrial]:
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


def conclude(study: optuna.Study, bench: Evaluator, name: str) -> SearchOutcome:
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
    winner = min(eligible, key=lambda setting: sign * setting.estimate.mean, default=None)
    comparison = compare(bench, winner, reference)
    bench.progress(Event("confirm", whole, whole))
    folder = run.folder / SEARCHES
    preset = write_preset(run.folder, name, winner.config, comparison["verdict"]) if winner else None
    paths = {kind: folder / f"{name}.{kind}" for kind in ("json", "csv", "png")}
    counts, refused = tally(trials)
    write_file(paths["csv"], trials_csv(trials, bench))
    draw_search(done, confirmed, reference, bench, paths["png"])
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
    write_json(paths["json"], record)
    verdict = str(comparison["verdict"])
    return SearchOutcome(
        quest, counts, refused, confirmed, reference, winner, verdict, paths["json"], paths["csv"], paths["png"], preset
    )


def _own(bench: Evaluator) -> dict[str, Any]:
    """The run's own setting, with more steps where the search was given more evaluations than it spends."""
    budget = bench.quest.objective.nfe
    spent = bench.cost(bench.setting({}, 2, 0))
    return {} if budget is None or spent is None or spent >= budget else bench.afford({}, budget)


def compare(bench: Evaluator, winner: TrialResult | None, reference: TrialResult) -> dict[str, Any]:
    """Compare the winner and the run's own setting on fresh seeds, which chose neither."""
    what = bench.metric.name
    if winner is None:
        verdict = f"No confirmed setting spends at most the {reference.nfe} evaluations of the run's own: no winner."
        return {"beats": False, "verdict": verdict}
    fresh = bench.quest.confirm.fresh
    ours, theirs = (bench.confirm(m.trial, m.chosen, fresh) for m in (winner, reference))
    test, beats = judge(ours, theirs, bench.metric.lower_is_better)
    verdict = (
        f"{describe_choice(winner.chosen)} {'beats' if beats else 'does not beat'} the run's own setting "
        f"({describe_choice(reference.chosen) or 'as it is'}) in a paired t-test at level {LEVEL}: "
        f"{what} {ours.estimate.mean:.4g} ± {ours.estimate.stderr:.2g} at {ours.nfe} evaluations "
        f"against {theirs.estimate.mean:.4g} ± {theirs.estimate.stderr:.2g} at {theirs.nfe}, "
        f"difference {test.difference:.4g}, {1 - LEVEL:.0%} interval {test.low:.4g} to {test.high:.4g}, p = {test.p:.2g}, "
        f"over {len(fresh)} fresh seeds of {bench.quest.confirm.n} samples."
    )
    return {
        "beats": beats,
        "verdict": verdict,
        "fresh": {
            "seeds": list(fresh),
            "winner": _row(ours),
            "reference": _row(theirs),
            **{key: getattr(test, key) for key in ("difference", "stderr", "low", "high", "p")},
        },
    }


def judge(winner: TrialResult, reference: TrialResult, lower_is_better: bool) -> tuple[Comparison, bool]:
    """Compare two settings by Student's paired t-test over their seeds; True if the winner is significantly better.

    Seeds share their noise, so the test uses the differences seed by seed. It is two-sided at LEVEL: a tie is called a
    win with probability LEVEL / 2.
    """
    test = paired(winner.cells, reference.cells)
    better = test.difference < 0 if lower_is_better else test.difference > 0
    return test, better and test.p is not None and test.p <= LEVEL


def describe_choice(chosen: Mapping[str, Any]) -> str:
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
    return f"{value:.4g}" if isinstance(value, float) else str(plain_choice(value)).replace(" ", "")


def _row(setting: TrialResult) -> dict[str, Any]:
    return {
        "trial": None if setting.trial < 0 else setting.trial,
        "chosen": setting.chosen,
        "values": list(setting.values),
        "mean": setting.estimate.mean,
        "stderr": setting.estimate.stderr,
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


def trials_csv(trials: Sequence[FrozenTrial], bench: Evaluator) -> str:
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
        chosen = [plain_choice(known.get("chosen", {}).get(key, "")) for key in keys]
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


def draw_search(
    done: Sequence[FrozenTrial], confirmed: Sequence[TrialResult], reference: TrialResult, bench: Evaluator, path: Path
) -> None:
    """The metric against its cost: every trial, the confirmed front with its errors, the run's own setting."""
    import numpy as np

    against, quest = bench.quest.objective.against, bench.quest
    figure, (ax,) = plots.canvas(1, (8, 5))

    # Along the trials' numbers where there is one objective: what is confirmed stands at its own trial.
    costs: dict[str | None, Callable[[TrialResult], float]] = {
        "nfe": lambda s: s.nfe,
        "seconds": lambda s: s.seconds,
        None: lambda s: s.trial,
    }
    cost = costs[against]
    x = [float(t.number if against is None else t.values[1]) for t in done]
    plots.dots(ax, np.array([x, [t.values[0] for t in done]]).T, plots.INK, f"trials, n = {quest.screen.n}")
    for i, (label, settings) in enumerate(
        ((f"confirmed, n = {quest.confirm.n}", sorted(confirmed, key=cost)), ("the run's own setting", [reference]))
    ):
        means, errors = [s.estimate.mean for s in settings], [s.estimate.stderr or 0.0 for s in settings]
        # A line only along a front: between trials there is nothing.
        style: dict[str, Any] = {"fmt": "o" if against is None else "o-", "color": plots.COLOURS[i], "capsize": 3}
        ax.errorbar([cost(s) for s in settings], means, errors, label=label, **style)
    found = [s.estimate.mean for s in (*confirmed, reference)]
    values = [*(t.values[0] for t in done), *found]
    if min(values) > 0 and max(values) > 5 * min(values):
        ax.set_yscale("log")
        plots.plain_ticks(ax.yaxis)
    outside = 0
    if bench.metric.lower_is_better:
        # A setting that fails altogether would flatten the rest.
        top = OUTLIER * max(found)
        outside = sum(value > top for value in values)
        ax.set_ylim(top=min(top, ax.get_ylim()[1]))
    unit = f" ({bench.metric.unit})" if bench.metric.unit else ""
    label = {"nfe": "network evaluations a sample", "seconds": "seconds a sample", None: "trial (-1: the run's own)"}
    title = quest.title or f"{len(done)} trials on {bench.run.folder.name}"
    plots.heading(ax, title + (f" ({outside} trials lie above)" if outside else ""))
    plots.label_axes(ax, label[against], f"{bench.metric.name}{unit}")
    ax.legend(fontsize=10, framealpha=0.9, edgecolor="none", markerscale=1.5)
    plots.save(figure, path)
