"""Weights of a run as files keep them: checkpoints, averages and their names, and averages rebuilt from snapshots.

The weights theta_j after step j, averaged with a power-function profile up to step t, are sum_j p(j) theta_j with

    p(j) = (j^(gamma + 1) - (j - 1)^(gamma + 1)) / t^(gamma + 1)

the integral of (gamma + 1) s^gamma / t^(gamma + 1) over j - 1 < s <= j.  A profile is named by its relative width, its
standard deviation over t: width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).  Snapshots of two widths, kept while
training, span the others: `rebuild` gives the average of any width at any step by least squares.

Source: Karras et al. 2024 (EDM2, arXiv 2312.02696), sections 3.1-3.2 and appendix C.
"""

from __future__ import annotations

import math
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sitkit.runs.checkpoint import (
    checkpoint_file,
    checkpoints,
    header_of_checkpoint,
    latest_checkpoint,
    read_checkpoint,
    step_of,
)
from sitkit.runs.config.schema import Config, TrainSettings
from sitkit.runs.one_file import weights_of_file
from sitkit.runs.run_folder import RunFolder, check_settings_of_checkpoint
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import write_json

WIDEST = 12**-0.5  # gamma = 0: all weights equal
# Relative L2 errors of a rebuilt profile: `rebuild` warns above the first and refuses above the second.
DOUBTFUL, WRONG = 0.05, 0.3
FIXED = "fixed."


def gamma(width: float) -> float:
    """Return the exponent of the power profile with a relative width: the largest root of
    (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2.  Raises ValueError outside 0 < width <= 12^-0.5 = 0.2887.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"the relative width of a power-function average is above 0 and at most 0.2887; got {width}.")
    inverse = width**-2
    return max(0.0, float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()))


def prefix(decays: Sequence[float], decay: float) -> str:
    """Return the prefix of the tensor names of one of several exponential averages in a checkpoint."""
    return "ema." if decay == decays[0] else f"ema-{decay!r}."


def power_prefix(width: float) -> str:
    """Return the prefix of the tensor names of the power profile of a width, in checkpoints and snapshots."""
    return f"power-{width!r}."


def width_of(power_prefix: str) -> float:
    """Return the width in a `power_prefix`."""
    return float(power_prefix.removeprefix("power-").removesuffix("."))


def snapshot_due(settings: TrainSettings, step: int) -> bool:
    """Whether a snapshot is kept after this step: every `posthoc_every` steps and at the end."""
    return bool(settings.posthoc) and (step % interval(settings) == 0 or step == settings.steps)


def interval(settings: TrainSettings) -> int:
    """Return the number of steps between two snapshots; the default keeps at most 32 snapshots.

    With widths 0.05 and 0.1, 32 snapshots represent widths 0.03 to 0.2 with a relative L2 error of about 1 % or less.
    """
    return settings.posthoc_every or max(1, -(-settings.steps // 32))


def snapshot_count(settings: TrainSettings) -> int:
    """Return the number of snapshots of a whole training."""
    return math.ceil(settings.steps / interval(settings))


def snapshot_bytes(settings: TrainSettings, parameters: int) -> int:
    """Return the size on disk of all snapshots of a whole training, in bytes."""
    size = parameters * len(settings.posthoc) * (2 if settings.posthoc_dtype == "float16" else 4)
    return size * snapshot_count(settings)


def check_space(folder: Path, settings: TrainSettings, network: nn.Module) -> str:
    """Return the size on disk of the snapshots of a whole training as a message, and write it to ema/snapshots.json.

    Raises:
        UserError: if the disk has too little free space for the snapshots that are still missing.
    """
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    count = snapshot_count(settings)
    total = snapshot_bytes(settings, parameters)
    size = f"{count} snapshots of {total // count / 1e6:,.1f} MB"
    existing = sum(path.stat().st_size for path in checkpoints(RunFolder(folder).snapshots))
    free = shutil.disk_usage(folder).free
    if total - existing > free:
        raise UserError(
            f"train.posthoc keeps {size}, and {folder} has {free / 1e6:,.1f} MB left: "
            "raise train.posthoc_every, or set train.posthoc_dtype=float16."
        )
    record = {"count": count, "every": interval(settings), "widths": list(settings.posthoc), "bytes": total}
    write_json(RunFolder(folder).snapshots / "snapshots.json", record | {"dtype": settings.posthoc_dtype})
    return f"post-hoc EMA: {size}, {total / 1e6:,.1f} MB in all."


class ProfileFit(NamedTuple):
    """Coefficients of snapshots, and the relative L2 error |sum_i c_i p_i - p| / |p| of the profile that they make."""

    coefficients: np.ndarray
    error: float


def fit_profile(snapshots: Sequence[tuple[float, float]], width: float, end: float) -> ProfileFit:
    """Return the least-squares fit of the power profile of a width at step `end` by those of snapshots (width, step).

    Profiles p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on 0 < s <= t have, with m = min(t, t'), the inner product
        <p, p'> = (gamma + 1) (gamma' + 1) m^(gamma + gamma' + 1) / ((gamma + gamma' + 1) t^(gamma + 1) t'^(gamma' + 1))
    All in float64, through logarithms, with profiles of norm 1: c = argmin |sum_i c_i p_i - p|^2.
    """
    exponents = np.array([gamma(w) for w, _ in snapshots])
    ends = np.array([t for _, t in snapshots], dtype=float) / end
    target = np.array([gamma(width)]), np.ones(1)
    norms = 0.5 * _log_inner(exponents, ends, exponents, ends)
    goal = 0.5 * _log_inner(*target, *target)
    gram = np.exp(_log_inner(exponents[:, None], ends[:, None], exponents, ends) - norms[:, None] - norms)
    right = np.exp(_log_inner(exponents, ends, *target) - norms - goal)
    solved = np.linalg.lstsq(gram, right, rcond=1e-13)[0]
    square = 1 - 2 * right @ solved + solved @ gram @ solved
    # Below 1e-7 the square is rounding: a snapshot has the profile itself.
    return ProfileFit(solved * np.exp(goal - norms), math.sqrt(max(float(square), 0.0)))


def _log_inner(a: np.ndarray, s: np.ndarray, b: np.ndarray, t: np.ndarray) -> np.ndarray:
    rates = np.log(a + 1) + np.log(b + 1) - np.log(a + b + 1)
    return rates + (a + b + 1) * np.log(np.minimum(s, t)) - (a + 1) * np.log(s) - (b + 1) * np.log(t)


def rebuild(folder: Path, width: float, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """Return (step, state of the network) of the power-function average of a width, from a run's snapshots.

    Sums are in float64.  Warns if the profile is off by more than 5 % (relative L2).

    Args:
        folder: the run's folder.
        width: the relative width of the average.
        step: the last step of the average, by default that of the newest snapshot.

    Raises:
        UserError: without snapshots, for a step beyond them, and for a profile that they represent with an error above 30 %.
    """
    paths = checkpoints(RunFolder(folder).snapshots)
    if not paths:
        raise UserError(
            f"{folder} keeps no snapshots to rebuild an average of width {width} from: "
            "train with --set train.posthoc=[0.05,0.1]."
        )
    steps = [step_of(path) for path in paths]
    end = steps[-1] if step is None else step
    if end > steps[-1]:
        raise UserError(f"The snapshots of {folder} end at step {steps[-1]}, before step {end}.")
    files = {at: read_checkpoint(path)[1] for at, path in zip(steps, paths, strict=True)}
    newest = files[steps[-1]]
    widths: list[float] = header_of_checkpoint(paths[-1])["widths"]
    snapshots = [(w, at) for w in widths for at in steps]
    try:
        fit = fit_profile(snapshots, width, end)
    except ValueError as error:
        raise UserError(f"sample.ema: {error}") from None
    message = (
        f"The average of width {width} at step {end} is off by {fit.error:.1%} of its profile (relative L2): "
        f"{len(steps)} snapshots of the widths {', '.join(map(str, widths))} cannot represent it"
    )
    if fit.error > WRONG:
        raise UserError(f"{message}. Ask for a width nearer to those, or train with a smaller train.posthoc_every.")
    if fit.error > DOUBTFUL:
        warnings.warn(f"{message} better.", stacklevel=2)
    state = {name.removeprefix(FIXED): tensor for name, tensor in newest.items() if name.startswith(FIXED)}
    first = power_prefix(widths[0])
    for name in (n.removeprefix(first) for n in newest if n.startswith(first)):
        total = torch.zeros((), dtype=torch.float64)
        for (w, at), coefficient in zip(snapshots, fit.coefficients, strict=True):
            total = total + coefficient * files[at][power_prefix(w) + name].double()
        state[name] = total.float()
    return end, state


def _checkpoint_of(folder: Path, step: int | None = None) -> Path:
    """Return the newest undamaged checkpoint of a run, or that of a step."""
    run = RunFolder(folder)
    paths = checkpoints(run.checkpoints)
    if step is not None:
        if (path := checkpoint_file(run.checkpoints, step)) in paths:
            return path
        raise UserError(
            f"{folder} has no checkpoint at step {step}; it has {', '.join(p.stem for p in paths) or 'none'}."
        )
    newest = latest_checkpoint(run.checkpoints)
    if newest is None:
        again = shlex.join(["sitkit", "train", str(run.config)])
        raise UserError(f"{folder} has no checkpoint yet: continue its training with `{again}`.")
    return newest


def load_weights(source: Path, config: Config, step: int | None = None) -> tuple[int, dict[str, Tensor], Path]:
    """Return (step, state of the network, path of the file) of the weights of a run that config.sample names.

    Args:
        source: the run's folder or its one file.
        config: the run's configuration.
        step: the step of the checkpoint, by default the newest.

    Raises:
        UserError: for an average that the run neither keeps nor can rebuild, and for a checkpoint that is damaged or was
            trained with other settings.
    """
    if source.is_file():
        return *weights_of_file(source, config, step), source
    decays, decay = config.train.ema_decays, config.sample.ema
    if decay is not None and decay not in decays:
        if decay > WIDEST:
            raise UserError(
                f"sample.ema: {source} keeps no average of decay {decay}, only of {', '.join(map(str, decays))}; "
                "up to 0.2887 it is the relative width of a power-function average."
            )
        return *rebuild(source, decay, step), RunFolder(source).snapshots
    path = _checkpoint_of(source, step)
    header, tensors = read_checkpoint(path)
    check_settings_of_checkpoint(config, path, header)
    start = "model." if config.sample.weights == "raw" else prefix(decays, decays[0] if decay is None else decay)
    state = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return int(header["step"]), state, path
