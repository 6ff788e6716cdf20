"""Samples of a run: pictures, an .npz in the layout of the `npz` data set, and a record of their settings."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from sitkit.data.dataset import Examples
from sitkit.evaluation.extractors.extractor import Extraction
from sitkit.evaluation.images import ROUNDING
from sitkit.registry.measures import Measures
from sitkit.runs.changed_plugins import warn_of_changed_samples
from sitkit.runs.config.identity import sampling_identity, sampling_recipe
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import SamplingFlags
from sitkit.runs.environment import environment
from sitkit.runs.run import Run, open_run
from sitkit.runs.run_folder import find_samples
from sitkit.runs.sample_set import ARRAYS, SHARD, SampleSet, Shards, block_size, to_float, to_storage
from sitkit.runtime import archives, rng
from sitkit.runtime.distributed import joined
from sitkit.runtime.errors import UserError, WorkFailed, suggest
from sitkit.runtime.files import to_json
from sitkit.runtime.locks import divide_work
from sitkit.runtime.progress import Event, Progress, silent
from sitkit.runtime.progress_bar import reporting
from sitkit.runtime.tensors import save_tensors
from sitkit.solvers.guidance import Guidance
from sitkit.solvers.moments import NOTED_LOSS
from sitkit.solvers.sampler import Plan, Sample, Sampler, SolveSpec
from sitkit.transport.diffusion import Diffusion
from sitkit.transport.field import require_unconditional


def labels_of(config: Config, data: Examples, index: Tensor, keys: Tensor) -> Tensor:
    """Return the label (n,) of each sample, a function of its index and key; num_classes stands for no label.

    Args:
        config: the configuration.
        data: the data of the training, or their description.
        index: the numbers of the samples, (n,).
        keys: the keys of the samples, (n,).

    Raises:
        UserError: for classes that the data do not have.
    """
    rule = config.sample.labels
    if isinstance(rule, tuple):
        labels = torch.tensor(chosen_classes(rule, data))
        return labels[index % len(labels)]
    if rule == "none" or data.num_classes == 0:
        return torch.full_like(index, data.num_classes)
    if rule == "data":
        return torch.tensor(in_proportion(_counts(data), config.sample.n))[index % config.sample.n]
    labels = torch.tensor(data.present_classes)
    return labels[index % len(labels) if rule == "balanced" else rng.labels(keys, len(labels))]


def chosen_classes(rule: tuple[int | str, ...], data: Examples) -> list[int]:
    """Return the numbers of classes that are given by number or name.  Raises UserError for one without examples."""
    names, top = data.class_names, data.num_classes - 1
    if top < 0:
        raise UserError(f"sample.labels = {list(rule)} asks for classes, and the data of this run have no labels.")
    for label in rule:
        if isinstance(label, str) and label not in names:
            raise UserError(
                f"sample.labels: there is no class {label!r}.{suggest(label, names)} Give a number or a name."
            )
    classes = [names.index(label) if isinstance(label, str) else label for label in rule]
    if not classes or not 0 <= min(classes) <= max(classes) <= top:
        raise UserError(f"sample.labels must be classes from 0 to {top}; got {list(rule)}.")
    empty = [names[label] for label in classes if label not in data.present_classes]
    if empty:
        raise UserError(f"sample.labels: class {empty[0]!r} has no example in the data, so the network never saw it.")
    return classes


def _counts(data: Examples) -> tuple[int, ...]:
    if data.class_counts is None:
        raise UserError(
            "sample.labels = 'data' needs the number of examples of each class, which this run does not know: "
            "use 'balanced', or give the classes."
        )
    return data.class_counts


@functools.lru_cache(maxsize=4)
def in_proportion(counts: tuple[int, ...], n: int) -> list[int]:
    """Return n classes in the proportions of counts, evenly mixed; the largest remainders decide about the last ones."""
    total = sum(counts)
    shares = [n * count // total for count in counts]
    order = sorted(range(len(counts)), key=lambda label: (-(n * counts[label] % total), label))
    for label in order[: n - sum(shares)]:
        shares[label] += 1
    places = [((2 * i + 1) / (2 * share), label) for label, share in enumerate(shares) for i in range(share)]
    return [label for _, label in sorted(places)]


# A smaller share of samples of other classes is not said: the digits differ from balanced by 0.6 %.
SAID_SHARE = 0.02
# The beginning of such a note.
LABELS = "labels: "


def label_notes(config: Config, data: Examples) -> tuple[str, ...]:
    """Return a note if the classes of the samples are not those of the data that they are measured against."""
    rule, counts = config.sample.labels, data.class_counts
    if rule in ("none", "data") or not counts or not sum(counts):
        return ()
    drawn = chosen_classes(rule, data) if isinstance(rule, tuple) else data.present_classes
    shares = [drawn.count(label) / len(drawn) - count / sum(counts) for label, count in enumerate(counts)]
    others = sum(map(abs, shares)) / 2
    if others <= SAID_SHARE:
        return ()
    if isinstance(rule, tuple) and set(drawn) != set(data.present_classes):
        names = ", ".join(data.class_names[label] for label in sorted(set(drawn)))
        return (f"{LABELS}the samples are of classes {names} alone, and are compared with all classes of the data.",)
    rule = rule if isinstance(rule, str) else "as listed"
    return (
        f"{LABELS}{rule}, and the data's classes have other frequencies: {others:.0%} of the samples would be of another "
        "class with sample.labels=data.",
    )


def plan_solve(sampler: Sampler, spec: SolveSpec, run: Measures) -> Plan:
    """Return the interval and the steps of a solve.

    Args:
        sampler: the sampler.
        spec: the settings on which the plan depends.
        run: the run that components measure; UNTRAINED before there is a run.

    Raises:
        UserError: for settings that cannot give right samples.
    """
    diffusion = spec.diffusion and spec.diffusion.bind(run)
    return sampler.bind(run).plan(dataclasses.replace(spec, diffusion=diffusion))


@dataclass(frozen=True, eq=False)
class SamplePlan:
    """The plan of a run's samples: everything that sample i depends on beyond i.

    Raises UserError, before any evaluation, for settings that cannot give right samples.
    """

    run: Run

    def __post_init__(self) -> None:
        y = labels_of(self.run.config, self.run.labelled, torch.arange(1), torch.zeros(1, dtype=torch.int64))
        if self.run.field.null_class and int(y) == self.run.field.null_class:
            require_unconditional(self.run.network)
        _ = self.guidance, self.plan

    @functools.cached_property
    def guidance(self) -> Guidance:
        """The guidance with the fields of other runs that it needs."""
        return self.run.config.guidance.bind(self.run)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler with the measurements on the run that its grid needs."""
        return self.run.config.sampler.bind(self.run)

    @functools.cached_property
    def diffusion(self) -> Diffusion:
        """The diffusion with the measurements on the run that it needs."""
        return self.run.config.diffusion.bind(self.run)

    @functools.cached_property
    def plan(self) -> Plan:
        """The interval and the steps."""
        spec = dataclasses.replace(self.run.config.solve_spec, diffusion=self.diffusion, guidance=self.guidance)
        return self.sampler.plan(spec)

    @property
    def batch_size(self) -> int:
        """The number of samples in one solve."""
        return block_size(self.run.shape) if self.run.device.type == "cpu" else self.run.config.sample.batch

    def solve(self, keys: Tensor, y: Tensor, *, trajectory: bool = False) -> Sample:
        """Solve from the noise of keys (b,) with labels y (b,); the result is not decoded."""
        keys = keys.to(self.run.device)
        return self.sampler.sample(
            self.run.field,
            rng.normal(keys, self.run.shape, rng.INITIAL),
            y.to(self.run.device),
            diffusion=self.diffusion,
            guidance=self.guidance,
            seeds=keys,
            trajectory=trajectory,
        )

    def draw(self, first: int, last: int, progress: Callable[[int], None]) -> SampleBatch:
        """Return samples first to last - 1.  Raises WorkFailed for samples that are not finite."""
        run, size, on_cpu = self.run, self.batch_size, self.run.device.type == "cpu"
        config = run.config
        began, nfe, paths = time.monotonic(), 0, None
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        for start in range(first, last, size):
            count = min(size, last - start)
            # On a CPU the block is always whole: a row's last digits may depend on the number of rows.
            index = torch.arange(start, start + (size if on_cpu else count))
            keys = rng.sample_keys(config.sample.seed, index)
            y = labels_of(config, run.labelled, index, keys)
            solution = self.solve(keys, y, trajectory=run.data_description.is_plane and start == 0)
            if solution.trajectory is not None:
                paths = solution.trajectory[:, : min(100, count)].cpu()
            nfe = max(nfe, solution.nfe)
            parts.append(config.autoencoder.decode(solution.x[:count]).cpu())
            labels.append(y[:count])
            progress(start + count - first)
        x = torch.cat(parts)
        bad = int((~x.isfinite().flatten(1).all(1)).sum())
        if bad:
            raise WorkFailed(
                f"{bad} of {last - first} samples are not finite: {config.sampler.name} on a network at step {run.step}."
            )
        return SampleBatch(x, torch.cat(labels), nfe, time.monotonic() - began, paths)

    def record(self) -> dict[str, Any]:
        """Return the settings of the samples and the values that were derived from them."""
        plan, run = self.plan, self.run
        return {
            "identity": sampling_identity(run.config, run.step, run.identity),
            "recipe": sampling_recipe(self.run.config, self.run.step),
            "training": self.run.identity,
            "times": plan.times.tolist(),
            "intervals": len(plan.times) - 1,
            "last_step": plan.last_step,
            "spread_lost": plan.spread_lost,
            "notes": list(plan.notes),
            "rounding": ROUNDING if self.run.data_description.is_image else "none",
            "at_once": self.batch_size,
            "environment": environment(self.run.device),
        }


class SampleBatch(NamedTuple):
    """Samples x (m, *shape) float32, labels y (m,), evaluations per sample, seconds, and the paths of some samples."""

    x: Tensor
    y: Tensor
    nfe: int
    seconds: float
    paths: Tensor | None


def sample(
    run: Run | str | Path = "latest", *, progress: Progress | None = None, **flags: Unpack[SamplingFlags]
) -> SampleSet:
    """Draw samples of a run, or return those that are on disk already.

    Args:
        run: a run, or its folder, name or identity, or "latest".
        progress: a function that receives events; by default a live bar in a terminal or in Jupyter.
        flags: the flags of `sitkit sample` by name: `sampler`, `diffusion`, `guidance` (a name, a mapping with `name` and
            fields, or an object), `steps` (intervals of the sampler), `n` (number of samples), `seed` (sample seed), `ema`
            (which average of the weights), `step` (of the checkpoint), `preset` (a way of sampling that a search saved),
            `runs` (the folder of runs), `device`, `settings` (any setting by its dotted key).

    Returns:
        The samples: x (n, *shape) float32, labels y (n,), and the record.  In a notebook they show their picture.

    Raises:
        UserError: before any evaluation, for a setting that cannot give right samples.
        WorkFailed: for samples that are not finite.
    """
    with reporting(progress) as report:
        return draw_samples(open_run(run, flags, "sample"), report)


def draw_samples(
    run: Run, progress: Progress = silent, *, keep: bool = True, extractions: tuple[Extraction, ...] = ()
) -> SampleSet:
    """Draw config.sample.n samples of a run into samples/<identity>/, or return those that are there already.

    Ranks under torchrun, or several processes on one folder, divide the shards and draw the same samples as one process.
    A call after a kill continues.

    Args:
        run: the run.
        progress: a function that receives events.
        keep: whether the samples are stored; False stores only a picture and the features of `extractions`.
        extractions: the extractors of the features that are stored.

    Raises:
        UserError: before any evaluation, for a setting that cannot give right samples.
        WorkFailed: for samples that are not finite.
    """
    name = sampling_identity(run.config, run.step, run.identity)
    folder = find_samples(run.folder, name, run.config, run.contents)
    shards = Shards(folder, run.data_description, extractions, run.config.sample.n, keep)
    if (stored := shards.record) is not None:
        warn_of_changed_samples(stored, run.config)
    with joined(run.config.run.device) as group:
        if not shards.finished:
            plan = SamplePlan(run)
            if group.lead and abs(plan.plan.spread_lost) > NOTED_LOSS:
                progress(Event("sample", message=f"{plan.plan.notes[-1]}."))
            report = ProgressReporter(shards, progress, "features" if shards.drawn else "sample")
            make, first = functools.partial(_make, shards, plan, report), group.rank * shards.count // group.size
            divide_work(shards.count, shards.done, make, folder / "shards", first)
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                shards.finish(plan.record())
            report(0)
    record = shards.record
    assert record is not None
    return SampleSet(folder, run.data_description, record)


def _make(shards: Shards, plan: SamplePlan, report: ProgressReporter, i: int) -> None:
    """Draw shard i, unless it exists, and extract its missing features."""
    x = shards.read(i)
    if x is None:
        batch = plan.draw(*shards.range(i), report)
        x = to_storage(batch.x, shards.data)
        keep = shards.keep or shards.count == 1
        # The first shard is always stored: the picture shows it.
        tensors = {"y": batch.y} | ({"x": x} if keep or i == 0 else {})
        if batch.paths is not None:
            tensors["paths"] = batch.paths
        save_tensors(shards.shard(i), tensors, {"kept": keep, "nfe": batch.nfe, "seconds": batch.seconds})
    for extraction in shards.missing:
        path = shards.part(i, extraction)
        if not path.is_file():
            save_tensors(path, extraction(to_float(x)), {"fingerprint": extraction.fingerprint})
    report(0)


class ProgressReporter:
    """Reports the progress and speed of all processes on a folder."""

    def __init__(self, shards: Shards, progress: Progress, stage: str) -> None:
        self.shards, self.progress, self.stage = shards, progress, stage
        self.began, self.before = time.monotonic(), self.count()
        self.complete = self.before

    def count(self) -> int:
        """Return the number of samples in complete shards, of all processes."""
        ranges = [self.shards.range(i) for i in range(self.shards.count) if self.shards.done(i)]
        return sum(last - first for first, last in ranges)

    def __call__(self, within: int) -> None:
        """Report `within` samples of the current shard, or 0 when a shard was just written."""
        if not within:
            # The headers of all shards are read, so not at every step of the work.
            self.complete = self.count()
        count = min(self.complete + within, self.shards.n)
        speed = (count - self.before) / max(time.monotonic() - self.began, 1e-9)
        self.progress(Event(self.stage, count, self.shards.n, {"images/s": speed}))


def write_adm(samples: SampleSet, path: Path) -> None:
    """Write samples in the archive of ADM's evaluator: arr_0 uint8 (n, h, w, 3), arr_1 the labels, and the record.

    Grey images get three equal channels.  `record` is JSON with the settings and the rounding rule.

    Raises:
        UserError: for samples that are not images.
    """
    if not samples.data.is_image:
        raise UserError(f"--adm writes images; the samples are of shape {samples.data.shape}.")
    n, arrays = samples.n, samples.folder / ARRAYS
    record = to_json({k: v for k, v in samples.record.items() if k != "environment"})
    with archives.writing(path, compress=False) as archive:
        images = archives.rows(arrays, "images", SHARD)
        archives.add(archive, "arr_0", n, (np.broadcast_to(part, (*part.shape[:3], 3)) for part in images))
        archives.add(archive, "arr_1", n, archives.rows(arrays, "labels", SHARD))
        archives.add(archive, "record", 1, [np.array([record])])
