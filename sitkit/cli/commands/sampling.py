"""Commands that sample and measure a run: sample, evaluate, likelihood, losscurve, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.interrupt import resumable
from sitkit.registry import extractors
from sitkit.runtime.errors import UserError


@app.command()
def sample(
    run: options.RunName = "latest",
    preset: options.PresetName = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    guidance: options.Guidance = None,
    steps: options.SamplerSteps = None,
    n: options.Count = None,
    seed: options.Seed = None,
    ema: options.Ema = None,
    step: options.Step = None,
    adm: Annotated[
        Path | None,
        typer.Option("--adm", help="Also write the samples as ADM's evaluator reads them.", metavar="OUT.npz"),
    ] = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Draw samples of a run: a picture, an .npz, and the recipe.  The same command again continues."""
    from sitkit.runs.run import open_run
    from sitkit.runs.sample import sample as verb
    from sitkit.runs.sample import write_adm

    flags = {
        "sampler": sampler, "diffusion": diffusion, "guidance": guidance, "steps": steps, "n": n, "seed": seed, "ema": ema,
        "device": device,
    }  # fmt: skip
    chosen = open_run(
        run,
        {"preset": preset, "step": step, "runs": runs, "device": device, "settings": options.layer(flags, sets)},
        "sample",
    )
    if adm is not None and not chosen.data_description.is_image:
        raise UserError(f"--adm writes images; this run models examples of shape {chosen.data_description.shape}.")
    with resumable(), console.progress() as progress:
        samples = verb(chosen, progress=progress)
        if adm is not None:
            write_adm(samples, adm)
    if json:
        console.as_json(samples.record | {"path": str(samples.folder)})
        return
    console.say(f"samples   {samples.folder / 'samples.npz'}   {samples.n} at {samples.record['nfe']} evaluations each")
    if adm is not None:
        console.say(f"ADM       {adm}")
    if (samples.folder / "grid.png").is_file():
        console.say(f"picture   {samples.folder / 'grid.png'}")
    console.say(f"recipe    {samples.folder / 'record.json'}")


@app.command()
def evaluate(
    run: options.RunName = "latest",
    preset: options.PresetName = None,
    metric: options.Metrics = None,
    features: options.Features = None,
    sampler: options.Sampler = None,
    diffusion: options.Diffusion = None,
    guidance: options.Guidance = None,
    steps: options.SamplerSteps = None,
    n: options.Count = None,
    seed: options.Seed = None,
    ema: options.Ema = None,
    step: options.Step = None,
    sets: options.Sets = None,
    runs: options.Folder = Path("runs"),
    device: options.Device = None,
    json: options.Json = False,
) -> None:
    """Measure a run's samples against its data; the same metric between two halves of the data stands beside each number.

    Without -n the number of samples is the number of examples, at most 50,000.  All metrics use the same samples.  The
    same command again continues; `torchrun --nproc-per-node=N -m sitkit evaluate ...` divides the work.
    """
    from sitkit.runs.evaluate import evaluate as verb

    if features is not None:
        try:
            extractors.parse(features)
        except UserError as error:
            raise UserError(f"--features: {error}") from None
    names = [name.strip() for text in metric or [] for name in text.split(",")] or None
    flags = {
        "metric": names, "sampler": sampler, "diffusion": diffusion, "guidance": guidance, "steps": steps, "n": n,
        "seed": seed, "ema": ema, "device": device,
    }  # fmt: skip
    settings = options.layer(flags, sets)
    with resumable(), console.progress() as progress:
        done = verb(
            run,
            features=features,
            preset=preset,
            step=step,
            runs=runs,
            device=device,
            settings=settings,
            progress=progress,
        )
    if json:
        console.as_json([evaluation.record | {"path": str(evaluation.path)} for evaluation in done])
        return
    rows = [
        (
            evaluation.record["metric"]["name"],
            evaluation.record["metric"].get("features", {}).get("name", ""),
            f"{evaluation.value:.4g}",
            "-" if evaluation.stderr is None else f"{evaluation.stderr:.2g}",
            "-" if evaluation.halves is None else f"{evaluation.halves:.4g}",
            evaluation.n,
            evaluation.nfe,
        )
        for evaluation in done
    ]
    notes = [note for evaluation in done for note in evaluation.record["notes"]]
    for record in (evaluation.record for evaluation in done):
        if record["reference"]["file"]:
            notes.append(f"{record['metric']['name']}: against the statistics in {record['reference']['file']}.")
    if any(evaluation.halves is not None for evaluation in done):
        notes.append("halves: the same metric between two random halves of the data.")
    features_of = {e.record["metric"]["features"]["name"]: e.record["features"] for e in done if e.record["features"]}
    for name, record in features_of.items():
        if "accuracy" in record:
            accuracy = "unknown" if record["accuracy"] is None else f"{record['accuracy']:.4g}"
            notes.append(f"{name}: accuracy on {record['heldout']} held-out examples {accuracy}.")
    console.table(
        ("metric", "features", "value", "stderr", "halves", "n", "NFE"), rows, notes=list(dict.fromkeys(notes))
    )
    for evaluation in done:
        console.say(f"recipe    {evaluation.path}")


@app.command()
def runs(
    runs: options.Folder = Path("runs"),
    json: options.Json = False,
) -> None:
    """List the runs on disk with their steps, samplings and numbers."""
    from sitkit.runs.run import list_runs

    rows = [
        {"run": str(run.folder), "step": run.step, "of": run.steps, "samplings": run.samplings,
         "evaluations": run.evaluations, "first": ", ".join(f"{value:.4g} {name}" for name, value in run.values)}
        for run in list_runs(runs)
    ]  # fmt: skip
    if json:
        console.as_json(rows)
    elif rows:
        shown = [
            (
                Path(row["run"]).name if runs == Path("runs") else row["run"],
                f"{row['step']}/{row['of']}",
                "; ".join(
                    [
                        *filter(None, [row["first"]]),
                        *(f"{row[what]} {what}" for what in ("samplings", "evaluations") if row[what]),
                    ]
                ),
            )
            for row in rows
        ]
        console.table(("run", "step", ""), shown, cut=True)
    else:
        console.say(f"no runs in {runs}: make one with `sitkit train`.")


@app.command()
def likelihood(
    run: options.RunName = "latest",
    n: Annotated[int | None, typer.Option("-n", help="Held-out examples.", show_default="all, at most 1000")] = None,
    probes: Annotated[int, typer.Option("--probes", help="Random probes of the divergence per example.")] = 1,
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
    """Measure bits per dimension of held-out data under the probability-flow ODE, with the standard error."""
    from sitkit.runs.likelihood import likelihood as verb

    with resumable(), console.progress() as progress:
        done = verb(
            run, n=n, probes=probes, divergence=divergence, sampler=sampler, steps=steps, seed=seed, ema=ema, runs=runs,  # pyright: ignore[reportArgumentType]
            device=device, settings=options.layer({}, sets), progress=progress,
        )  # fmt: skip
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
        notes.append("with one probe its part of the error is unknown: use --probes 2 or more.")
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
    """Plot the velocity loss of runs against time, for any target: where along the path each network errs."""
    from sitkit.results.losscurve import draw_loss_curves
    from sitkit.runs.run import load

    trained = [load(name, root=runs, device=device or "auto") for name in names or ["latest"]]
    curves = draw_loss_curves(trained, picture)
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
