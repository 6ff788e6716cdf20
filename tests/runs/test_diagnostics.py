"""The velocity loss against time: the closed form for Gaussian data, for each target."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import autoencoder, call, copied, tiny, trained

from sitkit.data.dataset import in_memory, load_examples
from sitkit.models.autoencoder import modelled
from sitkit.registry import interpolants, targets
from sitkit.results.losscurve import curve_labels
from sitkit.runs import diagnostics
from sitkit.runs.config.sources import read_assignments
from sitkit.runs.diagnostics import (
    DRAWS,
    LOSS_BATCH,
    MAX_LOSS_EXAMPLES,
    TIMES,
    heldout_examples,
    loss_curve,
    smooth,
    velocity_losses,
)
from sitkit.runs.run import initial_network, load
from sitkit.runtime.errors import UserError
from sitkit.runtime.files import read_json
from sitkit.training.train import run_training
from sitkit.transport.field import Field

DEVIATION, DIM = 0.5, 3
LAW = (
    f"data={{name: gaussian-mixture, components: 1, dim: {DIM}, size: 4000, holdout: 0.5, means: [[0.3, -1.0, 0.7]], "
    f"covariances: [{[[DEVIATION**2 * (i == j) for j in range(DIM)] for i in range(DIM)]}]}}"
)


@pytest.mark.parametrize("target", list(targets))
@pytest.mark.parametrize("interp", list(interpolants))
def test_the_exact_field_of_a_gaussian_has_the_irreducible_loss(tmp_path: Path, interp: str, target: str) -> None:
    """L_t = d Var(v | x_t) = d s^2 (d_alpha sigma - d_sigma alpha)^2 / (alpha^2 s^2 + sigma^2)."""
    config = tiny(tmp_path, LAW, "backbone=exact", f"interp={interp}", f"target={target}")
    data = load_examples(config.data)
    field = Field(initial_network(config), config.interp, config.target, data.num_classes)
    index = data.heldout[:MAX_LOSS_EXAMPLES]
    times, losses = loss_curve(field, data, index)
    assert len(index) == MAX_LOSS_EXAMPLES and len(times) == len(losses) == TIMES
    assert times == sorted(times) and 0 <= times[0] < 0.02 and 0.98 < times[-1] <= 1
    c = config.interp.coefficients(torch.tensor(times, dtype=torch.float64))
    variance = (c.alpha * DEVIATION) ** 2 + c.sigma**2
    wanted = DIM * DEVIATION**2 * (c.d_alpha * c.sigma - c.d_sigma * c.alpha) ** 2 / variance
    # |error|^2 is a chi-square of d = 3 freedoms, of relative deviation sqrt(2 / 3).  The 4 noises of an example share it:
    # at the worst, t = 0, where the error is all data, 1,000 draws count, so sqrt(2 / 3000) = 0.026; 4 of them.
    ratio = np.array(losses) / wanted.numpy()
    assert np.abs(ratio - 1).max() < 4 * math.sqrt(2 / (DIM * MAX_LOSS_EXAMPLES))


def test_a_network_that_predicts_zero_has_the_loss_of_the_velocity_itself(tmp_path: Path) -> None:
    config = tiny(tmp_path, LAW)
    data = load_examples(config.data)
    field = Field(
        initial_network(config).eval(), config.interp, config.target, data.num_classes
    )  # the head is zero at first
    _, losses = loss_curve(field, data, data.heldout[:MAX_LOSS_EXAMPLES])
    # E |data - noise|^2 = d (s^2 + 1) + |mean|^2 at every t, of the very same draws at each.
    wanted = DIM * (DEVIATION**2 + 1) + 0.3**2 + 1.0**2 + 0.7**2
    # Var |data - noise|^2 = 2 d 1.25^2 + 4 * 1.25 |mean|^2 = 17.3; at the worst 1,000 draws: sqrt(17.3 / 1000) = 0.13.
    assert abs(losses[0] - wanted) < 4 * 0.132
    # float32 sums over times differ by rounding only: 2^-24 of 5.3, times a few.
    assert max(losses) - min(losses) < 1e-5


def test_the_loss_does_not_depend_on_how_it_is_batched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(tmp_path, LAW, "backbone=exact")
    data = load_examples(config.data)
    field = Field(initial_network(config), config.interp, config.target, data.num_classes)
    _, whole = loss_curve(field, data, data.heldout[:300])
    monkeypatch.setattr(diagnostics, "LOSS_BATCH", 77)
    _, parts = loss_curve(field, data, data.heldout[:300])
    # Only the order of 1,200 float64 sums of values of size 1 differs, and float32 rounding inside a kernel.
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
    assert 300 * DRAWS > LOSS_BATCH


def test_smoothing_keeps_straight_lines_of_the_logarithm_and_halves_a_spike() -> None:
    level = [3.0] * 9
    # exp and log round to 2^-52 each.
    assert smooth(level) == pytest.approx(level, rel=1e-14)
    slope = [math.exp(0.3 * i) for i in range(9)]
    assert smooth(slope)[1:-1] == pytest.approx(slope[1:-1], rel=1e-14)
    spike = [1.0] * 4 + [math.e] + [1.0] * 4
    quarter = math.exp(0.25)
    assert smooth(spike) == pytest.approx([1, 1, 1, quarter, quarter**2, quarter, 1, 1, 1], rel=1e-14)
    assert all(math.isfinite(value) and value > 0 for value in smooth([0.0, 1.0, 0.0]))


def test_the_losses_of_a_run_are_kept_beside_it(tmp_path: Path) -> None:
    run = dataclasses.replace(load(trained()), folder=tmp_path)
    pairs = velocity_losses(run)
    (path,) = tmp_path.iterdir()
    assert path.name == "velocity-loss-ema-00000040.json"
    stored = read_json(path)
    assert pairs == tuple(zip(stored["times"], stored["smoothed"], strict=True))
    assert stored["smoothed"] == smooth(stored["raw"])
    assert (stored["times"], stored["raw"]) == loss_curve(run.field, run.examples, run.examples.heldout)
    path.write_text('{"times": [0.0, 1.0], "raw": [1, 1], "smoothed": [2, 3]}')
    assert velocity_losses(run) == ((0.0, 2), (1.0, 3))
    raw = dataclasses.replace(load(trained(), settings=read_assignments(["sample.weights=raw"])), folder=tmp_path)
    assert velocity_losses(raw) != pairs and len(list(tmp_path.iterdir())) == 2


def test_without_held_out_data_the_loss_is_refused(tmp_path: Path) -> None:
    folder = run_training(tiny(tmp_path, "data.holdout=0"))
    with pytest.raises(UserError, match=r"held-out data.*data\.holdout above 0"):
        velocity_losses(load(folder))
    assert not list(folder.glob("velocity-loss*"))


def test_the_losses_of_runs_side_by_side(tmp_path: Path) -> None:
    folders = [copied(trained(), tmp_path), run_training(tiny(tmp_path, "target=noise"))]
    words = ("losscurve", *(folder.name for folder in folders), "--runs", tmp_path, "--picture", tmp_path / "l.png")
    called = call(*words)
    assert called.status == 0 and "velocity" in called.out and "noise" in called.out
    assert (tmp_path / "l.png").read_bytes()[:4] == b"\x89PNG"
    curves = json.loads(call(*words, "--json").out)
    assert [entry["label"] for entry in curves] == ["velocity", "noise"]
    for entry, folder in zip(curves, folders, strict=True):
        assert list(zip(entry["times"], entry["losses"], strict=True)) == list(velocity_losses(load(folder)))
    assert curve_labels([load(folders[0]), load(folders[0])]) == [folders[0].name] * 2


def test_measurements_of_a_run_are_shown(tmp_path: Path) -> None:
    folder = copied(trained(), tmp_path)
    for kind, name in (("diffusion", "kl-eta"), ("timestep", "adapted")):
        path = tmp_path / f"{name}.png"
        words = ("show", kind, name, "--runs", tmp_path, "--picture", path)
        bare = call(*words)
        assert bare.status == 0 and "picture" not in bare.out and not path.exists()
        called = call(*words, "--run", folder.name)
        assert called.status == 0 and "values" in called.out and path.read_bytes()[:4] == b"\x89PNG"


def test_a_subset_of_the_held_out_examples_is_random_over_classes(tmp_path: Path) -> None:
    """Data in the order of their classes: the first 100 held-out examples would be of the first class alone."""
    labels = np.repeat(np.arange(4), 500)
    np.savez(tmp_path / "d.npz", images=np.zeros((2000, 8, 8, 1), np.uint8), labels=labels)
    data = f"data={{name: npz, path: {tmp_path / 'd.npz'}, holdout: 0.5}}"
    run = load(run_training(tiny(tmp_path / "runs", data, "train.steps=0", base="digits")), device="cpu")
    examples, index = heldout_examples(run, "loss", 100)
    counts = np.bincount(labels[index], minlength=4)
    # 25 of each are expected, with a standard deviation of sqrt(100 * 0.25 * 0.75) = 4.3; 4 of them.
    assert len(set(index)) == 100 and set(index) <= set(examples.heldout) and np.abs(counts - 25).max() < 4 * 4.4
    assert np.array_equal(heldout_examples(run, "loss", 40)[1], index[:40])
    assert np.array_equal(heldout_examples(run, "loss", 1000)[1], examples.heldout)


def test_the_loss_of_a_run_with_an_autoencoder_is_that_of_its_latents(tmp_path: Path) -> None:
    """The same run on latents in place of images has the same loss: the latents are what the network models."""
    path = autoencoder(tmp_path / "vae", channels=1)
    words = (
        f"autoencoder={{name: sd-vae, path: {path}}}",
        "train.steps=0",
        "backbone.patch_size=2",
        "data.holdout=0.01",
    )
    run = load(run_training(tiny(tmp_path / "runs", *words, base="digits")), device="cpu")
    examples, index = heldout_examples(run, "loss", 8)
    curve = loss_curve(run.field, examples, index, run.config.autoencoder)
    latents = modelled(run.config.autoencoder, examples, examples.read(index))
    assert latents.shape[1:] == run.shape != examples.shape
    given = in_memory(latents.numpy(), examples.labels[index], examples.class_names, holdout=0)
    assert loss_curve(run.field, given, np.arange(8)) == curve
    assert len(velocity_losses(run)) == TIMES
