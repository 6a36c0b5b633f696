"""RELION's tables of one tilt series, step by step: what each column says, and what is asked for where it is missing.

`simulators.cryoet.tilt.relion` says what the columns mean, and puts the steps together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array, is_number
from bridge.errors import InputError
from simulators.cryoet.formats.micrographs import YAxis, read_oriented
from simulators.cryoet.formats.star import LARGEST, NUMBER, Table, is_file, listed, read_star

Centre = Literal["rounded", "exact"]
# Columns of the table of all series, and the arguments that take their place.
_INSTRUMENT = (
    ("rlnTomoTiltSeriesPixelSize", "pixel_size_angstrom"),
    ("rlnTomoHand", "hand"),
    ("rlnVoltage", "voltage_kv"),
    ("rlnSphericalAberration", "cs_mm"),
    ("rlnAmplitudeContrast", "amplitude_contrast"),
)


class Instrument(NamedTuple):
    """What the table of all series says of the microscope, in the order of `_INSTRUMENT`."""

    pixel_size_angstrom: float
    hand: float
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float


@dataclass(frozen=True)
class Source:
    """Where images are, and what positions in them count from: `folder` is that of the tables' paths."""

    folder: Path
    stack: str | Path | None
    y_axis: YAxis | None
    centre: Centre | None


# --- the table of all series ----------------------------------------------------------------------------------------


def table_of_series(path: Path) -> Table:
    """The table of all series."""
    blocks = read_star(path)
    found = [table for table in blocks.values() if "rlnTomoName" in table.columns]
    if len(found) != 1:
        raise InputError(f"Expected one block with rlnTomoName in {str(path)!r} ({listed(blocks)}), got {len(found)}.")
    found[0].check_rows()
    names = found[0].texts("rlnTomoName")
    if len(set(names)) != len(names):
        raise InputError(f"Expected each rlnTomoName once in {str(path)!r}, got some again.")
    return found[0]


def instrument(table: Table, row: int, *given: float | None) -> Instrument:
    """The settings of a series, each as given or as its row says."""
    path, found = str(table.path), []
    for (column, argument), own in zip(_INSTRUMENT, given, strict=True):
        value = _setting(table, row, column, argument, own)
        if argument == "pixel_size_angstrom" and not (np.isfinite(value) and value > 0):
            raise InputError(f"Expected {column} > 0 in {path!r}, got {value:g}. Give {argument}=...")
        if argument == "hand" and value not in (1.0, -1.0):
            raise InputError(f"Expected {column} 1 or -1 in {path!r}, got {value:g}. Give {argument}=...")
        found.append(value)
    return Instrument(*found)


def _setting(table: Table, row: int, column: str, argument: str, given: float | None) -> float:
    if given is not None:
        if not (is_number(given) and abs(given) <= LARGEST):
            raise InputError(f"Expected a number as {argument}, got {given!r}.")
        return float(given)
    if column not in table.columns:
        raise InputError(
            f"Expected the column {column} in {str(table.path)!r}, found none. Add it, or give {argument}=..."
        )
    return float(table.numbers(column)[row])


# --- the table of one series, and its images ------------------------------------------------------------------------


def tilts_and_images(
    table: Table, row: int, size: Array | None, pixel: float, source: Source
) -> tuple[Table, NDArray[Any], tuple[float, float]]:
    """The table of a series with RELION 5's columns, its images in that order, and the edges of their pixels."""
    name = table.texts("rlnTomoName")[row]
    if "rlnTomoTiltSeriesStarFile" in table.columns:
        tilts = _block(source.folder / table.texts("rlnTomoTiltSeriesStarFile")[row], name, "project")
        return tilts, *_images(tilts, source.folder, source.stack, source.y_axis)
    tilts = _block(table.path, name, "project") if "rlnTomoTiltSeriesName" in table.columns else table
    if "rlnTomoProjX" not in tilts.columns:
        raise InputError(
            f"Expected the column rlnTomoTiltSeriesStarFile in {str(table.path)!r}, as RELION 5 has it, or "
            "rlnTomoTiltSeriesName, and rlnTomoProjX in the block of each series, as RELION 4 has them. Import the "
            "series into RELION 5."
        )
    if size is None:
        raise InputError(
            f"Expected rlnTomoSizeX, Y and Z in {str(table.path)!r}: matrices of RELION 4 count from there."
        )
    stack = source.stack
    if stack is None:
        stack = source.folder / re.sub(r":mrcs?$", "", table.texts("rlnTomoTiltSeriesName")[row])
    images, edges = _images(tilts, source.folder, stack, source.y_axis)
    return from_matrices(tilts, size, np.array(images.shape[:0:-1]), pixel, source.centre), images, edges


def _block(path: Path, name: str, argument: str) -> Table:
    """The block of a series, or the only block, if it has no name."""
    blocks = read_star(path, f" Give {argument}=..., the folder from which paths in the tables count.")
    table = blocks.get(name) or (blocks.get("") if len(blocks) == 1 else None)
    if table is None:
        raise InputError(f"Expected the block data_{name} in {str(path)!r}, got {listed(blocks)}.")
    table.check_rows()
    return table


def check_edges(edges: Sequence[float], pixel: float, tilts: Table, table: Table) -> None:
    """Refuses images whose pixel is not that of the table of all series."""
    # 0 and 1 are what many programs write for an unknown pixel.
    differ = [edge for edge in edges if edge not in (0.0, 1.0) and np.isfinite(edge) and abs(edge / pixel - 1) > 0.01]
    if differ:
        raise InputError(
            f"Expected one pixel size, got {differ[0]:g} angstrom in the images of {str(tilts.path)!r} and {pixel:g} "
            f"in {str(table.path)!r}. Give pixel_size_angstrom=..."
        )


def _images(
    tilts: Table, folder: Path, stack: str | Path | None, y_axis: YAxis | None
) -> tuple[NDArray[Any], tuple[float, float]]:
    """The images in the order of the table, and the edges of their pixels, as positive numbers."""
    if stack is not None:
        found = read_oriented(stack, y_axis)
        images, size = found.images, found.edges
        if len(images) != tilts.rows:
            raise InputError(
                f"Expected {tilts.rows} images in {str(stack)!r}, as {str(tilts.path)!r} has rows, got {len(images)}."
            )
        return images, (abs(size[0]), abs(size[1]))
    if "rlnMicrographName" not in tilts.columns:
        raise InputError(f"Expected the column rlnMicrographName in {str(tilts.path)!r}, found none. Give stack=...")
    names = tilts.texts("rlnMicrographName")
    if len(set(names)) != len(names):
        raise InputError(f"Expected each rlnMicrographName once in {str(tilts.path)!r}, got some again.")
    return _named_images(names, tilts.path, folder, y_axis)


def _named_images(
    names: Sequence[str], table: Path, folder: Path, y_axis: YAxis | None
) -> tuple[NDArray[Any], tuple[float, float]]:
    """Images called FILE, or N@FILE where a file has several."""
    opened: dict[str, tuple[NDArray[Any], tuple[float, float]]] = {}
    chosen = []
    for name in names:
        match = re.fullmatch(r"(\d{1,9})@(.+)", name, re.ASCII)
        file = name if match is None else match[2]
        if file not in opened:
            if not is_file(folder / file):
                raise InputError(
                    f"Expected an image at {str(folder / file)!r}, as {str(table)!r} has it, found none. Give "
                    "project=..., the folder from which paths in the tables count, or stack=..."
                )
            read = read_oriented(folder / file, y_axis)
            opened[file] = read.images, (abs(read.edges[0]), abs(read.edges[1]))
        images = opened[file][0]
        if match is None and len(images) != 1:
            raise InputError(f"Expected one image in {file!r}, got {len(images)}: write N@{file} in rlnMicrographName.")
        section = 1 if match is None else int(match[1])
        if not 1 <= section <= len(images):
            raise InputError(f"Expected image {section} in {file!r}, as {str(table)!r} has it, got {len(images)}.")
        chosen.append(images[section - 1])
    shapes, edges = {image.shape for image in chosen}, [size for _, size in opened.values()]
    if len(shapes) != 1 or not np.allclose(edges, edges[0], rtol=1e-3):
        raise InputError(
            f"Expected images of one shape and pixel in {str(table)!r}, got shapes {sorted(shapes)[:3]} and "
            f"pixels of {sorted({edge[0] for edge in edges})[:3]} angstrom."
        )
    return np.stack(chosen), edges[0]


# --- what the rows say ----------------------------------------------------------------------------------------------


def middle(size: Array, centre: Centre | None, what: str) -> Array:
    """Where the middle of so many pixels is, or the error that asks for `centre`."""
    if centre is not None and centre not in get_args(Centre):
        raise InputError(f"Unknown centre={centre!r}. Known: {', '.join(get_args(Centre))}.")
    if centre is None and (size % 2 != 0).any():
        odd = ", ".join(f"{n:g}" for n in np.unique(size[size % 2 != 0])[:3])
        raise InputError(
            f"Expected to be told the centre of an odd size ({odd}), from which {what} count. Give centre='rounded' "
            "(n // 2, as RELION 5's C++ programs have it, which reconstruct and extract) or centre='exact' (n / 2, as "
            "its Python code and others have it)."
        )
    return size / 2 if centre == "exact" else np.floor(size / 2)


def tilt_angles(tilts: Table, nominal: Array | None, assumed: list[str]) -> Array:
    """rlnTomoYTilt, or the tilts of the stage [degree]."""
    angles = tilts.optional("rlnTomoYTilt")
    if angles is None:
        if nominal is None:
            raise InputError(
                f"Expected the column rlnTomoYTilt or rlnTomoNominalStageTiltAngle in {str(tilts.path)!r}, found none."
            )
        angles = nominal
        assumed.append("Tilts are those of the stage: there is no rlnTomoYTilt.")
    if (abs(angles) > 90.0).any():
        raise InputError(f"Expected tilts within 90 degrees in {str(tilts.path)!r}, got {abs(angles).max():g}.")
    return angles


def exposures_before(tilts: Table) -> Array | None:
    """rlnMicrographPreExposure [e/angstrom^2]."""
    exposures = tilts.optional("rlnMicrographPreExposure")
    if exposures is not None and exposures.min() < 0:
        raise InputError(f"Expected rlnMicrographPreExposure >= 0 in {str(tilts.path)!r}, got {exposures.min():g}.")
    return exposures


def checked_order(order: Sequence[int] | None, exposures: Array | None, tilts: Table) -> Sequence[int]:
    """When each row's image was taken, 0 for the first: as given, else by what each had seen before."""
    n = tilts.rows
    if order is None:
        if exposures is None or len(np.unique(exposures)) != n:
            raise InputError(
                f"Expected the column rlnMicrographPreExposure in {str(tilts.path)!r}, another value for each image: "
                "it tells in which order they were taken. Give order=[...], 0 for the first taken."
            )
        order = np.argsort(np.argsort(exposures)).tolist()
    if sorted(order) != list(range(n)):
        raise InputError(f"Expected order as a permutation of 0 to {n - 1}, got {list(order)}.")
    return order


def dose_of_last(table: Table, row: int, given: float | None) -> float | None:
    """The dose of the image taken last, as given or as the table of all series says."""
    fraction = None if given is not None else table.optional("rlnTomoImportFractionalDose")
    return given if fraction is None else float(fraction[row])


def doses_of_images(
    exposures: Array | None, order: Sequence[int], last: float | None, path: Path, assumed: list[str]
) -> Array | None:
    """Of each image, by what the next one had seen before."""
    if last is not None and not 0 < last < LARGEST:
        raise InputError(
            f"Expected a dose > 0 of the last image of {str(path)!r}, got {last:g}. Give last_dose_e_per_angstrom2=..."
        )
    if exposures is None:
        return None
    if last is None:
        assumed.append(
            "There are no doses: rlnMicrographPreExposure does not tell that of the last image. Give "
            "last_dose_e_per_angstrom2."
        )
        return None
    sequence = np.argsort(np.asarray(order))
    steps = np.append(np.diff(exposures[sequence]), last)
    if steps.min() < 0:
        raise InputError(f"Expected rlnMicrographPreExposure to grow with order in {str(path)!r}, got it to fall.")
    if steps.max() > 1.05 * steps.min():
        assumed.append("Doses differ: that of an image taken out of the table counts to the image taken before it.")
    if exposures.min() > 0:
        assumed.append(f"Before the first image there was an exposure of {exposures.min():g} e/angstrom^2.")
    doses = np.empty(len(steps))
    doses[sequence] = steps
    return doses


def tilt_axis(tilts: Table, assumed: list[str]) -> float | None:
    """rlnTomoZRot, or the nominal axis [degree]."""
    axis = tilts.single("rlnTomoZRot", assumed)
    if axis is None:
        axis = tilts.single("rlnTomoNominalTiltAxisAngle", assumed)
        if axis is not None:
            assumed.append("The tilt axis is rlnTomoNominalTiltAxisAngle: there is no rlnTomoZRot.")
    return axis


def shifts_from_rounded(tilts: Table, shape: Array, pixel: float, centre: Centre | None) -> Array | None:
    """(images, 2) shifts as `TiltSeries` counts them, from pixel n // 2 [angstrom]."""
    shifts = tilts.together(("rlnTomoXShiftAngst", "rlnTomoYShiftAngst"))
    if shifts is None:
        return None
    about = middle(shape, centre, f"rlnTomoXShiftAngst and YShiftAngst of {str(tilts.path)!r}")
    return shifts + (about - shape // 2) * pixel


def defoci(tilts: Table) -> tuple[Array | None, Array | None]:
    """(images, 2) principal defoci [angstrom], and (images,) the direction of the first [degree]."""
    principal = tilts.together(("rlnDefocusU", "rlnDefocusV"))
    turned = tilts.optional("rlnDefocusAngle")
    if principal is not None and turned is None:
        if (principal[:, 0] != principal[:, 1]).any():
            raise InputError(
                f"Expected the column rlnDefocusAngle in {str(tilts.path)!r}: rlnDefocusU is not rlnDefocusV."
            )
        turned = np.zeros(tilts.rows)
    return principal, turned


# --- matrices of RELION 4 -------------------------------------------------------------------------------------------


def from_matrices(tilts: Table, size: Array, shape: Array, pixel: float, centre: Centre | None) -> Table:
    """The table of a series of RELION 4 with RELION 5's columns.

    The rows X, Y, Z and W of a matrix bring a voxel of the tomogram, counted from its corner, to pixels x, y and to a
    depth: R p + t, and R = R_z(rlnTomoZRot) R_y(rlnTomoYTilt) R_x(rlnTomoXTilt). Where the middle of the tomogram is
    seen, from the middle of the image, is the shift.
    """
    matrices = np.stack([_quadruples(tilts, f"rlnTomoProj{axis}") for axis in "XYZ"], axis=1)
    r, t = matrices[:, :, :3], matrices[:, :, 3]
    if not np.allclose(r @ r.swapaxes(1, 2), np.eye(3), atol=0.02) or (np.linalg.det(r) < 0).any():
        raise InputError(
            f"Expected projection matrices that turn and shift in data_{tilts.name} of {str(tilts.path)!r}, got some "
            "that enlarge, distort or mirror: a tilt series here has one magnification."
        )
    about = middle(size, centre, f"the matrices of {str(tilts.path)!r}")
    seen = (r @ about + t)[:, :2] - middle(shape, centre, f"the matrices of {str(tilts.path)!r}")
    found = {
        "rlnTomoXTilt": np.degrees(np.arctan2(r[:, 2, 1], r[:, 2, 2])),
        "rlnTomoYTilt": -np.degrees(np.arcsin(np.clip(r[:, 2, 0], -1, 1))),
        "rlnTomoZRot": np.degrees(np.arctan2(r[:, 1, 0], r[:, 0, 0])),
        "rlnTomoXShiftAngst": seen[:, 0] * pixel,
        "rlnTomoYShiftAngst": seen[:, 1] * pixel,
    }
    columns = {name: [f"{value:.12f}" for value in values] for name, values in found.items()}
    return Table(tilts.path, tilts.name, {**tilts.columns, **columns})


def _quadruples(tilts: Table, column: str) -> Array:
    """(rows, 4) of a column of texts like [1,0,0,-2.5]."""
    if column not in tilts.columns:
        raise InputError(f"Expected the column {column} in data_{tilts.name} of {str(tilts.path)!r}, found none.")
    rows = []
    for i, text in enumerate(tilts.columns[column], start=1):
        parts = text.strip().strip("[]").split(",")
        values = [float(part) if NUMBER.fullmatch(part.strip()) else np.nan for part in parts]
        if len(values) != 4 or not np.abs(values).max() <= LARGEST:
            raise InputError(
                f"Expected four numbers like [1,0,0,-2.5] in row {i} of {column} in data_{tilts.name} of "
                f"{str(tilts.path)!r}, got {text[:60]!r}."
            )
        rows.append(values)
    return np.array(rows)
