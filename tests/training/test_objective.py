"""Losses as components: what they see, what they train beside the network, and what a step computes from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny
from torch import Tensor, nn

from sitkit.data.dataset import Examples, load_examples
from sitkit.data.stream import batch
from sitkit.models.autoencoder import prepare_data
from sitkit.models.loss import Batch, InterpolantLoss, Loss, interpolant_loss
from sitkit.registry import couplings, guidances, interpolants, losses, targets, weightings
from sitkit.runs.checkpoint import checkpoints
from sitkit.runs.config.schema import Config
from sitkit.runs.run import initial_network, load
from sitkit.runs.run_folder import RunFolder
from sitkit.runtime import rng
from sitkit.runtime.rng import TRAINING, normal
from sitkit.runtime.tensors import load_tensors
from sitkit.training.objective import Inputs, TrainingInputs, objective_of
from sitkit.training.train import run_training
from sitkit.transport.field import Counted, Field

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Aligned(Loss):
    """The interpolant's loss, and how far a projection of a hidden layer is from the data."""

    layer: str = "blocks.0"
    share: float = 0.5

    @property
    def hidden(self) -> tuple[str, ...]:
        return (self.layer,)

    def build(self, network: nn.Module, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        return nn.Linear(32, int(np.prod(shape)))

    def per_example(self, batch: Batch) -> Tensor:
        plain = InterpolantLoss().per_example(batch)
        assert batch.parts is not None
        guess = batch.parts(batch.hidden[self.layer].mean(1))
        return plain + self.share * (guess - batch.data.flatten(1)).square().mean(1)


@pytest.fixture
def registered() -> Iterator[None]:
    losses.register("aligned")(Aligned)
    yield
    del losses._claims["aligned"]


def inputs(config: Config, network: nn.Module, step: int = 0, rank: int = 0, size: int = 1) -> Inputs:
    data = load_examples(config.data)
    make = TrainingInputs(config, network, data, CPU, rank, size)
    return make(*batch(data, config.train.seed, step, config.train.batch, make.part))


def test_the_parts_of_all_processes_are_the_batch(tmp_path: Path) -> None:
    for coupling in couplings:
        config = tiny(tmp_path, f"coupling={coupling}", base="digits")
        network = initial_network(config)
        whole = inputs(config, network)
        for size in (2, 4):
            parts = [inputs(config, network, rank=rank, size=size) for rank in range(size)]
            for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
                assert torch.equal(torch.cat(ours), theirs), coupling
        assert [len(part.data) for part in whole.split(4)] == [4] * 4
        assert all(map(torch.equal, (torch.cat(rows) for rows in zip(*whole.split(4), strict=True)), whole))


def test_a_loss_reads_hidden_states_and_trains_parts_of_its_own(tmp_path: Path, registered: None) -> None:
    words = ("loss={name: aligned, share: 0.25}", "train.steps=20", "run.checkpoint_every=10", "run.log_every=1")
    config = tiny(tmp_path / "whole", *words, base="digits")
    network, data = initial_network(config), prepare_data(config.data, config.autoencoder)
    objective = objective_of(config, network, data)
    again = objective_of(config, initial_network(config), data)
    assert objective.parts is not None and again.parts is not None
    # The seed draws them; earlier random numbers have no effect.
    assert all(map(torch.equal, objective.parts.parameters(), again.parts.parameters()))
    rows = inputs(config, network)
    mean, each = objective(*rows)
    tokens: list[Tensor] = []
    handle = network.get_submodule("blocks.0").register_forward_hook(lambda *call: tokens.append(call[2]))
    path = config.interp, config.target, config.weight
    plain = interpolant_loss(network, *path, rows.data, rows.noise, rows.t, rows.y)
    handle.remove()
    beside = (objective.parts(tokens[0].mean(1)) - rows.data.flatten(1)).square().mean(1)
    torch.testing.assert_close(each, plain + 0.25 * beside)
    assert float(mean.detach()) == pytest.approx(float(each.mean())) and not each.requires_grad

    whole = run_training(config)
    tensors = load_tensors(checkpoints(RunFolder(whole).checkpoints)[-1])[1]
    assert not torch.equal(tensors["parts.weight"], objective.parts.state_dict()["weight"])  # They have changed.
    assert not any(name.startswith("ema.parts") or "weight_0" in name for name in tensors)
    assert load(whole).step == 20  # Samples need no parts.
    # Killed half-way, parts and their moments continue as they were.
    newest = checkpoints(RunFolder(whole).checkpoints)[-1]
    before = newest.read_bytes()
    newest.unlink()
    assert run_training(config) == whole and newest.read_bytes() == before


def test_a_loss_is_bound_to_the_runs_data(tmp_path: Path) -> None:
    bound: list[str] = []

    @losses.register("binding")
    @dataclass(frozen=True)
    class Binding(Loss):
        """The interpolant's loss, which is bound to data."""

        def prepare(self, data: Examples) -> Loss:
            bound.append(data.fingerprint)
            return InterpolantLoss()

        def per_example(self, batch: Batch) -> Tensor:
            raise AssertionError("the bound loss is the one that is computed")

    try:
        config = tiny(tmp_path, "loss=binding", base="digits")
        network, data = initial_network(config), prepare_data(config.data, config.autoencoder)
        objective_of(config, network, data)(*inputs(config, network))
        assert bound == [data.examples.fingerprint]
    finally:
        del losses._claims["binding"]


class TwoTimes(nn.Module):
    """u(x, t, r) = t - 2 r; it records the times of its calls."""

    times = 2
    num_classes = 3
    class_dropout = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.times_given: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.times_given.append(t)
        return (t[:, 0] - 2 * t[:, 1]).reshape(-1, 1, 1, 1) + 0 * x


def test_a_network_of_two_times_is_read_at_one_and_called_with_two() -> None:
    network = TwoTimes()
    path = interpolants.create("linear"), targets.create("velocity")
    field = Field(network, *path)
    x = torch.zeros(4, 1, 2, 2)
    assert torch.equal(field.read(x, 0.25).velocity, torch.full_like(x, -0.25))
    weight = weightings.create("velocity")
    data, noise = torch.ones_like(x), torch.zeros_like(x)
    values = interpolant_loss(
        network, *path, weight, data, noise, torch.full((4,), 0.25), torch.zeros(4, dtype=torch.int64)
    )
    torch.testing.assert_close(values, torch.full((4,), 1.25**2))
    y = torch.arange(4) % 3
    for guidance in (
        guidances.create("cfg", interval=(0.2, 0.8)),
        guidances.create("cfg-zero"),
        guidances.create("none"),
    ):
        counted = Counted(network, 4)
        guided = guidance.guide(counted, 3)
        pair = torch.tensor([[0.25, 0.75]]).expand(4, 2)
        # Both branches give the same, so guidance changes only the count.
        torch.testing.assert_close(guided(x, pair, y), torch.full_like(x, 0.25 - 1.5))
        assert network.times_given[-1].shape == (len(network.times_given[-1]), 2)
        assert counted.nfe == guidance.evaluations(0.25)
        assert torch.equal(field.through(guided).read(x, 0.5, y).velocity, torch.full_like(x, -0.5))


def test_a_loss_has_keys_for_more_randomness(tmp_path: Path) -> None:
    config = tiny(tmp_path, base="digits")
    rows = inputs(config, initial_network(config))
    assert torch.equal(normal(rows.keys, tuple(rows.data.shape[1:]), TRAINING), rows.noise)


def test_bfloat16_is_the_network_s_and_the_loss_is_float32(tmp_path: Path) -> None:
    full, half = (tiny(tmp_path, f"train.precision={name}", base="digits") for name in ("fp32", "bf16"))
    network, data = initial_network(full), prepare_data(full.data, full.autoencoder)
    nn.init.normal_(network.get_submodule("final_layer.linear").weight)  # pyright: ignore[reportArgumentType]
    dtypes: list[torch.dtype] = []
    network.get_submodule("blocks.0.attn.qkv").register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    values = [objective_of(c, network, data)(*inputs(c, network))[1] for c in (full, half)]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert values[0].dtype == values[1].dtype == torch.float32
    # bfloat16 has 8 bits: a relative error of 2^-9 in each product, some twenty in a row, squared in the loss.
    torch.testing.assert_close(values[0], values[1], rtol=40 * 2**-9, atol=0)
    assert not torch.equal(*values)


def make_inputs(config: Config) -> TrainingInputs:
    return TrainingInputs(config, initial_network(config), load_examples(config.data), CPU)


def test_noise_and_times_follow_the_training_seed(tmp_path: Path) -> None:
    """The same examples at the same positions: another seed gives other noise, times and dropped labels."""
    x, y, positions = torch.zeros(64, 2), torch.zeros(64, dtype=torch.int64), np.arange(64)
    first, again, other = (
        make_inputs(tiny(tmp_path, f"train.seed={seed}", "backbone.class_dropout=0.5"))(x, y, positions)
        for seed in (3, 3, 4)
    )
    assert all(map(torch.equal, first, again))
    assert not bool((first.noise == other.noise).any()) and not bool((first.t == other.t).any())
    # Halves of 64 labels are dropped: both choices agree with probability 2^-64.
    assert not torch.equal(first.y, other.y)


def test_times_stay_where_the_loss_is_finite(tmp_path: Path) -> None:
    """The velocity of a noise prediction is singular at t = 0: none of 20,000 times is below 1e-3, where 20 of them fall."""
    config = tiny(tmp_path, "target=noise", "weight=velocity")
    made = make_inputs(config)
    low, high = made.interval
    times = made.times(rng.sample_keys(0, torch.arange(20_000))).double()
    # Times are float32, a rounding of 6e-8 of them.
    assert low == pytest.approx(1e-3) and float(times.min()) >= low * (1 - 1e-7) and float(times.max()) <= high
    # Clamped times would be equal.  Of 20,000 uniform float32 times with 24 bits some 12 pairs are.
    assert len(times.unique()) > 19_900
