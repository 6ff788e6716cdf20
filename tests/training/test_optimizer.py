"""The optimizer: schedules against their formulas, accumulation, clipping, and gradients that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import nn

from sitkit.data.dataset import load_examples
from sitkit.runs import checkpoint
from sitkit.runs.config.schema import TrainSettings
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.training.optimizer import Optimization
from sitkit.training.throughput import PASSES, Throughput, peak_flops
from sitkit.training.train import run_training


def settings(**values: object) -> TrainSettings:
    return TrainSettings.model_validate(values)


def rates(given: TrainSettings, upto: int | None = None, optimization: Optimization | None = None) -> list[float]:
    """The learning rate of each step."""
    parameter = nn.Parameter(torch.ones(1))
    optimization = optimization or Optimization([parameter], given)
    rates_of_steps = []
    for _ in range(given.steps if upto is None else upto):
        rates_of_steps.append(optimization.lr)
        optimization.parameters[0].grad = torch.ones(1)
        optimization.step()
    return rates_of_steps


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the log of a run."""
    return [json.loads(row) for row in RunFolder(folder).metrics.read_text().splitlines()]


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("decay", [1.0, 0.25])
def test_schedules_follow_their_formulas(shape: str, warmup: int, decay: float) -> None:
    fall = {} if shape == "constant" else {"decay": decay, "lr_end": 1e-5}
    given = settings(steps=40, lr=1e-3, warmup=warmup, schedule=shape, **fall)
    begin = max(40 - round(40 * decay), max(warmup - 1, 0))

    def expected(k: int) -> float:
        if k < warmup - 1:
            return 1e-3 * (k + 1) / warmup
        if shape == "constant" or k < begin:
            return 1e-3
        share = (k - begin) / (40 - begin)
        share = share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2
        return 1e-3 + (1e-5 - 1e-3) * share

    # torch's recursions round once or twice a step in float64.
    assert rates(given) == pytest.approx([expected(k) for k in range(40)], rel=1e-12)


def test_a_warm_up_longer_than_the_training_is_cut_and_fall_needs_a_schedule() -> None:
    assert rates(settings(steps=3, lr=1.0, warmup=40, schedule="linear")) == pytest.approx([1 / 40, 2 / 40, 3 / 40])
    for wrong in ({"decay": 0.5}, {"lr_end": 1e-5}):
        with pytest.raises(ValueError, match="belong to schedule"):
            settings(**wrong)
    with pytest.raises(ValueError, match="accumulate must divide batch"):
        settings(batch=10, accumulate=3)


def test_a_gradient_that_is_not_finite_changes_nothing_under_skip() -> None:
    optimization = Optimization([nn.Parameter(torch.ones(3))], settings(lr=0.1, nonfinite="skip", clip=1.0))
    (parameter,) = optimization.parameters
    parameter.grad = torch.ones(3)
    optimization.step()
    before, moments = parameter.detach().clone(), checkpoint.optimizer_tensors(optimization.optimizer)
    moments = {name: tensor.clone() for name, tensor in moments.items() if not name.endswith("json")}
    for bad in (math.nan, math.inf):
        parameter.grad = torch.tensor([1.0, bad, 1.0])
        assert not optimization.step().isfinite()
        assert torch.equal(parameter, before)
        after = checkpoint.optimizer_tensors(optimization.optimizer)
        assert all(torch.equal(after[name], tensor) for name, tensor in moments.items())
    parameter.grad = torch.ones(3)
    optimization.step()
    assert not torch.equal(parameter, before)


def test_accumulation_is_the_same_step(tmp_path: Path) -> None:
    words = ("train.batch=16", "train.steps=30", "run.log_every=1", "train.clip=1")
    curves = []
    for parts in (1, 4):
        folder = run_training(tiny(tmp_path, *words, f"train.accumulate={parts}", base="digits"))
        curves.append([row["loss"] for row in log_of(folder)])
    # Means of means in another order: a few roundings of 6e-8 a step.
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[0] != curves[1]


def test_a_failed_step_before_the_first_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match=r"at step 2\. There is no checkpoint before it\. The examples"):
        run_training(tiny(tmp_path, "train.lr=1e30", base="digits"))


def test_a_failed_step_writes_a_file_of_its_examples(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.lr=1e30", "run.checkpoint_every=1", base="digits")
    with pytest.raises(
        WorkFailed, match=r"at step 2\. The last good checkpoint is .*step-00000001.* \(step 1\)"
    ) as caught:
        run_training(config)
    (path,) = tmp_path.glob("*/nonfinite-00000002.json")
    assert str(path) in str(caught.value)
    dump = json.loads(path.read_text())
    assert dump["step"] == 2 and [row["position"] for row in dump["examples"]] == list(range(16, 32))
    data = load_examples(config.data)
    assert [row["label"] for row in dump["examples"]] == [int(data.labels[row["index"]]) for row in dump["examples"]]
    assert all(0 <= row["t"] <= 1 for row in dump["examples"])
    assert any(not math.isfinite(float(row["loss"])) for row in dump["examples"])


def test_skipping_stops_after_twenty_consecutive_steps(tmp_path: Path) -> None:
    # The weights are finite but so large that from the second step on no loss is.
    words = ("train.lr=1e30", "train.nonfinite=skip", "run.log_every=5", "train.steps=60", "run.checkpoint_every=1000")
    with pytest.raises(WorkFailed, match="at step 21"):
        run_training(tiny(tmp_path, *words, base="digits"))
    (folder,) = tmp_path.iterdir()
    assert [row["skipped"] for row in log_of(folder)] == [4, 5, 5, 5]
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_model_flops_utilisation_is_useful_flops_over_the_peak() -> None:
    group = ProcessGroup(0, 2, torch.device("cpu"))
    speed = Throughput(10**9, group, torch.float32)
    speed.since -= 2.0
    rates = speed.read(100)
    ceiling = 2 * peak_flops(torch.device("cpu"), torch.float32)
    assert rates["mfu"] == pytest.approx(PASSES * 1e9 * rates["images_per_second"] / ceiling)
    assert 0 < rates["images_per_second"] <= 50
    assert "mfu" not in Throughput(None, group, torch.float32).read(1)


@pytest.mark.slow
def test_a_compiled_training_compiles_once_and_learns_the_same(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    words = (
        "train.steps=30",
        "run.log_every=1",
        "run.sample_every=10",
        "run.checkpoint_every=10",
        "train.accumulate=2",
    )
    curves, graphs = [], []
    for compiled in ("false", "true"):
        torch._dynamo.reset()
        counters.clear()
        folder = run_training(tiny(tmp_path / compiled, *words, f"run.compile={compiled}", base="digits"))
        curves.append([row["loss"] for row in log_of(folder)])
        graphs.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    assert graphs == [(0, 0), (1, 0)]
    # Fused sums round otherwise: 6e-8 each, over 30 steps.
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_a_batch_in_uneven_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accumulate must divide batch"):
        tiny(tmp_path, "train.accumulate=3")


def test_the_norm_is_that_before_clipping(tmp_path: Path) -> None:
    """The logged norm shows how large gradients are, not the bound that they are cut to."""
    optimization = Optimization([nn.Parameter(torch.ones(2))], settings(lr=0.1, clip=1.0))
    optimization.parameters[0].grad = torch.tensor([3.0, 4.0])
    assert float(optimization.step()) == 5.0
    logged = [
        [row["grad_norm"] for row in log_of(run_training(tiny(tmp_path, "train.steps=1", "run.log_every=1", *words)))]
        for words in ((), ("train.clip=1e-3",))
    ]
    assert logged[0] == logged[1] and logged[0][0] > 1e-3
