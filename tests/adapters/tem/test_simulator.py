"""The adapter for TEM-simulator, against a stand-in that is run as a real process."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate

from adapters.tem import mrc
from adapters.tem.keys import KEYS
from adapters.tem.maps import absorption, cached, default_cache
from adapters.tem.simulator import PARAMETER_NAMES
from bridge.errors import EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.simulator.protocol import Simulator
from tests.lab.tem import NX, NY, PDB, SEED, SERIES, Lab, at, expected, tables


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


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
        ("shift_x_nm[2]", 2.0, 2),
        ("defocus_um[0]", 3.0, 0),
        ("dose_e_per_nm2[1]", 500.0, 1),
        ("tilt_deg[1]", 30.0, 1),
        ("image_rotation_deg[0]", 40.0, 0),
    ):
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
        geometry={
            "gen_tilt_data": False,
            "geom_file_in": "tilts",
            "ntilts": 3,
            "geom_errors": "file",
            "error_file_in": "errors",
            "theta_start": None,
            "theta_incr": None,
        },
        electronbeam={"gen_dose": False, "dose_file_in": "doses", "dose_per_im": None},
        optics={"gen_defocus": False, "defocus_file_in": "defoci", "defocus_nominal": None},
    )
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
    assert sorted(p.name for p in lab.cache.iterdir() if p.is_dir()) == [
        p.name for p in lab.cache.iterdir() if p.suffix != ".lock"
    ]


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
        cached(tmp_path, "key", True, lambda folder: mrc.write_stack(folder / "re.mrc", np.ones((2, 2, 2)), 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["key.lock"]


def test_ones_own_maps_are_used_as_they_are(lab: Lab) -> None:
    for name, value in (("r.mrc", 1.0), ("i.mrc", 0.5)):
        mrc.write_stack(lab.folder / name, np.full((4, 4, 4), value), 1.0)
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
    mrc.write_stack(lab.folder / "r.mrc", np.ones((4, 4, 4)), 1.0)
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


def test_outputs_live_in_mrc_files(lab: Lab) -> None:
    simulator = lab.make(("x_nm", "defocus_um[1]"), deck=tables(**SERIES), noise="both")
    output = at(simulator)
    path = str(lab.folder / "out.mrc")
    simulator.write_output(path, output)
    np.testing.assert_allclose(simulator.read_output(path), output, rtol=1e-6)
    assert mrc.read_header(Path(path)).voxel_angstrom[:2] == (10.0, 10.0)
    with pytest.raises(InputError, match="no mask"):
        simulator.write_output(path, np.ma.masked_greater(output, output.mean()))
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
        simulator,
        target,
        {"x_nm": 1.0, "y_nm": 0.0},
        seed=0,
        method=bridge.GaussNewton(steps=5, num_samples=8, scale=0.5),
    )
    error = simulator.space.vector(found.parameters) - np.array([2.0, -1.0])
    assert np.abs(error).max() < 0.1
