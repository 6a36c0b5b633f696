"""Ground truth for estimators: quadrature in place of noise, and statistical tests that would notice an error."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.distributions import Cauchy, Distribution, Gaussian, Gumbel, Triangular
from bridge.estimators.points import Nodes, PointSet


@final
@dataclass(frozen=True)
class Quadrature(PointSet):
    """Gauss-Legendre nodes and weights for a density in place of random points: the estimators without noise.

    Use it with covariate="none" and num_samples=rule.size(distribution, d). Panels end at 0, where densities may have
    kinks, at `breakpoints` (in eps), where f may jump, and where the density falls below 1e-17.

    Args:
        order: nodes of a panel.
        breakpoints: eps values, in every coordinate, at which f is not smooth.
    """

    order: int = 40
    breakpoints: tuple[float, ...] = ()
    name: ClassVar[str] = "quadrature"

    def line(self, distribution: Distribution) -> tuple[Array, Array]:
        """Nodes and weights on the line: sum_i w_i g(e_i) = E[g]."""
        x, w = np.polynomial.legendre.leggauss(self.order)
        heavy = isinstance(distribution, Cauchy)
        if heavy:
            # In the angle t, e = tan t, the density is constant: the infinite support becomes an interval.
            angles = np.arctan([0.5, 1, 2, 4, 8, 16, 32, 64, np.inf])
            edges = np.concatenate([[0], angles, -angles, np.arctan(self.breakpoints)])
        else:
            ladder = (
                [0.25, 0.5, 1, 2, 3, 4.5, 6, 9] if isinstance(distribution, Gaussian) else [0.5, 1, 2, 4, 8, 16, 28, 42]
            )
            if isinstance(distribution, Triangular):
                ladder = [0.5, 1]
            left = [0.5, 1, 1.5, 2, 2.5, 3, 3.4, 3.8] if isinstance(distribution, Gumbel) else ladder
            edges = np.concatenate([[0], ladder, np.negative(left), self.breakpoints])
        edges = np.unique(edges)
        half = 0.5 * np.diff(edges)
        t = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * x).ravel()
        weight = (half[:, None] * w).ravel()
        if heavy:
            return np.tan(t), weight / np.pi
        return t, weight * np.exp(distribution.log_prob(t))

    def size(self, distribution: Distribution, d: int) -> int:
        """Number of nodes in d dimensions (a tensor product)."""
        return len(self.line(distribution)[0]) ** d

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        raise InputError("Quadrature has nodes and weights, not uniform points.")

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        e, w = self.line(distribution)
        if n != len(e) ** d:
            raise InputError(f"Expected num_samples={len(e) ** d} for this quadrature in {d} dimensions, got {n}.")
        eps = np.array(list(itertools.product(e, repeat=d)))
        weight = np.prod(np.array(list(itertools.product(w, repeat=d))), axis=1)
        return Nodes(eps, distribution.score(eps), weight, n)


def mean_differs(samples: ArrayLike, truth: ArrayLike, alpha: float = 1e-6) -> bool:
    """Whether a two-sided t-test, over the first axis and Bonferroni-corrected over the others, rejects the truth."""
    rows = np.asarray(samples, dtype=np.float64)
    rows = rows.reshape(len(rows), -1)
    deviation = rows.mean(axis=0) - np.asarray(truth, dtype=np.float64).ravel()
    error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    p = 2 * stats.t.sf(np.abs(deviation) / np.maximum(error, 1e-300), len(rows) - 1)
    return bool((p < alpha / rows.shape[1]).any())


def assert_mean(samples: ArrayLike, truth: ArrayLike, power: float = 0.1, alpha: float = 1e-6) -> None:
    """Asserts that independent estimates have this mean, and that the test would have noticed an error of `power`.

    Args:
        samples: (replicates, ...) independent estimates.
        truth: (...).
        power: the same test must reject truth x (1 + power) and truth x (1 - power); raise replicates if it cannot.
    """
    rows, exact = np.asarray(samples, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if mean_differs(rows, exact, alpha):
        raise AssertionError(f"Expected the mean {exact.tolist()}, got {rows.mean(axis=0).tolist()}.")
    for wrong in (exact * (1 + power), exact * (1 - power)):
        if not mean_differs(rows, wrong, alpha):
            raise AssertionError(f"{len(rows)} replicates cannot tell an error of {power:.0%}: take more.")
