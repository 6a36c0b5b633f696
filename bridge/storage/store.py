"""Finished evaluations on disk: append-only, checksummed, found by what was evaluated.

A record's key is a hash of the simulator's identity (see `bridge.simulator.identity`), the inputs and the seeds of one
call, so a record is good for any number of ranks and any schedule, and deleting the directory changes costs, never
results. It says, too, what was evaluated, so that other fits can begin with it (see `bridge.fitting.reuse`). Every
process appends to a file of its own; a record that is torn or damaged is skipped, and evaluated again, as is a run that
failed or was not finite, of which there is none. Nothing in it is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import socket
import struct
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.errors import SetupError

_log = logging.getLogger("bridge")

# magic, checksum of what follows in the header; bytes and checksum of the call, the same of its outputs; key, dtype,
# device, dimensions of the outputs, rows, parameters, step. Then come the outputs' shape, the call (name, inputs,
# seeds), and the outputs.
_HEADER = struct.Struct("<4sIIIQI16s4s8sIIIQ")
_AFTER_CHECKSUM = 8
_MAGIC = b"BRG3"
_MOST_DIMENSIONS = 32
_DTYPES = {torch.float32: b"<f4\0", torch.float64: b"<f8\0"}
_SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Key:
    """What stands for one call of a simulator: 16 bytes, and what they are of.

    Attributes:
        name: of the simulator. inputs: (k, d). seeds: (k,).
    """

    digest: bytes
    name: str = field(compare=False)
    inputs: NDArray[np.float64] = field(compare=False, repr=False)
    seeds: NDArray[np.uint64] = field(compare=False, repr=False)


class Record(NamedTuple):
    """One call of a simulator and what came out: inputs (k, d), seeds (k,), outputs (k, *output_shape)."""

    name: str
    inputs: NDArray[np.float64]
    seeds: NDArray[np.uint64]
    outputs: torch.Tensor


class _Place(NamedTuple):
    path: Path
    begin: int  # of the call
    offset: int  # of the outputs
    size: int
    checksum: int
    dtype: str
    device: str
    shape: tuple[int, ...]
    rows: int
    parameters: int
    step: int


@final
class Store:
    """Evaluations in a directory, which is made where missing; many processes may use it at once.

    Args:
        directory: may hold evaluations of any number of simulators: each is filed under its identity.
        above_s: evaluations that took less [s] are not written: to repeat one costs less than to keep it.

    Attributes:
        step: written into each record: `clear` can spare the later ones.
        hits, misses: calls found, and not found, by this process.
        written: bytes written by this process since the last `clear` or `sync`.
        damaged: bytes skipped, when the directory was read, because they are no whole record.
    """

    def __init__(self, directory: str | os.PathLike[str], above_s: float = 0.01) -> None:
        self.directory, self.above_s = Path(directory), above_s
        self.step = self.hits = self.misses = self.written = self.damaged = 0
        self._index: dict[bytes, _Place] = {}
        self._file: int | None = None
        self._path: Path | None = None
        self._end = 0  # of the file
        self._synced = time.monotonic()
        self._full = False
        self._lock = threading.Lock()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"Expected a directory that can be written for evaluations, got: {error}.") from error
        for path in sorted(self.directory.glob("*.journal")):
            self._read(path)

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r}, above_s={self.above_s:g})"

    @staticmethod
    def key(name: str, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Key:
        """What stands for one call of a simulator, with inputs (k, d) and seeds (k,)."""
        inputs, seeds = np.ascontiguousarray(inputs), np.ascontiguousarray(seeds)
        digest = hashlib.blake2b(f"{name}\0{inputs.shape}".encode(), digest_size=16)
        digest.update(inputs.tobytes())
        digest.update(seeds.tobytes())
        return Key(digest.digest(), name, inputs, seeds)

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[str, float, int]]:
        # On another rank: that rank's own, in the same directory.
        return _opened, (str(self.directory), self.above_s, self.step)

    def __len__(self) -> int:
        return len(self._index)

    def count(self, step: int) -> int:
        """How many calls of this step, or a later one, there are."""
        return sum(place.step >= step for place in self._index.values())

    def get(self, key: Key) -> torch.Tensor | None:
        """The outputs (k, *output_shape) of a call, in memory of their own; None where they are missing or damaged."""
        place = self._index.get(key.digest)
        if place is not None:
            outputs = _outputs(place)
            if outputs is not None:
                self.hits += 1
                return outputs if place.device == "cpu" else outputs.to(place.device)
            self._index.pop(key.digest, None)
            _log.warning("a damaged record in %s is evaluated again", place.path)
        self.misses += 1
        return None

    def put(self, key: Key, outputs: torch.Tensor, seconds: float) -> None:
        """Appends the outputs of a call that took so many seconds. A full disk costs the record, not the run."""
        if seconds < self.above_s or self._full:
            return
        array = outputs.detach().to("cpu").contiguous()
        data = array.numpy().reshape(-1).view(np.uint8).data
        shape = struct.pack(f"<{array.ndim}Q", *array.shape)
        call = key.name.encode() + key.inputs.tobytes() + key.seeds.tobytes()
        device = outputs.device.type.encode().ljust(8, b"\0")
        rest = (
            *(len(call), zlib.crc32(call), len(data), zlib.crc32(data), key.digest, _DTYPES[array.dtype], device),
            *(array.ndim, *key.inputs.shape, self.step),
        )
        header = _HEADER.pack(_MAGIC, 0, *rest)
        checksum = zlib.crc32(header[_AFTER_CHECKSUM:] + shape)
        header = _HEADER.pack(_MAGIC, checksum, *rest) + shape
        with self._lock:
            try:
                self._append(header + call, data)
            except OSError as error:
                self._full = True
                _log.warning("evaluations are no longer journalled on %s: %s", socket.gethostname(), error)
                return
            assert self._path is not None
            self._index[key.digest] = _place(self._path, self._end - len(data) - len(call) - len(header), header)

    def names(self) -> set[str]:
        """The simulators that there are evaluations of."""
        return {call[0] for call in map(_call, self._index.values()) if call is not None}

    def records(self, name: str) -> Iterator[Record]:
        """What is known of a simulator, a call at a time, on the CPU, in any order; damaged ones are left out."""
        for place in list(self._index.values()):
            call = _call(place)
            if call is None or call[0] != name:
                continue
            outputs = _outputs(place)
            if outputs is not None:
                yield Record(*call, outputs)

    def _append(self, header: bytes, data: memoryview) -> None:
        if self._file is None:
            self._path = self.directory / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.journal"
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
            self._end = 0
        begin = end = self._end
        try:
            for part in (memoryview(header), data):
                while part:
                    count = os.write(self._file, part)
                    part = part[count:]
                    end += count
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, begin)
            raise
        self._end = end
        self.written += end - begin
        # What is written survives the death of this process; that of the machine, up to the last second.
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def sync(self) -> None:
        """Makes what has been written survive the death of the machine."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)
            self.written = 0

    def advance(self, step: int) -> None:
        """What is written from here on belongs to this step."""
        self.step = step

    def clear(self, before: int | None = None) -> None:
        """Forgets evaluations, and removes the files of this process and those that were here when it began.

        Args:
            before: forgets those of earlier steps only; a file is removed once it has no others. After an interruption
                there may be some of the step after the one that is about to be repeated.
        """
        with self._lock:
            stale = {key for key, place in self._index.items() if before is None or place.step < before}
            paths = {place.path for place in self._index.values()} | ({self._path} if self._path else set())
            for key in stale:
                del self._index[key]
            paths -= {place.path for place in self._index.values()}
            if self._file is not None and self._path in paths:
                os.close(self._file)
                self._file = self._path = None
            self.written = 0
            for path in paths:
                with contextlib.suppress(OSError):  # every rank that read it may remove it
                    path.unlink()

    def _read(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # another process may just clear it
            self._scan(path, file.fileno(), os.fstat(file.fileno()).st_size)

    def _scan(self, path: Path, file: int, size: int) -> None:
        offset = 0
        while offset < size:
            header = os.pread(file, _HEADER.size + 8 * _MOST_DIMENSIONS, offset)
            place = _whole(path, file, offset, header, size)
            if place is not None:
                self._index[_HEADER.unpack_from(header)[6]] = place
                offset = place.offset + place.size
                continue
            # A torn record: look for the next one.
            found = _find(file, offset + 1, size)
            self.damaged += found - offset
            offset = found


def _opened(directory: str, above_s: float, step: int) -> Store:
    store = Store(directory, above_s)
    store.advance(step)
    return store


def _place(path: Path, start: int, header: bytes) -> _Place:
    """Of the record that starts at `start`."""
    _, _, length, _, size, checksum, _, dtype, device, ndim, rows, parameters, step = _HEADER.unpack_from(header)
    shape = struct.unpack_from(f"<{ndim}Q", header, _HEADER.size)
    begin = start + _HEADER.size + 8 * ndim
    kind = dtype.strip(b"\0").decode(), device.strip(b"\0").decode()
    return _Place(path, begin, begin + length, size, checksum, *kind, shape, rows, parameters, step)


def _whole(path: Path, file: int, start: int, header: bytes, size: int) -> _Place | None:
    """Where a record's data are, if the record at `start` is whole; outputs are looked at when they are asked for."""
    if len(header) < _HEADER.size or header[:4] != _MAGIC:
        return None
    _, checksum, length, call, *_, ndim, _, _, _ = _HEADER.unpack_from(header)
    end = _HEADER.size + 8 * ndim
    if ndim > _MOST_DIMENSIONS or len(header) < end or zlib.crc32(header[_AFTER_CHECKSUM:end]) != checksum:
        return None
    place = _place(path, start, header)
    if place.offset + place.size > size or zlib.crc32(os.pread(file, length, place.begin)) != call:
        return None
    return place


def _part(path: Path, begin: int, size: int) -> NDArray[np.uint8] | None:
    data = np.empty(size, dtype=np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return data if file.readinto(data.data) == size else None
    except OSError:  # cleared by another process
        return None


def _outputs(place: _Place) -> torch.Tensor | None:
    data = _part(place.path, place.offset, place.size)
    if data is None or zlib.crc32(data.data) != place.checksum:
        return None
    return torch.as_tensor(data.view(place.dtype).reshape(place.shape))


def _call(place: _Place) -> tuple[str, NDArray[np.float64], NDArray[np.uint64]] | None:
    """Name, inputs and seeds of a record; its checksum was seen to be right when the file was read."""
    data = _part(place.path, place.begin, place.offset - place.begin)
    if data is None:
        return None
    numbers = 8 * place.rows * (place.parameters + 1)
    split = len(data) - numbers
    inputs = data[split : split + 8 * place.rows * place.parameters].tobytes()
    return (
        data[:split].tobytes().decode(),
        np.frombuffer(inputs, dtype=np.float64).reshape(place.rows, place.parameters).copy(),
        np.frombuffer(data[split + len(inputs) :].tobytes(), dtype=np.uint64).copy(),
    )


def _find(file: int, start: int, size: int) -> int:
    """The next place that may be the start of a record, or the end."""
    block = 1 << 20
    while start < size:
        found = os.pread(file, block + 3, start).find(_MAGIC)
        if found >= 0:
            return start + found
        start += block
    return size
