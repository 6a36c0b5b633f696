"""A particle's potential in three dimensions, and its projections in any direction, by the central-slice theorem.

v(x, y) = int V(R^{-1} r) dz    =>    v~(q) = V~(R^T (q_x, q_y, 0))
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import scipy.fft
import scipy.sparse
import torch
from numpy.typing import NDArray

from bridge.errors import InputError
from simulators.cryoet.maps import DensityMap
from simulators.cryoet.potential import (
    BETA,
    SUPPORT,
    Projection,
    add_linear,
    band_limit,
    curve,
    displaced_voxels,
    ice_potential,
    kernel_transform,
    radial_basis,
    spline_filter,
)
from simulators.cryoet.specimen import Specimen

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
def slice_frequencies(size: int, dtype: torch.dtype) -> Slice:
    """The frequencies of a slice; computed once for each size."""
    fy = torch.fft.fftfreq(size, dtype=torch.float64)[:, None].expand(size, size // 2 + 1).reshape(-1)
    fx = torch.fft.rfftfreq(size, dtype=torch.float64)[None, :].expand(size, size // 2 + 1).reshape(-1)
    (cells,) = torch.nonzero(fx**2 + fy**2 < 0.25, as_tuple=True)
    return Slice(cells, fx[cells].to(dtype), fy[cells].to(dtype))


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
    _converted: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(
        cls, specimen: Specimen | DensityMap, pixel_size_angstrom: float, *, hard_solvent: bool, oversampling: int = 3
    ) -> Volume:
        """A particle's potential, band-limited at the Nyquist frequency, isotropically.

        Args:
            specimen: the atoms, or a map; the particle turns about the origin.
            pixel_size_angstrom: of the image, and of the voxels [angstrom].
            hard_solvent: displaced solvent by threshold rather than the atoms' Gaussians; a map has none to displace.
            oversampling: of the Fourier transform, at least 2.

        Raises:
            InputError: the particle is too large for its pixels.
        """
        places = specimen.corners if isinstance(specimen, DensityMap) else specimen.positions
        reach = float(np.linalg.norm(places, axis=1).max()) + 16.0 + 6 * pixel_size_angstrom
        box = 2 * scipy.fft.next_fast_len(int(np.ceil(reach / pixel_size_angstrom)), real=True)
        size = oversampling * box
        if size > _LARGEST:
            raise InputError(
                f"Expected a particle within {_LARGEST // oversampling} pixels, got one of {2 * reach:.0f} angstrom, "
                f"{box} pixels of {pixel_size_angstrom:g}. Use larger pixels or a smaller particle."
            )
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
        # The spline's transform at each distance from the origin.
        window = np.sinc((np.arange(box) - box // 2) / size) ** 3
        potential /= window[:, None, None] * window[:, None] * window
        padded = np.zeros((size, size, size))
        start = size // 2 - box // 2
        padded[start : start + box, start : start + box, start : start + box] = potential
        transform = np.fft.fftshift(scipy.fft.fftn(np.fft.ifftshift(padded)))
        parts = np.stack((transform.real.reshape(-1), transform.imag.reshape(-1)), axis=1)
        return cls(torch.from_numpy(parts), size, box, float(pixel_size_angstrom))

    def in_dtype(self, dtype: torch.dtype) -> torch.Tensor:
        """The coefficients in a dtype; converted once."""
        if dtype not in self._converted:
            self._converted[dtype] = self.coefficients.to(dtype)
        return self._converted[dtype]

    def slice(self, rotation: torch.Tensor) -> torch.Tensor:
        """The projection's Fourier transform at `slice_frequencies(box)`, of the particle turned by `rotation`.

        Args:
            rotation: (3, 3), r = R r_particle; the beam is along z.

        Returns:
            (m,) complex, scaled so that irfft2 gives [V angstrom]; the particle's origin is at pixel 0.
        """
        dtype = rotation.dtype
        grid = slice_frequencies(self.box, dtype)
        # q_particle = R^T (fx, fy, 0), in samples of the padded grid.
        points = [self.size * (rotation[0, i] * grid.fx + rotation[1, i] * grid.fy) for i in (2, 1, 0)]
        points = [(p + self.size // 2).clamp(1, self.size - 2) for p in points]
        nearest = [p.detach().round() for p in points]
        z, y, x = (n.long() for n in nearest)
        base = (z * self.size + y) * self.size + x
        weights = [_spline(p - n) for p, n in zip(points, nearest, strict=True)]
        coefficients = self.in_dtype(dtype)
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

    def project(self, rotation: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The projection itself, (box, box), with the particle's origin at pixel box // 2 [V angstrom].

        Args:
            rotation: (3, 3).
            weight: (m,) factors at `slice_frequencies(box)`; None for 1.
        """
        values = self.slice(rotation) if weight is None else self.slice(rotation) * weight
        grid = slice_frequencies(self.box, rotation.dtype)
        spectrum = torch.zeros(self.box * (self.box // 2 + 1), dtype=values.dtype)
        spectrum = spectrum.index_put((grid.cells,), values).reshape(self.box, self.box // 2 + 1)
        image = torch.fft.irfft2(spectrum, s=(self.box, self.box))
        return torch.roll(image, (self.box // 2, self.box // 2), (0, 1))


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
        volume = self._volume[0]
        box, grid = volume.box, slice_frequencies(volume.box, rotation.dtype)
        # The origin comes from pixel 0 to pixel box // 2.
        sign = torch.cos((-2 * np.pi * (box // 2)) * (grid.fx + grid.fy)).round()
        flat = torch.zeros(box * (box // 2 + 1), dtype=torch.complex128)
        flat = flat.index_put((grid.cells,), volume.slice(rotation) * sign)
        weight = torch.from_numpy(spline_filter(box, self.oversampling))
        return self._finished(flat.reshape(box, box // 2 + 1) * weight, box * self.oversampling)

    def _finished(self, spectrum: torch.Tensor, size: int) -> Projection:
        n = spectrum.shape[0]
        middle = torch.zeros(size - n, spectrum.shape[1], dtype=spectrum.dtype)
        padded = torch.cat((spectrum[: n // 2], middle, spectrum[n // 2 :]))
        return Projection(torch.fft.irfft2(padded, s=(size, size)), self.pixel_size_angstrom / self.oversampling)


def _spline(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The quadratic B-spline at samples -1, 0 and 1, of points at `part` in [-1/2, 1/2]."""
    first, last = 0.5 * (0.5 - part).square(), 0.5 * (0.5 + part).square()
    return first, 1 - first - last, last
