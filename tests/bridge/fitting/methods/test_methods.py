"""The methods of `bridge.fit` and their options: closed forms first, then what each promises, then bits."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import bridge
from bridge.errors import InputError
from bridge.fitting.blur import make_blur, make_blur_schedule, stage_at
from bridge.fitting.methods.first_order import Mover, make_optimiser
from bridge.fitting.methods.natural import LossAndSquare, natural_step
from bridge.fitting.misfit import Misfit
from bridge.fitting.normal import leverages, of_robust
from bridge.fitting.prior import Prior
from bridge.fitting.robust import Huber, make_robust
from bridge.fitting.target import checked_noise
from tests.lab.fits import START, TRUTH, decay, killed_and_resumed, named

RNG = np.random.default_rng(4)
A = RNG.normal(size=(30, 3))


def linear(theta):
    return A @ theta


def flat(d):
    return Prior(np.zeros((d, d)), np.zeros(d))


# --- robust losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["huber", "cauchy", "soft-l1"])
def test_a_robust_loss_is_what_its_derivatives_say(name):
    loss = make_robust(name)
    r = np.concatenate([np.linspace(-6, 6, 101) + 0.013, [1e-9]])
    h = 1e-5
    slope = (loss.rho(r + h) - loss.rho(r - h)) / (2 * h)
    np.testing.assert_allclose(loss.weight(r) * r, slope, atol=1e-8)
    psi = lambda x: loss.weight(x) * x  # noqa: E731
    smooth = np.abs(np.abs(r) - loss.width) > 1e-3
    np.testing.assert_allclose(loss.curvature(r)[smooth], ((psi(r + h) - psi(r - h)) / (2 * h))[smooth], atol=1e-6)
    np.testing.assert_allclose(loss.rho(np.array([1e-4])), 0.5e-8, rtol=1e-6)
    # Weighted least squares at r0 touch the loss from above: what makes each reweighting a step down.
    for r0 in (0.3, 2.0, 7.0):
        above = 0.5 * loss.weight(np.array(r0)) * (r**2 - r0**2) + loss.rho(np.array(r0))
        assert (above >= loss.rho(r) - 1e-12).all()


@pytest.mark.parametrize("name", ["huber", "cauchy", "soft-l1"])
def test_robust_widths_keep_95_per_cent_of_the_efficiency(name):
    loss = make_robust(name)

    def mean(function):
        return integrate.quad(
            lambda x: float(function(np.array(x))) * stats.norm.pdf(x), -10, 10, points=[-loss.width, loss.width]
        )[0]

    b, a = mean(loss.curvature), mean(lambda x: (loss.weight(x) * x) ** 2)
    assert b**2 / a == pytest.approx(0.95, abs=2e-4)


def test_the_sandwich_of_squares_is_that_of_their_jackknife():
    """With a width beyond all residuals Huber's loss is least squares: a / b^2 = mean (r / (1 - h))^2."""
    r = RNG.normal(size=30)
    normal = A.T @ A
    hat = np.diag(A @ np.linalg.inv(normal) @ A.T)
    expected = ((r / (1 - hat)) ** 2).mean()
    covariance = of_robust(normal, A, r, Huber(100.0), np.zeros(3))
    np.testing.assert_allclose(covariance, np.linalg.inv(normal) * expected, rtol=1e-10)
    one = np.stack([np.ones(30), np.zeros(30)], axis=1)
    idle = of_robust(one.T @ one, one, r, Huber(100.0), np.zeros(2))
    assert idle[0, 0] == pytest.approx((r @ r) / 30 / (29 / 30) ** 2 / 30)
    assert np.isinf(idle[1, 1])


def test_leverages_are_the_hat_matrix_of_the_weighted_fit():
    weight = RNG.uniform(0.1, 1, size=30)
    root = np.sqrt(weight)[:, None] * A
    h = leverages(A, weight, np.zeros((3, 3)))
    np.testing.assert_allclose(h, np.diag(root @ np.linalg.pinv(root)), rtol=1e-9)
    assert h.sum() == pytest.approx(3)
    assert leverages(A, weight, 1e6 * np.eye(3)).sum() < 1e-3
    idle = np.concatenate([A, np.zeros((30, 1))], axis=1)
    np.testing.assert_allclose(leverages(idle, weight, np.zeros((4, 4))), h, rtol=1e-9)


@pytest.mark.parametrize(("m", "share"), [(12, 0.1), (12, 0.0), (100, 0.1), (100, 0.0)])
def test_robust_intervals_of_the_exact_estimate_cover_with_few_numbers_and_many(m, share):
    """Without the leverages it is 0.905 and 0.920 with 12 numbers."""
    x, loss, rng, refits = np.linspace(0, 3, m), make_robust("huber"), np.random.default_rng(3), 1500
    J = np.stack([np.exp(-1.2 * x), -2 * x * np.exp(-1.2 * x), np.ones(m)], axis=1)
    covered = 0
    for _ in range(refits):
        noise = rng.normal(size=m) * np.where(rng.uniform(size=m) < share, 10, 1)
        theta = np.zeros(3)
        for _ in range(40):
            w = loss.weight(J @ theta - noise)
            theta = np.linalg.solve((J.T * w) @ J, (J.T * w) @ noise)
        error = np.sqrt(np.diag(of_robust(J.T @ J, J, J @ theta - noise, loss, np.zeros(3))))
        covered += int((np.abs(theta) < 1.96 * error).sum())
    assert 0.935 <= covered / (3 * refits) <= 0.975, covered / (3 * refits)


def robust_solution(loss, target, sigma):
    """By iterations to the end: the estimate of a linear model."""
    x = np.zeros(3)
    for _ in range(200):
        w = loss.weight((A @ x - target) / sigma)
        x = np.linalg.solve((A.T * w) @ A, (A.T * w) @ target)
    return x


@pytest.mark.parametrize(
    ("method", "runs"),
    [
        ("kriging", 60),
        (bridge.GaussNewton(steps=20, num_samples=16, scale=0.2), None),
        (bridge.Adam(steps=120, num_samples=16, scale=(1.0, 0.01)), None),
    ],
    ids=["kriging", "gauss-newton", "adam"],
)
def test_a_robust_fit_of_a_linear_model_is_the_m_estimate(method, runs):
    rng = np.random.default_rng(1)
    loss = make_robust("soft-l1")
    target = A @ TRUTH + 0.1 * rng.normal(size=30)
    target[:5] += 3.0
    expected = robust_solution(loss, target, 0.1)
    result = bridge.fit(
        linear,
        target,
        [1.5, 1.0, 0.8],
        seed=0,
        variance=0.01,
        misfit=bridge.LeastSquares(robust="soft-l1"),
        method=method,
        stop=runs,
    )
    np.testing.assert_allclose(result.parameters, expected, atol=5e-3)
    plain = bridge.fit(linear, target, [1.5, 1.0, 0.8], seed=0, variance=0.01, stop=bridge.Stop(runs=40))
    assert np.abs(plain.parameters - TRUTH).max() > 5 * np.abs(result.parameters - TRUTH).max()
    r = (A @ result.parameters - target) / 0.1
    sandwich = of_robust(A.T @ A / 0.01, A / 0.1, r, loss, np.zeros(3))
    np.testing.assert_allclose(result.covariance, sandwich, rtol=0.06, atol=2e-6)


def coverage(refits, method, **settings):
    """The share of 95 % intervals that hold the truth; tenfold noise in one number of ten."""
    rng, covered = np.random.default_rng(12), 0
    for seed in range(refits):
        sigma = 0.05 * np.where(rng.uniform(size=25) < 0.1, 10, 1)
        target = decay(TRUTH) + sigma * rng.normal(size=25)
        result = bridge.fit(named(decay), target, TRUTH, seed=seed, method=method, variance=0.05**2, **settings)
        covered += int((np.abs(result.parameters - TRUTH) < 1.96 * result.standard_error).sum())
    return covered / (3 * refits)


def test_robust_intervals_cover_the_truth_in_contaminated_data():
    """Those of least squares with the clean variance do not."""
    method = bridge.GaussNewton(steps=8, num_samples=12, scale=(0.5, 0.1))
    assert 0.90 <= coverage(200, method, misfit=bridge.LeastSquares(robust="huber")) <= 0.98
    assert coverage(30, method) < 0.8


@pytest.mark.slow
def test_robust_intervals_of_kriging_cover_the_truth():
    assert 0.90 <= coverage(200, "kriging", misfit=bridge.LeastSquares(robust="huber"), stop=45) <= 0.98


# --- whitened residuals, priors ---------------------------------------------------------------------------------------


def test_a_covariance_of_the_target_whitens_its_residuals():
    """Generalised least squares: (A^T C^-1 A)^-1 A^T C^-1 t."""
    lag = np.abs(np.arange(30)[:, None] - np.arange(30))
    C = 0.01 * 0.8**lag
    target = A @ TRUTH + np.linalg.cholesky(C) @ np.random.default_rng(2).normal(size=30)
    normal = A.T @ np.linalg.solve(C, A)
    expected = np.linalg.solve(normal, A.T @ np.linalg.solve(C, target))
    for method, runs in (
        ("kriging", 60),
        (bridge.GaussNewton(steps=12, num_samples=8, scale=(0.5, 0.01)), None),
        (bridge.Adam(steps=120, num_samples=8, scale=(1.0, 0.01)), None),
    ):
        result = bridge.fit(linear, target, [1.8, 1.0, 0.6], seed=0, variance=C, method=method, stop=runs)
        np.testing.assert_allclose(result.parameters, expected, atol=0.01)
        np.testing.assert_allclose(result.covariance, np.linalg.inv(normal), rtol=0.05, atol=1e-5)
        np.testing.assert_array_equal(result.output, A @ result.parameters)
    # The same as a map of one's own, in image shape.
    factor = torch.as_tensor(np.linalg.inv(np.linalg.cholesky(C)))
    image = bridge.fit(
        lambda t: linear(t).reshape(5, 6),
        target.reshape(5, 6),
        [1.8, 1.0, 0.6],
        seed=0,
        variance=1.0,
        misfit=bridge.LeastSquares(whiten=lambda x: factor @ x.reshape(-1)),
        stop=bridge.Stop(runs=60),
    )
    np.testing.assert_allclose(image.parameters, expected, atol=0.01)
    assert image.output.shape == (5, 6)


def test_the_loss_of_a_whitened_output_and_its_gradient():
    rng = np.random.default_rng(3)
    root = rng.normal(size=(6, 6))
    C = root @ root.T + np.eye(6)
    target, y = torch.as_tensor(rng.normal(size=6)), torch.as_tensor(rng.normal(size=6))
    variance, whiten, _ = checked_noise(C, None, target, None)
    misfit = Misfit(target, variance, None, Prior(np.array([[4.0]]), np.array([1.0])), whiten)
    value, gradient, slope = misfit.value_and_gradient(y, np.array([1.5]))
    r = (y - target).numpy()
    assert value == pytest.approx(0.5 * r @ np.linalg.solve(C, r) + 0.5 * 4 * 0.25)
    np.testing.assert_allclose(gradient.numpy(), np.linalg.solve(C, r) / 6, rtol=1e-9)
    np.testing.assert_allclose(slope, [4 * 0.5 / 6])


@pytest.mark.parametrize(
    "method",
    [
        bridge.GaussNewton(num_samples=16, scale=0.1),
        bridge.Adam(num_samples=16, scale=(1.0, 0.01)),
        bridge.Natural(num_samples=16, scale=(1.0, 0.005)),
        bridge.Torch(num_samples=16, scale=(1.0, 0.01), optimiser="Adam"),
    ],
    ids=lambda method: method.name,
)
def test_a_prior_is_one_more_observation(method):
    """y = a with variance v and a prior (m, s): precision 1 / v + 1 / s^2; a second parameter has none."""
    sim = bridge.as_simulator(lambda t: np.array([t[0], t[1], t[1]]), names=["a", "b"], natural_scale=[0.1, 0.2])
    result = bridge.fit(sim, [1.0, 2.0, 2.2], [0.5, 1.9], seed=0, variance=0.04, prior={"a": (0.0, 0.1)}, method=method)
    np.testing.assert_allclose(result.parameters, [0.2, 2.1], atol=0.01)
    np.testing.assert_allclose(result.standard_error, [125**-0.5, (2 / 0.04) ** -0.5], rtol=0.02)


def test_a_prior_beside_a_loss_of_ones_own():
    """l = (y - 3)^2 / 2 and a prior of variance 1 about 0: halfway."""
    sim = bridge.as_simulator(lambda t: t, names=["a"])
    result = bridge.fit(
        sim,
        [3.0],
        [0.0],
        seed=0,
        prior={"a": (0.0, 1.0)},
        method=bridge.Adam(num_samples=8, scale=(1.0, 0.01)),
        misfit=lambda y, t: 0.5 * ((y - t) ** 2).sum(),
    )
    assert result.parameters[0] == pytest.approx(1.5, abs=0.02)
    assert result.method == "adam"
    assert result.standard_error is None


def test_a_prior_in_a_fit_with_block_structure():
    """Each parameter acts on outputs of its own: the normal matrix is diagonal, and the prior is added to it."""

    class Blocks:
        space = bridge.as_simulator(lambda t: t, names=["a", "b", "c"]).space
        output_shape = (6,)
        structure = bridge.simulator.protocol.BlockStructure([0, 1, 2], [0, 0, 1, 1, 2, 2])

        def __call__(self, inputs, seeds):
            return np.repeat(inputs, 2, axis=1)

    def fit(method):
        target = np.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
        return bridge.fit(
            Blocks(), target, [0.0, 0.0, 0.0], seed=0, variance=0.5, prior={"b": (0.0, 0.5)}, method=method
        )

    chosen = fit("auto")
    assert (chosen.method, "which outputs" in chosen.method_reason) == ("gauss-newton", True)
    result = fit(bridge.GaussNewton(num_samples=8, scale=(1.0, 0.01)))
    np.testing.assert_allclose(result.parameters, [1.0, 1.0, 3.0], atol=1e-3)
    np.testing.assert_allclose(result.standard_error**2, [1 / 4, 1 / 8, 1 / 4], rtol=0.01)


# --- any optimiser ----------------------------------------------------------------------------------------------------


def test_an_optimiser_gets_the_gradient_and_its_rate_follows_the_scale():
    make = make_optimiser(lambda p: torch.optim.SGD(p, lr=0.5), 1.0, 2)
    mover = Mover(make, (2, 2), first=2.0)
    x, g = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    np.testing.assert_allclose(mover.move(x, g, 2.0, 1.0), x - 0.5 * g)
    np.testing.assert_allclose(mover.move(x, g, 1.0, 1.0), x - 0.25 * g)
    mover.keep(np.array([1]))
    np.testing.assert_allclose(mover.move(x[1:], g[1:], 2.0, 1.0), [[3.0, 4.5]])


@pytest.mark.parametrize(
    "optimiser",
    ["RMSprop", torch.optim.NAdam, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.7, nesterov=True)],
    ids=["name", "class", "function"],
)
def test_any_optimiser_finds_a_linear_solution(optimiser):
    result = bridge.fit(
        linear,
        A @ TRUTH,
        [1.5, 1.0, 0.8],
        seed=0,
        method=bridge.Torch(steps=80, num_samples=8, scale=(1.0, 0.02), optimiser=optimiser),
    )
    assert (result.method, result.method_reason) == ("torch", "as asked")
    np.testing.assert_allclose(result.parameters, TRUTH, atol=0.03)


@pytest.mark.parametrize(
    ("optimiser", "words"),
    [
        (torch.optim.LBFGS, "several values of a loss"),
        ("Adamm", "Known: .*Adam"),
        (lambda p: 3, "makes a int"),
        (torch.optim.SparseAdam, "dense"),
    ],
)
def test_what_is_no_optimiser_of_a_gradient_is_refused(optimiser, words):
    with pytest.raises(InputError, match=words):
        bridge.fit(linear, A @ TRUTH, START, seed=0, method=bridge.Torch(optimiser=optimiser))


# --- natural gradients ------------------------------------------------------------------------------------------------

H = np.array([[3.0, 1.0, 0.2], [1.0, 2.0, -0.3], [0.2, -0.3, 0.5]])
L = np.array([[0.7, 0.0, 0.1], [0.3, 0.5, 0.0], [-0.2, 0.1, 0.9]])
AWAY = np.array([0.4, -0.3, 0.8])


def test_the_natural_step_on_a_quadratic_is_the_closed_form():
    """l = 1/2 z^T H z: dE/dx = H x, dE/dL = H L, var l = |L^T H x|^2 + 1/2 |L^T H L|_F^2.

    In the coordinates x + L delta and L exp(S): -L^T H x and -1/2 L^T H L, over the deviation.
    """
    M = L.T @ H @ L
    deviation = math.sqrt(((L.T @ H @ AWAY) ** 2).sum() + 0.5 * (M**2).sum())
    shift, wider = natural_step(L, H @ AWAY, H @ L, deviation, (1.0, 0.1))
    np.testing.assert_allclose(shift, -L @ L.T @ H @ AWAY / deviation)
    values, vectors = np.linalg.eigh(-0.05 * M / deviation)
    np.testing.assert_allclose(wider, L @ (vectors * np.exp(values)) @ vectors.T)
    # The direction is F^-1 times the gradient, F the Fisher information of N(x, C), which is C^-1 for x.
    np.testing.assert_allclose(shift * deviation, -np.linalg.solve(np.linalg.inv(L @ L.T), H @ AWAY))
    # and C moves by -2 eta/2 C (dE/dC) C with dE/dC = H / 2: to first order in the rate.
    small = natural_step(L, H @ AWAY, H @ L, deviation, (1.0, 1e-6))[1]
    C = L @ L.T
    np.testing.assert_allclose((small @ small.T - C) / 1e-6, -C @ H @ C / deviation, rtol=1e-4, atol=1e-9)


def test_a_diagonal_natural_step_is_the_full_one_where_the_quadratic_is_diagonal():
    scale, h = np.array([0.5, 1.0, 2.0]), np.array([3.0, 1.0, 0.2])
    one = natural_step(scale, h * AWAY, h * scale, 1.7, (1.0, 0.2))
    two = natural_step(np.diag(scale), h * AWAY, np.diag(h * scale), 1.7, (1.0, 0.2))
    np.testing.assert_allclose(one[0], two[0])
    np.testing.assert_allclose(np.diag(one[1]), two[1], atol=1e-12)


def test_the_expected_natural_step_of_the_estimator_is_the_closed_form():
    """Means over independent scrambles, each start with an L of its own; a truth off by a tenth is seen."""
    root, k = np.linalg.cholesky(H), 30
    sim = bridge.as_simulator(lambda t: t @ root, vectorized=True, names=["a", "b", "c"])
    misfit = Misfit(torch.zeros(3, dtype=torch.float64), torch.ones((), dtype=torch.float64), None, flat(3))
    smoothed = bridge.smooth(
        LossAndSquare(sim, misfit, np.ones(3)), seed=0, num_samples=256, points="sobol", covariate="none"
    )
    factors = np.repeat([1.0, 0.5], k)[:, None]
    thetas, scales = torch.as_tensor(factors * AWAY), torch.as_tensor(factors[:, :, None] * L)
    estimate = smoothed.estimate(thetas, scales=scales, scale_gradient=True)
    first = torch.zeros_like(estimate.value)
    first[:, 0] = 1
    gradients = estimate.vjp(first).numpy(), estimate.vjp_scale(first).numpy()
    for f, rows in ((1.0, slice(0, k)), (0.5, slice(k, 2 * k))):
        M = f**2 * L.T @ H @ L
        variance = (f**4 * (L.T @ H @ AWAY) ** 2).sum() + 0.5 * (M**2).sum()
        mean = f**2 * (AWAY @ H @ AWAY + np.trace(L.T @ H @ L)) / 2
        for found, truth in (
            (estimate.value.numpy()[rows], np.array([mean, mean**2 + variance])),
            (gradients[0][rows], f * H @ AWAY),
            (gradients[1][rows], f * H @ L),
        ):
            error = found.std(axis=0, ddof=1) / math.sqrt(k)
            assert (np.abs(found.mean(axis=0) - truth) < 5.5 * error + 1e-3 * np.abs(truth)).all()
            assert (np.abs(found.mean(axis=0) - 1.1 * truth) > 5.5 * error).any()


@pytest.mark.parametrize("full", [True, False])
def test_natural_gradients_converge_and_learn_the_scale(full):
    result = bridge.fit(
        named(decay), decay(TRUTH), START, seed=0, method=bridge.Natural(steps=120, scale=(2.0, 0.02), full_scale=full)
    )
    np.testing.assert_allclose(result.parameters, TRUTH, atol=0.01 if full else 0.05)
    widths = [h.scale for h in result.history]
    assert widths[-1] < 0.05 * widths[0]
    assert result.standard_error is not None


def test_natural_gradients_follow_a_loss_of_ones_own_with_steps():
    """A count of pixels that differ: no derivative anywhere."""
    yy, xx = np.mgrid[0:32, 0:32] + 0.5

    def disc(t):
        return ((xx - t[0]) ** 2 + (yy - t[1]) ** 2 < 64).astype(float)

    result = bridge.fit(
        disc,
        disc([17.0, 13.0]),
        [12.0, 18.0],
        seed=0,
        method=bridge.Natural(steps=60, num_samples=24, scale=(3.0, 0.1)),
        misfit=lambda y, t: (y != t).sum(),
    )
    np.testing.assert_allclose(result.parameters, [17.0, 13.0], atol=0.3)
    assert result.standard_error is None


# --- coarse to fine ---------------------------------------------------------------------------------------------------


def test_a_blur_keeps_what_it_says():
    noise, mean = make_blur(2.0, (3, 12, 15), "noise"), make_blur(2.0, (12, 15), "mean")
    np.testing.assert_allclose(mean(torch.ones(12, 15, dtype=torch.float64)).numpy(), 1.0)
    delta = torch.eye(180, dtype=torch.float64).reshape(180, 12, 15)
    # Variance of each blurred pixel under white noise: the sum of squares of what each source adds.
    np.testing.assert_allclose((noise(delta) ** 2).sum(dim=0).numpy(), 1.0)
    line = make_blur(1.5, (40,), "mean")(torch.eye(40, dtype=torch.float64)[20])
    np.testing.assert_allclose(line.numpy()[12:29], stats.norm.pdf(np.arange(-8, 9), scale=1.5), rtol=1e-3, atol=1e-8)


def test_stages_end_with_none_and_share_four_fifths_of_the_steps():
    stages = make_blur_schedule([4.0, lambda x: x[::2]], (8,), "noise")
    assert len(stages) == 3
    assert stages[-1] is None
    assert len(make_blur_schedule([4.0, 0], (8,), "noise")) == 2
    assert [stage_at(3, step, 21) for step in (0, 5, 6, 10, 11, 20)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    "method",
    [
        bridge.GaussNewton(steps=60, num_samples=8, scale=1.0),
        bridge.Adam(steps=100, num_samples=8, scale=1.0, learning_rate=1.0),
    ],
    ids=lambda method: method.name,
)
def test_coarse_to_fine_finds_what_fine_alone_does_not(method):
    """Two narrow bumps that do not meet: without a blur nothing says where to go."""
    x = np.arange(120.0)

    def bump(t):
        return np.exp(-0.5 * ((x - t[0]) / 2.0) ** 2)

    fine = bridge.fit(bump, bump([80.0]), [40.0], seed=0, method=method)
    coarse = bridge.fit(bump, bump([80.0]), [40.0], seed=0, method=replace(method, blur=[20, 10, 5]))
    assert abs(fine.parameters[0] - 80) > 10
    assert abs(coarse.parameters[0] - 80) < 0.5


# --- several starts ---------------------------------------------------------------------------------------------------


def wells(t):
    """Minima of |f|^2 near 1 (exact), -1 and 3 (not)."""
    return np.array([np.sin(0.5 * np.pi * (t[0] - 1)) * 2, 0.4 * (t[0] - 1)])


@pytest.mark.parametrize(
    "kind",
    [bridge.GaussNewton, bridge.Adam, bridge.Natural, functools.partial(bridge.Torch, optimiser="Adam")],
    ids=["gauss-newton", "adam", "natural", "torch"],
)
def test_of_several_starts_the_best_is_found_and_all_are_told(kind):
    calls = []

    class Counted:
        space = bridge.as_simulator(wells, names=["a"], bounds=[(-6, 8)]).space
        output_shape = (2,)

        def __call__(self, inputs, seeds):
            calls.append(len(inputs))
            return np.stack([wells(t) for t in inputs])

    starts = [{"a": -5.2}, {"a": 7.0}, {"a": 1.6}, {"a": -3.0}]
    method = kind(steps=24, num_samples=8, scale=(0.3, 0.05), tolerance=0.0)
    result = bridge.fit(Counted(), [0.0, 0.0], starts, seed=0, method=method)
    assert sum(calls) == result.num_evaluations
    assert abs(result.parameters[0] - 1) < 0.1
    assert result.start[0] == 1.6
    assert [e.start[0] for e in result.ends] == [-5.2, 7.0, 1.6, -3.0]
    assert sorted(e.steps for e in result.ends) == [5, 5, 11, 24]
    assert result.ends[2].steps == 24
    assert [h.num_evaluations for h in result.history][:2] == [32, 64]
    assert any("dropped" in h.note for h in result.history)
    kept = bridge.fit(Counted(), [0.0, 0.0], starts, seed=0, method=replace(method, halving=False))
    assert [e.steps for e in kept.ends] == [24] * 4
    assert kept.history[-1].num_evaluations == 24 * 32
    # A start among others goes as it would alone, but for its noise.
    alone = bridge.fit(Counted(), [0.0, 0.0], starts[0], seed=0, method=method)
    assert kept.ends[0].loss == pytest.approx(alone.loss, rel=1e-12)


def test_starts_are_drawn_in_the_bounds_and_kriging_runs_them_first():
    seen = []

    def simulator(t):
        seen.append(t.copy())
        return np.array([wells(t[:1])[0], wells(t[:1])[1], t[1]])

    sim = bridge.as_simulator(simulator, names=["a", "b"], bounds=[(-6, 8), (-math.inf, math.inf)])
    result = bridge.fit(sim, [0.0, 0.0, 0.5], bridge.Starts(6, [-5.2, 0.0]), seed=3, stop=bridge.Stop(runs=40))
    first = np.array(seen[: result.history[0].num_evaluations])
    assert len(first) >= 6
    np.testing.assert_array_equal(first[0], [-5.2, 0.0])
    assert (np.abs(first[:6, 0] - 1) <= 7).all()
    assert np.ptp(first[:6, 0]) > 5
    np.testing.assert_allclose(result.parameters, [1.0, 0.5], atol=0.05)
    assert result.ends == ()
    several = bridge.fit(
        sim,
        [0.0, 0.0, 0.5],
        bridge.Starts(3, np.array([[-5.2, 0.0], [1.5, 0.0]])),
        seed=3,
        method=bridge.GaussNewton(steps=12, num_samples=8, scale=0.3),
    )
    assert len(several.ends) == 3


# --- enough is known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        bridge.Kriging(),
        bridge.GaussNewton(num_samples=8, scale=(1.0, 0.1)),
        bridge.Adam(steps=120, num_samples=8, scale=(1.0, 0.1)),
    ],
    ids=lambda method: method.name,
)
def test_a_fit_stops_where_the_standard_errors_are_those_asked_for(method):
    rng = np.random.default_rng(5)
    target = decay(TRUTH) + 0.05 * rng.normal(size=25)

    def fit(method, **settings):
        return bridge.fit(
            named(decay), target, [1.6, 0.9, 0.5], seed=0, variance=0.05**2, fixed=["b"], method=method, **settings
        )

    longer = replace(method, tolerance=0.0)
    whole, early = fit(longer), fit(longer, stop=bridge.Stop(error={"a": 0.3, "rate": 0.4}))
    assert early.stop_reason == "standard_error"
    assert early.num_evaluations < whole.num_evaluations
    assert (np.abs(early.parameters - whole.parameters) < [0.075, 0.1, 1e-12]).all()
    told = early.history[-1].standard_error
    assert told[2] == 0
    assert told[0] <= 0.3
    assert told[1] <= 0.4
    # Errors that the data do not give are never reached.
    never = fit(method, stop=bridge.Stop(runs=150, error=1e-4))
    assert never.stop_reason != "standard_error"


# --- all at once, and nothing in silence ------------------------------------------------------------------------------


def absolute(y, t):
    return (y - t).abs().sum()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"misfit": bridge.LeastSquares(robust="huber")}, r"variance= with LeastSquares\(robust=\)"),
        ({"misfit": bridge.LeastSquares(robust="tukey"), "variance": 1.0}, "Known: huber, cauchy, soft-l1"),
        ({"misfit": bridge.LeastSquares(robust=("huber", -1.0)), "variance": 1.0}, "positive width"),
        ({"misfit": absolute, "variance": 1.0}, "no variance= with a loss of your own"),
        ({"misfit": bridge.LeastSquares(variance=2.0), "variance": 1.0}, "the variance once"),
        ({"misfit": absolute, "method": "kriging"}, r"trust-region, adam, torch,? (or )?natural"),
        ({"misfit": absolute, "stop": bridge.Stop(error=0.1)}, r"least squares with Stop\(error=\)"),
        ({"misfit": absolute, "method": "adam", "stop": bridge.Stop(error=0.1)}, r"least squares with Stop\(error=\)"),
        (
            {"method": "natural", "stop": bridge.Stop(error=0.1)},
            r"kriging or gauss-newton or adam or torch with Stop\(error=\), got natural",
        ),
        ({"method": bridge.Natural(distribution="cauchy")}, "Gaussian noise"),
        ({"method": bridge.GaussNewton(blur=[-2])}, "0 or more in blur="),
        ({"method": bridge.Adam(blur=[lambda x: x**2])}, "blur to be linear"),
        ({"misfit": bridge.LeastSquares(whiten=lambda x: x + 1)}, "whiten to be linear"),
        ({"misfit": bridge.LeastSquares(whiten=lambda x: torch.fft.fft(x))}, "view_as_real"),
        ({"misfit": bridge.LeastSquares(whiten=lambda x: x[None, 30])}, "got IndexError"),
        ({"variance": -np.eye(25)}, "positive definite"),
        ({"variance": np.ones((5, 5))}, r"covariance of all numbers, \(25, 25\)"),
        ({"method": "torch"}, r"Give method=bridge\.Torch\(optimiser='SGD'\)"),
        ({"stop": bridge.Stop(error={"c": 1.0})}, "Unknown parameter|Expected one of"),
        ({"start": bridge.Starts(1, [START, START])}, r"at least the 2 starts that are given, got Starts\(1, \.\.\.\)"),
        ({"start": np.zeros((2, 3, 4))}, r"\(k, d\) for several"),
        ({"start": [START, [1.0, 1.0, 0.1]], "fixed": ["b"]}, "one value of 'b'"),
        ({"method": "adam", "start": bridge.Starts(2, START), "stop": 60}, r"at least 163 runs.*Stop\(runs=60\)"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        bridge.fit(named(decay), decay(TRUTH), **{"start": START, "seed": 0, **settings})


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (bridge.Kriging, {"blur": [2]}),
        (bridge.Kriging, {"halving": False}),
        (bridge.Adam, {"optimiser": "SGD"}),
        (bridge.Adam, {"full_scale": True}),
        (bridge.Adam, {"restarts": 3}),
        (bridge.GaussNewton, {"learning_rate": 0.1}),
        (bridge.Natural, {"blur": [2]}),
        (bridge.CustomLoss, {"function": absolute, "robust": "huber"}),
    ],
)
def test_a_setting_of_others_is_none_of_the_object(kind, setting):
    with pytest.raises(InputError, match=f"Unknown argument '{list(setting)[-1]}'"):
        kind(**setting)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bridge.Stop(error=-1.0), "positive standard errors in error=, got -1.0"),
        (lambda: bridge.Stop(error={"a": "0.1"}), "positive standard errors"),
        (lambda: bridge.Starts(0, START), "positive number of starts, got 0"),
        (lambda: bridge.CustomLoss(3), "a loss as a function of output and target, got 3"),
    ],
)
def test_an_object_says_at_once_what_it_cannot_be_made_of(make, words):
    with pytest.raises(InputError, match=words):
        make()


SPIKED = decay(TRUTH) + 2.0 * (np.arange(25) == 7)
COMBINED = {
    "kriging": {
        "misfit": bridge.LeastSquares(robust="huber"),
        "variance": 0.01,
        "stop": bridge.Stop(runs=40, error=1e-3),
        "method": "kriging",
    },
    "natural": {
        "misfit": bridge.LeastSquares(robust="cauchy"),
        "variance": 0.01,
        "method": bridge.Natural(steps=10, num_samples=8),
    },
    "torch": {
        "prior": {"b": (0.5, 0.2)},
        "method": bridge.Torch(steps=10, num_samples=8, blur=[3, 1], optimiser="AdamW"),
    },
    "adam": {
        "misfit": bridge.LeastSquares(whiten=lambda x: x[1:] - x[:-1]),
        "method": bridge.Adam(steps=10, num_samples=8, blur=[3]),
    },
    "gauss-newton": {
        "misfit": bridge.LeastSquares(robust=("soft-l1", 2.0)),
        "variance": 0.01,
        "prior": {"a": (2.0, 0.5)},
        "fixed": ["b"],
        "stop": bridge.Stop(error=1e-3),
        "method": bridge.GaussNewton(steps=10, num_samples=8, blur=[2]),
    },
}


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_fit_by_a_trust_region_killed_between_two_steps_ends_bitwise_the_same(tmp_path, at):
    def fit(run, **more):
        return bridge.fit(
            named(decay),
            SPIKED,
            bridge.Starts(3, START),
            seed=0,
            misfit=lambda y, t: ((y - t) ** 2).mean(),
            prior={"b": (0.5, 3.0)},
            stop=60,
            run=run,
            **more,
        )

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert resumed.history == whole.history
    assert resumed.output.tobytes() == whole.output.tobytes()
    assert (whole.method, whole.num_evaluations <= 60) == ("trust-region", True)


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("at", [0, 2])
def test_a_fit_of_any_kind_killed_between_two_steps_ends_bitwise_the_same(tmp_path, name, at):
    def fit(run, **more):
        return bridge.fit(named(decay), SPIKED, bridge.Starts(3, START), seed=0, run=run, **COMBINED[name], **more)

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert resumed.history == whole.history
    assert [e.parameters.tobytes() for e in resumed.ends] == [e.parameters.tobytes() for e in whole.ends]
    assert len(whole.ends) == (0 if name == "kriging" else 3)
    assert whole.method == name


def test_a_run_is_not_gone_on_with_under_another_optimiser(tmp_path):
    def fit(optimiser):
        return bridge.fit(
            named(decay),
            decay(TRUTH),
            START,
            seed=0,
            method=bridge.Torch(steps=3, num_samples=4, optimiser=optimiser),
            run=tmp_path,
        )

    fit(lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(InputError, match="optimiser was"):
        fit(lambda p: torch.optim.SGD(p, lr=0.2))


def test_auto_says_what_it_took_and_why():
    result = bridge.fit(named(decay), decay(TRUTH), START, seed=0, stop=bridge.Stop(runs=8))
    assert result.method == "kriging"
    assert result.history[0].note.endswith(f"kriging: {result.method_reason}")
    assert result.to_dict()["method_reason"] == result.method_reason
    many = bridge.fit(lambda t: t, np.zeros(201), np.ones(201), seed=0, stop=bridge.Stop(runs=150))
    assert (many.method, "201 parameters" in many.method_reason) == ("gauss-newton", True)
    losing = bridge.fit(named(decay), decay(TRUTH), START, seed=0, misfit=absolute, stop=20)
    assert (losing.method, "a loss of one's own" in losing.method_reason) == ("trust-region", True)


def test_a_job_file_and_the_command_line_take_them(tmp_path, capsys):
    from bridge.cli.main import main
    from bridge.registry import register

    @register("test-fit-methods-decay")
    def make():
        return named(decay, output_shape=(25,))

    np.save(tmp_path / "target.npy", SPIKED)
    (tmp_path / "job.toml").write_text(
        """
        [simulator]
        name = "test-fit-methods-decay"
        [target]
        file = "target.npy"
        [start]
        a = 1.6
        rate = 0.9
        b = 0.7
        [fit]
        seed = 0
        starts = 2
        method = { name = "gauss-newton", steps = 12, num_samples = 8, blur = [2] }
        variance = 0.01
        misfit = { robust = ["huber", 1.5] }
        prior = { b = [0.5, 0.3] }
        stop = { error = { a = 1e-6 } }
        """,
        encoding="utf-8",
    )
    out = tmp_path / "out"
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q"]) == 0
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q", "--method", "kriging"]) == 2
    assert "method was 'gauss-newton', is 'kriging'" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q", "--reuse", str(tmp_path)]) == 2
    assert "Expected method kriging with --reuse, got GaussNewton(" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q", "--fresh", "--max-runs", "60"]) == 0
    said = json.loads((out / "parameters.json").read_text())
    assert (said["method"], said["stop_reason"]) == ("gauss-newton", "max_runs")
    assert len(said["ends"]) == 2
    assert said["num_evaluations"] <= 60
