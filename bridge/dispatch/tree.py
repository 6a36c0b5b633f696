"""Sums of one fixed shape: a binary tree over the leaves, whoever computes them.

Floating-point addition is not associative, so a sum is bitwise the same for any number of ranks and any schedule only
if its bracketing is. Node (level, place) covers leaves [place 2^level, (place + 1) 2^level), cut off at the number of
leaves; it is the sum of its two children, or its only child. A rank keeps one partial sum for each maximal subtree that
it has, O(log leaves) where its leaves are a run, and what is left is added along the tree: the right child goes to the
rank that has the left one, so that no rank takes more than O(log leaves) messages for each run that it owns.

Binned summation (Ahrens, Demmel, Nguyen, ACM TOMS 46 (2020) 22) is the other way; it costs more for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

# So many rows of sums, and a product with an identity costs no more than the additions.
_FEW = 16


class Node(NamedTuple):
    """A subtree: see the module."""

    level: int
    place: int


class TreeSum:
    """Adds leaves in any order; tensors passed in are owned (and changed) by the sum."""

    def __init__(
        self,
        num_leaves: int,
        buffers: list[torch.Tensor] | None = None,
        shares: NDArray[np.float64] | None = None,
        weight: float | None = None,
    ) -> None:
        """Args:
        buffers: collects the memory of finished sums, for this tree and for later ones that are given the list: fresh
            pages cost more than the additions.
        shares: (leaves, c) where each leaf is (c + 1, m), sums of w_i (F_i - r) with r as the last row, and has sums of
            the weights w_i of its own. The sum of two subtrees has the r of the left one.
        weight: leaves in float32 are rows to be multiplied by it and added in float64; they stay as they are.
        """
        self.num_leaves = num_leaves
        self.weight = weight
        self._shares = shares
        self._partials: dict[Node, torch.Tensor] = {}
        self._buffers = [] if buffers is None else buffers

    def buffer(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """Memory for the next leaf, (rows, m): what a finished sum has left, before anything new."""
        while self._buffers:
            old = self._buffers.pop()
            if old.shape == (rows, like.shape[1]) and old.dtype == like.dtype and old.device == like.device:
                return old
        return like.new_empty((rows, like.shape[1]))

    def add(self, leaf: int, value: torch.Tensor) -> None:
        self.add_node(Node(0, leaf), value)

    def add_node(self, node: Node, value: torch.Tensor) -> None:
        while 1 << node.level < self.num_leaves:
            level, place = node
            sibling = Node(level, place ^ 1)
            if sibling.place << level < self.num_leaves:
                other = self._partials.pop(sibling, None)
                if other is None:
                    break  # still to come
                left, right = (other, value) if place % 2 else (value, other)
                if self._shares is None:
                    value = self._added(left, right)
                else:
                    # The value's row by itself: its bits do not depend on what is beside it.
                    away, end = right[-1].sub_(left[-1]), min((place | 1) + 1 << level, self.num_leaves)
                    w = self.share_of((place | 1) << level, end)
                    left[0].add_(right[0]).add_(away, alpha=w[0])
                    if len(w) > 1:
                        _add_moved(left[1:-1], right[1:], torch.tensor(w[1:], dtype=left.dtype, device=left.device))
                    value = left
                    self.reuse(right)
            node = Node(level + 1, place // 2)
        self._partials[node] = value

    def _added(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.weight is None or torch.float32 not in (left.dtype, right.dtype):
            left.add_(right)
            self.reuse(right)
            return left
        if left.dtype != right.dtype:
            return self._added(self._weighted(left), self._weighted(right))
        total = self.buffer(left[:0].to(torch.float64), len(left))
        np.add(left.numpy(), right.numpy(), out=total.numpy(), dtype=np.float64)  # one pass over two rows
        return total.mul_(self.weight)

    def _weighted(self, row: torch.Tensor) -> torch.Tensor:
        if self.weight is None or row.dtype != torch.float32:
            return row
        return self.buffer(row[:0].to(torch.float64), len(row)).copy_(row).mul_(self.weight)

    def widen(self) -> None:
        """Rows in float32 that still are by themselves become leaves like others."""
        self._partials = {node: self._weighted(value) for node, value in self._partials.items()}

    def share_of(self, first: int, end: int) -> list[float]:
        """Sums of the weights over the leaves [first, end): c numbers."""
        assert self._shares is not None
        return self._shares[first:end].sum(axis=0).tolist()

    def reuse(self, memory: torch.Tensor) -> None:
        """Takes memory that is not needed any more for later leaves."""
        self._buffers.append(memory)

    def pop(self, node: Node) -> torch.Tensor:
        """Takes a finished subtree out of the sum."""
        return self._partials.pop(node)

    def result(self) -> torch.Tensor:
        """The whole sum, once every leaf has come."""
        (total,) = self._partials.values()
        return total


def _add_moved(left: torch.Tensor, right: torch.Tensor, w: torch.Tensor) -> None:
    """Adds right[:-1] + w x right[-1] to left (c, m); of few rows as one product, which goes over them once."""
    if len(left) <= _FEW:
        left.addmm_(torch.cat([torch.eye(len(w), dtype=w.dtype, device=w.device), w[:, None]], dim=1), right)
    else:
        left.add_(right[:-1]).addr_(w, right[-1])


def transfers(owners: NDArray[np.int64]) -> Iterator[tuple[Node, int, int]]:
    """What has to travel to finish a tree: (right child, rank that has it, rank that has its left sibling).

    The rank of a node is that of its first leaf; level by level, so that what is sent is complete.

    Args:
        owners: (leaves,) the rank that added each leaf.
    """
    level = 0
    while 1 << level < len(owners):
        rights = np.arange(1, -(-len(owners) >> level), 2)
        source, dest = owners[rights << level], owners[(rights - 1) << level]
        for i in np.flatnonzero(source != dest):
            yield Node(level, int(rights[i])), int(source[i]), int(dest[i])
        level += 1


def subtrees(owners: NDArray[np.int64]) -> Iterator[tuple[Node, int]]:
    """The largest subtrees that one rank has all leaves of, and that rank.

    Args:
        owners: (leaves,) the rank that added each leaf.
    """

    def below(node: Node) -> Iterator[tuple[Node, int]]:
        level, place = node
        leaves = owners[place << level : (place + 1) << level]
        if (leaves == leaves[0]).all():
            yield node, int(leaves[0])
            return
        yield from below(Node(level - 1, 2 * place))
        if (2 * place + 1) << (level - 1) < len(owners):
            yield from below(Node(level - 1, 2 * place + 1))

    yield from below(Node((len(owners) - 1).bit_length(), 0))


def run_of(count: int, rank: int, size: int) -> range:
    """The run of `count` items that `rank` of `size` gets: even runs, the first ranks taking the remainder."""
    small, more = divmod(count, size)
    start = rank * small + min(rank, more)
    return range(start, start + small + (rank < more))


# More than ranks, so that sums of owners also tell how many there are.
ONCE = 2.0**32


def owner_map(count: int, own: list[int], rank: int) -> NDArray[Any]:
    """(count,) ONCE + `rank` + 1 at this rank's items, as often as it has had them, and 0 elsewhere: summed over ranks,
    ONCE + 1 + the owner of each."""
    return np.bincount(own, minlength=count) * (ONCE + rank + 1)
