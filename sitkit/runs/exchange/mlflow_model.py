"""A trained run as an MLflow model: indices and labels in, samples out.

MLflow runs this file when it loads such a model; nothing in it is pickled.  Sample i is sample i of `sitkit sample`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from sitkit.runs.run import load
from sitkit.runs.sample import SamplePlan
from sitkit.runtime import rng


class Served(PythonModel):
    """Draws samples with the run's own sampler, w, guidance and sample seed."""

    def load_context(self, context: Any) -> None:
        """Load the run that MLflow kept beside this file."""
        self.plan = SamplePlan(load(Path(context.artifacts["run"])))

    def predict(self, context, model_input, params=None) -> Any:  # Without hints: MLflow would read a schema from them.
        """Return samples (n, *shape) float32 for a table with integer columns `index` and `label`, (n,) each."""
        config = self.plan.run.config
        index, y = (torch.from_numpy(np.array(model_input[name], dtype=np.int64)) for name in ("index", "label"))
        solution = self.plan.solve(rng.sample_keys(config.sample.seed, index), y)
        return config.autoencoder.decode(solution.x).cpu().numpy()


set_model(Served())
