"""MRC files as programs write them: odd headers are read rightly and noted, or refused by name."""

from __future__ import annotations

import bz2
import gzip
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.tem import mrc as tem_mrc
from bridge.errors import InputError
from simulators.cryoet import DensityMap, read_micrograph, read_stack

pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")

CASES = Path(__file__).parents[3] / "data" / "cryo"
IMOD = 1146047817
# mode: kind of numpy, by MRC2014.
REAL = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 7: "i4", 12: "f2"}


def mrc(
    data: np.ndarray,
    mode: int,
    order: str = "<",
    *,
    stamp: bytes | None = None,
    magic: bytes = b"MAP ",
    extended: bytes = b"",
    kind: bytes = b"",
    words: dict[int, Any] | None = None,
    after: bytes = b"",
    pixel: float = 2.5,
) -> bytes:
    """A file from its numbers alone; `words` are of the header, counted from 0."""
    nz, ny, nx = data.shape
    raw = bytearray(1024)
    struct.pack_into(f"{order}4i", raw, 0, nx, ny, nz, mode)
    struct.pack_into(f"{order}3i", raw, 28, nx, ny, nz)
    struct.pack_into(f"{order}6f", raw, 40, nx * pixel, ny * pixel, nz * pixel, 90, 90, 90)
    struct.pack_into(f"{order}3i", raw, 64, 1, 2, 3)
    struct.pack_into(f"{order}2i", raw, 88, 0, len(extended))
    raw[104 : 104 + len(kind)] = kind
    raw[208:212] = magic
    raw[212:214] = stamp if stamp is not None else {"<": b"\x44\x44", ">": b"\x11\x11"}[order]
    for word, value in (words or {}).items():
        struct.pack_into(f"{order}{'f' if isinstance(value, float) else 'i'}", raw, 4 * word, value)
    body = data.astype(data.dtype.newbyteorder(order)).tobytes()
    return bytes(raw) + extended + body + after


def numbers(kind: str, shape: tuple[int, int, int] = (3, 5, 4)) -> np.ndarray:
    random = np.random.default_rng(3)
    if kind[0] == "f":
        return (100 * random.normal(size=shape)).astype(kind)
    limits = np.iinfo(kind)
    return random.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


def quietly(read: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = read()
    return result, [str(w.message) for w in said]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.mrc"


# --- the corpus ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "word"),
    [("be.mrc", ""), ("bz.mrc.bz2", ""), ("machst4411.mrc", "stamp is 44 11"), ("machst4400.mrc", "stamp is 44 00")],
)
def test_the_corpus(name: str, word: str) -> None:
    found, said = quietly(lambda: read_stack(CASES / name))
    assert (found.images.shape, found.images.dtype, found.images.dtype.isnative) == ((3, 16, 24), np.float32, True)
    assert found.images[0, 0, :3] == pytest.approx([92.03913, 95.127815, 90.25])
    assert found.pixel_size_angstrom == pytest.approx(2.5)
    assert found.images.mean() == pytest.approx(99.9, abs=0.1)
    assert torch.from_numpy(found.images).dtype == torch.float32
    assert [word in note for note in said] == [True] * bool(word)
    assert len(found.notes) == len(said)


def test_bytes_of_imod() -> None:
    """Flag 1 is not set: the bytes are unsigned, and the one of 128 is no -128."""
    images = read_stack(CASES / "imod_signed.mrc").images
    assert (images.dtype, int(images.min()), int(images.max())) == (np.uint8, 61, 128)


# --- kinds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", REAL)
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress], ids=["plain", "gzip", "bzip2"])
@pytest.mark.parametrize("extended", [b"", bytes(range(200)) * 5], ids=["", "extended"])
def test_numbers_come_back_native(path: Path, order: str, mode: int, pack: Any, extended: bytes) -> None:
    data = numbers(REAL[mode])
    path.write_bytes(pack(mrc(data, mode, order, extended=extended, kind=b"FEI1" if extended else b"")))
    images = read_stack(path).images
    np.testing.assert_array_equal(images, data)
    assert images.dtype.isnative
    assert images.dtype == data.dtype
    assert images.flags.writeable


STAMPS = (
    b"\x44\x44",
    b"\x44\x41",
    b"\x11\x11",
    b"\x44\x11",
    b"\x44\x00",
    b"\x44\x20",
    b"\0\0",
    b"\x11\x00",
    b"\xff\xff",
)


@pytest.mark.parametrize("stamp", STAMPS, ids=bytes.hex)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", [0, 1, 2, 6])
def test_any_machine_stamp(path: Path, stamp: bytes, order: str, mode: int) -> None:
    """A wrong one is noted, whichever it is; sizes of 256 rows and columns make sense in both orders."""
    right = {"<": (b"\x44\x44", b"\x44\x41"), ">": (b"\x11\x11",)}[order]
    for shape, axes, pack in (
        ((3, 5, 4), {}, bytes),
        ((2, 256, 256), {}, bytes),
        ((2, 3, 4), {16: 0, 17: 0, 18: 0}, bytes),
        ((2, 3, 4), {16: 0, 17: 0, 18: 0}, gzip.compress),
    ):
        data = numbers(REAL[mode], shape)
        path.write_bytes(pack(mrc(data, mode, order, stamp=stamp, words=axes)))
        found, said = quietly(lambda: read_stack(path))
        np.testing.assert_array_equal(found.images, data)
        assert found.pixel_size_angstrom == pytest.approx(2.5)
        assert len(said) == (stamp not in right)
        assert all("machine stamp" in note and stamp[:1].hex() in note for note in said)


@given(
    order=st.sampled_from(["<", ">"]),
    mode=st.sampled_from(sorted(REAL)),
    stamp=st.binary(min_size=2, max_size=2),
    magic=st.sampled_from([b"MAP ", b"\0\0\0\0", b"MAP\0", b"map "]),
    extended=st.binary(max_size=40),
    after=st.binary(max_size=40),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    statistics=st.sampled_from([0.0, float("nan"), -1.0]),
    pack=st.sampled_from([bytes, gzip.compress, bz2.compress]),
)
@settings(max_examples=60, deadline=None)
def test_headers_that_are_odd_together(
    tmp_path_factory: pytest.TempPathFactory,
    order: str,
    mode: int,
    stamp: bytes,
    magic: bytes,
    extended: bytes,
    after: bytes,
    shape: tuple[int, int, int],
    statistics: float,
    pack: Any,
) -> None:
    path = tmp_path_factory.mktemp("odd") / "a.mrc"
    data = numbers(REAL[mode], shape)
    words = {19: statistics, 20: statistics, 21: statistics, 54: statistics}
    path.write_bytes(
        pack(mrc(data, mode, order, stamp=stamp, magic=magic, extended=extended, after=after, words=words))
    )
    found, said = quietly(lambda: read_stack(path))
    np.testing.assert_array_equal(found.images, data)
    right = {"<": (b"\x44\x44", b"\x44\x41"), ">": (b"\x11\x11",)}[order]
    assert len(said) == len(found.notes) == (stamp not in right) + (magic[:3] != b"MAP") + bool(after)


@pytest.mark.parametrize(
    ("words", "values", "said"),
    [
        ({}, "i1", 0),  # MRC2014
        ({38: IMOD, 39: 0}, "u1", 0),
        ({38: IMOD, 39: 1}, "i1", 0),
        ({38: IMOD, 39: 2 + 4 + 8}, "u1", 0),
        ({38: IMOD, 39: 1 + 8}, "i1", 0),
        ({38: IMOD + 1, 39: 0}, "i1", 0),
        ({19: 0.0, 20: 255.0}, "u1", 1),
        ({19: 3.0, 20: 200.0}, "u1", 1),
        ({19: -128.0, 20: 127.0}, "i1", 0),
        ({38: IMOD, 39: 1, 19: 0.0, 20: 255.0}, "i1", 0),
        ({19: float("nan"), 20: float("nan")}, "i1", 0),
    ],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_are_signed_or_not(path: Path, words: dict[int, Any], values: str, said: int, order: str) -> None:
    data = numbers("u1")
    path.write_bytes(mrc(data, 0, order, words=words))
    found, notes = quietly(lambda: read_stack(path))
    np.testing.assert_array_equal(found.images, data.view(values))
    assert len(notes) == said


@pytest.mark.parametrize("columns", [4, 5])
def test_four_bits(path: Path, columns: int) -> None:
    values = np.random.default_rng(0).integers(0, 16, (2, 3, columns), dtype=np.uint8)
    even = np.pad(values, ((0, 0), (0, 0), (0, columns % 2)))
    packed = even[:, :, ::2] | even[:, :, 1::2] << 4
    path.write_bytes(mrc(packed, 101, words={0: columns, 7: columns}))
    np.testing.assert_array_equal(read_stack(path, pixel_size_angstrom=1.0).images, values)
    path.write_bytes(mrc(packed, 0, words={38: IMOD, 39: 16}))
    with pytest.raises(InputError, match="4 bits"):
        read_stack(path)


def test_no_number_of_sections(path: Path) -> None:
    data = numbers("f4")
    for pack in (bytes, gzip.compress):
        path.write_bytes(pack(mrc(data, 2, words={2: 0})))
        found, said = quietly(lambda: read_stack(path))
        np.testing.assert_array_equal(found.images, data)
        assert "counts no sections" in said[0]
        path.write_bytes(pack(mrc(data, 2, words={2: 0}, after=b"xyz")))
        with pytest.raises(InputError, match="claims 4 x 5 x 0 numbers"):
            read_stack(path)


@pytest.mark.parametrize("mode", [3, 4, 16, 5, 8, -1, 1 << 20])
@pytest.mark.parametrize("order", ["<", ">"])
def test_modes_that_are_no_images(path: Path, mode: int, order: str) -> None:
    path.write_bytes(mrc(numbers("f4", (3, 5, 8)), mode, order, words={0: 4}))
    with pytest.raises(InputError, match=rf"a\.mrc.*mode {mode}" if mode in (3, 4, 16) else r"a\.mrc.*header claims"):
        read_stack(path)


@pytest.mark.parametrize("cell", [0.0, float("nan"), float("inf")])
def test_a_cell_that_says_nothing_is_asked_about(path: Path, cell: float) -> None:
    path.write_bytes(mrc(numbers("f4"), 2, words={10: cell, 11: cell, 12: cell}))
    with pytest.raises(InputError, match=rf"got \({cell}, {cell}\).*pixel_size_angstrom="):
        read_stack(path)
    assert read_stack(path, pixel_size_angstrom=3.0).pixel_size_angstrom == 3.0
    with pytest.raises(InputError, match="voxel_size_angstrom="):
        DensityMap.from_file(path, volts_per_unit=1.0)
    path.write_bytes(mrc(numbers("f4"), 2, words={11: cell}))
    with pytest.raises(InputError, match="pixel_size_angstrom="):
        read_stack(path)


def test_what_is_cut_or_not_finite(path: Path) -> None:
    whole = mrc(numbers("f4"), 2, ">", stamp=b"\x44\x11", extended=b"x" * 90)
    for pack in (bytes, gzip.compress, bz2.compress):
        for length in (0, 500, 1024, 1100, len(whole) - 1):
            path.write_bytes(pack(whole[:length]))
            with pytest.raises(InputError, match=r"a\.mrc"):
                read_stack(path)
    data = numbers("f4")
    data[1, 2, 3] = np.nan
    path.write_bytes(mrc(data, 2))
    with pytest.raises(InputError, match="finite"):
        read_stack(path)


@pytest.mark.parametrize("y_axis", [None, "up", "across"])
def test_a_stack_may_stay_in_its_file(path: Path, y_axis: Any) -> None:
    data = numbers("i2", (4, 6, 5))
    path.write_bytes(mrc(data, 1, extended=b"x" * 7))
    expected = read_stack(path, y_axis=y_axis).images
    found = read_stack(path, y_axis=y_axis, memory_map=True).images
    base = found
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    np.testing.assert_array_equal(found, expected)
    for raw in (mrc(data, 1, ">"), gzip.compress(mrc(data, 1))):  # converted, so read
        path.write_bytes(raw)
        np.testing.assert_array_equal(read_stack(path, y_axis=y_axis, memory_map=True).images, expected)
    path.write_bytes(mrc(data, 1)[:-1])
    with pytest.raises(InputError, match="claims"):
        read_stack(path, memory_map=True)


def test_a_large_stack_takes_no_memory(path: Path) -> None:
    """Two gigabytes, which the file system need not hold either."""
    raw = mrc(np.zeros((1, 1, 1), np.float32), 2, words={0: 8192, 1: 8192, 2: 8, 7: 8192, 8: 8192, 9: 8})[:1024]
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(1024 + 8 * 8192 * 8192 * 4)
    images = read_stack(path, pixel_size_angstrom=1.0, memory_map=True).images
    assert images.shape == (8, 8192, 8192)
    assert images[7, 8191, 8191] == 0.0


def test_maps_and_micrographs_too(path: Path) -> None:
    data = numbers("f4", (4, 4, 4))
    path.write_bytes(mrc(data, 2, ">", stamp=b"\x44\x11"))
    density, said = quietly(lambda: DensityMap.from_file(path, volts_per_unit=1.0))
    np.testing.assert_array_equal(density.values, data.astype(np.float64))
    assert (density.voxel_angstrom, len(said)) == ((2.5, 2.5, 2.5), 1)
    path.write_bytes(bz2.compress(mrc(data[:1], 2)))
    np.testing.assert_array_equal(read_micrograph(path).image, data[0])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("mode", [0, 1, 2, 6, 12])
def test_the_adapter_reads_the_same(path: Path, order: str, mode: int) -> None:
    """adapters do not import simulators: two readers, which must agree."""
    for words in ({}, {38: IMOD, 39: 0}):
        path.write_bytes(mrc(numbers(REAL[mode]), mode, order, stamp=b"\x44\x11", words=words, after=b"xx"))
        ours, _ = quietly(lambda: read_stack(path))
        theirs, header = tem_mrc.read(path)
        np.testing.assert_array_equal(theirs, ours.images)
        assert theirs.dtype == ours.images.dtype
        assert theirs.dtype.isnative
        assert header.voxel_angstrom == pytest.approx((2.5,) * 3)
