"""What identifies a component: harmless fields do not, its version, its plugin and the content of its files do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support import GOOD, put, run, tiny

import sitkit
from sitkit.registry import Component, essence, registries
from sitkit.registry.plugin import Plugin
from sitkit.runs.config.identity import sampling_identity, training_identity
from sitkit.runs.config.schema import SampleSettings, TrainSettings

PLAIN = [
    (registry.plural, name)
    for registry in registries.values()
    for name in registry.names()
    if name not in registry.presets() and registry.origin(name).partition(".")[0] == "sitkit"
]

# Values of the fields that have no default.
REQUIRED = {"path": "nowhere", "size": 8, "shape": (1, 8, 8)}


def later(component: Component, value: int = 0) -> Any:
    """Return the component as a later release has it, with one more field."""
    cls = type(component)
    fields = [("later", int, dataclasses.field(default=0, kw_only=True))]
    values = {field.name: getattr(component, field.name) for field in dataclasses.fields(component) if field.init}
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), frozen=True)(**values, later=value)


@pytest.mark.parametrize(("plural", "name"), PLAIN)
def test_a_field_that_a_release_adds_identifies_nothing_until_it_is_set(plural: str, name: str) -> None:
    registry, known = registries[plural], {field.name for field in dataclasses.fields(registries[plural][name])}
    component = registry.create(name, **{key: value for key, value in REQUIRED.items() if key in known})
    assert essence(later(component)) == essence(component)
    assert essence(later(component, 1)) == essence(component) | {"later": 1}


def test_a_field_of_a_component_within_another_identifies_nothing_until_it_is_set(tmp_path: Path) -> None:
    heun: Any = tiny(tmp_path, "sampler=heun").sampler
    assert "grid" not in essence(heun)
    for value, grid in ((0, None), (1, {"name": "uniform", "later": 1})):
        sampler: Any = dataclasses.replace(heun, grid=later(heun.grid, value))
        assert essence(sampler).get("grid") == grid


def test_an_explicit_default_identifies_nothing() -> None:
    assert essence(sitkit.samplers.create("heun", steps=sitkit.samplers["heun"]().steps)) == {"name": "heun"}
    assert essence(sitkit.samplers.create("heun", grid="uniform")) == {"name": "heun"}


@pytest.mark.parametrize("key", ["interp", "target", "weight", "loss", "backbone", "data", "train"])
def test_a_raised_version_changes_the_identity_of_trainings(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    before = training_identity(config), sampling_identity(config, 1)
    monkeypatch.setattr(type(getattr(config, key)), "version", 2)
    assert training_identity(config) != before[0] and sampling_identity(config, 1) != before[1]


@pytest.mark.parametrize("key", ["sampler", "diffusion", "guidance", "sample"])
def test_a_raised_version_changes_the_identity_of_samples(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path)
    before = training_identity(config), sampling_identity(config, 1)
    monkeypatch.setattr(type(getattr(config, key)), "version", 2)
    assert training_identity(config) == before[0] and sampling_identity(config, 1) != before[1]


def test_a_raised_version_of_a_default_changes_what_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    heun = sitkit.samplers.create("heun")
    monkeypatch.setattr(sitkit.timesteps["uniform"], "version", 2)
    assert essence(heun) == {"name": "heun", "grid": {"name": "uniform", "version": 2}}


@pytest.mark.parametrize("group", [TrainSettings, SampleSettings])
def test_a_setting_that_a_release_adds_identifies_nothing_until_it_is_set(group: type[Any], tmp_path: Path) -> None:
    class Later(group):
        later: bool = False

    key = "train" if group is TrainSettings else "sample"
    config = tiny(tmp_path)

    def identities(value: bool) -> tuple[str, str]:
        changed = Later(**getattr(config, key).model_dump(), later=value)
        other = config.model_copy(update={key: changed})
        return training_identity(other), sampling_identity(other, 1)

    assert identities(False) == (training_identity(config), sampling_identity(config, 1)) != identities(True)


def test_the_package_of_a_plugin_is_part_of_what_it_registers(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    put(site, "bend", GOOD.format(name="bend"))
    (tmp_path / "print_essence.py").write_text(
        "import sitkit\nfrom sitkit.registry import essence\nprint(essence(sitkit.interpolants.create('bend')))\n"
        "print(essence(sitkit.interpolants.create('gvp')))\n"
    )
    printed = run("print_essence", site=site, cwd=tmp_path).stdout.splitlines()
    assert printed == ["{'name': 'bend', 'package': 'sitkit-bend 1.0'}", "{'name': 'gvp'}"]
    (site / "sitkit_bend-1.0.dist-info").rename(site / "sitkit_bend-1.1.dist-info")
    metadata = site / "sitkit_bend-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    assert "sitkit-bend 1.1" in run("print_essence", site=site, cwd=tmp_path).stdout


def test_a_component_of_a_plugin_within_another_is_never_left_out() -> None:
    grids, heun = sitkit.timesteps, sitkit.samplers.create("heun")
    claims = grids._claims["uniform"]
    grids._claims["uniform"] = [dataclasses.replace(claims[0], plugin=Plugin("mine", "mine", "sitkit-mine", "1.0"))]
    try:
        assert essence(heun) == {"name": "heun", "grid": {"name": "uniform", "package": "sitkit-mine 1.0"}}
    finally:
        grids._claims["uniform"] = claims


@pytest.mark.parametrize("name", ["name", "version"])
def test_a_field_with_a_name_of_every_component_is_refused(name: str) -> None:
    fields = [(name, str, dataclasses.field(default=""))]
    cls = dataclasses.make_dataclass("Odd", fields, bases=(sitkit.interpolants["linear"],), frozen=True)
    with pytest.raises(
        sitkit.UserError, match=rf"interpolant 'odd' .* has a field '{name}', which every component has"
    ):
        sitkit.interpolants.register("odd")(cls)


def test_a_file_counts_by_its_content(tmp_path: Path) -> None:
    made = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        file = tmp_path / folder / f"{folder}.npz"
        file.write_bytes(b"statistics")
        made.append(essence(sitkit.metrics.create("frechet", reference=str(file))))
    assert made[0] == made[1] and "reference" not in made[0]
    file.write_bytes(b"others")
    assert essence(sitkit.metrics.create("frechet", reference=str(file))) != made[0]
    missing = str(tmp_path / "c.npz")
    assert essence(sitkit.metrics.create("frechet", reference=missing)) == {"name": "frechet", "reference": missing}
