"""The loss of a simulator as a simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import one_number
from bridge.errors import InputError
from bridge.evaluation.rows import as_rows
from bridge.simulator.function import makes_memory
from bridge.simulator.protocol import BlockStructure, Parallel, Simulator, simulator_name
from bridge.simulator.wrapper import SimulatorWrapper


@dataclass(frozen=True)
class LossWrapper(SimulatorWrapper):
    """What simulators have in common whose outputs are losses of another one: no block structure is left."""

    inner: Simulator

    @property
    def name(self) -> str:
        return f"loss of {simulator_name(self.inner)}"

    @property
    def structure(self) -> BlockStructure | None:
        return None

    def bound(self, comm: Any) -> Self:
        if not isinstance(self.inner, Parallel):
            raise InputError(f"Expected a simulator that takes a communicator, got {simulator_name(self.inner)!r}.")
        return replace(self, inner=self.inner.bound(comm))


@dataclass(frozen=True)
class LossSimulator(LossWrapper):
    """loss(f(x)) as a simulator with one number as output; the loss runs where the output is."""

    loss: Callable[[torch.Tensor], torch.Tensor]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return ()

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> torch.Tensor:
        rows = floating_rows(self.inner, inputs, seeds)
        with torch.enable_grad():  # a loss may differentiate inside
            # Numbers, not tensors: a loss may return the same memory every time.
            losses = [one_number(self.loss(row), "from the loss", InputError) for row in rows]
        return torch.tensor(losses, dtype=torch.float64)


def floating_rows(simulator: Simulator, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> torch.Tensor:
    """What a loss gets of a simulator, (k, *output_shape): float32 where outputs are, else float64; never integers,
    which wrap. In memory that the loss may write to."""
    name = simulator_name(simulator)
    rows, shape = as_rows(simulator(inputs, seeds), len(inputs), simulator.output_shape, name, torch.float64)
    rows = rows.reshape(len(inputs), *shape)
    return rows if makes_memory(simulator) else rows.clone()
