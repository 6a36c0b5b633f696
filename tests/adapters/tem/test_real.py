"""The TEM-simulator adapter against the real program, where the variable TEM_SIMULATOR names one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.tem.deck import Deck
from adapters.tem.simulator import TEMSimulator
from bridge.errors import EvaluationError, EvaluationTimeoutError
from tests.lab.tem import SERIES, Lab, at, tables


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


pytestmark = pytest.mark.skipif(
    "TEM_SIMULATOR" not in os.environ, reason="no TEM-simulator: name the binary in the variable TEM_SIMULATOR"
)


# A brick of carbon, denser than ice: what is not is hidden, as the program's potential is that of ice at least.
BRICK = "".join(
    f"ATOM  {i:5d}  CA  ALA A{i:4d}    {2.0 * x:8.3f}{2.0 * y:8.3f}{2.0 * z:8.3f}  1.00 20.00           C\n"
    for i, (x, y, z) in enumerate(np.ndindex(16, 8, 6), start=1)
)


def real_deck(lab: Lab, **changes: dict[str, Any]) -> Deck:
    (lab.folder / "p.pdb").write_text(BRICK)
    small = {"detector": {"det_pix_x": 64, "det_pix_y": 48}, "optics": {"magnification": 30000}}
    return Deck.from_tables(tables(**(small | changes)), lab.folder)


@pytest.fixture
def real_simulator(lab: Lab) -> Callable[..., TEMSimulator]:
    def make(parameters: tuple[str, ...], deck: Deck | None = None, **options: Any) -> TEMSimulator:
        options = {"cache": lab.cache, "scratch": lab.scratch, "noise": "none"} | options
        return TEMSimulator(deck or real_deck(lab), parameters, **options)

    return make


def test_real_cached_maps_give_the_images_of_the_structure(lab: Lab, real_simulator: Any) -> None:
    simulator, exact = (real_simulator(("voltage_kv", "x_nm"), exact_imag=e) for e in (False, True))
    at_reference = at(simulator)
    contrast = at_reference.std()
    assert at_reference.shape == (48, 64)
    assert contrast > 5
    assert np.abs(at(exact) - at_reference).max() < 1e-3 * contrast
    for kv in (100.0, 300.0):
        difference = at(simulator, voltage_kv=kv) - at(exact, voltage_kv=kv)
        assert difference.std() < 5e-3 * at(exact, voltage_kv=kv).std()


def test_real_shift_tilt_and_noise(lab: Lab, real_simulator: Any) -> None:
    # A pixel is 0.5 nm; the ice, which does not move, has to be flat.
    deck = real_deck(lab, sample={"thickness_edge": 50})
    simulator = real_simulator(("x_nm", "y_nm"), deck)
    left, right = at(simulator, x_nm=-1.0), at(simulator, x_nm=1.0)
    np.testing.assert_allclose(right[:, 6:-2], left[:, 2:-6], atol=1e-3 * left.std())
    both = real_simulator(("x_nm",), deck, noise="both")
    images = at(both, seed=3)
    np.testing.assert_array_equal(images, at(both, seed=3))
    np.testing.assert_array_equal(images[1], at(real_simulator(("x_nm",), deck)))
    assert not np.array_equal(images[0], at(both, seed=4)[0])
    # Noise is filtered by the MTF, so its variance is below that of counts; the mean is kept.
    assert abs((images[0] - images[1]).mean()) < 5 * np.sqrt(10 * images[1].mean() / 0.4 / images[1].size)


def test_real_series_by_tables_and_by_keys(lab: Lab, real_simulator: Any) -> None:
    deck = real_deck(lab, geometry=SERIES["geometry"])
    plain = at(real_simulator(("x_nm",), deck))
    names = ("tilt_deg[0]", "defocus_um[1]", "dose_e_per_nm2[2]", "shift_x_nm[1]", "image_rotation_deg[2]")
    simulator = real_simulator(names, deck)
    assert plain.shape == (3, 48, 64)
    # Focal lengths and doses go through text, so the last bits may differ.
    np.testing.assert_allclose(at(simulator), plain, rtol=1e-6)
    for name, image, value in (("shift_x_nm[1]", 1, 1.0), ("defocus_um[1]", 1, 2.0), ("tilt_deg[0]", 0, -40.0)):
        changed = np.abs(at(simulator, **{name: value}) - plain).max(axis=(1, 2)) > 1e-3
        assert changed.tolist() == [t == image for t in range(3)]


def test_real_tilt_and_height(lab: Lab, real_simulator: Any) -> None:
    """A tilt about x takes a particle at height z to y = -z sin(tilt); a positive one is to the right and below."""
    deck = real_deck(lab, geometry=SERIES["geometry"] | {"tilt_axis": 0}, sample={"thickness_edge": 50})
    simulator = real_simulator(("x_nm", "y_nm", "z_nm"), deck)
    images = at(simulator, x_nm=2.0, y_nm=3.0, z_nm=15.0)
    rows, columns = (np.arange(48)[:, None] - 23.5) * 0.5, (np.arange(64) - 31.5) * 0.5
    for image, tilt in zip(images, np.deg2rad([-20, 0, 20]), strict=True):
        weight = np.maximum(np.abs(image - np.median(image)) - 0.2 * np.ptp(image), 0)
        x, y = (float((weight * place).sum() / weight.sum()) for place in (columns, rows))
        assert x == pytest.approx(2.0, abs=0.5)
        assert y == pytest.approx(3.0 * np.cos(tilt) - 15.0 * np.sin(tilt), abs=0.5)


def test_real_refusals_are_failures(lab: Lab, real_simulator: Any) -> None:
    """What the table would not let through: the real program refuses it with exit status 0."""
    simulator = real_simulator(("x_nm",))
    simulator.prepare()
    (im,) = lab.cache.glob("*/im.mrc")
    deck = tables(particle={"source": "map", "pdb_file_in": None, "map_file_re_in": str(im), "map_file_im_in": "none"})
    with pytest.raises(EvaluationError, match="complaints"):
        at(real_simulator(("x_nm",), Deck.from_tables(deck, lab.folder)))
    with pytest.raises(EvaluationTimeoutError):
        at(
            real_simulator(("focal_length_mm",), timeout_s=0.5, bounds={"focal_length_mm": (0.01, 3)}),
            focal_length_mm=0.01,
        )
