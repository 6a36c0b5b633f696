"""RELION's table of particles: `read_relion_particles`.

A particle is turned by A = A_subtomogram A_particle, each the inverse of R_z(rot) R_y(tilt) R_z(psi), and is at
coordinate - A_subtomogram origin. rlnCenteredCoordinateXAngst counts from size / 2 of the tomogram, rlnCoordinateX from
its corner. The C++ programs of RELION 5 turn the specimen about size // 2 ("rounded"), so that for an odd size a
particle is half a pixel farther along the axis than its centred coordinate says (less than a nanometre, which is not
taken out of its height in the defocus); its Python code turns it about
size / 2 ("exact").

Reference:
    Burt et al. (2024), FEBS Open Bio 14, 1788; Zivanov et al. (2022), eLife 11, e83724.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from simulators.cryoet.formats.star import Table, listed, read_star
from simulators.cryoet.specimen.specimen import Specimen
from simulators.cryoet.tilt.parameters import Particle
from simulators.cryoet.tilt.relion_tables import Centre, middle, table_of_series


@dataclass(frozen=True, eq=False)
class RelionParticles:
    """Where particles are, and how they are turned.

    Args:
        tomograms: (n,) the name of each particle's tomogram.
        positions_angstrom: (n, 3) x, y, z from the point about which the specimen is turned [angstrom].
        angles_deg: (n, 3) rot, tilt, psi as `Particle` has them [degree].
        optics_groups: (n,) numbers, None where the file has none.
        assumed: what was taken for granted, in sentences.
    """

    tomograms: tuple[str, ...]
    positions_angstrom: Array
    angles_deg: Array
    optics_groups: NDArray[np.int64] | None
    assumed: tuple[str, ...]

    def turned_over(self) -> RelionParticles:
        """The particles of `RelionSeries.turned_over`: all turned by 180 degrees about y."""
        rot, tilt, psi = self.angles_deg.T
        # R_z(rot) R_y(tilt) R_z(psi) R_y(180) = R_z(rot + 180) R_y(180 - tilt) R_z(180 - psi).
        angles = np.stack([rot % 360.0 - 180.0, 180.0 - tilt, -psi % 360.0 - 180.0], axis=1)
        return replace(self, positions_angstrom=self.positions_angstrom * [-1.0, 1.0, -1.0], angles_deg=angles)

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


def read_relion_particles(
    path: str | Path,
    *,
    tomograms: str | Path | None = None,
    size_pixels: Sequence[float] | None = None,
    pixel_size_angstrom: float | None = None,
    angles_deg: Sequence[float] | None = None,
    centre: Centre | None = None,
) -> RelionParticles:
    """Reads poses from a table of particles of RELION 3.1 to 5. What it leaves open is asked for, never guessed.

    Args:
        path: the file, with the block `particles`, and `optics` where particles have optics groups.
        tomograms: the table of all series, for the tomograms' sizes and pixels.
        size_pixels: x, y, z of the tomograms in place of the tables' rlnTomoSizeX, Y and Z; these are needed where the
            places are rlnCoordinateX, Y and Z, which count from a corner. For rlnCenteredCoordinateXAngst, Y and Z they
            tell whether a size is odd.
        pixel_size_angstrom: what rlnCoordinateX, Y and Z count in, in place of rlnTomoTiltSeriesPixelSize of the optics
            group or of the table `tomograms` [angstrom].
        angles_deg: rot, tilt, psi of all particles; needed where there is no rlnAngleRot, Tilt and Psi [degree].
        centre: what the specimen is turned about, "rounded" (size // 2; RELION 5's C++ programs) or "exact" (size / 2);
            needed where a size is odd, and to be that of `read_relion_series`.

    Returns:
        the particles in the order of the file.

    Raises:
        InputError: a file that is missing, damaged or contradicts itself; a column missing for which no argument is
            given.
    """
    path = Path(path)
    assumed: list[str] = []
    source = _source(path, tomograms, pixel_size_angstrom, assumed)
    sizes = _sizes(source.names, tomograms, size_pixels)
    about = None if sizes is None else middle(sizes, centre, f"places in {str(path)!r}")
    places = _places(source, sizes, about, assumed)
    angles = _angles(source.table, angles_deg)
    origins = _origins(source.table, assumed)
    extracted = _three(source.table, "rlnTomoSubtomogram")
    if extracted is None:
        places = places - origins
    else:
        # A_subtomogram is the transpose of what the angles give.
        turn = _rotations(extracted)
        places = places - np.einsum("nji,nj->ni", turn, origins)
        angles = _euler(_rotations(angles) @ turn)
    groups = source.groups
    return RelionParticles(
        source.names, places, angles, None if groups is None else groups.astype(np.int64), tuple(assumed)
    )


# --- parts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Source:
    """The table of particles, and what tells the pixel that rlnCoordinateX counts in."""

    table: Table
    names: tuple[str, ...]  # of each particle's tomogram
    groups: Array | None
    optics: Table | None
    tomograms: str | Path | None
    pixel: float | None

    def pixels(self) -> Array:
        """(n,) what rlnCoordinateX counts in [angstrom]."""
        column = "rlnTomoTiltSeriesPixelSize"
        pixels: Array | None = None
        if self.pixel is not None:
            pixels = np.full(self.table.rows, float(self.pixel))
        elif self.groups is not None and self.optics is not None and column in self.optics.columns:
            known = (self.optics.numbers(name).tolist() for name in ("rlnOpticsGroup", column))
            of = dict(zip(*known, strict=True))
            pixels = np.array([of[group] for group in self.groups.tolist()])
        elif self.tomograms is not None:
            found = _of_tomograms(self.names, self.tomograms, (column,))
            pixels = None if found is None else found[:, 0]
        if pixels is None:
            raise InputError(
                f"Expected the column {column} for the optics groups of {str(self.table.path)!r}, found none: "
                "rlnCoordinateX, Y and Z are in pixels of unknown size. Give pixel_size_angstrom=..., or "
                "tomograms='tomograms.star'."
            )
        if not (np.isfinite(pixels).all() and (pixels > 0).all()):
            raise InputError(
                f"Expected {column} > 0 for {str(self.table.path)!r}, got {pixels.min():g}. Give "
                "pixel_size_angstrom=..."
            )
        return pixels


def _source(path: Path, tomograms: str | Path | None, pixel: float | None, assumed: list[str]) -> _Source:
    """Reads the table of particles, and that of their optics groups."""
    blocks = read_star(path)
    table = blocks.get("particles") or (blocks.get("") if len(blocks) == 1 else None)
    if table is None:
        raise InputError(f"Expected the block data_particles in {str(path)!r}, got {listed(blocks)}.")
    table.check_rows()
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
    return _Source(table, names, groups, optics, tomograms, pixel)


def _places(source: _Source, sizes: Array | None, about: Array | None, assumed: list[str]) -> Array:
    """(n, 3) from the point `about` which the specimen is turned [angstrom], origins not yet taken off."""
    table, path = source.table, str(source.table.path)
    centred = table.together(tuple(f"rlnCenteredCoordinate{axis}Angst" for axis in "XYZ"))
    corner = table.together(tuple(f"rlnCoordinate{axis}" for axis in "XYZ"))
    if centred is not None:
        places = centred
        if sizes is None or about is None:
            assumed.append("Tomograms have even sizes: none are known (give tomograms=... or size_pixels=...).")
        elif (away := sizes / 2 - about).any():
            places = centred + away * source.pixels()[:, None]
        if corner is not None:
            assumed.append("Places are rlnCenteredCoordinateXAngst, YAngst, ZAngst, not rlnCoordinateX, Y, Z.")
        return places
    if corner is None:
        raise InputError(
            f"Expected the columns rlnCenteredCoordinateXAngst, YAngst and ZAngst, or rlnCoordinateX, Y and Z, in "
            f"{path!r}, found neither: particles of single images have no place in a slab."
        )
    if about is None:
        raise InputError(
            f"Expected rlnTomoSizeX, Y and Z: rlnCoordinateX, Y and Z in {path!r} count from a corner of "
            "the tomogram. Give tomograms='tomograms.star', or size_pixels=(x, y, z)."
        )
    assumed.append("rlnCoordinateX, Y, Z count from the corner, as in RELION 5.")
    return (corner - about) * source.pixels()[:, None]


def _three(table: Table, stem: str) -> Array | None:
    """(n, 3) rot, tilt, psi [degree]."""
    return table.together(tuple(f"{stem}{angle}" for angle in ("Rot", "Tilt", "Psi")))


def _angles(table: Table, given: Sequence[float] | None) -> Array:
    """(n, 3) as given for all, else the table's [degree]."""
    own = _three(table, "rlnAngle")
    if given is None:
        if own is None:
            raise InputError(
                f"Expected the columns rlnAngleRot, rlnAngleTilt and rlnAnglePsi in {str(table.path)!r}, found none. "
                "Give angles_deg=(rot, tilt, psi) for all particles."
            )
        return own
    angles = np.asarray(given, dtype=float)
    if angles.shape != (3,) or not np.isfinite(angles).all():
        raise InputError(f"Expected angles_deg as three numbers, got {given!r}.")
    return np.tile(angles, (table.rows, 1))


def _origins(table: Table, assumed: list[str]) -> Array:
    """(n, 3) by which a particle is from where it was picked [angstrom]."""
    origins = table.together(tuple(f"rlnOrigin{axis}Angst" for axis in "XYZ"))
    if origins is None:
        if old := [c for c in ("rlnOriginX", "rlnOriginY", "rlnOriginZ") if c in table.columns]:
            raise InputError(
                f"Expected rlnOriginXAngst, YAngst and ZAngst in {str(table.path)!r}, got {', '.join(old)} in pixels, "
                "of before RELION 3.1. Multiply them by the pixel and rename them."
            )
        assumed.append("Origins are nought: there is no rlnOriginXAngst, YAngst, ZAngst.")
        origins = np.zeros((table.rows, 3))
    return origins


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
    table = table_of_series(Path(tomograms))
    values = table.together(columns)
    rows = {name: table.row_of(name) for name in set(names)}
    return None if values is None else values[[rows[name] for name in names]]


def _sizes(names: Sequence[str], tomograms: str | Path | None, given: Sequence[float] | None) -> Array | None:
    """(n, 3) of each particle's tomogram, or (3,) of all [pixels]; None where no file tells."""
    columns = ("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ")
    size = np.asarray(given, dtype=float) if given is not None else None
    if size is None and tomograms is not None:
        size = _of_tomograms(names, tomograms, columns)
    if size is None:
        return None
    if size.shape[-1] != 3 or size.ndim > 2 or not (np.isfinite(size).all() and (size > 0).all()):
        raise InputError(f"Expected three sizes > 0 of tomograms, got {size.tolist()[:3]}. Give size_pixels=(x, y, z).")
    return size


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
