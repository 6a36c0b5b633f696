"""RELION's tables of tilt series: `read_relion_series`, the inverse of what `write_tilt_series` writes.

RELION sees a point p of the specimen [angstrom, from the point that it turns the specimen about] at the pixel

    centre + (R_z(rlnTomoZRot) R_y(rlnTomoYTilt) R_x(rlnTomoXTilt) p + shift) / pixel

with shift = (rlnTomoXShiftAngst, rlnTomoYShiftAngst), added and of the image. Programs differ in the centre of an odd
number n of pixels: "rounded", n // 2, in the C++ programs of RELION 5, which reconstruct and extract
(`Tomogram::setProjectionMatrix`), as in `TiltSeries`; "exact", n / 2, in its Python code, so that `TiltSeries` has
shifts half a pixel larger. A file does not tell which of them its shifts are for, so the reader asks.

The underfocus at this point is larger by rlnTomoHand times its height, the z of the rotated p; in `TiltSeries` the
height is always added. A series of hand -1 is one of hand 1 seen from the other side, which is exact: with
Q = R_y(180), Q R_z(a) R_y(b) R_x(c) Q = R_z(-a) R_y(b) R_x(-c), and Q turns x and z round: columns run backwards, tilts
stay, and the specimen is turned, not mirrored. `RelionSeries.turned_over` and `RelionParticles.turned_over` do this.

Reference:
    Burt et al. (2024), FEBS Open Bio 14, 1788; Zivanov et al. (2022), eLife 11, e83724.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array, is_number
from bridge.errors import InputError
from simulators.cryoet.formats.micrographs import YAxis, read_oriented
from simulators.cryoet.formats.star import LARGEST, NUMBER, Table, is_file, listed, read_star
from simulators.cryoet.tilt.files import RecordedSeries
from simulators.cryoet.tilt.scheme import TiltScheme

Centre = Literal["rounded", "exact"]
_OTHER_HAND = "The hand is -1, and that of TiltSeries 1: take turned_over() of the series and of the particles."


@dataclass(frozen=True, eq=False)
class RelionSeries:
    """A tilt series as RELION's tables have it, images sorted by tilt; what no file told is None.

    Args:
        name: rlnTomoName.
        recorded: images, pixel, tilts (rlnTomoYTilt, which includes a pre-tilt, where there is one), axis, shifts,
            doses and mean defocus as `TiltSeries` has them.
        voltage_kv: [kV].
        cs_mm: spherical aberration [mm].
        amplitude_contrast: the part of the contrast that is amplitude's.
        hand: 1 where height adds to the underfocus, as it does in `TiltSeries`; -1 where it takes from it: see
            `turned_over`.
        nominal_deg: (images,) tilts of the stage [degree].
        x_tilt_deg: [degree].
        astigmatism_um: (images,) half the difference of the principal defoci.
        astigmatism_angle_deg: (images,) direction of rlnDefocusU, from +x to +y [degree].
        exposures_e_per_angstrom2: (images,) before each image.
        size_pixels: of the tomogram x, y, z, in the pixels of the images.
        assumed: what was taken for granted, in sentences.
    """

    name: str
    recorded: RecordedSeries
    voltage_kv: float
    cs_mm: float
    amplitude_contrast: float
    hand: int
    nominal_deg: Array | None
    x_tilt_deg: float | None
    astigmatism_um: Array | None
    astigmatism_angle_deg: Array | None
    exposures_e_per_angstrom2: Array | None
    size_pixels: tuple[float, float, float] | None
    assumed: tuple[str, ...]

    def turned_over(self) -> RelionSeries:
        """The same series seen from the other side, columns backwards: it has the other hand.

        Where `hand` is -1 this is what `TiltSeries` wants, with particles that are turned over as well.
        """
        recorded, shifts = self.recorded, self.recorded.shifts_angstrom
        columns = recorded.images.shape[2]
        if shifts is not None:
            # Column j becomes n - 1 - j: the centre n // 2 becomes itself, or for an even n the column before it.
            first = (columns - 1 - 2 * (columns // 2)) * recorded.pixel_size_angstrom
            shifts = np.stack([first - shifts[:, 0], shifts[:, 1]], axis=1)
        axis, angles = recorded.tilt_axis_deg, self.astigmatism_angle_deg
        assumed = tuple(line for line in self.assumed if line != _OTHER_HAND)
        turned = replace(
            recorded,
            images=np.ascontiguousarray(recorded.images[:, :, ::-1]),
            tilt_axis_deg=None if axis is None else -axis,
            shifts_angstrom=shifts,
        )
        return replace(
            self,
            recorded=turned,
            hand=-self.hand,
            x_tilt_deg=None if self.x_tilt_deg is None else -self.x_tilt_deg,
            astigmatism_angle_deg=None if angles is None else -angles,
            assumed=assumed if self.hand < 0 else (*assumed, _OTHER_HAND),
        )


def read_relion_series(
    path: str | Path,
    name: str | None = None,
    *,
    project: str | Path | None = None,
    stack: str | Path | None = None,
    pixel_size_angstrom: float | None = None,
    hand: int | None = None,
    voltage_kv: float | None = None,
    cs_mm: float | None = None,
    amplitude_contrast: float | None = None,
    order: Sequence[int] | None = None,
    last_dose_e_per_angstrom2: float | None = None,
    y_axis: YAxis | None = None,
    centre: Centre | None = None,
) -> RelionSeries:
    """Reads one tilt series of RELION 5 or 4, its images included. What tables leave open is asked for, never guessed.

    RELION 4 has one file of all tables, and projection matrices in place of angles and shifts: see `_from_matrices`.

    A table cut off between two rows is a shorter table, as one is from which images were taken out.

    Args:
        path: the table of all series (`tilt_series.star`, `tomograms.star`).
        name: rlnTomoName of the series; needed where there are several.
        project: the folder from which paths in the tables count; by default that of `path`.
        stack: the images in the order of the series' table, in place of rlnMicrographName.
        pixel_size_angstrom: in place of rlnTomoTiltSeriesPixelSize [angstrom].
        hand: in place of rlnTomoHand: 1 or -1.
        voltage_kv, cs_mm, amplitude_contrast: in place of rlnVoltage, rlnSphericalAberration, rlnAmplitudeContrast.
        order: (images,) when each row's image was taken, 0 for the first; by default from rlnMicrographPreExposure.
        last_dose_e_per_angstrom2: of the image taken last, in place of rlnTomoImportFractionalDose: the others' are the
            differences of rlnMicrographPreExposure. Without either there are no doses [e/angstrom^2].
        y_axis: see `read_stack`; the tables are those of the images as they then are.
        centre: what rlnTomoXShiftAngst and YShiftAngst count from, "rounded" (n // 2; RELION 5's C++ programs, and
            `write_tilt_series`) or "exact" (n / 2); needed where n, of the rows or columns, is odd.

    Returns:
        the series, sorted by tilt.

    Raises:
        InputError: a file that is missing, damaged or contradicts another; a column missing for which no argument is
            given.
    """
    path = Path(path)
    folder = path.parent if project is None else Path(project)
    table = table_of_series(path)
    row = table.row_of(name)
    name = table.texts("rlnTomoName")[row]
    assumed: list[str] = []

    def setting(column: str, argument: str, given: float | None) -> float:
        if given is not None:
            if not (is_number(given) and abs(given) <= LARGEST):
                raise InputError(f"Expected a number as {argument}, got {given!r}.")
            return float(given)
        if column not in table.columns:
            raise InputError(
                f"Expected the column {column} in {str(path)!r}, found none. Add it, or give {argument}=..."
            )
        return float(table.numbers(column)[row])

    pixel = setting("rlnTomoTiltSeriesPixelSize", "pixel_size_angstrom", pixel_size_angstrom)
    if not (np.isfinite(pixel) and pixel > 0):
        raise InputError(f"Expected rlnTomoTiltSeriesPixelSize > 0 in {str(path)!r}, got {pixel:g}. Give "
                         "pixel_size_angstrom=...")  # fmt: skip
    handedness = setting("rlnTomoHand", "hand", hand)
    if handedness not in (1.0, -1.0):
        raise InputError(f"Expected rlnTomoHand 1 or -1 in {str(path)!r}, got {handedness:g}. Give hand=...")
    voltage = setting("rlnVoltage", "voltage_kv", voltage_kv)
    cs = setting("rlnSphericalAberration", "cs_mm", cs_mm)
    contrast = setting("rlnAmplitudeContrast", "amplitude_contrast", amplitude_contrast)
    whole = table.together(("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"))
    if "rlnTomoTiltSeriesStarFile" in table.columns:
        tilts = _block(folder / table.texts("rlnTomoTiltSeriesStarFile")[row], name, "project")
        images, edges = _images(tilts, folder, stack, y_axis)
    else:
        tilts = _block(path, name, "project") if "rlnTomoTiltSeriesName" in table.columns else table
        if "rlnTomoProjX" not in tilts.columns:
            raise InputError(
                f"Expected the column rlnTomoTiltSeriesStarFile in {str(path)!r}, as RELION 5 has it, or "
                "rlnTomoTiltSeriesName, and rlnTomoProjX in the block of each series, as RELION 4 has them. Import the "
                "series into RELION 5."
            )
        if whole is None:
            raise InputError(f"Expected rlnTomoSizeX, Y and Z in {str(path)!r}: matrices of RELION 4 count from there.")
        name_of_stack = re.sub(r":mrcs?$", "", table.texts("rlnTomoTiltSeriesName")[row])
        images, edges = _images(tilts, folder, folder / name_of_stack if stack is None else stack, y_axis)
        tilts = _from_matrices(tilts, whole[row], np.array(images.shape[:0:-1]), pixel, centre)
    n = tilts.rows
    # 0 and 1 are what many programs write for an unknown pixel.
    differ = [edge for edge in edges if edge not in (0.0, 1.0) and np.isfinite(edge) and abs(edge / pixel - 1) > 0.01]
    if pixel_size_angstrom is None and differ:
        raise InputError(
            f"Expected one pixel size, got {differ[0]:g} angstrom in the images of {str(tilts.path)!r} and {pixel:g} "
            f"in {str(path)!r}. Give pixel_size_angstrom=..."
        )
    nominal = tilts.optional("rlnTomoNominalStageTiltAngle")
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
    exposures = tilts.optional("rlnMicrographPreExposure")
    if exposures is not None and exposures.min() < 0:
        raise InputError(f"Expected rlnMicrographPreExposure >= 0 in {str(tilts.path)!r}, got {exposures.min():g}.")
    if order is None:
        if exposures is None or len(np.unique(exposures)) != n:
            raise InputError(
                f"Expected the column rlnMicrographPreExposure in {str(tilts.path)!r}, another value for each image: "
                "it tells in which order they were taken. Give order=[...], 0 for the first taken."
            )
        order = np.argsort(np.argsort(exposures)).tolist()
    if sorted(order) != list(range(n)):
        raise InputError(f"Expected order as a permutation of 0 to {n - 1}, got {list(order)}.")
    if last_dose_e_per_angstrom2 is None:
        fraction = table.optional("rlnTomoImportFractionalDose")
        last_dose_e_per_angstrom2 = None if fraction is None else float(fraction[row])
    doses = _doses(exposures, order, last_dose_e_per_angstrom2, tilts.path, assumed)
    axis = tilts.single("rlnTomoZRot", assumed)
    if axis is None:
        axis = tilts.single("rlnTomoNominalTiltAxisAngle", assumed)
        if axis is not None:
            assumed.append("The tilt axis is rlnTomoNominalTiltAxisAngle: there is no rlnTomoZRot.")
    shifts = tilts.together(("rlnTomoXShiftAngst", "rlnTomoYShiftAngst"))
    if shifts is not None:
        size = np.array(images.shape[:0:-1])
        shifts = shifts + (middle(size, centre, f"rlnTomoXShiftAngst and YShiftAngst of {str(tilts.path)!r}")
                           - size // 2) * pixel  # fmt: skip
    principal = tilts.together(("rlnDefocusU", "rlnDefocusV"))
    turned = tilts.optional("rlnDefocusAngle")
    if principal is not None and turned is None:
        if (principal[:, 0] != principal[:, 1]).any():
            raise InputError(
                f"Expected the column rlnDefocusAngle in {str(tilts.path)!r}: rlnDefocusU is not rlnDefocusV."
            )
        turned = np.zeros(n)
    if handedness < 0:
        assumed.append(_OTHER_HAND)
    place = np.argsort(angles, kind="stable")

    def sort(values: Array | None) -> Array | None:
        return None if values is None else values[place]

    recorded = RecordedSeries(
        images[place],
        pixel,
        TiltScheme(tuple(angles[place].tolist()), tuple(int(order[i]) for i in place)),
        axis,
        sort(shifts),
        sort(doses),
        None if principal is None else sort(1e-4 * principal.mean(axis=1)),
    )
    return RelionSeries(
        name=name,
        recorded=recorded,
        voltage_kv=voltage,
        cs_mm=cs,
        amplitude_contrast=contrast,
        hand=int(handedness),
        nominal_deg=sort(nominal),
        x_tilt_deg=tilts.single("rlnTomoXTilt", assumed),
        astigmatism_um=None if principal is None else sort(0.5e-4 * (principal[:, 0] - principal[:, 1])),
        astigmatism_angle_deg=None if principal is None else sort(turned),
        exposures_e_per_angstrom2=sort(exposures),
        size_pixels=None if whole is None else (float(whole[row, 0]), float(whole[row, 1]), float(whole[row, 2])),
        assumed=tuple(assumed),
    )


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


def _block(path: Path, name: str, argument: str) -> Table:
    """The block of a series, or the only block, if it has no name."""
    blocks = read_star(path, f" Give {argument}=..., the folder from which paths in the tables count.")
    table = blocks.get(name) or (blocks.get("") if len(blocks) == 1 else None)
    if table is None:
        raise InputError(f"Expected the block data_{name} in {str(path)!r}, got {listed(blocks)}.")
    table.check_rows()
    return table


def _from_matrices(tilts: Table, size: Array, shape: Array, pixel: float, centre: Centre | None) -> Table:
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
    opened: dict[str, tuple[NDArray[Any], tuple[float, float]]] = {}
    chosen = []
    for name in names:
        match = re.fullmatch(r"(\d{1,9})@(.+)", name, re.ASCII)
        file = name if match is None else match[2]
        if file not in opened:
            if not is_file(folder / file):
                raise InputError(
                    f"Expected an image at {str(folder / file)!r}, as {str(tilts.path)!r} has it, found none. Give "
                    "project=..., the folder from which paths in the tables count, or stack=..."
                )
            read = read_oriented(folder / file, y_axis)
            opened[file] = read.images, (abs(read.edges[0]), abs(read.edges[1]))
        images = opened[file][0]
        if match is None and len(images) != 1:
            raise InputError(f"Expected one image in {file!r}, got {len(images)}: write N@{file} in rlnMicrographName.")
        section = 1 if match is None else int(match[1])
        if not 1 <= section <= len(images):
            raise InputError(f"Expected image {section} in {file!r}, as {str(tilts.path)!r} has it, got {len(images)}.")
        chosen.append(images[section - 1])
    shapes, edges = {image.shape for image in chosen}, [size for _, size in opened.values()]
    if len(shapes) != 1 or not np.allclose(edges, edges[0], rtol=1e-3):
        raise InputError(
            f"Expected images of one shape and pixel in {str(tilts.path)!r}, got shapes {sorted(shapes)[:3]} and "
            f"pixels of {sorted({edge[0] for edge in edges})[:3]} angstrom."
        )
    return np.stack(chosen), edges[0]


def _doses(
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
