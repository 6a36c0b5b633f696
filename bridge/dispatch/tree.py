"""Sums of one fixed shape: a binary tree over the leaves, whoever computes them.

Floating-point addition is not associative, so a sum is bitwise the same for any number of ranks only if its bracketing
is. Node (level, place) covers leaves [place 2^level, (place + 1) 2^level), cut off at the number of leaves; it is the
sum of its two children, or its only child. A rank that owns a run of leaves keeps one partial sum for each maximal
subtree in it, O(log leaves), and the root finishes the tree.

Binned summation (Ahrens, Demmel, Nguyen, ACM TOMS 46 (2020) 22) is the other way; it costs more for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch


class Node(NamedTuple):
    """A subtree: see the module."""

    level: int
    place: int


class TreeSum:
    """Adds leaves that come in ascending order; tensors passed in are owned (and changed) by the sum."""

    def __init__(self, num_leaves: int, spare: list[torch.Tensor] | None = None) -> None:
        """`spare` collects the memory of finished sums, for this tree and for later ones that are given the list:
        fresh pages cost more than the additions."""
        self.num_leaves = num_leaves
        self._partials: dict[Node, torch.Tensor] = {}
        self._spare = [] if spare is None else spare

    def buffer(self, like: torch.Tensor, rows: int) -> torch.Tensor:
        """Memory for the next leaf, (rows, m): what a finished sum has left, before anything new."""
        while self._spare:
            old = self._spare.pop()
            if old.shape == (rows, like.shape[1]) and old.dtype == like.dtype and old.device == like.device:
                return old
        return like.new_empty((rows, like.shape[1]))

    def add(self, leaf: int, value: torch.Tensor) -> None:
        self.add_node(Node(0, leaf), value)

    def add_node(self, node: Node, value: torch.Tensor) -> None:
        while True:
            level, place = node
            if place % 2:
                left = self._partials.pop(Node(level, place - 1), None)
                if left is None:
                    break
                self._spare.append(value)
                value = left.add_(value)
            elif (place + 1) << level < self.num_leaves or (place == 0 and 1 << level >= self.num_leaves):
                break  # the right sibling is still to come, or this is the root
            node = Node(level + 1, place // 2)
        self._partials[node] = value

    @property
    def partials(self) -> dict[Node, torch.Tensor]:
        """The finished subtrees, in leaf order."""
        return dict(sorted(self._partials.items(), key=lambda item: item[0].place << item[0].level))

    def result(self) -> torch.Tensor:
        """The whole sum, once every leaf has come."""
        (total,) = self._partials.values()
        return total


def owned_nodes(start: int, stop: int, num_leaves: int) -> Iterator[Node]:
    """The maximal subtrees of leaves [start, stop), in order: the keys of `TreeSum.partials` after adding them."""
    while start < stop:
        level = 0
        # Grow while the node stays aligned and its leaves (those that exist) stay inside.
        while start % (2 << level) == 0 and min(start + (2 << level), num_leaves) <= stop and 1 << level < num_leaves:
            level += 1
        yield Node(level, start >> level)
        start += 1 << level
