"""Two processes under torchrun: the losses are the same for every number of processes and after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import autoencoder, flags, tiny, wait

from sitkit.runs import averages
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.tensors import load_tensors, read_header
from sitkit.training.train import run_training

STEPS = 50
WORDS = (f"train.steps={STEPS}", "run.log_every=1", "run.checkpoint_every=10", "run.sample_every=0", "train.clip=1",
         "train.warmup=10", "train.schedule=cosine", "run.threads=1", "coupling=minibatch-ot")  # fmt: skip


def losses(runs: Path) -> list[float]:
    (path,) = runs.glob("*/metrics.jsonl")
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


def check_refusal(runs: Path, message: str, *settings: str) -> None:
    """Check that two processes print one message, without a traceback of the training, and write nothing."""
    process = launch(runs, *settings)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.count(message) == 1 and "sitkit/training/train.py" not in err
    assert not list(runs.glob("*/*"))


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process."""
    runs = tmp_path_factory.mktemp("one")
    run_training(tiny(runs, *WORDS, base="digits"))
    return losses(runs)


# Sums in another order: float32 roundings of 6e-8, over 50 steps of a network whose loss they hardly move.
CLOSE = 1e-5


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_curve_of_one(tmp_path: Path, curve: list[float], parallel: str) -> None:
    out = finished(launch(tmp_path, f"run.parallel={parallel}"))
    assert losses(tmp_path) == pytest.approx(curve, abs=CLOSE)
    # Only the lead prints.
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
    wait(process, lambda: any(checkpoints(RunFolder(run).checkpoints) for run in tmp_path.glob("*")))
    ranks = children(process.pid)
    for pid in [process.pid, *ranks] if whom == "all" else ranks[-1:]:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    (run,) = tmp_path.glob("digits-*")
    step = read_header(checkpoints(RunFolder(run).checkpoints)[-1])["step"]
    assert 10 <= step < STEPS
    # Continue with one process, or with two processes and the other kind of parallelism.
    if whom == "one":
        run_training(tiny(tmp_path, *WORDS, base="digits"))
    else:
        other = {"ddp": "fsdp", "fsdp": "ddp"}[parallel]
        finished(launch(tmp_path, f"run.parallel={other}"))
    assert losses(tmp_path) == pytest.approx(curve, abs=CLOSE)


@pytest.mark.slow
def test_compiled_processes_give_the_curve_of_one_process_without_compilation(
    tmp_path: Path, curve: list[float]
) -> None:
    process = launch(tmp_path, "run.compile=true")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "warning" not in err
    assert losses(tmp_path) == pytest.approx(curve, abs=CLOSE)


@pytest.mark.slow
def test_compiled_blocks_under_fsdp_on_a_cpu_are_refused(tmp_path: Path) -> None:
    check_refusal(tmp_path, "torch's CPU compiler then gives wrong gradients", "run.compile=true", "run.parallel=fsdp")


# The third call of the objective has an infinite loss, in the last process alone.
SPOILT = """
import os
from sitkit.cli import main
from sitkit.training.objective import Objective

honest, calls = Objective.forward, 0

def forward(self, *inputs):
    global calls
    calls += 1
    mean, each = honest(self, *inputs)
    last = int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
    return (mean * float("inf") if calls == 3 and last else mean), each

Objective.forward = forward
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_that_is_not_finite_in_one_process_is_skipped_by_all(tmp_path: Path, parallel: str) -> None:
    (tmp_path / "spoilt.py").write_text(SPOILT)
    settings = flags("train.steps=6", "train.nonfinite=skip", "run.log_every=1", base="digits")
    words = ["spoilt.py", "train", "digits", *settings]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    many = [*torchrun, *words, "--set", f"run.parallel={parallel}"]
    ends = []
    for runs, command in (("one", words), ("two", many)):
        command = [sys.executable, *command, "--runs", runs]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        (run,) = (tmp_path / runs).glob("digits-*")
        rows = [json.loads(line) for line in RunFolder(run).metrics.read_text().splitlines()]
        assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
        ends.append(load_tensors(checkpoints(RunFolder(run).checkpoints)[-1])[1])
    for name, tensor in ends[0].items():
        assert bool(tensor.isfinite().all()) if tensor.is_floating_point() else True
        if name.startswith(("model.", "optimizer.")) and name != "optimizer.json":
            # The skipped step counts in neither: five steps of Adam, whose direction is not sensitive at these sizes.
            torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=1e-6)
    assert float(ends[1]["optimizer.0.step"]) == 5


@pytest.mark.slow
def test_snapshots_of_sharded_averages_equal_those_of_one_process(tmp_path: Path) -> None:
    words = ("train.steps=12", "train.posthoc=[0.05, 0.1]", "train.posthoc_every=3", "run.sample_every=0")
    finished(launch(tmp_path / "two", "run.parallel=fsdp", *words))
    one = run_training(tiny(tmp_path / "one", *WORDS, *words, base="digits"))
    (two,) = (tmp_path / "two").glob("digits-*")
    for width in (0.05, 0.07, 0.1):
        step, ours = averages.rebuild(two, width)
        assert step == 12
        for name, tensor in averages.rebuild(one, width)[1].items():
            # Weights move by about lr = 2e-3 a step, and their sums are in another order: roundings of 6e-8.
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_processes_encode_the_same_files_as_one(tmp_path: Path) -> None:
    weights = autoencoder(tmp_path / "vae")
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    words = ["-m", "sitkit", "encode", "images.npz", "--set", f"autoencoder.path={weights}", "--per-shard", "16"]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words, "--out", "two"]
    for command in ([*words, "--out", "one"], many):
        result = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert sum(line.startswith("latents ") for line in result.stdout.splitlines()) == 1
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert first == second and len(first) == 9


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_batch_that_cannot_be_divided_evenly_is_refused(tmp_path: Path) -> None:
    check_refusal(tmp_path, "train.batch = 15 cannot be divided evenly among 2 processes", "train.batch=15")
