"""What a search looks for and where: a file of dotted settings with their choices or ranges.

    objective: {metric: frechet, against: nfe, nfe: 50}    # the front of metric and evaluations, at most 50 of them
    space:
      sampler: [heun, euler-maruyama]                      # a list is a choice
      diffusion: [sigma, kl]
      diffusion.norm: {low: 0.3, high: 3, log: true}       # two ends are a range: whole numbers if both ends are
      nfe: {low: 8, high: 50}                              # as many steps as so many evaluations allow
    screen: {n: 500, seed: 0}                              # what each trial draws
    confirm: {n: 1797, seeds: [1, 2, 3], best: 5}          # what the best of them draw again

A setting counts only where it exists: `diffusion` and its fields with a stochastic sampler, a component's field with the
components that have it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from sitkit.evaluation.metrics.metric import Metric
from sitkit.registry import metrics
from sitkit.registry.settings_files import experiments
from sitkit.runs.config.mappings import flat, nest
from sitkit.runs.config.schema import Config, Settings
from sitkit.runs.config.sources import Layer, locate, read_yaml, validate
from sitkit.runs.run import sampling_config
from sitkit.runtime.errors import UserError, suggest
from sitkit.solvers.sampler import SolveSpec
from sitkit.transport.diffusion import Diffusion

PARTS = ("sampler.", "diffusion.", "guidance.")
ROOTS = ("sampler", "diffusion", "guidance", "sample.weights", "sample.ema", "nfe")


class SearchGoal(Settings):
    """The metric to better, what it is weighed against (nothing: the metric alone), and the most evaluations a sample."""

    metric: str | dict[str, Any] = "frechet"
    against: Literal["nfe", "seconds"] | None = None
    nfe: int | None = Field(None, ge=1)


class Screen(Settings):
    """What every trial draws: the same samples' noise for all of them."""

    n: int = Field(500, ge=2)
    seed: int = Field(0, ge=0)


class Confirm(Settings):
    """What the `best` trials draw again, so that luck on the screen's seed is not taken for merit.

    seeds choose the winner among them; `fresh` seeds, which chose nothing, compare it with the run's own setting.
    """

    n: int = Field(1797, ge=2)
    seeds: tuple[int, ...] = Field((1, 2, 3), min_length=2)
    fresh: tuple[int, ...] = Field((101, 102, 103, 104, 105), min_length=2)
    best: int = Field(5, ge=1)


class Search(Settings):
    """A search as people write it.  heartbeat: seconds between a worker's signs of life; silent thrice as long, it is dead."""

    title: str = ""
    objective: SearchGoal = SearchGoal.model_validate({})
    space: dict[str, Any] = Field(min_length=1)
    screen: Screen = Screen.model_validate({})
    confirm: Confirm = Confirm.model_validate({})
    trials: int = Field(50, ge=1)
    seed: int = Field(0, ge=0)
    storage: str | None = None
    heartbeat: int = Field(10, ge=1)


class Range(Settings):
    """Numbers from low to high: whole if both are (and step is), spaced by step or evenly in the logarithm."""

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high; got {self.low} and {self.high}.")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step.")
        if self.step is not None and self.step <= 0:
            raise ValueError(f"step must be positive; got {self.step}.")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return all(isinstance(v, int) for v in (self.low, self.high, self.step or 1))


class Axis(NamedTuple):
    """One setting that is searched: its choices, or its range, and where each was written."""

    key: str
    place: str
    choices: tuple[Any, ...] = ()
    range: Range | None = None
    places: tuple[str, ...] = ()

    def written(self) -> Iterator[tuple[Any, str]]:
        """The choices, or the ends of the range, with their places."""
        if self.range is not None:
            return iter([(self.range.low, self.place), (self.range.high, self.place)])
        return zip(self.choices, self.places, strict=True)


def plain_choice(value: Any) -> Any:
    """A choice as a plain value that a table or a database takes: itself, or its JSON."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def read_search(path: Path | str, config: Config) -> tuple[Search, list[Axis]]:
    """The search in a file, or an experiment by name, and its axes, outer settings first.

    Raises UserError with file and line for a key that is no setting of sampling, one that exists with none of the
    choices, and a choice that no combination takes.
    """
    layer = read_yaml(experiments.find(path))
    search: Search = validate(Search, layer.values, layer.where)
    _metric(search, layer)
    axes = [_axis(key, value, layer) for key, value in search.space.items()]
    axes.sort(key=lambda axis: (axis.key == "nfe", axis.key.count(".")))
    keys = [axis.key for axis in axes]
    if "nfe" in keys and "sampler.steps" in keys:
        raise UserError(f"{axes[keys.index('nfe')].place}nfe sets sampler.steps: search one of the two.")
    for axis in axes:
        _check(axis, axes, config)
    return search, axes


def metric_of(search: Search) -> Metric:
    """The metric that is searched by."""
    return metrics.parse(search.objective.metric)


def _metric(search: Search, layer: Layer) -> None:
    try:
        metric_of(search)
    except UserError as error:
        raise UserError(f"{locate(layer.where, ['objective', 'metric'])}{error}") from None


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
        if key == "nfe" and not all(type(v) is int and v > 0 for v in value):
            raise UserError(f"{place}nfe must be whole numbers above 0; got {value}.")
        places = tuple(locate(layer.where, [f"space.{key}.{i}"]) or place for i in range(len(value)))
        return Axis(key, place, tuple(value), places=places)
    if not (isinstance(value, Mapping) and {"low", "high"} <= set(value)):
        raise UserError(f"{place}{key}: give a list of choices, or {{low: ..., high: ...}}; got {value!r}.")
    try:
        bounds: Range = validate(Range, value, {})
    except UserError as error:
        raise UserError(f"{place}{key}: {error}") from None
    if key == "nfe" and not (bounds.whole and bounds.low > 0):
        raise UserError(f"{place}nfe must be whole numbers above 0; got {bounds.low} to {bounds.high}.")
    return Axis(key, place, range=bounds)


def _check(axis: Axis, axes: Sequence[Axis], config: Config) -> None:
    """Every choice must be right in some combination of the settings that it stands in; impossible pairs are for later."""
    around = [a for a in axes if a is not axis and (axis.key.startswith(f"{a.key}.") or a.key == "sampler")]
    bases: list[dict[str, Any]] = []
    known: set[str] = set()
    for values in itertools.product(*([value for value, _ in a.written()] for a in around)):
        chosen = dict(zip((a.key for a in around), values, strict=True))
        try:
            possible = sampling_config(config, layer_of(chosen))
            fields = (key for key in flat(possible.plain()) if key.startswith(PARTS) and not key.endswith(".name"))
            known.update(key for key in fields if in_force(possible, key))
            if in_force(possible, axis.key):
                bases.append(chosen)
        except UserError:
            continue
    if not bases:
        raise UserError(
            f"{axis.place}{axis.key} is a setting of none of the choices here.{suggest(axis.key, sorted(known))} "
            "Remove it, or add a choice that has it."
        )
    if axis.key == "nfe":
        return
    for value, place in axis.written():
        failure: UserError | None = None
        for chosen in bases:
            try:
                sampling_config(config, layer_of({**chosen, axis.key: value}, {axis.key: place.removesuffix(": ")}))
                break
            except UserError as error:
                failure = error
        else:
            raise failure or UserError(f"{place}{axis.key} = {value!r} cannot be.")


def in_force(config: Config, key: str) -> bool:
    """Whether a setting exists and matters in a configuration."""
    root, *parts = key.split(".")
    if root == "diffusion" and not config.sampler.stochastic:
        return False
    if key == "nfe":
        return hasattr(config.sampler, "steps")
    node: Any = config.plain()
    for part in (root, *parts):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def layer_of(chosen: Mapping[str, Any], where: Mapping[str, str] | None = None) -> Layer:
    """Dotted settings as a layer, `nfe` left out: it is spent by `within`."""
    return Layer(nest({key: value for key, value in chosen.items() if key != "nfe"}), dict(where or {}))


def steps_within_budget(config: Config, diffusion: Diffusion, budget: int) -> int:
    """The most steps of a configuration's sampler that spend at most `budget` evaluations a sample.

    Raises UserError where not even the fewest do, or where so few give no right samples.
    """

    def cost(steps: int) -> int:
        sampler = sampling_config(config, layer_of({"sampler.steps": steps})).sampler
        return sampler.plan(SolveSpec(config.interp, config.target, diffusion, config.guidance)).nfe or 0

    steps = budget
    while (spent := cost(steps)) > budget:
        steps = min(steps - 1, steps * budget // spent)
        if steps < 1:
            raise UserError(
                f"sampler {config.sampler.name!r} spends more than {budget} evaluations on its fewest steps."
            )
    while cost(steps + 1) <= budget:
        steps += 1
    return steps
