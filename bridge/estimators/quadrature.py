"""Bayesian quadrature: the weights of a Gaussian-process fit of the outputs."""

from __future__ import annotations

import numpy as np

from bridge.arrays import Array
from bridge.estimators.distributions import Distribution


def bayesian_quadrature(distribution: Distribution, eps: Array, projections: Array) -> tuple[Array, Array]:
    """Weights a (n,) and W (n, d) of the smoothed value and gradient of a Gaussian-process fit of F on eps.

    Prior: an unknown constant plus k(e, e') = exp(-|e - e'|^2 / (2 l^2)), noise of variance r beside a unit signal.
    With z_i = E[k(eps, eps_i)], z_s,i = E[k(eps, eps_i) s(eps)] (products of one-dimensional quadratures, since both
    factorise), K = k + r I and 1 the constant: a = K^-1 z + K^-1 1 (1 - 1^T K^-1 z) / (1^T K^-1 1), which sums to 1,
    and W alike, which sums to 0.
    """
    n, d = eps.shape
    distances = np.sum((eps[:, None, :] - eps[None, :, :]) ** 2, axis=2)
    ones = np.ones(n)
    centred = projections - projections.mean(axis=0)
    spread = np.where(centred.std(axis=0) > 0, centred.std(axis=0), 1.0)
    centred = centred / spread
    best, chosen = -np.inf, (1.0, 1.0)
    # Distances grow as sqrt(d) times the noise's width.
    width = float(np.median(distances[~np.eye(n, dtype=bool)])) ** 0.5 if n > 1 else 1.0
    for length in width * np.array([0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0]):
        values, vectors = np.linalg.eigh(np.exp(-distances / (2 * length**2)))
        rotated, constant = vectors.T @ centred, vectors.T @ ones
        for r in 10.0 ** np.arange(-6, 1.5, 0.5):
            lam = np.maximum(values, 0) + r
            shift = (constant / lam) @ rotated / ((constant / lam) @ constant)
            residual = rotated - constant[:, None] * shift
            energy = np.sum(residual**2 / lam[:, None], axis=0) / n
            likelihood = -0.5 * (np.sum(np.log(np.maximum(energy, 1e-300))) * n + len(energy) * np.sum(np.log(lam)))
            if likelihood > best:
                best, chosen = likelihood, (float(length), float(r))
    length, r = chosen
    plain, scored = _kernel_means(distribution, eps, length)
    K = np.exp(-distances / (2 * length**2)) + r * np.eye(n)
    z = np.prod(plain, axis=1)
    others = np.stack([np.prod(np.delete(plain, j, axis=1), axis=1) for j in range(d)], axis=1)
    z_s = scored * others
    solved = np.linalg.solve(K, np.column_stack([ones, z, z_s]))
    unit, total = solved[:, 0], solved[:, 0].sum()
    a = solved[:, 1] + unit * (1 - solved[:, 1].sum()) / total
    W = solved[:, 2:] - unit[:, None] * solved[:, 2:].sum(axis=0) / total
    return a, W


def _kernel_means(distribution: Distribution, eps: Array, length: float) -> tuple[Array, Array]:
    """E[k(e, eps_ij)] and E[k(e, eps_ij) s(e)] over one coordinate, each (n, d), by Gauss rules in u."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    edges = np.linspace(0.0, 1.0, 65)
    half = 0.5 * np.diff(edges)
    t = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * nodes).ravel()
    w = (half[:, None] * weights).ravel() * 6 * t * (1 - t)
    u = t * t * (3 - 2 * t)
    e, s = distribution.icdf(u), distribution.score_from_uniform(u)
    kernel = np.exp(-((eps[:, :, None] - e) ** 2) / (2 * length**2))
    return kernel @ w, kernel @ (w * s)
