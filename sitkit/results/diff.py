"""The differences between two runs or two numbers, and whether they can explain that the results differ."""

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
from sitkit.runs.run import load_weights
from sitkit.runs.run_folder import RunFolder, find_run, read_config_of
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import digest_of

Stage = Literal["training", "sampling", "evaluation", "nothing"]
# Packages that compute nothing.
BYSTANDERS = ("sitkit", "pydantic", "optuna", "mlflow")
# Properties of a machine that change the order of sums, and with it the last digits.
MACHINE = ("python", "platform", "device", "cpu", "cuda", "threads", "processes")
HASH = re.compile("[0-9a-f]{40,}")
# Settings of `run` that change the order of sums.
ROUNDING_SETTINGS = ("device", "threads", "compile", "parallel")


class Difference(NamedTuple):
    """A setting, package or property that differs.

    Attributes:
        key: its name.
        a, b: its two values, as text.
        affects: the first stage that it can change, and with it all later stages.
        rounding: whether it changes last digits only, which a training or an adaptive solver may amplify.
    """

    key: str
    a: str
    b: str
    affects: Stage
    rounding: bool = False


class Differences(NamedTuple):
    """The result of `diff`.

    Attributes:
        a, b: the names of the two runs or numbers.
        differences: everything that differs.
        comparison: a - b over the common seeds; None for runs, for different metrics, and without common seeds.
        verdict: whether the results differ, and which differences can explain it.
    """

    a: str
    b: str
    differences: list[Difference]
    comparison: Comparison | None
    verdict: str


def diff(a: str, b: str, *, runs: str | Path = "runs") -> Differences:
    """Compare two runs or two numbers.

    A row and column of a study stands for all its seeds: the settings are those of the first common seed, and the
    results are compared over all common seeds.

    Args:
        a, b: two runs, or two numbers as in `explain`.
        runs: the folder of runs.

    Returns:
        The differences, each with the stage that it affects, and a verdict.

    Raises:
        UserError: a name is unknown or ambiguous, or one is a run and the other a number.
    """
    root = Path(runs)
    folders = [_run(name, root) for name in (a, b)]
    if folders[0] is not None and folders[1] is not None:
        return _of_runs(folders[0], folders[1])
    if folders[0] is not None or folders[1] is not None:
        run, other = (a, b) if folders[0] is not None else (b, a)
        numbers(other, root)  # Raises UserError for an unknown name.
        raise UserError(f"Give two runs or two numbers; {run} is a run and {other} is not.")
    return _of_numbers(_equal_but_seeds(a, root), _equal_but_seeds(b, root), a, b)


def _run(name: str, root: Path) -> Path | None:
    try:
        return find_run(name, root)
    except UserError:
        return None


def _equal_but_seeds(name: str, root: Path) -> list[NamedEvaluation]:
    """The numbers of a name, which may differ in their seeds only."""
    group = numbers(name, root)
    kinds = {json.dumps([number.record["metric"], _without_seed(number)], sort_keys=True) for number in group}
    if len(kinds) > 1:
        several = ", ".join(number.name for number in group[:3])
        raise UserError(f"{name} means {len(group)} numbers of {len(kinds)} kinds ({several}, ...): name one.")
    return group


def _without_seed(number: NamedEvaluation) -> Any:
    recipe = number.record["sampling"]["recipe"]
    cell = number.cell
    return {**recipe, "sample": {**recipe["sample"], "seed": None}}, cell and (cell.row, cell.column)


def _of_runs(a: Path, b: Path) -> Differences:
    differences = list(training_differences(a, b))
    equal = _weights(a) == _weights(b)
    verdict = "Their weights are equal to the bit." if equal else f"Their weights differ. {_explained(differences)}"
    return Differences(a.name, b.name, differences, None, verdict)


def _weights(folder: Path) -> Any:
    config = read_config_of(folder)
    if not config.backbone.trainable:
        return None
    step, state, _ = load_weights(folder, config)
    return step, digest_of(state)


def _of_numbers(a: list[NamedEvaluation], b: list[NamedEvaluation], first: str, second: str) -> Differences:
    by_seed = {number.seeds: number for number in b}
    pairs = [(number, by_seed[number.seeds]) for number in a if number.seeds in by_seed]
    x, y = pairs[0] if pairs else (a[0], b[0])
    differences, comparison = list(number_differences(x, y)), None
    if x.metric != y.metric:
        verdict = f"{x.metric} and {y.metric} cannot be compared."
    elif not pairs:
        verdict = f"They differ by {x.value - y.value:.6g} (a - b)."
    else:
        comparison = paired({x.seeds: x.estimate for x, _ in pairs}, {y.seeds: y.estimate for _, y in pairs})
        if all(x.record["value"] == y.record["value"] for x, y in pairs):
            equal = "Their values are equal to the last digit."
            return Differences(first, second, differences, comparison, equal)
        verdict = _described(comparison)
    return Differences(first, second, differences, comparison, f"{verdict} {_explained(differences)}")


def _described(comparison: Comparison) -> str:
    gap = f"They differ by {comparison.difference:.6g} (a - b)"
    if comparison.p is None or comparison.stderr is None:
        return f"{gap}; one number each gives no error of the difference."
    of = (
        f"over {comparison.units} {comparison.of}"
        if comparison.units > 1
        else f"by the errors within the {comparison.of}"
    )
    noise = f"beyond the noise at {LEVEL}" if comparison.p <= LEVEL else f"not distinguishable from noise at {LEVEL}"
    return f"{gap} ± {comparison.stderr:.2g} {of}, p = {comparison.p:.2g}: {noise}."


def _explained(differences: Sequence[Difference]) -> str:
    """A sentence: which differences can explain that the results differ."""
    stages = list(dict.fromkeys(d.affects for d in differences if d.affects != "nothing" and not d.rounding))
    if stages:
        words = stages[0] if len(stages) == 1 else f"{', '.join(stages[:-1])} and {stages[-1]}"
        return f"The differences in {words} can explain it."
    if any(d.affects != "nothing" for d in differences):
        return "Only properties that change rounding differ: they explain last digits, which a training can amplify."
    return "No recorded property explains a difference."


def number_differences(a: NamedEvaluation, b: NamedEvaluation) -> Iterator[Difference]:
    """Yield the differences between everything that two numbers depend on."""
    trained: list[Difference] = []
    if a.folder != b.folder:
        if all(RunFolder(number.folder).config.is_file() for number in (a, b)):
            trained = list(training_differences(a.folder, b.folder))
        elif a.record["training"] != b.record["training"]:
            trained = [Difference("training", a.record["training"], b.record["training"], "training")]
    yield from trained
    for difference in record_differences(a.record, b.record):
        # The weights of different trainings differ in any case.
        if not (trained and difference.key == "checkpoint.fingerprint"):
            yield difference


def record_differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the differences between two records: checkpoint, recipe, metric, reference, features, environments."""
    yield from _settings(a["checkpoint"], b["checkpoint"], affects="sampling", prefix="checkpoint.")
    # The step belongs to the checkpoint.
    recipes = [{key: v for key, v in r["sampling"]["recipe"].items() if key != "step"} for r in (a, b)]
    yield from _settings(*recipes, affects="sampling")
    if recipes[0] == recipes[1]:
        keys = ("times", "last_step", "rounding")
        solves = [{key: r["sampling"][key] for key in keys} | {"nfe": r["nfe"]} for r in (a, b)]
        yield from _settings(*solves, affects="sampling", deep=False)
    first, second = (r["sampling"].get("environment") for r in (a, b))
    used = _names([r[key] for r in (a, b) for key in ("sampling", "metric", "reference")])
    if first and second:
        yield from environment_differences(first, second, "sampling", used)
    for key in ("metric", "reference", "features"):
        yield from _settings(a[key] or {}, b[key] or {}, affects="evaluation", prefix=f"{key}.")
    yield from environment_differences(a["environment"], b["environment"], "evaluation", used)


def training_differences(a: Path, b: Path) -> Iterator[Difference]:
    """Yield the differences between two trainings: settings, data, autoencoder, environments."""
    first, second = read_config_of(a).plain(), read_config_of(b).plain()
    fixed = [{key: plain[key] for key in TRAINING_KEYS} for plain in (first, second)]
    yield from _settings(*fixed, affects="training")
    for key, x, y in _changes(first["run"], second["run"]):
        rounding = key in ROUNDING_SETTINGS
        yield Difference(f"run.{key}", x, y, "training" if rounding else "nothing", rounding)
    before, after = (RunFolder(folder).read_environment() for folder in (a, b))
    prints = [{key: e.get(key) for key in ("data", "autoencoder")} for e in (before, after)]
    yield from _settings(*prints, affects="training", prefix="fingerprint of ", deep=False)
    if before and after:
        yield from environment_differences(before, after, "training", _names([first, second]))


def environment_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], stage: Stage, used: set[str] | None = None
) -> Iterator[Difference]:
    """Yield the differences between two records of `sitkit.runs.environment.environment`.

    Args:
        a, b: the records.
        stage: the stage that ran in these environments.
        used: names of the components that were used; a plugin without any of them affects nothing. None: not known.
    """
    where = f"{stage}: "
    if code_version(a) != code_version(b):
        yield Difference(f"{where}code", code_version(a), code_version(b), stage)
    for name, x, y in _changes(a.get("packages") or {}, b.get("packages") or {}):
        if name != "sitkit":
            yield Difference(f"{where}{name}", x, y, "nothing" if name in BYSTANDERS else stage)
    components = {**_components_of_plugins(a), **_components_of_plugins(b)}
    for name, x, y in _changes(*({**(e.get("plugins") or {}), **_plugin_code(e)} for e in (a, b))):
        idle = used is not None and not (components.get(name.partition(" ")[0], set()) & used)
        yield Difference(f"{where}plugin {name}", x, y, "nothing" if idle else stage)
    for key, x, y in _changes(*({key: e.get(key) for key in MACHINE} for e in (a, b))):
        yield Difference(f"{where}{key}", x, y, stage, rounding=True)
    if a.get("before") != b.get("before"):
        x, y = (f"{len(e.get('before') or ())} before it" for e in (a, b))
        yield Difference(f"{where}continued", x, y, stage)


def _plugin_code(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name} code": state for name, state in (environment.get("plugin_code") or {}).items()}


def _components_of_plugins(environment: Mapping[str, Any]) -> dict[str, set[str]]:
    """The names of the components of each plugin."""
    plugins = {str(package): name for name, package in (environment.get("plugins") or {}).items()}
    components: dict[str, set[str]] = {}
    for component, package in (environment.get("components") or {}).items():
        components.setdefault(plugins.get(package, package), set()).add(component.partition(" ")[2])
    return components


def _names(value: Any) -> set[str]:
    """Every name of a component within plain values."""
    if isinstance(value, Mapping):
        own = {value["name"]} if isinstance(value.get("name"), str) else set()
        return own.union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, (list, tuple)) else set()


def _settings(
    a: Mapping[str, Any], b: Mapping[str, Any], *, affects: Stage, prefix: str = "", deep: bool = True
) -> Iterator[Difference]:
    for key, x, y in _changes(a, b, prefix=prefix, deep=deep):
        yield Difference(key, x, y, affects)


def _changes(
    a: Mapping[str, Any], b: Mapping[str, Any], *, prefix: str = "", deep: bool = False
) -> Iterator[tuple[str, str, str]]:
    """The keys whose values differ, with both values as text; `deep` looks into components of the same name."""
    for key in dict.fromkeys((*a, *b)):
        x, y = a.get(key), b.get(key)
        if deep and isinstance(x, Mapping) and isinstance(y, Mapping) and x.get("name") == y.get("name"):
            yield from _changes(x, y, prefix=f"{prefix}{key}.", deep=True)
        elif x != y:
            yield f"{prefix}{key}", describe_difference(x), describe_difference(y)


def describe_difference(value: Any) -> str:
    """Return a plain value in a line: name(field=value, ...) for a component, the start of a hash, the length of a list."""
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        fields = ", ".join(f"{k}={describe_difference(v)}" for k, v in value.items() if k != "name" and v is not None)
        return f"{value['name']}({fields})" if "name" in value and fields else str(value.get("name", fields))
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values" if len(value) > 8 else f"[{', '.join(map(describe_difference, value))}]"
    text = str(value)
    return text[:12] if HASH.fullmatch(text) else text
