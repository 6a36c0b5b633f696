"""What the target does not determine, in words, and what to do about it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.fit_result import Stated
from bridge.simulator import ParameterSpace

Array = NDArray[np.float64]


def doubts(stated: Stated | None, space: ParameterSpace, theta: Array, at_bound: NDArray[np.bool_]) -> tuple[str, ...]:
    """What the target does not determine, and what to do about it."""
    if stated is None:
        return ()
    covariance, unclear = stated.covariance * np.outer(space.natural_scale, space.natural_scale), stated.unclear
    said = list(stated.notes)
    error = np.sqrt(np.diag(covariance))
    advice = "Fix it (fixed=), give it a prior, or add data that depend on it."
    hidden = unclear if unclear.size else np.zeros(len(error), dtype=bool)
    for p, value, e, lost, bounded in zip(space.parameters, theta, error, hidden, at_bound, strict=True):
        unit = f" {p.unit}" if p.unit else ""
        if lost:
            said.append(
                f"{p.name} acts on the outputs by hardly more than the noise of the estimated Jacobian: its standard "
                f"error is {e:.3g}{unit} or more. Use more samples (num_samples=), a larger last scale (scale=), a "
                f"larger natural scale of {p.name}, or method='kriging'."
            )
        if np.isinf(e):
            said.append(f"{p.name} is not determined by the target: outputs do not depend on it by itself. {advice}")
        elif e > 0.5 * min(p.upper - p.lower, 20 * (p.natural_scale or 1.0)):
            said.append(f"{p.name} is hardly determined by the target: its standard error is {e:.3g}{unit}. {advice}")
        if bounded:
            said.append(f"{p.name} ended at its bound {value:g}{unit}: no standard error of it is stated there.")
    if np.isfinite(error).all() and (error > 0).all():
        correlation = covariance / np.outer(error, error)
        for i, j in zip(*np.triu_indices(len(error), 1), strict=True):
            if abs(correlation[i, j]) > 0.98:
                a, b = space.names[i], space.names[j]
                said.append(f"{a} and {b} are known together only: their correlation is {correlation[i, j]:+.3f}.")
    return tuple(said)
