"""Which rows of kept outputs count, and with which weights: all of them where nothing failed and nothing is lacking."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import EvaluationError
from bridge.estimators.weights import Weights, enough, in_pairs, make_weights, survivors
from bridge.evaluation.execution import STATUSES, Failure
from bridge.evaluation.kept_rows import KeptRows, has_rows
from bridge.evaluation.request import Drawn
from bridge.evaluation.rows import aligned
from bridge.evaluation.runner import Task
from bridge.simulator.protocol import simulator_name

_log = logging.getLogger("bridge")


class Group(NamedTuple):
    """Outputs of a problem that the same rows have.

    columns: their numbers; None for all outputs. valid: (num_rows,) which rows count. weights: None where too few do.
    """

    columns: torch.Tensor | None
    valid: NDArray[np.bool_]
    weights: Weights | None

    def times(self, factor: float) -> Group:
        """With weights multiplied by a number."""
        w = self.weights
        if w is None:
            return self
        scale = None if w.scale is None else w.scale * factor
        return self._replace(weights=Weights(w.value * factor, w.theta * factor, scale))


def agree_on_failures(task: Task, failures: Mapping[int, Failure]) -> tuple[NDArray[np.bool_], dict[str, int], str]:
    """Which runs of which problem succeeded, (P, num_rows), how many failed how, and why one of them did. Collective.

    Args:
        failures: row (over all problems) -> how it failed, of this rank's rows.

    Raises:
        EvaluationError: too few runs have succeeded.
    """
    tolerance, dispatcher = task.tolerance, task.dispatcher
    good = np.ones((task.layout.num_problems, task.layout.num_rows), dtype=bool)
    if tolerance.failures == "raise":
        return good, {}, ""
    codes = np.zeros(good.size)
    for row, failure in failures.items():
        codes[row] = STATUSES.index(failure.status)
    codes = dispatcher.scatter_add(codes).reshape(good.shape)
    counted = dict(Counter(STATUSES[int(code)] for code in codes[codes > 0]))
    num_failed = sum(counted.values())
    if num_failed == 0:
        return good, counted, ""
    why = dispatcher.first(next((f.why for f in failures.values()), None))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(counted.items()))
    least = 1 - num_failed / good.size
    if least < tolerance.min_ok:
        raise EvaluationError(
            f"Expected at least {tolerance.min_ok:.0%} of the runs to succeed (at_least), got {least:.0%}: "
            f"{num_failed} of {good.size} runs of {simulator_name(task.simulator)!r} failed ({counts}). "
            f"One of them: {why}"
        )
    if dispatcher.rank == 0:
        one = _one_line(str(why))
        _log.warning("%d of %d evaluations failed: %s; one: %s", num_failed, good.size, counts, one)
    return codes == 0, counted, str(why)


def rows_that_count(drawn: Drawn, good: NDArray[np.bool_], why: str) -> NDArray[np.bool_]:
    """(P, num_rows) of which rows sums are made, of the runs that succeeded.

    Raises:
        EvaluationError: too few rows of a problem are left.
    """
    strategy = drawn.request.strategy
    if strategy.failures == "penalty":
        return np.ones_like(good)  # the penalty is their output
    if good.all():
        return good
    nodes = [problem.design.nodes for problem in drawn.problems]
    return np.stack([survivors(strategy, n, g, why) for n, g in zip(nodes, good, strict=True)])


def _one_line(why: str) -> str:
    """What a log has room for, a round: the first line, and where the run's directory is."""
    first, *more = why.splitlines() or [""]
    return first + "".join(f" ({line.strip()})" for line in more if line.startswith("  directory: "))


def agree_on_groups(drawn: Drawn, rows: KeptRows, valid: NDArray[np.bool_]) -> list[list[Group]]:
    """The outputs of each problem, in groups that lack the same rows, with weights of their own. Collective.

    What travels is a bit for each number, and only where some are lacking. In the rows these become 0, which has no
    weight.
    """
    strategy = drawn.request.strategy
    lacking = [np.zeros((0, 0))] * len(drawn.problems)
    if strategy.missing == "ignore":
        lacking = rows.take_lacking()
    groups = []
    for p, packed in enumerate(lacking):
        if not packed.size:
            groups.append([Group(None, valid[p], _weights(drawn, rows, p, valid[p]))])
            continue
        patterns, own = np.unique(packed, axis=1, return_inverse=True)
        mine = []
        for g, words in enumerate(patterns.T):
            good = valid[p] & has_rows(words, strategy.num_rows)
            counts = in_pairs(strategy, drawn.problems[p].design.nodes, good)
            usable = enough(strategy, counts) and bool(counts[strategy.num_samples :].all())
            columns = torch.as_tensor(np.flatnonzero(own.reshape(-1) == g))
            mine.append(Group(columns, counts, _weights(drawn, rows, p, counts) if usable else None))
        groups.append(mine)
    return groups


def _weights(drawn: Drawn, rows: KeptRows, p: int, valid: NDArray[np.bool_]) -> Weights:
    request, nodes = drawn.request, drawn.problems[p].design.nodes
    projections = _projections(rows, p) if request.strategy.covariate.needs_outputs else None
    form = request.form if request.need_scale else None
    weights = make_weights(request.strategy, nodes, form, valid, projections)
    if projections is None:
        return weights
    # Fitted numbers: the same bits on every rank.
    share = request.dispatcher.broadcast
    return replace(weights, value=share(weights.value), theta=share(weights.theta))


def _projections(rows: KeptRows, p: int) -> Array:
    """(N, 4) projections of the outputs on random signs, from which hyperparameters are fitted. Collective."""
    signs = np.random.Generator(np.random.Philox(key=rows.num_outputs)).integers(0, 2, (4, rows.num_outputs))
    vectors = [aligned(torch.as_tensor(row)) for row in 2.0 * signs - 1.0]
    return np.stack(rows.products([(p, v) for v in vectors]), axis=1)[: rows.layout.num_samples]


def group_sums(
    rows: KeptRows,
    groups: Sequence[Sequence[Group]],
    asked: Sequence[tuple[int, Callable[[Weights], Array]]],
    buffers: list[torch.Tensor] | None = None,
    only: Sequence[torch.Tensor | None] | None = None,
) -> list[torch.Tensor]:
    """W F for each (problem, weights -> W (c, num_rows)): (c, m) float64, NaN where too few rows have a number.
    Collective.

    Args:
        groups: of each problem.
        only: for each, the outputs that are asked for; the others are left NaN.
    """
    requests: list[tuple[int, Array, torch.Tensor | None]] = []
    for q, (p, of) in enumerate(asked):
        index = None if only is None else only[q]
        for group in groups[p]:
            if group.weights is not None:
                columns = group.columns if index is None else index
                if index is not None and group.columns is not None:
                    columns = index[torch.isin(index, group.columns)]
                requests.append((q, of(group.weights), columns))
    requests = [r for r in requests if r[2] is None or len(r[2])]
    wanted = [(asked[q][0], W) for q, W, _ in requests]
    totals = rows.tree_sums(wanted, columns=[columns for *_, columns in requests], buffers=buffers)
    results: list[torch.Tensor | None] = [None] * len(asked)
    for (q, _, columns), total in zip(requests, totals, strict=True):
        if columns is None:
            results[q] = total
            continue
        whole = results[q]
        if whole is None:
            whole = results[q] = total.new_full((len(total), rows.num_outputs), torch.nan)
        whole[:, columns.to(whole.device)] = total
    shape = 1, rows.num_outputs
    return [rows.like.new_full(shape, torch.nan, dtype=torch.float64) if x is None else x for x in results]


def value_weights(weights: Weights) -> Array:
    """(1, num_rows)."""
    return weights.value[None]


def theta_weights(weights: Weights) -> Array:
    """(d, num_rows)."""
    return weights.theta.T
