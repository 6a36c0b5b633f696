"""A Gaussian process through all outputs of a simulator at once, known from their Gram matrix alone.

Every output o is modelled by a constant plus a Gaussian process, and all outputs share one kernel, so that the
prediction of each is the same linear combination of the rows that have been evaluated:

    mu(z) = F^T w(z),    |mu(z)|^2 = w^T G w,    G = F F^T,

with F (n, m) the whitened residuals of n rows. Whatever is wanted of m outputs, be it a loss, its gradient, the normal
matrix J^T J or the marginal likelihood, is made of the n x n matrix G: an image of 160,000 pixels costs no more than a
number. This is the Bayesian quadrature of `bridge.smooth(covariate="bq")` in the limit of no smoothing, over all rows
paid for so far.

The kernel is a squared exponential with a length for each parameter; a linear part 9 z . z' in the same lengths, so
that beyond the rows a trend goes on, in place of a return to the mean; a rough part exp(-r / 3) (a hard edge that moves
flips pixels in proportion to the distance); and a nugget (noise of the simulator). Its numbers maximise the marginal
likelihood times weak priors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.optimize import minimize

from bridge.arrays import Array

# In units of the lengths: long enough that the rough part is a variogram linear in the distance.
_ROUGH_LENGTH = 3.0
# More outputs than this that vary independently of each other add no evidence: the kernel is never quite right.
_MOST_INDEPENDENT = 10.0
_LEAST_NUGGET = 1e-9
# Variance of a slope of the linear part, over that of the smooth part.
_LINEAR = 9.0
# (mean, standard deviation) of the priors on logarithms: mean length over its default, share of roughness, nugget.
_LENGTH, _ROUGHNESS, _NUGGET = (0.5, 1.2), (-5.0, 3.0), (-9.0, 5.0)
_SPREAD_OF_LENGTHS = 0.7
# Where the search for the kernel begins, in the same logarithms: smooth, very smooth, rough.
_STARTS = ((0.0, -6.0, -9.0), (1.5, -9.0, -12.0), (0.0, 0.0, -3.0))
# A likelihood that cannot be had; parameters from which on squares are not kept coordinate by coordinate; what rounding
# makes of the largest number of a Gram matrix.
_NO_KERNEL, _MANY, _ROUNDING = 1e10, 40, 1e-15
_FEATURES = 128  # of the smooth part of a draw, and of its rough part


@final
@dataclass(frozen=True)
class GaussianProcess:
    """The posterior at given numbers of the kernel.

    Attributes:
        rows: (n, d). gram: (n, n) of the residuals.
        kernel: (d + 2,) logarithms of d lengths, of the rough part and of the nugget, relative to the smooth part.
        amplitude: variance of the smooth part, summed over all outputs.
    """

    rows: Array
    gram: Array
    kernel: Array
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
    def _middle(self) -> Array:
        """Where the linear part begins: it does not matter, since the constant is free."""
        return np.asarray(self.rows.mean(axis=0))

    def _covariance(self, points: Array, rough: bool = True) -> tuple[Array, Array]:
        """Kernel between points (q, d) and the rows, without nugget, (q, n); and -2 of its derivative in r^2, without
        the linear part."""
        k, slope = _kernel(self._distances(points), self.roughness if rough else 0.0)
        linear = ((points - self._middle) * self._inverse_squares) @ (self.rows - self._middle).T
        return k + _LINEAR * linear, slope

    def _distances(self, points: Array) -> Array:
        """Squared, in lengths, (q, n)."""
        if points.shape[1] <= _MANY:
            return np.asarray(_squares(points, self.rows) @ self._inverse_squares)
        a, b = (x * np.sqrt(self._inverse_squares) for x in (points - self._middle, self.rows - self._middle))
        return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T, 0.0)

    @cached_property
    def _solved(self) -> tuple[Array, Array, float]:
        """K^-1, K^-1 1 and 1^T K^-1 1."""
        k = self._covariance(self.rows)[0]
        inverse = cho_solve(_factor(k + self.nugget * np.eye(len(k))), np.eye(len(k)))
        ones = inverse.sum(axis=1)
        return inverse, ones, float(ones.sum())

    def at(self, z: Array, rough: bool = True) -> tuple[Array, float, Array, Array]:
        """Weights w (n,), variance summed over outputs, and their derivatives (n, d) and (d,).

        rough: else of the outputs without their rough part, which the rows are then taken to be disturbed by.
        """
        inverse, ones, total = self._solved
        k, slope = (of[0] for of in self._covariance(z[None], rough))
        from_middle = (z - self._middle) * self._inverse_squares
        dk = (_LINEAR * (self.rows - self._middle) - slope[:, None] * (z - self.rows)) * self._inverse_squares
        u, du = inverse @ k, inverse @ dk
        missing = 1 - u.sum()
        w, dw = u + ones * (missing / total), du - np.outer(ones, du.sum(axis=0) / total)
        own = 1 + rough * self.roughness + _LINEAR * float((z - self._middle) @ from_middle)
        variance = self.amplitude * max(own - k @ u + missing**2 / total, 0.0)
        slope_of_variance = _LINEAR * from_middle - u @ dk - missing / total * du.sum(axis=0)
        return w, variance, dw, 2 * self.amplitude * slope_of_variance

    def weights(self, points: Array) -> Array:
        """w at many points, (q, d) -> (q, n)."""
        inverse, ones, total = self._solved
        u = self._covariance(points)[0] @ inverse
        return np.asarray(u + np.outer((1 - u.sum(axis=1)) / total, ones))

    def loss(self, z: Array, caution: float, rough: bool = True) -> tuple[float, Array, Array]:
        """1/2 (|mu|^2 + caution * variance), its gradient, and J^T J of mu: with caution 1 the loss's expectation."""
        w, variance, dw, dv = self.at(z, rough)
        v = self.gram @ w
        value = 0.5 * float(w @ v + caution * variance)
        return value, np.asarray(dw.T @ v + 0.5 * caution * dv), np.asarray(dw.T @ self.gram @ dw)

    def differences(self, z: Array, width: Array) -> Array:
        """Of the weights, (n, d): central ones, over z_i +- width_i. J is F^T times these."""
        return np.stack([self.at(z + h)[0] - self.at(z - h)[0] for h in np.diag(width)], axis=1) / (2 * width)

    def residual_noise(self, residuals: Array) -> Array:
        """(m,) variance of one run in each output, of the rows' residuals (n, m): of what the prediction leaves at up
        to thirty-two rows, over what it can leave; of the same sum as `noise`."""
        inverse, ones, total = self._solved
        rows = np.unique(np.linspace(0, len(inverse) - 1, 32).astype(int))
        left = (inverse[rows] - np.outer(ones[rows], ones) / total) @ residuals
        squares = (left**2).sum(axis=0)
        return np.asarray(squares * (self.noise / max(float(squares.sum()), 1e-300)))

    @cached_property
    def _spanned(self) -> tuple[Array, Array]:
        """Residuals (n, r) of the same Gram matrix, and R (r, r), R^T R the covariance between these outputs."""
        values, vectors = np.linalg.eigh(self.gram)
        keep = values > 1e-14 * max(float(values.max()), 1e-300)
        residuals = vectors[:, keep] * np.sqrt(values[keep])
        inverse, ones, total = self._solved
        P = inverse - np.outer(ones, ones) / total
        between, axes = np.linalg.eigh(residuals.T @ P @ residuals / (len(residuals) - 1))
        return residuals, (axes * np.sqrt(np.maximum(between, 0))).T

    def draw(self, rng: np.random.Generator, wide: float = 1.0) -> Draw:
        """One draw of all outputs from the posterior, with deviations so many times as wide."""
        n, d = self.rows.shape
        residuals, root = self._spanned
        root, r = wide * root, len(root)
        omega, sizes = rng.normal(size=(_FEATURES, d)), np.full(_FEATURES, np.sqrt(2 / _FEATURES))
        if self.roughness > 1e-4:  # exp(-r / 3) has the spectrum of Cauchy's distribution
            rough = rng.normal(size=(_FEATURES, d)) / (_ROUGH_LENGTH * np.abs(rng.normal(size=(_FEATURES, 1))))
            omega, sizes = np.vstack([omega, rough]), np.append(sizes, np.sqrt(self.roughness) * sizes)
        frequencies, phases = omega * np.sqrt(self._inverse_squares), rng.uniform(0, 2 * np.pi, len(omega))
        waves = sizes[:, None] * rng.normal(size=(len(omega), r)) @ root
        slopes = np.sqrt(_LINEAR * self._inverse_squares)[:, None] * rng.normal(size=(d, r)) @ root
        noise = np.sqrt(self.nugget) * rng.normal(size=(n, r)) @ root
        prior = np.cos(self.rows @ frequencies.T + phases) @ waves + self.rows @ slopes
        return Draw(self, residuals - prior - noise, frequencies, phases, waves, slopes)


@final
@dataclass(frozen=True)
class Draw:
    """All outputs from the posterior: a draw from the prior, plus the prediction of what it misses at the rows.

    R(z) = W^T cos(Omega z + phi) + S^T z + D^T w(z), in the r dimensions that the rows' residuals span, with random
    Fourier features for the kernel (Wilson et al., *Efficiently sampling functions from Gaussian process posteriors*,
    2020).

    Attributes:
        differences: D, (n, r), residuals of the rows less the prior's draw and a draw of the noise.
        frequencies: Omega, (k, d). phases: phi, (k,). waves: W, (k, r). slopes: S, (d, r).
    """

    model: GaussianProcess
    differences: Array
    frequencies: Array
    phases: Array
    waves: Array
    slopes: Array

    def loss(self, z: Array) -> tuple[float, Array, Array]:
        """1/2 |R|^2, its gradient, and J^T J."""
        w, _, dw, _ = self.model.at(z)
        angle = self.frequencies @ z + self.phases
        r = np.cos(angle) @ self.waves + z @ self.slopes + w @ self.differences
        J = self.slopes + dw.T @ self.differences - (np.sin(angle)[:, None] * self.frequencies).T @ self.waves
        return 0.5 * float(r @ r), np.asarray(J @ r), np.asarray(J @ J.T)

    def losses(self, points: Array) -> Array:
        """(q, d) -> (q,)."""
        waves = np.cos(points @ self.frequencies.T + self.phases) @ self.waves
        r = waves + points @ self.slopes + self.model.weights(points) @ self.differences
        return np.asarray(0.5 * (r**2).sum(axis=1))


def default_kernel(unit: Array) -> Array:
    """(d + 2,) that of a smooth function of parameters in these units, before anything is known of it."""
    _, roughness, nugget = _STARTS[0]
    return np.append(np.log(1.5 * np.sqrt(len(unit)) * unit), (roughness, nugget))


@final
class _Likelihood:
    """Minus the logarithm of what `fit_gaussian_process` makes largest, and its gradient, in the kernel (d + 2,).

    Attributes:
        base: the logarithm of lengths that suit d parameters. spread: tr(G), of the centred Gram matrix.
    """

    def __init__(self, rows: Array, gram: Array) -> None:
        self.rows, self.gram = rows, gram
        n, d = rows.shape
        centring = np.eye(n) - 1 / n
        centred = centring @ gram @ centring
        self.spread = float(np.trace(centred))
        self.independent = float(
            np.clip(np.trace(centred) ** 2 / max((centred**2).sum(), 1e-300), 1, _MOST_INDEPENDENT)
        )
        self.between, self.base = _Between(rows), np.log(1.5 * np.sqrt(d))
        self.away = rows - rows.mean(axis=0)

    def __call__(self, t: Array) -> tuple[float, Array]:
        n, d = self.rows.shape
        scaled = np.exp(-2 * t[:d])
        distances = self.between.scaled(scaled)
        k, slope = _kernel(distances, float(np.exp(t[d])))
        nugget = float(np.exp(t[d + 1]))
        try:
            factor = cho_factor(k + _LINEAR * (self.away * scaled) @ self.away.T + nugget * np.eye(n), lower=True)
        except (LinAlgError, ValueError):
            return _NO_KERNEL, np.zeros(d + 2)
        inverse = cho_solve(factor, np.eye(n))
        ones = inverse.sum(axis=1)
        P = inverse - np.outer(ones, ones) / ones.sum()
        PG = P @ self.gram
        q = max(float(np.trace(PG)), 1e-300)
        value = (
            0.5 * self.independent * ((n - 1) * np.log(q) + 2 * np.log(np.diag(factor[0])).sum() + np.log(ones.sum()))
        )
        S = 0.5 * self.independent * (P - ((n - 1) / q) * PG @ P)
        g = np.empty(d + 2)
        # z . z' is -r^2 / 2 but for what a free constant takes up, of which S knows nothing.
        g[:d] = self.between.summed(S * (slope + _LINEAR)) * scaled
        smooth = _kernel(distances, 0.0)[0]
        g[d] = float((S * (k - smooth)).sum())
        g[d + 1] = nugget * float(np.trace(S))
        mean = float(t[:d].mean())
        apart, off = t[:d] - mean, (mean - self.base - _LENGTH[0]) / _LENGTH[1]
        value += 0.5 * float((apart**2).sum()) / _SPREAD_OF_LENGTHS**2 + 0.5 * off**2
        g[:d] += apart / _SPREAD_OF_LENGTHS**2 + off / _LENGTH[1] / d
        for i, (centre, sd) in ((d, _ROUGHNESS), (d + 1, _NUGGET)):
            value += 0.5 * ((t[i] - centre) / sd) ** 2
            g[i] += (t[i] - centre) / sd**2
        if not (np.isfinite(value) and np.isfinite(g).all()):
            return _NO_KERNEL, np.zeros(d + 2)
        return float(value), g


def fit_gaussian_process(
    rows: Array,
    gram: Array,
    before: Array | None = None,
    thorough: bool = True,
    unit: Array | None = None,
    rough: bool = True,
) -> GaussianProcess:
    """The kernel of largest marginal likelihood times prior.

    All outputs together: -p/2 ((n - 1) log q + log|K| + log 1^T K^-1 1), q = tr(P G), with P the inverse of K on
    what is orthogonal to the constant, amplitude q / (n - 1) profiled out, and p independent outputs
    (Rasmussen and Williams, *Gaussian Processes for Machine Learning*, equations 2.30 and 5.9, for one output).

    Args:
        rows: (n, d), n >= 2. gram: (n, n).
        before: a kernel to begin from. thorough: also begin from the three defaults.
        unit: (d,) of the lengths' defaults, 1 where left out. rough: else next to no rough part.
    """
    if unit is not None and (unit != 1).any():
        own = np.append(np.log(unit), (0.0, 0.0))
        found = fit_gaussian_process(rows / unit, gram, None if before is None else before - own, thorough, rough=rough)
        return replace(found, rows=rows, kernel=found.kernel + own)
    n, d = rows.shape
    likelihood = _Likelihood(rows, gram)
    base = likelihood.base
    # What the Gram matrix has lost to rounding, where all outputs are far from the target, is noise as well.
    lost = _ROUNDING * float(np.diag(gram).max()) / max(likelihood.spread / (n - 1), 1e-300)
    least_nugget = float(np.clip(lost, _LEAST_NUGGET, 1.0))
    bounds = [(base - 3, base + 5)] * d + [(-12.0, 3.0 if rough else -11.0), (np.log(least_nugget), 2.0)]
    starts = [] if before is None else [before]
    if before is None or thorough:
        starts += [np.concatenate([np.full(d, base + length), [part, nugget]]) for length, part, nugget in _STARTS]
    if d > _MANY:  # a step of the search for a kernel costs n^3, n more than 2 d
        starts = starts[:2]
    lower, upper = np.array(bounds).T
    best = None
    for start in starts:
        found = minimize(
            likelihood,
            np.clip(start, lower, upper),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 30 if d <= _MANY else 12},
        )
        if best is None or found.fun < best.fun:
            best = found
    assert best is not None
    kernel = np.asarray(best.x)
    if best.fun >= _NO_KERNEL:  # of none is there a likelihood: smooth enough to go on with
        kernel = np.clip(np.concatenate([np.full(d, base + 1.5), [-9.0, -3.0]]), lower, upper)
    model = GaussianProcess(rows, gram, kernel, 1.0)
    inverse, ones, total = model._solved
    trace = float(((inverse - np.outer(ones, ones) / total) * gram).sum())
    return replace(model, amplitude=max(trace / (n - 1), 1e-300) if np.isfinite(trace) else 1e-300)


def levenberg_marquardt(
    objective: Callable[[Array], tuple[float, Array, Array]], begin: Array, lower: Array, upper: Array
) -> tuple[Array, float]:
    """A minimum within a box, and its value.

    Args:
        objective: z -> value, gradient, and what stands for the Hessian, J^T J.
    """
    z = np.clip(begin, lower, upper)
    value, slope, normal = objective(z)
    if not (np.isfinite(value) and np.isfinite(slope).all() and np.isfinite(normal).all()):
        return z, np.inf
    damping = 1e-3
    for _ in range(60):
        free = ~(((z <= lower) & (slope > 0)) | ((z >= upper) & (slope < 0)))
        size = np.diag(normal)[free]
        if not free.any() or damping > 1e8 or not size.any():
            break
        step = np.zeros(len(z))
        damped = normal[np.ix_(free, free)] + damping * np.diag(size + 1e-9 * size.max())
        try:
            step[free] = -np.linalg.solve(damped, slope[free])
        except LinAlgError:
            damping *= 10
            continue
        new = np.clip(z + step, lower, upper)
        after = objective(new)
        if not (after[0] < value and np.isfinite(after[1]).all() and np.isfinite(after[2]).all()):
            damping *= 10
            continue
        little = value - after[0] < 1e-10 * value and float(np.abs(new - z).max()) < 1e-6
        z, (value, slope, normal) = new, after
        damping = max(damping / 5, 1e-12)
        if little:
            break
    return z, value


def _factor(k: Array) -> tuple[Array, bool]:
    """The Cholesky factor, of a matrix with more on its diagonal where rounding has made it indefinite.

    Raises:
        LinAlgError: it is not finite.
    """
    size = float(np.diag(k).max())
    for jitter in (0.0, 1e-13, 1e-11, 1e-9, 1e-7, 1e-5):
        try:
            factor: tuple[Array, bool] = cho_factor(k + jitter * size * np.eye(len(k)) if jitter else k, lower=True)
            return factor
        except (LinAlgError, ValueError):
            continue
    raise LinAlgError("no factor of the kernel's matrix")


class _Between:
    """Squared differences between n rows, coordinate by coordinate; many of them by products of matrices."""

    def __init__(self, rows: Array) -> None:
        self.away = rows - rows.mean(axis=0)
        self.squares = _squares(rows, rows) if rows.shape[1] <= _MANY else None

    def scaled(self, scales: Array) -> Array:
        """sum_k scales_k (x_ik - x_jk)^2, (n, n)."""
        if self.squares is not None:
            return np.asarray(self.squares @ scales)
        half = self.away * scales
        own = (half * self.away).sum(axis=1)
        return np.maximum(own[:, None] + own[None] - 2 * half @ self.away.T, 0.0)

    def summed(self, weights: Array) -> Array:
        """sum_ij weights_ij (x_ik - x_jk)^2, (d,), of symmetric weights."""
        if self.squares is not None:
            return np.asarray(np.einsum("ij,ijk->k", weights, self.squares))
        each = weights.sum(axis=1) @ self.away**2
        return np.asarray(2 * each - 2 * ((weights @ self.away) * self.away).sum(axis=0))


def _squares(a: Array, b: Array) -> Array:
    return np.asarray((a[:, None] - b[None]) ** 2)


def _kernel(r2: Array, roughness: float) -> tuple[Array, Array]:
    """k(r^2) without nugget, and -2 dk/d(r^2)."""
    r = np.sqrt(r2 + 1e-12)
    smooth, rough = np.exp(-0.5 * r2), roughness * np.exp(-r / _ROUGH_LENGTH)
    return smooth + rough, smooth + rough / (_ROUGH_LENGTH * r)
