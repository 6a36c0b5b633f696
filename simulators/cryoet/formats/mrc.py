"""What MRC files hold, as programs write them: `read_mrc`.

MRC2014 is read strictly where it matters: sizes, modes and lengths must agree. What many programs get wrong without
harm is read and noted by a warning: machine stamps (EMDB's and TEM-simulator's 44 11, older SerialEM's 44 00), which
are not needed where the header makes sense in one byte order; a missing "MAP"; bytes after the data; no number of
sections.

Reference:
    Cheng et al. (2015), J. Struct. Biol. 192, 146 (MRC2014); IMOD's flags: bio3d.colorado.edu/imod/doc/mrc_format.txt.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.errors import InputError, SetupError
from simulators.cryoet.formats.packed import PACKED_ERRORS, is_packed, opened

HEADER_BYTES = 1024
_KINDS = {0: "i1", 1: "i2", 2: "f4", 3: "i2", 4: "c8", 6: "u2", 7: "i4", 12: "f2", 16: "u1", 101: "u1"}
# Values of these are no real numbers.
_OTHERS = {3: "complex numbers", 4: "complex numbers", 16: "colours"}
_STAMPS = {b"\x44\x44": "<", b"\x44\x41": "<", b"\x11\x11": ">"}
_ORDERS = {"<": "little-endian", ">": "big-endian"}
_IMOD = 1146047817
_CHUNK = 1 << 24


def import_mrcfile() -> Any:
    """mrcfile, or a `SetupError` that says how to get it."""
    try:
        import mrcfile
    except ImportError as error:
        raise SetupError(
            "Expected the package mrcfile, which cannot be imported. Install it: "
            'pip install "simulation-bridge[cryoet]".'
        ) from error
    return mrcfile


@dataclass(frozen=True, eq=False)
class MrcContent:
    """What an MRC file holds, as it stands in the file.

    Args:
        data: (sections, rows, columns), finite real numbers in this machine's byte order.
        header: a record with mrcfile's names, for what readers want of it.
        label: the first label.
        notes: what was odd about the file, in sentences.
    """

    data: NDArray[Any]
    header: Any
    label: str
    notes: tuple[str, ...] = ()


def read_mrc(path: str | Path, *, memory_map: bool = False) -> MrcContent:
    """Reads an MRC file, plain or compressed (gzip, bzip2).

    Args:
        path: the file.
        memory_map: data stay in the file until they are used, and are not checked to be finite; where they have to be
            converted or decompressed they are read all the same.

    Raises:
        InputError: no such file, not MRC, truncated (noticed before memory is taken for what the header claims), or not
            finite real numbers.
    """
    dtypes, path = import_mrcfile().dtypes, Path(path)
    if not path.is_file():
        raise InputError(f"Expected an MRC file, found none at {str(path)!r}. Check the path.")
    notes: list[str] = []
    try:
        with opened(path) as stream:
            raw = stream.read(HEADER_BYTES)
            if len(raw) < HEADER_BYTES:
                raise ValueError(f"it has {len(raw)} bytes, and a header has {HEADER_BYTES}")
            size = None if is_packed(path) else path.stat().st_size
            order = _byte_order(raw, size, notes)
            header = np.frombuffer(raw, dtypes.HEADER_DTYPE.newbyteorder(order))
            header = header.astype(dtypes.HEADER_DTYPE.newbyteorder("=")).view(np.recarray)[0]
            data = _data(path, stream, raw, order, size, memory_map, notes)
    except (ValueError, OverflowError, MemoryError, *PACKED_ERRORS) as error:
        raise InputError(
            f"Expected an MRC2014 file, got {str(path)!r}: {error}. Was it written completely, and is it MRC?"
        ) from error
    if not memory_map and data.dtype.kind == "f" and not np.isfinite(data).all():
        raise InputError(f"Expected finite real numbers in {str(path)!r}, got NaN or infinity.")
    for note in notes:
        warnings.warn(f"{path.name}: {note}", UserWarning, stacklevel=4)
    count = min(max(int(header.nlabl), 0), len(header.label))
    label = bytes(header.label[0]).decode("ascii", "replace").strip(" \0") if count else ""
    return MrcContent(data, header, label, tuple(notes))


def _words(raw: bytes, order: str) -> list[int]:
    return [int(word) for word in np.frombuffer(raw, f"{order}i4")]


def _row_bytes(nx: int, mode: int) -> int:
    if mode == 101:
        return (nx + 1) // 2
    return nx * np.dtype(_KINDS[mode]).itemsize * {3: 2, 16: 3}.get(mode, 1)


def _byte_order(raw: bytes, size: int | None, notes: list[str]) -> Literal["<", ">"]:
    """The one in which the header makes sense; the stamp decides where both do."""
    stamped = _STAMPS.get(raw[212:214])
    found: list[tuple[tuple[bool, bool, bool, int], Literal["<", ">"]]] = []
    orders: tuple[Literal["<", ">"], ...] = (">", "<")
    for order in orders:
        words = _words(raw, order)
        nx, ny, nz, mode, extended = *words[:4], words[23]
        if mode in _KINDS and nx > 0 and ny > 0 and nz >= 0 and extended >= 0:
            fits = size is None or HEADER_BYTES + extended + _row_bytes(nx, mode) * ny * nz <= size
            likely = all(0 <= axis <= 3 for axis in words[16:19]) and max(nx, ny, nz) < 1 << 20
            found.append(((likely, fits, order == stamped, -nx * ny * nz), order))
    if not found:
        nx, ny, nz, mode, extended = *(words := _words(raw, stamped or "<"))[:4], words[23]
        raise ValueError(f"its header claims {nx} x {ny} x {nz} numbers of mode {mode} after {extended} bytes")
    order = max(found)[1]
    if order != stamped:
        stamp = " ".join(f"{byte:02x}" for byte in raw[212:214])
        notes.append(f"its machine stamp is {stamp}, but its header makes sense as {_ORDERS[order]}, and is read so.")
    if raw[208:211] != b"MAP":
        notes.append('its header has no "MAP", as before MRC2000; it is read as MRC2014.')
    return order


def _data(
    path: Path, stream: BinaryIO, raw: bytes, order: str, size: int | None, memory_map: bool, notes: list[str]
) -> NDArray[Any]:
    """(sections, rows, columns) in native byte order."""
    words = _words(raw, order)
    nx, ny, nz, mode, extended = *words[:4], words[23]
    if mode in _OTHERS:
        raise ValueError(f"it has {_OTHERS[mode]} (mode {mode}), and real ones are expected; convert it first")
    kind = _KINDS[mode]
    if mode == 0:
        kind = _bytes_kind(raw, words, order, notes)
    dtype = np.dtype(f"{order}{kind}")
    start, section = HEADER_BYTES + extended, _row_bytes(nx, mode) * ny
    if size is None:
        _exactly(stream, extended)
    if not nz:
        rest = (size - start) if size is not None else len(tail := stream.read())
        if rest < section or rest % section:
            raise ValueError(f"its header claims {nx} x {ny} x 0 numbers of mode {mode}, and {rest} bytes follow")
        nz = rest // section
        notes.append(f"its header counts no sections; its length is that of {nz}, which are read.")
    needed = section * nz
    claim = f"its header claims {nx} x {ny} x {nz} numbers of mode {mode}, {start + needed} bytes, but the file has"
    if size is not None:
        if size < start + needed:
            raise ValueError(f"{claim} {size}")
        after = size - start - needed
        if memory_map and mode != 101 and dtype.isnative:
            data: NDArray[Any] = np.memmap(path, dtype, "r", start, (nz, ny, nx))
        else:
            data = np.fromfile(path, np.uint8, needed, offset=start)
    else:
        content = tail if not words[2] else _exactly(stream, needed, f"{claim} {path.stat().st_size} compressed")
        data, after = np.frombuffer(content, np.uint8), 0
        while more := len(stream.read(_CHUNK)):
            after += more
    if after:
        notes.append(f"after the {nz} x {ny} x {nx} numbers that its header counts there are {after} bytes, not read.")
    if isinstance(data, np.memmap):
        return data
    if mode == 101:
        # Two to a byte, the first in the lower half.
        halves = np.stack((data & 15, data >> 4), axis=-1).reshape(nz, ny, -1)
        return np.ascontiguousarray(halves[:, :, :nx])
    data = data.view(dtype).reshape(nz, ny, nx)
    return data.astype(dtype.newbyteorder("="), copy=not data.flags.writeable)


def _bytes_kind(raw: bytes, words: list[int], order: str, notes: list[str]) -> str:
    """Signed, as MRC2014 has mode 0, or unsigned, where IMOD's flags or the header's own extremes say so."""
    if words[38] == _IMOD:
        if words[39] & 16:
            raise ValueError("each byte has two numbers of 4 bits (IMOD's flag 16); unpack it first, by IMOD's clip")
        return "i1" if words[39] & 1 else "u1"
    low, high = (float(v) for v in np.frombuffer(raw, f"{order}f4")[19:21])
    if low >= 0 and 127 < high <= 255:
        notes.append(f"its header has a largest value of {high:g}: bytes are read as unsigned, as before MRC2014.")
        return "u1"
    return "i1"


def _exactly(stream: BinaryIO, count: int, short: str = "") -> bytearray:
    """So many bytes, taking memory as they come."""
    content = bytearray()
    while len(content) < count:
        part = stream.read(min(_CHUNK, count - len(content)))
        if not part:
            raise ValueError(short or f"it ends in its extended header of {count} bytes")
        content += part
    return content
