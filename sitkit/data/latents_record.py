"""The JSON records of encoded latents: the keys that are read, and the types of their values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1, lt=2**63)]


class _Exact(BaseModel):
    """A record: the types are exact, and other keys are kept as they are."""

    model_config = ConfigDict(extra="allow", strict=True)


class Origin(_Exact):
    """The fingerprint of the data or of the autoencoder."""

    fingerprint: str


class Coder(Origin):
    """The autoencoder as plain values."""

    component: dict[str, Any]


class EncodedData(Origin):
    """The data as plain values."""

    data: dict[str, Any]


class PlanRecord(_Exact):
    """The content of plan.json: what is to be encoded."""

    format: Positive
    shape: list[Positive]
    dtype: str
    rows: list[Positive] = Field(min_length=1)
    class_names: list[str]
    autoencoder: Coder
    source: EncodedData


class Statistics(_Exact):
    """The mean and the standard deviation of each channel."""

    mean: list[float]
    std: list[float]


class IndexRecord(PlanRecord):
    """The content of index.json, which is written once everything is encoded."""

    fingerprint: str
    statistics: Statistics
