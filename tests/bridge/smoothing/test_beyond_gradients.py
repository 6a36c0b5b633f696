"""Second derivatives, covariance, median, standard errors, regression, failures, blocks: truths and their limits."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, InputError
from bridge.estimators.distributions import get_distribution
from bridge.simulator.protocol import BlockStructure
from bridge.smoothing.median import median_statistic
from bridge.testing import Quadrature, assert_mean

NAMES = ["gaussian", "logistic", "gumbel", "cauchy", "laplace", "triangular"]
MATRIX = np.array([[0.5, 0.21], [-0.13, 0.42]])
X2 = torch.tensor([0.2, -0.3], dtype=torch.float64)


def exact(f, d, name, order=40, **kwargs):
    rule = Quadrature(order)
    n = rule.size(get_distribution(name), d)
    sim = bridge.as_simulator(f, vectorized=True)
    return bridge.smooth(sim, seed=0, distribution=name, points=rule, num_samples=n, covariate="none", **kwargs)


def bell(x):
    return np.exp(-((x[:, 0] - 0.2) ** 2)) * 1.3


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_on_the_line(name):
    """d2/dx2 E[f(x + g e)] = E[f''], by quadrature without scores; Laplace and Triangular need their kinks."""
    e, w = Quadrature(120).line(get_distribution(name))
    u = 0.37 + 0.6 * e - 0.2
    truth = float(np.sum(w * 1.3 * (4 * u * u - 2) * np.exp(-u * u)))
    smoothed = exact(bell, 1, name, 60, scale=0.6)
    theta = torch.tensor([0.37], dtype=torch.float64)
    for hessian in (
        torch.autograd.functional.hessian(smoothed, theta),
        torch.func.hessian(smoothed)(theta),
        torch.func.jacrev(torch.func.jacrev(smoothed))(theta),
    ):
        assert hessian.item() == pytest.approx(truth, abs=1e-8)


@pytest.mark.parametrize("name", ["gaussian", "gumbel", "laplace", "triangular"])
def test_hessian_with_a_scale_matrix_that_is_not_symmetric(name):
    A = np.array([0.9, -0.7])

    def f(x):
        return np.sin(x @ A + 0.3)

    smoothed = exact(f, 2, name, 16, scale=torch.as_tensor(MATRIX), memory=bridge.Memory(keep_mb=1e4))
    nodes = exact(f, 2, name, 16, scale=torch.as_tensor(MATRIX)).strategy
    rule = nodes.points.nodes(nodes.distribution, nodes.num_samples, 2, np.random.default_rng(0))
    value = np.sum(rule.weight * f(X2.numpy() + rule.eps @ MATRIX.T))
    hessian = torch.func.hessian(smoothed)(X2)
    np.testing.assert_allclose(hessian, -value * np.outer(A, A), atol=2e-7)
    v = torch.tensor([0.3, 1.1], dtype=torch.float64)
    theta = X2.clone().requires_grad_()
    (g,) = torch.autograd.grad(smoothed(theta), theta, create_graph=True)
    (product,) = torch.autograd.grad(g, theta, v)
    np.testing.assert_allclose(product, hessian @ v, atol=1e-12)


def test_hessian_from_random_rows_is_unbiased():
    A = np.array([0.9, -0.7])
    sim = bridge.as_simulator(lambda x: np.sin(x @ A + 0.3), vectorized=True)
    truth = -np.sin(X2.numpy() @ A + 0.3) * np.exp(-0.5 * 0.25 * A @ A) * np.outer(A, A)
    for points in ("mc", "antithetic-mc"):
        smoothed = bridge.smooth(
            sim,
            seed=1,
            num_samples=16,
            scale=0.5,
            points=points,
            covariate="block",
            on=bridge.Ranks(leaf_size=16),
        )
        batch = X2.expand(1500, 2)
        hessian = torch.func.hessian(lambda t, b: smoothed(t, problem=b))  # noqa: B023
        hessians = torch.func.vmap(hessian)(batch, torch.arange(1500))
        assert_mean(hessians, truth, power=0.5)


def test_second_derivatives_need_rows():
    smoothed = bridge.smooth(lambda x: np.full(50, x.sum()), seed=0, num_samples=16, memory=bridge.Memory(keep_mb=0))
    with pytest.raises(InputError, match=r"memory=bridge\.Memory\(keep_mb=1\)"):
        torch.autograd.functional.hessian(lambda t: smoothed(t).sum(), X2)


# -- covariance and median -------------------------------------------------------------------------------------------

B = np.array([[1.0, 0.4], [-0.3, 0.8], [0.5, -0.9]])


@pytest.mark.slow  # half a minute of statistics
def test_covariance_and_its_derivatives_are_unbiased_at_five_rows():
    """f = [a.x, (b.x)^2, c.x + x0^2]: Gaussian moments in closed form; the plug-in would be N/(N-1).. off at N = 5."""

    def f(x):
        return np.stack([x @ B[0], (x @ B[1]) ** 2, x @ B[2] + x[:, 0] ** 2], axis=1)

    def truth(theta, L):
        # Gauss-Hermite, exact for polynomials.
        t, w = np.polynomial.hermite_e.hermegauss(12)
        w = w / w.sum()
        eps = np.array(list(itertools.product(t, t)))
        weight = np.prod(np.array(list(itertools.product(w, w))), axis=1)
        F = f(theta + eps @ L.T)
        F = F - weight @ F
        return (weight[:, None] * F).T @ F

    V = np.array([[0.5, 0.2, -0.1], [0.2, 0.3, 0.0], [-0.1, 0.0, 0.7]])
    theta, h = X2.numpy(), 1e-5
    d_x = [np.sum(V * (truth(theta + h * u, MATRIX) - truth(theta - h * u, MATRIX))) / (2 * h) for u in np.eye(2)]
    d_L = np.array(
        [
            np.sum(V * (truth(theta, MATRIX + h * E) - truth(theta, MATRIX - h * E))) / (2 * h)
            for E in np.eye(4).reshape(4, 2, 2)
        ]
    ).reshape(2, 2)
    n = 20000
    sim = bridge.as_simulator(f, vectorized=True)
    smoothed = bridge.smooth(
        sim,
        seed=3,
        num_samples=5,
        scale=torch.as_tensor(MATRIX),
        points="mc",
        on=bridge.Ranks(leaf_size=5),
        memory=bridge.Memory(keep_mb=1e4),
    )
    e = smoothed.estimate(X2.expand(n, 2), scale_gradient=True)
    assert_mean(e.covariance().reshape(n, 9)[:, [0, 4, 8]], np.diag(truth(theta, MATRIX)))
    batch = torch.as_tensor(V).expand(n, 3, 3)
    assert_mean(e.covariance_vjp(batch), d_x, power=0.4)
    assert_mean(e.covariance_vjp_scale(batch), d_L, power=0.4)
    v = torch.tensor([0.5, 0.3, 0.7], dtype=torch.float64).expand(n, 3)
    np.testing.assert_allclose(e.variance_vjp(v), e.covariance_vjp(torch.diag_embed(v)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_median_statistic_is_the_mean_over_all_subsets(k):
    rng = np.random.default_rng(1)
    F, g = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    F[3, 0] = F[5, 0]  # ties
    subsets = list(itertools.combinations(range(9), k))
    value = np.mean([np.median(F[list(s)], axis=0) for s in subsets], axis=0)
    jacobian = np.mean([np.outer(np.median(F[list(s)], axis=0), g[list(s)].sum(axis=0)) for s in subsets], axis=0)
    ours = median_statistic(F, g, k)
    np.testing.assert_allclose(ours[0], value, atol=1e-13)
    np.testing.assert_allclose(ours[1], jacobian, atol=1e-13)
    one = median_statistic(F[:, :1], g, k)
    assert (one[0] == ours[0][:1]).all()
    assert (one[1] == ours[1][:1]).all()


def test_median_of_cauchy_noise_exists_where_the_mean_does_not():
    """f(y) = y under Cauchy noise: median x, slope 1, by symmetry; k = 5 has finite variance."""
    sim = bridge.as_simulator(lambda x: x[:, :1], vectorized=True)
    smoothed = bridge.smooth(
        sim, seed=2, num_samples=33, distribution="cauchy", points="mc", on=bridge.Ranks(leaf_size=33)
    )
    e = smoothed.estimate(torch.full((2000, 1), 0.7, dtype=torch.float64))
    assert_mean(e.median(7)[:, 0], 0.7, power=0.2)
    assert_mean(e.median_jacobian(7)[:, 0, 0], 1.0, power=0.2)
    with pytest.raises(InputError, match="odd k"):
        e.median(4)


def test_dependent_rows_are_refused_for_covariance_and_median():
    e = bridge.smooth(lambda x: x, seed=0, num_samples=16).estimate(X2)
    for use in (e.covariance, e.median, lambda: e.variance_vjp(e.value)):
        with pytest.raises(InputError, match="points='mc'"):
            use()


# -- standard errors ---------------------------------------------------------------------------------------------------


def coverage(estimate, errors, values, truth):
    half = estimate.interval(errors)
    return float(((values - truth).abs() <= half).double().mean())


@pytest.mark.parametrize(
    ("points", "replicates", "covariate"),
    [("mc", 1, "loo"), ("mc", 1, "none"), ("mc", 1, "f(x)"), ("sobol", 4, "auto"), ("rqmc-latin", 8, "auto")],
)
def test_intervals_cover(points, replicates, covariate):
    """95 % intervals over 2,000 repetitions on a truth in closed form: between 92 and 98 %."""
    A = np.array([[0.9, -0.7], [0.5, 0.8]])
    sim = bridge.as_simulator(lambda x: np.sin(x @ A.T + 0.3), vectorized=True)
    phase, damp = X2.numpy() @ A.T + 0.3, np.exp(-0.5 * 0.25 * np.sum(A * A, axis=1))
    truth, jacobian = np.sin(phase) * damp, (np.cos(phase) * damp)[:, None] * A
    smoothed = bridge.smooth(
        sim,
        seed=4,
        num_samples=64,
        scale=0.5,
        points=points,
        replicates=replicates,
        covariate=covariate,
        on=bridge.Ranks(leaf_size=64),
        memory=bridge.Memory(keep_mb=1e4),
    )
    e = smoothed.estimate(X2.expand(2000, 2))
    v = torch.tensor([1.0, -0.5], dtype=torch.float64).expand(2000, 2)
    shares = [
        coverage(e, e.standard_error, e.value, torch.as_tensor(truth)),
        coverage(e, e.jacobian_standard_error(), e.jacobian(), torch.as_tensor(jacobian)),
        coverage(e, e.vjp_standard_error(v), e.vjp(v), v[0] @ torch.as_tensor(jacobian)),
    ]
    assert all(0.92 <= share <= 0.98 for share in shares), shares


def test_standard_errors_of_one_scramble_are_refused():
    e = bridge.smooth(lambda x: x, seed=0, num_samples=16).estimate(X2)
    with pytest.raises(InputError, match="replicates=4"):
        _ = e.standard_error


def test_replicates_are_independent_evaluations_of_their_own():
    smoothed = bridge.smooth(lambda x: np.sin(x), seed=0, num_samples=32, replicates=4)
    single = bridge.smooth(lambda x: np.sin(x), seed=0, num_samples=8, covariate="block")
    whole = smoothed.estimate(X2, step=3)
    parts = [single.estimate(X2, step=3, replicate=r) for r in range(4)]
    np.testing.assert_allclose(whole.jacobian(), sum(p.jacobian() for p in parts) / 4, rtol=1e-12)
    np.testing.assert_allclose(whole.value, sum(p.value for p in parts) / 4, rtol=1e-12)
    assert whole.num_evaluations == 32
    streamed = bridge.smooth(lambda x: np.sin(x), seed=0, num_samples=32, replicates=4, memory=bridge.Memory(keep_mb=0))
    assert torch.allclose(streamed.estimate(X2, step=3).jacobian(), whole.jacobian())


# -- better weights and points -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", ["mc", "sobol", "halton", "orthogonal"])
def test_regression_is_exact_for_linear_functions_and_gaussian_noise(points):
    A = np.array([[0.9, -0.7, 0.2], [0.5, 0.8, -1.0]])
    smoothed = bridge.smooth(
        lambda x: A @ x + 3, seed=0, num_samples=16, points=points, covariate="regression", scale=0.3
    )
    e = smoothed.estimate(torch.zeros(3, dtype=torch.float64))
    assert e.covariate == "regression"
    np.testing.assert_allclose(e.jacobian(), A, atol=1e-12)


def test_regression_falls_back_where_rows_are_too_few():
    e = bridge.smooth(lambda x: x, seed=0, num_samples=8, covariate="regression").estimate(torch.zeros(9).double())
    assert e.covariate == "block"
    assert "8 rows for 9 scores" in e.covariate_reason
    with pytest.raises(InputError, match="finite Fisher information"):
        bridge.smooth(lambda x: x, seed=0, covariate="regression", distribution="triangular")


def test_orthogonal_blocks():
    rng = np.random.default_rng(0)
    strategy = bridge.smooth(lambda x: x, seed=0, num_samples=12, points="antithetic-orthogonal").strategy
    nodes = strategy.points.nodes(strategy.distribution, 12, 3, rng)
    first = nodes.eps[0:6:2]
    np.testing.assert_allclose(first @ first.T, np.diag(np.sum(first**2, axis=1)), atol=1e-12)
    assert (nodes.eps[0::2] == -nodes.eps[1::2]).all()
    assert nodes.block == 6
    # Every row is Gaussian by itself.
    many = np.concatenate([strategy.points.base.nodes(strategy.distribution, 12, 3, rng).eps for _ in range(2000)])
    assert np.abs(np.cov(many.T) - np.eye(3)).max() < 0.03
    assert np.mean(many**4, axis=0) == pytest.approx(np.full(3, 3.0), rel=0.1)
    with pytest.raises(InputError, match="Gaussian noise for orthogonal"):
        bridge.smooth(lambda x: x, seed=0, points="orthogonal", distribution="laplace")


@pytest.mark.parametrize("name", ["gaussian", "logistic", "gumbel", "laplace", "cauchy"])
def test_bayesian_quadrature_is_near_the_truth_from_few_rows(name):
    A = np.array([0.9, -0.7])
    kwargs = {"seed": 3, "distribution": name, "scale": 0.3}
    f = bridge.as_simulator(lambda x: np.sin(x @ A + 0.3), vectorized=True)
    truth = exact(lambda x: np.sin(x @ A + 0.3), 2, name, 16, scale=0.3).estimate(X2)
    errors = {}
    for covariate in ("bq", "loo"):
        e = bridge.smooth(f, num_samples=32, points="sobol", covariate=covariate, **kwargs).estimate(X2.expand(50, 2))
        errors[covariate] = float((e.jacobian() - truth.jacobian()).square().mean().sqrt())
    assert errors["bq"] < (0.9 if name == "cauchy" else 0.5) * errors["loo"], errors


def test_auto_says_what_and_why():
    e = bridge.smooth(lambda x: x, seed=0, num_samples=64).estimate(X2)
    assert e.points == "Net(jitter=True)"
    assert "power of two" in e.points_reason
    assert e.covariate == "regression"
    assert "64 rows" in e.covariate_reason
    assert bridge.smooth(lambda x: x, seed=0, num_samples=60).estimate(X2).points == "Sobol()"
    few = bridge.smooth(lambda x: x, seed=0, num_samples=16).estimate(torch.zeros(6).double())
    assert "Orthogonal" in few.points
    assert "16" in few.points_reason
    fewer = bridge.smooth(lambda x: x, seed=0, num_samples=8).estimate(torch.zeros(6).double())
    assert fewer.points == "Orthogonal()"
    heavy = bridge.smooth(lambda x: x, seed=0, num_samples=8, distribution="triangular").estimate(X2)
    assert heavy.points == "Net(jitter=False)"
    skew = bridge.smooth(lambda x: x, seed=0, num_samples=64, distribution="gumbel").estimate(X2)
    assert skew.covariate == "block"
    assert "skew" in skew.covariate_reason
    for n, points in ((6, "Latin(jitter=True)"), (8, "Net(jitter=True)")):
        smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=n, distribution="logistic")
        assert smoothed.estimate(torch.zeros(6).double()).points == points


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raise", "nan"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_failures_are_dropped_by_new_weights(how, antithetic):
    """Rows 3 and 8 of 16 fail: the estimate is that of the others, whole pairs where there are pairs."""
    count = itertools.count()

    def f(x):
        if next(count) in (3, 8):
            if how == "raise":
                raise RuntimeError("no convergence")
            return np.full(2, np.nan)
        return np.sin(x)

    points = "antithetic-mc" if antithetic else "mc"
    kwargs = {"seed": 0, "num_samples": 16, "points": points, "covariate": "block"}
    e = bridge.smooth(bridge.as_simulator(f, repeatable=True), failures="drop", **kwargs).estimate(X2)
    assert e.num_failed == 2
    nodes = bridge.smooth(np.sin, **kwargs).estimate(X2)._evaluation.problems[0].design.nodes
    lost = [2, 3, 8, 9] if antithetic else [3, 8]
    keep = [i for i in range(16) if i not in lost]
    F, s = np.sin(X2.numpy() + nodes.eps[keep]), nodes.score[keep]
    # Within a pair the scores add up to zero, so leaving the pair out subtracts nothing; else N/(N - 1), as LOO.
    centred = F if antithetic else F - F.mean(axis=0)
    jacobian = centred.T @ s / (len(keep) - (not antithetic))
    np.testing.assert_allclose(e.value, F.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(e.jacobian(), jacobian, rtol=1e-10)


def test_too_many_failures_raise():
    def f(x):
        if x[0] > 0:
            raise RuntimeError("diverged")
        return x

    with pytest.raises(EvaluationError, match=r"at least 50% of .* RuntimeError|diverged"):
        bridge.smooth(f, seed=0, num_samples=16, failures="drop")(torch.tensor([1.0, 0.0]))
    with pytest.raises(EvaluationError, match="failures only"):
        bridge.smooth(f, seed=0, num_samples=16, failures="drop")(torch.tensor([9.0, 0.0]))
    with pytest.raises(EvaluationError, match="diverged"):
        bridge.smooth(f, seed=0, num_samples=16)(torch.tensor([1.0, 0.0]))


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0.0, 100.0], ids=["streamed", "kept"])
def test_block_structure_gives_exact_zeros_and_less_noise(keep):
    """Ten images, each moved by one parameter of its own, and one parameter that moves all."""
    grid = np.linspace(-1, 1, 12)

    def f(x):
        return np.exp(-((grid - x[:10, None]) ** 2)) * x[10]

    structure = BlockStructure([*range(10), -1], range(10))
    theta = torch.cat([torch.linspace(-0.3, 0.3, 10), torch.ones(1)]).double()
    kwargs = {"seed": 0, "num_samples": 64, "scale": 0.2, "memory": bridge.Memory(keep_mb=keep), "covariate": "block"}
    plain = bridge.smooth(f, **kwargs)
    blocks = bridge.smooth(bridge.as_simulator(f, structure=structure), **kwargs)
    J, S = plain.estimate(theta).jacobian(), blocks.estimate(theta).jacobian()
    mask = torch.as_tensor(structure.mask((10, 12))).T.reshape(10, 12, 11)
    assert torch.equal(S, torch.where(mask, J, torch.zeros(())))
    assert int(mask.sum()) == 120 + 120
    v = torch.ones(10, 12).double()
    e = blocks.estimate(theta)
    np.testing.assert_allclose(e.vjp(v), torch.einsum("ab,abd->d", v, S), rtol=1e-6, atol=1e-9)
    t = torch.linspace(-1, 1, 11).double()
    np.testing.assert_allclose(e.jvp(t), S @ t, rtol=1e-6, atol=1e-9)
    spread = [
        torch.stack([s.estimate(theta, step=i).vjp(v) for i in range(30)]).var(0)[:10].mean() for s in (plain, blocks)
    ]
    assert spread[1] < spread[0] / 4
    with pytest.raises(InputError, match="block structure"):
        blocks(theta, scale=torch.eye(11))
    with pytest.raises(InputError, match="a block for each of 3"):
        blocks(torch.zeros(3))


def test_the_simulators_own_seeds():
    """Common within a replicate, so that perturbations are compared under the same noise; new for each replicate."""
    seen = []

    def f(x, seed):
        seen.append(seed)
        return x

    bridge.smooth(bridge.as_simulator(f, seeded=True, repeatable=True), seed=0, num_samples=8, replicates=2)(X2)
    assert len(set(seen[:4])) == len(set(seen[4:])) == 1
    assert len(set(seen)) == 2
    seen.clear()
    bridge.smooth(bridge.as_simulator(f, seeded=True), seed=0, num_samples=8, simulator_seeds="independent")(X2)
    assert len(set(seen)) == 8
