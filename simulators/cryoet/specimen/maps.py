r"""Maps as specimens: a potential on voxels, as an MRC file of the EMDB holds it.

V~(q) = voxel sum_n V_n exp(-2 pi i q.r_n) below the map's own Nyquist frequencies and zero beyond, which takes the
map as the band-limited function that its voxels sample: any pixel size and any origin are exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import Array, is_number
from bridge.errors import InputError
from simulators.cryoet.formats.mrc import read_mrc

_CENTRES = ("box", "mass")
_KEYS = ("map", "volts_per_unit", "voxel_size_angstrom", "level", "centre", "origin")


@dataclass(frozen=True, eq=False)
class DensityMap:
    """A potential on voxels, less that of the solvent; a specimen like `Specimen`, but rigid.

    Args:
        values: (nz, ny, nx) [V].
        voxel_angstrom: edges of a voxel along x, y, z [angstrom].
        first_angstrom: place of the middle of voxel [0, 0, 0]: x, y, z [angstrom] from the origin about which the
            specimen turns.
        name: for messages.
    """

    values: Array
    voxel_angstrom: tuple[float, float, float]
    first_angstrom: tuple[float, float, float]
    name: str = "map"
    _digest: list[str] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 3 or 0 in values.shape or not np.isfinite(values).all():
            raise InputError(f"Expected a map of finite values of shape (nz, ny, nx), got shape {values.shape}.")
        values.flags.writeable = False
        put(self, "values", values)
        for key in ("voxel_angstrom", "first_angstrom"):
            three = tuple(float(v) for v in getattr(self, key))
            if len(three) != 3 or not np.isfinite(three).all() or (key == "voxel_angstrom" and not min(three) > 0):
                raise InputError(f"Expected {key} as three numbers, x, y, z, got {getattr(self, key)!r}.")
            put(self, key, three)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        volts_per_unit: float | None = None,
        voxel_size_angstrom: float | None = None,
        level: float | None = None,
        centre: str | Sequence[float] = "box",
        origin: str | None = None,
    ) -> DensityMap:
        """Reads a map as the EMDB has them: MRC2014, plain or compressed (.gz); any order of axes.

        Args:
            path: the file.
            volts_per_unit: what the file's unit is worth; maps are scaled arbitrarily, so this has to be said. A
                protein's potential is some 5 V above that of vitreous ice at full resolution [V].
            voxel_size_angstrom: where the file does not have it, or instead of the file's [angstrom].
            level: values below are taken for solvent, 0; the level at which the map is contoured, in the file's unit.
            centre: what the specimen turns about: "box" (voxel n // 2 of each axis), "mass" (the centre of what is
                above `level`), or x, y, z in the map's own frame [angstrom].
            origin: for a `centre` given as a point: where the map's frame comes from, "header" (the ORIGIN of MRC2014)
                or "start" (NXSTART, ...); None for the one that the file has.

        Raises:
            InputError: not readable, or the voxel size, the scale or the origin are not known.
        """
        content = read_mrc(path)
        header, where = content.header, repr(str(path))
        axes = [int(header.mapc), int(header.mapr), int(header.maps)]
        if sorted(axes) != [1, 2, 3]:
            raise InputError(f"Expected MAPC, MAPR, MAPS in {where} to be 1, 2, 3 in some order, got {axes}.")
        angles = [float(header.cellb[k]) for k in ("alpha", "beta", "gamma")]
        # A cell without angles is one that nobody has filled in.
        if any(a != 0 and abs(a - 90) > 1e-3 for a in angles):
            raise InputError(f"Expected a cell with right angles in {where}, got {angles}. Resample the map.")
        # Axis 2 - i of the data runs along x, y or z as axes[i] says.
        order = tuple(2 - axes.index(k) for k in (3, 2, 1))
        values = content.data.transpose(order).astype(np.float64)
        voxel = _voxel(header, voxel_size_angstrom, where)
        if volts_per_unit is None:
            raise InputError(
                f"Expected volts_per_unit for {where}: the unit of a map is arbitrary, and contrast depends on it. "
                f"Its values are from {values.min():.4g} to {values.max():.4g}."
            )
        if not (is_number(volts_per_unit) and volts_per_unit != 0):
            raise InputError(f"Expected volts_per_unit as a number that is not 0, got {volts_per_unit!r}.")
        if level is not None:
            values[values < level] = 0.0
            if not values.any():
                raise InputError(f"Expected a level below the map's largest value in {where}, got {level!r}.")
        # Voxel [0, 0, 0] from what the specimen turns about.
        if isinstance(centre, str):
            if centre not in _CENTRES:
                raise InputError(f"Unknown centre={centre!r}. Known: {', '.join(_CENTRES)}, or x, y, z.")
            middle = np.array(values.shape[::-1]) // 2 if centre == "box" else _mean_index(values, where)
            first = -middle * np.array(voxel)
        else:
            first = _first(header, axes, voxel, origin, where) - np.asarray(centre, dtype=np.float64)
        return cls(values * volts_per_unit, voxel, tuple(first.tolist()), Path(path).name)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DensityMap:
        """A map from plain data: `map` (a path) and the arguments of `from_file`."""
        for key in options:
            if key not in _KEYS:
                raise InputError(f"Unknown key {key!r} of a map. Known keys: {', '.join(_KEYS)}.")
        return cls.from_file(options["map"], **{k: v for k, v in options.items() if k != "map"})

    @property
    def identity_parts(self) -> Any:
        """What images depend on."""
        return self.values, self.voxel_angstrom, self.first_angstrom

    @property
    def digest(self) -> str:
        """Hash of everything that the image depends on; the key of caches."""
        if not self._digest:
            state = hashlib.blake2b(self.values.tobytes(), digest_size=16)
            state.update(repr((self.values.shape, self.voxel_angstrom, self.first_angstrom)).encode())
            self._digest.append(state.hexdigest())
        return self._digest[0]

    @property
    def corners(self) -> Array:
        """The corners of the box around all that is not 0 (8, 3) [angstrom]."""
        used = [np.flatnonzero(self.values.any(axis=other)) for other in ((0, 1), (0, 2), (1, 2))]
        ends = [(u[0], u[-1]) if len(u) else (0, 0) for u in used]
        index = np.array([(x, y, z) for x in ends[0] for y in ends[1] for z in ends[2]], dtype=np.float64)
        return index * self.voxel_angstrom + self.first_angstrom

    def _waves(self, axis: int, frequency: Array) -> NDArray[np.complex128]:
        """exp(-2 pi i q r_n) times the voxel's edge (frequencies, n), for an axis 0, 1, 2 = x, y, z."""
        edge = self.voxel_angstrom[axis]
        place = self.first_angstrom[axis] + edge * np.arange(self.values.shape[2 - axis])
        return np.exp(-2j * np.pi * frequency[:, None] * place) * (edge * (np.abs(frequency) < 0.5 / edge))[:, None]

    def projected_spectrum(self, size: int, step_angstrom: float) -> NDArray[np.complex128]:
        """Fourier coefficients of the projection along z on a periodic grid whose origin is sample size // 2.

        Args:
            size: of the grid, even.
            step_angstrom: its step [angstrom].

        Returns:
            (size, size // 2 + 1), in the scaling of `scipy.fft.irfft2` [V angstrom].
        """
        f, fx = _frequencies(size, step_angstrom)
        shift = np.exp(-2j * np.pi * (size // 2) * np.fft.fftfreq(size))
        flat = self.values.sum(axis=0) * self.voxel_angstrom[2]
        spectrum = self._waves(1, f) @ flat @ self._waves(0, fx).T
        return spectrum * shift[:, None] * _half(shift) / step_angstrom**2

    def spectrum(self, size: int, step_angstrom: float) -> NDArray[np.complex128]:
        """The same in three dimensions, zero beyond the grid's Nyquist frequency.

        Returns:
            (size, size, size // 2 + 1) as (z, y, x), in the scaling of `scipy.fft.irfftn` times step^3 [V angstrom^3].
        """
        f, fx = _frequencies(size, step_angstrom)
        shift = np.exp(-2j * np.pi * (size // 2) * np.fft.fftfreq(size))
        total = self.values @ self._waves(0, fx).T  # (z, y, qx)
        total = self._waves(1, f) @ total  # (z, qy, qx)
        total = np.einsum("kz,zyx->kyx", self._waves(2, f), total, optimize=True)
        q2 = f[:, None, None] ** 2 + f[:, None] ** 2 + fx**2
        band = q2 < (0.5 / step_angstrom) ** 2
        return band * total * shift[:, None, None] * shift[:, None] * _half(shift)


def _frequencies(size: int, step: float) -> tuple[Array, Array]:
    """Those of fft and of rfft [1/angstrom]."""
    return np.fft.fftfreq(size, step).astype(np.float64), np.fft.rfftfreq(size, step).astype(np.float64)


def _half(values: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """The frequencies of rfft, of those of fft."""
    return np.concatenate((values[: len(values) // 2], values[len(values) // 2 :][:1].conj()))


def _voxel(header: Any, given: float | None, where: str) -> tuple[float, float, float]:
    """Edges along x, y, z [angstrom]."""
    if given is not None:
        if not (is_number(given) and given > 0):
            raise InputError(f"Expected voxel_size_angstrom > 0, got {given!r}.")
        return (float(given),) * 3
    cell = [float(header.cella[k]) for k in "xyz"]
    sampling = [int(header[k]) for k in ("mx", "my", "mz")]
    if min(sampling) < 1 or not all(0 < edge < np.inf for edge in cell):
        raise InputError(
            f"Expected a voxel size in {where}, got a cell of {cell} angstrom with a sampling of {sampling}. Say it: "
            "voxel_size_angstrom=..."
        )
    x, y, z = (edge / n for edge, n in zip(cell, sampling, strict=True))
    return x, y, z


def _mean_index(values: Array, where: str) -> Array:
    total = np.maximum(values, 0.0)
    if not total.any():
        raise InputError(f"Expected positive values in {where} to have a centre of mass. Use centre='box'.")
    sums = [total.sum(axis=other) for other in ((0, 1), (0, 2), (1, 2))]
    return np.array([s @ np.arange(len(s)) / s.sum() for s in sums])


def _first(header: Any, axes: list[int], voxel: ArrayLike, origin: str | None, where: str) -> Array:
    """Place of the middle of voxel [0, 0, 0] in the map's own frame [angstrom]."""
    start = np.zeros(3)
    # NXSTART belongs to columns, whatever axis these run along.
    for axis, key in zip(axes, ("nxstart", "nystart", "nzstart"), strict=True):
        start[axis - 1] = float(header[key])
    start = start * np.asarray(voxel)
    stated = np.array([float(header.origin[k]) for k in "xyz"])
    if origin not in (None, "header", "start"):
        raise InputError(f"Unknown origin={origin!r}. Known: header, start, None.")
    if origin is None and start.any() and stated.any() and np.abs(start - stated).max() > 0.01 * np.max(voxel):
        raise InputError(
            f"Expected one origin in {where}, got ORIGIN {stated.tolist()} and NXSTART... of {start.tolist()} "
            'angstrom. Say which: origin="header" or "start".'
        )
    return stated if origin == "header" or (origin is None and stated.any()) else start
