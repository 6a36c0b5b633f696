"""What runs are worth to a fit: which are too large to count, whether residuals look like noise, what parameters do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array

# Numbers larger than this count as failed: what is made of their squares would overflow.
HUGE = 1e100
# A run whose loss is more than so many times that of the runs to compare with is taken for one of this loss.
_TAMED = 1e6
# Residuals that are checked for order: at least so many; standard deviations that their neighbours may be alike by.
_FEWEST, _ALIKE = 8, 2.5
# A guess of a natural scale may be wrong by this factor, and is corrected by no more than that beyond; one from nothing
# is corrected altogether.
_GUESS, _CORRECTED, _UNKNOWN = 30.0, 100.0, 1e9


def unusable(outputs: Array) -> NDArray[np.bool_]:
    """(n,) which outputs (n, ...) are not finite, or too large to be squared and summed."""
    with np.errstate(invalid="ignore"):
        return np.asarray(~(np.abs(outputs.reshape(len(outputs), -1)) < HUGE).all(axis=1))


def tamed(gram: Array, reference: float) -> Array:
    """A Gram matrix in which runs of enormous losses stand for others in the same direction, of large ones.

    A huge output in one run would otherwise leave no digits for all the others.

    Args:
        reference: a loss that is usual among the runs.
    """
    losses = 0.5 * np.diag(gram)
    most = _TAMED * reference
    if not (reference > 0 and losses.max() > most):
        return gram
    shrunk = np.sqrt(np.minimum(1.0, most / np.maximum(losses, 1e-300)))
    return np.asarray(gram * np.outer(shrunk, shrunk))


def looks_like_noise(residual: Array) -> bool:
    """Whether residuals (m,) have no mean, and neighbours that are no more alike than independent numbers.

    By von Neumann's ratio of the mean squared difference of neighbours to the variance, 2 for independent numbers, with
    variance 4 (m - 2) / (m^2 - 1).

    Reference: von Neumann, "Distribution of the ratio of the mean square successive difference to the variance",
    Annals of Mathematical Statistics 12 (1941).
    """
    m = len(residual)
    scale = float(np.abs(residual).max(initial=0.0))
    if m < _FEWEST or not (scale > 0 and np.isfinite(scale)):
        return False
    r = residual / scale
    away = r - r.mean()
    variance = float((away**2).mean())
    if variance <= 0 or abs(float(r.mean())) > 3 * np.sqrt(variance / m):
        return False
    ratio = float((np.diff(r) ** 2).sum()) / (m * variance)
    return bool(ratio > 2 - _ALIKE * np.sqrt(4 * (m - 2) / (m**2 - 1)))


def sensitivities(rows: Array, gram: Array) -> Array | None:
    """(d,) changes of all outputs together with each parameter, from the first rows (n, d) and their Gram matrix.

    None where the rows do not span all directions, or nothing changes.
    """
    n, d = rows.shape
    away = rows - rows.mean(axis=0)
    values = np.linalg.svd(away, compute_uv=False)
    if n <= d or values[-1] <= 1e-8 * values[0]:
        return None
    centring = np.eye(n) - 1 / n
    inverse = np.linalg.pinv(away)
    squares = np.diag(inverse @ (centring @ gram @ centring) @ inverse.T)
    return np.sqrt(squares) if np.isfinite(squares).all() and (squares >= 0).all() and squares.max() > 0 else None


def corrected_units(
    sensitivity: Array, guessed: NDArray[np.bool_], unknown: NDArray[np.bool_], residual: float
) -> Array:
    """(d,) by which guessed natural scales are to be multiplied, so that all parameters matter about as much.

    Args:
        sensitivity: changes of the outputs over one natural scale of each parameter.
        guessed: of which parameters nothing was said. unknown: of which nothing was known either.
        residual: the norm of all residuals at the start.
    """
    units = np.ones(len(sensitivity))
    seen = sensitivity > 1e-12 * sensitivity.max()
    known = seen & ~unknown
    usual = float(np.exp(np.log(sensitivity[known]).mean())) if known.any() else 0.3 * residual
    if usual > 0:
        ratio = usual / np.where(seen, sensitivity, usual)
        beyond = np.where(unknown, ratio, np.maximum(ratio / _GUESS, 1.0) * np.minimum(ratio * _GUESS, 1.0))
        most = np.where(unknown, _UNKNOWN, _CORRECTED)
        units = np.where(guessed & seen, np.clip(beyond, 1 / most, most), 1.0)
    return units
