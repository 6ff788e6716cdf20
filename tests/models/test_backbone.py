"""Laws of every backbone, the exact sizes of the paper, and the transformer against a second implementation."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sitkit.models.backbone import Backbone
from sitkit.models.sit import positions, time_features
from sitkit.registry import backbones, interpolants, targets
from sitkit.runtime.errors import UserError

# Layers, hidden size, heads: Ma et al. 2024, Table 9.
TABLE_9 = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
PAPER = [(f"sit-{size}/{patch}", *TABLE_9[size], patch) for size in TABLE_9 for patch in (2, 4, 8)]

# Every backbone at a size that is fast to test: two blocks of width 32 in place of 28 of width 1152.
SMALL = {"sit": {"hidden_size": 32, "depth": 2, "num_heads": 4}, "mlp": {"hidden_size": 32, "depth": 2}}
TRAINABLE = [name for name in backbones.names() if backbones.create(name).trainable]


def small(name: str, **fields: object) -> Backbone:
    component = backbones.create(name)
    return backbones.create(name, **SMALL.get(component.name, {}), **fields)


def shake(network: nn.Module, seed: int = 0) -> nn.Module:
    """Return the network in float64 with every weight non-zero, also biases and modulations."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.double().parameters():
        scale = 0.5 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.3
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def inputs(shape: tuple[int, ...], num_classes: int, size: int = 3, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, *shape, generator=generator, dtype=dtype)
    t = torch.rand(size, generator=generator, dtype=dtype)
    return x, t, torch.arange(size) % (num_classes + 1)


def shape_for(name: str) -> tuple[int, ...]:
    return (2,) if backbones.create(name).name == "mlp" else (3, 16, 8)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_network_keeps_the_shape_and_starts_at_zero(name: str) -> None:
    torch.manual_seed(0)
    network = small(name).build(shape_for(name), 5)
    x, t, y = inputs(shape_for(name), 5, dtype=torch.float32)
    out = network(x, t, y)
    assert out.shape == x.shape and out.dtype == x.dtype
    assert not out.any()
    assert (network.num_classes, network.class_dropout) == (5, 0.1)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_network_sees_x_t_and_the_label_and_nothing_random(name: str) -> None:
    network = shake(small(name).build(shape_for(name), 5))
    x, t, y = inputs(shape_for(name), 5)
    out = network(x, t, y)
    assert torch.equal(out, network(x, t, y))
    for other in (network(x + 0.1, t, y), network(x, t + 0.1, y), network(x, t, (y + 1) % 6)):
        # Rounding in float64 moves a prediction of order 1 by at most 1e-12; an input that the network reads moves it more.
        assert ((out - other).abs().flatten(1).amax(1) > 1e-5).all()


@pytest.mark.parametrize("name", TRAINABLE)
def test_samples_of_a_batch_do_not_touch(name: str) -> None:
    network = shake(small(name).build(shape_for(name), 5))
    x, t, y = inputs(shape_for(name), 5)
    single = torch.cat([network(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    # Rounding of sums of a few hundred terms in float64.
    torch.testing.assert_close(single, network(x, t, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TRAINABLE)
def test_the_smallest_training_moves_every_weight(name: str) -> None:
    network = shake(small(name).build(shape_for(name), 5))
    x, t, _ = inputs(shape_for(name), 5, size=6)
    network(x, t, torch.arange(6)).square().sum().backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_network_without_labels(name: str) -> None:
    network = small(name).build(shape_for(name), 0)
    x, t, y = inputs(shape_for(name), 0, dtype=torch.float32)
    assert network.num_classes == 0
    assert network(x, t, y).shape == x.shape
    with pytest.raises(IndexError):
        network(x, t, y + 1)


@pytest.mark.parametrize(
    ("name", "fields"), [("sit", {}), ("sit", {"qk_norm": True}), ("sit", {"checkpointing": True}), ("mlp", {})]
)
def test_a_network_compiles_as_one_graph(name: str, fields: dict[str, object]) -> None:
    network = shake(small(name, **fields).build(shape_for(name), 5))
    x, t, y = inputs(shape_for(name), 5)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, y), network(x, t, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_trained_network_needs_no_preparation(name: str) -> None:
    from sitkit.registry import datasets

    network = small(name).build(shape_for(name), 5)
    same = small(name).prepare(
        network,
        interpolant=interpolants.create("linear"),
        target=targets.create("velocity"),
        examples=datasets.create("points", size=40).load(),
    )
    assert same is network


def official_count(layers: int, d: int, patch: int, channels: int, side: int, classes: int) -> int:
    """Parameters of the published architecture, added up by hand: weights plus biases."""
    tokens = (side // patch) ** 2
    embed = channels * patch**2 * d + d + (256 * d + d) + (d * d + d) + (classes + 1) * d + tokens * d
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + (6 * d * d + 6 * d)
    out = 2 * channels * patch**2
    return embed + layers * block + (2 * d * d + 2 * d) + (d * out + out)


@pytest.mark.parametrize(("name", "layers", "hidden", "heads", "patch"), PAPER)
def test_the_papers_sizes(name: str, layers: int, hidden: int, heads: int, patch: int) -> None:
    with torch.device("meta"):
        network = backbones.create(name).build((4, 32, 32), 1000)
    assert sum(p.numel() for p in network.parameters()) == official_count(layers, hidden, patch, 4, 32, 1000)
    assert len(network.blocks) == layers
    assert {block.attn.num_heads for block in network.blocks} == {heads}
    assert network.pos_embed.shape == (1, (32 // patch) ** 2, hidden) and not network.pos_embed.requires_grad


def test_the_published_count() -> None:
    # The number of parameters of the published DiT-XL/2 and SiT-XL/2 checkpoints.
    assert official_count(28, 1152, 2, 4, 32, 1000) == 675_129_632


def test_the_official_names() -> None:
    network = small("sit").build((4, 8, 8), 10)
    d = 32
    block = {
        "attn.qkv.weight": (3 * d, d),
        "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d),
        "attn.proj.bias": (d,),
        "mlp.fc1.weight": (4 * d, d),
        "mlp.fc1.bias": (4 * d,),
        "mlp.fc2.weight": (d, 4 * d),
        "mlp.fc2.bias": (d,),
        "adaLN_modulation.1.weight": (6 * d, d),
        "adaLN_modulation.1.bias": (6 * d,),
    }
    expected = {
        "pos_embed": (1, 16, d),
        "x_embedder.proj.weight": (d, 4, 2, 2),
        "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256),
        "t_embedder.mlp.0.bias": (d,),
        "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,),
        "y_embedder.embedding_table.weight": (11, d),
        "final_layer.linear.weight": (2 * 2 * 8, d),
        "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d),
        "final_layer.adaLN_modulation.1.bias": (2 * d,),
        **{f"blocks.{i}.{key}": shape for i in range(2) for key, shape in block.items()},
    }
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == expected


def recompute(weights: dict[str, np.ndarray], x: np.ndarray, t: np.ndarray, y: np.ndarray, **form: float) -> np.ndarray:
    """The published forward pass in NumPy, patch by patch and head by head."""
    patch, heads, depth, time_scale = (int(form["patch"]), int(form["heads"]), int(form["depth"]), form["time_scale"])
    b, channels, height, width = x.shape

    def linear(name: str, v: np.ndarray) -> np.ndarray:
        return v @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(v: np.ndarray) -> np.ndarray:
        return v / (1 + np.exp(-v))

    def gelu(v: np.ndarray) -> np.ndarray:
        return 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def norm(v: np.ndarray) -> np.ndarray:
        return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-6)

    def attend(name: str, v: np.ndarray) -> np.ndarray:
        d = v.shape[-1]
        qkv = linear(f"{name}.qkv", v)
        size = d // heads
        out = np.empty_like(v)
        for h in range(heads):
            q, k, value = (qkv[..., part * d + h * size : part * d + (h + 1) * size] for part in range(3))
            logits = q @ k.swapaxes(1, 2) / math.sqrt(size)
            attention = np.exp(logits - logits.max(-1, keepdims=True))
            out[..., h * size : (h + 1) * size] = attention / attention.sum(-1, keepdims=True) @ value
        return linear(f"{name}.proj", out)

    kernel, tokens = weights["x_embedder.proj.weight"], []
    for row in range(height // patch):
        for column in range(width // patch):
            cut = x[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            tokens.append(np.einsum("bcij,dcij->bd", cut, kernel) + weights["x_embedder.proj.bias"])
    h = np.stack(tokens, 1) + weights["pos_embed"]

    frequency = np.exp(-math.log(10000) * np.arange(128) / 128)
    angle = time_scale * t[:, None] * frequency
    features = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", features)))
    c = c + weights["y_embedder.embedding_table.weight"][y]

    for i in range(depth):
        parts = np.split(linear(f"blocks.{i}.adaLN_modulation.1", silu(c)), 6, axis=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (part[:, None] for part in parts)
        h = h + gate_a * attend(f"blocks.{i}.attn", norm(h) * (1 + scale_a) + shift_a)
        inner = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + scale_m) + shift_m))
        h = h + gate_m * linear(f"blocks.{i}.mlp.fc2", inner)
    shift, scale = (part[:, None] for part in np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2, axis=1))
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)

    out = np.empty_like(x)
    place = 0
    for row in range(height // patch):
        for column in range(width // patch):
            pixels = h[:, place].reshape(b, patch, patch, -1)[..., :channels].transpose(0, 3, 1, 2)
            out[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = pixels
            place += 1
    return out


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize(("patch", "shape"), [(2, (4, 8, 8)), (1, (1, 4, 6)), (4, (3, 8, 16))])
def test_the_forward_pass_is_the_published_one(patch: int, shape: tuple[int, int, int], learn_sigma: bool) -> None:
    backbone = small("sit", patch_size=patch, learn_sigma=learn_sigma, time_scale=3.0)
    network = shake(backbone.build(shape, 5))
    weights = {key: value.detach().numpy() for key, value in network.state_dict().items()}
    x, t, y = inputs(shape, 5)
    truth = recompute(weights, x.numpy(), t.numpy(), y.numpy(), patch=patch, heads=4, depth=2, time_scale=3.0)
    assert np.abs(truth).max() > 0.1
    # Sums of at most 256 terms of order 1 in float64: rounding stays below 1e-13.
    np.testing.assert_allclose(network(x, t, y).detach().numpy(), truth, rtol=0, atol=1e-10)


def test_positions_name_the_column_first() -> None:
    table = positions(3, 5, 16).double().numpy()
    for row in range(3):
        for column in range(5):
            ours = table[row * 5 + column]
            frequencies = [10000 ** (-i / 4) for i in range(4)]
            truth = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies]
            # The table is stored in float32: half a unit in the last place of 1 is 6e-8.
            np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-7)


def test_time_features_are_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    features = time_features(t, 8)
    truth = [[f(float(s) * 10000 ** (-i / 4)) for f in (math.cos, math.sin) for i in range(4)] for s in t]
    torch.testing.assert_close(features, torch.tensor(truth, dtype=torch.float64), rtol=0, atol=1e-14)
    assert time_features(t.bfloat16()).dtype == torch.float32


def test_initial_weights_are_the_official_ones() -> None:
    torch.manual_seed(0)
    network = backbones.create("sit", hidden_size=256, depth=1, num_heads=4).build((4, 16, 16), 1000)
    weights = network.state_dict()
    for key, weight in weights.items():
        if key.endswith("bias") or "adaLN" in key or key.startswith("final_layer"):
            assert not weight.any(), key
        elif key.startswith(("t_embedder", "y_embedder")):
            # Over n draws the standard deviation is known to 1 / sqrt(2 n): four of these, for n >= 65,536, is 1.2%.
            assert weight.std().item() == pytest.approx(0.02, rel=0.012), key
        elif key != "pos_embed":
            bound = math.sqrt(6 / sum(weight.flatten(1).shape))
            # The largest of at least 4,096 uniform draws is within 1% of the bound but for a chance of 1e-17.
            assert 0.99 * bound < weight.abs().max().item() <= bound, key


def test_checkpointing_changes_no_number() -> None:
    x, t, y = inputs((4, 8, 8), 5)
    grads = []
    for checkpointing in (False, True):
        network = shake(small("sit", checkpointing=checkpointing).build((4, 8, 8), 5))
        network(x, t, y).square().sum().backward()
        grads.append([p.grad for p in network.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_holds_fewer_tensors_for_the_backward_pass() -> None:
    x, t, y = inputs((4, 8, 8), 5)
    held = []
    for checkpointing in (False, True):
        network, sizes = shake(small("sit", checkpointing=checkpointing).build((4, 8, 8), 5)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v, s=sizes: (s.append(v.numel()), v)[1], lambda v: v):
            network(x, t, y)
        held.append(sum(sizes))
    assert held[1] < held[0] / 2


def test_normalised_queries_and_keys_bound_the_logits() -> None:
    network = shake(small("sit", qk_norm=True).build((4, 8, 8), 5))
    norms = [module for module in network.modules() if isinstance(module, nn.RMSNorm)]
    assert len(norms) == 4
    x, t, y = inputs((4, 8, 8), 5)
    out = network(x, t, y)
    for name, parameter in network.named_parameters():
        if ".attn.qkv." in name:
            # Queries and keys grow a thousand times, and nothing changes: their size is normalised away.
            parameter.data[: 2 * 32] *= 1e3
    # The remaining difference is the 1e-6 added to a mean square of order 0.1 under the root.
    torch.testing.assert_close(network(x, t, y), out, rtol=0, atol=1e-4)


def test_bfloat16_weights_and_autocast() -> None:
    network = shake(small("sit").build((4, 8, 8), 5))
    x, t, y = inputs((4, 8, 8), 5, dtype=torch.float32)
    with torch.no_grad():
        truth = network(x.double(), t.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network.float()(x, t, y)
    half = network.bfloat16()(x.bfloat16(), t, y)
    assert half.dtype == torch.bfloat16
    for ours in (rounded, half):
        # Some twenty roundings of relative size 2^-9 in a row, as a random walk, reach 1%.
        assert ((ours.double() - truth).norm() / truth.norm()).item() < 0.03


@pytest.mark.parametrize("name", ["sit-s/2", "sit-xs/1", "sit-xs/2"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    backbone, shape = backbones.create(name), (4, 16, 24)
    with torch.device("meta"):
        network = backbone.build(shape, 10)
        x, t, y = torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        network(x, t, y)
    assert backbone.flops(shape) == counter.get_total_flops()


def test_flops_of_the_largest() -> None:
    flops = backbones.create("sit-xl/2").flops((4, 32, 32))
    # The paper's 118.6 "GFLOPs" are multiply-adds, two FLOPs each.
    assert flops is not None and round(flops / 2e9, 1) == 118.6


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_size": 30, "num_heads": 4}, "multiple of num_heads"),
        ({"hidden_size": 6, "num_heads": 1}, "multiple of 4"),
        ({"patch_size": 0}, "patch_size must be at least 1; got 0"),
        ({"depth": -1}, "depth must be at least 1; got -1"),
        ({"class_dropout": 1.5}, "class_dropout must be between 0 and 1"),
        ({"time_scale": 0.0}, "time_scale must be positive"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"pach_size": 2}, "Did you mean 'patch_size'"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        backbones.create("sit", **fields)


def test_a_shape_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"28x30 .*patch_size = 4.*1, 2\."):
        backbones.create("sit-xs/4").build((1, 28, 30), 10)
    with pytest.raises(UserError, match="'mlp'"):
        backbones.create("sit-xs/2").build((2,), 10)


def test_the_perceptron_takes_any_shape() -> None:
    for shape in ((2,), (3, 4, 5)):
        network = shake(small("mlp").build(shape, 2))
        x, t, y = inputs(shape, 2)
        assert network(x, t, y).shape == x.shape


def test_the_perceptron_learns_a_function() -> None:
    torch.manual_seed(0)
    network = backbones.create("mlp", hidden_size=64).build((2,), 2)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    x, t, y = torch.randn(512, 2), torch.rand(512), torch.arange(512) % 3
    wanted = torch.stack([torch.sin(3 * t) * x[:, 0], (y - 1.0) * x[:, 1]], 1)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (network(x, t, y) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # The loss of predicting 0 is about 0.5; without the label or the time it is more than 0.1.
    assert losses[-1] < 0.02


def test_listing_backbones_needs_no_torch() -> None:
    code = "import sys, sitkit.models.backbone; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
