"""Exact truth: closed forms against dense float64 oracles, autograd and hand formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import sitkit.models.exact as exact
from sitkit.models.exact import Empirical, Exact
from sitkit.registry import backbones, datasets, interpolants, targets
from sitkit.runtime.errors import UserError
from sitkit.transport.closed_form import Mixture, class_posterior, log_density, moments, readings, sample_law
from sitkit.transport.field import Field
from sitkit.transport.interpolant import Coefficients, Interpolant
from sitkit.transport.target import data_and_noise, determinant

INTERPOLANTS = interpolants.names()
TARGETS = targets.names()


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    """Four full covariances in three dimensions, in two classes that interleave."""
    generator = torch.Generator().manual_seed(5)
    roots = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64) * 0.4
    means = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + 0.05 * torch.eye(3, dtype=torch.float64)
    return Mixture(double(1, 2, 3, 4), means, covariances, torch.tensor([0, 1, 0, 1]))


def noisy(mixture: Mixture, interpolant: Interpolant, t: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """One draw of x_t per time, and a label for each, the null class among them."""
    data, _ = sample_law(mixture, len(t), seed)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    c = interpolant.at(t, data)
    return c.alpha * data + c.sigma * noise, torch.arange(len(t)) % (mixture.num_classes + 1)


def dense(mixture: Mixture, c: Coefficients, x: Tensor, y: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p, E[data], E[noise], score at one x by dense inverses, component by component."""
    alpha, sigma = float(c.alpha), float(c.sigma)
    d = len(x)
    inside = [k for k in range(len(mixture.weights)) if y in (int(mixture.groups[k]), mixture.num_classes)]
    total = sum(float(mixture.weights[k]) for k in inside)
    logs, data, noise, score = [], [], [], []
    for k in inside:
        m, covariance = mixture.means[k], mixture.covariances[k]
        law = MultivariateNormal(alpha * m, alpha**2 * covariance + sigma**2 * torch.eye(d, dtype=torch.float64))
        pull = torch.linalg.inv(law.covariance_matrix) @ (x - alpha * m)
        logs.append(law.log_prob(x) + math.log(float(mixture.weights[k]) / total))
        data.append(m + alpha * covariance @ pull)
        noise.append(sigma * pull)
        score.append(-pull)
    r = torch.stack(logs).softmax(0)
    mean_data, mean_noise, mean_score = (r @ torch.stack(v) for v in (data, noise, score))
    return torch.stack(logs).logsumexp(0), mean_data, mean_noise, mean_score


# Cancellation costs at most eps |x| / (det sigma) = 2e-16 * 3 / 1e-4 = 6e-12 for det, sigma >= 0.01; measured 2e-12.
TIMES = torch.cat([double(0.0), torch.linspace(0.01, 0.99, 29, dtype=torch.float64), double(1.0)])


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_readings_recovered_from_the_prediction_are_the_truth(name: str, target_name: str, mixture: Mixture) -> None:
    interpolant, target = interpolants.create(name), targets.create(target_name)
    network = Exact(mixture, interpolant, target)
    checked = 0
    for seed in range(3):
        x, y = noisy(mixture, interpolant, TIMES, seed)
        prediction = network(x, TIMES, y)
        assert prediction.isfinite().all()
        c = interpolant.at(TIMES, x)
        data, noise = data_and_noise(target, c, prediction, x)
        velocity = c.d_alpha * data + c.d_sigma * noise
        finite = (determinant(target, c).abs() > 1e-9).squeeze(1)
        if target_name == "velocity":
            assert finite.all()
        for i in finite.nonzero().flatten().tolist():
            at = Coefficients(*(value[i] for value in c))
            _, true_data, true_noise, true_score = dense(mixture, at, x[i], int(y[i]))
            close(data[i], true_data)
            close(noise[i], true_noise)
            if float(at.sigma) > 0:
                close(velocity[i], at.d_alpha * true_data + at.d_sigma * true_noise)
                close(-noise[i] / at.sigma, true_score, 1e-9)
            checked += 1
    assert checked >= 3 * (len(TIMES) - 1)


def close(ours: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_predictions_at_both_ends_are_the_limits(name: str, target_name: str, mixture: Mixture) -> None:
    interpolant, target = interpolants.create(name), targets.create(target_name)
    network = Exact(mixture, interpolant, target)
    for end, inside in ((0.0, 1e-9), (1.0, 1 - 1e-9)):
        times = torch.full((6,), end, dtype=torch.float64)
        x, y = noisy(mixture, interpolant, times)
        there = network(x, times, y)
        near = network(x, torch.full_like(times, inside), y)
        # Rates of change are at most a few hundred, but noise goes as sigma: sqrt(0.1 * 1e-9) = 1e-5 for vp-sbdm.
        scale = 1 + there.abs().max() + readings(mixture, interpolant.at(times, x), x, y).score.abs().max()
        assert float((there - near).abs().max()) < 2e-5 * float(scale)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_at_the_data_end_by_hand(name: str, mixture: Mixture) -> None:
    """At sigma = 0, E[data] = x and d_sigma E[noise] = -(d_sigma sigma) score, with the limit of d_sigma sigma."""
    interpolant = interpolants.create(name)
    end = torch.ones(5, dtype=torch.float64)
    x, _ = noisy(mixture, interpolant, end)
    c, just_before = interpolant.at(end, x), interpolant.at(end - 1e-12, x)
    truth = readings(mixture, c, x)
    limit = c.d_alpha * x - just_before.d_sigma * just_before.sigma * truth.score
    close(truth.data, x)
    # d_sigma sigma moves by at most ~10 * 1e-12 over the last 1e-12.
    close(truth.velocity, limit, 1e-10)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_score_is_the_gradient_of_the_log_density(name: str, mixture: Mixture) -> None:
    interpolant = interpolants.create(name)
    x, y = noisy(mixture, interpolant, TIMES)
    x.requires_grad_()
    c = interpolant.at(TIMES, x)
    (gradient,) = torch.autograd.grad(log_density(mixture, c, x, y).sum(), x)
    close(readings(mixture, c, x, y).score, gradient)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_log_density_against_dense_and_at_both_ends(name: str, mixture: Mixture) -> None:
    interpolant = interpolants.create(name)
    x, y = noisy(mixture, interpolant, TIMES)
    c = interpolant.at(TIMES, x)
    ours = log_density(mixture, c, x, y)
    for i in range(len(TIMES)):
        close(ours[i], dense(mixture, Coefficients(*(value[i] for value in c)), x[i], int(y[i]))[0])
    at_data = torch.stack(
        [MultivariateNormal(m, v).log_prob(x[-1]) for m, v in zip(mixture.means, mixture.covariances, strict=True)]
    )
    inside = (mixture.groups == y[-1]) | (y[-1] == mixture.num_classes)
    weights = mixture.weights[inside] / mixture.weights[inside].sum()
    close(ours[-1], (weights.log() + at_data[inside]).logsumexp(0))
    if float(c.alpha[0]) == 0:
        close(ours[0], -0.5 * (x[0].square().sum() + 3 * math.log(2 * math.pi)))


@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_velocity_carries_the_density(name: str, label: int, mixture: Mixture) -> None:
    """d/dt log p + div v + v . score = 0, the derivatives by autograd."""
    interpolant = interpolants.create(name)
    t = torch.linspace(0.02, 0.98, 13, dtype=torch.float64)
    x, _ = noisy(mixture, interpolant, t)
    y = torch.full((len(t),), label)
    t.requires_grad_()
    x.requires_grad_()
    c = interpolant.at(t, x)
    (rate,) = torch.autograd.grad(log_density(mixture, c, x, y).sum(), t)
    truth = readings(mixture, Coefficients(*(value.detach() for value in c)), x, y)
    divergence = sum(
        torch.autograd.grad(truth.velocity[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])
    )
    residual = rate + divergence + (truth.velocity * truth.score).sum(1)
    assert float(rate.abs().max()) > 0.1
    # The terms reach about 10 and rounding leaves 2e-14; a wrong rate in any of them leaves more than 1e-3.
    assert float(residual.detach().abs().max()) < 1e-8


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_class_posterior_is_bayes(name: str, mixture: Mixture) -> None:
    interpolant = interpolants.create(name)
    x, _ = noisy(mixture, interpolant, TIMES)
    c = interpolant.at(TIMES, x)
    posterior = class_posterior(mixture, c, x)
    close(posterior.sum(1), torch.ones(len(x), dtype=torch.float64))
    prior = double(0.4, 0.6)
    for label in (0, 1):
        y = torch.full((len(x),), label)
        bayes = (log_density(mixture, c, x, y) - log_density(mixture, c, x)).exp() * prior[label]
        close(posterior[:, label], bayes)
    if float(c.alpha[0]) == 0:
        close(posterior[0], prior)
    assert float(posterior.max()) > 0.9


def test_one_gaussian_by_hand() -> None:
    """N(0.7, 0.3^2), linear path: regression of data and noise on x, in plain numbers."""
    law = Mixture(double(1), double(0.7)[None], double(0.09)[None, None], torch.tensor([0]))
    interpolant = interpolants.create("linear")
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        for x in (-1.3, 0.0, 0.4, 2.0):
            variance = t * t * 0.09 + (1 - t) * (1 - t)
            away = x - 0.7 * t
            data = 0.7 + 0.09 * t * away / variance
            noise = (1 - t) * away / variance
            at = double(x)[None]
            truth = readings(law, interpolant.at(double(t), at), at)
            for ours, hand in zip(truth, (data - noise, -away / variance, data, noise), strict=True):
                assert float(ours) == pytest.approx(hand, rel=1e-13, abs=1e-13)
            hand = -0.5 * (away * away / variance + math.log(2 * math.pi * variance))
            assert float(log_density(law, interpolant.at(double(t), at), at)) == pytest.approx(hand, rel=1e-13)


@pytest.mark.parametrize("label", [None, 0, 1])
def test_samples_have_the_stated_moments(label: int | None, mixture: Mixture) -> None:
    n = 20_000
    x, y = sample_law(mixture, n, seed=3)
    again, _ = sample_law(mixture, n, seed=3)
    assert torch.equal(x, again)
    assert not torch.equal(x, sample_law(mixture, n, seed=4)[0])
    if label is None:
        share = float((y == 1).double().mean())
        assert abs(share - 0.6) < 4 * math.sqrt(0.6 * 0.4 / n)
    else:
        x = x[y == label]
    mean, covariance = moments(mixture, label)
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / len(x)).sqrt()).all()
    away = x - mean
    products = away.unsqueeze(2) * away.unsqueeze(1)
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(len(x))).all()


def test_labels_far_from_x_stay_finite(mixture: Mixture) -> None:
    interpolant = interpolants.create("linear")
    x = torch.full((3, 3), 1e3, dtype=torch.float64)
    c = interpolant.at(double(0.9), x)
    for label in (0, 1, 2):
        y = torch.full((3,), label)
        truth = readings(mixture, c, x, y)
        assert all(value.isfinite().all() for value in truth)
        assert log_density(mixture, c, x, y).isfinite().all()
    assert class_posterior(mixture, c, x).isfinite().all()


def test_shape_dtype_and_mixed_times() -> None:
    """Images, float32 in and out, a time of its own for each example; casting the network changes nothing."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64) * 0.3
    law = Mixture(
        double(0.5, 0.5), torch.randn(2, 8, generator=generator), root @ root.mT + torch.eye(8), torch.tensor([0, 1])
    )
    network = Exact(law, interpolants.create("gvp"), targets.create("velocity"))
    assert not list(network.parameters()) and not network.state_dict()
    assert network.num_classes == 2
    x = torch.randn(5, 2, 2, 2, generator=generator)
    t, y = torch.linspace(0, 1, 5), torch.tensor([0, 1, 2, 0, 1])
    ours = network(x, t, y)
    assert ours.dtype == torch.float32 and ours.shape == x.shape
    wide = network(x.double(), t.double(), y)
    assert torch.equal(ours, wide.float())
    for i in range(5):
        close(network(x[i : i + 1].double(), t[i : i + 1].double(), y[i : i + 1]), wide[i : i + 1], 1e-12)
    assert torch.equal(network.to(torch.bfloat16)(x, t, y), ours)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": double(1, -1)}, "weights must be positive"),
        ({"weights": double(1)}, r"weights must be \(2,\)"),
        ({"groups": torch.tensor([0, 2])}, "every label"),
        ({"means": double(0, math.nan)[:, None]}, "finite"),
        ({"means": double(0, 1)}, r"means must be \(K, d\)"),
        ({"covariances": torch.zeros(2, 1, 1)}, "number 0 of 2"),
        ({"covariances": torch.ones(2, 2, 2)}, r"covariances must be \(2, 1, 1\)"),
    ],
)
def test_an_impossible_mixture_is_refused(change: dict[str, Tensor], says: str) -> None:
    good = {
        "weights": double(1, 1),
        "means": torch.zeros(2, 1),
        "covariances": torch.ones(2, 1, 1),
        "groups": torch.tensor([0, 1]),
    }
    Mixture(**good)
    with pytest.raises(ValueError, match=says):
        Mixture(**{**good, **change})


def test_an_asymmetric_covariance_is_refused() -> None:
    skew = torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])
    with pytest.raises(ValueError, match="symmetric"):
        Mixture(double(1), torch.zeros(1, 2), skew, torch.tensor([0]))


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.arange(40) % 2


@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_empirical_law_is_a_mixture_of_vanishing_width(
    name: str, target_name: str, points: tuple[Tensor, Tensor]
) -> None:
    interpolant, target = interpolants.create(name), targets.create(target_name)
    where, labels = points
    width = 1e-13
    thin = Mixture(torch.ones(40), where, width * torch.eye(3).expand(40, 3, 3), labels)
    law = Empirical(where, labels, 2)
    t = torch.linspace(0, 0.95, 24, dtype=torch.float64)
    x, y = noisy(thin, interpolant, t)
    ours = Exact(law, interpolant, target)(x, t, y)
    # The width changes the answer by about width / sigma^4, sigma >= 0.05 (0.078 gvp, 0.072 vp-sbdm): below 2e-8.
    close(ours, Exact(thin, interpolant, target)(x, t, y), 1e-7)


def test_the_empirical_law_in_blocks_is_the_same(
    points: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Exact(Empirical(*points, 2), interpolants.create("linear"), targets.create("velocity"))
    t = torch.linspace(0, 0.9, 11, dtype=torch.float64)
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.arange(11) % 3
    whole = network(x, t, y)
    monkeypatch.setattr(exact, "MIXTURE_BLOCK", 80)
    close(network(x, t, y), whole, 1e-14)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_empirical_law_ends_on_its_points(name: str, points: tuple[Tensor, Tensor]) -> None:
    interpolant = interpolants.create(name)
    where, labels = points
    law = Empirical(where, labels, 2)
    x = where[:5] + 1e-9
    c = interpolant.at(double(1.0), x)
    truth = readings(law, c, x, labels[:5])
    close(truth.data, where[:5], 1e-14)
    assert not truth.noise.any()
    close(truth.velocity, c.d_alpha * where[:5], 1e-14)
    near = interpolant.at(double(0.999), x)
    noisy_x = near.alpha * where[:5] + near.sigma * 0.5
    close(readings(law, near, noisy_x).noise, torch.full_like(x, 0.5), 1e-10)


def test_the_empirical_law_refuses_a_label_without_points(points: tuple[Tensor, Tensor]) -> None:
    where, labels = points
    with pytest.raises(ValueError, match="each of the 3 labels"):
        Empirical(where, labels, 3)
    with pytest.raises(ValueError, match="points must be"):
        Empirical(where, labels[:-1], 2)
    unlabelled = Empirical(where, torch.zeros(40, dtype=torch.int64), 0)
    c = interpolants.create("linear").at(double(0.0), where)
    close(readings(unlabelled, c, where, torch.zeros(40, dtype=torch.int64)).data[0], where.mean(0), 1e-14)


def prepared(law: str, data: str, **fields: object) -> Exact:
    backbone = backbones.create("exact", law=law)
    examples = datasets.create(data, **fields).load()
    network = backbone.build(examples.shape, examples.num_classes)
    made = backbone.prepare(
        network, interpolant=interpolants.create("gvp"), target=targets.create("score"), examples=examples
    )
    assert isinstance(made, Exact)
    return made


def test_the_backbone_takes_the_law_of_the_data() -> None:
    assert not backbones["exact"].trainable
    examples = datasets.create("gaussian-mixture", size=500).load()
    known = prepared("auto", "gaussian-mixture", size=500)
    assert known.law is not None and isinstance(known.law, Mixture)
    assert isinstance(prepared("empirical", "gaussian-mixture", size=500).law, Empirical)
    digits = prepared("auto", "digits")
    assert isinstance(digits.law, Empirical) and digits.num_classes == 10
    field = Field(known, interpolants.create("gvp"), targets.create("score"))
    x = examples.read(examples.train[:7]).double()
    t = torch.full((7,), 0.6, dtype=torch.float64)
    y = torch.arange(7) % (known.num_classes + 1)
    truth = readings(known.law, field.interpolant.at(t, x), x, y)
    for ours, right in zip(field.read(x, t, y), truth, strict=True):
        close(ours, right)


def test_the_backbone_refuses_without_a_law() -> None:
    with pytest.raises(UserError, match="gaussian-mixture"):
        prepared("mixture", "digits")
    with pytest.raises(UserError, match="prepare"):
        backbones.create("exact").build((2,), 2)(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1))
    with pytest.raises(UserError, match="law"):
        backbones.create("exact", law="guess")


def test_the_data_set_follows_its_law() -> None:
    data = datasets.create("gaussian-mixture", dim=3, components=5, size=4000, seed=9, groups=(0, 1, 1, 2, 0))
    examples, again = data.load(), data.load()
    assert examples.shape == (3,) and examples.num_classes == 3 and len(examples) == 4000
    assert examples.fingerprint == again.fingerprint
    assert examples.fingerprint != datasets.create("gaussian-mixture", dim=3, size=4000, seed=10).load().fingerprint
    law = examples.law
    x = examples.read(torch.arange(4000).numpy()).double()
    mean, covariance = moments(law)
    assert ((x.mean(0) - mean).abs() < 4 * (covariance.diagonal() / 4000).sqrt()).all()
    c = Coefficients(*(double(v) for v in (1, 0, 1, -1)))
    assigned = class_posterior(law, c, x).argmax(1).numpy()
    expected = float(class_posterior(law, c, x).amax(1).mean())
    # The Bayes classifier is right as often as it believes to be, within 4 standard errors.
    assert abs((assigned == examples.labels).mean() - expected) < 4 * 0.5 / math.sqrt(4000)
    assert expected > 0.6


def test_the_data_set_takes_an_explicit_law() -> None:
    means, covariances = ((0.7,), (-2.0,)), (((0.09,),), ((0.25,),))
    law = (
        datasets.create(
            "gaussian-mixture", dim=1, components=2, size=100, means=means, covariances=covariances, weights=(3.0, 1.0)
        )
        .load()
        .law
    )
    assert law.means.flatten().tolist() == [0.7, -2.0]
    assert law.covariances.flatten().tolist() == [0.09, 0.25]
    assert law.weights.tolist() == [0.75, 0.25]
    with pytest.raises(UserError, match="dim"):
        datasets.create("gaussian-mixture", means=((0.7,), (-2.0,)), components=2)
    with pytest.raises(UserError, match="covariances"):
        datasets.create("gaussian-mixture", dim=1, components=1, covariances=(((-1.0,),),)).load()
