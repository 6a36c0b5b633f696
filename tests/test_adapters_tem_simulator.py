"""The adapter for TEM-simulator, against a stand-in that is run as a real process; and against the real one, if any."""

from __future__ import annotations

import io
import math
import os
import pickle
import shlex
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from adapters import _tem_mrc
from adapters._tem_deck import Component, Deck, read_table, table_text
from adapters._tem_keys import KEYS
from adapters._tem_maps import absorption, cached, default_cache
from adapters.tem_simulator import PARAMETER_NAMES, TEMSimulator
from bridge.errors import EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.simulator import Simulator

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


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def at(simulator: TEMSimulator, seed: int = 0, **values: float) -> np.ndarray[Any, Any]:
    """One run at the deck's own values, but for some."""
    x = simulator.space.mapping(simulator.reference) | values
    return simulator(simulator.space.vector(x)[None], np.array([seed], dtype=np.uint64))[0]


def expected(
    x: float, y: float, angles: tuple[float, float, float] = (10, 40, 20), *, kv: float = 200, defocus: float = 5,
    focal: float = 2.75, mu: float = 0.02, dose: float = 6000,
) -> np.ndarray[Any, Any]:  # fmt: skip
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


# --- what comes out -----------------------------------------------------------------------------------------------


def test_an_image_has_the_units_and_the_orientation_of_the_deck(lab: Lab) -> None:
    simulator = lab.make(("x_nm", "y_nm", "theta_deg", "psi_deg", "defocus_um", "focal_length_mm"))
    assert isinstance(simulator, Simulator)
    assert simulator.output_shape == (NY, NX)
    assert simulator.pixel_angstrom == 10.0
    assert simulator.reference.tolist() == [1.5, -2.0, 40.0, 20.0, 5.0, 2.75]
    image = at(simulator, x_nm=4.0, y_nm=3.0, theta_deg=70.0, psi_deg=-30.0, defocus_um=2.5, focal_length_mm=3.1)
    truth = expected(4.0, 3.0, (10, 70, -30), defocus=2.5, focal=3.1)
    np.testing.assert_allclose(image, truth, rtol=2e-6)
    assert np.ptp(truth) > 0.1 * truth.mean()
    assert lab.left() == []


def test_units_bounds_and_kinds_come_from_the_table(lab: Lab) -> None:
    names = ("voltage_kv", "focal_length_mm", "x_nm", "z_nm", "dose_e_per_nm2", "mtf_a")
    space = lab.make(names, bounds={"voltage_kv": (80, 400)}, natural_scale={"mtf_a": 0.25}).space
    assert [p.unit for p in space.parameters] == ["kV", "mm", "nm", "nm", "e/nm^2", ""]
    assert space.lower.tolist() == [80, 0.1, -12, -75, 0, 0]
    assert space.upper.tolist() == [400, 100, 12, 75, np.inf, 1]
    assert space.natural_scale.tolist() == [20, 0.3, 0.5, 50, 200, 0.25]
    assert [p.kind for p in space.parameters][:4] == ["continuous", "staircase", "continuous", "staircase"]


def test_every_numeric_key_can_be_varied_or_is_a_count(lab: Lab) -> None:
    for kind, keys in KEYS.items():
        for name, key in keys.items():
            if key.type == "float" and kind != "volume":
                never = name in ("voxel_size", "particle_conc", "occupancy")
                assert bool(key.parameter) is not never, f"{kind}.{name}"
    assert len(PARAMETER_NAMES) == len(set(PARAMETER_NAMES)) > 55


def test_parameters_reach_all_detectors_and_only_what_they_name(lab: Lab) -> None:
    simulator = lab.make(("gain", "dose_e_per_nm2", "pixel_size_um"), noise="both")
    twice = at(simulator, gain=20.0)
    once = at(simulator)
    assert simulator.output_shape == (2, NY, NX)
    np.testing.assert_allclose(twice[1], 2 * once[1], rtol=1e-6)
    np.testing.assert_allclose(at(simulator, dose_e_per_nm2=3000.0)[1], once[1] / 2, rtol=1e-6)
    assert at(simulator, pixel_size_um=30.0)[1].mean() == pytest.approx(4 * once[1].mean(), rel=0.1)


def test_noisy_and_clean_come_from_one_run(lab: Lab) -> None:
    both, noisy, clean = (lab.make(noise=noise) for noise in ("both", "noisy", "none"))
    images = at(both, seed=5)
    assert lab.started() == ["maps", "micrographs"]
    np.testing.assert_array_equal(images[0], at(noisy, seed=5))
    np.testing.assert_array_equal(images[1], at(clean, seed=5))
    deviation = (images[0] - images[1]) / np.sqrt(images[1] / 0.4)
    assert 0.7 < deviation.std() < 1.3
    assert not np.array_equal(at(noisy, seed=6), images[0])
    np.testing.assert_array_equal(at(lab.make(noise="deck"), seed=5), images[0])  # the deck's detector counts


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**63, 2**64 - 1])
def test_any_seed_is_a_seed_for_the_program(lab: Lab, seed: int) -> None:
    simulator = lab.make(noise="noisy", keep="all")
    np.testing.assert_array_equal(at(simulator, seed=seed), at(simulator, seed=seed))
    seeds = {line for d in lab.left() for line in (d / "input.txt").read_text().splitlines() if "rand_seed" in line}
    (value,) = {int(line.split()[-1]) for line in seeds if int(line.split()[-1]) != 1} or {1}
    assert 1 <= value < 2**31


def test_a_series_has_an_axis_of_images_and_parameters_of_single_ones(lab: Lab) -> None:
    names = ("x_nm", "shift_x_nm[2]", "defocus_um[0]", "dose_e_per_nm2[1]", "tilt_deg[1]", "image_rotation_deg[0]")
    simulator = lab.make(names, deck=tables(**SERIES))
    assert simulator.output_shape == (3, NY, NX)
    assert simulator.reference.tolist() == [1.5, 0.0, 5.0, 6000.0, 0.0, 0.0]
    before = at(simulator)
    np.testing.assert_allclose(before[1], expected(1.5, -2.0), rtol=2e-6)
    for name, value, image in (
        ("shift_x_nm[2]", 2.0, 2), ("defocus_um[0]", 3.0, 0), ("dose_e_per_nm2[1]", 500.0, 1),
        ("tilt_deg[1]", 30.0, 1), ("image_rotation_deg[0]", 40.0, 0),
    ):  # fmt: skip
        after = at(simulator, **{name: value})
        changed = [bool((after[t] != before[t]).any()) for t in range(3)]
        assert changed == [t == image for t in range(3)], name
    # A shift by two pixels is a shift by two pixels, and a smaller dose scales.
    np.testing.assert_allclose(at(simulator, **{"shift_x_nm[2]": 2.0})[2, :, 2:], before[2, :, :-2], rtol=2e-6)
    np.testing.assert_allclose(at(simulator, **{"dose_e_per_nm2[1]": 3000.0})[1], before[1] / 2, rtol=2e-6)


def test_tables_by_keys_and_by_files_are_the_same_series(lab: Lab) -> None:
    plain = at(lab.make(("x_nm",), deck=tables(**SERIES)))
    # An entry at its own value turns the keys into a table.
    table = lab.make(("tilt_deg[0]", "defocus_um[1]", "dose_e_per_nm2[2]", "shift_y_nm[0]"), deck=tables(**SERIES))
    np.testing.assert_allclose(at(table), plain, rtol=1e-6)
    (lab.folder / "tilts").write_text("4 3\n-30 -20 30\n-30 0 30\n-30 20 30\n0 0 0\n")
    (lab.folder / "doses").write_text("# e/nm^2\n3 1\n6000\n6000\n6000\n")
    (lab.folder / "defoci").write_text("3 1\n5\n5\n5\n")
    (lab.folder / "errors").write_text("3 5\n0 0 0 0 0\n0 0 0 0 0\n0 0 0 0 0\n")
    from_files = tables(
        geometry={"gen_tilt_data": False, "geom_file_in": "tilts", "ntilts": 3, "geom_errors": "file",
                  "error_file_in": "errors", "theta_start": None, "theta_incr": None},
        electronbeam={"gen_dose": False, "dose_file_in": "doses", "dose_per_im": None},
        optics={"gen_defocus": False, "defocus_file_in": "defoci", "defocus_nominal": None},
    )  # fmt: skip
    simulator = lab.make(("x_nm", "defocus_um[2]"), deck=from_files)
    np.testing.assert_allclose(at(simulator), plain, rtol=1e-6)
    assert at(simulator, **{"defocus_um[2]": 1.0})[2].min() > plain[2].min()


def test_several_particles_are_told_apart_by_numbers(lab: Lab) -> None:
    (lab.folder / "coordinates.txt").write_text("2 6\n-5 0 0 0 0 0\n0 0 0 0 0 0\n")
    (lab.folder / "more").write_text("2 6\n5 3 0 0 0 0\n0 -6 0 0 0 0\n")
    deck = tables()
    deck["particleset second"] = {**deck["particleset"], "coord_file_in": "more", "num_particles": 1}
    simulator = lab.make(("x_nm[0]", "x_nm[2]", "y_nm[2]"), deck=deck)
    assert simulator.reference.tolist() == [-5, 5, 3]
    image = at(simulator, **{"x_nm[0]": -4.0, "x_nm[2]": 6.0, "y_nm[2]": 2.0})
    mean = 10 * 6000 * math.exp(-0.02) * 1.27
    one = sum(1 - expected(x, y, (0, 0, 0)) / mean for x, y in ((-4, 0), (0, 0), (6, 2)))
    np.testing.assert_allclose(image, mean * (1 - one), rtol=2e-6)
    for name, said in (("x_nm", r"x_nm\[i\]"), ("x_nm[3]", "below 3")):
        with pytest.raises(InputError, match=said):
            lab.make((name,), deck=deck)


def test_both_dialects_give_the_same_image_for_the_same_pose(lab: Lab) -> None:
    names = ("x_nm", "phi_deg", "theta_deg", "psi_deg")
    plain = lab.make(names)
    fork = lab.make(names, binary=lab.binary("--dialect=zyz"), dialect="phase-plate", angles="zxz")
    for angles in ((10.0, 40.0, 20.0), (0.0, 0.0, 0.0), (-75.0, 120.0, 200.0)):
        pose = dict(zip(names[1:], angles, strict=True))
        np.testing.assert_allclose(at(fork, **pose), at(plain, **pose), rtol=2e-6)
    # Without `angles` the numbers are the fork's own, and mean another pose.
    own = lab.make(names, binary=lab.binary("--dialect=zyz"), dialect="phase-plate")
    assert np.abs(at(own) - at(plain)).max() > 100
    turned = at(own, phi_deg=10 + 90, psi_deg=20 - 90)
    np.testing.assert_allclose(turned, at(plain), rtol=2e-6)
    back = lab.make(names, angles="zyz")
    np.testing.assert_allclose(at(back, phi_deg=10 + 90, psi_deg=20 - 90), at(plain), rtol=2e-6)


def test_the_phase_plate_belongs_to_its_dialect(lab: Lab) -> None:
    deck = tables(optics={"phase_shift": 90.0})
    fork = lab.make(("phase_shift_deg",), deck=deck, binary=lab.binary("--dialect=zyz"), dialect="phase-plate")
    assert at(fork).shape == (NY, NX)
    with pytest.raises(InputError, match=r"dialect='phase-plate'"):
        lab.make(deck=deck)
    # The wrong dialect for a binary is seen in what it says: it ignores what it does not know.
    wrong = lab.make(("phase_shift_deg",), deck=deck, dialect="phase-plate")
    with pytest.raises(EvaluationError, match="Unknown parameter optics:phase_shift"):
        at(wrong)


def test_structure_says_which_images_a_parameter_touches(lab: Lab) -> None:
    names = ("x_nm", "defocus_um[2]", "shift_x_nm[0]")
    structure = lab.make(names, deck=tables(**SERIES)).structure
    assert structure is not None
    mask = structure.mask((3, NY, NX)).reshape(3, 3, -1)
    assert mask.all(axis=2).tolist() == [[True] * 3, [False, False, True], [True, False, False]]
    assert mask.any(axis=2).tolist() == mask.all(axis=2).tolist()
    assert lab.make(("x_nm",), deck=tables(**SERIES)).structure is None
    assert lab.make(names, deck=tables(**SERIES), noise="noisy").structure is None
    deck = tables(**SERIES)
    deck["detector second"] = dict(deck["detector"])
    two = lab.make(names, deck=deck)
    assert two.output_shape == (2, 3, NY, NX)
    assert two.structure is not None
    mask = two.structure.mask(two.output_shape).reshape(3, 2, 3, -1).all(axis=(1, 3))
    assert mask.tolist() == [[True] * 3, [False, False, True], [True, False, False]]


# --- maps ---------------------------------------------------------------------------------------------------------


def test_maps_are_built_once_for_all_simulators_and_processes(lab: Lab) -> None:
    first = lab.make()
    first.prepare()
    assert lab.started() == ["maps"]
    image = at(first)
    # The same content under another name, another construction, another process.
    (lab.folder / "other.pdb").write_text(PDB)
    second = lab.make(deck=tables(particle={"pdb_file_in": "other.pdb"}))
    np.testing.assert_array_equal(at(second), image)
    program = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb')).prepare()"
    (lab.folder / "pickle").write_bytes(pickle.dumps(first))
    subprocess.run([sys.executable, "-c", program, lab.folder / "pickle"], check=True, timeout=60)
    assert lab.started() == ["maps", "micrographs", "micrographs"]
    # No run but the first one reads the structure, and nothing else is in the cache.
    assert sorted(p.name for p in lab.cache.iterdir() if p.is_dir()) == [p.name for p in lab.cache.glob("*[!.lock]")]


@pytest.mark.parametrize(
    "changes",
    [
        {"particle": {"voxel_size": 0.2}},
        {"particle": {"add_hydrogen": False}},
        {"particle": {"pdb_transf_file_in": "transformations"}},
        {"electronbeam": {"acc_voltage": 300}},
    ],
)
def test_other_maps_are_built_where_something_differs(lab: Lab, changes: dict[str, dict[str, Any]]) -> None:
    (lab.folder / "transformations").write_text("1 6\n0 0 0 0 0 0\n")
    lab.make().prepare()
    lab.make(deck=tables(**changes)).prepare()
    assert lab.started() == ["maps", "maps"]
    (lab.folder / "p.pdb").write_text(PDB + PDB)
    lab.make(deck=tables(**changes)).prepare()
    assert len(lab.started()) == 3


def test_the_voltage_does_not_matter_to_a_particle_without_an_imaginary_map(lab: Lab) -> None:
    for kv in (200, 300):
        deck = tables(particle={"use_imag_pot": False, "famp": 0.1}, electronbeam={"acc_voltage": kv})
        image = at(lab.make(("famp",), deck=deck))
        np.testing.assert_allclose(image, expected(1.5, -2, kv=kv, mu=0.0), rtol=2e-6)
    assert lab.started() == ["maps", "micrographs", "micrographs"]
    assert [p.name for p in lab.cache.glob("*/*.mrc")] == ["re.mrc"]


def test_the_imaginary_map_follows_the_voltage(lab: Lab) -> None:
    rescaled, exact = lab.make(("voltage_kv",)), lab.make(("voltage_kv",), exact_imag=True)
    for kv in (200.0, 300.0, 80.0):
        mu = 0.02 * absorption(kv) / absorption(200.0)
        np.testing.assert_allclose(at(rescaled, voltage_kv=kv), expected(1.5, -2, kv=kv, mu=mu), rtol=2e-6)
        np.testing.assert_allclose(at(exact, voltage_kv=kv), expected(1.5, -2, kv=kv, mu=4.0 / kv), rtol=2e-6)
    assert lab.started().count("maps") == 1


def test_damaged_maps_are_built_again(lab: Lab) -> None:
    image = at(lab.make())
    (path,) = lab.cache.glob("*/im.mrc")
    path.write_bytes(path.read_bytes()[:-1])
    np.testing.assert_array_equal(at(lab.make()), image)
    (path,) = lab.cache.glob("*/re.mrc")
    path.unlink()
    np.testing.assert_array_equal(at(lab.make()), image)
    assert lab.started().count("maps") == 3


def test_many_processes_and_threads_share_one_build(lab: Lab) -> None:
    simulator = lab.make(binary=lab.binary("--slow=0.3"))
    (lab.folder / "pickle").write_bytes(pickle.dumps(simulator))
    program = (
        "import pickle, sys, numpy as np; s = pickle.load(open(sys.argv[1], 'rb'));"
        "np.save(sys.argv[2], s(s.reference[None], np.zeros(1, np.uint64)))"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(lab.folder / "pickle"), str(lab.folder / f"{i}.npy")])
        for i in range(2)
    ]
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(at(simulator))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [p.wait(60) for p in others] == [0, 0]
    for image in (*results, *(np.load(lab.folder / f"{i}.npy")[0] for i in range(2))):
        np.testing.assert_allclose(image, expected(1.5, -2.0), rtol=2e-6)
    assert len(results) == 3
    assert lab.started().count("maps") == 1
    assert lab.left() == []


def test_runs_side_by_side_do_not_meet(lab: Lab) -> None:
    simulator = lab.make()
    simulator.prepare()
    inputs = np.array([[x, y] for x in (-4.0, 0.0, 4.0) for y in (-2.0, 2.0)])
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        results[i] = simulator(inputs[i : i + 1], SEED)[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (x, y) in enumerate(inputs):
        np.testing.assert_allclose(results[i], expected(x, y), rtol=2e-6)


@pytest.mark.mpi
def test_ranks_share_one_build_and_agree_to_the_last_bit(run_ranks: Any, lab: Lab) -> None:
    (lab.folder / "pickle").write_bytes(pickle.dumps(lab.make(binary=lab.binary("--slow=0.3"))))
    program = """
        import pickle, sys
        import numpy as np, torch
        import bridge

        with open(sys.argv[1], "rb") as file:
            simulator = pickle.load(file)
        theta = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        value = bridge.smooth(simulator, seed=0, num_samples=4, scale=0.5)(theta)
        value.square().sum().backward()
        if bridge.is_root():
            np.save(sys.argv[2], np.append(value.detach().numpy(), theta.grad.numpy()))
        """
    results = []
    for n in (2, 1):
        done = run_ranks(n, program, lab.folder / "pickle", lab.folder / f"{n}.npy")
        assert done.returncode == 0, done.stderr
        results.append(np.load(lab.folder / f"{n}.npy"))
    np.testing.assert_array_equal(*results)
    assert np.abs(results[0][-2:]).min() > 0
    assert lab.started().count("maps") == 1
    assert lab.left() == []


def test_a_build_that_fails_leaves_no_maps_and_says_why(lab: Lab) -> None:
    (lab.folder / "p.pdb").write_text("")
    simulator = lab.make(mode="no-maps")
    with pytest.raises(EvaluationError, match="Particle map written"):
        simulator.prepare()
    assert [p for p in lab.cache.iterdir() if p.is_dir()] == []
    (directory,) = lab.left()  # of the run that failed
    assert (directory / "input.txt").exists()
    with pytest.raises(InputError, match=r"none\.pdb"):
        lab.make(deck=tables(particle={"pdb_file_in": "none.pdb"})).prepare()
    slow = lab.make(binary=lab.binary("--slow=30"), build_timeout_s=0.5)
    with pytest.raises(EvaluationTimeoutError, match=r"within 0\.5 s"):
        slow.prepare()


def test_a_cache_that_cannot_be_written(lab: Lab) -> None:
    (lab.folder / "file").write_text("")
    with pytest.raises(SetupError, match="cache"):
        lab.make(cache=lab.folder / "file" / "below").prepare()


def test_the_cache_is_where_the_desktop_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "simulation-bridge" / "tem-simulator"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert default_cache() == Path.home() / ".cache" / "simulation-bridge" / "tem-simulator"


def test_a_builder_that_writes_half_is_not_believed(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="whole maps"):
        cached(tmp_path, "key", True, lambda folder: _tem_mrc.write_stack(folder / "re.mrc", np.ones((2, 2, 2)), 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["key.lock"]


def test_ones_own_maps_are_used_as_they_are(lab: Lab) -> None:
    for name, value in (("r.mrc", 1.0), ("i.mrc", 0.5)):
        _tem_mrc.write_stack(lab.folder / name, np.full((4, 4, 4), value), 1.0)
    own = {"source": "map", "pdb_file_in": None, "map_file_re_in": "r.mrc", "map_file_im_in": "i.mrc"}
    image = at(lab.make(("voltage_kv",), deck=tables(particle=own)), voltage_kv=300.0)
    np.testing.assert_allclose(image, expected(1.5, -2, kv=300, mu=0.5), rtol=2e-6)
    assert lab.started() == ["micrographs"]


@pytest.mark.parametrize("kv", [1.0, 80.0, 200.0, 300.0, 1000.0, 1e4])
def test_absorption_is_the_integral_of_the_cross_sections(kv: float) -> None:
    k = 2 * np.pi / 1.23984198 * np.sqrt(kv * (kv + 2 * 510.99895))
    gamma, a0 = 1 + kv / 510.99895, 0.0529177211

    def sigma(z: int) -> float:
        screen, energy = z ** (1 / 3) / (k * a0), 0.0135 * z / (4 * kv)

        def elastic(log_angle: float) -> float:
            t = np.exp(log_angle)
            return 2 * np.pi * t * t * 4 * z ** (2 / 3) * (a0 * gamma / (1 + (t / screen) ** 2)) ** 2

        def inelastic(log_angle: float) -> float:
            t = np.exp(log_angle)
            part = gamma / (k * k * a0 * (t * t + energy * energy))
            return 2 * np.pi * t * t * 4 * z * part * part * (1 - (1 + (t / screen) ** 2) ** -2)

        return sum(integrate.quad(f, -30, 20, limit=500, epsabs=0, epsrel=1e-10)[0] for f in (elastic, inelastic))

    assert absorption(kv) == pytest.approx(k / gamma * (sigma(8) + 2 * sigma(1)), rel=1e-8)


# --- what can go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kind", "said"),
    [
        ("nan", EvaluationError, "1 of 384"),
        ("truncated", OutputError, "cut short"),
        ("cut-header", OutputError, "1024 bytes"),
        ("no-image", OutputError, r"image0\.mrc"),
        ("one-image-less", EvaluationError, r"1 images of 16 x 24"),
        ("unfinished", EvaluationError, r"Simulation complete.*did not end"),
        ("crash", EvaluationError, "SIGABRT"),
        ("exit-1", EvaluationError, "exit status 1"),
        ("no-log", EvaluationError, "tem.log of TEM-simulator, got none"),
    ],
)
def test_images_count_only_if_all_is_well(lab: Lab, mode: str, kind: type[Exception], said: str) -> None:
    _tem_mrc.write_stack(lab.folder / "r.mrc", np.ones((4, 4, 4)), 1.0)
    own = {"source": "map", "pdb_file_in": None, "map_file_re_in": "r.mrc", "use_imag_pot": False, "famp": 0.1}
    simulator = lab.make(mode=mode, deck=tables(particle=own))
    with pytest.raises(kind, match=said) as caught:
        at(simulator, x_nm=2.25)
    assert type(caught.value) is kind
    (directory,) = lab.left()
    message = str(caught.value)
    for part in ("x_nm = 2.25 nm", "seed 0", str(directory)):
        assert part in message
    assert ("last lines of tem.log" in message and "Generating micrographs" in message) == (mode != "no-log")
    assert (directory / "input.txt").exists()


def test_what_the_program_says_on_standard_error_is_no_failure(lab: Lab) -> None:
    np.testing.assert_array_equal(at(lab.make(mode="stderr")), at(lab.make()))


def test_a_hang_is_ended(lab: Lab) -> None:
    simulator = lab.make(mode="hang", timeout_s=1.0)
    with pytest.raises(EvaluationTimeoutError, match=r"within 1 s(.*\n)*.*Generating micrographs"):
        at(simulator)


def test_a_projection_that_fails_is_seen_although_the_log_says_complete(lab: Lab) -> None:
    simulator = lab.make()
    simulator.prepare()
    (path,) = lab.cache.glob("*/im.mrc")
    deck = tables(
        particle={"source": "map", "pdb_file_in": None, "map_file_re_in": str(path), "map_file_im_in": "none"}
    )
    with pytest.raises(EvaluationError, match="Error reading data from file") as caught:
        at(lab.make(deck=deck))
    assert "Simulation complete" in str(caught.value)


def test_no_program(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEM_SIMULATOR", raising=False)
    monkeypatch.setenv("PATH", str(lab.folder))
    simulator = lab.make(binary=None)
    with pytest.raises(SetupError, match="TEM-simulator"):
        at(simulator)
    monkeypatch.setenv("TEM_SIMULATOR", str(lab.folder / "absent"))
    with pytest.raises(SetupError, match="absent"):
        at(lab.make(binary=None))
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("TEM_SIMULATOR", str(lab.binary()))
    assert at(lab.make(binary=None)).shape == (NY, NX)


def test_queries_outside_are_treated_as_asked(lab: Lab) -> None:
    bounds = {"x_nm": (-3, 3)}
    simulator = lab.make(bounds=bounds)
    np.testing.assert_allclose(at(simulator, x_nm=50.0), expected(3.0, -2.0), rtol=2e-6)
    with pytest.raises(InputError, match=r"x_nm = 50 nm outside \[-3, 3\]"):
        at(lab.make(bounds=bounds, outside="raise"), x_nm=50.0)
    np.testing.assert_allclose(at(lab.make(bounds=bounds, outside="ignore"), x_nm=5.0), expected(5.0, -2.0), rtol=2e-6)
    # Where nobody clips, the program's own range is checked before it is started.
    before = len(lab.started())
    with pytest.raises(InputError, match=r"within \[1, 10000\] kV, got 0.5"):
        at(lab.make(("voltage_kv",), outside="ignore"), voltage_kv=0.5)
    assert len(lab.started()) == before


@pytest.mark.parametrize("inputs", [np.zeros((1, 3)), np.zeros(2), np.array([[0.0, np.nan]]), np.array([[np.inf, 0]])])
def test_inputs_are_checked(lab: Lab, inputs: Any) -> None:
    with pytest.raises(InputError, match=r"\(k, 2\)"):
        lab.make()(inputs, SEED)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parameters": ("volts",)}, "Known parameters: .*voltage_kv.*tilt_deg"),
        ({"parameters": ()}, "Known parameters"),
        ({"parameters": "x_nm"}, "list"),
        ({"parameters": ("shift_x_nm[1]",)}, "below 1"),
        ({"parameters": ("famp",)}, "use_imag_pot = False"),
        ({"parameters": ("grid_offset_x_nm",)}, "particle_coords = grid"),
        ({"parameters": ("total_dose_e_per_nm2",)}, "total_dose"),
        ({"parameters": ("defocus_um[0]",), "deck": tables(optics={"defocus_syst_error": 0.1})}, "defocus errors"),
        ({"parameters": ("shift_x_nm[0]",), "deck": tables(geometry={"geom_errors": "random"})}, "geom_errors"),
        ({"bounds": {"x_nm": (1.0,)}}, "lower, upper"),
        ({"bounds": {"z_nm": (0, 1)}}, "z_nm"),
        ({"parameters": ("voltage_kv",), "bounds": {"voltage_kv": (0.5, 300)}}, r"\[1, 10000\] kV"),
        ({"parameters": ("focal_length_mm",), "bounds": {"focal_length_mm": (0.001, 3)}}, r"\[0.01, inf\] mm"),
        ({"parameters": ("dqe",), "bounds": {"dqe": (0.0, 1.0)}}, "dqe"),
        ({"noise": "some"}, "deck, none, noisy, both"),
        ({"dialect": "2.0"}, r"v1\.3, phase-plate"),
        ({"angles": "xyx"}, "zxz, zyz"),
    ],
)  # fmt: skip
def test_arguments_are_checked_at_once(lab: Lab, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        lab.make(**options)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optics": {"cs": None}}, r"cs in the component 'optics'"),
        ({"optics": {"css": 2.0}}, "Unknown key 'css'.*Known keys: magnification"),
        ({"optic": {"cs": 2.0}}, "Unknown component 'optic'.*Known components: simulation"),
        ({"optics": {"focal_length": 0.001}}, r"\[0.01, inf\] mm, got 0.001"),
        ({"optics": {"cs": "two"}}, "finite number, got 'two'"),
        ({"optics": {"cs": float("nan")}}, "finite"),
        ({"optics": {"defocus_nominal": None}}, "defocus_nominal"),
        ({"electronbeam": {"acc_voltage": 20000}}, r"\[1, 10000\] kV"),
        ({"electronbeam": {"total_dose": 100.0}}, "both"),
        ({"electronbeam": {"dose_per_im": None}}, "dose_per_im"),
        ({"electronbeam": {"gen_dose": "maybe"}}, "yes or no"),
        ({"electronbeam": {"gen_dose": False}}, "dose_file_in"),
        ({"detector": {"det_pix_x": 10.5}}, "integer"),
        ({"detector": {"det_pix_x": 20000}}, "10000"),
        ({"detector": {"dqe": 0.001}}, "dqe"),
        ({"detector": {"image_file_format": "png"}}, "mrc, mrc-int, raw"),
        ({"particle": {"source": "cif"}}, "pdb, map, random"),
        ({"particle": {"pdb_file_in": None}}, "pdb_file_in"),
        ({"particle": {"use_imag_pot": False}}, "famp"),
        ({"particle": {"source": "map"}}, "map_file_re_in, map_file_im_in"),
        ({"particle": {"source": "random"}}, "contrast_re, smoothness, make_positive"),
        ({"particle": {"voxel_size": 20.0}}, "voxel_size"),
        ({"particle": {"pdb_file_in": 'a"b'}}, "text"),
        ({"particleset": {"particle_type": "Q"}}, r"\['P'\]"),
        ({"particleset": {"num_particles": 5}}, "num_particles = 5"),
        ({"particleset": {"coord_file_in": "nothing"}}, "table"),
        ({"particleset": {"particle_coords": "grid"}}, "particle_dist"),
        ({"geometry": {"ntilts": 0}}, "ntilts"),
        ({"geometry": {"gen_tilt_data": False}}, "geom_file_in"),
        ({"geometry": {"geom_errors": "file"}}, "error_file_in"),
        ({"geometry second": {}}, "at most 1 geometry"),
        ({"particle " + "n" * 50: {}}, "at most 49"),
        ({"detector second": {**DETECTOR, **MTF, "det_pix_x": 12}}, r"one size.*\(16, 12\), \(16, 24\)"),
    ],
)  # fmt: skip
def test_a_deck_that_the_program_would_refuse_is_refused_before(lab: Lab, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        lab.make(deck=tables(**changes))
    assert lab.started() == []


@pytest.mark.parametrize("missing", ["sample", "geometry", "electronbeam", "optics", "detector"])
def test_missing_components(lab: Lab, missing: str) -> None:
    deck = tables()
    del deck[missing]
    with pytest.raises(InputError, match=f"component '{missing}'"):
        lab.make(deck=deck)


def test_too_many_components(lab: Lab) -> None:
    many = {f"detector {i}": {**DETECTOR, **MTF} for i in range(10)}
    with pytest.raises(InputError, match="at most 10 detector"):
        lab.make(deck=tables(**many))


# --- decks as files -----------------------------------------------------------------------------------------------


def write_deck(lab: Lab, deck: dict[str, dict[str, Any]]) -> Path:
    path = lab.folder / "sub" / "input.txt"
    path.parent.mkdir()
    for name in ("p.pdb", "coordinates.txt"):
        (lab.folder / name).rename(path.parent / name)
    path.write_text("# a comment\n" + Deck.from_tables(deck).text())
    return path


def test_a_deck_from_a_file_is_read_relative_to_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    deck = tables()
    deck["simulation"] = {
        "generate_micrographs": True,
        "generate_volumes": True,
        "log_file": "mine.log",
        "rand_seed": 3,
    }
    deck["volume"] = {"voxel_size": 0.1, "nx": 9, "ny": 9, "nz": 9, "map_file_re_out": "volume.mrc"}
    deck["particle P"] |= {"map_file_re_out": "/nowhere/r.mrc", "map_file_im_out": "/nowhere/i.mrc"}
    deck["detector"]["image_file_out"] = "/nowhere/image.mrc"
    path = write_deck(lab, deck)
    options: dict[str, Any] = {"binary": lab.binary(), "cache": "cache", "scratch": "scratch", "noise": "none"}
    for given_as in ("sub/input.txt", {"file": "sub/input.txt"}, Deck.read(path)):
        monkeypatch.chdir(lab.folder)
        simulator = TEMSimulator(given_as, ["x_nm"], **options)
        simulator.prepare()
        monkeypatch.chdir(lab.folder / "sub")
        np.testing.assert_allclose(at(simulator, x_nm=2.0), expected(2.0, -2.0), rtol=2e-6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cs = 2\n", "line 1"),
        ("=== optics ===\ncs\n", "line 2"),
        ("=== optics ===\n= =\n", "line 2"),
        ("=== optics ===\ncs =\n", "line 2"),
        ("=== a b c ===\n", "line 1"),
        ("=== optics ===\ncs = " + "1" * 196 + "\n", "200 bytes"),
        ("=== optics ===\nCS = 2\n", "Unknown key 'CS'"),
    ],
)
def test_decks_that_cannot_be_parsed(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "input.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        Deck.read(tmp_path / "input.txt")


def test_no_deck(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="deck"):
        Deck.read(tmp_path / "none")
    with pytest.raises(InputError, match="int"):
        TEMSimulator(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="table of keys"):
        TEMSimulator({"optics": 3})


def test_lines_that_would_be_cut_are_refused_and_long_paths_do_no_harm(lab: Lab) -> None:
    with pytest.raises(InputError, match="at most 200 bytes"):
        Deck((Component.of("particle", "", {"source": "pdb", "pdb_file_in": "p" * 200}),)).text()
    deep = lab.folder / ("d" * 120) / ("e" * 120)
    deep.mkdir(parents=True)
    (lab.folder / "p.pdb").rename(deep / "a file.pdb")
    deck = tables(particle={"pdb_file_in": str(deep / "a file.pdb")})
    np.testing.assert_allclose(at(lab.make(deck=deck, cache=deep)), expected(1.5, -2.0), rtol=2e-6)


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.integers(1, 10**4),
    st.text("ab c'é", min_size=1),
)
def test_values_survive_writing_and_reading(
    tmp_path_factory: Any, real: float, yes: bool, count: int, text: str
) -> None:
    if not text.strip() or text != text.strip():
        text = "x"
    path = tmp_path_factory.mktemp("deck") / "input.txt"
    tables_ = {"optics": {"cs": real, "gen_defocus": yes}, "detector d": {"det_pix_x": count, "image_file_out": text}}
    deck = Deck.from_tables(tables_)
    path.write_text(deck.text())
    again = Deck.read(path)
    assert [dict(c.values) for c in again.components] == [dict(c.values) for c in deck.components]
    assert [c.heading for c in again.components] == ["optics", "detector d"]


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3), min_size=1, max_size=5))
def test_tables_survive_writing_and_reading(tmp_path_factory: Any, rows: list[tuple[float, ...]]) -> None:
    path = tmp_path_factory.mktemp("table") / "t"
    path.write_text("# comment\n" + table_text(np.array(rows)))
    np.testing.assert_array_equal(read_table(path, (3,)), np.array(rows))


@pytest.mark.parametrize("text", ["", "2 3\n1 2 3\n", "1 3\n1 2\n", "1 2\n1 2\n", "1 3\n1 nan 2\n", "x"])
def test_tables_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError):
        read_table(tmp_path / "t", (3,))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("mode", "dtype"), [(1, "i2"), (2, "f4")])
@pytest.mark.parametrize("stamp", [b"\x44\x11\0\0", b"\x44\x44\0\0", b"\x11\x11\0\0", b"\0\0\0\0"])
def test_byte_order_is_found_whatever_the_stamp(
    tmp_path: Path, order: str, mode: int, dtype: str, stamp: bytes
) -> None:
    data = np.arange(24, dtype=f"{order}{dtype}").reshape(2, 3, 4)
    raw = bytearray(1024)
    struct.pack_into(f"{order}4i", raw, 0, 4, 3, 2, mode)
    struct.pack_into(f"{order}3i3f", raw, 28, 4, 3, 2, 20.0, 15.0, 10.0)
    struct.pack_into(f"{order}i", raw, 92, 6)
    raw[212:216] = stamp
    (tmp_path / "a.mrc").write_bytes(bytes(raw) + b"\1" * 6 + data.tobytes())
    read, header = _tem_mrc.read(tmp_path / "a.mrc")
    np.testing.assert_array_equal(read, data)
    assert header.voxel_angstrom == (5.0, 5.0, 5.0)


# mrcfile 1.5 sets an array's dtype in place, which numpy 2.5 deprecates.
@pytest.mark.filterwarnings("ignore:Setting the dtype on a NumPy array:DeprecationWarning")
def test_stacks_are_mrc2014(tmp_path: Path) -> None:
    mrcfile = pytest.importorskip("mrcfile", reason="mrcfile is optional (extra `cryoet`)")
    data = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    _tem_mrc.write_stack(tmp_path / "a.mrc", data, 2.5)
    said = io.StringIO()
    assert mrcfile.validate(tmp_path / "a.mrc", print_file=said), said.getvalue()
    with mrcfile.open(tmp_path / "a.mrc") as file:
        np.testing.assert_array_equal(file.data, data)
        assert file.is_image_stack()
        assert file.header.dmean == pytest.approx(data.mean(), abs=1e-6)


def test_outputs_live_in_mrc_files(lab: Lab) -> None:
    simulator = lab.make(("x_nm", "defocus_um[1]"), deck=tables(**SERIES), noise="both")
    output = at(simulator)
    path = str(lab.folder / "out.mrc")
    simulator.write_output(path, output)
    np.testing.assert_allclose(simulator.read_output(path), output, rtol=1e-6)
    assert _tem_mrc.read_header(Path(path)).voxel_angstrom[:2] == (10.0, 10.0)
    with pytest.raises(InputError, match=r"\(16, 24\)"):
        lab.make().read_output(path)
    with pytest.raises(InputError, match="none"):
        simulator.read_output("none")


def test_the_bridge_fits_it(lab: Lab) -> None:
    """The whole way: a simulator of an external program under the bridge, with one shift recovered from an image."""
    import bridge

    bounds = {"x_nm": (-8, 8), "y_nm": (-6, 6)}
    simulator = lab.make(bounds=bounds)
    target = at(simulator, x_nm=2.0, y_nm=-1.0)
    found = bridge.fit(
        simulator, target, {"x_nm": 1.0, "y_nm": 0.0}, seed=0, method="gauss-newton", steps=5, num_samples=8, scale=0.5
    )
    error = simulator.space.vector(found.parameters) - np.array([2.0, -1.0])
    assert np.abs(error).max() < 0.1


# --- the real program ---------------------------------------------------------------------------------------------

real = pytest.mark.skipif(
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


@real
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


@real
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


@real
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


@real
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


@real
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
