"""Structures that deform: elastic networks, hinged domains, and both as parameters of a micrograph."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import InputError
from simulators.cryoet import CryoET, Deformation, Domain, Microscope, Pose, Residues, Specimen, elastic_modes
from simulators.cryoet.specimen.deformation import hessian, rigid_motions

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

EXAMPLES = Path(__file__).resolve().parents[4] / "examples"
HINGE = EXAMPLES / "data" / "6wg6.cif.gz"
SEEDS = np.zeros(1, dtype=np.uint64)


@pytest.fixture(scope="module")
def protein() -> Specimen:
    return Specimen.from_file(HINGE)


def cloud(n: int, seed: int = 0, size: float = 20.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-size, size, (n, 3))


def beads(n: int = 12, seed: int = 1) -> Specimen:
    """A small structure of two atoms a residue, each residue a node at its first."""
    nodes = cloud(n, seed)
    places = np.stack((nodes, nodes + 1.5), axis=1).reshape(-1, 3)
    number = np.repeat(np.arange(n), 2)
    residues = Residues(number, np.where(number < n // 2, "A", "B"), 10 + number, np.arange(2 * n) % 2 == 0)
    return Specimen.from_atoms(places, np.full(2 * n, 6), weights=60.0, b_factors=200.0, residues=residues)


# --- elastic networks ---------------------------------------------------------------------------------------------


def test_the_hessian_of_two_points() -> None:
    """One spring along u: H = [[u u^T, -u u^T], [-u u^T, u u^T]], with the one stretch of eigenvalue 2."""
    u = np.array([2.0, -1.0, 2.0]) / 3
    matrix = hessian([[1.0, 2.0, 3.0], 4.5 * u + [1.0, 2.0, 3.0]]).toarray()
    block = np.outer(u, u)
    np.testing.assert_allclose(matrix, np.block([[block, -block], [-block, block]]), atol=1e-15)
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), [0, 0, 0, 0, 0, 2], atol=1e-14)
    # Out of reach there is no spring.
    assert hessian([[0.0, 0, 0], [15.1, 0, 0]]).nnz == 0 or not hessian([[0.0, 0, 0], [15.1, 0, 0]]).toarray().any()


def test_an_equilateral_triangle() -> None:
    """Springs k = m = 1: the breathing mode has omega^2 = 3, two others 3/2 (Landau & Lifshitz, Mechanics, 24)."""
    triangle = 5 * np.array([[1.0, 0, 0], [-0.5, np.sqrt(0.75), 0], [-0.5, -np.sqrt(0.75), 0]])
    modes = elastic_modes(triangle, 3)
    np.testing.assert_allclose(modes.eigenvalues, [1.5, 1.5, 3.0], rtol=1e-12)
    breathing = triangle / np.linalg.norm(triangle)
    assert abs((modes.vectors[2] * breathing).sum()) == pytest.approx(1, abs=1e-12)


def test_the_hessian_is_the_second_derivative_of_the_springs_energy() -> None:
    points = torch.from_numpy(cloud(9))
    pairs = [(i, j) for i in range(9) for j in range(i) if (points[i] - points[j]).norm() < 25]

    def energy(moved: torch.Tensor) -> torch.Tensor:
        return sum(0.5 * ((moved[i] - moved[j]).norm() - (points[i] - points[j]).norm()) ** 2 for i, j in pairs)  # type: ignore[return-value]

    exact = torch.autograd.functional.hessian(energy, points).reshape(27, 27)
    np.testing.assert_allclose(hessian(points.numpy(), 25.0).toarray(), exact, atol=1e-13)


@given(st.integers(0, 10**6), st.integers(4, 30))
def test_rigid_motions_cost_no_energy(seed: int, n: int) -> None:
    points = cloud(n, seed)
    rigid = rigid_motions(points)
    np.testing.assert_allclose(rigid.T @ rigid, np.eye(6), atol=1e-12)
    matrix = hessian(points, 100.0)
    assert np.abs(matrix @ rigid).max() < 1e-12 * max(1.0, abs(matrix).max())
    # A turn by a small angle is one of them, but for its square.
    small = points + 1e-6 * np.cross([0.3, -0.5, 0.8], points)
    move = (small - points).reshape(-1) / 1e-6
    np.testing.assert_allclose(rigid @ (rigid.T @ move), move, atol=1e-9 * np.abs(move).max())


def test_modes_against_all_eigenvectors_of_the_dense_matrix(protein: Specimen) -> None:
    nodes = protein.positions[protein.residues.nodes & (protein.residues.chains == "A")][:120]
    modes = elastic_modes(nodes, 8, 12.0)
    values, vectors = scipy.linalg.eigh(hessian(nodes, 12.0).toarray())
    assert np.abs(values[:6]).max() < 1e-12
    np.testing.assert_allclose(modes.eigenvalues, values[6:14], rtol=1e-8)
    flat = modes.vectors.reshape(8, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(8), atol=1e-10)
    np.testing.assert_allclose(np.abs(np.diag(flat @ vectors[:, 6:14])), 1, atol=1e-8)
    assert np.abs(rigid_motions(nodes).T @ flat.T).max() < 1e-10
    again = elastic_modes(nodes, 8, 12.0)
    np.testing.assert_array_equal(again.vectors, modes.vectors)
    # A turned structure has the same modes, turned.
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    turned = elastic_modes(nodes @ turn.T, 8, 12.0)
    np.testing.assert_allclose(turned.eigenvalues, values[6:14], rtol=1e-8)
    np.testing.assert_allclose(turned.vectors, modes.vectors @ turn.T, atol=1e-7)


def test_networks_that_have_no_modes() -> None:
    with pytest.raises(InputError, match=r"in pieces.*cut-off"):
        elastic_modes(np.concatenate((cloud(8, size=5), cloud(8, 1, size=5) + 100)), 2)
    with pytest.raises(InputError, match="not on a line"):
        elastic_modes(np.outer(np.arange(5.0), [1, 2, 3]), 2, 100.0)
    with pytest.raises(InputError, match="1 to 3 modes of 3 nodes, got 4"):
        elastic_modes(cloud(3), 4, 100.0)
    with pytest.raises(InputError, match="different places"):
        elastic_modes(np.zeros((4, 3)), 1)


# --- what atoms do ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=3))
def test_an_amplitude_is_the_rms_displacement_of_the_nodes(amplitudes: list[float]) -> None:
    specimen = beads()
    bending = Deformation(modes=3, cutoff_angstrom=40.0)
    moved = bending.applied(specimen, dict(zip(bending.values, amplitudes, strict=True)))
    shift = moved.positions - specimen.positions
    nodes = shift[specimen.residues.nodes]
    assert np.sqrt((nodes**2).sum(axis=1).mean()) == pytest.approx(np.linalg.norm(amplitudes), abs=1e-10)
    # All atoms of a residue move with its node.
    np.testing.assert_allclose(shift[1::2], shift[::2], atol=1e-13)


@given(st.floats(-180, 180), st.integers(0, 1000))
def test_a_domain_turns_as_a_rigid_body(angle: float, seed: int) -> None:
    specimen = beads(seed=seed)
    domain = Domain(hinge=(("A", 11), (1.0, -2.0, 30.0)), chain="B")
    moved = Deformation(domains=[domain]).applied(specimen, {"domain_deg[0]": angle}).positions
    still, mask = specimen.positions, specimen.residues.chains == "B"
    np.testing.assert_array_equal(moved[~mask], still[~mask])
    before, after = (p[mask][:, None] - p[mask][None] for p in (still, moved))
    np.testing.assert_allclose(np.linalg.norm(after, axis=2), np.linalg.norm(before, axis=2), atol=1e-9)
    start = still[2]
    axis = np.array([1.0, -2.0, 30.0]) - start
    axis /= np.linalg.norm(axis)
    # Distances to the axis stay, and so does the height along it; the angle about it is the one asked for.
    a, b = still[mask] - start, moved[mask] - start
    np.testing.assert_allclose(b @ axis, a @ axis, atol=1e-9)
    a, b = a - np.outer(a @ axis, axis), b - np.outer(b @ axis, axis)
    sine, cosine = np.einsum("k,nk->n", axis, np.cross(a, b)), (a * b).sum(axis=1)
    square = (a * a).sum(axis=1)
    np.testing.assert_allclose(sine, square * np.sin(np.deg2rad(angle)), atol=1e-8)
    np.testing.assert_allclose(cosine, square * np.cos(np.deg2rad(angle)), atol=1e-8)


def test_modes_first_then_domains_in_their_order() -> None:
    specimen = beads()
    hinge = ((0.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    both = Deformation(1, 40.0, [Domain(hinge, residues=(10, 15)), Domain(hinge, chain="A", residues=(14, 99))])
    moved = both.applied(specimen, {"mode_angstrom[0]": 2.0, "domain_deg[0]": 90.0, "domain_deg[1]": 90.0})
    only = Deformation(1, 40.0).applied(specimen, {"mode_angstrom[0]": 2.0})
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    expected = only.positions.copy()
    expected[:12] = expected[:12] @ turn.T  # residues 10 to 15 are chain A, two atoms each
    expected[8:12] = expected[8:12] @ turn.T
    np.testing.assert_allclose(moved.positions, expected, atol=1e-12)


def test_copies_deform_alike(protein: Specimen) -> None:
    bending = Deformation(2, 12.0, [Domain((("A", 500), ("A", 560)), chain="A", residues=(560, 700))])
    values = {"mode_angstrom[0]": 2.0, "mode_angstrom[1]": -1.0, "domain_deg[0]": 7.0}
    field = dict(copies=3, field_angstrom=500.0, seed=3)
    one, many = bending.applied(protein, values), bending.applied(protein.field(**field), values)
    n = protein.num_atoms
    some = np.random.default_rng(0).integers(0, n, (200, 2))
    for i in range(3):
        copy = many.positions[i * n : (i + 1) * n]
        a, b = (np.linalg.norm(p[some[:, 0]] - p[some[:, 1]], axis=1) for p in (one.positions, copy))
        np.testing.assert_allclose(b, a, atol=1e-6)
    mixed = Specimen(
        *(
            np.concatenate((getattr(s, k), getattr(s, k)))
            for s in (protein,)
            for k in ("positions", "atomic_numbers", "weights", "b_factors", "hydrogens")
        ),
        np.repeat([0, 1], n),
    )
    broken = mixed.transformed().positions.copy()
    broken[-1] += 1.0
    with pytest.raises(InputError, match="one rigid structure"):
        Deformation(1, 12.0).of(
            Specimen(broken, mixed.atomic_numbers, mixed.weights, mixed.b_factors, mixed.hydrogens, mixed.labels)
        )


def test_residues_of_a_file(protein: Specimen) -> None:
    residues = protein.residues
    assert residues is not None
    assert np.unique(residues.chains).tolist() == ["A", "B", "M"]
    assert int(residues.nodes.sum()) == int(residues.index.max()) + 1 == 420
    # Neighbours along the chain are 3.8 angstrom apart, as C-alpha atoms are.
    nodes = residues.nodes & (residues.chains == "A")
    gaps = np.linalg.norm(np.diff(protein.positions[nodes], axis=0), axis=1)[np.diff(residues.numbers[nodes]) == 1]
    assert np.abs(gaps - 3.8).max() < 0.2
    assert protein.field(2, 300.0, 0).residues.index.max() == 839


def test_settings_that_make_no_sense(protein: Specimen) -> None:
    hinge = (("A", 500), ("A", 560))
    for message, domain in (
        ("Unknown chain 'Z'.*A, B, M", Domain(hinge, chain="Z")),
        ("residues 1 to 9", Domain(hinge, residues=(1, 9), chain="A")),
        ("one residue 1 of chain 'A'", Domain((("A", 1), ("A", 560)), chain="A")),
        ("two different points", Domain((("A", 500), ("A", 500)), chain="A")),
    ):
        with pytest.raises(InputError, match=message):
            CryoET(protein, deformation={"domains": [domain]})
    for message, options in (
        ("modes as an integer", {"modes": 1.5}),
        ("2 values of Deformation.mode_angstrom, got 1", {"modes": 2, "mode_angstrom": [1.0]}),
        ("Unknown key 'mode'", {"mode": 3}),
        ("with a hinge", {"domains": [{"chain": "A"}]}),
        ("a point of a hinge", {"domains": [{"chain": "A", "hinge": ["A", "B"]}]}),
        ("neither", {"domains": [{"hinge": hinge}]}),
    ):
        with pytest.raises(InputError, match=message):
            CryoET(protein, deformation=options)
    with pytest.raises(InputError, match=r"Unknown parameter 'mode_angstrom\[0\]'.*need deformation"):
        CryoET(protein, parameters=["mode_angstrom[0]"])
    with pytest.raises(InputError, match=r"Unknown parameter 'mode_angstrom\[5\]'"):
        Deformation(modes=2).applied(protein, {"mode_angstrom[5]": 1.0})


# --- images -------------------------------------------------------------------------------------------------------

NAMES = ("mode_angstrom[0]", "mode_angstrom[1]", "domain_deg[0]", "x_tilt_deg", "y_tilt_deg", "x_angstrom")


def simulator(mode: str, specimen: Specimen | None = None, **changes) -> CryoET:
    bending = Deformation(2, 40.0, [Domain((("A", 11), (1.0, -2.0, 30.0)), chain="B")])
    settings = dict(
        shape=(32, 32), pixel_size_angstrom=4.0, parameters=NAMES, deformation=bending, mode=mode, margin_pixels=8
    )
    return CryoET(beads() if specimen is None else specimen, **{**settings, **changes})


@pytest.mark.parametrize("mode", ["hard", "smooth"])
def test_an_image_is_that_of_the_moved_atoms(mode: str) -> None:
    """The same through a specimen that is deformed and tilted beforehand, and an undeformed simulator."""
    sim = simulator(mode)
    row = np.array([1.5, -2.0, 20.0, 12.0, -31.0, 3.0])
    image = sim(row[None], SEEDS)[0]
    bent = sim.deformation.applied(sim.specimen, dict(zip(NAMES[:3], row[:3].tolist(), strict=True)))
    a, b = np.deg2rad(row[3:5])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    other = CryoET(
        bent.transformed(about_y @ about_x),
        shape=(32, 32),
        pixel_size_angstrom=4.0,
        parameters=("x_angstrom",),
        mode=mode,  # type: ignore[arg-type]
        margin_pixels=8,
    )
    expected = other(row[None, 5:], SEEDS)[0]
    # Grids of other sizes ring at other places, near 1e-3 of the contrast; hard counts may round the other way.
    tolerance = 1.0 if mode == "hard" else 3e-3 * expected.std()
    assert np.abs(image - expected).max() <= tolerance
    if mode == "hard":
        assert (image != expected).mean() < 0.05
    still = sim(np.array([[0, 0, 0, 0, 0, 3.0]]), SEEDS)[0]
    assert np.abs(image - still).max() > 0.2 * still.std()


def test_the_differentiable_projection_is_the_same() -> None:
    sim = simulator("smooth")
    theta = torch.tensor([1.5, -2.0, 20.0, 12.0, -31.0, 3.0], dtype=torch.float64)
    values = dict(zip(NAMES, theta.tolist(), strict=True))
    cached = sim.projection({**sim._values, **values}).coefficients
    again = sim._projector().differentiable(sim._positions({**sim._values, **values}, torch.device("cpu"))).coefficients
    assert (again - cached).abs().max() < 1e-9 * cached.abs().max()
    image, call = sim.image(theta), torch.from_numpy(sim(theta.numpy()[None], SEEDS)[0])
    assert (image - call).abs().max() < 1e-3 * image.std()  # float32


@pytest.mark.parametrize("mode", ["hard", "smooth"])
def test_cached_projections_are_those_of_the_row(mode: str) -> None:
    """Whatever was asked for before, a row has the bits that it has alone."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(7, 6)) * [1, 1, 5, 5, 5, 2]
    rows[1, :5] = rows[0, :5]  # only the shift differs: the projection is used again
    rows[5] = rows[0]
    rows[6, :5] = 0.0
    sim = simulator(mode)
    together = sim(rows, np.zeros(7, dtype=np.uint64))
    backwards = sim(rows[::-1], np.zeros(7, dtype=np.uint64))[::-1]
    alone = np.concatenate([simulator(mode)(row[None], SEEDS) for row in rows])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(backwards, alone)
    assert not np.array_equal(together[0], together[2])
    # What is kept does not grow with the number of structures.
    assert len(sim._projections) <= 5
    one = sim.projection(dict(zip(sim._shaping, (1.0, 0, 0, 0, 0), strict=True)))
    assert one is sim.projection(dict(zip(sim._shaping, (1.0, 0, 0, 0, 0), strict=True)))


def test_a_fixed_deformation_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bending = Deformation(2, 40.0, mode_angstrom=(1.0, -2.0))
    sim = simulator("hard", deformation=bending, parameters=("x_angstrom", "rotation_deg"), pose=Pose(x_tilt_deg=10.0))
    built = []
    projector = type(sim._projector())
    original = projector.build
    monkeypatch.setattr(projector, "build", lambda self, xyz=None: (built.append(1), original(self, xyz))[1])
    sim(np.random.default_rng(0).normal(size=(6, 2)), np.zeros(6, dtype=np.uint64))
    sim.replace(microscope=Microscope(defocus_um=2.0))(np.zeros((2, 2)), np.zeros(2, dtype=np.uint64))
    assert len(built) == 1
    other = sim.replace(deformation=Deformation(2, 40.0, mode_angstrom=(1.0, 2.0)))
    assert not np.array_equal(other(np.zeros((1, 2)), SEEDS), sim(np.zeros((1, 2)), SEEDS))
    assert len(built) == 2


def test_tilts_and_the_rotation_are_one_rotation() -> None:
    """x-tilt by 180 degrees turns the specimen over: the image is mirrored, y -> -y."""
    sim = CryoET(beads(), (33, 33), 4.0, parameters=("x_tilt_deg", "rotation_deg"), mode="smooth", margin_pixels=16)
    zero, over = (sim.image(torch.tensor([a, 0.0], dtype=torch.float64)) for a in (0.0, 180.0))
    # The origin is not in the middle of the padded grid, so that its fading edges are not mirrored.
    assert (over - zero.flip(0)).abs().max() < 1e-4 * zero.std()
    assert (over - zero).abs().max() > zero.std()


def test_a_simulator_with_a_deformation_travels() -> None:
    sim = simulator("hard")
    rows = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    expected = sim(rows, SEEDS)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(sim))(rows, SEEDS), expected)
    p = {p.name: p for p in sim.space.parameters}
    assert (p["mode_angstrom[1]"].unit, p["domain_deg[0]"].unit) == ("angstrom", "deg")
    assert p["mode_angstrom[1]"].upper == 5.0


# --- the example --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return importlib.import_module("structure_from_projections")


@pytest.fixture(scope="module")
def task(example: ModuleType):
    return example.problem(0, 2)


def test_the_target_is_another_codes_image_of_the_same_thing(example: ModuleType, task) -> None:
    images = task.simulator(task.truth[None], SEEDS)[0]
    bent = Deformation.applied(
        example.BENDING,
        Specimen.from_file(HINGE),
        dict(zip(example.BENDING.values, task.truth[:3].tolist(), strict=True)),
    )
    for image, pose in zip(images, task.truth[3:].reshape(2, 5), strict=True):
        other = example.expected_counts(bent, pose)
        assert np.corrcoef(image.ravel(), other.ravel())[0, 1] > 0.95
        # Not the same to rounding, which would be an inverse crime.
        assert (image - other).std() > 0.05 * other.std()
    # Counts are those of a Poisson process about it: chi-square within five standard deviations.
    chi = ((task.target - images) ** 2).sum() / task.variance / images.size
    assert abs(chi - 1) < 0.2


def test_a_pose_touches_its_own_image(task) -> None:
    moved = task.truth.copy()
    moved[3:8] += 1.0
    one, other = task.simulator(np.stack((task.truth, moved)), np.zeros(2, dtype=np.uint64))
    assert not np.array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])
    assert task.simulator.structure.parameter_block.tolist() == [-1] * 3 + [0] * 5 + [1] * 5


FIT = """
import numpy as np
import bridge
from simulators.cryoet import CryoET, Deformation, Specimen

places = np.random.default_rng(1).uniform(-20, 20, (20, 3))
specimen = Specimen.from_atoms(places, [6] * 20, weights=60.0, b_factors=200.0)
names = ("mode_angstrom[0]", "mode_angstrom[1]", "x_tilt_deg", "rotation_deg", "x_angstrom")
sim = CryoET(specimen, (24, 24), 4.0, parameters=names, deformation=Deformation(2, 30.0), margin_pixels=8)
truth = np.array([0.8, -1.2, 3.0, 5.0, 2.0])
target = sim.replace(noise="poisson")(truth[None], np.ones(1, dtype=np.uint64))[0]
result = bridge.fit(
    sim, target, np.zeros(5), seed=0, variance=640.0,
    method=bridge.GaussNewton(steps=20, num_samples=64, scale=(0.7, 0.1)),
)
if bridge.is_root():
    print(*(value.hex() for value in (*result.parameters.tolist(), *result.standard_error.tolist(), result.loss)))
"""


@pytest.mark.mpi
@pytest.mark.slow
def test_a_structural_fit_finds_the_structure_with_the_same_bits_on_one_rank_and_on_two(
    run_ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(FIT, {"__name__": "__main__"})
    alone = capsys.readouterr().out
    found = np.array([float.fromhex(value) for value in alone.split()])
    parameters, error = found[:5], found[5:10]
    assert (np.abs(parameters - [0.8, -1.2, 3.0, 5.0, 2.0]) < 4 * error + 0.1).all(), (parameters, error)
    assert (error < [0.5, 0.5, 3.0, 1.0, 0.5]).all(), error
    done = run_ranks(2, FIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone
