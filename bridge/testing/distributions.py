"""What is asked of a density."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch

from bridge.arrays import Array
from bridge.estimators.distributions import Distribution, get_distribution
from bridge.simulator.function import as_simulator
from bridge.smoothing.smooth import smooth
from bridge.testing.common import Contract, short_descent

# What a tail has at least; the uniform numbers that perturbations are made of come as near to 0 and 1 as these.
_TAIL, _LOWEST, _HIGHEST = 1e-13, 2.0**-54, 1 - 2.0**-53


class DistributionContract(Contract):
    """The contract of `bridge.Distribution`, for a test class that names one.

        class TestMine(bridge.testing.DistributionContract):
            made = Epanechnikov()

    All integrals are Gauss-Legendre sums between quantiles, of p = exp(log_prob).
    """

    made: ClassVar[Distribution]

    def fit_settings(self, made: Any) -> dict[str, Any]:
        return {"method": short_descent(distribution=made)}

    def test_icdf_inverts_the_integral_of_the_density(self) -> None:
        u, places = _quantiles(self.made)
        kinks = _kinks(self.made, places)
        masses = []
        for a, b in pairwise(places):
            inner = [a, *[kink for kink in kinks if a < kink < b], b]
            masses.append(sum(float(_rule(self.made, *ends)[1].sum()) for ends in pairwise(inner)))
        below = _TAIL + np.cumsum(masses)
        np.testing.assert_allclose(below, u[1:], atol=1e-8, err_msg="the integral of p up to icdf(u) is not u")
        lower = u[1:] <= 0.5
        np.testing.assert_allclose(
            np.array(masses)[lower], np.diff(u)[lower], rtol=1e-5, err_msg="icdf and log_prob differ in the lower tail"
        )

    def test_score_is_minus_the_slope_of_log_prob(self) -> None:
        ends = self._ends()
        found = [float((w * self.made.score(e)).sum()) for e, w in self._rules(ends)]
        p = np.exp(self.made.log_prob(ends))
        np.testing.assert_allclose(
            found, p[:-1] - p[1:], atol=self._slack * p.max(), err_msg="the integral of s p is not -p's difference"
        )

    def test_the_score_has_the_moments_that_gradients_need(self) -> None:
        e, w = self._everywhere()
        s = self.made.score(e)
        assert abs(float((w * s).sum())) < 1e-5, f"E[s] = {float((w * s).sum()):.3g}, not 0"
        assert abs(float((w * s * e).sum()) - 1) < 1e-4, f"E[s eps] = {float((w * s * e).sum()):.6g}, not 1"
        assert get_distribution(self.made) is self.made

    def test_fisher_information_is_as_stated(self) -> None:
        stated, (e, w) = self.made.fisher_information, self._everywhere()
        square = w * self.made.score(e) ** 2
        if np.isfinite(stated):
            assert abs(float(square.sum()) - stated) < 1e-4 * stated, f"E[s^2] = {float(square.sum()):.6g}"
        if np.isinf(stated):
            middle = np.abs(e) <= np.abs(self.made.icdf(np.array([1e-4, 1 - 1e-4]))).min()
            assert square.sum() > 1.1 * square[middle].sum(), "E[s^2] is finite, and stated as infinite"

    def test_second_score_is_that_of_the_density(self) -> None:
        _, places = _quantiles(self.made)
        # Between quantiles, where a kink is seen; cut at those that are stated, with a gap.
        ends = np.unique(np.concatenate([0.5 * (places[1:] + places[:-1]), _kinks(self.made, places)]))
        width = np.diff(ends)
        a, b = ends[:-1] + 1e-3 * width, ends[1:] - 1e-3 * width
        found = []
        for left, right in zip(a, b, strict=True):
            e, w = _rule(self.made, left, right)
            found.append(float((w * self.made.second_score(e)).sum()))
        slopes = np.concatenate([self._slope(a), self._slope(b)])
        np.testing.assert_allclose(
            found,
            self._slope(b) - self._slope(a),
            atol=1e-4 * np.abs(slopes).max(),
            err_msg="the integral of second_score p is not the difference of p', or p has a kink that atoms lacks",
        )

    def test_atoms_are_the_jumps_of_the_slope(self) -> None:
        stated, ends = dict(self.made.atoms), self._ends()
        size = np.abs(self._slope(0.5 * (ends[1:] + ends[:-1]))).max()
        for place, mass in stated.items():
            beside = self._slope(np.array([place - 1e-6, place + 1e-6]))
            jump = float(beside[1] - beside[0])
            assert abs(jump - mass) < 1e-3 * max(1.0, abs(mass)), f"p' jumps by {jump:.4g} at {place}, not by {mass}"
        for end, slope in zip(ends[[0, -1]], self._slope(ends[[0, -1]]), strict=True):
            listed = any(abs(place - end) < 1e-3 for place in stated)
            assert listed or abs(slope) < 1e-2 * size, f"p' ends in a jump at {end:.4g} that atoms lacks"

    def test_it_is_symmetric_where_it_says_so(self) -> None:
        u = np.array([2.0**-k for k in (1, 2, 3, 8, 20)])
        e = self.made.icdf(u)
        mirrored = np.allclose(e, -self.made.icdf(1 - u), atol=1e-9)
        mirrored = mirrored and np.allclose(self.made.log_prob(e), self.made.log_prob(-e), atol=1e-9)
        assert mirrored or not self.made.symmetric, "symmetric = True, and p(-e) is not p(e)"

    def test_numbers_stay_finite_at_both_ends(self) -> None:
        u = np.array([_LOWEST, 1e-9, 0.3, 0.5, 0.8, 1 - 1e-9, _HIGHEST])
        e, s = self.made.icdf(u), self.made.score_from_uniform(u)
        assert np.isfinite(e).all(), f"icdf of {u} is {e}"
        assert np.isfinite(s).all(), f"score_from_uniform of {u} is {s}"
        assert (np.diff(e) > 0).all(), "icdf does not rise"
        inner = slice(2, 5)
        np.testing.assert_allclose(s[inner], self.made.score(e[inner]), rtol=1e-6, atol=1e-9)

    def test_many_numbers_at_once_are_each_its_own(self) -> None:
        u = np.linspace(0.05, 0.95, 12).reshape(3, 4)
        for function in (self.made.icdf, self.made.score_from_uniform):
            alone = np.array([[function(np.array(x)) for x in row] for row in u])
            np.testing.assert_allclose(function(u), alone, rtol=1e-14)

    def test_smoothing_with_it_is_the_integral(self) -> None:
        e, w = self._everywhere()
        x, width = 0.37, 0.6
        at = np.tanh(1.3 * (x + width * e) + 0.4)
        smoothed = smooth(
            as_simulator(lambda rows: np.tanh(1.3 * rows[:, 0] + 0.4), vectorized=True),
            seed=0,
            num_samples=4096,
            scale=width,
            distribution=self.made,
        )
        estimate = smoothed.estimate(torch.tensor([x], dtype=torch.float64))
        assert abs(float(estimate.value) - float((w * at).sum())) < 0.01
        assert abs(float(estimate.jacobian()) - float((w * 1.3 * (1 - at**2)).sum())) < 0.03

    # -- integrals --------------------------------------------------------------------------------------------------

    @property
    def _slack(self) -> float:
        """What differences of `log_prob` in place of a score of its own cost at the ends of a compact support."""
        return 2e-5 if type(self.made).score is Distribution.score else 1e-7

    def _ends(self) -> Array:
        """Between which p is smooth, and changes little."""
        _, places = _quantiles(self.made)
        return np.unique(np.concatenate([places, _kinks(self.made, places)]))

    def _rules(self, ends: Array) -> list[tuple[Array, Array]]:
        return [_rule(self.made, a, b) for a, b in pairwise(ends)]

    def _everywhere(self) -> tuple[Array, Array]:
        rules = self._rules(self._ends())
        return np.concatenate([e for e, _ in rules]), np.concatenate([w for _, w in rules])

    def _slope(self, e: Array) -> Array:
        """p'."""
        p = np.exp(self.made.log_prob(e))
        return np.asarray(np.where(p > 0, -self.made.score(e) * p, 0.0))


def _quantiles(distribution: Distribution) -> tuple[Array, Array]:
    """u from one tail to the other, closer towards the ends, and icdf(u)."""
    tail = np.geomspace(_TAIL, 0.5, 70)
    u = np.concatenate([tail, 1 - tail[-2::-1]])
    places = np.asarray(distribution.icdf(u), dtype=np.float64)
    assert (np.diff(places) > 0).all(), "icdf does not rise"
    return u, places


def _kinks(distribution: Distribution, places: Array) -> list[float]:
    return [place for place, _ in distribution.atoms if places[0] < place < places[-1]]


def _rule(distribution: Distribution, a: float, b: float) -> tuple[Array, Array]:
    """Nodes, and weights times p, of an integral from a to b."""
    x, w = np.polynomial.legendre.leggauss(20)
    e = 0.5 * (a + b) + 0.5 * (b - a) * x
    return e, 0.5 * (b - a) * w * np.exp(distribution.log_prob(e))
