"""The design: every random number of a step, fixed before anything is evaluated.

A design is a pure function of (strategy, step, problem, d): never of the rank, the number of workers, the chunk or the
order of calls. Ranks therefore make it by themselves, and nothing random is sent or saved.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import InputError
from bridge.estimators.points import Nodes
from bridge.estimators.strategy import Strategy

# First word of every key, so that the streams of different purposes never meet.
_PERTURBATIONS, _SIMULATOR, _OTHER_PERTURBATIONS, _OTHER_SIMULATOR = 0, 1, 2, 3


def whole_number(name: str, value: Any) -> int:
    """A setting that is a key of the noise, as a Python integer.

    Raises:
        InputError: it is not an integer (a float, a bool, a name), or below 0, or beyond 63 bits.
    """
    try:
        number = -1 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        hint = f" Use int({name})." if isinstance(value, (float, np.floating)) else ""
        raise InputError(f"Expected {name} to be an integer from 0 to 2^63 - 1, got {value!r}.{hint}")
    return number


@dataclass(frozen=True)
class Design:
    """The rows of one problem at one step.

    Attributes:
        nodes: eps, scores and weights of the N perturbed rows.
        seeds: (num_rows,) uint64, the simulator's own seeds.
    """

    nodes: Nodes
    seeds: NDArray[np.uint64]


def make_design(
    strategy: Strategy,
    step: int,
    problem: int,
    dimension: int,
    replicate: int = 0,
    atom: tuple[int, float] | None = None,
) -> Design:
    """All draws of (seed, step, problem, replicate) for `dimension` parameters.

    Args:
        atom: (coordinate, value) at which eps is held in every row, all else alike.
    """

    def generator(purpose: int) -> np.random.Generator:
        return _generator(strategy.seed, purpose, step, problem, replicate)

    perturbations = _OTHER_PERTURBATIONS if strategy.stream else _PERTURBATIONS
    nodes = strategy.points.nodes(strategy.distribution, strategy.num_samples, dimension, generator(perturbations))
    if atom is not None:
        eps = nodes.eps.copy()
        eps[:, atom[0]] = atom[1]
        nodes = replace(nodes, eps=eps)
    common = strategy.simulator_seeds == "common"
    # Common seeds are those of all rows, of both streams.
    draw = generator(_OTHER_SIMULATOR if strategy.stream and not common else _SIMULATOR)
    if common:
        seeds = np.full(strategy.num_rows, draw.integers(0, 2**63, dtype=np.uint64))
    else:
        seeds = draw.integers(0, 2**63, size=strategy.num_rows, dtype=np.uint64)
    return Design(nodes, seeds)


def single_seeds(seed: int, step: int, count: int) -> NDArray[np.uint64]:
    """The simulator's own seeds of runs that stand by themselves: (count,).

    Run b has that of a design with one row, of problem b: what a smoothing evaluates at a point, and what is run there
    without any smoothing, are then the same run, which a store has once.
    """
    draws = (_generator(seed, _SIMULATOR, step, problem, 0) for problem in range(count))
    return np.array([draw.integers(0, 2**63, dtype=np.uint64) for draw in draws], dtype=np.uint64)


def _generator(seed: int, purpose: int, step: int, problem: int, replicate: int) -> np.random.Generator:
    key = np.random.SeedSequence(seed, spawn_key=(purpose, step, problem, replicate))
    return np.random.Generator(np.random.Philox(key))
