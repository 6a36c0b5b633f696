"""What a fit says of how well the target is explained: one loss for all methods, chi-square, and who is to blame."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import chi2

import bridge

T = np.linspace(0.0, 2.0, 30)
TRUTH = np.array([1.4, 0.7, 0.3])
START = [1.1, 0.9, 0.4]
SIGMA = 0.04


def curve(p):
    return p[0] * np.cos(2 * p[1] * T) + p[2] * T


def simulator(f=curve, **more):
    return bridge.as_simulator(f, names=["height", "rate", "slope"], natural_scale=[0.3, 0.2, 0.2], **more)


def noisy_target(seed=0, sigma=SIGMA):
    return curve(TRUTH) + sigma * np.random.default_rng(seed).normal(size=len(T))


METHODS = [
    bridge.Kriging(),
    bridge.GaussNewton(),
    bridge.Adam(steps=60, scale=(1.0, 0.05)),
    bridge.Torch(steps=60, scale=(1.0, 0.05), optimiser="Adam"),
    bridge.Natural(steps=60, scale=(1.0, 0.05)),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("known", [True, False])
def test_the_loss_is_half_the_sum_of_squares_whatever_the_method(method, known):
    target, prior = noisy_target(), {"slope": (0.35, 0.1)}
    variance = SIGMA**2 if known else None
    r = bridge.fit(simulator(), target, START, seed=0, method=method, prior=prior, variance=variance)
    np.testing.assert_array_equal(r.output, curve(r.parameters))
    squares = ((r.output - target) ** 2).sum() / (SIGMA**2 if known else 1.0)
    squares += ((r["slope"] - 0.35) / 0.1) ** 2
    assert r.loss == pytest.approx(0.5 * squares, rel=1e-9)
    assert r.dof == 30 + 1 - 3
    if known:
        assert r.chi_square == pytest.approx(squares, rel=1e-9)
        assert r.p_value == pytest.approx(chi2.sf(squares, 28), rel=1e-6)
    else:
        assert r.chi_square is None
        assert r.p_value is None
    np.testing.assert_allclose(r.loss_share.sum(), 1.0)


@pytest.mark.parametrize(
    "method", [bridge.Kriging(scale=0.2), bridge.GaussNewton(scale=0.2)], ids=lambda method: method.name
)
def test_p_values_of_right_models_are_uniform_and_nothing_is_said(method):
    """Of 40 targets the smallest and largest p are not improbable, and no target is called unexplained."""
    p, said = [], 0
    for seed in range(40):
        r = bridge.fit(
            simulator(),
            noisy_target(seed),
            TRUTH,
            seed=seed,
            variance=SIGMA**2,
            method=method,
            stop=bridge.Stop(runs=400),
        )
        p.append(r.p_value)
        said += any("not explained" in w for w in r.warnings)
    p = np.sort(p)
    away = np.abs(p - (np.arange(40) + 0.5) / 40).max()
    assert away < 0.3  # Kolmogorov's distance: 0.3 has a probability of 1e-3
    assert said == 0


@pytest.mark.parametrize("method", ["kriging", "gauss-newton"])
def test_the_noise_of_the_simulator_is_no_misfit(method):
    """The simulator is as noisy as the target: chi-square is twice what the target's variance says."""

    def shaken(p, seed):
        return curve(p) + SIGMA * np.random.default_rng(seed).normal(size=len(T))

    p, said = [], 0
    most = {"kriging": 100, "gauss-newton": 400}[method]  # a Gaussian process of many noisy runs takes its time
    for seed in range(12):
        r = bridge.fit(
            simulator(shaken, seeded=True),
            noisy_target(seed),
            TRUTH,
            seed=seed,
            variance=SIGMA**2,
            method=method,
            stop=bridge.Stop(runs=most),
        )
        p.append(r.p_value)
        said += any("not explained" in w for w in r.warnings)
    assert said == 0
    assert np.median(p) > 0.02  # without the simulator's own noise it would be 1e-4
    assert min(p) > 1e-5


def test_a_wrong_model_is_named_with_or_without_a_variance():
    target = noisy_target() + 0.3 * np.sin(5 * T)
    known = bridge.fit(simulator(), target, START, seed=0, variance=SIGMA**2, stop=bridge.Stop(runs=60))
    assert any(w.startswith("The target is not explained: chi-square is") for w in known.warnings)
    assert known.p_value < 1e-10
    unknown = bridge.fit(simulator(), target, START, seed=0, stop=bridge.Stop(runs=60))
    assert any(w.startswith("Residuals are not noise") for w in unknown.warnings)


def test_white_residuals_and_exact_fits_are_not_called_patterns():
    for seed in range(8):
        r = bridge.fit(simulator(), noisy_target(seed), TRUTH, seed=seed, stop=bridge.Stop(runs=60))
        assert not any("not noise" in w for w in r.warnings)
    exact = bridge.fit(simulator(), curve(TRUTH), START, seed=0, stop=bridge.Stop(runs=100))
    assert not any("not noise" in w for w in exact.warnings)


def test_the_output_that_is_to_blame_is_named():
    target = noisy_target()
    target[17] += 3.0
    r = bridge.fit(simulator(), target, START, seed=0, variance=SIGMA**2, stop=bridge.Stop(runs=60))
    (index, share), *_ = r.largest_shares()
    assert index == (17,)
    assert share > 0.5
    assert any("Output [17] alone is" in w for w in r.warnings)
    told = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert told["largest_shares"][0]["index"] == [17]
    assert told["chi_square"] == r.chi_square
    assert told["dof"] == 27


def test_shares_with_a_covariance_are_of_the_outputs_not_of_what_is_whitened():
    """e V^-1 e elementwise, which adds up to chi-square."""
    covariance = SIGMA**2 * (0.6 ** np.abs(np.subtract.outer(np.arange(30), np.arange(30))))
    target = noisy_target()
    target[3] += 2.0
    r = bridge.fit(simulator(), target, TRUTH, seed=0, variance=covariance, stop=bridge.Stop(runs=60))
    e = r.output - target
    whole = e @ np.linalg.solve(covariance, e)
    assert r.chi_square == pytest.approx(whole, rel=1e-8)
    np.testing.assert_allclose(r.loss_share, e * np.linalg.solve(covariance, e) / whole, rtol=1e-6)
    assert r.largest_shares()[0][0] == (3,)


def test_a_loss_of_ones_own_has_a_loss_and_no_chi_square():
    r = bridge.fit(
        simulator(),
        noisy_target(),
        START,
        seed=0,
        method=bridge.Adam(steps=30),
        misfit=lambda y, t: (y - t).abs().sum(),
    )
    assert r.loss == pytest.approx(np.abs(r.output - noisy_target()).sum())
    assert (r.chi_square, r.dof, r.p_value, r.loss_share) == (None, None, None, None)
    assert str(r).splitlines()[4].startswith("loss ")


def test_every_start_that_is_kept_has_the_loss_of_its_output():
    starts = np.array([START, [1.0, 0.5, 0.0]])
    r = bridge.fit(simulator(), noisy_target(), starts, seed=0, method=bridge.GaussNewton(halving=False))
    for end in r.ends:
        assert end.loss == pytest.approx(0.5 * ((curve(end.parameters) - noisy_target()) ** 2).sum(), rel=1e-9)
    assert r.loss in [end.loss for end in r.ends]


MEANS, SPREAD = np.array([1.0, 0.2]), np.array([[0.04, 0.0186], [0.0186, 0.01]])  # a correlation of 0.93


@pytest.mark.parametrize(
    ("method", "close"),
    [("kriging", 0.05), ("gauss-newton", 0.05), (bridge.Adam(steps=200, scale=(1.0, 0.02)), 0.3)],
    ids=["kriging", "gauss-newton", "adam"],
)
@pytest.mark.parametrize("key", [("b", "a"), "b, a"])
def test_a_prior_of_two_parameters_together_is_the_gaussian_posterior(method, close, key):
    """y = A x + noise: the posterior has precision A^T A / v + P and the mean that belongs to it."""
    A = np.random.default_rng(1).normal(size=(6, 3))
    A[:, 1] = A[:, 0]  # what only the prior tells apart
    y, v = A @ [0.9, 0.4, -1.0], 0.01
    sim = bridge.as_simulator(lambda x: A @ x, names=["a", "b", "c"], natural_scale=[0.1, 0.2, 0.3])
    r = bridge.fit(
        sim,
        y,
        [0.5, 0.5, 0.0],
        seed=0,
        method=method,
        variance=v,
        prior={key: (MEANS[::-1], SPREAD[::-1, ::-1])},
    )
    P, mean = np.zeros((3, 3)), np.append(MEANS, 0.0)
    P[:2, :2] = np.linalg.inv(SPREAD)
    covariance = np.linalg.inv(A.T @ A / v + P)
    posterior = covariance @ (A.T @ y / v + P @ mean)
    error = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(r.standard_error, error, rtol=0.03)
    np.testing.assert_allclose(r.parameters, posterior, atol=close * error.min())
    np.testing.assert_allclose(r.covariance[0, 1], covariance[0, 1], rtol=0.05)
    away = r.parameters - mean
    assert 2 * r.loss == pytest.approx(((r.output - y) ** 2).sum() / v + away @ P @ away)
    assert r.dof == 6 + 2 - 3


def test_a_prior_of_all_parameters_is_that_of_their_names():
    simulator_, target = simulator(), noisy_target()
    C = np.diag([0.01, 0.02, 0.04]) + 0.005
    by_names = {("height", "rate", "slope"): (TRUTH, C)}
    a, b = (bridge.fit(simulator_, target, START, seed=0, variance=SIGMA**2, prior=p) for p in (by_names, (TRUTH, C)))
    np.testing.assert_array_equal(a.parameters, b.parameters)


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ({"height": (1.0, 0.0)}, "standard deviation > 0"),
        ({"height": (1.0, -1.0)}, "standard deviation > 0"),
        ({"height": (np.nan, 1.0)}, "standard deviation > 0"),
        ({"height": 1.0}, r"= \(mean, standard deviation\), or"),
        ({"hieght": (1.0, 1.0)}, "hieght"),
        ({("height", "rate"): ([1.0, 1.0], [[1.0, 2.0], [2.0, 1.0]])}, "positive definite"),
        ({("height", "rate"): ([1.0, 1.0], [[1.0, 0.1], [0.2, 1.0]])}, "symmetric"),
        ({("height", "rate"): ([1.0], np.eye(2))}, r"means of shape \(2,\)"),
        ({("height", "rate"): ([1.0, 2.0], 1.0)}, r"covariance \(2, 2\)"),
        ({("height", "height"): ([1.0, 2.0], np.eye(2))}, "each parameter once"),
        ({"height": (1.0, 1.0), "height, rate": ([1.0, 2.0], np.eye(2))}, "each parameter once"),
        ((TRUTH, np.eye(2)), r"covariance \(3, 3\)"),
    ],
)
def test_a_prior_that_is_none_is_told(prior, words):
    with pytest.raises(bridge.InputError, match=words):
        bridge.fit(simulator(), noisy_target(), START, seed=0, variance=SIGMA**2, prior=prior)


def test_a_start_that_fits_better_than_the_end_is_told():
    """A disc leaves the picture by a first scale of 1, guessed since the start is 0: all of the target is missed."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]

    def disc(p):
        return ((x - p[0]) ** 2 + (y - p[1]) ** 2 < p[2] ** 2).astype(int)

    target = disc([0.1, -0.2, 0.5])
    lost = bridge.fit(disc, target, [0.0, 0.0, 0.4], seed=0, stop=60)
    assert lost.loss == 0.5 * target.sum()
    assert any(w.startswith("The start fits better") and "52.5" in w for w in lost.warnings)
    bounded = bridge.as_simulator(disc, names=["x", "y", "r"], bounds=[(-1, 1), (-1, 1), (0.05, 1)])
    found = bridge.fit(bounded, target, [0.0, 0.0, 0.4], seed=0, stop=60)
    assert not any(w.startswith("The start fits better") for w in found.warnings)
    exact = bridge.fit(simulator(), curve(TRUTH), TRUTH, seed=0)
    assert not any(w.startswith("The start fits better") for w in exact.warnings)
