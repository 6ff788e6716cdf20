"""The scalable interpolant transformer (Ma et al. 2024), with the official parameter names and shapes.

The network is the diffusion transformer of Peebles and Xie (2022): patches of x become tokens, (t, label) modulates every
block through adaLN-Zero, and a linear head maps each token to a patch of the prediction.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from sitkit.models.backbone import SiTBackbone

TIME_FEATURES = 256
MAX_PERIOD = 10_000


def time_features(t: Tensor, count: int = TIME_FEATURES) -> Tensor:
    """Return cos(t f_i), then sin(t f_i), with f_i = 10000^(-i / (count / 2)): (b,) -> (b, count), at least float32."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(count // 2, dtype=dtype, device=t.device) / (count // 2)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions(rows: int, columns: int, channels: int) -> Tensor:
    """Return the fixed 2-D sine-cosine positions, (rows * columns, channels) in float32.

    The first half of the channels encodes the column, the second the row (the official order); each half is
    sin(p f_i), then cos(p f_i), with f_i = 10000^(-i / (channels / 4)).
    """
    quarter = channels // 4
    frequencies = MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)

    def axis(length: int) -> Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = axis(columns).expand(rows, columns, channels // 2)
    down = axis(rows)[:, None].expand(rows, columns, channels // 2)
    return rearrange(torch.cat([across, down], dim=2), "r c d -> (r c) d").float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift.  x: (b, n, d); shift and scale: (b, d)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedder(nn.Module):
    """Patches to tokens: (b, c, h, w) -> (b, h/p * w/p, d)."""

    def __init__(self, channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d r c -> b (r c) d")


class TimestepEmbedder(nn.Module):
    """A perceptron on sinusoidal features of time: (b,) -> (b, d)."""

    def __init__(self, hidden_size: int, time_scale: float) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(self.time_scale * t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels to vectors: (b,) -> (b, d); the last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention: (b, n, d) -> (b, n, d)."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        x = scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), gelu by its tanh approximation."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _norm(hidden_size: int) -> nn.LayerNorm:
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def _modulation(hidden_size: int, count: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, count * hidden_size))


class Block(nn.Module):
    """Attention, then feed-forward, each shifted, scaled and gated by c: (b, n, d), (b, d) -> (b, n, d)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = _norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = _norm(hidden_size)
        self.mlp = FeedForward(hidden_size, mlp_ratio)
        self.adaLN_modulation = _modulation(hidden_size, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Tokens to patches: (b, n, d), (b, d) -> (b, n, p * p * channels)."""

    def __init__(self, hidden_size: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * channels)
        self.adaLN_modulation = _modulation(hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The scalable interpolant transformer: x (b, c, h, w), t (b,), y (b,) int64 -> (b, c, h, w).

    The arguments of the constructor are the shape (c, h, w), the number of classes and the fields of the backbone 'sit'.
    Source: Ma et al. 2024 (arXiv 2401.08740), Table 9; Peebles and Xie 2022 (arXiv 2212.09748), section 3.2.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        class_dropout: float,
        learn_sigma: bool,
        time_scale: float,
        qk_norm: bool,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        self.channels, height, width = shape
        self.num_classes, self.class_dropout = num_classes, class_dropout
        self.patch_size, self.rows, self.columns = patch_size, height // patch_size, width // patch_size
        self.checkpointing = checkpointing

        self.x_embedder = PatchEmbedder(self.channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, time_scale)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # Its size is known to `limited` before its values are computed.
        self.pos_embed = nn.Parameter(torch.empty(1, self.rows * self.columns, hidden_size), requires_grad=False)
        self.pos_embed.data = positions(self.rows, self.columns, hidden_size)[None]
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.channels * (2 if learn_sigma else 1))
        initialise(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction of the network.

        Args:
            x: states, (b, c, h, w).
            t: times, (b,).
            y: labels, (b,) int64; num_classes is the null class.

        Returns:
            The prediction, (b, c, h, w).
        """
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, c, use_reentrant=False)
            else:
                tokens = block(tokens, c)
        patches = rearrange(
            self.final_layer(tokens, c),
            "b (r c) (p q k) -> b k (r p) (c q)",
            r=self.rows,
            c=self.columns,
            p=self.patch_size,
            q=self.patch_size,
        )
        return patches[:, : self.channels]


def initialise(network: SiT) -> None:
    """Set the official initial weights: every block is the identity and the prediction is 0.

    Modulations and the head are 0; the label table and the time perceptron are normal(0, 0.02); other linear layers,
    and the patch convolution as a linear layer, are Xavier-uniform.  Biases are 0.
    """
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            continue
        if name.endswith("adaLN_modulation.1") or name == "final_layer.linear":
            nn.init.zeros_(module.weight)
        elif name.startswith(("t_embedder", "y_embedder")):
            nn.init.normal_(module.weight, std=0.02)
        else:
            nn.init.xavier_uniform_(module.weight.flatten(1))
        if not isinstance(module, nn.Embedding) and module.bias is not None:
            nn.init.zeros_(module.bias)


def flops(shape: tuple[int, int, int], form: SiTBackbone) -> int:
    """Return the FLOPs of the matrix products of one forward pass for one sample; a multiply-add counts as two.

    The "118.6 GFLOPs" of SiT-XL/2 at 32x32x4 in the paper are multiply-adds: this function gives 237.3e9 there.
    """
    channels, height, width = shape
    tokens, d = height * width // form.patch_size**2, form.hidden_size
    patch = channels * form.patch_size**2
    inner = int(d * form.mlp_ratio)
    embed = tokens * patch * d + TIME_FEATURES * d + d * d
    attention = tokens * 4 * d * d + 2 * tokens * tokens * d
    block = attention + tokens * 2 * d * inner + 6 * d * d
    head = 2 * d * d + tokens * d * patch * (2 if form.learn_sigma else 1)
    return 2 * (embed + form.depth * block + head)
