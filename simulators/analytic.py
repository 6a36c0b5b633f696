"""Simulators whose smoothed values and Jacobians are known exactly: the ground truth for estimators.

Noise is L eps with independent coordinates of one of six unit densities, by name. The formulas are independent of the
estimators' own: cumulative and characteristic functions come from scipy and closed forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.space import ParameterSpace

DENSITIES: dict[str, Any] = {
    "gaussian": stats.norm(),
    "logistic": stats.logistic(),
    "gumbel": stats.gumbel_r(),
    "cauchy": stats.cauchy(),
    "laplace": stats.laplace(),
    "triangular": stats.triang(0.5, loc=-1, scale=2),
}
# Where the densities have kinks: quadrature is split there.
_KINKS: dict[str, tuple[float, ...]] = {"laplace": (0.0,), "triangular": (-1.0, 0.0, 1.0)}


class Smoothed(Protocol):
    """A simulator that knows its own smoothed value, (*output_shape), and Jacobian, (*output_shape, d)."""

    def smoothed(self, theta: ArrayLike, scale: Any, distribution: str) -> tuple[Array, Array]: ...


def _density(name: str) -> Any:
    if name not in DENSITIES:
        raise InputError(f"Unknown density {name!r}. Known: {', '.join(DENSITIES)}.")
    return DENSITIES[name]


def characteristic_function(name: str, t: ArrayLike) -> NDArray[np.complex128]:
    """E[exp(i t e)] of a unit density.

    Gaussian exp(-t^2/2); logistic pi t / sinh(pi t); Gumbel Gamma(1 - i t); Cauchy exp(-|t|); Laplace 1/(1 + t^2);
    triangular on [-1, 1] (sin(t/2) / (t/2))^2.
    """
    _density(name)
    t = np.asarray(t, dtype=np.float64)
    if name == "gumbel":
        return np.asarray(special.gamma(1 - 1j * t))
    if name == "logistic":
        a = np.pi * np.where(t == 0, 1.0, t)
        value = np.where(t == 0, 1.0, a / np.sinh(a))
    elif name == "gaussian":
        value = np.exp(-(t**2) / 2)
    elif name == "cauchy":
        value = np.exp(-np.abs(t))
    elif name == "laplace":
        value = 1 / (1 + t**2)
    else:
        value = np.sinc(t / (2 * np.pi)) ** 2
    return value.astype(np.complex128)


@dataclass(frozen=True)
class Sines:
    """f(x) = sin(W x + b): smooth, with any scale matrix.

    E sin(w.(x + L e) + b) = Im[exp(i (w.x + b)) prod_j phi((L^T w)_j)], phi the characteristic function.
    """

    weights: Array
    phases: Array

    @property
    def space(self) -> ParameterSpace | None:
        return None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (len(self.phases),)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return np.asarray(np.sin((inputs[:, None, :] * self.weights).sum(axis=2) + self.phases))

    def smoothed(self, theta: ArrayLike, scale: Any, distribution: str) -> tuple[Array, Array]:
        """Exact; scale: a number, (d,) or (d, d)."""
        d = self.weights.shape[1]
        L = np.asarray(scale, dtype=np.float64)
        L = L if L.ndim == 2 else np.diag(np.broadcast_to(L, (d,)))
        wave = np.exp(1j * (self.weights @ np.asarray(theta, dtype=np.float64) + self.phases))
        wave = wave * characteristic_function(distribution, self.weights @ L).prod(axis=1)
        return wave.imag, wave.real[:, None] * self.weights


@dataclass(frozen=True)
class HardSort:
    """The permutation matrix that sorts n numbers: P[i, j] = 1 where x_j has rank i, the smallest having rank 0."""

    n: int

    @property
    def space(self) -> ParameterSpace | None:
        return None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.n, self.n)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        ranks = np.argsort(np.argsort(inputs, axis=1, kind="stable"), axis=1)
        return np.asarray((ranks[:, None, :] == np.arange(self.n)[None, :, None]).astype(np.float64))

    def smoothed(self, theta: ArrayLike, scale: float, distribution: str) -> tuple[Array, Array]:
        """Exact to about 1e-12, by one-dimensional quadrature.

        P(x_j has rank i) = int p(e) B_i({F((x_j - x_k) / L + e)}_{k != j}) de, B_i the probability of i successes among
        independent trials (Poisson-binomial). dB_i/dq_k = B_{i-1} - B_i of the trials without k; moving all numbers
        alike changes nothing, which gives the derivative in x_j.
        """
        density = _density(distribution)
        x = np.asarray(theta, dtype=np.float64) / scale
        value, jacobian = np.zeros((self.n, self.n)), np.zeros((self.n, self.n, self.n))
        for j in range(self.n):
            others = [k for k in range(self.n) if k != j]
            e, weight = _quadrature(distribution, x[others] - x[j])
            at = x[j] - x[others] + e[:, None]
            q, slope = density.cdf(at), density.pdf(at)
            value[:, j] = weight @ _successes(q)
            for column, k in enumerate(others):
                rest = _successes(np.delete(q, column, axis=1))
                change = np.pad(rest, ((0, 0), (1, 0))) - np.pad(rest, ((0, 0), (0, 1)))
                jacobian[:, j, k] = -(weight * slope[:, column]) @ change / scale
            jacobian[:, j, j] = -jacobian[:, j].sum(axis=1)
        return value, jacobian


def _successes(q: Array) -> Array:
    """(r, n) chances of n independent trials -> (r, n + 1) probabilities of 0, ..., n successes."""
    result = np.ones((len(q), 1))
    for column in q.T:
        q_ = column[:, None]
        result = np.pad(result * (1 - q_), ((0, 0), (0, 1))) + np.pad(result * q_, ((0, 0), (1, 0)))
    return result


def _quadrature(distribution: str, shifts: Array) -> tuple[Array, Array]:
    """Nodes e and weights for E[g(e)], g with kinks at kink + shift: Gauss-Legendre in u = F(e), pieces that shrink
    geometrically towards both ends, where icdf is singular."""
    density = _density(distribution)
    kinks = [kink + s for kink in _KINKS.get(distribution, ()) for s in (0.0, *shifts)]
    ends = 0.5 ** np.arange(1, 50)
    inner = density.cdf(np.array(kinks)) if kinks else np.zeros(0)
    edges = np.unique(np.concatenate([[0.0, 1.0], ends, 1 - ends, inner]))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    u = (middle[:, None] + half[:, None] * nodes).ravel()
    weight = (half[:, None] * weights).ravel()
    inside = (u > 0) & (u < 1)
    return np.asarray(density.ppf(u[inside])), weight[inside]


@dataclass(frozen=True)
class Disc:
    """A hard disc as an image: pixel p of [-1, 1]^2 is 1 where |p - (x_0, x_1)|^2 < x_2^2, else 0."""

    size: int = 64

    @property
    def space(self) -> ParameterSpace | None:
        return None

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    def _centres(self) -> Array:
        return np.asarray((np.arange(self.size) + 0.5) / self.size * 2 - 1)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        p = self._centres()
        along = (p - inputs[:, :1]) ** 2
        across = (p - inputs[:, 1:2]) ** 2
        return np.asarray(along[:, :, None] + across[:, None, :] < inputs[:, 2, None, None] ** 2, dtype=np.float32)

    def smoothed(self, theta: ArrayLike, scale: float, distribution: str = "gaussian") -> tuple[Array, Array]:
        """Exact to about 1e-9 for Gaussian noise of one scale: |p - c|^2 / L^2 is non-central chi-square with two
        degrees of freedom and non-centrality a = |p - c|^2 / L^2; the radius by Gauss-Hermite quadrature.

        With F_2 and F_4 its cumulative distributions of two and four degrees, dF_2/da = (F_4 - F_2) / 2.
        """
        if distribution != "gaussian":
            raise InputError(f"Expected Gaussian noise for the exact disc, got {distribution!r}.")
        x, y, r = np.asarray(theta, dtype=np.float64)
        p = self._centres()
        dx, dy = np.meshgrid(p - x, p - y, indexing="ij")
        a = (dx**2 + dy**2) / scale**2
        z, weight = np.polynomial.hermite_e.hermegauss(40)
        value, slope, in_r = np.zeros_like(a), np.zeros_like(a), np.zeros_like(a)
        for radius, w in zip(r / scale + z, weight / weight.sum(), strict=True):
            two = stats.ncx2.cdf(radius**2, 2, a)
            value += w * two
            slope += w * (stats.ncx2.cdf(radius**2, 4, a) - two) / 2
            in_r += w * stats.ncx2.pdf(radius**2, 2, a) * 2 * radius / scale
        jacobian = np.stack([slope * -2 * dx / scale**2, slope * -2 * dy / scale**2, in_r], axis=-1)
        return value, jacobian
