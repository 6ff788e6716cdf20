"""Numbers on disk, and how people name them.

runs/NAME/evaluations/ID.json     the file itself
ID                                its name, or the first digits of it
RUN    RUN:METRIC    RUN:ID       every number of a run; those of one metric; one
STUDY  STUDY:ROW  STUDY:ROW:COLUMN  STUDY:ROW:COLUMN:SEED  STUDY:ROW:COLUMN:SEED:SAMPLE_SEED
                                  every number of a study, of a row, ...; what is left empty is any
STUDY:CELL                        a cell by its number, as `sitkit check` and `sitkit ablate --dry-run` count
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sitkit.results.statistics import Estimate, Seeds
from sitkit.results.study_results import FILE, STUDIES, CellResult, StudyResults, find_study, read_results, runs_of
from sitkit.runs.evaluate import Evaluation
from sitkit.runs.run_folder import RunFolder, find_run
from sitkit.runtime.errors import UserError, suggest


@dataclass(frozen=True)
class NamedEvaluation(Evaluation):
    """A number with the cell of a study, and the folder of the study, if it was named as one."""

    cell: CellResult | None = None
    study: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of its run."""
        return self.path.parent.parent

    @property
    def name(self) -> str:
        """How a line calls it."""
        if self.cell is None or self.study is None:
            return f"{self.folder.name}:{self.path.stem}"
        seeds = f"{self.cell.seed}:{self.cell.sample_seed}"
        return f"{self.study.name}:{self.cell.row}:{self.cell.column}:{seeds}"

    @property
    def seeds(self) -> Seeds:
        """The seeds of training and of sampling."""
        return self.record["seeds"]["train"], self.record["seeds"]["sample"]

    @property
    def estimate(self) -> Estimate:
        """The value with its standard error."""
        return Estimate(self.value, self.stderr)


def numbers(target: str, root: Path = Path("runs")) -> list[NamedEvaluation]:
    """What a name means: one number or several.  Raises UserError for a name that means none, with the nearest one."""
    path = Path(target)
    if path.suffix == ".json" and path.name != FILE:
        return [NamedEvaluation.read(path)]
    study, rest = _study(target, root)
    if study is not None:
        return _of_study(study, rest)
    short = sorted(root.glob(f"*/evaluations/{target}*.json")) if re.fullmatch("[0-9a-f]{4,12}", target) else []
    if len(short) == 1:
        return [NamedEvaluation.read(short[0])]
    run, _, which = target.partition(":")
    try:
        folder = find_run(run, root)
    except UserError as error:
        if short:
            several = ", ".join(f"{path.parent.parent.name}:{path.stem}" for path in short)
            raise UserError(f"{target!r} is the start of several numbers: {several}.") from None
        raise UserError(
            f"{error} Nor is it the name of a study in {root.parent / STUDIES}, or the file of a number."
        ) from None
    return _of_run(folder, which)


def _study(target: str, root: Path) -> tuple[Path | None, str]:
    """The folder of a study and what follows its name; a name may hold colons of its own."""
    parts = target.split(":")
    for length in range(len(parts), 0, -1):
        name = ":".join(parts[:length])
        found = find_study(name, root) if name else None
        if found is not None:
            return found, ":".join(parts[length:])
    return None, ""


def _of_run(folder: Path, which: str) -> list[NamedEvaluation]:
    found = [NamedEvaluation.read(path) for path in sorted(RunFolder(folder).evaluations.glob("*.json"))]
    if not found:
        raise UserError(f"{folder} has no numbers yet: sitkit evaluate {folder} makes one.")
    chosen = [
        number
        for number in found
        if not which or which in (number.metric, number.record["metric"]["name"]) or number.path.stem.startswith(which)
    ]
    if not chosen:
        known = list(dict.fromkeys(number.metric for number in found))
        raise UserError(f"{folder} has no number {which!r}.{suggest(which, known)} It has {', '.join(known)}.")
    return chosen


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
        for cell in done
        if (path := runs / str(cell.evaluation))
    ]


def cells_named(results: StudyResults, which: str, name: str) -> list[CellResult]:
    """The cells that ROW:COLUMN:SEED:SAMPLE_SEED, or the number of a cell, means; none of it means all.

    Raises UserError for what the study `name` has not, with the nearest that it has.
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
        raise UserError(f"{name}:{which}: behind row and column come two seeds, and {rest!r} are more.")
    for seed, known, what in zip(seeds, (results.seeds, results.sample_seeds), ("", "sampling "), strict=True):
        if seed and seed not in map(str, known):
            raise UserError(f"{name} has no {what}seed {seed}; it has {', '.join(map(str, known))}.")
    return [
        cell
        for cell in possible
        if row in (None, cell.row)
        and column in (None, cell.column)
        and seeds[0] in ("", str(cell.seed))
        and seeds[1] in ("", str(cell.sample_seed))
    ]


def _begin(text: str, known: Sequence[str], what: str) -> tuple[str | None, str]:
    """The known name that a text begins with, and what follows its colon; None where the place is empty."""
    if not text or text.startswith(":"):
        return None, text[1:]
    fits = [name for name in known if text == name or text.startswith(f"{name}:")]
    if not fits:
        word = text.partition(":")[0]
        raise UserError(f"No {what} is called {word!r}.{suggest(word, list(known))} Known: {'; '.join(known)}.")
    longest = max(fits, key=len)
    return longest, text[len(longest) + 1 :]
