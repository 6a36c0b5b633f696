"""Finished evaluations on disk: append-only, checksummed, found by what was evaluated.

A record's key is a hash of the simulator's name, the inputs and the seeds of one call, so a record is good for any
number of ranks and any schedule, and deleting the directory changes costs, never results. Every process appends to a
file of its own; a record that is torn or damaged is skipped, and evaluated again, as is a run that failed or was not
finite, of which there is none. Nothing in it is pickled.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.errors import SetupError

_log = logging.getLogger("bridge")

# magic, checksum of what follows in the header, bytes of data, checksum of data, key, dtype, device, dimensions, step
_HEADER = struct.Struct("<4sIQI16s4s8sIQ")
_AFTER_CHECKSUM = 8
_MAGIC = b"BRG2"
_DTYPES = {torch.float32: b"<f4\0", torch.float64: b"<f8\0"}
_SYNC_SECONDS = 1.0


class _Place(NamedTuple):
    path: Path
    offset: int
    size: int
    checksum: int
    dtype: str
    device: str
    shape: tuple[int, ...]
    step: int


@final
class Store:
    """Evaluations in a directory, which is made where missing; many processes may use it at once.

    Args:
        directory: of one version of the simulators: after a change of their code, take another or delete it.
        above_s: evaluations that took less [s] are not written: to repeat one costs less than to keep it.

    Attributes:
        step: written into each record: `clear` can spare the later ones.
        hits, misses: evaluations found, and not found, by this process.
        written: bytes written by this process since the last `clear`.
        damaged: bytes skipped, when the directory was read, because they are no whole record.
    """

    def __init__(self, directory: str | os.PathLike[str], above_s: float = 0.01) -> None:
        self.directory, self.above_s = Path(directory), above_s
        self.step = self.hits = self.misses = self.written = self.damaged = 0
        self._index: dict[bytes, _Place] = {}
        self._file: int | None = None
        self._path: Path | None = None
        self._synced = time.monotonic()
        self._full = False
        self._lock = threading.Lock()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(f"Expected a directory that can be written for evaluations, got: {error}.") from error
        for path in sorted(self.directory.glob("*.journal")):
            self._read(path)

    @staticmethod
    def key(name: str, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> bytes:
        """16 bytes that stand for one call of a simulator."""
        digest = hashlib.blake2b(f"{name}\0{inputs.shape}".encode(), digest_size=16)
        digest.update(np.ascontiguousarray(inputs).tobytes())
        digest.update(np.ascontiguousarray(seeds).tobytes())
        return digest.digest()

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[str, float, int]]:
        # On another rank: that rank's own, in the same directory.
        return _opened, (str(self.directory), self.above_s, self.step)

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: bytes) -> torch.Tensor | None:
        """The outputs (k, *output_shape) of a call, in memory of their own; None where they are missing or damaged."""
        place = self._index.get(key)
        if place is not None:
            data = np.empty(place.size, dtype=np.uint8)
            try:
                with place.path.open("rb") as file:
                    file.seek(place.offset)
                    whole = file.readinto(data.data) == place.size
            except OSError:
                whole = False
            if whole and zlib.crc32(data.data) == place.checksum:
                self.hits += 1
                tensor = torch.as_tensor(data.view(place.dtype).reshape(place.shape))
                return tensor if place.device == "cpu" else tensor.to(place.device)
            self._index.pop(key, None)
            _log.warning("a damaged record in %s is evaluated again", place.path)
        self.misses += 1
        return None

    def put(self, key: bytes, outputs: torch.Tensor, seconds: float) -> None:
        """Appends the outputs of a call that took so many seconds. A full disk costs the record, not the run."""
        if seconds < self.above_s or self._full:
            return
        array = outputs.detach().to("cpu").contiguous()
        data = array.numpy().reshape(-1).view(np.uint8).data
        shape = struct.pack(f"<{array.ndim}Q", *array.shape)
        device = outputs.device.type.encode().ljust(8, b"\0")
        rest = (len(data), zlib.crc32(data), key, _DTYPES[array.dtype], device, array.ndim, self.step)
        header = _HEADER.pack(_MAGIC, 0, *rest)
        checksum = zlib.crc32(header[_AFTER_CHECKSUM:] + shape)
        header = _HEADER.pack(_MAGIC, checksum, *rest) + shape
        with self._lock:
            try:
                self._append(header, data)
            except OSError as error:
                self._full = True
                _log.warning("evaluations are no longer journalled on %s: %s", socket.gethostname(), error)
                return
            assert self._path is not None
            self._index[key] = _place(self._path, self.written - len(data), header)

    def _append(self, header: bytes, data: memoryview) -> None:
        if self._file is None:
            self._path = self.directory / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.journal"
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        begin = self.written
        try:
            for part in (memoryview(header), data):
                while part:
                    count = os.write(self._file, part)
                    part = part[count:]
                    self.written += count
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, begin)
            self.written = begin
            raise
        # What is written survives the death of this process; that of the machine, up to the last second.
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            os.fsync(self._file)
            self._synced = time.monotonic()

    def sync(self) -> None:
        """Makes what has been written survive the death of the machine."""
        with self._lock:
            if self._file is not None:
                os.fsync(self._file)

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
            header = os.pread(file, _HEADER.size + 8 * 32, offset)
            place = _whole(path, offset, header, size)
            if place is not None:
                self._index[_HEADER.unpack_from(header)[4]] = place
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


def _place(path: Path, offset: int, header: bytes) -> _Place:
    _, _, size, checksum, _, dtype, device, ndim, step = _HEADER.unpack_from(header)
    shape = struct.unpack_from(f"<{ndim}Q", header, _HEADER.size)
    return _Place(path, offset, size, checksum, dtype.strip(b"\0").decode(), device.strip(b"\0").decode(), shape, step)


def _whole(path: Path, offset: int, header: bytes, size: int) -> _Place | None:
    """Where a record's data are, if the record at `offset` is whole."""
    if len(header) < _HEADER.size or header[:4] != _MAGIC:
        return None
    _, checksum, length, *_, ndim, _ = _HEADER.unpack_from(header)
    end = _HEADER.size + 8 * ndim
    if ndim > 32 or len(header) < end or zlib.crc32(header[_AFTER_CHECKSUM:end]) != checksum:
        return None
    return _place(path, offset + end, header) if offset + end + length <= size else None


def _find(file: int, start: int, size: int) -> int:
    """The next place that may be the start of a record, or the end."""
    block = 1 << 20
    while start < size:
        found = os.pread(file, block + 3, start).find(_MAGIC)
        if found >= 0:
            return start + found
        start += block
    return size
