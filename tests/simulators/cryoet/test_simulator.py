"""`CryoET`: geometry, hard and smooth mode, exact gradients, and the interface that bridge counts on."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from bridge.simulator.protocol import Simulator
from simulators.cryoet import PARAMETER_NAMES, CryoET, Deformation, Detector, Domain, Microscope, Pose, Specimen
from simulators.cryoet.specimen.potential import band_limit, projected_spectrum

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

HINGE = Path(__file__).resolve().parents[3] / "examples" / "data" / "6wg6.cif.gz"
POSE = ("x_angstrom", "y_angstrom", "rotation_deg")
FLOAT64 = torch.float64


def blobs(*centres: tuple[float, float], weight: float = 150.0, b_factor: float = 600.0) -> Specimen:
    """Round Gaussian blobs of protein at places in the plane."""
    positions = [(x, y, 0.0) for x, y in centres]
    return Specimen.from_atoms(positions, [6] * len(positions), weights=weight, b_factors=b_factor)


@pytest.fixture(scope="module")
def hinge() -> Specimen:
    return Specimen.from_file(HINGE, assembly="1")


@pytest.fixture(scope="module")
def pair(hinge: Specimen) -> tuple[CryoET, CryoET]:
    """The same micrograph of one protein in hard and in smooth mode."""
    hard = CryoET(hinge, shape=(64, 64), pixel_size_angstrom=3.0, microscope=Microscope(defocus_um=1.5))
    return hard, hard.replace(mode="smooth")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=FLOAT64)


# --- geometry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(48, 48), (49, 47), (40, 61)])
def test_the_origin_is_pixel_half_the_size(shape: tuple[int, int]) -> None:
    sim = CryoET(blobs((0, 0)), shape=shape, pixel_size_angstrom=3.0, parameters=POSE, mode="smooth")
    image = sim.image(tensor(0, 0, 0))
    darkest = np.unravel_index(int(image.argmin()), shape)
    assert darkest == (shape[0] // 2, shape[1] // 2)


def test_plus_x_is_right_and_plus_y_is_down_by_exact_pixels() -> None:
    pixel = 2.5
    sim = CryoET(blobs((0, 0), (30, 10)), shape=(60, 64), pixel_size_angstrom=pixel, parameters=POSE, mode="smooth")
    still = sim.image(tensor(0, 0, 0))
    right = sim.image(tensor(3 * pixel, 0, 0))
    down = sim.image(tensor(0, 5 * pixel, 0))
    scale = still.std()
    # Whole pixels are whole samples of the spline's grid, so nothing is interpolated. What is left is the ringing of
    # the band limit (1e-4 of the blobs' potential and less with distance) that fades out at another place of the
    # margin, and what of it comes through the lens: below 1e-7.
    assert (right[:, 3:] - still[:, :-3]).abs().max() < 1e-6 * scale
    assert (down[5:, :] - still[:-5, :]).abs().max() < 1e-6 * scale
    # Power: the other direction does not fit.
    assert (right[:, :-3] - still[:, 3:]).abs().max() > scale


def test_fractional_shift_moves_the_centre_of_mass() -> None:
    """In focus without a lens a blob is a dark spot without fringes, whose first moment can be summed to the end."""
    sim = CryoET(
        blobs((0, 0), b_factor=3000.0),
        shape=(64, 64),
        pixel_size_angstrom=3.0,
        parameters=POSE,
        mode="smooth",
        microscope=Microscope(defocus_um=0.0, cs_mm=0.0, aperture_um=0.0, amplitude_contrast=0.1),
    )

    def centre(x: float, y: float) -> np.ndarray:
        dark = 40.0 * 9 - sim.image(tensor(x, y, 0)).numpy()
        return np.array([dark.sum(axis=0) @ np.arange(64), dark.sum(axis=1) @ np.arange(64)]) / dark.sum()

    # Sums over pixels are exact for what the pixels resolve, and this blob ends at exp(-B q^2 / 4) = 1e-9 at their
    # Nyquist frequency. The spline's images, (f / (1 - f))^3 at f cycles a sample of its grid, are near 1e-6 for it.
    assert centre(0, 0) == pytest.approx(np.array([32.0, 32.0]), abs=1e-5)
    assert centre(4.0, -1.7) == pytest.approx(32 + np.array([4.0, -1.7]) / 3.0, abs=1e-5)


def test_rotation_is_from_x_to_y_about_the_origin() -> None:
    sim = CryoET(blobs((0, 0), (40, 0)), shape=(65, 65), pixel_size_angstrom=3.0, parameters=POSE, mode="smooth")
    still, turned = sim.image(tensor(0, 0, 0)), sim.image(tensor(0, 0, 90))
    # The blob at +x (columns) comes to +y (rows); with an odd size the centre is a pixel of its own, and a quarter of a
    # turn brings samples onto samples. The tolerance is that of whole pixels above; a hundredth of a pixel makes 0.04.
    assert (turned - still.flip(0).T).abs().max() < 1e-6 * still.std()
    assert turned[32 + 13, 32] < turned[32 - 13, 32] - still.std()
    # Rotate, then shift.
    both = sim.image(tensor(6, 9, 90))
    assert (both[3:, 2:] - turned[:-3, :-2]).abs().max() < 1e-6 * still.std()


def test_protein_is_dark_at_underfocus(pair: tuple[CryoET, CryoET]) -> None:
    for sim in pair:
        sim = sim.replace(parameters=("defocus_um",), bounds={"defocus_um": (-4.0, 4.0)})
        under, over = sim.image(tensor(1.5)), sim.image(tensor(-1.5))
        assert under.min() - under[0, 0] < -20
        assert under[26:38, 26:38].mean() < under[0, 0] - 3
        assert over[26:38, 26:38].mean() > over[0, 0] + 1


def test_z_adds_to_the_defocus(pair: tuple[CryoET, CryoET]) -> None:
    sim = pair[1].replace(parameters=("defocus_um", "z_angstrom"), bounds=None)
    assert torch.allclose(sim.image(tensor(1.5, 500.0)), sim.image(tensor(1.55, 0.0)), rtol=1e-12)


@pytest.mark.parametrize("pose", [(0.0, 0.0, 0.0), (0.7, -1.3, 17.0), (31.0, 12.5, 45.0), (-8.1, 3.3, -133.0)])
def test_interpolated_pose_equals_atoms_that_are_moved(hinge: Specimen, pose: tuple[float, float, float]) -> None:
    """The cached projection against a direct projection of rotated and shifted atoms."""
    x, y, degrees = pose
    n, pixel = 96, 3.0
    sim = CryoET(hinge, shape=(n, n), pixel_size_angstrom=pixel, mode="smooth", margin_pixels=0)
    cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    moved = hinge.transformed([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]], (x, y, 0))
    spectrum = projected_spectrum(moved, (2 * n, 2 * n), pixel / 2, solvent=True, highest=0.5 / pixel)
    q2 = np.fft.fftfreq(2 * n, pixel / 2)[:, None] ** 2 + np.fft.rfftfreq(2 * n, pixel / 2)[None, :] ** 2
    direct = scipy.fft.irfft2(spectrum * band_limit(q2, 0.5 / pixel), s=(2 * n, 2 * n))[::2, ::2]
    values = {**sim._values, "x_angstrom": x, "y_angstrom": y, "rotation_deg": degrees}
    for dtype, tolerance in ((torch.float64, 2e-3), (torch.float32, 2e-3)):
        margin = (sim._padded[0] - n) // 2
        ours = sim._crop(sim._posed(values, dtype)).numpy() if margin else sim._posed(values, dtype).numpy()
        # A square root of mean squares, relative to the contrast.
        assert np.sqrt(np.mean((ours - direct) ** 2)) < tolerance * direct.std()


@given(x=st.floats(-160, 160), rotation=st.floats(-180, 180), wide=st.booleans())
@example(x=35.0 / 0.9, rotation=10.0, wide=True)
@example(x=92.0, rotation=0.0, wide=True)
@settings(max_examples=25)
def test_nothing_comes_in_from_the_other_side(x: float, rotation: float, wide: bool) -> None:
    """Atoms that leave the image are gone: a margin six times as wide changes less than 1 % of the contrast.

    That is what the margin is made for: what the lens carries across it is, by geometry, nothing, and by diffraction
    the fringe of the band limit's edge. 1 % here is 0.13 of 360 electrons, whose own noise is 19.
    """
    sim = leaving(wide)
    reference = sim.replace(margin_pixels=180)
    theta = tensor(x, 0.3 * x, rotation)
    contrast = (reference.image(tensor(0, 0, 0)) - 360.0).abs().max()
    assert (sim.image(theta) - reference.image(theta)).abs().max() < 0.01 * contrast


def test_without_a_margin_much_comes_in_from_the_other_side() -> None:
    """Power of the test above: half of the margin, or none, is not enough."""
    sim, theta = leaving(True), tensor(35.0, 10.0, 10.0)
    reference = sim.replace(margin_pixels=180)
    contrast = (reference.image(tensor(0, 0, 0)) - 360.0).abs().max()
    for margin in (0, 14):
        narrow = sim.replace(margin_pixels=margin)
        assert (narrow.image(theta) - reference.image(theta)).abs().max() > 0.05 * contrast


def leaving(wide: bool) -> CryoET:
    """Blobs of which some leave the image, and the margin, when they move; a size that needs no further padding."""
    centres = ((0, 0), (100, 0), (-100, 20), (0, 110), (40, 40)) if wide else ((0, 0), (30, 0))
    sim = CryoET(
        blobs(*centres, b_factor=200.0), shape=(50, 62), pixel_size_angstrom=3.0, parameters=POSE, mode="smooth"
    )
    assert sim._padded == (108, 120)
    return sim


@pytest.mark.parametrize(
    ("parameters", "bounds", "margin"),
    [
        # lambda df q / pixel: 0.0197 angstrom, 1.5 um, 1/6 per angstrom, 3 angstrom: 16.4 pixels; and 12.
        (("x_angstrom",), None, 29),
        (("defocus_um",), {"defocus_um": (-3.0, 2.0)}, 45),
        (("z_angstrom",), {"z_angstrom": (-5000.0, 0.0)}, 34),
        (("astigmatism_um",), {"astigmatism_um": (-0.5, 0.5)}, 34),
        (("voltage_kv",), {"voltage_kv": (100.0, 400.0)}, 43),
        # Not more than half the image, and 12.
        (("defocus_um",), {"defocus_um": (1.0, 50.0)}, 112),
    ],
)
def test_the_margin_follows_from_the_bounds(parameters: tuple[str, ...], bounds: dict | None, margin: int) -> None:
    sim = CryoET(blobs((0, 0)), shape=(200, 200), pixel_size_angstrom=3.0, parameters=parameters, bounds=bounds)
    assert sim._padded == (scipy.fft.next_fast_len(200 + 2 * margin, real=True),) * 2


def test_an_empty_field_is_the_dose() -> None:
    sim = CryoET(blobs((0, 0)), shape=(32, 32), parameters=POSE, bounds={"x_angstrom": (-1e4, 1e4)}, mode="smooth")
    image = sim.image(tensor(5000, 0, 0))
    assert image.numpy() == pytest.approx(np.full((32, 32), 40.0 * 9), rel=1e-4)


# --- hard and smooth ----------------------------------------------------------------------------------------------


def test_hard_images_are_integer_counts_and_piecewise_constant(pair: tuple[CryoET, CryoET]) -> None:
    hard, smooth = pair
    seeds = np.zeros(3, dtype=np.uint64)
    inputs = np.array([[1.5, 0, 0, 0]]) + np.array([[0.0], [1e-9], [0.0]]) * np.ones(4)
    inputs[2, 1] += 1.0
    images = hard(inputs, seeds)
    assert np.array_equal(images, np.rint(images))
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    soft = smooth(inputs, seeds)
    assert not np.array_equal(soft, np.rint(soft))
    with pytest.raises(RuntimeError), torch.no_grad():
        hard.image(tensor(1.5, 0, 0, 0).requires_grad_()).sum().backward()
    theta = tensor(1.5, 0, 0, 0).requires_grad_()
    assert torch.autograd.grad(hard.image(theta).sum(), theta)[0].abs().max() == 0


def test_hard_and_smooth_agree_but_for_rounding_and_threshold(pair: tuple[CryoET, CryoET]) -> None:
    hard, smooth = pair
    inputs, seeds = np.array([[1.5, 2.0, -3.0, 20.0], [2.5, 0, 0, 0]]), np.zeros(2, dtype=np.uint64)
    difference, contrast = hard(inputs, seeds) - smooth(inputs, seeds), smooth(inputs, seeds).std(axis=(1, 2))
    # The threshold moves solvent by a voxel or so at the surface; rounding adds 1/sqrt 12 of a count.
    assert (difference.std(axis=(1, 2)) < 0.35 * contrast).all()
    assert (difference.std(axis=(1, 2)) > 0.25).all()
    for a, b in zip(hard(inputs, seeds), smooth(inputs, seeds), strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
    # Before rounding and with the same potential there is no difference at all.
    theta = torch.from_numpy(inputs)
    shared = hard.replace()
    object.__setattr__(shared, "_projections", {shared._projection_key(): smooth.projection()})
    assert torch.allclose(shared.electrons(theta), smooth.electrons(theta), rtol=1e-9)


def test_hard_aperture_is_a_step_and_the_smooth_one_is_not(hinge: Specimen) -> None:
    names = ("aperture_um",)
    hard = CryoET(hinge, shape=(48, 48), pixel_size_angstrom=3.0, parameters=names, microscope=Microscope())
    smooth = hard.replace(mode="smooth")
    sizes = torch.linspace(10.0, 10.2, 41, dtype=FLOAT64)[:, None]
    steps = [(sim.electrons(sizes).diff(dim=0) ** 2).mean(dim=(1, 2)).sqrt() for sim in (hard, smooth)]
    assert (steps[0] == 0).sum() > 20
    assert steps[0].max() > 0
    assert (steps[1] > 0).all()
    assert steps[1].max() < 3 * steps[1].min()


def test_saturation_and_dead_pixels(hinge: Specimen) -> None:
    dead = Detector(dead_pixel_fraction=0.05, bits=8, dose_e_per_angstrom2=28.3)
    hard = CryoET(hinge, shape=(64, 64), pixel_size_angstrom=3.0, detector=dead, noise="full")
    images = hard(np.array([[1.5, 0, 0, 0], [2.0, 5, 5, 9]]), np.array([1, 2], dtype=np.uint64))
    zero = (images == 0).all(axis=0)
    assert 0.03 < zero.mean() < 0.07
    assert ((images == 0) == zero).all()
    assert images.max() == 255
    assert (images == 255).mean() > 0.1
    clean = hard.replace(detector=Detector(bits=None, dose_e_per_angstrom2=28.3))
    assert clean(np.array([[1.5, 0, 0, 0]]), np.array([1], dtype=np.uint64)).max() > 255
    other = hard.replace(detector=Detector(dead_pixel_fraction=0.05, bits=8, dead_pixel_seed=1))
    assert not np.array_equal(zero, other(np.array([[1.5, 0, 0, 0]]), np.array([1]))[0] == 0)


def test_gain_and_dose_scale_the_counts(pair: tuple[CryoET, CryoET]) -> None:
    smooth = pair[1].replace(parameters=("dose_e_per_angstrom2",), bounds=None)
    one, two = smooth.image(tensor(10.0)), smooth.image(tensor(20.0))
    assert torch.allclose(2 * one, two)
    gained = smooth.replace(detector=Detector(gain=3.5))
    assert torch.allclose(gained.image(tensor(10.0)), 3.5 * one)
    assert torch.allclose(gained.electrons(tensor(10.0)), one)


# --- gradients ----------------------------------------------------------------------------------------------------


def test_gradients_of_the_smooth_mode_in_every_parameter() -> None:
    places = [(0, 0, -9), (25, 10, 14), (-10, 30, 3), (-20, -8, 20)]
    specimen = Specimen.from_atoms(places, [6] * 4, weights=150.0, b_factors=300.0)
    hinge = ((0.0, 0.0, -9.0), (-10.0, 30.0, 3.0))
    bending = Deformation(2, 60.0, [Domain(hinge, residues=(2, 2))], (0.3, -0.2), (4.0,))
    sim = CryoET(
        specimen,
        shape=(10, 12),
        pixel_size_angstrom=5.0,
        parameters=(*PARAMETER_NAMES, *bending.values),
        deformation=bending,
        mode="smooth",
        # An aperture that cuts into the band, so that its edge has a gradient.
        microscope=Microscope(aperture_um=12.0, astigmatism_um=0.1, astigmatism_angle_deg=20.0, convergence_mrad=0.1),
        detector=Detector(mtf=0.6, gain=1.3),
        pose=Pose(3.1, -2.2, 100.0, 11.0, 15.0, -25.0),
        margin_pixels=16,
    )
    scale = torch.from_numpy(sim.space.natural_scale)
    reference = torch.from_numpy(sim.reference)
    # Sixteen mixtures of the pixels: as good as all, and sooner checked.
    mixtures = torch.from_numpy(np.random.default_rng(0).normal(size=(16, 120)) / 10)

    def image(u: torch.Tensor) -> torch.Tensor:
        return mixtures @ sim.image(reference + scale * u).reshape(-1) / 100

    u = torch.zeros(sim.space.dimension, dtype=FLOAT64, requires_grad=True)
    assert torch.autograd.gradcheck(image, (u,), eps=1e-5, atol=1e-5, rtol=1e-3, check_forward_ad=True)
    forward = torch.func.jacfwd(image)(u.detach())
    assert torch.allclose(forward, torch.func.jacrev(image)(u.detach()), atol=1e-10)
    # No parameter is without effect.
    assert (forward.abs().amax(dim=0) > 1e-6).all()


@pytest.mark.parametrize("names", [POSE, ("defocus_um",), ("astigmatism_angle_deg", "astigmatism_um", "voltage_kv")])
def test_gradients_of_a_real_structure(pair: tuple[CryoET, CryoET], names: tuple[str, ...]) -> None:
    sim = pair[1].replace(parameters=names, bounds=None, shape=(12, 12), margin_pixels=16)
    theta = torch.from_numpy(sim.reference + 0.03 * sim.space.natural_scale).requires_grad_()
    assert torch.autograd.gradcheck(sim.image, (theta,), eps=1e-5, atol=1e-3, rtol=1e-3)


def test_images_of_a_batch(pair: tuple[CryoET, CryoET]) -> None:
    sim = pair[1]
    theta = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 4)) * [0.1, 5, 5, 2] + [1.5, 0, 0, 0])
    images = sim.image(theta)
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == FLOAT64
    assert torch.equal(images[1, 2], sim.image(theta[1, 2]))
    single = sim.image(theta.float())
    assert single.dtype == torch.float32
    assert (single - images).abs().max() < 0.01
    assert sim.image(theta[:0]).shape == (0, 3, 64, 64)


# --- the interface ------------------------------------------------------------------------------------------------


def test_it_is_a_simulator(pair: tuple[CryoET, CryoET]) -> None:
    for sim in pair:
        assert isinstance(sim, Simulator)
        assert sim.output_shape == (64, 64)
        assert sim.space.names == ("defocus_um", "x_angstrom", "y_angstrom", "rotation_deg")
        assert sim.space.natural_scale.tolist() == [0.1, 5.0, 5.0, 2.0]
        assert sim.reference.tolist() == [1.5, 0, 0, 0]
        assert all(p.unit and p.description for p in sim.space.parameters)


@pytest.mark.parametrize("noise", ["none", "poisson", "full"])
@pytest.mark.parametrize("mode", ["hard", "smooth"])
def test_a_row_depends_on_its_own_input_and_seed_alone(pair: tuple[CryoET, CryoET], mode: str, noise: str) -> None:
    sim = pair[0].replace(mode=mode, noise=noise, detector=Detector(mtf=0.5))
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(5, 4)) * [0.1, 5, 5, 2] + [1.5, 0, 0, 0]
    seeds = np.array([1, 2, 1, 2**63, 5], dtype=np.uint64)
    images = sim(inputs, seeds)
    assert images.dtype == np.float32
    assert images.shape == (5, 64, 64)
    for i in range(5):
        assert np.array_equal(sim(inputs[i : i + 1], seeds[i : i + 1])[0], images[i])
    assert np.array_equal(sim(inputs[::-1], seeds[::-1]), images[::-1])
    same = sim(inputs[[0, 0]], seeds[[0, 1]])
    assert np.array_equal(same[0], same[1]) == (noise == "none")
    assert sim(inputs[:0], seeds[:0]).shape == (0, 64, 64)


def test_call_and_image_are_the_same_simulator(pair: tuple[CryoET, CryoET]) -> None:
    theta = np.array([[1.4, 2.5, -3.5, 12.0]])
    for sim, tolerance in zip(pair, (1.0, 2e-3), strict=True):
        called, exact = sim(theta, np.zeros(1, dtype=np.uint64))[0], sim.image(torch.from_numpy(theta))[0].numpy()
        # A rounded count may differ by one where the expectation lies on the edge.
        assert np.abs(called - exact).max() <= tolerance
        assert np.mean(np.abs(called - exact) > 2e-3) < 0.002


def test_replace_shares_projections_and_only_valid_ones(pair: tuple[CryoET, CryoET]) -> None:
    hard, smooth = pair
    assert hard.replace(noise="full", shape=(32, 40)).projection() is hard.projection()
    assert smooth.projection() is not hard.projection()
    finer = smooth.replace(pixel_size_angstrom=2.0)
    assert finer.projection() is not smooth.projection()
    assert smooth.replace(specimen=blobs((0, 0))).projection() is not smooth.projection()
    with pytest.raises(InputError, match="Unknown argument 'detctor'"):
        hard.replace(detctor=Detector())


def test_it_can_be_pickled(pair: tuple[CryoET, CryoET]) -> None:
    inputs, seeds = np.array([[1.5, 0, 0, 3.0]]), np.array([3], dtype=np.uint64)
    for sim in (pair[0].replace(noise="full"), CryoET(blobs((0, 0)), shape=(16, 16))):
        assert np.array_equal(pickle.loads(pickle.dumps(sim))(inputs, seeds), sim(inputs, seeds))


def test_from_the_plain_data_of_a_job_file() -> None:
    sim = CryoET(
        specimen={"file": str(HINGE), "assembly": "1", "copies": 2, "field_angstrom": 400, "seed": 1},
        shape=[48, 64],
        pixel_size_angstrom=6,
        microscope={"voltage_kv": 200, "defocus_um": 2.0},
        detector={"dose_e_per_angstrom2": 20, "mtf": [[0.0, 1.0], [0.5, 0.4], [0.71, 0.2]]},
        parameters=["defocus_um", "x_angstrom"],
        bounds={"defocus_um": [0.5, 3.0]},
        natural_scale={"x_angstrom": 1.0},
        pose={"rotation_deg": 30.0},
        noise="full",
    )
    assert sim(np.array([[2.0, 1.0]]), np.array([0])).shape == (1, 48, 64)
    assert (sim.space.lower[0], sim.space.upper[0]) == (0.5, 3.0)
    assert sim.space.natural_scale.tolist() == [0.1, 1.0]
    assert isinstance(CryoET(specimen="helix", shape=(16, 16)), Simulator)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parameters": ["defokus_um"]}, "Unknown parameter 'defokus_um'. Known parameters: voltage_kv, defocus_um"),
        ({"parameters": "defocus_um"}, "Use a list"),
        ({"parameters": ["defocus_um", "defocus_um"]}, "more than once"),
        ({"bounds": {"dose": (1, 2)}}, "in bounds"),
        ({"natural_scale": {"dose": 1.0}}, "in natural_scale"),
        ({"natural_scale": {"defocus_um": 0.0}}, "positive, finite natural_scale"),
        ({"bounds": {"defocus_um": (2, 1)}}, "lower < upper"),
        ({"bounds": {"defocus_um": (2,)}}, "lower, upper"),
        ({"shape": (0, 5)}, "shape"),
        ({"shape": (64,)}, "shape"),
        ({"shape": "64"}, "shape"),
        ({"shape": (64.0, 64)}, "shape"),
        ({"pixel_size_angstrom": 0.0}, "pixel_size_angstrom"),
        ({"mode": "soft"}, "Known: hard, smooth"),
        ({"noise": "gaussian"}, "Known: none, poisson, full"),
        ({"microscope": {"voltage": 300}}, "Unknown key 'voltage' of microscope. Known keys: voltage_kv"),
        ({"detector": {"dqe": 0.0}}, "Detector.dqe"),
        ({"detector": {"dose_e_per_angstrom2": -1}}, "dose_e_per_angstrom2"),
        ({"detector": {"mtf": 1.5}}, "Detector.mtf"),
        ({"detector": {"mtf": [[0.1, 1.0], [0.5, 0.5]]}}, "start at 0"),
        ({"detector": {"mtf": [0.1, 1.0]}}, "pairs"),
        ({"detector": {"bits": 99}}, "Detector.bits"),
        ({"pose": {"x": 1.0}}, "Known keys: x_angstrom"),
        ({"pose": 3}, "got int"),
        ({"margin_pixels": -1}, "margin_pixels"),
    ],
)
def test_settings_that_are_wrong(options: dict, said: str) -> None:
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        CryoET(**{"specimen": blobs((0, 0)), "shape": (16, 16), **options})


def test_queries_that_are_wrong() -> None:
    sim = CryoET(blobs((0, 0)), shape=(16, 16))
    seeds = np.zeros(1, dtype=np.uint64)
    with pytest.raises(InputError, match=r"defocus_um = 9 um outside \[0.2, 4\]"):
        sim(np.array([[9.0, 0, 0, 0]]), seeds)
    with pytest.raises(InputError, match="inside the bounds"):
        sim(np.array([[1.0, np.nan, 0, 0]]), seeds)
    with pytest.raises(InputError, match=r"\(k, 4\)"):
        sim(np.zeros((1, 3)), seeds)
    with pytest.raises(InputError, match=r"seeds of shape \(k,\)"):
        sim(np.zeros((2, 4)), seeds)
    with pytest.raises(InputError, match="uint64"):
        sim(np.array([[1.0, 0, 0, 0]]), np.zeros(1))
    with pytest.raises(InputError, match=r"\(\.\.\., 4\)"):
        sim.image(torch.zeros(3))
    with pytest.raises(InputError, match="float32 or float64"):
        sim.image(torch.zeros(4, dtype=torch.int64))
