"""Estimators against quadrature and closed forms: no randomness, 1e-9."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError
from bridge.estimators.distributions import get_distribution
from bridge.testing import Quadrature

NAMES = ["gaussian", "logistic", "gumbel", "cauchy", "laplace", "triangular"]
X, GAMMA = 0.37, 0.6


def smooth_exactly(f, d, name, rule, **kwargs):
    density = get_distribution(name)
    sim = bridge.as_simulator(f, vectorized=True)
    return bridge.smooth(
        sim, seed=0, distribution=name, points=rule, num_samples=rule.size(density, d), covariate="none", **kwargs
    )


@pytest.mark.parametrize("name", NAMES)
def test_moments_of_the_score(name):
    density, (e, w) = get_distribution(name), Quadrature(80).line(get_distribution(name))
    s = density.score(e)
    assert np.sum(w) == pytest.approx(1, abs=1e-12)
    assert np.sum(w * s) == pytest.approx(0, abs=1e-12)
    assert np.sum(w * s * e) == pytest.approx(1, abs=1e-11)
    if np.isfinite(density.fisher_information):
        assert np.sum(w * s * s) == pytest.approx(density.fisher_information, abs=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep", [0.0, 1e4], ids=["streamed", "kept"])
def test_one_dimension_smooth_function(name, keep):
    """d/dx E[f(x + g e)] = E[f'], d/dg = E[f' e]: integration without scores is the independent truth."""

    def f(x):
        return np.stack([np.tanh(1.3 * x[:, 0] + 0.4), 1 / (1 + (x[:, 0] - 0.2) ** 2)], axis=1)

    def slope(x):
        return np.stack([1.3 / np.cosh(1.3 * x + 0.4) ** 2, -2 * (x - 0.2) / (1 + (x - 0.2) ** 2) ** 2], axis=1)

    e, w = Quadrature(120).line(get_distribution(name))
    at = X + GAMMA * e
    with np.errstate(over="ignore"):
        truth = (w[:, None] * f(at[:, None])).sum(0)
        truth_x = (w[:, None] * slope(at)).sum(0)
        truth_g = (w[:, None] * slope(at) * np.where(np.isfinite(e), e, 0)[:, None]).sum(0)
    smoothed = smooth_exactly(f, 1, name, Quadrature(60), memory=bridge.Memory(keep_mb=keep))
    theta = torch.tensor([X], dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(GAMMA, dtype=torch.float64, requires_grad=True)
    y = smoothed(theta, scale=gamma)
    np.testing.assert_allclose(y.detach(), truth, atol=1e-9)
    for k in range(2):
        gx, gg = torch.autograd.grad(y[k], (theta, gamma), retain_graph=True)
        assert gx.item() == pytest.approx(truth_x[k], abs=1e-9)
        assert gg.item() == pytest.approx(truth_g[k], abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_step_has_its_closed_form(name):
    """E[1(x + g e > 0)] = 1 - F(-x/g), slope p(-x/g)/g, slope in g: -x p(-x/g)/g^2."""
    density, jump = get_distribution(name), -X / GAMMA
    rule = Quadrature(80, breakpoints=(jump,))
    e, w = rule.line(density)
    smoothed = smooth_exactly(lambda x: (x[:, 0] > 0).astype(float), 1, name, rule)
    theta = torch.tensor([X], dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(GAMMA, dtype=torch.float64, requires_grad=True)
    y = smoothed(theta, scale=gamma)
    gx, gg = torch.autograd.grad(y, (theta, gamma))
    p = float(np.exp(density.log_prob(np.array(jump))))
    assert y.item() == pytest.approx(w[e > jump].sum(), abs=1e-9)
    assert gx.item() == pytest.approx(p / GAMMA, abs=1e-9)
    assert gg.item() == pytest.approx(-X * p / GAMMA**2, abs=1e-9)


SQUARE = np.array([[0.5, 0.21], [-0.13, 0.42]])


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cauchy"])
@pytest.mark.parametrize("lower", [False, True], ids=["full", "lower"])
def test_two_dimensions_with_a_scale_matrix_that_is_not_symmetric(name, lower):
    """d/dx = E[grad f], d/dL = E[grad f eps^T] (Theorem 7), truth without scores."""
    A = np.array([[0.9, -0.4], [0.3, 0.8], [-0.5, 0.6]])

    def f(x):
        return np.tanh(x @ A.T)

    x, L = np.array([0.2, -0.3]), np.tril(SQUARE) if lower else SQUARE
    rule, density = Quadrature(16), get_distribution(name)
    fine = Quadrature(22)
    nodes = fine.nodes(density, fine.size(density, 2), 2, np.random.default_rng(0))
    at = x + nodes.eps @ L.T
    slope = (1 - np.tanh(at @ A.T) ** 2)[:, :, None] * A  # (n, m, d)
    w = nodes.weight
    truth_J = np.einsum("n,nmd->md", w, slope)
    truth_L = np.einsum("n,nmd,ne->mde", w, slope, nodes.eps)
    smoothed = smooth_exactly(f, 2, name, rule)
    theta = torch.tensor(x, requires_grad=True)
    tensor = torch.tensor(SQUARE, requires_grad=True)
    scale = bridge.LowerTriangular(tensor) if lower else tensor
    y = smoothed(theta, scale=scale)
    np.testing.assert_allclose(y.detach(), w @ f(at), atol=1e-9)
    for k in range(3):
        gx, gL = torch.autograd.grad(y[k], (theta, tensor), retain_graph=True)
        np.testing.assert_allclose(gx, truth_J[k], atol=1e-9)
        np.testing.assert_allclose(gL, np.tril(truth_L[k]) if lower else truth_L[k], atol=1e-9)
    estimate = smoothed.estimate(theta, scale=scale)
    np.testing.assert_allclose(estimate.jacobian(), truth_J, atol=1e-9)
    t = np.array([0.3, -1.1])
    np.testing.assert_allclose(estimate.jvp(torch.tensor(t)), truth_J @ t, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_two_dimensions_diagonal_scale(name):
    def f(x):
        a, b = np.tanh(0.9 * x[:, 0]), np.tanh(0.8 * x[:, 1] - 0.3)
        return np.stack([a + b, a * b], axis=1)

    def slope(x):
        a, b = np.tanh(0.9 * x[:, 0]), np.tanh(0.8 * x[:, 1] - 0.3)
        da, db = 0.9 * (1 - a * a), 0.8 * (1 - b * b)
        return np.stack([np.stack([da, db], axis=1), np.stack([da * b, a * db], axis=1)], axis=1)

    x, sd = np.array([0.2, -0.3]), np.array([0.5, 0.3])
    rule, density = Quadrature(18), get_distribution(name)
    nodes = rule.nodes(density, rule.size(density, 2), 2, np.random.default_rng(0))
    at = x + nodes.eps * sd
    smoothed = smooth_exactly(f, 2, name, rule)
    theta, scale = torch.tensor(x, requires_grad=True), torch.tensor(sd, requires_grad=True)
    y = smoothed(theta, scale=scale)
    v = torch.tensor([0.7, -1.2], dtype=torch.float64)
    gx, gs = torch.autograd.grad(y, (theta, scale), v)
    np.testing.assert_allclose(gx, np.einsum("n,nmd,m->d", nodes.weight, slope(at), v), atol=1e-9)
    np.testing.assert_allclose(gs, np.einsum("n,nmd,nd,m->d", nodes.weight, slope(at), nodes.eps, v), atol=1e-9)


def test_relu_has_its_closed_form():
    """E[relu(x + g e)] = x Phi(z) + g phi(z) with z = x/g, Gaussian; slope Phi(z)."""
    from scipy import stats

    rule = Quadrature(80, breakpoints=(-X / GAMMA,))
    relu = smooth_exactly(lambda x: np.maximum(x[:, 0], 0), 1, "gaussian", rule, scale=GAMMA)
    theta = torch.tensor([X], dtype=torch.float64, requires_grad=True)
    y = relu(theta)
    (g,) = torch.autograd.grad(y, theta)
    z = X / GAMMA
    assert y.item() == pytest.approx(X * stats.norm.cdf(z) + GAMMA * stats.norm.pdf(z), abs=1e-9)
    assert g.item() == pytest.approx(stats.norm.cdf(z), abs=1e-9)


def test_gumbel_argmax_is_softmax():
    """E[one-hot argmax(x + e)] = softmax(x) under Gumbel noise, and its Jacobian; RQMC, within its own scatter."""

    def f(x):
        return np.eye(3)[np.argmax(x, axis=1)]

    x = torch.tensor([0.3, -0.2, 0.6], dtype=torch.float64)
    smoothed = bridge.smooth(bridge.as_simulator(f, vectorized=True), seed=1, num_samples=1024, distribution="gumbel")
    estimate = smoothed.estimate(x.expand(32, 3))
    p = torch.softmax(x, 0)
    values, jacobians = estimate.value, estimate.jacobian()
    truth = torch.diag(p) - torch.outer(p, p)
    for samples, exact in ((values, p), (jacobians, truth)):
        error = samples.std(0) / 32**0.5
        assert ((samples.mean(0) - exact).abs() < 5 * error).all()
        assert (error < 0.01).all()


def test_a_uniform_density_is_refused_by_name_and_by_quadrature():
    class Uniform(bridge.Distribution):
        def icdf(self, u):
            return 2 * u - 1

        def log_prob(self, e):
            return np.where(np.abs(e) < 1, -np.log(2.0), -np.inf)

    with pytest.raises(InputError, match="absolutely continuous"):
        get_distribution("uniform")
    with pytest.raises(InputError, match=r"E\[s e\] = 1"):
        get_distribution(Uniform())


def test_a_density_of_ones_own_needs_only_icdf_and_log_prob():
    class MyLogistic(bridge.Distribution):
        def icdf(self, u):
            return np.log(u) - np.log1p(-u)

        def log_prob(self, e):
            return -np.abs(e) - 2 * np.log1p(np.exp(-np.abs(e)))

    theirs, ours = (
        bridge.smooth(np.tanh, seed=3, num_samples=64, distribution=kind).estimate(torch.tensor([0.2]).double())
        for kind in (MyLogistic(), "logistic")
    )
    np.testing.assert_allclose(theirs.jacobian(), ours.jacobian(), rtol=1e-7)
