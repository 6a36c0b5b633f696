"""Weights: every estimator is linear in the outputs, value = F^T a, Jacobian = F^T W L^-1, d/dL = L^-T unvec(F^T G).

All weights are made in eps-space, before L^-1, from the perturbations alone. A covariate (control variate) is a way of
centring the score functions; since E[s] = 0 and E[s eps^T] = I, constants may be subtracted from f in both gradients.

Write g_i for a score function of row i (a column of s, or of s eps^T - I), w_i for the weights of the mean (1/N but for
quadrature rules). The estimators are sum_i w_i (F_i - b_i) g_i with

    none    b = 0
    f(x)    b = f(x), one more row: weight -sum_i w_i g_i on it
    mean    b = the mean of all rows
    loo     b_i = the mean of the other rows; the literal one, (1/(N-1)) sum_i (F_i - avg) g_i
    auto    b_i = the mean of the other independent blocks of rows (leave one block out): `loo` for independent rows,
            whole pairs for antithetic ones; where all rows depend on each other, `mean`

Leaving out blocks is exactly unbiased. `mean` under dependent rows is nearly unbiased in x, short by O(1/N) in L. The
literal `loo` under dependent rows is biased up by up to N/(N-1).

Reference: arXiv 2410.08125, section on covariates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bridge.design import Covariate, Strategy
from bridge.points import Nodes
from bridge.scale import Form

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """Weights of all rows of one problem (the N perturbed ones, then f(x) if it is evaluated).

    Attributes:
        value: (num_rows,)
        theta: (num_rows, d), in eps-space.
        scale: (num_rows, d) for a diagonal L, (num_rows, d^2) row-major for a matrix, in eps-space; None when the
            scale is not differentiated.
    """

    value: Array
    theta: Array
    scale: Array | None


def resolve_covariate(covariate: Covariate, nodes: Nodes) -> tuple[Covariate, str]:
    """What "auto" stands for with these rows, and why, in words."""
    if covariate != "auto":
        return covariate, "as asked"
    n = len(nodes.weight)
    if np.ptp(nodes.weight) > 0:
        return "none", "quadrature weights are exact without a covariate"
    if nodes.block == 1 and n > 1:
        return "loo", "rows are independent: leave-one-out is unbiased"
    if nodes.block < n:
        return "auto", f"blocks of {nodes.block} rows are independent: whole blocks are left out, unbiased"
    if n == 1:
        return "none", "a single row cannot be centred on others"
    return "mean", "rows depend on each other: the mean, without N/(N-1), is nearly unbiased"


def _centre(g: Array, nodes: Nodes, covariate: Covariate) -> Array:
    """Rows of weights W with sum_i F_i W_i = sum_i w_i (F_i - b_i) g_i; g is (N, c)."""
    n, w = len(nodes.weight), nodes.weight[:, None]
    if covariate in ("none", "f(x)"):
        return w * g
    if covariate == "mean":
        return w * (g - np.sum(w * g, axis=0))
    if covariate == "loo":
        return (g - np.mean(g, axis=0)) / (n - 1)
    # Leave one block out: b_i = mean of the rows outside i's block.
    total = np.sum(g, axis=0)
    own = np.repeat(np.add.reduceat(g, np.arange(0, n, nodes.block), axis=0), nodes.block, axis=0)
    return (g - (total - own) / (n - nodes.block)) / n


def make_weights(strategy: Strategy, nodes: Nodes, scale_form: Form | None) -> Weights:
    """The weights of one problem; `scale_form` is None when L is not differentiated."""
    covariate, _ = resolve_covariate(strategy.covariate, nodes)
    n, d = nodes.eps.shape

    def with_extra_row(columns: Array, raw: Array) -> Array:
        if not strategy.extra_row:
            return columns
        last = -np.sum(nodes.weight[:, None] * raw, axis=0) if covariate == "f(x)" else np.zeros(raw.shape[1])
        return np.vstack([columns, last])

    value = np.zeros(strategy.num_rows)
    if strategy.forward == "unsmoothed":
        value[n] = 1.0
    else:
        value[:n] = nodes.weight
    theta = with_extra_row(_centre(nodes.score, nodes, covariate), nodes.score)
    scale = None
    if scale_form is not None:
        if scale_form == "diagonal":
            raw = nodes.score * nodes.eps - 1
        else:
            raw = (nodes.score[:, :, None] * nodes.eps[:, None, :] - np.eye(d)).reshape(n, d * d)
        scale = with_extra_row(_centre(raw, nodes, covariate), raw)
    return Weights(value, theta, scale)
