"""What is linear in outputs that are kept, and what needs the rows themselves.

The forward pass reduces m numbers; a VJP exchanges the N scalars <v, F_i>.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.estimators.scale import pull_back_theta, push_theta
from bridge.estimators.weights import Weights, second_weights
from bridge.evaluation.execution import Failure
from bridge.evaluation.groups import (
    Group,
    agree_on_failures,
    agree_on_groups,
    group_sums,
    rows_that_count,
    theta_weights,
    value_weights,
)
from bridge.evaluation.kept_rows import KeptRows
from bridge.evaluation.linear_forms import Evaluated, collective, mean_of
from bridge.evaluation.request import Drawn
from bridge.evaluation.rows import Known


class KeptSums(NamedTuple):
    """The rows, which of them count and how, and the values that they give.

    valid: (P, num_rows). groups: of each problem. values: (m,) of each problem. failures: how many failed how.
    """

    rows: KeptRows
    valid: NDArray[np.bool_]
    groups: list[list[Group]]
    values: list[torch.Tensor]
    failures: dict[str, int]


def sum_kept(drawn: Drawn, rows: KeptRows, failures: Mapping[int, Failure]) -> KeptSums:
    """Agrees on which rows count, and adds up the values. Collective.

    Args:
        failures: row (over all problems) -> how it failed, of this rank's rows.
    """
    good, counted, why = agree_on_failures(drawn.task, failures)
    valid = rows_that_count(drawn, good, why)
    groups = agree_on_groups(drawn, rows, valid)
    asked = [(p, value_weights) for p in range(len(drawn.problems))]
    values = [total[0] for total in group_sums(rows, groups, asked, drawn.request.spare)]
    return KeptSums(rows, valid, groups, values, counted)


@final
class Kept(Evaluated):
    """The forms of outputs that are kept.

    Attributes:
        lacks: whether outputs of some rows lack numbers that others have.
    """

    def __init__(self, drawn: Drawn, known: Known, sums: KeptSums) -> None:
        super().__init__(drawn, known, sums.values, sums.failures, streamed=False)
        self._rows, self._valid, self._groups = sums.rows, sums.valid, sums.groups
        self.lacks = any(group.columns is not None for mine in sums.groups for group in mine)

    def _multiply(self, p: int, factor: float) -> None:
        self._groups[p] = [group.times(factor) for group in self._groups[p]]

    def _gradient(self, p: int, v: torch.Tensor) -> Array:
        total: Array | float = 0.0
        for group, c in self._group_products(p, v):
            weights = group.weights
            assert weights is not None
            columns = [w for w in (weights.theta, weights.scale) if w is not None]
            # A sum in index order: the same bits whoever owned the rows.
            if self.structure is None:
                parts = [(w * c[:, None]).sum(axis=0) for w in columns]
            else:
                seen = self.structure.seen(c)
                parts = [(w * seen).sum(axis=0) for w in columns]
            total = total + np.concatenate(parts)
        return np.zeros(self._drawn.num_columns - 1) + total

    def _group_products(self, p: int, v: torch.Tensor) -> list[tuple[Group, Array]]:
        """<v, F_i> of all rows over the outputs of each group that has weights, (num_rows,), or, where there is block
        structure, over each block of them, (num_rows, blocks). Collective."""
        groups = self._groups[p]
        structure = None if self.structure is None else torch.as_tensor(self.structure.outputs(self.output_shape))
        if groups[0].columns is None:
            return [(groups[0], self._rows.products([(p, v)], block_of=structure)[0])]
        of_group = torch.zeros(self.num_outputs, dtype=torch.int64)
        for g, group in enumerate(groups):
            assert group.columns is not None
            of_group[group.columns] = g
            if group.weights is None:  # nothing is known of them, whatever is asked
                v = v.index_fill(0, group.columns, 0.0)
        blocks = 1 if structure is None else int(structure.max()) + 1
        combined = of_group if structure is None else of_group * blocks + structure
        last = len(groups) * blocks
        sums = self._rows.products([(p, v)], block_of=combined)[0]
        sums = np.pad(sums, ((0, 0), (0, last - sums.shape[1]))).reshape(len(sums), len(groups), blocks)
        return [
            (group, sums[:, g, 0] if structure is None else sums[:, g])
            for g, group in enumerate(groups)
            if group.weights is not None
        ]

    def _along(self, tangents: Sequence[tuple[int, list[Array]]]) -> list[torch.Tensor]:
        blocks = self._blocks()
        wanted: list[tuple[int, Callable[[Weights], Array]]] = []
        for p, parts in tangents:
            wanted += [(p, functools.partial(_along, parts, own)) for own, _ in blocks]
        only = [index for _ in tangents for _, index in blocks]
        sums = [total[0] for total in group_sums(self._rows, self._groups, wanted, only=only)]
        results = []
        for first in range(0, len(sums), len(blocks)):
            whole = sums[first]
            for (_, index), piece in zip(blocks, sums[first : first + len(blocks)], strict=True):
                if index is not None:
                    whole[index] = piece[index]
            results.append(whole)
        return results

    def _blocks(self) -> list[tuple[Any, torch.Tensor | None]]:
        """(parameters that touch it, its outputs) for each block of outputs; one block of all without structure."""
        if self.structure is None:
            return [(None, None)]
        block_of = self.structure.outputs(self.output_shape)
        touched = self.structure.touched(int(block_of.max()) + 1)
        return [(touched[g], torch.as_tensor(np.flatnonzero(block_of == g))) for g in np.unique(block_of)]

    def _jacobian_columns(self, problems: Sequence[int]) -> list[torch.Tensor]:
        sums = group_sums(self._rows, self._groups, [(p, theta_weights) for p in problems])
        # One row where no number is one that enough rows have.
        return [columns.expand(self.dimension, -1) if len(columns) < self.dimension else columns for columns in sums]

    # -- second derivatives -----------------------------------------------------------------------------------------

    @collective
    def hvp(self, triples: Sequence[tuple[int, torch.Tensor, Array]]) -> list[Array]:
        self.require_derivatives()
        self.dispatcher.begin("hvp", f"{len(triples)} products")
        vectors, tangents = [], []
        for b, v, u in triples:
            v, u = self._broadcast_vector(v), self.dispatcher.broadcast(u)
            vectors += [(p, v) for p in self.replicates(b)]
            tangents += [u] * self.strategy.replicates
        results = []
        for (p, v), u in zip(vectors, tangents, strict=True):
            scale, nodes, total = self.problems[p].scale, self.problems[p].design.nodes, np.zeros(self.dimension)
            for group, c in self._group_products(p, v):
                c = c if c.ndim == 1 else c.sum(axis=1)
                W = second_weights(self.strategy, nodes, group.valid, push_theta(scale, u))
                total = total + (W * c[:, None]).sum(axis=0)
            results.append(pull_back_theta(scale, self.factors[p] * total))
        R = self.strategy.replicates
        return [np.mean(results[i : i + R], axis=0) for i in range(0, len(results), R)]

    @collective
    def curvature(self, triples: Sequence[tuple[int, Array, Array]]) -> list[torch.Tensor]:
        self.require_derivatives()
        self.dispatcher.begin("curvature", f"{len(triples)} products")
        rows = []
        for b, t, u in triples:
            t, u = self.dispatcher.broadcast(t), self.dispatcher.broadcast(u)
            for p in self.replicates(b):
                scale, nodes = self.problems[p].scale, self.problems[p].design.nodes
                W = second_weights(self.strategy, nodes, self._valid[p], push_theta(scale, u))
                along = self.factors[p] * (W * push_theta(scale, t)).sum(axis=1)
                rows.append((p, along[None, :]))
        sums = [total[0] for total in self._rows.tree_sums(rows)]
        R = self.strategy.replicates
        return [mean_of(sums[i : i + R]) for i in range(0, len(sums), R)]

    # -- what needs the rows ----------------------------------------------------------------------------------------

    def surviving(self, p: int) -> NDArray[np.bool_]:
        """(N,) which perturbed rows of problem p count."""
        return np.asarray(self._valid[p][: self.strategy.num_samples])

    @collective
    def unperturbed(self, p: int) -> torch.Tensor:
        """f(x), where it was evaluated as one more row: (m,). Collective."""
        last = np.zeros((1, self.strategy.num_rows))
        last[0, -1] = 1.0
        return self._rows.tree_sums([(p, last)])[0][0]

    @collective
    def mean_of_rows(self, p: int) -> torch.Tensor:
        """The mean of the surviving perturbed rows: (m,). Collective."""
        good = np.zeros((1, self.strategy.num_rows))
        good[0, : self.strategy.num_samples] = self.surviving(p) / self.surviving(p).sum()
        return self._rows.tree_sums([(p, good)])[0][0]

    @collective
    def row_products(self, b: int, v: torch.Tensor) -> list[Array]:
        """<v, F_i> of the perturbed rows of each replicate of vector b: R arrays (N,). Collective."""
        self.dispatcher.begin("products", f"vector {b}")
        v = self._broadcast_vector(v)
        products = self._rows.products([(p, v) for p in self.replicates(b)])
        return [c[: self.strategy.num_samples] for c in products]

    @collective
    def second_moments(self, b: int, weights: Sequence[Array], centres: torch.Tensor) -> list[torch.Tensor]:
        """W (F - centre)^2 for each W (c, N), from the rows of a single replicate: (c, m) each. Collective."""
        self.dispatcher.begin("second moments", f"vector {b}")
        (p,) = self.replicates(b)
        extra = self.strategy.num_rows - self.strategy.num_samples
        padded = [(p, np.pad(w, ((0, 0), (0, extra)))) for w in weights]
        return self._rows.tree_sums(padded, transform=lambda F: (F.to(torch.float64) - centres.to(F.device)).square())

    @collective
    def row_scalars(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Array:
        """As `KeptRows.row_scalars`. Collective."""
        self.dispatcher.begin("row scalars", f"problem {p}")
        return self._rows.row_scalars(p, function)

    @collective
    def by_columns(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """As `KeptRows.by_columns`. Collective."""
        return self._rows.by_columns(p, function)

    def gather_rows(self, p: int) -> torch.Tensor:
        """All perturbed rows on every rank, (N, m) float64. Collective; for looking and for small outputs."""
        return self.by_columns(p, lambda columns: columns)


def _along(parts: Sequence[Array], own: Any, weights: Weights) -> Array:
    """The weights of the derivative along a tangent in eps-space, of some parameters: (1, num_rows)."""
    columns = [weights.theta * parts[0]]
    if len(parts) == 2:
        assert weights.scale is not None
        columns.append(weights.scale * parts[1])
    return np.asarray(sum((c if own is None else c[:, own]).sum(axis=1) for c in columns))[None, :]
