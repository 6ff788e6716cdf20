"""What a study or a configuration comes to, before any of it is done: spans, evaluations, cost, what is there already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from sitkit.registry.measures import UNTRAINED
from sitkit.registry.settings_files import experiments
from sitkit.runs import checkpoint
from sitkit.runs.checkpoint import step_of
from sitkit.runs.config.identity import ResultLocation
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import (
    TRAINING_SETTINGS,
    Layer,
    assemble,
    flags_to_layer,
    locate,
    read_config,
    read_yaml,
)
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample import plan_solve
from sitkit.runtime.errors import UserError
from sitkit.solvers.sampler import Plan
from sitkit.studies.cost import Cost, cost_of, require
from sitkit.studies.status import StudyStatus
from sitkit.studies.study import Cell, Refused, Seeds, Study, StudyPlan, refusal, refused_at
from sitkit.studies.study_file import read_study
from sitkit.studies.tasks import trained
from sitkit.transport import interval

CellState = Literal["measured", "trained", "begun", "todo"]
Built = TypeVar("Built")
SOLVE = ("diffusion", "sampler", "guidance", "interp", "target")


class CellForecast(NamedTuple):
    """What one cell will do and cost.

    number: as `sitkit ablate --dry-run` counts.  measurement: equal where two cells are one and the same.
    times: where its solve starts and stops.  singular: why not at 0 and 1.
    steps: intervals, a last step of its own among them; None for an adaptive solver, as nfe.  training: the times at which
    it is trained.  step: of its newest checkpoint.
    """

    number: int
    row: str
    column: str
    seed: int
    sample_seed: int
    run: str
    measurement: str
    state: CellState
    step: int
    times: tuple[float, float]
    singular: tuple[str, ...]
    steps: int | None
    nfe: int | None
    training: tuple[float, float]
    cost: Cost


class CheckReport(NamedTuple):
    """The cells of a plan that can be done here, those that cannot, and the whole of what is still to be done.

    trainings, measurements: how many there are and how many of them are to do.  flops: of all that is to do; None where a
    part is not known.  disk: bytes that it will take.
    """

    cells: list[CellForecast]
    refused: list[Refused]
    trainings: tuple[int, int]
    measurements: tuple[int, int]
    flops: int | None
    disk: int


def read_plan(
    path: str,
    over: Layer | None = None,
    base: str | None = None,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
) -> StudyPlan:
    """The plan of a study's file; of a configuration (a file, a preset, the folder of a run) that of its only cell."""
    if path in experiments:
        path = str(experiments[path])
    if RunFolder(path).config.is_file():
        path = str(RunFolder(path).config)
    if Path(path).is_file() and _is_study(read_yaml(path)):
        return read_study(path, over, base, seeds, sample_seeds)
    for flag, value in (("--base", base), ("--seeds", seeds), ("--sample-seeds", sample_seeds)):
        if value is not None:
            raise UserError(f"{flag} is for a study; {path} is a configuration.")
    layers = [read_config(path), *([over] if over is not None else [])]
    config = assemble(layers)
    cell = Cell("", "", config.train.seed, config.sample.seed, config, None, f"{path}: ")
    why = refusal(config)
    # What was said last is what was meant to change.
    said = (locate(layer.where, [key]) for layer in reversed(layers) for key in SOLVE)
    place = next(filter(None, said), cell.place)
    return StudyPlan(
        Study.model_validate({}), Path(path), None, [Refused("", "", f"{place}{why}") if why else cell], ()
    )


def _is_study(layer: Layer) -> bool:
    return bool(set(layer.values) & (set(Study.model_fields) - set(Config.model_fields))) or not layer.values


def check(
    target: str | Path,
    *,
    base: str | None = None,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
    runs: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Layer | None = None,
) -> CheckReport:
    """Return what each cell of a study will do and cost, before any work.

    Args:
        target: a study; or a configuration, a preset, or the folder of a run.
        base: a preset or file in place of the study's own base.
        seeds, sample_seeds: training and sampling seeds in place of the study's own.
        runs, device: the folder of runs; where the work would be done.
        settings: any setting, by dotted key.

    Raises:
        UserError: for a study that cannot be read, with file, line and key.
    """
    over = flags_to_layer({"runs": runs, "device": device}, settings, TRAINING_SETTINGS)
    return check_plan(read_plan(str(target), over, base, seeds, sample_seeds))


def check_plan(plan: StudyPlan) -> CheckReport:
    """What each cell of a plan will do and cost, and which cannot be done here: by their data, network or metric."""
    outlook = _Forecasts(StudyStatus(plan))
    cells: list[CellForecast] = []
    refused = list(plan.refused)
    for number, (cell, place) in enumerate(zip(plan.cells, outlook.board.places, strict=True), 1):
        try:
            cells.append(outlook(number, cell, place))
        except UserError as error:
            refused.append(Refused(cell.row, cell.column, refused_at(cell.place, cell.row, cell.column, str(error))))
    return _summed(cells, refused)


class _Forecasts:
    """Outlooks of cells; what cells share is worked out once."""

    def __init__(self, board: StudyStatus) -> None:
        self.board = board
        self._known: dict[Any, Any] = {}
        self._steps: dict[str, tuple[bool, int]] = {}

    def _once(self, what: Callable[[Config], Built], config: Config, *parts: Any) -> Built:
        # The plan keeps its parts alive, so that an id means one of them.
        key = (what, *map(id, parts))
        if key not in self._known:
            try:
                self._known[key] = what(config)
            except UserError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, UserError):
            raise found
        return found

    def __call__(self, number: int, cell: Cell, place: ResultLocation) -> CellForecast:
        config = cell.config
        self._once(require, config, config.backbone, config.autoencoder, config.data, config.sample, *config.metric)
        solve = self._once(
            _solve, config, config.sampler, config.interp, config.target, config.diffusion, config.guidance
        )
        fixed = solve.nfe is not None
        return CellForecast(
            number,
            cell.row,
            cell.column,
            cell.seed,
            cell.sample_seed,
            place.run,
            place.measurement,
            *self._state(config, place),
            (float(solve.times[0]), float(solve.times[-1]) + solve.last_step),
            solve.notes,
            len(solve.times) - 1 + bool(solve.last_step) if fixed else None,
            solve.nfe,
            self._once(_trainable, config, config.interp, config.target, config.weight),
            cost_of(config, solve.nfe),
        )

    def _state(self, config: Config, place: ResultLocation) -> tuple[CellState, int]:
        if place.training not in self._steps:
            newest = checkpoint.checkpoints(RunFolder(self.board.runs / place.run).checkpoints)[-1:]
            step = step_of(newest[0]) if newest else 0
            self._steps[place.training] = trained(config), step
        done, step = self._steps[place.training]
        if self.board.measurements.find(place) is not None:
            return "measured", step
        return "trained" if done else "begun" if step else "todo", step


def _solve(config: Config) -> Plan:
    return plan_solve(config, UNTRAINED)


def _trainable(config: Config) -> tuple[float, float]:
    return interval.trainable_interval(config.interp, config.target, config.weight)


def _summed(cells: list[CellForecast], refused: list[Refused]) -> CheckReport:
    runs = {cell.run: cell for cell in cells}
    measurements = {cell.measurement: cell for cell in cells}
    todo = [cell for cell in measurements.values() if cell.state != "measured"]
    # A run that has all its numbers need not be there any more.
    wanted = {cell.run for cell in todo if cell.state != "trained"}
    parts = [runs[run].cost.training_flops for run in wanted] + [cell.cost.sampling_flops for cell in todo]
    disk = sum(runs[run].cost.checkpoints for run in wanted) + sum(cell.cost.samples for cell in todo)
    return CheckReport(
        cells,
        refused,
        (len(runs), len(wanted)),
        (len(measurements), len(todo)),
        None if any(part is None for part in parts) else sum(part or 0 for part in parts),
        disk,
    )
