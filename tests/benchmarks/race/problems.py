"""All problems by name: the race's simulators and published functions in their variants, and those to practise with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from bridge.errors import InputError
from bridge.simulator.function import FunctionSimulator

from . import more_wild, practice
from .problem import Array, Problem, half_squares, rows_of, space_of
from .project import microscope_2, microscope_4, teapot, tilt_series
from .small import disc, noisy_sines, predators, staircase


def published(name: str, variant: str, seed: int) -> Problem:
    """A function of `more_wild`; the start is the published one, moved by about a natural scale."""
    function = (more_wild.FUNCTIONS | practice.FUNCTIONS)[name]
    begin = np.array(function.start)
    d, size = len(begin), max(1.0, float(np.abs(begin).max()))
    # Radius of the trust region that DFO-LS and Py-BOBYQA start with by default; a wide box for those who need one.
    space = space_of([f"x{i}" for i in range(d)], "", -10 * size, 10 * size, 0.1 * size)
    start = begin + 0.1 * size * np.random.default_rng([106, seed]).standard_normal(d)

    def outputs(inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return rows_of(lambda x, s: more_wild.residuals(function, variant, x, s), inputs, seeds)

    m = len(function.residuals(begin))
    simulator = FunctionSimulator(outputs, space, (m,), vectorized=True, seeded=True)

    def clean(inputs: Array) -> Array:
        return np.stack([more_wild.true_residuals(function, variant, x) for x in inputs])

    distance = half_squares(clean, np.zeros(m), 1.0)
    # The least sum of absolute values is another one, unless all residuals vanish.
    least = None if variant == "nonsmooth" and function.minimum > 0 else function.minimum
    return Problem(
        f"{name}:{variant}",
        "published",
        seed,
        simulator,
        np.zeros(m),
        1.0,
        start,
        distance,
        "loss",
        least=least,
        elsewhere=function.elsewhere,
        noisy=variant in ("deterministic", "stochastic"),
    )


SIMULATORS: dict[str, Callable[[int], Problem]] = {
    "disc": disc,
    "noisy-sines": noisy_sines,
    "microscope-2": microscope_2,
    "microscope-4": microscope_4,
    "teapot": teapot,
    "staircase": staircase,
    "predators": predators,
    "tilt-series": tilt_series,
}
PUBLISHED = tuple(f"{name}:{variant}" for name in more_wild.FUNCTIONS for variant in more_wild.VARIANTS)
NAMES = (*SIMULATORS, *PUBLISHED)
PRACTICE = (*practice.SIMULATORS, *(f"{name}:{v}" for name in practice.FUNCTIONS for v in more_wild.VARIANTS))


def make(name: str, seed: int) -> Problem:
    """A problem of `NAMES` or `PRACTICE`.

    Raises:
        InputError: an unknown name.
    """
    if name not in (*NAMES, *PRACTICE):
        raise InputError(f"Unknown problem {name!r}. Known: {', '.join((*NAMES, *PRACTICE))}.")
    simulators = SIMULATORS | practice.SIMULATORS
    return simulators[name](seed) if name in simulators else published(*name.split(":"), seed)
