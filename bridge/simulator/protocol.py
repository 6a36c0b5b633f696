"""What a simulator is: a black box from parameters to an array, and what more it may say of itself.

Shape words used everywhere: `d` parameters, `k` rows of one call, `m` numbers in one output.
This module needs numpy alone, so that adapters can be imported where torch is not installed.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from bridge.simulator.space import ParameterSpace


@runtime_checkable
class Simulator(Protocol):
    """All that an outside author must satisfy (structural: no inheritance needed).

    Attributes:
        space: names, units and bounds of the d inputs; None where any number of inputs is taken.
        output_shape: shape of one output; None where it is only known after the first call.

    `__call__(inputs, seeds)` maps (k, d) float64 C-contiguous inputs and (k,) uint64 seeds to an array of shape
    (k, *output_shape). Row i of the result depends on `inputs[i]` and `seeds[i]` alone.
    """

    @property
    def space(self) -> ParameterSpace | None: ...

    @property
    def output_shape(self) -> tuple[int, ...] | None: ...

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any: ...


@runtime_checkable
class IdentityParts(Protocol):
    """Something that says of which values its outputs are made; its other attributes are no part of its identity.

    Values are gone through as attributes are; a `Path` stands for the content of that file or folder.
    """

    @property
    def identity_parts(self) -> Any: ...


class BlockStructure:
    """Which outputs each parameter touches: the other derivatives are exactly zero, and their noise is not paid for.

    The images of a tilt series that have shifts of their own are one example, independent problems in one call
    another. The variance of a VJP falls by about the number of blocks.

    Args:
        parameter_block: (d,) the block of each parameter, 0, 1, ...; -1 touches every output.
        output_block: the block of each output: an array of the output's shape, or of its first axis alone; -1 is
            touched by every parameter.
    """

    def __init__(self, parameter_block: ArrayLike, output_block: ArrayLike) -> None:
        self.parameter_block = np.asarray(parameter_block)
        self._output_block = np.asarray(output_block)
        for what, blocks in (("parameter_block", self.parameter_block), ("output_block", self._output_block)):
            if blocks.dtype.kind not in "iu" or blocks.size == 0 or blocks.min() < -1:
                raise InputError(f"Expected {what} to be integers from -1 up, got {blocks.tolist()}.")
        if self.parameter_block.ndim != 1:
            raise InputError(f"Expected one block a parameter, got shape {self.parameter_block.shape}.")

    def __repr__(self) -> str:
        return (
            f"BlockStructure({len(np.unique(self.parameter_block))} blocks of {len(self.parameter_block)} parameters)"
        )

    def _blocks(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        blocks = self._output_block
        if blocks.shape != shape and shape[:1] == blocks.shape:
            blocks = np.broadcast_to(blocks.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
        if blocks.shape != shape:
            raise InputError(
                f"Expected output_block of shape {shape} or {shape[:1]}, as outputs have, got {blocks.shape}."
            )
        return blocks.reshape(-1).astype(np.int64)

    def outputs(self, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """(m,) block of each output, counted from 0 (0 is what every parameter touches)."""
        return self._blocks(shape) + 1

    def touched(self, blocks: int) -> NDArray[np.bool_]:
        """(blocks, d): whether parameter j touches block g of `outputs`."""
        g = np.arange(blocks)[:, None] - 1
        own = self.parameter_block[None, :]
        return np.asarray((g == -1) | (own == -1) | (g == own))

    def of_parameters(self, parameter_block: ArrayLike) -> BlockStructure:
        """The same blocks of outputs, for other parameters."""
        return BlockStructure(parameter_block, self._output_block)

    def seen(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, blocks) sums over each block to (n, d): the sum over what each parameter touches."""
        touched = self.touched(sums.shape[1])
        return np.stack([(sums * touched[:, j]).sum(axis=1) for j in range(touched.shape[1])], axis=1)

    def mask(self, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """(d, m): whether parameter j touches output o."""
        block = self.outputs(shape)
        return self.touched(int(block.max()) + 1)[block].T


@runtime_checkable
class Structured(Protocol):
    """A simulator that knows which outputs each parameter touches."""

    @property
    def structure(self) -> BlockStructure | None: ...


@runtime_checkable
class RowByRow(Protocol):
    """A simulator that says whether it computes its rows one by one: then any grouping of rows gives the same bits."""

    @property
    def row_by_row(self) -> bool: ...


def computes_row_by_row(simulator: Simulator) -> bool:
    """Whether rows may be grouped at will; a simulator that does not say so might compute with all rows of a call."""
    return isinstance(simulator, RowByRow) and simulator.row_by_row


@runtime_checkable
class Parallel(Protocol):
    """A simulator that is itself parallel: `bound(comm)` is the same one, run by the ranks of a communicator."""

    def bound(self, comm: Any) -> Simulator: ...


def simulator_name(simulator: Simulator) -> str:
    """A name for messages: that of the wrapped function or simulator, else the class's."""
    name = getattr(simulator, "name", None)
    return name if isinstance(name, str) else type(simulator).__name__


@runtime_checkable
class FileFormat(Protocol):
    """What a simulator may know besides: the files in which its outputs live (`bridge fit` uses it)."""

    output_suffix: str

    def read_output(self, path: str) -> NDArray[Any]: ...

    def write_output(self, path: str, output: NDArray[Any]) -> None: ...
