"""Numbers computed again, from the checkpoint on, and compared to the last digit."""

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
from sitkit.runtime.files import read_json
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting

VALUES = ("value", "stderr", "halves", "n", "nfe")
# What a run is given, and what others have learnt from the data; everything else is made again.
GIVEN = ("config.yaml", "environment.json", "data.json", "checkpoints", "ema")
EXTRACTORS = "extractors"


class Verification(NamedTuple):
    """What became of a number when it was computed again.

    verdict: "same" to the last digit; "differs"; "impossible" where it could not be computed, with the reason.
    was, now: value, stderr, halves, n, nfe.  samples: whether they are the same to the bit; None where they are not kept.
    differences: between then and now, of checkpoint, code, packages and machine; told where the number differs.
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
    """Sample and measure again from the checkpoint, and compare each number to the last digit.  Nothing is written.

    Args:
        result: numbers, as in `explain`; the name of a study means all of its numbers.
        runs: the folder of runs.
        device: by default the device that the record names.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.

    Raises:
        UserError: for a number that is not there, with the nearest name.
    """
    found = numbers(str(result), Path(runs))
    with reporting(progress) as report:
        return verify_numbers(found, device, report)


def verify_numbers(
    found: Sequence[NamedEvaluation], device: str | None = None, progress: Progress = silent
) -> list[Verification]:
    """Sample and measure again, in a temporary folder, what each number says of itself, and compare.

    Given are the checkpoint and the extractor of features; samples, what is measured on the run before sampling, features
    and references are made anew, on the device and with the threads of then unless `device` says otherwise.  Numbers that
    share samples share them here.  A number that cannot be computed does not stop the others.
    """
    verdicts: dict[Path, Verification] = {}
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="sitkit-verify-") as scratch:
            for i, number in enumerate(found):
                if number.path not in verdicts:
                    verdicts[number.path] = _verify(number, Path(scratch) / _folder(number), device, progress)
                progress(Event("verify", i + 1, len(found)))
    finally:
        torch.set_num_threads(threads)
    return [verdicts[number.path]._replace(name=number.name) for number in found]


def _folder(number: NamedEvaluation) -> str:
    """A folder for each root of runs, so that equal names do not meet."""
    return f"{abs(hash(number.folder.parent.resolve())):x}"


def _verify(number: NamedEvaluation, root: Path, device: str | None, progress: Progress) -> Verification:
    was = {key: number.record.get(key) for key in VALUES}
    try:
        run = run_as_measured(number, root, device)
        (made,) = measure_run(run, progress)
    except (UserError, WorkFailed) as error:
        return Verification(number.name, number.path, "impossible", was, None, None, str(error), [])
    record = read_json(made.path)
    now = {key: record.get(key) for key in VALUES}
    then = RunFolder(number.folder).samples / number.record["samples"] / ARRAYS
    samples = _equal(then, RunFolder(run.folder).samples / record["samples"] / ARRAYS)
    if now == was:
        return Verification(number.name, number.path, "same", was, now, samples, "", [])
    what = {None: "", True: "its samples are the same to the bit", False: "its samples differ"}[samples]
    return Verification(
        number.name, number.path, "differs", was, now, samples, what, list(record_differences(number.record, record))
    )


def run_as_measured(number: NamedEvaluation, root: Path, device: str | None = None) -> Run:
    """The run of a number, loaded as it was when it was measured, its samples and numbers going to `root`.

    Raises UserError where the checkpoint, the data or a component is not there any more.
    """
    record = number.record
    environment, recipe = record["environment"], dict(record["sampling"]["recipe"])
    step = recipe.pop("step")
    # On an accelerator a sample's last digits depend on how many there are at once.
    recipe["sample"] = {"batch": record["sampling"]["at_once"], **recipe["sample"]}
    over = {**recipe, "metric": [record["metric"]], "run": {"track": False, "keep_samples": record["sampling"]["kept"]}}
    source = _given(number, root)
    run = load(source, step=step, device=device or device_of_record(environment), settings=Layer(over), root=root)
    torch.set_num_threads(environment["threads"])
    if run.examples.fingerprint != record["data"]:
        raise UserError(f"The data of {number.folder} changed since the number was measured.")
    return run


def device_of_record(environment: Mapping[str, Any]) -> str:
    """The device of a record by the name that torch has for it: of a GPU with CUDA the record has the maker's."""
    return "cuda" if "cuda" in environment else str(environment["device"])


def _given(number: NamedEvaluation, root: Path) -> Path:
    """A folder under `root` that has what the number's run was given, and links to the other runs that it asks."""
    root.mkdir(parents=True, exist_ok=True)
    home = number.folder.parent.resolve()
    if (home / EXTRACTORS).is_dir() and not (root / EXTRACTORS).exists():
        (root / EXTRACTORS).symlink_to(home / EXTRACTORS)
    if not RunFolder(number.folder).config.is_file():
        # Of a run in one file.
        return Path(number.record["command"][2]).resolve()
    guide = number.record["sampling"]["recipe"]["guidance"].get("run")
    for name in filter(None, (number.folder.name, guide)):
        (root / name).mkdir(exist_ok=True)
        for part in GIVEN:
            if (home / name / part).exists() and not (root / name / part).exists():
                (root / name / part).symlink_to(home / name / part)
    return root / number.folder.name


def _equal(a: Path, b: Path) -> bool | None:
    """Whether two archives hold the same arrays; None where one is not there."""
    if not (a.is_file() and b.is_file()):
        return None
    with np.load(a, allow_pickle=False) as first, np.load(b, allow_pickle=False) as second:
        names = first.files
        if names != second.files:
            return False
    parts = (zip(archives.rows(a, name, SHARD), archives.rows(b, name, SHARD), strict=False) for name in names)
    return all(np.array_equal(x, y) for pairs in parts for x, y in pairs)


def difference(verdict: Verification) -> float | None:
    """By how much of itself the value differs."""
    if verdict.now is None:
        return None
    was, now = float(verdict.was["value"]), float(verdict.now["value"])
    return 0.0 if was == now else abs(now - was) / max(abs(was), abs(now)) if math.isfinite(was + now) else math.inf
