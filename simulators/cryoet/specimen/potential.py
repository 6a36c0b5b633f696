"""From atoms to a projected electrostatic potential, and its interpolation at any in-plane pose.

The projection along the beam is a sum over atoms of radial functions, one for each kind of atom and B factor. In
Fourier space this is a handful of non-uniform Fourier transforms: the kinds' radial functions are expressed in a few
of themselves, so the cost does not grow with the number of different B factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.ndimage
import scipy.sparse
import torch
from numpy.typing import NDArray

from bridge.errors import InputError
from simulators.cryoet.formats.gemmi import import_gemmi
from simulators.cryoet.microscope.physics import ICE_MOLECULES_PER_ANGSTROM3, POTENTIAL_CONSTANT
from simulators.cryoet.specimen.specimen import Specimen

# Volume of solvent displaced by an atom [angstrom^3]: Fraser, MacRae & Suzuki (1978), J. Appl. Cryst. 11, 693.
_DISPLACED = {1: 5.15, 6: 16.44, 7: 2.49, 8: 9.13, 15: 5.73, 16: 19.86}

# Kernel of the non-uniform Fourier transform: exp(beta (sqrt(1 - x^2) - 1)) over 8 samples, oversampling 2. Its error
# is near 1e-7 of the largest value (Barnett, Magland & af Klinteberg 2019, SIAM J. Sci. Comput. 41, C479).
SUPPORT = 8
BETA = 2.3 * SUPPORT

# Points that are interpolated at a time.
_BLOCK = 1 << 16


@lru_cache(maxsize=128)
def peng_coefficients(atomic_number: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Amplitudes a_i [angstrom] and widths b_i [angstrom^2] of an element's electron scattering factor.

    Reference:
        Peng, Ren, Dudarev & Whelan (1996), Acta Cryst. A52, 257, table 1 (International Tables C, 4.3.2.2).
    """
    table = import_gemmi().Element(int(atomic_number)).c4322
    if atomic_number < 1 or table is None:
        raise InputError(f"Expected an element with an electron scattering factor (Z = 1 to 98), got {atomic_number}.")
    values = table.get_coefs()
    return tuple(values[:5]), tuple(values[5:])


def scattering_factor(atomic_number: int, q2: NDArray[np.float64]) -> NDArray[np.float64]:
    """f_e(q) = sum_i a_i exp(-b_i q^2 / 4) [angstrom], of the squared frequency [1/angstrom^2]."""
    a, b = peng_coefficients(atomic_number)
    return sum(ai * np.exp(-0.25 * bi * q2) for ai, bi in zip(a, b, strict=True))  # type: ignore[return-value]


def ice_potential() -> float:
    """Mean inner potential of vitreous ice [V]: h^2 / (2 pi m e) n (f_O(0) + 2 f_H(0)), about 4.6 V."""
    zero = np.zeros(1)
    molecule = scattering_factor(8, zero) + 2 * scattering_factor(1, zero)
    return float(POTENTIAL_CONSTANT * ICE_MOLECULES_PER_ANGSTROM3 * molecule[0])


def displaced_volume(atomic_number: int) -> float:
    """Solvent that an atom displaces [angstrom^3]; a van der Waals sphere for elements not tabulated."""
    if atomic_number in _DISPLACED:
        return _DISPLACED[atomic_number]
    return float(4 / 3 * np.pi * import_gemmi().Element(int(atomic_number)).vdw_r ** 3)


def curve(
    atomic_number: int, b_factor: float, hydrogens: float, q2: NDArray[np.float64], solvent: bool
) -> NDArray[np.float64]:
    """Fourier transform of one atom's potential, less that of the solvent it displaces [V angstrom^3].

    The displaced solvent is a Gaussian, V_ice V exp(-pi V^(2/3) q^2) (Fraser et al. 1978, equation 3).
    """
    values = np.zeros_like(q2)
    for z, number in ((atomic_number, 1.0), (1, hydrogens)):
        if number:
            values += number * POTENTIAL_CONSTANT * scattering_factor(z, q2)
            if solvent:
                volume = displaced_volume(z)
                values -= number * ice_potential() * volume * np.exp(-np.pi * volume ** (2 / 3) * q2)
    return values * np.exp(-0.25 * b_factor * q2)


def radial_basis(specimen: Specimen, highest: float, solvent: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A few kinds of atom whose curves span those of all, and the atoms' coordinates in them (n, r)."""
    keys = np.stack((specimen.atomic_numbers, specimen.b_factors, specimen.hydrogens), axis=1)
    kinds, inverse = np.unique(keys, axis=0, return_inverse=True)
    q2 = np.linspace(0, highest, 96) ** 2
    curves = np.stack([curve(int(z), b, h, q2, solvent) for z, b, h in kinds])
    # Interpolative decomposition: pivoted QR chooses the kinds that stand for the others. Kinds are sorted by element
    # and B factor and their curves vary smoothly, so that a few hundred of them, with each element's ends, span all.
    ends = np.flatnonzero(np.diff(kinds[:, 0], prepend=-1) != 0)
    ends = np.concatenate((ends, ends[1:] - 1, [len(kinds) - 1]))
    candidates = np.union1d(np.arange(0, len(kinds), max(1, len(kinds) // 256)), ends)
    _, r, pivots = scipy.linalg.qr(curves[candidates].T, mode="economic", pivoting=True)
    size = np.abs(np.diag(r))
    rank = max(1, int((size > 1e-9 * size[0]).sum()))
    chosen = candidates[pivots[:rank]]
    coordinates = np.linalg.lstsq(curves[chosen].T, curves.T, rcond=None)[0].T
    return kinds[chosen], coordinates[inverse.reshape(-1)] * specimen.weights[:, None]


def kernel_transform(size: int) -> NDArray[np.float64]:
    """Fourier transform of the spreading kernel at the frequencies of a grid of `size` samples, by quadrature."""
    nodes, node_weights = np.polynomial.legendre.leggauss(48)
    values = np.exp(BETA * (np.sqrt(1 - nodes**2) - 1)) * node_weights * (SUPPORT / 2)
    frequency = np.fft.fftfreq(size)
    return np.cos(2 * np.pi * frequency[:, None] * (nodes * SUPPORT / 2)[None, :]) @ values


def _spreading_matrix(positions: NDArray[np.float64], shape: tuple[int, int], step: float) -> scipy.sparse.csr_matrix:
    """(pixels, n): each atom's kernel values on the periodic grid whose origin is sample n // 2."""
    columns, weights = [], []
    for axis, size in ((1, shape[0]), (0, shape[1])):
        place = positions[:, axis] / step + size // 2
        first = np.ceil(place - SUPPORT / 2).astype(np.int64)
        index = first[:, None] + np.arange(SUPPORT)[None, :]
        offset = (index - place[:, None]) / (SUPPORT / 2)
        weights.append(np.exp(BETA * (np.sqrt(np.maximum(1 - offset**2, 0)) - 1)))
        columns.append(index % size)
    pixels = columns[0][:, :, None] * shape[1] + columns[1][:, None, :]
    values = weights[0][:, :, None] * weights[1][:, None, :]
    n, taps = len(positions), SUPPORT**2
    pointers = np.arange(0, n * taps + 1, taps)
    return scipy.sparse.csr_matrix((values.ravel(), pixels.ravel(), pointers), shape=(n, shape[0] * shape[1])).T


def band_limit(q2: NDArray[np.float64], cutoff: float) -> NDArray[np.float64]:
    """1 below 0.9 cutoff, 0 above cutoff, half a cosine between; isotropic, so that it commutes with rotation."""
    ramp = np.clip((np.sqrt(q2) / cutoff - 0.9) / 0.1, 0, 1)
    return 0.5 * (1 + np.cos(np.pi * ramp))


def projected_spectrum(
    specimen: Specimen, shape: tuple[int, int], step_angstrom: float, *, solvent: bool, highest: float | None = None
) -> NDArray[np.complex128]:
    r"""Fourier coefficients of the projected potential on a periodic grid whose origin is sample n // 2.

    V~(q) = h^2/(2 pi m e) sum_j w_j f_j(q) exp(-B_j q^2/4) exp(-2 pi i q.r_j), less the displaced solvent.

    Args:
        specimen: the atoms.
        shape: (rows, columns) of the grid.
        step_angstrom: its step [angstrom].
        solvent: subtract the smooth displaced solvent.
        highest: the spectrum is needed for |q| < highest only, and zero beyond; None for all [1/angstrom].

    Returns:
        (rows, columns // 2 + 1), in the scaling of `scipy.fft.irfft2` over `shape` [V angstrom].
    """
    nyquist = 0.5 / step_angstrom
    # The kernel needs twice the sampling of the band that is wanted.
    finer = 1 if highest is not None and highest <= 0.5 * nyquist else 2
    fine = (finer * shape[0], finer * shape[1])
    limit = nyquist * np.sqrt(2) if highest is None else highest
    kinds, coordinates = radial_basis(specimen, limit, solvent)
    # Origin at sample n // 2 of the coarse grid, which is sample finer * (n // 2) of the fine one.
    offset = np.array([finer * (n // 2) - (finer * n) // 2 for n in (shape[1], shape[0])]) * step_angstrom / finer
    spread = _spreading_matrix(specimen.positions[:, :2] + offset, fine, step_angstrom / finer)
    rows = np.concatenate((np.arange((shape[0] + 1) // 2), np.arange(-(shape[0] // 2), 0)))
    half = shape[1] // 2 + 1
    qy = np.fft.fftfreq(shape[0], step_angstrom)
    qx = np.fft.rfftfreq(shape[1], step_angstrom)
    q2 = qy[:, None] ** 2 + qx[None, :] ** 2
    # A frequency on the limit itself does not belong to the band, however it is rounded.
    table = np.linspace(0, limit**2, 16385)
    band = 1.0 if highest is None else q2 < highest**2 * (1 - 1e-9)
    total = np.zeros((shape[0], half), dtype=np.complex128)
    for (z, b, h), column in zip(kinds, coordinates.T, strict=True):
        spectrum = scipy.fft.rfft2((spread @ column).reshape(fine))[rows, :half]
        total += spectrum * np.interp(q2, table, curve(int(z), b, h, table, solvent))
    kernel_y = kernel_transform(fine[0])[rows]
    kernel_x = kernel_transform(fine[1])[np.arange(half)]
    # Continuous transform -> samples: a sum over atoms of V~ / (area of a sample).
    return band * total / (kernel_y[:, None] * kernel_x[None, :] * step_angstrom**2)


def projected_potential(
    specimen: Specimen,
    shape: tuple[int, int],
    step_angstrom: float,
    *,
    solvent: bool = False,
    resolution_angstrom: float | None = None,
) -> NDArray[np.float64]:
    """Projected potential on a periodic grid whose origin is pixel n // 2; the reference for everything faster.

    Args:
        specimen: the atoms.
        shape: (rows, columns).
        step_angstrom: pixel [angstrom].
        solvent: subtract the smooth displaced solvent.
        resolution_angstrom: keep |q| < 1 / resolution only (sharp); None for all frequencies of the grid.

    Returns:
        (rows, columns) float64 [V angstrom].
    """
    highest = None if resolution_angstrom is None else 1 / resolution_angstrom
    spectrum = projected_spectrum(specimen, shape, step_angstrom, solvent=solvent, highest=highest)
    return scipy.fft.irfft2(spectrum, s=shape)


def displaced_thickness(
    specimen: Specimen, shape: tuple[int, int], step_angstrom: float, voxel_angstrom: float = 1.5
) -> NDArray[np.float64]:
    """Thickness of the solvent that is displaced when a voxel is either solvent or not: the hard threshold.

    Each copy's atoms' volumes are spread on voxels and blurred by the atoms' mean Gaussian and a probe of 1.4 angstrom;
    the fullest voxels, up to the total volume of the atoms, hold no solvent, and all others hold nothing else. Copies
    are treated one by one, since they do not overlap.

    Args:
        specimen: the atoms.
        shape, step_angstrom: of the periodic grid whose origin is sample n // 2.
        voxel_angstrom: edge of a voxel [angstrom].

    Returns:
        (rows, columns) float64 [angstrom]; steps are as wide as a voxel, spread linearly over grid samples.
    """
    total = np.zeros(shape)
    for full, low in displaced_voxels(specimen, voxel_angstrom):
        columns = full.sum(axis=2) * voxel_angstrom**3
        x, y = np.nonzero(columns)
        points = np.stack(((y + low[1]), (x + low[0])), axis=1) * (voxel_angstrom / step_angstrom)
        points += np.array([shape[0] // 2, shape[1] // 2])
        inside = (points >= 0).all(axis=1) & (points < np.array(shape) - 1).all(axis=1)
        add_linear(total, points[inside], columns[x, y][inside] / step_angstrom**2)
    return total


def displaced_voxels(
    specimen: Specimen, voxel_angstrom: float
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """For each copy the voxels (x, y, z) that hold no solvent, and the index of the first one; see above.

    A bead that stands for many atoms is as wide as its volume at least: a narrower Gaussian would hold several times
    what fits, and its rim, where it is all but nought, would decide.

    Args:
        specimen: the atoms.
        voxel_angstrom: edge of a voxel; voxel i of an axis is at i edges from the origin [angstrom].

    Raises:
        InputError: atoms lie so densely that their volume finds no place around them.
    """
    volume = np.array([displaced_volume(int(z)) for z in range(1, 1 + int(specimen.atomic_numbers.max()))])
    own, weights = volume[specimen.atomic_numbers - 1], specimen.weights
    mean_square = own ** (2 / 3) / (2 * np.pi) + specimen.b_factors / (8 * np.pi**2)
    # A Gaussian of this mean square, and of a sphere's volume, is 1 in its middle.
    least = (weights * (own + specimen.hydrogens * _DISPLACED[1])) ** (2 / 3) / (2 * np.pi)
    square = max((mean_square * weights).sum() / weights.sum() + 1.4**2, (least * weights).sum() / weights.sum())
    blur = np.sqrt(square) / voxel_angstrom
    for label in np.unique(specimen.labels):
        mine = specimen.labels == label
        xyz = specimen.positions[mine] / voxel_angstrom
        filled = weights[mine] * (own[mine] + specimen.hydrogens[mine] * _DISPLACED[1])
        # As many voxels as the atoms' volume fills: the threshold comes out near one half for a protein.
        count = max(round(filled.sum() / voxel_angstrom**3), 1)
        # Two standard deviations from the last atom a voxel is far from full, unless atoms are too dense; at four the
        # blur ends.
        for deviations in (2, 3, 4):
            margin = int(np.ceil(deviations * blur)) + 1
            low = np.floor(xyz.min(axis=0)).astype(np.int64) - margin
            density = np.zeros(np.ceil(xyz.max(axis=0)).astype(np.int64) + margin - low + 1)
            add_linear(density, xyz - low, filled / voxel_angstrom**3)
            density = scipy.ndimage.gaussian_filter(density, blur, mode="constant")
            # The threshold is sought among the fuller voxels, if they are enough: the others are many.
            fuller = density[density > 0.25 * density.max()]
            fuller = density.reshape(-1) if len(fuller) < count else fuller
            if len(fuller) >= count:
                threshold = np.partition(fuller, len(fuller) - count)[len(fuller) - count]
                rim = max(density.take((0, -1), axis=axis).max() for axis in range(3))
                if threshold > rim:
                    break
        else:
            raise InputError(
                f"Expected atoms with room for the {filled.sum():.0f} angstrom^3 of solvent that they displace, got "
                f"{specimen.name} within {' x '.join(f'{x:.0f}' for x in voxel_angstrom * np.ptp(xyz, axis=0))} "
                "angstrom. Are weights right (atoms that each stands for), and coordinates in angstrom?"
            )
        yield density >= threshold, low


def add_linear(grid: NDArray[np.float64], points: NDArray[np.float64], values: NDArray[np.float64]) -> None:
    """Adds values at fractional indices (n, dimensions) to the 2^dimensions samples around each."""
    low = np.floor(points).astype(np.int64)
    part = points - low
    index, shares = [], []
    for corner in np.ndindex(*(2,) * grid.ndim):
        shares.append(values * np.prod(np.where(np.array(corner) == 1, part, 1 - part), axis=1))
        index.append(np.ravel_multi_index(tuple((low + np.array(corner)).T), grid.shape))
    grid.reshape(-1)[:] += np.bincount(np.concatenate(index), np.concatenate(shares), minlength=grid.size)


@dataclass(frozen=True, eq=False)
class Projection:
    r"""A projected potential that can be sampled anywhere: v(x, y) = sum_k c_k B(x - k_x) B(y - k_y).

    B is the quadratic B-spline on a grid `oversampling` (s) times as fine as the image. The coefficients are the
    band-limited potential divided in Fourier space by the spline's own transform, sinc^3, which makes v exact within
    the band; what is left are the spline's images about multiples of the sampling frequency, (f / (1 - f))^3 of the
    component at f cycles a sample: 0.8 % at the end of the band (f = 1 / (2 s), s = 3) and falling with its third
    power. v has a continuous gradient, so that gradients through the pose are those of v itself. (At equal accuracy
    a cubic spline on a coarser grid costs 16 look-ups a pixel instead of nine.)

    Args:
        coefficients: (N, N) float64.
        step_angstrom: of their grid [angstrom]; the specimen's origin is at sample N // 2.
    """

    coefficients: torch.Tensor
    step_angstrom: float
    _converted: dict[tuple[torch.dtype, torch.device], torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    @classmethod
    def build(
        cls, specimen: Specimen, pixel_size_angstrom: float, *, hard_solvent: bool, oversampling: int = 3
    ) -> Projection:
        """Projects a specimen for images of a pixel size; see `Projector`."""
        return Projector.of(specimen, pixel_size_angstrom, hard_solvent=hard_solvent, oversampling=oversampling).build()

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """The coefficients in another tensor's dtype and on its device; converted once."""
        key = other.dtype, other.device
        if key not in self._converted:
            self._converted[key] = self.coefficients.to(other.device, other.dtype)
        return self._converted[key]

    def sample(self, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """v at fractional grid indices; what lies outside the grid is empty.

        Args:
            columns, rows: positions in samples of the grid, of one shape and dtype.

        Returns:
            v, of the same shape and dtype [V angstrom].
        """
        coefficients = self.like(columns)
        # In blocks that stay in the processor's cache.
        block = _BLOCK if columns.device.type == "cpu" else max(columns.numel(), 1)
        blocks = zip(torch.split(columns.reshape(-1), block), torch.split(rows.reshape(-1), block), strict=True)
        return torch.cat([_interpolated(coefficients, x, y) for x, y in blocks]).reshape(columns.shape)


def spline_filter(size: int, finer: float) -> NDArray[np.float64]:
    """From a spectrum on `size`^2 samples to that of the spline's coefficients on a grid `finer` times as fine.

    Args:
        size: of the spectrum's grid.
        finer: ratio of the steps; the band must end below the coarser grid's Nyquist frequency.

    Returns:
        (size, size // 2 + 1).
    """
    fy, fx = np.fft.fftfreq(size) / finer, np.fft.rfftfreq(size) / finer
    return np.asarray(finer**2 / (np.sinc(fy)[:, None] * np.sinc(fx)[None, :]) ** 3)


@dataclass(frozen=True, eq=False)
class Projector:
    """Projects one set of atoms at any positions: what does not depend on positions is computed once.

    Args:
        specimen: the atoms.
        pixel_size_angstrom: of the image; the potential is band-limited at its Nyquist frequency, isotropically.
        hard_solvent: displaced solvent by threshold rather than the atoms' Gaussians.
        oversampling: of the grid with respect to the image, at least 2.
        size: of the grid of half a pixel's step.
        amounts: (n, r) of each kind of atom in each atom, see `radial_basis`.
        filters: (r, size, size // 2 + 1) from the kinds' spread positions to their potentials' spectra.
        finish: (size, size // 2 + 1) band limit, and division by the spline's transform.
    """

    specimen: Specimen
    pixel_size_angstrom: float
    hard_solvent: bool
    oversampling: int
    size: int
    amounts: NDArray[np.float64]
    filters: NDArray[np.float64]
    finish: NDArray[np.float64]
    _tables: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        specimen: Specimen,
        pixel_size_angstrom: float,
        *,
        hard_solvent: bool,
        oversampling: int = 3,
        reach_angstrom: float | None = None,
    ) -> Projector:
        """A projector of these atoms.

        Args:
            specimen, pixel_size_angstrom, hard_solvent, oversampling: see the class.
            reach_angstrom: largest |x| and |y| that atoms may come to; None for those of the specimen [angstrom].

        Raises:
            InputError: the grid would be too large.
        """
        # Half a pixel, twice the band, is what the non-uniform Fourier transform needs; the finer grid comes after.
        step, finer = pixel_size_angstrom / 2, oversampling / 2
        farthest = float(np.abs(specimen.positions[:, :2]).max()) if reach_angstrom is None else reach_angstrom
        # Room for the atoms' tails, the ringing of the band limit and the support of the spline.
        reach = farthest + 24.0 + 16 * pixel_size_angstrom
        n = 4 * scipy.fft.next_fast_len(int(np.ceil(reach / step / 2)) + 1, real=True)
        if n * oversampling // 2 > 16384:
            raise InputError(
                f"Expected a specimen that fits a grid of 16384^2 samples, got one of {2 * reach:.0f} angstrom and "
                f"steps of {step / finer:g} angstrom. Use larger pixels or a smaller specimen."
            )
        cutoff = 0.5 / pixel_size_angstrom
        kinds, amounts = radial_basis(specimen, cutoff, not hard_solvent)
        f, fx = np.fft.fftfreq(n, step), np.fft.rfftfreq(n, step)
        q2 = f[:, None] ** 2 + fx[None, :] ** 2
        table = np.linspace(0, cutoff**2, 16385)
        kernel = kernel_transform(n)
        # Continuous transform -> samples: a sum over atoms of V~ / (area of a sample).
        spread = kernel[:, None] * kernel[None, : n // 2 + 1] * step**2
        # A frequency on the limit itself does not belong to the band, however it is rounded.
        band = (q2 < cutoff**2 * (1 - 1e-9)) / spread
        curves = (curve(int(z), b, h, table, not hard_solvent) for z, b, h in kinds)
        filters = np.stack([band * np.interp(q2, table, values) for values in curves])
        finish = band_limit(q2, cutoff) * spline_filter(n, finer)
        return cls(specimen, pixel_size_angstrom, hard_solvent, oversampling, n, amounts, filters, finish)

    @property
    def step_angstrom(self) -> float:
        """Of the spline's grid."""
        return self.pixel_size_angstrom / self.oversampling

    def build(self, positions: NDArray[np.float64] | None = None) -> Projection:
        """The projection of the atoms at `positions` (n, 3) [angstrom]; None for the specimen's own."""
        n, step = self.size, self.pixel_size_angstrom / 2
        moved = self.specimen if positions is None else replace(self.specimen, positions=positions)
        spread = _spreading_matrix(moved.positions[:, :2], (n, n), step)
        spectrum = np.zeros((n, n // 2 + 1), dtype=np.complex128)
        for transfer, column in zip(self.filters, self.amounts.T, strict=True):
            spectrum += transfer * scipy.fft.rfft2((spread @ column).reshape(n, n))
        if self.hard_solvent:
            spectrum -= ice_potential() * scipy.fft.rfft2(displaced_thickness(moved, (n, n), step))
        spectrum *= self.finish
        size = n * self.oversampling // 2
        # 4 divides n, so sample n // 2 becomes sample size // 2; the band ends far below n's Nyquist frequency.
        padded = np.zeros((size, spectrum.shape[1]), dtype=np.complex128)
        padded[: n // 2], padded[-(n // 2) :] = spectrum[: n // 2], spectrum[n // 2 :]
        return Projection(torch.from_numpy(scipy.fft.irfft2(padded, s=(size, size))), self.step_angstrom)

    def differentiable(self, positions: torch.Tensor) -> Projection:
        """The same in torch, with derivatives in `positions` (n, 3) float64; for solvent without a threshold."""
        assert not self.hard_solvent
        n, step, device = self.size, self.pixel_size_angstrom / 2, positions.device
        if device not in self._tables:
            tables = (self.amounts, self.filters, self.finish)
            self._tables[device] = tuple(torch.from_numpy(table).to(device) for table in tables)
        amounts, filters, finish = self._tables[device]
        cells, weights = [], []
        for axis in (1, 0):
            cell, weight = kernel_weights(positions[:, axis] / step + n // 2, n)
            cells.append(cell)
            weights.append(weight)
        flat = (cells[0][:, :, None] * n + cells[1][:, None, :]).reshape(-1)
        values = (weights[0][:, :, None] * weights[1][:, None, :]).reshape(len(positions), -1)
        shares = (values[:, :, None] * amounts[:, None, :]).reshape(-1, amounts.shape[1])
        grid = positions.new_zeros(n * n, amounts.shape[1]).index_add(0, flat, shares)
        spectrum = (torch.fft.rfft2(grid.T.reshape(-1, n, n)) * filters).sum(dim=0) * finish
        size = n * self.oversampling // 2
        middle = spectrum.new_zeros(size - n, spectrum.shape[1])
        padded = torch.cat((spectrum[: n // 2], middle, spectrum[n // 2 :]))
        return Projection(torch.fft.irfft2(padded, s=(size, size)), self.step_angstrom)


def kernel_weights(place: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of a periodic line of `size` samples and the spreading kernel's values in them, (n, 8) each.

    Args:
        place: (n,) float64 [samples]; the values are differentiable in it.
        size: of the line.
    """
    first = torch.ceil(place.detach() - SUPPORT / 2).long()
    index = first[:, None] + torch.arange(SUPPORT, device=place.device)
    offset = (index - place[:, None]) / (SUPPORT / 2)
    # The kernel ends at 1e-8 of its height, with an infinite slope in the last point: cut off just before.
    inside = 1 - offset * offset
    root = torch.sqrt(inside.clamp_min(1e-6))
    return index % size, torch.where(inside > 1e-6, torch.exp(BETA * (root - 1)), 0.0)


def _interpolated(coefficients: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The quadratic spline at fractional grid indices (m,); in-place only on tensors that nothing else needs."""
    n = coefficients.shape[0]
    # Clamping keeps the indices valid. At the edge of the grid the potential is zero but for ringing near 1e-4.
    columns, rows = columns.clamp(1, n - 2), rows.clamp(1, n - 2)
    # The nearest sample; its neighbours on both sides complete the support.
    column, row = columns.detach().round(), rows.detach().round()
    if columns.dtype == torch.float64 or n <= 4096:
        base = torch.add(column, row, alpha=n).long()
    else:  # float32 counts integers up to 2^24 only
        base = torch.add(column.long(), row.long(), alpha=n)
    base -= n + 1
    (left, right), (above, below) = _outer_weights(columns - column), _outer_weights(rows - row)
    flat, reach = coefficients.reshape(-1), (n - 3) * n + n - 2

    def line(j: int) -> torch.Tensor:
        # A narrowed view instead of base + offset: no new index array for each of the nine.
        first, middle, last = (flat.narrow(0, j * n + i, reach).index_select(0, base) for i in range(3))
        # The weights' sum is one: middle + w_first (first - middle) + w_last (last - middle).
        return middle.addcmul(left, first.sub_(middle), value=0.5).addcmul_(right, last.sub_(middle), value=0.5)

    middle = line(1)
    return middle.addcmul(above, line(0).sub_(middle), value=0.5).addcmul_(below, line(2).sub_(middle), value=0.5)


def _outer_weights(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Twice the quadratic B-spline's values at samples -1 and 1, of a point at `part` in [-1/2, 1/2]."""
    last = (part + 0.5).square()
    return torch.sub(last, part, alpha=2), last
