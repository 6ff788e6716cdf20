"""Evaluate one setting of a search on a set of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sitkit.registry import metrics
from sitkit.results.statistics import Estimate, SeedPair, estimate
from sitkit.runs.config.schema import Config
from sitkit.runs.evaluate import measure_run
from sitkit.runs.one_file import weights_name
from sitkit.runs.run import Run, sampling_config
from sitkit.runs.sample import plan_solve
from sitkit.runtime.progress import Progress
from sitkit.studies.search.space import Axis, Search, layer_of, steps_within_budget


class TrialResult(NamedTuple):
    """A setting, measured on several sampling seeds: the metric's values, and evaluations and seconds a sample.

    trial: its number, -1 for the run's own setting.
    """

    trial: int
    chosen: dict[str, Any]
    config: Config
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    nfe: int
    seconds: float

    @property
    def numbers(self) -> dict[SeedPair, Estimate]:
        """The values by seed: sampling seeds of one training."""
        return {(0, seed): Estimate(value) for seed, value in zip(self.seeds, self.values, strict=True)}

    @property
    def estimate(self) -> Estimate:
        """The mean over seeds with its standard error and interval."""
        return estimate(self.numbers)


class Evaluator:
    """Measures settings of a search on its run, with the weights that each setting names."""

    def __init__(self, run: Run, spec: Search, axes: list[Axis], progress: Progress) -> None:
        self.run, self.spec, self.axes, self.progress = run, spec, axes, progress
        self.metric = metrics.parse(spec.objective.metric)
        self._runs = {run.weights_name: run}

    def run_with(self, config: Config) -> Run:
        """Return the run with a configuration and the weights that it names."""
        name = weights_name(config)
        self._runs[name] = self._runs.get(name, self.run).with_settings(config)
        return self._runs[name]

    def setting(self, chosen: Mapping[str, Any], n: int, seed: int) -> Config:
        """Return the run's configuration with the chosen settings, the search's metric, and n samples from a seed."""
        config = sampling_config(self.run.config, layer_of(chosen))
        sample = config.sample.model_copy(update={"n": n, "seed": seed})
        return config.model_copy(update={"sample": sample, "metric": (self.metric,)})

    def cost(self, config: Config) -> int | None:
        """Return the evaluations a sample, None for an adaptive solver.  Raises UserError if samples cannot be right."""
        return plan_solve(config.sampler, config.solve_spec, self.run_with(config)).nfe

    def within_budget(self, chosen: dict[str, Any], budget: int) -> dict[str, Any]:
        """Return the settings with as many steps as a budget of evaluations allows."""
        config = self.setting(chosen, 2, 0)
        if not hasattr(config.sampler, "steps"):
            return chosen
        return {**chosen, "sampler.steps": steps_within_budget(config, self.run_with(config), budget)}

    def measure(self, config: Config) -> tuple[float, int, float]:
        """Return the metric, and the evaluations and seconds a sample."""
        (number,) = measure_run(self.run_with(config), lambda event: self.progress(event) if event.message else None)
        return number.value, number.nfe, number.record["sampling"]["seconds"] / number.n

    def confirm(self, trial: int, chosen: dict[str, Any], seeds: Sequence[int]) -> TrialResult:
        """Measure a setting with each of the seeds, on the number of samples of the confirmation."""
        configs = [self.setting(chosen, self.spec.confirm.n, seed) for seed in seeds]
        measured = [self.measure(config) for config in configs]
        seconds = statistics.fmean(seconds for *_, seconds in measured)
        values, nfe = tuple(value for value, *_ in measured), max(nfe for _, nfe, _ in measured)
        return TrialResult(trial, chosen, configs[0], tuple(seeds), values, nfe, seconds)
