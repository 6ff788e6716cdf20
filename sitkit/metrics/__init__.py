"""Metrics: how far a set of samples is from a reference set.  One file a family."""

from __future__ import annotations

from sitkit.metrics import frechet, kernel, wasserstein

__all__ = ["frechet", "kernel", "wasserstein"]
