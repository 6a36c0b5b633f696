"""What is linear in outputs that are added up as they come and dropped: the sums F^T [a, W], (1 + d) m numbers.

The rows of a leaf that several ranks share travel to the rank that has its first: at most one leaf's worth for each
rank, and the rows that a rank has taken off another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.dispatch import TreeSum
from bridge.errors import InputError, OutputError
from bridge.evaluation.kernels import accumulate, accumulate_differences
from bridge.evaluation.linear_forms import Evaluated
from bridge.evaluation.request import Drawn
from bridge.evaluation.rows import CHUNK, Known, Rows, Unit, aligned
from bridge.evaluation.runner import Runner
from bridge.simulator.function import makes_memory


class StreamedSums(NamedTuple):
    """columns: F^T [a, W] of each problem, (columns, m). values: the first of them in float64, (m,)."""

    columns: list[torch.Tensor]
    values: list[torch.Tensor]


@final
class Stream:
    """Adds rows to F^T [a, W] as they come: one tree a problem, leaves of several units.

    Within a leaf rows are added `CHUNK` at a time, counted from its first, whatever calls they come from: one pass over
    the sums for each chunk, and the same bits for any calls.

    Small sums are float64. Large ones, (1 + d) m numbers, are in the dtype of the outputs, for half the memory and
    half the time. Sums of float32 outputs in float32 would lose what outputs have in common, so the first row of each
    leaf is taken off the others (see `TreeSum`).
    """

    def __init__(self, drawn: Drawn, runner: Runner, like: torch.Tensor, large: bool) -> None:
        """Args:
        runner: says what is wrong with outputs that are not finite.
        like: outputs, of which dtype, device and size count.
        large: whether leaves have several units, see `Layout`.
        """
        self._drawn, self._layout, self._runner, self._large = drawn, drawn.layout, runner, large
        self._like = like[:0].clone()
        self._owns_outputs = makes_memory(drawn.request.simulator)
        self._units_in_leaf = self._layout.units_in_leaf(large)
        self._sum_dtype = like.dtype if large else torch.float64
        self._differences = self._sum_dtype == torch.float32
        # A product with one row of weights has other last bits than the first row of a larger one, and the value's must
        # not depend on which derivatives are added up beside it: beside none, there is a row of zeros.
        self._num_columns = max(drawn.num_columns, 2) if self._differences else drawn.num_columns
        runs = self._layout.runs
        per_problem = self._layout.leaf_of(len(runs), self._units_in_leaf)
        # Of each leaf: its first row, and the end of the last leaf.
        firsts = [runs[self._layout.leaf_start(leaf, self._units_in_leaf)][0] for leaf in range(per_problem)]
        self._first_rows = [*firsts, drawn.request.strategy.num_rows]
        shares = [self._shares(p) if self._differences else None for p in range(len(drawn.problems))]
        self._sums = [TreeSum(per_problem, drawn.request.buffers, share) for share in shares]
        self._matrix: tuple[int, torch.Tensor] | None = None
        # Leaves of which rows are still to come: one, and one at the end of a run of which others took the rest.
        self._open: dict[tuple[int, int], torch.Tensor] = {}
        self._begun: tuple[int, int] | None = None
        # Rows of a chunk of which others are still to come.
        self._partial: dict[tuple[int, int], Rows] = {}
        self._waiting: dict[tuple[int, int], list[Rows]] = {}
        self._dispatcher = drawn.request.dispatcher

    def _shares(self, p: int) -> Array:
        """The sums of the weights over each leaf of problem p: (leaves, columns)."""
        return np.add.reduceat(self._weights(p), self._first_rows[:-1], axis=1).T

    def _weights(self, p: int) -> Array:
        """(columns, num_rows) of problem p."""
        weights = self._drawn.weights(p)
        return np.pad(weights, ((0, self._num_columns - len(weights)), (0, 0)))

    def add(self, out: Rows) -> None:
        """Takes rows; their memory may be used again afterwards."""
        if self._large and out.F is not None and out.F.dtype != self._like.dtype:
            if self._like.dtype == torch.float32:
                raise OutputError(
                    f"Expected outputs of one dtype from simulator {self._runner.name!r}, which are added up as they "
                    f"come, got {self._like.dtype} first and then {out.F.dtype}. Return float64 every time."
                )
            out = out._replace(F=out.F.to(self._like.dtype))
        # A leaf is added by the rank that has its first unit, row by row. What a rank takes off others comes from the
        # end of their runs backwards, and the first rows of its own run may belong to a leaf begun by another: these
        # wait until it is known who has what.
        start, stop = out.start, out.start + len(out.inputs)
        while start < stop:
            leaf = self._layout.leaf_of(self._layout.unit_of(start), self._units_in_leaf)
            end = min(stop, self._first_rows[leaf + 1])
            part = out.part(start, end)
            shared = out.stolen or (start != self._first_rows[leaf] and (out.problem, leaf) != self._begun)
            if shared and self._units_in_leaf > 1:
                self._runner.check_finite(part)
                for unit, rows in self._layout.by_unit(part):
                    assert rows.F is not None
                    kept = rows._replace(F=rows.F.clone())
                    self._waiting.setdefault((unit.problem, unit.index), []).append(kept)
            else:
                self._begun = (out.problem, leaf)
                self._add(leaf, part)
            start = end

    def _add(self, leaf: int, out: Rows) -> None:
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

    def _joined(self, leaf: int, chunk: int, whole: int, part: Rows) -> Rows | None:
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
            gathered = Rows(part.problem, False, chunk, inputs, F)
        assert gathered.F is not None
        gathered.F[part.start - chunk : stop - chunk] = part.F
        gathered.inputs[part.start - chunk : stop - chunk] = part.inputs
        if stop == whole:
            return gathered
        self._partial[key] = gathered
        return None

    def _add_chunk(self, leaf: int, out: Rows, done: bool) -> None:
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
            accumulate_differences(total, part, F, first, self._owns_outputs or F is not out.F)
        else:
            accumulate(total, part, F, first)
        self._runner.check_finite_sum(total[0], out)
        if done:
            self._sums[p].add(leaf, self._open.pop((p, leaf)))

    def finish(self, owner: NDArray[np.int64]) -> StreamedSums:
        """Completes shared leaves and trees, on every rank. Collective.

        Args:
            owner: (units,) the rank that has each unit.
        """
        if self._dispatcher.size == 1:
            totals = [tree.result() for tree in self._sums]
        else:
            self._exchange(owner)
            rows = self._num_columns + self._differences
            like = self._like.new_empty((rows, self._like.shape[1]), dtype=self._sum_dtype)
            owners = [self._layout.leaf_owner(owner, p, self._units_in_leaf) for p in range(len(self._sums))]
            totals = self._dispatcher.finish(self._sums, [like] * len(self._sums), owners)
        if not self._differences:
            return StreamedSums(totals, [total[0] for total in totals])
        values = []
        for tree, total in zip(self._sums, totals, strict=True):
            share = tree.share_of(0, tree.num_leaves)
            values.append(total[0].to(torch.float64).add_(total[-1], alpha=share[0]))
            for row, w in zip(total[1:-1], share[1:], strict=True):
                row.add_(total[-1], alpha=w)
        return StreamedSums([total[:-1] for total in totals], values)

    def _exchange(self, owner: NDArray[np.int64]) -> None:
        """Rows of shared leaves go to the rank that has the leaf's first unit; all ranks walk in the same order.

        A unit waits, on the rank that has it, unless that rank has had the leaf's first unit before, from its own run.
        """
        if self._units_in_leaf == 1:
            return
        layout, count = self._layout, len(self._layout.runs)
        mine = np.zeros(len(layout.units))
        mine[[p * count + i for p, i in self._waiting]] = 1.0
        for number in np.flatnonzero(self._dispatcher.scatter_add(mine)):
            unit = layout.units[number]
            leaf = layout.leaf_of(unit.index, self._units_in_leaf)
            first = unit.problem * count + layout.leaf_start(leaf, self._units_in_leaf)
            self._move(unit, leaf, int(owner[number]), int(owner[first]))

    def _move(self, unit: Unit, leaf: int, source: int, home: int) -> None:
        rank = self._dispatcher.rank
        F = self._like.new_empty((unit.stop - unit.start, self._like.shape[1]))
        if rank == source:
            waited = self._waiting.pop((unit.problem, unit.index))
            F = torch.cat([rows.F for rows in waited if rows.F is not None])
        if source != home and rank in (source, home):
            F = self._dispatcher.transfer(F, source, home)
        if rank == home:
            # Its parameters are for messages about numbers that are not finite: these have been looked at before.
            inputs = np.full((len(F), self._drawn.dimension), np.nan)
            self._add(leaf, Rows(unit.problem, False, unit.start, inputs, F))


@final
class Streamed(Evaluated):
    """The forms of sums of rows."""

    def __init__(self, drawn: Drawn, known: Known, sums: StreamedSums) -> None:
        super().__init__(drawn, known, sums.values, {}, streamed=True)
        self._sums = sums.columns

    def _multiply(self, p: int, factor: float) -> None:
        self._sums[p] *= factor

    def _gradient(self, p: int, v: torch.Tensor) -> Array:
        # One column at a time: a float64 copy of all of them would be twice the Jacobian.
        columns = self._sums[p][1:]
        v = v.to(columns.device)
        if self.structure is None:
            return np.array([torch.dot(c.to(torch.float64), v).item() for c in columns])
        mask = torch.as_tensor(self.structure.mask(self.output_shape), device=columns.device)
        return np.array(
            [torch.dot(c.to(torch.float64), v * mask[j % self.dimension]).item() for j, c in enumerate(columns)]
        )

    def _along(self, tangents: Sequence[tuple[int, list[Array]]]) -> list[torch.Tensor]:
        products = []
        for p, parts in tangents:
            columns = self._sums[p][1:]
            t = torch.as_tensor(np.concatenate(parts)).to(columns)
            products.append(t @ self._masked(columns[: len(t)]))
        return products

    def _jacobian_columns(self, problems: Sequence[int]) -> list[torch.Tensor]:
        return [self._sums[p][1 : 1 + self.dimension] for p in problems]

    def hvp(self, triples: Sequence[tuple[int, torch.Tensor, Array]]) -> list[Array]:
        self.require_derivatives()
        raise self.needs_rows("second derivatives")

    def curvature(self, triples: Sequence[tuple[int, Array, Array]]) -> list[torch.Tensor]:
        self.require_derivatives()
        raise self.needs_rows("second derivatives")

    def needs_rows(self, what: str) -> InputError:
        """What a user is told who asks for something that needs the rows themselves."""
        like = self._known.like
        size = len(self.problems) * self.strategy.num_rows * self.num_outputs * like.element_size() / 1e6
        return InputError(
            f"Expected kept outputs for {what}, got streamed ones. Give memory=bridge.Memory(keep_mb={int(size) + 1}) "
            "(over all ranks)."
        )
