"""A study's YAML file: rows and columns, crossed into cells."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from sitkit.registry.settings_files import experiments
from sitkit.results.study_results import FACTS, PublishedNumber
from sitkit.runs.config.mappings import flat, merge, nest
from sitkit.runs.config.schema import Config, RunSettings, SampleSettings, TrainSettings
from sitkit.runs.config.sources import (
    TRAINING_SETTINGS,
    Layer,
    assemble,
    component_keys,
    flags_to_layer,
    locate,
    read_config,
    read_yaml,
    validate,
)
from sitkit.runtime.errors import UserError, suggest
from sitkit.studies.study import Cell, Refused, Study, StudyFlags, StudyPlan, plan_untrained, refused_at

# Keys of a row that are not settings.
ROW_KEYS = ("label", "paper", "columns")
# A bound far above every use.
MOST_CELLS = 10**6
# A study must have at least one of these keys.
NEEDED = ("rows", "columns", "grid", "seeds", "sample_seeds", "set", "base", "bases", "metric")
# Settings that are groups; every other key of a configuration takes a component.
GROUPS = {"train": TrainSettings, "sample": SampleSettings, "run": RunSettings}


def flags_layer(flags: StudyFlags) -> Layer:
    """Return the settings on top of every cell's that the keyword arguments make."""
    values = {key: flags.get(key) for key in ("runs", "device")}
    return flags_to_layer(values, flags.get("settings"), TRAINING_SETTINGS)


def read_study(path: Path | str, **flags: Unpack[StudyFlags]) -> StudyPlan:
    """Return the study in a file, or the experiment of that name, and its cells, each checked.

    flags: what takes the place of the file's own settings.
    Raises UserError with file, line and reason for a mistake in the study itself; an impossible cell is an entry of the
    plan.
    """
    path, base = experiments.find(path), flags.get("base")
    layer = read_yaml(path)
    study: Study = validate(Study, layer.values, layer.where)
    if not study.model_fields_set.intersection(NEEDED):
        raise UserError(
            f"{path}: there is nothing to compare: a study has rows, columns, a grid or seeds, "
            "as in `rows: [{interp: linear}, {interp: gvp}]`."
        )
    where = dict(layer.where)
    name = base or study.base
    if name in study.bases:
        where |= _within(where, f"bases.{name}")
        study = validate(Study, merge(layer.values, study.bases[name]), where)
    seeds = {key: value for key in ("seeds", "sample_seeds") if (value := flags.get(key)) is not None}
    study = validate(Study, dict(study) | seeds, {})
    try:
        layers = [read_config(_beside(path, name)), Layer(study.set, _within(where, "set"))]
    except UserError as error:
        raise UserError(f"{'--base: ' if base else locate(where, ['base'])}{error}") from None
    if study.metric is not None:
        layers.append(Layer({"metric": study.metric}, where))
    over = flags_layer(flags)
    layers.append(over)
    assemble(layers)  # A mistake below the cells is a mistake of all of them.
    cells = len(study.rows) * max(1, len(study.columns)) * math.prod(map(len, study.grid.values()))
    cells *= len(study.seeds or (0,)) * len(study.sample_seeds or (0,))
    if cells > MOST_CELLS:
        raise UserError(f"{path}: {cells:,} cells; a study has at most {MOST_CELLS:,}: cross fewer values.")
    entries = list(_Crossing(study, str(path), where, layers))
    if not entries:
        raise UserError(f"{locate(where, ['exclude'])}every cell of the study is excluded.")
    return StudyPlan(study, path, base, entries, _command(path, base, seeds, over))


def _command(path: Path, base: str | None, seeds: Mapping[str, Sequence[int]], over: Layer) -> tuple[str, ...]:
    """Return the words of `sitkit ablate` for a study with everything that replaces the file's own settings."""
    words = ["sitkit", "ablate", str(path), *(["--base", base] if base else [])]
    for name, values in seeds.items():
        words += [f"--{name.replace('_', '-')}", ",".join(map(str, values))]
    for key, value in flat(over.values).items():
        if key != "run.folder":
            words += ["--set", f"{key}={json.dumps(value)}"]
        elif Path(value) != RunSettings.model_fields["folder"].default:
            words += ["--runs", str(value)]
    return tuple(words)


class _Crossing:
    """The cells of a study, in the order row, column, training seed, sampling seed."""

    def __init__(self, study: Study, path: str, where: Mapping[str, str], layers: Sequence[Layer]) -> None:
        self.study, self.path, self.where = study, path, where
        self.columns = _columns(study, where)
        self.assembler = _Assembler(layers)
        self.matched = [False] * len(study.exclude)

    def __iter__(self) -> Iterator[Cell | Refused]:
        titles: dict[str, int] = {}
        shown = {*self.columns, *FACTS}
        for i, row in enumerate(self.study.rows):
            place = locate(self.where, ["rows", str(i)]) or f"{self.path}: "
            self._check_row(row, place)
            title = ""
            for column, settings in self.columns.items():
                layers = self._layers(i, row, column, settings)
                values, where = self.assembler.values(layers)
                title = title or str(row.get("label") or _name(self.assembler.values(layers[:1])[0], row) or "base")
                if titles.setdefault(title, i) != i:
                    raise UserError(f"{place}two rows are called {title!r}: give each a label of its own.")
                if self._excluded(title, column, values):
                    continue
                reference = self._reference(row, column)
                for entry in self._seeded(title, column, values, where, layers, place, reference):
                    if isinstance(entry, Cell) and not shown.issuperset(self.study.show):
                        shown |= flat(entry.config.plain()).keys() | entry.config.plain().keys()
                    yield entry
        self._check_exclusions()
        self._check_show(shown)

    def _layers(self, i: int, row: Mapping[str, Any], column: str, settings: Layer) -> list[Layer]:
        """Return the settings of the row, of the column, and of the row in this column alone."""
        own = {k: v for k, v in row.items() if k not in ROW_KEYS}
        alone = dict((row.get("columns") or {}).get(column, {}))
        where = _within(self.where, f"rows.{i}")
        return [Layer(own, where), settings, Layer(alone, _within(where, f"columns.{column}"))]

    def _check_row(self, row: Mapping[str, Any], place: str) -> None:
        own, paper = row.get("columns") or {}, row.get("paper")
        if not isinstance(own, Mapping) or not all(isinstance(settings, Mapping) for settings in own.values()):
            raise UserError(f"{place}columns of a row are settings for each column; got {own!r}.")
        numbers = paper if isinstance(paper, Mapping) and not _is_reference(paper) else {}
        for text, keys in (("the row has settings for", own), ("paper has a number for", numbers)):
            for key in keys:
                if key not in self.columns:
                    known = "; ".join(self.columns)
                    raise UserError(f"{place}{text} {key!r}.{suggest(key, self.columns)} Columns: {known}.")
        for number in numbers.values() if numbers else () if paper is None else (paper,):
            if not (_is_number(number) or _is_reference(number)):
                raise UserError(
                    f"{place}paper is a number, or a number for each column, or {{value, source, setting}} in the place "
                    f"of a number; got {number!r}."
                )

    def _reference(self, row: Mapping[str, Any], column: str) -> PublishedNumber | None:
        paper = row.get("paper")
        if isinstance(paper, Mapping) and not _is_reference(paper):
            paper = paper.get(column)
        if paper is None:
            return None
        entry = paper if isinstance(paper, Mapping) else {"value": paper}
        setting = self.study.setting | dict(entry.get("setting", {}))
        return PublishedNumber(number=entry["value"], source=entry.get("source", self.study.source), setting=setting)

    def _excluded(self, row: str, column: str, values: Mapping[str, Any]) -> bool:
        names, excluded = {"row": row, "column": column}, False
        for i, rule in enumerate(self.study.exclude):
            if all(_matches(names[key] if key in names else _at(values, key), want) for key, want in rule.items()):
                self.matched[i] = excluded = True
        return excluded

    def _check_exclusions(self) -> None:
        for i, matched in enumerate(self.matched):
            if not matched:
                place = locate(self.where, ["exclude", str(i)])
                raise UserError(f"{place}no cell is {dict(self.study.exclude[i])}, so none is excluded by it.")

    def _check_show(self, known: set[str]) -> None:
        for i, name in enumerate(self.study.show):
            if name not in known:
                place = locate(self.where, ["show", str(i)])
                raise UserError(
                    f"{place}show names {name!r}, which is neither a column nor a setting nor one of {', '.join(FACTS)}."
                    f"{suggest(name, list(known))} Columns: {'; '.join(self.columns)}."
                )

    def _seeded(
        self,
        row: str,
        column: str,
        values: Mapping[str, Any],
        where: Mapping[str, str],
        layers: Sequence[Layer],
        place: str,
        reference: PublishedNumber | None,
    ) -> Iterator[Cell | Refused]:
        study = self.study
        for key, seeds in (("train.seed", study.seeds), ("sample.seed", study.sample_seeds)):
            setter = next((layer for layer in layers if key in flat(layer.values)), None)
            if seeds is not None and setter is not None:
                name = "seeds" if key == "train.seed" else "sample_seeds"
                raise UserError(
                    f"{setter.where.get(key, place)}: {key} is set here and by the study's {name}: use one."
                )
        try:
            config = self.assembler.config(values, where)
        except UserError as error:
            yield Refused(row, column, str(error))
            return
        plan = plan_untrained(config)
        if isinstance(plan, str):
            yield Refused(row, column, refused_at(place, row, column, plan))
            return
        for seed in (config.train.seed,) if study.seeds is None else study.seeds:
            train = self.assembler.with_seed(config.train, seed)
            for sample_seed in (config.sample.seed,) if study.sample_seeds is None else study.sample_seeds:
                sample = self.assembler.with_seed(config.sample, sample_seed)
                cell = config.model_copy(update={"train": train, "sample": sample})
                yield Cell(row, column, seed, sample_seed, cell, reference, place)


class _Assembler:
    """Configurations on top of the same layers; parts with equal settings are built once and shared.

    A study of 10,000 cells has few different parts, and sharing them makes its plan quick and small.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._base: Any = functools.reduce(merge, (layer.values for layer in layers), {})
        self._where = _places(layers)
        self._part = functools.cache(_build_part)
        self.with_seed: Callable[[Any, int], Any] = functools.cache(_with_seed)

    def values(self, layers: Sequence[Layer]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """Return the settings of these layers on top of the ones below, and their places."""
        return functools.reduce(merge, (layer.values for layer in layers), self._base), _places(layers)

    def config(self, values: Mapping[str, Any], where: Mapping[str, str]) -> Config:
        """Return the configuration of these settings.  Raises UserError with the place and what to write instead."""
        try:
            return Config.model_validate({key: self._part(key, json.dumps(value)) for key, value in values.items()})
        except (TypeError, ValueError):
            # The parts alone do not know their place; the whole does.
            return validate(Config, values, {**self._where, **where})


def _places(layers: Sequence[Layer]) -> dict[str, str]:
    return {key: place for layer in layers for key, place in layer.where.items()}


def _build_part(key: str, text: str) -> Any:
    value, registry = json.loads(text), component_keys().get(key)
    if registry is None:
        return GROUPS[key].model_validate(value) if key in GROUPS else value
    return tuple(map(registry.parse, value)) if isinstance(value, list) else registry.parse(value)


def _with_seed(settings: Any, seed: int) -> Any:
    return settings if settings.seed == seed else settings.model_copy(update={"seed": seed})


def _within(where: Mapping[str, str], key: str) -> dict[str, str]:
    return {k.removeprefix(f"{key}."): v for k, v in where.items() if k.startswith(f"{key}.")}


def _columns(study: Study, where: Mapping[str, str]) -> dict[str, Layer]:
    """Return settings by the name of the column: the named columns crossed with the axes of the grid."""
    columns: dict[str, Layer] = {}
    for named, values in itertools.product(study.columns or {"": {}}, itertools.product(*study.grid.values())):
        settings: Any = study.columns.get(named, {})
        lines = _within(where, f"columns.{named}")
        for key, value in zip(study.grid, values, strict=True):
            settings = merge(settings, nest({key: value}))
            lines[key] = where.get(f"grid.{key}", "")
        title = ", ".join(filter(None, (named, *map(_value_name, values))))
        columns[title] = Layer(settings, lines)
    return columns


def _beside(study: Path, base: str) -> str:
    """Return the path of a base that is a file beside the study."""
    beside = study.parent / base
    return str(beside) if Path(base).suffix in (".yaml", ".yml") and beside.exists() else base


def _name(values: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return the name of a row without a label: its settings."""
    return " ".join(_value_name(values[key]) for key in row if key not in ROW_KEYS and key in values)


def _value_name(value: Any) -> str:
    if isinstance(value, Mapping):
        rest = ", ".join(f"{k}={v}" for k, v in value.items() if k != "name")
        return f"{value.get('name', '')}{f'({rest})' if rest else ''}"
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and _is_number(value.get("value"))
        and value.keys() <= {"value", "source", "setting"}
        and isinstance(value.get("setting", {}), Mapping)
    )


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _matches(value: Any, want: Any) -> bool:
    """Return whether a setting has the value of an exclusion; a component matches by its name or by some of its fields."""
    if isinstance(value, Mapping) and isinstance(want, str):
        return value.get("name") == want
    if isinstance(value, Mapping) and isinstance(want, Mapping):
        return all(key in value and _matches(value[key], part) for key, part in want.items())
    return value == want
