"""Published checkpoints: read exactly, or refused; nothing in a file is executed."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import call
from torch import Tensor

from sitkit.runs.exchange import convert
from sitkit.runs.run import load

SIDE, PATCH, WIDTH, HEADS, DEPTH, CLASSES, CHANNELS = 8, 2, 24, 3, 2, 5, 3


def official(projectors: bool = False, learn_sigma: bool = True) -> dict[str, Tensor]:
    """The state of a small SiT with the official names and shapes, every tensor random and none of them zero."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / math.sqrt(shape[-1] if len(shape) > 1 else 4)

    out = PATCH * PATCH * CHANNELS * (2 if learn_sigma else 1)
    state = {
        "pos_embed": draw(1, (SIDE // PATCH) ** 2, WIDTH),
        "x_embedder.proj.weight": draw(WIDTH, CHANNELS, PATCH, PATCH), "x_embedder.proj.bias": draw(WIDTH),
        "t_embedder.mlp.0.weight": draw(WIDTH, 256), "t_embedder.mlp.0.bias": draw(WIDTH),
        "t_embedder.mlp.2.weight": draw(WIDTH, WIDTH), "t_embedder.mlp.2.bias": draw(WIDTH),
        "y_embedder.embedding_table.weight": draw(CLASSES + 1, WIDTH),
        "final_layer.linear.weight": draw(out, WIDTH), "final_layer.linear.bias": draw(out),
        "final_layer.adaLN_modulation.1.weight": draw(2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": draw(2 * WIDTH),
    }  # fmt: skip
    for i in range(DEPTH):
        for name, shape in {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH), "adaLN_modulation.1": (6 * WIDTH, WIDTH),
        }.items():  # fmt: skip
            state |= {f"blocks.{i}.{name}.weight": draw(*shape), f"blocks.{i}.{name}.bias": draw(shape[0])}
    if projectors:
        state |= {"projectors.0.0.weight": draw(7, WIDTH), "projectors.0.0.bias": draw(7)}
    return state


def forward(state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The official network in float64, written out: no layer of torch.nn, no attention of torch."""
    p = {name: value.double() for name, value in state.items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def silu(h: Tensor) -> Tensor:
        return h / (1 + (-h).exp())

    def gelu(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())

    b, side = len(x), SIDE // PATCH
    cut = (
        x.double().reshape(b, CHANNELS, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, side * side, -1)
    )
    h = cut @ p["x_embedder.proj.weight"].reshape(WIDTH, -1).T + p["x_embedder.proj.bias"] + p["pos_embed"]
    angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    time = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = silu(time + p["y_embedder.embedding_table.weight"][y])
    for i in range(DEPTH):
        parts = linear(f"blocks.{i}.adaLN_modulation.1", c)[:, None].split(WIDTH, -1)
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(h) * (1 + parts[1]) + parts[0]).split(WIDTH, -1)
        heads = []
        for head in range(HEADS):
            own = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(WIDTH // HEADS)
            heads.append(scores.softmax(-1) @ v[..., own])
        h = h + parts[2] * linear(f"blocks.{i}.attn.proj", torch.cat(heads, -1))
        inner = gelu(linear(f"blocks.{i}.mlp.fc1", norm(h) * (1 + parts[4]) + parts[3]))
        h = h + parts[5] * linear(f"blocks.{i}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].split(WIDTH, -1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = h.reshape(b, side, side, PATCH, PATCH, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, -1, SIDE, SIDE)
    return out[:, :CHANNELS]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, CHANNELS, SIDE, SIDE, generator=g),
        torch.tensor([0.0, 0.3, 0.7, 1.0]),
        torch.tensor([0, 2, 4, 5]),
    )


def converted(tmp_path: Path, held: Any, *words: str) -> Path:
    torch.save(held, tmp_path / "network.pt")
    result = call("convert", tmp_path / "network.pt", "--runs", tmp_path / "runs", "--heads", str(HEADS), *words)
    assert result.status == 0, result.err
    return Path(result.out.split()[1])


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_converted_sit_gives_the_output_of_its_weights(tmp_path: Path, learn_sigma: bool, bare: bool) -> None:
    state = official(learn_sigma=learn_sigma)
    args = argparse.Namespace(model="SiT-XS/2", path_type="GVP", prediction="score", num_classes=CLASSES)
    held = state if bare else {"model": {n: 0 * t for n, t in state.items()}, "ema": state, "opt": {}, "args": args}
    run = load(converted(tmp_path, held, "--from", "sit"), device="cpu")
    x, t, y = inputs()
    truth = forward(state, x, t, y)
    # float32 against float64: outputs of size 10 at most, each a few hundred roundings of 6e-8.
    assert float((run.network(x, t, y).double() - truth).abs().max() / truth.abs().max()) < 1e-5
    assert (run.config.interp.name, run.config.target.name) == (("linear", "velocity") if bare else ("gvp", "score"))


def test_the_time_and_the_sign_of_repa_are_reversed(tmp_path: Path) -> None:
    state = official(projectors=True)
    args = argparse.Namespace(model="SiT-XS/2", path_type="linear", prediction="v", enc_type="dinov2-vit-b")
    torch.save({"model": state, "ema": state, "steps": 400, "args": args}, tmp_path / "network.pt")
    result = call("convert", tmp_path / "network.pt", "--runs", tmp_path / "runs", "--heads", str(HEADS))
    assert result.status == 0 and "projectors are left out" in result.err
    run = load(Path(result.out.split()[1]), device="cpu")
    assert run.step == 400
    x, t, y = inputs()
    truth = -forward(state, x, 1 - t, y)
    assert float((run.network(x, t, y).double() - truth).abs().max() / truth.abs().max()) < 1e-5


@pytest.mark.parametrize("bare", [True, False])
def test_a_dit_gives_the_noise_of_its_timesteps(tmp_path: Path, bare: bool) -> None:
    state = official()
    args = argparse.Namespace(model="DiT-XS/2", num_classes=CLASSES, vae="mse", global_batch_size=256)
    zero = {name: 0 * tensor for name, tensor in state.items()}
    held = state if bare else {"model": zero, "ema": state, "opt": {}, "args": args}
    run = load(converted(tmp_path, held, *(("--from", "dit") if bare else ())), device="cpu")
    assert (run.config.interp.name, run.config.target.name) == ("ddpm", "noise")
    x, _, y = inputs()
    n = torch.tensor([0, 1, 500, 999])
    t = 1 - (n + 1.0) / 1000
    truth = forward(state, x, n.double(), y)
    # Angles reach 999 radians, of which float32 keeps 6e-5, here as in the official code: a part of the features is off
    # by that, and the output by as much of its size.
    assert float((run.network(x, t, y).double() - truth).abs().max() / truth.abs().max()) < 1e-4
    # In float64 the time itself is exact to 1e-13, and what is left are the rounded weights of the one turned layer.
    exact = run.network.double()(x.double(), 1 - (n.double() + 1) / 1000, y)
    assert float((exact - truth).abs().max() / truth.abs().max()) < 1e-6
    # And the path is DDPM's: x_t of level n has the product of 1 - beta_i, i <= n, of data.
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    c = run.field.interpolant.coefficients(1 - (n.double() + 1) / 1000)
    torch.testing.assert_close(c.alpha.square(), kept[n], rtol=1e-11, atol=0)
    torch.testing.assert_close(c.sigma.square(), 1 - kept[n], rtol=1e-11, atol=0)


def test_a_step_of_ddim_by_the_official_formula_agrees_with_the_field(tmp_path: Path) -> None:
    """x' = sqrt(abar') data + sqrt(1 - abar') noise from the official prediction (Song et al. 2020, eta = 0)."""
    state = official()
    run = load(converted(tmp_path, state, "--from", "dit"), device="cpu")
    x, _, y = inputs()
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    before, after = kept[799], kept[599]
    noise = forward(state, x, torch.full((4,), 799.0), y)
    data = (x.double() - (1 - before).sqrt() * noise) / before.sqrt()
    expected = after.sqrt() * data + (1 - after).sqrt() * noise
    read = run.field.read(x, 1 - 800 / 1000, y)
    c = run.field.interpolant.at(torch.tensor(1 - 600 / 1000, dtype=torch.float64), x)
    ours = c.alpha * read.data.double() + c.sigma * read.noise.double()
    # As above: float32 keeps 6e-5 of an angle of 799.
    assert float((ours - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    "wrap",
    [
        "module.{}".format, "_orig_mod.{}".format, "module._orig_mod.{}".format, "_orig_mod.module.{}".format,
        "_fsdp_wrapped_module.{}".format, lambda name: name.replace("blocks.1.", "blocks.1._orig_mod."),
        lambda name: name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    ],
)  # fmt: skip
def test_names_that_wrappers_changed_are_read(tmp_path: Path, wrap: Callable[[str], str]) -> None:
    """torch.compile, DDP, FSDP and checkpointing of blocks add a part to names, in the order of their use."""
    state = official()
    run = load(converted(tmp_path, {wrap(name): t for name, t in state.items()}, "--from", "sit"), device="cpu")
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.network.state_dict().items())


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path: Path) -> None:
    torch.save(official() | {"module.pos_embed": torch.ones(1, (SIDE // PATCH) ** 2, WIDTH)}, tmp_path / "both.pt")
    result = call("convert", tmp_path / "both.pt", "--from", "sit", "--heads", str(HEADS))
    assert result.status == 2 and "pos_embed twice" in result.err


def table_of(rows: int) -> dict[str, Tensor]:
    """A network with a label table of that number of rows."""
    g = torch.Generator().manual_seed(2)
    return official() | {"y_embedder.embedding_table.weight": torch.randn(rows, WIDTH, generator=g)}


@pytest.mark.parametrize(
    ("rows", "args", "words", "classes", "null_row"),
    [
        (6, {"num_classes": 5}, (), 5, True),
        (5, {"num_classes": 5}, (), 5, False),
        (6, {}, (), 5, True),
        (5, {}, ("--classes", "5"), 5, False),
        (5, {"num_classes": 1000}, ("--classes", "4"), 4, True),
        (5, {"cfg_prob": 0.0}, (), 5, False),
        (6, {"cfg_prob": 0.2, "num_classes": 5}, (), 5, True),
    ],
)
def test_the_rows_of_a_label_table_are_the_classes_that_the_file_states(
    tmp_path: Path, rows: int, args: dict[str, Any], words: tuple[str, ...], classes: int, null_row: bool
) -> None:
    """A training without label dropout has no row for no label: its last row is a class, and nothing is unconditional."""
    state = table_of(rows)
    held = {"ema": state, "args": argparse.Namespace(model="SiT-XS/2", **args)}
    run = load(converted(tmp_path, held, *words), device="cpu")
    assert run.field.null_class == classes
    assert vars(run.config.backbone)["class_dropout"] == (args.get("cfg_prob", 0.1) if null_row else 0)
    x, t, _ = inputs()
    y = torch.tensor([0, 1, 2, classes - 1])
    truth = forward(state, x, t, y)
    # As for the other networks: float32 against float64.
    assert float((run.network(x, t, y).double() - truth).abs().max() / truth.abs().max()) < 1e-5
    guided = call("sample", run.folder, "-n", "2", "--steps", "2", "--guidance", "cfg")
    assert guided.status == (0 if null_row else 2) and ("class_dropout" in guided.err) == (not null_row), guided.err


def test_a_label_table_that_fits_no_number_of_classes_is_refused(tmp_path: Path) -> None:
    torch.save({"ema": table_of(9), "args": argparse.Namespace(model="SiT-XS/2", num_classes=5)}, tmp_path / "sit.pt")
    result = call("convert", tmp_path / "sit.pt", "--runs", tmp_path / "runs", "--heads", str(HEADS))
    assert result.status == 2 and "9 rows" in result.err and "--classes 8" in result.err
    asked = call("convert", tmp_path / "sit.pt", "--runs", tmp_path / "runs", "--heads", str(HEADS), "--classes", "4")
    assert asked.status == 2 and "--classes says 4" in asked.err and not (tmp_path / "runs").exists()


def test_every_width_of_the_inner_layer_is_read_from_its_ratio() -> None:
    """int(hidden * ratio) is the width, for all widths up to 16 times the hidden one: 49 / 24 * 24 may round below 49."""
    widths = [(hidden, inner) for hidden in (4, 24, 48, 92, 144, 384, 1152) for inner in range(1, 16 * hidden)]
    wrong = [(hidden, inner) for hidden, inner in widths if int(hidden * convert._ratio(inner, hidden)) != inner]
    assert not wrong
    assert any(int(hidden * (inner / hidden)) != inner for hidden, inner in widths)


def test_a_converted_run_samples_without_its_data_and_goes_back(tmp_path: Path) -> None:
    state = official()
    run = converted(tmp_path, state, "--from", "sit")
    result = call("sample", run, "-n", "6", "--steps", "2", "--guidance", "cfg", "--set", "guidance.scale=2")
    assert result.status == 0, result.err
    with np.load(Path(result.out.split()[1])) as arrays:
        assert arrays["images"].shape == (6, SIDE, SIDE, CHANNELS) and arrays["labels"].tolist() == [0, 1, 2, 3, 4, 0]
    refused = call("evaluate", run, "-n", "6", "--steps", "2")
    assert refused.status == 2 and "Traceback" not in refused.err
    assert call("convert", run, "--to", tmp_path / "back.pt").status == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_a_converted_run_is_measured_against_statistics_in_a_file(tmp_path: Path) -> None:
    """|mu|^2 + tr S + d - 2 tr S^(1/2) against N(0, 1), by numpy from the samples."""
    run, file, d = converted(tmp_path, official(), "--from", "sit"), tmp_path / "reference.npz", CHANNELS * SIDE**2
    np.savez(file, mu=np.zeros(d), sigma=np.eye(d))
    metric = f"metric={{name: frechet, reference: {file}}}"
    result = call("evaluate", run, "-n", "6", "--steps", "2", "--set", metric, "--set", "run.track=false", "--json")
    assert result.status == 0, result.err
    (record,) = json.loads(result.out)
    output = call("evaluate", run, "-n", "6", "--steps", "2", "--set", metric, "--set", "run.track=false").out
    assert "against the statistics in" in output and "real:" not in output
    with np.load(run / "samples" / record["samples"] / "samples.npz") as arrays:
        x = (arrays["images"] / 127.5 - 1).transpose(0, 3, 1, 2).reshape(6, d)
    spread = np.linalg.svd((x - x.mean(0)) / 5**0.5, compute_uv=False)
    truth = (x.mean(0) ** 2).sum() + (spread**2).sum() + d - 2 * spread.sum()
    # Images are divided in float32.
    assert abs(record["value"] / truth - 1) < 1e-6 and record["real"] is None and record["reference"]["n"] == 0


def test_latents_are_kept_as_they_are_and_have_no_picture(tmp_path: Path) -> None:
    out = 2 * 4 * PATCH**2
    state = official() | {
        "x_embedder.proj.weight": torch.randn(WIDTH, 4, PATCH, PATCH),
        "final_layer.linear.weight": torch.randn(out, WIDTH), "final_layer.linear.bias": torch.randn(out),
    }  # fmt: skip
    run = converted(tmp_path, state, "--from", "sit", "--vae", "none")
    result = call("sample", run, "-n", "6", "--steps", "2")
    assert result.status == 0 and "picture" not in result.out, result.err
    with np.load(Path(result.out.split()[1])) as arrays:
        x = arrays["points"]
    assert x.shape == (6, 4, SIDE, SIDE) and x.dtype == np.float32 and np.abs(x).max() > 1


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in official().items() if key != name}


@pytest.mark.parametrize("place", ["model", "args"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": official(), place: Malicious()}, "evil.pt")
    result = call("convert", "evil.pt")
    assert result.status == 2 and "mkdir" in result.err and "Nothing in it was run" in result.err
    assert not Path("ran").exists() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("held", "words", "message"),
    [
        (official(), ("--from", "adm"), "known are sit, repa, dit"),
        (official(), (), "add --from sit"),
        (official(), ("--from", "sit"), "add --heads"),
        ({"weights": [1, 2]}, ("--from", "sit"), "is no tensor"),
        ({"pos_embed": torch.ones(1)}, ("--from", "sit"), "it has no"),
        ({"conv1.weight": torch.ones(3, 3)}, (), "no SiT network: it has no x_embedder.proj.weight"),
        (
            {"ema": official(), "args": argparse.Namespace(model="SiT-S/2", prediction="flow")},
            ("--heads", "3"),
            "'flow'",
        ),
        (official() | {"pos_embed": torch.ones(1)}, ("--from", "sit"), "axes"),
        (without("t_embedder.mlp.0.weight"), ("--from", "dit", "--heads", "3"), "t_embedder.mlp.0.weight"),
        (without("final_layer.linear.bias"), ("--from", "repa", "--heads", "3"), "final_layer.linear.bias"),
        (torch.ones(3), (), "holds a Tensor"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, held: Any, words: tuple[str, ...], message: str) -> None:
    torch.save(held, tmp_path / "network.pt")
    result = call("convert", tmp_path / "network.pt", "--runs", tmp_path / "runs", *words)
    assert result.status == 2 and message in result.err.replace("\n", " ") and "Traceback" not in result.err
    assert not (tmp_path / "runs").exists()


def test_a_file_that_is_cut_short_or_absent_is_refused(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:2000])
    assert "cut short" in call("convert", tmp_path / "cut.pt").err
    assert "There is no file" in call("convert", tmp_path / "none.pt").err


@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"<!DOCTYPE html><html>404</html>", b"version https://git-lfs.github.com"]
)
def test_another_download_in_place_of_a_checkpoint_is_named_in_one_line(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "page.pt"
    path.write_bytes(data)
    result = call("convert", path)
    assert result.status == 2 and f"{path} is no file of torch.save" in result.err and result.err.count("\n") == 1


def test_a_block_that_is_missing_is_named(tmp_path: Path) -> None:
    state = {name: t for name, t in official().items() if not name.startswith("blocks.0.attn")}
    torch.save({"ema": state}, tmp_path / "sit.pt")
    result = call("convert", tmp_path / "sit.pt", "--heads", "3")
    assert result.status == 2 and "blocks.0.attn.qkv.weight" in result.err
    state = {name.replace("blocks.1.", "blocks.2."): t for name, t in official().items()}
    torch.save({"ema": state}, tmp_path / "sit.pt")
    result = call("convert", tmp_path / "sit.pt", "--heads", "3")
    assert result.status == 2 and "blocks.1.attn.qkv.weight" in result.err
