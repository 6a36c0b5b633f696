"""Tilt series from files: what was written is read; what files leave open is asked for, never guessed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import (
    Detector,
    Particle,
    Specimen,
    TiltScheme,
    TiltSeries,
    read_micrograph,
    read_stack,
    read_tilt_series,
    write_stack,
    write_tilt_series,
)

mrcfile = pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")

# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")

BEAD = Particle(Specimen.from_atoms([[0.0, 0.0, 0.0]], [79], weights=[200.0], b_factors=2000.0))
SHIFTS = np.array([[3.0, -2.0], [40.0, 8.0], [-17.0, 0.5]])
IMAGES = np.arange(3 * 10 * 13, dtype=np.float32).reshape(3, 10, 13)


def series(shape: tuple[int, int] = (10, 13), axis: float = 85.3) -> TiltSeries:
    return TiltSeries(
        [BEAD],
        TiltScheme((-40.0, 2.0, 44.0), (2, 0, 1)),
        shape,
        4.5,
        {"defocus_um": 2.5},
        Detector(dose_e_per_angstrom2=3.5),
        ("defocus_um[1]",),
        tilt_axis_deg=axis,
        shifts_angstrom=SHIFTS.tolist(),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tilt_series(tmp_path, "t", series(), IMAGES, [3.25])
    return tmp_path


def files(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"stack": folder / "t.mrc", "mdoc": folder / "t.mdoc", "transforms": folder / "t.xf"} | changes


def test_what_was_written_is_read(folder: Path) -> None:
    found = read_tilt_series(**files(folder))
    np.testing.assert_array_equal(found.images, IMAGES)
    assert found.pixel_size_angstrom == pytest.approx(4.5)
    assert found.scheme == series().scheme
    assert found.tilt_axis_deg == pytest.approx(85.3, abs=1e-4)
    np.testing.assert_allclose(found.shifts_angstrom, SHIFTS, atol=5e-3)  # .xf has three digits of a pixel
    np.testing.assert_allclose(found.doses_e_per_angstrom2, [3.5] * 3)
    np.testing.assert_allclose(found.defocus_um, [2.5, 3.25, 2.5])


def test_the_truth_is_kept_to_the_last_bit(tmp_path: Path) -> None:
    of = series()
    write_tilt_series(tmp_path, "t", of, IMAGES, [0.1 + 0.2])
    truth = json.loads((tmp_path / "t_truth.json").read_text())
    assert truth["parameters"] == {"defocus_um[1]": {"value": 0.1 + 0.2, "unit": "um"}}
    inputs = of.space.vector({name: entry["value"] for name, entry in truth["parameters"].items()})
    np.testing.assert_array_equal(inputs, [0.1 + 0.2])
    settings = truth["settings"]
    assert (settings["tilt_axis_deg"], settings["shift_x_angstrom[1]"], settings["tilt_deg[2]"]) == (85.3, 40.0, 44.0)
    assert (truth["shape"], truth["pixel_size_angstrom"]) == ([3, 10, 13], 4.5)
    # All that the simulator knows by name, each once.
    assert {**settings, **{name: p["value"] for name, p in truth["parameters"].items()}} == of.settings(inputs)


@given(st.floats(-179.0, 179.0), st.integers(8, 40), st.integers(8, 40))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_axis_and_shifts_come_back_at_any_angle_and_parity(
    tmp_path: Path, axis: float, rows: int, columns: int
) -> None:
    of = series((rows, columns), axis)
    write_tilt_series(tmp_path, "u", of, np.zeros(of.output_shape))
    found = read_tilt_series(tmp_path / "u.mrc", mdoc=tmp_path / "u.mdoc", transforms=tmp_path / "u.xf")
    assert (found.tilt_axis_deg - axis + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-4)
    np.testing.assert_allclose(found.shifts_angstrom, SHIFTS, atol=5e-3)


# As SerialEM wrote one of EMPIAR-10164, whose axis is at 85.3 degrees; without calibration it writes doses of 0.
SERIAL_EM = """PixelSpacing = 4.5
ImageFile = t.mrc
ImageSize = 13 10
DataMode = 1

[T = SerialEM: Digitized on a Krios at München]

[T =     Tilt axis angle = 85.3, binning = 1  spot = 8  camera = 2]
""" + "".join(
    f"""
[ZValue = {t}]
TiltAngle = {tilt}
StagePosition = 20.7936 155.287
ExposureDose = 0
RotationAngle = 175.3
TargetDefocus = -4
SubFramePath = D:\\Müller\\frames\\t_{t}.mrc
"""
    for t, tilt in enumerate((-39.9981, 2.00099, 44.0003))
)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-8-sig"])
@pytest.mark.parametrize("title", [True, False])
def test_an_mdoc_of_serial_em(folder: Path, encoding: str, title: bool) -> None:
    """Its rotation is that of the axis and 90 degrees; the title that IMOD goes by comes first, where there is one."""
    text = SERIAL_EM if title else SERIAL_EM.replace("Tilt axis angle = 85.3,", "TiltAxisAngle = -94.7 ")
    (folder / "s.mdoc").write_bytes(text.encode(encoding))
    found = read_tilt_series(folder / "t.mrc", mdoc=folder / "s.mdoc", order=[1, 0, 2])
    assert found.tilt_axis_deg == pytest.approx(85.3, abs=1e-9)
    assert found.doses_e_per_angstrom2 is None
    np.testing.assert_array_equal(found.defocus_um, [4.0] * 3)  # the target; the lens' Defocus is another thing
    np.testing.assert_array_equal(found.scheme.angles_deg, [-39.9981, 2.00099, 44.0003])


@given(st.floats(-360.0, 360.0))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_title_and_rotation_of_an_mdoc_tell_the_same_axis(tmp_path: Path, axis: float) -> None:
    write_tilt_series(tmp_path, "v", series(axis=axis), IMAGES)
    lines = (tmp_path / "v.mdoc").read_text().splitlines()
    for left_out in ("[T", "Rotation"):
        (tmp_path / "v.mdoc").write_text("\n".join(line for line in lines if not line.startswith(left_out)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is taken as SerialEM counts it
            found = read_tilt_series(tmp_path / "v.mrc", mdoc=tmp_path / "v.mdoc").tilt_axis_deg
        assert (found - axis + 180) % 360 - 180 == pytest.approx(0.0, abs=1e-4)
        assert -180 <= found <= 180


def test_images_are_sorted_by_tilt(folder: Path) -> None:
    (folder / "t.rawtlt").write_text("44\n-40\n2\n")
    found = read_tilt_series(folder / "t.mrc", tilts=folder / "t.rawtlt", order=[2, 0, 1])
    assert found.scheme == TiltScheme((-40.0, 2.0, 44.0), (0, 1, 2))
    np.testing.assert_array_equal(found.images, IMAGES[[1, 2, 0]])
    assert found.tilt_axis_deg is found.shifts_angstrom is found.defocus_um is None


def test_the_order_is_asked_for(folder: Path) -> None:
    with pytest.raises(InputError, match=r"order=\["):
        read_tilt_series(folder / "t.mrc", tilts=folder / "t.rawtlt")
    with pytest.raises(InputError, match="tilts="):
        read_tilt_series(folder / "t.mrc", order=[0, 1, 2])


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_an_unknown_pixel_is_asked_for(folder: Path, pixel: float) -> None:
    write_stack(folder / "t.mrc", IMAGES, 1.0)
    with mrcfile.open(folder / "t.mrc", mode="r+") as mrc:
        mrc.header.cella.x, mrc.header.cella.y = 13 * pixel, 10 * pixel
    plain = files(folder, mdoc=None, tilts=folder / "t.rawtlt", order=[2, 0, 1])
    with pytest.raises(InputError, match="pixel_size_angstrom="):
        read_tilt_series(**plain)
    assert read_tilt_series(**plain, pixel_size_angstrom=1.0).pixel_size_angstrom == 1.0
    assert read_tilt_series(**files(folder)).pixel_size_angstrom == 4.5  # the mdoc knows
    if pixel == 0.0:
        for read in (read_stack, read_micrograph):
            write_stack(folder / "one.mrc", IMAGES[:1], 1.0)
            with mrcfile.open(folder / "one.mrc", mode="r+") as mrc:
                mrc.header.cella.x = 0.0
            with pytest.raises(InputError, match="pixel_size_angstrom="):
                read(folder / "one.mrc")
            assert read(folder / "one.mrc", pixel_size_angstrom=2.5).pixel_size_angstrom == 2.5
            with pytest.raises(InputError, match="pixel_size_angstrom as a number > 0"):
                read(folder / "one.mrc", pixel_size_angstrom=-1.0)


def test_pixels_that_differ_are_asked_about(folder: Path) -> None:
    write_stack(folder / "t.mrc", IMAGES, 9.0)
    with pytest.raises(InputError, match=r"9 angstrom .* 4.5 .* pixel_size_angstrom="):
        read_tilt_series(**files(folder))
    assert read_tilt_series(**files(folder), pixel_size_angstrom=9.0).pixel_size_angstrom == 9.0


@pytest.mark.parametrize("how", ["axes", "cell"])
def test_an_unusual_y_axis_is_asked_about(folder: Path, how: str) -> None:
    with mrcfile.open(folder / "t.mrc", mode="r+") as mrc:
        if how == "axes":
            mrc.header.mapc, mrc.header.mapr = 2, 1
        else:
            mrc.header.cella.y = -mrc.header.cella.y
    for read in (lambda: read_stack(folder / "t.mrc"), lambda: read_tilt_series(**files(folder))):
        with pytest.raises(InputError, match=r"y_axis='down'.*'up'.*'across'"):
            read()
    for y_axis, expected in (("down", IMAGES), ("up", IMAGES[:, ::-1]), ("across", IMAGES.swapaxes(1, 2))):
        found = read_stack(folder / "t.mrc", y_axis=y_axis)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.images, expected)
        assert found.pixel_size_angstrom == pytest.approx(4.5)
    with pytest.raises(InputError, match="Unknown y_axis"):
        read_stack(folder / "t.mrc", y_axis="left")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("t.xf", " ", " -", "y_axis='up'"),  # only the first number of the first line changes its sign: a mirror image
        ("t.mdoc", "[ZValue = 1]", "[ZValue = 2]", "ZValue once"),
        ("t.mdoc", "[ZValue = 2]", "[ZValue = -2]", "ZValues 0, 1"),
        ("t.mdoc", "[ZValue = 2]", "[ZValue = 1.5]", "ZValues 0, 1"),
        ("t.mdoc", "[ZValue = 2]", "[ZValue = ]", "number in line"),
        ("t.mdoc", "[ZValue = 2]", "[FrameSet = 2]", "2 sections in .*there is none for images 2"),
        ("t.mdoc", "TiltAngle = 2.0000", "TiltAngle = two", "number in line"),
        ("t.mdoc", "TiltAngle = 2.0000\n", "", "TiltAngle in all 3"),
        ("t.mdoc", "RotationAngle = 175.3000", "RotationAngle = 25", "one RotationAngle"),
        ("t.mdoc", "angle = 85.3000,", "angle = east,", "number in line 7 of .*'east'"),
        ("t.mdoc", "angle = 85.3000, binning = 1", "angle =", "number in line 7"),
        ("t.xf", "\n", " 7\n", "6 numbers in line 1"),
    ],
)
def test_what_is_wrong_is_said(folder: Path, name: str, old: str, new: str, said: str) -> None:
    text = (folder / name).read_text()
    if (name, old) == ("t.xf", " "):
        numbers = text.splitlines()[0].split()
        changed = " ".join([f"{-float(numbers[0])}", f"{-float(numbers[1])}", *numbers[2:]]) + "\n"
        text = changed + "".join(line + "\n" for line in text.splitlines()[1:])
    else:
        assert old in text
        text = text.replace(old, new, 1)
    (folder / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_tilt_series(**files(folder))


def test_numbers_of_images_agree(folder: Path) -> None:
    (folder / "t.rawtlt").write_text("-40\n2\n")
    with pytest.raises(InputError, match="tilts of 3 images"):
        read_tilt_series(**files(folder, tilts=folder / "t.rawtlt"))
    with pytest.raises(InputError, match="Check the path"):
        read_tilt_series(**files(folder, mdoc=folder / "absent.mdoc"))
    (folder / "t.xf").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="6 numbers in line 1"):
        read_tilt_series(**files(folder))
