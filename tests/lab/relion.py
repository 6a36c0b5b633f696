"""A small tilt series for the tests of RELION's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from simulators.cryoet import Detector, Particle, Specimen, TiltScheme, TiltSeries

BEAD = Specimen.from_atoms([[0.0, 0.0, 0.0]], [79], weights=[200.0], b_factors=2000.0)
POSES = np.array([[11.5, -70.25, 33.0, 10.0, 100.0, -20.0], [-5.125, 8.0, -41.0, -170.0, 35.5, 120.25]])
SHIFTS = np.array([[3.0, -2.0], [40.0, 8.0], [-17.0, 0.5]])
DEFOCI = [2.5, 3.25, 2.875]
IMAGES = np.arange(3 * 10 * 13, dtype=np.float32).reshape(3, 10, 13)


def series(
    shape: tuple[int, int] = (10, 13),
    axis: float = 85.3,
    shifts: Any = SHIFTS,
    poses: np.ndarray = POSES,
    x_tilt: float = 1.5,
    direction: float = 30.5,
) -> TiltSeries:
    microscope = {
        "voltage_kv": 200.0,
        "cs_mm": 1.4,
        "amplitude_contrast": 0.1,
        "astigmatism_um": 0.125,
        "astigmatism_angle_deg": direction,
    }
    return TiltSeries(
        [Particle(BEAD, *pose) for pose in poses.tolist()],
        TiltScheme((-40.0, 2.0, 44.0), (2, 0, 1)),
        shape,
        4.5,
        microscope,
        Detector(dose_e_per_angstrom2=3.5),
        [f"defocus_um[{t}]" for t in range(3)],
        tilt_axis_deg=axis,
        x_tilt_deg=x_tilt,
        pre_tilt_deg=-3.0,
        shifts_angstrom=np.asarray(shifts).tolist(),
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
