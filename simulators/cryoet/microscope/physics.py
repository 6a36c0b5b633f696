"""Relativistic electrons and the strength of their interaction with an electrostatic potential.

Every constant comes from CODATA through `scipy.constants`. The functions take numbers or torch tensors, so that
the smooth mode may differentiate through the voltage.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from scipy import constants

Scalar = TypeVar("Scalar", float, torch.Tensor, float | torch.Tensor)

REST_ENERGY_EV = constants.m_e * constants.c**2 / constants.e
"""Rest energy of the electron [eV]."""

POTENTIAL_CONSTANT = constants.h**2 / (2 * constants.pi * constants.m_e * constants.e) * 1e20
"""h^2 / (2 pi m e) [V angstrom^2]: scattering factor [angstrom] -> Fourier transform of the potential."""

ICE_MOLECULES_PER_ANGSTROM3 = 0.0314
"""Water molecules in vitreous ice of 0.94 g/cm^3 [1/angstrom^3]."""


def wavelength_angstrom(voltage_kv: Scalar) -> Scalar:
    r"""Relativistic wavelength of the beam.

    lambda = h c / sqrt(E (E + 2 E_0)), E = e V.

    Args:
        voltage_kv: accelerating voltage [kV].

    Returns:
        lambda [angstrom].

    Reference:
        Reimer & Kohl, Transmission Electron Microscopy, 5th edition, equation 2.5.
    """
    energy = voltage_kv * 1e3
    hc = constants.h * constants.c / constants.e * 1e10
    return hc / (energy * (energy + 2 * REST_ENERGY_EV)) ** 0.5


def interaction_constant(voltage_kv: Scalar) -> Scalar:
    r"""Phase per projected potential.

    sigma = 2 pi m_0 gamma e lambda / h^2, gamma = 1 + E / E_0.

    Args:
        voltage_kv: accelerating voltage [kV].

    Returns:
        sigma [rad / (V angstrom)].

    Reference:
        Kirkland, Advanced Computing in Electron Microscopy, 3rd edition, equation 5.6.
    """
    gamma = 1 + voltage_kv * 1e3 / REST_ENERGY_EV
    # lambda in angstrom (1e-10 m) and the result per angstrom (1e-10 / m): 1e-20 altogether.
    scale = 2 * constants.pi * constants.m_e * constants.e / constants.h**2 * 1e-20
    return scale * gamma * wavelength_angstrom(voltage_kv)


def focal_spread_angstrom(voltage_kv: Scalar, energy_spread_ev: Scalar, cc_mm: Scalar) -> Scalar:
    r"""Standard deviation of the focus caused by the spread of the beam's energy.

    sigma_f = C_c (dE / E) (1 + E / E_0) / (1 + E / (2 E_0)).

    Args:
        voltage_kv: accelerating voltage [kV].
        energy_spread_ev: standard deviation of the energy, dE [eV]; 0.425 of the full width at half maximum.
        cc_mm: coefficient of chromatic aberration [mm].

    Returns:
        sigma_f [angstrom].

    Reference:
        Reimer & Kohl, Transmission Electron Microscopy, 5th edition, section 2.3.4.
    """
    energy = voltage_kv * 1e3
    relativistic = (1 + energy / REST_ENERGY_EV) / (1 + energy / (2 * REST_ENERGY_EV))
    return cc_mm * 1e7 * energy_spread_ev / energy * relativistic
