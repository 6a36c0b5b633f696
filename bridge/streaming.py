"""Rows as they come from a simulator, and their sums by weights.

`Stream` adds rows to F^T [a, W] as they come; what is kept is added with the same kernel (`accumulate`) afterwards.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch import TreeSum
from bridge.errors import EvaluationError, OutputError

if TYPE_CHECKING:
    from bridge.evaluation import Evaluation
    from bridge.running import Outputs

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
        # Leaves of which rows are still to come: one, and one at the end of a run of which others took the rest.
        self._open: dict[tuple[int, int], torch.Tensor] = {}
        self._begun: tuple[int, int] | None = None
        self._waiting: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._rank = e.dispatcher.rank

    def _place(self, unit: Unit) -> tuple[int, int]:
        """(leaf, first unit's number among all) of a unit."""
        leaf = self._e.leaf_of(unit.index, self._units_in_leaf)
        return leaf, unit.problem * len(self._e.runs) + self._e.leaf_start(leaf, self._units_in_leaf)

    def add(self, out: Outputs) -> None:
        unit, F = out.unit, out.F
        assert F is not None
        leaf, first = self._place(unit)
        # A leaf is added by the rank that has its first unit, unit by unit. What a rank takes off others comes from the
        # end of their runs backwards, and the first unit of its own run may belong to a leaf begun by another: these
        # wait until it is known who has what.
        here = first + unit.index - self._e.leaf_start(leaf, self._units_in_leaf)
        if out.stolen or (first != here and (unit.problem, leaf) != self._begun):
            self._e.runner.check_finite(out)
            self._waiting.setdefault((unit.problem, unit.index), []).append(F.clone())
            return
        self._begun = (unit.problem, leaf)
        self._add(unit.problem, leaf, out.start, F, out)

    def _add(self, p: int, leaf: int, start: int, F: torch.Tensor, out: Outputs | None = None) -> None:
        if self._matrix is None or self._matrix[0] != p:
            self._matrix = (p, self._e.stream_weights(p, F))
        part = self._matrix[1][:, start : start + len(F)]
        total = self._open.get((p, leaf))
        if total is None:
            total = self._open[p, leaf] = self._sums[p].buffer(F, len(part))
            accumulate(total, part, F, first=True)
        else:
            accumulate(total, part, F, first=False)
        if out is not None:
            self._e.runner.check_finite_sum(total[0], out)
        if start + len(F) == self._e.runs[self._e.leaf_start(leaf + 1, self._units_in_leaf) - 1][1]:
            self._sums[p].add(leaf, self._open.pop((p, leaf)))

    def finish(self) -> list[torch.Tensor]:
        """Completes shared leaves and trees: one (columns, m) a problem, on every rank. Collective."""
        e = self._e
        if e.dispatcher.size == 1:
            return [tree.result() for tree in self._sums]
        self._exchange()
        like = self._like.new_empty((e.num_columns, e.num_outputs))
        owners = [e.leaf_owner(p, self._units_in_leaf) for p in range(len(self._sums))]
        return e.dispatcher.finish(self._sums, [like] * len(self._sums), owners)

    def _exchange(self) -> None:
        """Rows of shared leaves go to the rank that has the leaf's first unit; all ranks walk in the same order.

        A unit waits, on the rank that has it, unless that rank has had the leaf's first unit before, from its own run.
        """
        e = self._e
        mine = np.zeros(len(e.units))
        mine[[p * len(e.runs) + i for p, i in self._waiting]] = 1.0
        for number in np.flatnonzero(e.dispatcher.scatter_add(mine)):
            unit = e.units[number]
            leaf, first = self._place(unit)
            self._move(unit, leaf, int(e.owner[number]), int(e.owner[first]))

    def _move(self, unit: Unit, leaf: int, source: int, home: int) -> None:
        e = self._e
        rows = unit.stop - unit.start
        F = self._like.new_empty((0, e.num_outputs))
        if self._rank == source:
            F = torch.cat(self._waiting.pop((unit.problem, unit.index)))
        elif self._rank == home:
            F = self._like.new_empty((rows, e.num_outputs))
        if source != home and self._rank in (source, home):
            F = e.dispatcher.transfer(F, source, home)
        if self._rank == home:
            for start in range(0, rows, CHUNK):
                self._add(unit.problem, leaf, unit.start + start, F[start : start + CHUNK])


def spilled(F: torch.Tensor) -> torch.Tensor:
    """A copy in a file on the node's local disk (TMPDIR), which the system reads and writes back as it needs memory.

    The file has no name any more when this returns, and ends with the tensor.

    Raises:
        EvaluationError: the disk is full.
    """
    size = max(1, F.numel() * F.element_size())
    descriptor, name = tempfile.mkstemp(prefix="bridge-", suffix=".spill")
    try:
        # Reserved, not sparse: writing to memory that the disk has no room for would kill the process.
        os.posix_fallocate(descriptor, 0, size)
        copy = torch.from_file(name, shared=True, size=F.numel(), dtype=F.dtype).reshape(F.shape)
    except OSError as error:
        raise EvaluationError(
            f"Expected room for {size / 1e6:.1f} MB of outputs beyond memory_megabytes in {tempfile.gettempdir()}, "
            f"got: {error}. Set TMPDIR to a larger local disk, or raise memory_megabytes."
        ) from error
    finally:
        os.close(descriptor)
        os.unlink(name)
    return copy.copy_(F)
