"""RELION's tables: what was written is read, in both conventions of coordinates; damage is said, never guessed away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import (
    Particle,
    RelionParticles,
    RelionSeries,
    TiltScheme,
    TiltSeries,
    read_relion_particles,
    read_relion_series,
    read_tilt_series,
    write_stack,
    write_tilt_series,
)
from simulators.cryoet.formats.star import read_star
from simulators.cryoet.tilt.parameters import about_y, about_z
from tests.lab.relion import BEAD, DEFOCI, IMAGES, POSES, SHIFTS, edit, series

pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")
pytest.importorskip("gemmi", reason="gemmi is optional (extra `cryoet`)")

# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tilt_series(tmp_path, "t", series(), IMAGES, DEFOCI)
    return tmp_path


def test_a_series_that_was_written_is_read(folder: Path) -> None:
    found = read_relion_series(folder / "t_series.star", centre="rounded")
    recorded = found.recorded
    np.testing.assert_array_equal(recorded.images, IMAGES)
    assert recorded.pixel_size_angstrom == 4.5
    assert recorded.scheme == TiltScheme((-43.0, -1.0, 41.0), (2, 0, 1))  # rlnTomoYTilt has the pre-tilt
    np.testing.assert_allclose(found.nominal_deg, [-40.0, 2.0, 44.0], atol=1e-6)
    assert recorded.tilt_axis_deg == pytest.approx(85.3, abs=1e-6)
    assert found.x_tilt_deg == pytest.approx(1.5, abs=1e-6)
    np.testing.assert_allclose(recorded.shifts_angstrom, SHIFTS, atol=1e-6)
    np.testing.assert_allclose(recorded.doses_e_per_angstrom2, [3.5] * 3, atol=2e-6)
    np.testing.assert_allclose(found.exposures_e_per_angstrom2, [7.0, 0.0, 3.5], atol=1e-6)
    np.testing.assert_allclose(recorded.defocus_um, DEFOCI, atol=1e-10)
    np.testing.assert_allclose(found.astigmatism_um, [0.125] * 3, atol=1e-10)
    np.testing.assert_allclose(found.astigmatism_angle_deg, [30.5] * 3, atol=1e-6)
    assert (found.name, found.voltage_kv, found.cs_mm, found.amplitude_contrast, found.hand) == ("t", 200, 1.4, 0.1, 1)
    assert found.size_pixels == (14.0, 10.0, 224.0)  # even, as thick as the ice
    assert found.assumed == ()


def test_the_last_dose_is_not_guessed(folder: Path) -> None:
    text = (folder / "t_series.star").read_text()
    (folder / "t_series.star").write_text(text.replace("rlnTomoImportFractionalDose", "rlnOther"))
    found = read_relion_series(folder / "t_series.star", centre="rounded")
    assert found.recorded.doses_e_per_angstrom2 is None
    assert any("last_dose_e_per_angstrom2" in line for line in found.assumed)


@given(st.lists(st.floats(0.5, 9.0), min_size=3, max_size=3), st.permutations(range(3)))
@settings(max_examples=15, deadline=None)
def test_doses_that_differ_come_back(
    tmp_path_factory: pytest.TempPathFactory, doses: list[float], order: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("doses")
    names = tuple(f"dose_e_per_angstrom2[{t}]" for t in range(3))
    of = TiltSeries([Particle(BEAD)], TiltScheme((-40.0, 2.0, 44.0), tuple(order)), (10, 12), 4.5, parameters=names)
    write_tilt_series(folder, "d", of, np.zeros((3, 10, 12)), doses)
    found = read_relion_series(folder / "d_series.star").recorded
    np.testing.assert_allclose(found.doses_e_per_angstrom2, doses, atol=3e-6)
    np.testing.assert_allclose(
        read_tilt_series(folder / "d.mrc", mdoc=folder / "d.mdoc").doses_e_per_angstrom2, doses, rtol=1e-5
    )


def relion_4(folder: Path) -> Path:
    """The series of `folder` as RELION 4 has it: one file, with matrices from voxels of the tomogram to pixels."""
    tilts = read_star(folder / "t_tilts.star")["t"]
    series_ = read_star(folder / "t_series.star")["global"]
    size = np.array([series_.numbers(f"rlnTomoSize{axis}")[0] for axis in "XYZ"])
    pixel = float(series_.numbers("rlnTomoTiltSeriesPixelSize")[0])
    rows = []
    for i in range(tilts.rows):
        a, b, c = (np.radians(tilts.numbers(f"rlnTomo{k}")[i]) for k in ("ZRot", "YTilt", "XTilt"))
        z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
        y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
        x = np.array([[1, 0, 0], [0, np.cos(c), -np.sin(c)], [0, np.sin(c), np.cos(c)]])
        turn = z @ y @ x
        shift = [tilts.numbers(f"rlnTomo{k}ShiftAngst")[i] / pixel for k in "XY"]
        to = np.array([13 // 2 + shift[0], 10 // 2 + shift[1], 0.0]) - turn @ (size // 2)
        matrix = np.column_stack((turn, to))
        rows.append(
            " ".join("[" + ",".join(f"{v:.13g}" for v in line) + "]" for line in (*matrix, (0, 0, 0, 1)))
            + "".join(f" {tilts.columns[k][i]}" for k in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"))
            + f" 1.0 {tilts.columns['rlnMicrographPreExposure'][i]}"
        )
    columns = [
        *(f"rlnTomoProj{k}" for k in "XYZW"),
        "rlnDefocusU",
        "rlnDefocusV",
        "rlnDefocusAngle",
        "rlnCtfScalefactor",
        "rlnMicrographPreExposure",
    ]
    head = {k: v[0] for k, v in series_.columns.items() if k != "rlnTomoTiltSeriesStarFile"}
    head |= {"rlnTomoTiltSeriesName": "t.mrc:mrc", "rlnTomoFrameCount": "3"}
    path = folder / "tomograms4.star"
    path.write_text(
        "data_global\n\nloop_\n"
        + "".join(f"_{k}\n" for k in head)
        + " ".join(head.values())
        + "\n\ndata_t\n\nloop_\n"
        + "".join(f"_{k}\n" for k in columns)
        + "\n".join(rows)
        + "\n"
    )
    return path


def test_tables_of_relion_4(folder: Path) -> None:
    """The same series from projection matrices."""
    expected = read_relion_series(folder / "t_series.star", centre="rounded")
    path = relion_4(folder)
    found = read_relion_series(path, centre="rounded")
    for key in ("images", "shifts_angstrom", "doses_e_per_angstrom2", "defocus_um"):
        np.testing.assert_allclose(getattr(found.recorded, key), getattr(expected.recorded, key), atol=1e-6)
    assert found.recorded.tilt_axis_deg == pytest.approx(85.3, abs=1e-6)
    assert found.x_tilt_deg == pytest.approx(1.5, abs=1e-6)
    np.testing.assert_allclose(found.recorded.scheme.angles_deg, [-43.0, -1.0, 41.0], atol=1e-6)
    assert found.recorded.scheme.order == expected.recorded.scheme.order
    text = path.read_text()
    for old, new, said in (
        ("_rlnTomoTiltSeriesName", "_rlnOther", "rlnTomoTiltSeriesStarFile.*RELION 5.*RELION 4"),
        ("_rlnTomoProjY", "_rlnOther", "rlnTomoProjY"),
        ("_rlnTomoSizeX", "_rlnOther", "rlnTomoSizeX"),
        (" [0,0,0,1]", " [0,0,0,1]", ""),
        ("data_t\n", "data_u\n", "data_t"),
        ("\n[", "\n[9", "enlarge, distort or mirror"),
        ("\n[", "\n[x", "four numbers like"),
    ):
        path.write_text(text.replace(old, new, 1))
        if said:
            with pytest.raises(InputError, match=said):
                read_relion_series(path, centre="rounded")
        else:
            read_relion_series(path, centre="rounded")
    path.write_text(text)
    with pytest.raises(InputError, match="centre='rounded'"):
        read_relion_series(path)


def test_particles_that_were_written_are_read(folder: Path) -> None:
    found = read_relion_particles(folder / "t_particles.star")
    np.testing.assert_allclose(found.positions_angstrom, POSES[:, :3], atol=1e-6)
    np.testing.assert_allclose(found.angles_deg, POSES[:, 3:], atol=1e-6)
    assert found.tomograms == ("t", "t")
    particles = found.particles(BEAD)
    assert [(p.x_angstrom, p.psi_deg) for p in particles] == [(11.5, -20.0), (-5.125, 120.25)]
    assert found.particles(BEAD, "t")[1].rot_deg == -170.0
    with pytest.raises(InputError, match="Unknown tomogram 'v'"):
        found.particles(BEAD, "v")


OPTICS = """
# version 30001

data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnTomoTiltSeriesPixelSize #4
1 first 300.000000 2.500000
2 "second one" 300.000000 2.000000


"""
GENERAL = "\n# version 50001\n\ndata_general\n\n_rlnTomoSubTomosAre2DStacks                       1\n \n"
CORNER = """# version 30001

data_particles

loop_
_rlnTomoName #1
_rlnCoordinateX #2
_rlnCoordinateY #3
_rlnCoordinateZ #4
_rlnAngleRot #5
_rlnAngleTilt #6
_rlnAnglePsi #7
_rlnOpticsGroup #8
_rlnOriginXAngst #9
_rlnOriginYAngst #10
_rlnOriginZAngst #11
a   110.0  90.0  30.0   1.0  2.0  3.0  1   0.0  0.0  0.0
a   100.0 100.0  20.0 -90.0 45.0 90.0  2   1.5 -2.5  4.0
b  1.1e2  100.   20.  -90.0 45.0 90.0  2   1.5 -2.5  4.0

"""
GLOBAL = """
data_global

loop_
_rlnTomoName #1
_rlnVoltage #2
_rlnSphericalAberration #3
_rlnAmplitudeContrast #4
_rlnTomoTiltSeriesPixelSize #5
_rlnTomoHand #6
_rlnTomoTiltSeriesStarFile #7
_rlnTomoSizeX #8
_rlnTomoSizeY #9
_rlnTomoSizeZ #10
_rlnTomoImportFractionalDose #11
a 300 2.7 0.07 2.5 -1 tilts/a.star 200 200 40 3.0
b 300 2.7 0.07 2.0 -1 tilts/b.star 400 200 40 3.0

"""
# Images in files of their own, in the order in which they were taken.
TILTS = """# version 50001

data_a

loop_
_rlnMicrographName #1
_rlnTomoNominalStageTiltAngle #2
_rlnMicrographPreExposure #3
_rlnTomoNominalTiltAxisAngle #4
_rlnDefocusU #5
_rlnDefocusV #6
_rlnDefocusAngle #7
images/a_0.mrc   0.01  0.0  -94.8  31000  29000  15.0
images/a_1.mrc   3.01  3.0  -94.8  32000  30000  16.0
images/a_2.mrc  -2.99  6.0  -94.8  33000  33000  17.0

"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tomograms.star").write_text(GLOBAL)
    (tmp_path / "particles.star").write_text(GENERAL + OPTICS + CORNER)
    (tmp_path / "tilts").mkdir()
    (tmp_path / "tilts" / "a.star").write_text(TILTS)
    (tmp_path / "images").mkdir()
    for i, image in enumerate(IMAGES):
        write_stack(tmp_path / "images" / f"a_{i}.mrc", image[None], 2.5)
    return tmp_path


def test_a_project_of_relion_5(project: Path) -> None:
    found = read_relion_series(project / "tomograms.star", "a")
    np.testing.assert_array_equal(found.recorded.images, IMAGES[[2, 0, 1]])
    assert found.recorded.scheme == TiltScheme((-2.99, 0.01, 3.01), (2, 0, 1))
    assert found.recorded.tilt_axis_deg == pytest.approx(-94.8)
    assert found.recorded.shifts_angstrom is found.x_tilt_deg is None
    np.testing.assert_allclose(found.recorded.doses_e_per_angstrom2, [3.0] * 3)
    np.testing.assert_allclose(found.recorded.defocus_um, [3.3, 3.0, 3.1])
    np.testing.assert_allclose(found.astigmatism_um, [0.0, 0.1, 0.1])
    np.testing.assert_allclose(found.astigmatism_angle_deg, [17.0, 15.0, 16.0])
    assert (found.hand, found.size_pixels) == (-1, (200.0, 200.0, 40.0))
    assert len(found.assumed) == 3
    assert "rlnTomoYTilt" in found.assumed[0]
    assert "rlnTomoNominalTiltAxisAngle" in found.assumed[1]
    assert "hand is -1" in found.assumed[2]
    with pytest.raises(InputError, match="Give name="):
        read_relion_series(project / "tomograms.star")
    with pytest.raises(InputError, match="Unknown rlnTomoName 'c'"):
        read_relion_series(project / "tomograms.star", "c")
    with pytest.raises(InputError, match=r"b\.star.*project="):
        read_relion_series(project / "tomograms.star", "b")


def test_exposures_and_order(project: Path) -> None:
    path, tilts = project / "tomograms.star", project / "tilts" / "a.star"
    with pytest.raises(InputError, match="to grow with order"):
        read_relion_series(path, "a", order=[1, 0, 2])
    with pytest.raises(InputError, match="permutation"):
        read_relion_series(path, "a", order=[1, 1, 2])
    # An image taken out, and an exposure before the first.
    tilts.write_text(
        TILTS.replace("\nimages/a_1.mrc   3.01  3.0", "\nimages/a_1.mrc   3.01  4.5").replace(
            "\nimages/a_0.mrc   0.01  0.0", "\nimages/a_0.mrc   0.01  0.5"
        )
    )
    found = read_relion_series(path, "a")
    np.testing.assert_allclose(found.recorded.doses_e_per_angstrom2, [3.0, 4.0, 1.5])
    assert any("taken out" in line for line in found.assumed)
    assert any("exposure of 0.5" in line for line in found.assumed)
    edit(tilts, "rlnMicrographPreExposure", "rlnOther")
    found = read_relion_series(path, "a", order=[1, 0, 2])
    assert found.recorded.scheme.order == (2, 1, 0)
    assert found.recorded.doses_e_per_angstrom2 is found.exposures_e_per_angstrom2 is None


def test_images_differ(project: Path) -> None:
    write_stack(project / "images" / "a_1.mrc", IMAGES[:1, :8], 2.5)
    with pytest.raises(InputError, match="one shape and pixel"):
        read_relion_series(project / "tomograms.star", "a")
    write_stack(project / "images" / "a_1.mrc", IMAGES[:1], 3.5)
    with pytest.raises(InputError, match="one shape and pixel"):
        read_relion_series(project / "tomograms.star", "a")
    write_stack(project / "images" / "a_1.mrc", IMAGES[:2], 2.5)
    with pytest.raises(InputError, match=r"one image in 'images/a_1\.mrc'"):
        read_relion_series(project / "tomograms.star", "a")


def test_paths_count_from_the_project(project: Path) -> None:
    job = project / "Tomograms"
    job.mkdir()
    (project / "tomograms.star").rename(job / "tomograms.star")
    with pytest.raises(InputError, match="project="):
        read_relion_series(job / "tomograms.star", "a")
    found = read_relion_series(job / "tomograms.star", "a", project=project)
    np.testing.assert_array_equal(found.recorded.images, IMAGES[[2, 0, 1]])
    (project / "images" / "a_1.mrc").unlink()
    with pytest.raises(InputError, match=r"a_1\.mrc.*stack="):
        read_relion_series(job / "tomograms.star", "a", project=project)
    write_stack(project / "all.mrc", IMAGES, 2.5)
    found = read_relion_series(job / "tomograms.star", "a", project=project, stack=project / "all.mrc")
    np.testing.assert_array_equal(found.recorded.images, IMAGES[[2, 0, 1]])
    write_stack(project / "all.mrc", IMAGES[:2], 2.5)
    with pytest.raises(InputError, match="3 images"):
        read_relion_series(job / "tomograms.star", "a", project=project, stack=project / "all.mrc")


def test_coordinates_from_the_corner(project: Path) -> None:
    # (110 - 200 / 2) 2.5 = 25 and so on; origins are subtracted; the tables of tomograms have the sizes.
    found = read_relion_particles(project / "particles.star", tomograms=project / "tomograms.star")
    np.testing.assert_allclose(
        found.positions_angstrom, [[25.0, -25.0, 25.0], [-1.5, 2.5, -4.0], [-90 * 2 - 1.5, 2.5, -4.0]]
    )
    np.testing.assert_array_equal(found.angles_deg[1], [-90.0, 45.0, 90.0])
    assert found.optics_groups is not None
    assert found.optics_groups.tolist() == [1, 2, 2]
    assert len(found.particles(BEAD, "a")) == 2
    with pytest.raises(InputError, match="tomogram="):
        found.particles(BEAD)
    given_sizes = read_relion_particles(project / "particles.star", size_pixels=(200, 200, 40), pixel_size_angstrom=3.0)
    np.testing.assert_allclose(given_sizes.positions_angstrom[:, 0], [30.0, -1.5, 30.0 - 1.5])
    with pytest.raises(InputError, match=r"tomograms=.*size_pixels="):
        read_relion_particles(project / "particles.star")


def test_the_pixel_of_relion_3_is_asked_for(project: Path) -> None:
    path = project / "particles.star"
    edit(path, "_rlnTomoTiltSeriesPixelSize", "_rlnImagePixelSize")
    edit(path, "_rlnTomoName", "_rlnMicrographName")
    with pytest.raises(InputError, match="pixel_size_angstrom="):
        read_relion_particles(path, size_pixels=(200, 200, 40))
    found = read_relion_particles(path, size_pixels=(200, 200, 40), pixel_size_angstrom=2.5)
    assert found.tomograms == ("a", "a", "b")
    assert any("rlnMicrographName" in line for line in found.assumed)
    found = read_relion_particles(path, tomograms=project / "tomograms.star")  # which has pixels as well
    assert found.positions_angstrom[0].tolist() == [25.0, -25.0, 25.0]


def test_centred_places_come_first(project: Path) -> None:
    path = project / "particles.star"
    for axis in "XYZ":
        edit(path, f"_rlnCoordinate{axis}", f"_rlnCenteredCoordinate{axis}Angst")
    found = read_relion_particles(path)
    np.testing.assert_allclose(found.positions_angstrom[1], [98.5, 102.5, 16.0])
    both = OPTICS + CORNER.replace("_rlnAngleRot", "_rlnCenteredCoordinateXAngst").replace(
        "_rlnAngleTilt", "_rlnCenteredCoordinateYAngst"
    ).replace("_rlnAnglePsi", "_rlnCenteredCoordinateZAngst")
    path.write_text(both)
    found = read_relion_particles(path, angles_deg=(0, 0, 0))
    np.testing.assert_allclose(found.positions_angstrom[0], [1.0, 2.0, 3.0])
    assert any("not rlnCoordinateX" in line for line in found.assumed)


@pytest.mark.parametrize("own", [(20.0, 50.0, -70.0), (10.0, 0.0, 5.0)])
def test_orientations_at_extraction_are_composed(tmp_path: Path, own: tuple[float, float, float]) -> None:
    # A = A_subtomogram A_particle; the origin is in the frame of the extracted box.
    extracted = (30.0, 90.0, -15.0) if own[1] else (25.0, 0.0, 40.0)
    origin = np.array([3.0, -7.0, 2.0])
    columns = [
        "rlnTomoName",
        *(f"rlnCenteredCoordinate{a}Angst" for a in "XYZ"),
        *(f"rlnTomoSubtomogram{a}" for a in ("Rot", "Tilt", "Psi")),
        *(f"rlnAngle{a}" for a in ("Rot", "Tilt", "Psi")),
        *(f"rlnOrigin{a}Angst" for a in "XYZ"),
    ]
    row = ["t", 1.0, 2.0, 3.0, *extracted, *own, *origin]
    text = "data_particles\n\nloop_\n" + "".join(f"_{c}\n" for c in columns) + " ".join(map(str, row)) + "\n\n"
    (tmp_path / "p.star").write_text(text)
    found = read_relion_particles(tmp_path / "p.star")

    def turn(angles: Any) -> np.ndarray:
        rot, tilt, psi = (torch.tensor(float(a), dtype=torch.float64) for a in angles)
        return (about_z(rot) @ about_y(tilt) @ about_z(psi)).T.numpy()

    np.testing.assert_allclose(turn(found.angles_deg[0]), turn(extracted) @ turn(own), atol=1e-12)
    np.testing.assert_allclose(found.positions_angstrom[0], [1, 2, 3] - turn(extracted) @ origin, atol=1e-12)


@pytest.mark.parametrize(
    ("column", "argument", "value"),
    [
        ("rlnTomoTiltSeriesPixelSize", "pixel_size_angstrom", 2.5),
        ("rlnTomoHand", "hand", -1),
        ("rlnVoltage", "voltage_kv", 120.0),
        ("rlnSphericalAberration", "cs_mm", 0.5),
        ("rlnAmplitudeContrast", "amplitude_contrast", 0.2),
    ],
)
def test_a_missing_column_is_asked_for(project: Path, column: str, argument: str, value: float) -> None:
    edit(project / "tomograms.star", column, "rlnOther")
    with pytest.raises(InputError, match=rf"{column} .*tomograms\.star.* {argument}="):
        read_relion_series(project / "tomograms.star", "a")
    arguments: dict[str, Any] = {argument: value}
    found = read_relion_series(project / "tomograms.star", "a", **arguments)
    of = found.recorded if argument == "pixel_size_angstrom" else found
    assert getattr(of, argument) == value


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("tomograms.star", " -1 tilts/a", " 0 tilts/a", "hand="),
        ("tomograms.star", "0.07 2.5", "0.07 -2.5", "pixel_size_angstrom="),
        ("tomograms.star", "0.07 2.5", "0.07 3.5", r"2\.5 angstrom .* 3\.5 .*pixel_size_angstrom="),
        ("tomograms.star", "\nb 300", "\na 300", "each rlnTomoName once"),
        ("tomograms.star", "data_global", "data_global\nloop_\n_rlnQ\n1\n\n", "one table in the block"),
        ("tomograms.star", "rlnTomoTiltSeriesStarFile", "rlnOther", "rlnTomoTiltSeriesStarFile"),
        ("tomograms.star", "rlnTomoName", "rlnOther", "one block with rlnTomoName"),
        ("tomograms.star", "200 200 40 3.0", "200 200 40 -3", "dose > 0"),
        ("tilts/a.star", "data_a", "data_c", "block data_a"),
        ("tilts/a.star", "images/a_1", "images/a_0", "each rlnMicrographName once"),
        ("tilts/a.star", "images/a_1.mrc", "3@images/a_1.mrc", "image 3 in"),
        ("tilts/a.star", "rlnMicrographName", "rlnOther", "rlnMicrographName .*stack="),
        ("tilts/a.star", "rlnMicrographPreExposure", "rlnOther", r"rlnMicrographPreExposure .*order="),
        ("tilts/a.star", "  3.0  -94.8", "  0.0  -94.8", r"rlnMicrographPreExposure .*order="),
        ("tilts/a.star", "  6.0  -94.8", "  6.0  -93.8", "one rlnTomoNominalTiltAxisAngle"),
        ("tilts/a.star", "rlnTomoNominalStageTiltAngle", "rlnOther", "rlnTomoYTilt or"),
        ("tilts/a.star", " -2.99", " -92.99", "within 90"),
        ("tilts/a.star", "rlnDefocusV", "rlnOther", "no rlnDefocusV"),
        ("tilts/a.star", "rlnDefocusAngle", "rlnOther", "rlnDefocusAngle"),
        ("tilts/a.star", "32000", "thirty", r"number .*row 2 of rlnDefocusU .*a\.star.*'thirty'"),
        ("tilts/a.star", "32000", "nan", "'nan'"),
        ("tilts/a.star", "32000", "3_2", "'3_2'"),
        ("tilts/a.star", "32000", "1e400", "'1e400'"),
        ("tilts/a.star", "33000  17.0\n", "33000\n", "cannot be read"),  # a truncated loop
        ("tilts/a.star", "33000  17.0\n\n", "33000  17", "end of a line"),  # cut off in the middle of a number
        ("tilts/a.star", TILTS[TILTS.index("images") :], "", "rows in data_a"),
    ],
)
def test_what_is_wrong_with_a_series_is_said(project: Path, name: str, old: str, new: str, said: str) -> None:
    edit(project / name, old, new)
    with pytest.raises(InputError, match=f"(?s){said}"):
        read_relion_series(project / "tomograms.star", "a")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("90.0  2 ", "90.0  7 ", r"Unknown optics groups \[7.0\]"),
        ('2 "second one"', '1 "second one"', "each rlnOpticsGroup once"),
        ("data_optics", "data_other", "data_optics with"),
        ("data_optics", "data_particles", "duplicate block"),
        ("data_particles", "data_images", "block data_particles"),
        ("_rlnAngleTilt", "_rlnOther", "no rlnAngleTilt"),
        ("_rlnCoordinateZ", "_rlnOther", "no rlnCoordinateZ"),
        ("_rlnOriginXAngst", "_rlnOther", "no rlnOriginXAngst"),
        ("_rlnTomoName", "_rlnOther", "rlnTomoName"),
        ("_rlnAngleTilt", "_rlnAngleRot", "duplicate tag"),
        ("\na   110.0", "\na   NaN", "'NaN'"),
        ("\na   110.0", "\n?   110.0", "text in row 1"),
        (CORNER[CORNER.index("a   110") :], "", "rows in data_particles"),
        ("\nb  1.1e2", "\nc  1.1e2", "Unknown rlnTomoName 'c'"),
    ],
)
def test_what_is_wrong_with_particles_is_said(project: Path, old: str, new: str, said: str) -> None:
    edit(project / "particles.star", old, new)
    with pytest.raises(InputError, match=f"{said}") as caught:
        read_relion_particles(project / "particles.star", tomograms=project / "tomograms.star")
    assert ".star'" in str(caught.value)


def test_groups_are_whole_numbers(project: Path) -> None:
    edit(project / "particles.star", '2 "second', '2.5 "second')
    edit(project / "particles.star", "90.0  2 ", "90.0  2.5 ")
    with pytest.raises(InputError, match="whole numbers as rlnOpticsGroup"):
        read_relion_particles(project / "particles.star", tomograms=project / "tomograms.star")


def test_missing_angles_and_origins_in_pixels(project: Path) -> None:
    path, tomograms = project / "particles.star", project / "tomograms.star"
    for angle in ("Rot", "Tilt", "Psi"):
        edit(path, f"_rlnAngle{angle}", f"_rlnOther{angle}")
    with pytest.raises(InputError, match="angles_deg="):
        read_relion_particles(path, tomograms=tomograms)
    found = read_relion_particles(path, tomograms=tomograms, angles_deg=(1, 2, 3))
    assert found.angles_deg.tolist() == [[1.0, 2.0, 3.0]] * 3
    for axis in "XYZ":
        edit(path, f"_rlnOrigin{axis}Angst", f"_rlnOrigin{axis}")
    with pytest.raises(InputError, match="rlnOriginX, rlnOriginY, rlnOriginZ in pixels"):
        read_relion_particles(path, tomograms=tomograms, angles_deg=(1, 2, 3))


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\x1f\x8b\x08" + bytes(range(256)), b"data_\n", b"no table\n"])
def test_what_is_no_star_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.star").write_bytes(content)
    for read in (read_relion_series, read_relion_particles):
        with pytest.raises(InputError, match=r"x\.star"):
            read(tmp_path / "x.star")
        with pytest.raises(InputError, match="Check the path"):
            read(tmp_path / "absent.star")
        with pytest.raises(InputError, match="Check the path"):
            read(tmp_path)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    kind = rng.integers(4)
    if kind == 0:
        return content[: rng.integers(len(content))]
    if kind == 1:
        lines = content.splitlines(keepends=True)
        return b"".join(lines[: rng.integers(len(lines))])
    if kind == 2:
        changed = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            changed[rng.integers(len(changed))] = (
                rng.integers(256) if rng.integers(2) else rng.choice(list(b"0-.e \n@;\"'"))
            )
        return bytes(changed)
    lines = content.splitlines(keepends=True)
    first = rng.integers(len(lines) - 1)
    part = slice(first, first + rng.integers(2, 6))
    lines[part] = [lines[part][i] for i in rng.permutation(len(lines[part]))]
    return b"".join(lines)


def finite(found: RelionSeries | RelionParticles) -> bool:
    if isinstance(found, RelionParticles):
        return bool(np.isfinite(found.positions_angstrom).all() and np.isfinite(found.angles_deg).all())
    of = found.recorded
    arrays = [
        found.voltage_kv,
        found.cs_mm,
        found.amplitude_contrast,
        found.x_tilt_deg,
        found.astigmatism_um,
        found.astigmatism_angle_deg,
        found.exposures_e_per_angstrom2,
        found.nominal_deg,
        of.tilt_axis_deg,
        of.shifts_angstrom,
        of.doses_e_per_angstrom2,
        of.defocus_um,
        of.pixel_size_angstrom,
    ]
    return all(np.isfinite(array).all() for array in arrays if array is not None)


@pytest.mark.parametrize("which", ["global", "tilts", "particles", "written"])
def test_damaged_files_give_errors_or_finite_numbers(project: Path, which: str) -> None:
    write_tilt_series(project, "t", series(), IMAGES, DEFOCI)
    read: Callable[[], RelionSeries | RelionParticles]
    if which == "particles":
        path = project / "particles.star"
        read = lambda: read_relion_particles(path, tomograms=project / "tomograms.star")  # noqa: E731
    elif which == "written":
        path = project / "t_tilts.star"
        read = lambda: read_relion_series(project / "t_series.star", last_dose_e_per_angstrom2=3.5, centre="exact")  # noqa: E731
    else:
        path = project / ("tomograms.star" if which == "global" else "tilts/a.star")
        read = lambda: read_relion_series(project / "tomograms.star", "a")  # noqa: E731
    content = path.read_bytes()
    assert finite(read())
    rng = np.random.default_rng(20240517)
    said = []
    for _ in range(150):
        path.write_bytes(mutated(content, rng))
        try:
            assert finite(read())
        except InputError as error:
            said.append(str(error))
    assert all("Expected" in text or "Unknown" in text for text in said)
    assert 75 < len(said) < 150  # some damage does no harm, such as lines exchanged
