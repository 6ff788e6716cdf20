"""Find numbers on disk by name.

runs/NAME/evaluations/ID.json     the file itself
ID                                its name, or the first digits of it
RUN    RUN:METRIC    RUN:ID       every number of a run; those of one metric; one
STUDY  STUDY:ROW  STUDY:ROW:COLUMN  STUDY:ROW:COLUMN:SEED  STUDY:ROW:COLUMN:SEED:SAMPLE_SEED
                                  every number of a study, of a row, ...; an empty part means any
STUDY:CELL                        a cell by its number, as `sitkit check` and `sitkit ablate --dry-run` count
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sitkit.results.statistics import Estimate, SeedPair
from sitkit.results.study_results import (
    FILE,
    STUDIES,
    CellResult,
    StudyResults,
    evaluation_of,
    find_study,
    read_results,
    runs_of,
)
from sitkit.runs.evaluate import Evaluation
from sitkit.runs.run_folder import RunFolder, find_run
from sitkit.runtime.errors import UserError, suggest


@dataclass(frozen=True)
class NamedEvaluation(Evaluation):
    """An evaluation with the cell and the folder of its study, if it was named by a study."""

    cell: CellResult | None = None
    study: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.path.parent.parent

    @property
    def name(self) -> str:
        """The name for people: RUN:ID, or STUDY:ROW:COLUMN:SEED:SAMPLE_SEED."""
        if self.cell is None or self.study is None:
            return f"{self.folder.name}:{self.path.stem}"
        seeds = f"{self.cell.seed}:{self.cell.sample_seed}"
        return f"{self.study.name}:{self.cell.row}:{self.cell.column}:{seeds}"

    @property
    def seeds(self) -> SeedPair:
        """The seeds of training and of sampling."""
        return self.record["seeds"]["train"], self.record["seeds"]["sample"]

    @property
    def estimate(self) -> Estimate:
        """The value with its standard error."""
        return Estimate(self.value, self.stderr)


def numbers(target: str, root: Path = Path("runs")) -> list[NamedEvaluation]:
    """Return the numbers with a name. Raises UserError, with the nearest name, if there is none."""
    path = Path(target)
    if path.suffix == ".json" and path.name != FILE:
        return [NamedEvaluation.read(path)]
    study, rest = _study(target, root)
    if study is not None:
        return _of_study(study, rest)
    short = sorted(root.glob(f"*/evaluations/{target}*.json")) if re.fullmatch("[0-9a-f]{4,12}", target) else []
    if len(short) == 1:
        return [NamedEvaluation.read(short[0])]
    run, _, name = target.partition(":")
    try:
        folder = find_run(run, root)
    except UserError as error:
        if short:
            several = ", ".join(f"{path.parent.parent.name}:{path.stem}" for path in short)
            raise UserError(f"{target!r} is the start of several numbers: {several}.") from None
        raise UserError(
            f"{error} Nor is it the name of a study in {root.parent / STUDIES}, or the file of a number."
        ) from None
    return _of_run(folder, name)


def _study(target: str, root: Path) -> tuple[Path | None, str]:
    """The folder of a study, and the text after its name, which may contain colons."""
    parts = target.split(":")
    for length in range(len(parts), 0, -1):
        name = ":".join(parts[:length])
        folder = find_study(name, root) if name else None
        if folder is not None:
            return folder, ":".join(parts[length:])
    return None, ""


def _of_run(folder: Path, name: str) -> list[NamedEvaluation]:
    every = [NamedEvaluation.read(path) for path in sorted(RunFolder(folder).evaluations.glob("*.json"))]
    if not every:
        raise UserError(f"{folder} has no numbers yet: sitkit evaluate {folder} computes one.")
    named = [n for n in every if name in (n.metric, n.record["metric"]["name"]) or n.path.stem.startswith(name)]
    if not named:
        known = list(dict.fromkeys(number.metric for number in every))
        raise UserError(f"{folder} has no number {name!r}.{suggest(name, known)} It has {', '.join(known)}.")
    return named


def _of_study(study: Path, rest: str) -> list[NamedEvaluation]:
    results = read_results(study)
    cells = cells_named(results, rest, study.name)
    done = [cell for cell in cells if cell.state == "done" and cell.evaluation]
    if not done:
        states = ", ".join(dict.fromkeys(cell.state for cell in cells))
        raise UserError(f"{study.name}:{rest} has no number yet ({states}): {shlex.join(results.command)} continues.")
    runs = runs_of(study, results)
    return [
        NamedEvaluation(path, Evaluation.read(path).record, cell, study)
        for path, cell in ((evaluation_of(runs, cell), cell) for cell in done)
    ]


def cells_named(results: StudyResults, which: str, name: str) -> list[CellResult]:
    """Return the cells of ROW:COLUMN:SEED:SAMPLE_SEED or of the number of a cell; "" means all cells.

    Raises UserError, with the nearest name, for a row, column or seed that the study `name` does not have.
    """
    possible = [cell for cell in results.cells if cell.state != "refused"]
    if which.isdecimal() and which not in results.rows:
        if not 1 <= int(which) <= len(possible):
            raise UserError(f"{name} has cells 1 to {len(possible)}; got {which}.")
        return [possible[int(which) - 1]]
    row, rest = _begin(which, results.rows, f"row of {name}")
    column, rest = _begin(rest, results.columns, f"column of {name}")
    seeds = [*rest.split(":"), ""][:2]
    if rest.count(":") > 1:
        raise UserError(f"{name}:{which}: row and column are followed by two seeds; {rest!r} are more.")
    for seed, known, kind in zip(seeds, (results.seeds, results.sample_seeds), ("", "sampling "), strict=True):
        if seed and seed not in map(str, known):
            raise UserError(f"{name} has no {kind}seed {seed}; it has {', '.join(map(str, known))}.")
    return [
        cell
        for cell in possible
        if row in (None, cell.row)
        and column in (None, cell.column)
        and seeds[0] in ("", str(cell.seed))
        and seeds[1] in ("", str(cell.sample_seed))
    ]


def _begin(text: str, known: Sequence[str], kind: str) -> tuple[str | None, str]:
    """The known name at the start of a text, and the text after its colon; None if the part is empty."""
    if not text or text.startswith(":"):
        return None, text[1:]
    fits = [name for name in known if text == name or text.startswith(f"{name}:")]
    if not fits:
        word = text.partition(":")[0]
        raise UserError(f"No {kind} is called {word!r}.{suggest(word, list(known))} Known: {'; '.join(known)}.")
    longest = max(fits, key=len)
    return longest, text[len(longest) + 1 :]
