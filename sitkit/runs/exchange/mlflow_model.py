"""A trained run as an MLflow model: indexes and labels in, samples out.

MLflow runs this file when such a model is loaded; nothing in it is pickled.  Sample i is sample i of `sitkit sample`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from sitkit.runs.run import load
from sitkit.runtime import rng


class Served(PythonModel):
    """Draws with the run's own sampler, w, guidance and sample seed."""

    def load_context(self, context: Any) -> None:
        """Load the run that MLflow kept beside this file."""
        self.run = load(Path(context.artifacts["run"]))

    def predict(self, context, model_input, params=None) -> Any:  # Without hints: MLflow would read a schema from them.
        """A table with columns `index` and `label`, (n,) integers each -> samples (n, *shape) float32."""
        run = self.run
        config = run.config
        index, y = (torch.from_numpy(np.array(model_input[name], dtype=np.int64)) for name in ("index", "label"))
        keys = rng.sample_keys(config.sample.seed, index).to(run.device)
        drawn = config.sampler.bind(run).sample(
            run.field,
            rng.normal(keys, run.shape, rng.INITIAL),
            y.to(run.device),
            diffusion=config.diffusion.bind(run),
            guidance=config.guidance.bind(run),
            seeds=keys,
        )
        return config.autoencoder.decode(drawn.x).cpu().numpy()


set_model(Served())
