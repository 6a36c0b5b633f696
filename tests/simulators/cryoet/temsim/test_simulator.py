"""`TEMSim`: closed forms of its steps, and the interface that bridge counts on; beside the program in another file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bridge
from bridge.errors import InputError
from bridge.simulator.protocol import Simulator
from bridge.testing import check_simulator
from simulators.cryoet import Camera, Microscope, Optics, Sample, Specimen, TEMSim, counted, read_structure
from simulators.cryoet.microscope.optics import frequencies, transfer_function
from simulators.cryoet.microscope.physics import interaction_constant
from simulators.cryoet.temsim.optics import Grid, Scattering, Thickness, _bessel_sums, lens, slice_height
from simulators.cryoet.temsim.potential import (
    Maps,
    Projected,
    add_gaussians,
    cross_section,
    differential_cross_section,
    ice_potential_v,
    on_pixels,
    rotation,
    water_cross_section,
    wave_number,
)

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

SEED = np.zeros(1, dtype=np.uint64)
VACUUM = Sample(thickness_center_nm=0.0, thickness_edge_nm=0.0)
PERFECT = Camera(mtf_a=0.0, mtf_b=0.0, mtf_c=1.0, gain=2.0)


@pytest.fixture(scope="module")
def wedge() -> Specimen:
    """Dense carbon and oxygen without symmetry."""
    places = np.array([p for p in np.ndindex(9, 6, 4) if p[0] + 2 * p[1] < 14]) * 2.0
    return Specimen.from_atoms(places, np.where(np.arange(len(places)) % 3, 6, 8), hydrogens=0.5, b_factors=20.0)


@pytest.fixture(scope="module")
def small(wedge: Specimen) -> TEMSim:
    simulator = TEMSim(wedge, shape=(40, 48), camera={"padding": 8})
    simulator.projection()
    return simulator


def at(simulator: TEMSim, seed: int = 0, **values: float) -> np.ndarray[Any, Any]:
    point = simulator.space.mapping(simulator.reference) | values
    return simulator(simulator.space.vector(point)[None], np.array([seed], dtype=np.uint64))[0].astype(np.float64)


# --- cross-sections and the lens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [1, 6, 8, 16])
@pytest.mark.parametrize("kv", [20.0, 300.0])
def test_cross_section_is_the_integral_over_angles(z: int, kv: float) -> None:
    """2 pi int (d sigma / d Omega) t dt of small angles, in the logarithm of t."""

    def ring(u: float) -> float:
        return 2 * np.pi * math.exp(2 * u) * float(differential_cross_section(z, kv, np.array(math.exp(u))))

    assert cross_section(z, kv) == pytest.approx(scipy.integrate.quad(ring, -20, 8, limit=400)[0], rel=1e-6)


def test_lens_is_the_other_simulators() -> None:
    """The same formula in another form; there the energy's spread is a standard deviation, here sqrt(2) of it."""
    shape, pixel = (32, 41), 0.5
    settings_ = {"voltage_kv": 200.0, "defocus_um": 2.0, "cs_mm": 2.0, "cc_mm": 2.2}
    ours = lens(
        {**settings_, "energy_spread_ev": 1.3 * math.sqrt(2), "cond_ap_angle_mrad": 0.3, "aperture_um": 1000.0}
        | {"focal_length_mm": 2.0},
        150.0,
        Grid.of(shape, pixel),
    )
    microscope = Microscope(
        **settings_, energy_spread_ev=1.3, convergence_mrad=0.3, aperture_um=0.0, b_factor_angstrom2=0.0
    )
    grid = frequencies(shape, 10 * pixel, torch.float64)
    expected = transfer_function({**microscope.values(), "z_angstrom": 1500.0}, grid, smooth=False)
    expected = expected * (grid.q2 < (0.05 / pixel) ** 2)
    assert ours[0, 0] == 1
    # One side rounds to single precision, and frequencies on the edge itself may fall on either.
    assert ((ours - expected).abs() > 1e-6).sum() <= 4
    assert (ours - expected * 1.001).abs().max() > 1e-4


def test_aperture_cuts_at_its_angle() -> None:
    values = {"voltage_kv": 300.0, "defocus_um": 0.0, "cs_mm": 0.0, "cc_mm": 0.0, "energy_spread_ev": 0.0}
    values |= {"cond_ap_angle_mrad": 0.0, "aperture_um": 20.0, "focal_length_mm": 10.0}
    grid = Grid.of((64, 64), 0.5)
    through = lens(values, 0.0, grid).abs()
    assert torch.equal(through > 0.5, grid.full(torch.from_numpy(grid.q < wave_number(300.0) * 1e-3)))
    assert 0 < through.sum() < through.numel()


def test_scattering_sums_all_that_passes() -> None:
    """At x = 0 the kernel is the sum of the rings, close to the integral up to the angle of the aperture."""
    values = {"voltage_kv": 300.0, "defocus_um": 5.0, "aperture_um": 50.0, "focal_length_mm": 3.0}
    scattering = Scattering.of(values, 0.5)
    assert scattering.angle == pytest.approx(25e-3 / 3)

    def ring(t: float) -> float:
        return 2 * np.pi * t * float(differential_cross_section(6, 300.0, np.array(t)))

    step = 0.5 / (np.pi * 6000)
    # From half a step on, as far as the last ring reaches.
    last = (math.floor(scattering.angle / step) + 0.5) * step
    integral = scipy.integrate.quad(ring, 0.5 * step, last, limit=200)[0] / cross_section(6, 300.0)
    assert scattering.particle[0] == pytest.approx(integral, rel=0.02)
    assert 0 < scattering.ice[0] < 33.5 * water_cross_section(300.0)


def test_long_sums_are_done_in_parts() -> None:
    rings = np.random.Generator(np.random.Philox(key=2)).random((1500, 2))
    sums = _bessel_sums(1400.5, rings, 1401)
    for j in (0, 1, 700, 1400):
        expected = scipy.special.j0(np.arange(1, 1501) * j / 1400.5) @ rings
        np.testing.assert_allclose(sums[j], expected, rtol=1e-11, atol=1e-11)


# --- maps and projections -----------------------------------------------------------------------------------------


def test_gaussians_are_normal_densities_cut_off() -> None:
    b = 210.0
    grid = np.zeros((31, 31, 31))
    centre = np.array([[15.3, 14.8, 15.0]])
    add_gaussians(grid, centre, np.array([[3.0]]), np.array([b]))
    r2 = ((np.stack(np.meshgrid(*[np.arange(31)] * 3, indexing="ij"), -1) - centre[0]) ** 2).sum(-1)
    exponent = 4 * np.pi**2 / b
    expected = 3 * (4 * np.pi / b) ** 1.5 * np.exp(-exponent * r2) * (exponent * r2 <= 10)
    np.testing.assert_allclose(grid, expected, rtol=1e-12, atol=1e-18)
    # What is cut off is the chance that a chi-square of three degrees of freedom exceeds 20.
    assert grid.sum() == pytest.approx(3 * (1 - scipy.special.gammaincc(1.5, 10.0)), rel=1e-4)


def test_maps_are_ice_but_where_atoms_are_denser(wedge: Specimen) -> None:
    maps = Maps.build(wedge, 0.1)
    real = maps.real()
    assert maps.potential.max() > ice_potential_v() > maps.potential.min()
    surface = np.ones(real.shape, dtype=bool)
    surface[1:-1, 1:-1, 1:-1] = False
    assert real[surface].mean() == pytest.approx(0, abs=1e-12)
    assert real.max() - real.min() == pytest.approx(maps.potential.max() - ice_potential_v(), rel=1e-12)
    assert maps.absorbing(300.0).max() > 0


def test_a_plain_element_has_the_potential_of_its_whole_scattering_factor() -> None:
    """Far from the clamp: the integral of one atom's potential is h^2 / (2 pi m e) f(0)."""
    maps = Maps.build(Specimen.from_atoms([(0.3, -0.2, 0.1)], [6]), 0.1)
    carbon = 47.87765 * (0.0893 + 0.2563 + 0.7570 + 1.0487 + 0.3575)
    kept = np.prod([scipy.special.erf(5 / 1.5916 / math.sqrt(2))] * 3)  # of 5 angstrom around, at B = 200
    assert maps.potential.sum() == pytest.approx(carbon * kept, rel=2e-3)
    wide = Maps.build(Specimen.from_atoms([(0.3, -0.2, 0.1)], [6], b_factors=190.0), 0.1)
    assert wide.potential.max() < maps.potential.max()


def test_voltages_between_nodes(wedge: Specimen) -> None:
    maps = Maps.build(wedge, 0.1)
    projected = Projected.build(maps, np.eye(3))
    for kv in (1.0, 7.3, 80.0, 300.0, 1000.0, 1e4):
        phase, loss = projected.at(kv, 1.0)
        # Parallel to the axes cells are shared by halves, which keeps sums.
        assert loss.sum() == pytest.approx(0.05 * water_cross_section(kv) * maps.absorbing(kv).sum(), rel=1e-5)
        assert phase.sum() == pytest.approx(0.1 * maps.real().sum(), rel=1e-12)


@given(
    x=st.floats(-3, 3), y=st.floats(-3, 3), phi=st.floats(0, 360), theta=st.floats(0, 180), pixel=st.floats(0.2, 1.0)
)
@settings(max_examples=30)
def test_pixels_keep_the_integral(small: TEMSim, x: float, y: float, phi: float, theta: float, pixel: float) -> None:
    rng = np.random.Generator(np.random.Philox(key=1))
    layers = rng.random((2, 7, 9))
    basis = 0.1 * rotation(phi, 0.0, theta)[:2, :2]
    values, (rows, columns) = on_pixels(layers, basis, (x, y), (40, 48), pixel)
    assert values.shape == (2, rows.stop - rows.start, columns.stop - columns.start)
    area = abs(np.linalg.det(basis))
    np.testing.assert_allclose(values.sum(axis=(1, 2)) * pixel**2, layers.sum(axis=(1, 2)) * area, rtol=1e-9)


def test_pixels_are_overlaps() -> None:
    """A cell of 0.3 nm, 0.25 nm off the middle of 2 x 2 pixels of 0.5 nm: shares of its area."""
    values, (rows, columns) = on_pixels(np.ones((1, 1, 1)), 0.3 * np.eye(2), (0.1, -0.05), (2, 2), 0.5)
    image = np.zeros((2, 2))
    image[rows, columns] = values[0]
    right, down = (0.1 + 0.15) / 0.3, (-0.05 + 0.15) / 0.3
    shares = np.outer([1 - down, down], [1 - right, right]) * 0.09 / 0.25
    np.testing.assert_allclose(image, shares, rtol=1e-12)


def test_a_quarter_turn_turns_the_image(wedge: Specimen) -> None:
    square = TEMSim(wedge, shape=(40, 40), camera={"padding": 8, "gain": 1.0})
    turned = square.replace(placement={"psi_deg": 90.0})
    still, after = at(square, x_nm=1.3), at(turned, y_nm=1.3)
    # From +x to +y: what was at (x, y) is at (-y, x).
    np.testing.assert_allclose(after, np.rot90(still, -1), atol=2e-4 * still.std())
    assert np.abs(after - still).max() > still.std()


# --- whole images -------------------------------------------------------------------------------------------------


def test_nothing_but_flat_ice_is_uniform(wedge: Specimen) -> None:
    """The particle out of the field: dose x pixel^2 x gain, less what the ice takes away."""
    for thickness in (0.0, 50.0):
        sample = Sample(thickness_center_nm=thickness, thickness_edge_nm=thickness)
        simulator = TEMSim(wedge, shape=(24, 32), sample=sample, bounds={"x_nm": (-100, 100)})
        image = at(simulator, x_nm=90.0)
        taken = Scattering.of(Optics().__dict__, 0.5).ice[0]
        assert taken > 1e-4
        np.testing.assert_allclose(image, 6000 * 0.25 * 10 * math.exp(-thickness * taken), rtol=2e-7)


def test_curved_ice_between_levels() -> None:
    grid = Grid.of((64, 64), 0.5)
    sample = Sample(diameter_nm=50.0, thickness_center_nm=30.0, thickness_edge_nm=60.0)
    ice = Thickness.of(sample, 300.0, grid)
    taken = np.full_like(grid.q, 2e-3)
    beam, rest = ice.blurred(torch.zeros(64, 33, dtype=torch.complex64), taken, grid)
    y, x = np.meshgrid((np.arange(64) - 31.5) * 0.5, (np.arange(64) - 31.5) * 0.5, indexing="ij")
    thickness = 30 + 30 * (x**2 + y**2) / 25**2
    inside = x**2 + y**2 < 25**2
    # Interpolation between levels errs by (step x taken)^2 / 8.
    bound = (ice.step * 2e-3) ** 2 / 8
    error = beam.numpy()[inside] / np.exp(-2e-3 * thickness[inside]) - 1
    assert error.min() > -1e-12
    assert error.max() < 1.01 * bound
    assert not rest.any()


def test_weak_phase_contrast_in_vacuum(wedge: Specimen) -> None:
    """I - 1 = 2 F^-1[-Im T F phase - Re T F loss + K F loss] to first order, K the kernel of what is lost."""
    thin = Specimen.from_atoms(wedge.positions, wedge.atomic_numbers, weights=0.9, b_factors=20.0)
    simulator = TEMSim(thin, shape=(48, 48), sample=VACUUM, camera=PERFECT)
    image = at(simulator, x_nm=0.8)
    values = Optics().__dict__
    grid = Grid.of((88, 88), 0.5)
    projected = simulator.projection()
    layers = projected.at(300.0, 10 * interaction_constant(300.0))
    placed = np.zeros((2, 88, 88))
    cells, (rows, columns) = on_pixels(layers, projected.basis, (0.8, 0.0), (88, 88), 0.5)
    placed[:, rows, columns] = cells
    phase, loss = (np.fft.fft2(p) for p in placed)
    transfer = lens(values, 0.0, grid).numpy()
    particle, _ = Scattering.of(values, 0.5).at(5000.0, grid)
    spectrum = -2 * transfer.imag * phase - 2 * transfer.real * loss
    spectrum += 2 * loss * grid.full(torch.from_numpy(particle)).numpy()
    contrast = np.fft.ifft2(spectrum).real[20:-20, 20:-20]
    ours = image / (6000 * 0.25 * 2) - 1
    second = placed[0].max()
    assert second < 0.1
    assert np.sqrt(((ours - contrast) ** 2).mean()) < second * contrast.std()
    assert np.sqrt(((ours + contrast) ** 2).mean()) > contrast.std()


def test_protein_is_dark_at_underfocus_and_shifts_by_pixels(small: TEMSim) -> None:
    image = at(small)
    assert image[18:22, 22:26].mean() < image.mean()
    right, down = at(small, x_nm=1.0), at(small, y_nm=1.5)
    flat = small.replace(sample=Sample(thickness_edge_nm=50.0))
    image, right, down = at(flat), at(flat, x_nm=1.0), at(flat, y_nm=1.5)
    # The grid of 56 x 64 is periodic and whole pixels move the same numbers.
    np.testing.assert_allclose(right[:, 2:], image[:, :-2], atol=1e-3 * image.std())
    np.testing.assert_allclose(down[3:], image[:-3], atol=1e-3 * image.std())


def test_staircases(small: TEMSim) -> None:
    """z acts in slices of pixel^2 k / (4 pi), the focal length in the number of rings, the voltage smoothly."""
    high = small.replace(parameters=("z_nm", "focal_length_mm"))
    d = slice_height(300.0, 0.5)
    assert d == pytest.approx(0.25 / (2 * 0.00196875), rel=1e-4)
    np.testing.assert_array_equal(at(high, z_nm=0.49 * d), at(high, z_nm=0.0))
    assert np.abs(at(high, z_nm=0.51 * d) - at(high, z_nm=0.0)).max() > 0.1
    raised = small.replace(parameters=("defocus_um",), sample=VACUUM)
    risen = raised.replace(parameters=("z_nm",))
    # In vacuum a slice is a defocus, but for the angles at which scattering is summed.
    assert np.abs(at(risen, z_nm=d) - at(raised, defocus_um=5 + d * 1e-3)).max() < 0.05 * np.ptp(at(raised))
    rings = 37699.1 * 25e-3  # pi 6000 / 0.5 x ap / 2, in mm
    edge = rings / 314
    below, above = at(high, focal_length_mm=edge * (1 + 1e-6)), at(high, focal_length_mm=edge * (1 - 1e-6))
    assert np.abs(above - below).mean() > 100 * np.abs(at(high, focal_length_mm=edge * (1 - 3e-6)) - above).mean()


def test_mtf_is_the_two_term_form() -> None:
    camera = Camera(mtf_p=2.0)
    transfer = camera.mtf((8, 8)).numpy()
    assert transfer[0, 0] == 1
    xi2 = 0.25  # the Nyquist frequency of the columns
    first = 4 / (2 * (1 + 10 * xi2) ** 2 + 2)
    assert transfer[0, 4] == pytest.approx(0.7 * first + 0.2 / (1 + 40 * xi2) + 0.1, rel=1e-6)


@pytest.mark.parametrize("mean", [3.0, 400.0])
def test_counted_electrons_have_mean_and_variance(mean: float) -> None:
    n = 400_000
    electrons = counted(torch.full((n,), mean, dtype=torch.float64), 0.4, seed=5).numpy()
    variance = mean / 0.4
    assert electrons.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / n))
    assert electrons.var() == pytest.approx(variance, rel=0.03)
    assert electrons.min() >= 0
    whole = counted(torch.full((1000,), mean, dtype=torch.float64), 1.0, seed=5).numpy()
    np.testing.assert_array_equal(whole, np.rint(whole))


def test_noise_is_of_the_seed_and_about_the_clean_image(small: TEMSim) -> None:
    noisy = small.replace(noise="full")
    images = [at(noisy, seed) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    clean = at(small)
    mtf = Camera(padding=8).mtf((56, 64)).numpy()
    power = (np.abs(mtf[:, 1:-1]) ** 2).sum() * 2 + (mtf[:, 0] ** 2).sum() + (mtf[:, -1] ** 2).sum()
    # Sums of independent electrons, filtered: variance 10^2 (mean / DQE) x mean of MTF^2.
    expected = 10 * clean.mean() / 0.4 * power / (56 * 64)
    assert (images[0] - clean).var() == pytest.approx(expected, rel=0.2)


# --- the structure's file and the interface -----------------------------------------------------------------------


def test_structures_are_read_as_the_program_does(tmp_path: Path) -> None:
    def line(kind: str, atom: str, residue: str, x: float, element: str) -> str:
        start = f"{kind:<6}    1 {atom:<4} {residue:>3} A   1    {x:8.3f}   2.000   3.000"
        return f"{start}  0.50 20.00          {element:>2}\n"

    (tmp_path / "p.pdb").write_text(
        "MODEL        1\n" + line("ATOM", " CA", "GLY", 1, "C") + line("ATOM", " N", "PRO", 2, "N") + "ENDMDL\n"
        "MODEL        2\n" + line("ATOM", " NZ", "LYS", 3, "N") + line("HETATM", " O", "HOH", 4, "O") + "ENDMDL\n"
    )
    (tmp_path / "t.txt").write_text("# copies\n6 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 -1 0 5\n1 0 0 0\n0 0 1 7\n")
    one = read_structure(tmp_path / "p.pdb")
    assert one.hydrogens.tolist() == [2, 0, 3, 2]
    assert one.weights.tolist() == [0.5] * 4
    assert read_structure(tmp_path / "p.pdb", add_hydrogen=False).hydrogens.sum() == 0
    two = read_structure(tmp_path / "p.pdb", tmp_path / "t.txt")
    np.testing.assert_allclose(two.positions[4:], [[3, x, 10] for x in (1, 2, 3, 4)])
    with pytest.raises(InputError, match=r"p\.cif"):
        read_structure(tmp_path / "p.cif")


def test_it_is_a_simulator_with_units_and_bounds(small: TEMSim) -> None:
    assert isinstance(small, Simulator)
    assert small.space.names == ("voltage_kv", "focal_length_mm", "x_nm", "y_nm")
    assert [p.unit for p in small.space.parameters] == ["kV", "mm", "nm", "nm"]
    assert small.space.natural_scale.tolist() == [20.0, 0.3, 0.5, 0.5]
    assert small.reference.tolist() == [300.0, 3.0, 0.0, 0.0]
    rows = small.reference + np.array([[0, 0, 0, 0], [5, 0.1, 1, -1], [-9, -0.1, 0.3, 2]])
    batch = small(rows, np.zeros(3, dtype=np.uint64))
    assert batch.dtype == np.float32
    for row, image in zip(rows, batch, strict=True):
        np.testing.assert_array_equal(small(row[None], SEED)[0], image)
    check_simulator(small, rows)
    changed = small.replace(bounds={"x_nm": (-2, 2)}, natural_scale={"x_nm": 0.1})
    assert changed.projection() is small.projection()
    assert (changed.space.lower[2], changed.space.natural_scale[2]) == (-2.0, 0.1)


def test_bridge_smooths_and_fits_it(small: TEMSim) -> None:
    simulator = small.replace(parameters=("voltage_kv", "x_nm", "y_nm"))
    target = at(simulator)
    start = {"voltage_kv": 330.0, "x_nm": 0.6, "y_nm": -0.4}
    result = bridge.fit(simulator, target, start, seed=0, method=bridge.GaussNewton(steps=10, num_samples=16))
    assert (np.abs(result.parameters - [300.0, 0.0, 0.0]) < [3.0, 0.02, 0.02]).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"parameters": ("voltage",)}, "Known parameters: voltage_kv"),
        ({"bounds": {"voltage_kv": (0, 600)}}, r"within \[1, 10000\]"),
        ({"bounds": {"z_nm": (0, 600)}}, "The parameters are"),
        ({"noise": "loud"}, "Known: none, poisson, full"),
        ({"optics": {"voltage": 300}}, "Known keys: voltage_kv"),
        ({"camera": {"dqe": 0.0}}, "Camera.dqe"),
        ({"camera": {"mtf_a": 0.0, "mtf_b": 0.0, "mtf_c": 0.0}}, "mtf_c=1"),
        ({"shape": (4, 400)}, "rows, columns"),
        ({"particle": {"map": "emd.map"}}, "CryoET takes maps"),
    ],
)
def test_wrong_settings_say_what_to_do(small: TEMSim, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        small.replace(**changes)


def test_outside_the_bounds(small: TEMSim) -> None:
    for wrong in ([2000.0, 3.0, 0.0, 0.0], [300.0, np.nan, 0.0, 0.0]):
        with pytest.raises(InputError, match="inside the bounds"):
            small(np.array([wrong]), SEED)
