"""Averages of the weights against explicit sums and closed forms, across kills, and rebuilt after training."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from support import call, finish, flags, start, tiny, wait, weights
from torch import nn

from sitkit.runs import averages as weight_averages
from sitkit.runs.averages import fit_profile, gamma, rebuild
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.sources import Layer
from sitkit.runs.run import load
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.runtime.tensors import load_tensors
from sitkit.training.ema import EMA
from sitkit.training.train import run_training

GROUP = ProcessGroup(0, 1, torch.device("cpu"))


def move(network: nn.Module, step: int) -> None:
    """Put the weights on a known path: theta_j = sin(j / 7 + k), another k for each number."""
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            k = torch.arange(p.numel(), dtype=torch.float64) + 10 * i
            p.copy_(torch.sin(step / 7 + k).view_as(p))


@pytest.mark.parametrize(("warmup", "initial"), [(True, 1e-9), (False, 0.994)])
def test_the_decay_of_a_step_with_a_warm_up(warmup: bool, initial: float) -> None:
    """The average is the explicit sum; after 60 steps the first weights count for 1e-9, without a warm-up for 0.994."""
    network = nn.Linear(3, 2).double()
    average, shares, sums = EMA(network, (0.9999,), warmup=warmup), np.zeros(0), []
    for step in range(1, 61):
        move(network, step)
        average.update(step)
        decay = min(0.9999, (1 + step) / (10 + step)) if warmup else 0.9999
        shares = np.append(shares * decay, 1 - decay) if len(shares) else np.ones(1)
        sums.append(network.weight.detach().clone())
    assert shares[0] == pytest.approx(initial, rel=0.5 if warmup else 1e-3) or shares[0] < initial
    expected = sum(share * weight for share, weight in zip(shares, sums, strict=True))
    torch.testing.assert_close(average.tensors()["ema.weight"], expected, rtol=0, atol=1e-13)


def profile(width: float, steps: int) -> np.ndarray:
    """Return the weight of each step in the power-function average, by its definition."""
    j, exponent = np.arange(steps + 1.0) / steps, gamma(width) + 1
    return np.diff(j**exponent)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_a_width_is_the_standard_deviation_of_its_profile(width: float) -> None:
    # By quadrature: midpoints of 1e6 cells leave an error near (gamma / 1e6)^2 < 1e-7.
    s = (np.arange(10**6) + 0.5) / 10**6
    p = (gamma(width) + 1) * s ** gamma(width) / 10**6
    mean = (p * s).sum()
    assert np.sqrt((p * (s - mean) ** 2).sum()) == pytest.approx(width, rel=1e-5)


def test_the_paper_s_exponents() -> None:
    # EDM2, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94.
    assert gamma(0.05) == pytest.approx(16.97, abs=5e-3) and gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    for width in (0.0, -0.1, 0.29):
        with pytest.raises(ValueError, match=r"at most 0.2887"):
            gamma(width)


def test_updates_give_the_averages_by_definition() -> None:
    network = nn.Linear(3, 2).double()
    network.bias.requires_grad_(False)
    averages = EMA(network, (0.9, 0.5), (0.05, 0.2))
    path = []
    for step in range(1, 31):
        move(network, step)
        averages.update(step)
        path.append(network.weight.detach().clone())
    thetas, tensors = torch.stack(path), averages.tensors()
    for decay, key in ((0.9, "ema."), (0.5, "ema-0.5.")):
        share = (1 - decay) * decay ** np.arange(29.0, -1, -1)
        share[0] /= 1 - decay
        wanted = torch.tensordot(torch.from_numpy(share), thetas, 1)
        # 30 roundings of numbers of size 1.
        torch.testing.assert_close(tensors[f"{key}weight"], wanted, atol=1e-14, rtol=0)
        assert torch.equal(tensors[f"{key}bias"], network.bias)
    for width in (0.05, 0.2):
        wanted = torch.tensordot(torch.from_numpy(profile(width, 30)), thetas, 1)
        torch.testing.assert_close(tensors[f"power-{width}.weight"], wanted, atol=1e-14, rtol=0)
        assert f"power-{width}.bias" not in tensors


def test_applied_sets_the_first_average_and_restores_the_weights_to_the_bit() -> None:
    network = nn.Linear(3, 2)
    averages = EMA(network, (0.9,))
    for step in (1, 2, 3):
        move(network, step)
        averages.update(step)
    own = network.weight.detach().clone()
    with pytest.raises(ZeroDivisionError), averages.applied():
        assert torch.equal(network.weight, averages.tensors()["ema.weight"]) and not torch.equal(network.weight, own)
        raise ZeroDivisionError
    assert torch.equal(network.weight, own)


def test_averages_are_loaded_and_a_missing_average_is_named() -> None:
    network = nn.Linear(3, 2)
    first, second = EMA(network, (0.9,), (0.1,)), EMA(nn.Linear(3, 2), (0.9,), (0.1,))
    second.load(first.tensors())
    assert torch.equal(second.tensors()["power-0.1.weight"], first.tensors()["power-0.1.weight"])
    with pytest.raises(UserError, match=r"holds no power-0.2.weight"):
        EMA(network, (0.9,), (0.2,)).load(first.tensors())


def write_snapshots(folder: Path, dtype: torch.dtype) -> Path:
    """Take 640 steps on the known path and keep 32 snapshots of the paper's two widths."""
    network = nn.Linear(3, 2).double()
    averages = EMA(network, (0.9,), (0.05, 0.1))
    for step in range(1, 641):
        move(network, step)
        averages.update(step)
        if step % 20 == 0:
            averages.snapshot(folder, step, dtype, GROUP)
    return folder


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_snapshots(tmp_path_factory.mktemp("known"), torch.float64)


def exact(width: float, steps: int) -> torch.Tensor:
    """Return the average of the known path, summed in float64."""
    j = torch.arange(1, steps + 1, dtype=torch.float64)
    path = torch.sin(j[:, None] / 7 + torch.arange(6, dtype=torch.float64))
    return torch.tensordot(torch.from_numpy(profile(width, steps)), path, 1).view(2, 3)


@pytest.mark.parametrize("width", [0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.12, 0.15, 0.2])
def test_a_rebuilt_average_equals_the_tracked_average(snapshots: Path, width: float) -> None:
    step, state = rebuild(snapshots, width)
    kept = [(w, at) for w in (0.05, 0.1) for at in range(20, 641, 20)]
    fit = fit_profile(kept, width, 640)
    # The path has size 1, so the averages differ by at most the L1 error of the profiles, computed from every step,
    # and by 64 float32 roundings of the sum's result, 6e-8 each.
    made = sum(c * np.pad(profile(w, at), (0, 640 - at)) for (w, at), c in zip(kept, fit.coefficients, strict=True))
    off = float(np.abs(made - profile(width, 640)).sum())
    assert step == 640 and off < 0.02
    assert float((state["weight"] - exact(width, 640)).abs().max()) <= off + 1e-7
    assert fit.error < (1e-6 if width in (0.05, 0.1) else 0.02)


def test_a_rebuilt_average_may_end_earlier(snapshots: Path) -> None:
    step, state = rebuild(snapshots, 0.07, 400)
    assert step == 400
    # 20 snapshots up to this step: the error is 2.4e-3 of the profile.
    torch.testing.assert_close(state["weight"].double(), exact(0.07, 400), atol=3e-3, rtol=0)
    with pytest.raises(UserError, match=r"end at step 640, before step 641"):
        rebuild(snapshots, 0.07, 641)


def test_a_width_that_the_snapshots_cannot_represent_is_refused(snapshots: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"width 0.01 at step 640 is off by 17.4% of its profile"):
        rebuild(snapshots, 0.01)
    with pytest.raises(UserError, match=r"width 0.003 .* cannot represent it\. Ask for a width nearer"):
        rebuild(snapshots, 0.003)
    with pytest.raises(UserError, match=r"keeps no snapshots .* train.posthoc=\[0.05,0.1\]"):
        rebuild(tmp_path, 0.05)


def test_the_reported_error_is_the_error_of_the_profile() -> None:
    kept = [(0.1, at) for at in (25.0, 50.0, 75.0, 100.0)]
    fit = fit_profile(kept, 0.06, 100.0)
    s = (np.arange(200_000) + 0.5) / 2000
    power = lambda w, t: np.where(s <= t, (gamma(w) + 1) * s ** gamma(w) / t ** (gamma(w) + 1), 0)  # noqa: E731
    wanted, made = power(0.06, 100.0), sum(c * power(*k) for k, c in zip(kept, fit.coefficients, strict=True))
    assert fit.error == pytest.approx(np.linalg.norm(made - wanted) / np.linalg.norm(wanted), rel=1e-3)
    # No other coefficients are better: moving any of them makes it worse.
    for i in range(4):
        for move in (-0.01, 0.01):
            other = made + move * power(*kept[i])
            assert np.linalg.norm(other - wanted) > np.linalg.norm(made - wanted)


def test_snapshots_in_half_precision_have_its_rounding_error(tmp_path: Path) -> None:
    _, state = rebuild(write_snapshots(tmp_path, torch.float16), 0.075)
    # Each number is rounded to 2^-12 of itself at most, and the coefficients' sizes sum to 1.5; the profile adds 9e-4.
    torch.testing.assert_close(state["weight"].double(), exact(0.075, 640), atol=1.5 * 2**-12 + 9e-4, rtol=0)


POSTHOC = ("train.posthoc=[0.05, 0.1]", "train.ema=[0.9, 0.5]", "train.steps=64")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_training(tiny(tmp_path_factory.mktemp("runs"), *POSTHOC))


def test_a_run_samples_with_every_average_that_it_has_or_can_rebuild(run: Path) -> None:
    folders = {}
    for words in ((), ("--ema", "0.9"), ("--ema", "0.5"), ("--ema", "0.075"), ("--ema", "0.1")):
        result = call("sample", run, "-n", "8", "--set", "sampler.steps=4", *words)
        assert result.status == 0, result.err
        folders[words[1:]] = Path(result.out.split()[1]).parent
    assert len(set(folders.values())) == 5
    arrays = {key: np.load(folder / "samples.npz")["points"] for key, folder in folders.items()}
    assert np.array_equal(arrays[()], arrays[("0.9",)])
    assert all(np.abs(arrays[()] - arrays[key]).max() > 1e-5 for key in (("0.5",), ("0.075",), ("0.1",)))
    kept = load(run, settings=Layer({"sample": {"ema": 0.1}})).network.state_dict()
    tracked = load_tensors(checkpoints(run / "checkpoints")[-1])[1]
    for name, value in kept.items():
        # The snapshots have this width: float64 sums of 64 snapshots, most with coefficients near 0.
        torch.testing.assert_close(value, tracked[f"power-0.1.{name}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ema", "0.6"), "keeps no average of decay 0.6, only of 0.9, 0.5"),
        (("--ema", "0.001"), "cannot represent it"),
        (("--ema", "1.5"), "--ema: sample.ema"),
        (("--ema", "0.9", "--set", "sample.weights=raw"), "weights = 'raw' wants none"),
    ],
)
def test_an_average_that_cannot_be_computed_is_refused(run: Path, words: tuple[str, ...], message: str) -> None:
    result = call("sample", run, *words)
    assert result.status == 2 and message in result.err and "Traceback" not in result.err


def test_the_size_of_the_snapshots_is_known_before_the_training(run: Path) -> None:
    record = read_json(RunFolder(run).snapshots / "snapshots.json")
    files = checkpoints(RunFolder(run).snapshots)
    assert record["count"] == len(files) == 32 and record["every"] == 2
    for path in files:
        tensors = load_tensors(path)[1]
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == record["bytes"] / record["count"]


def test_a_disk_too_small_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(weight_averages.shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(UserError, match=r"train.posthoc keeps 32 snapshots of 0.0 MB, .* raise train.posthoc_every"):
        run_training(tiny(tmp_path, *POSTHOC))


def test_a_killed_training_leaves_the_same_snapshots_when_it_continues(run: Path, tmp_path: Path) -> None:
    words = ["train", "points", "--runs", tmp_path / "runs", *flags(*POSTHOC, "run.checkpoint_every=5")]
    process = start(*words, cwd=tmp_path)
    folder = tmp_path / "runs" / run.name
    wait(process, lambda: len(checkpoints(RunFolder(folder).snapshots)) >= 8)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert len(checkpoints(RunFolder(folder).snapshots)) < 32
    assert call(*words).status == 0
    names = [path.name for path in checkpoints(RunFolder(run).snapshots)]
    assert [path.name for path in checkpoints(RunFolder(folder).snapshots)] == names
    for name in names:
        assert (RunFolder(folder).snapshots / name).read_bytes() == (RunFolder(run).snapshots / name).read_bytes()
    assert load_tensors(checkpoints(folder / "checkpoints")[-1])[1].keys() and weights(run)
