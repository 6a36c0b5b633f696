"""Shortest paths through a grid of costs: a hard 0/1 mask, constant almost everywhere in the costs.

Parameters are *log* costs, so that perturbed costs stay positive. The solver treats all rows of a call at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.space import Parameter, ParameterSpace

# Between these, a cost always stands out of the rounding of a path's sum; heavy-tailed noise is clipped to them.
LOG_COST_RANGE = (-12.0, 12.0)
# Cost of a cell for each class of terrain: road, grass, wood, marsh, rock.
TERRAIN_COSTS = (1.0, 1.5, 2.5, 4.0, 7.0)
# Of the maps of the variance study: one whose paths bend around the rocks. Any other seed gives another landscape.
TERRAIN_SEED = 32


@dataclass(frozen=True)
class ShortestPath:
    """The cheapest path from the top-left to the bottom-right cell of a `size` x `size` grid, by steps to 8 neighbours.

    Input: size^2 log costs in row-major order; output: (size, size), 1 on the path, both ends included, else 0. The
    cost of a path is the sum of exp(log cost) over its cells. Ties: seen from the end, the predecessor is the first of
    the cheapest in row-major order.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or int(self.size) != self.size or self.size < 2:
            raise InputError(f"Expected a grid of at least 2 x 2 cells, got size={self.size!r}.")

    @cached_property
    def space(self) -> ParameterSpace:
        lower, upper = LOG_COST_RANGE
        cells = [(i, j) for i in range(self.size) for j in range(self.size)]
        return ParameterSpace(tuple(Parameter(f"log_cost_{i}_{j}", "", lower, upper) for i, j in cells))

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (self.size, self.size)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        inputs = np.asarray(inputs, dtype=np.float64)
        if inputs.ndim != 2 or inputs.shape[1] != self.size**2:
            raise InputError(f"Expected log costs of shape (k, {self.size**2}), got {inputs.shape}.")
        lower, upper = LOG_COST_RANGE
        # Written so that NaN fails it.
        if not ((inputs >= lower) & (inputs <= upper)).all():
            raise InputError(f"Expected log costs in [{lower:g}, {upper:g}], got {inputs.min():g} to {inputs.max():g}.")
        return shortest_paths(np.exp(inputs).reshape(-1, self.size, self.size))


def shortest_paths(costs: Array) -> NDArray[np.float32]:
    """Masks (k, g, g) of the cheapest paths through positive costs (k, g, g).

    Bellman-Ford: after t sweeps each cell knows its cheapest path of at most t steps. The rows are the last axis, so
    that each operation runs over long contiguous memory, and the minimum over nine cells is taken by rows, then
    columns. A row's result does not depend on the others': sweeps beyond its own last change nothing.
    """
    k, g = costs.shape[:2]
    wide = g + 2
    cost = np.ascontiguousarray(costs.transpose(1, 2, 0))
    padded = np.full((wide, wide, k), np.inf)
    padded[1, 1] = cost[0, 0]
    distance = padded[1:-1, 1:-1]
    along, found = np.empty((g, wide, k)), np.empty((g, g, k))
    sweep = 0
    while True:
        np.minimum(padded[:-2], padded[1:-1], out=along)
        np.minimum(along, padded[2:], out=along)
        np.minimum(along[:, :-2], along[:, 1:-1], out=found)
        np.minimum(found, along[:, 2:], out=found)
        found += cost
        found[0, 0] = cost[0, 0]
        sweep += 1
        # The far corner is g - 1 steps away: before, there is always a change.
        if sweep >= g and np.array_equal(found, distance):
            break
        distance[...] = found

    # Back from the end to whichever neighbour is nearest to the start. The cell itself is among the nine: only at the
    # start is it the nearest, so that paths which have arrived wait there for the others.
    flat, rows = padded.reshape(-1), np.arange(k)
    steps = (np.array([-1, 0, 1])[:, None] * wide + np.array([-1, 0, 1])).reshape(-1, 1)
    mask = np.zeros((wide * wide, k), dtype=np.float32)
    cell = np.full(k, g * wide + g)
    start = wide + 1
    while True:
        mask.reshape(-1)[cell * k + rows] = 1
        if (cell == start).all():
            break
        around = flat[(cell + steps) * k + rows]
        cell = cell + steps[around.argmin(axis=0), 0]
    return np.ascontiguousarray(mask.reshape(wide, wide, k)[1:-1, 1:-1].transpose(2, 0, 1))


def terrain(size: int, seed: int = TERRAIN_SEED) -> Array:
    """Log costs (size^2,) of a landscape: a smoothed random field, cut at its quantiles into the classes of terrain.

    A function of its arguments alone; the maps of the variance study are terrain(8) and terrain(12).
    """
    field = ndimage.gaussian_filter(np.random.default_rng([seed, size]).standard_normal((size, size)), 1.0)
    cuts = np.quantile(field, np.arange(1, len(TERRAIN_COSTS)) / len(TERRAIN_COSTS))
    return np.log(np.array(TERRAIN_COSTS))[np.searchsorted(cuts, field)].reshape(-1)
