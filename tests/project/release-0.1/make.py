"""Make the files of this folder with sitkit 0.1: `python make.py FOLDER`, as the README says.  It is not a test.

It uses the command line alone, from within FOLDER, so that no path of the machine is written down.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

BASE = """\
data: digits
backbone: {name: sit, hidden_size: 16, depth: 1, num_heads: 2, patch_size: 2, time_scale: 1000}
train: {steps: 20, batch: 16, lr: 2e-3, ema: 0.9}
sampler: {name: heun, steps: 4}
sample: {n: 32}
run: {threads: 1, log_every: 1, checkpoint_every: 10, sample_every: 0, keep: 1, track: false}
"""
STUDY = """\
title: Two paths
base: base.yaml
set: {train: {steps: 5}, sample: {n: 16}}
rows:
  - {label: Linear, interp: linear}
  - {label: GVP, interp: gvp}
columns:
  ode: {sampler: {name: heun, steps: 2}}
  sde: {sampler: {name: euler-maruyama, steps: 4}}
"""
# The name of the program as its users have it, in the place of a path.
SITKIT = [sys.executable, "-c", "import sys; sys.argv[0] = 'sitkit'; from sitkit.cli import main; main()"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "SITKIT_PLUGINS": "", "MLFLOW_DISABLE_TELEMETRY": "true"}


def sitkit(folder: Path, *words: str) -> None:
    """Run `sitkit WORDS` in a folder."""
    subprocess.run([*SITKIT, *words], cwd=folder, env=ENVIRONMENT, check=True)


def stopped(folder: Path) -> None:
    """Begin a training and kill it when its checkpoint at step 10 is there, before the one at step 20."""
    while True:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        process = subprocess.Popen([*SITKIT, "train", "base.yaml"], cwd=folder, env=ENVIRONMENT)
        while process.poll() is None and not list(folder.glob("runs/*/checkpoints/step-00000010.safetensors")):
            time.sleep(0.0005)
        process.kill()
        process.wait()
        names = [path.name for path in folder.glob("runs/*/checkpoints/*")]
        if names == ["step-00000010.safetensors"]:
            return


def main(root: Path) -> None:
    """Make the four."""
    for name, text in (("stopped", ""), ("finished", ""), ("study", STUDY)):
        (root / name).mkdir(parents=True)
        (root / name / "base.yaml").write_text(BASE)
        if text:
            (root / name / "two-paths.yaml").write_text(text)
    stopped(root / "stopped")
    finished = root / "finished"
    sitkit(finished, "train", "base.yaml")
    sitkit(finished, "sample", "latest")
    sitkit(finished, "sample", "latest", "--sampler", "euler-maruyama", "--steps", "6", "--seed", "1")
    sitkit(finished, "evaluate", "latest", "-n", "32", "--metric", "frechet,precision")
    sitkit(root / "study", "ablate", "two-paths.yaml")
    sitkit(finished, "convert", "latest", "--to", "../exported.safetensors")


main(Path(sys.argv[1]))
