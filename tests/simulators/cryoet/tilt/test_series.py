"""Tilt series: closed forms of the geometry, the exposure and the ice; gradients; files; and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

import bridge
from bridge.errors import InputError
from bridge.simulator.protocol import FileFormat, Simulator, Structured
from simulators.cryoet import (
    SERIES_PARAMETER_NAMES,
    CryoET,
    Detector,
    Microscope,
    Particle,
    Specimen,
    TiltScheme,
    TiltSeries,
    Volume,
    read_stack,
    write_stack,
    write_tilt_series,
)
from simulators.cryoet.specimen.potential import Projection
from simulators.cryoet.tilt.scheme import critical_exposure, damage, transmission

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
mrcfile = pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")

# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")

SEED = np.zeros(1, dtype=np.uint64)
HELIX = Specimen.helix(20)
# One heavy bead: a particle whose place can be measured.
BEAD = Specimen.from_atoms([[0.0, 0.0, 0.0]], [79], weights=[200.0], b_factors=2000.0)
PIXEL = 8.0


# Five beads of no symmetry, as small as a particle may be.
CLUSTER = Specimen.from_atoms(
    [[20, 0, 5], [-10, 15, 0], [0, -22, -8], [5, 5, 25], [-15, -5, 10]],
    [6, 8, 16, 7, 6],
    weights=[60, 40, 30, 50, 70],
    b_factors=1500.0,
)
ONE = (Particle(CLUSTER),)


def make(particles: Any = ONE, **options: Any) -> TiltSeries:
    options = {
        "scheme": TiltScheme.uniform(-40, 40, 40),
        "shape": (48, 56),
        "pixel_size_angstrom": PIXEL,
        "mode": "smooth",
        "parameters": ("defocus_um",),
        "detector": Detector(dose_e_per_angstrom2=3.0, dqe=1.0),
    } | options
    return TiltSeries(particles=particles, **options)


def at(series: TiltSeries, **values: float) -> torch.Tensor:
    """Expected counts in float64 at the settings, but for some; `x__1` stands for `x[1]`."""
    named = {k.replace("__", "[") + ("]" if "__" in k else ""): v for k, v in values.items()}
    theta = series.space.vector(series.space.mapping(series.reference) | named)
    return series.image(torch.from_numpy(theta))


# --- the scheme ---------------------------------------------------------------------------------------------------


def test_uniform_schemes_go_from_end_to_end() -> None:
    assert TiltScheme.uniform(-60, 60, 30) == TiltScheme((-60, -30, 0, 30, 60), (0, 1, 2, 3, 4))
    assert TiltScheme.uniform(60, -60, -30) == TiltScheme((-60, -30, 0, 30, 60), (4, 3, 2, 1, 0))
    assert len(TiltScheme.uniform(-60, 60, 3)) == 41


def test_dose_symmetric_schemes_swing() -> None:
    plain = TiltScheme.dose_symmetric(9, 3)
    taken = [plain.angles_deg[plain.order.index(i)] for i in range(7)]
    assert taken == [0, 3, -3, 6, -6, 9, -9]
    grouped = TiltScheme.dose_symmetric(9, 3, group=2, start_deg=12)
    assert [grouped.angles_deg[grouped.order.index(i)] for i in range(7)] == [12, 15, 18, 9, 6, 21, 3]
    assert TiltScheme.from_options({"dose_symmetric": [9, 3, 2, 12]}) == grouped
    assert plain.earlier(plain.angles_deg.index(3)) == [plain.angles_deg.index(0)]


@given(st.integers(1, 30), st.sampled_from([1.0, 1.5, 2.0, 3.0]), st.integers(1, 5))
def test_schemes_take_every_tilt_once(steps: int, step: float, group: int) -> None:
    scheme = TiltScheme.dose_symmetric(step * steps, step, group)
    assert len(scheme) == 2 * steps + 1
    np.testing.assert_allclose(scheme.angles_deg, step * np.arange(-steps, steps + 1), atol=1e-9)
    assert sorted(len(scheme.earlier(t)) for t in range(len(scheme))) == list(range(len(scheme)))
    # Never more than a group and a step off balance.
    seen = np.array([scheme.angles_deg[scheme.order.index(i)] for i in range(len(scheme))])
    assert np.abs(np.cumsum(np.sign(seen))).max() <= group


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: TiltScheme.uniform(0, 60, -3), "leads from start to stop"),
        (lambda: TiltScheme.uniform(0, 60, 0), "leads from start to stop"),
        (lambda: TiltScheme.dose_symmetric(60, 3, 0), "group"),
        (lambda: TiltScheme.dose_symmetric(99, 3), "angles_deg"),
        (lambda: TiltScheme((3, 0), (0, 1)), "small to large"),
        (lambda: TiltScheme((0, 3), (0, 2)), "permutation"),
        (lambda: TiltScheme((), ()), "small to large"),
        (lambda: TiltScheme.from_options({"spiral": [60, 3]}), "uniform, dose_symmetric"),
        (lambda: TiltScheme.from_options({"uniform": [60]}), "arguments of uniform"),
        (lambda: TiltScheme.from_options(3), "int"),  # type: ignore[arg-type]
    ],
)
def test_schemes_are_checked(make_it: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_it()


# --- projections --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angles", [(0, 0, 0), (30, 50, -70), (120, 95, 10)])
def test_slices_are_the_projections_of_the_turned_atoms(angles: tuple[float, ...]) -> None:
    turn = Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()
    volume = Volume.build(HELIX, PIXEL, hard_solvent=False)
    found = volume.project(torch.from_numpy(turn)).numpy()
    direct = Projection.build(HELIX.transformed(turn), PIXEL, hard_solvent=False)
    place = (torch.arange(volume.box, dtype=torch.float64) - volume.box // 2) * PIXEL / direct.step_angstrom
    place = place + direct.coefficients.shape[0] // 2
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    truth = direct.sample(columns.contiguous(), rows.contiguous()).numpy()
    # Both are interpolations, whose splines err by up to 0.8 % of what is at the end of the band.
    assert np.abs(found - truth).max() < 5e-3 * np.abs(truth).max()


def test_the_hard_solvent_displaces_as_much_as_the_smooth_one() -> None:
    """Its volume is that of the atoms, so the total potential, the projection's sum, is the same."""
    hard, smooth = (Volume.build(HELIX, PIXEL, hard_solvent=h).project(torch.eye(3)) for h in (True, False))
    assert float(hard.sum()) == pytest.approx(float(smooth.sum()), rel=0.02)
    assert float((hard - smooth).abs().max()) > 0.02 * float(smooth.abs().max())


def test_one_untilted_image_is_a_micrograph() -> None:
    optics = Microscope(defocus_um=1.5)
    camera = Detector(dose_e_per_angstrom2=20.0, mtf=0.5, gain=2.0)
    common: dict[str, Any] = {"shape": (64, 64), "microscope": optics, "detector": camera, "mode": "smooth"}
    micrograph = CryoET(HELIX, pixel_size_angstrom=PIXEL, parameters=("x_angstrom", "z_angstrom"), **common)
    scheme = TiltScheme((0.0,), (0,))
    particle = Particle(HELIX, x_angstrom=13.0, z_angstrom=800.0)
    series = make([particle], scheme=scheme, thickness_angstrom=0.0, radiation_damage=False, **common)
    one = micrograph.image(torch.tensor([13.0, 800.0], dtype=torch.float64))
    image = at(series)[0]
    # CryoET interpolates the projection, whose spline errs by up to 0.8 % at the end of the band.
    assert float((image - one).abs().max()) < 0.01 * float((one - one.median()).abs().max())


# --- geometry -----------------------------------------------------------------------------------------------------


def test_particles_go_where_the_matrices_say() -> None:
    place, shift = np.array([60.0, -40.0, 50.0]), np.array([[8.0, 0.0], [0.0, -12.0], [4.0, 20.0]])
    axis, x_tilt, pre_tilt = 35.0, 5.0, -8.0
    # In focus but for a little, so that a bead is a spot.
    series = make(
        [Particle(BEAD, *place)],
        shifts_angstrom=shift,
        tilt_axis_deg=axis,
        x_tilt_deg=x_tilt,
        pre_tilt_deg=pre_tilt,
        microscope=Microscope(defocus_um=0.3, cs_mm=0.0),
        shape=(64, 72),
    )
    images = at(series)
    for t, tilt in enumerate((-40.0, 0.0, 40.0)):
        turn = Rotation.from_euler("ZYX", (axis, tilt + pre_tilt, x_tilt), degrees=True).as_matrix()
        truth = (turn @ place)[:2] + shift[t]
        signal = (images[t] - images[t].median()).abs().numpy()
        signal[signal < 0.3 * signal.max()] = 0
        rows, columns = np.mgrid[:64, :72]
        found = [
            ((grid - size // 2) * PIXEL * signal).sum() / signal.sum() for grid, size in ((columns, 72), (rows, 64))
        ]
        np.testing.assert_allclose(found, truth, atol=0.1 * PIXEL)


def test_a_shift_by_whole_pixels_moves_the_image() -> None:
    series = make(parameters=("shift_x_angstrom[1]", "shift_y_angstrom[1]"))
    before, after = at(series), at(series, shift_x_angstrom__1=3 * PIXEL, shift_y_angstrom__1=-2 * PIXEL)
    contrast = float((before - before.median()).abs().max())
    assert float((after[1, 4:-8, 8:-4] - before[1, 6:-6, 5:-7]).abs().max()) < 1e-9 * contrast
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_half_a_pixel_twice_is_a_pixel() -> None:
    """Shifts by parts of pixels are those of the band-limited projection: they add up, and nothing jumps between."""
    series = make(parameters=("shift_x_angstrom[1]",))
    whole, near = at(series, shift_x_angstrom__1=PIXEL)[1], at(series, shift_x_angstrom__1=0.5 * PIXEL - 1e-7)[1]
    beyond = at(series, shift_x_angstrom__1=0.5 * PIXEL + 1e-7)[1]
    contrast = float((whole - whole.median()).abs().max())
    assert float((near - beyond).abs().max()) < 1e-3 * contrast
    assert float((whole - near).abs().max()) > 0.05 * contrast


def test_euler_angles_are_relions() -> None:
    """Orientation = inverse of intrinsic ZYZ; turned atoms in the default orientation give the same series."""
    angles = (25.0, 60.0, -40.0)
    turn = Rotation.from_euler("ZYZ", angles, degrees=True).inv().as_matrix()
    by_angles = at(make([Particle(CLUSTER, 10.0, 20.0, 0.0, *angles)]))
    by_atoms = at(make([Particle(CLUSTER.transformed(turn), 10.0, 20.0, 0.0)]))
    assert float((by_angles - by_atoms).abs().max()) < 0.005 * float((by_atoms - by_atoms.median()).abs().max())


def test_height_is_defocus() -> None:
    # The envelope of convergence is that of the slab's middle.
    options: dict[str, Any] = {
        "scheme": TiltScheme((0.0,), (0,)),
        "margin_pixels": 20,
        "microscope": Microscope(defocus_um=3.0, convergence_mrad=0.0),
    }
    high = at(make([Particle(CLUSTER, z_angstrom=5000.0)], **options))
    middle = make([Particle(CLUSTER)], **options)
    assert float((high - at(middle, defocus_um=3.5)).abs().max()) < 1e-9 * float(high.abs().max())
    assert float((high - at(middle)).abs().max()) > 0.1 * float(high.std())


def test_particles_side_by_side_do_not_see_each_other_and_have_no_order() -> None:
    left, right = Particle(BEAD, -120.0, 0.0, 2000.0), Particle(BEAD, 120.0, 40.0, -3000.0)
    options: dict[str, Any] = {"scheme": TiltScheme((0.0,), (0,)), "shape": (64, 64), "thickness_angstrom": 0.0}
    both, swapped = at(make([left, right], **options)), at(make([right, left], **options))
    torch.testing.assert_close(both, swapped, rtol=1e-12, atol=0.0)
    one, other = at(make([left], **options)), at(make([right], **options))
    empty = float(one[0, 0, 0])
    contrast = float((both - empty).abs().max())
    # The contrasts add up but for what is quadratic in the scattered wave.
    assert float((both - (one + other - empty)).abs().max()) < 0.05 * contrast


def test_a_particle_outside_leaves_no_trace() -> None:
    near, far = Particle(CLUSTER), Particle(CLUSTER, x_angstrom=9000.0)
    both, one = at(make([near, far], margin_pixels=40)), at(make([near], margin_pixels=40))
    torch.testing.assert_close(both, one, rtol=1e-9, atol=0.0)
    cut = at(make([Particle(CLUSTER, x_angstrom=0.5 * 56 * PIXEL)], margin_pixels=40))
    assert torch.isfinite(cut).all()


# --- ice, exposure, noise -----------------------------------------------------------------------------------------


def test_ice_takes_its_share_of_the_electrons() -> None:
    thickness, path, x_tilt, pre_tilt = 1500.0, 2800.0, 10.0, 7.0
    thin = at(make(thickness_angstrom=0.0, x_tilt_deg=x_tilt, pre_tilt_deg=pre_tilt))
    thick = at(
        make(thickness_angstrom=thickness, mean_free_path_angstrom=path, x_tilt_deg=x_tilt, pre_tilt_deg=pre_tilt)
    )
    for t, tilt in enumerate((-40.0, 0.0, 40.0)):
        cosine = math.cos(math.radians(tilt + pre_tilt)) * math.cos(math.radians(x_tilt))
        torch.testing.assert_close(thick[t] / thin[t], torch.full_like(thin[t], math.exp(-thickness / (path * cosine))))
    assert transmission(thickness, path, 1.0) == pytest.approx(math.exp(-thickness / path))


def test_critical_exposures_are_the_published_ones() -> None:
    q2 = torch.tensor([0.0, 0.1**2, 0.25**2], dtype=torch.float64)
    expected = [math.inf, 0.245 * 0.1**-1.665 + 2.81, 0.245 * 0.25**-1.665 + 2.81]
    np.testing.assert_allclose(critical_exposure(q2, 300.0), expected, rtol=1e-12)
    np.testing.assert_allclose(critical_exposure(q2, 200.0), 0.8 * np.array(expected), rtol=1e-12)
    np.testing.assert_allclose(critical_exposure(q2, 250.0), 0.9 * np.array(expected), rtol=1e-12)
    weight = damage(q2, torch.tensor(10.0, dtype=torch.float64), 300.0)
    np.testing.assert_allclose(weight, np.exp(-10.0 / (2 * np.array(expected))), rtol=1e-12)
    # At the critical exposure the power has fallen to 1/e.
    assert float(damage(q2, critical_exposure(q2, 300.0)[1], 300.0)[1]) ** 2 == pytest.approx(math.exp(-1))


def test_later_images_show_less() -> None:
    scheme = TiltScheme((-0.01, 0.0, 0.01), (1, 0, 2))
    series = make(scheme=scheme, detector=Detector(dose_e_per_angstrom2=30.0), thickness_angstrom=0.0)
    contrast = [float((image - image[0, 0]).std()) for image in at(series)]
    assert contrast[1] > 1.05 * contrast[0] > 1.05**2 * contrast[2]
    fresh = at(make(scheme=scheme, detector=Detector(dose_e_per_angstrom2=30.0), radiation_damage=False))
    deviations = [float((image - image[0, 0]).std()) for image in fresh]
    assert deviations[0] == pytest.approx(deviations[2], rel=1e-2)


def test_an_images_noise_is_its_own() -> None:
    series = make(
        parameters=("defocus_um[1]", "shift_x_angstrom[2]"),
        mode="hard",
        noise="full",
        detector=Detector(dose_e_per_angstrom2=3.0, dqe=0.8, bits=None),
    )
    inputs = series.reference + np.array([[0.0, 0.0], [0.5, 0.0], [0.0, 9.0]])
    images = series(inputs, np.full(3, 5, dtype=np.uint64))
    changed = (images != images[:1]).any(axis=(2, 3))
    assert changed.tolist() == [[False] * 3, [False, True, False], [False, False, True]]
    assert not np.array_equal(series(inputs[:1], SEED)[0], images[0])
    assert not np.array_equal(images[0, 0] - images[0, 0].mean(), images[0, 2] - images[0, 2].mean())
    assert np.array_equal(images, np.round(images))
    np.testing.assert_array_equal(series(inputs[1:2], np.full(1, 5, dtype=np.uint64))[0], images[1])
    # Poisson's variance over the DQE, per image.
    quiet = make(
        parameters=series.parameters, detector=Detector(dose_e_per_angstrom2=3.0, dqe=0.8, bits=None), mode="hard"
    )
    noise = images[0] - quiet(inputs[:1], SEED)[0]
    assert noise[1].var() == pytest.approx(images[0, 1].mean() / 0.8, rel=0.1)


# --- structure and gradients --------------------------------------------------------------------------------------

BLOCKS = ("defocus_um", "shift_x_angstrom[0]", "defocus_um[2]", "tilt_deg[1]", "dose_e_per_angstrom2[1]")


@pytest.mark.parametrize("radiation_damage", [True, False])
def test_structure_is_what_the_images_do(radiation_damage: bool) -> None:
    series = make(parameters=BLOCKS, bounds={"tilt_deg[1]": (-60, 60)}, radiation_damage=radiation_damage)
    assert isinstance(series, Simulator)
    assert isinstance(series, Structured)
    assert isinstance(series, FileFormat)
    assert series.structure is not None
    declared = series.structure.mask(series.output_shape).reshape(5, 3, -1).any(axis=2)
    before = at(series)
    for k, step in enumerate((0.3, 8.0, 0.3, 5.0, 2.0)):
        theta = series.reference.copy()
        theta[k] += step
        touched = (series.image(torch.from_numpy(theta)) != before).any(dim=(1, 2)).numpy()
        assert (touched <= declared[k]).all(), series.space.names[k]
        assert touched.any()
    own = [[True, True, True], [True, False, False], [False, False, True], [False, True, False]]
    assert declared[:4].tolist() == own
    assert declared[4].tolist() == ([True] * 3 if radiation_damage else [False, True, False])
    assert make().structure is None


def test_what_is_common_is_that_of_the_images_without_their_own() -> None:
    series = make(parameters=("defocus_um", "defocus_um[1]"))
    before, after = at(series), at(series, defocus_um=2.0)
    assert (after != before).any(dim=(1, 2)).tolist() == [True, False, True]
    settings = series.settings([2.0, 2.5])
    assert [settings[f"defocus_um[{t}]"] for t in range(3)] == [2.0, 2.5, 2.0]


VARIED = {
    "defocus_um": 1e-4,
    "voltage_kv": 1e-2,
    "tilt_axis_deg": 1e-4,
    "x_tilt_deg": 1e-4,
    "pre_tilt_deg": 1e-4,
    "thickness_angstrom": 1.0,
    "mean_free_path_angstrom": 1.0,
    "tilt_deg[0]": 1e-4,
    "shift_x_angstrom[1]": 1e-3,
    "shift_y_angstrom[1]": 1e-3,
    "defocus_um[1]": 1e-4,
    "dose_e_per_angstrom2[0]": 1e-4,
    "x_angstrom[1]": 1e-3,
    "y_angstrom[1]": 1e-3,
    "z_angstrom[1]": 1e-2,
    "particle_rot_deg[1]": 1e-4,
    "particle_tilt_deg[0]": 1e-4,
    "particle_psi_deg[0]": 1e-4,
}


def test_gradients_of_the_smooth_mode_are_exact() -> None:
    """Reverse mode against central differences, whose error is h^2, and against forward mode."""
    particles = [Particle(CLUSTER, 5.0, 3.0, 200.0, 10, 20, 30), Particle(CLUSTER, 60.0, -30.0, -100.0, 70, 80, 90)]
    series = make(
        particles,
        parameters=tuple(VARIED),
        scheme=TiltScheme((-30.0, 20.0), (1, 0)),
        shape=(24, 24),
        bounds={"tilt_deg[0]": (-40, 0), "pre_tilt_deg": (-10, 10)},
        tilt_axis_deg=20.0,
    )
    random = torch.Generator().manual_seed(0)
    cotangent = torch.randn(series.output_shape, generator=random, dtype=torch.float64)
    theta = torch.from_numpy(series.reference).requires_grad_()

    def scalar(at: torch.Tensor) -> torch.Tensor:
        return (series.image(at) * cotangent).sum()

    (gradient,) = torch.autograd.grad(scalar(theta), theta)
    theta = theta.detach()
    for k, (name, step) in enumerate(VARIED.items()):
        move = torch.zeros_like(theta)
        move[k] = step
        difference = float(scalar(theta + move) - scalar(theta - move)) / (2 * step)
        assert abs(difference) > 0, name
        assert difference == pytest.approx(float(gradient[k]), rel=1e-4), name
    direction = torch.randn(len(VARIED), generator=random, dtype=torch.float64)
    _, forward = torch.func.jvp(scalar, (theta,), (direction,))
    torch.testing.assert_close(forward, gradient @ direction, rtol=1e-8, atol=1e-10)


def test_smoothed_gradients_of_the_black_box_agree_where_the_structure_lets_them() -> None:
    names = ("shift_x_angstrom[0]", "shift_x_angstrom[2]")
    series = make(parameters=names, shape=(32, 32))
    theta = torch.from_numpy(series.reference)
    exact = torch.func.jacfwd(series.image)(theta).movedim(-1, 0)
    estimate = bridge.smooth(series, seed=0, num_samples=32, scale=0.1).estimate(theta).jacobian().movedim(-1, 0)
    for k, image in enumerate((0, 2)):
        others = [t for t in range(3) if t != image]
        assert float(estimate[k][others].abs().max()) == 0.0
        seen = (exact[k] * estimate[k]).sum() / exact[k].square().sum()
        assert float(seen) == pytest.approx(1.0, abs=0.05)


# --- files --------------------------------------------------------------------------------------------------------


def test_a_series_is_written_for_other_programs(tmp_path: Path) -> None:
    axis, pre_tilt = 85.0, 5.0
    series = make(
        [Particle(CLUSTER, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0)],
        scheme={"dose_symmetric": [40, 20]},
        tilt_axis_deg=axis,
        pre_tilt_deg=pre_tilt,
        x_tilt_deg=1.5,
        parameters=("shift_x_angstrom[1]", "defocus_um[4]"),
        shape=(47, 56),
        mode="hard",
    )
    theta = np.array([16.0, 2.5])
    images = series(theta[None], SEED)[0]
    files = write_tilt_series(tmp_path / "new", "ts_01", series, images, theta)
    assert sorted(p.name for p in files) == sorted(p.name for p in (tmp_path / "new").iterdir())
    text = {p.name.removeprefix("ts_01"): p.read_text() for p in files[1:]}
    with mrcfile.open(files[0]) as stack:
        np.testing.assert_array_equal(stack.data, images)
        assert stack.is_image_stack()
        assert float(stack.voxel_size.x) == PIXEL
        assert stack.header.ispg == 0
    assert mrcfile.validate(files[0])
    assert [float(v) for v in text[".rawtlt"].split()] == [-40, -20, 0, 20, 40]
    assert [float(v) for v in text[".tlt"].split()] == [-35, -15, 5, 25, 45]
    assert [float(v) for v in text[".xtilt"].split()] == [1.5] * 5
    # The transformation takes a point on the tilt axis to the line x = middle, the specimen's origin to the middle.
    table = np.array([[float(v) for v in line.split()] for line in text[".xf"].splitlines()])
    middle = np.array([56, 47]) / 2
    for t, row in enumerate(table):
        shift = np.array([2.0 if t == 1 else 0.0, 0.0])
        matrix, moved = row[:4].reshape(2, 2), row[4:]
        origin = np.array([56 // 2 + 0.5, 47 // 2 + 0.5]) + shift  # pixel n // 2, counted from the first pixel's edge
        along = 10 * np.array([-math.sin(math.radians(axis)), math.cos(math.radians(axis))])
        np.testing.assert_allclose(matrix @ (origin - middle) + middle + moved, middle, atol=2e-3)
        np.testing.assert_allclose(
            matrix @ (origin + along - middle) + middle + moved, middle + np.array([0, 10]), atol=2e-3
        )
    blocks = [
        dict(line.split(" = ") for line in b.splitlines()[1:] if line) for b in text[".mdoc"].split("[ZValue")[1:]
    ]
    assert [float(b["TiltAngle"]) for b in blocks] == [-40, -20, 0, 20, 40]
    assert [float(b["PriorRecordDose"]) for b in blocks] == [12, 6, 0, 3, 9]
    assert [float(b["Defocus"]) for b in blocks] == [-3, -3, -3, -3, -2.5]
    tilts = _star(text["_tilts.star"])
    assert [float(v) for v in tilts["rlnDefocusU"]] == [30000] * 4 + [25000]
    assert [float(v) for v in tilts["rlnTomoYTilt"]] == [-35, -15, 5, 25, 45]
    assert [float(v) for v in tilts["rlnTomoXShiftAngst"]] == [0, 16, 0, 0, 0]
    assert [float(v) for v in tilts["rlnTomoYShiftAngst"]] == [0] * 5  # of n // 2, as RELION's C++ programs have it
    assert tilts["rlnMicrographName"][0] == "1@ts_01.mrc"
    (particle,) = zip(*list(_star(text["_particles.star"]).values())[1:], strict=True)
    assert [float(v) for v in particle] == [10, 20, 30, 40, 50, 60]
    tomogram = _star(text["_series.star"])
    assert tomogram["rlnTomoTiltSeriesStarFile"] == ["ts_01_tilts.star"]
    assert [tomogram[f"rlnTomoSize{axis}"] for axis in "XY"] == [["56"], ["48"]]  # even
    assert int(tomogram["rlnTomoSizeZ"][0]) % 2 == 0
    assert [float(v) for v in tomogram["rlnTomoHand"]] == [1]
    np.testing.assert_array_equal(series.read_output(str(files[0])), images)
    for name in ("", "../x", "a b", ".x"):
        with pytest.raises(InputError, match="name"):
            write_tilt_series(tmp_path, name, series, images)
    with pytest.raises(InputError, match=r"\(5, 47, 56\)"):
        write_tilt_series(tmp_path, "x", series, images[:2])


def _star(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line]
    names = [line.split()[0].lstrip("_") for line in lines if line.startswith("_")]
    rows = [line.split("\t") for line in lines[2 + len(names) :]]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def test_stacks_are_read_as_they_were_written(tmp_path: Path) -> None:
    images = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    write_stack(tmp_path / "s.mrc", images, 2.5)
    stack = read_stack(tmp_path / "s.mrc")
    np.testing.assert_array_equal(stack.images, images)
    assert stack.pixel_size_angstrom == pytest.approx(2.5)
    write_stack(tmp_path / "one.mrc", images[:1], 2.5)
    assert read_stack(tmp_path / "one.mrc").images.shape == (1, 4, 5)
    with pytest.raises(InputError, match="images, rows, columns"):
        write_stack(tmp_path / "s.mrc", images[0], 2.5)
    with pytest.raises(InputError, match="pixel of 8"):
        make().read_output(str(tmp_path / "s.mrc"))


# --- settings -----------------------------------------------------------------------------------------------------


def test_it_is_made_from_plain_data() -> None:
    series = TiltSeries(
        particles=[{"specimen": {"helix": True, "num_subunits": 5}, "x_angstrom": 10.0}, {"specimen": "helix"}],
        scheme={"uniform": [-20, 20, 20]},
        shape=[32, 40],
        microscope={"defocus_um": 2.0},
        detector={"dose_e_per_angstrom2": 2.0},
        parameters=["x_angstrom[0]", "defocus_um"],
    )
    assert series.output_shape == (3, 32, 40)
    assert series.reference.tolist() == [10.0, 2.0]
    assert [p.unit for p in series.space.parameters] == ["angstrom", "um"]
    assert series.nominal_deg == (-20, 0, 20)


def test_every_name_is_a_parameter() -> None:
    names = [name.replace("[t]", "[0]").replace("[i]", "[0]") for name in SERIES_PARAMETER_NAMES]
    bounds = {"tilt_deg[0]": (-40, 40), "pre_tilt_deg": (-10, 10)}
    series = make(parameters=names, bounds=bounds)
    assert series.space.dimension == len(names) > 25
    assert set(series.settings(series.reference)) >= set(names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"particles": []}, "at least one"),
        ({"particles": [{"specimen": "helix", "colour": 1}]}, "colour"),
        ({"particles": [Particle(CLUSTER, x_angstrom=0.0), 3]}, "Particle"),
        ({"parameters": ("defocus",)}, "Known parameters: .*shift_x_angstrom"),
        ({"parameters": ("shift_x_angstrom[3]",)}, "t below 3"),
        ({"parameters": ("x_angstrom[1]",)}, "i below 1"),
        ({"parameters": "defocus_um"}, "list"),
        ({"bounds": {"cs_mm": (0, 1)}}, "cs_mm"),
        ({"natural_scale": {"cs_mm": 1.0}}, "cs_mm.*in natural_scale"),
        ({"bounds": {"defocus_um": (0,)}}, "lower, upper"),
        ({"shifts_angstrom": [[0, 0]]}, r"\(3, 2\)"),
        ({"mode": "soft"}, "hard, smooth"),
        ({"noise": "white"}, "none, poisson, full"),
        ({"thickness_angstrom": -1.0}, "thickness_angstrom"),
        ({"scheme": TiltScheme.uniform(-80, 80, 80), "pre_tilt_deg": 10.0}, "85 degrees"),
        ({"parameters": ("tilt_deg[0]",)}, "Narrow bounds"),
        ({"margin_pixels": -1}, "margin_pixels"),
        ({"shape": (2, 2)}, "shape"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], said: str) -> None:
    particles = options.pop("particles", [Particle(CLUSTER)])
    with pytest.raises(InputError, match=said):
        make(particles, **options)


def test_inputs_are_checked() -> None:
    series = make(bounds={"defocus_um": (1, 4)})
    for inputs in (np.zeros((1, 2)), np.array([[5.0]]), np.array([[np.nan]])):
        with pytest.raises(InputError, match="Expected"):
            series(inputs, SEED)
    for theta in (torch.zeros(2), torch.zeros(1, dtype=torch.int64), np.zeros(1)):
        with pytest.raises(InputError, match="Expected theta"):
            series.image(theta)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Use larger pixels"):
        Volume.build(Specimen.helix(), 1.0, hard_solvent=False)
    assert series.image(torch.zeros((0, 1))).shape == (0, 3, 48, 56)
