"""A forecast of a study or a configuration before any work: intervals, evaluations, cost, and what is there already."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Unpack

from sitkit.registry.settings_files import experiments
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import assemble, locate, read_config, read_yaml, require_flags
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.errors import UserError
from sitkit.studies.cost import Cost, cost_of, obstacles
from sitkit.studies.status import CellStatus, StudyStatus
from sitkit.studies.study import Cell, Refused, Study, StudyFlags, StudyPlan, plan_untrained
from sitkit.studies.study_file import flags_layer, read_study
from sitkit.transport.interval import largest_weight, trainable_interval


@dataclass(frozen=True)
class CellForecast(CellStatus):
    """What one cell will do and cost, and what of it is on disk.

    times: the start and the end of its solve.  singular: why they are not 0 and 1.  steps: intervals, with a last step of
    another kind; None for an adaptive solver, as nfe.  training: the interval of times of its training.  largest_weight: of
    its loss, and the time of that weight.
    """

    times: tuple[float, float]
    singular: tuple[str, ...]
    steps: int | None
    nfe: int | None
    training: tuple[float, float]
    largest_weight: tuple[float, float]
    cost: Cost


class CheckReport(NamedTuple):
    """The forecast of a study.

    Attributes:
        cells: the forecast of each possible cell.
        refused: the impossible cells, with their reasons.
        trainings, measurements: their number, and the number of them that are still to do.
        flops: of everything to do; None if a part is not known.
        disk: bytes that it will take.
    """

    cells: list[CellForecast]
    refused: list[Refused]
    trainings: tuple[int, int]
    measurements: tuple[int, int]
    flops: int | None
    disk: int


def read_plan(path: str, **flags: Unpack[StudyFlags]) -> StudyPlan:
    """Return the plan of a study's file; of a configuration (a file, a preset, the folder of a run) that of its only cell."""
    if path in experiments:
        path = str(experiments[path])
    if RunFolder(path).config.is_file():
        path = str(RunFolder(path).config)
    if Path(path).is_file():
        keys = set(read_yaml(path).values)
        if not keys or keys & (set(Study.model_fields) - set(Config.model_fields)):
            return read_study(path, **flags)
    for flag in ("base", "seeds", "sample_seeds"):
        if flags.get(flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} is for a study; {path} is a configuration.")
    layers = [read_config(path), flags_layer(flags)]
    config = assemble(layers)
    cell = Cell("", "", config.train.seed, config.sample.seed, config, None, f"{path}: ")
    plan = plan_untrained(config)
    # The last setting is the one that was meant to change.
    solve = ("diffusion", "sampler", "guidance", "interp", "target")
    places = [locate(layer.where, [key]) for layer in reversed(layers) for key in solve]
    place = next(filter(None, places), cell.place)
    entry = Refused("", "", f"{place}{plan}") if isinstance(plan, str) else cell
    return StudyPlan(Study.model_validate({}), Path(path), None, [entry], ())


def check(target: str | Path, **flags: Unpack[StudyFlags]) -> CheckReport:
    """Return what each cell of a study will do and cost, before any work.

    Args:
        target: a study; or a configuration, a preset, or the folder of a run.
        flags: the flags of `sitkit check` by name: `base` (a preset or file in place of the study's own base), `seeds` and
            `sample_seeds` (training and sampling seeds in place of the study's own), `runs` (the folder of runs),
            `device`, `settings` (any setting by its dotted key).

    Returns:
        The forecast of each cell, the impossible cells, and the sum of what is left to do.

    Raises:
        UserError: for a study that cannot be read, with file, line and key.
    """
    require_flags(flags, StudyFlags, "check")
    return check_plan(read_plan(str(target), **flags))


def check_plan(plan: StudyPlan) -> CheckReport:
    """Return the forecast of a plan; a cell that cannot be done on this machine is refused with its reason."""
    cells: list[CellForecast] = []
    refused = list(plan.refused)
    training, weight = functools.cache(trainable_interval), functools.cache(largest_weight)
    for cell, status, reason in zip(plan.cells, StudyStatus(plan).cells(), obstacles(plan.cells), strict=True):
        solve = plan_untrained(cell.config)
        if reason or isinstance(solve, str):
            refused.append(cell.refused(reason or str(solve)))
            continue
        config = cell.config
        try:
            cost = cost_of(config, solve.nfe)
        except UserError as error:
            refused.append(cell.refused(str(error)))
            continue
        cells.append(
            CellForecast(
                **vars(status),
                times=(float(solve.times[0]), float(solve.times[-1]) + solve.last_step),
                singular=solve.notes,
                steps=None if solve.nfe is None else len(solve.times) - 1 + bool(solve.last_step),
                nfe=solve.nfe,
                training=training(config.interp, config.target, config.weight),
                largest_weight=weight(config.interp, config.target, config.weight, config.timestep),
                cost=cost,
            )
        )
    return _report(cells, refused)


def _report(cells: list[CellForecast], refused: list[Refused]) -> CheckReport:
    runs = {cell.run: cell for cell in cells}
    measurements = {cell.measurement: cell for cell in cells}
    todo = [cell for cell in measurements.values() if cell.state != "measured"]
    # A run with all of its numbers need not exist any more.
    wanted = {cell.run for cell in todo if cell.state != "trained"}
    parts = [runs[run].cost.training_flops for run in wanted] + [cell.cost.sampling_flops for cell in todo]
    return CheckReport(
        cells=cells,
        refused=refused,
        trainings=(len(runs), len(wanted)),
        measurements=(len(measurements), len(todo)),
        flops=None if None in parts else sum(part or 0 for part in parts),
        disk=sum(runs[run].cost.checkpoints for run in wanted) + sum(cell.cost.samples for cell in todo),
    )
