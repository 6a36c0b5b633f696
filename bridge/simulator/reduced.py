"""A simulator of fewer parameters: some are fixed, some are tied to others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.protocol import BlockStructure, Simulator, Structured, simulator_name
from bridge.simulator.space import ParameterSpace
from bridge.simulator.wrapper import SimulatorWrapper


@final
@dataclass(frozen=True)
class ReducedSimulator(SimulatorWrapper):
    """theta = base + E phi, of the free parameters phi; made by `reduced`.

    Attributes:
        free: their space. base: (d,) values of what is fixed, 0 elsewhere. lift: E, (d, free) of zeros and ones.
    """

    inner: Simulator
    free: ParameterSpace
    base: Array
    lift: Array

    @property
    def space(self) -> ParameterSpace:
        return self.free

    def forwarded(self, inputs: Array) -> Array:
        return np.ascontiguousarray(self.base + inputs @ self.lift.T)

    @property
    def name(self) -> str:
        # What is fixed belongs to the name: a run goes on with the same only.
        tied = [int(np.argmax(row)) if row.any() else -1 for row in self.lift]
        return f"{simulator_name(self.inner)} with {self.base.tolist()} and free {tied}"

    @property
    def structure(self) -> BlockStructure | None:
        whole = self.inner.structure if isinstance(self.inner, Structured) else None
        if whole is None:
            return None
        own = [np.unique(whole.parameter_block[self.lift[:, j] > 0]) for j in range(self.lift.shape[1])]
        return whole.of_parameters([int(blocks[0]) if len(blocks) == 1 else -1 for blocks in own])

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> Any:
        return self.inner(self.forwarded(inputs), seeds)


def reduced(
    simulator: Simulator, space: ParameterSpace, start: Array, fixed: Sequence[str], tied: Mapping[str, str]
) -> ReducedSimulator:
    """The simulator with `fixed` parameters held at the start and each of `tied` equal to another.

    Raises:
        InputError: an unknown name, nothing left to fit, a parameter tied to one that is not free, or with other
            bounds or another natural scale.
    """
    if isinstance(fixed, str):
        raise InputError(f"Expected a list of names, fixed=[{fixed!r}], got a text.")
    for name in (*fixed, *tied, *tied.values()):
        space.index(name)
    bound = {*fixed, *tied}
    if both := set(fixed) & set(tied):
        raise InputError(f"Expected parameters that are either fixed or tied, got both for {sorted(both)}.")
    free = [i for i, name in enumerate(space.names) if name not in bound]
    if not free:
        raise InputError("Expected a parameter that is free to be fitted, got all of them fixed or tied.")
    lift = np.zeros((space.dimension, len(free)))
    lift[free, np.arange(len(free))] = 1.0
    base = np.zeros(space.dimension)
    for name in fixed:
        base[space.index(name)] = start[space.index(name)]
    for name, other in tied.items():
        if other in bound:
            raise InputError(
                f"Expected {name!r} to be tied to a free parameter, got {other!r}. Free: one of the others."
            )
        one, two = space.parameters[space.index(name)], space.parameters[space.index(other)]
        if (one.lower, one.upper, one.natural_scale) != (two.lower, two.upper, two.natural_scale):
            raise InputError(
                f"Expected {name!r} and {other!r}, which are tied, to have the same bounds and natural scale, got "
                f"[{one.lower:g}, {one.upper:g}], {one.natural_scale:g} and [{two.lower:g}, {two.upper:g}], "
                f"{two.natural_scale:g}."
            )
        lift[space.index(name), free.index(space.index(other))] = 1.0
    return ReducedSimulator(simulator, ParameterSpace(tuple(space.parameters[i] for i in free)), base, lift)
