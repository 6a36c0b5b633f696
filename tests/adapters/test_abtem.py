"""abTEM as a simulator: what it refuses without abTEM, and with it geometry, signs, caches, and CryoET's image."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pickle
import subprocess
import sys

import numpy as np
import pytest

from adapters.abtem import PARAMETER_NAMES, AbTEM
from bridge.errors import InputError, SetupError
from bridge.simulator.protocol import Simulator

ATOMS = {"positions": [[0.0, 0.0, 0.0], [9.0, 2.0, 1.0]], "numbers": [16, 8]}
SEEDS = np.zeros(1, dtype=np.uint64)

needs_abtem = pytest.mark.skipif(
    importlib.util.find_spec("abtem") is None, reason="abTEM is not installed (the optional dependency `abtem`)"
)


def simulator(atoms=None, **changes) -> AbTEM:
    settings = dict(shape=(32, 34), pixel_size_angstrom=1.0, margin_pixels=8, centre=False, oversampling=2)
    return AbTEM(ATOMS if atoms is None else atoms, **{**settings, **changes})


# --- without abTEM ------------------------------------------------------------------------------------------------


def test_importing_the_adapter_imports_neither_abtem_nor_torch() -> None:
    program = "import adapters.abtem, sys; print([m for m in ('abtem', 'ase', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_missing_abtem_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "abtem", None)
    sim = simulator()
    with pytest.raises(SetupError, match=r"pip install .simulation-bridge\[abtem\]"):
        sim(sim.reference[None], SEEDS)


def test_space_and_settings() -> None:
    sim = simulator(
        parameters=("defocus_um", "voltage_kv"), settings={"defocus_um": 2.0}, bounds={"defocus_um": (1, 3)}
    )
    assert isinstance(sim, Simulator)
    assert sim.space.names == ("defocus_um", "voltage_kv")
    assert sim.reference.tolist() == [2.0, 300.0]
    assert (sim.space.lower[0], sim.space.upper[0]) == (1, 3)
    assert sim.output_shape == (32, 34)
    assert inspect.getdoc(AbTEM).startswith("Micrographs of atoms in vacuum")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": ["voltage"]}, r"Unknown parameter 'voltage'\. Known parameters: voltage_kv"),
        ({"parameters": "voltage_kv"}, "list of parameter names"),
        ({"settings": {"voltage_kv": 1e5}}, r"voltage_kv in \[20, 1000\] kV"),
        ({"bounds": {"voltage_kv": (1, 2)}}, "in bounds"),
        ({"bounds": {"defocus_um": (-99, 2)}}, "bounds of defocus_um"),
        ({"noise": "full"}, "Unknown noise='full'"),
        ({"parametrization": "weak"}, "Unknown parametrization"),
        ({"shape": (4, 4)}, "shape"),
        ({"oversampling": 0}, "oversampling"),
        ({"atoms": {"positions": [[0, 0, 0]], "numbers": [0]}}, "atomic numbers"),
        ({"atoms": {"positions": [[0, 0]], "numbers": [1]}}, "positions"),
        ({"atoms": {"places": []}}, "positions and numbers"),
        ({"atoms": 3}, "ase.Atoms, a path or a table"),
        ({"atoms": "absent.pdb"}, "found none"),
    ],
)
def test_settings_that_make_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        simulator(**changes)


def test_rows_that_are_refused_before_anything_is_loaded() -> None:
    sim = simulator()
    with pytest.raises(InputError, match=r"inputs of shape \(k, 3\)"):
        sim(np.zeros((1, 2)), SEEDS)
    with pytest.raises(InputError, match="inside the bounds"):
        sim(np.array([[99.0, 0.0, 0.0]]), SEEDS)
    with pytest.raises(InputError, match="inside the bounds"):
        sim(np.array([[np.nan, 0.0, 0.0]]), SEEDS)


# --- with abTEM ---------------------------------------------------------------------------------------------------


@needs_abtem
def test_plus_x_is_right_and_plus_y_is_down_and_matter_is_dark_at_underfocus() -> None:
    sim = simulator({"positions": [[0.0, 0.0, 0.0]], "numbers": [79]}, settings={"defocus_um": 0.05, "cs_mm": 0.0})
    still = sim(np.array([[0.05, 0.0, 0.0]]), SEEDS)[0]
    assert np.unravel_index(int(still.argmin()), still.shape) == (16, 17)
    moved = sim(np.array([[0.05, 3.0, 5.0]]), SEEDS)[0]
    assert np.abs(moved[5:, 3:] - still[:-5, :-3]).max() < 1e-3 * still.std()
    assert sim(np.array([[-0.05, 0.0, 0.0]]), SEEDS)[0][16, 17] > 40.0 > still[16, 17]
    assert still.mean() == pytest.approx(40.0, rel=0.01)


@needs_abtem
def test_height_adds_to_the_underfocus() -> None:
    low, high = ({"positions": [[0.0, 0.0, z]], "numbers": [79]} for z in (0.0, 40.0))
    settings = dict(oversampling=4, slice_thickness_angstrom=1.0)
    one = simulator(low, **settings)(np.array([[0.024, 0.0, 0.0]]), SEEDS)[0]
    other = simulator(high, **settings)(np.array([[0.02, 0.0, 0.0]]), SEEDS)[0]
    wrong = simulator(high, **settings)(np.array([[0.028, 0.0, 0.0]]), SEEDS)[0]
    assert (other - one).std() < 0.15 * one.std() < (wrong - one).std()


@needs_abtem
def test_a_row_alone_in_company_and_in_another_process_has_the_same_bits() -> None:
    sim = simulator(parameters=("defocus_um", "rotation_deg", "x_angstrom"), noise="poisson")
    random = np.random.default_rng(0)
    rows = random.uniform([0.1, -10, -3], [1, 10, 3], (6, 3))
    rows[3, 1] = rows[0, 1]  # a potential that is used again
    seeds = np.arange(6, dtype=np.uint64)
    together = sim(rows, seeds)
    fresh = simulator(parameters=("defocus_um", "rotation_deg", "x_angstrom"), noise="poisson")
    np.testing.assert_array_equal(fresh(rows[3:4], seeds[3:4])[0], together[3])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(sim))(rows[::-1], seeds[::-1])[::-1], together)
    assert len(sim._potentials) <= 4
    assert not np.array_equal(sim(rows[:1], seeds[1:2]), together[:1])
    assert together.dtype == np.float32
    assert (together == together.round()).all()


@needs_abtem
def test_every_parameter_acts() -> None:
    sim = simulator(
        parameters=PARAMETER_NAMES,
        settings={
            "focal_spread_angstrom": 30.0,
            "convergence_mrad": 0.05,
            "aperture_mrad": 12.0,
            "astigmatism_um": 0.1,
        },
    )
    here = sim(sim.reference[None], SEEDS)[0]
    for k, p in enumerate(sim.space.parameters):
        moved = sim.reference.copy()
        moved[k] += p.natural_scale
        assert np.abs(sim(moved[None], SEEDS)[0] - here).max() > 2e-4, p.name


@needs_abtem
def test_a_thin_specimen_has_cryoets_image() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")
    from simulators.cryoet import CryoET, Detector, Microscope, Specimen
    from simulators.cryoet.specimen.potential import Projector

    random = np.random.default_rng(0)
    places, numbers = random.uniform(-1, 1, (300, 3)) * [16, 16, 3], random.choice([6, 7, 8, 16], 300)
    lens = dict(voltage_kv=300.0, defocus_um=0.5, cs_mm=2.7, astigmatism_um=0.1, astigmatism_angle_deg=25.0)
    ideal = dict(amplitude_contrast=0.0, energy_spread_ev=0.0, convergence_mrad=0.0, aperture_um=0.0)
    names = ("defocus_um", "x_angstrom", "y_angstrom")
    specimen = Specimen.from_atoms(places, numbers)
    ours = CryoET(
        specimen,
        (48, 48),
        1.0,
        Microscope(**lens, **ideal, b_factor_angstrom2=0.0),
        Detector(40.0),
        names,
        mode="smooth",
        margin_pixels=48,
    )
    # In vacuum: the projection without displaced solvent.
    vacuum = Projector.of(specimen, 1.0, hard_solvent=True, reach_angstrom=ours._reach())
    ours._projections[ours._projection_key()] = dataclasses.replace(vacuum, hard_solvent=False).build()
    theirs = AbTEM(
        {"positions": places, "numbers": numbers},
        (48, 48),
        1.0,
        names,
        lens,
        parametrization="peng",
        margin_pixels=48,
        centre=False,
    )
    theta = np.array([0.5, 2.3, -1.7])
    a, b = ours.electrons(torch.from_numpy(theta)).numpy(), theirs(theta[None], SEEDS)[0].astype(np.float64)
    assert b.mean() == pytest.approx(a.mean(), rel=1e-3)
    difference, contrast = (np.fft.fft2(image - image.mean()) for image in (b - a, a))
    q = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.fftfreq(48))
    for low, high, limit in ((0.02, 0.2, 0.05), (0.2, 0.4, 0.1)):
        band = (q >= low) & (q < high)
        assert np.linalg.norm(difference[band]) < limit * np.linalg.norm(contrast[band])
