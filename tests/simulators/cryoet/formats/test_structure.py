"""Structure files as they are: every kind of oddity is read rightly, and alike, by all simulators, or named."""

from __future__ import annotations

import bz2
import gzip
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import CryoET, Deformation, Particle, Specimen, TEMSim, TiltSeries, read_structure

gemmi = pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

CASES = Path(__file__).parents[3] / "data" / "cryo"
READERS = {"from_file": Specimen.from_file, "read_structure": read_structure}
alike = pytest.mark.parametrize("read", READERS.values(), ids=READERS)
Reader = Callable[..., Specimen]


def atom(
    serial: int = 1,
    name: str = " CA ",
    residue: str = "ALA",
    chain: str = "A",
    number: object = 1,
    place: Sequence[float] = (0, 0, 0),
    occupancy: object = 1.0,
    b: object = 20.0,
    element: str = " C",
    altloc: str = " ",
    code: str = " ",
    record: str = "ATOM",
    segment: str = "    ",
) -> str:
    """A line in the columns of version 3.3."""
    x, y, z = place
    share = occupancy if isinstance(occupancy, str) else f"{occupancy:6.2f}"
    width = b if isinstance(b, str) else f"{b:6.2f}"
    return (
        f"{record:<6}{serial:>5} {name:<4}{altloc}{residue:>3} {chain}{number:>4}{code}   {x:8.3f}{y:8.3f}{z:8.3f}"
        f"{share}{width}      {segment}{element}"
    )


def pdb(folder: Path, *lines: str, name: str = "a.pdb", end: str = "\n") -> Path:
    path = folder / name
    path.write_bytes((end.join([*lines, "END"]) + end).encode())
    return path


def models(*frames: Sequence[str]) -> list[str]:
    return [line for i, frame in enumerate(frames, 1) for line in (f"MODEL     {i:4d}", *frame, "ENDMDL")]


def quietly(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = read()
    return result, [str(w.message) for w in said]


BACKBONE = [
    atom(1, " N  ", element=" N", place=(0, 0, 3.8)),
    atom(2, " CA ", place=(1.5, 0.3, 3.8)),
    atom(3, " C  ", place=(3, 0.6, 3.8)),
    atom(4, " O  ", element=" O", place=(4.5, 0.9, 3.8)),
]


# --- the corpus ---------------------------------------------------------------------------------------------------


@alike
@pytest.mark.parametrize(
    ("name", "elements", "weights", "word"),
    [
        ("bom.pdb", [7, 6, 6, 8], 1.0, ""),
        ("dum.pdb", [7, 6, 6, 8], 1.0, ""),
        ("gz.pdb.gz", [7, 6, 6, 8] * 2, [0.6] * 4 + [0.4] * 4, ""),
        ("noelement.pdb", [7, 6, 6, 8, 20], 1.0, ""),
        ("nmr.pdb", [7, 6, 6, 8], 1.0, "the first one is read; model=N"),
        ("models.cif", [7, 6], 1.0, "the first one is read; model=N"),
        ("bneg.pdb", [7, 6, 6, 8], 1.0, "B factors < 0 of 4 atoms, down to -5"),
        ("allocc0.pdb", [7, 6, 6, 8], 1.0, "all occupancies are 0"),
        ("altloc_over1.pdb", [7, 6, 6, 8] * 2, 0.5, "more than 1 at 4 places, up to 2"),
    ],
)
def test_the_corpus(read: Reader, name: str, elements: list[int], weights: Any, word: str) -> None:
    found, said = quietly(lambda: read(CASES / name))
    assert found.atomic_numbers.tolist() == elements
    np.testing.assert_allclose(found.weights, weights, rtol=1e-6)
    np.testing.assert_array_equal(found.b_factors, 0.0 if name == "bneg.pdb" else 20.0)
    assert len(said) == bool(word)
    assert not word or word in said[0]
    # Both have the same atoms in the same places, up to the centre.
    other, _ = quietly(lambda: read_structure(CASES / name))
    np.testing.assert_allclose(np.diff(found.positions, axis=0), np.diff(other.positions, axis=0), atol=1e-12)


@alike
def test_an_unknown_atom_is_named_and_may_be_left_out(read: Reader) -> None:
    with pytest.raises(InputError, match=r"'X' for atom UNK of residue UNX A 2 in line 5 of .*unknown_atoms='skip'"):
        read(CASES / "unx.pdb")
    assert read(CASES / "unx.pdb", unknown_atoms="skip").atomic_numbers.tolist() == [7, 6, 6, 8]
    with pytest.raises(InputError, match="Unknown unknown_atoms='ignore'"):
        read(CASES / "unx.pdb", unknown_atoms="ignore")


def test_every_simulator_has_the_same_reader() -> None:
    small = dict(shape=(16, 16), pixel_size_angstrom=4.0)
    options = {"file": str(CASES / "unx.pdb"), "unknown_atoms": "skip"}
    for build in (
        lambda specimen: CryoET(specimen, **small).specimen,
        lambda specimen: TiltSeries([Particle(specimen)], {"uniform": [-3, 3, 3]}, (16, 16), 4.0).particles[0].specimen,
    ):
        with pytest.raises(InputError, match="line 5"):
            build(str(CASES / "unx.pdb"))
        assert build(options).num_atoms == 4
    with pytest.raises(InputError, match="line 5"):
        TEMSim(CASES / "unx.pdb")
    assert TEMSim(CASES / "unx.pdb", unknown_atoms="skip").particle.num_atoms == 4
    both = {"file": str(CASES / "nmr.pdb"), "model": "all"}
    assert CryoET(both, **small).specimen.num_atoms == TEMSim(CASES / "nmr.pdb", model="all").particle.num_atoms == 8
    assert CryoET({**both, "model": 2}, **small).specimen.num_atoms == 4


# --- models -------------------------------------------------------------------------------------------------------


def chain(name: str, occupancy: float, *, residues: int = 2, shift: float = 0.0, first: int = 1) -> list[str]:
    return [
        atom(i, " CA ", chain=name, number=i, occupancy=occupancy, place=(3.8 * i + shift, 0, ord(name) - 65))
        for i in range(first, first + residues)
    ]


@alike
@pytest.mark.parametrize(
    ("frames", "weight", "atoms", "words"),
    [
        # An ensemble, to the rounding of two digits.
        ([chain("A", 0.2)] * 5, 2.0, 10, 0),
        ([chain("A", 0.33)] * 3, 1.98, 6, 0),
        ([chain("A", 0.17)] * 6, 2.04, 12, 0),
        ([chain("A", 0.7), chain("A", 0.3)], 2.0, 4, 0),
        # Alternatives of one whole.
        ([chain("A", 1.0)] * 4, 2.0, 2, 1),
        ([chain("A", 0.5)] * 4, 1.0, 2, 1),
        ([chain("A", 0.3)] * 2, 0.6, 2, 1),
        # Each chain by its occupancies.
        ([chain("A", 0.2) + chain("B", 1.0)] * 5, 4.0, 12, 1),
        ([chain("A", 0.5) + chain("B", 1.0), chain("A", 0.5)], 4.0, 6, 0),
        ([chain("A", 0.5), chain("A", 0.5) + chain("B", 1.0)], 4.0, 6, 0),
        ([chain("A", 0.5) + chain("B", 0.2)] * 2, 2.8, 8, 0),
        # Models of other atoms: the first has fewer, or more, or one is a ligand's.
        ([chain("A", 1.0), chain("A", 1.0, residues=3)], 2.0, 2, 1),
        ([chain("A", 1.0, residues=3), chain("A", 1.0)], 3.0, 3, 1),
        ([chain("A", 1.0), chain("A", 1.0) + chain("L", 1.0)], 2.0, 2, 1),
        ([chain("A", 0.5, residues=3), chain("A", 0.5)], 2.5, 5, 0),
        # Parts of one structure, divided among models.
        ([chain("A", 1.0), chain("B", 1.0)], 4.0, 4, 0),
        ([chain("A", 1.0), chain("A", 1.0, first=3)], 4.0, 4, 0),
    ],
)
@pytest.mark.parametrize("kind", ["pdb", "cif"])
def test_models(
    tmp_path: Path, read: Reader, kind: str, frames: list[list[str]], weight: float, atoms: int, words: int
) -> None:
    path = pdb(tmp_path, *models(*frames))
    if kind == "cif":
        document = gemmi.read_pdb(str(path)).make_mmcif_document()
        path = tmp_path / "a.cif"
        path.write_text(document.as_string())
    found, said = quietly(lambda: read(path))
    assert found.num_atoms == atoms
    assert found.weights.sum() == pytest.approx(weight, abs=1e-5)
    assert len(said) == words
    everything, said = quietly(lambda: read(path, model="all"))
    assert (everything.num_atoms, said) == (sum(map(len, frames)), [])
    last, said = quietly(lambda: read(path, model=len(frames)))
    assert (last.num_atoms, said) == (len(frames[-1]), [])
    with pytest.raises(InputError, match=rf"Unknown model 9 .*Known: 1, 2{'' if len(frames) == 2 else ', 3'}"):
        read(path, model=9)
    for wrong in (1.5, True, "first"):
        with pytest.raises(InputError, match="Expected model"):
            read(path, model=wrong)


@given(st.lists(st.integers(1, 99), min_size=2, max_size=6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_any_shares_of_one(tmp_path_factory: pytest.TempPathFactory, parts: list[int], residues: int) -> None:
    """Occupancies of two digits that add up to 1 are shares, whatever they are; ten times them are not."""
    hundredths = np.floor(100 * np.cumsum([0, *parts]) / sum(parts)).astype(int)
    shares = np.diff(hundredths) / 100
    folder = tmp_path_factory.mktemp("shares")
    frames = [chain("A", share, residues=residues, shift=i) for i, share in enumerate(shares)]
    found, said = quietly(lambda: read_structure(pdb(folder, *models(*frames))))
    assert found.weights.sum() == pytest.approx(residues, abs=1e-5)
    assert (found.num_atoms, said) == (residues * len(shares), [])


@alike
def test_models_and_alternatives_together(tmp_path: Path, read: Reader) -> None:
    """Each of two models has two alternatives of a quarter; another place has 1 in each of both, in each model."""
    frame = [atom(i, occupancy=0.25, altloc=a) for i, a in enumerate("AB", 1)]
    found, said = quietly(lambda: read(pdb(tmp_path, *models(frame, frame))))
    assert (found.weights.tolist(), said) == ([0.25] * 4, [])
    frame = [atom(i, occupancy=1.0, altloc=a) for i, a in enumerate("AB", 1)]
    found, said = quietly(lambda: read(pdb(tmp_path, *models(frame, frame))))
    assert found.weights.tolist() == [0.5, 0.5]
    assert len(said) == 2


@alike
def test_frames_without_models(tmp_path: Path, read: Reader) -> None:
    """As programs of molecular dynamics write them: END between frames, MODEL without number, no ENDMDL."""
    for lines in (
        [*BACKBONE, "END", *BACKBONE],
        ["MODEL", *BACKBONE, "ENDMDL", "MODEL", *BACKBONE, "ENDMDL"],
        ["MODEL        1", *BACKBONE, "MODEL        1", *BACKBONE],
        ["MODEL        2", *BACKBONE[::-1], "ENDMDL", "MODEL        0", *BACKBONE, "ENDMDL"],
    ):
        found, said = quietly(lambda lines=lines: read(pdb(tmp_path, *lines)))
        assert (found.num_atoms, len(said)) == (4, 1)
        assert read(pdb(tmp_path, *lines), model="all").num_atoms == 8
        assert read(pdb(tmp_path, *lines), model=2).num_atoms == 4
    assert read(pdb(tmp_path, *lines), model=2).atomic_numbers.tolist() == [8, 6, 6, 7]
    assert read(pdb(tmp_path, *lines), model=0).atomic_numbers.tolist() == [7, 6, 6, 8]


@alike
def test_an_assembly_of_shares(tmp_path: Path, read: Reader) -> None:
    """Each model is doubled by the file's symmetry; TEM-simulator's structures are those of the file."""
    rows = [
        f"REMARK 350   BIOMT{i}   {n}" + "".join(f" {float(i == j):9.6f}" for j in (1, 2, 3)) + f"{20 * (n - 1):15.5f}"
        for n in (1, 2)
        for i in (1, 2, 3)
    ]
    remark = ["REMARK 350 BIOMOLECULE: 1", "REMARK 350 APPLY THE FOLLOWING TO CHAINS: A", *rows]
    found = read(pdb(tmp_path, *remark, *models(*[chain("A", 0.2)] * 5)))
    copies = 2 if read == Specimen.from_file else 1
    assert found.num_atoms == copies * 10
    assert found.weights.sum() == pytest.approx(copies * 2.0, abs=1e-5)


BIOMT = [
    "REMARK 350 BIOMOLECULE: 1",
    "REMARK 350 APPLY THE FOLLOWING TO CHAINS: A, B,",
    "REMARK 350                    AND CHAINS: C",
    *(
        f"REMARK 350   BIOMT{i}   {n}"
        + "".join(f" {(i == j) * (1 - 2 * (n == 2 and i < 3)):9.6f}" for j in (1, 2, 3))
        + f"{30.0 * (n - 1) * (i == 1):15.5f}"
        for n in (1, 2)
        for i in (1, 2, 3)
    ),
]
OPERATORS = [
    *(f"_pdbx_struct_oper_list.matrix[{i}][{j}]" for i in (1, 2, 3) for j in (1, 2, 3)),
    *(f"_pdbx_struct_oper_list.vector[{i}]" for i in (1, 2, 3)),
]
ATOMS_CIF = [
    "data_a",
    "loop_",
    *(
        f"_atom_site.{tag}"
        for tag in (
            "group_PDB",
            "id",
            "type_symbol",
            "label_atom_id",
            "label_alt_id",
            "label_comp_id",
            "label_asym_id",
            "label_seq_id",
            "Cartn_x",
            "Cartn_y",
            "Cartn_z",
            "occupancy",
            "B_iso_or_equiv",
        )
    ),
    *(f"ATOM {i} C CA . ALA {c} 1 {i} 2 3 1 20" for i, c in enumerate("ABC")),
    "HETATM 9 O O . HOH D . 5 5 5 1 20",
]
TABLES = [
    "_pdbx_struct_assembly.id 1",
    "_pdbx_struct_assembly.details other",
    "_pdbx_struct_assembly_gen.assembly_id 1",
    "_pdbx_struct_assembly_gen.oper_expression 1,2",
    "_pdbx_struct_assembly_gen.asym_id_list A,B,C",
    "loop_",
    "_pdbx_struct_oper_list.id",
    *OPERATORS,
    "1 1 0 0 0 1 0 0 0 1 0 0 0",
    "2 -1 0 0 0 -1 0 0 0 1 30 0 0",
]


def specimen(folder: Path, lines: Sequence[str], **options: Any) -> tuple[Specimen, list[str]]:
    path = folder / "a.ent"
    path.write_text("\n".join([*lines, ""]))
    return quietly(lambda: Specimen.from_file(path, hydrogens="none", **options))


def atoms_of(chains: str) -> list[str]:
    return [atom(i, chain=c, place=(i, 2, 3)) for i, c in enumerate(chains)]


@pytest.mark.parametrize("kind", ["pdb", "cif", "pairs"])
def test_an_assembly_is_whole_or_says_what_it_lacks(tmp_path: Path, kind: str) -> None:
    """Of copies x, y, z and 30 - x, -y, z; tables of one row may be pairs, and details may be anything."""
    if kind == "pdb":
        head, whole, chains = BIOMT, [*BIOMT, *atoms_of("ABC")], [atoms_of("A"), atoms_of("Z")]
    else:
        tables = list(TABLES)
        if kind == "pairs":
            at = tables.index("loop_")
            numbers = dict(zip(OPERATORS, tables[-1].split()[1:], strict=True))
            tables[at:] = ["_pdbx_struct_oper_list.id 1", *(f"{tag} {value}" for tag, value in numbers.items())]
            tables = [line.replace("1,2", "1") for line in tables]
        head, whole = tables, [*ATOMS_CIF, *tables]
        cut = [line.replace(" A 1 0", f" {c} 1 0") for c in "AZ" for line in ATOMS_CIF[:-3]]
        chains = [cut[: len(cut) // 2], cut[len(cut) // 2 :]]
    found, said = specimen(tmp_path, whole)
    x = found.positions - found.positions[0]
    if kind == "pairs":
        assert x.tolist() == [[0, 0, 0], [-1, 0, 0], [-2, 0, 0]]
    else:
        assert x.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [30, -4, 0], [29, -4, 0], [28, -4, 0]]
    assert not said
    # A file that was cut to one chain; to none of them.
    joined = [[*head, *part] if kind == "pdb" else [*part, *head] for part in chains]
    found, said = specimen(tmp_path, joined[0])
    assert found.num_atoms == (1 if kind == "pairs" else 2)
    assert ["without chains that the file does not have: B, C" in told for told in said] == [True]
    with pytest.raises(InputError, match=r"none of A, B, C.*assembly=None"):
        specimen(tmp_path, joined[1])
    assert specimen(tmp_path, joined[1], assembly=None)[0].num_atoms == 1


def test_a_chain_of_water_is_no_missing_chain(tmp_path: Path) -> None:
    water = [atom(9, " O  ", "HOH", "C", element=" O", record="HETATM", place=(7, 7, 7))]
    found, said = specimen(tmp_path, [*BIOMT, *atoms_of("AB"), *water])
    assert (found.num_atoms, said) == (4, [])
    listed = [line.replace("A,B,C", "A,B,C,D") for line in TABLES]
    found, said = specimen(tmp_path, [*ATOMS_CIF, *listed])
    assert (found.num_atoms, said) == (6, [])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("BIOMT1   2 -1.0", "BIOMT1   2 -x.0", "four numbers of BIOMT1 in line 7"),
        ("BIOMT2   2  0.0", "BIOMT2   2  nan", "four numbers of BIOMT2 of matrix 2 in line 8"),
        ("BIOMT3   2  0.0", "BIOMT3   3  0.0", "BIOMT3 of matrix 2 in line 9"),
        ("BIOMT2   1 ", "BIOMT3   1 ", "BIOMT2 of matrix 1 in line 5"),
        ("BIOMT1   2 -1.0", "BIOMT1   2 -2.0", "rotation .*lines 7 to 9"),
        ("BIOMT1   2 -1.0", "BIOMT1   2 -0.0", "rotation .*lines 7 to 9"),
        ("BIOMT1   2 -1.0", "BIOMT1     2 -1.0", "columns 24 to 68, in lines 7 to 9"),
        ("   BIOMT2   2", "   BIOM 2   2", "BIOMT2 of matrix 2 in line 8"),
        ("                   AND CHAINS: C", "C", "AND CHAINS: .* in line 3"),
    ],
)
def test_damage_of_matrices_is_named_by_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = "\n".join([*BIOMT, *atoms_of("ABC")])
    assert text.count(old) == 1
    with pytest.raises(InputError, match=said):
        specimen(tmp_path, text.replace(old, new).split("\n"))
    assert specimen(tmp_path, text.replace(old, new).split("\n"), assembly=None)[0].num_atoms == 3


@pytest.mark.parametrize("row", [3, 4, 5, 6, 7, 8])
def test_a_lost_row_is_named(tmp_path: Path, row: int) -> None:
    left = [line for i, line in enumerate(BIOMT) if i != row]
    with pytest.raises(InputError, match=r"BIOMT\d .*line \d"):
        specimen(tmp_path, [*left, *atoms_of("ABC")])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("2 -1 0", "2 -x 0", r"matrix\[1\]\[1\] of operator '2'.*got '-x'"),
        ("2 -1 0", "2 ? 0", r"matrix\[1\]\[1\] of operator '2'.*got '\?'"),
        ("2 -1 0", "2 -2 0", "rotation .*operator '2'"),
        (" 1,2", " 1,3", "operator '3'.*those of 1, 2"),
        (" 1,2", " '(1-2'", "expression of operators"),
        ("_pdbx_struct_oper_list.vector[3]", "_pdbx_struct_oper_list.other", "operator '1'.*those of none"),
    ],
)
def test_damage_of_tables_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = "\n".join([*ATOMS_CIF, *TABLES])
    assert text.count(old) == 1
    with pytest.raises(InputError, match=said):
        specimen(tmp_path, text.replace(old, new).split("\n"))


@pytest.mark.parametrize("written", ["(1,2)", "(1-2)", "'1, 2'", "(1)(1,2)"])
def test_expressions_of_operators(tmp_path: Path, written: str) -> None:
    tables = [line.replace("1,2", written) for line in TABLES]
    assert specimen(tmp_path, [*ATOMS_CIF, *tables])[0].num_atoms == 6


def test_the_last_of_several_operators_comes_first(tmp_path: Path) -> None:
    tables = [line.replace("1,2", "(1,3)(2)") for line in TABLES]
    made = specimen(tmp_path, [*ATOMS_CIF, *tables, "3 1 0 0 0 1 0 0 0 1 100 0 0"])[0].positions
    plain = specimen(tmp_path, ATOMS_CIF)[0].positions
    turned = plain[:1] - plain
    expected = np.concatenate((turned, turned + np.array([100, 0, 0]))) * [1, 1, 0]
    np.testing.assert_allclose(made - made[0], expected, atol=1e-9)


def test_a_mirror_image_and_matrices_without_a_name_are_told(tmp_path: Path) -> None:
    mirror = [line.replace("BIOMT1   2 -1", "BIOMT1   2  1") for line in BIOMT]
    found, said = specimen(tmp_path, [*mirror, *atoms_of("ABC")])
    assert found.num_atoms == 6
    assert ["mirror image" in told for told in said] == [True]
    found, said = specimen(tmp_path, [*BIOMT[1:], *atoms_of("ABC")])
    assert found.num_atoms == 3
    assert ["names no assembly" in told for told in said] == [True]


def test_shares_deform_as_one_residue(tmp_path: Path) -> None:
    random = np.random.default_rng(0).uniform(-8, 8, (6, 3))
    frames = [
        [atom(i, number=i, occupancy=0.5, place=p + shift) for i, p in enumerate(random, 1)] for shift in (0.0, 0.4)
    ]
    specimen = Specimen.from_file(pdb(tmp_path, *models(*frames)))
    assert specimen.residues is not None
    assert specimen.residues.index.tolist() == [*range(6)] * 2
    assert specimen.residues.nodes.tolist() == [True] * 6 + [False] * 6
    moved = Deformation(modes=1, cutoff_angstrom=40.0).applied(specimen, {"mode_angstrom[0]": 2.0}).positions
    np.testing.assert_allclose(moved[6:] - moved[:6], specimen.positions[6:] - specimen.positions[:6], atol=1e-12)


# --- what a line may be like --------------------------------------------------------------------------------------


@alike
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", ["", "\ufeff", "utf-16"], ids=["plain", "mark", "wide"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress], ids=["", "gz", "bz2"])
@pytest.mark.parametrize("kind", ["pdb", "cif"])
def test_bytes_around_the_text(tmp_path: Path, read: Reader, end: str, mark: str, pack: Any, kind: str) -> None:
    text = pdb(tmp_path, *BACKBONE).read_text()
    if kind == "cif":
        text = gemmi.read_pdb_string(text).make_mmcif_document().as_string()
    text = text.replace("\n", end)
    raw = text.encode("utf-16") if mark == "utf-16" else (mark + text).encode()
    # The name says nothing: the content does.
    (tmp_path / "file.any").write_bytes(pack(raw))
    found, said = quietly(lambda: read(tmp_path / "file.any"))
    assert (found.atomic_numbers.tolist(), said) == ([7, 6, 6, 8], [])


@alike
@pytest.mark.parametrize(
    ("name", "residue", "element", "segment", "expected"),
    [
        (" CA ", "ALA", " C", "    ", 6),
        (" CA ", "ALA", " c", "    ", 6),
        (" CA ", "ALA", "C ", "    ", 6),
        (" CA ", "ALA", "", "    ", 6),
        ("CA  ", "ALA", "", "    ", 6),
        (" CA ", "ALA", "  ", "PROA", 6),
        ("CA  ", " CA", "", "    ", 20),
        (" CA ", " CA", "", "    ", 20),
        ("CA  ", " CA", "ca", "    ", 20),
        ("ZN  ", " ZN", "ZN", "    ", 30),
        ("ZN  ", " ZN", "zn", "    ", 30),
        ("ZN  ", " ZN", "Zn", "    ", 30),
        (" ZN ", " ZN", "", "    ", 30),
        ("ZN  ", " ZN", "", "    ", 30),
        ("FE  ", "HEM", "", "    ", 26),
        ("ZN  ", " ZN", "N ", "   Z", 30),
        ("ZN  ", " ZN", " ZN", "    ", 30),
        ("CL  ", " CL", " CL", "    ", 17),
        ("CL  ", " CL", "CL1-", "    ", 17),
        (" O1 ", "SO4", " O1-", "    ", 8),
        (" N  ", "ALA", " N1+", "    ", 7),
        ("CD  ", "LYS", "", "    ", 6),
        ("CD  ", " CD", "", "    ", 48),
        (" CD ", "LYS", "", "    ", 6),
        ("HG  ", "SER", "", "    ", 1),
        ("HG11", "VAL", "", "    ", 1),
        ("1HG1", "VAL", "", "    ", 1),
        (" D  ", "ALA", " D", "    ", 1),
        (" DA ", "ALA", "", "    ", 1),
        ("NE2 ", "GLN", "", "    ", 7),
        ("SE  ", "MSE", "", "    ", 34),
        (" SD ", "MET", "", "    ", 16),
        (" SG ", "CYS", "", "    ", 16),
        (" P  ", " DA", "", "    ", 15),
        (" C5'", "  A", "", "    ", 6),
        ("O5' ", "  G", "", "    ", 8),
        (" C1 ", "LIG", "", "    ", 6),
        ("BR1 ", "LIG", "", "    ", 35),
        ("C1  ", "LIG", "", "    ", 6),
        (" CA ", "ALA", "  70", "1CRN", 6),
        (" N  ", "ALA", "1234", "1CRN", 7),
        (" U  ", "IUM", " U", "    ", 92),
    ],
)
def test_elements(
    tmp_path: Path, read: Reader, name: str, residue: str, element: str, segment: str, expected: int
) -> None:
    line = atom(name=name, residue=residue, element=element, segment=segment, record="HETATM")
    assert read(pdb(tmp_path, line, BACKBONE[0].replace("A   1", "A   9"))).atomic_numbers[0] == expected
    if not element.strip():  # the line ends before
        assert read(pdb(tmp_path, line.rstrip(), BACKBONE[0].replace("A   1", "A   9"))).atomic_numbers[0] == expected


@alike
@pytest.mark.parametrize(
    ("line", "said"),
    [
        (atom(name=" Q1 ", residue="LIG", element=" Q"), r"'Q' for atom Q1 of residue LIG A 1 in line 6"),
        (atom(name=" X  ", residue="ALA", element=""), r"'\?'|'' for atom X of residue ALA A 1 in line 6"),
        (atom(name="LR  ", residue=" LR", element="LR"), "'LR' for atom LR .* line 6"),
        (atom(name=" A  ", residue="UNX", number=7, code="B", element="ZZ"), "'ZZ' for atom A of residue UNX A 7B .*6"),
        (atom(place=(0, 0, 0)).replace("   0.000   0.000", "   0.000********", 1), "coordinate .* line 6"),
        (atom(occupancy="******"), "occupancy in columns 55 to 60 of line 6"),
        (atom(occupancy=-1.0), r"occupancies >= 0, got -1.00 in line 6"),
        (atom(b="  nan "), "B factor in columns 61 to 66 of line 6"),
        (atom(b="1x.000"), "B factor in columns 61 to 66 of line 6"),
        ("ATOM      1  CA  GLY A   1       1.000", "coordinate in columns 39 to 46 of line 6"),
    ],
)
def test_what_cannot_be_read_is_named_by_line(tmp_path: Path, read: Reader, line: str, said: str) -> None:
    path = pdb(tmp_path, "REMARK   1", *BACKBONE, line)
    with pytest.raises(InputError, match=said) as caught:
        read(path)
    assert "a.pdb" in str(caught.value)
    if "atom" in said:
        assert read(path, unknown_atoms="skip").num_atoms == 4


CIF = (
    "id",
    "type_symbol",
    "label_atom_id",
    "label_alt_id",
    "label_comp_id",
    "label_asym_id",
    "label_entity_id",
    "label_seq_id",
    "Cartn_x",
    "Cartn_y",
    "Cartn_z",
    "occupancy",
    "B_iso_or_equiv",
)


def cif(folder: Path, *rows: str, without: str = "") -> Path:
    tags = ["group_PDB", *CIF]
    keep = [i for i, tag in enumerate(tags) if tag != without]
    lines = ["data_x", "loop_", *(f"_atom_site.{tags[i]}" for i in keep)]
    lines += [" ".join(row.split()[i] for i in keep) for row in rows]
    (folder / "a.cif").write_text("\n".join(lines) + "\n")
    return folder / "a.cif"


@alike
def test_columns_of_mmcif(tmp_path: Path, read: Reader) -> None:
    rows = [
        "ATOM 1 N N . ALA A 1 1 0 0 0 1 20",
        "ATOM 2 c CA . ALA A 1 1 1 0 0 ? ?",
        "HETATM 3 ZN ZN . ZN B 2 . 2 0 0 1 20",
        "HETATM 4 ? FE . HEM C 3 . 3 0 0 1 20",
        "HETATM 5 N N . DUM D 4 . 0 0 90 1 20",
    ]
    found, said = quietly(lambda: read(cif(tmp_path, *rows)))
    assert (found.atomic_numbers.tolist(), found.weights.tolist(), said) == ([7, 6, 30, 26], [1.0] * 4, [])
    assert found.b_factors.tolist() == [20, 0, 20, 20] or found.b_factors[1] >= 0
    without = read(cif(tmp_path, *rows, without="type_symbol"))
    assert without.atomic_numbers.tolist() == [7, 6, 30, 26]
    for left_out in ("occupancy", "B_iso_or_equiv", "label_alt_id", "group_PDB", "id", "label_asym_id"):
        assert read(cif(tmp_path, *rows, without=left_out)).atomic_numbers.tolist() == [7, 6, 30, 26]
    charged = ["HETATM 6 O1- O1 . SO4 E 5 . 4 0 0 1 20", "HETATM 7 ZN2+ ZN . ZN F 6 . 5 0 0 1 20"]
    assert read(cif(tmp_path, *rows, *charged)).atomic_numbers.tolist() == [7, 6, 30, 26, 8, 30]
    unknown = cif(tmp_path, *rows, "HETATM 6 X UNK . UNX E 5 . 4 0 0 1 20")
    with pytest.raises(InputError, match=r"'X' for atom UNK of residue UNX E .* in line 22 of .*'skip'"):
        read(unknown)
    assert read(unknown, unknown_atoms="skip").num_atoms == 4
    with pytest.raises(InputError, match=r"numbers for each atom.* in line 22"):
        read(cif(tmp_path, *rows, "HETATM 6 C C1 . LIG E 5 . ? 0 0 1 20"))
    negative, said = quietly(lambda: read(cif(tmp_path, "ATOM 1 N N . ALA A 1 1 0 0 0 1 -4.5")))
    assert negative.b_factors.tolist() == [0.0]
    assert "down to -4.5" in said[0]


@alike
def test_occupancies(tmp_path: Path, read: Reader) -> None:
    def weights(*lines: str) -> tuple[list[float], int]:
        found, said = quietly(lambda: read(pdb(tmp_path, *lines)))
        return np.round(found.weights, 3).tolist(), len(said)

    # Rounded, one of three, beside atoms that all have; another residue in the same place.
    assert weights(*(atom(i, occupancy=0.33, altloc=a) for i, a in enumerate("ABC", 1))) == ([0.33] * 3, 0)
    three = [atom(i, occupancy=0.33 + 0.01 * (i > 1), altloc=a) for i, a in enumerate("ABC", 1)]
    assert weights(*three) == ([0.33, 0.34, 0.34], 0)
    assert weights(*(atom(i, occupancy=1.0, altloc=a) for i, a in enumerate("ABC", 1))) == ([0.333] * 3, 1)
    assert weights(atom(1, occupancy=0.9, altloc="A"), atom(2, occupancy=0.3, altloc="B")) == ([0.75, 0.25], 1)
    assert weights(atom(1, occupancy=1.0), atom(2, occupancy=1.0, altloc="B")) == ([0.5, 0.5], 1)
    mixed = [atom(i, residue=r, occupancy=1.0, altloc=a) for i, (r, a) in enumerate((("SER", "A"), ("THR", "B")), 1)]
    assert weights(*mixed) == ([0.5, 0.5], 1)
    # Not the same place: insertion codes, chains, residues that share a number.
    for other in ({"code": "A"}, {"chain": "B"}, {"residue": "GLY"}):
        assert weights(atom(1), atom(2, place=(9, 0, 0), **other)) == ([1.0, 1.0], 0)  # type: ignore[arg-type]
        # The very same place, each whole: told, not changed. Shares of one are not.
        assert weights(atom(1), atom(2, **other)) == ([1.0, 1.0], 1)  # type: ignore[arg-type]
        halves = [atom(i, occupancy=0.5, **o) for i, o in enumerate(({}, other))]  # type: ignore[arg-type]
        assert weights(*halves) == ([0.5, 0.5], 0)
    assert weights(atom(1, occupancy=100.0)) == ([1.0], 1)
    assert weights(atom(1, occupancy="      "), atom(2, name=" CB ", place=(9, 0, 0))) == ([1.0, 1.0], 0)
    assert weights(atom(1)[:54]) == ([1.0], 0)
    assert weights(atom(1, occupancy=0.0), atom(2, name=" CB ")) == ([0.0, 1.0], 0)


@alike
@pytest.mark.parametrize(
    "dummy",
    [
        atom(5, " N  ", "DUM", number=2, place=(0, 1, 90), element=" N", record="HETATM"),
        atom(5, " O  ", "DUM", number=2, place=(0, 1, -90), element=" O"),
        atom(5, " X  ", "DUM", number=2, place=(0, 1, 90), element=" X", record="HETATM"),
        atom(5, " DUM", "MEM", number=2, place=(0, 1, 90), element="", record="HETATM"),
    ],
)
def test_dummies_are_not_atoms(tmp_path: Path, read: Reader, dummy: str) -> None:
    assert read(pdb(tmp_path, *BACKBONE, dummy)).num_atoms == 4
    with pytest.raises(InputError, match="found none"):
        read(pdb(tmp_path, dummy))


def test_records_beside(tmp_path: Path) -> None:
    """Serials in base 36, anisotropy, breaks, remarks in other alphabets and lower case do no harm."""
    lines = [
        "remark   1 M\u00fcller",
        "CRYST1   50.000   50.000   50.000  90.00  90.00  90.00 P 1           1",
        atom("A0000", " N  ", element=" N"),
        f"ANISOU{'A0000':>5}  N   ALA A   1     2406   1892   1614    198    519   -328       N",
        atom("*****", " C  ", place=(1, 0, 0)).replace("ATOM", "atom"),
        "TER",
        atom(9, " O  ", element=" O", number="A000", record="HETATM", place=(2, 0, 0)),
        atom(10, " O  ", "HOH", number=3, element=" O", record="HETATM", place=(3, 0, 0)),
        atom(11, " MW ", "HOH", number=3, element=" M"),
    ]
    assert Specimen.from_file(pdb(tmp_path, *lines)).atomic_numbers.tolist() == [7, 6, 8]
    # Water counts among the ice of TEM-simulator.
    assert read_structure(pdb(tmp_path, *lines[:-1])).atomic_numbers.tolist() == [7, 6, 8, 8]
    with pytest.raises(InputError, match="line 9"):
        read_structure(pdb(tmp_path, *lines))
    with pytest.raises(InputError, match=r"other than water and dummies in .*a\.pdb"):
        Specimen.from_file(pdb(tmp_path, lines[-2]))
