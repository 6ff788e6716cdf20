"""The log-density of held-out data under a trained run, in bits per dimension, with where its error comes from.

Data on levels of spacing w have no density: each value x is replaced by x + w (u - 1/2) with u uniform, so that
E log2 p(x + w (u - 1/2)) + d log2 w is a lower bound of the log2-probability of the levels (Theis et al. 2016, section
3.1).  Bits per dimension are that bound, negated, over d.  Data that are not rounded, and latents, are measured in nats
per dimension of their differential entropy, which may be negative.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from sitkit.models.autoencoder import modelled
from sitkit.registry import spec
from sitkit.runs.config.sources import Layer, Spec
from sitkit.runs.environment import environment
from sitkit.runs.run import Run, open_run
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import read_json, write_json
from sitkit.runtime.hashing import identity
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.solvers.log_density import LogDensity, integrate_log_density
from sitkit.solvers.ode import Dopri5, ODESampler
from sitkit.solvers.sampler import Sampler

MAX_HELDOUT, LIKELIHOOD_BATCH = 1000, 100


class HeldoutLikelihood(NamedTuple):
    """A likelihood on disk: where, and the record."""

    path: Path
    record: dict[str, Any]

    @property
    def value(self) -> float:
        """Bits per dimension, or nats per dimension where the data are not rounded."""
        return float(self.record["value"])


Divergence = Literal["auto", "exact", "rademacher", "gaussian"]


def likelihood(
    run: Run | str | Path = "latest",
    *,
    n: int | None = None,
    probes: int = 1,
    divergence: Divergence = "auto",
    sampler: Spec[Sampler] = "dopri5",
    steps: int | None = None,
    seed: int = 0,
    ema: float | None = None,
    runs: str | Path | None = None,
    device: str | None = None,
    settings: Mapping[str, Any] | Layer | None = None,
    progress: Progress | None = None,
) -> HeldoutLikelihood:
    """Measure the log-likelihood of held-out data under the probability-flow ODE, or return it from disk.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        n: held-out examples; all, at most 1,000, by default.
        probes: probes of the divergence for each example.
        divergence: "auto" (exact up to 32 dimensions, else rademacher), "exact", "rademacher", "gaussian".
        sampler: an ODE solver.
        steps: intervals of a fixed-step solver.
        seed: seed of dequantisation and probes.
        ema, runs, device, settings, progress: as in `sample`.

    Returns:
        Bits per dimension (nats per dimension for data that are not rounded), with standard errors in the record.

    Raises:
        UserError: where nothing is held out, for a sampler that solves no ODE, and for n or probes below 1.
        WorkFailed: for log-densities that are not finite.
    """
    if divergence not in get_args(Divergence):
        known = ", ".join(get_args(Divergence))
        raise UserError(f"divergence {divergence}: no such estimate. Known: {known}.")
    flags = {"sampler": sampler, "steps": steps, "ema": ema, "runs": runs, "device": device, "settings": settings}
    chosen = open_run(run, flags, "likelihood")
    with reporting(progress) as report:
        solver: Any = chosen.config.sampler
        return measure_likelihood(chosen, report, n=n, probes=probes, divergence=divergence, sampler=solver, seed=seed)


def measure_likelihood(
    run: Run,
    progress: Progress = silent,
    *,
    n: int | None = None,
    probes: int = 1,
    divergence: Divergence = "auto",
    sampler: ODESampler = Dopri5(),
    seed: int = 0,
) -> HeldoutLikelihood:
    """Measure the first n held-out examples (all, at most 1,000) into likelihoods/<identity>.json, or read it there.

    The densities are conditional on the examples' labels, where there are any and config.sample.labels is not "none".
    Dequantisation and probes belong to the example and the seed, whatever n, probes or the batch.  Each example is also
    sent to noise and back: `round_trip` is what the solver lost.

    stderr: of the mean over examples, and everything in it; stderr_probes: the part of the probes, 0 where the
    divergence is exact and null with one probe, which cannot tell; stderr_data: the rest.
    Raises UserError where nothing is held out, for a sampler that is no ODE solver, and for n or probes below 1.
    """
    data = run.examples
    if n is not None and n < 1:
        raise UserError(f"n must be at least 1; got {n}.")
    if not len(data.heldout):
        raise UserError(
            "a likelihood is measured on held-out data, and the run held none out: set data.holdout above 0."
        )
    index = data.heldout[: n or MAX_HELDOUT]
    recipe: dict[str, Any] = {
        "step": run.step,
        "weights": run.config.sample.weights,
        "ema": run.config.sample.ema,
        "labels": "given" if data.num_classes and run.config.sample.labels != "none" else "none",
        "sampler": spec(sampler) if isinstance(sampler, ODESampler) else None,
        "divergence": divergence,
        "probes": probes,
        "n": len(index),
        "seed": seed,
        "batch": LIKELIHOOD_BATCH,
    }
    path = RunFolder(run.folder).likelihoods / f"{identity(run.identity, recipe, data.fingerprint)}.json"
    if not path.is_file():
        write_json(path, _measure(run, index, recipe, sampler, progress))
    return HeldoutLikelihood(path, read_json(path))


def _measure(
    run: Run, index: np.ndarray, recipe: dict[str, Any], sampler: ODESampler, progress: Progress
) -> dict[str, Any]:
    data, sampler = run.examples, sampler.bind(run)
    device = run.device
    # Latents of rounded images are not rounded.
    width = data.bin_width if not run.config.autoencoder.encodes else None
    parts: list[LogDensity] = []
    began, lost, back = time.monotonic(), [], 0
    for first in range(0, len(index), LIKELIHOOD_BATCH):
        some = index[first : first + LIKELIHOOD_BATCH]
        keys = rng.sample_keys(recipe["seed"], torch.from_numpy(some))
        x = data.read(some)
        x = (dequantised(x, width, keys) if width else x).to(device)
        x = modelled(run.config.autoencoder, data, x)
        y = torch.from_numpy(data.labels[some]).to(device) if recipe["labels"] == "given" else None
        part = integrate_log_density(
            run.field,
            x,
            y,
            sampler=sampler,
            divergence=recipe["divergence"],
            probes=recipe["probes"],
            seeds=keys.to(device),
        )
        again = sampler.sample(run.field, part.noise, y, seeds=keys)
        lost.append((again.x - x).flatten(1).square().mean(1).sqrt().cpu())
        parts.append(part._replace(log_prob=part.log_prob.cpu(), each=part.each.cpu().double()))
        back = max(back, again.nfe)
        progress(Event("likelihood", first + len(some), len(index)))
    each = torch.cat([part.each for part in parts], 1)
    if not bool(each.isfinite().all()):
        raise WorkFailed(f"{int((~each.isfinite()).any(0).sum())} of {len(index)} log-densities are not finite.")
    size, error = math.prod(run.shape), torch.cat(lost)
    unit = math.log(2) * size if width else size
    values = -(each + (size * math.log(width) if width else 0.0)) / unit
    return {
        "value": float(values.mean()),
        "unit": "bits/dim" if width else "nats/dim",
        **standard_errors(values, exact=parts[0].probes == 0),
        "log_prob": float(each.mean()),
        "dimensions": size,
        "bin_width": width,
        "divergence": "exact" if parts[0].probes == 0 else recipe["divergence"].replace("auto", "rademacher"),
        "probes": parts[0].probes,
        "n": len(index),
        "nfe": max(part.nfe for part in parts),
        "round_trip": {"rms": float(error.square().mean().sqrt()), "worst": float(error.max()), "nfe": back},
        "per_example": values.mean(0).tolist(),
        "recipe": recipe,
        "training": run.identity,
        "data": {"spec": spec(run.config.data), "fingerprint": data.fingerprint},
        "seconds": time.monotonic() - began,
        "environment": environment(device),
    }


def dequantised(x: Tensor, width: float, keys: Tensor) -> Tensor:
    """x + width (u - 1/2), u uniform on (0, 1) for each value, a function of the example's key: (b, ...) -> (b, ...)."""
    drawn = rng.words(keys, torch.zeros(1, dtype=torch.int64), math.prod(x.shape[1:]), rng.DATA)
    u = (drawn.double() + 0.5) / 2**32
    return x + (width * (u - 0.5)).reshape(x.shape).to(x)


def standard_errors(values: Tensor, *, exact: bool = False) -> dict[str, float | None]:
    """Of the mean of values (probes, n): in all, by the probes, and by the data.

    The variance of the mean is (V + W / k) / n with V over examples and W over the probes of one, k probes each: the
    variance of the examples' means over n estimates all of it, the mean variance within examples over k n the second part.
    """
    k, n = values.shape
    whole = float(values.mean(0).var() / n) if n > 1 else None
    within = 0.0 if exact else float(values.var(0).mean() / (k * n)) if k > 1 else None
    return {
        "stderr": None if whole is None else math.sqrt(whole),
        "stderr_probes": None if within is None else math.sqrt(within),
        "stderr_data": None if whole is None or within is None else math.sqrt(max(whole - within, 0.0)),
    }
