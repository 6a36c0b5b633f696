"""How Gauss-Newton steps: no further than the scale reaches, with a scale that follows the steps."""

import numpy as np
import pytest
import torch

import bridge
from bridge.fitting.methods.steps import Schedule, SmoothedProblem
from bridge.fitting.misfit import Misfit
from bridge.fitting.prior import Prior
from tests.lab.fits import START, TRUTH, decay, killed_and_resumed, named

A = np.random.default_rng(4).normal(size=(30, 3)) * [3.0, 1.0, 0.3]
COUNT = np.arange(1, 11.0)


def jennrich_sampson(x):
    """Least at 0.2578 for both, of sum of squares 124.362, at the bottom of a narrow curved valley."""
    return np.exp(COUNT * x[0]) + np.exp(COUNT * x[1])


@pytest.mark.parametrize("longest", [10.0, 0.5, 0.01])
def test_a_step_that_is_too_long_is_that_of_levenberg(longest):
    target = torch.as_tensor(A @ TRUTH)
    misfit = Misfit(target, torch.ones(()), None, Prior(np.zeros((3, 3)), np.zeros(3)))
    seen = SmoothedProblem(None, misfit, np.ones(3), Schedule(1.0, 0.1, 10))
    step = seen.step(misfit, torch.as_tensor(A), torch.zeros(30, dtype=torch.float64), np.zeros(3), longest)
    H, g = A.T @ A, -A.T @ A @ TRUTH
    damped = H + 1e-3 * np.diag(np.diag(H))
    if longest > 2:
        np.testing.assert_allclose(step, -np.linalg.solve(damped, g), rtol=1e-8)
        return
    assert 0.98 * longest < np.abs(step).max() <= longest
    # (H + damping + lambda I) step = -g for one lambda.
    more = (-g - damped @ step) / step
    np.testing.assert_allclose(more, more[0], rtol=1e-6)
    assert more[0] > 0


def test_the_scale_follows_the_steps_and_a_linear_fit_ends_early():
    result = bridge.fit(lambda t: A @ t, A @ TRUTH, [1.5, 1.0, 0.8], seed=0, method="gauss-newton")
    scales = np.array([h.scale for h in result.history])
    assert scales[0] == 2.0
    assert (np.diff(scales) <= 0).all()
    assert (scales[1:] >= scales[:-1] / 4 - 1e-12).all()
    schedule = [Schedule(2.0, 0.1, 24).width(h.step) for h in result.history]
    assert (scales <= schedule).all()
    assert scales[4] == 0.1  # of the schedule it would be 1.1
    assert result.stop_reason == "converged"
    assert len(result.history) <= 10
    np.testing.assert_allclose(result.parameters, TRUTH, atol=1e-2)


def test_a_scale_that_is_given_as_a_number_stays_and_so_does_that_of_stages():
    def fit(**settings):
        method = bridge.GaussNewton(steps=8, num_samples=8, tolerance=0.0, **settings)
        return bridge.fit(lambda t: A @ t, A @ TRUTH, [1.5, 1.0, 0.8], seed=0, method=method)

    fixed = fit(scale=0.3)
    assert {h.scale for h in fixed.history} == {0.3}
    staged = fit(blur=[2])
    assert [h.scale for h in staged.history] == [Schedule(2.0, 0.1, 8).width(step) for step in range(8)]


def test_a_narrow_curved_valley_is_followed():
    """Steps cut to length go to and fro across it: two parts in a hundred of the start's loss were left."""
    sim = bridge.as_simulator(jennrich_sampson, names=["a", "b"], natural_scale=[0.1, 0.1])
    result = bridge.fit(sim, 2 + 2 * COUNT, [0.3, 0.4], seed=0, method="gauss-newton")
    least, start = 124.362, ((jennrich_sampson([0.3, 0.4]) - 2 - 2 * COUNT) ** 2).sum()
    left = ((jennrich_sampson(result.parameters) - 2 - 2 * COUNT) ** 2).sum() - least
    assert left < 1e-3 * (start - least)
    np.testing.assert_allclose(result.parameters, 0.2578, atol=0.03)


@pytest.mark.parametrize("at", [0, 3])
def test_each_start_has_a_scale_of_its_own_and_is_resumed_with_it(tmp_path, at):
    """Bitwise, though the scales of the next step are nowhere but in the state."""
    starts = [START, [4.0, 3.0, 0.2], [1.0, 0.2, 1.5]]

    def fit(run, **more):
        return bridge.fit(
            named(decay),
            decay(TRUTH),
            starts,
            seed=0,
            method=bridge.GaussNewton(steps=10, num_samples=8, halving=False),
            run=run,
            **more,
        )

    whole, resumed = killed_and_resumed(fit, tmp_path, at)
    assert resumed.history == whole.history
    # A start among others goes as it would alone, with its own scales, but for its noise.
    alone = bridge.fit(
        named(decay), decay(TRUTH), starts[0], seed=0, method=bridge.GaussNewton(steps=10, num_samples=8)
    )
    assert whole.ends[0].loss == pytest.approx(alone.loss, rel=1e-9)
    np.testing.assert_allclose(whole.ends[0].parameters, alone.parameters, rtol=1e-9)


def test_a_fit_that_ends_on_its_way_says_so():
    def fit(method, **settings):
        return bridge.fit(lambda t: A @ t, A @ TRUTH, TRUTH + 3.0, seed=0, method=method, **settings)

    cut = fit(bridge.GaussNewton(steps=3, num_samples=8, scale=0.2))
    (said,) = [w for w in cut.warnings if "still as long as it may be" in w]
    assert "max_steps" in said
    assert "Give the method more steps (steps=)" in said
    short = fit(bridge.GaussNewton(num_samples=8, scale=0.2), stop=bridge.Stop(runs=40))
    assert any("max_runs ended the fit" in w for w in short.warnings)
    for done in (
        bridge.GaussNewton(steps=24, num_samples=8, scale=0.2),
        bridge.Adam(steps=3, num_samples=8, scale=0.2),
    ):
        assert not any("as long as it may be" in w for w in fit(done).warnings)
