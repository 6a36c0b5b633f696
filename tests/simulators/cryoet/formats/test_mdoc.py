"""Tilt series by the text files of SerialEM, Tomography 5, PACEtomo and IMOD: read rightly, or asked about by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import TiltScheme, read_tilt_series, write_stack

pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")

# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")

CASES = Path(__file__).parents[3] / "data" / "cryo"
IMAGES = np.arange(4 * 16 * 24, dtype=np.float32).reshape(4, 16, 24)


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    write_stack(tmp_path / "st3.mrc", IMAGES[:3], 2.5)
    write_stack(tmp_path / "st4.mrc", IMAGES, 2.5)
    return tmp_path / "st3.mrc"


def quietly(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = read()
    return result, [str(w.message) for w in said if w.category is UserWarning]


def mdoc(folder: Path, *sections: dict[str, object], head: str = "", end: str = "\n", blank: bool = True) -> Path:
    """Sections with tilts of -3, 0, 3, ... and all else as given; `z` is the ZValue."""
    lines = ["PixelSpacing = 2.5", "Voltage = 300", "", "[T = SerialEM: Acquired on a Krios]", head]
    for i, section in enumerate(sections):
        lines += ["", f"[ZValue = {section.get('z', i)}]"] if blank else [f"[ZValue={section.get('z', i)}]"]
        values = {"TiltAngle": 3 * i - 3, "RotationAngle": 174.8} | section
        lines += [f"{key} = {value}" for key, value in values.items() if key != "z" and value is not None]
    (folder / "a.mdoc").write_bytes(end.join(lines).encode())
    return folder / "a.mdoc"


# --- the corpus ---------------------------------------------------------------------------------------------------


def test_an_excluded_view(stack: Path) -> None:
    file = CASES / "4_sections_3_images_excluded_view.mdoc"
    with pytest.raises(InputError, match=r"3 images.*4 sections.*\(ZValue 0, 1, 2, 3\).*excluded=\[\.\.\.\]"):
        read_tilt_series(stack, mdoc=file)
    options = dict(mdoc=file, tilt_axis_deg=84.8)
    for z in range(4):
        found = read_tilt_series(stack, **options, excluded=[z])
        left = [t for i, t in enumerate((-3.0, 0.0, 3.0, 6.0)) if i != z]
        assert found.scheme == TiltScheme(tuple(left), (0, 1, 2))
        np.testing.assert_array_equal(found.images, IMAGES[:3])
        assert any("exposure" in note for note in found.notes)
        # The stack still has it.
        found = read_tilt_series(stack.with_name("st4.mrc"), **options, excluded=[z])
        assert found.scheme.angles_deg == tuple(left)
        np.testing.assert_array_equal(found.images, IMAGES[[i for i in range(4) if i != z]])
        # Or the tilts that are left tell which it is.
        (stack.parent / "a.rawtlt").write_text("".join(f"{t:.2f}\n" for t in left))
        found = read_tilt_series(stack, **options, tilts=stack.parent / "a.rawtlt")
        assert found.scheme == TiltScheme(tuple(left), (0, 1, 2))
    (stack.parent / "a.rawtlt").write_text("-2\n1\n4\n")
    with pytest.raises(InputError, match="excluded="):
        read_tilt_series(stack, **options, tilts=stack.parent / "a.rawtlt")
    with pytest.raises(InputError, match=r"Unknown ZValues \[7\]"):
        read_tilt_series(stack, **options, excluded=[7])
    with pytest.raises(InputError, match=r"4 images .* or 2, without"):
        read_tilt_series(stack, **options, excluded=[0, 1])
    with pytest.raises(InputError, match="Expected mdoc="):
        read_tilt_series(stack, tilts=stack.parent / "a.rawtlt", order=[0, 1, 2], excluded=[1])


def test_a_lens_reading_is_no_defocus(stack: Path) -> None:
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=CASES / "Defocus_positive_zero.mdoc"))
    assert found.defocus_um is None
    assert sum("lens' reading" in line and "up to 0.1 um" in line for line in said) == 1
    np.testing.assert_allclose(found.doses_e_per_angstrom2, [3.0] * 3)


def test_an_order_that_nothing_tells(stack: Path) -> None:
    file = CASES / "PriorRecordDose_missing_PACEtomo_20.mdoc"
    with pytest.raises(InputError, match=r"order=\[\.\.\.\].*PriorRecordDose or DateTime"):
        read_tilt_series(stack, mdoc=file)
    found, _ = quietly(lambda: read_tilt_series(stack, mdoc=file, order=[1, 0, 2]))
    assert found.scheme.order == (1, 0, 2)
    np.testing.assert_array_equal(found.doses_e_per_angstrom2, [3.0] * 3)
    # The same file with times.
    text = file.read_text()
    for z, time in enumerate(("17:02:01", "17:00:46", "16:59:53")):
        text = text.replace(f"[ZValue = {z}]", f"[ZValue = {z}]\nDateTime = 25-Mar-21  {time}")
    (stack.parent / "timed.mdoc").write_text(text)
    found, _ = quietly(lambda: read_tilt_series(stack, mdoc=stack.parent / "timed.mdoc"))
    assert found.scheme.order == (2, 1, 0)


def test_a_rotation_that_may_be_counted_otherwise(stack: Path) -> None:
    file = CASES / "Tomo5_RotationAngle_only_tilt_axis_1.mdoc"
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=file))
    assert found.tilt_axis_deg == pytest.approx(93.27)
    assert len(said) == 1
    assert all(part in said[0] for part in ("RotationAngle = -176.73", "93.27", "tilt_axis_deg="))
    assert said[0].endswith(found.notes[-1])
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=file, tilt_axis_deg=1.0))
    assert (found.tilt_axis_deg, said) == (1.0, [])
    with pytest.raises(InputError, match="tilt_axis_deg"):
        read_tilt_series(stack, mdoc=file, tilt_axis_deg=float("nan"))


# --- kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("blank", [True, False])
@pytest.mark.parametrize("head", ["", "[T =     Tilt axis angle = 84.8, binning = 1  spot = 8]", "[FrameSet = 0]"])
def test_lines_of_any_kind(stack: Path, end: str, blank: bool, head: str) -> None:
    file = mdoc(stack.parent, *({"PriorRecordDose": 3 * i} for i in range(3)), end=end, blank=blank, head=head)
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=file))
    assert found.scheme == TiltScheme((-3.0, 0.0, 3.0), (0, 1, 2))
    assert found.tilt_axis_deg == pytest.approx(84.8)
    assert said == []


def test_gaps_and_sections_that_lack(stack: Path) -> None:
    with_gap = [{"z": z, "PriorRecordDose": z} for z in (0, 1, 5)]
    found = read_tilt_series(stack, mdoc=mdoc(stack.parent, *with_gap))
    assert found.scheme.order == (0, 1, 2)
    assert any("gaps (0, 1, 5)" in note for note in found.notes)
    with pytest.raises(InputError, match=r"3 sections .* none for images 2, 3. Add"):
        read_tilt_series(stack.with_name("st4.mrc"), mdoc=mdoc(stack.parent, *with_gap))
    (stack.parent / "a.mdoc").write_text("PixelSpacing = 2.5\nTiltAngle = 3\n")
    with pytest.raises(InputError, match=r"sections \[ZValue = 0\].*got none"):
        read_tilt_series(stack, mdoc=stack.parent / "a.mdoc")


@given(st.permutations(range(3)), st.sampled_from(["dose", "time", "both"]), st.permutations([-12.0, 3.5, 40.0]))
@settings(max_examples=40, deadline=None)
def test_any_order(tmp_path_factory: pytest.TempPathFactory, order: list[int], told: str, tilts: list[float]) -> None:
    """In the order of the stack, whatever order of tilts that is."""
    folder = tmp_path_factory.mktemp("order")
    write_stack(folder / "a.mrc", IMAGES[:3], 2.5)
    sections: list[dict[str, object]] = [
        {
            "TiltAngle": tilt,
            "ExposureDose": 2.0,
            "PriorRecordDose": 2.0 * when if told != "time" else 0,
            "DateTime": f"2024-Feb-28 23:59:{57 + when:02d}" if told != "dose" else None,
        }
        for tilt, when in zip(tilts, order, strict=True)
    ]
    found = read_tilt_series(folder / "a.mrc", mdoc=mdoc(folder, *sections))
    place = np.argsort(tilts)
    assert found.scheme == TiltScheme(tuple(sorted(tilts)), tuple(order[i] for i in place))
    np.testing.assert_array_equal(found.images, IMAGES[:3][place])


@pytest.mark.parametrize(
    ("times", "order"),
    [
        (("25-Mar-21  17:00:46", "25-Mar-21  17:00:45", "24-Mar-21  23:00:00"), (2, 1, 0)),
        (("31-Dec-20 23:59:59", "01-Jan-21 00:00:01", "01-Feb-21 00:00:01"), (0, 1, 2)),
        (("2021-Oct-03 09:00:00", "2021-Sep-30 10:00:00", "2022-Jan-01 00:00:00"), (1, 0, 2)),
        (("2021-10-03 09:00:00.25", "2021-10-03T09:00:00.50", "2021-09-03 10:00:00"), (1, 2, 0)),
        (("2021/10/03 09:00:00", "2021/10/02 09:00:00", "2021/10/01 09:00:00"), (2, 1, 0)),
        (("3-Oct-2021 11:59:59 PM", "3-Oct-2021 12:00:01 AM", "3-Oct-2021 12:00:01 PM"), (2, 0, 1)),
        # What is not different, not a time, or not all there tells nothing; nor does 03/04, which may be in April.
        (("25-Mar-21 17:00:46",) * 3, None),
        (("yesterday", "today", "tomorrow"), None),
        (("25-Mar-21 17:00:46", "25-Mar-21 17:00:45", None), None),
        (("03/04/2021 09:00:00", "03/05/2021 09:00:00", "03/06/2021 09:00:00"), None),
        (("31-Feb-21 17:00:46", "25-Mar-21 17:00:45", "26-Mar-21 17:00:45"), None),
    ],
)
def test_times(stack: Path, times: tuple[str | None, ...], order: tuple[int, ...] | None) -> None:
    file = mdoc(stack.parent, *({"DateTime": time} for time in times))
    if order is None:
        with pytest.raises(InputError, match=r"order=\[\.\.\.\]"):
            read_tilt_series(stack, mdoc=file)
    else:
        assert read_tilt_series(stack, mdoc=file).scheme.order == order


def test_two_orders(stack: Path) -> None:
    file = mdoc(stack.parent, *({"PriorRecordDose": i, "DateTime": f"25-Mar-21 17:00:{9 - i:02d}"} for i in range(3)))
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=file))
    assert found.scheme.order == (0, 1, 2)
    assert ["different orders" in line for line in said] == [True]
    with pytest.raises(InputError, match="permutation"):
        read_tilt_series(stack, mdoc=file, order=[0, 1, 1])


@pytest.mark.parametrize(
    ("targets", "lens", "expected", "words"),
    [
        ((-3, -3, -3), (0.4, -350.5, 0.0), [3.0] * 3, 0),  # as SerialEM has them
        ((-2, -2.5, -3), None, [2.0, 2.5, 3.0], 0),
        ((-3, -3, -3), (-1, -1, -1), [3.0] * 3, 0),
        (None, (-3, -3.5, -4), [3.0, 3.5, 4.0], 0),
        (None, (-3, 0, -4), None, 1),
        (None, (0.1, 0.2, 0.3), None, 1),
        (None, (-3, -3, 2), None, 1),
        ((0, 0, 0), (-3, -3.5, -4), [3.0, 3.5, 4.0], 0),
        ((0, 0, 0), (0, 0, 0), None, 0),
        (None, None, None, 0),
        ((3, 3, 3), None, None, 1),
        ((-3, 3, -3), (-3, -3, -3), None, 1),
    ],
)
def test_defocus(stack: Path, targets: Any, lens: Any, expected: list[float] | None, words: int) -> None:
    sections = [
        {"PriorRecordDose": i, "TargetDefocus": targets and targets[i], "Defocus": lens and lens[i]} for i in range(3)
    ]
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=mdoc(stack.parent, *sections)))
    assert (None if found.defocus_um is None else found.defocus_um.tolist()) == expected
    assert len(said) == words


@pytest.mark.parametrize(
    ("exposure", "prior", "expected"),
    [
        ((3, 3, 3), (0, 3, 6), [3.0] * 3),
        ((2, 3, 4), (0, 2, 5), [2.0, 3.0, 4.0]),
        (None, (0, 3, 6), [3.0] * 3),
        (None, (5, 8, 11), [3.0] * 3),
        (None, (6, 0, 3), [3.0] * 3),
        ((0, 0, 0), (0, 3, 6), [3.0] * 3),
        (None, (0, 3, 9), None),
        (None, (0, 3.001, 6), [3.0] * 3),
    ],
)
def test_doses(stack: Path, exposure: Any, prior: Any, expected: list[float] | None) -> None:
    sections = [{"ExposureDose": exposure and exposure[i], "PriorRecordDose": prior[i]} for i in range(3)]
    found = read_tilt_series(stack, mdoc=mdoc(stack.parent, *sections)).doses_e_per_angstrom2
    assert (None if found is None else found.tolist()) == expected


@pytest.mark.parametrize(
    ("serial_em", "title", "given", "words"),
    [(True, False, False, 0), (False, False, False, 1), (False, True, False, 0), (False, False, True, 0)],
)
def test_the_axis_is_told_where_it_is_a_guess(
    stack: Path, serial_em: bool, title: bool, given: bool, words: int
) -> None:
    file = mdoc(stack.parent, *({"PriorRecordDose": i} for i in range(3)))
    text = file.read_text().replace("[T = SerialEM", "[T = SerialEM" if serial_em else "[T = Tomography")
    file.write_text(text + ("\n[T = Tilt axis angle = 84.8, binning = 1]" if title else ""))
    if given:
        (stack.parent / "a.xf").write_text("0.0906 0.9959 -0.9959 0.0906 1 2\n" * 3)
    options = {"transforms": stack.parent / "a.xf"} if given else {}
    found, said = quietly(lambda: read_tilt_series(stack, mdoc=file, **options))
    assert found.tilt_axis_deg == pytest.approx(84.8, abs=0.01)
    assert len(said) == words


# --- transformations ----------------------------------------------------------------------------------------------


@given(
    st.floats(-179, 179),
    st.lists(st.floats(0.5, 2.0), min_size=3, max_size=3),
    st.lists(st.floats(-9, 9), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_transformations_that_enlarge(
    tmp_path_factory: pytest.TempPathFactory, axis: float, sizes: list[float], moves: list[float]
) -> None:
    """A point of the image goes to where the transformation puts it: shifts are those of the image as recorded."""
    folder = tmp_path_factory.mktemp("xf")
    write_stack(folder / "a.mrc", IMAGES[:3], 2.5)
    file = mdoc(folder, *({"PriorRecordDose": i} for i in range(3)))
    c, s = np.cos(np.radians(axis)), np.sin(np.radians(axis))
    turn = np.array([[c, s], [-s, c]])
    shifts = np.array(moves).reshape(3, 2)
    # The specimen's origin, at half a pixel from IMOD's middle for even sizes, is brought to the middle.
    origin = np.array([24 // 2 + 0.5 - 12, 16 // 2 + 0.5 - 8])
    rows = [(*(m * turn).ravel(), *(-m * turn @ (d + origin))) for m, d in zip(sizes, shifts, strict=True)]
    (folder / "a.xf").write_text("".join(" ".join(f"{v:.9f}" for v in row) + "\n" for row in rows))
    found, said = quietly(lambda: read_tilt_series(folder / "a.mrc", mdoc=file, transforms=folder / "a.xf"))
    assert (found.tilt_axis_deg - axis + 180) % 360 - 180 == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(found.magnifications, sizes, rtol=1e-7)
    np.testing.assert_allclose(found.shifts_angstrom, 2.5 * shifts, atol=1e-6)
    assert len(said) == (np.abs(np.array(sizes) - 1).max() > 0.02)
    assert all("see magnifications" in line for line in said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("1 0 0 -1 0 0", "mirror"),
        ("0 0 0 0 0 0", "magnifications of 0.000"),
        ("9 0 0 9 0 0", "9.000"),
        ("1.2 0 0 0.9 0 0", "stretched"),
        ("1 0.3 0 1 0 0", "stretched"),
        ("0.99 0.14 -0.14 0.99 0 0", "turns of"),
    ],
)
def test_transformations_that_distort(stack: Path, row: str, said: str) -> None:
    (stack.parent / "a.xf").write_text(f"1 0 0 1 0 0\n{row}\n1 0 0 1 0 0\n")
    file = mdoc(stack.parent, *({"PriorRecordDose": i} for i in range(3)))
    with pytest.raises(InputError, match=said):
        read_tilt_series(stack, mdoc=file, transforms=stack.parent / "a.xf")


def test_a_sorted_series_may_stay_in_its_file(stack: Path) -> None:
    file = mdoc(stack.parent, *({"PriorRecordDose": i} for i in range(3)))
    assert isinstance(read_tilt_series(stack, mdoc=file, memory_map=True).images, np.memmap)
    np.testing.assert_array_equal(read_tilt_series(stack, mdoc=file, memory_map=True).images, IMAGES[:3])


@pytest.mark.parametrize("key", ["ExposureDose", "PriorRecordDose"])
def test_a_negative_dose_is_refused_by_line(stack: Path, key: str) -> None:
    sections = [{"PriorRecordDose": 3 * i, "ExposureDose": 3} for i in range(3)]
    for where in range(3):
        spoilt = [section | ({key: -3} if i == where else {}) for i, section in enumerate(sections)]
        path = mdoc(stack.parent, *spoilt)
        line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text == f"{key} = -3")
        with pytest.raises(InputError, match=rf"{key} >= 0 in line {line} "):
            read_tilt_series(stack, mdoc=path)


@pytest.mark.parametrize("extra", ["TiltAngle = 9", "ExposureDose = 4", "DateTime = 25-Mar-21 17:00:46"])
def test_two_values_of_one_key_are_refused_by_line(stack: Path, extra: str) -> None:
    sections = [{"PriorRecordDose": 3 * i, "ExposureDose": 3, "DateTime": f"25-Mar-21 17:00:1{i}"} for i in range(3)]
    path = mdoc(stack.parent, *sections)
    text = path.read_text()
    path.write_text(f"{text}\n{extra}\n")
    last = len(path.read_text().splitlines())
    with pytest.raises(InputError, match=rf"one {extra.split()[0]} in a section .* in line \d+ and .* in line {last}"):
        read_tilt_series(stack, mdoc=path)
    # The same again does no harm.
    path.write_text(f"{text}\nTiltAngle = 3.0\n")
    assert read_tilt_series(stack, mdoc=path).scheme.angles_deg == (-3.0, 0.0, 3.0)
