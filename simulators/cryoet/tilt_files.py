"""A tilt series on disk, as IMOD, SerialEM's readers and RELION 5 expect it: `write_tilt_series`, `read_tilt_series`.

Of a series `name` are written:

* `name.mrc`: the stack; `name.rawtlt`: nominal tilts; `name.tlt`, `name.xtilt`: tilts with the pre-tilt, and x-tilts;
* `name.xf`: A11 A12 A21 A22 DX DY [pixels] of each image, which bring it to where the tilt axis is y and the specimen's
  origin in the middle, as IMOD counts it (n / 2 from the edge of the first pixel);
* `name.mdoc`: pixel, voltage, the axis as a title, and of each image tilt, rotation (the axis and 90 degrees, as
  SerialEM counts it), doses, defocus (negative: underfocus);
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from simulators.cryoet.files import YAxis, read_oriented, square_pixel, write_stack
from simulators.cryoet.tilt_scheme import TiltScheme
from simulators.cryoet.tilt_series import TiltSeries


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
        f"[T =     Tilt axis angle = {_within_half_a_turn(values['tilt_axis_deg']):.4f}, binning = 1]",
        "",
    ]
    for t in range(images):
        lines += [
            f"[ZValue = {t}]",
            f"TiltAngle = {values[f'tilt_deg[{t}]']:.4f}",
            f"RotationAngle = {_within_half_a_turn(values['tilt_axis_deg'] + 90.0):.4f}",
            f"PixelSpacing = {series.pixel_size_angstrom:g}",
            f"ExposureDose = {values[f'dose_e_per_angstrom2[{t}]']:.6g}",
            f"PriorRecordDose = {_prior(series, values, t):.6g}",
            f"Defocus = {-values[f'defocus_um[{t}]']:.6g}",
            "",
        ]
    return "\n".join(lines)


def _within_half_a_turn(degrees: float) -> float:
    return (degrees + 180.0) % 360.0 - 180.0


def _star(block: str, columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    lines = [f"data_{block}", "", "loop_"]
    lines += [f"_{column} #{i}" for i, column in enumerate(columns, start=1)]
    lines += ["\t".join(v if isinstance(v, str) else f"{v:.6f}" if isinstance(v, float) else str(v) for v in row)
              for row in rows]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n\n"


def _series_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnTomoName", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast",
               "rlnMicrographOriginalPixelSize", "rlnTomoTiltSeriesPixelSize", "rlnTomoHand", "rlnTomoSizeX",
               "rlnTomoSizeY", "rlnTomoSizeZ", "rlnTomoTiltSeriesStarFile"]  # fmt: skip
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
    ]
    return _star("global", columns, [[*row, f"{name}_tilts.star"]])


def _tilts_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnMicrographName", "rlnTomoNominalStageTiltAngle", "rlnMicrographPreExposure", "rlnDefocusU",
               "rlnDefocusV", "rlnDefocusAngle", "rlnTomoXTilt", "rlnTomoYTilt", "rlnTomoZRot", "rlnTomoXShiftAngst",
               "rlnTomoYShiftAngst"]  # fmt: skip
    images = series.output_shape[0]
    astigmatism = 1e4 * values["astigmatism_um"]
    table: list[list[str | int | float]] = []
    for t in range(images):
        defocus = 1e4 * values[f"defocus_um[{t}]"]
        table.append(
            [f"{t + 1}@{name}.mrc", float(series.nominal_deg[t]), float(_prior(series, values, t)),
             defocus + astigmatism, defocus - astigmatism, values["astigmatism_angle_deg"], values["x_tilt_deg"],
             values[f"tilt_deg[{t}]"] + values["pre_tilt_deg"], values["tilt_axis_deg"],
             values[f"shift_x_angstrom[{t}]"], values[f"shift_y_angstrom[{t}]"]]
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


# --- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RecordedSeries:
    """A tilt series as recorded, images sorted by tilt; what no file told is None.

    Args:
        images: (images, rows, columns), in the file's dtype.
        pixel_size_angstrom: [angstrom].
        scheme: tilts, and the order in which they were taken.
        tilt_axis_deg: from +y through -x, as `TiltSeries` has it [degree].
        shifts_angstrom: (images, 2) as `TiltSeries` has them.
        doses_e_per_angstrom2: (images,) of each image.
        defocus_um: (images,) positive is underfocus.
    """

    images: NDArray[Any]
    pixel_size_angstrom: float
    scheme: TiltScheme
    tilt_axis_deg: float | None
    shifts_angstrom: NDArray[np.float64] | None
    doses_e_per_angstrom2: NDArray[np.float64] | None
    defocus_um: NDArray[np.float64] | None


def read_tilt_series(
    stack: str | Path,
    *,
    tilts: str | Path | None = None,
    mdoc: str | Path | None = None,
    transforms: str | Path | None = None,
    order: Sequence[int] | None = None,
    pixel_size_angstrom: float | None = None,
    y_axis: YAxis | None = None,
) -> RecordedSeries:
    """Reads a stack and the text files that belong to it. What they leave open is asked for, never guessed.

    Args:
        stack: MRC.
        tilts: `.rawtlt` or `.tlt`, a tilt a line in the order of the stack; by default those of `mdoc` [degree].
        mdoc: SerialEM's `.mdoc`: tilts, axis, doses (where all are 0 they are not known), defocus (negative is
            underfocus), pixel. The axis is that of the title "Tilt axis angle = ..." which IMOD reads, or RotationAngle
            less 90 degrees.
        transforms: `.xf`: the shifts, and the axis in place of that in `mdoc`.
        order: (images,) when each image of the stack was taken, 0 for the first; by default from the doses in `mdoc`.
        pixel_size_angstrom: in place of the files'; needed where they have none, or a stack's header says exactly 1
            angstrom, which is what many programs write for an unknown pixel, or stack and mdoc differ [angstrom].
        y_axis: see `read_stack`; text files are those of the images as they then are. Needed where transforms mirror.

    Returns:
        the series, sorted by tilt.

    Raises:
        InputError: a file that is missing, cannot be read or has another number of images; an argument missing.
    """
    sections = None if mdoc is None else _read_mdoc(Path(mdoc))
    read = read_oriented(stack, y_axis)
    images, edges = read.images, read.edges
    pixel = _pixel(stack, edges, mdoc, sections, pixel_size_angstrom)
    n = len(images)
    if tilts is not None:
        angles = _read_table(Path(tilts), 1)[:, 0]
    elif sections is not None:
        angles = _column(sections, "TiltAngle", Path(cast(str, mdoc)))
    else:
        raise InputError(f"Expected the tilts of {str(stack)!r}. Give tilts='...rawtlt' (or .tlt), or mdoc='...mdoc'.")
    if (abs(angles) > 90.0).any():
        worst = float(angles[np.argmax(abs(angles))])
        raise InputError(f"Expected tilts within 90 degrees in {str(tilts or mdoc)!r}, got {worst:g}.")
    moved = None if transforms is None else _read_table(Path(transforms), 6)
    for name, table in (("tilts", angles), ("mdoc", sections), ("transforms", moved), ("order", order)):
        if table is not None and len(table) != n:
            raise InputError(f"Expected {name} of {n} images, as {str(stack)!r} has, got {len(table)}.")
    axis = doses = defocus = shifts = None
    if sections is not None:
        path = Path(cast(str, mdoc))
        axis = _axis(sections, path)
        doses, defocus = _optional(sections, "ExposureDose", path), _optional(sections, "Defocus", path)
        if doses is not None and not doses.any():
            doses = None
        if defocus is not None:
            if (defocus > 0).any():
                raise InputError(
                    f"Expected Defocus in {str(path)!r} as SerialEM has it, negative for underfocus, got "
                    f"{float(defocus.max()):g} um. Turn the signs, or take the key out."
                )
            defocus = -defocus
        if order is None:
            prior = _optional(sections, "PriorRecordDose", path)
            if prior is not None and len(np.unique(prior)) == n:
                order = np.argsort(np.argsort(prior)).tolist()
    if order is None:
        raise InputError(
            f"Expected the order in which the images of {str(stack)!r} were taken: the specimen suffers. Give "
            "order=[...], 0 for the first taken, or an mdoc with PriorRecordDose."
        )
    if moved is not None:
        axis, shifts = _geometry(moved, images.shape[1:], pixel, transforms, y_axis)
    place = np.argsort(angles, kind="stable")
    scheme = TiltScheme(tuple(angles[place].tolist()), tuple(int(order[i]) for i in place))

    def sort(values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        return None if values is None else values[place]

    return RecordedSeries(images[place], pixel, scheme, axis, sort(shifts), sort(doses), sort(defocus))


def _pixel(
    stack: str | Path,
    edges: tuple[float, float],
    mdoc: str | Path | None,
    sections: Sequence[Mapping[str, float]] | None,
    given: float | None,
) -> float:
    """The pixel [angstrom]: the given one, else the mdoc's, else the header's; none that stands for an unknown one."""
    unknown = abs(edges[0]) in (0.0, 1.0)
    spacing = None if sections is None else sections[0].get("PixelSpacing")
    if given is None and spacing is None and abs(edges[0]) == 1.0:
        raise InputError(
            f"Expected pixels of known size in {str(stack)!r}; 1 angstrom exactly is what many programs write for an "
            "unknown one. Give pixel_size_angstrom=..., also if it is 1."
        )
    if given is None and spacing is not None and not unknown and abs(abs(edges[0]) / spacing - 1) > 0.01:
        raise InputError(
            f"Expected one pixel size, got {abs(edges[0]):g} angstrom in {str(stack)!r} and {spacing:g} in "
            f"{str(mdoc)!r}. Give pixel_size_angstrom=..."
        )
    return square_pixel(stack, edges, spacing if given is None else given)


def _text(path: Path) -> list[str]:
    try:
        # Comments and paths may be in any encoding; what is used is ASCII.
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"Expected a text file at {str(path)!r}, got: {error}. Check the path.") from error


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"Expected a number in line {line} of {str(path)!r}, got {text!r}.")
    return value


def _read_table(path: Path, columns: int) -> NDArray[np.float64]:
    rows = []
    for i, line in enumerate(_text(path), start=1):
        if parts := line.split():
            if len(parts) != columns:
                raise InputError(f"Expected {columns} numbers in line {i} of {str(path)!r}, got {line.strip()!r}.")
            rows.append([_number(part, path, i) for part in parts])
    return np.array(rows).reshape(-1, columns)


_MDOC = ("PixelSpacing", "TiltAngle", "RotationAngle", "ExposureDose", "PriorRecordDose", "Defocus")
_TITLE = "Tilt axis angle"


def _read_mdoc(path: Path) -> list[dict[str, float]]:
    """What is used of each section of an mdoc, its header's keys included, in the order of the stack."""
    common: dict[str, float] = {}
    sections: dict[int, dict[str, float]] = {}
    current = common
    for i, line in enumerate(_text(path), start=1):
        key, equals, value = (part.strip() for part in line.strip("[] ").partition("="))
        if key == "T" and value.startswith(_TITLE):
            common[_TITLE] = _number((value.partition("=")[2].replace(",", " ").split() or [""])[0], path, i)
        elif key == "ZValue":
            z = int(_number(value, path, i))
            if z in sections:
                raise InputError(f"Expected each ZValue once in {str(path)!r}, got {z} again in line {i}.")
            current = sections[z] = dict(common)
        elif equals and key in _MDOC and not line.lstrip().startswith("["):
            current[key] = _number(value, path, i)
    if sorted(sections) != list(range(len(sections))) or not sections:
        raise InputError(f"Expected sections [ZValue = 0], [ZValue = 1], ... in {str(path)!r}, got {sorted(sections)}.")
    return [sections[z] for z in sorted(sections)]


def _optional(sections: Sequence[Mapping[str, float]], key: str, path: Path) -> NDArray[np.float64] | None:
    found = [section[key] for section in sections if key in section]
    if found and len(found) != len(sections):
        raise InputError(f"Expected {key} in all {len(sections)} sections of {str(path)!r}, or none, got {len(found)}.")
    return np.array(found) if found else None


def _column(sections: Sequence[Mapping[str, float]], key: str, path: Path) -> NDArray[np.float64]:
    values = _optional(sections, key, path)
    if values is None:
        raise InputError(f"Expected {key} in the sections of {str(path)!r}, found none.")
    return values


def _axis(sections: Sequence[Mapping[str, float]], path: Path) -> float | None:
    """The tilt axis from +y through -x [degree]; None where the file does not say."""
    rotations = _optional(sections, "RotationAngle", path)
    if rotations is not None:
        around = rotations[0] + np.array([_within_half_a_turn(angle - rotations[0]) for angle in rotations])
        if np.ptp(around) > 0.5:
            raise InputError(f"Expected one RotationAngle in {str(path)!r}, got {around.min():g} to {around.max():g}.")
    if _TITLE in sections[0]:
        return sections[0][_TITLE]
    return None if rotations is None else _within_half_a_turn(float(around.mean()) - 90.0)


def _geometry(
    moved: NDArray[np.float64], shape: Sequence[int], pixel: float, path: str | Path | None, y_axis: YAxis | None
) -> tuple[float, NDArray[np.float64]]:
    """The tilt axis [degree] and the shifts (images, 2) [angstrom] behind IMOD's transformations; see `_transforms`."""
    matrices = moved[:, :4].reshape(-1, 2, 2)
    sizes = np.linalg.det(matrices)
    if (sizes < 0).any():
        raise InputError(
            f"Expected transformations without mirror images in {str(path)!r}, got a negative determinant: y runs "
            f"the other way in the stack they were made for. Give y_axis='up' (it is {y_axis!r}) and the "
            "transformations of the images that are turned over."
        )
    turns = np.degrees(np.arctan2(matrices[:, 0, 1] - matrices[:, 1, 0], matrices[:, 0, 0] + matrices[:, 1, 1]))
    turns = turns[0] + (turns - turns[0] + 180.0) % 360.0 - 180.0
    if (abs(sizes - 1) > 0.02).any() or np.ptp(turns) > 0.5:
        raise InputError(
            f"Expected transformations that turn by one angle and shift in {str(path)!r}, got turns of "
            f"{turns.min():.2f} to {turns.max():.2f} degrees and magnifications of {np.sqrt(sizes.min()):.3f} to "
            f"{np.sqrt(sizes.max()):.3f}: a tilt series here has one axis and one magnification."
        )
    rows, columns = shape
    origin = np.array([columns // 2 + 0.5 - columns / 2, rows // 2 + 0.5 - rows / 2])
    shifts = np.stack([-np.linalg.solve(a, d) - origin for a, d in zip(matrices, moved[:, 4:], strict=True)])
    return float(turns.mean()), shifts * pixel
