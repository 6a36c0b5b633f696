"""Rows: which there are, what comes of them, and the memory that they are in."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array, floating, real_array
from bridge.errors import EvaluationError, OutputError

# Rows handed to the simulator, and to the kernel, at once: more would cost memory and gain no speed.
CHUNK = 8
# But of small outputs, so many rows that the work outweighs a call: this many numbers.
CHUNK_NUMBERS = 1 << 17
# All of their values are float32 values.
_NARROW = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Unit:
    """Rows [start, stop) of one problem; `index` counts the units of the problem."""

    problem: int
    index: int
    start: int
    stop: int


class Rows(NamedTuple):
    """What came of rows [start, start + k) of a problem, of one unit or several: F (k, m), or None where all failed.

    `stolen`: the rows are from another rank's run.
    """

    problem: int
    stolen: bool
    start: int
    inputs: Array
    F: torch.Tensor | None

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of these, as views."""
        rows = slice(start - self.start, stop - self.start)
        F = None if self.F is None else self.F[rows]
        return Rows(self.problem, self.stolen, start, self.inputs[rows], F)


@dataclass(frozen=True, eq=False)
class Known:
    """What all ranks know once every row has been run.

    Attributes:
        owner: (units,) the rank that has each unit.
        like: (0, m), a tensor of this rank's dtype and device of outputs.
        large: whether outputs are so many that leaves have several units.
    """

    owner: NDArray[np.int64]
    output_shape: tuple[int, ...]
    like: torch.Tensor
    large: bool
    clipped_fraction: float
    num_cached: int


def rows_at_once(num_outputs: int) -> int:
    """Rows for one call of the simulator, a multiple of the kernel's, so that sums are the same for any."""
    return max(CHUNK, CHUNK_NUMBERS // max(1, num_outputs) // CHUNK * CHUNK)


def as_rows(
    outputs: Any, k: int, shape: tuple[int, ...] | None, name: str, narrow: torch.dtype = torch.float32
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A simulator's outputs as a (k, m) floating tensor, and the shape of one output; the one place of conversion.

    Args:
        narrow: dtype of numbers that float32 has room for: booleans, integers of up to 16 bits, float16 and bfloat16.
            float32 stays what it is, and all else becomes float64.
    """
    if not isinstance(outputs, torch.Tensor):
        array = real_array(outputs, f"from simulator {name!r}")
        array = floating(array, np.float32 if narrow == torch.float32 else np.float64)
        # Read-only memory (a memory map, a broadcast) cannot back a tensor.
        flags = array.flags
        outputs = torch.as_tensor(array if flags.writeable and flags.c_contiguous and flags.aligned else array.copy())
    tensor = outputs.detach()
    if tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
        tensor = torch.as_tensor(real_array(tensor, f"from simulator {name!r}")).to(tensor.device)
    if tensor.ndim == 0 or tensor.shape[0] != k or (shape is not None and tuple(tensor.shape[1:]) != shape):
        want = f"({k}, {', '.join(map(str, shape))})" if shape else f"({k},)" if shape == () else f"({k}, ...)"
        hint = " If one output is a scalar, declare output_shape=()." if tensor.shape == (k,) else ""
        raise OutputError(
            f"Expected outputs of shape {want} from simulator {name!r} for {k} rows, got {tuple(tensor.shape)}.{hint}"
        )
    if tensor.numel() == 0:
        raise OutputError(f"Expected at least one number from simulator {name!r}, got shape {tuple(tensor.shape[1:])}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.to(narrow if tensor.dtype in _NARROW else torch.float64)
    return aligned(tensor.reshape(k, -1)), tuple(tensor.shape[1:])


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory that starts on a multiple of 64 bytes.

    The last bits of a BLAS product depend on where its operands lie; torch's own memory starts on such multiples,
    numpy's and the user's need not, and differs from rank to rank.
    """
    return tensor if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 else tensor.contiguous().clone()


def spilled(F: torch.Tensor) -> torch.Tensor:
    """A copy in a file on the node's local disk (TMPDIR), which the system reads and writes back as it needs memory.

    The file has no name any more when this returns, and ends with the tensor.

    Raises:
        EvaluationError: the disk is full.
    """
    size = max(1, F.numel() * F.element_size())
    descriptor, name = tempfile.mkstemp(prefix="bridge-", suffix=".spill")
    try:
        # Reserved, not sparse: writing to memory that the disk has no room for would kill the process.
        os.posix_fallocate(descriptor, 0, size)
        copy = torch.from_file(name, shared=True, size=F.numel(), dtype=F.dtype).reshape(F.shape)
    except OSError as error:
        raise EvaluationError(
            f"Expected room for {size / 1e6:.1f} MB of outputs beyond bridge.Memory(rank_mb=...) in "
            f"{tempfile.gettempdir()}, got: {error}. Set TMPDIR to a larger local disk, or raise rank_mb."
        ) from error
    finally:
        os.close(descriptor)
        os.unlink(name)
    return copy.copy_(F)
