"""Names to components: the one door for built-ins and plugins.

A component is a frozen dataclass whose fields are its configuration.  Every extension point of sitkit is a
`Registry` at the bottom of this module.  `sitkit.registry.loading` finds what registers itself in them.

Nothing here imports torch, so that listing names is quick.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import sys
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from sitkit.registry.plugin import Plugin, broken, ensure_loaded, left_out, loading, owner
from sitkit.runtime.errors import UserError, suggest

if TYPE_CHECKING:
    from sitkit.registry.measures import Measures


@dataclass(frozen=True)
class Component(ABC):
    """Base of everything a registry holds.  The dataclass fields are the configuration."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: ClassVar[str] = ""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Callable[[Any], Any]) -> Any:
        """A field annotated with a registry's base class takes a name, a mapping with `name`, or a component."""
        base = f"{cls.__module__}:{cls.__qualname__}"
        for registry in registries.values():
            if registry.base == base:
                from pydantic_core import core_schema

                return core_schema.no_info_plain_validator_function(registry.parse)
        return handler(source)

    def bind(self, run: Measures) -> Self:
        """Return this component with what it needs of a trained run filled in; itself where nothing is missing.

        By default every field that is a component is bound.  Override it in a component that needs a measurement itself.

        Args:
            run: the run, or `sitkit.registry.measures.UNTRAINED` to plan before there is one.
        """
        inner = {
            f.name: value for f in dataclasses.fields(self) if isinstance(value := getattr(self, f.name), Component)
        }
        bound = {name: value.bind(run) for name, value in inner.items()}
        return dataclasses.replace(self, **bound) if any(bound[name] is not inner[name] for name in inner) else self

    @classmethod
    def test_fields(cls) -> Sequence[Mapping[str, Any]]:
        """Fields of the instances that `sitkit plugin test` examines; a component without defaults gives its own."""
        return ({},)


C = TypeVar("C", bound=Component)
K = TypeVar("K", bound=type[Component])


@dataclass(frozen=True)
class Preset:
    """A second name for a component, with some of its fields set."""

    of: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """What one registration gives a name to.

    value: a component class, a `Preset`, or the path of a settings file.
    origin: the module that registered it, for messages.
    plugin: the plugin that registered it; None for sitkit and for the user's own code.
    """

    value: Any
    where: str
    origin: str
    plugin: Plugin | None


class NameTable:
    """Names of one kind, each with the plugins that claim it.

    While plugins are imported, several may claim a name.  `sitkit.registry.loading` then withdraws the names of every
    plugin whose claim another plugin makes too; after that each name has one claim.
    """

    def __init__(self, kind: str, plural: str) -> None:
        self.kind, self.plural = kind, plural
        self._claims: dict[str, list[Claim]] = {}

    def claim(self, name: str, claim: Claim) -> None:
        """Add a claim.  Raises UserError unless every earlier claim is another plugin's and plugins are being imported."""
        earlier = self._claims.setdefault(name, [])
        if earlier and (loading.current is None or {c.plugin for c in earlier} & {None, claim.plugin}):
            raise UserError(self.taken(name, claim))
        earlier.append(claim)

    def taken(self, name: str, claim: Claim) -> str:
        """Return the sentence that the name of this claim belongs to an earlier one."""
        return f"{self.kind} {name!r} ({claim.where}) is already registered by {self._claims[name][0].origin}."

    def withdraw(self, plugin: Plugin) -> None:
        """Remove the claims of a plugin that did not load."""
        kept = {name: [c for c in claims if c.plugin != plugin] for name, claims in self._claims.items()}
        self._claims = {name: claims for name, claims in kept.items() if claims}

    def conflicts(self) -> Iterator[tuple[Plugin, str]]:
        """Yield every plugin that claims a name which another plugin claims, with the reason."""
        for name, (first, *others) in self._claims.items():
            for other in others:
                if first.plugin and other.plugin:
                    yield first.plugin, f"{self.kind} {name!r} is also registered by {other.plugin.module}."
                    yield other.plugin, self.taken(name, other)

    def origin(self, name: str) -> str:
        """Return the module that registered `name`."""
        return self._claims[name][0].origin

    def names_of(self, plugin: Plugin) -> list[str]:
        """Return the names that a plugin registered."""
        return [name for name, claims in self._claims.items() if claims[0].plugin == plugin]

    def plugin(self, name: str) -> Plugin | None:
        """Return the plugin that registered `name`; None for sitkit's own."""
        ensure_loaded()
        return self._claims[name][0].plugin

    def _values(self) -> dict[str, Any]:
        ensure_loaded()
        return {name: claims[0].value for name, claims in self._claims.items()}


class Registry(NameTable, Mapping[str, type[C]], Generic[C]):
    """Names to component classes of one kind.  Read-only outside `register` and `preset`.

    `registry["gvp"]` is the class, `registry.create("gvp")` an instance with checked fields.
    """

    def __init__(self, kind: str, plural: str, flag: str, base: str) -> None:
        super().__init__(kind, plural)
        self.flag, self.base = flag, base
        registries[plural] = self

    @property
    def base_class(self) -> type[C]:
        """What every component of the kind is a subclass of."""
        module, _, attribute = self.base.partition(":")
        return getattr(importlib.import_module(module), attribute)

    @property
    def purpose(self) -> str:
        """One sentence on what a component of the kind is, without its full stop."""
        return (self.base_class.__doc__ or "").strip().partition("\n")[0].partition(".  ")[0].removesuffix(".")

    def register(self, name: str) -> Callable[[K], K]:
        """Class decorator.  Refuses a duplicate name, an abstract class, and fields without @dataclass."""

        def add(cls: K) -> K:
            where, base = f"{cls.__module__}.{cls.__qualname__}", self.base_class
            if not issubclass(cls, base):
                raise UserError(f"{self.kind} {name!r} ({where}) must subclass {base.__module__}.{base.__qualname__}.")
            if inspect.isabstract(cls):
                lacks = ", ".join(sorted(cls.__abstractmethods__))
                raise UserError(f"{self.kind} {name!r} ({where}) is abstract: it lacks {lacks}.")
            if inspect.get_annotations(cls) and "__dataclass_fields__" not in cls.__dict__:
                raise UserError(f"{self.kind} {name!r} ({where}) has fields: decorate it with @dataclass(frozen=True).")
            self.claim(name, Claim(cls, where, cls.__module__, owner(cls.__module__)))
            cls.name = name
            return cls

        return add

    def preset(self, name: str, of: str, **fields: Any) -> None:
        """Register `name` as the component `of` with some fields set."""
        origin = sys._getframe(1).f_globals.get("__name__", "?")
        self.claim(name, Claim(Preset(of, fields), f"a preset of {origin}", origin, owner(origin)))

    def names(self) -> list[str]:
        """Return every name, in the order of registration, presets last."""
        values = self._values()
        return sorted(values, key=lambda name: isinstance(values[name], Preset))

    def meaning(self, name: str) -> str:
        """One line on `name`: the first of its docstring, or what it is a preset of."""
        known = self.presets()
        if name in known:
            fields = ", ".join(f"{key}={value}" for key, value in known[name].fields.items())
            return f"{known[name].of}{f' with {fields}' if fields else ''}"
        return (self[name].__doc__ or "").strip().partition("\n")[0]

    def presets(self) -> Mapping[str, Preset]:
        """Names that stand for a component with some fields set."""
        return {name: value for name, value in self._values().items() if isinstance(value, Preset)}

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

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
        """The component `name` with these fields, checked.  Raises UserError on a miss or a wrong field."""
        cls, preset = self._resolve(name)
        return build(cls, {**preset, **fields}, f"{self.kind} {name!r}")

    def parse(self, value: str | Mapping[str, Any] | Component) -> C:
        """A component from what people write: a name, or a mapping with `name` and fields."""
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
    """An instance of a component class with its fields checked by pydantic."""
    from pydantic import ValidationError

    known = [f.name for f in dataclasses.fields(cls) if f.init]
    for key in fields:
        if key not in known:
            has = f"Its fields: {', '.join(known)}." if known else "It has no fields."
            raise UserError(f"{what} has no field {key!r}.{suggest(key, known)} {has}", (key,))
    try:
        return _adapter(cls).validate_python(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(str(part) for part in first["loc"])
        key = ".".join(path)
        reason = first["msg"].removeprefix("Value error, ")
        inner = getattr(first.get("ctx", {}).get("error"), "path", ())
        if not path:
            # A component's own check begins with the field that it is about: "steps must be at least 1".
            path = tuple(word for word in [reason.partition(" ")[0]] if word in known)
        raise UserError(f"{what}: {f'{key}: ' if key else ''}{reason}", (*path, *inner)) from None


@functools.cache
def _adapter(cls: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def spec(component: Component) -> dict[str, Any]:
    """The component as a plain mapping, `name` first, every field resolved: what is recorded and hashed."""
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
    """Every component that a plugin registered, as "kind name", with the plugin's package and version."""
    return {
        f"{registry.kind} {name}": str(plugin)
        for registry in registries.values()
        for name in registry.names()
        if (plugin := registry.plugin(name)) is not None
    }


def owned(plugin: Plugin) -> list[tuple[Registry[Any], str]]:
    """The registry and the name of everything that a plugin registered, presets included."""
    ensure_loaded()
    return [(registry, name) for registry in registries.values() for name in registry.names_of(plugin)]


def registry_of(word: str, others: Iterable[str] = ()) -> Registry[Any]:
    """The registry by its plural, its kind or its flag.  Raises UserError with the nearest right name.

    others: what else could have been meant where the word stands.
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
