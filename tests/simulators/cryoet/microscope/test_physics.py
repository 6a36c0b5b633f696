"""Constants, potential and lens of the cryo-EM simulator, against formulas and numbers from elsewhere."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.errors import InputError
from simulators.cryoet import Microscope, Specimen, contrast_transfer, projected_potential
from simulators.cryoet.microscope.optics import (
    aperture,
    aperture_cutoff,
    envelope_exponent,
    frequencies,
    phase_aberration,
    transfer_function,
)
from simulators.cryoet.microscope.physics import (
    POTENTIAL_CONSTANT,
    focal_spread_angstrom,
    interaction_constant,
    wavelength_angstrom,
)
from simulators.cryoet.specimen.potential import (
    displaced_thickness,
    displaced_volume,
    displaced_voxels,
    ice_potential,
    peng_coefficients,
    scattering_factor,
)
from simulators.cryoet.tilt.parameters import about_z

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

ABTEM = Path(__file__).parents[3] / "data" / "cryoet_abtem.npz"


@pytest.fixture(scope="module")
def abtem() -> dict[str, np.ndarray]:
    with np.load(ABTEM) as stored:
        return dict(stored)


# abTEM 1.0.11, abtem.core.energy.energy2wavelength and energy2sigma.
@pytest.mark.parametrize(
    ("voltage", "wavelength", "sigma"),
    [
        (80.0, 0.0417571618, 1.008706603e-3),
        (100.0, 0.0370143661, 9.24395823e-4),
        (120.0, 0.0334921525, 8.63811325e-4),
        (200.0, 0.0250793403, 7.28840105e-4),
        (300.0, 0.0196874888977, 6.526161465e-4),
    ],
)
def test_wavelength_and_interaction_constant(voltage: float, wavelength: float, sigma: float) -> None:
    assert wavelength_angstrom(voltage) == pytest.approx(wavelength, rel=1e-6)
    assert interaction_constant(voltage) == pytest.approx(sigma, rel=1e-6)
    tensor = torch.tensor(voltage, dtype=torch.float64)
    assert wavelength_angstrom(tensor).item() == pytest.approx(wavelength_angstrom(voltage), rel=1e-14)


def test_potential_constant() -> None:
    assert pytest.approx(47.87765, rel=1e-6) == POTENTIAL_CONSTANT


def test_focal_spread_is_the_derivative_of_focus_with_energy() -> None:
    # dE/E with the relativistic factor is minus 2 d(log lambda) at fixed lens current.
    h = 1e-4
    slope = (math.log(wavelength_angstrom(300.0 + h)) - math.log(wavelength_angstrom(300.0 - h))) / (2 * h * 1e3)
    assert focal_spread_angstrom(300.0, 0.7, 2.7) == pytest.approx(-2 * slope * 0.7 * 2.7e7, rel=1e-6)


def test_ice_potential() -> None:
    # 0.94 g/cm^3 of molecules of 18.015 g/mol; f_O(0) = 1.9834, f_H(0) = 0.5288 angstrom.
    n = 0.94 / 18.015 * 0.602214
    assert ice_potential() == pytest.approx(47.87765 * n * (1.9834 + 2 * 0.5288), rel=2e-3)


def test_potential_equals_abtem(abtem: dict[str, np.ndarray]) -> None:
    specimen = Specimen.from_atoms(abtem["positions"] - [24, 24, 0], abtem["numbers"])
    ours = projected_potential(specimen, (48, 48), 1.0, resolution_angstrom=3.0)
    error = np.sqrt(np.mean((ours - abtem["potential"]) ** 2)) / abtem["potential"].std()
    assert error < 1e-3
    # Power: a tenth of a per cent more potential, or a pixel elsewhere, would be noticed.
    assert np.sqrt(np.mean((1.002 * ours - abtem["potential"]) ** 2)) / abtem["potential"].std() > 1e-3


def test_fourier_transform_equals_the_sum_over_atoms(abtem: dict[str, np.ndarray]) -> None:
    """The non-uniform transform and the basis of radial functions against each atom's own exponential."""
    rng = np.random.default_rng(0)
    numbers, positions = abtem["numbers"], abtem["positions"] - [24, 24, 0]
    b_factors, weights, hydrogens = rng.uniform(0, 200, 100), rng.uniform(0.2, 1, 100), rng.integers(0, 4, 100)
    specimen = Specimen.from_atoms(positions, numbers, weights=weights, b_factors=b_factors, hydrogens=hydrogens)
    shape, step = (40, 54), 1.1
    ours = np.fft.fft2(projected_potential(specimen, shape, step, resolution_angstrom=2.5)) * step**2
    qy, qx = np.fft.fftfreq(shape[0], step)[:, None], np.fft.fftfreq(shape[1], step)[None, :]
    q2 = qx**2 + qy**2
    exact = np.zeros(shape, dtype=complex)
    for (x, y, _), z, w, b, h in zip(positions, numbers, weights, b_factors, hydrogens, strict=True):
        # Origin at pixel n // 2.
        phase = qx * (x + shape[1] // 2 * step) + qy * (y + shape[0] // 2 * step)
        factor = scattering_factor(int(z), q2) + h * scattering_factor(1, q2)
        exact += w * 47.87764724 * factor * np.exp(-0.25 * b * q2 - 2j * np.pi * phase)
    exact *= q2 < 1 / 2.5**2
    assert np.abs(ours - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("atomic_number", [1, 6, 8, 26, 79])
def test_potential_of_one_atom_in_real_space(atomic_number: int) -> None:
    b_factor, step, n = 40.0, 0.25, 128
    specimen = Specimen.from_atoms([[0.1, -0.2, 3.0]], [atomic_number], b_factors=b_factor)
    ours = projected_potential(specimen, (n, n), step)
    y, x = np.meshgrid(*(2 * [(np.arange(n) - n // 2) * step]), indexing="ij")
    r2 = (x - 0.1) ** 2 + (y + 0.2) ** 2
    exact = np.zeros((n, n))
    for a, b in zip(*peng_coefficients(atomic_number), strict=True):
        width = b + b_factor
        exact += 47.87765 * a * 4 * np.pi / width * np.exp(-4 * np.pi**2 * r2 / width)
    assert np.abs(ours - exact).max() < 2e-6 * exact.max()


@pytest.mark.parametrize("step", [0.4, 1.0])
def test_displaced_solvent_lowers_the_potential_by_its_volume(step: float) -> None:
    """Against each atom's Gaussian in real space: V_ice V 4 pi / c exp(-4 pi^2 r^2 / c), c = 4 pi V^(2/3) + B."""
    b_factor, n = 20.0, 64
    specimen = Specimen.from_atoms([[0, 0, 0], [4, 0, 0]], [6, 8], b_factors=b_factor, hydrogens=[2, 0])
    with_solvent, without = (projected_potential(specimen, (n, n), step, solvent=s) for s in (True, False))
    difference = without - with_solvent
    y, x = np.meshgrid(*(2 * [(np.arange(n) - n // 2) * step]), indexing="ij")
    exact, volume, beyond = np.zeros((n, n)), 0.0, 0.0
    for place, number, z in ((0.0, 1, 6), (0.0, 2, 1), (4.0, 1, 8)):
        own = displaced_volume(z)
        c = 4 * np.pi * own ** (2 / 3) + b_factor
        r2 = (x - place) ** 2 + y**2
        exact += number * ice_potential() * own * 4 * np.pi / c * np.exp(-4 * np.pi**2 * r2 / c)
        volume += number * own
        # The part of its transform V_ice V exp(-c q^2 / 4) beyond the grid's Nyquist frequency 1 / (2 step).
        beyond += number * ice_potential() * own * 4 * np.pi / c * (1 - math.erf(math.sqrt(c) / (4 * step)) ** 2)
    # 1e-6: the error of the non-uniform transform, some 1e-7 of the largest value, in each of the two potentials.
    transform = 1e-6 * without.max()
    assert difference.sum() * step**2 == pytest.approx(ice_potential() * volume, rel=1e-6)
    # Beyond the Nyquist frequency the grid shows nothing: no sample can be off by more than the integral of what is
    # missing there. That ringing may be negative. At 0.4 angstrom it is far below the error of the transform; at
    # 1 angstrom the hydrogens, widths of 0.7 angstrom, ring by a few per cent at most.
    assert np.abs(difference - exact).max() < beyond + transform
    assert difference.min() > -beyond - transform
    if step < 0.5:
        assert beyond < 1e-6 * exact.max()
    else:
        # Power: the bound is not far from what happens.
        assert np.abs(difference - exact).max() > 0.1 * beyond


def test_hard_solvent_displaces_the_same_volume() -> None:
    specimen = Specimen.helix(40)
    thickness = displaced_thickness(specimen, (300, 300), 1.5)
    own = np.array([displaced_volume(int(z)) for z in specimen.atomic_numbers])
    volume = (specimen.weights * (own + specimen.hydrogens * displaced_volume(1))).sum()
    assert thickness.sum() * 1.5**2 == pytest.approx(volume, rel=1e-3)
    assert 0 <= thickness.min() < thickness.max() < 190


@pytest.mark.parametrize("weight", [20.0, 150.0, 3000.0])
def test_a_beads_solvent_is_a_ball_of_its_volume(weight: float) -> None:
    """However many atoms it stands for, and however sharp it is."""
    place = np.array([0.3, -0.2, 0.1])
    bead = Specimen.from_atoms([place], [6], weights=weight, b_factors=20.0)
    ((full, low),) = displaced_voxels(bead, 1.0)
    volume = weight * displaced_volume(6)
    radius = (0.75 * volume / np.pi) ** (1 / 3)
    away = np.linalg.norm(np.moveaxis(np.indices(full.shape), 0, -1) + low - place, axis=-1)
    assert full.sum() == round(volume)
    assert away[full].max() < radius + 0.9 < away.max()
    assert away[~full].min() > radius - 0.9


def test_dense_beads_displace_the_same_volume_wherever_they_turn() -> None:
    """Beads of several times what fits between them: the region follows them, and not a box around them."""
    random = np.random.default_rng(0)
    beads = Specimen.from_atoms(random.uniform(-12, 12, (24, 3)), [6] * 24, weights=150.0, b_factors=200.0)
    (straight, low), *_ = displaced_voxels(beads, 1.5)
    spread = np.cov((np.argwhere(straight) + low).T)
    for degrees in (20.0, 45.0):
        turn = about_z(torch.tensor(degrees, dtype=torch.float64)).numpy()
        (turned, _), *_ = displaced_voxels(beads.transformed(turn), 1.5)
        assert turned.sum() == straight.sum() == round(24 * 150 * displaced_volume(6) / 1.5**3)
        np.testing.assert_allclose(np.cov(np.argwhere(turned).T), turn @ spread @ turn.T, atol=0.02 * np.trace(spread))


def test_atoms_without_room_for_what_they_displace_are_refused() -> None:
    with pytest.raises(InputError, match=r"room for the 8\d+ angstrom\^3.*weights"):
        list(displaced_voxels(Specimen.from_atoms([[0.0, 0.0, 0.0]] * 60, [6] * 60, weights=90.0), 1.5))


def test_transfer_equals_abtem(abtem: dict[str, np.ndarray]) -> None:
    grid = frequencies((64, 64), 3.0, torch.float64)
    plain = Microscope(defocus_um=2.0)
    astigmatic = Microscope(defocus_um=2.0, astigmatism_um=0.05, astigmatism_angle_deg=30.0)
    for microscope, key in ((plain, "kernel"), (astigmatic, "kernel_astigmatic")):
        ours = torch.exp(1j * phase_aberration(microscope.values(), grid)).numpy()
        assert np.abs(ours - abtem[key]).max() < 2e-4
    assert np.abs(abtem["kernel"] - abtem["kernel_astigmatic"]).max() > 1


@pytest.mark.parametrize(("astigmatism", "angle", "phase"), [(0.0, 0.0, 0.0), (0.1, 30.0, 0.0), (0.05, -70.0, 60.0)])
def test_ctf_equals_torch_ctf(astigmatism: float, angle: float, phase: float) -> None:
    torch_ctf = pytest.importorskip("torch_ctf", reason="torch-ctf is not installed")
    theirs = torch_ctf.calculate_ctf_2d(
        defocus=2.0,
        astigmatism=astigmatism,
        astigmatism_angle=angle,
        voltage=300.0,
        spherical_aberration=2.7,
        amplitude_contrast=0.07,
        phase_shift=phase,
        pixel_size=2.0,
        image_shape=(60, 64),
        rfft=False,
        fftshift=False,
    ).double()
    microscope = Microscope(
        defocus_um=2.0, astigmatism_um=astigmatism, astigmatism_angle_deg=angle, phase_shift_deg=phase
    )
    difference = (contrast_transfer(microscope, (60, 64), 2.0) - theirs).abs()
    # A phase plate shifts the scattered wave only: at q = 0 ours has no shift.
    difference[0, 0] = 0.0
    assert difference.max() < 1e-4


def test_contrast_transfer_at_the_origin_is_the_amplitude_contrast() -> None:
    assert contrast_transfer(Microscope(amplitude_contrast=0.1), (8, 8), 3.0)[0, 0].item() == pytest.approx(0.1)


def test_temporal_envelope_is_the_mean_over_focus() -> None:
    """E_t against a Gaussian average of exp(i pi lambda q^2 f), by quadrature."""
    microscope = Microscope(energy_spread_ev=1.5, convergence_mrad=0.0, b_factor_angstrom2=0.0)
    grid = frequencies((16, 16), 2.0, torch.float64)
    spread = focal_spread_angstrom(300.0, 1.5, 2.7)
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    phases = np.pi * wavelength_angstrom(300.0) * grid.q2.numpy()[..., None] * spread * nodes
    mean = (np.exp(1j * phases) @ weights / weights.sum()).real
    ours = torch.exp(-envelope_exponent(microscope.values(), grid)).numpy()
    assert ours == pytest.approx(mean, abs=1e-10)
    assert mean.min() < 0.9


def test_spatial_envelope_is_the_mean_over_illumination() -> None:
    """E_s to first order in the angle, against a Gaussian average of the slope of chi, by quadrature."""
    microscope = Microscope(convergence_mrad=0.1, energy_spread_ev=0.0, b_factor_angstrom2=0.0, defocus_um=2.0)
    n, pixel = 16, 2.0
    grid = frequencies((n, n), pixel, torch.float64)
    wavelength = wavelength_angstrom(300.0)
    q = np.fft.fftfreq(n, pixel)

    def chi(q: np.ndarray) -> np.ndarray:
        return np.pi * wavelength * 2e4 * q**2 - 0.5 * np.pi * 2.7e7 * wavelength**3 * q**4

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    # 1/e semi-angle a: standard deviation a / sqrt 2 in each direction.
    tilt = 1e-4 / np.sqrt(2) / wavelength * nodes
    slope = (chi(q + 1e-6) - chi(q - 1e-6)) / 2e-6
    mean = (np.exp(1j * slope[:, None] * tilt) @ weights / weights.sum()).real
    ours = torch.exp(-envelope_exponent(microscope.values(), grid)).numpy()[0]
    assert ours == pytest.approx(mean, abs=1e-6)
    assert mean.min() < 0.5


def test_b_factor_envelope() -> None:
    microscope = Microscope(b_factor_angstrom2=80.0, energy_spread_ev=0.0, convergence_mrad=0.0)
    grid = frequencies((16, 12), 2.0, torch.float64)
    transfer = transfer_function(microscope.values(), grid, smooth=False)
    assert transfer.abs().numpy() == pytest.approx(np.exp(-20.0 * grid.q2.numpy()))


@pytest.mark.parametrize("shape", [(16, 16), (15, 18), (17, 9)])
def test_half_of_the_lens_mirrored_is_the_whole(shape: tuple[int, int]) -> None:
    grid = frequencies(shape, 2.0, torch.float64)
    straight = {**Microscope(aperture_um=20.0).values()}
    # An astigmatism too small to matter takes the general way.
    general = {**straight, "astigmatism_um": 1e-15}
    for smooth in (True, False):
        a, b = (transfer_function(v, grid, smooth=smooth) for v in (straight, general))
        assert torch.allclose(a, b, rtol=0, atol=1e-9)


def test_aperture() -> None:
    values = Microscope(aperture_um=20.0, focal_length_mm=3.0).values()
    cutoff = aperture_cutoff(values)
    assert cutoff == pytest.approx(10e-6 / 3e-3 / wavelength_angstrom(300.0))
    grid = frequencies((64, 64), 2.0, torch.float64)
    hard, smooth = (aperture(values, grid, smooth=s) for s in (False, True))
    assert hard is not None
    assert smooth is not None
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard > 0, grid.q2.sqrt() < cutoff)
    away = (grid.q2.sqrt() / cutoff - 1).abs() > 0.15
    assert (hard - smooth).abs()[away].max() < 1e-3
    assert aperture({**values, "aperture_um": 0.0}, grid, smooth=False) is None
    assert aperture({**values, "aperture_um": 500.0}, grid, smooth=True) is None


def test_unknown_element() -> None:
    with pytest.raises(InputError, match="scattering factor"):
        peng_coefficients(0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("voltage_kv", -1.0), ("amplitude_contrast", 1.5), ("defocus_um", float("nan")), ("cs_mm", "2.7")],
)
def test_microscope_out_of_range(setting: str, value: object) -> None:
    with pytest.raises(InputError, match=setting):
        Microscope(**{setting: value})
