"""Micrographs and stacks of them on disk: MRC2014, written whole or not at all, read strictly."""

from __future__ import annotations

import gzip
import math
import os
import struct
import tempfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError, SetupError

_MODES = {np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.uint16)}


def _mrcfile() -> Any:
    try:
        import mrcfile
    except ImportError as error:
        raise SetupError(
            "Expected the package mrcfile, which cannot be imported. Install it: "
            'pip install "simulation-bridge[cryoet]".'
        ) from error
    return mrcfile


@dataclass(frozen=True, eq=False)
class Micrograph:
    """An image as read from a file.

    Args:
        image: (rows, columns), in the file's dtype.
        pixel_size_angstrom: [angstrom].
        label: the file's first label.
    """

    image: NDArray[Any]
    pixel_size_angstrom: float
    label: str


def write_micrograph(
    path: str | Path, image: ArrayLike, pixel_size_angstrom: float, label: str = "simulators.cryoet"
) -> None:
    """Writes one image as MRC2014: ISPG 0, voxel size from the pixel, one label.

    The file appears under its name only when it is complete; one that was there before is replaced.

    Args:
        path: file to write; its folder must exist.
        image: (rows, columns); float32, int8, int16 and uint16 are kept, other real numbers become float32 (mode 2).
        pixel_size_angstrom: [angstrom].
        label: up to 80 ASCII characters.

    Raises:
        InputError: wrong shape, not finite, a pixel size that is not positive, a label that is too long, or no such
            folder.
    """
    array = np.asarray(image)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"Expected an image of shape (rows, columns), got {array.shape}. Write one image at a time.")
    _write(Path(path), array, pixel_size_angstrom, label)


def write_stack(
    path: str | Path, images: ArrayLike, pixel_size_angstrom: float, label: str = "simulators.cryoet"
) -> None:
    """Writes images as one MRC2014 stack: ISPG 0, as many sections as images; otherwise as `write_micrograph`.

    The cell's third edge is that of a single voxel a section where sections have no thickness (MZ = 1), as the standard
    has it for stacks; readers of tilt series go by the first two.

    Args:
        path: file to write; its folder must exist.
        images: (images, rows, columns).
        pixel_size_angstrom: [angstrom].
        label: up to 80 ASCII characters.

    Raises:
        InputError: as for `write_micrograph`.
    """
    array = np.asarray(images)
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"Expected images of shape (images, rows, columns), got {array.shape}.")
    _write(Path(path), array, pixel_size_angstrom, label)


def _write(path: Path, array: NDArray[Any], pixel_size_angstrom: float, label: str) -> None:
    mrcfile = _mrcfile()
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"Expected finite real numbers, got dtype {array.dtype} or NaN or infinity in the image.")
    array = array if array.dtype in _MODES else array.astype(np.float32)
    if not (np.isfinite(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InputError(f"Expected pixel_size_angstrom > 0, got {pixel_size_angstrom!r}.")
    if len(label) > 80 or not label.isascii():
        raise InputError(f"Expected a label of at most 80 ASCII characters, got {len(label)}: {label!r}. Shorten it.")
    if not path.parent.is_dir():
        raise InputError(f"Expected the folder {str(path.parent)!r} to exist. Create it first.")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        with mrcfile.new(temporary, overwrite=True) as mrc:
            mrc.set_data(np.ascontiguousarray(array))
            if array.ndim == 3:
                mrc.set_image_stack()
            mrc.voxel_size = (pixel_size_angstrom, pixel_size_angstrom, pixel_size_angstrom)
            mrc.header.ispg = 0
            # One label of ours instead of the library's, which holds the time: equal images give equal files.
            mrc.header.label[:] = b""
            mrc.header.label[0] = label.encode("ascii")
            mrc.header.nlabl = 1
        # mkstemp makes the file private; give it the permissions that open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@dataclass(frozen=True, eq=False)
class Stack:
    """Images as read from a file.

    Args:
        images: (images, rows, columns), in the file's dtype.
        pixel_size_angstrom: [angstrom].
        label: the file's first label.
    """

    images: NDArray[Any]
    pixel_size_angstrom: float
    label: str


YAxis = Literal["down", "up", "across"]


def read_micrograph(
    path: str | Path, *, pixel_size_angstrom: float | None = None, y_axis: YAxis | None = None
) -> Micrograph:
    """Reads one image from an MRC file.

    Args:
        path: the file; a stack of a single image is taken as that image.
        pixel_size_angstrom, y_axis: as in `read_stack`.

    Returns:
        the image and its pixel size.

    Raises:
        InputError: as for `read_stack`, and where there are several images.
    """
    images, size, label = read_oriented(path, y_axis)
    if len(images) != 1:
        raise InputError(f"Expected one image in {str(path)!r}, got an array of shape {images.shape}. Split the stack.")
    return Micrograph(images[0], square_pixel(path, size, pixel_size_angstrom), label)


def read_stack(path: str | Path, *, pixel_size_angstrom: float | None = None, y_axis: YAxis | None = None) -> Stack:
    """Reads all images of an MRC file. What its header leaves open is asked for, never guessed.

    Args:
        path: the file; a single image is taken as a stack of one.
        pixel_size_angstrom: in place of the header's; needed where that has none [angstrom].
        y_axis: where y runs in the file: "down", to larger rows, as usual; "up", to smaller rows: rows are then turned
            over; "across", to larger columns: images are then transposed. Needed where the header names other axes than
            columns along x and rows along y, or a negative cell.

    Returns:
        the images and their pixel size.

    Raises:
        InputError: no such file, not MRC, truncated, not images, pixels that are not square, or an argument missing.
    """
    images, size, label = read_oriented(path, y_axis)
    return Stack(images, square_pixel(path, size, pixel_size_angstrom), label)


def read_oriented(path: str | Path, y_axis: YAxis | None) -> tuple[NDArray[Any], tuple[float, float], str]:
    """The images with columns along x and rows along y, the pixel's edges in the header, and the first label."""
    if y_axis not in (None, "down", "up", "across"):
        raise InputError(f"Unknown y_axis={y_axis!r}. Known: down, up, across, or None.")
    images, size, axes, label = _read(Path(path))
    if y_axis is None and (axes not in ((1, 2, 3), (0, 0, 0)) or min(size) < 0):
        raise InputError(
            f"Expected columns along x and rows along y (MAPC, MAPR, MAPS = 1, 2, 3, and a positive cell) in "
            f"{str(path)!r}, got axes {axes} and pixels of {size} angstrom. Say where y runs: y_axis='down' (to larger "
            "rows: as they stand), 'up' (rows are turned over) or 'across' (images are transposed)."
        )
    if y_axis == "up":
        images = np.ascontiguousarray(images[:, ::-1])
    elif y_axis == "across":
        images = np.ascontiguousarray(images.swapaxes(1, 2))
    return images, size, label


def square_pixel(path: str | Path, size: tuple[float, float], given: float | None) -> float:
    """The edge of a square pixel [angstrom]: the given one, else the header's."""
    if given is not None:
        if not (np.isfinite(given) and given > 0):
            raise InputError(f"Expected pixel_size_angstrom > 0, got {given!r}.")
        return float(given)
    edges = [abs(edge) for edge in size]
    if not (min(edges) > 0 and max(edges) < np.inf):
        raise InputError(
            f"Expected pixels of known size in {str(path)!r}, got {size} angstrom in its header. Give "
            "pixel_size_angstrom=..., or set the header's cell."
        )
    if abs(edges[0] - edges[1]) > 1e-4 * edges[0]:
        raise InputError(
            f"Expected square pixels in {str(path)!r}, got {size} angstrom. Give pixel_size_angstrom=... if the header "
            "is wrong, else resample the images."
        )
    return edges[0]


@dataclass(frozen=True, eq=False)
class MrcContent:
    """What an MRC file holds, as it stands in the file.

    Args:
        data: (sections, rows, columns), finite real numbers.
        header: mrcfile's, for what readers want of it.
        label: the first label.
    """

    data: NDArray[Any]
    header: Any
    label: str


def read_mrc(path: str | Path) -> MrcContent:
    """Reads an MRC2014 file, plain or compressed by gzip, strictly.

    Raises:
        InputError: no such file, not MRC, truncated (noticed before memory is taken for what the header claims), not
            three-dimensional, or not finite real numbers.
    """
    mrcfile, path = _mrcfile(), Path(path)
    if not path.is_file():
        raise InputError(f"Expected an MRC file, found none at {str(path)!r}. Check the path.")
    try:
        _check_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with mrcfile.open(path, mode="r", permissive=False) as mrc:
                data, header = np.array(mrc.data), mrc.header.copy()
        count = min(max(int(header.nlabl), 0), len(header.label))
        label = bytes(header.label[0]).decode("ascii", "replace").strip(" \0") if count else ""
    # What gzip and numpy raise for bytes that are not what they should be.
    except (ValueError, OSError, RuntimeWarning, EOFError, OverflowError, zlib.error, TypeError) as error:
        raise InputError(
            f"Expected an MRC2014 file, got {str(path)!r}: {error}. Was it written completely, and is it MRC?"
        ) from error
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3 or 0 in data.shape:
        raise InputError(f"Expected images or a volume in {str(path)!r}, got an array of shape {data.shape}.")
    if data.dtype.kind not in "iuf" or not np.isfinite(data).all():
        raise InputError(f"Expected finite real numbers in {str(path)!r}, got dtype {data.dtype} or NaN or infinity.")
    return MrcContent(data, header, label)


# Bytes of a number in each mode of MRC2014; half a byte in mode 101.
_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 6: 2, 12: 2, 101: 0.5}
# A deflated stream is at least this part of what it becomes.
_LARGEST_RATIO = 1032


def _check_size(path: Path) -> None:
    """Raises ValueError where the file is too short for what its header claims, before memory is taken for it."""
    with open(path, "rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path, "rb") if compressed else open(path, "rb") as stream:
        header = stream.read(1024)
    if len(header) < 1024:
        raise ValueError(f"it has {len(header)} bytes, and a header has 1024")
    order = ">" if header[212:214] == b"\x11\x11" else "<"
    nx, ny, nz, mode = struct.unpack(f"{order}4i", header[:16])
    (extended,) = struct.unpack(f"{order}i", header[92:96])
    if min(nx, ny, nz) < 1 or extended < 0 or mode not in _BYTES:
        raise ValueError(f"its header claims {nx} x {ny} x {nz} numbers of mode {mode} after {extended} bytes")
    needed = 1024 + extended + math.floor(nx * ny * nz * _BYTES[mode])
    available = path.stat().st_size * (_LARGEST_RATIO if compressed else 1)
    if needed > available:
        raise ValueError(
            f"its header claims {nx} x {ny} x {nz} numbers of mode {mode}, {needed} bytes, but the file has "
            f"{path.stat().st_size}{' compressed' if compressed else ''}"
        )


def _read(path: Path) -> tuple[NDArray[Any], tuple[float, float], tuple[int, int, int], str]:
    """The images (images, rows, columns), the pixel's edges [angstrom], the axes of columns, rows and sections (1 to 3
    for x, y and z; 0 where the header says nothing) and the first label of an MRC file."""
    content = read_mrc(path)
    header = content.header
    axes = (int(header.mapc), int(header.mapr), int(header.maps))
    sampling, cell = (int(header.mx), int(header.my)), (float(header.cella.x), float(header.cella.y))
    size = tuple(edge / n if n > 0 else 0.0 for edge, n in zip(cell, sampling, strict=True))
    return content.data, (size[0], size[1]), axes, content.label
