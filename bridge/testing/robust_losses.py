"""What is asked of a robust loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from bridge.arrays import Array
from bridge.fitting.comparison import LeastSquares
from bridge.fitting.fit import fit
from bridge.fitting.robust import RobustLoss
from bridge.testing.common import Contract, refused


class RobustLossContract(Contract):
    """The contract of `bridge.RobustLoss`, for a test class that names one.

        class TestMine(bridge.testing.RobustLossContract):
            made = Welsch()

    Attributes:
        convex: whether the curvature is nowhere negative.
    """

    made: ClassVar[RobustLoss]
    convex: ClassVar[bool] = False

    def fit_settings(self, made: Any) -> dict[str, Any]:
        return {"misfit": LeastSquares(variance=0.01, robust=made)}

    def test_it_is_half_the_square_of_small_residuals(self) -> None:
        r = 1e-3 * self.made.width * np.array([-1.0, 0.5, 1.0])
        np.testing.assert_allclose(self.made.rho(r), 0.5 * r * r, rtol=1e-4)
        np.testing.assert_allclose(self.made.weight(r), 1, rtol=1e-4)
        np.testing.assert_allclose(self.made.curvature(r), 1, rtol=1e-4)
        for function, at_zero in ((self.made.rho, 0.0), (self.made.weight, 1.0), (self.made.curvature, 1.0)):
            assert function(np.zeros(1))[0] == at_zero

    def test_it_does_not_know_signs(self) -> None:
        r = self._residuals()
        for function in (self.made.rho, self.made.weight, self.made.curvature):
            assert np.array_equal(function(r), function(-r))

    def test_the_weight_times_the_residual_is_the_slope(self) -> None:
        r = self._residuals()
        x, w = _rule(r)
        found = (w * self.made.weight(x) * x).sum(axis=1)
        np.testing.assert_allclose(found, np.diff(self.made.rho(r)), rtol=1e-6, atol=1e-9)

    def test_the_curvature_is_the_slope_of_the_slope(self) -> None:
        r = self._residuals()
        x, w = _rule(r)
        found = (w * self.made.curvature(x)).sum(axis=1)
        np.testing.assert_allclose(found, np.diff(self.made.weight(r) * r), rtol=1e-6, atol=1e-9)
        assert not self.convex or (self.made.curvature(x) >= 0).all(), "convex = True, and the curvature is negative"

    def test_large_residuals_count_for_less(self) -> None:
        r = np.geomspace(1e-3, 1e6, 200) * self.made.width
        weight = self.made.weight(r)
        assert (weight > 0).all() or (weight >= 0).all()
        assert (weight <= 1).all()
        assert (np.diff(weight) <= 1e-12).all(), "the weight rises with the residual"
        assert weight[-1] < 1e-3, "an outlier a million widths long has a weight"
        assert (np.diff(self.made.rho(r)) >= 0).all(), "the loss falls with the residual"

    def test_the_width_is_a_setting(self) -> None:
        wide, r = replace(self.made, width=2 * self.made.width), self._residuals()
        # Measured in widths, the loss has one form.
        np.testing.assert_allclose(wide.rho(2 * r), 4 * self.made.rho(r), rtol=1e-9)
        np.testing.assert_allclose(wide.weight(2 * r), self.made.weight(r), rtol=1e-9)
        for width in (0.0, -1.0, float("nan")):
            with refused(f"a width of {width}"):
                replace(self.made, width=width)

    def test_a_fit_with_it_is_not_led_astray_by_an_outlier(self) -> None:
        t = np.linspace(0, 1, 15)
        target = 2.0 + 0.5 * t + 0.1 * np.sin(40 * t)
        target[6] += 5.0
        found = [
            fit(
                lambda p: p[0] + p[1] * t,
                target,
                [1.9, 0.6],
                seed=0,
                misfit=LeastSquares(variance=0.01, robust=robust),
                stop=15,
            )
            for robust in (None, self.made)
        ]
        errors = [np.abs(result.parameters - [2.0, 0.5]).max() for result in found]
        assert errors[1] < 0.5 * errors[0], f"errors {errors} without and with it"

    def _residuals(self) -> Array:
        """From 0 to ten widths, with the width itself, where some have a corner."""
        return self.made.width * np.concatenate([np.linspace(0, 1, 9), np.linspace(1.25, 10, 36)])


def _rule(ends: Array) -> tuple[Array, Array]:
    """Nodes and weights of an integral over each interval, (k, 16)."""
    x, w = np.polynomial.legendre.leggauss(16)
    half = 0.5 * np.diff(ends)[:, None]
    return 0.5 * (ends[1:] + ends[:-1])[:, None] + half * x, half * w
