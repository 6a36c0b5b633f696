"""`TEMSim` against the program whose model it is, where the variable TEM_SIMULATOR names one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.tem.deck import Deck
from adapters.tem.simulator import TEMSimulator
from simulators.cryoet import TEMSim
from tests.lab.tem import COORDINATES, Lab, tables

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
pytestmark = pytest.mark.skipif(
    "TEM_SIMULATOR" not in os.environ, reason="no TEM-simulator: name the binary in the variable TEM_SIMULATOR"
)

# A wedge of alanines, denser than ice, without symmetry; some atoms so mobile that their Gaussians are wider.
PARTICLE = "".join(
    f"ATOM  {i:5d} {' NCO'[1 + i % 3]:>2}{'A' if i % 5 == 0 else ' '}  {('ALA', 'LYS', 'ILE')[i % 3]} A{i:4d}    "
    f"{2.0 * x:8.3f}{2.0 * y:8.3f}{2.0 * z:8.3f}  1.00{20.0 + 300 * (i % 7 == 0):6.2f}"
    f"          {' NCO'[1 + i % 3]:>2}\n"
    for i, (x, y, z) in enumerate(np.ndindex(16, 8, 6), start=1)
    if x + 2 * y < 24
)
NAMES = ("voltage_kv", "focal_length_mm", "x_nm", "y_nm", "z_nm", "defocus_um", "aperture_um")
AT = {"voltage_kv": 200, "focal_length_mm": 2.75, "x_nm": 1.3, "y_nm": -0.7, "z_nm": 0.0, "defocus_um": 5.0}
AT |= {"aperture_um": 50}
ROWS, COLUMNS = 48, 64


def both(tmp_path: Path, angles: tuple[float, float, float], cases: list[dict[str, float]], **sample: float) -> Any:
    """Images of the program and of `TEMSim` at the same settings; the program builds its maps at each voltage."""
    lab = Lab(tmp_path)
    (lab.folder / "p.pdb").write_text(PARTICLE)
    (lab.folder / "coordinates.txt").write_text(COORDINATES.replace("10 40 20", " ".join(map(str, angles))))
    thickness = {"thickness_center": 50, "thickness_edge": 150, "diameter": 1000} | sample
    deck = tables(detector={"det_pix_x": COLUMNS, "det_pix_y": ROWS}, optics={"magnification": 30000}, sample=thickness)
    program = TEMSimulator(
        Deck.from_tables(deck, lab.folder), NAMES, noise="none", cache=lab.cache, scratch=lab.scratch, exact_imag=True
    )
    ours = TEMSim(
        lab.folder / "p.pdb",
        shape=(ROWS, COLUMNS),
        parameters=NAMES,
        placement=dict(zip(("phi_deg", "theta_deg", "psi_deg"), angles, strict=True)),
        sample={f"{name}_nm": value for name, value in thickness.items()},
        optics={"energy_spread_ev": 1.3, "cs_mm": 2, "cc_mm": 2, "cond_ap_angle_mrad": 0.1},
    )
    inputs = np.array([[{**AT, **case}[name] for name in NAMES] for case in cases])
    seeds = np.zeros(len(inputs), dtype=np.uint64)
    return program(inputs, seeds), ours(inputs, seeds).astype(np.float64)


def misfit(theirs: Any, ours: Any) -> list[float]:
    """Root of the mean square difference of the contrasts, over the contrast's."""
    contrasts = [images / images.mean(axis=(1, 2), keepdims=True) - 1 for images in (theirs, ours)]
    return [float(np.sqrt(((a - b) ** 2).mean()) / a.std()) for a, b in zip(*contrasts, strict=True)]


@pytest.mark.parametrize("angles", [(0, 0, 0), (0, 90, 0), (90, 90, 0)])
def test_real_images_are_ours_where_axes_are_parallel(tmp_path: Path, angles: tuple[float, float, float]) -> None:
    cases: list[dict[str, float]] = [
        {},
        {"voltage_kv": 100},
        {"voltage_kv": 300, "focal_length_mm": 3},
        {"voltage_kv": 20},
        {"voltage_kv": 1000},
        {"focal_length_mm": 1},
        {"focal_length_mm": 12},
        {"aperture_um": 20},
        {"defocus_um": 1},
        {"defocus_um": -3},
        {"z_nm": 120},
        {"x_nm": -4.1, "y_nm": 2.2},
        {"x_nm": 1.325},
        {"defocus_um": 5.01},
    ]
    theirs, ours = both(tmp_path, angles, cases)
    # The program writes single precision, a rounding of 3e-8 of the mean; the contrast is 3e-3 of it.
    assert max(misfit(theirs, ours)) < 1e-4
    np.testing.assert_allclose(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2)), rtol=1e-6)
    # Power: a twentieth of a pixel, and a hundredth of a micrometre of defocus, are seen.
    assert min(misfit(theirs[[0, 0]], ours[-2:])) > 2e-4


def test_real_images_are_ours_in_any_orientation(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, (10, 40, 20), [{}, {"voltage_kv": 300}, {"x_nm": -2.0}])
    assert max(misfit(theirs, ours)) < 1e-4
    np.testing.assert_allclose(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2)), rtol=1e-6)


@pytest.mark.parametrize(("diameter", "edge"), [(30, 60), (1000, 50), (28, 0)])
def test_real_ice_of_any_shape(tmp_path: Path, diameter: float, edge: float) -> None:
    theirs, ours = both(tmp_path, (0, 0, 0), [{}], diameter=diameter, thickness_edge=edge)
    assert max(misfit(theirs, ours)) < 1e-4
    np.testing.assert_allclose(ours.mean(axis=(1, 2)), theirs.mean(axis=(1, 2)), rtol=1e-6)
