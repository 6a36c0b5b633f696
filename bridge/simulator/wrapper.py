"""A simulator that has another one do the work: what both have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.simulator.protocol import BlockStructure, Simulator, Structured, computes_row_by_row, simulator_name
from bridge.simulator.space import ParameterSpace


class SimulatorWrapper(ABC):
    """Has the parameters, outputs and structure of another simulator, unless a subclass says otherwise.

    Attributes:
        inner: that one.
    """

    inner: Simulator

    @property
    def name(self) -> str:
        return simulator_name(self.inner)

    @property
    def space(self) -> ParameterSpace | None:
        return self.inner.space

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        return self.inner.output_shape

    @property
    def structure(self) -> BlockStructure | None:
        return self.inner.structure if isinstance(self.inner, Structured) else None

    @property
    def row_by_row(self) -> bool:
        return computes_row_by_row(self.inner)

    @abstractmethod
    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any: ...
