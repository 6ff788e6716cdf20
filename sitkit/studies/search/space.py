"""The file of a search: its goal, and the settings that it varies, by dotted key, with choices or ranges.

    objective: {metric: frechet, against: nfe, nfe: 50}    # the front of metric and evaluations, at most 50 a sample
    space:
      sampler: [heun, euler-maruyama]                      # a list holds choices
      diffusion: [sigma, kl]
      diffusion.norm: {low: 0.3, high: 3, log: true}       # low and high are a range; of whole numbers if both are whole
      nfe: {low: 8, high: 50}                              # as many steps as this number of evaluations allows
    screen: {n: 500, seed: 0}                              # samples of each trial
    confirm: {n: 1797, seeds: [1, 2, 3], best: 5}          # samples of the best trials, drawn again

A setting has an effect only where it exists: `diffusion` and its fields with a stochastic sampler, the field of a
component with the components that have it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from sitkit.registry import metrics
from sitkit.registry.measures import Measures
from sitkit.registry.settings_files import experiments
from sitkit.runs.config.mappings import flat, nest
from sitkit.runs.config.schema import MOST_SAMPLES, MOST_SEED, Config, Settings
from sitkit.runs.config.sources import Layer, locate, read_yaml, validate
from sitkit.runs.run import sampling_config
from sitkit.runtime.errors import UserError, suggest
from sitkit.studies.study import Seed

PARTS = ("sampler.", "diffusion.", "guidance.")
ROOTS = ("sampler", "diffusion", "guidance", "sample.weights", "sample.ema", "nfe")


# A bound far above every use.
MOST_TRIALS = 10**6


class SearchGoal(Settings):
    """The goal of a search.

    metric: the metric to improve.  against: the cost that it is weighed against; None for the metric alone.  nfe: the
    largest number of evaluations a sample.
    """

    metric: str | dict[str, Any] = "frechet"
    against: Literal["nfe", "seconds"] | None = None
    nfe: int | None = Field(None, ge=1, le=10**9)

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | dict[str, Any]) -> str | dict[str, Any]:
        metrics.parse(metric)
        return metric


class Screen(Settings):
    """The samples that every trial draws, all from the same noise."""

    n: int = Field(500, ge=2, le=MOST_SAMPLES)
    seed: int = Field(0, ge=0, le=MOST_SEED)


class Confirm(Settings):
    """The samples that the `best` trials draw again, so that a lucky screen seed does not decide.

    seeds: they choose the winner.  fresh: seeds that chose nothing; they compare the winner with the run's own setting.
    """

    n: int = Field(1797, ge=2, le=MOST_SAMPLES)
    seeds: tuple[Seed, ...] = Field((1, 2, 3), min_length=2)
    fresh: tuple[Seed, ...] = Field((101, 102, 103, 104, 105), min_length=2)
    best: int = Field(5, ge=1, le=MOST_TRIALS)


class Search(Settings):
    """A search as its file says it.

    heartbeat: seconds between two signs of life of a worker; one that is silent for three times as long counts as dead.
    """

    title: str = ""
    objective: SearchGoal = SearchGoal.model_validate({})
    space: dict[str, Any] = {}
    screen: Screen = Screen.model_validate({})
    confirm: Confirm = Confirm.model_validate({})
    trials: int = Field(50, ge=1, le=MOST_TRIALS)
    seed: int = Field(0, ge=0, le=MOST_SEED)
    storage: str | None = None
    heartbeat: int = Field(10, ge=1, le=10**6)


class Range(Settings):
    """Numbers from low to high, spaced by step or evenly in the logarithm; whole if low, high and step are."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not all(-(2**53) <= number <= 2**53 for number in (self.low, self.high, self.step or 0)):
            raise ValueError(f"low, high and step must lie within 2^53; got {self.low}, {self.high} and {self.step}.")
        if not self.low < self.high:
            raise ValueError(f"low must be below high; got {self.low} and {self.high}.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step.")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be positive; got {self.step}.")
        return self

    @property
    def whole(self) -> bool:
        """True if the range has only whole numbers."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))


class Axis(NamedTuple):
    """A setting that is searched: its choices or its range, with the line of each in the file."""

    key: str
    place: str
    choices: tuple[Any, ...] = ()
    range: Range | None = None
    places: tuple[str, ...] = ()

    def written(self) -> Iterator[tuple[Any, str]]:
        """Return the choices, or the ends of the range, with their places."""
        if self.range is not None:
            return iter([(self.range.low, self.place), (self.range.high, self.place)])
        return zip(self.choices, self.places, strict=True)


def plain_choice(value: Any) -> Any:
    """Return a choice as a value that a table or a database takes: itself, or its JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def read_search(path: Path | str, config: Config) -> tuple[Search, list[Axis]]:
    """Return the search in a file, or the experiment of that name, and its axes, outer settings first.

    Raises UserError with file and line for a key that is not a setting of sampling, for a setting that exists with none
    of the choices, and for a choice that is valid in no combination.
    """
    path = experiments.find(path)
    layer = read_yaml(path)
    search: Search = validate(Search, layer.values, layer.where)
    if not search.space:
        place = locate(layer.where, ["space"]) or f"{path}: "
        raise UserError(
            f"{place}the key `space` is missing or empty: write the settings to search with their choices, as in "
            "`space: {sampler: [heun, euler-maruyama], nfe: {low: 8, high: 50}}`."
        )
    axes = [_axis(key, value, layer) for key, value in search.space.items()]
    axes.sort(key=lambda axis: (axis.key == "nfe", axis.key.count(".")))
    keys = [axis.key for axis in axes]
    if "nfe" in keys and "sampler.steps" in keys:
        raise UserError(f"{axes[keys.index('nfe')].place}nfe sets sampler.steps: search one of the two.")
    for axis in axes:
        combinations = _combinations(axis, axes, config)
        _require_existing(axis, combinations)
        _require_valid_choices(
            axis, [chosen for chosen, possible in combinations if in_force(possible, axis.key)], config
        )
    return search, axes


def _axis(key: str, value: Any, layer: Layer) -> Axis:
    place = locate(layer.where, [f"space.{key}"])
    if not any(key == root or key.startswith(f"{root}.") for root in ROOTS):
        raise UserError(
            f"{place}{key!r} cannot be searched.{suggest(key, ROOTS)} After training these can: {', '.join(ROOTS)}, "
            "and fields of components (sampler.steps)."
        )
    if isinstance(value, list):
        if not value:
            raise UserError(f"{place}{key} has no choice.")
        places = tuple(locate(layer.where, [f"space.{key}.{i}"]) or place for i in range(len(value)))
        axis = Axis(key, place, tuple(value), places=places)
    elif isinstance(value, Mapping) and {"low", "high"} <= set(value):
        try:
            axis = Axis(key, place, range=validate(Range, value, {}))
        except UserError as error:
            raise UserError(f"{place}{key}: {error}") from None
    else:
        raise UserError(f"{place}{key}: give a list of choices, or {{low: ..., high: ...}}; got {value!r}.")
    whole = axis.range.whole if axis.range is not None else all(type(number) is int for number in axis.choices)
    if key == "nfe" and not (whole and all(number > 0 for number, _ in axis.written())):
        raise UserError(f"{place}nfe must be whole numbers above 0; got {value}.")
    return axis


def _combinations(axis: Axis, axes: Sequence[Axis], config: Config) -> list[tuple[dict[str, Any], Config]]:
    """Return the valid choices of the settings on which an axis depends, each with its configuration."""
    around = [a for a in axes if a is not axis and (axis.key.startswith(f"{a.key}.") or a.key == "sampler")]
    combinations = []
    for values in itertools.product(*([value for value, _ in a.written()] for a in around)):
        chosen = dict(zip((a.key for a in around), values, strict=True))
        with contextlib.suppress(UserError):
            combinations.append((chosen, sampling_config(config, layer_of(chosen))))
    return combinations


def _require_existing(axis: Axis, combinations: Sequence[tuple[dict[str, Any], Config]]) -> None:
    """Raise UserError for a setting that exists in no combination."""
    if any(in_force(possible, axis.key) for _, possible in combinations):
        return
    fields = {(key, in_force(possible, key)) for _, possible in combinations for key in flat(possible.plain())}
    known = sorted(key for key, exists in fields if exists and key.startswith(PARTS) and not key.endswith(".name"))
    raise UserError(
        f"{axis.place}{axis.key} is a setting of none of the choices here.{suggest(axis.key, known)} "
        "Remove it, or add a choice that has it."
    )


def _require_valid_choices(axis: Axis, combinations: Sequence[dict[str, Any]], config: Config) -> None:
    """Raise UserError for a choice that is valid in no combination; a trial refuses the combinations that are not."""
    for value, place in axis.written() if axis.key != "nfe" else ():
        failure = None
        for chosen in combinations:
            try:
                sampling_config(config, layer_of({**chosen, axis.key: value}, {axis.key: place.removesuffix(": ")}))
                break
            except UserError as error:
                failure = error
        else:
            assert failure is not None
            raise failure


def in_force(config: Config, key: str) -> bool:
    """Return whether a setting exists in a configuration and has an effect."""
    if key == "nfe":
        return hasattr(config.sampler, "steps")
    if key.partition(".")[0] == "diffusion" and not config.sampler.stochastic:
        return False
    node: Any = config.plain()
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def layer_of(chosen: Mapping[str, Any], where: Mapping[str, str] | None = None) -> Layer:
    """Return dotted settings as a layer, without `nfe`, which sets the number of steps."""
    return Layer(nest({key: value for key, value in chosen.items() if key != "nfe"}), dict(where or {}))


def steps_within_budget(config: Config, run: Measures, budget: int) -> int:
    """Return the largest number of steps with which a configuration's sampler spends at most `budget` evaluations a sample.

    run: where components measure what they need.
    Raises UserError if one step spends more, and if samples with the steps cannot be right.
    """

    # Bound once: a measurement on the run is a file.
    solve = dataclasses.replace(config.solve_spec, diffusion=config.diffusion.bind(run))

    def cost(steps: int) -> int:
        sampler = sampling_config(config, layer_of({"sampler.steps": steps})).sampler
        return sampler.bind(run).plan(solve).nfe or 0

    steps = budget
    while (spent := cost(steps)) > budget:
        steps = min(steps - 1, steps * budget // spent)
        if steps < 1:
            raise UserError(f"sampler {config.sampler.name!r} spends over {budget} evaluations on its fewest steps.")
    while cost(steps + 1) <= budget:
        steps += 1
    return steps
