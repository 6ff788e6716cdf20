"""The loss of runs over t, as a picture."""

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
    """Draw the velocity loss of one or several runs against t, and return the curves.

    Args:
        run: a run or several, each a Run, a folder, a name, an identity, or "latest".
        picture: where the plot goes.
        runs: the folder of runs.
        device: "cpu", "cuda", "auto".

    Returns:
        A curve a run: x are the times, values the losses summed over dimensions.
    """
    chosen = [run] if isinstance(run, (Run, str, Path)) else list(run)
    trained = [name if isinstance(name, Run) else load(name, root=runs, device=device or "auto") for name in chosen]
    return draw_loss_curves(trained, Path(picture))


def draw_loss_curves(runs: Sequence[Run], path: Path) -> list[Curve]:
    """The velocity losses of runs against time, one curve a run, in one picture: which target errs where.

    The curves are in the same units whatever is predicted, so runs on one interpolant may be compared at every t.
    """
    names = curve_labels(runs)
    curves = [
        Curve(name, *(list(column) for column in zip(*velocity_losses(run), strict=True)))
        for name, run in zip(names, runs, strict=True)
    ]
    plots.curves(
        curves,
        path,
        title="velocity loss of held-out data",
        xlabel="t (0 noise, 1 data)",
        ylabel="L_t = E |v_theta - v|^2 (summed over dimensions)",
        logy=True,
    )
    return curves


def curve_labels(runs: Sequence[Run]) -> list[str]:
    """The shortest names that tell the runs apart: the target, interpolant and target, or the folder."""
    found: list[str] = []
    for name in (
        lambda run: run.config.target.name,
        lambda run: f"{run.config.interp.name} {run.config.target.name}",
        lambda run: run.folder.name,
    ):
        found = [name(run) for run in runs]
        if len(set(found)) == len(found):
            break
    return found
