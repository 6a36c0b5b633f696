"""A tilt series to disk, as IMOD, SerialEM's readers and RELION 5 expect it: `write_tilt_series`.

Of a series `name` are written:

* `name.mrc`: the stack; `name.rawtlt`: nominal tilts; `name.tlt`, `name.xtilt`: tilts with the pre-tilt, and x-tilts;
* `name.xf`: A11 A12 A21 A22 DX DY [pixels] of each image, which bring it to where the tilt axis is y and the specimen's
  origin in the middle, as IMOD counts it (n / 2 from the edge of the first pixel);
* `name.mdoc`: pixel, voltage, the axis as a title, and of each image tilt, rotation (the axis and 90 degrees, as
  SerialEM counts it), doses, defocus (negative: underfocus; also as TargetDefocus);
* `name_series.star`, `name_tilts.star`, `name_particles.star`: RELION 5's tables (defocus in angstrom, positive), for
  its C++ programs, whose centre of an image is n // 2 as in `TiltSeries`. rlnTomoHand is 1: height adds to the
  underfocus. Tomograms have even sizes: those programs turn one of odd size, or of none, about a point half a pixel off
  its middle.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import ArrayLike

from bridge.arrays import unmasked_array
from bridge.errors import InputError
from simulators.cryoet.formats.mdoc import within_half_a_turn
from simulators.cryoet.formats.micrographs import write_stack
from simulators.cryoet.tilt.scheme import TiltScheme
from simulators.cryoet.tilt.series import TiltSeries


def write_tilt_series(
    folder: str | Path, name: str, series: TiltSeries, images: ArrayLike, parameters: ArrayLike | None = None
) -> list[Path]:
    """Writes a series' images and what is known of them; each file appears whole, and takes the place of an older one.

    NAME_truth.json has the parameters with their units, and all other settings by name, to the last bit:
    `series.space.vector({name: p["value"] for name, p in truth["parameters"].items()})` are the inputs again.

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
    stack = unmasked_array(images, "as images")
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
        "_truth.json": _truth(series, values),
    }
    files = [folder / f"{name}.mrc"]
    for suffix, text in texts.items():
        files.append(folder / f"{name}{suffix}")
        _write_text(files[-1], text)
    return files


def _truth(series: TiltSeries, values: Mapping[str, float]) -> str:
    known = {p.name: {"value": float(values[p.name]), "unit": p.unit} for p in series.space.parameters}
    content = {
        "pixel_size_angstrom": series.pixel_size_angstrom,
        "shape": list(series.output_shape),
        "parameters": known,
        "settings": {name: float(value) for name, value in values.items() if name not in known},
    }
    return json.dumps(content, indent=2) + "\n"


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
        f"[T =     Tilt axis angle = {within_half_a_turn(values['tilt_axis_deg']):.4f}, binning = 1]",
        "",
    ]
    for t in range(images):
        lines += [
            f"[ZValue = {t}]",
            f"TiltAngle = {values[f'tilt_deg[{t}]']:.4f}",
            f"RotationAngle = {within_half_a_turn(values['tilt_axis_deg'] + 90.0):.4f}",
            f"PixelSpacing = {series.pixel_size_angstrom:g}",
            f"ExposureDose = {values[f'dose_e_per_angstrom2[{t}]']:.6g}",
            f"PriorRecordDose = {_prior(series, values, t):.6g}",
            f"Defocus = {-values[f'defocus_um[{t}]']:.6g}",
            f"TargetDefocus = {-values[f'defocus_um[{t}]']:.6g}",
            "",
        ]
    return "\n".join(lines)


def _star(block: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    lines = [f"data_{block}", "", "loop_"]
    lines += [f"_{column} #{i}" for i, column in enumerate(columns, start=1)]
    lines += [
        "\t".join(v if isinstance(v, str) else f"{v:.6f}" if isinstance(v, float) else str(v) for v in row)
        for row in rows
    ]
    return "\n" + "\n".join(lines) + "\n\n"


def _series_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = [
        "rlnTomoName",
        "rlnVoltage",
        "rlnSphericalAberration",
        "rlnAmplitudeContrast",
        "rlnMicrographOriginalPixelSize",
        "rlnTomoTiltSeriesPixelSize",
        "rlnTomoHand",
        "rlnTomoSizeX",
        "rlnTomoSizeY",
        "rlnTomoSizeZ",
        "rlnTomoImportFractionalDose",
        "rlnTomoTiltSeriesStarFile",
    ]
    pixel = float(series.pixel_size_angstrom)
    rows, columns_ = series.output_shape[1:]
    heights = [abs(values[f"z_angstrom[{i}]"]) for i in range(len(series.particles))]
    depth = max(1.0, 0.5 * values["thickness_angstrom"] / pixel, *(height / pixel for height in heights))
    row: list[str | int | float] = [
        name,
        values["voltage_kv"],
        values["cs_mm"],
        values["amplitude_contrast"],
        pixel,
        pixel,
        1.0,
        columns_ + columns_ % 2,
        rows + rows % 2,
        2 * math.ceil(depth),
        # The tilts' table has what each image had seen before: with this one the doses of all are known.
        float(values[f"dose_e_per_angstrom2[{int(np.argmax(cast(TiltScheme, series.scheme).order))}]"]),
    ]
    return _star("global", columns, [[*row, f"{name}_tilts.star"]])


def _tilts_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = [
        "rlnMicrographName",
        "rlnTomoNominalStageTiltAngle",
        "rlnMicrographPreExposure",
        "rlnDefocusU",
        "rlnDefocusV",
        "rlnDefocusAngle",
        "rlnTomoXTilt",
        "rlnTomoYTilt",
        "rlnTomoZRot",
        "rlnTomoXShiftAngst",
        "rlnTomoYShiftAngst",
    ]
    images = series.output_shape[0]
    astigmatism = 1e4 * values["astigmatism_um"]
    table: list[list[str | int | float]] = []
    for t in range(images):
        defocus = 1e4 * values[f"defocus_um[{t}]"]
        table.append(
            [
                f"{t + 1}@{name}.mrc",
                float(series.nominal_deg[t]),
                float(_prior(series, values, t)),
                defocus + astigmatism,
                defocus - astigmatism,
                values["astigmatism_angle_deg"],
                values["x_tilt_deg"],
                values[f"tilt_deg[{t}]"] + values["pre_tilt_deg"],
                values["tilt_axis_deg"],
                values[f"shift_x_angstrom[{t}]"],
                values[f"shift_y_angstrom[{t}]"],
            ]
        )
    return _star(name, columns, table)


def _particles_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = [
        "rlnTomoName",
        "rlnCenteredCoordinateXAngst",
        "rlnCenteredCoordinateYAngst",
        "rlnCenteredCoordinateZAngst",
        "rlnAngleRot",
        "rlnAngleTilt",
        "rlnAnglePsi",
    ]
    keys = ("x_angstrom", "y_angstrom", "z_angstrom", "particle_rot_deg", "particle_tilt_deg", "particle_psi_deg")
    table: list[list[str | int | float]] = [
        [name, *(values[f"{key}[{i}]"] for key in keys)] for i in range(len(series.particles))
    ]
    return _star("particles", columns, table)
