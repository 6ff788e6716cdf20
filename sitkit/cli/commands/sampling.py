"""Commands that sample and measure a run: sample, evaluate, likelihood, losscurve, runs."""

from __future__ import annotations

from pathlib import Path

import typer

import sitkit
from sitkit.cli import console, options
from sitkit.cli.app import app
from sitkit.cli.console import short
from sitkit.cli.interrupt import resumable
from sitkit.registry import extractors
from sitkit.runtime.errors import UserError


@app.command()
@options.grouped
def sample(
    *,
    run: str = options.RUN,
    preset: str | None = options.PRESET,
    sampling: options.SamplingOptions,
    step: int | None = options.STEP,
    adm: Path | None = typer.Option(
        None, "--adm", help="Also write the samples as ADM's evaluator reads them.", metavar="OUT.npz"
    ),
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Draw samples of a run: a picture, an .npz, and the recipe.  The same command again continues."""
    from sitkit.runs.run import open_run
    from sitkit.runs.sample import write_adm

    chosen = open_run(run, {"preset": preset, "step": step, **running.arguments(**vars(sampling))}, "sample")
    if adm is not None and not chosen.data_description.is_image:
        raise UserError(f"--adm writes images; this run models examples of shape {chosen.data_description.shape}.")
    with resumable(), console.progress() as progress:
        samples = sitkit.sample(chosen, progress=progress)
        if adm is not None:
            write_adm(samples, adm)
    if json:
        return console.as_json(samples.record | {"path": samples.folder})
    picture = samples.folder / "grid.png"
    console.facts(
        samples=f"{samples.folder / 'samples.npz'}   {samples.n} at {samples.record['nfe']} evaluations each",
        ADM=adm,
        picture=picture if picture.is_file() else None,
        recipe=samples.folder / "record.json",
    )


@app.command()
@options.grouped
def evaluate(
    *,
    run: str = options.RUN,
    preset: str | None = options.PRESET,
    metric: list[str] | None = options.component("metrics", options.DATA, "Repeat it, or name several with commas."),
    features: str | None = options.component("extractors", options.DATA),
    sampling: options.SamplingOptions,
    step: int | None = options.STEP,
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Measure a run's samples against its data; the same metric of real examples stands beside each number.

    Without -n the number of samples is the number of examples, at most 50,000.  All metrics use the same samples.  The
    same command again continues; `torchrun --nproc-per-node=N -m sitkit evaluate ...` divides the work.
    """

    if features is not None:
        try:
            extractors.parse(features)
        except UserError as error:
            raise UserError(f"--features: {error}") from None
    names = [name.strip() for text in metric or [] for name in text.split(",")] or None
    arguments = running.arguments(metric=names, **vars(sampling))
    evaluations = console.call(sitkit.evaluate, run, features=features, preset=preset, step=step, **arguments)
    if json:
        return console.as_json([e.record | {"path": e.path} for e in evaluations])
    rows, notes = [], []
    for e in evaluations:
        metric_record, features_record = e.record["metric"], e.record["features"] or {}
        name, extractor = metric_record["name"], metric_record.get("features", {}).get("name", "")
        rows.append((name, extractor, short(e.value), short(e.stderr, 2), short(e.real), e.n, e.nfe))
        notes += e.record["notes"]
        if e.record["reference"]["file"]:
            notes.append(f"{name}: against the statistics in {e.record['reference']['file']}.")
        if "accuracy" in features_record:
            accuracy = "unknown" if features_record["accuracy"] is None else short(features_record["accuracy"])
            notes.append(f"{extractor}: accuracy on {features_record['heldout']} held-out examples {accuracy}.")
    for size in sorted({e.real_n for e in evaluations if e.real is not None}):
        notes.append(f"real: the same metric of {size} random examples of the data against the others.")
    columns = ("metric", "features", "value", "stderr", "real", "n", "NFE")
    console.table(columns, rows, notes=list(dict.fromkeys(notes)))
    for evaluation in evaluations:
        console.facts(recipe=evaluation.path)


@app.command()
def runs(runs: Path = options.RUNS, json: bool = options.JSON) -> None:
    """List the runs on disk with their steps, samplings and numbers."""
    records, rows = [], []
    for run in sitkit.list_runs(runs):
        first = ", ".join(f"{value:.4g} {name}" for name, value in run.values)
        counts = {"samplings": run.samplings, "evaluations": run.evaluations}
        records.append({"run": run.folder, "step": run.step, "of": run.steps, **counts, "first": first})
        known = [first, *(f"{count} {name}" for name, count in counts.items() if count)]
        folder = run.folder.name if runs == Path("runs") else run.folder
        rows.append((folder, f"{run.step}/{run.steps}", "; ".join(filter(None, known))))
    if json:
        console.as_json(records)
    elif rows:
        console.table(("run", "step", ""), rows, cut=True)
    else:
        console.say(f"no runs in {runs}: make one with `sitkit train`.")


@app.command()
@options.grouped
def likelihood(
    *,
    run: str = options.RUN,
    n: int | None = typer.Option(None, "-n", help="Held-out examples.", show_default="all, at most 1000"),
    probes: int = typer.Option(1, "--probes", help="Random probes of the divergence per example."),
    divergence: str = typer.Option(
        "auto", "--divergence", help="auto (exact up to 32 dimensions), exact, rademacher, gaussian."
    ),
    sampler: str = typer.Option("dopri5", "--sampler", help="An ODE solver.", rich_help_panel=options.SAMPLING),
    steps: int | None = options.SAMPLER_STEPS,
    seed: int = typer.Option(0, "--seed", help="Seed of dequantisation and probes."),
    ema: float | None = options.EMA,
    running: options.RunningOptions,
    json: bool = options.JSON,
) -> None:
    """Measure bits per dimension of held-out data under the probability-flow ODE, with the standard error."""

    solver = {"divergence": divergence, "probes": probes, "sampler": sampler, "steps": steps}
    result = console.call(sitkit.likelihood, run, n=n, seed=seed, ema=ema, **solver, **running.arguments())
    record = result.record
    if json:
        return console.as_json(record | {"path": result.path})
    errors = [short(record[key], 2) for key in ("stderr", "stderr_data", "stderr_probes")]
    row = [short(result.value), *errors, record["n"], record["divergence"], record["probes"] or "-", record["nfe"]]
    row.append(short(record["round_trip"]["rms"], 2))
    columns = (record["unit"], "stderr", "of data", "of probes", "n", "divergence", "probes", "NFE", "round trip")
    notes = ["round trip: root mean square of data -> noise -> data, in units of the data."]
    if record["stderr_probes"] is None:
        notes.append("with one probe its part of the error is unknown: use --probes 2 or more.")
    console.table(columns, [row], notes=notes)
    console.facts(recipe=result.path)


@app.command()
def losscurve(
    names: list[str] | None = typer.Argument(None, metavar="RUN...", help="Runs to compare.", show_default="latest"),
    picture: Path = typer.Option(Path("losscurve.png"), "--picture", help="Where the plot goes."),
    runs: Path = options.RUNS,
    device: str | None = options.DEVICE,
    json: bool = options.JSON,
) -> None:
    """Plot the velocity loss of runs against time, for any target: where along the path each network errs."""
    from sitkit.results.losscurve import draw_loss_curves

    trained = [sitkit.load(name, root=runs, device=device or "auto") for name in names or ["latest"]]
    curves = draw_loss_curves(trained, picture)
    if json:
        return console.as_json([
            {"run": run.folder.name, "label": curve.label, "times": list(curve.x), "losses": list(curve.values)}
            for run, curve in zip(trained, curves, strict=True)
        ])  # fmt: skip
    rows = []
    for run, curve in zip(trained, curves, strict=True):
        largest, time = max(zip(curve.values, curve.x, strict=True), key=lambda point: point[0])
        mean = sum(curve.values) / len(curve.values)
        rows.append((curve.label, short(mean), short(largest), short(time, 3), run.folder))
    console.table(("target", "mean over t", "largest", "at t", "run"), rows, "velocity loss, summed over dimensions")
    console.facts(picture=picture)
