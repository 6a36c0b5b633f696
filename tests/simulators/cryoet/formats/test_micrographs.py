"""Specimens and micrographs: what is read, what is written, what is refused."""

from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import Specimen, read_micrograph, write_micrograph, write_stack

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
mrcfile = pytest.importorskip("mrcfile", reason="the cryo-EM simulator needs mrcfile")

HINGE = Path(__file__).resolve().parents[4] / "examples" / "data" / "6wg6.cif.gz"

PDB = """\
CRYST1   50.000   50.000   50.000  90.00  90.00  90.00 P 1           1
ATOM      1  N   GLY A   1      10.000  10.000  10.000  1.00 20.00           N
ATOM      2  CA  GLY A   1      11.450  10.000  10.000  1.00 21.00           C
ATOM      3  C   GLY A   1      12.000  11.400  10.000  1.00 22.00           C
ATOM      4  O   GLY A   1      11.300  12.400  10.000  0.50 23.00           O
HETATM    5  O   HOH A   2      20.000  20.000  20.000  1.00 30.00           O
END
"""


@pytest.fixture
def glycine(tmp_path: Path) -> Path:
    path = tmp_path / "glycine.pdb"
    path.write_text(PDB)
    return path


def test_pdb(glycine: Path) -> None:
    specimen = Specimen.from_file(glycine)
    assert specimen.num_atoms == 4  # water belongs to the solvent
    assert specimen.atomic_numbers.tolist() == [7, 6, 6, 8]
    assert specimen.weights.tolist() == [1, 1, 1, 0.5]
    assert specimen.b_factors.tolist() == [20, 21, 22, 23]
    mass = np.array([14.007, 12.011, 12.011, 15.999 * 0.5])
    assert np.abs(mass @ specimen.positions).max() < 1e-2
    # A glycine residue has three hydrogens; its oxygen is only half there, and so is its share of them.
    full = 3 * (14.007 + 2 * 12.011 + 8.0) / (14.007 + 2 * 12.011 + 16.0)
    assert specimen.hydrogens.sum() == pytest.approx(full, rel=2e-2)
    assert specimen.hydrogens[3] == 0
    assert Specimen.from_file(glycine, hydrogens="file").hydrogens.sum() == 0


def test_compressed_mmcif_and_assembly() -> None:
    specimen = Specimen.from_file(HINGE, assembly="1")
    assert specimen.num_atoms == 3394
    assert np.bincount(specimen.atomic_numbers)[[6, 7, 8, 15, 16]].tolist() == [2124, 609, 643, 2, 16]
    # About eight hydrogens a residue, as proteins have.
    assert specimen.hydrogens.sum() == pytest.approx(1.65 * 2124, rel=0.03)
    whole = Specimen.from_file(HINGE, assembly=None)
    assert whole.num_atoms > specimen.num_atoms
    with pytest.raises(InputError, match=r"Unknown assembly '99'.*1, 2, 3"):
        Specimen.from_file(HINGE, assembly="99")


def test_files_that_are_not_structures(tmp_path: Path, glycine: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        Specimen.from_file(tmp_path / "absent.pdb")
    (tmp_path / "empty.pdb").write_text("")
    (tmp_path / "prose.pdb").write_text("This is no structure.\n" * 5)
    (tmp_path / "broken.cif").write_text("data_x\nloop_\n_atom_site.id\n_atom_site.Cartn_x\n1 2 3\n")
    (tmp_path / "column.pdb").write_text(PDB.replace("10.000  10.000  10.000", "10.0x0  10.000  10.000"))
    (tmp_path / "cut.cif.gz").write_bytes(gzip.compress(b"data_x\n" * 1000)[:20])
    (tmp_path / "water.pdb").write_text("\n".join(line for line in PDB.splitlines() if line[:4] != "ATOM"))
    for name in ("empty.pdb", "prose.pdb", "broken.cif", "column.pdb", "cut.cif.gz", "water.pdb"):
        with pytest.raises(InputError, match="Expected") as caught:
            Specimen.from_file(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(InputError, match="names no assemblies"):
        Specimen.from_file(glycine, assembly="7")
    with pytest.raises(InputError, match="riding, file, none"):
        Specimen.from_file(glycine, hydrogens="some")


def test_helix_has_the_symmetry_of_the_virus() -> None:
    specimen = Specimen.helix(60)
    first, later = specimen.positions[:32], specimen.positions[49 * 32 : 50 * 32]
    # 49 subunits later: three turns, hence the same angle, 49 rises further along x.
    assert later - first == pytest.approx(np.broadcast_to([49 * 1.408, 0, 0], first.shape), abs=1e-9)
    radius = np.hypot(*specimen.positions[:, 1:].T)
    assert radius.min() >= 20
    assert radius.max() <= 90
    assert specimen.positions.mean(axis=0)[0] == pytest.approx(0, abs=1e-9)
    # One subunit is a protein of 17.5 kDa.
    mass = {6: 12.011, 7: 14.007, 8: 15.999, 16: 32.06}
    each = np.array([mass[z] for z in specimen.atomic_numbers.tolist()]) + 1.008 * specimen.hydrogens
    assert (each * specimen.weights).sum() / 60 == pytest.approx(17.5e3, rel=0.03)
    with pytest.raises(InputError, match="num_subunits"):
        Specimen.helix(0)


@given(copies=st.integers(1, 9), seed=st.integers(0, 2**40), spacing=st.sampled_from([None, 60.0, 90.0]))
def test_field_of_copies(copies: int, seed: int, spacing: float | None) -> None:
    one = Specimen.from_atoms([[20, 0, 0], [0, 15, 0], [0, 0, -10], [-5, -5, 5]], [6, 7, 8, 16], b_factors=10.0)
    many = one.field(copies=copies, field_angstrom=500.0, seed=seed, spacing_angstrom=spacing)
    assert many.num_atoms == 4 * copies
    assert np.abs(many.positions[:, :2]).max() <= 250
    parts = many.positions.reshape(copies, 4, 3)
    # Rigid: all distances within a copy are kept; right-handed: so is the signed volume.
    for part in parts:
        assert np.linalg.det(part[1:] - part[0]) == pytest.approx(np.linalg.det(one.positions[1:] - one.positions[0]))
        gaps = np.linalg.norm(part[:, None] - part[None], axis=-1)
        assert gaps == pytest.approx(np.linalg.norm(one.positions[:, None] - one.positions[None], axis=-1))
    assert np.unique(many.labels).tolist() == list(range(copies))
    again = one.field(copies=copies, field_angstrom=500.0, seed=seed, spacing_angstrom=spacing)
    assert many.digest == again.digest
    assert pickle.loads(pickle.dumps(many)).digest == many.digest


def test_field_keeps_its_distance_and_says_what_does_not_fit() -> None:
    one = Specimen.from_atoms([[30, 0, 0], [-30, 0, 0]], [6, 6])
    many = one.field(copies=6, field_angstrom=400.0, seed=3)
    centres = many.positions.reshape(6, 2, 3).mean(axis=1)[:, :2]
    gaps = np.linalg.norm(centres[:, None] - centres[None], axis=-1)[np.triu_indices(6, 1)]
    assert gaps.min() >= 64 - 1e-9
    assert one.field(copies=6, field_angstrom=400.0, seed=4).digest != many.digest
    with pytest.raises(InputError, match="room for 20 copies"):
        one.field(copies=20, field_angstrom=200.0, seed=1)
    with pytest.raises(InputError, match="wider than one copy"):
        one.field(copies=1, field_angstrom=30.0, seed=1)
    with pytest.raises(InputError, match="seed"):
        one.field(copies=1, field_angstrom=300.0, seed=-1)


def test_fields_are_those_that_micrographs_were_made_from() -> None:
    """A field is a function of its seed for good: the demo's target shows the one of seed 1."""
    one = Specimen.from_atoms([[30, 0, 0], [0, 10, 0]], [6, 6])
    expected = [
        [-5.659362, 27.789147, -8.433741],
        [-21.291017, 49.776091, 8.065522],
        [-69.234824, -78.895929, -12.896861],
        [-51.434138, -64.358064, 8.823776],
        [30.065003, -60.032001, -17.471205],
        [56.788349, -69.891647, -3.736209],
    ]
    assert one.field(copies=3, field_angstrom=200.0, seed=1).positions == pytest.approx(np.array(expected), abs=1e-5)
    hinges = Specimen.from_file(HINGE, assembly="1").field(copies=12, field_angstrom=768.0, seed=1)
    ends = hinges.positions.reshape(12, -1, 3)[[0, 11]][:, [0, -1]].reshape(4, 3)
    expected = [[-104.532, 214.895, -1.650], [-127.300, 221.868, -36.104]]
    expected += [[-2.937, -39.905, 0.869], [36.392, -31.590, 12.621]]
    # To the last figure of the structure's own coordinates.
    assert ends == pytest.approx(np.array(expected), abs=2e-3)


def test_orientations_are_uniform() -> None:
    """The direction of a bond over many copies: mean 0 and second moment 1/3 in each axis, to 5 standard errors."""
    one = Specimen.from_atoms([[1, 0, 0], [0, 0, 0]], [6, 6])
    n = 1500
    many = one.field(copies=n, field_angstrom=1e6, seed=0, spacing_angstrom=0.0)
    bond = np.diff(many.positions.reshape(n, 2, 3), axis=1)[:, 0]
    assert np.abs(bond.mean(axis=0)).max() < 5 / np.sqrt(3 * n)
    assert np.abs((bond**2).mean(axis=0) - 1 / 3).max() < 5 * np.sqrt(4 / 45 / n)


def test_specimen_from_plain_data(glycine: Path) -> None:
    assert Specimen.from_options("helix").digest == Specimen.helix().digest
    assert Specimen.from_options(str(glycine)).num_atoms == 4
    table = {"file": str(glycine), "copies": 3, "field_angstrom": 100, "seed": 1}
    assert Specimen.from_options(table).num_atoms == 12
    assert Specimen.from_options({"helix": True, "num_subunits": 3}).num_atoms == 3 * 32
    for wrong, said in (
        ({"fiel": "x"}, "Known keys: file, assembly"),
        ({}, "either file"),
        ({"helix": True, "file": "x"}, "either file"),
        ({"helix": True, "assembly": "1"}, "does not belong"),
        ({"helix": True, "copies": 2}, "missing: field_angstrom, seed"),
        (5, "got int"),
    ):
        with pytest.raises(InputError, match=said):
            Specimen.from_options(wrong)  # type: ignore[arg-type]


def test_specimen_arrays_are_checked_and_kept() -> None:
    with pytest.raises(InputError, match=r"\(n, 3\)"):
        Specimen.from_atoms(np.zeros((4, 2)), [6] * 4)
    with pytest.raises(InputError, match="NaN"):
        Specimen.from_atoms([[np.nan, 0, 0]], [6])
    with pytest.raises(InputError, match="B factors"):
        Specimen.from_atoms([[0, 0, 0]], [6], b_factors=-1.0)
    given_positions = np.zeros((1, 3))
    specimen = Specimen.from_atoms(given_positions, [6])
    given_positions += 1
    assert specimen.positions.max() == 0
    with pytest.raises(ValueError, match="read-only"):
        specimen.positions[0] = 1
    with pytest.raises(InputError, match="orthogonal"):
        specimen.transformed(2 * np.eye(3))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([np.float32, np.int16, np.uint16, np.int8, np.float64, np.int32]),
    pixel=st.floats(0.2, 20.0),
)
def test_mrc_round_trip(tmp_path_factory, rows: int, columns: int, dtype: type, pixel: float) -> None:
    path = tmp_path_factory.mktemp("mrc") / "image.mrc"
    image = (np.random.default_rng(rows * 41 + columns).normal(size=(rows, columns)) * 50).astype(dtype)
    write_micrograph(path, image, pixel, label="a test")
    back = read_micrograph(path)
    assert back.image.shape == (rows, columns)
    assert np.array_equal(back.image, image.astype(np.float32) if dtype in (np.float64, np.int32) else image)
    assert back.image.dtype == (np.float32 if dtype in (np.float64, np.int32) else dtype)
    assert back.pixel_size_angstrom == pytest.approx(pixel, rel=1e-6)
    assert back.label == "a test"


def test_mrc_header_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "image.mrc"
    write_micrograph(path, np.arange(12.0).reshape(3, 4), 2.5)
    assert mrcfile.validate(path)
    with mrcfile.open(path) as mrc:
        assert mrc.header.ispg == 0
        assert mrc.header.mode == 2
        assert mrc.header.nlabl == 1
        assert (mrc.header.nx, mrc.header.ny, mrc.header.nz) == (4, 3, 1)
        assert float(mrc.header.cella.x) == pytest.approx(10.0)
    first = path.read_bytes()
    write_micrograph(path, np.arange(12.0).reshape(3, 4), 2.5)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == ["image.mrc"]


def test_mrc_write_is_refused_without_touching_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.mrc"
    write_micrograph(path, np.ones((4, 4)), 1.0)
    old = path.read_bytes()
    for image, pixel, label in (
        (np.ones((2, 2, 2)), 1.0, ""),
        (np.array([[np.nan]]), 1.0, ""),
        (np.ones((2, 2), dtype=complex), 1.0, ""),
        (np.ones((2, 2)), 0.0, ""),
        (np.ones((2, 2)), 1.0, "x" * 81),
        (np.ones((2, 2)), 1.0, "angstr\u00f6m"),
        (np.ones((2, 2)), 1.0, None),
        *((np.ones((2, 2)), pixel, "") for pixel in ("2", None, True, np.nan, [1.0, 2.0])),
        (None, 1.0, ""),
        ("image", 1.0, ""),
    ):
        with pytest.raises(InputError, match="Expected"):
            write_micrograph(path, image, pixel, label)  # type: ignore[arg-type]
    # What lies under a mask is not written, whole or not.
    holes = np.ma.masked_array(np.full((4, 4), -9999.0), mask=np.eye(4))
    for array in (holes, holes.astype(np.int16)):
        with pytest.raises(InputError, match=r"no mask.*np\.ma\.filled"):
            write_micrograph(path, array, 1.0)
        with pytest.raises(InputError, match="no mask"):
            write_stack(path, [array, array], 1.0)
    with pytest.raises(InputError, match="folder"):
        write_micrograph(tmp_path / "no" / "image.mrc", np.ones((2, 2)), 1.0)

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_micrograph(path, np.zeros((4, 4)), 1.0)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["image.mrc"]


def test_mrc_files_that_are_malformed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found none"):
        read_micrograph(tmp_path / "absent.mrc")
    good = tmp_path / "good.mrc"
    write_micrograph(good, np.ones((8, 8)), 1.0)
    whole = good.read_bytes()
    cases = {"empty": b"", "prose": b"no image " * 300, "short": whole[:900], "cut": whole[:-50]}
    cases["nan"] = whole[:-4] + np.float32("nan").tobytes()
    cases["cell"] = whole[:40] + bytes(12) + whole[52:]
    for name, content in cases.items():
        path = tmp_path / f"{name}.mrc"
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_micrograph(path)
    with mrcfile.new(tmp_path / "stack.mrc") as mrc:
        mrc.set_data(np.ones((3, 4, 4), dtype=np.float32))
        mrc.set_image_stack()
    with pytest.raises(InputError, match="one image"):
        read_micrograph(tmp_path / "stack.mrc")
