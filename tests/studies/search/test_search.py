"""The search: its refusals and proposals; nothing is lost or done twice, and its numbers are reproducible."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import scipy.stats
from optuna.trial import FrozenTrial, TrialState
from support import ROOT

from sitkit.registry.measures import UNTRAINED
from sitkit.runs.config.sampling_presets import read_preset, write_preset
from sitkit.runs.config.sources import Layer, assemble
from sitkit.runs.evaluate import measure_run
from sitkit.runs.run import Run, load, sampling_config
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.runtime.progress import silent
from sitkit.solvers.sampler import SolveSpec
from sitkit.studies.search import search
from sitkit.studies.search.confirm import front, judge
from sitkit.studies.search.evaluator import Evaluator, TrialResult
from sitkit.studies.search.space import in_force, layer_of, read_search, steps_within_budget
from sitkit.studies.search.trials import (
    ByNumber,
    EnoughTrials,
    TrialObjective,
    database_url,
    distinct,
    open_study,
    quiet,
)
from sitkit.training.train import run_training

SPACE = """
objective: {metric: frechet, against: nfe, nfe: 24}
space:
  sampler: [euler, heun, euler-maruyama]
  nfe: {low: 3, high: 24, log: true}
  sampler.grid: [uniform, {name: power, rho: 2}]
  sampler.grid.rho: {low: 1.0, high: 3.0}
  sampler.last_step: [mean, tweedie]
  sampler.last_step_size: [0.04, 0.1]
  diffusion: [constant, sigma]
  diffusion.norm: {low: 0.2, high: 3, log: true}
screen: {n: 100, seed: 0}
confirm: {n: 200, seeds: [1, 2], fresh: [11, 12, 13], best: 3}
seed: 1
heartbeat: 1
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the closed-form network of a mixture, sampled by heun with 6 steps."""
    given = {
        # In three dimensions: of points in the plane each sampling would draw a picture.
        "data": {"name": "gaussian-mixture", "dim": 3, "size": 400},
        "backbone": "exact",
        "sampler": {"name": "heun", "steps": 6},
        "run": {"track": False, "folder": str(tmp_path_factory.mktemp("made"))},
    }
    return run_training(assemble([Layer(given)]))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """The run in a folder of its own, with nothing sampled."""
    return load(shutil.copytree(made, tmp_path / "runs" / made.name))


def written(folder: Path, text: str) -> Path:
    path = folder / "search.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def trials_of(folder: Path, name: str = "search") -> list[FrozenTrial]:
    """The trials in a run's database, or none as long as there is no study."""
    url = f"sqlite:///{folder / 'searches' / f'{name}.db'}"
    try:
        (study,) = optuna.get_all_study_names(url)
        return optuna.load_study(study_name=study, storage=url).get_trials()
    except Exception:
        return []


# The line of the mistake, words of the message, and the file.
WRONG_KEYS = [
    (1, "cannot be searched", "space: {train.lr: [1]}"), (1, "Did you mean 'sampler'", "space: {smpler: [heun]}"),
    (2, "none of the choices", "space:\n  sampler.stps: [3]"),
    (3, "none of the choices", "space:\n  sampler: [heun]\n  diffusion: [kl]"),
    (1, "the key `space` is missing or empty: write", "space: {}"),
    (2, "one of the two", "space:\n  nfe: [4]\n  sampler.steps: [4]"),
]  # fmt: skip
WRONG_VALUES = {
    (2, "Did you mean 'euler'"): "space:\n  sampler: [heun, eulr]",
    (3, "last_step: .*'tweedie'"): "space:\n  sampler: [euler-maruyama]\n  sampler.last_step: [mean, twedie]",
    **{(2, words): f"space:\n  sampler.steps: {value}" for words, value in [
        ("below high", "{low: 9, high: 3}"), ("at least 1", "{low: 0, high: 3}"), ("list of choices", "7"), ("no choice", "[]"),
    ]},
    (2, "nfe must be whole numbers above 0; got {"): "space:\n  nfe: {low: 3, high: 4.5}",
    (1, "Did you mean 'frechet'"): "objective: {metric: frechte}\nspace: {nfe: [4]}",
    (1, "confirm.seeds"): "confirm: {seeds: [1]}\nspace: {nfe: [4]}",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "words", "text"), [*WRONG_KEYS, *((*key, text) for key, text in WRONG_VALUES.items())]
)
def test_a_wrong_file_is_refused_with_its_line(run: Run, tmp_path: Path, line: int, words: str, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=words) as caught:
        search(run, path)
    assert f"search.yaml:{line}: " in str(caught.value)
    assert not (run.folder / "searches").exists()


def test_a_file_without_a_space_says_what_to_write(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.yaml:1: unknown key 'spaec'\. Did you mean 'space'"):
        search(run, written(tmp_path, "spaec: {nfe: [4]}"))
    with pytest.raises(
        UserError, match=r"search\.yaml: the key `space` is missing or empty: write .*`space: \{sampler"
    ):
        search(run, written(tmp_path, "trials: 3"))
    assert not (run.folder / "searches").exists()


def test_settings_are_in_force_where_they_exist(run: Run) -> None:
    sde = {"sampler": "euler-maruyama"}
    power = {"sampler.grid": {"name": "power", "rho": 2}}
    cases = [
        ({}, "sampler.steps", True), ({}, "sampler.last_step", False), ({}, "diffusion", False), (sde, "diffusion", True),
        ({}, "diffusion.norm", False), (sde, "diffusion.norm", True), (sde, "sampler.last_step", True),
        ({}, "sampler.grid.rho", False), (power, "sampler.grid.rho", True), ({}, "guidance.scale", False),
        ({"guidance": "cfg"}, "guidance.scale", True), ({}, "nfe", True), ({"sampler": "dopri5"}, "nfe", False),
        ({}, "sample.weights", True), (sde, "diffusion.eta", False), ({**sde, "diffusion": "kl-eta"}, "diffusion.eta", True),
    ]  # fmt: skip
    for chosen, key, expected in cases:
        assert in_force(sampling_config(run.config, layer_of(chosen)), key) is expected, (chosen, key)


@pytest.mark.parametrize("sampler", ["euler", "midpoint", "heun", "rk4", "euler-maruyama", "stochastic-heun"])
@pytest.mark.parametrize("guidance", ["none", {"name": "cfg", "interval": [0.2, 0.7]}])
def test_a_budget_gives_the_largest_number_of_steps(run: Run, sampler: str, guidance: Any) -> None:
    config = sampling_config(run.config, layer_of({"sampler": sampler, "guidance": guidance}))

    def cost(steps: int) -> int | None:
        solver = dataclasses.replace(config.sampler, steps=steps)  # pyright: ignore[reportCallIssue]
        return solver.plan(SolveSpec(config.interp, config.target, config.diffusion, config.guidance)).nfe

    for budget in (24, 31, 50):
        steps = steps_within_budget(config, UNTRAINED, budget)
        spent, more = cost(steps), cost(steps + 1)
        assert spent is not None and more is not None and spent <= budget < more


def test_a_budget_below_one_step_is_refused(run: Run) -> None:
    config = sampling_config(run.config, layer_of({"sampler": "rk4"}))
    with pytest.raises(UserError, match="fewest steps"):
        steps_within_budget(config, UNTRAINED, 3)


def test_no_point_beats_the_front() -> None:
    rng = np.random.default_rng(1)
    points = [(float(v), float(c)) for v, c in rng.integers(0, 12, (60, 2))]
    kept = {points[i] for i in front(points)}
    brute = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert kept == brute and len(front(points)) == len(kept)
    assert [points[i][1] for i in front(points)] == sorted(points[i][1] for i in front(points))


def test_a_proposal_depends_on_the_number_of_the_trial_and_the_past() -> None:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)

    def proposals(*pieces: int) -> list[float]:
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(storage=storage, study_name="s")
        with quiet():
            for count in pieces:
                # A new sampler for each piece, as after a restart.
                study = optuna.load_study(storage=storage, study_name="s", sampler=ByNumber(3))
                study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=count)
        return [trial.params["x"] for trial in study.get_trials()]

    whole = proposals(20)
    assert proposals(7, 6, 7) == whole
    assert len(set(whole)) == 20


def test_a_search_confirms_its_best_trials_and_does_nothing_twice(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, SPACE)
    outcome = search(run, path, trials=12)
    trials = trials_of(run.folder)
    assert len(distinct(trials)) == 12 == outcome.counts["measured"]
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}

    # Refusals (constant w with a `mean` last step leaves noise) are kept with their reason, and have spent nothing.
    refused = [t for t in trials if t.state == TrialState.PRUNED]
    assert refused and all("noise" in t.user_attrs["reason"] or "unstable" in t.user_attrs["reason"] for t in refused)
    assert sum(outcome.refused.values()) == len(refused) == outcome.counts["refused"]
    sampled = {p.parent.name for p in run.folder.glob("samples/*/record.json")}
    assert all(t.user_attrs.get("sampling") not in sampled for t in refused)
    assert all(t.user_attrs["sampling"] in sampled for t in distinct(trials))

    # The budget holds, and the front is that of the trials.
    done = distinct(trials)
    assert max(t.values[1] for t in done) <= 24
    best = [done[i].number for i in front([(t.values[0], t.values[1]) for t in done])]
    assert {m.trial for m in outcome.confirmed} <= set(best) and outcome.confirmed[-1].trial == best[-1]
    assert len(outcome.confirmed) == min(3, len(best))

    # The run's own heun with 6 steps may spend the budget too: 12 steps.
    assert outcome.reference.nfe == 24 and outcome.reference.chosen == {"sampler.steps": 12}
    assert outcome.winner is not None and outcome.winner.nfe <= 24
    assert outcome.winner.estimate.mean == min(m.estimate.mean for m in outcome.confirmed)

    # The winner's numbers are reproduced from its preset and the seeds alone.
    bare = load(
        shutil.copytree(run.folder, tmp_path / "bare" / run.folder.name, ignore=_bare),
        settings=read_preset(run.folder, "search"),
    )
    again = [_value(bare, n=200, seed=seed) for seed in (1, 2)]
    assert again == list(outcome.winner.values)
    record = read_json(outcome.record)
    fresh = [_value(bare, n=200, seed=seed) for seed in (11, 12, 13)]
    assert fresh == record["fresh"]["winner"]["values"]
    gaps = np.subtract(fresh, record["fresh"]["reference"]["values"])
    assert record["fresh"]["difference"] == pytest.approx(gaps.mean())
    assert record["fresh"]["stderr"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(3))
    test = scipy.stats.ttest_rel(fresh, record["fresh"]["reference"]["values"])
    assert record["fresh"]["p"] == pytest.approx(test.pvalue)
    assert (record["fresh"]["low"], record["fresh"]["high"]) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert record["beats"] == (test.pvalue <= 0.05 and gaps.mean() < 0)
    assert ("does not beat" in outcome.verdict) != record["beats"]
    assert outcome.picture.read_bytes()[:4] == b"\x89PNG"
    # In a notebook the outcome shows its table; its repr is one line.
    table = outcome._repr_markdown_().splitlines()
    assert len(table) == 2 + len(outcome.confirmed) + 1 + 2 and table[-1] == outcome.verdict
    assert sum("winner: " in row for row in table) == 1 and table[-3].startswith("| own |") and "±" in table[-3]
    assert repr(outcome) == f"SearchOutcome({outcome.verdict} {outcome.record})"
    assert repr(run).startswith("Run(") and "\n" not in repr(run)
    assert len(outcome.table.read_text().splitlines()) == len(trials) + 1

    # The same command again measures nothing.
    stamps = {p: p.stat().st_mtime_ns for p in run.folder.rglob("evaluations/*.json")}
    same = search(run, path, trials=12)
    assert {p: p.stat().st_mtime_ns for p in run.folder.rglob("evaluations/*.json")} == stamps
    assert len(trials_of(run.folder)) == len(trials) and same.verdict == outcome.verdict
    # With more trials the search continues.
    assert search(run, path, trials=14).counts["measured"] == 14
    assert [t.params for t in trials_of(run.folder)[: len(trials)]] == [t.params for t in trials]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_ties_are_called_wins_at_the_rate_of_the_test(lower_is_better: bool) -> None:
    """Two equal settings on five seeds: 2.5 % of ties are wins. "More than two standard errors" called 5.8 % wins."""
    rng, ties, seeds, config = np.random.default_rng(0), 2000, 5, assemble([Layer({})])

    def measured(values: np.ndarray) -> TrialResult:
        return TrialResult(0, {}, config, tuple(range(seeds)), tuple(values.tolist()), 1, 0.0)

    wins, old_wins = 0, 0
    for _ in range(ties):
        shared = rng.normal(0, 3, seeds)
        ours, own = (measured(shared + rng.normal(size=seeds)) for _ in range(2))
        test, wins_now = judge(ours, own, lower_is_better)
        assert test.stderr is not None
        wins += wins_now
        old_wins += (-test.difference if lower_is_better else test.difference) > 2 * test.stderr
    margin = 4 * np.sqrt(0.025 * 0.975 / ties)
    assert abs(wins / ties - 0.025) <= margin < old_wins / ties - 0.025


def _bare(folder: str, names: list[str]) -> set[str]:
    return {"samples", "evaluations", "searches"} & set(names)


def _value(run: Run, n: int, seed: int) -> float:
    return measure_run(run.with_settings(Layer({"sample": {"n": n, "seed": seed}})))[0].value


def test_one_objective_spends_its_budget(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sitkit.studies.search.trials.MAX_UNPRODUCTIVE", 25)
    text = """
objective: {metric: sliced-wasserstein, nfe: 16}
space: {sampler: [euler, heun, dopri5], sampler.grid: [uniform, cosine]}
screen: {n: 50}
confirm: {n: 60, seeds: [1, 2], fresh: [3, 4], best: 2}
"""
    outcome = search(run, written(tmp_path, text), trials=40)
    trials = trials_of(run.folder)
    done = distinct(trials)
    # Four settings are possible; the rest repeat them, and dopri5, which spends more than 16 evaluations, is refused.
    assert len(done) == 4 and {t.user_attrs["nfe"] for t in done} == {16}
    assert len({t.user_attrs["sampling"] for t in done}) == 4 and outcome.counts["repeated"] > 0
    assert any("objective.nfe allows 16" in reason for reason in outcome.refused)
    assert [m.trial for m in outcome.confirmed] == [t.number for t in sorted(done, key=lambda t: t.values[0])[:2]]


def test_a_solve_that_cannot_go_on_is_a_failed_trial(run: Run, tmp_path: Path) -> None:
    """A step of dopri5 takes six evaluations, so five never suffice; the search goes on with the other settings."""
    text = """
objective: {metric: sliced-wasserstein}
space: {sampler: [heun, {name: dopri5, max_nfe: 5}], sampler.steps: {low: 4, high: 40}}
screen: {n: 50}
confirm: {n: 60, seeds: [1, 2], fresh: [3, 4], best: 2}
"""
    outcome = search(run, written(tmp_path, text), trials=5)
    failed = [trial for trial in trials_of(run.folder) if trial.user_attrs.get("kind") == "failed"]
    assert outcome.counts["measured"] == 5 and outcome.counts["failed"] == len(failed) > 0
    for trial in failed:
        assert "cannot go on at t = " in trial.user_attrs["reason"] and "max_nfe" in trial.user_attrs["reason"]
    assert "dopri5" not in str([measured.chosen for measured in outcome.confirmed])


def test_a_space_where_nothing_is_possible_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sitkit.studies.search.trials.MAX_UNPRODUCTIVE", 5)
    text = "objective: {nfe: 3}\nspace: {sampler: [rk4]}\nscreen: {n: 20}"
    with pytest.raises(UserError, match=r"none of .* settings .*fewest steps"):
        search(run, written(tmp_path, text))


SLOW = SPACE.replace("n: 100", "n: 3000").replace("nfe: {low: 3, high: 24", "nfe: {low: 16, high: 24")


def worker(run: Run, path: Path, trials: int) -> subprocess.Popen[bytes]:
    words = ["search", str(run.folder), str(path), "--trials", str(trials)]
    return subprocess.Popen(
        [sys.executable, "-m", "sitkit", *words], cwd=path.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(run: Run, ready: Any) -> list[FrozenTrial]:
    for _ in range(1200):
        trials = trials_of(run.folder)
        if ready(trials):
            return trials
        time.sleep(0.05)
    raise AssertionError("the worker was not ready within a minute")


def test_a_killed_worker_loses_nothing(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, SLOW)
    process = worker(run, path, 7)
    try:
        wait_for(run, lambda ts: len(distinct(ts)) >= 2 and ts[-1].state == TrialState.RUNNING)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = trials_of(run.folder)
    dead = [t for t in before if t.state == TrialState.RUNNING]
    kept = len(distinct(before))
    assert len(dead) == 1 and 2 <= kept < 7

    outcome = search(run, path, trials=7)
    after = trials_of(run.folder)
    assert outcome.counts["measured"] == 7 == len(distinct(after))
    assert not [t for t in after if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    assert [t.values for t in distinct(after[: len(before)])] == [t.values for t in distinct(before)]
    # The next trial took the place of the dead one.
    lost, heir = after[dead[0].number], after[dead[0].number + 1]
    assert lost.state == TrialState.FAIL and heir.state in (TrialState.COMPLETE, TrialState.PRUNED)
    assert lost.params.items() <= heir.params.items()

    # A search without a kill has the same trials.
    whole = load(shutil.copytree(run.folder, tmp_path / "whole" / run.folder.name, ignore=_bare))
    search(whole, path, trials=7)
    expected, done = trials_of(whole.folder), [t for t in after if t.state != TrialState.FAIL]
    assert [(t.params, t.state, t.values and t.values[0]) for t in done] == [
        (t.params, t.state, t.values and t.values[0]) for t in expected
    ]


def test_a_full_disk_ends_a_search_in_one_line_and_costs_no_trial(run: Run, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the system refuses to write more, as on a full one."""
    path = written(tmp_path, SPACE)
    search(run, path, trials=2)
    largest = max(file.stat().st_size for file in (run.folder / "searches").iterdir())
    script = (
        "import resource, signal, sys; from sitkit.cli import main; size = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)); main()"
    )
    words = ["search", str(run.folder), str(path), "--trials", "40"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(largest), *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("error:") == 1, done.stderr
    measured = len(distinct(trials_of(run.folder)))
    assert 2 <= measured < 40
    assert search(run, path, trials=measured + 1).counts["measured"] == measured + 1


def test_two_processes_share_a_study(run: Run, tmp_path: Path) -> None:
    path = written(tmp_path, SLOW)
    process = worker(run, path, 7)
    try:
        wait_for(run, lambda ts: len(ts) >= 2)
        ours = search(run, path, trials=7)
        assert process.wait(60) == 0
    finally:
        process.kill()
    trials = trials_of(run.folder)
    assert len(distinct(trials)) == 7 == ours.counts["measured"]
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    done = distinct(trials)
    assert len({t.user_attrs["sampling"] for t in done}) == 7
    # Both worked: two trials ran at the same time.
    spans = sorted((t.datetime_start, t.datetime_complete) for t in trials if t.datetime_start and t.datetime_complete)
    assert any(b[0] < a[1] for a, b in itertools.pairwise(spans))


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_too_many_does_no_work(run: Run, tmp_path: Path) -> None:
    spec, axes = read_search(written(tmp_path, SPACE), run.config)
    evaluator = Evaluator(run, spec, axes, silent)
    study = open_study(evaluator, "search", None)
    objective = TrialObjective(study, evaluator, 2, "process.lock")
    with quiet():
        early = [study.ask() for _ in range(3)]
    # Two are wanted and two of lower number run already; for the second there is only one.
    with pytest.raises(EnoughTrials):
        objective(early[2])
    assert not list(run.folder.glob("samples/*"))
    objective(early[1])
    assert len(list(run.folder.glob("samples/*"))) == 1


@pytest.mark.parametrize(
    ("space", "near"),
    [
        ("{guidance: [cfg], guidance.scal: [1.0, 2.0]}", "Did you mean 'guidance.scale'"),
        ("{sampler: [euler-maruyama], sampler.lst_step: [mean]}", "Did you mean 'sampler.last_step'"),
        ("{guidance.scal: [1.0, 2.0]}", "none of the choices here. Remove it"),
    ],
)
def test_a_misspelt_field_gets_the_nearest_field_of_the_choices(
    run: Run, tmp_path: Path, space: str, near: str
) -> None:
    (tmp_path / "search.yaml").write_text(f"space: {space}\n")
    with pytest.raises(UserError, match=f"search.yaml:1: .* is a setting of .*{near}"):
        read_search(tmp_path / "search.yaml", run.config)


def test_a_preset_is_read_back_and_refused_by_name(run: Run, tmp_path: Path) -> None:
    config = sampling_config(
        run.config, layer_of({"sampler": "euler-maruyama", "sampler.last_step": "tweedie", "diffusion": "kl"})
    )
    write_preset(run.folder, "mine", config, "found by hand\nin two lines")
    back = sampling_config(run.config, read_preset(run.folder, "mine"))
    assert (back.sampler, back.diffusion, back.guidance) == (config.sampler, config.diffusion, config.guidance)
    with pytest.raises(UserError, match="Did you mean 'mine'"):
        read_preset(run.folder, "mien")
    with pytest.raises(UserError, match="sitkit search"):
        read_preset(tmp_path, "mine")
    # One of the same name that says how to train is another thing.
    with pytest.raises(UserError, match=r"no way of sampling 'digits'.*'digits' is a preset of `sitkit train`"):
        read_preset(run.folder, "digits")
    (run.folder / "presets" / "odd.yaml").write_text("sampler: heun\ntrain: {lr: 1}\n")
    with pytest.raises(UserError, match=r"odd\.yaml:2: .*'train'"):
        read_preset(run.folder, "odd")


def test_the_search_of_the_experiments_is_valid() -> None:
    given = {"backbone": "sit-xs/2", "sampler": {"name": "heun", "steps": 25}}
    spec, axes = read_search(ROOT / "experiments" / "search.yaml", assemble([Layer(given)]))
    assert spec.objective.nfe == 50 and {axis.key for axis in axes} == set(spec.space)


@pytest.mark.parametrize("name", ["my%20 runs", "a?b", "a#b"])
def test_the_database_of_a_search_is_in_its_folder_for_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    optuna.create_study(storage=database_url(tmp_path / name / "s.db"))
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.db")] == [f"{name}/s.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
