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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from simulators.cryoet.formats.micrographs import YAxis
from simulators.cryoet.tilt.read import RecordedSeries
from simulators.cryoet.tilt.relion_tables import (
    Centre,
    Source,
    check_edges,
    checked_order,
    defoci,
    dose_of_last,
    doses_of_images,
    exposures_before,
    instrument,
    shifts_from_rounded,
    table_of_series,
    tilt_angles,
    tilt_axis,
    tilts_and_images,
)
from simulators.cryoet.tilt.scheme import TiltScheme

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

    RELION 4 has one file of all tables, and matrices in place of angles and shifts: see `relion_tables.from_matrices`.

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
    microscope = instrument(table, row, pixel_size_angstrom, hand, voltage_kv, cs_mm, amplitude_contrast)
    pixel = microscope.pixel_size_angstrom
    whole = table.together(("rlnTomoSizeX", "rlnTomoSizeY", "rlnTomoSizeZ"))
    size = None if whole is None else whole[row]
    tilts, images, edges = tilts_and_images(table, row, size, pixel, Source(folder, stack, y_axis, centre))
    if pixel_size_angstrom is None:
        check_edges(edges, pixel, tilts, table)
    assumed: list[str] = []
    nominal = tilts.optional("rlnTomoNominalStageTiltAngle")
    angles = tilt_angles(tilts, nominal, assumed)
    exposures = exposures_before(tilts)
    order = checked_order(order, exposures, tilts)
    last_dose = dose_of_last(table, row, last_dose_e_per_angstrom2)
    doses = doses_of_images(exposures, order, last_dose, tilts.path, assumed)
    axis = tilt_axis(tilts, assumed)
    shifts = shifts_from_rounded(tilts, np.array(images.shape[:0:-1]), pixel, centre)
    principal, turned = defoci(tilts)
    if microscope.hand < 0:
        assumed.append(_OTHER_HAND)
    place = np.argsort(angles, kind="stable")
    scheme = TiltScheme(tuple(angles[place].tolist()), tuple(int(order[i]) for i in place))
    shifts, doses, nominal, exposures = (_at(place, values) for values in (shifts, doses, nominal, exposures))
    principal, turned = _at(place, principal), _at(place, turned)
    defocus = None if principal is None else 1e-4 * principal.mean(axis=1)
    return RelionSeries(
        name=name,
        recorded=RecordedSeries(images[place], pixel, scheme, axis, shifts, doses, defocus),
        voltage_kv=microscope.voltage_kv,
        cs_mm=microscope.cs_mm,
        amplitude_contrast=microscope.amplitude_contrast,
        hand=int(microscope.hand),
        nominal_deg=nominal,
        x_tilt_deg=tilts.single("rlnTomoXTilt", assumed),
        astigmatism_um=None if principal is None else 0.5e-4 * (principal[:, 0] - principal[:, 1]),
        astigmatism_angle_deg=None if principal is None else turned,
        exposures_e_per_angstrom2=exposures,
        size_pixels=None if size is None else (float(size[0]), float(size[1]), float(size[2])),
        assumed=tuple(assumed),
    )


def _at(place: NDArray[np.intp], values: Array | None) -> Array | None:
    """The values of images in another order, where there are any."""
    return None if values is None else values[place]
