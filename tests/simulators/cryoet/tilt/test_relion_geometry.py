"""RELION's tables and the simulator agree on where a particle is, and on its defocus: any parity, both hands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import (
    Detector,
    RelionParticles,
    RelionSeries,
    TiltSeries,
    read_relion_particles,
    read_relion_series,
    write_tilt_series,
)
from simulators.cryoet.tilt.parameters import about_x, about_y, about_z
from simulators.cryoet.tilt.relion_tables import Centre
from tests.lab.relion import BEAD, DEFOCI, IMAGES, POSES, SHIFTS, edit, series

pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")
pytest.importorskip("gemmi", reason="gemmi is optional (extra `cryoet`)")

# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")

CENTRES: tuple[Centre, ...] = ("rounded", "exact")


def from_behind(shape: tuple[int, int] = (10, 13)) -> TiltSeries:
    """The same specimen, turned by 180 degrees about y with its microscope's geometry; columns run backwards."""
    turned = POSES * [-1.0, 1.0, -1.0, 1.0, -1.0, -1.0] + [0.0, 0.0, 0.0, 180.0, 180.0, 180.0]
    first = 4.5 * (shape[1] - 1 - 2 * (shape[1] // 2))
    return series(shape, -85.3, SHIFTS * [-1.0, 1.0] + [first, 0.0], turned, -1.5, -30.5)


def remade(found: RelionSeries, particles: RelionParticles) -> TiltSeries:
    """The simulator of what was read."""
    recorded = found.recorded
    assert recorded.doses_e_per_angstrom2 is not None
    assert found.astigmatism_um is not None
    assert found.astigmatism_angle_deg is not None
    microscope = {
        "voltage_kv": found.voltage_kv,
        "cs_mm": found.cs_mm,
        "amplitude_contrast": found.amplitude_contrast,
        "astigmatism_um": found.astigmatism_um[0],
        "astigmatism_angle_deg": found.astigmatism_angle_deg[0],
    }
    return TiltSeries(
        particles.particles(BEAD),
        recorded.scheme,
        recorded.images.shape[1:],
        recorded.pixel_size_angstrom,
        microscope,
        Detector(dose_e_per_angstrom2=recorded.doses_e_per_angstrom2[0]),
        [f"defocus_um[{t}]" for t in range(3)],
        tilt_axis_deg=recorded.tilt_axis_deg,
        x_tilt_deg=found.x_tilt_deg,
        shifts_angstrom=recorded.shifts_angstrom,
        mode="smooth",
    )


@given(st.floats(-179.0, 179.0), st.integers(8, 24), st.integers(8, 24), st.floats(-900.0, 900.0), st.floats(-9.0, 9.0))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_geometry_comes_back_at_any_angle_and_parity(
    tmp_path: Path, axis: float, rows: int, columns: int, x: float, y: float
) -> None:
    of = series((rows, columns), axis, [[x, y], [y, x], [0.0, -x]])
    write_tilt_series(tmp_path, "u", of, np.zeros(of.output_shape))
    found = read_relion_series(tmp_path / "u_series.star", centre="rounded")
    assert found.recorded.tilt_axis_deg == pytest.approx(axis, abs=1e-6)
    np.testing.assert_allclose(found.recorded.shifts_angstrom, [[x, y], [y, x], [0.0, -x]], atol=1e-6)


def relion_sees(folder: Path, shape: tuple[int, int], place: np.ndarray, centre: Centre, hand: int) -> np.ndarray:
    """RELION's projection, with its tables' numbers: column, row, defocus [um] of a centred place, (images, 3)."""
    titles, row = _table(folder / "t_series.star")
    size = np.array([int(row[0][titles.index(f"_rlnTomoSize{axis}")]) for axis in "XYZ"])
    n = np.array(shape[::-1])
    about, middle = (size // 2, n // 2) if centre == "rounded" else (size / 2, n / 2)
    found = []
    for line in _table(folder / "t_tilts.star")[1]:
        u, v, _, *geometry = map(float, line[3:])
        x_tilt, y_tilt, z_rot, *shift = (torch.tensor(value, dtype=torch.float64) for value in geometry)
        turn = (about_z(z_rot) @ about_y(y_tilt) @ about_x(x_tilt)).numpy()
        pixel = (turn @ (place / 4.5 + size / 2 - about))[:2] + np.array(shift) / 4.5 + middle
        found.append([*pixel, 0.5e-4 * (u + v) + hand * 1e-4 * (turn @ place)[2]])
    return np.array(found)


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    lines = [line.split() for line in path.read_text().splitlines()]
    return [line[0] for line in lines if line and line[0].startswith("_")], [line for line in lines if len(line) > 2]


@pytest.mark.parametrize("hand", [1, -1])
@pytest.mark.parametrize("centre", ["rounded", "exact"])
@pytest.mark.parametrize(("shape", "tomogram"), [((10, 13), "13 10 31"), ((13, 12), "14 9 30"), ((12, 12), "12 12 30")])
def test_relion_and_the_simulator_see_a_particle_at_the_same_pixel(
    tmp_path: Path, shape: tuple[int, int], tomogram: str, centre: Centre, hand: int
) -> None:
    write_tilt_series(tmp_path, "t", series(shape), np.zeros((3, *shape)), DEFOCI)
    titles, (row,) = _table(tmp_path / "t_series.star")
    first, last = titles.index("_rlnTomoHand"), titles.index("_rlnTomoSizeZ") + 1
    edit(tmp_path / "t_series.star", "\t".join(row[first:last]), "\t".join([str(hand), *tomogram.split()]))
    found = read_relion_series(tmp_path / "t_series.star", last_dose_e_per_angstrom2=3.5, centre=centre)
    particles = read_relion_particles(
        tmp_path / "t_particles.star", tomograms=tmp_path / "t_series.star", pixel_size_angstrom=4.5, centre=centre
    )
    assert found.hand == hand
    if hand == -1:
        assert any("turned_over" in line for line in found.assumed)
        found, particles = found.turned_over(), particles.turned_over()
    assert (found.hand, found.assumed) == (1, ())
    of = remade(found, particles)
    own = {name: torch.tensor(v, dtype=torch.float64) for name, v in of.settings(found.recorded.defocus_um).items()}
    assert found.recorded.shifts_angstrom is not None
    for place, read in zip(POSES[:, :3], particles.positions_angstrom, strict=True):
        expected = relion_sees(tmp_path, shape, place, centre, hand)
        if hand == -1:
            expected[:, 0] = shape[1] - 1 - expected[:, 0]
        turned = np.stack([(of.rotation(own, t) @ torch.tensor(read)).numpy() for t in range(3)])
        pixels = (turned[:, :2] + found.recorded.shifts_angstrom) / 4.5 + [shape[1] // 2, shape[0] // 2]
        np.testing.assert_allclose(pixels, expected[:, :2], atol=1e-5)
        # RELION's heights count from size / 2 whatever it turns the specimen about: half a nanometre for odd sizes.
        np.testing.assert_allclose(found.recorded.defocus_um + 1e-4 * turned[:, 2], expected[:, 2], atol=5e-4)


def test_the_centre_of_odd_sizes_is_asked_for(tmp_path: Path) -> None:
    for shape in ((10, 13), (13, 10), (10, 12)):
        write_tilt_series(tmp_path, "t", series(shape), np.zeros((3, *shape)))
        tables = tmp_path / "t_series.star"
        shifts = {c: read_relion_series(tables, centre=c).recorded.shifts_angstrom for c in CENTRES}
        np.testing.assert_allclose(shifts["rounded"], SHIFTS, atol=1e-6)
        odd = np.array(shape[::-1]) % 2
        np.testing.assert_allclose(shifts["exact"] - shifts["rounded"], np.tile(2.25 * odd, (3, 1)))
        if odd.any():
            with pytest.raises(InputError, match=r"odd size \(13\).*t_tilts\.star.*centre='rounded'.*'exact'"):
                read_relion_series(tables)
        else:
            np.testing.assert_array_equal(read_relion_series(tables).recorded.shifts_angstrom, shifts["exact"])
        # Sizes that are written are even, whatever the images'.
        found = read_relion_particles(tmp_path / "t_particles.star", tomograms=tables)
        np.testing.assert_allclose(found.positions_angstrom, POSES[:, :3], atol=1e-6)
        assert found.assumed == ("Origins are nought: there is no rlnOriginXAngst, YAngst, ZAngst.",)
    with pytest.raises(InputError, match="Unknown centre='middle'"):
        read_relion_series(tables, centre="middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"odd size \(41\).*places in .*t_particles\.star.*centre='rounded'"):
        read_relion_particles(tmp_path / "t_particles.star", size_pixels=(14, 10, 41))


@pytest.mark.parametrize("shape", [(10, 13), (13, 12)])
@pytest.mark.parametrize("hand", [1, -1])
def test_a_simulator_made_of_what_was_read_makes_the_same_images(
    tmp_path: Path, shape: tuple[int, int], hand: int
) -> None:
    was = replace(series(shape), mode="smooth")
    expected = was.image(torch.tensor(DEFOCI, dtype=torch.float64)).numpy()
    assert expected.std() > 0.01
    behind = from_behind(shape) if hand == -1 else was
    write_tilt_series(tmp_path, "t", behind, expected[:, :, ::hand], DEFOCI)
    found = read_relion_series(tmp_path / "t_series.star", hand=hand, last_dose_e_per_angstrom2=3.5, centre="rounded")
    particles = read_relion_particles(tmp_path / "t_particles.star")
    with_hand_1 = remade(found, particles)
    if hand == -1:
        found, particles = found.turned_over(), particles.turned_over()
    images = remade(found, particles).image(torch.tensor(found.recorded.defocus_um)).numpy()
    np.testing.assert_allclose(found.recorded.images, expected, rtol=1e-6)
    np.testing.assert_allclose(images, expected, rtol=1e-5)
    if hand == -1:  # heights of 4 nm the wrong way round are seen
        wrong = with_hand_1.image(torch.tensor(found.recorded.defocus_um)).numpy()[:, :, ::-1]
        assert np.abs(wrong - expected).max() > 30 * np.abs(images - expected).max()


def test_turning_over_twice_changes_nothing(tmp_path: Path) -> None:
    write_tilt_series(tmp_path, "t", series(), IMAGES, DEFOCI)
    found = read_relion_series(tmp_path / "t_series.star", last_dose_e_per_angstrom2=3.5, centre="rounded")
    again = found.turned_over().turned_over()
    np.testing.assert_array_equal(again.recorded.images, IMAGES)
    np.testing.assert_allclose(again.recorded.shifts_angstrom, SHIFTS, atol=1e-6)
    assert (again.recorded.tilt_axis_deg, again.x_tilt_deg) == (found.recorded.tilt_axis_deg, found.x_tilt_deg)
    assert (again.hand, again.assumed) == (1, ())
    assert found.turned_over().hand == -1
    assert "turned_over" in found.turned_over().assumed[0]
    particles = read_relion_particles(tmp_path / "t_particles.star")
    twice = particles.turned_over().turned_over()
    np.testing.assert_array_equal(twice.positions_angstrom, particles.positions_angstrom)

    def turn(angles: np.ndarray) -> np.ndarray:
        rot, tilt, psi = (torch.tensor(float(a), dtype=torch.float64) for a in angles)
        return (about_z(rot) @ about_y(tilt) @ about_z(psi)).T.numpy()

    for one, two, behind in zip(
        particles.angles_deg, twice.angles_deg, particles.turned_over().angles_deg, strict=True
    ):
        np.testing.assert_allclose(turn(two), turn(one), atol=1e-12)
        np.testing.assert_allclose(turn(behind), np.diag([-1.0, 1.0, -1.0]) @ turn(one), atol=1e-12)
