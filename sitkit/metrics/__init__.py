"""Metrics: how far a set of samples is from a reference set.  One file a family."""

from __future__ import annotations

import sys

from sitkit.metrics import classifier, frechet, kernel, neighbours, networks, score, wasserstein
from sitkit.registry import RegistryPackage

__all__ = ["classifier", "frechet", "kernel", "neighbours", "networks", "score", "wasserstein"]

sys.modules[__name__].__class__ = RegistryPackage
