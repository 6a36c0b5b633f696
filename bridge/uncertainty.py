"""How well the parameters are known where a fit has ended, and what the target does not determine."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.kriging import Kriging
from bridge.misfit import Misfit
from bridge.robust import Robust
from bridge.search import Search
from bridge.simulator import ParameterSpace

Array = NDArray[np.float64]


def of_least_squares(normal: Array, variance: float, precision: Array) -> Array:
    """(J^T J / sigma^2 + P)^-1: infinite where a parameter is not determined.

    Args:
        normal: J^T J of whitened residuals, (d, d). variance: sigma^2 of these. precision: the prior's P, (d,).
    """
    return inverse(normal / variance + np.diag(precision))


def of_robust(normal: Array, J: Array, residual: Array, robust: Robust, precision: Array) -> Array:
    """The sandwich A^-1 M A^-1, A = b J^T J + P, M = a J^T J + P, with a and b from the residuals themselves.

    So it holds for residuals that are not Gaussian: outliers cost accuracy, in place of lending it (see
    `Robust.spread`).

    Args:
        normal: J^T J, without weights. J: (m, d), for the leverages alone. residual: (m,) in standard deviations.
        precision: the prior's P, (d,).
    """
    a, b = robust.spread(residual, leverages(J, robust.weight(residual), precision))
    bread = inverse(b * normal + np.diag(precision))
    open_ = np.isinf(np.diag(bread))
    bread[open_, open_] = 0
    result = bread @ (a * normal + np.diag(precision)) @ bread
    result[open_, open_] = np.inf
    return np.asarray(result)


def leverages(J: Array, weight: Array, precision: Array) -> Array:
    """h_i = w_i J_i (J^T W J + P)^-1 J_i^T, (m,): how far the fit follows each number. They add up to d without P."""
    covariance = inverse((J.T * weight) @ J + np.diag(precision))
    open_ = np.isinf(np.diag(covariance))
    covariance[open_, open_] = 0
    return np.asarray(weight * ((J @ covariance) * J).sum(axis=1))


def of_descent(misfit: Misfit, jacobian: torch.Tensor, output: torch.Tensor, natural: Array, known: bool) -> Array:
    """Covariance in natural units, from the smoothed output and its Jacobian.

    Args:
        known: whether the target's variance is; else the mean squared residual takes its place.
    """
    J = misfit.jacobian(jacobian, natural)
    r = misfit.residual(output)
    normal, d = (J.T @ J).numpy(), J.shape[1]
    if misfit.robust is not None:
        return of_robust(normal, J.numpy(), r.numpy(), misfit.robust, misfit.prior.precision)
    variance = 1.0 if known else max(float(r @ r) / max(len(r) - d, 1), 1e-300)
    return of_least_squares(normal, variance, misfit.prior.precision)


def of_search(search: Search, misfit: Misfit, known: bool) -> Array:
    """Covariance in natural units, where a search is now.

    sigma^2 has what the simulator's own noise leaves open, and is otherwise 1 where the variance is known, else the
    mean squared residual.
    """
    loss, z = search.overall
    robust, precision = misfit.robust, misfit.prior.precision
    model = search.model(z, weighted=False)
    m, d = search.residuals.shape[1], len(z)
    weights = model.at(z)[0]
    noise = model.noise / m
    sigma2 = 1.0 if known else max(2 * loss / max(m - d, 1) - noise, 0.0)
    variance = max(sigma2 + noise * float(weights @ weights), 1e-300)
    covariance, width = np.eye(d), np.full(d, 0.1)
    # Differences over the errors themselves: the slope between two steps of a staircase is not what counts.
    for _ in range(3):
        normal = model.normal_matrix(z, width)
        if robust is None:
            covariance = of_least_squares(normal, variance, precision)
        else:
            J = _jacobian(search, model, z, width)
            covariance = of_robust(normal, J, search.residual_at(z), robust, precision)
        width = np.clip(np.sqrt(np.diag(covariance)), 1e-4, 1.0)
    return covariance


def _jacobian(search: Search, model: Kriging, z: Array, width: Array) -> Array:
    """(m, d) by the differences of `Kriging.normal_matrix`: the model itself knows its rows' Gram matrix alone."""
    dw = np.stack([model.at(z + h)[0] - model.at(z - h)[0] for h in np.diag(width)], axis=1) / (2 * width)
    which, first = [], 0
    for row in model.rows:  # they are in the order of the search's
        first += int(np.argmax((search.rows[first:] == row).all(axis=1)))
        which.append(first)
        first += 1
    index, failed = np.array(which), search.failed[which]
    # Of a failed row the model has another in its place: the one that is no distance away.
    square, good = np.diag(model.gram), np.flatnonzero(~failed)
    for i in np.flatnonzero(failed):
        index[i] = index[good[int(np.argmin(square[i] + square[good] - 2 * model.gram[i, good]))]]
    return np.asarray(search.residuals[index].T @ dw)


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


def lifted(covariance: Array, lift: Array) -> Array:
    """E C E^T without inf * 0."""
    free = [int(np.argmax(row)) if row.any() else -1 for row in lift]
    padded = np.zeros((len(covariance) + 1, len(covariance) + 1))
    padded[:-1, :-1] = covariance
    return np.asarray(padded[np.ix_(free, free)])


def in_units(covariance: Array, natural: Array) -> Array:
    """From natural units to the parameters' own."""
    return np.asarray(covariance * np.outer(natural, natural))


def doubts(covariance: Array | None, space: ParameterSpace, theta: Array) -> tuple[str, ...]:
    """What the target does not determine, and what to do about it."""
    if covariance is None:
        return ()
    said = []
    error = np.sqrt(np.diag(covariance))
    advice = "Fix it (fixed=), give it a prior, or add data that depend on it."
    for p, value, e in zip(space.parameters, theta, error, strict=True):
        unit = f" {p.unit}" if p.unit else ""
        if not np.isfinite(e):
            said.append(f"{p.name} is not determined by the target: outputs do not depend on it by itself. {advice}")
        elif e > 0.5 * min(p.upper - p.lower, 20 * p.natural_scale):
            said.append(f"{p.name} is hardly determined by the target: its standard error is {e:.3g}{unit}. {advice}")
        if value in (p.lower, p.upper):
            said.append(f"{p.name} ended at its bound {value:g}{unit}: its standard error does not count there.")
    if np.isfinite(error).all() and (error > 0).all():
        correlation = covariance / np.outer(error, error)
        for i, j in zip(*np.triu_indices(len(error), 1), strict=True):
            if abs(correlation[i, j]) > 0.98:
                a, b = space.names[i], space.names[j]
                said.append(f"{a} and {b} are known together only: their correlation is {correlation[i, j]:+.3f}.")
    return tuple(said)
