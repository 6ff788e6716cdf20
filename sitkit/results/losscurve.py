"""The loss of runs against time, as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sitkit.evaluation import plots
from sitkit.evaluation.plots import Curve
from sitkit.runs.diagnostics import velocity_losses
from sitkit.runs.run import Run, load


def losscurve(
    run: Run | str | Path | Sequence[Run | str | Path] = "latest",
    *,
    picture: str | Path = "losscurve.png",
    runs: str | Path = "runs",
    device: str | None = None,
) -> list[Curve]:
    """Plot the velocity loss of one or several runs against t, and return the curves.

    Args:
        run: a run or several, each a Run, a folder, a name, an identity, or "latest".
        picture: the file of the plot.
        runs: the folder of runs.
        device: "cpu", "cuda", "auto".

    Returns:
        One curve per run: `x` holds the times, `values` the losses summed over dimensions.
    """
    chosen = [run] if isinstance(run, (Run, str, Path)) else list(run)
    trained = [name if isinstance(name, Run) else load(name, root=runs, device=device or "auto") for name in chosen]
    return draw_loss_curves(trained, Path(picture))


def draw_loss_curves(runs: Sequence[Run], path: Path) -> list[Curve]:
    """Plot the velocity losses of runs against time, and return the curves.

    The unit does not depend on the target, so runs with one interpolant can be compared at every t.
    """
    names = curve_labels(runs)
    curves = [
        Curve(name, *(list(column) for column in zip(*velocity_losses(run), strict=True)))
        for name, run in zip(names, runs, strict=True)
    ]
    title, ylabel = "velocity loss of held-out data", "L_t = E |v_theta - v|^2 (summed over dimensions)"
    plots.curves(curves, path, title=title, xlabel="t (0 noise, 1 data)", ylabel=ylabel, logy=True)
    return curves


def curve_labels(runs: Sequence[Run]) -> list[str]:
    """Return the shortest distinct names of the runs: the target, interpolant and target, or the folder."""
    targets = [run.config.target.name for run in runs]
    paths = [f"{run.config.interp.name} {run.config.target.name}" for run in runs]
    distinct = (names for names in (targets, paths) if len(set(names)) == len(runs))
    return next(distinct, [run.folder.name for run in runs])
