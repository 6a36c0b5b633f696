"""What the residuals at the end of a fit tell of noise: outliers, variance that grows, neighbours that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import fdtrc, stdtr

from bridge.arrays import Array
from bridge.fitting.misfit import Misfit
from bridge.fitting.normal import finite_inverse

# Chance of an outlier; how far a parameter may go without an output that is one, of its standard error; how many.
_OUTLIER, _INFLUENCE, _MOST_OUTLIERS = 1e-3, 1.0, 0.1
# Residuals with which a correlation of neighbours is believed in full.
_MANY = 15
# Of residuals at the start: those that are left of a target without noise.
_EXACT = 1e-6
_CORRELATIONS = np.append(np.arange(0, 0.95, 0.1), 0.97)
# Chance of noise that seems to grow with the outputs, from which on it does; outputs that tell it; standard deviations
# from which on an output is an outlier all the same; and how far a fit may follow the noisiest one.
_GROWS, _ENOUGH_TO_GROW, _LOUDEST, _DECIDES = 0.2, 10, 4.0, 0.6
# Noise of an output beside the median one, and its share of a parameter, with which one sigma for all is wrong.
_LOUD, _SHARE, _HEARD = 25.0, 0.3, 0.01


def is_exact(r: Array, first: float) -> bool:
    """Whether residuals are those of a target without noise, met but for rounding.

    Args:
        first: root of the mean squared residual where the fit began.
    """
    return bool(np.isfinite(first) and r @ r < (_EXACT * first) ** 2 * len(r))


def are_data(J: Array, r: Array) -> NDArray[np.bool_]:
    """(m,) which numbers are data: not those that are 0 in all runs and in the target."""
    size, least = np.abs(J).max(axis=1, initial=0.0), 1e-12
    return np.asarray((size > least * size.max(initial=0.0)) | (np.abs(r) > least * np.abs(r).max(initial=0.0)))


def output_sizes(misfit: Misfit, r: Array, there: NDArray[np.bool_]) -> Array:
    """Of the outputs with these residuals, whitened as they are."""
    return np.abs(r - misfit.residual(torch.zeros_like(misfit.target)).numpy()[there])


def target_spread(misfit: Misfit) -> float:
    with torch.no_grad():
        return float(misfit.residual(torch.full_like(misfit.target, float(misfit.target.mean()))).norm())


def alike_neighbours(r: Array, J: Array, shape: tuple[int, ...]) -> tuple[list[float], list[float], float]:
    """Correlation rho >= 0 of neighbouring residuals along each axis, and that to reckon with; then growth.

    That is by how much the mean squared residual is larger than it seems, since a fit follows what is alike.

    Moments of residuals M e, M = 1 - J (J^T J)^-1 J^T, with e of correlation R = rho^|i - j|: the rho at which
    tr(M L M R) / tr(M R) is r^T L r / r^T r, L the pairs of neighbours.
    """
    shape = shape if np.prod(shape) == len(r) else (len(r),)
    size = float(r @ r)
    if size <= 0 or len(r) < 4:
        return [0.0] * len(shape), [0.0] * len(shape), 1.0
    q = J @ _root(finite_inverse(J.T @ J))  # H = q q^T
    few = min(1.0, (len(r) - J.shape[1]) / _MANY)  # a handful of numbers tell next to nothing of it
    found, used, grown = [], [], 1.0
    for axis, n in enumerate(shape):
        if n < 4:
            found.append(0.0)
            used.append(0.0)
            continue
        seen = float(r @ _neighbours(r[:, None], shape, axis)[:, 0]) / size
        Lq = _neighbours(q, shape, axis)
        pairs, qLq = len(r) * (n - 1) / n, q.T @ Lq
        at = []
        for rho in _CORRELATIONS:
            alone = [rho if i == axis else 0.0 for i in range(len(shape))]
            Rq = correlated(q, alone, shape)
            qRq = q.T @ Rq
            total = len(r) - float(np.trace(qRq))
            # tr(L R) = pairs rho; the products with H: tr(H L R), twice, and tr(H L H R).
            alike = pairs * rho - 2 * float((Lq * Rq).sum()) + float((qLq * qRq).sum())
            at.append((alike / max(total, 1e-12), total))
        ratios, totals = np.array(at).T
        ratios = np.maximum.accumulate(ratios)
        rho, error = float(np.interp(seen, ratios, _CORRELATIONS)), 1 / np.sqrt(len(r))
        found.append(rho)
        # Those that go unnoticed are the low ones among estimates: a standard error more, where it is not about 0.
        used.append(few * min(rho + error * min(max(rho / error - 1, 0.0), 1.0), float(_CORRELATIONS[-1])))
        grown *= float(totals[0] / max(np.interp(used[-1], _CORRELATIONS, totals), 0.05 * totals[0]))
    return found, used, grown


def _neighbours(columns: Array, shape: tuple[int, ...], axis: int) -> Array:
    """L x for columns x (m, k), L_ij = 1/2 for neighbours along an axis."""
    x = np.moveaxis(columns.reshape((*shape, columns.shape[1])), axis, 0)
    result = np.zeros_like(x)
    result[1:] += 0.5 * x[:-1]
    result[:-1] += 0.5 * x[1:]
    return np.asarray(np.moveaxis(result, 0, axis).reshape(columns.shape))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def correlated(columns: Array, rho: Sequence[float], shape: tuple[int, ...]) -> Array:
    """R x for columns x (m, k), R_ij = prod over axes of rho^|i - j|."""
    if not any(rho):
        return columns
    shape = shape if np.prod(shape) == len(columns) else (len(columns),)
    x = columns.reshape((*shape, columns.shape[1]))
    for axis, part in enumerate(rho):
        if part > 0:
            part = min(part, 0.99)
            ahead = lfilter([1.0], [1.0, -part], x, axis=axis)
            back = np.flip(lfilter([1.0], [1.0, -part], np.flip(x, axis), axis=axis), axis)
            x = ahead + back - x
    return np.asarray(x.reshape(columns.shape))


def growing_variance(r: Array, h: Array, output: Array | None) -> Array | None:
    """(m,) variance a + b |output| where squared residuals grow with the outputs, as those of counts do; else None.

    By the F test of their regression on the size of the outputs (Breusch and Pagan 1979, as Koenker has it).

    Args:
        h: (m,) leverages. output: (m,) sizes of the outputs, None if unknown.
    """
    if output is None or len(r) < _ENOUGH_TO_GROW or np.ptp(output) <= 0:
        return None
    squares, A = r**2 / np.maximum(1 - h, 1e-3), np.stack([np.ones(len(r)), output], axis=1)
    b = np.linalg.lstsq(A, squares, rcond=None)[0]
    left, all_ = float(((squares - A @ b) ** 2).sum()), float(((squares - squares.mean()) ** 2).sum())
    n = len(r) - 2
    if not (b[1] > 0 and left > 0 and fdtrc(1, n, (all_ - left) * n / left) < _GROWS):
        return None
    usual = np.maximum(A @ b, 0.1 * squares.mean())
    if h[int(np.argmax(usual))] > _DECIDES:
        return None
    return usual if (squares < _LOUDEST**2 * usual).all() else None


class Outweighing(NamedTuple):
    """An output that is so far from the others that one sigma for all is wrong: its number, and why, in words."""

    output: int
    why: str


def with_outliers(
    J: Array, r: Array, h: Array, dof: float, V: Array, noise: Array, least: Array, own: Array | float
) -> tuple[Array, Outweighing | None]:
    """The variances V with what outliers have of their own, and the output that outweighs all others, if one does.

    Args:
        J: (m, d). r: (m,) residuals. h: (m,) leverages. dof: degrees of freedom. V: (m,).
        noise: (m,) variance that is left in the estimate of each output. least: (m,) variance that all have.
        own: (m,) or number, variance of the runs' own noise in each output, or less.
    """
    h = np.clip(h, 0, 1 - 1e-12)
    covariance, loo = finite_inverse(J.T @ J), r / (1 - h)
    V, found = V.copy(), np.zeros(len(r), dtype=bool)
    while dof - found.sum() > 2 and found.sum() < _MOST_OUTLIERS * len(r):
        # Of the residuals without those found: r_o^2 / (1 - h_o) is what leaving one out takes off their squares.
        squares = np.where(found, 0, r * loo)
        left = dof - float(found.sum()) - 1
        rest = np.maximum(
            (min(float(r @ r), float(squares.sum()) + 1e-300) - squares) / left, np.maximum(least, 1e-300)
        )
        t = np.where(found, 0, np.abs(r) / np.sqrt(rest * (1 - h)))
        k = int(np.argmax(t))
        if not 2 * len(r) * stdtr(left, -float(t[k])) < _OUTLIER:
            break
        moves = np.abs(covariance @ J[k] * loo[k])
        if (moves > _INFLUENCE * np.sqrt(np.diag(covariance) * rest[k])).any():
            return V, Outweighing(
                k,
                "fits far worse than the others, and outweighs them: it is far noisier than the others, or the fit is "
                "not at the minimum yet. Give variance= for each output, leave that one out, or allow more steps or "
                "runs.",
            )
        found[k] = True
        V = np.where(found, np.maximum(loo**2, noise), np.maximum(V * min(1.0, rest[k] / V[~found].mean()), noise))
    noise = np.maximum(noise, own)
    k = int(np.argmax(noise))
    if noise[k] > _LOUD * np.median(noise) and noise[k] > _HEARD * np.median(V) and h[k] > _SHARE:
        return V, Outweighing(
            k,
            "is far noisier than the others, and outweighs them. Give variance= for each output, or leave that one "
            "out.",
        )
    return V, None
