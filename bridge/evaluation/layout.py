"""Which unit has which row, and which leaf of the summation tree has which unit.

A *unit* is a run of rows that one rank evaluates. A *leaf* is one unit where outputs are kept, and several where they
are streamed, because the kernel that adds rows to (1 + d) m numbers is bound by memory. All of it follows from N; ranks
only choose who has which unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import numpy as np
from numpy.typing import NDArray

from bridge.evaluation.rows import Rows, Unit

# Rows of a streamed leaf: below, the additions of the tree cost more than those of the leaves.
STREAMED_LEAF = 32


@final
class Layout:
    """The units of some problems of equally many rows, and their leaves.

    Args:
        num_samples: N, perturbed rows of a problem.
        leaf_size: rows of a unit.
        extra_row: whether the unperturbed row is there as well, a unit of its own.

    Attributes:
        runs: (start, stop) of the rows of each unit of a problem.
        units: of all problems, one problem after another.
        num_regular: units of a problem that have perturbed rows.
    """

    def __init__(self, num_problems: int, num_samples: int, leaf_size: int = 1, extra_row: bool = False) -> None:
        self.num_problems, self.num_samples, self.leaf_size = num_problems, num_samples, leaf_size
        self.num_rows = num_samples + extra_row
        self.runs = [(start, min(start + leaf_size, num_samples)) for start in range(0, num_samples, leaf_size)]
        self.num_regular = len(self.runs)
        if extra_row:
            self.runs.append((num_samples, num_samples + 1))
        self.units = [Unit(p, i, *run) for p in range(num_problems) for i, run in enumerate(self.runs)]

    def unit_of(self, row: int) -> int:
        """The unit of a problem that has a row; the unperturbed row is a unit of its own."""
        return min(row, self.num_samples - 1) // self.leaf_size + (row == self.num_samples)

    def by_unit(self, rows: Rows) -> Iterator[tuple[Unit, Rows]]:
        """Rows of one unit or several, by unit."""
        start, stop = rows.start, rows.start + len(rows.inputs)
        while start < stop:
            index = self.unit_of(start)
            end = min(stop, self.runs[index][1])
            yield self.units[rows.problem * len(self.runs) + index], rows.part(start, end)
            start = end

    def units_in_leaf(self, large: bool) -> int:
        """Units that are added up before the tree, where outputs are as large as that they may be streamed, or not."""
        return units_of_leaf(self.num_samples, self.leaf_size) if large else 1

    def leaf_of(self, index: int, units_in_leaf: int) -> int:
        """The leaf of a problem's unit; the unperturbed row is a leaf of its own. `index` may be one past the end."""
        if index >= self.num_regular:
            return -(-self.num_regular // units_in_leaf) + (index - self.num_regular)
        return index // units_in_leaf

    def leaf_start(self, leaf: int, units_in_leaf: int) -> int:
        """The first unit of a leaf."""
        leaves = -(-self.num_regular // units_in_leaf)
        return leaf * units_in_leaf if leaf < leaves else self.num_regular + (leaf - leaves)

    def leaf_owner(self, owner: NDArray[np.int64], p: int, units_in_leaf: int) -> NDArray[np.int64]:
        """(leaves,) the rank that adds each leaf of a problem: the one that has its first unit.

        Args:
            owner: (units,) the rank that has each unit.
        """
        first = p * len(self.runs)
        leaves = self.leaf_of(len(self.runs), units_in_leaf)
        return owner[[first + self.leaf_start(leaf, units_in_leaf) for leaf in range(leaves)]]


def units_of_leaf(n: int, unit: int) -> int:
    """Units of `unit` rows in a streamed leaf of n rows in all: 4 rows at N = 16, 32 at N = 256, and never more than 16
    leaves, because each level of the tree holds a sum."""
    rows = max(min(STREAMED_LEAF, 1 << max(0, (n - 1).bit_length() - 2)), -(-n // 16))
    return max(1, -(-rows // unit) if rows > STREAMED_LEAF else rows // unit)
