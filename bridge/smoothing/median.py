"""The k-sample median and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special

from bridge.arrays import Array
from bridge.errors import InputError


def median_columns(good: NDArray[np.bool_], g: Array, k: int, columns: torch.Tensor) -> torch.Tensor:
    """The median and its gradient, one below the other, of some outputs (N, width): (1 + d, width)."""
    F = columns[torch.from_numpy(good)].numpy()
    value, jacobian = median_statistic(F, g, k)
    half = len(F) // 2
    if k <= half:
        # A constant changes the gradient's noise alone, but the median of the same rows is not one: it would take
        # k/N of the gradient away. So each half is centred on the other's median, which is independent of it.
        halves = [(F[:half], g[:half], F[half:]), (F[half:], g[half:], F[:half])]
        jacobian = np.mean([median_statistic(x - np.median(y, axis=0), s, k)[1] for x, s, y in halves], axis=0)
    return torch.from_numpy(np.vstack([value[None], jacobian.T]))


def median_statistic(F: Array, g: Array, k: int) -> tuple[Array, Array]:
    """The k-sample median and its gradient as U-statistics over all subsets of k rows.

    With y_(r) the sorted outputs and s_(r) their scores, h = (k-1)/2 and T = C(N, k):
    value = sum_r y_(r) C(r-1, h) C(N-r, h) / T;
    gradient = sum_r y_(r) [C(r-1,h) C(N-r,h) s_(r) + C(r-2,h-1) C(N-r,h) sum_{i<r} s_(i)
    + C(r-1,h) C(N-r-1,h-1) sum_{i>r} s_(i)] / T (all k scores of a subset, not the median's alone).

    Args:
        F: (N, m) outputs. g: (N, d) scores pulled back, L^-T s. k: odd.

    Returns:
        (m,) and (m, d).
    """
    n = len(F)
    if F.shape[1] == 1:
        # Sums over rows run in one order for two columns and more; a single one would be summed in pairs.
        value, jacobian = median_statistic(np.repeat(F, 2, axis=1), g, k)
        return value[:1], jacobian[:1]
    if int(k) != k or k < 1 or k % 2 == 0 or k > n:
        raise InputError(f"Expected an odd k between 1 and the {n} rows for the k-sample median, got {k!r}.")
    h = (k - 1) // 2
    r = np.arange(1, n + 1)
    # Ratios to C(N, k) by logarithms: the binomials themselves overflow.
    total = _log_binomial(n, k)

    def ratio(a: Array | NDArray[np.int64], i: int, b: Array | NDArray[np.int64], j: int) -> Array:
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(np.exp(_log_binomial(a, i) + _log_binomial(b, j) - total))

    own = ratio(r - 1, h, n - r, h)
    below = ratio(r - 2, h - 1, n - r, h) if h else np.zeros(n)
    above = ratio(r - 1, h, n - r - 1, h - 1) if h else np.zeros(n)
    order = np.argsort(F, axis=0, kind="stable")
    y = np.take_along_axis(F, order, axis=0)
    value = np.sum(own[:, None] * y, axis=0)
    jacobian = np.empty((F.shape[1], g.shape[1]))
    for j in range(g.shape[1]):
        s = g[:, j][order]
        lower = np.cumsum(s, axis=0) - s
        higher = s.sum(axis=0) - lower - s
        jacobian[:, j] = np.sum(y * (own[:, None] * s + below[:, None] * lower + above[:, None] * higher), axis=0)
    return value, jacobian


def _log_binomial(n: Any, k: int) -> Any:
    """log C(n, k), -inf where it is zero."""
    n = np.asarray(n, dtype=np.float64)
    inside = (n >= k) & (k >= 0)
    safe = np.where(inside, n, max(k, 0))
    value = special.gammaln(safe + 1) - special.gammaln(k + 1) - special.gammaln(safe - k + 1) if k >= 0 else 0 * safe
    return np.where(inside, value, -np.inf)
