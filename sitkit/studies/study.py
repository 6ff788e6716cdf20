"""Studies: a file of rows and columns, crossed into cells, each of them one number to be had.

    base: digits                                   # a preset, or a file
    set: {sampler: euler-maruyama}                 # settings of every cell
    rows: [{label: Linear, interp: linear, paper: {kl: 33.6}}]
    columns: {kl: {diffusion: kl}}                 # named settings, crossed with the rows
    grid: {train.lr: [1e-3, 1e-4]}                 # axes, all crossed with the columns
    exclude: [{interp: linear, train.lr: 1e-3}]    # cells that are not wanted
    seeds: [0, 1, 2]                               # training seeds
    sample_seeds: [0, 1]                           # sampling seeds, each with every training
    show: [kl, nfe]                                # what the printed table shows
    setting: {data: ImageNet 256, train.steps: 400000}      # what the reference numbers were measured with
    bases: {imagenet256: {set: {...}}}             # what another base changes in the study

Nothing here trains or samples: a study is read, crossed and checked.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from sitkit.registry.measures import UNTRAINED
from sitkit.results.study_results import PublishedNumber
from sitkit.runs.config.identity import label, training_identity
from sitkit.runs.config.schema import Config, Settings
from sitkit.runs.sample import plan_solve
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import file_name

Seeds = tuple[Annotated[int, Field(ge=0)], ...]
# What is measured on a trained run, before there is one.


class Study(Settings):
    """An ablation as people write it.

    rows: settings with a `label`; in `columns` settings of the row in one column alone; in `paper` a reference number, or
    one for each column, or {value, source, setting} in the place of a number.
    columns: settings by name.  grid: dotted keys and the values to cross.  exclude: what the cells that are left out have
    in common, by `row`, by `column`, or by dotted keys and values as the file writes them.
    seeds, sample_seeds: of training and sampling; by default each cell's own train.seed and sample.seed.
    show: names of columns, "n", "nfe" or dotted settings, in the order in which the printed tables show them; by default
    the columns.  source, setting: where the reference numbers come from, and what they were measured with.
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
class Cell:
    """One number to be had: a row, a column, two seeds, and the configuration they make.  place: "file:line: " of the row."""

    row: str
    column: str
    seed: int
    sample_seed: int
    config: Config
    reference: PublishedNumber | None
    place: str = ""

    @property
    def paper(self) -> float | None:
        """The published number."""
        return self.reference.number if self.reference else None


@dataclass(frozen=True, slots=True)
class Refused:
    """A cell that cannot be, with file, line and reason."""

    row: str
    column: str
    reason: str


@dataclass(frozen=True)
class StudyPlan:
    """A study and its cells in the order of the file, the impossible ones among them; command: what does it again."""

    study: Study
    file: Path
    base: str | None
    entries: list[Cell | Refused]
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name, and the base where it is not the study's own."""
        return file_name("-".join(filter(None, (self.file.stem, Path(self.base).stem if self.base else ""))))

    @functools.cached_property
    def cells(self) -> list[Cell]:
        """The cells that can be."""
        return [entry for entry in self.entries if isinstance(entry, Cell)]

    @functools.cached_property
    def refused(self) -> list[Refused]:
        """The cells that cannot be."""
        return [entry for entry in self.entries if isinstance(entry, Refused)]

    def require(self) -> None:
        """Raises UserError with file, line and reason for the first cell that cannot be."""
        if self.refused:
            others = len(self.refused) - 1
            more = (
                f" And {others} more of the cells: `sitkit check {shlex.quote(str(self.file))}` names them."
                if others
                else ""
            )
            raise UserError(f"{self.refused[0].reason}{more}")


def refused_at(place: str, row: str, column: str, why: str) -> str:
    """The reason why a cell cannot be, with where its row stands and which it is."""
    return f"{place}row {row!r}{f', {column}' if column else ''}: {why}" if row else f"{place}{why}"


def refusal(config: Config) -> str:
    """Why samples of a configuration could not be right, or "": known before anything is trained."""
    try:
        plan_solve(config, UNTRAINED)
    except UserError as error:
        return str(error)
    return ""


def trainings(cells: Sequence[Cell]) -> dict[str, Config]:
    """The distinct trainings of the cells, by identity."""
    return {training_identity(cell.config): cell.config for cell in cells}


def describe_setting(config: Config, key: str) -> str:
    """A setting as a table shows it: a component by its shortest name, anything else by its value."""
    value: Any = config
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, tuple) else getattr(value, part)
    return label(value) if hasattr(value, "name") else str(value)
