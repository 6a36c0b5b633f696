"""The normal matrix J^T J of whitened residuals, the noise in it, and covariances that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.robust import RobustLoss

# Standard deviations by which the information on a parameter is to exceed nothing: its error is then good to a sixth.
_CLEAR, _LOST = 3.0, 1.0

_ALIKE = 0.25


@final
@dataclass(frozen=True)
class Normal:
    """J^T J of several independent estimates of one Jacobian, J_1 ... J_R, (d, d).

    Attributes:
        mean: J, (m, d). naive: J^T J, which the noise of J makes too large: by S, on average.
        noise: S = sum_r (J_r - J)^T (J_r - J) / (R (R - 1)), unbiased; 0 where there is but one.
        independent: how many outputs have noise of their own, as far as the columns of J_r - J tell: S_ab^2 is
            S_aa S_bb / independent on average for two columns whose noise is independent.
    """

    mean: Array
    naive: Array
    noise: Array
    independent: float

    @property
    def unbiased(self) -> Array:
        """J^T J - S = sum_{r != s} J_r^T J_s / (R (R - 1)): no estimate meets itself in it."""
        return self.naive - self.noise

    def deviation(self, signal: Array, noise: Array) -> Array:
        """Standard deviation of v^T (J^T J - S) v, whose mean is `signal`, with `noise` = v^T S v.

        With a the signal's vector and n_r the noise of J_r v, of variance R v^T S v in all, the sum over r != s is
        |a|^2 + 2 a . mean n_r + (products of n_r . n_s).
        """
        return np.asarray(2 * np.sqrt(noise * (np.maximum(signal, 0) + noise) / self.independent))

    def information(self, step_noise: float = 0.0) -> Array:
        """The normal matrix from which errors are stated.

        In the directions in which S is diagonal beside `naive` = I, with 1 - mu on S's diagonal and mu left: mu, or
        the standard deviation of mu where that is more (at most 1, as it stands in `naive`): more than that is not
        known of it, and the error is a lower bound.

        Args:
            step_noise: B / S, B the noise of the Jacobian of a single step, where x is what Gauss-Newton's steps
                (N + B)^-1 J^T r have come to; 0 for others. J^T r has noise of covariance B, for residuals of variance
                1 that it is independent of. With beta = B / N a step leaves beta / (1 + beta) of the way and adds
                noise of variance beta / (1 + beta)^2 / N: in the long run beta / (1 + 2 beta) / N, beside the 1 / N
                that the target's own noise makes.
        """
        size = np.sqrt(np.diag(self.naive))
        size[size == 0] = 1
        values, vectors = np.linalg.eigh(self.naive / np.outer(size, size))
        good = values > 1e-10
        root = vectors[:, good] * np.sqrt(values[good])  # scaled: naive = root root^T
        within = vectors[:, good] / np.sqrt(values[good])
        shares, turn = np.linalg.eigh(within.T @ (self.noise / np.outer(size, size)) @ within)
        noise = np.clip(shares, 0, 1)
        left = np.maximum(1 - noise, np.minimum(1.0, self.deviation(1 - noise, noise)))
        beta = step_noise * noise / left
        left = left * (1 + 2 * beta) / (1 + 3 * beta)
        root = root @ turn
        return np.asarray((root * left) @ root.T * np.outer(size, size))


def normal_of(jacobians: Sequence[Array]) -> Normal:
    """Of independent estimates (m, d) of one whitened Jacobian."""
    replicates, mean = len(jacobians), reduce(np.add, jacobians) / len(jacobians)
    d = mean.shape[1]
    # Part of a pair that is quite alike, beside those there are: few columns do not tell that outputs are independent.
    noise, alike, pairs = np.zeros((d, d)), _ALIKE, _ALIKE
    if replicates > 1:
        for J in jacobians:
            noise += (J - mean).T @ (J - mean) / (replicates * (replicates - 1))
        a, b = np.triu_indices(d, 1)
        seen = noise[a, a] * noise[b, b] > 0
        alike += float((noise[a, b] ** 2)[seen] @ (1 / (noise[a, a] * noise[b, b])[seen]))
        pairs += float(seen.sum())
    return Normal(mean, mean.T @ mean, noise, min(pairs / alike, float(len(mean))))


def of_least_squares(normal: Array, variance: float, precision: Array) -> Array:
    """(J^T J / sigma^2 + P)^-1: infinite where a parameter is not determined.

    Args:
        normal: J^T J of whitened residuals, (d, d). variance: sigma^2 of these. precision: the prior's P, (d, d).
    """
    return inverse(normal / variance + precision)


def of_robust(normal: Array, J: Array, residual: Array, robust: RobustLoss, precision: Array) -> Array:
    """The sandwich A^-1 M A^-1, A = b J^T J + P, M = a J^T J + P, with a and b from the residuals themselves.

    So it holds for residuals that are not Gaussian: outliers cost accuracy, in place of lending it (see
    `RobustLoss.spread`).

    Args:
        normal: J^T J, without weights. J: (m, d), for the leverages alone. residual: (m,) in standard deviations.
        precision: the prior's P, (d, d).
    """
    a, b = robust.spread(residual, leverages(J, robust.weight(residual), precision))
    bread = inverse(b * normal + precision)
    open_ = np.isinf(np.diag(bread))
    bread[open_, open_] = 0
    result = bread @ (a * normal + precision) @ bread
    result[open_, open_] = np.inf
    return np.asarray(result)


def leverages(J: Array, weight: Array, precision: Array) -> Array:
    """h_i = w_i J_i (J^T W J + P)^-1 J_i^T, (m,): how far the fit follows each number. They add up to d without P."""
    covariance = inverse((J.T * weight) @ J + precision)
    open_ = np.isinf(np.diag(covariance))
    covariance[open_, open_] = 0
    return np.asarray(weight * ((J @ covariance) * J).sum(axis=1))


def sandwich(bread: Array, meat: Array) -> Array:
    open_ = np.isinf(np.diag(bread))
    bread = bread.copy()
    bread[open_, open_] = 0
    result = bread @ meat @ bread
    open_ |= (np.diag(result) <= 0) & (np.diag(meat) > 0)  # lost in rounding
    result[open_, open_] = np.inf
    return np.asarray(result)


def unclear_of(
    normal: Normal, information: Array, covariance: Array, precision: Array
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(d,) where the information on a parameter, the others being fitted, is not clearly above its own noise; and where
    it is lost in it.

    That information is v^T N v, v = C e_a / C_aa.
    """
    variance = np.diag(covariance)
    finite = np.isfinite(variance) & (variance > 0)
    directions = np.where(np.outer(finite, finite), covariance, 0) / np.where(finite, variance, 1)
    signal, noise = (np.einsum("ia,ij,ja->a", directions, M, directions) for M in (information, normal.noise))
    by_prior = np.where(finite, variance, 0) * np.diag(precision) > 0.5
    deviation = normal.deviation(signal, noise)
    open_ = finite & ~by_prior
    return np.asarray(open_ & (signal < _CLEAR * deviation)), np.asarray(open_ & (signal <= _LOST * deviation))


def of_unit_diagonal(normal: Array) -> tuple[Array, Array]:
    """A normal matrix with a diagonal of 1, and the roots of the diagonal that it had, (d,)."""
    size = np.sqrt(np.maximum(np.diag(normal), 1e-300))
    return normal / np.outer(size, size), size


def least_share(normal: Array) -> float:
    """The least eigenvalue of a normal matrix with a diagonal of 1: how far parameters are told apart."""
    return max(float(np.linalg.eigvalsh(of_unit_diagonal(normal)[0])[0]), 0.0)


def turned(naive: Array, information: Array) -> Array:
    """M, M^T naive M = information, and 1 where these are the same."""
    values, vectors = np.linalg.eigh(naive)
    good = values > 1e-14 * max(float(values.max()), 1e-300)
    root = (vectors[:, good] * np.sqrt(values[good])) @ vectors[:, good].T
    back = (vectors[:, good] / np.sqrt(values[good])) @ vectors[:, good].T
    part, axes = np.linalg.eigh(back @ information @ back)
    return np.asarray(back @ (axes * np.sqrt(np.maximum(part, 0))) @ axes.T @ root)


def inverse(normal: Array) -> Array:
    """Infinite variances where a direction is not determined, instead of numbers that mean nothing."""
    size = np.sqrt(np.maximum(np.diag(normal), 0))
    unseen = size <= 1e-9 * max(float(size.max()), 1e-300)
    scaled = normal / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    scaled[unseen] = scaled[:, unseen] = 0
    values, vectors = np.linalg.eigh(scaled)
    good = values > 1e-10
    inverted = (vectors[:, good] / values[good]) @ vectors[:, good].T
    open_ = unseen | ((vectors[:, ~good] ** 2).sum(axis=1) > 1e-6)
    result = inverted / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    result[open_] = result[:, open_] = 0
    result[open_, open_] = np.inf
    return np.asarray(result)


def finite_inverse(normal: Array) -> Array:
    """As `inverse`, 0 in place of infinite."""
    result = inverse(normal)
    result[~np.isfinite(result)] = 0
    return result


def lifted(covariance: Array, lift: Array) -> Array:
    """E C E^T without inf * 0."""
    free = [int(np.argmax(row)) if row.any() else -1 for row in lift]
    padded = np.zeros((len(covariance) + 1, len(covariance) + 1))
    padded[:-1, :-1] = covariance
    return np.asarray(padded[np.ix_(free, free)])


def in_units(covariance: Array, natural: Array) -> Array:
    """From natural units to the parameters' own."""
    return np.asarray(covariance * np.outer(natural, natural))


def without(covariance: Array, which: NDArray[np.bool_]) -> Array:
    """NaN for parameters whose error is not stated."""
    result = covariance.copy()
    result[which], result[:, which] = np.nan, np.nan
    return result
