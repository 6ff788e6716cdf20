"""Likelihoods: the change of variables against closed forms, and the record of a likelihood."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from support import copied, trained

from sitkit.data.dataset import Dataset, Examples, in_memory
from sitkit.data.dataset import load_examples as examples_of
from sitkit.data.toy import GaussianMixture
from sitkit.models.exact import Exact
from sitkit.registry import datasets, interpolants, samplers, targets
from sitkit.runs.config.schema import Config
from sitkit.runs.config.sources import Layer, assemble
from sitkit.runs.diagnostics import heldout_examples
from sitkit.runs.likelihood import dequantised, likelihood, standard_errors
from sitkit.runs.run import Run, initial_network, load
from sitkit.runtime import rng
from sitkit.runtime.errors import UserError, WorkFailed
from sitkit.runtime.files import write_json
from sitkit.solvers.log_density import integrate_log_density, log_prior
from sitkit.solvers.ode import Dopri5, Heun
from sitkit.solvers.sampler import SolveSpec
from sitkit.transport.closed_form import Mixture, log_density, sample_law
from sitkit.transport.field import Field


@functools.cache
def law(dim: int) -> Mixture:
    return GaussianMixture(dim=dim).mixture()


def field_of(dim: int, interp: str, target: str = "velocity") -> Field:
    interpolant, aim = interpolants.create(interp), targets.create(target)
    return Field(Exact(law(dim), interpolant, aim), interpolant, aim, law(dim).num_classes)


# dim 2: every interpolant and target; 8 and 48 dimensions: every interpolant.
CASES = [(2, i, t) for i in interpolants.names() for t in targets.names()]
CASES += [(dim, i, "velocity") for dim in (8, 48) for i in interpolants.names()]


@pytest.mark.parametrize(("dim", "interp", "target"), CASES)
def test_the_ode_gives_the_closed_form_density(dim: int, interp: str, target: str) -> None:
    field = field_of(dim, interp, target)
    x, y = sample_law(law(dim), 8 if dim == 48 else 32, seed=3)
    solver = Dopri5()
    result = integrate_log_density(field, x, y, sampler=solver, divergence="exact")
    t0, t1 = solver.plan(SolveSpec(field.interpolant, field.target)).times[[0, -1]].expand(len(x), 2).T
    start = log_density(law(dim), field.interpolant.at(t0, x), result.noise, y)
    truth = log_density(law(dim), field.interpolant.at(t1, x), x, y)
    # The change of variables between the solve's own ends, where both densities are known.  Local errors of 1e-5 a step
    # over at most 20 steps, 2e-4, grow by the flow's own stretching; the largest measured is 8e-4 (48 dimensions, vp-sbdm).
    change = result.log_prob - log_prior(result.noise) + start
    assert float((change - truth).abs().max()) < 2e-3
    # Where the solve spans [0, 1] and noise at t = 0 is standard normal, that is the density of the data itself.
    whole = float(t0[0]) == 0 and float(t1[0]) == 1 and float(field.interpolant.coefficients(t0[:1]).alpha) == 0
    if whole:
        data = log_density(law(dim), field.interpolant.at(torch.ones_like(t1), x), x, y)
        assert float((result.log_prob - data).abs().max()) < 2e-3
    # Counted at the network, and no more than three times what drawing as many samples costs.
    keys = rng.sample_keys(0, torch.arange(len(x)))
    samples = solver.sample(field, rng.normal(keys, (dim,), rng.INITIAL, torch.float64), y, seeds=keys)
    assert result.nfe <= 3 * samples.nfe


def test_a_finer_tolerance_gives_a_smaller_error() -> None:
    field, (x, y) = field_of(2, "linear"), sample_law(law(2), 32, seed=3)
    truth = log_density(law(2), field.interpolant.at(torch.ones(32, dtype=torch.float64), x), x, y)
    result = integrate_log_density(field, x, y, sampler=Dopri5(rtol=1e-8, atol=1e-8), divergence="exact")
    # 1e-8 a step over 30 steps is 3e-7; measured 5e-8.
    assert float((result.log_prob - truth).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_probes_scatter_about_the_exact_divergence(kind: str) -> None:
    field, (x, y) = field_of(8, "linear"), sample_law(law(8), 16, seed=5)
    solver, seeds = Heun(steps=40), list(range(16))
    exact = integrate_log_density(field, x, y, sampler=solver, divergence="exact")
    many = integrate_log_density(field, x, y, sampler=solver, divergence=kind, probes=64, seeds=seeds)  # pyright: ignore[reportArgumentType]
    assert many.each.shape == (64, 16) and torch.allclose(many.each.mean(0), many.log_prob)
    assert torch.equal(many.noise, exact.noise)
    gaps = many.log_prob - exact.log_prob
    # 16 means of 64 probes, each within 5 of its own standard errors.
    assert bool((gaps.abs() < 5 * many.each.std(0) / 8).all()) and float(gaps.abs().max()) > 0
    # A probe is the same probe however many there are.
    one = integrate_log_density(field, x, y, sampler=solver, divergence=kind, probes=1, seeds=seeds)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(one.log_prob, many.each[0], rtol=0, atol=1e-9)


def test_standard_errors_separate_data_and_probes() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(20000, generator=generator, dtype=torch.float64)
    probes = 0.5 * torch.randn(4, 20000, generator=generator, dtype=torch.float64)
    result = standard_errors(data + probes)
    # Variances 1 and 0.25 / 4 over 20,000; a variance from 20,000 draws is good to sqrt(2 / 20000) = 1%, its root to 0.5%.
    for key, variance in (("stderr", 1 + 0.0625), ("stderr_probes", 0.0625), ("stderr_data", 1.0)):
        assert result[key] == pytest.approx(math.sqrt(variance / 20000), rel=0.025)
    one = standard_errors((data + probes)[:1])
    assert one["stderr"] == pytest.approx(math.sqrt(1.25 / 20000), rel=0.025)
    assert one["stderr_probes"] is None and one["stderr_data"] is None
    exact = standard_errors(data[None], exact=True)
    assert exact["stderr_probes"] == 0 and exact["stderr_data"] == exact["stderr"]


def test_dequantisation_fills_the_bin_and_belongs_to_the_example() -> None:
    keys = rng.sample_keys(7, torch.arange(500))
    x = torch.zeros(500, 1, 4, 5, dtype=torch.float64)
    filled = dequantised(x, 0.125, keys)
    assert float(filled.abs().max()) <= 0.0625
    # 10,000 uniform draws: mean 0 within 5 / sqrt(12 * 10000) bins, variance 1/12 within 5% (5 x 0.9%).
    assert abs(float(filled.mean())) < 0.125 * 5 / math.sqrt(120000)
    assert float(filled.var()) == pytest.approx(0.125**2 / 12, rel=0.05)
    assert torch.equal(dequantised(x[100:103], 0.125, keys[100:103]), filled[100:103])


def test_levels_are_where_the_bin_width_says() -> None:
    digits = examples_of(datasets.create("digits"))
    images = in_memory(np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2), None, (), holdout=0)
    for data, width in ((digits, 1 / 8), (images, 1 / 127.5)):
        assert data.bin_width == width
        steps = (data.read(np.arange(4)).double() + 1) / width
        # float32 values near 1, in bins of 1/127.5: 127.5 * 6e-8 = 8e-6.
        assert float((steps - steps.round()).abs().max()) < 1e-4
    assert examples_of(datasets.create("points")).bin_width is None


@final
@dataclass(frozen=True, kw_only=True)
class Rounded(Dataset):
    """N(0, 1) in four dimensions, rounded to levels of a width."""

    width: float = 0.25
    holdout: float = 0.5

    def load(self) -> Examples:
        z = np.random.default_rng(0).standard_normal((2000, 4))
        values = (np.round(z / self.width) * self.width).astype(np.float32)
        normal = Mixture(torch.ones(1), torch.zeros(1, 4), torch.eye(4)[None], torch.zeros(1))
        names = ("all",)
        return in_memory(values, None, names, holdout=self.holdout, law=normal, bin_width=self.width)


def run_of(folder: Path, **settings: object) -> Run:
    """A run with the closed-form network, without a training."""
    config: Config = assemble([Layer({"backbone": "exact", "metric": "mmd", "run": {"track": False}, **settings})])
    network = initial_network(config)
    data = examples_of(config.data)
    return Run(folder, config, 0, network, Field(network, config.interp, config.target, data.num_classes))


def bound_of_rounded_normal(width: float) -> float:
    """E of -log2 N(x + width (u - 1/2)) - log2 width over levels x of a rounded normal and u, in bits per dimension."""
    levels = width * np.arange(-60, 61)
    edges = torch.from_numpy(np.append(levels - width / 2, levels[-1] + width / 2))
    share = torch.special.ndtr(edges).diff().numpy()
    # E (x + width (u - 1/2))^2 = x^2 + width^2 / 12, exactly.
    nats = 0.5 * math.log(2 * math.pi) + 0.5 * (levels**2 + width**2 / 12)
    return float(share @ nats) / math.log(2) - math.log2(width)


@pytest.fixture
def rounded() -> Iterator[str]:
    """The name of the data set of rounded values, registered for one test."""
    datasets.register("rounded-normal")(Rounded)
    yield "rounded-normal"
    del datasets._claims["rounded-normal"]


def test_bits_of_rounded_data_are_their_closed_form(tmp_path: Path, rounded: str) -> None:
    result = likelihood(run_of(tmp_path, data={"name": rounded}), divergence="exact")
    record = result.record
    assert record["unit"] == "bits/dim" and record["n"] == 1000 and record["divergence"] == "exact"
    # 1,000 examples of 4 values: standard error 0.011 bits, all of it from the data; 4 of them.
    assert record["stderr"] == pytest.approx(1 / math.sqrt(2 * 4 * 1000) / math.log(2), rel=0.15)
    assert abs(result.value - bound_of_rounded_normal(0.25)) < 4 * record["stderr"]
    # Without the bin's volume the number would be off by log2(1/4) = 2 bits, without dequantisation by 0.0038: the
    # first is what the line above sees.
    assert np.mean(record["per_example"]) == pytest.approx(result.value, abs=1e-12)


def test_likelihood_agrees_with_the_closed_form_and_is_measured_once(tmp_path: Path) -> None:
    run = run_of(tmp_path, data={"name": "gaussian-mixture", "dim": 8, "size": 1000})
    result = likelihood(run, n=30)
    index = heldout_examples(run, "likelihood", 30)[1]
    x, y = run.examples.read(index).double(), torch.from_numpy(run.examples.labels[index])
    one = run.config.interp.at(torch.ones(30, dtype=torch.float64), x)
    truth = -log_density(law(8), one, x, y) / 8
    # float32 states of eight numbers and a tolerance of 1e-5: 1e-4 nats over 8 dimensions, with room for float32.
    assert np.abs(np.array(result.record["per_example"]) - truth.numpy()).max() < 2e-4
    assert result.record["unit"] == "nats/dim" and result.record["bin_width"] is None
    # There and back within the tolerance of each way, 20 steps of 1e-5 each, and the stretch between.
    assert result.record["round_trip"]["worst"] < 2e-3
    before = result.path.stat().st_mtime_ns
    assert likelihood(run, n=30).record == result.record and result.path.stat().st_mtime_ns == before
    assert likelihood(run, n=29).path != result.path
    assert [p.parent.name for p in tmp_path.rglob("*.json")] == ["likelihoods"] * 2
    assert result.record["identity"] == result.path.stem
    # Release 0.1 named the file by every field of the sampler, and did not write the name into it.
    older = result.path.with_name("0123456789ab.json")
    result.path.rename(older)
    write_json(older, {key: value for key, value in result.record.items() if key != "identity"})
    assert likelihood(run, n=30).path == older != likelihood(run, n=30, seed=1).path


def test_one_probe_and_four_agree_within_their_error(tmp_path: Path) -> None:
    run = run_of(tmp_path, data={"name": "gaussian-mixture", "dim": 40, "size": 600})
    one, four = (likelihood(run, n=30, probes=k, sampler="heun", steps=25) for k in (1, 4))
    assert one.record["divergence"] == "rademacher" and four.record["probes"] == 4
    # The first probe is shared: var(p1 - mean of p1..p4) = 3/4 var(p1) = 3 var(mean of four).
    error = math.sqrt(3) * four.record["stderr_probes"]
    assert 0 < abs(one.value - four.value) < 4 * error


def test_weights_that_are_not_finite_end_a_likelihood_with_one_line(tmp_path: Path) -> None:
    run = load(copied(trained("points"), tmp_path))
    for weights in run.network.parameters():
        weights.fill_(float("nan"))
    with pytest.raises(
        WorkFailed, match=r"^sampler 'dopri5' cannot go on at t = .* evaluations\): .* not finite\. .*$"
    ):
        likelihood(run, n=4)
    assert not list((run.folder / "likelihoods").glob("*"))


def test_impossible_arguments_are_refused_before_any_work(tmp_path: Path) -> None:
    run = run_of(tmp_path, data={"name": "gaussian-mixture", "size": 200})
    sde = samplers.create("euler-maruyama")
    part = samplers.create("heun", t0=0.5, partial=True)
    for wrong in ({"n": 0}, {"probes": 0}, {"sampler": sde}, {"sampler": part}):
        with pytest.raises(UserError):
            likelihood(run, **wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="holdout"):
        likelihood(run_of(tmp_path, data={"name": "gaussian-mixture", "size": 200, "holdout": 0}))
    assert not list(tmp_path.rglob("*.json"))
