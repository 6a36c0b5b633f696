"""A tilt series on disk, as IMOD, SerialEM's readers and RELION 5 expect it.

Of a series `name` are written:

* `name.mrc`: the stack; `name.rawtlt`: nominal tilts; `name.tlt`, `name.xtilt`: tilts with the pre-tilt, and x-tilts;
* `name.xf`: A11 A12 A21 A22 DX DY [pixels] of each image, which bring it to where the tilt axis is y and the specimen's
  origin in the middle, as IMOD counts it (n / 2 from the edge of the first pixel);
* `name.mdoc`: pixel, voltage, and of each image tilt, rotation of the axis, doses, defocus (negative: underfocus);
* `name_series.star`, `name_tilts.star`, `name_particles.star`: RELION 5's tables (defocus in angstrom, positive).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from bridge.errors import InputError
from simulators.cryoet.files import write_stack
from simulators.cryoet.tilt_scheme import TiltScheme
from simulators.cryoet.tilt_series import TiltSeries


def write_tilt_series(
    folder: str | Path, name: str, series: TiltSeries, images: ArrayLike, parameters: ArrayLike | None = None
) -> list[Path]:
    """Writes a series' images and what is known of them; each file appears whole, and takes the place of an older one.

    Args:
        folder: where; made if missing.
        name: of the series: letters, digits, "-", "_" and ".".
        series: the simulator.
        images: (images, rows, columns).
        parameters: (d,) inputs at which the images were made; None for `series.reference`.

    Returns:
        the files.

    Raises:
        InputError: another shape, or a name that is none for files.
    """
    stack = np.asarray(images)
    if stack.shape != series.output_shape:
        raise InputError(f"Expected images of shape {series.output_shape}, got {stack.shape}.")
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise InputError(f"Expected a name of letters, digits, '-', '_' and '.', got {name!r}.")
    values = series.settings(series.reference if parameters is None else parameters)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_stack(folder / f"{name}.mrc", stack, series.pixel_size_angstrom)
    texts = {
        ".rawtlt": _lines(series.nominal_deg, "{:.2f}"),
        ".tlt": _lines([values[f"tilt_deg[{t}]"] + values["pre_tilt_deg"] for t in range(len(stack))], "{:.4f}"),
        ".xtilt": _lines([values["x_tilt_deg"]] * len(stack), "{:.4f}"),
        ".xf": _transforms(series, values),
        ".mdoc": _mdoc(name, series, values),
        "_series.star": _series_star(name, series, values),
        "_tilts.star": _tilts_star(name, series, values),
        "_particles.star": _particles_star(name, series, values),
    }
    files = [folder / f"{name}.mrc"]
    for suffix, text in texts.items():
        files.append(folder / f"{name}{suffix}")
        _write_text(files[-1], text)
    return files


def _write_text(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _lines(values: Sequence[float], form: str) -> str:
    return "".join(form.format(value) + "\n" for value in values)


def _transforms(series: TiltSeries, values: Mapping[str, float]) -> str:
    angle = math.radians(values["tilt_axis_deg"])
    # Turns the image by minus the axis' angle.
    a = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    rows, columns = series.output_shape[1:]
    # Our origin is the middle of pixel n // 2, IMOD's n / 2 pixels from the edge.
    origin = np.array([columns // 2 + 0.5 - columns / 2, rows // 2 + 0.5 - rows / 2])
    lines = []
    for t in range(series.output_shape[0]):
        shift = np.array([values[f"shift_{axis}_angstrom[{t}]"] for axis in "xy"]) / series.pixel_size_angstrom
        lines.append(" ".join(f"{v:12.7f}" for v in a.ravel()) + " ".join(f"{v:12.3f}" for v in -a @ (shift + origin)))
    return "\n".join(lines) + "\n"


def _prior(series: TiltSeries, values: Mapping[str, float], image: int) -> float:
    return sum(values[f"dose_e_per_angstrom2[{t}]"] for t in cast(TiltScheme, series.scheme).earlier(image))


def _mdoc(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    images, rows, columns = series.output_shape
    lines = [
        f"PixelSpacing = {series.pixel_size_angstrom:g}",
        f"Voltage = {values['voltage_kv']:g}",
        f"ImageFile = {name}.mrc",
        f"ImageSize = {columns} {rows}",
        "DataMode = 2",
        "",
        f"[T = Tilt axis angle = {values['tilt_axis_deg']:.2f}]",
        "",
    ]
    for t in range(images):
        lines += [
            f"[ZValue = {t}]",
            f"TiltAngle = {values[f'tilt_deg[{t}]']:.4f}",
            f"RotationAngle = {values['tilt_axis_deg']:.4f}",
            f"PixelSpacing = {series.pixel_size_angstrom:g}",
            f"ExposureDose = {values[f'dose_e_per_angstrom2[{t}]']:.6g}",
            f"PriorRecordDose = {_prior(series, values, t):.6g}",
            f"Defocus = {-values[f'defocus_um[{t}]']:.6g}",
            "",
        ]
    return "\n".join(lines)


def _star(block: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    lines = [f"data_{block}", "", "loop_"]
    lines += [f"_{column} #{i}" for i, column in enumerate(columns, start=1)]
    lines += ["\t".join(v if isinstance(v, str) else f"{v:.6f}" if isinstance(v, float) else str(v) for v in row)
              for row in rows]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n\n"


def _series_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnTomoName", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast",
               "rlnMicrographOriginalPixelSize", "rlnTomoTiltSeriesPixelSize", "rlnTomoHand",
               "rlnTomoTiltSeriesStarFile"]  # fmt: skip
    pixel = float(series.pixel_size_angstrom)
    row: list[str | int | float] = [
        name,
        values["voltage_kv"],
        values["cs_mm"],
        values["amplitude_contrast"],
        pixel,
        pixel,
        1.0,
    ]
    return _star("global", columns, [[*row, f"{name}_tilts.star"]])


def _tilts_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnMicrographName", "rlnTomoNominalStageTiltAngle", "rlnMicrographPreExposure", "rlnDefocusU",
               "rlnDefocusV", "rlnDefocusAngle", "rlnTomoXTilt", "rlnTomoYTilt", "rlnTomoZRot", "rlnTomoXShiftAngst",
               "rlnTomoYShiftAngst"]  # fmt: skip
    images, rows, columns_ = series.output_shape
    # RELION's origin is n / 2 pixels, ours n // 2.
    origin = [(n // 2 - n / 2) * series.pixel_size_angstrom for n in (columns_, rows)]
    astigmatism = 1e4 * values["astigmatism_um"]
    table: list[list[str | int | float]] = []
    for t in range(images):
        defocus = 1e4 * values[f"defocus_um[{t}]"]
        table.append(
            [f"{t + 1}@{name}.mrc", float(series.nominal_deg[t]), float(_prior(series, values, t)),
             defocus + astigmatism, defocus - astigmatism, values["astigmatism_angle_deg"], values["x_tilt_deg"],
             values[f"tilt_deg[{t}]"] + values["pre_tilt_deg"], values["tilt_axis_deg"],
             values[f"shift_x_angstrom[{t}]"] + origin[0], values[f"shift_y_angstrom[{t}]"] + origin[1]]
        )  # fmt: skip
    return _star(name, columns, table)


def _particles_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnTomoName", "rlnCenteredCoordinateXAngst", "rlnCenteredCoordinateYAngst",
               "rlnCenteredCoordinateZAngst", "rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]  # fmt: skip
    keys = ("x_angstrom", "y_angstrom", "z_angstrom", "particle_rot_deg", "particle_tilt_deg", "particle_psi_deg")
    table: list[list[str | int | float]] = [
        [name, *(values[f"{key}[{i}]"] for key in keys)] for i in range(len(series.particles))
    ]
    return _star("particles", columns, table)
