"""The methods of `bridge.fit` and their options: closed forms first, then what each promises, then bits."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

import bridge
from bridge.errors import InputError
from bridge.fitting.blur import make_blur, make_blur_schedule, stage_at
from bridge.fitting.methods.first_order import TorchMover, make_optimiser
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


@pytest.mark.parametrize("method", ["kriging", "gauss-newton", "adam"])
def test_a_robust_fit_of_a_linear_model_is_the_m_estimate(method):
    rng = np.random.default_rng(1)
    loss = make_robust("soft-l1")
    target = A @ TRUTH + 0.1 * rng.normal(size=30)
    target[:5] += 3.0
    expected = robust_solution(loss, target, 0.1)
    settings = {
        "kriging": {"max_runs": 60},
        "gauss-newton": {"num_samples": 16, "steps": 20, "scale": 0.2},
        "adam": {"num_samples": 16, "steps": 120, "scale": (1.0, 0.01)},
    }[method]
    result = bridge.fit(
        linear,
        target,
        [1.5, 1.0, 0.8],
        seed=0,
        variance=0.01,
        method=method,
        misfit=bridge.LeastSquares(robust="soft-l1"),
        **settings,
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
    settings = {"steps": 8, "num_samples": 12, "scale": (0.5, 0.1)}
    assert 0.90 <= coverage(200, "gauss-newton", robust="huber", **settings) <= 0.98
    assert coverage(30, "gauss-newton", **settings) < 0.8


@pytest.mark.slow
def test_robust_intervals_of_kriging_cover_the_truth():
    assert 0.90 <= coverage(200, "kriging", robust="huber", max_runs=45) <= 0.98


# --- whitened residuals, priors ---------------------------------------------------------------------------------------


def test_a_covariance_of_the_target_whitens_its_residuals():
    """Generalised least squares: (A^T C^-1 A)^-1 A^T C^-1 t."""
    lag = np.abs(np.arange(30)[:, None] - np.arange(30))
    C = 0.01 * 0.8**lag
    target = A @ TRUTH + np.linalg.cholesky(C) @ np.random.default_rng(2).normal(size=30)
    normal = A.T @ np.linalg.solve(C, A)
    expected = np.linalg.solve(normal, A.T @ np.linalg.solve(C, target))
    for settings in (
        {"method": "kriging", "max_runs": 60},
        {"method": "gauss-newton", "num_samples": 8, "steps": 12, "scale": (0.5, 0.01)},
        {"method": "adam", "num_samples": 8, "steps": 120, "scale": (1.0, 0.01)},
    ):
        result = bridge.fit(linear, target, [1.8, 1.0, 0.6], seed=0, variance=C, **settings)
        np.testing.assert_allclose(result.parameters, expected, atol=0.01)
        np.testing.assert_allclose(result.covariance, np.linalg.inv(normal), rtol=0.05, atol=1e-5)
        np.testing.assert_array_equal(result.output, A @ result.parameters)
    # The same as a map of one's own, in image shape.
    factor = torch.as_tensor(np.linalg.inv(np.linalg.cholesky(C)))
    image = bridge.fit(lambda t: linear(t).reshape(5, 6), target.reshape(5, 6), [1.8, 1.0, 0.6], seed=0, variance=1.0, misfit=bridge.LeastSquares(whiten=lambda x: factor @ x.reshape(-1)), stop=bridge.Stop(runs=60))  # fmt: skip
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


@pytest.mark.parametrize("method", ["gauss-newton", "adam", "natural", "torch"])
def test_a_prior_is_one_more_observation(method):
    """y = a with variance v and a prior (m, s): precision 1 / v + 1 / s^2; a second parameter has none."""
    sim = bridge.as_simulator(lambda t: np.array([t[0], t[1], t[1]]), names=["a", "b"], natural_scale=[0.1, 0.2])
    scale = {"gauss-newton": 0.1, "natural": (1.0, 0.005)}.get(method, (1.0, 0.01))
    more = {"optimiser": "Adam"} if method == "torch" else {}
    result = bridge.fit(
        sim, [1.0, 2.0, 2.2], [0.5, 1.9], seed=0, method=method, variance=0.04, prior={"a": (0.0, 0.1)},
        num_samples=16, scale=scale, **more,
    )  # fmt: skip
    np.testing.assert_allclose(result.parameters, [0.2, 2.1], atol=0.01)
    np.testing.assert_allclose(result.standard_error, [125**-0.5, (2 / 0.04) ** -0.5], rtol=0.02)


def test_a_prior_beside_a_loss_of_ones_own():
    """l = (y - 3)^2 / 2 and a prior of variance 1 about 0: halfway."""
    sim = bridge.as_simulator(lambda t: t, names=["a"])
    result = bridge.fit(sim, [3.0], [0.0], seed=0, prior={"a": (0.0, 1.0)}, method=bridge.TrustRegion(round_size=8, scale=(1.0, 0.01)), misfit=lambda y, t: 0.5 * ((y - t) ** 2).sum())  # fmt: skip
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

    target = np.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    result = bridge.fit(
        Blocks(),
        target,
        [0.0, 0.0, 0.0],
        seed=0,
        variance=0.5,
        prior={"b": (0.0, 0.5)},
        method=bridge.Kriging(round_size=8, scale=(1.0, 0.01)),
    )
    assert result.method == "gauss-newton"
    assert "which outputs" in result.method_reason
    np.testing.assert_allclose(result.parameters, [1.0, 1.0, 3.0], atol=1e-3)
    np.testing.assert_allclose(result.standard_error**2, [1 / 4, 1 / 8, 1 / 4], rtol=0.01)


# --- any optimiser ----------------------------------------------------------------------------------------------------


def test_an_optimiser_gets_the_gradient_and_its_rate_follows_the_scale():
    make = make_optimiser(lambda p: torch.optim.SGD(p, lr=0.5), 1.0, 2)
    mover = TorchMover(make, (2, 2), first=2.0)
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
    assert (result.method, result.method_reason) == ("torch", "an optimiser is given")
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

    result = bridge.fit(disc, disc([17.0, 13.0]), [12.0, 18.0], seed=0, method=bridge.Natural(steps=60, num_samples=24, scale=(3.0, 0.1)), misfit=lambda y, t: (y != t).sum())  # fmt: skip
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


@pytest.mark.parametrize("method", ["gauss-newton", "adam"])
def test_coarse_to_fine_finds_what_fine_alone_does_not(method):
    """Two narrow bumps that do not meet: without a blur nothing says where to go."""
    x = np.arange(120.0)

    def bump(t):
        return np.exp(-0.5 * ((x - t[0]) / 2.0) ** 2)

    settings = {"seed": 0, "method": method, "scale": 1.0, "num_samples": 8, "steps": 60}
    if method == "adam":
        settings |= {"steps": 100, "learning_rate": 1.0}
    fine = bridge.fit(bump, bump([80.0]), [40.0], **settings)
    coarse = bridge.fit(bump, bump([80.0]), [40.0], method=bridge.GaussNewton(blur=[20, 10, 5]), **settings)
    assert abs(fine.parameters[0] - 80) > 10
    assert abs(coarse.parameters[0] - 80) < 0.5


# --- several starts ---------------------------------------------------------------------------------------------------


def wells(t):
    """Minima of |f|^2 near 1 (exact), -1 and 3 (not)."""
    return np.array([np.sin(0.5 * np.pi * (t[0] - 1)) * 2, 0.4 * (t[0] - 1)])


@pytest.mark.parametrize("method", ["gauss-newton", "adam", "natural", "torch"])
def test_of_several_starts_the_best_is_found_and_all_are_told(method):
    calls = []

    class Counted:
        space = bridge.as_simulator(wells, names=["a"], bounds=[(-6, 8)]).space
        output_shape = (2,)

        def __call__(self, inputs, seeds):
            calls.append(len(inputs))
            return np.stack([wells(t) for t in inputs])

    more = {"optimiser": "Adam"} if method == "torch" else {}
    starts = [{"a": -5.2}, {"a": 7.0}, {"a": 1.6}, {"a": -3.0}]
    settings = {
        "seed": 0,
        "method": method,
        "num_samples": 8,
        "steps": 24,
        "scale": (0.3, 0.05),
        "tolerance": 0.0,
        **more,
    }
    result = bridge.fit(Counted(), [0.0, 0.0], starts, **settings)
    assert sum(calls) == result.num_evaluations
    assert abs(result.parameters[0] - 1) < 0.1
    assert result.start[0] == 1.6
    assert [e.start[0] for e in result.ends] == [-5.2, 7.0, 1.6, -3.0]
    assert sorted(e.steps for e in result.ends) == [5, 5, 11, 24]
    assert result.ends[2].steps == 24
    assert [h.num_evaluations for h in result.history][:2] == [32, 64]
    assert any("dropped" in h.note for h in result.history)
    kept = bridge.fit(Counted(), [0.0, 0.0], starts, method=bridge.Kriging(halving=False), **settings)
    assert [e.steps for e in kept.ends] == [24] * 4
    assert kept.history[-1].num_evaluations == 24 * 32
    # A start among others goes as it would alone, but for its noise.
    alone = bridge.fit(Counted(), [0.0, 0.0], starts[0], **settings)
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
    several = bridge.fit(sim, [0.0, 0.0, 0.5], bridge.Starts(3, np.array([[-5.2, 0.0], [1.5, 0.0]])), seed=3, method=bridge.GaussNewton(steps=12, num_samples=8, scale=0.3))  # fmt: skip
    assert len(several.ends) == 3


# --- enough is known --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["kriging", "gauss-newton", "adam"])
def test_a_fit_stops_where_the_standard_errors_are_those_asked_for(method):
    rng = np.random.default_rng(5)
    target = decay(TRUTH) + 0.05 * rng.normal(size=25)
    settings = {"kriging": {}, "gauss-newton": {"scale": (1.0, 0.1), "num_samples": 8}}.get(
        method, {"num_samples": 8, "steps": 120, "scale": (1.0, 0.1)}
    )
    common = {"seed": 0, "method": method, "variance": 0.05**2, "fixed": ["b"], **settings}
    start = [1.6, 0.9, 0.5]
    whole = bridge.fit(named(decay), target, start, method=bridge.Kriging(tolerance=0.0), **common)
    early = bridge.fit(
        named(decay),
        target,
        start,
        method=bridge.Kriging(tolerance=0.0),
        stop=bridge.Stop(error={"a": 0.3, "rate": 0.4}),
        **common,
    )
    assert early.stop_reason == "standard_error"
    assert early.num_evaluations < whole.num_evaluations
    assert (np.abs(early.parameters - whole.parameters) < [0.075, 0.1, 1e-12]).all()
    told = early.history[-1].standard_error
    assert told[2] == 0
    assert told[0] <= 0.3
    assert told[1] <= 0.4
    # Errors that the data do not give are never reached.
    never = bridge.fit(named(decay), target, start, stop=bridge.Stop(runs=150, error=1e-4), **common)
    assert never.stop_reason != "standard_error"


# --- all at once, and nothing in silence ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"robust": "huber"}, r"variance= with robust="),
        ({"robust": "tukey", "variance": 1.0}, "Known: huber, cauchy, soft-l1"),
        ({"robust": ("huber", -1.0), "variance": 1.0}, "positive width"),
        ({"robust": "huber", "variance": 1.0, "loss": lambda y, t: y.sum()}, "loss of your own"),
        ({"loss": lambda y, t: y.sum(), "method": "kriging"}, "trust-region, adam, torch or natural"),
        ({"loss": lambda y, t: y.sum(), "stop_at_error": 0.1}, "least squares with stop_at_error"),
        ({"method": "natural", "stop_at_error": 0.1}, "stop_at_error with method kriging or gauss-newton"),
        ({"method": "natural", "distribution": "cauchy"}, "Gaussian noise"),
        ({"method": "natural", "forward": "unsmoothed"}, "spread of the losses"),
        ({"method": "kriging", "coarse": [2]}, "coarse with method gauss-newton or adam or torch"),
        ({"coarse": [-2]}, "0 or more"),
        ({"coarse": [lambda x: x**2]}, "coarse to be linear"),
        ({"whiten": lambda x: x + 1}, "whiten to be linear"),
        ({"whiten": lambda x: torch.fft.fft(x)}, "view_as_real"),
        ({"whiten": lambda x: x[None, 30]}, "got IndexError"),
        ({"variance": -np.eye(25)}, "positive definite"),
        ({"variance": np.ones((5, 5))}, r"covariance of all numbers, \(25, 25\)"),
        ({"method": "torch"}, "optimiser= with method='torch'"),
        ({"method": "adam", "optimiser": "SGD"}, "optimiser with method torch alone"),
        ({"method": "gauss-newton", "learning_rate": 0.1}, "learning_rate with method adam"),
        ({"method": "adam", "full_scale": True}, "full_scale with method natural"),
        ({"method": "adam", "restarts": 3}, "restarts with method kriging"),
        ({"method": "kriging", "halving": False}, "halving with method gauss-newton or adam or torch or natural"),
        ({"stop_at_error": {"c": 1.0}}, "Unknown parameter|Expected one of"),
        ({"stop_at_error": -1.0}, "positive standard errors"),
        ({"num_starts": 1, "start": [START, START]}, "num_starts of at least the 2"),
        ({"start": np.zeros((2, 3, 4))}, r"\(k, d\) for several"),
        ({"start": [START, [1.0, 1.0, 0.1]], "fixed": ["b"]}, "one value of 'b'"),
        ({"method": "adam", "max_runs": 60, "num_starts": 2}, "max_runs of at least 163"),
    ],
)
def test_what_a_method_has_no_use_for_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        bridge.fit(named(decay), decay(TRUTH), **{"start": START, "seed": 0, **settings})


SPIKED = decay(TRUTH) + 2.0 * (np.arange(25) == 7)
COMBINED = [
    {"method": "kriging", "robust": "huber", "variance": 0.01, "num_starts": 3, "max_runs": 40, "stop_at_error": 1e-3},
    {"method": "natural", "robust": "cauchy", "variance": 0.01, "num_starts": 3, "steps": 10},
    {"optimiser": "AdamW", "coarse": [3, 1], "num_starts": 3, "steps": 10, "prior": {"b": (0.5, 0.2)}},
    {"method": "adam", "coarse": [3], "whiten": lambda x: x[1:] - x[:-1], "num_starts": 3, "steps": 10},
    {
        "method": "gauss-newton", "robust": ("soft-l1", 2.0), "coarse": [2], "variance": 0.01, "num_starts": 3,
        "prior": {"a": (2.0, 0.5)}, "fixed": ["b"], "stop_at_error": 1e-3, "steps": 10,
    },
]  # fmt: skip


LOSS = {"loss": lambda y, t: ((y - t) ** 2).mean(), "prior": {"b": (0.5, 3.0)}, "num_starts": 3, "max_runs": 60}


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_fit_by_a_trust_region_killed_between_two_steps_ends_bitwise_the_same(tmp_path, at):
    def fit(directory, **more):
        return bridge.fit(named(decay), SPIKED, START, seed=0, run=directory, **LOSS, **more)

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert resumed.history == whole.history
    assert resumed.output.tobytes() == whole.output.tobytes()
    assert (whole.method, whole.num_evaluations <= 60) == ("trust-region", True)


@pytest.mark.parametrize("settings", COMBINED, ids=["kriging", "natural", "torch", "adam", "gauss-newton"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_fit_of_any_kind_killed_between_two_steps_ends_bitwise_the_same(tmp_path, settings, at):
    samples = {} if settings.get("method") == "kriging" else {"num_samples": 8}

    def fit(directory, **more):
        return bridge.fit(named(decay), SPIKED, START, seed=0, run=directory, **samples, **settings, **more)

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert resumed.history == whole.history
    assert [e.parameters.tobytes() for e in resumed.ends] == [e.parameters.tobytes() for e in whole.ends]
    assert len(whole.ends) == (0 if settings.get("method") == "kriging" else 3)


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
    many = bridge.fit(lambda t: t, np.zeros(201), np.ones(201), seed=0, method=bridge.Kriging(rounds=1))
    assert (many.method, "201 parameters" in many.method_reason) == ("gauss-newton", True)
    blurred = bridge.fit(lambda t: t, np.zeros(3), np.ones(3), seed=0, method=bridge.GaussNewton(steps=1, blur=[1]))
    assert (blurred.method, "coarse to fine" in blurred.method_reason) == ("gauss-newton", True)


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
        steps = 12
        num_samples = 8
        num_starts = 2
        variance = 0.01
        robust = ["huber", 1.5]
        coarse = [2]
        prior = { b = [0.5, 0.3] }
        stop_at_error = { a = 1e-6 }
        method = "auto"
        """,
        encoding="utf-8",
    )
    out = tmp_path / "out"
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q"]) == 0
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q", "--method", "kriging"]) == 2
    assert "coarse with method gauss-newton" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "job.toml"), "-o", str(out), "-q", "--fresh", "--max-runs", "60"]) == 0
    said = json.loads((out / "parameters.json").read_text())
    assert (said["method"], said["stop_reason"]) == ("gauss-newton", "max_runs")
    assert len(said["ends"]) == 2
    assert said["num_evaluations"] <= 60
