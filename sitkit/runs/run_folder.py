"""The files of a run on disk.

runs/<slug>-<training identity>/
    config.yaml  environment.json  data.json  metrics.jsonl  checkpoints/  ema/  previews/
    samples/<identity>/  evaluations/<identity>.json  likelihoods/<identity>.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sitkit.runtime.files import read_json


class RunFolder:
    """The paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / "config.yaml"  # every setting resolved
        self.environment = path / "environment.json"  # code, packages and machine; fingerprints of data and autoencoder
        self.data = path / "data.json"  # what sampling must know of the data
        self.metrics = path / "metrics.jsonl"  # the curves of the training
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "ema"  # averages from which post-hoc averages are rebuilt
        self.previews = path / "previews"  # pictures of samples during the training
        self.samples = path / "samples"
        self.evaluations = path / "evaluations"
        self.likelihoods = path / "likelihoods"

    def read_environment(self) -> dict[str, Any]:
        """Return the record of code, packages and machine; empty if there is none."""
        return read_json(self.environment) if self.environment.is_file() else {}
