"""Micrographs and stacks of them on disk: MRC2014, written whole or not at all, read strictly."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def read_micrograph(path: str | Path) -> Micrograph:
    """Reads one image from an MRC file.

    Args:
        path: the file; a stack of a single image is taken as that image.

    Returns:
        the image and its pixel size.

    Raises:
        InputError: no such file, not MRC, truncated, several images, or pixels that are not square.
    """
    images, size, label = _read(Path(path))
    if len(images) != 1:
        raise InputError(f"Expected one image in {str(path)!r}, got an array of shape {images.shape}. Split the stack.")
    return Micrograph(images[0], _square(path, size), label)


def read_stack(path: str | Path) -> Stack:
    """Reads all images of an MRC file.

    Args:
        path: the file; a single image is taken as a stack of one.

    Returns:
        the images and their pixel size.

    Raises:
        InputError: no such file, not MRC, truncated, not images, or pixels that are not square.
    """
    images, size, label = _read(Path(path))
    return Stack(images, _square(path, size), label)


def _read(path: Path) -> tuple[NDArray[Any], tuple[float, float], str]:
    """The images (images, rows, columns), the pixel's edges [angstrom] and the first label of an MRC file."""
    mrcfile = _mrcfile()
    if not path.is_file():
        raise InputError(f"Expected an MRC file, found none at {str(path)!r}. Check the path.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with mrcfile.open(path, mode="r", permissive=False) as mrc:
                data = np.array(mrc.data)
                voxel = mrc.voxel_size
                size = (float(voxel.x), float(voxel.y))
                label = bytes(mrc.header.label[0]).decode("ascii", "replace").strip() if mrc.header.nlabl else ""
    except (ValueError, OSError, RuntimeWarning, EOFError) as error:
        raise InputError(
            f"Expected an MRC2014 file, got {str(path)!r}: {error}. Was it written completely, and is it MRC?"
        ) from error
    if data.ndim == 2:
        data = data[None]
    if data.ndim != 3:
        raise InputError(f"Expected images in {str(path)!r}, got an array of shape {data.shape}.")
    if data.dtype.kind not in "iuf" or not np.isfinite(data).all():
        raise InputError(f"Expected finite real numbers in {str(path)!r}, got dtype {data.dtype} or NaN or infinity.")
    return data, size, label


def _square(path: str | Path, size: tuple[float, float]) -> float:
    """The edge of a square pixel [angstrom]."""
    if not size[0] > 0 or abs(size[0] - size[1]) > 1e-4 * size[0]:
        raise InputError(
            f"Expected square pixels of known size in {str(path)!r}, got {size} angstrom. Set the header's cell."
        )
    return size[0]
