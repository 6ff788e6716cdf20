"""How a number was computed, and the commands that compute it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sitkit.results.lookup import NamedEvaluation, numbers
from sitkit.results.reproduce import evaluate_command, train_command
from sitkit.results.study_results import read_results
from sitkit.runs.environment import code_version
from sitkit.runs.evaluate import real_of
from sitkit.runs.run_folder import RunFolder


class Explanation(NamedTuple):
    """A number, everything that it depends on, and the commands that compute it again.

    Attributes:
        name: the name of the number.
        path: the file of its record.
        metric: the metric's name, with its features.
        value, stderr: the value and its standard error, in the metric's unit.
        real: the same metric of as many random examples against the others.
        n: the number of samples.
        nfe: network evaluations per sample.
        seeds: the seeds of training, sampling and metric.
        data: the data set, the reference set and the features, with their fingerprints.
        checkpoint: step, weights and fingerprint.
        settings: of sampling and of the metric, as plain values.
        rounding: how images were rounded to 8 bits.
        stages: code and machine of training, sampling and evaluation; None for a stage without a record.
        plugins: each plugin with its package and version.
        commands: "number", "training" and "study": the commands that compute them again.
    """

    name: str
    path: str
    metric: str
    value: Any
    stderr: Any
    real: Any
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
    """Return how numbers were computed, with the commands that compute them again.

    Args:
        result: the file of a number, its identity, or STUDY:ROW:COLUMN:SEED:SAMPLE_SEED (any part may be empty).
        runs: the folder of runs.

    Returns:
        One explanation per number.

    Raises:
        UserError: there is no such number; the message has the nearest name.
    """
    return [explain_number(number) for number in numbers(str(result), Path(runs))]


def explain_number(number: NamedEvaluation) -> Explanation:
    """Return how a number was computed."""
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
    recorded = ("value", "stderr", "n", "nfe", "seeds", "checkpoint", "rounding")
    return Explanation(
        name=number.name,
        path=str(number.path),
        metric=number.metric,
        real=real_of(record),
        data={"fingerprint": record["data"], "reference": record["reference"], "features": record["features"]},
        settings={k: v for k, v in sampling["recipe"].items() if k != "step"} | {"metric": record["metric"]},
        stages=stages,
        plugins=_plugins(stages),
        commands=commands,
        **{key: record[key] for key in recorded},
    )


def _plugins(stages: Mapping[str, Any]) -> dict[str, str]:
    """The plugins of all stages, each with its package and version."""
    return {
        name: package for stage in stages.values() if stage for name, package in (stage.get("plugins") or {}).items()
    }


def code(stage: Mapping[str, Any] | None) -> str:
    """Return the code and the machine of a stage in a line."""
    if not stage:
        return "not recorded"
    packages = stage.get("packages") or {}
    parts = [code_version(stage), *(f"{name} {packages.get(name, '?')}" for name in ("torch", "numpy"))]
    parts += [f"python {stage['python']}", stage["device"]]
    return ", ".join([*parts, f"threads {stage['threads']}"] if stage.get("threads") else parts)
