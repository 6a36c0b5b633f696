"""Weights: every estimator is linear in the outputs, value = F^T a, Jacobian = F^T W L^-1, d/dL = L^-T unvec(F^T G).

All weights are made in eps-space, before L^-1, from the perturbations alone (`bq` needs the outputs, too). How the
score functions are centred is the covariate's (`bridge.estimators.covariates`); here are the rows that count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import EvaluationError, InputError
from bridge.estimators.covariates import Covariate, Sample
from bridge.estimators.points import Nodes
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


def resolve_covariate(strategy: Strategy, nodes: Nodes) -> tuple[Covariate, str]:
    """What a covariate stands for with these rows, and why, in words."""
    asked = strategy.covariate
    covariate, why = asked.resolve(_sample(strategy, nodes))
    for need in ("needs_centre", "needs_outputs"):  # known before the run
        if getattr(covariate, need) and not getattr(asked, need):
            raise InputError(
                f"Expected {need} = True of the covariate {asked!r}, which resolves to {covariate!r}, got False."
            )
    return covariate, why


def _sample(strategy: Strategy, nodes: Nodes) -> Sample:
    return Sample(nodes, strategy.distribution, strategy.information, strategy.replicates)


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
        EvaluationError: fewer than `at_least` of the rows are left, or the unperturbed one is lost and has a weight.
    """
    n, valid = strategy.num_samples, in_pairs(strategy, nodes, good)
    left = int(valid[:n].sum())
    if not enough(strategy, valid):
        raise EvaluationError(
            f"Expected at least {strategy.min_ok:.0%} of {n} rows to succeed (at_least), and two, got {left} (first "
            f"failure: {why}). Bound the parameters to where the simulator works, or use a smaller scale."
        )
    if strategy.extra_row and not valid[n]:
        raise EvaluationError(
            f"Expected the unperturbed run to succeed, as covariate='f(x)' and straight_through() need it, got a "
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
        projections: (N, c) projections of the outputs, where the covariate needs these.
    """
    n, d = nodes.eps.shape
    rows = np.ones(n, dtype=bool) if valid is None else valid[:n]
    if not rows.all():
        nodes = _survivors_only(nodes, rows)
    covariate, _ = resolve_covariate(strategy, nodes)
    seen = projections[rows] if covariate.needs_outputs and projections is not None else None
    mean, theta = covariate.weights(_sample(strategy, nodes), seen)
    value = np.zeros(strategy.num_rows)
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
        scale = _all_rows(strategy, rows, covariate.centre(raw, nodes), raw, nodes, covariate)
    return Weights(value, _all_rows(strategy, rows, theta, nodes.score, nodes, covariate), scale)


def _all_rows(
    strategy: Strategy, rows: NDArray[np.bool_], columns: Array, raw: Array, nodes: Nodes, covariate: Covariate
) -> Array:
    """Weights of the surviving rows (n', c) to those of all rows, f(x) included: (num_rows, c)."""
    if len(columns) == strategy.num_rows:
        return columns
    full = np.zeros((strategy.num_rows, columns.shape[1]))
    full[: len(rows)][rows] = columns
    if covariate.needs_centre:
        full[-1] = covariate.centre_weight(raw, nodes)
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
    s = nodes.score
    diagonal = strategy.distribution.second_score(nodes.eps) * u
    crossed = s * (s @ u)[:, None] - s * s * u
    raw = crossed if strategy.distribution.atoms else crossed + diagonal
    columns = covariate.centre(raw, nodes)
    if strategy.distribution.atoms:
        columns = columns + nodes.weight[:, None] * diagonal
    return _all_rows(strategy, rows, columns, raw, nodes, covariate)
