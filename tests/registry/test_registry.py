"""Registries: refusals, suggestions, and records of components."""

from __future__ import annotations

import dataclasses
import re
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sitkit
from sitkit.registry import Component, Registry, build, registries, spec
from sitkit.runtime.errors import UserError, suggest
from sitkit.testing import obey


@dataclass(frozen=True)
class Shape(Component):
    """Something with an area."""

    @abstractmethod
    def area(self) -> float:
        """Return the area."""


@pytest.fixture
def shapes() -> Iterator[Registry[Shape]]:
    yield Registry("shape", "shapes", "--shape", f"{__name__}:Shape")
    del registries["shapes"]


def square() -> type[Shape]:
    @dataclass(frozen=True)
    class Square(Shape):
        """A square."""

        side: float = 1.0
        holes: tuple[int, ...] = ()

        def __post_init__(self) -> None:
            if not self.side > 0:
                raise ValueError(f"side must be positive; got {self.side}.")

        def area(self) -> float:
            return self.side**2

    return Square


EVERY = [(plural, name) for plural, registry in registries.items() for name in registry.names()]


def test_the_contract_is_registered() -> None:
    contract = {
        "interpolants": "linear gvp vp-sbdm ddpm",
        "targets": "velocity score noise data",
        "losses": "interpolant",
        "weightings": "velocity noise score data likelihood min-snr",
        "timesteps": "uniform logit-normal shift power discrete",
        "couplings": "independent minibatch-ot",
        "diffusions": "zero constant sigma linear decreasing increasing-decreasing sin2 kl sbdm kl-eta",
        "samplers": "euler midpoint heun rk4 dopri5 dopri8 euler-maruyama stochastic-heun",
        "guidances": "none cfg",
        "backbones": "sit sit-s/2 sit-xl/8 sit-xs/1 mlp exact",
        "datasets": "digits points gaussian-mixture npz image-folder",
        "metrics": "frechet sliced-wasserstein mmd",
        "autoencoders": "identity",
    }
    for plural, names in contract.items():
        assert set(names.split()) <= set(getattr(sitkit, plural).names()), plural


@pytest.mark.parametrize("plural", registries)
def test_a_registry_is_reached_by_its_plural(plural: str) -> None:
    registry = registries[plural]
    reached = getattr(sitkit, plural)
    assert reached.names() == registry.names() == list(reached) and len(reached) == len(registry)
    first = registry.names()[0]
    assert reached[first] is registry[first] and first in reached and "nothing" not in reached
    with pytest.raises(AttributeError):
        _ = reached.nothing


@pytest.mark.parametrize(("plural", "name"), EVERY)
def test_every_component_obeys_the_laws_of_components(plural: str, name: str) -> None:
    registry = registries[plural]
    needed = [
        f.name
        for f in dataclasses.fields(registry[name])
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if needed:
        # The error for a field without a default names the field in one line.
        with pytest.raises(UserError, match=rf"{registry.kind} '{re.escape(name)}': {needed[0]}: Field required"):
            registry.create(name)
        return
    component = registry.create(name)
    obey(component, "registered", "explained", "frozen", "typed", "recorded")
    assert registry.parse(name) == registry.parse({"name": name}) == registry.parse(component) == component
    assert next(iter(spec(component))) == "name"


@pytest.mark.parametrize(("plural", "name"), EVERY)
def test_the_error_for_a_misspelt_name_suggests_the_right_one(plural: str, name: str) -> None:
    registry = registries[plural]
    with pytest.raises(
        UserError, match=rf"No {registry.kind} named '{re.escape(name)}x'\. Did you mean '.*'\? Known: "
    ) as missed:
        registry.create(name + "x")
    near = str(missed.value).split("Did you mean '")[1].split("'")[0]
    # The suggestion is the name itself, or another that is equally near.
    assert near == name


def test_duplicates_are_refused_and_both_are_named(shapes: Registry[Shape]) -> None:
    first = square()
    shapes.register("square")(first)
    with pytest.raises(UserError, match=rf"shape 'square' \({__name__}.*Square\) is already registered by {__name__}"):
        shapes.register("square")(square())
    with pytest.raises(UserError, match="already registered"):
        shapes.preset("square", "square")
    assert shapes["square"] is first


def test_wrong_classes_are_refused_at_registration(shapes: Registry[Shape]) -> None:
    class Blob(Shape):
        """Has no area."""

    with pytest.raises(UserError, match=r"shape 'blob' \(.*Blob\) is abstract: it lacks area"):
        shapes.register("blob")(Blob)

    class Bare(Shape):
        """Has fields, but is not a dataclass."""

        side: float = 1.0

        def area(self) -> float:
            return 0.0

    with pytest.raises(UserError, match=r"has fields: decorate it with @dataclass\(frozen=True\)"):
        shapes.register("bare")(Bare)

    @dataclass(frozen=True)
    class Stranger(Component):
        """Not a shape."""

    with pytest.raises(UserError, match=rf"must subclass {__name__}.Shape"):
        shapes.register("stranger")(Stranger)
    assert shapes.names() == []


def test_a_registry_is_read_only_but_for_register_and_preset(shapes: Registry[Shape]) -> None:
    shapes.register("square")(square())
    view: Any = shapes
    with pytest.raises(TypeError):
        view["round"] = square()
    with pytest.raises(TypeError):
        del view["square"]
    shapes.names().append("round")
    shapes.presets()["round"] = None  # pyright: ignore[reportIndexIssue]
    assert shapes.names() == ["square"] and "round" not in shapes and len(shapes) == 1 and list(shapes) == ["square"]


def test_fields_are_checked(shapes: Registry[Shape]) -> None:
    shapes.register("square")(square())
    assert shapes.create("square", side="2").area() == 4.0
    for fields, message in (
        ({"sid": 2}, r"shape 'square' has no field 'sid'\. Did you mean 'side'\? Its fields: side, holes\."),
        ({"side": "wide"}, r"shape 'square': side: .*number"),
        ({"side": -1}, r"shape 'square': side must be positive; got -1"),
        ({"holes": [1, "x"]}, r"shape 'square': holes\.1: .*integer"),
    ):
        with pytest.raises(UserError, match=message):
            shapes.create("square", **fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        shapes.create("square").side = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def test_presets_set_fields_and_given_fields_replace_them(shapes: Registry[Shape]) -> None:
    shapes.register("square")(square())
    shapes.preset("large", "square", side=10.0)
    shapes.preset("large-with-hole", "large", holes=(1,))
    assert spec(shapes.create("large-with-hole")) == {"name": "square", "side": 10.0, "holes": [1]}
    assert spec(shapes.create("large", side=3)) == {"name": "square", "side": 3.0, "holes": []}
    assert shapes.names() == ["square", "large", "large-with-hole"] and shapes.origin("large") == __name__
    assert shapes["large"] is shapes["square"]


def test_the_error_of_parse_says_what_it_takes(shapes: Registry[Shape]) -> None:
    shapes.register("square")(square())
    assert shapes.parse({"name": "square", "side": 2}) == shapes.create("square", side=2)
    for wrong in (3, {"side": 2}, {"name": 3}, None):
        with pytest.raises(UserError, match="A shape is a name or a mapping with 'name'"):
            shapes.parse(wrong)  # pyright: ignore[reportArgumentType]


def test_a_component_within_a_component() -> None:
    """The grid of a sampler is a name, a mapping or a component, and its record has all fields."""
    by_mapping = sitkit.samplers.create("heun", grid={"name": "shift", "shift": 2})
    assert by_mapping == sitkit.samplers.create("heun", grid=sitkit.timesteps.create("shift", shift=2.0))
    assert spec(by_mapping)["grid"] == {"name": "shift", "shift": 2.0}
    with pytest.raises(UserError, match=r"sampler 'heun': grid: No timestep named 'shfit'\. Did you mean 'shift'"):
        sitkit.samplers.create("heun", grid="shfit")


NAMES = st.text("abcdefgh-/", min_size=3, max_size=12)


@given(st.lists(NAMES, min_size=1, max_size=8, unique=True), st.data())
def test_suggestions_are_known_names(known: list[str], data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(known))
    assert suggest(word, known) == f" Did you mean {word!r}?"
    said = suggest(data.draw(NAMES), known)
    assert not said or any(f"{name!r}" in said for name in known)


def test_the_first_letter_decides_between_equally_similar_names() -> None:
    known = ["euler", "midpoint", "heun", "rk4", "stochastic-heun"]
    for order in (known, known[::-1]):
        assert suggest("hoin", order) == " Did you mean 'heun'?"


def test_a_word_that_resembles_no_name_gets_no_suggestion() -> None:
    assert suggest("zzzzzz", ["linear", "gvp"]) == ""


def test_the_error_of_build_names_the_component() -> None:
    with pytest.raises(UserError, match=r"the thing has no field 'x'\. It has no fields\."):
        build(sitkit.interpolants["linear"], {"x": 1}, "the thing")


def test_a_base_class_is_known_by_name_without_an_import_of_torch() -> None:
    assert all(":" in registry.base and registry.flag.startswith("--") for registry in registries.values())
