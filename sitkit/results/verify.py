"""Compute numbers again from their checkpoint, and compare them to the last digit."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sitkit.results.diff import Difference, record_differences
from sitkit.results.lookup import NamedEvaluation, numbers
from sitkit.runs.config.sources import Layer
from sitkit.runs.evaluate import measure_run
from sitkit.runs.run import Run, load
from sitkit.runs.run_folder import RunFolder
from sitkit.runs.sample_set import ARRAYS, SHARD
from sitkit.runtime import archives
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import inside
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting

VALUES = ("value", "stderr", "real", "n", "nfe")
# The files of a run that are used; all other files are computed again.
USED_FILES = ("config.yaml", "environment.json", "data.json", "checkpoints", "ema")
EXTRACTORS = "extractors"


class Verification(NamedTuple):
    """The result of computing a number again.

    Attributes:
        name: the name of the number.
        path: the file of its record.
        verdict: "same" to the last digit, "differs", or "impossible" if it could not be computed.
        was, now: the recorded and the new value, stderr, value of real data, n and nfe; `now` is None for "impossible".
        samples: whether the samples are equal to the bit; None if they are not on disk.
        reason: why the number could not be computed, or whether its samples differ; else "".
        differences: differences of checkpoint, code, packages and machine since then, if the number differs.
    """

    name: str
    path: Path
    verdict: Literal["same", "differs", "impossible"]
    was: dict[str, Any]
    now: dict[str, Any] | None
    samples: bool | None
    reason: str
    differences: list[Difference]


def verify(
    result: str | Path, *, runs: str | Path = "runs", device: str | None = None, progress: Progress | None = None
) -> list[Verification]:
    """Sample and measure again from the checkpoint, and compare each number to the last digit.

    Nothing is written.

    Args:
        result: a number or several, as in `explain`; the name of a study means all its numbers.
        runs: the folder of runs.
        device: "cpu", "cuda", "auto"; by default the device of the record.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Returns:
        One verification per number. A number that cannot be computed does not stop the others.

    Raises:
        UserError: there is no such number; the message has the nearest name.
    """
    with reporting(progress) as report:
        return verify_numbers(numbers(str(result), Path(runs)), device, report)


def verify_numbers(
    evaluations: Sequence[NamedEvaluation], device: str | None = None, progress: Progress = silent
) -> list[Verification]:
    """Sample and measure again in a temporary folder, and compare with the records.

    The checkpoint and the trained extractors are used as they are. Samples, measurements on the run, features and
    references are computed again, with the recorded number of threads and on the recorded device unless `device` is
    given. Numbers with the same samples share them. A number that cannot be computed does not stop the others.
    """
    verdicts: dict[Path, Verification] = {}
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="sitkit-verify-") as scratch:
            for i, number in enumerate(evaluations):
                if number.path not in verdicts:
                    verdicts[number.path] = _verify(number, Path(scratch) / _folder(number), device, progress)
                progress(Event("verify", i + 1, len(evaluations)))
    finally:
        torch.set_num_threads(threads)
    return [verdicts[number.path]._replace(name=number.name) for number in evaluations]


def _folder(number: NamedEvaluation) -> str:
    """A folder for each folder of runs, so that equal names of runs do not collide."""
    return f"{abs(hash(number.folder.parent.resolve())):x}"


def _verify(number: NamedEvaluation, root: Path, device: str | None, progress: Progress) -> Verification:
    # Release 0.1, whose records have "halves", estimated standard errors in another way.
    left_out = {"stderr"} if "halves" in number.record else set[str]()
    was = {key: number.record[key] for key in VALUES if key in number.record and key not in left_out}
    try:
        run = run_as_measured(number, root, device)
        (evaluation,) = measure_run(run, progress)
        then = inside(RunFolder(number.folder).samples, f"{number.record['samples']}/{ARRAYS}")
        samples = _equal(then, RunFolder(run.folder).samples / evaluation.record["samples"] / ARRAYS)
    except (UserError, WorkFailed) as error:
        return Verification(number.name, number.path, "impossible", was, None, None, str(error), [])
    record = evaluation.record
    now = {key: record.get(key) for key in was}
    if now == was:
        return Verification(number.name, number.path, "same", was, now, samples, "", [])
    reason = {None: "", True: "its samples are the same to the bit", False: "its samples differ"}[samples]
    differences = list(record_differences(number.record, record))
    return Verification(number.name, number.path, "differs", was, now, samples, reason, differences)


def run_as_measured(number: NamedEvaluation, root: Path, device: str | None = None) -> Run:
    """Return the run of a number with the settings of its record; samples and numbers are written to `root`.

    Raises UserError if the checkpoint, the data or a component is missing.
    """
    record = number.record
    environment, recipe = record["environment"], dict(record["sampling"]["recipe"])
    step = recipe.pop("step")
    # On an accelerator the last digits of a sample depend on the batch size.
    recipe["sample"] = {"batch": record["sampling"]["at_once"], **recipe["sample"]}
    over = {**recipe, "metric": [record["metric"]], "run": {"track": False, "keep_samples": record["sampling"]["kept"]}}
    source = _linked_run(number, root)
    run = load(source, step=step, device=device or device_of_record(environment), settings=Layer(over), root=root)
    torch.set_num_threads(environment["threads"])
    if run.examples.fingerprint != record["data"]:
        raise UserError(f"The data of {number.folder} changed since the number was measured.")
    return run


def device_of_record(environment: Mapping[str, Any]) -> str:
    """Return torch's name of the device of a record, which holds the product name of a CUDA device."""
    return "cuda" if "cuda" in environment else str(environment["device"])


def _linked_run(number: NamedEvaluation, root: Path) -> Path:
    """A folder under `root` with links to the files of the number's run, and of the run that guides it."""
    root.mkdir(parents=True, exist_ok=True)
    home = number.folder.parent.resolve()
    if (home / EXTRACTORS).is_dir() and not (root / EXTRACTORS).exists():
        (root / EXTRACTORS).symlink_to(home / EXTRACTORS)
    if not RunFolder(number.folder).config.is_file():
        # A run in one file.
        return Path(number.record["command"][2]).resolve()
    guide = number.record["sampling"]["recipe"]["guidance"].get("run")
    for name in filter(None, (number.folder.name, guide)):
        (root / name).mkdir(exist_ok=True)
        for part in USED_FILES:
            if (home / name / part).exists() and not (root / name / part).exists():
                (root / name / part).symlink_to(home / name / part)
    return root / number.folder.name


def _equal(a: Path, b: Path) -> bool | None:
    """Whether two archives hold the same arrays; None if one is missing."""
    if not (a.is_file() and b.is_file()):
        return None
    names = list(archives.headers(a))
    if names != list(archives.headers(b)):
        return False
    parts = (zip(archives.rows(a, name, SHARD), archives.rows(b, name, SHARD), strict=False) for name in names)
    return all(np.array_equal(x, y) for pairs in parts for x, y in pairs)


def difference(verdict: Verification) -> float | None:
    """Return the relative difference of the value; None if it could not be computed."""
    if verdict.now is None:
        return None
    was, now = float(verdict.was["value"]), float(verdict.now["value"])
    return 0.0 if was == now else abs(now - was) / max(abs(was), abs(now)) if math.isfinite(was + now) else math.inf
