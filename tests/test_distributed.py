"""Two real processes under torchrun: one curve, whatever the number of processes, and whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from trials import flags, tiny, wait

from sitkit import checkpoint
from sitkit.run import CHECKPOINTS, METRICS
from sitkit.train import train

STEPS = 50
WORDS = (f"train.steps={STEPS}", "run.log_every=1", "run.checkpoint_every=10", "run.sample_every=0", "train.clip=1",
         "train.warmup=10", "train.schedule=cosine", "run.threads=1", "coupling=minibatch-ot")  # fmt: skip


def losses(runs: Path) -> list[float]:
    (path,) = runs.glob(f"*/{METRICS}")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


def launch(runs: Path, *settings: str, processes: int = 2) -> subprocess.Popen[str]:
    """The training under torchrun, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    words = ["sitkit", "train", "digits", *flags(*WORDS, *settings, base="digits"), "--runs", str(runs)]
    return subprocess.Popen(
        [*command, *words], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    runs = tmp_path_factory.mktemp("one")
    train(tiny(runs, *WORDS, base="digits"))
    return losses(runs)


# Sums in another order: float32 roundings of 6e-8, over 50 steps of a network whose loss they hardly move.
CLOSE = 1e-5


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(tmp_path: Path, curve: list[float], parallel: str) -> None:
    out = finished(launch(tmp_path, f"run.parallel={parallel}"))
    assert losses(tmp_path) == pytest.approx(curve, abs=CLOSE)
    # One process speaks.
    assert out.count("next ") == 1
    environment = json.loads(next(tmp_path.glob("*/environment.json")).read_text())
    assert environment["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("whom", ["one", "all"])
def test_killed_and_continued_by_another_number_of_processes(
    tmp_path: Path, curve: list[float], parallel: str, whom: str
) -> None:
    process = launch(tmp_path, f"run.parallel={parallel}")
    wait(process, lambda: any(checkpoint.checkpoints(run / CHECKPOINTS) for run in tmp_path.glob("*")))
    ranks = children(process.pid)
    for pid in [process.pid, *ranks] if whom == "all" else ranks[-1:]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (run,) = tmp_path.glob("digits-*")
    step = checkpoint.header(checkpoint.checkpoints(run / CHECKPOINTS)[-1])["step"]
    assert 10 <= step < STEPS
    # To one process, or to two that lay it out the other way.
    if whom == "one":
        train(tiny(tmp_path, *WORDS, base="digits"))
    else:
        other = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
        finished(launch(tmp_path, f"run.parallel={other}"))
    assert losses(tmp_path) == pytest.approx(curve, abs=CLOSE)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path) -> None:
    process = launch(tmp_path, "train.batch=15")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count("train.batch = 15 cannot be shared evenly by 2 processes") == 1 and 'commands.py", line' not in err
    assert not list(tmp_path.glob("*/*"))
