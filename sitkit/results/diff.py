"""What differs between two runs or two numbers, and whether it can explain that their results differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sitkit.results.lookup import NamedEvaluation, numbers
from sitkit.results.statistics import LEVEL, Comparison, paired
from sitkit.runs.config.schema import TRAINING_KEYS
from sitkit.runs.environment import code_version
from sitkit.runs.one_file import weights_fingerprint
from sitkit.runs.run import load_weights
from sitkit.runs.run_folder import RunFolder, find_run, read_config_of
from sitkit.runtime.errors import UserError

Stage = Literal["training", "sampling", "evaluation", "nothing"]
# Packages that store and show, and compute nothing.
BYSTANDERS = ("sitkit", "pydantic", "optuna", "mlflow")
# What of a machine changes the order of sums, and with it the last digits.
MACHINE = ("python", "platform", "device", "cpu", "cuda", "threads", "processes")
HASH = re.compile("[0-9a-f]{40,}")
# What of config.run changes the order of sums.
ROUNDING_NOTE = ("device", "threads", "compile", "parallel")


class Difference(NamedTuple):
    """A thing that is one way here and another way there.

    affects: the stage that it enters first; through it all later ones.  rounding: it changes last digits alone, which a
    training or an adaptive solver may amplify.
    """

    key: str
    a: str
    b: str
    affects: Stage
    rounding: bool = False


class Differences(NamedTuple):
    """Two things compared: their names, what differs, their values, and what may be said of the results.

    comparison: a - b over the seeds that both have; None for runs without numbers, and for different metrics.
    """

    a: str
    b: str
    differences: list[Difference]
    comparison: Comparison | None
    verdict: str


def diff(a: str, b: str, *, runs: str | Path = "runs") -> Differences:
    """What differs between A and B: two runs, or two numbers, each named as `sitkit.results.lookup` says.

    A row and column of a study stands for all its seeds: the settings are those of the first seed that both have, the
    results are compared over all.  Raises UserError for names that mean nothing, or more than one thing.
    """
    root = Path(runs)
    folders = [_run(name, root) for name in (a, b)]
    if folders[0] is not None and folders[1] is not None:
        return _of_runs(folders[0], folders[1])
    if folders[0] is not None or folders[1] is not None:
        run, other = (a, b) if folders[0] is not None else (b, a)
        numbers(other, root)  # Raises for a name that means nothing.
        raise UserError(f"Give two runs or two numbers; {run} is a run and {other} is not.")
    return _of_numbers(_alike(a, root), _alike(b, root), a, b)


def _run(name: str, root: Path) -> Path | None:
    try:
        return find_run(name, root)
    except UserError:
        return None


def _alike(name: str, root: Path) -> list[NamedEvaluation]:
    """Numbers that differ in their seeds alone."""
    found = numbers(name, root)
    ways = {json.dumps([number.record["metric"], _unseeded(number)], sort_keys=True) for number in found}
    if len(ways) > 1:
        several = ", ".join(number.name for number in found[:3])
        raise UserError(f"{name} means {len(found)} numbers of {len(ways)} kinds ({several}, ...): name one.")
    return found


def _unseeded(number: NamedEvaluation) -> Any:
    recipe = number.record["sampling"]["recipe"]
    cell = number.cell
    return {**recipe, "sample": {**recipe["sample"], "seed": None}}, cell and (cell.row, cell.column)


def _of_runs(a: Path, b: Path) -> Differences:
    found = list(training_differences(a, b))
    same = _weights(a) == _weights(b)
    if same:
        return Differences(a.name, b.name, found, None, "Their weights are equal to the bit.")
    return Differences(a.name, b.name, found, None, f"Their weights differ. {_explained(found)}")


def _weights(folder: Path) -> Any:
    config = read_config_of(folder)
    if not config.backbone.trainable:
        return None
    step, state, _ = load_weights(folder, config)
    return step, weights_fingerprint(state)


def _of_numbers(a: list[NamedEvaluation], b: list[NamedEvaluation], first: str, second: str) -> Differences:
    by_seed = {number.seeds: number for number in b}
    shared = [(number, by_seed[number.seeds]) for number in a if number.seeds in by_seed]
    one, other = shared[0] if shared else (a[0], b[0])
    found = list(number_differences(one, other))
    if one.metric != other.metric:
        verdict = f"{one.metric} and {other.metric} are not to be compared. {_explained(found)}"
        return Differences(first, second, found, None, verdict)
    if not shared:
        gap = float(one.record["value"]) - float(other.record["value"])
        return Differences(first, second, found, None, f"They differ by {gap:.6g} (a - b). {_explained(found)}")
    told = paired({x.seeds: x.estimate for x, _ in shared}, {y.seeds: y.estimate for _, y in shared})
    if all(x.record["value"] == y.record["value"] for x, y in shared):
        return Differences(first, second, found, told, "Their values are equal to the last digit.")
    return Differences(first, second, found, told, f"{_said(told)} {_explained(found)}")


def _said(told: Comparison) -> str:
    gap = f"They differ by {told.difference:.6g} (a - b)"
    if told.p is None or told.stderr is None:
        return f"{gap}; one number each has no error to go by."
    of = f"over {told.units} {told.of}" if told.units > 1 else f"by the errors within the {told.of}"
    noise = f"beyond the noise at {LEVEL}" if told.p <= LEVEL else f"not distinguishable from noise at {LEVEL}"
    return f"{gap} ± {told.stderr:.2g} {of}, p = {told.p:.2g}: {noise}."


def _explained(found: Sequence[Difference]) -> str:
    """What of the differences can make results differ, in a sentence."""
    stages = list(dict.fromkeys(d.affects for d in found if d.affects != "nothing" and not d.rounding))
    if stages:
        words = stages[0] if len(stages) == 1 else f"{', '.join(stages[:-1])} and {stages[-1]}"
        return f"What differs in {words} can explain it."
    if any(d.affects != "nothing" for d in found):
        return "Only what changes rounding differs: it explains last digits, and what training makes of them."
    return "Nothing that is recorded explains a difference."


def number_differences(a: NamedEvaluation, b: NamedEvaluation) -> Iterator[Difference]:
    """What differs between what two numbers depend on."""
    trained: list[Difference] = []
    if a.folder != b.folder:
        if all(RunFolder(number.folder).config.is_file() for number in (a, b)):
            trained = list(training_differences(a.folder, b.folder))
        elif a.record["training"] != b.record["training"]:
            trained = [Difference("training", a.record["training"], b.record["training"], "training")]
    yield from trained
    for difference in record_differences(a.record, b.record):
        # Other weights are what another training comes to.
        if not (trained and difference.key == "checkpoint.fingerprint"):
            yield difference


def record_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """What differs between two records from sampling on: checkpoint, recipe, metric, reference, environments."""
    yield from _settings(a["checkpoint"], b["checkpoint"], "sampling", "checkpoint.")
    recipes = [dict(record["sampling"]["recipe"]) for record in (a, b)]
    for recipe in recipes:
        recipe.pop("step", None)  # The checkpoint's.
    yield from _settings(recipes[0], recipes[1], "sampling")
    if recipes[0] == recipes[1]:
        for key in ("times", "last_step", "rounding"):
            yield from _settings({key: a["sampling"][key]}, {key: b["sampling"][key]}, "sampling")
        yield from _settings({"nfe": a["nfe"]}, {"nfe": b["nfe"]}, "sampling")
    before = a["sampling"].get("environment"), b["sampling"].get("environment")
    if all(before):
        yield from environment_differences(*before, "sampling", _used(a, b))
    yield from _settings(a["metric"], b["metric"], "evaluation", "metric.")
    yield from _settings(a["reference"], b["reference"], "evaluation", "reference.")
    yield from _settings(a["features"] or {}, b["features"] or {}, "evaluation", "features.")
    yield from environment_differences(a["environment"], b["environment"], "evaluation", _used(a, b))


def training_differences(a: Path, b: Path) -> Iterator[Difference]:
    """What differs between what two runs were trained with."""
    first, second = read_config_of(a), read_config_of(b)
    plain = first.plain(), second.plain()
    fixed = [{key: told[key] for key in TRAINING_KEYS} for told in plain]
    yield from _settings(fixed[0], fixed[1], "training")
    for key, (x, y) in _unequal(plain[0]["run"], plain[1]["run"]):
        affects: Stage = "training" if key in ROUNDING_NOTE else "nothing"
        yield Difference(f"run.{key}", x, y, affects, rounding=affects != "nothing")
    made = [RunFolder(f).read_environment() for f in (a, b)]
    for what in ("data", "autoencoder"):
        yield from _settings({what: made[0].get(what)}, {what: made[1].get(what)}, "training", "fingerprint of ")
    if all(made):
        yield from environment_differences(made[0], made[1], "training", _names(plain[0]) | _names(plain[1]))


def environment_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], stage: Stage, used: set[str] | None = None
) -> Iterator[Difference]:
    """What differs between two records of `sitkit.runs.environment.environment`.

    used: names of the components that were; a plugin that brings none of them affects nothing.  None: not known.
    """
    where = f"{stage}: "
    if code_version(a) != code_version(b):
        yield Difference(f"{where}code", code_version(a), code_version(b), stage)
    for name, (x, y) in _unequal(a.get("packages") or {}, b.get("packages") or {}):
        if name != "sitkit":
            yield Difference(f"{where}{name}", x, y, "nothing" if name in BYSTANDERS else stage)
    codes = [{**(told.get("plugins") or {}), **_commits(told)} for told in (a, b)]
    matter = {**_brings(a), **_brings(b)}
    for name, (x, y) in _unequal(*codes):
        plugin = name.partition(" ")[0]
        idle = used is not None and not (matter.get(plugin, set()) & used)
        yield Difference(f"{where}plugin {name}", x, y, "nothing" if idle else stage)
    for key in MACHINE:
        for _, (x, y) in _unequal({key: a.get(key)}, {key: b.get(key)}):
            yield Difference(f"{where}{key}", x, y, stage, rounding=True)
    if a.get("before") != b.get("before"):
        x, y = (f"{len(told.get('before') or ())} before it" for told in (a, b))
        yield Difference(f"{where}continued", x, y, stage)


def _commits(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} code": state for name, state in (environment.get("plugin_code") or {}).items()}


def _brings(environment: Mapping[str, Any]) -> dict[str, set[str]]:
    """The names of the components that each plugin brings."""
    packages = {str(package): name for name, package in (environment.get("plugins") or {}).items()}
    found: dict[str, set[str]] = {}
    for component, package in (environment.get("components") or {}).items():
        found.setdefault(packages.get(package, package), set()).add(component.partition(" ")[2])
    return found


def _used(a: Mapping[str, Any], b: Mapping[str, Any]) -> set[str]:
    return _names([record[key] for record in (a, b) for key in ("sampling", "metric", "reference")])


def _names(value: Any) -> set[str]:
    """Every name of a component within plain values."""
    if isinstance(value, Mapping):
        own = {value["name"]} if isinstance(value.get("name"), str) else set()
        return own.union(*(_names(v) for v in value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(_names, value))
    return set()


def _settings(a: Mapping[str, Any], b: Mapping[str, Any], affects: Stage, before: str = "") -> Iterator[Difference]:
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping) and x.get("name") == y.get("name"):
            yield from _settings(x, y, affects, f"{before}{key}.")
        elif x != y:
            yield Difference(f"{before}{key}", describe_difference(x), describe_difference(y), affects)


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """The keys whose values differ, with both in few words."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield key, (describe_difference(a.get(key)), describe_difference(b.get(key)))


def describe_difference(value: Any) -> str:
    """A plain value in a line: a component as name(field=value, ...), a long list by its length, a hash by its beginning."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        fields = ", ".join(f"{k}={describe_difference(v)}" for k, v in value.items() if k != "name" and v is not None)
        return f"{value['name']}({fields})" if "name" in value and fields else str(value.get("name", fields))
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values" if len(value) > 8 else f"[{', '.join(map(describe_difference, value))}]"
    text = str(value)
    return text[:12] if HASH.fullmatch(text) else text
