"""The JSON records of a run on disk: the keys that the code reads, and the types of their values.

A record may have more keys, and those of sitkit 0.1 have fewer.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sitkit.data.dataset import LARGEST_EXAMPLE
from sitkit.runtime.files import plain_name


def _path_within(path: str) -> str:
    for part in path.split("/"):
        plain_name(part)
    return path


PlainName = Annotated[str, AfterValidator(plain_name)]
PathWithin = Annotated[str, AfterValidator(_path_within)]


def _moderate(shape: list[int]) -> list[int]:
    if math.prod(shape) > LARGEST_EXAMPLE:
        raise ValueError(f"an example has at most {LARGEST_EXAMPLE:,} numbers; got {shape}.")
    return shape


Whole = Annotated[int, Field(ge=0, lt=2**63)]
# Numbers that are not finite are words in JSON.
Number = float | Literal["NaN", "Infinity", "-Infinity"]


class Record(BaseModel):
    """A record: the types are exact, and other keys are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class Commit(Record):
    """The commit of a checkout."""

    commit: str


class EnvironmentRecord(Record):
    """The content of environment.json, and the environment of samples and of a number."""

    data: str | None = None
    autoencoder: str | None = None
    training: str | None = None
    packages: dict[str, str] = {}
    plugins: dict[str, str] = {}
    plugin_sources: dict[str, str] = {}
    components: dict[str, str] = {}
    git: Commit | None = None
    device: str | None = None
    python: str | None = None
    threads: Whole | None = None
    before: list[dict[str, Any]] = []


class DataRecord(Record):
    """The content of data.json: what sampling needs to know of the data."""

    shape: Annotated[list[Whole], AfterValidator(_moderate)]
    class_names: list[str]
    fingerprint: str
    bin_width: float | None = None
    encoder: str | None = None
    counts: list[Whole] | None = None
    std: Annotated[float, Field(gt=0)] | None = None


class Fingerprints(Record):
    """The fingerprints in a run's file."""

    autoencoder: str
    weights: str


class FileRecord(Record):
    """The header of a run in one file."""

    step: Whole
    weights: str
    config: dict[str, Any]
    data: DataRecord
    fingerprints: Fingerprints
    components: dict[str, str] = {}


class Named(Record):
    """A component as plain values."""

    name: str


class GuidanceOfSamples(Named):
    """The guidance of samples, with the run that guides them."""

    run: PlainName | None = None


class SettingsOfSamples(Record):
    """The settings `sample` of samples."""

    n: Whole
    seed: Whole
    weights: str
    ema: float | None = None
    labels: str | list[int | str] = "balanced"


class Recipe(Record):
    """Everything that samples depend on beyond the training."""

    step: Whole
    sampler: Named
    diffusion: Named
    guidance: GuidanceOfSamples
    sample: SettingsOfSamples


class SamplesRecord(Record):
    """The content of record.json in a folder of samples."""

    recipe: Recipe
    nfe: Whole
    at_once: Whole
    kept: bool
    rounding: str = ""
    seconds: float = 0.0
    environment: EnvironmentRecord = EnvironmentRecord()


class MetricOfNumber(Named):
    """The metric of a number."""

    features: Named | None = None
    reference: str | None = None


class DataOfNumber(Record):
    """The data that a number compares with."""

    data: Named
    n: Whole
    file: str | None = None


class Checkpoint(Record):
    """The weights of a number."""

    step: Whole
    weights: str


class SeedsOfNumber(Record):
    """The seeds of a number."""

    train: Whole
    sample: Whole


class NumberRecord(Record):
    """The content of evaluations/<identity>.json."""

    value: Number
    stderr: Number | None
    real: Number | None = None
    real_n: Whole | None = None
    # The value of real data in records of sitkit 0.1.
    halves: Number | None = None
    notes: list[str]
    n: Whole
    nfe: Whole
    rounding: str
    metric: MetricOfNumber
    features: dict[str, Any] | None
    reference: DataOfNumber
    data: str
    run: PlainName
    samples: PlainName
    sampling: SamplesRecord
    checkpoint: Checkpoint
    seeds: SeedsOfNumber
    environment: EnvironmentRecord
    command: list[str]
    trained: EnvironmentRecord | None = None


class ShownNumber(Record):
    """What a list of runs shows of a number."""

    metric: Named
    value: Number


class RoundTrip(Record):
    """The error of a solve to noise and back."""

    rms: Number


class LikelihoodRecord(Record):
    """The content of likelihoods/<identity>.json."""

    value: Number
    unit: str
    stderr: Number | None
    stderr_data: Number | None
    stderr_probes: Number | None
    n: Whole
    divergence: str
    probes: Whole
    nfe: Whole
    round_trip: RoundTrip


class CheckpointRecord(Record):
    """The header of a checkpoint, and of a snapshot of averages."""

    step: Whole
    config: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    widths: list[float] = []


class CursorRecord(Record):
    """The content of tracking.json."""

    token: str
    uri: str
    run: str
    offset: Whole
    last: str
    artifacts: dict[str, list[int]]
    status: str = ""


class TrackedRecord(Record):
    """The content of tracked.json."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    experiment: str
    params: dict[str, Any] | None
    tags: dict[str, Any] | None
    patterns: list[str]
    parent: str | None
    model: list[int] | None = None
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


class MeasuredPairs(Record):
    """A quantity that was measured at several times."""

    times: list[float]
