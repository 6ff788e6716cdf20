"""Registries: components by name, those of sitkit and those of plugins.

A component is a frozen dataclass whose fields are its configuration.  Every extension point of sitkit is a `Registry` at
the bottom of this module; `sitkit.registry.loading` imports the modules that register components.  This module does not
import torch, so that names are listed quickly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import sys
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from sitkit.registry.name_table import Claim, NameTable
from sitkit.registry.plugin import Plugin, broken, ensure_loaded, left_out, owner
from sitkit.runtime.errors import UserError, suggest
from sitkit.runtime.hashing import file_digest

if TYPE_CHECKING:
    from sitkit.registry.measures import Measures


@dataclass(frozen=True)
class Component(ABC):
    """Base of all components.  The dataclass fields are the configuration.

    Class attribute `version`: raise it when a formula or the meaning of a default changes, so that results made before and
    after have different identities.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: ClassVar[str] = ""
    version: ClassVar[int] = 1

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Let a field annotated with a registry's base class take a name, a mapping with `name`, or a component."""
        base = f"{cls.__module__}:{cls.__qualname__}"
        for registry in registries.values():
            if registry.base == base:
                from pydantic_core import core_schema

                return core_schema.no_info_plain_validator_function(registry.parse)
        return handler(source)

    def bind(self, run: Measures) -> Self:
        """Return this component with the measurements of a trained run that it needs; itself if it needs none.

        By default every field that is a component is bound.  Override it in a component that needs a measurement itself.

        Args:
            run: the run, or `sitkit.registry.measures.UNTRAINED` to plan before training.

        Returns:
            A component of the same class.
        """
        inner = {
            f.name: value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), Component)
        }
        bound = {name: value.bind(run) for name, value in inner.items()}
        return dataclasses.replace(self, **bound) if any(bound[name] is not inner[name] for name in inner) else self

    def places(self) -> tuple[str, ...]:
        """Return the fields that are paths on this machine.  Identities hold the `content` of the files, not the paths."""
        return ()

    def content(self) -> str:
        """Return the SHA-256 of the files in `places`.  Raises UserError if one cannot be read."""
        return file_digest(*(str(getattr(self, place)) for place in self.places()))

    @classmethod
    def test_fields(cls) -> Sequence[Mapping[str, Any]]:
        """Return the fields of the instances that `sitkit plugin test` checks; override it for fields without defaults."""
        return ({},)


C = TypeVar("C", bound=Component)
K = TypeVar("K", bound=type[Component])


@dataclass(frozen=True)
class Preset:
    """A second name for a component, with some of its fields set.

    Args:
        of: the name of the component, or of another preset.
        fields: values of the component's fields.
    """

    of: str
    fields: Mapping[str, Any]


class Registry(NameTable, Mapping[str, type[C]], Generic[C]):
    """Component classes of one kind by name.  It is read-only but for `register` and `preset`.

    `registry["gvp"]` is the class, `registry.create("gvp")` an instance with checked fields.
    """

    def __init__(self, kind: str, plural: str, flag: str, base: str) -> None:
        super().__init__(kind, plural)
        self.flag, self.base = flag, base
        registries[plural] = self

    @property
    def base_class(self) -> type[C]:
        """The base class of the components of this kind."""
        module, _, attribute = self.base.partition(":")
        return getattr(importlib.import_module(module), attribute)

    @property
    def purpose(self) -> str:
        """One sentence that says what a component of this kind is, without its full stop."""
        return (self.base_class.__doc__ or "").strip().partition("\n")[0].partition(".  ")[0].removesuffix(".")

    def register(self, name: str) -> Callable[[K], K]:
        """Return a class decorator that registers a component class.

        Args:
            name: the name of the component.

        Returns:
            The decorator.  It raises UserError for a registered name, an abstract class, and fields without @dataclass.
        """

        def add(cls: K) -> K:
            where, base = f"{cls.__module__}.{cls.__qualname__}", self.base_class
            if not issubclass(cls, base):
                raise UserError(f"{self.kind} {name!r} ({where}) must subclass {base.__module__}.{base.__qualname__}.")
            if inspect.isabstract(cls):
                lacks = ", ".join(sorted(cls.__abstractmethods__))
                raise UserError(f"{self.kind} {name!r} ({where}) is abstract: it lacks {lacks}.")
            if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
                raise UserError(f"{self.kind} {name!r} ({where}) has fields: decorate it with @dataclass(frozen=True).")
            if taken := {"name", "version"} & {field.name for field in dataclasses.fields(cls)}:
                raise UserError(
                    f"{self.kind} {name!r} ({where}) has a field {min(taken)!r}, which every component has."
                )
            self.claim(name, Claim(cls, where, cls.__module__, owner(cls.__module__)))
            cls.name = name
            return cls

        return add

    def preset(self, name: str, of: str, **fields: Any) -> None:
        """Register a second name for a component, with some of its fields set.

        Args:
            name: the new name.
            of: the name of the component, or of another preset.
            fields: values of the component's fields.

        Raises:
            UserError: the name is registered.
        """
        origin = sys._getframe(1).f_globals.get("__name__", "?")
        self.claim(name, Claim(Preset(of, fields), f"a preset of {origin}", origin, owner(origin)))

    def names(self) -> list[str]:
        """Return every name, in the order of registration, presets last."""
        values = self._values()
        return sorted(values, key=lambda name: isinstance(values[name], Preset))

    def meaning(self, name: str) -> str:
        """Return one line on a component: the first of its docstring, or the component and fields of a preset."""
        known = self.presets()
        if name in known:
            fields = ", ".join(f"{key}={value}" for key, value in known[name].fields.items())
            return f"{known[name].of}{f' with {fields}' if fields else ''}"
        return (self[name].__doc__ or "").strip().partition("\n")[0]

    def presets(self) -> Mapping[str, Preset]:
        """Return the names that stand for a component with some fields set."""
        return {name: value for name, value in self._values().items() if isinstance(value, Preset)}

    def __getitem__(self, name: str) -> type[C]:
        return self._resolve(name)[0]

    def _resolve(self, name: str) -> tuple[type[C], dict[str, Any]]:
        """Return the class that `name` stands for, and the fields that its presets set."""
        values, fields = self._values(), {}
        value = values.get(name)
        while isinstance(value, Preset):
            fields = {**value.fields, **fields}
            value = values.get(value.of)
        if value is None:
            missing = "".join(f" {plugin}" for plugin in broken)
            if left_out:
                missing += f" SITKIT_PLUGINS leaves out {', '.join(plugin.name for plugin in left_out)}."
            raise UserError(
                f"No {self.kind} named {name!r}.{suggest(name, self.names())} "
                f"Known: {', '.join(self.names())}.{missing}",
                ("name",),
            )
        return value, fields

    def create(self, name: str, /, **fields: Any) -> C:
        """Return a component with checked fields.

        Args:
            name: a registered name.
            fields: values of the component's fields; the others have their defaults.

        Returns:
            The component.

        Raises:
            UserError: the name or a field is unknown, or a value is wrong.
        """
        cls, preset = self._resolve(name)
        return build(cls, {**preset, **fields}, f"{self.kind} {name!r}")

    def parse(self, value: str | Mapping[str, Any] | Component) -> C:
        """Return a component from its form in files and flags.

        Args:
            value: a name, a mapping with `name` and fields, or a component.

        Returns:
            The component; `value` itself if it is one.

        Raises:
            UserError: the name or a field is unknown, or a value is wrong.
        """
        if isinstance(value, Component):
            return value  # pyright: ignore[reportReturnType]
        if isinstance(value, str):
            return self.create(value)
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            article = "An" if self.kind[0] in "aeiou" else "A"
            raise UserError(f"{article} {self.kind} is a name or a mapping with 'name'; got {value!r}.")
        fields = {k: v for k, v in value.items() if k != "name"}
        return self.create(value["name"], **fields)


def build(cls: type[C], fields: Mapping[str, Any], what: str) -> C:
    """Return an instance of a component class, its fields checked by pydantic.

    Args:
        cls: the class.
        fields: values of its fields.
        what: the name of the component for messages, as "sampler 'heun'".

    Returns:
        The component.

    Raises:
        UserError: a field is unknown or its value is wrong.
    """
    from pydantic import ValidationError

    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in fields:
        if key not in known:
            hint = f"Its fields: {', '.join(known)}." if known else "It has no fields."
            raise UserError(f"{what} has no field {key!r}.{suggest(key, known)} {hint}", (key,))
    _require_sound_numbers(cls, fields, what)
    try:
        return _adapter(cls).validate_python(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        key = ".".join(path)
        reason = first["msg"].removeprefix("Value error, ")
        inner = getattr(first.get("ctx", {}).get("error"), "path", ())
        if not path:
            # The message of a component's own check begins with the field: "steps must be at least 1".
            path = tuple(word for word in [reason.partition(" ")[0]] if word in known)
        raise UserError(f"{what}: {f'{key}: ' if key else ''}{reason}", (*path, *inner)) from None


def _require_sound_numbers(cls: type[Any], fields: Mapping[str, Any], what: str) -> None:
    """Raise UserError for true or false in the place of a number, which pydantic reads as 1 or 0, and for past 64 bits."""
    types = {f.name: str(f.type) for f in dataclasses.fields(cls)}
    for key, value in fields.items():
        numbers = re.search(r"\b(int|float)\b", types[key]) and "bool" not in types[key]
        for part in _parts(value):
            if isinstance(part, bool) and numbers:
                raise UserError(f"{what}: {key}: a number is needed; got {str(part).lower()}", (key,))
            if isinstance(part, int) and not -(2**63) <= part < 2**63:
                raise UserError(
                    f"{what}: {key}: a number of at most 64 bits is needed; got one of {part.bit_length()}", (key,)
                )


def _parts(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _parts(part)
    else:
        yield value


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def spec(component: Component) -> dict[str, Any]:
    """Return a component as plain values, for records and identities.

    Args:
        component: a registered component.

    Returns:
        Its name under "name", then all fields; components among them are mappings too.
    """
    return {"name": component.name} | {
        f.name: _plain(getattr(component, f.name)) for f in dataclasses.fields(component) if f.init
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return spec(value)
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


def origins() -> dict[str, str]:
    """Return the components of plugins, as "kind name", each with the plugin's package and version."""
    return {
        f"{registry.kind} {name}": str(plugin)
        for registry in registries.values()
        for name in registry.names()
        if (plugin := registry.plugin(name)) is not None
    }


def owned(plugin: Plugin) -> list[tuple[Registry[Any], str]]:
    """Return the registry and the name of every component of a plugin, presets included."""
    ensure_loaded()
    return [(registry, name) for registry in registries.values() for name in registry.names_of(plugin)]


def registry_of(word: str, others: Iterable[str] = ()) -> Registry[Any]:
    """Return a registry by its plural, its kind or its flag.  Raises UserError with the nearest right name.

    others: further words that are possible in the same place, for the message.
    """
    for registry in registries.values():
        if word in (registry.plural, registry.kind, registry.flag, registry.flag.removeprefix("--")):
            return registry
    known = [*registries, *others]
    raise UserError(f"No registry {word!r}.{suggest(word, known)} Known: {', '.join(known)}.")


registries: dict[str, Registry[Any]] = {}

# Every extension point of sitkit.
interpolants = Registry("interpolant", "interpolants", "--interp", "sitkit.transport.interpolant:Interpolant")
targets = Registry("target", "targets", "--target", "sitkit.transport.target:Target")
weightings = Registry("weighting", "weightings", "--weight", "sitkit.transport.weighting:Weighting")
losses = Registry("loss", "losses", "--loss", "sitkit.models.loss:Loss")
timesteps = Registry("timestep", "timesteps", "--timestep", "sitkit.transport.timestep:Timestep")
couplings = Registry("coupling", "couplings", "--coupling", "sitkit.transport.coupling:Coupling")
diffusions = Registry("diffusion", "diffusions", "--diffusion", "sitkit.transport.diffusion:Diffusion")
samplers = Registry("sampler", "samplers", "--sampler", "sitkit.solvers.sampler:Sampler")
guidances = Registry("guidance", "guidances", "--guidance", "sitkit.solvers.guidance:Guidance")
backbones = Registry("backbone", "backbones", "--backbone", "sitkit.models.backbone:Backbone")
autoencoders = Registry("autoencoder", "autoencoders", "--autoencoder", "sitkit.models.autoencoder:Autoencoder")
datasets = Registry("dataset", "datasets", "--data", "sitkit.data.dataset:Dataset")
metrics = Registry("metric", "metrics", "--metric", "sitkit.evaluation.metrics.metric:Metric")
extractors = Registry("extractor", "extractors", "--features", "sitkit.evaluation.extractors.extractor:Extractor")
