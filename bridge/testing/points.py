"""What is asked of a point set."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch

from bridge.arrays import Array
from bridge.estimators.distributions import Distribution, Gaussian
from bridge.estimators.points import Nodes, PointSet
from bridge.simulator.function import as_simulator
from bridge.smoothing.smooth import smooth
from bridge.testing.common import Contract, refused, short_descent
from bridge.testing.truth import assert_mean, mean_differs

_DRAWS = 500


class PointSetContract(Contract):
    """The contract of `bridge.PointSet`, for a test class that names one.

        class TestMine(bridge.testing.PointSetContract):
            made = Lattice()
            feasible = ((8, 2), (31, 3))

    Attributes:
        feasible: (n, d) that it can make; those of the first are drawn many times.
        infeasible: (n, d) that it refuses.
        randomised: whether each point is uniform by itself, over all draws, so that means are unbiased.
        stratified: whether each of n equal intervals of every coordinate has one point.
        bias: of means and slopes, relative, where it is not randomised.
        distribution: of the noise that it is tested with.
    """

    made: ClassVar[PointSet]
    feasible: ClassVar[tuple[tuple[int, int], ...]] = ((8, 2), (64, 3), (1, 1))
    infeasible: ClassVar[tuple[tuple[int, int], ...]] = ()
    randomised: ClassVar[bool] = True
    stratified: ClassVar[bool] = False
    bias: ClassVar[float] = 0.05
    distribution: ClassVar[Distribution] = Gaussian()

    def fit_settings(self, made: Any) -> dict[str, Any]:
        n = next(n for n, d in self.feasible if d == 2)  # of two parameters
        return {"method": short_descent(points=made, num_samples=n)}

    def test_points_lie_in_the_open_cube(self) -> None:
        for n, d in self.feasible:
            for key in range(20):
                u = self.made.uniform(n, d, _generator(key))
                assert u.shape == (n, d), f"expected shape {(n, d)}, got {u.shape}"
                assert u.dtype == np.float64
                assert (u > 0).all(), "a point lies on a face of the cube: its perturbation would be infinite"
                assert (u < 1).all(), "a point lies on a face of the cube: its perturbation would be infinite"

    def test_points_depend_on_the_generator_alone(self) -> None:
        for n, d in self.feasible:
            first = self.made.uniform(n, d, _generator(3))
            np.random.default_rng(0).random(5)
            assert np.array_equal(first, self.made.uniform(n, d, _generator(3))), "the same generator, other points"
            if self.randomised:
                assert not np.array_equal(first, self.made.uniform(n, d, _generator(4))), "no noise in them"

    def test_nodes_are_perturbations_scores_and_weights_of_these_points(self) -> None:
        for n, d in self.feasible:
            nodes = self._nodes(n, d, 5)
            assert nodes.eps.shape == nodes.score.shape == (n, d)
            assert nodes.weight.shape == (n,)
            assert abs(nodes.weight.sum() - 1) < 1e-12, "the weights of the mean do not sum to 1"
            np.testing.assert_allclose(nodes.score, self.distribution.score(nodes.eps), rtol=1e-6, atol=1e-9)
            assert 1 <= nodes.block <= n, f"blocks of {nodes.block} rows among {n}"
            if nodes.paired:
                assert np.array_equal(nodes.eps[0::2], -nodes.eps[1::2]), "paired = True, and rows are no pairs"
                assert nodes.block % 2 == 0, "a pair is torn apart by its block"

    def test_blocks_are_independent_of_each_other(self) -> None:
        n, d = self.feasible[0]
        sets = [self._nodes(n, d, key) for key in range(_DRAWS)]
        block = sets[0].block
        if block == n:
            return  # nothing is claimed
        u = np.stack([nodes.eps for nodes in sets])
        for x in (u, u**2 - np.mean(u**2), np.sign(u)):
            # Products of rows of different blocks, over all pairs of these.
            whole = x.sum(axis=1) ** 2
            own = np.add.reduceat(x, np.arange(0, n, block), axis=1) ** 2
            pairs = (whole - own.sum(axis=1)).mean(axis=1) / (n * n - n * block)
            pairs = np.where(np.abs(pairs) < 1e-12, 0.0, pairs)  # of mirrored rows, but for rounding
            assert not mean_differs(pairs, 0.0), f"rows of different blocks of {block} depend on each other"

    def test_each_coordinate_is_uniform(self) -> None:
        n, d = self.feasible[0]
        u = np.stack([self.made.uniform(n, d, _generator(key)) for key in range(_DRAWS)])
        if self.randomised:
            moments = np.concatenate([u.mean(axis=1), (u**2).mean(axis=1), (u**5).mean(axis=1)], axis=1)
            assert_mean(moments, np.repeat([1 / 2, 1 / 3, 1 / 6], d), power=0.2)
        if self.stratified:
            for n, d in self.feasible:
                cells = np.sort(np.floor(self.made.uniform(n, d, _generator(1)) * n), axis=0)
                assert (cells == np.arange(n)[:, None]).all(), "an interval of a coordinate has none, or several"

    def test_means_and_slopes_are_unbiased(self) -> None:
        """E[exp(t.eps)] and E[exp(t.eps) s] = t E[exp(t.eps)], t small."""
        n, d = self.feasible[0]
        t = np.array([0.5, -0.3, 0.2, 0.4])[:d]
        values, slopes = [], []
        for key in range(_DRAWS):
            nodes = self._nodes(n, d, key)
            f = np.exp(nodes.eps @ t)
            values.append(nodes.weight @ f)
            slopes.append((nodes.weight * (f - 1)) @ nodes.score)  # f(x) = 1 is known, and less noise
        grid = self._moment(t)
        exact = [grid, *(grid * t)]
        found = np.column_stack([values, slopes])
        if self.randomised:
            assert_mean(found, exact, power=0.4)
        else:
            error = np.abs(found.mean(axis=0) / exact - 1).max()
            assert error < self.bias, f"a bias of {error:.1%}, more than {self.bias:.1%}"

    def test_smoothing_with_it_gives_the_slope_of_a_linear_function(self) -> None:
        A = np.array([[1.0, -2.0, 0.5, 1.5], [0.3, 0.8, -1.2, 0.1]])
        for n, d in self.feasible:
            if n < 8 * (d + 1):
                continue
            smoothed = smooth(
                as_simulator(lambda x, d=d: 3.0 + x @ A[:, :d].T, vectorized=True),
                seed=0,
                num_samples=n,
                scale=0.3,
                points=self.made,
                distribution=self.distribution,
            )
            jacobian = smoothed.estimate(torch.zeros(d, dtype=torch.float64)).jacobian().numpy()
            error = np.linalg.norm(jacobian - A[:, :d]) / np.linalg.norm(A[:, :d])
            assert error < 0.05, f"the slope of a linear function is off by {error:.1%} with {n} rows"

    def test_what_is_infeasible_is_refused(self) -> None:
        for n, d in self.infeasible:
            with refused(f"{n} rows of {d} parameters"):
                self._nodes(n, d, 0)

    def _nodes(self, n: int, d: int, key: int) -> Nodes:
        return self.made.nodes(self.distribution, n, d, _generator(key))

    def _moment(self, t: Array) -> float:
        """E[exp(t.eps)], by midpoints of u."""
        e = self.distribution.icdf((np.arange(200_000) + 0.5) / 200_000)
        return float(np.prod([np.exp(e * x).mean() for x in t]))


def _generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
