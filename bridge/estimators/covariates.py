"""Weights: every estimator is linear in the outputs, value = F^T a, Jacobian = F^T W L^-1, d/dL = L^-T unvec(F^T G).

All weights are made in eps-space, before L^-1, from the perturbations alone. A covariate (control variate) is a way of
centring the score functions; since E[s] = 0 and E[s eps^T] = I, constants may be subtracted from f in both gradients.

Write g_i for a score function of row i (a column of s, or of s eps^T - I), w_i for the weights of the mean (1/N but for
quadrature rules). The estimators are sum_i w_i (F_i - b_i) g_i with

    none    b = 0
    f(x)    b = f(x), one more row: weight -sum_i w_i g_i on it
    mean    b = the mean of all rows
    loo     b_i = the mean of the other rows; the literal one, (1/(N-1)) sum_i (F_i - avg) g_i
    block   b_i = the mean of the other independent blocks of rows (leave one block out): `loo` for independent rows,
            whole pairs for antithetic ones; where all rows depend on each other, `mean`

Leaving out blocks is exactly unbiased. `mean` under dependent rows is nearly unbiased in x, short by O(1/N) in L. The
literal `loo` under dependent rows is biased up by up to N/(N-1).

Two estimators of the gradient in x are not of that form; they use more of the design, and are biased by O(1/N):

    regression  least squares of F on [1, s], times the known E[s s^T] = I_F: W = I_F S~ (S~^T S~)^-1, S~ the centred
                scores. Exact for f linear in s, that is for a linear f and Gaussian noise.
    bq          Bayesian quadrature: the gradient of a Gaussian-process fit of F on eps, see `bayesian_quadrature`;
                length and noise by maximum likelihood on projections of F.

`auto` takes the regression where the rows suffice for it and the density is symmetric, else, and where replicates are
asked for, `block`.

Reference: arXiv 2410.08125, section on covariates; Berahas, Cao, Choromanski, Scheinberg, FoCM 22 (2022) 507, for
regression; O'Hagan, J. Stat. Plan. Inference 29 (1991) 245, for Bayesian quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import EvaluationError
from bridge.estimators.distributions import Distribution, Gaussian
from bridge.estimators.points import Nodes
from bridge.estimators.quadrature import bayesian_quadrature
from bridge.estimators.scale import Form
from bridge.estimators.strategy import Strategy


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


# Regression wants so many rows for each column, and so well-conditioned scores; below, its variance explodes.
_ROWS_PER_COLUMN = 4
_LEAST_EIGENVALUE = 0.1


def resolve_covariate(strategy: Strategy, nodes: Nodes) -> tuple[str, str]:
    """What a covariate stands for with these rows, and why, in words."""
    covariate = strategy.covariate
    n, d = nodes.eps.shape
    if covariate == "regression":
        good, why = _regression_is_safe(strategy, nodes)
        return ("regression", "as asked") if good else ("block", f"regression is not possible: {why}")
    if covariate != "auto":
        return covariate, "as asked"
    if np.ptp(nodes.weight) > 0:
        return "none", "quadrature weights are exact without a covariate"
    if n == 1:
        return "none", "a single row cannot be centred on others"
    if strategy.replicates > 1:
        # Each regression is biased alike, by O(1/N), which the spread of the replicates does not show: 95 % intervals
        # then cover 81 to 93 % (16 and 64 rows of a smooth function).
        return "block", "replicates give standard errors, which hold for unbiased weights"
    if _is_skew(strategy.distribution):
        return "block", "the score of a skew density is far from linear: least squares on it gain nothing"
    # Pairs of Gaussian rows are central differences: they suffice as soon as they span the space well.
    pairs = nodes.paired and isinstance(strategy.distribution, Gaussian)
    if (pairs or n >= _ROWS_PER_COLUMN * (d + 1)) and _regression_is_safe(strategy, nodes)[0]:
        return "regression", f"{n} rows suffice for least squares on {d} scores"
    if nodes.block == 1:
        return "block", "rows are independent: leave-one-out is unbiased"
    if nodes.block < n:
        return "block", f"blocks of {nodes.block} rows are independent: whole blocks are left out, unbiased"
    return "block", "rows depend on each other: the mean, without N/(N-1), is nearly unbiased"


def _is_skew(distribution: Distribution) -> bool:
    low, middle, high = distribution.icdf(np.array([0.1, 0.5, 0.9]))
    return bool(abs(low + high - 2 * middle) > 1e-3 * (high - low))


def _regression_is_safe(strategy: Strategy, nodes: Nodes) -> tuple[bool, str]:
    n, d = nodes.eps.shape
    if not np.isfinite(strategy.information) or np.ptp(nodes.weight) > 0:
        return False, f"the Fisher information of {strategy.distribution.name} is not finite, or rows have weights"
    if (n // 2 if nodes.paired else n - 1) < d:
        return False, f"{n} rows for {d} scores"
    centred = nodes.score - np.mean(nodes.score, axis=0)
    least = float(np.linalg.eigvalsh(centred.T @ centred / n)[0]) / strategy.information
    return least >= _LEAST_EIGENVALUE, f"the scores' least eigenvalue is {least:.2g} of what is expected"


def _centre(g: Array, nodes: Nodes, covariate: str) -> Array:
    """Rows of weights W with sum_i F_i W_i = sum_i w_i (F_i - b_i) g_i; g is (N, c)."""
    n, w = len(nodes.weight), nodes.weight[:, None]
    if covariate in ("none", "f(x)") or n == 1:
        return w * g
    if covariate == "loo":
        return (g - np.mean(g, axis=0)) / (n - 1)
    if covariate == "mean" or nodes.block >= n:
        return w * (g - np.sum(w * g, axis=0))
    # Leave one block out: b_i = mean of the rows outside i's block.
    total = np.sum(g, axis=0)
    own = np.repeat(np.add.reduceat(g, np.arange(0, n, nodes.block), axis=0), nodes.block, axis=0)
    return (g - (total - own) / (n - nodes.block)) / n


def _regression(strategy: Strategy, nodes: Nodes) -> Array:
    # In torch's memory, whose alignment is the same on every rank: the last bits of a solution depend on it.
    centred = torch.as_tensor(nodes.score - np.mean(nodes.score, axis=0)).clone()
    solved = torch.linalg.solve(centred.T @ centred, centred.T)
    return np.ascontiguousarray(strategy.information * solved.T.numpy())


def _survivors_only(nodes: Nodes, valid: NDArray[np.bool_]) -> Nodes:
    weight = nodes.weight[valid] / np.sum(nodes.weight[valid])
    # Independent rows and whole pairs stay so; of other blocks nothing is known any more.
    block = nodes.block if nodes.block == 1 or (nodes.paired and nodes.block == 2) else len(weight)
    return replace(nodes, eps=nodes.eps[valid], score=nodes.score[valid], weight=weight, block=block)


def in_pairs(strategy: Strategy, nodes: Nodes, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(num_rows,) the good rows of which the other half of the pair is good as well, where rows are pairs."""
    valid, n = good.copy(), strategy.num_samples
    if nodes.paired:
        valid[:n] = np.repeat(valid[:n].reshape(-1, 2).all(axis=1), 2)
    return valid


def enough(strategy: Strategy, valid: NDArray[np.bool_]) -> bool:
    """Whether so many rows suffice for an estimate."""
    n = strategy.num_samples
    left = int(valid[:n].sum())
    return left >= max(strategy.min_ok * n, min(n, 2))


def survivors(strategy: Strategy, nodes: Nodes, good: NDArray[np.bool_], why: str) -> NDArray[np.bool_]:
    """Which rows count, once those that failed are dropped: (num_rows,). A pair goes as a whole.

    Raises:
        EvaluationError: fewer than `min_ok` of the rows are left, or the unperturbed one is lost and has a weight.
    """
    n, valid = strategy.num_samples, in_pairs(strategy, nodes, good)
    left = int(valid[:n].sum())
    if not enough(strategy, valid):
        raise EvaluationError(
            f"Expected at least {strategy.min_ok:.0%} of {n} rows to succeed (min_ok), and two, got {left} (first "
            f"failure: {why}). Bound the parameters to where the simulator works, or use a smaller scale."
        )
    if strategy.extra_row and not valid[n]:
        raise EvaluationError(
            f"Expected the unperturbed run to succeed, as covariate='f(x)' and forward='unsmoothed' need it, got a "
            f"failure: {why}."
        )
    return valid


def make_weights(
    strategy: Strategy,
    nodes: Nodes,
    scale_form: Form | None,
    valid: NDArray[np.bool_] | None = None,
    projections: Array | None = None,
) -> Weights:
    """The weights of one problem.

    Args:
        scale_form: None when L is not differentiated.
        valid: (num_rows,) rows that count; all, when left out. The others get a weight of zero, and the rest are the
            weights of the design without them.
        projections: (N, c) projections of the outputs, for covariate "bq" alone.
    """
    n, d = nodes.eps.shape
    rows = np.ones(n, dtype=bool) if valid is None else valid[:n]
    if not rows.all():
        nodes = _survivors_only(nodes, rows)
    covariate, _ = resolve_covariate(strategy, nodes)
    value = np.zeros(strategy.num_rows)
    mean = nodes.weight
    if covariate == "regression":
        theta, centring = _regression(strategy, nodes), "block"
    elif covariate == "bq":
        assert projections is not None
        mean, theta = bayesian_quadrature(strategy.distribution, nodes.eps, projections[rows])
        centring = "block"
    else:
        theta, centring = _centre(nodes.score, nodes, covariate), covariate
    if strategy.forward == "unsmoothed":
        value[n] = 1.0
    else:
        value[:n][rows] = mean
    scale = None
    if scale_form is not None:
        if scale_form == "diagonal":
            raw = nodes.score * nodes.eps - 1
        else:
            raw = (nodes.score[:, :, None] * nodes.eps[:, None, :] - np.eye(d)).reshape(-1, d * d)
        scale = _all_rows(strategy, rows, _centre(raw, nodes, centring), raw, nodes, covariate)
    return Weights(value, _all_rows(strategy, rows, theta, nodes.score, nodes, covariate), scale)


def _all_rows(
    strategy: Strategy, rows: NDArray[np.bool_], columns: Array, raw: Array, nodes: Nodes, covariate: str
) -> Array:
    """Weights of the surviving rows (n', c) to those of all rows, f(x) included: (num_rows, c)."""
    if len(columns) == strategy.num_rows:
        return columns
    full = np.zeros((strategy.num_rows, columns.shape[1]))
    full[: len(rows)][rows] = columns
    if covariate == "f(x)":
        full[-1] = -np.sum(nodes.weight[:, None] * raw, axis=0)
    return full


def second_weights(strategy: Strategy, nodes: Nodes, valid: NDArray[np.bool_], u: Array) -> Array:
    """Weights of the Hessian's product with u (d,), in eps-space: (num_rows, d).

    Row i: (s_i s_i^T + diag(p''/p - s_i^2)) u, centred as the gradient is. Where p has kinks, the diagonal's mean is
    not zero without its atoms, so it is left as it is there.
    """
    rows = valid[: len(nodes.weight)]
    if not rows.all():
        nodes = _survivors_only(nodes, rows)
    covariate, _ = resolve_covariate(strategy, nodes)
    if covariate in ("regression", "bq"):
        covariate = "block"
    s = nodes.score
    diagonal = strategy.distribution.second_score(nodes.eps) * u
    crossed = s * (s @ u)[:, None] - s * s * u
    raw = crossed if strategy.distribution.atoms else crossed + diagonal
    columns = _centre(raw, nodes, covariate)
    if strategy.distribution.atoms:
        columns = columns + nodes.weight[:, None] * diagonal
    return _all_rows(strategy, rows, columns, raw, nodes, covariate)
