"""Estimators: unbiasedness with power checks, exact facts of theory, invariances, batches, transforms, autograd."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import bridge
from bridge.dispatch import TreeSum, transfers
from bridge.estimators.design import make_design
from bridge.estimators.distributions import get_distribution
from bridge.estimators.points import get_points
from bridge.estimators.strategy import default_leaf_size
from bridge.estimators.weights import make_weights
from bridge.testing import Quadrature, assert_mean, mean_differs

A = np.array([[0.9, -0.4], [0.3, 0.8]])
X = torch.tensor([0.2, -0.3], dtype=torch.float64)
L = torch.tensor([[0.5, 0.21], [-0.13, 0.42]], dtype=torch.float64)
REPLICATES = 2000  # 64 would not notice an error of 10 %


def smooth_function(x):
    return np.tanh(x @ A.T) + 0.7


VECTORIZED = bridge.as_simulator(smooth_function, vectorized=True)


def truths(name, scale):
    rule, density = Quadrature(18), get_distribution(name)
    exact = bridge.smooth(
        VECTORIZED, seed=0, distribution=name, points=rule, num_samples=rule.size(density, 2), covariate="none"
    ).estimate(X, scale=scale, scale_gradient=True)
    v = torch.tensor([1.0, -0.5], dtype=torch.float64)
    return exact.value, exact.jacobian(), exact.vjp_scale(v), v


def replicated(name, scale, n, **kwargs):
    """REPLICATES independent estimates, as one batch of problems."""
    smoothed = bridge.smooth(
        VECTORIZED, seed=5, distribution=name, num_samples=n, on=bridge.Ranks(leaf_size=n), **kwargs
    )
    return smoothed.estimate(X.expand(REPLICATES, 2), scale=scale, scale_gradient=True)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "gumbel", "laplace"])
@pytest.mark.parametrize("covariate", ["none", "f(x)", "loo", "auto"])
def test_independent_rows_are_unbiased_in_x_and_in_a_full_scale(name, covariate):
    value, jacobian, dL, v = truths(name, L)
    estimate = replicated(name, L, 8, points="mc", covariate=covariate)
    # Without a covariate the constant 0.7 swamps the signal: fewer digits, more power asked of fewer quantities.
    power = 0.1 if covariate != "none" else 0.3
    assert_mean(estimate.value, value, power)
    strong = jacobian.abs() > 0.3
    assert_mean(estimate.jacobian()[:, strong], jacobian[strong], power)
    samples = estimate.vjp_scale(v.expand(REPLICATES, 2))
    strong = dL.abs() > 0.1
    assert not mean_differs(samples, dL)
    assert mean_differs(samples[:, strong], dL[strong] + 0.25)


@pytest.mark.parametrize("name", ["gaussian", "logistic", "laplace", "cauchy"])
def test_antithetic_pairs_are_unbiased_in_x_and_in_the_scale(name):
    """Whole pairs are left out: the literal LOO would be N/(N-1) too large in x and 0.86 of the truth in L at N = 8."""
    scale = torch.diagonal(L).clone()
    _, jacobian, dL, v = truths(name, scale)
    estimate = replicated(name, scale, 8, points="antithetic-mc", covariate="block")
    strong = jacobian.abs() > 0.25
    assert_mean(estimate.jacobian()[:, strong], jacobian[strong])
    samples = estimate.vjp_scale(v.expand(REPLICATES, 2))
    assert not mean_differs(samples, dL)
    literal = replicated(name, scale, 8, points="antithetic-mc", covariate="loo")
    np.testing.assert_allclose(literal.jacobian(), estimate.jacobian() * 8 / 7, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("points", ["rqmc-latin", "rqmc-cartesian", "sobol"])
@pytest.mark.parametrize("name", ["gaussian", "logistic", "gumbel", "laplace", "cauchy"])
def test_randomised_points_without_covariate_are_unbiased(name, points):
    scale = torch.diagonal(L).clone()
    value, jacobian, _, _ = truths(name, scale)
    estimate = replicated(name, scale, 9 if points == "rqmc-cartesian" else 8, points=points, covariate="none")
    assert_mean(estimate.value, value)
    strong = jacobian.abs() > 0.3
    assert_mean(estimate.jacobian()[:, strong], jacobian[strong])


def test_triangular_with_latin_midpoints_is_within_its_known_bias():
    """Latin midpoints cap the score at sqrt(N); the bias at N = 1000 is 2-3 % (theory, section 2)."""
    scale = torch.diagonal(L).clone()
    _, jacobian, _, _ = truths("triangular", scale)
    smoothed = bridge.smooth(VECTORIZED, seed=5, distribution="triangular", num_samples=1000)
    assert "Latin" in smoothed.estimate(X).points
    mean = smoothed.estimate(X.expand(60, 2), scale=scale).jacobian().mean(0)
    assert ((mean - jacobian).abs() < 0.04 * jacobian.abs().max()).all()
    assert np.abs(make_design(smoothed.strategy, 0, 0, 2).nodes.score).max() <= np.sqrt(1000) * (1 + 1e-12)


def test_f_of_x_equals_none_where_the_scores_sum_to_zero():
    for points in ("antithetic-mc", "qmc-latin"):
        a, b = (
            bridge.smooth(VECTORIZED, seed=1, num_samples=16, scale=0.3, points=points, covariate=c)
            .estimate(X)
            .jacobian()
            for c in ("none", "f(x)")
        )
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_mean_is_loo_short_by_the_factor_of_theory():
    a, b = (
        bridge.smooth(VECTORIZED, seed=1, num_samples=16, scale=0.3, points="mc", covariate=c).estimate(X).jacobian()
        for c in ("mean", "loo")
    )
    np.testing.assert_allclose(a, b * 15 / 16, rtol=1e-12)


def test_weights_against_a_loop_over_blocks():
    strategy = bridge.smooth(VECTORIZED, seed=3, num_samples=12, points="antithetic-mc").strategy
    nodes = make_design(strategy, 0, 0, 3).nodes
    F = np.random.default_rng(0).normal(size=12)
    G = (nodes.score[:, :, None] * nodes.eps[:, None, :] - np.eye(3)).reshape(12, 9)
    expected = np.zeros(9)
    for i in range(12):
        others = [j for j in range(12) if j // 2 != i // 2]
        expected += (F[i] - F[others].mean()) * G[i] / 12
    np.testing.assert_allclose(F @ make_weights(strategy, nodes, "matrix").scale, expected, rtol=1e-12)


def test_cartesian_has_one_point_in_each_cell_and_names_the_nearest_feasible_numbers():
    rng = np.random.default_rng(0)
    u = get_points("rqmc-cartesian").uniform(27, 3, rng)
    assert len(set(map(tuple, np.floor(u * 3).astype(int)))) == 27
    assert len(np.unique(u[:, 0])) == 27  # not a product of jittered axes
    with pytest.raises(bridge.BridgeError, match="27 and 64"):
        bridge.smooth(lambda x: x, seed=0, num_samples=30, points="qmc-cartesian")(torch.zeros(3))


@given(
    st.sampled_from(["mc", "qmc-latin", "rqmc-latin", "sobol"]), st.integers(1, 70), st.integers(1, 5), st.booleans()
)
def test_points_lie_in_the_open_cube_and_depend_on_the_key_alone(points, n, d, antithetic):
    n += n % 2 if antithetic else 0
    name = f"antithetic-{points}" if antithetic else points
    strategy = bridge.smooth(
        VECTORIZED, seed=n, num_samples=n, points=name, covariate="none", simulator_seeds="independent"
    ).strategy
    one, two = make_design(strategy, 4, 2, d), make_design(strategy, 4, 2, d)
    assert np.isfinite(one.nodes.eps).all()
    assert one.nodes.eps.shape == (n, d)
    assert np.array_equal(one.nodes.eps, two.nodes.eps)
    assert np.array_equal(one.seeds, two.seeds)
    assert not np.array_equal(one.nodes.eps, make_design(strategy, 5, 2, d).nodes.eps) or points == "qmc-latin"
    if "latin" in points and not antithetic:
        from scipy.stats import norm

        cells = np.sort(np.floor(norm.cdf(one.nodes.eps) * n - 1e-9 * (points == "qmc-latin")), axis=0)
        assert (cells == np.arange(n)[:, None]).all()


@pytest.mark.parametrize(("n", "d"), [(3, 7), (7, 7), (10, 7), (17, 7), (2, 1)])
def test_orthogonal_directions_are_gaussian_in_any_number(n, d):
    """Also where the last rotation is used in part: blocks of d orthogonal rows, each row N(0, I) by itself."""
    rng = np.random.default_rng(n)
    sets = np.stack([get_points("orthogonal").nodes(get_distribution("gaussian"), n, d, rng).eps for _ in range(4000)])
    assert sets.shape == (4000, n, d)
    for start in range(0, n, d):
        gram = sets[:, start : start + d] @ sets[:, start : start + d].transpose(0, 2, 1)
        assert np.abs(gram - gram * np.eye(gram.shape[1])).max() < 1e-12 * d * 10
    for row in (sets[:, 0], sets[:, -1]):
        assert_mean(row**2, np.ones(d), power=0.3)
        moments = row.T @ row / 4000
        assert np.abs(moments - np.diag(np.diag(moments))).max() < 6 / np.sqrt(4000)
        assert np.abs(row.mean(axis=0)).max() < 6 / np.sqrt(4000)


def test_few_directions_of_many_parameters_factorise_a_slim_matrix(monkeypatch):
    """d N^2 operations for N rows: with d x d matrices, 10,000 parameters took minutes and gigabytes."""
    shapes = []
    original = np.linalg.qr

    def recorded(matrix):
        shapes.append(matrix.shape)
        return original(matrix)

    monkeypatch.setattr(np.linalg, "qr", recorded)
    smoothed = bridge.smooth(lambda x: x[:1], seed=0, num_samples=64, scale=0.1)
    estimate = smoothed.estimate(torch.zeros(10_000, dtype=torch.float64))
    assert estimate.points == "Orthogonal()"
    assert estimate.jacobian().shape == (1, 10_000)
    assert shapes == [(10_000, 64)]
    gaussian, cauchy = get_distribution("gaussian"), get_distribution("cauchy")
    auto = get_points("auto")
    # What would take longer than a second is left to points that are made at once.
    assert auto.choose(gaussian, 3000, 2000)[0].name == "sobol"
    assert auto.choose(gaussian, 1500, 5000)[0].name == "latin"
    assert auto.choose(cauchy, 64, 10_000)[0].name == "latin"
    assert auto.choose(gaussian, 64, 10_000)[0].name == auto.choose(gaussian, 150, 100)[0].name == "orthogonal"


@given(st.integers(1, 90), st.data())
def test_the_tree_has_one_shape_for_any_owners(leaves, data):
    values = np.random.default_rng(leaves).normal(size=leaves) * 10.0 ** np.arange(leaves).clip(0, 12)
    whole = TreeSum(leaves)
    for i, v in enumerate(values):
        whole.add(i, torch.tensor([v]))
    # Any owners, and leaves added in any order; then what `transfers` says has to travel, and nothing else.
    owners = np.array(data.draw(st.lists(st.integers(0, 4), min_size=leaves, max_size=leaves)))
    parts = [TreeSum(leaves) for _ in range(5)]
    for i in data.draw(st.permutations(range(leaves))):
        parts[owners[i]].add(i, torch.tensor([values[i]]))
    for node, source, dest in transfers(owners):
        parts[dest].add_node(node, parts[source].pop(node))
    assert parts[owners[0]].result().item() == whole.result().item()
    assert whole.result().item() == pytest.approx(values.sum(), rel=1e-9)


def test_leaf_size_follows_from_n_alone():
    assert [default_leaf_size(n) for n in (1, 64, 65, 128, 256, 1024, 4096)] == [1, 1, 4, 4, 8, 32, 128]


@pytest.mark.parametrize("keep", [0.0, 100.0])
def test_a_batch_is_its_problems_one_by_one_bitwise(keep):
    smoothed = bridge.smooth(VECTORIZED, seed=2, num_samples=48, scale=0.4, memory=bridge.Memory(keep_mb=keep))
    batch = torch.stack([X, X + 0.3, X - 0.2]).reshape(3, 1, 2)
    together = smoothed(batch, step=4)
    assert together.shape == (3, 1, 2)
    for b in range(3):
        assert torch.equal(smoothed(batch[b, 0], step=4, problem=b), together[b, 0])
    numbers = torch.arange(3)
    assert torch.equal(smoothed(batch, step=4, problem=numbers[:, None]), together)
    mapped = torch.func.vmap(lambda t, b: smoothed(t, step=4, problem=b))(batch[:, 0], numbers)
    assert torch.equal(mapped, together[:, 0])


@pytest.mark.parametrize("samples", [20, 64, 200])
@pytest.mark.parametrize(("dimension", "outputs"), [(1, 3), (2, 1000), (8, 40_000), (13, 7)])
def test_a_value_has_the_same_bits_whatever_derivatives_are_added_up_beside_it(samples, dimension, outputs):
    matrix = np.random.default_rng(dimension).normal(size=(dimension, outputs))

    def simulator(x):
        return (100 + np.sin(x @ matrix)).astype(np.float32)

    smoothed = bridge.smooth(simulator, seed=0, num_samples=samples, scale=0.4, memory=bridge.Memory(keep_mb=0))
    theta, scale = torch.zeros(dimension), torch.full((dimension,), 0.4, dtype=torch.float64)
    alone = smoothed(theta)
    assert torch.equal(smoothed(theta.requires_grad_()), alone)
    assert torch.equal(smoothed(theta, scale=scale.requires_grad_()), alone)


def test_the_memory_of_outputs_is_used_again_once_they_are_added_up(monkeypatch):
    from bridge.simulator import function as module

    places, empty = [], module._Memory.empty

    def told(self, shape, dtype):
        result = empty(self, shape, dtype)
        places.append(result.ctypes.data)
        return result

    monkeypatch.setattr(module._Memory, "empty", told)
    smoothed = bridge.smooth(
        lambda x: np.full(5000, x[0]), seed=0, num_samples=256, scale=0.4, memory=bridge.Memory(keep_mb=0)
    )
    smoothed(torch.zeros(1))
    places.clear()
    smoothed(torch.zeros(1), step=1)
    assert len(places) > 30
    assert len(set(places)) == 1


def test_kept_and_streamed_agree():
    a, b = (
        bridge.smooth(VECTORIZED, seed=2, num_samples=100, covariate="f(x)", memory=bridge.Memory(keep_mb=k)).estimate(
            X, scale=L, scale_gradient=True
        )
        for k in (0.0, 100.0)
    )
    assert (a.streamed, b.streamed) == (True, False)
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for one, other in (
        (a.value, b.value),
        (a.jacobian(), b.jacobian()),
        (a.vjp(v), b.vjp(v)),
        (a.vjp_scale(v), b.vjp_scale(v)),
        (a.jvp(v), b.jvp(v)),
        (a.vjp(v), a.jacobian().T @ v),
        (a.jvp(v), a.jacobian() @ v),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-10)
    assert a.num_evaluations == 101


def test_torch_func_transforms_agree_with_the_estimate():
    smoothed = bridge.smooth(VECTORIZED, seed=2, num_samples=32, scale=0.4)
    J = smoothed.estimate(X).jacobian()
    np.testing.assert_allclose(torch.func.jacrev(smoothed)(X), J, rtol=1e-12)
    np.testing.assert_allclose(torch.func.jacfwd(smoothed)(X), J, rtol=1e-12)
    t = torch.tensor([1.0, -2.0], dtype=torch.float64)
    value, tangent = torch.func.jvp(smoothed, (X,), (t,))
    np.testing.assert_allclose(tangent, J @ t, rtol=1e-12)
    assert torch.equal(value, smoothed(X))
    batch = torch.stack([X, X + 0.1])
    stacked = smoothed.estimate(batch).jacobian()
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        mapped = torch.func.vmap(lambda x, b: jacobian(partial(smoothed, problem=b))(x))(batch, torch.arange(2))  # noqa: B023
        np.testing.assert_allclose(mapped, stacked, rtol=1e-12)
    grad_L = torch.func.vmap(torch.func.grad(lambda s: smoothed(X, scale=s).sum()))(torch.tensor([0.4, 0.5]))
    s = torch.tensor(0.4, requires_grad=True)
    assert grad_L[0].item() == pytest.approx(torch.autograd.grad(smoothed(X, scale=s).sum(), s)[0].item(), rel=1e-6)


def test_one_dispatch_for_a_mapped_batch_and_no_calls_in_backward():
    calls = []

    def counted(x):
        calls.append(len(x))
        return smooth_function(x)

    smoothed = bridge.smooth(
        bridge.as_simulator(counted, vectorized=True, repeatable=True),
        seed=0,
        num_samples=8,
        on=bridge.Ranks(leaf_size=8),
    )
    batch = X.expand(5, 2).clone().requires_grad_()
    y = torch.func.vmap(smoothed)(batch)
    assert calls == [8] * 5
    y.sum().backward()
    assert calls == [8] * 5
    assert batch.grad.shape == (5, 2)


def test_the_simulator_is_a_black_box():
    """It gets plain numbers, cannot be differentiated, and is called exactly N times."""
    calls = 0

    def opaque(x):
        nonlocal calls
        calls += 1
        assert type(x) is np.ndarray
        assert x.dtype == np.float64
        assert x.flags.c_contiguous
        y = np.floor(10 * x.sum())
        x[:] = np.nan  # its own copy: nobody else may notice
        return y

    theta = X.clone().requires_grad_()
    y = bridge.smooth(bridge.as_simulator(opaque, repeatable=True), seed=0, num_samples=256, scale=0.5)(theta)
    y.backward()
    assert calls == 256
    np.testing.assert_allclose(theta.grad, [10, 10], rtol=0.15)


def test_second_derivatives_in_a_learned_scale_are_refused_not_wrong():
    smoothed = bridge.smooth(VECTORIZED, seed=0, num_samples=8)
    theta, scale = X.clone().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    (g,) = torch.autograd.grad(smoothed(theta, scale=scale).sum(), theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="Detach the scale"):
        g.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("output", [np.float32, np.float64, np.int32, np.uint8, bool])
def test_types_follow_theta(dtype, output):
    smoothed = bridge.smooth(lambda x: (x > 0).astype(output), seed=0, num_samples=64)
    theta = X.to(dtype).clone().requires_grad_()
    y = smoothed(theta)
    y.sum().backward()
    assert y.dtype == theta.grad.dtype == dtype
    exact = bridge.smooth(lambda x: (x > 0).astype(np.float64), seed=0, num_samples=64)(X)
    np.testing.assert_allclose(y.detach(), exact, rtol=1e-5)


def test_learned_log_scale_and_unsmoothed_forward():
    log_scale = torch.tensor([-1.0, -0.5], dtype=torch.float64, requires_grad=True)
    smoothed = bridge.smooth(VECTORIZED, seed=0, num_samples=64, scale=torch.ones(2))
    smoothed(X, scale=log_scale.exp()).sum().backward()
    assert log_scale.grad.abs().min() > 0
    plain = bridge.smooth(VECTORIZED, seed=0, num_samples=64, scale=0.3).straight_through()
    theta = X.clone().requires_grad_()
    y = plain(theta)
    np.testing.assert_allclose(y.detach(), smooth_function(X.numpy()[None])[0], rtol=1e-14)
    y.sum().backward()
    reference = bridge.smooth(VECTORIZED, seed=0, num_samples=64, scale=0.3).estimate(X).vjp(torch.ones(2))
    np.testing.assert_allclose(theta.grad, reference, rtol=1e-12)


def test_smoothing_of_the_loss_is_that_of_the_algorithm_plus_the_variance():
    """Squared error: E[|h - t|^2] = |E[h] - t|^2 + tr Cov[h], exactly with weights that sum to one."""
    rule, density = Quadrature(18), get_distribution("gaussian")
    common = {"seed": 0, "scale": 0.4, "points": rule, "num_samples": rule.size(density, 2), "covariate": "none"}
    target = torch.tensor([0.5, 1.0], dtype=torch.float64)
    of_loss = bridge.smooth_loss(VECTORIZED, lambda y: ((y - target) ** 2).sum(), **common)(X)
    mean = bridge.smooth(VECTORIZED, **common)(X)
    square = bridge.smooth(lambda x: smooth_function(x[None])[0] ** 2, **common)(X)
    expected = ((mean - target) ** 2).sum() + (square - mean**2).sum()
    assert of_loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_simulator_seeds_are_common_or_independent():
    seen = []

    def noisy(x, seed):
        seen.append(seed)
        return np.random.default_rng(seed).normal()

    sim = bridge.as_simulator(noisy, seeded=True, repeatable=True)
    for kind, count in (("common", 1), ("independent", 16)):
        seen.clear()
        smoothed = bridge.smooth(sim, seed=7, num_samples=16, simulator_seeds=kind)
        first = smoothed(X, step=1)
        assert len(set(seen)) == count
        before = list(seen)
        seen.clear()
        assert torch.equal(smoothed(X, step=1), first)
        assert seen == before
        seen.clear()
        smoothed(X, step=2)
        assert set(seen).isdisjoint(before)


def test_frozen_noise_is_noticed_once():
    smoothed = bridge.smooth(VECTORIZED, seed=0, num_samples=4)
    wanted = X.clone().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Values alone are no optimiser's, of parameters that need a gradient or not.
        smoothed(X + 4)
        smoothed(X + 5)
        with torch.no_grad():
            smoothed(wanted + 6)
    smoothed(wanted)
    with pytest.warns(UserWarning, match="noise is frozen"):
        smoothed(wanted + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smoothed(wanted + 2)
        smoothed(wanted + 3, step=1)


def test_queries_are_clipped_and_counted():
    seen = []

    def f(x):
        seen.append(x.copy())
        return x

    sim = bridge.as_simulator(f, names=["a"], bounds=[(0.0, 1.0)], units=["nm"], repeatable=True)
    estimate = bridge.smooth(sim, seed=0, num_samples=64, scale=1.0).estimate(torch.tensor([0.5]))
    queries = np.array(seen)
    assert queries.min() == 0.0
    assert queries.max() == 1.0
    assert estimate.clipped_fraction == ((queries == 0) | (queries == 1)).mean()
    strict = bridge.as_simulator(f, names=["a"], bounds=[(0.0, 1.0)], outside="raise")
    with pytest.raises(bridge.BridgeError, match=r"a = .* outside \[0, 1\]"):
        bridge.smooth(strict, seed=0, num_samples=64, scale=1.0)(torch.tensor([0.5]))


def test_a_plain_scale_is_in_natural_units():
    sim = bridge.as_simulator(lambda x: x, names=["kv", "angstrom"], natural_scale=[30.0, 0.5])
    e = bridge.smooth(sim, seed=0, num_samples=256, scale=0.1)
    f = bridge.smooth(lambda x: x, seed=0, num_samples=256, scale=0.1 * torch.tensor([30.0, 0.5]).double())
    assert torch.equal(e(X), f(X))


@pytest.mark.parametrize("dtype", [">i4", "<i8", ">u8", "u2", "strided"])
def test_arrays_of_keys_and_numbers_in_any_order_of_bytes(dtype: str):
    numbers = np.array([9, 4, 7])[::-1] if dtype == "strided" else np.array([7, 4, 9], dtype)
    smoothed = bridge.smooth(VECTORIZED, seed=0, num_samples=4, scale=0.1)
    x = torch.stack([X, X + 1, X + 2])
    expected = smoothed(x, step=torch.tensor([7, 4, 9]), problem=torch.tensor([7, 4, 9]))
    assert torch.equal(smoothed(x, step=numbers, problem=numbers), expected)
    with pytest.raises(bridge.InputError, match=r"2\^63 - 1"):
        smoothed(x, step=np.array([1, 2, 1 << 63], "u8"))
    if dtype[0] == ">":
        wide = np.array([0.1] * len(X), ">f8")
        turned = np.ascontiguousarray(x.numpy()).astype(">f8")
        again = smoothed(turned, step=numbers, problem=numbers, scale=wide)
        assert torch.equal(again, expected)


@pytest.mark.parametrize("target", [np.array([1.0, 2.0], dtype=object), np.array(["1", "2"]), None])
def test_a_target_of_no_numbers_is_refused_with_what_to_do(target: object):
    smoothed = bridge.smooth(lambda x: x[:2], seed=0, num_samples=4, scale=0.1, points="mc")
    with pytest.raises(bridge.InputError, match=r"real numbers as the target, got .*Give "):
        smoothed.squared_error(torch.zeros(2, dtype=torch.float64), target)
    again = smoothed.squared_error(torch.zeros(2, dtype=torch.float64), np.array([0.1, 0.2], ">f8"))
    exact = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert torch.equal(again, smoothed.squared_error(torch.zeros(2, dtype=torch.float64), exact))
