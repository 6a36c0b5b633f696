"""Outputs that are kept: each rank has its own rows of F, and sums of them are made where they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.dispatch import Dispatcher, TreeSum
from bridge.evaluation.kernels import accumulate
from bridge.evaluation.layout import Layout
from bridge.evaluation.rows import Rows, Unit, aligned, spilled

# Rows whose bits a float64 holds exactly.
_BITS = 48
# Numbers that are multiplied at once: with those of a vector they stay in a cache, whatever the number of outputs.
_PIECE = 1 << 15


@final
class Keeper:
    """Keeps rows as they come, on the rank that has them.

    Args:
        memory_bytes: outputs beyond this go to a file on the local disk.
        owns_outputs: whether each call's outputs are in memory of their own: else the simulator may use it again.
        check: refuses outputs that are not finite, or fills them in.
    """

    def __init__(self, layout: Layout, memory_bytes: float, owns_outputs: bool, check: Callable[[Rows], None]) -> None:
        self._layout, self._memory_bytes, self._owns_outputs, self._check = layout, memory_bytes, owns_outputs, check
        # As they came: (rows, outputs), None for a chunk of which every row failed.
        self._chunks: dict[Unit, list[tuple[int, torch.Tensor | None]]] = {}
        self._held = 0

    def add(self, rows: Rows) -> None:
        """Takes rows; what is left of their memory may be used again afterwards."""
        F = rows.F
        if F is not None:
            self._check(rows)
            self._held += F.numel() * F.element_size()
            if self._held > self._memory_bytes and F.device.type == "cpu":
                F = spilled(F)
            elif not self._owns_outputs:
                F = F.clone()
            rows = rows._replace(F=F)
        for unit, part in self._layout.by_unit(rows):
            G = None if part.F is None else aligned(part.F)
            self._chunks.setdefault(unit, []).append((len(part.inputs), G))

    def rows(self, like: torch.Tensor, filling: float) -> list[list[tuple[Unit, torch.Tensor]]]:
        """The units of each problem that this rank has, with `filling` where all of a chunk failed."""
        kept: list[list[tuple[Unit, torch.Tensor]]] = [[] for _ in range(self._layout.num_problems)]
        for unit, parts in self._chunks.items():
            filled = [like.new_full((k, like.shape[1]), filling) if F is None else F for k, F in parts]
            kept[unit.problem].append((unit, filled[0] if len(filled) == 1 else torch.cat(filled)))
        return kept


@final
class KeptRows:
    """The rows F (num_rows, m) of each problem, of which each rank has some units.

    Args:
        kept: this rank's units of each problem.
        owner: (units,) the rank that has each unit.
        like: (0, m), a tensor of this rank's dtype and device of outputs.
    """

    def __init__(
        self,
        layout: Layout,
        kept: list[list[tuple[Unit, torch.Tensor]]],
        owner: NDArray[np.int64],
        like: torch.Tensor,
        dispatcher: Dispatcher,
    ) -> None:
        self.layout, self.dispatcher, self.like = layout, dispatcher, like
        self._kept, self._owner = kept, owner

    @property
    def num_outputs(self) -> int:
        """m."""
        return int(self.like.shape[1])

    def tree_sums(
        self,
        weights: Sequence[tuple[int, Array]],
        *,
        columns: Sequence[torch.Tensor | None] | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """W F in float64 for each (problem, W (c, num_rows)), by a tree over the units: (c, m). Collective.

        Args:
            columns: for each, the outputs to sum; all where None.
            transform: applied to the rows first.
            buffers: memory for sums.
        """
        sums = [TreeSum(len(self.layout.runs), buffers, weight=self._exact_weight(w)) for _, w in weights]
        of_each = [None] * len(weights) if columns is None else columns
        for tree, (p, w), index in zip(sums, weights, of_each, strict=True):
            for unit, F in self._kept[p]:
                G = F if transform is None else transform(F)
                G = G if index is None else G[:, index.to(G.device)]
                if tree.weight is not None and G.dtype == torch.float32 and G.device.type == "cpu":
                    tree.add(unit.index, G)
                    continue
                part = aligned(torch.as_tensor(np.ascontiguousarray(w[:, unit.start : unit.stop])).to(G.device))
                total = tree.buffer(G if G.dtype == torch.float64 else G[:0].to(torch.float64), len(part))
                accumulate(total, part, G, first=True)
                tree.add(unit.index, total)
            tree.widen()
        if self.dispatcher.size == 1:
            return [tree.result() for tree in sums]
        owners = [self.layout.leaf_owner(self._owner, p, 1) for p, _ in weights]
        like = [
            self.like.new_empty((len(w), self.num_outputs if index is None else len(index)), dtype=torch.float64)
            for (_, w), index in zip(weights, of_each, strict=True)
        ]
        return self.dispatcher.finish(sums, like, owners)

    def _exact_weight(self, w: Array) -> float | None:
        """The weight of all rows, where they are leaves and it is a power of two: w a + w b is then w (a + b)."""
        one = self.layout.leaf_size == 1 and len(w) == 1 and bool((w == w[0, 0]).all())
        return float(w[0, 0]) if one and math.frexp(w[0, 0])[0] == 0.5 else None

    def products(self, pairs: Sequence[tuple[int, torch.Tensor]], block_of: torch.Tensor | None = None) -> list[Array]:
        """<v, F_i> of all rows, for each (problem, v): (num_rows,) float64. Collective.

        Args:
            block_of: (m,) which block each output belongs to, in [0, blocks): (num_rows, blocks) sums of each block.
        """
        blocks = 1 if block_of is None else int(block_of.max()) + 1
        scalars = np.zeros((len(pairs), self.layout.num_rows, blocks))
        asked: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for q, (p, v) in enumerate(pairs):
            asked.setdefault(p, []).append((q, v))
        width = self.num_outputs
        if self.like.device.type == "cpu":
            width = max(_PIECE // 16, _PIECE // self.layout.leaf_size)
        for p, mine in asked.items():
            own = [row for unit, _ in self._kept[p] for row in range(unit.start, unit.stop)]
            for piece in (slice(left, left + width) for left in range(0, self.num_outputs, width)):
                wide = torch.empty(0, dtype=torch.float64)
                there = [v[piece] for _, v in mine]
                sums: list[list[torch.Tensor]] = [[] for _ in mine]
                for _, F in self._kept[p]:
                    F = F[:, piece]
                    if wide.shape != F.shape or wide.device != F.device:
                        wide = torch.empty_like(F, dtype=torch.float64, memory_format=torch.contiguous_format)
                        there = [part.to(F.device) for part in there]
                    wide.copy_(F)
                    for part, found in zip(there, sums, strict=True):
                        if block_of is None:
                            found.append(torch.mv(wide, part)[:, None])
                        else:
                            of_blocks = wide.new_zeros((wide.shape[0], blocks))
                            found.append(of_blocks.index_add_(1, block_of[piece].to(F.device), wide * part))
                for (q, _), parts in zip(mine, sums, strict=True):
                    if parts:
                        scalars[q, own] += torch.cat([part.cpu() for part in parts]).numpy()
        total = self.dispatcher.scatter_add(scalars)
        return list(total[:, :, 0] if block_of is None else total)

    def row_scalars(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Array:
        """function(F) of the perturbed rows of a problem, computed where the rows are: (N,). Collective.

        `function` maps (k, m) float64 to (k,) and treats each row by itself.
        """
        scalars = np.zeros(self.layout.num_rows)
        for unit, F in self._kept[p]:
            scalars[unit.start : unit.stop] = function(F.to("cpu", torch.float64)).numpy()
        return self.dispatcher.scatter_add(scalars)[: self.layout.num_samples]

    def by_columns(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """function(F) of all perturbed rows of a problem, each rank taking a part of the outputs: (n, m) float64.

        `function` maps (N, width) float64 to (n, width) and treats each output by itself. The row blocks are
        transposed: each rank gives every other one a part of its rows, nobody holds all. Collective.
        """
        mine = sorted(
            ((unit.start, F) for unit, F in self._kept[p] if unit.start < self.layout.num_samples),
            key=lambda pair: pair[0],
        )
        block = torch.cat([F for _, F in mine]) if mine else self.like
        columns = self.dispatcher.transpose(block.to("cpu", torch.float64))
        # They come in the order of ranks: back into that of rows.
        runs = self.layout.runs
        owner = self._owner[p * len(runs) :][: self.layout.num_regular]
        order = np.concatenate([np.arange(*runs[i]) for i in np.argsort(owner, kind="stable")])
        return self.dispatcher.concatenate(function(columns[np.argsort(order)]))

    def take_lacking(self) -> list[Array]:
        """Replaces numbers that rows lack, NaN, by 0, and says which these were. Collective.

        Returns:
            (words, m) for each problem: bit i of a column is whether that output lacks row i; empty where all have all.
        """
        found: list[tuple[Unit, torch.Tensor]] = []
        for kept in self._kept:
            for i, (unit, F) in enumerate(kept):
                nan = torch.isnan(F)
                if bool(nan.any()):
                    found.append((unit, nan.cpu()))
                    kept[i] = unit, torch.where(nan, 0.0, F)
        counts = np.zeros(len(self._kept))
        for unit, _ in found:
            counts[unit.problem] += 1
        counts = self.dispatcher.scatter_add(counts)
        words = -(-self.layout.num_rows // _BITS)
        lacking = [np.zeros((words, self.num_outputs) if count else (0, 0)) for count in counts]
        for unit, nan in found:
            for i, row in zip(range(unit.start, unit.stop), nan.numpy(), strict=True):
                lacking[unit.problem][i // _BITS][row] += 2.0 ** (i % _BITS)
        return [self.dispatcher.scatter_add(packed) if packed.size else packed for packed in lacking]


def has_rows(packed: Array, num_rows: int) -> NDArray[np.bool_]:
    """(num_rows,) which rows have a number, by the words of a column of `KeptRows.take_lacking`."""
    bits, rows = packed.astype(np.int64), np.arange(num_rows)
    return bits[rows // _BITS] >> (rows % _BITS) & 1 == 0
