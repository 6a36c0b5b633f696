"""What stands, in a model of all runs, for numbers that some of their outputs lack.

Each output o is a constant plus a Gaussian process with the kernel that all outputs share (see
`bridge.fitting.methods.gaussian_process`), so that what a run lacks is predicted from the runs that have it, for all
outputs together that the same runs have. Scaling the Gram matrix to what two runs have in common would be cheaper, but
that is no Gram matrix of anything any
more: it has negative eigenvalues, and a run would look better for lacking what it explains worst.

A prediction knows the target's own noise, which is the same in all residuals, but it may be too good where a run is
far from those that have the number. So the squares that stand for what a run lacks are, on average, at least those of
what it has.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.methods.gaussian_process import GaussianProcess


def completed(rows: Array, residuals: Array, failed: NDArray[np.bool_], kernel: Array) -> tuple[Array, Array]:
    """Residuals without NaN, and what is to be added to the squared norm of each.

    Args:
        rows: (n, d). residuals: (n, m), NaN where a run lacks a number. failed: (n,) runs that have none at all.
        kernel: as `Kriging` has it.
    """
    lacking = np.isnan(residuals) & ~failed[:, None]
    more = np.zeros(len(rows))
    if not lacking.any():
        return residuals, more
    whole = np.where(lacking, 0.0, residuals)
    patterns, of_output = np.unique(lacking, axis=1, return_inverse=True)
    for g, lacks in enumerate(patterns.T):
        have = ~lacks & ~failed
        if not lacks.any() or not have.any():  # what no run has counts in none
            continue
        columns = np.flatnonzero(of_output.reshape(-1) == g)
        model = GaussianProcess(rows[have], np.zeros((int(have.sum()),) * 2), kernel, 1.0)
        predicted = model.weights(rows[lacks]) @ residuals[np.ix_(have, columns)]
        whole[np.ix_(np.flatnonzero(lacks), columns)] = predicted
    known = lacking & (~lacking & ~failed[:, None]).any(axis=0)  # of outputs that some run has
    there = (~lacking).sum(axis=1)
    least = np.where(lacking, 0.0, whole**2).sum(axis=1) / np.maximum(there, 1) * known.sum(axis=1)
    more = np.maximum(least - np.where(lacking, whole**2, 0.0).sum(axis=1), 0.0)
    return whole, np.where(failed, 0.0, more)
