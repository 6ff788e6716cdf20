"""A study's YAML file: rows and columns, crossed into cells."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sitkit.registry.settings_files import experiments
from sitkit.results.study_results import FACTS, PublishedNumber
from sitkit.runs.config.mappings import flat, merge, nest
from sitkit.runs.config.schema import Config, RunSettings, SampleSettings, TrainSettings
from sitkit.runs.config.sources import Layer, assemble, component_keys, locate, read_config, read_yaml, validate
from sitkit.runtime.errors import UserError, suggest
from sitkit.studies.study import Cell, Refused, Seeds, Study, StudyPlan, refusal, refused_at

# What a row says beside its settings.
ROW_KEYS = ("label", "paper", "columns")
# What a file must have something of to be a study.
NEEDED = ("rows", "columns", "grid", "seeds", "sample_seeds", "set", "base", "bases", "metric")


def read_study(
    path: Path | str,
    over: Layer | None = None,
    base: str | None = None,
    seeds: Seeds | None = None,
    sample_seeds: Seeds | None = None,
) -> StudyPlan:
    """The study in a file, or an experiment by name, and its cells, each checked.

    base, seeds, sample_seeds: in place of the file's own.

    Raises UserError with file, line and reason for what is wrong with the study itself; a cell that cannot be is an entry
    of the plan.
    """
    path = experiments.find(path)
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
        inside = f"bases.{name}."
        where |= {k.removeprefix(inside): v for k, v in layer.where.items() if k.startswith(inside)}
        study = validate(Study, merge(layer.values, study.bases[name]), where)
    given = {"seeds": seeds, "sample_seeds": sample_seeds}
    study = validate(Study, dict(study) | {k: v for k, v in given.items() if v is not None}, {})
    try:
        layers = [read_config(_beside(path, name)), Layer(study.set, _within(where, "set"))]
    except UserError as error:
        raise UserError(f"{'--base: ' if base else locate(where, ['base'])}{error}") from None
    if study.metric is not None:
        layers.append(Layer({"metric": study.metric}, where))
    if over is not None:
        layers.append(over)
    assemble(layers)  # What is wrong below the cells is wrong with all of them.
    entries = list(_Crossing(study, str(path), where, layers))
    if not entries:
        raise UserError(f"{locate(where, ['exclude'])}every cell of the study is excluded.")
    return StudyPlan(study, path, base, entries, _command(path, over, base, given))


def _command(
    path: Path, over: Layer | None, base: str | None, given: Mapping[str, Sequence[int] | None]
) -> tuple[str, ...]:
    """The words of `sitkit ablate` for a study with what was given in place of the file's own."""
    words = ["sitkit", "ablate", str(path), *(["--base", base] if base else [])]
    for name, seeds in given.items():
        if seeds is not None:
            words += [f"--{name.replace('_', '-')}", ",".join(map(str, seeds))]
    for key, value in flat(over.values if over else {}).items():
        if key != "run.folder":
            words += ["--set", f"{key}={json.dumps(value)}"]
        elif Path(value) != RunSettings.model_fields["folder"].default:
            words += ["--runs", str(value)]
    return tuple(words)


class _Crossing:
    """The cells of a study, in its order: row, column, training seed, sampling seed."""

    def __init__(self, study: Study, path: str, where: Mapping[str, str], layers: Sequence[Layer]) -> None:
        self.study, self.path, self.where = study, path, where
        self.columns = _columns(study, where)
        self.assemble = _Assembler(layers)
        self.matched = [False] * len(study.exclude)
        self._checked: dict[tuple[Any, ...], str] = {}

    def __iter__(self) -> Iterator[Cell | Refused]:
        titles: dict[str, int] = {}
        shown = {*self.columns, *FACTS}
        for i, row in enumerate(self.study.rows):
            place = locate(self.where, ["rows", str(i)]) or f"{self.path}: "
            self._check_row(row, place)
            title = ""
            for column, chosen in self.columns.items():
                layers = self._layers(i, row, column, chosen)
                values, where = self.assemble.values(layers)
                title = title or str(row.get("label") or _name(self.assemble.values(layers[:1])[0], row) or "base")
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

    def _layers(self, i: int, row: Mapping[str, Any], column: str, chosen: Layer) -> list[Layer]:
        settings = {k: v for k, v in row.items() if k not in ROW_KEYS}
        own = (row.get("columns") or {}).get(column, {})
        return [
            Layer(settings, _within(self.where, f"rows.{i}")),
            chosen,
            Layer(dict(own), _within(self.where, f"rows.{i}.columns.{column}")),
        ]

    def _check_row(self, row: Mapping[str, Any], place: str) -> None:
        own, paper = row.get("columns") or {}, row.get("paper")
        if not isinstance(own, Mapping) or not all(isinstance(settings, Mapping) for settings in own.values()):
            raise UserError(f"{place}columns of a row are settings for each column; got {own!r}.")
        numbers = paper if isinstance(paper, Mapping) and not _is_reference(paper) else {}
        for what, keys in (("the row has settings for", own), ("paper has a number for", numbers)):
            for key in keys:
                if key not in self.columns:
                    known = "; ".join(self.columns)
                    raise UserError(f"{place}{what} {key!r}.{suggest(key, self.columns)} Columns: {known}.")
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
        told = paper if isinstance(paper, Mapping) else {"value": paper}
        setting = self.study.setting | dict(told.get("setting", {}))
        return PublishedNumber(number=told["value"], source=told.get("source", self.study.source), setting=setting)

    def _excluded(self, row: str, column: str, values: Mapping[str, Any]) -> bool:
        out = False
        for i, told in enumerate(self.study.exclude):
            here = {"row": row, "column": column}
            if all(_matches(here[key] if key in here else _at(values, key), want) for key, want in told.items()):
                self.matched[i] = out = True
        return out

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
                    f"{place}show names {name!r}, which is no column, no setting, and not one of {', '.join(FACTS)}."
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
            config = self.assemble.config(values, where)
        except UserError as error:
            yield Refused(row, column, str(error))
            return
        why = self._refusal(config)
        if why:
            yield Refused(row, column, refused_at(place, row, column, why))
            return
        for seed in (config.train.seed,) if study.seeds is None else study.seeds:
            trained = config.model_copy(update={"train": self.assemble.seeded(config.train, seed)})
            for drawn in (config.sample.seed,) if study.sample_seeds is None else study.sample_seeds:
                sample = self.assemble.seeded(config.sample, drawn)
                yield Cell(row, column, seed, drawn, trained.model_copy(update={"sample": sample}), reference, place)

    def _refusal(self, config: Config) -> str:
        """Why a cell's sampling cannot be right, or ""; asked once for each way of sampling."""
        key = (config.sampler, config.interp, config.target, config.diffusion, config.guidance)
        if key not in self._checked:
            self._checked[key] = refusal(config)
        return self._checked[key]


class _Assembler:
    """Configurations on top of the same layers, parts with equal settings built once and shared.

    A study of 10,000 cells has few different parts: building each of them once is what makes planning it quick and small.
    """

    GROUPS = {"train": TrainSettings, "sample": SampleSettings, "run": RunSettings}

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._below = list(layers)
        self._base: Any = {}
        for layer in layers:
            self._base = merge(self._base, layer.values)
        self._where = {key: place for layer in layers for key, place in layer.where.items()}
        self._parts: dict[tuple[str, str], Any] = {}
        self._seeded: dict[tuple[Any, int], Any] = {}
        self._registries = component_keys()

    def values(self, layers: Sequence[Layer]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        """The settings that the layers make on top of those below, and where they came from."""
        values = self._base
        for layer in layers:
            values = merge(values, layer.values)
        return values, {key: place for layer in layers for key, place in layer.where.items()}

    def config(self, values: Mapping[str, Any], where: Mapping[str, str]) -> Config:
        """The configuration of these settings.  Raises UserError with where and what instead."""
        try:
            return Config.model_validate({key: self._part(key, value) for key, value in values.items()})
        except ValueError:
            # Built part by part it cannot say where; whole, it can.
            return validate(Config, values, {**self._where, **where})

    def _part(self, key: str, value: Any) -> Any:
        if key not in self._registries and key not in self.GROUPS:
            return value
        asked = (key, json.dumps(value, sort_keys=True, default=repr))
        if asked not in self._parts:
            self._parts[asked] = self._build(key, value)
        return self._parts[asked]

    def _build(self, key: str, value: Any) -> Any:
        if key in self.GROUPS:
            return self.GROUPS[key].model_validate(value)
        parse = self._registries[key].parse
        return tuple(map(parse, value)) if isinstance(value, (list, tuple)) else parse(value)

    def seeded(self, settings: Any, seed: int) -> Any:
        """Settings with another seed; equal ones are one object."""
        if settings.seed == seed:
            return settings
        asked = (settings, seed)
        if asked not in self._seeded:
            self._seeded[asked] = settings.model_copy(update={"seed": seed})
        return self._seeded[asked]


def _within(where: Mapping[str, str], key: str) -> dict[str, str]:
    return {k.removeprefix(f"{key}."): v for k, v in where.items() if k.startswith(f"{key}.")}


def _columns(study: Study, where: Mapping[str, str]) -> dict[str, Layer]:
    """Settings by the name of the column: the named columns crossed with the axes of the grid."""
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
    """A base that is a file is found beside the study."""
    beside = study.parent / base
    return str(beside) if Path(base).suffix in (".yaml", ".yml") and beside.exists() else base


def _name(values: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """A row without a label is called by what it sets."""
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
    """Whether a setting is what an exclusion says; a component is matched by its name, or by some of its fields."""
    if isinstance(value, Mapping) and isinstance(want, str):
        return value.get("name") == want
    if isinstance(value, Mapping) and isinstance(want, Mapping):
        return all(key in value and _matches(value[key], part) for key, part in want.items())
    return value == want
