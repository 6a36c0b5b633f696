"""Damaged files: every reader either reads, or says with an `InputError` which file is wrong.

Whole files are cut, bytes and bits changed, lines swapped, doubled and lost, numbers replaced, and headers made to
claim more than there is; all from fixed seeds. Warnings are errors here but for words to the user.
"""

from __future__ import annotations

import gzip
import signal
import struct
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bridge.errors import InputError
from simulators.cryoet import DensityMap, Specimen, read_micrograph, read_stack
from simulators.cryoet.temsim.potential import read_structure
from simulators.cryoet.tilt.read import read_tilt_series

gemmi = pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
mrcfile = pytest.importorskip("mrcfile", reason="the cryo-EM simulator needs mrcfile")

CASES = 120  # of each kind of file
# Far more than these files of some kilobytes need, and far less than their damaged headers claim.
LARGEST_BYTES = 64 << 20

NUMBERS = (b"nan", b"inf", b"-1", b"0", b"1e30", b"-1e-30", b"99999999999999999999", b"1.5.2", b"?", b".", b"", b"\xff")


def _atom(serial: int, name: str, residue: str, chain: str, number: int, place: np.ndarray, element: str) -> str:
    x, y, z = place
    return (
        f"ATOM  {serial:5d}  {name:<3s} {residue} {chain}{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00"
        f"          {element:>2s}  "
    )


def _pdb() -> bytes:
    random = np.random.default_rng(0)
    lines = ["CRYST1   60.000   60.000   60.000  90.00  90.00  90.00 P 1           1"]
    for chain in "AB":
        for number in range(1, 5):
            for name, element in (("N", "N"), ("CA", "C"), ("C", "C"), ("O", "O")):
                place = random.uniform(0, 40, 3)
                lines.append(_atom(len(lines), name, "GLY", chain, number, place, element))
        lines.append("TER")
    return ("\n".join([*lines, "END"]) + "\n").encode()


def _cif() -> bytes:
    document = gemmi.read_pdb_string(_pdb().decode()).make_mmcif_document()
    return document.as_string().encode()


def _mrc(path: Path, shape: tuple[int, ...]) -> bytes:
    random = np.random.default_rng(0)
    with mrcfile.new(path) as mrc:
        mrc.set_data(random.normal(size=shape).astype(np.float32))
        if len(shape) == 3:
            mrc.set_image_stack()
        mrc.voxel_size = 3.0
    return path.read_bytes()


MDOC = b"PixelSpacing = 3\nVoltage = 300\n\n[T =     Tilt axis angle = 85.0, binning = 1]\n\n" + b"\n".join(
    f"[ZValue = {t}]\nTiltAngle = {3 * t - 3}\nRotationAngle = 175\nExposureDose = 3\nPriorRecordDose = {3 * t}\n"
    f"Defocus = -3\n".encode()
    for t in range(3)
)
TLT = b"-3.00\n0.00\n3.00\n"
XF = b"\n".join(b"0.0872 -0.9962 0.9962 0.0872 1.5 -2.0" for _ in range(3)) + b"\n"


def damaged(whole: bytes, seed: int, *, text: bool) -> bytes:
    """One of several kinds of damage, by the seed."""
    random = np.random.default_rng(seed)
    kind = int(random.integers(8 if text else 5))
    data = bytearray(whole)
    if kind == 0:  # a truncated copy, also of nothing
        return bytes(data[: int(random.integers(len(data)))])
    if kind == 1:  # single bits
        for place in random.integers(len(data), size=int(random.integers(1, 6))):
            data[place] ^= 1 << int(random.integers(8))
        return bytes(data)
    if kind == 2:  # bytes anywhere
        for place in random.integers(len(data), size=int(random.integers(1, 40))):
            data[place] = int(random.integers(256))
        return bytes(data)
    if kind == 3:  # a hole
        a, b = sorted(random.integers(len(data), size=2).tolist())
        return bytes(data[:a] + data[b:])
    if kind == 4:  # a block of zeros, as file systems leave
        a = int(random.integers(len(data)))
        data[a : a + 512] = bytes(len(data[a : a + 512]))
        return bytes(data)
    lines = whole.split(b"\n")
    if kind == 5:
        random.shuffle(lines)  # type: ignore[arg-type]
    elif kind == 6:  # a line lost, another twice
        lines.pop(int(random.integers(len(lines))))
        lines.insert(int(random.integers(len(lines))), lines[int(random.integers(len(lines)))])
    else:  # a word replaced
        line = int(random.integers(len(lines)))
        words = lines[line].split(b" ")
        words[int(random.integers(len(words)))] = NUMBERS[int(random.integers(len(NUMBERS)))]
        lines[line] = b" ".join(words)
    return b"\n".join(lines)


def survives(path: Path, read: Callable[[], object]) -> bool:
    """Whether the file was read; refused must mean an `InputError` that names it, soon, without taking memory."""

    def hangs(*_: object) -> None:
        raise AssertionError(f"reading {path} does not end")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    said = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what a reader made of an odd file
            read()
    except InputError as error:
        said = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if said is not None:
        assert path.name.split(".")[0] in said, f"the message does not name {path.name}: {said}"
        assert said.startswith(("Expected", "Unknown"))
    return said is None


def run(path: Path, whole: bytes, read: Callable[[], object], *, text: bool, packed: bool = False) -> None:
    path.write_bytes(gzip.compress(whole) if packed else whole)
    assert survives(path, read), "the undamaged file is not read"
    read_after_all = 0
    tracemalloc.start()
    try:
        for seed in range(CASES):
            # Of a compressed file, either the stream is damaged or what is in it.
            inside = packed and seed % 2 == 0
            data = damaged(gzip.compress(whole) if packed and not inside else whole, seed, text=text and not packed)
            path.write_bytes(gzip.compress(data) if inside else data)
            read_after_all += survives(path, read)
        assert tracemalloc.get_traced_memory()[1] < LARGEST_BYTES
    finally:
        tracemalloc.stop()
    # The damage is real, yet not always fatal: both outcomes have been seen.
    assert 0 < read_after_all < CASES


@pytest.mark.parametrize("name", ["model.pdb", "model.cif", "model.pdb.gz", "model.cif.gz"])
def test_structures(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    whole = _pdb() if ".pdb" in name else _cif()
    run(path, whole, lambda: Specimen.from_file(path, assembly=None), text=True, packed=name.endswith(".gz"))


TRANSFORMS = b"# copies\n6 4\n1 0 0 0\n0 1 0 0\n0 0 1 0\n0 -1 0 5.5\n1 0 0 0\n0 0 1 -2\n"


@pytest.mark.parametrize("name", ["model.pdb", "copies.txt"])
def test_structures_as_tem_simulator_reads_them(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.pdb").write_bytes(_pdb())
    (tmp_path / "copies.txt").write_bytes(TRANSFORMS)
    path = tmp_path / name
    run(path, path.read_bytes(), lambda: read_structure(tmp_path / "model.pdb", tmp_path / "copies.txt"), text=True)


@pytest.mark.parametrize("kind", ["micrograph", "stack", "map", "map.gz"])
def test_images_and_maps(tmp_path: Path, kind: str) -> None:
    whole = _mrc(tmp_path / "whole.mrc", (12, 10) if kind == "micrograph" else (3, 12, 10))
    path = tmp_path / ("damaged.mrc.gz" if kind.endswith("gz") else "damaged.mrc")
    readers = {
        "micrograph": lambda: read_micrograph(path),
        "stack": lambda: read_stack(path),
        "map": lambda: DensityMap.from_file(path, volts_per_unit=1.0, centre=(0.0, 0.0, 0.0)),
        "map.gz": lambda: DensityMap.from_file(path, volts_per_unit=1.0, centre="mass"),
    }
    run(path, whole, readers[kind], text=False, packed=kind.endswith("gz"))


@pytest.mark.parametrize("packed", [False, True])
def test_headers_that_claim_too_much(tmp_path: Path, packed: bool) -> None:
    """10^9 voxels and more, an extended header of 2 GB, negative sizes, other modes and byte orders."""
    whole = _mrc(tmp_path / "whole.mrc", (3, 12, 10))
    path = tmp_path / ("claims.mrc.gz" if packed else "claims.mrc")
    values = (-1, 0, 1, 1000, 30000, 2**20, 2**31 - 1, -(2**31))
    tracemalloc.start()
    try:
        for word in (0, 1, 2, 3, 7, 8, 9, 16, 17, 18, 22, 23, 55):
            for value in values:
                data = bytearray(whole)
                struct.pack_into("<i", data, 4 * word, value)
                path.write_bytes(gzip.compress(bytes(data)) if packed else bytes(data))
                survives(path, lambda: read_stack(path))
                survives(path, lambda: DensityMap.from_file(path, volts_per_unit=1.0))
        data = bytearray(whole)
        struct.pack_into("<3i", data, 0, 1000, 1000, 1000)
        path.write_bytes(gzip.compress(bytes(data)) if packed else bytes(data))
        with pytest.raises(InputError, match=r"claims 1000 x 1000 x 1000 numbers of mode 2, 4000001024 bytes"):
            read_stack(path)
        assert tracemalloc.get_traced_memory()[1] < LARGEST_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["series.mdoc", "series.tlt", "series.xf"])
def test_what_belongs_to_a_tilt_series(tmp_path: Path, name: str) -> None:
    stack = tmp_path / "series.mrc"
    _mrc(stack, (3, 12, 10))
    for other, data in (("series.mdoc", MDOC), ("series.tlt", TLT), ("series.xf", XF)):
        (tmp_path / other).write_bytes(data)
    path = tmp_path / name

    def read() -> object:
        files = {"mdoc": tmp_path / "series.mdoc", "tilts": tmp_path / "series.tlt"}
        if name == "series.xf":
            files["transforms"] = path
        if name == "series.mdoc":
            del files["tilts"]
        return read_tilt_series(stack, **files, order=[0, 1, 2], pixel_size_angstrom=3.0)

    run(path, path.read_bytes(), read, text=True)
