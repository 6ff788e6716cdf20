"""Shared by all tests: tiny trained runs, small studies, plugins, and calls of the command line."""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from sitkit import cli
from sitkit.runs import checkpoint
from sitkit.runs.config.identity import training_identity
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import assemble, read_assignments, read_config
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.stops import SIGNALS
from sitkit.studies import ablate
from sitkit.studies.status import StudyOutcome
from sitkit.studies.study import Cell
from sitkit.training.train import run_training

# Settings of the smallest networks that still have every part.
SMALL = {
    "points": ("backbone.hidden_size=16", "backbone.depth=1", "data.size=400", "train.batch=16", "train.steps=40"),
    "digits": (
        "backbone.hidden_size=32", "backbone.depth=1", "backbone.num_heads=2", "backbone.patch_size=4", "train.batch=16",
        "train.steps=20",
    ),
}  # fmt: skip
QUIET = ("run.track=false",)
ROOT = Path(__file__).parent.parent
POLY = ROOT / "plugins" / "sitkit-poly"
STARTED = tempfile.TemporaryDirectory(prefix="sitkit-tests-")


class Called(NamedTuple):
    """The exit status of a command and its output."""

    status: int
    out: str
    err: str


def tiny(folder: Path, *settings: str, base: str = "points") -> Config:
    """Return a preset at the smallest size, with settings "key=value" on top; runs go to `folder`."""
    small = read_assignments([*SMALL[base], *QUIET, f"run.folder={folder}"])
    return assemble([read_config(base), small, read_assignments(settings)])


def flags(*settings: str, base: str = "points") -> list[str]:
    """Return the words of a command line that make the same settings."""
    return [word for setting in (*SMALL[base], *QUIET, *settings) for word in ("--set", setting)]


@functools.cache
def trained(base: str = "points") -> Path:
    """Return the folder of a run that is trained once for all tests; tests must not write to it."""
    return run_training(tiny(Path(STARTED.name) / "runs", base=base))


def autoencoder(folder: Path, seed: int = 0, channels: int = 3) -> Path:
    """Write a small AutoencoderKL with random weights, which halves each side, as save_pretrained does."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]
            block_out_channels=(8, 16),  # pyright: ignore[reportArgumentType]
            norm_num_groups=4,
            latent_channels=2,
        )
    network.save_pretrained(folder)
    return folder


def copied(run: Path, root: Path) -> Path:
    """Copy a run's folder to another root, so that a test may write to it."""
    return Path(shutil.copytree(run, root / run.name))


def weights(folder: Path) -> bytes:
    """Return the bytes of the newest checkpoint of a run."""
    return checkpoint.checkpoints(RunFolder(folder).checkpoints)[-1].read_bytes()


@contextlib.contextmanager
def flipped_bit(path: Path, draw: random.Random) -> Iterator[None]:
    """Flip one bit of the tensors of a safetensors file, drawn at random, within the context."""
    whole = path.read_bytes()
    changed, start = bytearray(whole), 8 + int.from_bytes(whole[:8], "little")
    changed[draw.randrange(start, len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(changed)
    yield
    path.write_bytes(whole)


def call(*words: str | Path) -> Called:
    """Run `sitkit WORDS` in this process."""
    out, err, handlers = io.StringIO(), io.StringIO(), {number: signal.getsignal(number) for number in SIGNALS}
    with (
        mock.patch.object(sys, "argv", ["sitkit", *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
            status: Any = 0
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return Called(int(status), out.getvalue(), err.getvalue())


def start(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
    """Start `python -m sitkit WORDS` as a process in the folder `cwd`."""
    return subprocess.Popen(
        [sys.executable, "-m", "sitkit", *map(str, words)], cwd=cwd, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> Called:
    """Wait for the end of a process and return its exit status and output."""
    out, err = process.communicate(timeout=300)
    return Called(process.returncode, out, err)


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Return when `until()` is true or the process has ended; fail after two minutes."""
    began = time.monotonic()
    while not until() and process.poll() is None:
        assert time.monotonic() - began < 120, "nothing happened for two minutes"
        time.sleep(0.002)


def run(
    *command: str | Path, site: Path | str, cwd: Path, plugins: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in an environment in which the packages under `site` are installed too."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    environment.pop("SITKIT_PLUGINS", None)
    if plugins is not None:
        environment["SITKIT_PLUGINS"] = plugins
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def install(site: Path, *packages: Path) -> None:
    """Build packages and install them into a folder with pip."""
    # If the build backend is installed, nothing is downloaded; otherwise pip fetches it into a build environment.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *isolation, "--target", site, *packages]
    process = subprocess.run(pip, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


HEADER = """
from dataclasses import dataclass
import sitkit
from sitkit.transport.interpolant import Interpolant, Linear
"""
GOOD = """
@sitkit.interpolants.register({name!r})
@dataclass(frozen=True)
class Good(Interpolant):
    "A path."
    def coefficients(self, t):
        return Linear().coefficients(t)
"""
ABSTRACT = """
@sitkit.interpolants.register("vague")
@dataclass(frozen=True)
class Vague(Interpolant):
    "No coefficients."
"""


def put(site: Path, plugin: str, source: str) -> None:
    """Write the installed files of a package sitkit-PLUGIN whose entry point PLUGIN is the module sitkit_PLUGIN."""
    (site / f"sitkit_{plugin}.py").write_text(HEADER + source)
    enter(site, plugin)


def enter(site: Path, plugin: str) -> None:
    """Write the metadata of such a package, as pip does."""
    module = f"sitkit_{plugin.replace('-', '_')}"
    record = site / f"{module}-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sitkit-{plugin}\nVersion: 1.0\n")
    (record / "entry_points.txt").write_text(f"[sitkit.plugins]\n{plugin} = {module}\n")


# A study of two rows and two columns, which takes seconds.
BASE = """
data: {name: points, law: moons, size: 400}
backbone: {name: mlp, hidden_size: 16, depth: 1}
train: {steps: 30, batch: 16, lr: 1e-3, ema: 0.9}
sample: {n: 50, labels: none}
metric: sliced-wasserstein
run: {track: false, checkpoint_every: 5, log_every: 5}
"""
STUDY = """title: "Two by two"
source: "Nobody, 1900"
base: base.yaml
set: {sampler: heun}
rows:
  - {label: Linear, interp: linear, paper: {"3": 1.5, "6": 2}}
  - label: GVP
    interp: gvp
grid:
  sampler.steps: [3, 6]
"""


def write_study(folder: Path, study: str = STUDY, base: str = BASE) -> Path:
    """Write a study and its base configuration; return the path of the study."""
    folder.mkdir(exist_ok=True)
    (folder / "base.yaml").write_text(base)
    (folder / "study.yaml").write_text(study)
    return folder / "study.yaml"


def run_study(study: Path, *words: str) -> StudyOutcome:
    """Run a study with settings "key=value"; its runs go beside it."""
    return ablate.run_study(study, settings=read_assignments([f"run.folder={study.parent / 'runs'}", *words]))


def read_csv(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the study's table.csv."""
    with (folder / "studies/study/table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def trainings(cells: Sequence[Cell]) -> dict[str, Config]:
    """The distinct trainings of the cells of a study, by identity."""
    return {training_identity(cell.config): cell.config for cell in cells}


def published(cell: Cell) -> float | None:
    """The published number of a cell."""
    return cell.reference.number if cell.reference else None
