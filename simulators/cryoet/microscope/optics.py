"""The lens: aberrations, envelopes and the objective aperture.

Spatial frequencies q are in 1/angstrom. Defocus is positive for underfocus; with the transfer function
T = E exp(i chi) of this module, protein is dark at underfocus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch

from bridge.errors import InputError
from simulators.cryoet.device import CPU
from simulators.cryoet.microscope.physics import focal_spread_angstrom, wavelength_angstrom

Value = float | torch.Tensor


def check_range(owner: str, name: str, value: object, lower: float, upper: float, open_lower: bool = False) -> None:
    """Raises `InputError` unless `value` is a number in [lower, upper] (or in (lower, upper])."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    inside = number and (lower < value if open_lower else lower <= value) and value <= upper  # type: ignore[operator]
    if not inside:
        bracket = "(" if open_lower else "["
        raise InputError(
            f"Expected {owner}.{name} to be a number in {bracket}{lower:g}, {upper:g}], got {value!r}. "
            "The unit ends the name; correct the value."
        )


@dataclass(frozen=True)
class Microscope:
    """The microscope's settings.

    Args:
        voltage_kv: accelerating voltage [kV].
        defocus_um: mean defocus, positive is underfocus [um].
        astigmatism_um: half the difference of the two principal defoci [um].
        astigmatism_angle_deg: direction of the larger defocus, from +x (column) to +y (row) [degree].
        cs_mm: spherical aberration [mm].
        amplitude_contrast: w, the part of the contrast that is amplitude contrast.
        phase_shift_deg: extra phase of the scattered wave (phase plate) [degree].
        energy_spread_ev: standard deviation of the beam's energy [eV].
        cc_mm: chromatic aberration [mm].
        convergence_mrad: illumination semi-angle at 1/e [mrad].
        aperture_um: diameter of the objective aperture [um]; 0 for none.
        focal_length_mm: of the objective lens; with the aperture it fixes the cut-off frequency [mm].
        b_factor_angstrom2: B of the remaining envelope exp(-B q^2 / 4) [angstrom^2].
    """

    voltage_kv: float = 300.0
    defocus_um: float = 1.5
    astigmatism_um: float = 0.0
    astigmatism_angle_deg: float = 0.0
    cs_mm: float = 2.7
    amplitude_contrast: float = 0.07
    phase_shift_deg: float = 0.0
    energy_spread_ev: float = 0.3
    cc_mm: float = 2.7
    convergence_mrad: float = 0.02
    aperture_um: float = 100.0
    focal_length_mm: float = 3.5
    b_factor_angstrom2: float = 50.0

    def __post_init__(self) -> None:
        limits = {
            "voltage_kv": (1.0, 1e4),
            "defocus_um": (-100.0, 100.0),
            "astigmatism_um": (-100.0, 100.0),
            "cs_mm": (-100.0, 100.0),
            "amplitude_contrast": (0.0, 0.99),
            "energy_spread_ev": (0.0, 1e3),
            "cc_mm": (0.0, 100.0),
            "convergence_mrad": (0.0, 100.0),
            "aperture_um": (0.0, 1e5),
            "focal_length_mm": (0.01, 100.0),
            "b_factor_angstrom2": (0.0, 1e4),
        }
        for item in fields(self):
            lower, upper = limits.get(item.name, (-3.6e5, 3.6e5))
            check_range("Microscope", item.name, getattr(self, item.name), lower, upper)

    def values(self) -> dict[str, float]:
        """The settings by parameter name; `b_factor_angstrom2` is the parameter `b_factor`."""
        table = {item.name: float(getattr(self, item.name)) for item in fields(self)}
        table["b_factor"] = table.pop("b_factor_angstrom2")
        return table


@dataclass(frozen=True)
class Frequencies:
    """Spatial frequencies of an image in the order of `torch.fft.fft2`.

    Args:
        q2: squared frequency (H, W) [1/angstrom^2].
        cosine, sine: q2 cos(2 phi) and q2 sin(2 phi), phi from +x to +y (H, W) [1/angstrom^2].
        scattered: 1 everywhere but 0 at q = 0, where the unscattered beam goes (H, W).
        highest: the largest |q| of the grid [1/angstrom].
    """

    q2: torch.Tensor
    cosine: torch.Tensor
    sine: torch.Tensor
    scattered: torch.Tensor
    highest: float

    @property
    def quadrant(self) -> Frequencies:
        """Those of qx >= 0 and qy >= 0 (and the Nyquist frequencies)."""
        part = (slice(self.q2.shape[0] // 2 + 1), slice(self.q2.shape[1] // 2 + 1))
        q2, cosine, sine, scattered = (t[part] for t in (self.q2, self.cosine, self.sine, self.scattered))
        return Frequencies(q2, cosine, sine, scattered, self.highest)


@lru_cache(maxsize=16)
def frequencies(
    shape: tuple[int, int], pixel_size_angstrom: float, dtype: torch.dtype, device: torch.device = CPU
) -> Frequencies:
    """The frequency grid of an image of `shape` (rows, columns); computed once per content."""
    qy = torch.fft.fftfreq(shape[0], pixel_size_angstrom, dtype=torch.float64)[:, None]
    qx = torch.fft.fftfreq(shape[1], pixel_size_angstrom, dtype=torch.float64)[None, :]
    q2 = qx**2 + qy**2
    tables = (q2, qx**2 - qy**2, 2 * qx * qy, q2 > 0)
    return Frequencies(*(table.to(device, dtype) for table in tables), float(q2.max().sqrt()))


def _is_zero(value: Value) -> bool:
    return not isinstance(value, torch.Tensor) and value == 0.0


def cos_sin(degrees: Value) -> tuple[Value, Value]:
    """Cosine and sine of an angle in degrees, as numbers or tensors like the angle itself."""
    if isinstance(degrees, torch.Tensor):
        angle = torch.deg2rad(degrees)
        return torch.cos(angle), torch.sin(angle)
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def local_defocus(values: Mapping[str, Value], grid: Frequencies) -> Value:
    r"""Defocus in each direction: df(phi) = df + A cos 2(phi - phi_A) + z [angstrom].

    A scalar without astigmatism, else (H, W).
    """
    defocus = values["defocus_um"] * 1e4 + values.get("z_angstrom", 0.0)
    if _is_zero(values["astigmatism_um"]):
        return defocus
    cosine, sine = cos_sin(2 * values["astigmatism_angle_deg"])
    # cos 2(phi - phi_A) from q^2 cos 2phi and q^2 sin 2phi; the direction of q = 0 does not matter.
    direction = (grid.cosine * cosine + grid.sine * sine) / torch.where(grid.q2 > 0, grid.q2, 1.0)
    return defocus + values["astigmatism_um"] * 1e4 * direction


def phase_aberration(values: Mapping[str, Value], grid: Frequencies) -> torch.Tensor:
    r"""Phase of the transfer function.

    chi(q) = pi lambda df(phi) q^2 - (pi / 2) C_s lambda^3 q^4 + phase shift (scattered wave only).

    Args:
        values: microscope settings by name, numbers or 0-d tensors.
        grid: frequencies.

    Returns:
        chi (H, W) [rad].

    Reference:
        Reimer & Kohl, Transmission Electron Microscopy, 5th edition, equation 3.66 (with underfocus positive).
    """
    wavelength = wavelength_angstrom(values["voltage_kv"])
    quartic = -0.5 * math.pi * 1e7 * values["cs_mm"] * wavelength**3
    chi = grid.q2 * (math.pi * wavelength * local_defocus(values, grid) + quartic * grid.q2)
    if _is_zero(values["phase_shift_deg"]):
        return chi
    return chi + (values["phase_shift_deg"] * (math.pi / 180)) * grid.scattered


def envelope_exponent(values: Mapping[str, Value], grid: Frequencies) -> torch.Tensor:
    r"""Minus the logarithm of the coherence envelopes and of the B factor.

    E = exp(-B q^2 / 4) exp(-(pi lambda sigma_f)^2 q^4 / 2) exp(-pi^2 a^2 (df q - C_s lambda^2 q^3)^2).

    Args:
        values: microscope settings by name; the energy spread is a standard deviation, a the 1/e semi-angle.
        grid: frequencies.

    Returns:
        -log E (H, W).

    Reference:
        Frank, Optik 38 (1973) 519; Wade & Frank, Optik 49 (1977) 81.
    """
    wavelength = wavelength_angstrom(values["voltage_kv"])
    spread = focal_spread_angstrom(values["voltage_kv"], values["energy_spread_ev"], values["cc_mm"])
    exponent = 0.25 * values["b_factor"] + (0.5 * (math.pi * wavelength * spread) ** 2) * grid.q2
    if not _is_zero(values["convergence_mrad"]):
        slope = local_defocus(values, grid) - (1e7 * values["cs_mm"] * wavelength**2) * grid.q2
        exponent = exponent + (math.pi * 1e-3 * values["convergence_mrad"]) ** 2 * slope**2
    return exponent * grid.q2


def aperture_cutoff(values: Mapping[str, Value]) -> Value:
    r"""Cut-off frequency of the objective aperture, q_a = (d / 2) / (f lambda) [1/angstrom]."""
    half_angle = 0.5e-3 * values["aperture_um"] / values["focal_length_mm"]
    return half_angle / wavelength_angstrom(values["voltage_kv"])


def aperture(values: Mapping[str, Value], grid: Frequencies, *, smooth: bool) -> torch.Tensor | None:
    r"""Transmission of the objective aperture; None where it certainly passes every frequency of the grid.

    Hard: [q < q_a]. Smooth: 1 / (1 + exp((q^2 - q_a^2) / (0.04 q_a^2))), a blur of about 2 % of the radius.
    """
    if _is_zero(values["aperture_um"]):
        return None
    cutoff = aperture_cutoff(values)
    # The smooth edge of an aperture at 1.5 times the highest frequency transmits all but exp(-13) there.
    if not isinstance(cutoff, torch.Tensor) and cutoff > (1.5 if smooth else 1.0) * grid.highest:
        return None
    if smooth:
        return torch.sigmoid((1 - grid.q2 / cutoff**2) / 0.04)
    return (grid.q2 < cutoff**2).to(grid.q2.dtype)


def transfer_function(values: Mapping[str, Value], grid: Frequencies, *, smooth: bool) -> torch.Tensor:
    r"""T(q) = A(q) E(q) exp(i chi(q)), which multiplies the Fourier transform of the exit wave.

    Args:
        values: microscope settings by name, numbers or 0-d tensors.
        grid: frequencies.
        smooth: a smooth edge of the aperture rather than a hard one.

    Returns:
        T (H, W), complex.
    """
    if _is_zero(values["astigmatism_um"]):
        # Then T depends on |qx| and |qy| alone: a quarter, and its mirror images.
        return unfolded(_transfer(values, grid.quadrant, smooth=smooth), grid.q2.shape)
    return _transfer(values, grid, smooth=smooth)


def unfolded(quarter: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """What depends on |qx| and |qy| alone, (rows, columns), from its values at `Frequencies.quadrant`."""
    rows, columns = ((n + 1) // 2 for n in shape)
    upper = torch.cat((quarter, quarter[:, 1:columns].flip(1)), 1)
    return torch.cat((upper, upper[1:rows].flip(0)))


def _transfer(values: Mapping[str, Value], grid: Frequencies, *, smooth: bool) -> torch.Tensor:
    chi = phase_aberration(values, grid)
    amplitude = torch.exp(-envelope_exponent(values, grid))
    opening = aperture(values, grid, smooth=smooth)
    if opening is not None:
        amplitude = amplitude * opening
    return torch.complex(amplitude * torch.cos(chi), amplitude * torch.sin(chi))


def contrast_transfer(
    microscope: Microscope, shape: tuple[int, int], pixel_size_angstrom: float, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    r"""Contrast transfer function of a weak object, without envelopes and aperture.

    CTF(q) = sin(chi(q) + arcsin w), so that I(q) = delta(q) - 2 sigma v(q) CTF(q) / sqrt(1 - w^2).

    Args:
        microscope: settings.
        shape: (rows, columns).
        pixel_size_angstrom: pixel [angstrom].
        dtype: of the result.

    Returns:
        CTF (H, W), in the order of `torch.fft.fft2`.
    """
    grid = frequencies(shape, pixel_size_angstrom, dtype)
    return torch.sin(phase_aberration(microscope.values(), grid) + math.asin(microscope.amplitude_contrast))
