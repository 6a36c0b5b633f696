"""Micrographs and stacks of them on disk: MRC2014, written whole or not at all; what is read is in `mrc`."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import is_number, unmasked_array
from bridge.errors import InputError
from simulators.cryoet.formats.mrc import import_mrcfile, read_mrc

_MODES = {np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.uint16)}


@dataclass(frozen=True, eq=False)
class Micrograph:
    """An image as read from a file.

    Args:
        image: (rows, columns), in the file's dtype.
        pixel_size_angstrom: [angstrom].
        label: the file's first label.
        notes: what was odd about the file, in sentences.
    """

    image: NDArray[Any]
    pixel_size_angstrom: float
    label: str
    notes: tuple[str, ...] = ()


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
    array = unmasked_array(image, "as an image")
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
    array = unmasked_array(images, "as images")
    if array.ndim != 3 or 0 in array.shape:
        raise InputError(f"Expected images of shape (images, rows, columns), got {array.shape}.")
    _write(Path(path), array, pixel_size_angstrom, label)


def _write(path: Path, array: NDArray[Any], pixel_size_angstrom: float, label: str) -> None:
    mrcfile = import_mrcfile()
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise InputError(f"Expected finite real numbers, got dtype {array.dtype} or NaN or infinity in the image.")
    array = array if array.dtype in _MODES else array.astype(np.float32)
    if not (is_number(pixel_size_angstrom) and pixel_size_angstrom > 0):
        raise InputError(f"Expected pixel_size_angstrom as a number > 0, got {pixel_size_angstrom!r}.")
    if not isinstance(label, str) or len(label) > 80 or not label.isascii():
        raise InputError(f"Expected a label of at most 80 ASCII characters, got {label!r}. Shorten it.")
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
        notes: what was odd about the file, in sentences.
    """

    images: NDArray[Any]
    pixel_size_angstrom: float
    label: str
    notes: tuple[str, ...] = ()


YAxis = Literal["down", "up", "across"]


def read_micrograph(
    path: str | Path, *, pixel_size_angstrom: float | None = None, y_axis: YAxis | None = None
) -> Micrograph:
    """Reads one image from an MRC file, plain or compressed (gzip, bzip2).

    Args:
        path: the file; a stack of a single image is taken as that image.
        pixel_size_angstrom, y_axis: as in `read_stack`.

    Returns:
        the image and its pixel size.

    Raises:
        InputError: as for `read_stack`, and where there are several images.
    """
    found = read_oriented(path, y_axis)
    shape = found.images.shape
    if len(found.images) != 1:
        raise InputError(f"Expected one image in {str(path)!r}, got an array of shape {shape}. Split the stack.")
    pixel = square_pixel(path, found.edges, pixel_size_angstrom)
    return Micrograph(found.images[0], pixel, found.label, found.notes)


def read_stack(
    path: str | Path,
    *,
    pixel_size_angstrom: float | None = None,
    y_axis: YAxis | None = None,
    memory_map: bool = False,
) -> Stack:
    """Reads all images of an MRC file. What its header leaves open is asked for, never guessed.

    Args:
        path: the file; a single image is taken as a stack of one.
        pixel_size_angstrom: in place of the header's; needed where that has none [angstrom].
        y_axis: where y runs in the file: "down", to larger rows, as usual; "up", to smaller rows: rows are then turned
            over; "across", to larger columns: images are then transposed. Needed where the header names other axes than
            columns along x and rows along y, or a negative cell.
        memory_map: images stay in the file until they are used, see `read_mrc`.

    Returns:
        the images and their pixel size.

    Raises:
        InputError: no such file, not MRC, truncated, not images, pixels that are not square, or an argument missing.
    """
    found = read_oriented(path, y_axis, memory_map=memory_map)
    return Stack(found.images, square_pixel(path, found.edges, pixel_size_angstrom), found.label, found.notes)


@dataclass(frozen=True, eq=False)
class Oriented:
    """Images with columns along x and rows along y.

    Args:
        images: (images, rows, columns).
        edges: of a pixel by the header, along x and y; 0 or not finite where it does not say [angstrom].
        label: the first label.
        notes: see `Stack`.
    """

    images: NDArray[Any]
    edges: tuple[float, float]
    label: str
    notes: tuple[str, ...]


def read_oriented(path: str | Path, y_axis: YAxis | None, *, memory_map: bool = False) -> Oriented:
    """The images as `y_axis` says they run, whatever their pixel."""
    if y_axis not in (None, "down", "up", "across"):
        raise InputError(f"Unknown y_axis={y_axis!r}. Known: down, up, across, or None.")
    content = read_mrc(path, memory_map=memory_map)
    header, images = content.header, content.data
    axes = (int(header.mapc), int(header.mapr), int(header.maps))
    sampling, cell = (int(header.mx), int(header.my)), (float(header.cella.x), float(header.cella.y))
    x, y = (edge / n if n > 0 else 0.0 for edge, n in zip(cell, sampling, strict=True))
    if y_axis is None and (axes not in ((1, 2, 3), (0, 0, 0)) or x < 0 or y < 0):
        raise InputError(
            f"Expected columns along x and rows along y (MAPC, MAPR, MAPS = 1, 2, 3, and a positive cell) in "
            f"{str(path)!r}, got axes {axes} and pixels of {(x, y)} angstrom. Say where y runs: y_axis='down' (to "
            "larger rows: as they stand), 'up' (rows are turned over) or 'across' (images are transposed)."
        )
    if y_axis == "up":
        images = images[:, ::-1]
    elif y_axis == "across":
        images = images.swapaxes(1, 2)
    if not memory_map:
        images = np.ascontiguousarray(images)
    return Oriented(images, (x, y), content.label, content.notes)


def square_pixel(path: str | Path, size: tuple[float, float], given: float | None) -> float:
    """The edge of a square pixel [angstrom]: the given one, else the header's."""
    if given is not None:
        if not (is_number(given) and given > 0):
            raise InputError(f"Expected pixel_size_angstrom as a number > 0, got {given!r}.")
        return float(given)
    edges = [abs(edge) for edge in size]
    if not all(0 < edge < np.inf for edge in edges):
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
