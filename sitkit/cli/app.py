"""The typer application and its global options."""

from __future__ import annotations

import typer

from sitkit.cli import console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which combination of interpolant, target, weight, backbone, sampler and diffusion is best, and by how much.",
)


def _print_version(requested: bool) -> None:
    if requested:
        import sitkit

        console.say(f"sitkit {sitkit.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    pass
