"""RELION's STAR tables: `read_relion_series`, `read_relion_particles`, the inverse of what `write_tilt_series` writes.

RELION 5 sees a point p of the specimen [angstrom, from the middle of the tomogram] at the pixel

    centre + (R_z(rlnTomoZRot) R_y(rlnTomoYTilt) R_x(rlnTomoXTilt) p + shift) / pixel,    centre = n / 2,

with shift = (rlnTomoXShiftAngst, rlnTomoYShiftAngst), added and of the image; `TiltSeries` has centre = n // 2, so for
an odd number n of pixels its shifts are half a pixel larger. (RELION's C++ programs round its centre down; this is
the centre of its Python programs.) The defocus at this point is larger by rlnTomoHand times its height in the beam. A
particle is turned by A = A_subtomogram A_particle, each the inverse of R_z(rot) R_y(tilt) R_z(psi), and is at
coordinate - A_subtomogram origin.

Reference:
    Burt et al. (2024), FEBS Open Bio 14, 1788; Zivanov et al. (2022), eLife 11, e83724.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import InputError
from simulators.cryoet.files import YAxis, read_oriented
from simulators.cryoet.specimen import Specimen
from simulators.cryoet.star import LARGEST, Table, is_file, listed, read_star
from simulators.cryoet.tilt_files import RecordedSeries
from simulators.cryoet.tilt_parameters import Particle
from simulators.cryoet.tilt_scheme import TiltScheme

Array = NDArray[np.float64]


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
        hand: 1 where height adds to the underfocus, as it does in `TiltSeries`; -1 where it takes from it.
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


@dataclass(frozen=True, eq=False)
class RelionParticles:
    """Where particles are, and how they are turned.

    Args:
        tomograms: (n,) the name of each particle's tomogram.
        positions_angstrom: (n, 3) x, y, z from the middle of the tomogram [angstrom].
        angles_deg: (n, 3) rot, tilt, psi as `Particle` has them [degree].
        optics_groups: (n,) numbers, None where the file has none.
        assumed: what was taken for granted, in sentences.
    """

    tomograms: tuple[str, ...]
    positions_angstrom: Array
    angles_deg: Array
    optics_groups: NDArray[np.int64] | None
    assumed: tuple[str, ...]

    def particles(
        self, specimen: Specimen | str | Path | Mapping[str, Any], tomogram: str | None = None
    ) -> list[Particle]:
        """The particles of one tomogram, for `TiltSeries`.

        Args:
            specimen: what each is, see `Specimen.from_options`.
            tomogram: its name; needed where there are several.

        Raises:
            InputError: an unknown tomogram, or none named among several.
        """
        known = sorted(set(self.tomograms))
        if tomogram is None and len(known) > 1:
            raise InputError(
                f"Expected particles of one tomogram, got {len(known)}. Give tomogram=, one of {known[:9]}."
            )
        wanted = known[0] if tomogram is None else tomogram
        if wanted not in known:
            raise InputError(f"Unknown tomogram {wanted!r}. Known: {', '.join(known[:9])}.")
        shared: Any = Specimen.from_options(specimen)
        rows = zip(self.tomograms, self.positions_angstrom.tolist(), self.angles_deg.tolist(), strict=True)
        return [Particle(shared, *place, *angles) for name, place, angles in rows if name == wanted]


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
) -> RelionSeries:
    """Reads one tilt series of RELION 5, its images included. What tables leave open is asked for, never guessed.

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

    Returns:
        the series, sorted by tilt.

    Raises:
        InputError: a file that is missing, damaged or contradicts another; a column missing for which no argument is
            given.
    """
    path = Path(path)
    folder = path.parent if project is None else Path(project)
    table = _with_names(path)
    row = table.row_of(name)
    name = table.texts("rlnTomoName")[row]
    assumed: list[str] = []

    def setting(column: str, argument: str, given: float | None) -> float:
        if given is not None:
            if not abs(given) <= LARGEST:
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
    if "rlnTomoTiltSeriesStarFile" not in table.columns:
        raise InputError(f"Expected the column rlnTomoTiltSeriesStarFile in {str(path)!r}, as RELION 5 has it.")
    tilts = _block(folder / table.texts("rlnTomoTiltSeriesStarFile")[row], name, "project")
    n = tilts.rows
    images, edges = _images(tilts, folder, stack, y_axis)
    # 0 and 1 are what many programs write for an unknown pixel.
    differ = [edge for edge in edges if edge not in (0.0, 1.0) and abs(edge / pixel - 1) > 0.01]
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
        rows, columns = images.shape[1:]
        shifts = shifts - np.array([columns // 2 - columns / 2, rows // 2 - rows / 2]) * pixel
    principal = tilts.together(("rlnDefocusU", "rlnDefocusV"))
    turned = tilts.optional("rlnDefocusAngle")
    if principal is not None and turned is None:
        if (principal[:, 0] != principal[:, 1]).any():
            raise InputError(
                f"Expected the column rlnDefocusAngle in {str(tilts.path)!r}: rlnDefocusU is not rlnDefocusV."
            )
        turned = np.zeros(n)
    size = table.together(("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"))
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
        size_pixels=None if size is None else (float(size[row, 0]), float(size[row, 1]), float(size[row, 2])),
        assumed=tuple(assumed),
    )


def read_relion_particles(
    path: str | Path,
    *,
    tomograms: str | Path | None = None,
    size_pixels: Sequence[float] | None = None,
    pixel_size_angstrom: float | None = None,
    angles_deg: Sequence[float] | None = None,
) -> RelionParticles:
    """Reads poses from a table of particles of RELION 3.1 to 5. What it leaves open is asked for, never guessed.

    Args:
        path: the file, with the block `particles`, and `optics` where particles have optics groups.
        tomograms: the table of all series, for the tomograms' sizes and pixels.
        size_pixels: x, y, z of the tomograms in place of the tables' rlnTomoSizeX, Y and Z; these are needed where the
            places are rlnCoordinateX, Y and Z, which count from a corner, the middle being half the size.
        pixel_size_angstrom: what rlnCoordinateX, Y and Z count in, in place of rlnTomoTiltSeriesPixelSize of the optics
            group or of the table `tomograms` [angstrom].
        angles_deg: rot, tilt, psi of all particles; needed where there is no rlnAngleRot, Tilt and Psi [degree].

    Returns:
        the particles in the order of the file.

    Raises:
        InputError: a file that is missing, damaged or contradicts itself; a column missing for which no argument is
            given.
    """
    path = Path(path)
    blocks = read_star(path)
    table = blocks.get("particles") or (blocks.get("") if len(blocks) == 1 else None)
    if table is None:
        raise InputError(f"Expected the block data_particles in {str(path)!r}, got {listed(blocks)}.")
    table.check_rows()
    assumed: list[str] = []
    namesake = "rlnTomoName" if "rlnTomoName" in table.columns else "rlnMicrographName"
    if namesake not in table.columns:
        raise InputError(f"Expected the column rlnTomoName (or rlnMicrographName) in {str(path)!r}, found neither.")
    if namesake != "rlnTomoName":
        assumed.append("Tomograms are named by rlnMicrographName: there is no rlnTomoName.")
    names = tuple(table.texts(namesake))
    groups = table.optional("rlnOpticsGroup")
    optics = blocks.get("optics")
    if optics is not None:
        optics.check_rows()
    if groups is not None:
        _check_groups(groups, optics, path)

    centred = table.together(tuple(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"))
    corner = table.together(tuple(f"rlnCoordinate{axis}" for axis in "XYZ"))
    if centred is not None:
        places = centred
        if corner is not None:
            assumed.append("Places are rlnCenteredCoordinateXAngst, YAngst, ZAngst, not rlnCoordinateX, Y, Z.")
    elif corner is not None:
        pixels = _particle_pixels(table, names, groups, optics, tomograms, pixel_size_angstrom)
        places = (corner - 0.5 * _sizes(table, names, tomograms, size_pixels)) * pixels[:, None]
        assumed.append("rlnCoordinateX, Y, Z count from the corner, the middle being half the size, as in RELION 5.")
    else:
        raise InputError(
            f"Expected the columns rlnCenteredCoordinateXAngst, YAngst and ZAngst, or rlnCoordinateX, Y and Z, in "
            f"{str(path)!r}, found neither: particles of single images have no place in a slab."
        )

    def angles(stem: str) -> Array | None:
        return table.together(tuple(f"{stem}{angle}" for angle in ("Rot", "Tilt", "Psi")))

    own = angles("rlnAngle")
    if own is None or angles_deg is not None:
        if angles_deg is None:
            raise InputError(
                f"Expected the columns rlnAngleRot, rlnAngleTilt and rlnAnglePsi in {str(path)!r}, found none. Give "
                "angles_deg=(rot, tilt, psi) for all particles."
            )
        given = np.asarray(angles_deg, dtype=float)
        if given.shape != (3,) or not np.isfinite(given).all():
            raise InputError(f"Expected angles_deg as three numbers, got {angles_deg!r}.")
        own = np.tile(given, (table.rows, 1))
    origins = table.together(tuple(f"rlnOrigin{axis}Angst" for axis in "XYZ"))
    if origins is None:
        if old := [c for c in ("rlnOriginX", "rlnOriginY", "rlnOriginZ") if c in table.columns]:
            raise InputError(
                f"Expected rlnOriginXAngst, YAngst and ZAngst in {str(path)!r}, got {', '.join(old)} in pixels, of "
                "before RELION 3.1. Multiply them by the pixel and rename them."
            )
        assumed.append("Origins are nought: there is no rlnOriginXAngst, YAngst, ZAngst.")
        origins = np.zeros((table.rows, 3))
    extracted = angles("rlnTomoSubtomogram")
    if extracted is None:
        places = places - origins
    else:
        # A_subtomogram is the transpose of what the angles give.
        turn = _rotations(extracted)
        places = places - np.einsum("nji,nj->ni", turn, origins)
        own = _euler(_rotations(own) @ turn)
    return RelionParticles(names, places, own, None if groups is None else groups.astype(np.int64), tuple(assumed))


# --- of a series --------------------------------------------------------------------------------------------------


def _with_names(path: Path) -> Table:
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


def _images(
    tilts: Table, folder: Path, stack: str | Path | None, y_axis: YAxis | None
) -> tuple[NDArray[Any], tuple[float, float]]:
    """The images in the order of the table, and the edges of their pixels, as positive numbers."""
    if stack is not None:
        images, size, _ = read_oriented(stack, y_axis)
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
    found = []
    for name in names:
        match = re.fullmatch(r"(\d{1,9})@(.+)", name, re.ASCII)
        file = name if match is None else match[2]
        if file not in opened:
            if not is_file(folder / file):
                raise InputError(
                    f"Expected an image at {str(folder / file)!r}, as {str(tilts.path)!r} has it, found none. Give "
                    "project=..., the folder from which paths in the tables count, or stack=..."
                )
            images, size, _ = read_oriented(folder / file, y_axis)
            opened[file] = images, (abs(size[0]), abs(size[1]))
        images = opened[file][0]
        if match is None and len(images) != 1:
            raise InputError(f"Expected one image in {file!r}, got {len(images)}: write N@{file} in rlnMicrographName.")
        section = 1 if match is None else int(match[1])
        if not 1 <= section <= len(images):
            raise InputError(f"Expected image {section} in {file!r}, as {str(tilts.path)!r} has it, got {len(images)}.")
        found.append(images[section - 1])
    shapes, edges = {image.shape for image in found}, [size for _, size in opened.values()]
    if len(shapes) != 1 or not np.allclose(edges, edges[0], rtol=1e-3):
        raise InputError(
            f"Expected images of one shape and pixel in {str(tilts.path)!r}, got shapes {sorted(shapes)[:3]} and "
            f"pixels of {sorted({edge[0] for edge in edges})[:3]} angstrom."
        )
    return np.stack(found), edges[0]


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


# --- of particles -------------------------------------------------------------------------------------------------


def _check_groups(groups: Array, optics: Table | None, path: Path) -> None:
    if optics is None or "rlnOpticsGroup" not in optics.columns:
        raise InputError(f"Expected the block data_optics with rlnOpticsGroup in {str(path)!r}: particles name groups.")
    known = optics.numbers("rlnOpticsGroup")
    if len(np.unique(known)) != len(known):
        raise InputError(f"Expected each rlnOpticsGroup once in data_optics of {str(path)!r}, got some again.")
    if unknown := sorted(set(groups.tolist()) - set(known.tolist())):
        raise InputError(
            f"Unknown optics groups {unknown[:5]} of particles in {str(path)!r}. Known: "
            f"{', '.join(f'{group:g}' for group in known[:9])}."
        )
    if (groups != np.round(groups)).any():
        raise InputError(f"Expected whole numbers as rlnOpticsGroup in {str(path)!r}.")


def _of_tomograms(names: Sequence[str], tomograms: str | Path, columns: tuple[str, ...]) -> Array | None:
    """Columns of the table of all series, for each particle (n, columns)."""
    table = _with_names(Path(tomograms))
    values = table.together(columns)
    rows = {name: table.row_of(name) for name in set(names)}
    return None if values is None else values[[rows[name] for name in names]]


def _sizes(table: Table, names: Sequence[str], tomograms: str | Path | None, given: Sequence[float] | None) -> Array:
    """(n, 3) of each particle's tomogram, or (3,) of all [pixels]."""
    columns = ("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ")
    size = np.asarray(given, dtype=float) if given is not None else None
    if size is None and tomograms is not None:
        size = _of_tomograms(names, tomograms, columns)
    if size is None:
        raise InputError(
            f"Expected rlnTomoSizeX, Y and Z: rlnCoordinateX, Y and Z in {str(table.path)!r} count from a corner of "
            "the tomogram. Give tomograms='tomograms.star', or size_pixels=(x, y, z)."
        )
    if size.shape[-1] != 3 or size.ndim > 2 or not (np.isfinite(size).all() and (size > 0).all()):
        raise InputError(f"Expected three sizes > 0 of tomograms, got {size.tolist()[:3]}. Give size_pixels=(x, y, z).")
    return size


def _particle_pixels(
    table: Table,
    names: Sequence[str],
    groups: Array | None,
    optics: Table | None,
    tomograms: str | Path | None,
    given: float | None,
) -> Array:
    """(n,) what rlnCoordinateX counts in [angstrom]."""
    column = "rlnTomoTiltSeriesPixelSize"
    pixels: Array | None = None
    if given is not None:
        pixels = np.full(table.rows, float(given))
    elif groups is not None and optics is not None and column in optics.columns:
        of = dict(zip(optics.numbers("rlnOpticsGroup").tolist(), optics.numbers(column).tolist(), strict=True))
        pixels = np.array([of[group] for group in groups.tolist()])
    elif tomograms is not None:
        found = _of_tomograms(names, tomograms, (column,))
        pixels = None if found is None else found[:, 0]
    if pixels is None:
        raise InputError(
            f"Expected the column {column} for the optics groups of {str(table.path)!r}, found none: rlnCoordinateX, Y "
            "and Z are in pixels of unknown size. Give pixel_size_angstrom=..., or tomograms='tomograms.star'."
        )
    if not (np.isfinite(pixels).all() and (pixels > 0).all()):
        raise InputError(
            f"Expected {column} > 0 for {str(table.path)!r}, got {pixels.min():g}. Give pixel_size_angstrom=..."
        )
    return pixels


def _rotations(angles_deg: Array) -> Array:
    """R_z(rot) R_y(tilt) R_z(psi), (n, 3, 3)."""
    (a, b, c), (d, e, f) = np.cos(np.radians(angles_deg)).T, np.sin(np.radians(angles_deg)).T
    rows = [
        [a * b * c - d * f, -a * b * f - d * c, a * e],
        [d * b * c + a * f, -d * b * f + a * c, d * e],
        [-e * c, e * f, b],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _euler(matrices: Array) -> Array:
    """The angles (n, 3) [degree] of `_rotations`, tilt from 0 to 180; psi is 0 where only its sum with rot counts."""
    r = np.moveaxis(matrices, 0, -1)
    sine = np.hypot(r[0, 2], r[1, 2])
    along = sine < 1e-9
    rot = np.where(along, np.arctan2(r[1, 0], r[1, 1]), np.arctan2(r[1, 2], r[0, 2]))
    psi = np.where(along, 0.0, np.arctan2(r[2, 1], -r[2, 0]))
    return np.degrees(np.stack([rot, np.arctan2(sine, r[2, 2]), psi], axis=1))
