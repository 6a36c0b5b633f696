"""A particle's potential in three dimensions, and its projections in any direction, by the central-slice theorem.

v(x, y) = int V(R^{-1} r) dz    =>    v~(q) = V~(R^T (q_x, q_y, 0))
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from numpy.typing import NDArray

from bridge.errors import InputError
from simulators.cryoet.device import CPU
from simulators.cryoet.specimen.maps import DensityMap
from simulators.cryoet.specimen.potential import (
    BETA,
    SUPPORT,
    Projection,
    add_linear,
    band_limit,
    curve,
    displaced_voxels,
    ice_potential,
    kernel_transform,
    kernel_weights,
    radial_basis,
    spline_filter,
)
from simulators.cryoet.specimen.specimen import Specimen

_LARGEST = 512
_ATOMS_AT_A_TIME = 4096


def _spread(positions: NDArray[np.float64], values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Atoms' values on a periodic grid of size^3 samples, by the kernel of the non-uniform Fourier transform.

    Args:
        positions: (n, 3) in samples, from the sample size // 2, as (z, y, x).
        values: (n, r).
        size: of the grid.

    Returns:
        (r, size, size, size).
    """
    total = np.zeros((size**3, values.shape[1]))
    taps = np.arange(SUPPORT)
    for start in range(0, len(positions), _ATOMS_AT_A_TIME):
        place = positions[start : start + _ATOMS_AT_A_TIME] + size // 2
        index = np.ceil(place - SUPPORT / 2).astype(np.int64)[:, :, None] + taps
        offset = (index - place[:, :, None]) / (SUPPORT / 2)
        weight = np.exp(BETA * (np.sqrt(np.maximum(1 - offset**2, 0)) - 1))
        index %= size
        cells = (index[:, 0, :, None, None] * size + index[:, 1, None, :, None]) * size + index[:, 2, None, None, :]
        weights = weight[:, 0, :, None, None] * weight[:, 1, None, :, None] * weight[:, 2, None, None, :]
        n = len(place)
        pointers = np.arange(0, n * SUPPORT**3 + 1, SUPPORT**3)
        matrix = scipy.sparse.csr_matrix((weights.ravel(), cells.ravel(), pointers), shape=(n, size**3))
        total += matrix.T @ values[start : start + _ATOMS_AT_A_TIME]
    return total.T.reshape(-1, size, size, size)


def potential_spectrum(specimen: Specimen, size: int, step_angstrom: float, *, solvent: bool) -> NDArray[np.complex128]:
    r"""V~(q) = h^2/(2 pi m e) sum_j w_j f_j(q) exp(-B_j q^2/4) exp(-2 pi i q.r_j), for |q| < 1 / (2 step), else 0.

    Args:
        specimen: the atoms.
        size: of the grid, even.
        step_angstrom: its step [angstrom]; the origin is at sample size // 2.
        solvent: subtract the smooth displaced solvent.

    Returns:
        (size, size, size // 2 + 1) as (z, y, x) [V angstrom^3].
    """
    limit = 0.5 / step_angstrom
    kinds, coordinates = radial_basis(specimen, limit, solvent)
    # Half a step: the kernel needs twice the sampling of the band that is wanted.
    grids = _spread(2 * specimen.positions[:, ::-1] / step_angstrom, coordinates, 2 * size)
    rows = np.concatenate((np.arange(size // 2), np.arange(-(size // 2), 0)))
    half = np.arange(size // 2 + 1)
    f, fx = np.fft.fftfreq(size, step_angstrom), np.fft.rfftfreq(size, step_angstrom)
    q2 = f[:, None, None] ** 2 + f[:, None] ** 2 + fx**2
    table = np.linspace(0, limit**2, 16385)
    total = np.zeros(q2.shape, dtype=np.complex128)
    for (z, b, h), grid in zip(kinds, grids, strict=True):
        part = scipy.fft.rfftn(grid)[np.ix_(rows, rows, half)]
        total += part * np.interp(q2, table, curve(int(z), b, h, table, solvent))
    kernel = kernel_transform(2 * size)
    kernel_all, kernel_half = kernel[rows], kernel[half]
    return (q2 < limit**2) * total / (kernel_all[:, None, None] * kernel_all[:, None] * kernel_half)


def displaced_fraction(specimen: Specimen, size: int, step_angstrom: float) -> NDArray[np.float64]:
    """The part of each voxel that holds no solvent, by the threshold of `displaced_voxels`: (size,) * 3, (z, y, x).

    Args:
        specimen: the atoms.
        size, step_angstrom: of the grid, whose origin is at sample size // 2.
    """
    voxel = 1.5
    total = np.zeros((size, size, size))
    for full, low in displaced_voxels(specimen, voxel):
        points = ((np.argwhere(full) + low)[:, ::-1] * (voxel / step_angstrom) + size // 2).astype(np.float64)
        inside = (points >= 0).all(axis=1) & (points < size - 1).all(axis=1)
        add_linear(total, points[inside], np.full(int(inside.sum()), (voxel / step_angstrom) ** 3, dtype=np.float64))
    return total


@dataclass(frozen=True)
class Slice:
    """The frequencies of a projection of `size` x `size` pixels that lie within the band, in the half-plane of rfft2.

    Args:
        cells: (m,) their flat indices in (size, size // 2 + 1).
        fx, fy: (m,) [cycles/pixel].
    """

    cells: torch.Tensor
    fx: torch.Tensor
    fy: torch.Tensor


@lru_cache(maxsize=32)
def slice_frequencies(size: int, dtype: torch.dtype, device: torch.device = CPU) -> Slice:
    """The frequencies of a slice; computed once for each size."""
    fy = torch.fft.fftfreq(size, dtype=torch.float64)[:, None].expand(size, size // 2 + 1).reshape(-1)
    fx = torch.fft.rfftfreq(size, dtype=torch.float64)[None, :].expand(size, size // 2 + 1).reshape(-1)
    (cells,) = torch.nonzero(fx**2 + fy**2 < 0.25, as_tuple=True)
    return Slice(cells.to(device), fx[cells].to(device, dtype), fy[cells].to(device, dtype))


@dataclass(frozen=True, eq=False)
class Volume:
    r"""The Fourier transform of a potential, sampled anywhere: V~(k) = sum_n c_n B_x B_y B_z, B_x = B(k_x - n_x).

    B is the quadratic B-spline on a grid `oversampling` (s) times as fine as the potential's box demands. The potential
    is divided by the spline's own transform, sinc^3, which makes V~ exact but for the spline's images about multiples
    of s boxes: (u / (1 - u))^3 of the potential at u boxes of the padded grid, at most u = 1 / (2 s) at the box's edge
    (0.8 % for s = 3, and 0.02 % half-way to it). V~ has a continuous gradient, so that gradients through angles are
    those of the model itself.

    Args:
        coefficients: (N^3, 2) float64, real and imaginary part; zero frequency at sample N // 2 of each axis (z, y, x)
            [V angstrom^3].
        size: N.
        box: edge of a projection that holds the particle in any direction [pixels], even.
        pixel_size_angstrom: pixel and voxel [angstrom].
    """

    coefficients: torch.Tensor
    size: int
    box: int
    pixel_size_angstrom: float
    _converted: dict[tuple[torch.dtype, torch.device], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )
    _slices: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls,
        specimen: Specimen | DensityMap,
        pixel_size_angstrom: float,
        *,
        hard_solvent: bool,
        oversampling: int = 3,
        reach_angstrom: float | None = None,
    ) -> Volume:
        """A particle's potential, band-limited at the Nyquist frequency, isotropically.

        Args:
            specimen: the atoms, or a map; the particle turns about the origin.
            pixel_size_angstrom: of the image, and of the voxels [angstrom].
            hard_solvent: displaced solvent by threshold rather than the atoms' Gaussians; a map has none to displace.
            oversampling: of the Fourier transform, at least 2.
            reach_angstrom: largest distance of an atom from the origin for which there is to be room; None for that of
                the specimen [angstrom].

        Raises:
            InputError: the particle is too large for its pixels.
        """
        if reach_angstrom is None:
            places = specimen.corners if isinstance(specimen, DensityMap) else specimen.positions
            reach_angstrom = float(np.linalg.norm(places, axis=1).max())
        box, size = _sizes(reach_angstrom, pixel_size_angstrom, oversampling)
        if isinstance(specimen, DensityMap):
            spectrum = specimen.spectrum(box, pixel_size_angstrom)
        else:
            spectrum = potential_spectrum(specimen, box, pixel_size_angstrom, solvent=not hard_solvent)
            if hard_solvent:
                fraction = scipy.fft.rfftn(displaced_fraction(specimen, box, pixel_size_angstrom))
                spectrum -= ice_potential() * pixel_size_angstrom**3 * fraction
        f, fx = np.fft.fftfreq(box), np.fft.rfftfreq(box)
        spectrum *= band_limit(f[:, None, None] ** 2 + f[:, None] ** 2 + fx**2, 0.5)
        potential = scipy.fft.irfftn(spectrum, s=(box, box, box))
        window = _spline_transform(box, size)
        potential /= window[:, None, None] * window[:, None] * window
        padded = np.zeros((size, size, size))
        start = size // 2 - box // 2
        padded[start : start + box, start : start + box, start : start + box] = potential
        transform = np.fft.fftshift(scipy.fft.fftn(np.fft.ifftshift(padded)))
        parts = np.stack((transform.real.reshape(-1), transform.imag.reshape(-1)), axis=1)
        return cls(torch.from_numpy(parts), size, box, float(pixel_size_angstrom))

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The coefficients in another tensor's dtype and on its device; converted once."""
        key = other.dtype, other.device
        if key not in self._converted:
            self._converted[key] = self.coefficients.to(other.device, other.dtype)
        return self._converted[key]

    def slice(self, rotation: torch.Tensor) -> torch.Tensor:
        """The projection's Fourier transform at `slice_frequencies(box)`, of the particle turned by `rotation`.

        Args:
            rotation: (3, 3), r = R r_particle; the beam is along z.

        Returns:
            (m,) complex, scaled so that irfft2 gives [V angstrom]; the particle's origin is at pixel 0.
        """
        grid = slice_frequencies(self.box, rotation.dtype, rotation.device)
        # q_particle = R^T (fx, fy, 0), in samples of the padded grid.
        points = [self.size * (rotation[0, i] * grid.fx + rotation[1, i] * grid.fy) for i in (2, 1, 0)]
        points = [(p + self.size // 2).clamp(1, self.size - 2) for p in points]
        nearest = [p.detach().round() for p in points]
        z, y, x = (n.long() for n in nearest)
        base = (z * self.size + y) * self.size + x
        weights = [_spline(p - n) for p, n in zip(points, nearest, strict=True)]
        coefficients = self.like(rotation)
        total: torch.Tensor | None = None
        for i, wz in zip((-1, 0, 1), weights[0], strict=True):
            for j, wy in zip((-1, 0, 1), weights[1], strict=True):
                offset = (i * self.size + j) * self.size
                row = sum(
                    w[:, None] * coefficients.index_select(0, base + (offset + k))
                    for k, w in zip((-1, 0, 1), weights[2], strict=True)
                )
                term = (wz * wy)[:, None] * row
                total = term if total is None else total + term
        assert total is not None
        return torch.complex(total[:, 0], total[:, 1]) / self.pixel_size_angstrom**2

    def kept_slice(self, rotation: torch.Tensor, most: int) -> torch.Tensor:
        """The same, without derivatives, of the `most` last directions from memory."""
        key = rotation.dtype, rotation.device, *rotation.flatten().cpu().tolist()
        if key not in self._slices:
            while len(self._slices) >= most:
                del self._slices[next(iter(self._slices))]
            self._slices[key] = self.slice(rotation)
        return self._slices[key]

    def project(self, rotation: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The projection itself, (box, box), with the particle's origin at pixel box // 2 [V angstrom].

        Args:
            rotation: (3, 3).
            weight: (m,) factors at `slice_frequencies(box)`; None for 1.
        """
        return projected(self.slice(rotation) if weight is None else self.slice(rotation) * weight, self.box)


def projected(spectrum: torch.Tensor, box: int) -> torch.Tensor:
    """A projection (box, box) of its spectrum (m,) at `slice_frequencies(box)`; pixel 0 of that is pixel box // 2."""
    cells = slice_frequencies(box, spectrum.real.dtype, spectrum.device).cells
    full = spectrum.new_zeros(box * (box // 2 + 1)).index_put((cells,), spectrum)
    image = torch.fft.irfft2(full.reshape(box, box // 2 + 1), s=(box, box))
    return torch.roll(image, (box // 2, box // 2), (0, 1))


def _sizes(reach_angstrom: float, pixel_size_angstrom: float, oversampling: int) -> tuple[int, int]:
    """Edges of a particle's box and of the padded grid [pixels]."""
    reach = reach_angstrom + 16.0 + 6 * pixel_size_angstrom
    box = 2 * scipy.fft.next_fast_len(int(np.ceil(reach / pixel_size_angstrom)), real=True)
    if oversampling * box > _LARGEST:
        raise InputError(
            f"Expected a particle within {_LARGEST // oversampling} pixels, got one of {2 * reach:.0f} angstrom, "
            f"{box} pixels of {pixel_size_angstrom:g}. Use larger pixels or a smaller particle."
        )
    return box, oversampling * box


def _spline_transform(box: int, size: int) -> NDArray[np.float64]:
    """The spline's transform at each distance from the origin, along an axis."""
    return np.asarray(np.sinc((np.arange(box) - box // 2) / size) ** 3)


@dataclass(frozen=True, eq=False)
class VolumeBuilder:
    """Builds volumes of one set of atoms at any positions: what does not depend on positions is computed once.

    Args:
        specimen: the atoms.
        pixel_size_angstrom, hard_solvent: see `Volume.build`.
        reach_angstrom: largest distance from the origin that atoms may come to [angstrom].
        oversampling: of the Fourier transform.
    """

    specimen: Specimen
    pixel_size_angstrom: float
    hard_solvent: bool
    reach_angstrom: float
    oversampling: int = 3
    _tables: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    def build(self, positions: NDArray[np.float64]) -> Volume:
        """The volume of the atoms at `positions` (n, 3) [angstrom]."""
        return Volume.build(
            replace(self.specimen, positions=positions),
            self.pixel_size_angstrom,
            hard_solvent=self.hard_solvent,
            oversampling=self.oversampling,
            reach_angstrom=self.reach_angstrom,
        )

    def differentiable(self, positions: torch.Tensor) -> Volume:
        """The same in torch, with derivatives in `positions` (n, 3) float64; for solvent without a threshold.

        Backward keeps 512 numbers for each atom and each of the few kinds that atoms are made of.
        """
        assert not self.hard_solvent
        box, size = _sizes(self.reach_angstrom, self.pixel_size_angstrom, self.oversampling)
        if positions.device not in self._tables:
            tables = (torch.from_numpy(table).to(positions.device) for table in self._made(box, size))
            self._tables[positions.device] = tuple(tables)
        amounts, filters, finish = self._tables[positions.device]
        fine = 2 * box
        places = 2 * positions / self.pixel_size_angstrom + box
        (z, wz), (y, wy), (x, wx) = (kernel_weights(places[:, axis], fine) for axis in (2, 1, 0))
        cells = (z[:, :, None, None] * fine + y[:, None, :, None]) * fine + x[:, None, None, :]
        weights = (wz[:, :, None, None] * wy[:, None, :, None] * wx[:, None, None, :]).reshape(-1)
        owner = torch.arange(len(positions), device=positions.device).repeat_interleave(SUPPORT**3)
        flat, half = cells.reshape(-1), box // 2
        rows = torch.cat((torch.arange(half), torch.arange(fine - half, fine))).to(positions.device)
        spectrum: torch.Tensor | None = None
        for amount, transfer in zip(amounts.T, filters, strict=True):
            grid = positions.new_zeros(fine**3).index_add(0, flat, weights * amount[owner]).reshape((fine,) * 3)
            part = torch.fft.rfftn(grid)[..., : half + 1].index_select(0, rows).index_select(1, rows) * transfer
            spectrum = part if spectrum is None else spectrum + part
        assert spectrum is not None
        potential = torch.fft.irfftn(spectrum, s=(box, box, box)) * finish
        before = size // 2 - half
        padded = torch.nn.functional.pad(potential, (before, size - box - before) * 3)
        transform = torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(padded)))
        parts = torch.stack((transform.real.reshape(-1), transform.imag.reshape(-1)), dim=1)
        return Volume(parts, size, box, self.pixel_size_angstrom)

    def _made(self, box: int, size: int) -> tuple[NDArray[np.float64], ...]:
        """Each kind of atom in each atom, each kind's filter, and what makes spline coefficients of a potential."""
        pixel, limit = self.pixel_size_angstrom, 0.5 / self.pixel_size_angstrom
        kinds, amounts = radial_basis(self.specimen, limit, True)
        f, fx = np.fft.fftfreq(box, pixel), np.fft.rfftfreq(box, pixel)
        q2 = f[:, None, None] ** 2 + f[:, None] ** 2 + fx**2
        table = np.linspace(0, limit**2, 16385)
        rows = np.concatenate((np.arange(box // 2), np.arange(-(box // 2), 0)))
        kernel = kernel_transform(2 * box)
        first, last = kernel[rows], kernel[: box // 2 + 1]
        band = (q2 < limit**2) * band_limit(q2 * pixel**2, 0.5) / (first[:, None, None] * first[:, None] * last)
        filters = np.stack([band * np.interp(q2, table, curve(int(z), b, h, table, True)) for z, b, h in kinds])
        window = _spline_transform(box, size)
        return amounts, filters, 1 / (window[:, None, None] * window[:, None] * window)


@dataclass(frozen=True, eq=False)
class MapProjector:
    """Projects a map: along z exactly, in other directions by a `Volume`.

    Args:
        density: the map.
        pixel_size_angstrom: of the image [angstrom].
        oversampling: of the projection's grid, see `Projection`.
    """

    density: DensityMap
    pixel_size_angstrom: float
    oversampling: int = 3
    _volume: list[Volume] = field(default_factory=list, init=False, repr=False)

    def build(self) -> Projection:
        """The projection along z."""
        step, finer = self.pixel_size_angstrom / 2, self.oversampling / 2
        reach = float(np.abs(self.density.corners[:, :2]).max()) + 24.0 + 16 * self.pixel_size_angstrom
        n = 4 * scipy.fft.next_fast_len(int(np.ceil(reach / step / 2)) + 1, real=True)
        f, fx = np.fft.fftfreq(n, step), np.fft.rfftfreq(n, step)
        band = band_limit(f[:, None] ** 2 + fx[None, :] ** 2, 0.5 / self.pixel_size_angstrom)
        spectrum = self.density.projected_spectrum(n, step) * band * spline_filter(n, finer)
        return self._finished(torch.from_numpy(spectrum), n * self.oversampling // 2)

    def turned(self, rotation: torch.Tensor) -> Projection:
        """The projection along z of the map turned by `rotation` (3, 3) float64; differentiable in it."""
        if not self._volume:
            self._volume.append(Volume.build(self.density, self.pixel_size_angstrom, hard_solvent=False))
        volume, device = self._volume[0], rotation.device
        box, grid = volume.box, slice_frequencies(volume.box, rotation.dtype, device)
        # The origin comes from pixel 0 to pixel box // 2.
        sign = torch.cos((-2 * np.pi * (box // 2)) * (grid.fx + grid.fy)).round()
        flat = torch.zeros(box * (box // 2 + 1), dtype=torch.complex128, device=device)
        flat = flat.index_put((grid.cells,), volume.slice(rotation) * sign)
        weight = torch.from_numpy(spline_filter(box, self.oversampling)).to(device)
        return self._finished(flat.reshape(box, box // 2 + 1) * weight, box * self.oversampling)

    def _finished(self, spectrum: torch.Tensor, size: int) -> Projection:
        n = spectrum.shape[0]
        middle = spectrum.new_zeros(size - n, spectrum.shape[1])
        padded = torch.cat((spectrum[: n // 2], middle, spectrum[n // 2 :]))
        return Projection(torch.fft.irfft2(padded, s=(size, size)), self.pixel_size_angstrom / self.oversampling)


def _spline(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The quadratic B-spline at samples -1, 0 and 1, of points at `part` in [-1/2, 1/2]."""
    first, last = 0.5 * (0.5 - part).square(), 0.5 * (0.5 + part).square()
    return first, 1 - first - last, last
