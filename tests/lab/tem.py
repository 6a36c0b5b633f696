"""Where the tests of the TEM-simulator adapter run: a deck, its files, the stand-in, and what it ought to give."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np

from adapters.tem.deck import Deck
from adapters.tem.simulator import TEMSimulator

STAND_IN = Path(__file__).with_name("tem_stand_in.py")
SEED = np.zeros(1, dtype=np.uint64)
NX, NY = 24, 16

PDB = "".join(
    f"ATOM  {i:5d}  CA  ALA A{i:4d}    {12 * math.cos(i):8.3f}{12 * math.sin(1.3 * i):8.3f}{1.5 * i - 15:8.3f}"
    "  1.00 20.00           C\n"
    for i in range(1, 21)
)
COORDINATES = "# one particle\n1 6\n1.5 -2.0 0 10 40 20\n"

BEAM = {"acc_voltage": 200, "energy_spread": 1.3, "gen_dose": True, "dose_per_im": 6000.0}
OPTICS = {"magnification": 15000, "gen_defocus": True, "defocus_nominal": 5, "cs": 2, "cc": 2, "aperture": 50}
DETECTOR = {"det_pix_x": NX, "det_pix_y": NY, "pixel_size": 15, "gain": 10, "use_quantization": True, "dqe": 0.4}
MTF = {"mtf_a": 0.7, "mtf_b": 0.2, "mtf_c": 0.1, "mtf_alpha": 10, "mtf_beta": 40}
PIXEL_NM = 1.0


def tables(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A deck; `optics={"cs": None}` leaves a key out."""
    deck: dict[str, dict[str, Any]] = {
        "sample": {"diameter": 1000, "thickness_center": 50, "thickness_edge": 150},
        "particle P": {"source": "pdb", "voxel_size": 0.1, "pdb_file_in": "p.pdb"},
        "particleset": {"particle_type": "P", "particle_coords": "file", "coord_file_in": "coordinates.txt"},
        "geometry": {"gen_tilt_data": True, "ntilts": 1, "theta_start": 0, "theta_incr": 0, "geom_errors": "none"},
        "electronbeam": dict(BEAM),
        "optics": {**OPTICS, "focal_length": 2.75, "cond_ap_angle": 0.1},
        "detector": {**DETECTOR, **MTF},
    }
    for heading, values in changes.items():
        name = {"particle": "particle P"}.get(heading, heading)
        merged = {**deck.get(name, {}), **values}
        deck[name] = {k: v for k, v in merged.items() if v is not None}
    return deck


SERIES = {"geometry": {"ntilts": 3, "theta_start": -20, "theta_incr": 20, "tilt_axis": 30}}


class Lab:
    """A folder with a deck's files, stand-ins, a cache and a scratch directory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.scratch, self.cache = folder, folder / "scratch", folder / "cache"
        self.calls = folder / "calls"
        (folder / "p.pdb").write_text(PDB)
        (folder / "coordinates.txt").write_text(COORDINATES)

    def binary(self, *options: str) -> Path:
        """An executable that runs the stand-in with options."""
        path = self.folder / f"TEM {'-'.join(o.strip('-').replace('/', '') for o in options)[:60]}"
        words = [sys.executable, "-SE", str(STAND_IN), f"--calls={self.calls}", *options]
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)
        return path

    def make(
        self, parameters: Any = ("x_nm", "y_nm"), *, deck: Any = None, mode: str = "", **options: Any
    ) -> TEMSimulator:
        options = {"noise": "none", "cache": self.cache, "scratch": self.scratch, "timeout_s": 60.0} | options
        if "binary" not in options:
            options["binary"] = self.binary(*([f"--mode={mode}"] if mode else []))
        deck = Deck.from_tables(deck or tables(), self.folder)
        return TEMSimulator(deck, parameters, **options)

    def started(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []

    def left(self) -> list[Path]:
        return sorted(self.scratch.iterdir()) if self.scratch.exists() else []


def at(simulator: TEMSimulator, seed: int = 0, **values: float) -> np.ndarray[Any, Any]:
    """One run at the deck's own values, but for some."""
    x = simulator.space.mapping(simulator.reference) | values
    return simulator(simulator.space.vector(x)[None], np.array([seed], dtype=np.uint64))[0]


def expected(
    x: float,
    y: float,
    angles: tuple[float, float, float] = (10, 40, 20),
    *,
    kv: float = 200,
    defocus: float = 5,
    focal: float = 2.75,
    mu: float = 0.02,
    dose: float = 6000,
) -> np.ndarray[Any, Any]:
    """The stand-in's formula once more, for one untilted particle."""
    # R_z(psi) R_x(theta) R_z(phi) (0, 0, 1)
    theta, psi = np.deg2rad(angles[1:])
    u = 3 * np.array([np.sin(theta) * np.sin(psi), -np.sin(theta) * np.cos(psi)])
    columns, rows = (np.arange(NX) - (NX - 1) / 2) * PIXEL_NM, (np.arange(NY)[:, None] - (NY - 1) / 2) * PIXEL_NM

    def ball(a: float, b: float) -> np.ndarray[Any, Any]:
        return np.exp(-((columns - a) ** 2 + (rows - b) ** 2) / 8)

    blob = ball(x, y) + 0.5 * ball(x + u[0], y + u[1])
    mean = 10 * dose * PIXEL_NM**2 * math.exp(-mu) * (1 + 0.01 * math.floor(10 * focal))
    return mean * (1 - 0.1 * (200 / kv) * (1 + 0.1 * defocus) * blob)
