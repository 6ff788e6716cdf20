"""Groups of options: a dataclass in the signature of a command becomes single options."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

from sitkit.cli.options import SeedOptions, grouped
from sitkit.runtime.errors import UserError


@dataclass(frozen=True)
class SizeOptions:
    width: int = typer.Option(1, "--width")
    names: list[str] | None = typer.Option(None, "--name")


def test_a_command_receives_the_dataclass_and_typer_sees_its_fields_in_order() -> None:
    app, received = typer.Typer(), []

    @app.command()
    @grouped
    def command(
        *, first: str = typer.Argument("a"), sizes: SizeOptions, last: bool = typer.Option(False, "--last")
    ) -> None:
        received.append((first, sizes, last))

    assert [p.name for p in typer.main.get_command(app).params if p.param_type_name == "option"][:3] == [
        "width",
        "names",
        "last",
    ]
    assert CliRunner().invoke(app, ["b", "--width", "3", "--name", "x", "--name", "y", "--last"]).exit_code == 0
    assert CliRunner().invoke(app, []).exit_code == 0
    assert received == [("b", SizeOptions(3, ["x", "y"]), True), ("a", SizeOptions(1, None), False)]
    assert CliRunner().invoke(app, ["--width", "three"]).exit_code == 2


def test_a_field_may_have_the_name_of_its_group() -> None:
    app, received = typer.Typer(), []

    @app.command()
    @grouped
    def command(*, seeds: SeedOptions) -> None:
        received.append(seeds.arguments())

    assert CliRunner().invoke(app, ["--seeds", "0,1"]).exit_code == 0
    assert received == [{"seeds": (0, 1), "sample_seeds": None}]


def test_a_seed_that_is_no_number_is_refused_with_its_flag() -> None:
    with pytest.raises(UserError, match="--sample-seeds 1,b: write whole numbers"):
        SeedOptions(None, "1,b").arguments()
