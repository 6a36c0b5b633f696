"""A problem of the race: a simulator, a noisy target, a start; and how far from the answer each evaluated point is.

A point is judged by one number, its distance:

fixed       max_i |theta_i - truth_i| / tolerance_i, or another distance in units of what is wanted: solved below 1;
loss        the loss without noise, 1/2 sum (r_i(theta) - target_i)^2 / variance: solved below
            f_L + tau (f_0 - f_L), the test of Moré and Wild, f_0 at the start and f_L the least that is known.

It is judged on every point that a solver evaluates, whatever the solver takes for its answer. A seed changes the start,
the target's noise, and the truth where it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.simulator.space import Parameter, ParameterSpace

Array = NDArray[np.float64]
RUNS_A_DIMENSION = 60


@dataclass(frozen=True)
class Problem:
    """One instance.

    Attributes:
        simulator: of the project's kind; its space has bounds and natural scales.
        target, variance: of the solver's loss, 1/2 sum (simulator - target)^2 / variance.
        noisy_target: the variance is that of noise, of the target (and of a run); else a mere unit.
        start: (d,).
        distance: (inputs (k, d), outputs (k, *shape)) -> (k,), see above.
        criterion: which distance it is.
        tau: of the test on the loss.
        least: the least loss that is known beforehand; None where only the solvers will tell.
        elsewhere: a lower one in a place where few come.
        truth: (d,) a point that solves it; None where none is known.
        noisy: the simulator's outputs are noisy (solvers with a flag for noise are told).
        runs_a_dimension: the budget is that times (d + 1).
    """

    name: str
    group: Literal["simulators", "published"]
    seed: int
    simulator: Any
    target: NDArray[Any]
    variance: float
    start: Array
    distance: Callable[[Array, NDArray[Any]], Array]
    criterion: Literal["fixed", "loss"]
    tau: float = 1e-3
    least: float | None = 0.0
    truth: Array | None = None
    noisy: bool = False
    noisy_target: bool = False
    runs_a_dimension: int = RUNS_A_DIMENSION
    elsewhere: float | None = None

    @property
    def dimension(self) -> int:
        return len(self.start)

    @property
    def budget(self) -> int:
        return self.runs_a_dimension * (self.dimension + 1)


def rows_of(function: Callable[[Array, int], Array], inputs: Array, seeds: NDArray[np.uint64]) -> Array:
    return np.stack([function(x, int(seed)) for x, seed in zip(inputs, seeds, strict=True)])


def space_of(
    names: list[str], units: str, lower: Any, upper: Any, natural: Any, kind: Any = "continuous"
) -> ParameterSpace:
    low, high, scale = (np.broadcast_to(np.asarray(v, dtype=np.float64), len(names)) for v in (lower, upper, natural))
    return ParameterSpace(
        tuple(
            Parameter(n, units, float(a), float(b), float(s), kind)
            for n, a, b, s in zip(names, low, high, scale, strict=True)
        )
    )


def near(truth: Array, tolerance: Any) -> Callable[[Array, NDArray[Any]], Array]:
    return lambda inputs, outputs: (np.abs(inputs - truth) / tolerance).max(axis=1)


def half_squares(
    clean: Callable[[Array], Array], target: Array, variance: float
) -> Callable[[Array, NDArray[Any]], Array]:
    """Of the outputs (k, m) that the simulator would give without noise, and the target without its noise."""
    return lambda inputs, outputs: 0.5 * ((clean(inputs) - target) ** 2).sum(axis=1) / variance


def within(space: ParameterSpace, start: Array) -> Array:
    return np.clip(start, space.lower, space.upper)
