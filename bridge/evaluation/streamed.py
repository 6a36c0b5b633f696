"""Rows as they come from a simulator, and their sums by weights.

`Stream` adds rows to F^T [a, W] as they come; what is kept is added with the same kernel (`accumulate`) afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bridge.arrays import Array
from bridge.dispatch import TreeSum
from bridge.errors import OutputError
from bridge.evaluation.rows import CHUNK, Outputs, Unit, aligned

if TYPE_CHECKING:
    from bridge.evaluation.evaluation import Evaluation

# Numbers of an output that are converted at once: what is made of 8 rows of them stays in a cache.
BLOCK = 1 << 14
# Rows of a streamed leaf: below, the additions of the tree cost more than those of the leaves.
STREAMED_LEAF = 32


def units_of_leaf(n: int, unit: int) -> int:
    """Units of `unit` rows in a streamed leaf of n rows in all: 4 rows at N = 16, 32 at N = 256, and never more than 16
    leaves, because each level of the tree holds a sum."""
    rows = max(min(STREAMED_LEAF, 1 << max(0, (n - 1).bit_length() - 2)), -(-n // 16))
    return max(1, -(-rows // unit) if rows > STREAMED_LEAF else rows // unit)


def accumulate(total: torch.Tensor, weights: torch.Tensor, F: torch.Tensor, first: bool) -> None:
    """Adds weights (c, k) times F (k, m) to total (c, m), in pieces of fixed size; `first`: total is empty memory.

    Everything is added up in the dtype of the total and the weights, whatever that of F is. The value's row goes by
    itself: its bits are then the same whether or not derivatives are added up beside it, and kernels are made for
    multiples of four or eight rows.
    """
    for start in range(0, len(F), CHUNK):
        W, G = weights[:, start : start + CHUNK], F[start : start + CHUNK]
        if first and len(G) == 1:
            # An outer product, for which the matrix product is several times slower, as are two dtypes at once.
            torch.mul(W, total[:1].copy_(G) if len(total) == 1 else G.to(total.dtype), out=total)
        elif F.dtype == total.dtype:
            _add(total, W, G, first)
        else:
            wide = total.new_empty((len(G), BLOCK))
            for left in range(0, F.shape[1], BLOCK):
                part = G[:, left : left + BLOCK]
                _add(total[:, left : left + BLOCK], W, wide[:, : part.shape[1]].copy_(part), first)
        first = False


def accumulate_differences(
    total: torch.Tensor, weights: torch.Tensor, F: torch.Tensor, first: bool, in_place: bool
) -> None:
    """Adds weights (c, k) times F - r to total (c + 1, m), whose last row is r: the first row that came.

    What is added up is then as small as outputs differ, so that float32 is enough for it. At most `CHUNK` rows. All in
    one product, which takes half the time of two: of two rows of weights or more, each has the same bits whatever is
    beside it, in single precision.

    Args:
        in_place: whether F may be written to, which costs a tenth of new memory.
    """
    if first:
        total[-1].copy_(F[0])
        if len(F) == 1:
            total[:-1].zero_()
            return
    if not in_place:
        F = F - total[-1]
    elif F.device.type == "cpu":
        np.subtract(F.numpy(), total[-1].numpy(), out=F.numpy())  # in half of torch's time
    else:
        F.sub_(total[-1])
    _add_product(total[:-1], weights, F, first)


def _add(total: torch.Tensor, W: torch.Tensor, G: torch.Tensor, first: bool) -> None:
    """The value's row, and those of derivatives."""
    _add_product(total[:1], W[:1], G, first)
    if len(total) > 1:
        _add_product(total[1:], W[1:], G, first)


def _add_product(total: torch.Tensor, W: torch.Tensor, G: torch.Tensor, first: bool) -> None:
    if first:
        torch.mm(W, G, out=total)
    else:
        total.addmm_(W, G)


class Stream:
    """Adds rows to F^T [a, W] as they come: one tree a problem, leaves of several units.

    Within a leaf rows are added `CHUNK` at a time, counted from its first, whatever calls they come from: one pass over
    the sums for each chunk, and the same bits for any calls.

    Small sums are float64. Large ones, (1 + d) m numbers, are in the dtype of the outputs, for half the memory and
    half the time. Sums of float32 outputs in float32 would lose what outputs have in common, so the first row of each
    leaf is taken off the others (see `TreeSum`).
    """

    def __init__(self, evaluation: Evaluation, like: torch.Tensor, spare: list[torch.Tensor]) -> None:
        self._e = e = evaluation
        self._like = like[:0].clone()
        self._units_in_leaf = e.units_in_leaf
        self._sum_dtype = like.dtype if e.large else torch.float64
        self._differences = self._sum_dtype == torch.float32
        # A product with one row of weights has other last bits than the first row of a larger one, and the value's must
        # not depend on which derivatives are added up beside it: beside none, there is a row of zeros.
        self._num_columns = max(e.num_columns, 2) if self._differences else e.num_columns
        per_problem = e.leaf_of(len(e.runs), self._units_in_leaf)
        # Of each leaf: its first row, and the end of the last leaf.
        firsts = [e.runs[e.leaf_start(leaf, self._units_in_leaf)][0] for leaf in range(per_problem)]
        self._first_rows = [*firsts, e.strategy.num_rows]
        shares = [self._shares(p) if self._differences else None for p in range(len(e.problems))]
        self._sums = [TreeSum(per_problem, spare, share) for share in shares]
        self._matrix: tuple[int, torch.Tensor] | None = None
        # Leaves of which rows are still to come: one, and one at the end of a run of which others took the rest.
        self._open: dict[tuple[int, int], torch.Tensor] = {}
        self._begun: tuple[int, int] | None = None
        # Rows of a chunk of which others are still to come.
        self._partial: dict[tuple[int, int], Outputs] = {}
        self._waiting: dict[tuple[int, int], list[Outputs]] = {}
        self._rank = e.dispatcher.rank

    def _shares(self, p: int) -> Array:
        """The sums of the weights over each leaf of problem p: (leaves, columns)."""
        return np.add.reduceat(self._weights(p), self._first_rows[:-1], axis=1).T

    def _weights(self, p: int) -> Array:
        """(columns, num_rows) of problem p."""
        weights = self._e.stream_weights(p)
        return np.pad(weights, ((0, self._num_columns - len(weights)), (0, 0)))

    def add(self, out: Outputs) -> None:
        """Takes rows; their memory may be used again afterwards."""
        if self._e.large and out.F is not None and out.F.dtype != self._like.dtype:
            if self._like.dtype == torch.float32:
                raise OutputError(
                    f"Expected outputs of one dtype from simulator {self._e.runner.name!r}, which are added up as they "
                    f"come, got {self._like.dtype} first and then {out.F.dtype}. Return float64 every time."
                )
            out = out._replace(F=out.F.to(self._like.dtype))
        # A leaf is added by the rank that has its first unit, row by row. What a rank takes off others comes from the
        # end of their runs backwards, and the first rows of its own run may belong to a leaf begun by another: these
        # wait until it is known who has what.
        start, stop = out.start, out.start + len(out.inputs)
        while start < stop:
            leaf = self._e.leaf_of(self._e.unit_of(start), self._units_in_leaf)
            end = min(stop, self._first_rows[leaf + 1])
            part = out.part(start, end)
            shared = out.stolen or (start != self._first_rows[leaf] and (out.problem, leaf) != self._begun)
            if shared and self._units_in_leaf > 1:
                self._e.runner.check_finite(part)
                for unit, rows in self._e.by_unit(part):
                    assert rows.F is not None
                    kept = rows._replace(F=rows.F.clone())
                    self._waiting.setdefault((unit.problem, unit.index), []).append(kept)
            else:
                self._begun = (out.problem, leaf)
                self._add(leaf, part)
            start = end

    def _add(self, leaf: int, out: Outputs) -> None:
        """Adds the next rows of a leaf, chunk by chunk."""
        first, last = self._first_rows[leaf], self._first_rows[leaf + 1]
        start, stop = out.start, out.start + len(out.inputs)
        while start < stop:
            chunk = first + (start - first) // CHUNK * CHUNK
            whole = min(chunk + CHUNK, last)
            end = min(stop, whole)
            rows = self._joined(leaf, chunk, whole, out.part(start, end))
            if rows is not None:
                self._add_chunk(leaf, rows, done=whole == last)
            start = end

    def _joined(self, leaf: int, chunk: int, whole: int, part: Outputs) -> Outputs | None:
        """The rows [chunk, whole), once all have come."""
        stop = part.start + len(part.inputs)
        if part.start == chunk and stop == whole:
            return part
        assert part.F is not None
        key = (part.problem, leaf)
        gathered = self._partial.pop(key, None)
        if gathered is None:
            F = part.F.new_empty((whole - chunk, part.F.shape[1]))
            inputs = np.empty((whole - chunk, part.inputs.shape[1]))
            gathered = Outputs(part.problem, False, chunk, inputs, F)
        assert gathered.F is not None
        gathered.F[part.start - chunk : stop - chunk] = part.F
        gathered.inputs[part.start - chunk : stop - chunk] = part.inputs
        if stop == whole:
            return gathered
        self._partial[key] = gathered
        return None

    def _add_chunk(self, leaf: int, out: Outputs, done: bool) -> None:
        assert out.F is not None
        p, F = out.problem, aligned(out.F)
        if self._matrix is None or self._matrix[0] != p:
            W = torch.as_tensor(np.ascontiguousarray(self._weights(p)))
            self._matrix = (p, aligned(W.to(F.device, self._sum_dtype)))
        part = self._matrix[1][:, out.start : out.start + len(F)]
        first = (p, leaf) not in self._open
        if first:
            like = F if F.dtype == self._sum_dtype else F[:0].to(self._sum_dtype)
            self._open[p, leaf] = self._sums[p].buffer(like, len(part) + self._differences)
        total = self._open[p, leaf]
        if self._differences:
            accumulate_differences(total, part, F, first, self._e.owns_outputs or F is not out.F)
        else:
            accumulate(total, part, F, first)
        self._e.runner.check_finite_sum(total[0], out)
        if done:
            self._sums[p].add(leaf, self._open.pop((p, leaf)))

    def finish(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Completes shared leaves and trees: one (columns, m) a problem, on every rank, and the value's row of each in
        float64. Collective."""
        e = self._e
        if e.dispatcher.size == 1:
            totals = [tree.result() for tree in self._sums]
        else:
            self._exchange()
            like = self._like.new_empty((self._num_columns + self._differences, e.num_outputs), dtype=self._sum_dtype)
            owners = [e.leaf_owner(p, self._units_in_leaf) for p in range(len(self._sums))]
            totals = e.dispatcher.finish(self._sums, [like] * len(self._sums), owners)
        if not self._differences:
            return totals, [total[0] for total in totals]
        values = []
        for tree, total in zip(self._sums, totals, strict=True):
            share = tree.share_of(0, tree.num_leaves)
            values.append(total[0].to(torch.float64).add_(total[-1], alpha=share[0]))
            for row, w in zip(total[1:-1], share[1:], strict=True):
                row.add_(total[-1], alpha=w)
        return [total[:-1] for total in totals], values

    def _exchange(self) -> None:
        """Rows of shared leaves go to the rank that has the leaf's first unit; all ranks walk in the same order.

        A unit waits, on the rank that has it, unless that rank has had the leaf's first unit before, from its own run.
        """
        e = self._e
        if self._units_in_leaf == 1:
            return
        mine = np.zeros(len(e.units))
        mine[[p * len(e.runs) + i for p, i in self._waiting]] = 1.0
        for number in np.flatnonzero(e.dispatcher.scatter_add(mine)):
            unit = e.units[number]
            leaf = e.leaf_of(unit.index, self._units_in_leaf)
            first = unit.problem * len(e.runs) + e.leaf_start(leaf, self._units_in_leaf)
            self._move(unit, leaf, int(e.owner[number]), int(e.owner[first]))

    def _move(self, unit: Unit, leaf: int, source: int, home: int) -> None:
        e = self._e
        F = self._like.new_empty((unit.stop - unit.start, e.num_outputs))
        if self._rank == source:
            waited = self._waiting.pop((unit.problem, unit.index))
            F = torch.cat([out.F for out in waited if out.F is not None])
        if source != home and self._rank in (source, home):
            F = e.dispatcher.transfer(F, source, home)
        if self._rank == home:
            # Its parameters are for messages about numbers that are not finite: these have been looked at before.
            inputs = np.full((len(F), e.dimension), np.nan)
            self._add(leaf, Outputs(unit.problem, False, unit.start, inputs, F))
