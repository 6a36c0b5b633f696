"""Decks, tables and MRC files of the TEM-simulator adapter: what is read, written and refused before anything runs."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.tem import mrc
from adapters.tem.deck import Component, Deck, read_table, table_text
from adapters.tem.simulator import TEMSimulator
from bridge.errors import InputError
from tests.lab.tem import DETECTOR, MTF, Lab, at, expected, tables


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parameters": ("volts",)}, "Known parameters: .*voltage_kv.*tilt_deg"),
        ({"parameters": ()}, "Known parameters"),
        ({"parameters": "x_nm"}, "list"),
        ({"parameters": ("shift_x_nm[1]",)}, "below 1"),
        ({"parameters": ("famp",)}, "use_imag_pot = False"),
        ({"parameters": ("grid_offset_x_nm",)}, "particle_coords = grid"),
        ({"parameters": ("total_dose_e_per_nm2",)}, "total_dose"),
        ({"parameters": ("defocus_um[0]",), "deck": tables(optics={"defocus_syst_error": 0.1})}, "defocus errors"),
        ({"parameters": ("shift_x_nm[0]",), "deck": tables(geometry={"geom_errors": "random"})}, "geom_errors"),
        ({"bounds": {"x_nm": (1.0,)}}, "lower, upper"),
        ({"bounds": {"z_nm": (0, 1)}}, "z_nm"),
        ({"parameters": ("voltage_kv",), "bounds": {"voltage_kv": (0.5, 300)}}, r"\[1, 10000\] kV"),
        ({"parameters": ("focal_length_mm",), "bounds": {"focal_length_mm": (0.001, 3)}}, r"\[0.01, inf\] mm"),
        ({"parameters": ("dqe",), "bounds": {"dqe": (0.0, 1.0)}}, "dqe"),
        ({"noise": "some"}, "deck, none, noisy, both"),
        ({"dialect": "2.0"}, r"v1\.3, phase-plate"),
        ({"angles": "xyx"}, "zxz, zyz"),
    ],
)
def test_arguments_are_checked_at_once(lab: Lab, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        lab.make(**options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optics": {"cs": None}}, r"cs in the component 'optics'"),
        ({"optics": {"css": 2.0}}, "Unknown key 'css'.*Known keys: magnification"),
        ({"optic": {"cs": 2.0}}, "Unknown component 'optic'.*Known components: simulation"),
        ({"optics": {"focal_length": 0.001}}, r"\[0.01, inf\] mm, got 0.001"),
        ({"optics": {"cs": "two"}}, "finite number, got 'two'"),
        ({"optics": {"cs": float("nan")}}, "finite"),
        ({"optics": {"defocus_nominal": None}}, "defocus_nominal"),
        ({"electronbeam": {"acc_voltage": 20000}}, r"\[1, 10000\] kV"),
        ({"electronbeam": {"total_dose": 100.0}}, "both"),
        ({"electronbeam": {"dose_per_im": None}}, "dose_per_im"),
        ({"electronbeam": {"gen_dose": "maybe"}}, "yes or no"),
        ({"electronbeam": {"gen_dose": False}}, "dose_file_in"),
        ({"detector": {"det_pix_x": 10.5}}, "integer"),
        ({"detector": {"det_pix_x": 20000}}, "10000"),
        ({"detector": {"dqe": 0.001}}, "dqe"),
        ({"detector": {"image_file_format": "png"}}, "mrc, mrc-int, raw"),
        ({"particle": {"source": "cif"}}, "pdb, map, random"),
        ({"particle": {"pdb_file_in": None}}, "pdb_file_in"),
        ({"particle": {"use_imag_pot": False}}, "famp"),
        ({"particle": {"source": "map"}}, "map_file_re_in, map_file_im_in"),
        ({"particle": {"source": "random"}}, "contrast_re, smoothness, make_positive"),
        ({"particle": {"voxel_size": 20.0}}, "voxel_size"),
        ({"particle": {"pdb_file_in": 'a"b'}}, "text"),
        ({"particleset": {"particle_type": "Q"}}, r"\['P'\]"),
        ({"particleset": {"num_particles": 5}}, "num_particles = 5"),
        ({"particleset": {"coord_file_in": "nothing"}}, "table"),
        ({"particleset": {"particle_coords": "grid"}}, "particle_dist"),
        ({"geometry": {"ntilts": 0}}, "ntilts"),
        ({"geometry": {"gen_tilt_data": False}}, "geom_file_in"),
        ({"geometry": {"geom_errors": "file"}}, "error_file_in"),
        ({"geometry second": {}}, "at most 1 geometry"),
        ({"particle " + "n" * 50: {}}, "at most 49"),
        ({"detector second": {**DETECTOR, **MTF, "det_pix_x": 12}}, r"one size.*\(16, 12\), \(16, 24\)"),
    ],
)
def test_a_deck_that_the_program_would_refuse_is_refused_before(lab: Lab, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        lab.make(deck=tables(**changes))
    assert lab.started() == []


@pytest.mark.parametrize("missing", ["sample", "geometry", "electronbeam", "optics", "detector"])
def test_missing_components(lab: Lab, missing: str) -> None:
    deck = tables()
    del deck[missing]
    with pytest.raises(InputError, match=f"component '{missing}'"):
        lab.make(deck=deck)


def test_too_many_components(lab: Lab) -> None:
    many = {f"detector {i}": {**DETECTOR, **MTF} for i in range(10)}
    with pytest.raises(InputError, match="at most 10 detector"):
        lab.make(deck=tables(**many))


# --- decks as files -----------------------------------------------------------------------------------------------


def write_deck(lab: Lab, deck: dict[str, dict[str, Any]]) -> Path:
    path = lab.folder / "sub" / "input.txt"
    path.parent.mkdir()
    for name in ("p.pdb", "coordinates.txt"):
        (lab.folder / name).rename(path.parent / name)
    path.write_text("# a comment\n" + Deck.from_tables(deck).text())
    return path


def test_a_deck_from_a_file_is_read_relative_to_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    deck = tables()
    deck["simulation"] = {
        "generate_micrographs": True,
        "generate_volumes": True,
        "log_file": "mine.log",
        "rand_seed": 3,
    }
    deck["volume"] = {"voxel_size": 0.1, "nx": 9, "ny": 9, "nz": 9, "map_file_re_out": "volume.mrc"}
    deck["particle P"] |= {"map_file_re_out": "/nowhere/r.mrc", "map_file_im_out": "/nowhere/i.mrc"}
    deck["detector"]["image_file_out"] = "/nowhere/image.mrc"
    path = write_deck(lab, deck)
    options: dict[str, Any] = {"binary": lab.binary(), "cache": "cache", "scratch": "scratch", "noise": "none"}
    for given_as in ("sub/input.txt", {"file": "sub/input.txt"}, Deck.read(path)):
        monkeypatch.chdir(lab.folder)
        simulator = TEMSimulator(given_as, ["x_nm"], **options)
        simulator.prepare()
        monkeypatch.chdir(lab.folder / "sub")
        np.testing.assert_allclose(at(simulator, x_nm=2.0), expected(2.0, -2.0), rtol=2e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cs = 2\n", "line 1"),
        ("=== optics ===\ncs\n", "line 2"),
        ("=== optics ===\n= =\n", "line 2"),
        ("=== optics ===\ncs =\n", "line 2"),
        ("=== a b c ===\n", "line 1"),
        ("=== optics ===\ncs = " + "1" * 196 + "\n", "200 bytes"),
        ("=== optics ===\nCS = 2\n", "Unknown key 'CS'"),
    ],
)
def test_decks_that_cannot_be_parsed(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "input.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        Deck.read(tmp_path / "input.txt")


def test_no_deck(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="deck"):
        Deck.read(tmp_path / "none")
    with pytest.raises(InputError, match="int"):
        TEMSimulator(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="table of keys"):
        TEMSimulator({"optics": 3})


def test_lines_that_would_be_cut_are_refused_and_long_paths_do_no_harm(lab: Lab) -> None:
    with pytest.raises(InputError, match="at most 200 bytes"):
        Deck((Component.of("particle", "", {"source": "pdb", "pdb_file_in": "p" * 200}),)).text()
    deep = lab.folder / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (lab.folder / "p.pdb").rename(deep / "a file.pdb")
    deck = tables(particle={"pdb_file_in": str(deep / "a file.pdb")})
    np.testing.assert_allclose(at(lab.make(deck=deck, cache=deep)), expected(1.5, -2.0), rtol=2e-6)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.integers(1, 10**4),
    st.text("ab c'é", min_size=1),
)
def test_values_survive_writing_and_reading(
    tmp_path_factory: Any, real: float, yes: bool, count: int, text: str
) -> None:
    if not text.strip() or text != text.strip():
        text = "x"
    path = tmp_path_factory.mktemp("deck") / "input.txt"
    tables_ = {"optics": {"cs": real, "gen_defocus": yes}, "detector d": {"det_pix_x": count, "image_file_out": text}}
    deck = Deck.from_tables(tables_)
    path.write_text(deck.text())
    again = Deck.read(path)
    assert [dict(c.values) for c in again.components] == [dict(c.values) for c in deck.components]
    assert [c.heading for c in again.components] == ["optics", "detector d"]


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3), min_size=1, max_size=5))
def test_tables_survive_writing_and_reading(tmp_path_factory: Any, rows: list[tuple[float, ...]]) -> None:
    path = tmp_path_factory.mktemp("table") / "t"
    path.write_text("# comment\n" + table_text(np.array(rows)))
    np.testing.assert_array_equal(read_table(path, (3,)), np.array(rows))


@pytest.mark.parametrize("text", ["", "2 3\n1 2 3\n", "1 3\n1 2\n", "1 2\n1 2\n", "1 3\n1 nan 2\n", "x"])
def test_tables_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError):
        read_table(tmp_path / "t", (3,))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "dtype"), [(1, "i2"), (2, "f4")])
@pytest.mark.parametrize("stamp", [b"\x44\x11\0\0", b"\x44\x44\0\0", b"\x11\x11\0\0", b"\0\0\0\0"])
def test_byte_order_is_found_whatever_the_stamp(
    tmp_path: Path, order: str, mode: int, dtype: str, stamp: bytes
) -> None:
    data = np.arange(24, dtype=f"{order}{dtype}").reshape(2, 3, 4)
    raw = bytearray(1024)
    struct.pack_into(f"{order}4i", raw, 0, 4, 3, 2, mode)
    struct.pack_into(f"{order}3i3f", raw, 28, 4, 3, 2, 20.0, 15.0, 10.0)
    struct.pack_into(f"{order}i", raw, 92, 6)
    raw[212:216] = stamp
    (tmp_path / "a.mrc").write_bytes(bytes(raw) + b"\1" * 6 + data.tobytes())
    read, header = mrc.read(tmp_path / "a.mrc")
    np.testing.assert_array_equal(read, data)
    assert header.voxel_angstrom == (5.0, 5.0, 5.0)


# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")
def test_stacks_are_mrc2014(tmp_path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")
    data = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    mrc.write_stack(tmp_path / "a.mrc", data, 2.5)
    said = io.StringIO()
    assert mrcfile.validate(tmp_path / "a.mrc", print_file=said), said.getvalue()
    with mrcfile.open(tmp_path / "a.mrc") as file:
        np.testing.assert_array_equal(file.data, data)
        assert file.is_image_stack()
        assert file.header.dmean == pytest.approx(data.mean(), abs=1e-6)
