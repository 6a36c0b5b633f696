"""Scattering and the lens in TEM-simulator v1.3's model: elastic waves, what is scattered inelastically, and ice.

Lengths are in nm, angles in radians; frequencies are angular, q = 2 pi / length.

Reference:
    Rullgard, Ofverstedt, Masich, Daneholt & Oktem (2011), J. Microsc. 243, 234.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import scipy.special
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from simulators.cryoet.device import CPU
from simulators.cryoet.microscope.optics import check_range
from simulators.cryoet.microscope.physics import REST_ENERGY_EV
from simulators.cryoet.temsim.potential import (
    ICE_PER_NM3,
    cross_section,
    differential_cross_section,
    water_cross_section,
    wave_number,
)

CARBON_PER_NM3 = 100.0
"""Atoms of the carbon film [1/nm^3]."""

# Ice of different thickness: blurred at so many thicknesses at most, a tenth of the smallest one apart at least.
_MOST_LEVELS, _LEVELS_A_THICKNESS = 20, 10
_THIN_NM = 1.0

# Rows and columns of the largest table of Bessel functions that is made at once.
_LARGEST_TABLE = 1024


@dataclass(frozen=True)
class Sample:
    """A round hole in a carbon film, filled with ice whose thickness is t_c + (t_e - t_c) (2 r / diameter)^2.

    Args:
        diameter_nm: of the hole.
        thickness_center_nm: t_c.
        thickness_edge_nm: t_e, also that of the film.
    """

    diameter_nm: float = 1000.0
    thickness_center_nm: float = 50.0
    thickness_edge_nm: float = 150.0

    def __post_init__(self) -> None:
        for name in ("diameter_nm", "thickness_center_nm", "thickness_edge_nm"):
            check_range("Sample", name, getattr(self, name), 0.0, 1e6)


@dataclass(frozen=True)
class Optics:
    """The microscope's settings.

    Args:
        voltage_kv: accelerating voltage.
        energy_spread_ev: spread of the beam's energy.
        defocus_um: positive is underfocus.
        cs_mm, cc_mm: spherical and chromatic aberration.
        aperture_um: diameter of the objective aperture.
        focal_length_mm: with the aperture, where scattered electrons are cut off.
        cond_ap_angle_mrad: aperture angle of the condenser.
    """

    voltage_kv: float = 300.0
    energy_spread_ev: float = 1.3
    defocus_um: float = 5.0
    cs_mm: float = 2.0
    cc_mm: float = 2.0
    aperture_um: float = 50.0
    focal_length_mm: float = 3.0
    cond_ap_angle_mrad: float = 0.1

    def __post_init__(self) -> None:
        limits = {
            "voltage_kv": (1.0, 1e4),
            "energy_spread_ev": (0.0, 1e3),
            "defocus_um": (-100.0, 100.0),
            "cs_mm": (-100.0, 100.0),
            "cc_mm": (-100.0, 100.0),
            "aperture_um": (0.0, 1e4),
            "focal_length_mm": (0.01, 1e3),
            "cond_ap_angle_mrad": (0.0, 100.0),
        }
        for name, (lower, upper) in limits.items():
            check_range("Optics", name, getattr(self, name), lower, upper)


@dataclass(frozen=True, eq=False)
class Grid:
    """Angular frequencies of an image in a quarter of the transform's order, q_y >= 0 and q_x >= 0.

    Args:
        shape: (rows, columns) of the image.
        pixel_nm: [nm].
        q: |q| (rows // 2 + 1, columns // 2 + 1) [1/nm].
    """

    shape: tuple[int, int]
    pixel_nm: float
    q: Array

    @classmethod
    @lru_cache(maxsize=8)
    def of(cls, shape: tuple[int, int], pixel_nm: float) -> Grid:
        qy, qx = (2 * np.pi / (n * pixel_nm) * np.arange(n // 2 + 1) for n in shape)
        return cls(shape, pixel_nm, np.hypot(qy[:, None], qx))

    def half(self, quarter: torch.Tensor) -> torch.Tensor:
        """The quarter and its mirror image in the order of `torch.fft.rfft2`."""
        return torch.cat((quarter, quarter[1 : (self.shape[0] + 1) // 2].flip(0)))

    def full(self, quarter: torch.Tensor) -> torch.Tensor:
        """The quarter and its mirror images in the order of `torch.fft.fft2`."""
        return self.half(torch.cat((quarter, quarter[:, 1 : (self.shape[1] + 1) // 2].flip(1)), 1))


def slice_height(voltage_kv: float, pixel_nm: float) -> float:
    """Thickness of the slices to which particles are moved, pixel^2 k / (4 pi) [nm]."""
    return pixel_nm**2 * wave_number(voltage_kv) / (4 * math.pi)


def slice_of(z_nm: float, voltage_kv: float, pixel_nm: float) -> float:
    """Height of the slice nearest to z [nm]."""
    d = slice_height(voltage_kv, pixel_nm)
    return d * math.floor(z_nm / d + 0.5)


def lens(values: Mapping[str, float], height_nm: float, grid: Grid, device: torch.device = CPU) -> torch.Tensor:
    r"""Transfer function of elastically scattered electrons.

    T = exp(i (df q^2 / (2 k) - C_s q^4 / (4 k^3))) exp(c q^2 + d q^4 + e q^6) [q < min(pi / pixel, k ap / (2 f))],
    c = -df^2 a^2 / 4, d = (df C_s a^2 / 2 - dE^2 C^2 / 16) / k^2, e = -C_s^2 a^2 / (4 k^4),
    C = C_c (1 + 2 r E) / (E (1 + r E)), r = 1 / (2 E_0), a the condenser's angle.

    Args:
        values: settings by the names of `Optics`.
        height_nm: added to the defocus.
        grid: frequencies.
        device: of the result.

    Returns:
        (rows, columns) complex64, in the order of `torch.fft.fft2`; 1 at q = 0.
    """
    kv = values["voltage_kv"]
    k, energy = wave_number(kv), 1e3 * kv
    df, cs = 1e3 * values["defocus_um"] + height_nm, 1e6 * values["cs_mm"]
    chromatic = 1e6 * values["cc_mm"] * (1 + energy / REST_ENERGY_EV)
    chromatic /= energy * (1 + 0.5 * energy / REST_ENERGY_EV)
    angle2 = (1e-3 * values["cond_ap_angle_mrad"]) ** 2
    c = -0.25 * df * df * angle2
    d = (0.5 * df * cs * angle2 - (values["energy_spread_ev"] * chromatic / 4) ** 2) / k**2
    e = -0.25 * cs * cs * angle2 / k**4
    q2 = grid.q**2
    turns = q2 * ((0.5 * df / k - 0.25 * cs / k**3 * q2) / (2 * math.pi))
    # Single precision is enough for an angle within a turn, and a fraction of the time.
    phase = ((turns - np.rint(turns)) * (2 * math.pi)).astype(np.float32)
    amplitude = np.exp((q2 * (c + q2 * (d + e * q2))).astype(np.float32))
    amplitude *= grid.q < min(math.pi / grid.pixel_nm, k * collection_angle(values))
    quarter = torch.complex(torch.from_numpy(amplitude * np.cos(phase)), torch.from_numpy(amplitude * np.sin(phase)))
    return grid.full(quarter.to(device))


def collection_angle(values: Mapping[str, float]) -> float:
    """Largest angle that passes the aperture, ap / (2 f) [rad]."""
    return 0.5e-3 * values["aperture_um"] / values["focal_length_mm"]


def _bessel_sums(largest: float, rings: Array, size: int) -> Array:
    """sum_i J_0(i j / largest) rings_i for j < size and i = 1, ..., n: (size, c) of rings (n, c)."""
    n = len(rings)
    if max(size, n + 1) <= _LARGEST_TABLE:
        # Most products i j occur several times.
        distinct, which = _products(64 * math.ceil(max(size, n + 1) / 64))
        table: Array = scipy.special.j0(distinct / largest)[which[:size, 1 : n + 1]]
        return table @ rings
    # A short focal length needs millions of them.
    parts = np.array_split(np.arange(size) / largest, math.ceil(size * n / _LARGEST_TABLE**2))
    return np.concatenate([scipy.special.j0(np.outer(part, np.arange(1, n + 1))) @ rings for part in parts])


@lru_cache(maxsize=8)
def _products(size: int) -> tuple[Array, NDArray[np.int64]]:
    """The distinct products i j of numbers below `size`, and which of them each pair has (size, size)."""
    numbers = np.arange(size)
    distinct, which = np.unique(np.outer(numbers, numbers), return_inverse=True)
    return distinct.astype(np.float64), which.reshape(size, size)


@dataclass(frozen=True, eq=False)
class Scattering:
    r"""What passes the aperture of the electrons scattered at an angle, as a function of x = |q| |defocus|.

    A sum in place of the integral 2 pi int_0^{t_max} J_0(x t) (d sigma / d Omega) t dt, over steps of
    dt = pixel / (pi (|defocus| + 1 um)): the number of them, floor(t_max / dt), jumps with focal length and aperture.

    Args:
        particle: share of a particle's electrons, with carbon's cross-sections, at x = i / t_max.
        ice: what ice takes away, per thickness [1/nm].
        angle: t_max [rad].
    """

    particle: Array
    ice: Array
    angle: float

    @classmethod
    def of(cls, values: Mapping[str, float], pixel_nm: float) -> Scattering:
        kv, largest = values["voltage_kv"], collection_angle(values)
        end = math.pi * (1e3 * abs(values["defocus_um"]) + 1e3) / pixel_nm
        count, size = math.floor(largest * end), max(math.ceil(end * largest), 1)
        angle = np.arange(1, count + 1) / end
        ring = 2 * np.pi * angle / end
        carbon = ring / cross_section(6, kv) * differential_cross_section(6, kv, angle)
        water = ring * (differential_cross_section(8, kv, angle) + 2 * differential_cross_section(1, kv, angle))
        kernels = _bessel_sums(end * largest, np.stack((carbon, water), axis=1), size)
        return cls(kernels[:, 0].copy(), ICE_PER_NM3 * (water_cross_section(kv) - kernels[:, 1]), largest)

    def at(self, defocus_nm: float, grid: Grid) -> tuple[Array, Array]:
        """Both kernels on a quarter of the frequencies, linear between their samples and constant after the last."""
        place = grid.q * (abs(defocus_nm) * self.angle)
        first = np.minimum(place.astype(np.int64), len(self.ice) - 1)
        second = np.minimum(first + 1, len(self.ice) - 1)
        part = place - first
        return (
            self.particle[first] + part * (self.particle[second] - self.particle[first]),
            self.ice[first] + part * (self.ice[second] - self.ice[first]),
        )


@dataclass(frozen=True, eq=False)
class Thickness:
    """Ice on each pixel, and the levels between which it is interpolated.

    Args:
        lowest, step: thickness of the first level, and from one to the next [nm].
        weights: of each level (rows, columns), hat functions of the thickness, float64.
        beyond: what is thicker than the last level (rows, columns); None where nothing is [nm].
    """

    lowest: float
    step: float
    weights: tuple[torch.Tensor, ...]
    beyond: torch.Tensor | None
    _elsewhere: dict[torch.device, Thickness] = field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> Thickness:
        """The same on a device; copied once."""
        if device not in self._elsewhere:
            beyond = None if self.beyond is None else self.beyond.to(device)
            weights = tuple(weight.to(device) for weight in self.weights)
            self._elsewhere[device] = Thickness(self.lowest, self.step, weights, beyond)
        return self._elsewhere[device]

    @classmethod
    def of(cls, sample: Sample, voltage_kv: float, grid: Grid) -> Thickness:
        """Of an untilted sample whose centre is the image's."""
        corner = 0.5 * grid.pixel_nm * math.hypot(*(n - 1 for n in grid.shape))
        # Carbon is worth as much ice as it scatters more.
        carbon = CARBON_PER_NM3 * cross_section(6, voltage_kv) / (ICE_PER_NM3 * water_cross_section(voltage_kv))
        return cls._of(sample, 0.0 if corner < 0.5 * sample.diameter_nm else carbon, grid)

    @classmethod
    @lru_cache(maxsize=8)
    def _of(cls, sample: Sample, carbon: float, grid: Grid) -> Thickness:
        y, x = ((np.arange(n) - 0.5 * (n - 1)) * grid.pixel_nm for n in grid.shape)
        r2 = y[:, None] ** 2 + x**2
        edge2 = (0.5 * sample.diameter_nm) ** 2
        inside = r2 < edge2
        rise = (sample.thickness_edge_nm - sample.thickness_center_nm) / edge2 if edge2 else 0.0
        ice = np.where(inside, sample.thickness_center_nm + rise * r2, carbon * sample.thickness_edge_nm)
        lowest = float(ice.min())
        free = ice[inside | (sample.thickness_edge_nm < _THIN_NM)]
        highest = max(float(free.max(initial=0.0)), lowest)
        if highest < _THIN_NM:
            return cls(0.0, 1.0, (torch.ones(grid.shape, dtype=torch.float64),), None)
        spread, levels = highest - lowest, _MOST_LEVELS
        if spread < _THIN_NM:
            levels = 0
        elif _LEVELS_A_THICKNESS * spread < _MOST_LEVELS * lowest:
            levels = math.ceil(_LEVELS_A_THICKNESS * spread / lowest)
        step = spread / levels if levels else 1.0
        away = [(ice - lowest) / step - level for level in range(levels + 1)]
        weights = [np.maximum(1 - np.abs(a), 0.0) for a in away]
        over = np.maximum(away[-1], 0.0)
        weights[-1] = np.where(over > 0, 1.0, weights[-1])
        beyond = torch.from_numpy(over * step) if over.max() > 0 else None
        return cls(lowest, step, tuple(map(torch.from_numpy, weights)), beyond)

    def blurred(self, spectrum: torch.Tensor, taken: Array, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left of the beam behind this ice, and of an image's deviation from it.

        Each level blurs the image in its own way; between levels both are interpolated by thickness, beyond the last
        they fall off as what is not scattered.

        Args:
            spectrum: of the deviation without ice, in the order of `torch.fft.rfft2`, complex64.
            taken: what ice takes away on a quarter of the frequencies, per thickness [1/nm].
            grid: frequencies.

        Returns:
            the beam (rows, columns) float64, and the deviation (rows, columns) float32.
        """
        blur, further = (np.exp((-t * taken).astype(np.float32)) for t in (self.lowest, self.step))
        # The beam is where all the dose is, so it is kept in double precision.
        device = spectrum.device
        here = self.on(device)
        beam = torch.zeros(grid.shape, dtype=torch.float64, device=device)
        total = torch.zeros(grid.shape, dtype=torch.float32, device=device)
        for level, weight in enumerate(here.weights):
            image = torch.fft.irfft2(spectrum * grid.half(torch.from_numpy(blur).to(device)), s=grid.shape)
            total.addcmul_(image, weight.to(torch.float32))
            beam.add_(weight, alpha=math.exp(-(self.lowest + level * self.step) * float(taken[0, 0])))
            blur = blur * further
        if here.beyond is not None:
            fall = torch.exp(-float(taken[0, 0]) * here.beyond)
            beam *= fall
            total *= fall
        return beam, total
