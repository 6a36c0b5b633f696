"""A surrogate as control variate: unbiased whatever it is, exact where it is the simulator, its variance as derived."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, InputError
from bridge.testing import assert_mean, mean_differs

A = np.array([[1.0, -0.4], [0.2, 0.8], [-0.5, 0.6]])
X = torch.tensor([0.3, -0.2], dtype=torch.float64)
SCALE = 0.5


def waves(x):
    return np.sin(x @ A.T)


def steps(x):
    """A coarse and wrong one: quantised, of another amplitude, with a mean of its own."""
    return 0.8 * np.round(3 * np.sin(x @ A.T)) / 3 + 0.5


WAVES = bridge.as_simulator(waves, vectorized=True)
STEPS = bridge.as_simulator(steps, vectorized=True)
ZERO = bridge.as_simulator(lambda x: np.zeros((len(x), 3)), vectorized=True)


def truth(x=X, scale=SCALE):
    """E sin(A_j.(x + L eps)) = sin(A_j.x) exp(-|L A_j|^2 / 2) under Gaussian noise: value and Jacobian."""
    phase, damping = A @ x.numpy(), np.exp(-0.5 * scale**2 * (A**2).sum(axis=1))
    return np.sin(phase) * damping, (np.cos(phase) * damping)[:, None] * A


def stand_in(simulator=STEPS, samples=64, weight=1.0):
    return bridge.Surrogate(simulator, samples, weight)


STAND_IN = stand_in()


def smooth(simulator=WAVES, *, surrogate=STAND_IN, seed=0, num_samples=16, points="mc", **settings):
    return bridge.smooth(
        simulator, seed=seed, num_samples=num_samples, scale=SCALE, points=points, surrogate=surrogate, **settings
    )


def everything(estimate, v, t, scale=True):
    tensors = [estimate.value, estimate.jacobian(), estimate.vjp(v), estimate.jvp(t)]
    return [*tensors, estimate.vjp_scale(v)] if scale else tensors


V = torch.tensor([0.4, -1.0, 0.7], dtype=torch.float64)
T = torch.tensor([1.0, -2.0], dtype=torch.float64)


# -- unbiased ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "covariate", "settings"),
    [
        (1.0, "none", {"num_samples": 8}),
        pytest.param(-0.3, "loo", {"num_samples": 8}, marks=pytest.mark.slow),
        pytest.param("auto", "loo", {"num_samples": 16, "replicates": 4}, marks=pytest.mark.slow),
    ],
)
def test_any_weight_is_unbiased(weight, covariate, settings):
    """1,000 and 2,000 independent problems of a batch; the surrogate's own mean is far off, so that it must cancel."""
    smoothed = smooth(
        surrogate=stand_in(samples=32, weight=weight), covariate=covariate, on=bridge.Ranks(leaf_size=16), **settings
    )
    estimate = smoothed.estimate(X.expand(1000 if weight == "auto" else 2000, 2))
    value, jacobian = truth()
    assert_mean(estimate.value.numpy(), value)
    # (The third output's slope in the second parameter, say, is told from zero, not from a tenth of itself.)
    products = estimate.jacobian().numpy() @ np.array([1.0, -2.0])
    assert_mean(products, jacobian @ np.array([1.0, -2.0]), power=0.2)
    assert not mean_differs(estimate.jacobian().numpy(), jacobian)


def test_a_weight_from_the_same_rows_would_be_biased():
    """What cross-fitting is for: the test above is able to see the bias that it avoids. With f = eps^2, g = eps^2 + eps
    the regression coefficient goes with the mean of the same rows."""
    rng = np.random.default_rng(0)
    eps, further = rng.normal(size=(20000, 8)), rng.normal(size=(20000, 32))
    f, g, mean = eps**2, eps**2 + eps, (further**2 + further).mean(axis=1)
    centred = g - g.mean(axis=1, keepdims=True)
    same = (f * centred).sum(axis=1) / (centred**2).sum(axis=1)
    assert mean_differs(f.mean(axis=1) - same * (g.mean(axis=1) - mean), 1.0)
    halves = [(f[:, a], g[:, a], f[:, b], g[:, b]) for a, b in ((slice(4), slice(4, 8)), (slice(4, 8), slice(4)))]
    crossed = []
    for fa, ga, fb, gb in halves:
        centred = gb - gb.mean(axis=1, keepdims=True)
        alpha = (fb * centred).sum(axis=1) / (centred**2).sum(axis=1)
        crossed.append(fa.mean(axis=1) - np.clip(alpha, -2, 2) * (ga.mean(axis=1) - mean))
    assert not mean_differs(np.mean(crossed, axis=0), 1.0)


def test_a_stochastic_simulator_and_its_surrogate_share_common_seeds():
    """Given the seed the bracket has mean zero: noise that both add alike never enters."""

    def noisy(x, seed):
        return np.sin(x @ A.T) + 100 * np.random.default_rng(seed).normal()

    f = bridge.as_simulator(noisy, seeded=True)
    one = smooth(f, surrogate=stand_in(f), covariate="loo").estimate(X.expand(50, 2))
    calm = smooth(WAVES, surrogate=stand_in(WAVES), covariate="loo").estimate(X.expand(50, 2))
    torch.testing.assert_close(one.jacobian(), calm.jacobian(), rtol=1e-9, atol=1e-9)
    apart = smooth(f, surrogate=stand_in(f), covariate="loo", simulator_seeds="independent").estimate(X.expand(50, 2))
    assert (apart.jacobian() - calm.jacobian()).abs().mean() > 1


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [24.0, 0.0], ids=["kept", "streamed"])
@pytest.mark.parametrize("replicates", [1, 4])
def test_a_surrogate_of_zero_and_a_weight_of_zero_change_no_bit(keep, replicates):
    settings = {"memory": bridge.Memory(keep_mb=keep), "replicates": replicates, "num_samples": 32}
    plain = bridge.smooth(WAVES, seed=0, scale=SCALE, points="mc", **settings)
    expected = everything(plain.estimate(X, scale_gradient=True), V, T)
    for smoothed in (smooth(surrogate=stand_in(ZERO), **settings), smooth(surrogate=stand_in(weight=0.0), **settings)):
        estimate = smoothed.estimate(X, scale_gradient=True)
        assert estimate.streamed == (keep == 0)
        for got, want in zip(everything(estimate, V, T), expected, strict=True):
            assert torch.equal(got, want)
    auto = smooth(surrogate=stand_in(ZERO, weight="auto"), **{**settings, "replicates": 4}).estimate(X)
    assert torch.equal(auto.surrogate_weight, torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("keep", [24.0, 0.0], ids=["kept", "streamed"])
def test_the_simulator_as_its_own_surrogate_gives_the_further_rows_alone(keep):
    """f - f is exactly zero: the estimate is that of M rows, whatever N rows are."""
    many, few = (
        smooth(
            surrogate=stand_in(WAVES),
            num_samples=n,
            covariate="block",
            on=bridge.Ranks(leaf_size=1),
            memory=bridge.Memory(keep_mb=keep),
        ).estimate(X, scale_gradient=True)
        for n in (16, 128)
    )
    for a, b in zip(everything(many, V, T), everything(few, V, T), strict=True):
        assert torch.equal(a, b)
    # They are not the rows that the simulator has itself.
    plain = bridge.smooth(WAVES, seed=0, num_samples=64, scale=SCALE, points="mc", covariate="block").estimate(X)
    assert not torch.equal(many.value, plain.value)
    assert many.num_evaluations == 16
    assert many.num_surrogate_evaluations == 16 + 64


def test_it_is_the_sum_of_its_parts():
    """T_N[f] - alpha T_N[g] + alpha T_M[g], each of them an estimate of its own."""
    for weight in (1.0, 0.3):
        whole = smooth(surrogate=stand_in(weight=weight)).estimate(X, scale_gradient=True)
        f, g = (
            bridge.smooth(s, seed=0, num_samples=16, scale=SCALE, points="mc").estimate(X, scale_gradient=True)
            for s in (WAVES, STEPS)
        )
        # With f = 0 and alpha = -1 what is left is T_N[g] - T_M[g].
        bracket = smooth(ZERO, surrogate=stand_in(weight=-1.0)).estimate(X, scale_gradient=True)
        parts = zip(*(everything(e, V, T) for e in (whole, f, g, bracket)), strict=True)
        for got, fine, own, difference in parts:
            torch.testing.assert_close(got, fine - weight * difference, rtol=1e-12, atol=1e-13)
            assert not torch.allclose(difference, own)


@pytest.mark.parametrize("weight", [1.0, "auto"])
def test_autograd_gives_what_the_estimate_gives(weight):
    smoothed = smooth(surrogate=stand_in(weight=weight), replicates=4)
    x = X.clone().requires_grad_()
    scale = torch.full((2,), SCALE, dtype=torch.float64, requires_grad=True)
    estimate = smoothed.estimate(X, 3, scale_gradient=True)
    value = smoothed(x, 3, scale=scale)
    gradients = torch.autograd.grad(value @ V, (x, scale))
    assert torch.equal(value, estimate.value)
    for got, want in zip(gradients, (estimate.vjp(V), estimate.vjp_scale(V)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(estimate.jacobian() @ T, estimate.jvp(T))
    torch.testing.assert_close(estimate.jacobian().T @ V, estimate.vjp(V))
    torch.testing.assert_close(torch.func.jacrev(lambda t: smoothed(t, 3))(X), estimate.jacobian())
    torch.testing.assert_close(torch.func.jacfwd(lambda t: smoothed(t, 3))(X), estimate.jacobian())
    with torch.no_grad():
        assert torch.equal(smoothed(X, 3), estimate.value)


@pytest.mark.parametrize("weight", [0.5, "auto"])
def test_a_batch_is_its_problems(weight):
    smoothed = smooth(surrogate=stand_in(weight=weight), replicates=4)
    thetas = torch.stack([X, X + 0.3, X - 1])
    batch = smoothed.estimate(thetas)
    for b in range(3):
        single = smoothed.estimate(thetas[b], problem=b)
        assert torch.equal(batch.value[b], single.value)
        assert torch.equal(batch.jacobian()[b], single.jacobian())
        assert torch.equal(batch.surrogate_weight[b], single.surrogate_weight)
    mapped = torch.func.vmap(lambda x, b: torch.func.jacrev(partial(smoothed, problem=b))(x))(thetas, torch.arange(3))
    torch.testing.assert_close(mapped, batch.jacobian(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_second_derivatives(distribution):
    """Linear as all else, also at the kinks of Laplace's density: f twice is the estimate of the further rows."""
    settings = {"distribution": distribution, "covariate": "block", "replicates": 4}
    hessians = [
        torch.func.hessian(lambda x, s=s: s(x) @ V)(X)
        for s in (
            smooth(surrogate=stand_in(WAVES), **settings),
            smooth(surrogate=stand_in(WAVES), num_samples=32, **settings),
            smooth(**settings),
            smooth(surrogate=stand_in(weight=0.0), **settings),
            bridge.smooth(WAVES, seed=0, num_samples=16, scale=SCALE, points="mc", **settings),
        )
    ]
    assert torch.equal(hessians[0], hessians[1])
    assert torch.equal(hessians[3], hessians[4])
    assert not torch.allclose(hessians[2], hessians[4])
    auto = smooth(surrogate=stand_in(weight="auto"), **settings)
    assert torch.isfinite(torch.func.hessian(lambda x: auto(x) @ V)(X)).all()


def test_a_loss_is_taken_of_both():
    def loss(y):
        return (y**2).sum()

    smoothed = bridge.smooth_loss(
        WAVES, loss, seed=0, num_samples=16, scale=SCALE, points="mc", surrogate=bridge.Surrogate(WAVES, samples=64)
    )
    other = bridge.smooth_loss(
        WAVES, loss, seed=0, num_samples=32, scale=SCALE, points="mc", surrogate=bridge.Surrogate(WAVES, samples=64)
    )
    assert smoothed(X).shape == ()
    assert torch.equal(smoothed.estimate(X).value, other.estimate(X).value)


# -- variance ----------------------------------------------------------------------------------------------------------


def test_the_variance_is_that_of_the_difference_and_that_of_the_further_rows():
    """Var = Var(f - alpha g)/N + alpha^2 Var(g)/M, for the value and, without a covariate, for the Jacobian."""
    n, m, weight = 8, 64, 0.7
    rng = np.random.default_rng(5)
    eps = rng.normal(size=(400_000, 2))
    x = X.numpy() + SCALE * eps
    f, g = waves(x), steps(x)
    score = eps[:, 0] / SCALE
    difference = f - weight * g
    expected = [
        difference.var(axis=0) / n + weight**2 * g.var(axis=0) / m,
        (difference * score[:, None]).var(axis=0) / n + weight**2 * (g * score[:, None]).var(axis=0) / m,
    ]
    smoothed = smooth(
        num_samples=n, surrogate=stand_in(samples=m, weight=weight), covariate="none", on=bridge.Ranks(leaf_size=64)
    )
    estimate = smoothed.estimate(X.expand(2000, 2))
    got = [estimate.value.numpy().var(axis=0), estimate.jacobian().numpy()[:, :, 0].var(axis=0)]
    # A variance from 2,000 estimates has a standard error of 3 to 5 %.
    np.testing.assert_allclose(got[0], expected[0], rtol=0.15)
    np.testing.assert_allclose(got[1], expected[1], rtol=0.15)
    plain = f.var(axis=0) / n
    assert (got[0] < 0.6 * plain).all()


def test_auto_finds_the_weight_of_least_variance_and_leaves_a_useless_surrogate_alone():
    """alpha* = Cov/(Var (1 + N/M)). g = f / 4 + unrelated: about 4; unrelated alone: about 0."""

    def quarter(x):
        return 0.25 * waves(x) + 7.0

    def unrelated(x):
        return np.stack([np.sin(40 * x[:, 0]), np.cos(50 * x[:, 1]), np.sin(60 * x.sum(axis=1))], axis=1)

    settings = {"num_samples": 64, "replicates": 8, "on": bridge.Ranks(leaf_size=64)}
    found = {}
    for name, g in (("quarter", quarter), ("unrelated", unrelated)):
        smoothed = smooth(surrogate=stand_in(bridge.as_simulator(g, vectorized=True), 512, "auto"), **settings)
        estimate = smoothed.estimate(X.expand(80, 2))
        error = (estimate.jacobian() - torch.as_tensor(truth()[1])).square().mean().sqrt()
        found[name] = (float(estimate.surrogate_weight.mean()), float(error))
    plain = bridge.smooth(
        WAVES, seed=0, num_samples=64, scale=SCALE, points="mc", replicates=8, on=bridge.Ranks(leaf_size=64)
    ).estimate(X.expand(80, 2))
    error = float((plain.jacobian() - torch.as_tensor(truth()[1])).square().mean().sqrt())
    assert found["quarter"][0] == pytest.approx(4 / (1 + 64 / 512), rel=1e-9)
    assert found["quarter"][1] < 0.5 * error
    assert abs(found["unrelated"][0]) < 0.05
    assert found["unrelated"][1] < 1.1 * error
    # As a surrogate with a weight of one it does the harm that "auto" avoids.
    one = smooth(surrogate=stand_in(bridge.as_simulator(unrelated, vectorized=True), 512), **settings)
    worse = (one.estimate(X.expand(80, 2)).jacobian() - torch.as_tensor(truth()[1])).square().mean().sqrt()
    assert worse > 1.5 * error


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "points"), [(1.0, "auto"), ("auto", "mc")])
def test_intervals_cover(weight, points):
    smoothed = smooth(
        num_samples=64,
        replicates=8,
        surrogate=stand_in(samples=256, weight=weight),
        points=points,
        covariate="block",
        on=bridge.Ranks(leaf_size=64),
    )
    estimate = smoothed.estimate(X.expand(200, 2))
    value, jacobian = truth()
    v = V.expand(200, 3)
    checks = [
        (estimate.value, estimate.standard_error, torch.as_tensor(value)),
        (estimate.jacobian(), estimate.jacobian_standard_error(), torch.as_tensor(jacobian)),
        (estimate.vjp(v), estimate.vjp_standard_error(v), torch.as_tensor(V.numpy() @ jacobian)),
    ]
    for got, error, exact in checks:
        covered = ((got - exact).abs() <= estimate.interval(error)).double().mean()
        assert 0.91 < covered < 0.98, covered
        # Errors a quarter too small would be seen.
        assert ((got - exact).abs() <= 0.75 * estimate.interval(error)).double().mean() < 0.91


def test_an_accuracy_is_reached_with_fewer_runs():
    settings = {"num_samples": 16, "covariate": "block"}
    good = bridge.as_simulator(lambda x: waves(x) + 0.02 * np.round(x.sum(axis=1))[:, None], vectorized=True)
    with_one = smooth(surrogate=stand_in(good, samples=1024), **settings)
    plain = bridge.smooth(WAVES, seed=0, scale=SCALE, points="mc", **settings)
    cheap, dear = (s.estimate_to(X, relative_error=0.04, budget=20_000) for s in (with_one, plain))
    assert cheap.reached
    assert dear.reached
    assert 4 * cheap.num_evaluations < dear.num_evaluations
    torch.testing.assert_close(cheap.jacobian, torch.as_tensor(truth()[1]), atol=0.15, rtol=0)


# -- counted, stored, failing ------------------------------------------------------------------------------------------


def test_runs_are_counted_apart_and_never_differentiated():
    calls = {"fine": 0, "coarse": 0}

    def counting(name, function):
        def run(x):
            calls[name] += 1
            return function(x[None])[0]

        return bridge.as_simulator(run, repeatable=True)

    smoothed = smooth(counting("fine", waves), surrogate=stand_in(counting("coarse", steps)))
    estimate = smoothed.estimate(X.expand(3, 2))
    estimate.jacobian()
    assert calls == {"fine": 3 * 16, "coarse": 3 * (16 + 64)}
    assert (estimate.num_evaluations, estimate.num_surrogate_evaluations) == (48, 240)
    plain = bridge.smooth(WAVES, seed=0).estimate(X)
    assert plain.num_surrogate_evaluations == 0
    assert plain.surrogate_weight is None


def test_a_store_tells_the_two_apart_though_they_have_one_name(tmp_path):
    class Named:
        name, space, output_shape = "waves", None, (3,)
        calls = 0

        def __init__(self, function):
            self.function = function

        def __call__(self, inputs, seeds):
            self.calls += len(inputs)
            return self.function(inputs)

    fine, coarse = Named(waves), Named(steps)
    expected = smooth(fine, surrogate=stand_in(coarse)).estimate(X).jacobian()
    before = (fine.calls, coarse.calls)
    store = bridge.Store(tmp_path, above_s=0.0)
    for _ in range(2):
        assert torch.equal(smooth(fine, surrogate=stand_in(coarse), memory=store).estimate(X).jacobian(), expected)
    assert (fine.calls, coarse.calls) == (2 * before[0], 2 * before[1])
    # The simulator's own runs are found without the surrogate as well.
    bridge.smooth(fine, seed=0, num_samples=16, scale=SCALE, points="mc", memory=store).estimate(X)
    assert fine.calls == 2 * before[0]


def test_failures_of_the_surrogate():
    def fragile(x):
        if x[0] > 0.9:
            raise ValueError("no mesh")
        return steps(x[None])[0]

    with pytest.raises(EvaluationError, match="no mesh"):
        smooth(surrogate=stand_in(fragile))(X)
    estimate = smooth(surrogate=stand_in(fragile), failures="drop", covariate="block").estimate(X.expand(200, 2))
    assert estimate.num_failed == 0
    assert estimate.num_surrogate_failed > 400
    # What fails of the surrogate fails in both of its parts: the estimate stays that of the simulator.
    assert not mean_differs(estimate.jacobian().numpy(), truth()[1])
    assert not mean_differs(estimate.value.numpy(), truth()[0])


def test_it_runs_in_processes_of_its_own():
    expected = smooth(_plain_waves, surrogate=stand_in(_plain_steps)).estimate(X)
    estimate = smooth(_plain_waves, surrogate=stand_in(_plain_steps), on="process").estimate(X)
    assert torch.equal(estimate.jacobian(), expected.jacobian())


def _plain_waves(x):
    return np.sin(A @ x)


def _plain_steps(x):
    return np.round(3 * np.sin(A @ x)) / 3


# -- at the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surrogate": stand_in(weight="auto")}, "replicates=8"),
        ({"surrogate": stand_in(weight="auto"), "replicates": 2}, "at least 4 replicates"),
        ({"surrogate": stand_in(weight="best")}, "a number or 'auto'"),
        ({"surrogate": stand_in(weight=np.nan)}, "finite weight of the surrogate"),
        ({"surrogate": stand_in(samples=0)}, "samples of the surrogate"),
        ({"surrogate": stand_in(samples=66), "replicates": 4}, "multiple of replicates=4"),
        ({"covariate": "bq"}, "other than 'bq'"),
        ({"points": "rqmc-cartesian", "num_samples": 16, "surrogate": stand_in(samples=63)}, "63|64"),
    ],
)
def test_settings_are_refused(settings, message):
    two = bridge.as_simulator(waves, vectorized=True, names=("a", "b"))
    with pytest.raises(InputError, match=message):
        smooth(two, **settings)
    with pytest.raises(InputError, match=r"no surrogate for straight_through\(\)"):
        smooth(two).straight_through()


def test_other_parameters_bounds_and_outputs_are_refused():
    def simulator(names=("a", "b"), bounds=None, shape=(3,)):
        return bridge.as_simulator(waves, vectorized=True, names=names, bounds=bounds, output_shape=shape)

    fine = simulator(bounds=[(-1, 1), (-1, 1)])
    with pytest.raises(InputError, match=r"same parameters .* a, b, got a, c"):
        smooth(fine, surrogate=stand_in(simulator(("a", "c"))))
    with pytest.raises(InputError, match="widen the surrogate's"):
        smooth(fine, surrogate=stand_in(simulator(bounds=[(-1, 1), (-1, 0.5)])))
    with pytest.raises(InputError, match=r"shape \(3,\) from the surrogate .* got \(4,\)"):
        smooth(fine, surrogate=stand_in(simulator(shape=(4,))))
    # One that is only known once it has run, before the simulator has.
    runs = []
    dear = bridge.as_simulator(lambda x: runs.append(1) or waves(x[None])[0], output_shape=(3,))
    with pytest.raises(InputError, match=r"got \(2,\)"):
        smooth(dear, surrogate=stand_in(lambda x: waves(x[None])[0, :2]))(X)
    assert not runs
    with pytest.raises(InputError, match=r"got \(2,\)"):
        smooth(surrogate=stand_in(lambda x: waves(x[None])[0, :2]))(X)


def test_what_needs_rows_is_refused():
    estimate = smooth(covariate="loo").estimate(X)
    asks = [
        lambda: estimate.standard_error,
        estimate.jacobian_standard_error,
        lambda: estimate.vjp_standard_error(V),
        estimate.covariance,
        lambda: estimate.variance_vjp(V),
        estimate.median,
        lambda: estimate.squared_error(V),
    ]
    for ask in asks:
        with pytest.raises(InputError, match="no surrogate for"):
            ask()


# -- ranks -------------------------------------------------------------------------------------------------------------

RANKS = """
import hashlib
import numpy as np
import torch
import bridge

A = np.random.default_rng(0).normal(size=(2, 300))
fine = lambda x: np.sin(x @ A).astype(np.float32)
coarse = lambda x: (np.round(4 * np.sin(x @ A)) / 4).astype(np.float32)
theta = torch.tensor([[0.1, 0.4], [0.2, 0.3]], dtype=torch.float64, requires_grad=True)
matrix = torch.tensor([[0.5, 0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
digest = hashlib.sha256()
for keep in (40, 0):
    for weight, replicates in ((1.0, 1), (0.7, 4), ("auto", 4)):
        smoothed = bridge.smooth(
            fine, seed=0, num_samples=16, replicates=replicates, memory=bridge.Memory(keep_mb=keep),
            surrogate=bridge.Surrogate(coarse, samples=96, weight=weight),
        )
        y = smoothed(theta, step=2, scale=matrix)
        gradients = torch.autograd.grad((y**2).sum(), (theta, matrix))
        e = smoothed.estimate(theta.detach())
        tensors = [y, *gradients, e.jacobian(), e.jvp(torch.ones(2, 2)), e.surrogate_weight]
        if replicates > 1:
            tensors.append(e.jacobian_standard_error())
        for t in tensors:
            digest.update(t.detach().numpy().tobytes())
try:
    bridge.smooth(fine, seed=0, surrogate=lambda x: coarse(x)[:5])(theta)
except bridge.errors.InputError as error:
    digest.update(str(error).encode())
if bridge.is_root():
    print("digest", digest.hexdigest())
"""


@pytest.mark.mpi
def test_the_same_bits_on_any_number_of_ranks(run_ranks, run_alone):
    digests = {}
    for ranks in (1, 2, 3):
        done = run_alone(RANKS) if ranks == 1 else run_ranks(ranks, RANKS)
        assert done.returncode == 0, done.stderr
        digests[ranks] = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    assert len(digests[1]) == 1
    assert digests[1] == digests[2] == digests[3]
