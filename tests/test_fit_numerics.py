"""No numerics of ours end a fit, whatever the scales, and "converged" is not said of a place that is worse than another.

The properties are those of every method: a fit, or an error of the package's own, or an end with the best so far.
"""

import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bridge

METHODS = ("kriging", "trust-region", "gauss-newton", "adam", "torch", "natural")
X = np.linspace(0.0, 1.0, 12)
KINDS = ("linear", "exponential", "plateau", "outlier", "overflow", "rounded", "noisy", "wall")
BUDGETS = {"kriging": 40, "trust-region": 40, "gauss-newton": 100, "adam": 100, "torch": 100, "natural": 100}


def simulator_of(kind, unit, size):
    """Two parameters of `unit`, outputs of `size`."""

    def line(theta):
        a, b = theta / unit
        return size * (a + b * X)

    def f(theta, seed=0):
        a, b = np.clip(theta / unit, -1e9, 1e9)
        if kind == "exponential":
            return size * a * np.exp(np.clip(-b * X, -600, 600))
        if kind == "plateau":
            return size * np.full(12, float(a > 0.3) + float(b > 0.2))
        if kind == "overflow":
            with np.errstate(over="ignore"):
                return line(theta) + size * np.exp(50 * np.maximum(np.abs(a) - 3, 0))
        if kind == "rounded":
            return size * np.round(line(theta) / size, 1)
        if kind == "noisy":
            return line(theta) + 0.1 * size * np.random.default_rng(seed).normal(size=12)
        if kind == "wall":
            return line(theta) if a < 2.0 else np.full(12, np.nan)
        return line(theta)

    return f


@st.composite
def fits(draw):
    kind = draw(st.sampled_from(KINDS))
    unit, size = (10.0 ** draw(st.integers(-12, 12)) for _ in range(2))
    told = draw(st.booleans())
    far = draw(st.sampled_from((0.0, 1.0, 30.0, 1000.0)))
    bounded = draw(st.booleans())
    f = simulator_of(kind, unit, size)
    given_ = {}
    if bounded:
        given_["bounds"] = [(-2000 * unit, 2000 * unit)] * 2
    if told:
        given_["natural_scale"] = [unit] * 2
    elif not bounded:
        given_["names"] = ["p", "q"]
    sim = bridge.as_simulator(f, seeded=kind == "noisy", **given_)
    direction = draw(st.sampled_from(((1.0, 1.0), (-1.0, 0.5), (0.0, -1.0))))
    start = unit * (np.array([1.0, 0.7]) - far * np.abs(direction))
    with np.errstate(all="ignore"):
        target = np.array(f(unit * np.array([1.0, 0.7])))
    if kind == "outlier":
        target[3] = size * 10.0 ** draw(st.integers(3, 9))
    return {
        "simulator": sim,
        "target": target,
        "start": start,
        "method": draw(st.sampled_from(METHODS)),
        "variance": size**2 if draw(st.booleans()) else None,
        "seed": draw(st.integers(0, 3)),
        "kind": kind,
        "size": size,
    }


def checked(case):
    case = dict(case)
    kind, size = case.pop("kind"), case.pop("size")
    method = case["method"]
    more = {"optimiser": "Adam"} if method == "torch" else {}
    if method in ("gauss-newton", "adam", "torch", "natural"):
        more |= {"num_samples": 8, "steps": 5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            result = bridge.fit(**case, max_runs=BUDGETS[method], **more)
        except bridge.BridgeError as error:
            assert len(str(error)) > 30
            return None
    assert np.isfinite(result.parameters).all()
    assert result.stop_reason in ("converged", "max_runs", "max_steps", "numerics", "no_better")
    if result.stop_reason == "converged" and np.isfinite(result.output).all() and kind != "noisy":
        # The numbers compared here are of order 1, whatever the units.
        at_end, at_start = (
            float((((y - case["target"]) / size) ** 2).sum()) for y in (result.output, result.start_output)
        )
        # What is less than the digits of the outputs, beside an outlier, is no difference.
        digits = 1e-9 * float(((case["target"] / size) ** 2).sum())
        assert at_end <= at_start * (1 + 1e-9) + digits, (at_end, at_start)
    return result


@settings(max_examples=30, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(fits())
def test_a_fit_of_anything_ends_in_good_order(case):
    checked(case)


@pytest.mark.slow
@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(fits())
def test_many_more_fits_of_anything_end_in_good_order(case):
    checked(case)
