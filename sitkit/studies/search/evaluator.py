"""Evaluate one setting of a search on a set of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sitkit.results.statistics import CellValue, Estimate, estimate
from sitkit.runs.config.schema import Config
from sitkit.runs.evaluate import measure_run
from sitkit.runs.one_file import weights_name
from sitkit.runs.run import Run, sampling_config
from sitkit.runtime.progress import Progress
from sitkit.solvers.sampler import SolveSpec
from sitkit.studies.search.space import Axis, Search, layer_of, metric_of, steps_within_budget


class TrialResult(NamedTuple):
    """One setting measured on several sampling seeds: the metric's values, and NFE and seconds per sample.

    `trial` is -1 for the run's own setting.
    """

    trial: int
    chosen: dict[str, Any]
    config: Config
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    nfe: int
    seconds: float

    @property
    def cells(self) -> list[CellValue]:
        """The values with their seeds: all sampling seeds of one training."""
        return [CellValue(0, seed, value) for seed, value in zip(self.seeds, self.values, strict=True)]

    @property
    def estimate(self) -> Estimate:
        """The mean over seeds with its standard error and interval."""
        return estimate(self.cells)


class Evaluator:
    """What a trial is tried on: the run with each kind of weights, at a size and seed."""

    def __init__(self, run: Run, quest: Search, axes: list[Axis], progress: Progress) -> None:
        self.run, self.quest, self.axes, self.progress = run, quest, axes, progress
        self.metric = metric_of(quest)
        self._runs = {run.weights_name: run}

    def at(self, config: Config) -> Run:
        """The run with this configuration and the weights it asks for."""
        name = weights_name(config)
        self._runs[name] = self._runs.get(name, self.run).with_settings(config)
        return self._runs[name]

    def setting(self, chosen: Mapping[str, Any], n: int, seed: int) -> Config:
        """The run's configuration with these settings, to draw n samples from a seed and measure the search's metric."""
        config = sampling_config(self.run.config, layer_of(chosen))
        drawn = config.sample.model_copy(update={"n": n, "seed": seed})
        return config.model_copy(update={"sample": drawn, "metric": (self.metric,)})

    def cost(self, config: Config) -> int | None:
        """Evaluations a sample, None where an adaptive solver will tell.  Raises UserError for what cannot be right."""
        run = self.at(config)
        sampler, diffusion = config.sampler.bind(run), config.diffusion.bind(run)
        return sampler.plan(SolveSpec(config.interp, config.target, diffusion, config.guidance)).nfe

    def afford(self, chosen: dict[str, Any], budget: int) -> dict[str, Any]:
        """The settings with as many steps as a budget of evaluations allows."""
        config = self.setting(chosen, 2, 0)
        if not hasattr(config.sampler, "steps"):
            return chosen
        run = self.at(config)
        config = config.model_copy(update={"sampler": config.sampler.bind(run)})
        return {**chosen, "sampler.steps": steps_within_budget(config, config.diffusion.bind(run), budget)}

    def measure(self, config: Config) -> tuple[float, int, float]:
        """The metric, evaluations and seconds a sample."""
        said = self.progress
        (done,) = measure_run(self.at(config), lambda event: said(event) if event.message else None)
        return done.value, done.nfe, done.record["sampling"]["seconds"] / done.n

    def confirm(self, trial: int, chosen: dict[str, Any], seeds: Sequence[int]) -> TrialResult:
        """A setting measured with each of the seeds, at the confirmation's size."""
        configs = [self.setting(chosen, self.quest.confirm.n, seed) for seed in seeds]
        each = [self.measure(config) for config in configs]
        seconds = statistics.fmean(second for *_, second in each)
        values, nfe = tuple(value for value, *_ in each), max(nfe for _, nfe, _ in each)
        return TrialResult(trial, chosen, configs[0], tuple(seeds), values, nfe, seconds)

    def better(self, a: float, b: float) -> bool:
        """Whether a is the better value of the metric."""
        return a < b if self.metric.lower_is_better else a > b
