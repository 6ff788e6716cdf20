"""The log-density of held-out data under a trained run, in bits per dimension, with the parts of its error.

Data on levels of spacing w have no density: each value x is replaced by x + w (u - 1/2) with u uniform, so that
E log2 p(x + w (u - 1/2)) + d log2 w is a lower bound of the log2-probability of the levels (Theis et al. 2016, section
3.1).  Bits per dimension are that bound, negated, over d.  Data that are not rounded, and latents, are measured in nats
per dimension of their differential entropy, which may be negative.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple, Unpack, get_args

import numpy as np
import torch
from torch import Tensor

from sitkit.models.autoencoder import modelled
from sitkit.registry import essence, samplers, spec
from sitkit.runs.config.identity import training_identity
from sitkit.runs.config.records import LikelihoodRecord
from sitkit.runs.config.sources import Spec, WeightsFlags, require_flags
from sitkit.runs.diagnostics import heldout_examples
from sitkit.runs.environment import environment
from sitkit.runs.run import Run, open_run
from sitkit.runs.run_folder import RunFolder, find_record, recorded_packages
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import exists, read_record, write_json
from sitkit.runtime.hashing import identity
from sitkit.runtime.progress import Event, Progress
from sitkit.runtime.progress_bar import reporting
from sitkit.solvers.log_density import LogDensity, integrate_log_density
from sitkit.solvers.sampler import Sampler

MAX_HELDOUT, LIKELIHOOD_BATCH = 1000, 100


class HeldoutLikelihood(NamedTuple):
    """A likelihood on disk: likelihoods/<identity>.json.

    Args:
        path: the file.
        record: the content of the file: the value, its standard errors, and the settings that it depends on.
    """

    path: Path
    record: dict[str, Any]

    @property
    def value(self) -> float:
        """Bits per dimension, or nats per dimension if the data are not rounded."""
        return float(self.record["value"])

    def __repr__(self) -> str:
        stderr = "" if self.record["stderr"] is None else f" ± {self.record['stderr']:.2g}"
        return f"HeldoutLikelihood({self.value:.4g}{stderr} {self.record['unit']}, n = {self.record['n']})"


Divergence = Literal["auto", "exact", "rademacher", "gaussian"]


def likelihood(
    run: Run | str | Path = "latest",
    *,
    n: int | None = None,
    probes: int = 1,
    divergence: Divergence = "auto",
    sampler: Spec[Sampler] = "dopri5",
    seed: int = 0,
    progress: Progress | None = None,
    **flags: Unpack[WeightsFlags],
) -> HeldoutLikelihood:
    """Measure the log-likelihood of held-out data under the probability-flow ODE, or return it from disk.

    The densities are conditional on the examples' labels, if there are any and sample.labels is not "none".
    Dequantisation and probes belong to the example and the seed, whatever n, probes or the batch.  Each example is also
    sent to noise and back: `round_trip` in the record is the error of the solver.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        n: held-out examples; all, at most 1,000, by default.
        probes: probes of the divergence for each example.
        divergence: "auto" (exact up to 32 dimensions, else rademacher), "exact", "rademacher", "gaussian".
        sampler: an ODE solver.
        seed: seed of dequantisation and probes.
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: `steps` (intervals of a fixed-step solver), `ema`, `step`, `runs`, `device`, `settings`: as in `sample`.

    Returns:
        Bits per dimension (nats per dimension for data that are not rounded), with standard errors in the record: `stderr`
        of the mean over examples, `stderr_probes` the part of the probes (0 for the exact divergence, null with one
        probe), `stderr_data` the rest.

    Raises:
        UserError: if nothing is held out, for a sampler that solves no ODE, and for n or probes below 1.
        WorkFailed: for log-densities that are not finite.
    """
    require_flags(flags, WeightsFlags, "likelihood")
    if divergence not in get_args(Divergence):
        known = ", ".join(get_args(Divergence))
        raise UserError(f"divergence {divergence}: no such estimate. Known: {known}.")
    if n is not None and n < 1:
        raise UserError(f"n must be at least 1; got {n}.")
    run = open_run(run, {"sampler": sampler, **flags}, "likelihood")
    data, index = heldout_examples(run, "likelihood", n or MAX_HELDOUT)
    config = run.config
    recipe: dict[str, Any] = {
        "step": run.step,
        "weights": config.sample.weights,
        "ema": config.sample.ema,
        "labels": "given" if data.num_classes and config.sample.labels != "none" else "none",
        "sampler": spec(config.sampler),
        "divergence": divergence,
        "probes": probes,
        "n": len(index),
        "seed": seed,
        "batch": LIKELIHOOD_BATCH,
    }
    if len(index) < len(data.heldout):
        # Release 0.1 took the first ones.
        recipe["subset"] = "random"

    def recorded(record: dict[str, Any]) -> list[str]:
        packages, values = recorded_packages(record["environment"]), record["recipe"]
        sampler = essence(samplers.parse(values["sampler"]), packages=packages)
        training = training_identity(config, run.contents, packages)
        return [identity(training, values | {"sampler": sampler}, record["data"]["fingerprint"])]

    name = identity(run.identity, recipe | {"sampler": essence(config.sampler)}, data.fingerprint)
    path = find_record(RunFolder(run.folder).likelihoods / f"{name}.json", "*.json", recorded)
    if not exists(path):
        with reporting(progress) as report:
            write_json(path, {"identity": name, **_measure(run, index, recipe, report)})
    remedy = "Remove it, and the same command measures it again."
    return HeldoutLikelihood(path, read_record(path, LikelihoodRecord, "the record of a likelihood", remedy))


def _measure(run: Run, index: np.ndarray, recipe: dict[str, Any], progress: Progress) -> dict[str, Any]:
    data, device = run.examples, run.device
    sampler: Any = run.config.sampler.bind(run)
    # Latents of rounded images are not rounded.
    width = data.bin_width if not run.config.autoencoder.encodes else None
    parts: list[LogDensity] = []
    began, errors, nfe_back = time.monotonic(), [], 0
    for first in range(0, len(index), LIKELIHOOD_BATCH):
        batch = index[first : first + LIKELIHOOD_BATCH]
        keys = rng.sample_keys(recipe["seed"], torch.from_numpy(batch))
        x = data.read(batch)
        x = (dequantised(x, width, keys) if width else x).to(device)
        x = modelled(run.config.autoencoder, data, x)
        y = torch.from_numpy(data.labels[batch]).to(device) if recipe["labels"] == "given" else None
        part = integrate_log_density(
            run.field,
            x,
            y,
            sampler=sampler,
            divergence=recipe["divergence"],
            probes=recipe["probes"],
            seeds=keys.to(device),
        )
        returned = sampler.sample(run.field, part.noise, y, seeds=keys)
        errors.append((returned.x - x).flatten(1).square().mean(1).sqrt().cpu())
        parts.append(part._replace(log_prob=part.log_prob.cpu(), each=part.each.cpu().double()))
        nfe_back = max(nfe_back, returned.nfe)
        progress(Event("likelihood", first + len(batch), len(index)))
    each = torch.cat([part.each for part in parts], 1)
    if not bool(each.isfinite().all()):
        raise WorkFailed(f"{int((~each.isfinite()).any(0).sum())} of {len(index)} log-densities are not finite.")
    size, error = math.prod(run.shape), torch.cat(errors)
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
        "round_trip": {"rms": float(error.square().mean().sqrt()), "worst": float(error.max()), "nfe": nfe_back},
        "per_example": values.mean(0).tolist(),
        "recipe": recipe,
        "training": run.identity,
        "data": {"spec": spec(run.config.data), "fingerprint": data.fingerprint},
        "seconds": time.monotonic() - began,
        "environment": environment(device),
    }


def dequantised(x: Tensor, width: float, keys: Tensor) -> Tensor:
    """Return x + width (u - 1/2), (b, *shape), with u uniform on (0, 1) for each value, a function of the example's key."""
    words = rng.words(keys, torch.zeros(1, dtype=torch.int64), math.prod(x.shape[1:]), rng.DATA)
    u = (words.double() + 0.5) / 2**32
    return x + (width * (u - 0.5)).reshape(x.shape).to(x)


def standard_errors(values: Tensor, *, exact: bool = False) -> dict[str, float | None]:
    """Return the standard error of the mean of values (probes, n), its part from the probes, and its part from the data.

    The variance of the mean is (V + W / k) / n, with V the variance over examples, W that over the probes of an example,
    and k probes each.  The variance of the examples' means over n estimates the sum, the mean variance within examples
    over k n the second part.
    """
    k, n = values.shape
    total = float(values.mean(0).var() / n) if n > 1 else None
    probes = 0.0 if exact else float(values.var(0).mean() / (k * n)) if k > 1 else None
    data = None if total is None or probes is None else max(total - probes, 0.0)
    parts = {"stderr": total, "stderr_probes": probes, "stderr_data": data}
    return {name: None if variance is None else math.sqrt(variance) for name, variance in parts.items()}
