"""How a number was made, and the commands that make it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sitkit.results.lookup import NamedEvaluation, numbers
from sitkit.results.reproduce import evaluate_command, train_command
from sitkit.results.study_results import read_results
from sitkit.runs.environment import code_version
from sitkit.runs.run_folder import RunFolder


class Explanation(NamedTuple):
    """A number, what made it, and the commands: to have it again, to train its run, to do its study.

    settings: of sampling and measuring, as plain values.  stages: for training, sampling and evaluation the code and the
    machine; None where it was not recorded.
    """

    name: str
    path: str
    metric: str
    value: Any
    stderr: Any
    halves: Any
    n: int
    nfe: int
    seeds: dict[str, int]
    data: dict[str, Any]
    checkpoint: dict[str, Any]
    settings: dict[str, Any]
    rounding: str
    stages: dict[str, Any]
    plugins: dict[str, str]
    commands: dict[str, str]


def explain(result: str | Path, *, runs: str | Path = "runs") -> list[Explanation]:
    """Return how numbers were made, each with the commands that make it again.

    Args:
        result: the file of a number, its identity, or STUDY:ROW:COLUMN:SEED:SAMPLE_SEED (any part may be left out).
        runs: the folder of runs.

    Raises:
        UserError: for a number that is not there, with the nearest name.
    """
    return [explain_number(number) for number in numbers(str(result), Path(runs))]


def explain_number(number: NamedEvaluation) -> Explanation:
    """All that is known of how a number was made."""
    record = number.record
    sampling = record["sampling"]
    stages = {
        "training": record.get("trained"),
        "sampling": sampling.get("environment"),
        "evaluation": record["environment"],
    }
    commands = {"number": evaluate_command(number.folder, record)}
    if RunFolder(number.folder).config.is_file():
        commands["training"] = train_command(number.folder)
    else:
        commands["number"] = shlex.join(record["command"])
    if number.study is not None:
        commands["study"] = shlex.join(read_results(number.study).command)
    return Explanation(
        number.name,
        str(number.path),
        number.metric,
        record["value"],
        record["stderr"],
        record["halves"],
        record["n"],
        record["nfe"],
        record["seeds"],
        {"fingerprint": record["data"], "reference": record["reference"], "features": record["features"]},
        record["checkpoint"],
        {key: value for key, value in sampling["recipe"].items() if key != "step"} | {"metric": record["metric"]},
        record["rounding"],
        stages,
        _plugins(stages),
        commands,
    )


def _plugins(stages: Mapping[str, Any]) -> dict[str, str]:
    """The plugins that were there, each with its package and version."""
    return {name: package for told in stages.values() if told for name, package in (told.get("plugins") or {}).items()}


def code(stage: Mapping[str, Any] | None) -> str:
    """A stage's code and machine in a line."""
    if not stage:
        return "not recorded"
    packages = stage.get("packages") or {}
    parts = [code_version(stage), f"torch {packages.get('torch', '?')}", f"numpy {packages.get('numpy', '?')}"]
    threads = stage.get("threads")
    return ", ".join(
        [*parts, f"python {stage['python']}", stage["device"], *([f"threads {threads}"] if threads else [])]
    )
