"""The step of outputs that are multiples of one: integers, counts, flags, numbers rounded to so many digits.

Such an output is off by up to half a step wherever the simulator is run, which no residual needs to show: the loss may
be 0 on a whole plateau of parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array

# Of an output's range: what is left of two numbers that have no common step, in double precision; and the least step
# that is told apart from that, which is so many times as much.
_NOTHING, _LEAST_STEP, _APART = 1e-9, 1e-6, 1e3
# So many different steps from an output's first value, and their common divisor is hardly a multiple of the step.
_ENOUGH = 3


@final
class Lattice:
    """The step of each output, as far as the runs tell that are shown to it: Euclid's divisor of their differences.

    Its state is two numbers an output, since outputs may be many and runs are not kept.
    """

    def __init__(self) -> None:
        self.first, self.divisor, self.range = np.zeros(0), np.zeros(0), np.zeros(0)
        self.changes = np.zeros(0)

    def add(self, outputs: Array) -> None:
        """Of runs (n, ...); those that are not finite tell nothing."""
        if not len(outputs):
            return
        rows = np.asarray(outputs, dtype=np.float64).reshape(len(outputs), -1)
        rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows):
            return
        if self.first.shape != rows.shape[1:]:
            self.first = rows[0]
            self.divisor, self.range, self.changes = (np.zeros(len(self.first)) for _ in range(3))
        for row in rows:
            away = np.abs(row - self.first)
            self.range = np.maximum(self.range, away)
            # An output that has been found to have no step is not looked at again: NaN.
            new = ~np.isnan(self.divisor) & (away > _NOTHING * self.range)
            self.changes += new
            if new.any():
                rounding = 16 * np.finfo(np.float64).eps * np.maximum(np.abs(row), np.abs(self.first))
                least = np.maximum(_NOTHING * self.range, rounding)
                self.divisor[new] = _common(self.divisor[new], away[new], least[new])

    @property
    def steps(self) -> Array:
        """(m,), 0 where there is none.

        An output that has changed but once or twice has the step that others have, or none.
        """
        with np.errstate(invalid="ignore"):
            some = np.flatnonzero((self.changes > 0) & (self.divisor > _LEAST_STEP * self.range))
        steps = np.zeros(len(self.first))
        if len(some):
            _, group = np.unique(np.round(np.log(self.divisor[some]), 6), return_inverse=True)
            known = np.bincount(group, self.changes[some])[group] >= _ENOUGH
            steps[some[known]] = self.divisor[some[known]]
        return steps

    def deviation(self, shape: tuple[int, ...]) -> Array:
        """Standard deviation of what rounding leaves, step / sqrt(12)."""
        return self.steps.reshape(shape) / np.sqrt(12) if len(self.first) else np.zeros(shape)

    def holds(self, values: Array) -> NDArray[np.bool_]:
        """(m,) whether numbers are on the outputs' lattice."""
        steps = self.steps
        off = np.abs(np.asarray(values, dtype=np.float64).reshape(-1) - self.first) / np.where(steps > 0, steps, 1)
        return (steps > 0) & (np.abs(off - np.round(off)) < 1e-3)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("first", "divisor", "range", "changes")}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in ("first", "divisor", "range", "changes"):
            setattr(self, name, np.asarray(saved[name]))


def _common(a: Array, b: Array, least: Array) -> Array:
    """The greatest common divisor of real numbers, NaN where it is next to nothing beside their errors."""
    large, small = np.maximum(a, b), np.minimum(a, b)
    while (go := small > least).any():
        rest = np.where(go, np.fmod(large, np.where(go, small, 1)), 0)
        # A remainder of nearly the whole divisor is none: fmod rounds down.
        rest = np.where(go & (small - rest <= least), 0, rest)
        large, small = np.where(go, small, large), np.where(go, rest, small)
    return np.where(large > _APART * least, large, np.nan)
