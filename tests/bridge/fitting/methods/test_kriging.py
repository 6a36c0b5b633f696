"""Fits by a model of all runs: answers that are known, errors that cover, mistakes that are told, bits that stay."""

import json

import numpy as np
import pytest

import bridge
from bridge.errors import EvaluationError, InputError
from tests.lab.fits import START, TRUTH, X, decay, killed_and_resumed, named

YY, XX = np.mgrid[0:64, 0:64] + 0.5


def ellipse(theta):
    return ((((XX - theta[0]) / theta[2]) ** 2 + ((YY - theta[1]) / theta[3]) ** 2) < 1).astype(float)


def test_linear_least_squares_and_its_covariance():
    rng = np.random.default_rng(0)
    A = rng.normal(size=(30, 3))
    target = A @ TRUTH + 0.1 * rng.normal(size=30)
    result = bridge.fit(
        lambda t: A @ t, target, [0.0, 0.0, 0.0], seed=0, variance=0.01, method=bridge.Kriging(tolerance=0.01)
    )
    normal = A.T @ A / 0.01
    np.testing.assert_allclose(result.parameters, np.linalg.solve(normal, A.T @ target / 0.01), atol=2e-3)
    np.testing.assert_allclose(result.covariance, np.linalg.inv(normal), rtol=0.02, atol=1e-6)
    assert (result.method, result.stop_reason, result.num_failed) == ("kriging", "converged", 0)
    # Found in two rounds; the others make sure that nothing better is near.
    least = 0.5 * ((A @ np.linalg.solve(normal, A.T @ target / 0.01) - target) ** 2).sum() / 0.01
    assert result.history[1].num_evaluations == 12
    assert result.history[1].loss < least + 0.01
    assert result.num_evaluations <= 30
    unknown = bridge.fit(lambda t: A @ t, target, [0.0, 0.0, 0.0], seed=0)
    residual = target - A @ np.linalg.lstsq(A, target, rcond=None)[0]
    expected = np.linalg.inv(A.T @ A) * (residual @ residual) / 27
    np.testing.assert_allclose(unknown.covariance, expected, rtol=0.05, atol=1e-6)


def test_hard_ellipses_in_few_runs():
    """64 x 64 pixels of 0 and 1, off by up to the half-axes: gradients are zero almost everywhere."""
    for seed in range(3):
        rng = np.random.default_rng([77, seed])
        truth = np.array([*rng.uniform(24, 40, 2), rng.uniform(8, 14), rng.uniform(5, 9)])
        start = truth + np.array([*rng.uniform(-7, 7, 2), *rng.uniform(-1, 3, 2)])
        simulator = bridge.as_simulator(
            ellipse, bounds=[(0, 64), (0, 64), (2, 30), (2, 30)], natural_scale=[4.0, 4.0, 2.0, 2.0]
        )
        result = bridge.fit(simulator, ellipse(truth), start, seed=seed, stop=bridge.Stop(runs=80))
        assert np.abs(result.parameters - truth).max() < 0.5, (seed, result)
        assert result.num_evaluations <= 80


def test_a_stochastic_simulator_of_counts():
    def counts(theta, seed):
        rate = 200 * np.maximum(decay(theta), 1e-3)
        return 2 * np.sqrt(np.random.default_rng(seed).poisson(rate) + 0.375)

    target = 2 * np.sqrt(np.random.default_rng(5).poisson(200 * decay(TRUTH)) + 0.375)
    result = bridge.fit(named(counts, seeded=True), target, START, seed=0, variance=1.0, stop=bridge.Stop(runs=150))
    assert (np.abs(result.parameters - TRUTH) < 4 * result.standard_error).all()
    assert (result.standard_error < [0.1, 0.1, 0.1]).all()


@pytest.mark.slow
def test_the_intervals_of_noisy_refits_cover_the_truth():
    rng = np.random.default_rng(8)
    covered, count = 0, 120
    for seed in range(count):
        target = decay(TRUTH) + 0.05 * rng.normal(size=25)
        variance = 0.05**2 if seed % 2 else None
        result = bridge.fit(named(decay), target, START, seed=seed, variance=variance, stop=bridge.Stop(runs=80))
        covered += int((np.abs(result.parameters - TRUTH) < 1.96 * result.standard_error).sum())
    assert 0.90 <= covered / (3 * count) <= 0.98, covered / (3 * count)


def test_fixed_and_tied_parameters_and_priors():
    calls = []

    def simulator(theta):
        calls.append(theta)
        return decay(theta)

    bounded = named(simulator, bounds=[(0, 5), (0, 5), (0, 5)])
    result = bridge.fit(bounded, decay([2.0, 1.2, 0.7]), START, seed=0, fixed=["b"])
    assert {t[2] for t in calls} == {0.7}
    np.testing.assert_allclose(result.parameters, [2.0, 1.2, 0.7], atol=0.01)
    assert result.standard_error[2] == 0
    assert all(h.parameters[2] == 0.7 for h in result.history)
    pair = bridge.as_simulator(lambda t: np.array([t[0] + t[1], 2 * t[0] + t[1]]), names=["p", "q"])
    result = bridge.fit(pair, [2.0, 3.0], [0.0, 0.3], seed=0, tied={"q": "p"})
    np.testing.assert_allclose(result.parameters, [1.0, 1.0], atol=1e-3)
    # One number y = a with variance v and a prior (m, s): precision 1/v + 1/s^2.
    one = bridge.as_simulator(lambda t: np.array([t[0]]), names=["a"])
    result = bridge.fit(
        one, [1.0], [0.2], seed=0, variance=0.04, prior={"a": (0.0, 0.1)}, method=bridge.Kriging(tolerance=1e-3)
    )
    assert result.parameters[0] == pytest.approx(0.2, abs=2e-3)
    assert result.standard_error[0] == pytest.approx((1 / 0.04 + 1 / 0.01) ** -0.5, rel=0.02)


def test_failed_runs_are_lived_with_and_the_answer_stands_beside_them():
    def simulator(theta):
        if theta[1] > 1.3:
            raise ValueError("too fast")
        return decay(theta)

    target = decay(TRUTH)
    result = bridge.fit(named(simulator), target, [1.6, 1.1, 0.7], seed=1, failures="drop", stop=bridge.Stop(runs=120))
    np.testing.assert_allclose(result.parameters, TRUTH, atol=0.02)
    assert result.num_failed > 0
    with pytest.raises(EvaluationError, match="too fast"):
        bridge.fit(named(simulator), target, [1.6, 1.1, 0.7], seed=1, stop=bridge.Stop(runs=120))


def two_wells(theta):
    """The lesser well at -1.94, with a loss of 1.97 of 16 at the start; the target is met at 2."""
    return np.array([theta[0] ** 2 - 4, 0.5 * (theta[0] - 2)])


def test_a_search_that_is_stuck_begins_again_elsewhere():
    simulator = bridge.as_simulator(two_wells, bounds=[(-20, 20)], natural_scale=[0.5])
    once = bridge.fit(simulator, np.zeros(2), [-3.0], seed=1, method=bridge.Kriging(restarts=0))
    assert once.parameters[0] == pytest.approx(-1.935, abs=1e-3)
    result = bridge.fit(simulator, np.zeros(2), [-3.0], seed=1)
    assert result.parameters[0] == pytest.approx(2, abs=1e-3)
    notes = [step.note for step in result.history if "restart" in step.note]
    assert notes[0] == "restart 1: a minimum with loss 1.968 is found, and kept"


def test_restarts_where_everything_fails_lose_nothing():
    def walled(theta):
        return np.full(2, np.nan) if abs(theta[0] + 3) > 2 else two_wells(theta)

    simulator = bridge.as_simulator(walled, bounds=[(-200, 200)], natural_scale=[0.5])
    result = bridge.fit(simulator, np.zeros(2), [-3.0], seed=1, failures="drop", method=bridge.Kriging(restarts=8))
    assert result.parameters[0] == pytest.approx(-1.935, abs=1e-3)
    assert any("nothing but failures there" in step.note for step in result.history)


# --- a novice's mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "settings", "error", "words"),
    [
        (
            decay,
            {"start": [9.0, 0.9, 0.7]},
            InputError,
            r"inside the bounds, got a = 9 outside \[0, 5\]. Move the start",
        ),
        (lambda t: np.ones(25), {}, InputError, "too small, or the simulator is constant"),
        (
            lambda t: np.round(decay(t), -9),
            {"method": bridge.Kriging(scale=1e-6)},
            InputError,
            "natural scales of the parameters",
        ),
        (lambda t: np.full(25, np.nan), {}, EvaluationError, "NaN|not finite|non-finite"),
        (lambda t: np.full(25, np.nan), {"failures": "drop"}, EvaluationError, "all 6 runs about the start failed"),
        (decay, {"prior": {"c": (0, 1)}}, InputError, "Unknown parameter|Expected one of"),
        (decay, {"fixed": ["a", "b", "rate"]}, InputError, "free to be fitted"),
        (decay, {"covariate": "loo"}, InputError, r"Give method=bridge.Adam\(covariate=\.\.\.\)"),
        (decay, {"stop": 1}, InputError, "runs of at least 2, got 1"),
    ],
)
def test_a_mistake_is_told_with_what_to_change(function, settings, error, words):
    simulator = named(function, bounds=[(0, 5), (0, 5), (0, 5)])
    settings = {"start": START, "seed": 0, **settings}
    with pytest.raises(error, match=words):
        bridge.fit(simulator, decay(TRUTH), **settings)


def test_a_scale_too_small_or_too_large_is_mended_and_told():
    coarse = named(lambda t: np.round(decay(t), 1))
    result = bridge.fit(
        coarse, decay(TRUTH), START, seed=0, method=bridge.Kriging(scale=1e-4), stop=bridge.Stop(runs=80)
    )
    assert "too small" in result.history[0].note
    # Rounding makes a plateau of what fits as well as the truth does.
    assert result.loss <= 1.1 * 0.5 * ((np.round(decay(TRUTH), 1) - decay(TRUTH)) ** 2).sum()
    np.testing.assert_allclose(result.parameters, TRUTH, atol=0.2)

    def window(theta):  # nothing to be seen away from the start
        return np.exp(-((X - theta[0]) ** 2) * 4) * (np.abs(theta - START).max() < 1)

    result = bridge.fit(
        named(window),
        window(np.array([1.7, 0.9, 0.7])),
        START,
        seed=0,
        method=bridge.Kriging(scale=20.0),
        stop=bridge.Stop(runs=80),
    )
    assert "too large" in result.history[0].note
    assert result.parameters[0] == pytest.approx(1.7, abs=0.02)


@pytest.mark.parametrize(("m", "pace"), [(40, 0.7), (64, 0.35)])
def test_a_constant_simulator_is_told_from_a_wide_scale_whatever_the_rounding(m, pace):
    """Products of two rounds differ in their last bits, outputs do not."""
    with pytest.raises(InputError, match="or the simulator is constant there: nothing changes"):
        bridge.fit(lambda t: np.zeros(m), np.cos(pace * np.arange(m)), [1.8, 0.25], seed=0)


def test_a_parameter_that_does_nothing_or_is_known_together_only():
    idle = named(lambda t: t[0] * np.exp(-t[1] * X))
    result = bridge.fit(idle, 2 * np.exp(-X), START, seed=0, stop=bridge.Stop(runs=60))
    assert any(w.startswith("b is not determined") and "fixed=" in w for w in result.warnings)
    assert not np.isfinite(result.standard_error[2])
    assert not any("Natural scales" in w for w in result.warnings)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["parameters"]["b"]["standard_error"] is None
    product = bridge.as_simulator(lambda t: t[0] * t[1] * np.exp(-X), names=["a", "c"])
    noisy = 2 * np.exp(-X) + 0.05 * np.random.default_rng(0).normal(size=25)
    result = bridge.fit(product, noisy, [1.0, 1.0], seed=0, stop=bridge.Stop(runs=60))
    assert any("not determined" in w or "together" in w or "hardly" in w for w in result.warnings)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_fit_killed_between_two_steps_ends_bitwise_the_same(tmp_path, at):
    def fit(run, **settings):
        return bridge.fit(named(decay), decay(TRUTH), START, seed=0, stop=bridge.Stop(runs=50), run=run, **settings)

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert [h.parameters for h in resumed.history] == [h.parameters for h in whole.history]


def test_a_budget_is_kept_to_the_run():
    count = [0]

    def simulator(theta):
        count[0] += 1
        return np.floor(20 * decay(theta))

    newton = bridge.GaussNewton(num_samples=8)
    for budget, method in ((7, "kriging"), (23, "kriging"), (40, "kriging"), (40, newton)):
        count[0] = 0
        result = bridge.fit(
            named(simulator), decay(TRUTH) * 20, START, seed=0, method=method, stop=bridge.Stop(runs=budget)
        )
        assert count[0] == result.num_evaluations <= budget
    result = bridge.fit(named(simulator), decay(TRUTH) * 20, START, seed=0, stop=bridge.Stop(seconds=1e-6))
    assert (result.stop_reason, len(result.history)) == ("max_time", 1)
