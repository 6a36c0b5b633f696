"""A tilt series on disk, as IMOD, SerialEM's readers and RELION 5 expect it: `write_tilt_series`, `read_tilt_series`.

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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import is_number, unmasked_array
from bridge.errors import InputError
from simulators.cryoet.formats.mdoc import Mdoc, number, read_mdoc, text_lines, within_half_a_turn
from simulators.cryoet.formats.micrographs import YAxis, read_oriented, square_pixel, write_stack
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
    lines += ["\t".join(v if isinstance(v, str) else f"{v:.6f}" if isinstance(v, float) else str(v) for v in row)
              for row in rows]  # fmt: skip
    return "\n" + "\n".join(lines) + "\n\n"


def _series_star(name: str, series: TiltSeries, values: Mapping[str, float]) -> str:
    columns = ["rlnTomoName", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast",
               "rlnMicrographOriginalPixelSize", "rlnTomoTiltSeriesPixelSize", "rlnTomoHand", "rlnTomoSizeX",
               "rlnTomoSizeY", "rlnTomoSizeZ", "rlnTomoImportFractionalDose",
               "rlnTomoTiltSeriesStarFile"]  # fmt: skip
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
        magnifications: (images,) by which transformations enlarge each image.
        notes: what was taken for granted, in sentences.
    """

    images: NDArray[Any]
    pixel_size_angstrom: float
    scheme: TiltScheme
    tilt_axis_deg: float | None
    shifts_angstrom: NDArray[np.float64] | None
    doses_e_per_angstrom2: NDArray[np.float64] | None
    defocus_um: NDArray[np.float64] | None
    magnifications: NDArray[np.float64] | None = None
    notes: tuple[str, ...] = ()


def read_tilt_series(
    stack: str | Path,
    *,
    tilts: str | Path | None = None,
    mdoc: str | Path | None = None,
    transforms: str | Path | None = None,
    order: Sequence[int] | None = None,
    excluded: Sequence[int] = (),
    tilt_axis_deg: float | None = None,
    pixel_size_angstrom: float | None = None,
    y_axis: YAxis | None = None,
    memory_map: bool = False,
) -> RecordedSeries:
    """Reads a stack and the text files that belong to it. What they leave open is asked for, never guessed.

    Args:
        stack: MRC.
        tilts: `.rawtlt` or `.tlt`, a tilt a line in the order of the stack; by default those of `mdoc` [degree].
        mdoc: SerialEM's `.mdoc`: tilts, axis, doses, defocus, pixel; see `simulators.cryoet.formats.mdoc` for what its
            keys mean. Doses where all are 0 are not known. ZValues may have gaps: sections are those of the images in
            order.
        transforms: `.xf`: the shifts and magnifications, and the axis in place of that in `mdoc`.
        order: (images,) when each image of the stack was taken, 0 for the first; by default from the doses or times in
            `mdoc`.
        excluded: ZValues of sections of `mdoc` to leave out, and of images where the stack still has them; found by
            `tilts` where these are fewer than sections.
        tilt_axis_deg: in place of the files' [degree].
        pixel_size_angstrom: in place of the files'; needed where they have none, or a stack's header says exactly 1
            angstrom, which is what many programs write for an unknown pixel, or stack and mdoc differ [angstrom].
        y_axis: see `read_stack`; text files are those of the images as they then are. Needed where transforms mirror.
        memory_map: images stay in the file until they are used, if they are sorted by tilt there; see `read_stack`.

    Returns:
        the series, sorted by tilt.

    Raises:
        InputError: a file that is missing, cannot be read or has another number of images; an argument missing.
    """
    notes: list[str] = []
    excluded = tuple(int(z) for z in excluded)

    def note(said: str) -> None:
        notes.append(said)

    def tell(said: str) -> None:
        notes.append(said)
        warnings.warn(f"{Path(cast(str, mdoc or transforms)).name}: {said}", UserWarning, stacklevel=4)

    read = read_oriented(stack, y_axis, memory_map=memory_map)
    notes += read.notes
    images = read.images
    angles = None if tilts is None else _read_table(Path(tilts), 1)[:, 0]
    moved = None if transforms is None else _read_table(Path(transforms), 6)
    known = None if mdoc is None else read_mdoc(Path(mdoc))
    pixel = _pixel(stack, read.edges, mdoc, None if known is None else known.sections, pixel_size_angstrom)
    n = len(images)
    for name, table in (("tilts", angles), ("transforms", moved), ("order", order)):
        if table is not None and len(table) != n:
            raise InputError(f"Expected {name} of {n} images, as {str(stack)!r} has, got {len(table)}.")
    if known is None and excluded:
        raise InputError("Expected mdoc=... with excluded=: they are ZValues of its sections.")
    if known is not None:
        known, kept = _matched(known, n, excluded, angles, str(stack), note)
        if len(kept) < n:
            images = images[kept]
            angles, moved = (None if table is None else table[kept] for table in (angles, moved))
            order = None if order is None else np.argsort(np.argsort([order[i] for i in kept])).tolist()
        if angles is None:
            angles = known.column("TiltAngle")
    if angles is None:
        raise InputError(f"Expected the tilts of {str(stack)!r}. Give tilts='...rawtlt' (or .tlt), or mdoc='...mdoc'.")
    if (abs(angles) > 90.0).any():
        worst = float(angles[np.argmax(abs(angles))])
        raise InputError(f"Expected tilts within 90 degrees in {str(tilts or mdoc)!r}, got {worst:g}.")
    if order is None and known is not None:
        order = known.order(tell)
    if order is None:
        raise InputError(
            f"Expected the order in which the images of {str(stack)!r} were taken: the specimen suffers. Give "
            "order=[...], 0 for the first taken, or an mdoc with PriorRecordDose or DateTime, different for each image."
        )
    if sorted(order) != list(range(len(images))):
        raise InputError(f"Expected order as a permutation of 0 to {len(images) - 1}, got {list(order)}.")
    axis = doses = defocus = shifts = sizes = None
    if known is not None:
        doses, defocus = known.doses(order, note), known.defocus_um(tell)
        axis = known.axis_deg(note if moved is not None or tilt_axis_deg is not None else tell)
    if moved is not None:
        axis, shifts, sizes = _geometry(moved, images.shape[1:], pixel, transforms, y_axis)
        if (abs(sizes - 1) > 0.02).any():
            tell(
                f"{Path(cast(str, transforms)).name} enlarges images by {sizes.min():.3f} to {sizes.max():.3f}, and "
                "TiltSeries has one magnification: see magnifications of what was read. Pixels stay those of the files."
            )
    if tilt_axis_deg is not None:
        if not is_number(tilt_axis_deg):
            raise InputError(f"Expected tilt_axis_deg as a number, got {tilt_axis_deg!r}.")
        axis = float(tilt_axis_deg)
    place = np.argsort(angles, kind="stable")
    scheme = TiltScheme(tuple(angles[place].tolist()), tuple(int(order[i]) for i in place))
    if (place != np.arange(len(place))).any():
        images = images[place]

    def sort(values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        return None if values is None else values[place]

    return RecordedSeries(
        images, pixel, scheme, axis, sort(shifts), sort(doses), sort(defocus), sort(sizes), tuple(notes)
    )


def _matched(
    mdoc: Mdoc,
    images: int,
    excluded: Sequence[int],
    tilts: NDArray[np.float64] | None,
    stack: str,
    note: Callable[[str], None],
) -> tuple[Mdoc, list[int]]:
    """The sections of the stack's images, and which images are left."""
    path, total = str(mdoc.path), len(mdoc.z)
    if unknown := sorted(set(excluded) - set(mdoc.z)):
        raise InputError(f"Unknown ZValues {unknown} in excluded. {path!r} has {_numbers(mdoc.z)}.")
    everything = list(range(images))
    if excluded:
        kept = [i for i, z in enumerate(mdoc.z) if z not in set(excluded)]
        if not kept or images not in (total, len(kept)):
            raise InputError(
                f"Expected {total} images in {stack!r}, as {path!r} has sections, or {len(kept)}, without those "
                f"excluded, got {images}."
            )
        note(f"the exposure of the views excluded (ZValue {_numbers(excluded)}) is not counted.")
        return mdoc.chosen(kept), kept if images == total else everything
    if images == total:
        if mdoc.z != tuple(range(total)):
            note(f"ZValues have gaps ({_numbers(mdoc.z)}): its sections are those of the images in order.")
        return mdoc, everything
    if images < total and tilts is not None:
        # Nominal tilts are the mdoc's to the digits of the file.
        apart = abs(mdoc.column("TiltAngle")[:, None] - tilts)
        kept = sorted(set(apart.argmin(axis=0).tolist()))
        if len(kept) == images and apart.min(axis=0).max() < 0.1 and (np.diff(apart.argmin(axis=0)) > 0).all():
            left = [z for i, z in enumerate(mdoc.z) if i not in kept]
            note(f"sections without an image, by their tilts: ZValue {_numbers(left)}. Their exposure is not counted.")
            return mdoc.chosen(kept), everything
    if images < total:
        raise InputError(
            f"Expected mdoc of {images} images, as {stack!r} has, got {total} sections in {path!r} (ZValue "
            f"{_numbers(mdoc.z)}): views were taken out of the stack. Give excluded=[...], their ZValues, or the tilts "
            "that are left, tilts='...rawtlt'."
        )
    without = sorted(set(range(images)) - set(mdoc.z))
    raise InputError(
        f"Expected mdoc of {images} images, as {stack!r} has, got {total} sections in {path!r}: there is none for "
        f"images {_numbers(without)}. Add those sections, or take the images out of the stack."
    )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, list(values)[:12])) + (", ..." if len(values) > 12 else "")


def _pixel(
    stack: str | Path,
    edges: tuple[float, float],
    mdoc: str | Path | None,
    sections: Sequence[Mapping[str, float]] | None,
    given: float | None,
) -> float:
    """The pixel [angstrom]: the given one, else the mdoc's, else the header's; none that stands for an unknown one."""
    unknown = abs(edges[0]) in (0.0, 1.0) or not math.isfinite(edges[0])
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


def _read_table(path: Path, columns: int) -> NDArray[np.float64]:
    rows = []
    for i, line in enumerate(text_lines(path), start=1):
        if parts := line.split():
            if len(parts) != columns:
                raise InputError(f"Expected {columns} numbers in line {i} of {str(path)!r}, got {line.strip()!r}.")
            rows.append([number(part, path, i) for part in parts])
    return np.array(rows).reshape(-1, columns)


def _geometry(
    moved: NDArray[np.float64], shape: Sequence[int], pixel: float, path: str | Path | None, y_axis: YAxis | None
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """The tilt axis [degree], the shifts (images, 2) [angstrom] and the magnifications (images,) behind IMOD's
    transformations; see `_transforms`."""
    matrices = moved[:, :4].reshape(-1, 2, 2)
    areas = np.linalg.det(matrices)
    if (areas < 0).any():
        raise InputError(
            f"Expected transformations without mirror images in {str(path)!r}, got a negative determinant: y runs "
            f"the other way in the stack they were made for. Give y_axis='up' (it is {y_axis!r}) and the "
            "transformations of the images that are turned over."
        )
    sizes = np.sqrt(areas)
    turns = np.degrees(np.arctan2(matrices[:, 0, 1] - matrices[:, 1, 0], matrices[:, 0, 0] + matrices[:, 1, 1]))
    turns = turns[0] + (turns - turns[0] + 180.0) % 360.0 - 180.0
    stretches = np.linalg.svd(matrices, compute_uv=False)
    if not (sizes.min() > 0.25 and sizes.max() < 4) or np.ptp(turns) > 0.5 or (stretches[:, 0] > 1.05 * sizes).any():
        raise InputError(
            f"Expected transformations that turn by one angle, enlarge and shift in {str(path)!r}, got turns of "
            f"{turns.min():.2f} to {turns.max():.2f} degrees, magnifications of {sizes.min():.3f} to "
            f"{sizes.max():.3f} and edges of a square stretched by up to {stretches.max():.3f}: a tilt series here has "
            "one axis, and images are not distorted."
        )
    rows, columns = shape
    origin = np.array([columns // 2 + 0.5 - columns / 2, rows // 2 + 0.5 - rows / 2])
    shifts = np.stack([-np.linalg.solve(a, d) - origin for a, d in zip(matrices, moved[:, 4:], strict=True)])
    return float(turns.mean()), shifts * pixel, sizes
