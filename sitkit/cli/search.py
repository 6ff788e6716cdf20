"""Commands on a trained run: its likelihood, its loss against time, and the search for the best way to sample it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.commands import app
from sitkit.cli.interrupt import resumable
from sitkit.runtime.errors import UserError


@app.command()
def likelihood(
    run: options.RunName = "latest",
    n: Annotated[int | None, typer.Option("-n", help="Held-out examples.", show_default="all, at most 1000")] = None,
    probes: Annotated[int, typer.Option("--probes", help="Probes of the divergence.")] = 1,
    divergence: Annotated[
        str, typer.Option("--divergence", help="auto (exact up to 32 dimensions), exact, rademacher, gaussian.")
    ] = "auto",
    sampler: Annotated[
        str, typer.Option("--sampler", help="An ODE solver.", rich_help_panel=options.SAMPLING)
    ] = "dopri5",
    steps: options.SamplerSteps = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of dequantisation and probes.")] = 0,
    ema: options.Ema = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Bits per dimension of held-out data under the probability-flow ODE, with its standard error."""
    from sitkit.runs.likelihood import density as verb
    from sitkit.runs.run import load

    kinds = ("auto", "exact", "rademacher", "gaussian")
    if divergence not in kinds:
        raise UserError(f"--divergence {divergence}: no such estimate. Known: {', '.join(kinds)}.")
    over = options.layer({"sampler": sampler, "sampler.steps": steps, "sample.ema": ema, "run.device": device}, sets)
    trained = load(run, over=over, root=runs, device=device or "auto")
    with resumable(), console.progress() as progress:
        solver = trained.config.sampler
        done = verb(trained, progress, n=n, probes=probes, divergence=divergence, sampler=solver, seed=seed)  # pyright: ignore[reportArgumentType]
    record = done.record
    if json:
        console.as_json(record | {"path": str(done.path)})
        return
    numbers = [
        f"{record[key]:.2g}" if record[key] is not None else "-" for key in ("stderr", "stderr_data", "stderr_probes")
    ]
    row = [f"{done.value:.4g}", *numbers, record["n"], record["divergence"], record["probes"] or "-", record["nfe"],
           f"{record['round_trip']['rms']:.2g}"]  # fmt: skip
    columns = (record["unit"], "stderr", "of data", "of probes", "n", "divergence", "probes", "NFE", "round trip")
    notes = ["round trip: root mean square of data -> noise -> data, in units of the data."]
    if record["stderr_probes"] is None:
        notes.append("one probe cannot tell its own part of the error: --probes 2 or more does.")
    console.table(columns, [row], notes=notes)
    console.say(f"recipe    {done.path}")


@app.command()
def losscurve(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Runs to compare.", show_default="latest"),
    ] = None,
    picture: Annotated[Path, typer.Option("--picture", help="Where the plot goes.")] = Path("losscurve.png"),
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """The velocity loss of runs against time, whatever their targets: where each errs."""
    from sitkit.runs.diagnostics import draw
    from sitkit.runs.run import load

    trained = [load(name, root=runs, device=device or "auto") for name in names or ["latest"]]
    curves = draw(trained, picture)
    if json:
        console.as_json([
            {"run": run.folder.name, "label": curve.label, "times": list(curve.x), "losses": list(curve.values)}
            for run, curve in zip(trained, curves, strict=True)
        ])  # fmt: skip
        return
    rows = []
    for run, curve in zip(trained, curves, strict=True):
        losses, times = list(curve.values), list(curve.x)
        worst = max(range(len(losses)), key=losses.__getitem__)
        rows.append(
            (curve.label, f"{sum(losses) / len(losses):.4g}", f"{losses[worst]:.4g}", f"{times[worst]:.3g}", run.folder)
        )
    console.table(("target", "mean over t", "largest", "at t", "run"), rows, "velocity loss, summed over dimensions")
    console.say(f"picture   {picture}")


@app.command()
def search(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder, name or identity of a run, or 'latest'.")],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A search, as experiments/search.yaml, or an experiment's name.")
    ],
    trials: Annotated[
        int | None, typer.Option("--trials", help="Settings to measure, by all processes together.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Optuna's database URL.", show_default="a file in the run's folder")
    ] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Search for the best way to sample a run; run again, or beside itself, it continues."""
    from sitkit.runs.run import load
    from sitkit.studies.search import describe
    from sitkit.studies.search import search as verb

    trained = load(run, over=options.layer({"run.device": device}, sets), root=runs, device=device or "auto")
    with resumable(), console.progress() as progress:
        found = verb(trained, file, trials=trials, storage=storage, progress=progress)
    if json:
        from sitkit.runs.checkpoint import read_json

        console.as_json(read_json(found.record) | {"path": str(found.record)})
        return
    rows = [
        (
            "own" if setting is found.reference else setting.trial,
            f"{setting.mean:.4g}",
            f"{setting.stderr:.2g}",
            setting.nfe,
            f"{setting.seconds:.3g}",
            ("winner: " if setting is found.winner else "") + (describe(setting.chosen) or "the run's own setting"),
        )
        for setting in (*found.confirmed, found.reference)
    ]
    seeds = found.search.confirm.seeds
    notes = [
        f"mean and standard error over {len(seeds)} seeds of {found.search.confirm.n} samples; "
        + ", ".join(f"{count} trials {kind}" for kind, count in found.counts.items() if count),
        *(f"{count} refused: {reason}" for reason, count in list(found.refused.items())[:5]),
    ]
    console.table(("trial", "metric", "stderr", "NFE", "s/sample", "setting"), rows, found.search.title, notes)
    console.say(found.verdict)
    console.say(f"picture   {found.picture}\ntrials    {found.table}\nrecord    {found.record}")
    if found.preset is not None:
        console.say(
            f"next      sitkit sample {shlex.quote(str(trained.folder))} --preset {shlex.quote(found.preset.stem)}"
        )
