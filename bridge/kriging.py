"""A Gaussian process through all outputs of a simulator at once, known from their Gram matrix alone.

Every output o is modelled by a constant plus a Gaussian process, and all outputs share one kernel, so that the
prediction of each is the same linear combination of the rows that have been evaluated:

    mu(z) = F^T w(z),    |mu(z)|^2 = w^T G w,    G = F F^T,

with F (n, m) the whitened residuals of n rows. Whatever is wanted of m outputs, be it a loss, its gradient, the normal
matrix J^T J or the marginal likelihood, is made of the n x n matrix G: an image of 160,000 pixels costs no more than a
number. This is the Bayesian quadrature of `bridge.smooth(covariate="bq")` in the limit of no smoothing, over all rows
paid for so far.

The kernel is a squared exponential with a length for each parameter, a rough part exp(-r / 3) of the same lengths (a
hard edge that moves flips pixels in proportion to the distance), and a nugget (noise of the simulator). Its
numbers maximise the marginal likelihood times weak priors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize

Array = NDArray[np.float64]

# In units of the lengths: long enough that the rough part is a variogram linear in the distance.
_ROUGH_LENGTH = 3.0
# More outputs than this that vary independently of each other add no evidence: the kernel is never quite right.
_MOST_INDEPENDENT = 10.0
_LEAST_NUGGET = 1e-9
# (mean, standard deviation) of the priors on logarithms: mean length over its default, share of roughness, nugget.
_LENGTH, _ROUGHNESS, _NUGGET = (0.5, 1.2), (-5.0, 3.0), (-9.0, 5.0)
_SPREAD_OF_LENGTHS = 0.7
# Where the search for the kernel begins, in the same logarithms: smooth, very smooth, rough.
_STARTS = ((0.0, -6.0, -9.0), (1.5, -9.0, -12.0), (0.0, 0.0, -3.0))


@final
@dataclass(frozen=True)
class Kriging:
    """The posterior at given numbers of the kernel.

    Attributes:
        rows: (n, d). gram: (n, n) of the residuals.
        kernel: (d + 2,) logarithms of d lengths, of the rough part and of the nugget, relative to the smooth part.
        independent: how many outputs vary independently, (tr G)^2 / tr G^2 of the centred Gram matrix, at most 10.
        amplitude: variance of the smooth part, summed over all outputs.
    """

    rows: Array
    gram: Array
    kernel: Array
    independent: float
    amplitude: float

    @cached_property
    def _inverse_squares(self) -> Array:
        return np.asarray(np.exp(-2 * self.kernel[:-2]))

    @property
    def roughness(self) -> float:
        return float(np.exp(self.kernel[-2]))

    @property
    def nugget(self) -> float:
        return float(np.exp(self.kernel[-1]))

    @property
    def noise(self) -> float:
        """Variance of one run of the simulator, summed over all outputs."""
        return self.amplitude * self.nugget

    @cached_property
    def _solved(self) -> tuple[Array, Array, float]:
        """K^-1, K^-1 1 and 1^T K^-1 1."""
        k = _kernel(_squares(self.rows, self.rows) @ self._inverse_squares, self.roughness)[0]
        inverse = cho_solve(cho_factor(k + self.nugget * np.eye(len(k)), lower=True), np.eye(len(k)))
        ones = inverse.sum(axis=1)
        return inverse, ones, float(ones.sum())

    def at(self, z: Array) -> tuple[Array, float, Array, Array]:
        """Weights w (n,), variance summed over outputs, and their derivatives (n, d) and (d,)."""
        inverse, ones, total = self._solved
        away = z - self.rows
        k, slope = _kernel(away**2 @ self._inverse_squares, self.roughness)
        dk = -slope[:, None] * away * self._inverse_squares
        u, du = inverse @ k, inverse @ dk
        missing = 1 - u.sum()
        w, dw = u + ones * (missing / total), du - np.outer(ones, du.sum(axis=0) / total)
        variance = self.amplitude * max(1 + self.roughness - k @ u + missing**2 / total, 0.0)
        slope_of_variance = -2 * self.amplitude * (u @ dk + missing / total * du.sum(axis=0))
        return w, variance, dw, slope_of_variance

    def loss(self, z: Array, caution: float) -> tuple[float, Array]:
        """1/2 (|mu|^2 + caution * variance) and its gradient: with caution 1 the expectation of the loss."""
        w, variance, dw, dv = self.at(z)
        v = self.gram @ w
        return 0.5 * float(w @ v + caution * variance), np.asarray(dw.T @ v + 0.5 * caution * dv)

    def hopeful(self, z: Array, kappa: float) -> tuple[float, Array]:
        """The loss, less kappa of its standard deviations, and its gradient.

        With variance V spread over p independent outputs, |R|^2 has mean |mu|^2 + V and variance
        2 V^2 / p + 4 |mu|^2 V / p.
        """
        w, variance, dw, dv = self.at(z)
        v = self.gram @ w
        a, da = float(w @ v), 2 * dw.T @ v
        variance += 1e-12 * self.amplitude
        p = self.independent
        deviation = np.sqrt(2 * variance**2 / p + 4 * a * variance / p) + 1e-300
        slope = ((2 * variance + 2 * a) * dv + 2 * variance * da) / p / deviation
        return 0.5 * float(a + variance - kappa * deviation), 0.5 * np.asarray(da + dv - kappa * slope)

    def hopes(self, points: Array, kappa: float) -> Array:
        """`hopeful` at many points, (q, d) -> (q,)."""
        inverse, ones, total = self._solved
        k, _ = _kernel(_squares(points, self.rows) @ self._inverse_squares, self.roughness)
        u = k @ inverse
        missing = 1 - u.sum(axis=1)
        w = u + np.outer(missing / total, ones)
        variance = self.amplitude * np.maximum(1 + self.roughness - (k * u).sum(axis=1) + missing**2 / total, 0)
        a, p = np.maximum(((w @ self.gram) * w).sum(axis=1), 0), self.independent
        return np.asarray(0.5 * (a + variance - kappa * np.sqrt(2 * variance**2 / p + 4 * a * variance / p)))

    def normal_matrix(self, z: Array, width: Array) -> Array:
        """J^T J, (d, d), by central differences of the predicted outputs over z_i +- width_i, less what noise adds."""
        shifts = np.diag(width)
        dw = np.stack([self.at(z + h)[0] - self.at(z - h)[0] for h in shifts], axis=1) / (2 * width)
        return np.asarray(dw.T @ self.gram @ dw - self.noise * dw.T @ dw)

    def believing(self, z: Array) -> Kriging:
        """With one row more at z, whose outputs are as predicted: less variance about it, the same prediction."""
        w = self.at(z)[0]
        v = self.gram @ w
        gram = np.block([[self.gram, v[:, None]], [v[None], np.array([[w @ v]])]])
        return replace(self, rows=np.vstack([self.rows, z]), gram=gram)


def fit_kriging(rows: Array, gram: Array, before: Array | None = None, thorough: bool = True) -> Kriging:
    """The kernel of largest marginal likelihood times prior.

    All outputs together: -p/2 ((n - 1) log q + log|K| + log 1^T K^-1 1), q = tr(P G), with P the inverse of K on
    what is orthogonal to the constant, amplitude q / (n - 1) profiled out, and p independent outputs
    (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, equations 2.30 and 5.9, for one output).

    Args:
        rows: (n, d), n >= 2. gram: (n, n).
        before: a kernel to begin from. thorough: also begin from the three defaults.
    """
    n, d = rows.shape
    centring = np.eye(n) - 1 / n
    centred = centring @ gram @ centring
    independent = float(np.clip(np.trace(centred) ** 2 / max((centred**2).sum(), 1e-300), 1, _MOST_INDEPENDENT))
    squares, base = _squares(rows, rows), np.log(1.5 * np.sqrt(d))

    def objective(t: Array) -> tuple[float, Array]:
        scaled = np.exp(-2 * t[:d])
        k, slope = _kernel(squares @ scaled, float(np.exp(t[d])))
        nugget = float(np.exp(t[d + 1]))
        try:
            factor = cho_factor(k + nugget * np.eye(n), lower=True)
        except LinAlgError:
            return 1e10, np.zeros(d + 2)
        inverse = cho_solve(factor, np.eye(n))
        ones = inverse.sum(axis=1)
        P = inverse - np.outer(ones, ones) / ones.sum()
        PG = P @ gram
        q = max(float(np.trace(PG)), 1e-300)
        value = 0.5 * independent * ((n - 1) * np.log(q) + 2 * np.log(np.diag(factor[0])).sum() + np.log(ones.sum()))
        S = 0.5 * independent * (P - ((n - 1) / q) * PG @ P)
        g = np.empty(d + 2)
        g[:d] = np.einsum("ij,ijk->k", S * slope, squares) * scaled
        smooth = _kernel(squares @ scaled, 0.0)[0]
        g[d] = float((S * (k - smooth)).sum())
        g[d + 1] = nugget * float(np.trace(S))
        mean = float(t[:d].mean())
        apart, off = t[:d] - mean, (mean - base - _LENGTH[0]) / _LENGTH[1]
        value += 0.5 * float((apart**2).sum()) / _SPREAD_OF_LENGTHS**2 + 0.5 * off**2
        g[:d] += apart / _SPREAD_OF_LENGTHS**2 + off / _LENGTH[1] / d
        for i, (centre, sd) in ((d, _ROUGHNESS), (d + 1, _NUGGET)):
            value += 0.5 * ((t[i] - centre) / sd) ** 2
            g[i] += (t[i] - centre) / sd**2
        return float(value), g

    bounds = [(base - 3, base + 5)] * d + [(-12.0, 3.0), (np.log(_LEAST_NUGGET), 2.0)]
    starts = [] if before is None else [before]
    if before is None or thorough:
        starts += [np.concatenate([np.full(d, base + length), [rough, nugget]]) for length, rough, nugget in _STARTS]
    lower, upper = np.array(bounds).T
    best = None
    for start in starts:
        found = minimize(
            *(objective, np.clip(start, lower, upper)),
            jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 30},
        )  # fmt: skip
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    model = Kriging(rows, gram, np.asarray(best.x), independent, 1.0)
    inverse, ones, total = model._solved
    trace = float(((inverse - np.outer(ones, ones) / total) * gram).sum())
    return replace(model, amplitude=max(trace / (n - 1), 1e-300))


def _squares(a: Array, b: Array) -> Array:
    return np.asarray((a[:, None] - b[None]) ** 2)


def _kernel(r2: Array, roughness: float) -> tuple[Array, Array]:
    """k(r^2) without nugget, and -2 dk/d(r^2)."""
    r = np.sqrt(r2 + 1e-12)
    smooth, rough = np.exp(-0.5 * r2), roughness * np.exp(-r / _ROUGH_LENGTH)
    return smooth + rough, smooth + rough / (_ROUGH_LENGTH * r)
