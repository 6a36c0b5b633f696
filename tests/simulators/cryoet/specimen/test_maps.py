"""Maps as specimens: what a file's header means, and that a map of atoms gives the atoms' image."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

from bridge.errors import InputError
from simulators.cryoet import CryoET, DensityMap, Particle, Specimen, TiltSeries
from simulators.cryoet.specimen.volume import potential_spectrum

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
mrcfile = pytest.importorskip("mrcfile", reason="the cryo-EM simulator needs mrcfile")

SEEDS = np.zeros(1, dtype=np.uint64)
POSE = ("x_angstrom", "y_angstrom", "rotation_deg")


def write(path: Path, data: np.ndarray, voxel: float = 2.0, **header) -> Path:
    """A volume by mrcfile; `header` sets fields, in file order."""
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(data, dtype=np.float32))
        mrc.set_volume()
        mrc.voxel_size = voxel
        for key, value in header.items():
            mrc.header[key] = value
    return path


@pytest.fixture(scope="module")
def atoms() -> Specimen:
    places = [(-9.0, 4.0, 11.0), (6.0, -7.0, -3.0), (12.0, 9.0, 2.0)]
    return Specimen.from_atoms(places, [6, 7, 8], weights=300.0, b_factors=1000.0)


@pytest.fixture(scope="module")
def density(atoms: Specimen) -> DensityMap:
    """The atoms' own potential on 40^3 voxels of 2 angstrom, less the solvent's."""
    n, step = 40, 2.0
    values = scipy.fft.irfftn(potential_spectrum(atoms, n, step, solvent=True), s=(n, n, n)) / step**3
    return DensityMap(values, (step,) * 3, (-n // 2 * step,) * 3)


# --- headers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", list(itertools.permutations((1, 2, 3))))
def test_any_order_of_axes(tmp_path: Path, axes: tuple[int, int, int]) -> None:
    """The file's columns, rows and sections run along the axes 1, 2, 3 = x, y, z that MAPC, MAPR, MAPS name."""
    volume = np.random.default_rng(0).normal(size=(4, 5, 6)).astype(np.float32)  # z, y, x
    along = {1: 2, 2: 1, 3: 0}
    data = volume.transpose([along[a] for a in reversed(axes)])
    path = write(tmp_path / "map.mrc", data, mapc=axes[0], mapr=axes[1], maps=axes[2], mx=6, my=5, mz=4)
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.cella.x, mrc.header.cella.y, mrc.header.cella.z = 6 * 1.5, 5 * 2.0, 4 * 2.5
        # Start of columns, rows, sections.
        mrc.header.nxstart, mrc.header.nystart, mrc.header.nzstart = (10 * a for a in axes)
    read = DensityMap.from_file(path, volts_per_unit=2.0)
    np.testing.assert_array_equal(read.values, 2.0 * volume.astype(np.float64))
    assert read.voxel_angstrom == (1.5, 2.0, 2.5)
    # Voxel n // 2 is the origin.
    assert read.first_angstrom == (-3 * 1.5, -2 * 2.0, -2 * 2.5)
    placed = DensityMap.from_file(path, volts_per_unit=1.0, centre=(0.0, 0.0, 0.0))
    assert placed.first_angstrom == (10 * 1.5, 20 * 2.0, 30 * 2.5)


def test_a_voxel_is_the_cell_by_the_sampling_not_by_the_size(tmp_path: Path) -> None:
    path = write(tmp_path / "part.map", np.ones((4, 4, 4)), mx=100, my=100, mz=100)
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.cella.x = mrc.header.cella.y = mrc.header.cella.z = 300.0
    assert DensityMap.from_file(path, volts_per_unit=1.0).voxel_angstrom == (3.0, 3.0, 3.0)


def test_origin_and_start(tmp_path: Path) -> None:
    path = write(tmp_path / "map.mrc", np.ones((4, 4, 4)), nxstart=5)
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.origin.x = 7.0
    point = dict(volts_per_unit=1.0, centre=(1.0, 0.0, 0.0))
    with pytest.raises(InputError, match=r'one origin.*7\.0.*10\.0.*origin="header" or "start"'):
        DensityMap.from_file(path, **point)
    assert DensityMap.from_file(path, origin="header", **point).first_angstrom == (6.0, 0.0, 0.0)
    assert DensityMap.from_file(path, origin="start", **point).first_angstrom == (9.0, 0.0, 0.0)
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.origin.x = 10.0  # the same, said twice
    assert DensityMap.from_file(path, **point).first_angstrom == (9.0, 0.0, 0.0)


def test_what_the_file_does_not_say_is_asked_about(tmp_path: Path) -> None:
    path = write(tmp_path / "map.mrc", np.linspace(-1, 3, 64).reshape(4, 4, 4))
    with pytest.raises(InputError, match=r"volts_per_unit.*arbitrary.*-1 to 3"):
        DensityMap.from_file(path)
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.cella.x = mrc.header.cella.y = mrc.header.cella.z = 0.0
    with pytest.raises(InputError, match=r"voxel size in .*map\.mrc.*Say it"):
        DensityMap.from_file(path, volts_per_unit=1.0)
    assert DensityMap.from_file(path, volts_per_unit=1.0, voxel_size_angstrom=1.2).voxel_angstrom == (1.2,) * 3
    with mrcfile.open(path, mode="r+") as mrc:
        mrc.header.cellb.gamma = 120.0
    with pytest.raises(InputError, match="right angles"):
        DensityMap.from_file(path, volts_per_unit=1.0, voxel_size_angstrom=1.2)
    with pytest.raises(InputError, match="MAPC, MAPR, MAPS"):
        DensityMap.from_file(write(tmp_path / "axes.mrc", np.ones((4, 4, 4)), mapc=2), volts_per_unit=1.0)
    with pytest.raises(InputError, match=r"Unknown key 'volts'.*volts_per_unit"):
        CryoET({"map": str(path), "volts": 1.0})
    path = write(tmp_path / "map.mrc", np.ones((4, 4, 4)))
    with pytest.raises(InputError, match="volts_per_unit"):
        CryoET(path)


def test_level_and_centre_of_mass(tmp_path: Path) -> None:
    values = np.zeros((6, 6, 6))
    values[1, 2, 4], values[1, 2, 2], values[5, 5, 5] = 3.0, 1.0, 0.5
    path = write(tmp_path / "map.mrc", values)
    read = DensityMap.from_file(path, volts_per_unit=1.0, level=0.9, centre="mass")
    assert read.values.sum() == 4.0
    assert read.first_angstrom == pytest.approx((-7.0, -4.0, -2.0))
    assert read.corners.min(axis=0) == pytest.approx((-3.0, 0.0, 0.0))
    with pytest.raises(InputError, match="level below"):
        DensityMap.from_file(path, volts_per_unit=1.0, level=4.0)
    with pytest.raises(InputError, match="Unknown centre='middle'"):
        DensityMap.from_file(path, volts_per_unit=1.0, centre="middle")


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixel", [3.0, 4.7])
def test_a_map_of_atoms_has_the_atoms_image(atoms: Specimen, density: DensityMap, pixel: float) -> None:
    """At pixels that are not the map's; in both modes, since a map has no solvent to displace."""
    settings = dict(shape=(24, 26), pixel_size_angstrom=pixel, parameters=POSE, margin_pixels=10)
    theta = torch.tensor([3.3, -2.1, 40.0], dtype=torch.float64)
    expected = CryoET(atoms, mode="smooth", **settings).image(theta)
    image = CryoET(density, mode="smooth", **settings).image(theta)
    # The tails of the atoms are cut off at 40 angstrom.
    assert (image - expected).abs().max() < 2e-3 * expected.std()
    hard = CryoET(density, mode="hard", **settings).electrons(theta)
    assert (hard - CryoET(density, mode="smooth", **settings).electrons(theta)).abs().max() < 1e-9 * hard.max()


def test_a_tilted_map_has_the_tilted_atoms_image(atoms: Specimen, density: DensityMap) -> None:
    names = ("x_tilt_deg", "y_tilt_deg", "x_angstrom")
    settings = dict(shape=(16, 16), pixel_size_angstrom=6.0, parameters=names, margin_pixels=10, mode="smooth")
    theta = torch.tensor([25.0, -40.0, 3.0], dtype=torch.float64)
    sim = CryoET(density, **settings)
    expected, image = CryoET(atoms, **settings).image(theta), sim.image(theta)
    # The volume's spline errs by up to 0.8 % at its box's edge.
    assert (image - expected).abs().max() < 0.02 * expected.std()
    still = sim.image(torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64))
    assert (image - still).abs().max() > expected.std()
    # The same bits whether the projection is kept or not, and exact derivatives.
    row = theta.numpy()[None]
    np.testing.assert_array_equal(sim(row, SEEDS), CryoET(density, **settings)(row, SEEDS))
    assert (torch.from_numpy(sim(row, SEEDS)[0]) - image).abs().max() < 1e-3 * image.std()
    exact, h = torch.func.jacfwd(sim.image)(theta), 1e-4
    for k in range(2):
        step = h * torch.eye(3, dtype=torch.float64)[k]
        difference = (sim.image(theta + step) - sim.image(theta - step)) / (2 * h)
        assert (exact[..., k] - difference).abs().max() < 1e-5 * exact[..., k].abs().max()


def test_a_map_in_a_tilt_series(atoms: Specimen, density: DensityMap) -> None:
    series = [
        TiltSeries([Particle(s, x_angstrom=10.0)], {"uniform": [-40, 40, 40]}, (24, 24), 4.0, mode="smooth")
        for s in (atoms, density)
    ]
    one, other = (s.image(torch.from_numpy(s.reference)) for s in series)
    assert (one - other).abs().max() < 0.02 * one.std()


def test_a_compressed_file_from_plain_data(tmp_path: Path, density: DensityMap) -> None:
    plain = write(tmp_path / "emd_1.map", density.values, 2.0)
    packed = tmp_path / "emd_1.map.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    settings = dict(shape=(16, 16), pixel_size_angstrom=5.0, parameters=POSE)
    images = [
        CryoET({"map": str(path), "volts_per_unit": 1.0}, **settings)(np.zeros((1, 3)), SEEDS)
        for path in (plain, packed)
    ]
    np.testing.assert_array_equal(*images)
    with pytest.raises(InputError, match="map, which is rigid"):
        CryoET({"map": str(plain), "volts_per_unit": 1.0}, deformation={"modes": 2})
