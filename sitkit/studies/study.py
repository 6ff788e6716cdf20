"""Studies: rows and columns, crossed into cells; each cell is a number to measure.

    base: digits                                   # a preset, or a file
    set: {sampler: euler-maruyama}                 # settings of every cell
    rows: [{label: Linear, interp: linear, paper: {kl: 33.6}}]
    columns: {kl: {diffusion: kl}}                 # named settings, crossed with the rows
    grid: {train.lr: [1e-3, 1e-4]}                 # axes, all crossed with the columns
    exclude: [{interp: linear, train.lr: 1e-3}]    # cells to leave out
    seeds: [0, 1, 2]                               # training seeds
    sample_seeds: [0, 1]                           # sampling seeds, each with every training
    show: [kl, nfe]                                # the columns of the printed table
    setting: {data: ImageNet 256, train.steps: 400000}      # the setting of the reference numbers
    bases: {imagenet256: {set: {...}}}             # changes of the study on another base

Nothing here trains or samples: a study is read, crossed and checked.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

from pydantic import Field, field_validator

from sitkit.data.dataset import load_examples
from sitkit.models.autoencoder import median_std
from sitkit.registry.measures import Untrained
from sitkit.results.study_results import PublishedNumber
from sitkit.runs.config.identity import label
from sitkit.runs.config.schema import MOST_SEED, Config, Settings
from sitkit.runs.config.sources import Layer
from sitkit.runs.sample import plan_solve
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name
from sitkit.solvers.sampler import Plan, Sampler, SolveSpec

Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]
Seeds = tuple[Seed, ...]


class StudyFlags(TypedDict, total=False):
    """The keyword arguments of `ablate` and `check`: what takes the place of a study's own settings."""

    base: str | None
    seeds: Sequence[int] | None
    sample_seeds: Sequence[int] | None
    runs: str | Path | None
    device: str | None
    settings: Mapping[str, Any] | Layer | None


class Study(Settings):
    """A study as its file says it.

    rows: settings with a `label`; in `columns` settings of the row in one column alone; in `paper` a reference number, or
    a number for each column, or {value, source, setting} in the place of a number.
    columns: settings by name.  grid: dotted keys and the values to cross.  exclude: the cells to leave out, by `row`, by
    `column`, or by dotted keys and values as the file writes them.
    seeds, sample_seeds: of training and sampling; by default each cell's own train.seed and sample.seed.
    show: names of columns, "n", "nfe" or dotted settings, in the order of the printed tables; by default the columns.
    source, setting: the source of the reference numbers, and the setting that they were measured in.
    bases: for each base that the study can run on, the keys of the study that it changes (set, columns, metric, ...).
    """

    title: str = ""
    source: str = ""
    setting: dict[str, Any] = {}
    base: str = "digits"
    set: dict[str, Any] = {}
    bases: dict[str, dict[str, Any]] = {}
    rows: tuple[dict[str, Any], ...] = Field(({},), min_length=1)
    columns: dict[str, dict[str, Any]] = {}
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = {}
    exclude: tuple[dict[str, Any], ...] = ()
    seeds: Seeds | None = Field(None, min_length=1)
    sample_seeds: Seeds | None = Field(None, min_length=1)
    show: tuple[str, ...] = ()
    metric: str | dict[str, Any] | None = None

    @field_validator("seeds", "sample_seeds")
    @classmethod
    def _distinct(cls, seeds: Seeds | None) -> Seeds | None:
        if seeds is not None and len(set(seeds)) < len(seeds):
            raise ValueError(f"each seed once; got {list(seeds)}.")
        return seeds


@dataclass(frozen=True, slots=True)
class Refused:
    """A cell that is impossible, with file, line and reason."""

    row: str
    column: str
    reason: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A number to measure: a row, a column, two seeds, and their configuration.  place: "file:line: " of the row."""

    row: str
    column: str
    seed: int
    sample_seed: int
    config: Config
    reference: PublishedNumber | None
    place: str = ""

    def refused(self, reason: str) -> Refused:
        """Return the cell as an impossible one."""
        return Refused(self.row, self.column, refused_at(self.place, self.row, self.column, reason))


@dataclass(frozen=True)
class StudyPlan:
    """A study and its cells in the order of the file, impossible ones included; command: the command that runs it."""

    study: Study
    file: Path
    base: str | None
    entries: list[Cell | Refused]
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name, and the base if it is not the study's own."""
        return file_name("-".join(filter(None, (self.file.stem, Path(self.base).stem if self.base else ""))))

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """The possible cells."""
        return [entry for entry in self.entries if isinstance(entry, Cell)]

    @functools.cached_property
    def refused(self) -> list[Refused]:
        """The impossible cells."""
        return [entry for entry in self.entries if isinstance(entry, Refused)]

    def require(self) -> None:
        """Raise UserError with file, line and reason for the first impossible cell."""
        if self.refused:
            others, command = len(self.refused) - 1, f"sitkit check {shlex.quote(str(self.file))}"
            more = f" And {others} more of the cells: `{command}` names them." if others else ""
            raise UserError(f"{self.refused[0].reason}{more}")


def refused_at(place: str, row: str, column: str, why: str) -> str:
    """Return the reason why a cell is impossible, with the line of its row and its name."""
    return f"{place}row {row!r}{f', {column}' if column else ''}: {why}" if row else f"{place}{why}"


def plan_untrained(config: Config) -> Plan | str:
    """Return the plan of a configuration's sampler before there is a trained run, or why samples cannot be right.

    The spread of the data is measured, if they are here and an SDE is solved.  Finite positive values stand in for
    measurements on that run.
    """
    std = None
    if config.sampler.stochastic:
        with contextlib.suppress(UserError):
            std = median_std(config.autoencoder, load_examples(config.data))
    return _plan_untrained(config.sampler, config.solve_spec, std)


@functools.lru_cache(maxsize=4096)
def _plan_untrained(sampler: Sampler, spec: SolveSpec, std: float | None) -> Plan | str:
    try:
        return plan_solve(sampler, spec, Untrained(std))
    except UserError as error:
        return str(error)


def describe_setting(config: Config, key: str) -> str:
    """Return a setting as a table shows it: a component by its shortest name, anything else by its value."""
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)
    return label(value) if hasattr(value, "name") else str(value)
