"""Rows as they come from a simulator, and their sums by weights.

`Stream` adds rows to F^T [a, W] as they come; what is kept is added with the same kernel (`accumulate`) afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch import TreeSum
from bridge.errors import OutputError

if TYPE_CHECKING:
    from bridge.evaluation import Evaluation

Array = NDArray[np.float64]

# Rows handed to the simulator, and to the kernel, at once: more would cost memory and gain no speed.
CHUNK = 8
# But of small outputs, so many rows that the work outweighs a call: this many numbers.
CHUNK_NUMBERS = 1 << 17
# Rows of a streamed leaf: below, the additions of the tree cost more than those of the leaves.
STREAMED_LEAF = 32


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one problem; `index` counts the units of the problem."""

    problem: int
    index: int
    start: int
    stop: int


def rows_at_once(num_outputs: int) -> int:
    """Rows for one call of the simulator, a multiple of the kernel's, so that sums are the same for any."""
    return max(CHUNK, CHUNK_NUMBERS // max(1, num_outputs) // CHUNK * CHUNK)


def as_rows(outputs: Any, k: int, shape: tuple[int, ...] | None, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A simulator's outputs as a (k, m) floating tensor, and the shape of one output; the one place of conversion."""
    if not isinstance(outputs, torch.Tensor):
        array = np.asarray(outputs)
        if array.dtype.kind not in "fiub":
            raise OutputError(
                f"Expected real numbers from simulator {name!r}, got an array of dtype {array.dtype}. Return the real "
                "and imaginary parts, or a numeric array."
            )
        if array.dtype == np.longdouble or not array.dtype.isnative or array.dtype in (np.uint32, np.uint64):
            array = array.astype(np.float64)
        elif array.dtype == np.uint16:
            array = array.astype(np.float32)
        # Read-only memory (a memory map, a broadcast) cannot back a tensor.
        outputs = torch.as_tensor(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    tensor = outputs.detach()
    if tensor.ndim == 0 or tensor.shape[0] != k or (shape is not None and tuple(tensor.shape[1:]) != shape):
        want = f"({k}, {', '.join(map(str, shape))})" if shape else f"({k},)" if shape == () else f"({k}, ...)"
        hint = " If one output is a scalar, declare output_shape=()." if tensor.shape == (k,) else ""
        raise OutputError(
            f"Expected outputs of shape {want} from simulator {name!r} for {k} rows, got {tuple(tensor.shape)}.{hint}"
        )
    if tensor.is_complex():
        raise OutputError(f"Expected real numbers from simulator {name!r}, got a tensor of dtype {tensor.dtype}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        exact = (torch.uint8, torch.int8, torch.int16, torch.bool, torch.float16, torch.bfloat16)
        tensor = tensor.to(torch.float32 if tensor.dtype in exact else torch.float64)
    return aligned(tensor.reshape(k, -1)), tuple(outputs.shape[1:])


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory that starts on a multiple of 64 bytes.

    The last bits of a BLAS product depend on where its operands lie; torch's own memory starts on such multiples,
    numpy's and the user's need not, and differs from rank to rank.
    """
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 else tensor.contiguous().clone()


def accumulate(total: torch.Tensor, weights: torch.Tensor, F: torch.Tensor, first: bool) -> None:
    """Adds weights (c, k) times F (k, m) to total (c, m), in pieces of fixed size; `first`: total is empty memory.

    The value's row goes by itself: its bits are then the same whether or not derivatives are added up beside it, and
    kernels are made for multiples of four or eight rows.
    """
    for start in range(0, len(F), CHUNK):
        W, G = weights[:, start : start + CHUNK], F[start : start + CHUNK]
        if not first:
            total[:1].addmm_(W[:1], G)
            if len(total) > 1:
                total[1:].addmm_(W[1:], G)
        elif len(G) == 1:
            # An outer product, for which the matrix product is several times slower.
            torch.mul(W, G, out=total)
        else:
            torch.mm(W[:1], G, out=total[:1])
            if len(total) > 1:
                torch.mm(W[1:], G, out=total[1:])
        first = False


class Stream:
    """Adds rows to F^T [a, W] as they come: one tree a problem, leaves of several units."""

    def __init__(self, evaluation: Evaluation, like: torch.Tensor, spare: list[torch.Tensor]) -> None:
        self._e = e = evaluation
        self._like = like[:0].clone()
        self._units_in_leaf = e.units_in_leaf
        per_problem = e.leaf_of(len(e.runs), self._units_in_leaf)
        self._sums = [TreeSum(per_problem, spare) for _ in e.problems]
        self._matrix: tuple[int, torch.Tensor] | None = None
        self._total: torch.Tensor | None = None
        self._at: tuple[int, int] | None = None
        self._travelling: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._rank = e.dispatcher.rank

    def _place(self, unit: Unit) -> tuple[int, int]:
        """(leaf, first unit's number among all) of a unit."""
        leaf = self._e.leaf_of(unit.index, self._units_in_leaf)
        return leaf, unit.problem * len(self._e.runs) + self._e.leaf_start(leaf, self._units_in_leaf)

    def add(self, unit: Unit, start: int, F: torch.Tensor, inputs: Array) -> None:
        leaf, first = self._place(unit)
        if self._e.owner(first) != self._rank:
            self._e.check_finite(F, unit.problem, inputs, start)
            self._travelling.setdefault((unit.problem, unit.index), []).append(F.clone())
            return
        self._add(unit.problem, leaf, start, F)
        assert self._total is not None
        self._e.check_finite_sum(self._total[0], F, unit.problem, inputs, start)

    def _add(self, p: int, leaf: int, start: int, F: torch.Tensor) -> None:
        if self._at != (p, leaf):
            self._close()
        if self._matrix is None or self._matrix[0] != p:
            self._matrix = (p, self._e.stream_weights(p, F))
        part = self._matrix[1][:, start : start + len(F)]
        first = self._total is None
        if self._total is None:
            self._at, self._total = (p, leaf), self._sums[p].buffer(F, len(part))
        accumulate(self._total, part, F, first)

    def _close(self) -> None:
        if self._at is not None and self._total is not None:
            self._sums[self._at[0]].add(self._at[1], self._total)
        self._at = self._total = None

    def finish(self) -> list[torch.Tensor]:
        """Completes shared leaves and trees: one (columns, m) a problem, on every rank. Collective."""
        e = self._e
        if e.dispatcher.size > 1:
            self._exchange()
        self._close()
        if e.dispatcher.size == 1:
            return [tree.result() for tree in self._sums]
        like = self._like.new_empty((e.num_columns, e.num_outputs))
        return e.dispatcher.finish(self._sums, [like] * len(self._sums), e.owners(self._units_in_leaf))

    def _exchange(self) -> None:
        """Rows of shared leaves go to the rank that has the leaf's first unit; all ranks walk in the same order."""
        e = self._e
        for start, stop in zip(e.starts, [*e.starts[1:], len(e.units)], strict=True):
            for number in range(start, stop):
                leaf, first = self._place(e.units[number])
                if first >= start:
                    break
                self._move(e.units[number], leaf, e.owner(start), e.owner(first))

    def _move(self, unit: Unit, leaf: int, source: int, home: int) -> None:
        e = self._e
        rows = unit.stop - unit.start
        if self._rank == source:
            F = torch.cat(self._travelling.pop((unit.problem, unit.index)))
            e.dispatcher.transfer(F, source, home)
        elif self._rank == home:
            F = e.dispatcher.transfer(self._like.new_empty((rows, e.num_outputs)), source, home)
            for start in range(0, rows, CHUNK):
                self._add(unit.problem, leaf, unit.start + start, F[start : start + CHUNK])
