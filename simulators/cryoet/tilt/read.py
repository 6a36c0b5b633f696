"""A tilt series from disk: `read_tilt_series`, of a stack and the text files of IMOD and SerialEM beside it.

`simulators.cryoet.tilt.write` says what is in these files.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array, is_number
from bridge.errors import InputError
from simulators.cryoet.formats.mdoc import Mdoc, number, read_mdoc, text_lines
from simulators.cryoet.formats.micrographs import YAxis, read_oriented, square_pixel
from simulators.cryoet.tilt.scheme import TiltScheme


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
    shifts_angstrom: Array | None
    doses_e_per_angstrom2: Array | None
    defocus_um: Array | None
    magnifications: Array | None = None
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
    _check_counts(len(images), str(stack), tilts=angles, transforms=moved, order=order)
    if known is None and excluded:
        raise InputError("Expected mdoc=... with excluded=: they are ZValues of its sections.")
    if known is not None:
        known, kept = _matched(known, len(images), excluded, angles, str(stack), note)
        if len(kept) < len(images):
            images = images[kept]
            angles, moved = (None if table is None else table[kept] for table in (angles, moved))
            order = None if order is None else np.argsort(np.argsort([order[i] for i in kept])).tolist()
        if angles is None:
            angles = known.column("TiltAngle")
    angles = _checked_tilts(angles, str(stack), str(tilts or mdoc))
    if order is None and known is not None:
        order = known.order(tell)
    order = _checked_order(order, len(images), str(stack))
    axis = doses = defocus = shifts = sizes = None
    if known is not None:
        doses, defocus = known.doses(order, note), known.defocus_um(tell)
        axis = known.axis_deg(note if moved is not None or tilt_axis_deg is not None else tell)
    if moved is not None:
        axis, shifts, sizes = _geometry(moved, images.shape[1:], pixel, transforms, y_axis)
        _tell_sizes(sizes, cast(str, transforms), tell)
    if tilt_axis_deg is not None:
        axis = _checked_axis(tilt_axis_deg)
    place = np.argsort(angles, kind="stable")
    scheme = TiltScheme(tuple(angles[place].tolist()), tuple(int(order[i]) for i in place))
    if (place != np.arange(len(place))).any():
        images = images[place]

    shifts, doses, defocus, sizes = (None if v is None else v[place] for v in (shifts, doses, defocus, sizes))
    return RecordedSeries(images, pixel, scheme, axis, shifts, doses, defocus, sizes, tuple(notes))


def _check_counts(images: int, stack: str, **tables: Sequence[int] | Array | None) -> None:
    for name, table in tables.items():
        if table is not None and len(table) != images:
            raise InputError(f"Expected {name} of {images} images, as {stack!r} has, got {len(table)}.")


def _checked_tilts(angles: Array | None, stack: str, file: str) -> Array:
    if angles is None:
        raise InputError(f"Expected the tilts of {stack!r}. Give tilts='...rawtlt' (or .tlt), or mdoc='...mdoc'.")
    if (abs(angles) > 90.0).any():
        worst = float(angles[np.argmax(abs(angles))])
        raise InputError(f"Expected tilts within 90 degrees in {file!r}, got {worst:g}.")
    return angles


def _checked_order(order: Sequence[int] | None, images: int, stack: str) -> Sequence[int]:
    if order is None:
        raise InputError(
            f"Expected the order in which the images of {stack!r} were taken: the specimen suffers. Give "
            "order=[...], 0 for the first taken, or an mdoc with PriorRecordDose or DateTime, different for each image."
        )
    if sorted(order) != list(range(images)):
        raise InputError(f"Expected order as a permutation of 0 to {images - 1}, got {list(order)}.")
    return order


def _checked_axis(given: float) -> float:
    if not is_number(given):
        raise InputError(f"Expected tilt_axis_deg as a number, got {given!r}.")
    return float(given)


def _tell_sizes(sizes: Array, transforms: str | Path, tell: Callable[[str], None]) -> None:
    if (abs(sizes - 1) > 0.02).any():
        tell(
            f"{Path(transforms).name} enlarges images by {sizes.min():.3f} to {sizes.max():.3f}, and "
            "TiltSeries has one magnification: see magnifications of what was read. Pixels stay those of the files."
        )


def _matched(
    mdoc: Mdoc,
    images: int,
    excluded: Sequence[int],
    tilts: Array | None,
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


def _read_table(path: Path, columns: int) -> Array:
    rows = []
    for i, line in enumerate(text_lines(path), start=1):
        if parts := line.split():
            if len(parts) != columns:
                raise InputError(f"Expected {columns} numbers in line {i} of {str(path)!r}, got {line.strip()!r}.")
            rows.append([number(part, path, i) for part in parts])
    return np.array(rows).reshape(-1, columns)


def _geometry(
    moved: Array, shape: Sequence[int], pixel: float, path: str | Path | None, y_axis: YAxis | None
) -> tuple[float, Array, Array]:
    """The tilt axis [degree], the shifts (images, 2) [angstrom] and the magnifications (images,) behind IMOD's
    transformations; `write` makes them."""
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
