"""Smoothing densities mu on R^d with independent, identical coordinates.

Everything is at unit scale; the scale matrix L acts later. The score is s(e) = -d log p(e) / de: the Gaussian's is +e.
It enters the estimators through E[f(x + L eps) (L^-T s)^T] = df_L/dx, which needs an absolutely continuous density, but
neither full support nor a derivative everywhere: where the derivative does not exist (a null set), the score is 0.

Reference: Petersen, Borgelt, Mishra, Ermon, arXiv 2410.08125, Lemma 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, final

import numpy as np
from scipy import special

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.registry import Registry


class Distribution(ABC):
    """A density on the line. A new one needs `icdf` and `log_prob`; the score is differentiated numerically unless
    it is given. `bridge.register("name")` makes it known by a name; `bridge.testing.DistributionContract` tests it.

    Attributes:
        name: as users write it.
        symmetric: p(-e) = p(e); antithetic pairs need it.
        fisher_information: E[s^2], the variance of the score; inf where it does not exist.
        cross_moments: whether E[s_i eps_j] exists for i != j, which a scale matrix with off-diagonal entries needs.
        atoms: (place, mass) of the point masses of p'': where p has a kink. A custom density with kinks lists them.
    """

    name: ClassVar[str] = "custom"
    symmetric: ClassVar[bool] = False
    fisher_information: ClassVar[float] = float("nan")
    cross_moments: ClassVar[bool] = True
    atoms: ClassVar[tuple[tuple[float, float], ...]] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @abstractmethod
    def icdf(self, u: Array) -> Array:
        """Inverse of the cumulative distribution function, for u in the open interval (0, 1)."""

    @abstractmethod
    def log_prob(self, e: Array) -> Array:
        """log p(e); -inf outside the support."""

    def score(self, e: Array) -> Array:
        """s(e) = -d log p / de, here by central differences (relative error about 1e-10)."""
        h = 6e-6 * np.maximum(1.0, np.abs(e))
        slope = (self.log_prob(e + h) - self.log_prob(e - h)) / (2 * h)
        return np.where(np.isfinite(slope), -slope, 0.0)

    def score_from_uniform(self, u: Array) -> Array:
        """s(icdf(u)); overridden where going through eps loses digits."""
        return self.score(self.icdf(u))

    def second_score(self, e: Array) -> Array:
        """p''(e) / p(e) = s^2 - s', where it exists; here by central differences of the score."""
        h = 1e-5 * np.maximum(1.0, np.abs(e))
        s = self.score(e)
        return np.asarray(s * s - (self.score(e + h) - self.score(e - h)) / (2 * h))


DISTRIBUTIONS: Registry[Distribution] = Registry(
    "distribution", "bridge.distributions", Distribution, or_else=", or a Distribution"
)


@DISTRIBUTIONS.register("gaussian")
@final
class Gaussian(Distribution):
    """p = exp(-e^2/2) / sqrt(2 pi); s = e. The least E[s^2] for a given variance."""

    symmetric = True
    fisher_information = 1.0

    def icdf(self, u: Array) -> Array:
        return special.ndtri(u)

    def log_prob(self, e: Array) -> Array:
        return -0.5 * e * e - 0.5 * np.log(2 * np.pi)

    def score(self, e: Array) -> Array:
        return np.array(e, dtype=np.float64)

    def second_score(self, e: Array) -> Array:
        return e * e - 1


@DISTRIBUTIONS.register("logistic")
@final
class Logistic(Distribution):
    """p = exp(-e) / (1 + exp(-e))^2; s = tanh(e/2), bounded."""

    symmetric = True
    fisher_information = 1 / 3

    def icdf(self, u: Array) -> Array:
        return special.logit(u)

    def log_prob(self, e: Array) -> Array:
        a = np.abs(e)
        return -a - 2 * np.log1p(np.exp(-a))

    def score(self, e: Array) -> Array:
        return np.tanh(0.5 * e)

    def second_score(self, e: Array) -> Array:
        t = np.tanh(0.5 * e)
        return 1.5 * t * t - 0.5


@DISTRIBUTIONS.register("gumbel")
@final
class Gumbel(Distribution):
    """p = exp(-e - exp(-e)); s = 1 - exp(-e). Not symmetric; its mean, 0.5772, shifts the point that is queried."""

    symmetric = False
    fisher_information = 1.0

    def icdf(self, u: Array) -> Array:
        return -np.log(-np.log(u))

    def log_prob(self, e: Array) -> Array:
        with np.errstate(over="ignore"):  # far left the density is exp(-inf) = 0
            return -e - np.exp(-e)

    def score(self, e: Array) -> Array:
        return -np.expm1(-e)

    def second_score(self, e: Array) -> Array:
        s = -np.expm1(-e)
        return s * s - np.exp(-e)


@DISTRIBUTIONS.register("cauchy")
@final
class Cauchy(Distribution):
    """p = 1 / (pi (1 + e^2)); s = 2e / (1 + e^2). For bounded f only: the mean of the noise does not exist."""

    symmetric = True
    fisher_information = 0.5
    cross_moments = False

    def icdf(self, u: Array) -> Array:
        # tan(pi (u - 1/2)) loses the tail's digits; the cotangent of the smaller tail keeps them.
        tail = np.minimum(u, 1 - u)
        return np.where(u == 0.5, 0.0, np.sign(u - 0.5) / np.tan(np.pi * tail))

    def log_prob(self, e: Array) -> Array:
        return -np.log(np.pi) - np.log1p(e * e)

    def score(self, e: Array) -> Array:
        return 2 * e / (1 + e * e)

    def second_score(self, e: Array) -> Array:
        return (6 * e * e - 2) / (1 + e * e) ** 2


@DISTRIBUTIONS.register("laplace")
@final
class Laplace(Distribution):
    """p = exp(-|e|) / 2; s = sign(e), and 0 at 0, where p has a kink."""

    symmetric = True
    fisher_information = 1.0
    atoms = ((0.0, -1.0),)

    def icdf(self, u: Array) -> Array:
        return np.where(u < 0.5, np.log(2 * u), -np.log(2 * (1 - u)))

    def log_prob(self, e: Array) -> Array:
        return -np.abs(e) - np.log(2.0)

    def score(self, e: Array) -> Array:
        return np.sign(e)

    def second_score(self, e: Array) -> Array:
        return np.ones_like(e)  # p'' = p - delta(0)


@DISTRIBUTIONS.register("triangular")
@final
class Triangular(Distribution):
    """p = max(0, 1 - |e|); s = sign(e) / (1 - |e|), and 0 at 0. Compact support: queries stay within L's box.

    The score has infinite variance: use points="qmc-latin", which keeps |s| <= sqrt(num_samples).
    """

    symmetric = True
    fisher_information = float("inf")
    atoms = ((-1.0, 1.0), (0.0, -2.0), (1.0, 1.0))

    def icdf(self, u: Array) -> Array:
        return np.where(u < 0.5, np.sqrt(2 * u) - 1, 1 - np.sqrt(2 * (1 - u)))

    def log_prob(self, e: Array) -> Array:
        inside = np.abs(e) < 1
        return np.where(inside, np.log1p(-np.where(inside, np.abs(e), 0.0)), -np.inf)

    def score(self, e: Array) -> Array:
        inside = np.abs(e) < 1
        return np.where(inside, np.sign(e) / np.where(inside, 1 - np.abs(e), 1.0), 0.0)

    def score_from_uniform(self, u: Array) -> Array:
        # 1 - |e| = sqrt(2 min(u, 1-u)) exactly; through e the ends cancel.
        return np.sign(u - 0.5) / np.sqrt(2 * np.minimum(u, 1 - u))

    def second_score(self, e: Array) -> Array:
        return np.zeros_like(e)  # p'' is nothing but its atoms


def check_distribution(distribution: Distribution) -> None:
    """Checks by quadrature that smoothing with this density has the derivative that the estimators use.

    E[s] = 0 and E[s e] = 1 hold for every absolutely continuous density whose boundary terms vanish; they fail for a
    uniform density (s = 0 almost everywhere, E[s e] = 0), for which the estimator would silently return 0.

    Raises:
        InputError: a moment is off by more than 1 %.
    """
    # Gauss-Legendre in t with u = 3t^2 - 2t^3, graded towards both ends; panels so that kinks do little harm.
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0.0, 1.0, 401)
    half = 0.5 * np.diff(edges)
    t = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * nodes).ravel()
    w = (half[:, None] * weights).ravel() * 6 * t * (1 - t)
    u = t * t * (3 - 2 * t)
    e = np.asarray(distribution.icdf(u), dtype=np.float64)
    s = np.asarray(distribution.score(e), dtype=np.float64)
    mean, product = float(np.sum(w * s)), float(np.sum(w * s * e))
    if not (np.isfinite(e).all() and abs(mean) < 0.01 and abs(product - 1) < 0.01):
        raise InputError(
            f"Expected a density with E[s] = 0 and E[s e] = 1 (s = -d log p / de), got {mean:.4g} and {product:.4g} "
            f"for {type(distribution).__name__}. A density that jumps, such as the uniform one, has no score-function "
            "gradient; take distribution='triangular' for compact support, and check icdf against log_prob."
        )


def fisher_information(distribution: Distribution) -> float:
    """E[s^2]: as the density states it, else by quadrature; inf where it grows without end towards the tails."""
    if not np.isnan(distribution.fisher_information):
        return distribution.fisher_information
    nodes, weights = np.polynomial.legendre.leggauss(40)

    def truncated(tail: float) -> float:
        # Panels that shrink towards both ends, in u.
        edges = np.concatenate([np.geomspace(tail, 0.5, 60), 1 - np.geomspace(tail, 0.5, 60)[-2::-1]])
        half = 0.5 * np.diff(edges)
        u = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * nodes).ravel()
        return float(np.sum((half[:, None] * weights).ravel() * distribution.score_from_uniform(u) ** 2))

    near, far = truncated(1e-4), truncated(1e-8)
    return far if np.isfinite(far) and far < 1.1 * near else float("inf")


def get_distribution(distribution: str | Distribution) -> Distribution:
    """The distribution of that name, or the given one; those of others after `check_distribution`.

    Raises:
        InputError: unknown name, the uniform density, or a density that fails the check.
    """
    if isinstance(distribution, str) and distribution == "uniform":
        raise InputError(
            "Expected an absolutely continuous density, got 'uniform': its score is 0 almost everywhere, so the "
            "estimated gradient would be 0 whatever the simulator does. Take 'triangular' for compact support."
        )
    density = DISTRIBUTIONS.make(distribution)
    if type(density).__module__ != __name__:
        check_distribution(density)
    return density
