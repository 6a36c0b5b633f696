"""Errors where a first-order descent has ended: along a valley that it has hardly moved along, only at the minimum."""

import numpy as np
import pytest
import torch

import bridge
from bridge.fitting.methods.descent_errors import of_descent
from bridge.fitting.misfit import Misfit
from bridge.fitting.prior import Prior

M = 30
AXES = np.linalg.qr(np.random.default_rng(2).normal(size=(M, 2)))[0]
STEEP = AXES * [30.0, 10.0]  # changes of the outputs over a natural unit, in standard deviations
VALLEY = AXES * [30.0, 1.0]  # of the second parameter the error is 1


def errors(J, start, end, noise, precision=0.0, about=0.01):
    """(2,) at an end, of a linear simulator whose truth is 0, and the notes. precision: of the second parameter."""
    target = torch.as_tensor(noise)
    prior = Prior(np.diag([0.0, precision]), np.zeros(2))
    misfit = Misfit(target, torch.tensor(1.0, dtype=torch.float64), None, prior)
    past = end + about * np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    y, slopes = torch.as_tensor(J @ end), torch.as_tensor(J)
    stated = of_descent(
        misfit,
        torch.stack([y, y]),
        torch.stack([slopes, slopes]),
        end,
        np.ones(2),
        True,
        past=past,
        start=start,
        last=0.1,
    )
    return np.sqrt(np.diag(stated.covariance)), [note.text for note in stated.notes]


def minimum(J, noise, precision=0.0):
    return np.linalg.solve(J.T @ J + np.diag([0.0, precision]), J.T @ noise)


def test_along_a_valley_that_it_has_hardly_moved_along_an_end_short_of_the_minimum_has_no_error():
    noise = np.random.default_rng(0).normal(size=M)
    least = minimum(VALLEY, noise)
    end = least + np.array([0.0, 0.4])
    error, notes = errors(VALLEY, end + np.array([3.0, 0.5]), end, noise)
    assert np.isnan(error[1])
    assert error[0] == pytest.approx(1 / 30, rel=0.1)
    assert any("along the valley" in text and "kriging" in text and "prior" in text for text in notes)


@pytest.mark.parametrize(
    ("J", "moved", "left", "precision"),
    [
        (VALLEY, 2.0, 0.4, 0.0),  # it has moved
        (VALLEY, 0.5, 0.02, 0.0),  # it has found the minimum
        (VALLEY, 0.0, 0.0, 0.0),  # it began there
        (STEEP, 0.05, 0.05, 0.0),  # there is no valley
        (VALLEY, 0.1, 0.2, 4.0),  # the prior tells where the minimum is
    ],
)
def test_errors_stay_where_the_end_is_that_of_any_start(J, moved, left, precision):
    noise = np.random.default_rng(0).normal(size=M)
    end = minimum(J, noise, precision) + np.array([0.0, left])
    error, notes = errors(J, end + np.array([0.01, moved]), end, noise, precision)
    expected = np.sqrt(np.diag(np.linalg.inv(J.T @ J + np.diag([0.0, precision]))))
    assert error == pytest.approx(np.hypot(expected, [0.0, left]), rel=0.05)
    assert not any("valley" in text for text in notes)


@pytest.mark.parametrize(("apart", "way", "least_stated"), [(0.1, 1.0, 0.99), (3.0, 1.0, 0.99), (0.8, 0.2, 0.0)])
def test_intervals_along_a_valley_hold_from_any_start_or_are_not_stated(apart, way, least_stated):
    """Starts at the truth, give or take `apart` errors; descents that go this part of the way to the minimum."""
    rng, inside, count = np.random.default_rng(4), [], 200
    for _ in range(count):
        noise, start = rng.normal(size=M), rng.normal(size=2) * [0.1, apart]
        least = minimum(VALLEY, noise)
        end = np.array([least[0], start[1] + way * (least[1] - start[1])])
        error = errors(VALLEY, start, end, noise)[0][1]
        inside += [abs(end[1]) < 1.96 * error] if np.isfinite(error) else []
    assert len(inside) >= least_stated * count
    assert 0.90 < np.mean(inside) < 0.98 or len(inside) < 0.15 * count


SGD = bridge.Torch(steps=60, num_samples=8, optimiser="SGD", learning_rate=0.03)


@pytest.mark.parametrize("method", [bridge.Adam(steps=60, num_samples=8), SGD], ids=["adam", "torch"])
def test_fits_state_no_error_along_a_valley_that_they_have_not_gone_down(method):
    """Outputs tell the second parameter by itself, but hardly: in natural units alone it is a valley."""
    t = np.linspace(0, 1, 25)

    def f(x):
        return x[0] * np.sin(3 * t) + 0.002 * x[1] * np.cos(9 * t)

    y = f(np.array([1.0, 0.0])) + 0.02 * np.random.default_rng(1).normal(size=25)
    simulator = bridge.as_simulator(f, names=["high", "low"], natural_scale=[0.1, 1.0])
    result = bridge.fit(simulator, y, [0.7, 0.5], seed=0, variance=4e-4, method=method)
    assert np.isfinite(result.standard_error[0])
    assert np.isnan(result.standard_error[1])
    assert any("along the valley" in w for w in result.warnings)
