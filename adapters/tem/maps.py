"""Potential maps of particles: built once by the program itself, kept on disk, found by what they were built of.

Of a run from a PDB file nearly all the time goes into the maps. They depend on the structure, the voxel and, the
imaginary one, on the voltage; a run that reads them instead gives the same image to single precision.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from adapters.tem import mrc
from adapters.tem.deck import Component
from bridge.errors import BridgeError, EvaluationError, InputError, SetupError

REAL, IMAGINARY = "re.mrc", "im.mrc"
_VERSION = 1
_PDB_KEYS = ("voxel_size", "nx", "ny", "nz", "use_imag_pot", "add_hydrogen")

# CODATA 2018, as far as single precision of a map can tell.
_REST_ENERGY_KEV = 510.99895
_HC_KEV_NM = 1.23984198
_BOHR_RADIUS_NM = 0.0529177211


def default_cache() -> Path:
    """$XDG_CACHE_HOME/simulation-bridge/tem-simulator, with ~/.cache where that variable is not set."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "simulation-bridge" / "tem-simulator"


def absorption(voltage_kv: float) -> float:
    r"""How the imaginary potential of water depends on the voltage, up to a constant.

        I(E) = k / (1 + E / E0) (sigma_O + 2 sigma_H),    sigma = sigma_el + sigma_inel,

    with k = 2 pi / (h c) sqrt(E (E + 2 E0)), gamma = 1 + E / E0, theta_0 = Z^{1/3} / (k a_0),
    theta_E = 13.5 eV Z / (4 E), A = theta_E^2, B = theta_0^2:

        sigma_el   = 4 pi Z^{4/3} (gamma / k)^2
        sigma_inel = 4 pi Z gamma^2 / (k^4 a_0^2) int_0^inf [1 - (1 + u / B)^{-2}] (u + A)^{-2} du.

    Protein follows water within some tenths of a per cent, as its elements are light ones too.

    Args:
        voltage_kv: [kV].

    Reference:
        Rullgard et al. (2011), J. Microsc. 243, 234; the integral of the Lenz-Wentzel model is elementary.
    """
    k = 2 * math.pi / _HC_KEV_NM * math.sqrt(voltage_kv * (voltage_kv + 2 * _REST_ENERGY_KEV))
    gamma = 1 + voltage_kv / _REST_ENERGY_KEV
    return k / gamma * (_cross_section(8, voltage_kv, k, gamma) + 2 * _cross_section(1, voltage_kv, k, gamma))


def _cross_section(z: int, voltage_kv: float, k: float, gamma: float) -> float:
    elastic = 4 * math.pi * z ** (4 / 3) * (gamma / k) ** 2
    a = (0.0135 * z / (4 * voltage_kv)) ** 2
    b = (z ** (1 / 3) / (k * _BOHR_RADIUS_NM)) ** 2
    d = b - a
    integral = (a - 3 * b + 2 * b * b * math.log(b / a) / d) / (d * d)
    return elastic + 4 * math.pi * z * gamma**2 / (k**4 * _BOHR_RADIUS_NM**2) * integral


@cache
def _digest(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content; computed once for each state of the file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        state = path.stat()
        return _digest(str(path), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise InputError(f"Expected to read {str(path)!r}, got {error}. Correct the deck.") from error


def cache_key(particle: Component, folder: Path, binary: Path, voltage_kv: float) -> str:
    """A hash of all that a particle's maps depend on: files by content, not by name or date."""
    parts = {key: particle.get(key) for key in _PDB_KEYS}
    if particle.get("use_imag_pot"):
        parts["acc_voltage"] = voltage_kv
    for key in ("pdb_file_in", "pdb_transf_file_in"):
        name = particle.get(key)
        parts[key] = None if name is None else content_digest(folder / str(name))
    parts |= {"binary": content_digest(binary), "version": _VERSION}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@final
@dataclass(frozen=True)
class Maps:
    """A particle's maps on disk; `imaginary` is None where the particle has none."""

    real: Path
    imaginary: Path | None


def _found(folder: Path, imaginary: bool) -> Maps | None:
    """The maps in a folder, if all are there and as long as they say."""
    paths = [folder / REAL, folder / IMAGINARY] if imaginary else [folder / REAL]
    try:
        for path in paths:
            mrc.read_header(path)
    except (OSError, ValueError):
        return None
    return Maps(paths[0], paths[1] if imaginary else None)


def cached(root: Path, key: str, imaginary: bool, build: Callable[[Path], None]) -> Maps:
    """The maps of `key`, built where they are missing or damaged; safe under any number of processes.

    The folder appears under its name only when it is complete. Of processes that want the same maps at once, one
    builds and the others wait, where the file system can lock; else each builds, and the last one's stay.

    Args:
        root: the cache.
        key: see `cache_key`.
        imaginary: whether there are two maps.
        build: writes the maps into the empty folder that it is given.

    Raises:
        SetupError: the cache cannot be written.
        EvaluationError: the program wrote no maps.
    """
    folder = root / key
    if (found := _found(folder, imaginary)) is not None:
        return found
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{key}.lock"):
            if (found := _found(folder, imaginary)) is not None:
                return found
            new = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
            try:
                build(new)
                if _found(new, imaginary) is None:
                    raise EvaluationError(f"Expected whole maps of the particle in {new}, got none.")
                _put(new, folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
    except BridgeError:  # a time limit of ours is an OSError, too
        raise
    except OSError as error:
        raise SetupError(
            f"Expected a writable cache for the maps in {str(root)!r}, got {error}. Choose another by cache=."
        ) from error
    found = _found(folder, imaginary)
    if found is None:
        raise SetupError(f"Expected the maps in {str(folder)!r} just written, got none. Is something deleting them?")
    return found


def _put(new: Path, folder: Path) -> None:
    """Moves a complete folder to its place; what is there is damaged, or another process's equal one."""
    new.chmod(0o755)
    with contextlib.suppress(OSError):
        os.rename(new, folder)
        return
    for path in new.iterdir():
        os.replace(path, folder / path.name)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
