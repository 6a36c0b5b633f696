"""MRC files as TEM-simulator writes and reads them.

Most builds of TEM-simulator write a machine stamp that readers of MRC2014 refuse, so the byte order is found from the
header's own numbers, and everything else is checked instead: the mode, and that the file has the size it declares.

Reference: Cheng et al. (2015), J. Struct. Biol. 192, 146 (MRC2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 1024
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}
_IMOD = 1146047817


@final
@dataclass(frozen=True)
class Header:
    """What of a header matters here.

    Args:
        shape: (sections, rows, columns).
        dtype: of the data, with its byte order.
        offset: where the data start [bytes].
        voxel_angstrom: (x, y, z) [angstrom], 0 where the file does not say.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    voxel_angstrom: tuple[float, float, float]


def read_header(path: Path) -> Header:
    """The header of an MRC file, whatever its machine stamp.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no MRC file of a mode known here, or shorter than it declares.
    """
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES:
        raise ValueError(f"expected a header of {HEADER_BYTES} bytes, got {len(raw)}")
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in orders:
        words = np.frombuffer(raw, dtype=f"{order}i4")
        nx, ny, nz, mode = (int(w) for w in words[:4])
        # In the wrong byte order a mode of 1 or 2 is millions, and so is an axis of 1 to 3.
        if mode in _MODES and nx > 0 and ny > 0 and nz >= 0 and 0 <= int(words[16]) <= 3:
            break
    else:
        raise ValueError(f"expected the header of an MRC file with mode {', '.join(map(str, _MODES))}")
    # IMOD's bytes are unsigned but where its flag says otherwise.
    unsigned = mode == 0 and int(words[38]) == _IMOD and not int(words[39]) & 1
    dtype = np.dtype(f"{order}{'u1' if unsigned else _MODES[mode]}")
    offset = HEADER_BYTES + max(0, int(words[23]))
    expected = offset + nx * ny * nz * dtype.itemsize
    size = path.stat().st_size
    if size < expected:
        raise ValueError(f"expected {expected} bytes for {nz} sections of {ny} x {nx}, got {size}: it is cut short")
    sampling = [int(n) or 1 for n in words[7:10]]
    cell = np.frombuffer(raw, dtype=f"{order}f4")[10:13]
    voxel = tuple(float(c) / n for c, n in zip(cell, sampling, strict=True))
    return Header((nz, ny, nx), dtype, offset, (voxel[0], voxel[1], voxel[2]))


def read(path: Path) -> tuple[NDArray[Any], Header]:
    """The data (sections, rows, columns) in native byte order, and the header; raises as `read_header`."""
    header = read_header(path)
    data = np.fromfile(path, dtype=header.dtype, count=int(np.prod(header.shape)), offset=header.offset)
    return data.reshape(header.shape).astype(header.dtype.newbyteorder("="), copy=False), header


def write_stack(path: Path, stack: NDArray[Any], pixel_angstrom: float) -> None:
    """Images (sections, rows, columns) as MRC2014, mode 2, ISPG 0.

    Args:
        path: the file.
        stack: real numbers; they become float32.
        pixel_angstrom: [angstrom].
    """
    data = np.ascontiguousarray(stack, dtype="<f4")
    sections, rows, columns = data.shape
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    floats = words.view("<f4")
    words[:4] = columns, rows, sections, 2
    words[7:10] = columns, rows, sections
    floats[10:13] = np.array([columns, rows, sections]) * pixel_angstrom
    floats[13:16] = 90.0
    words[16:19] = 1, 2, 3
    floats[19:22] = data.min(initial=np.inf), data.max(initial=-np.inf), data.mean(dtype=np.float64)
    words[27] = 20140
    floats[54] = data.std(dtype=np.float64)
    words[55] = 1
    raw = bytearray(words.tobytes())
    raw[208:216] = b"MAP \x44\x44\0\0"
    label = b"bridge: adapters.tem.simulator"
    raw[224 : 224 + len(label)] = label
    with path.open("wb") as file:
        file.write(raw)
        data.tofile(file)


def write_scaled(source: Path, target: Path, factor: float) -> None:
    """A copy of a float32 MRC file with all its data multiplied by `factor`, in the header's byte order."""
    data, header = read(source)
    if header.dtype.kind != "f" or header.dtype.itemsize != 4:
        raise ValueError(f"expected a map in mode 2 (float32), got {header.dtype}")
    with source.open("rb") as file:
        raw = file.read(header.offset)
    np.multiply(data, np.float32(factor), out=data)
    with target.open("wb") as file:
        file.write(raw)
        data.astype(header.dtype, copy=False).tofile(file)
