"""The structure of a tilt series' particles: the same in all images, varied, differentiated, cached and recovered."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError
from simulators.cryoet import Deformation, Detector, Domain, Particle, Residues, Specimen, TiltScheme, TiltSeries
from simulators.cryoet.specimen.volume import Volume, VolumeBuilder

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

SEEDS = np.zeros(1, dtype=np.uint64)
NAMES = ("mode_angstrom[0]", "domain_deg[0]", "z_angstrom[0]", "shift_x_angstrom[1]")
ROW = np.array([1.5, 20.0, 30.0, 3.0])


def clamp(seed: int = 1) -> Specimen:
    """Two arms of beads that meet at the origin, each a chain, some 15 angstrom wide and 35 long."""
    random = np.random.default_rng(seed)
    arms = [random.uniform([0, -7, -7], [30, 7, 7], (12, 3)) * [side, 1, 1] for side in (1, -1)]
    number = np.arange(24)
    residues = Residues(number, np.where(number < 12, "A", "B"), 10 + number, np.ones(24, dtype=bool))
    return Specimen.from_atoms(np.concatenate(arms), [6] * 24, weights=150.0, b_factors=200.0, residues=residues)


HINGE = Domain(((0.0, 0.0, 0.0), (0.0, 1.0, 0.0)), chain="B")
BENDING = Deformation(1, 30.0, [HINGE])


def series(mode: str = "smooth", **changes) -> TiltSeries:
    settings = dict(
        particles=[Particle(clamp(), -40.0, 10.0, 0.0, 10.0, 20.0, 30.0), Particle(clamp(), 50.0, -20.0, 40.0)],
        scheme=TiltScheme((-40.0, 0.0, 40.0), (1, 0, 2)),
        shape=(40, 48),
        pixel_size_angstrom=5.0,
        parameters=NAMES,
        mode=mode,
        bounds={"mode_angstrom[0]": (-2.5, 2.5), "domain_deg[0]": (-35.0, 35.0)},
        deformation=BENDING,
        margin_pixels=8,
        detector=Detector(gain=100.0, bits=None),
    )
    return TiltSeries(**{**settings, **changes})


@pytest.mark.parametrize("mode", ["hard", "smooth"])
@pytest.mark.parametrize("deformed", [None, [1]])
def test_images_are_those_of_the_deformed_atoms(
    mode: str, deformed: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as with structures that were deformed beforehand, of all particles or of one."""
    # A box of another size fades out elsewhere: one size for all.
    original = Volume.build
    monkeypatch.setattr(Volume, "build", lambda *a, **k: original(*a, **{**k, "reach_angstrom": 80.0}))
    images = series(mode, deformed=deformed)(ROW[None], SEEDS)[0]
    bent = BENDING.applied(clamp(), dict(zip(NAMES[:2], ROW[:2].tolist(), strict=True)))
    first = clamp() if deformed else bent
    particles = [Particle(first, -40.0, 10.0, 0.0, 10.0, 20.0, 30.0), Particle(bent, 50.0, -20.0, 40.0)]
    other = series(mode, particles=particles, parameters=NAMES[2:], deformation=Deformation(), bounds=None)
    expected = other(ROW[None, 2:], SEEDS)[0]
    contrast = expected.std(axis=(1, 2)).min()
    assert np.abs(images - expected).max() <= (1.0 if mode == "hard" else 1e-4 * contrast)  # counts are rounded
    still = series(mode, deformed=deformed)(ROW[None] * [0, 0, 1, 1], SEEDS)[0]
    changed = np.abs(images - still).max(axis=(1, 2)) / still.std(axis=(1, 2))
    assert changed.min() > 0.2, changed  # in every image


def test_the_differentiable_volume_is_the_kept_one() -> None:
    volumes = series()._volumes
    values = {name: torch.tensor(v, dtype=torch.float64) for name, v in zip(NAMES, ROW.tolist(), strict=True)}
    (kept, other), (again, same) = (volumes.of(values, differentiable=d) for d in (False, True))
    assert kept is other  # both particles deform alike
    assert again is same
    assert float((again.coefficients - kept.coefficients).abs().max()) < 1e-9 * float(kept.coefficients.abs().max())
    assert volumes.of(values, differentiable=False)[0] is kept


def test_reverse_and_forward_derivatives_agree_and_see_the_structure() -> None:
    alone = [Particle(clamp(), -10.0, 10.0, 0.0, 10.0, 20.0, 30.0)]
    sim, theta = (
        series(particles=alone, pixel_size_angstrom=8.0, shape=(20, 24)),
        torch.from_numpy(ROW).requires_grad_(),
    )
    image = sim.image(theta)
    cotangent = torch.from_numpy(np.random.default_rng(0).normal(size=image.shape))
    (gradient,) = torch.autograd.grad(image, theta, cotangent)
    for k, name in enumerate(NAMES):
        tangent = torch.zeros(4, dtype=torch.float64)
        tangent[k] = 1.0
        _, slope = torch.func.jvp(sim.image, (theta.detach(),), (tangent,))
        assert float(gradient[k]) == pytest.approx(float((slope * cotangent).sum()), rel=1e-9), name
        wide = sim.image(theta.detach() + 1e-3 * tangent) - sim.image(theta.detach() - 1e-3 * tangent)
        assert float((wide / 2e-3 - slope).norm() / slope.norm()) < 1e-5, name


@pytest.mark.parametrize("mode", ["hard", "smooth"])
def test_what_is_kept_is_that_of_the_row(mode: str) -> None:
    random = np.random.default_rng(0)
    rows = ROW + random.normal(size=(7, 4)) * [1, 5, 10, 2]
    rows[1, :2] = rows[0, :2]  # another pose of the same structure
    rows[5] = rows[0]
    sim = series(mode)
    together = sim(rows, np.zeros(7, dtype=np.uint64))
    backwards = sim(rows[::-1], np.zeros(7, dtype=np.uint64))[::-1]
    alone = np.concatenate([series(mode)(row[None], SEEDS) for row in rows])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(backwards, alone)
    assert len(sim._volumes._volumes) <= 4


def test_structure_and_projections_are_computed_when_they_change_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"build": 0, "slice": 0}
    for kind, name in ((VolumeBuilder, "build"), (Volume, "slice")):
        original = getattr(kind, name)

        def counting(self, *arguments, name=name, original=original):
            calls[name] += 1
            return original(self, *arguments)

        monkeypatch.setattr(kind, name, counting)

    def spent(row: np.ndarray) -> tuple[int, int]:
        before = dict(calls)
        sim(row[None], SEEDS)
        return calls["build"] - before["build"], calls["slice"] - before["slice"]

    bounds = {"tilt_deg[0]": (-60, 60)}
    sim = series("hard", parameters=(*NAMES, "defocus_um", "particle_rot_deg[1]", "tilt_deg[0]"), bounds=bounds)
    start = np.array([*ROW, 3.0, 0.0, -40.0])
    assert spent(start) == (1, 6)  # three images of two particles
    assert spent(start + np.array([0, 0, 9, 2, 0.1, 0, 0])) == (0, 0)  # shifts and the lens
    assert spent(start + np.array([0, 0, 0, 0, 0, 5, 0])) == (0, 3)  # one particle turns
    assert spent(start + np.array([0, 0, 0, 0, 0, 0, 1])) == (0, 2)  # one image tilts
    assert spent(start + np.array([0, 1, 0, 0, 0, 0, 0])) == (1, 6)  # the structure


# An arm opened by 15 degrees; wanted are its angle and the particle's place, from 40 electrons an angstrom^2.
OPENING = dict(
    particles=[Particle(clamp(), 0.0, 0.0, 0.0, 10.0, 20.0, 30.0)],
    shape=(28, 28),
    deformation=Deformation(domains=[HINGE]),
    parameters=("domain_deg[0]", "x_angstrom[0]", "y_angstrom[0]"),
    detector=Detector(dose_e_per_angstrom2=40.0, gain=100.0, bits=None),
    bounds={"domain_deg[0]": (-35.0, 35.0)},
    # The place is known a hundred times better than the angle in the usual units; with them smoothing moves the image
    # by so much that what is left of that hides the angle.
    natural_scale={"domain_deg[0]": 5.0, "x_angstrom[0]": 1.0, "y_angstrom[0]": 1.0},
)


def opened(mode: str, seed: int) -> tuple[TiltSeries, np.ndarray, np.ndarray]:
    """A series, the truth, and its images with electrons counted."""
    truth = np.array([15.0, 4.0, -3.0])
    counts = series(mode, noise="poisson", **OPENING)(truth[None], np.full(1, seed, dtype=np.uint64))[0]
    return series(mode, **OPENING), truth, counts.astype(np.float64)


@pytest.mark.parametrize("method", ["auto", bridge.GaussNewton(steps=6, num_samples=8, scale=(1.0, 0.5))], ids=str)
def test_fit_recovers_a_domains_opening_in_hard_mode(method: str | bridge.Method) -> None:
    """A black box with thresholds and integers; the errors that are stated are those of the information in it."""
    sim, truth, target = opened("hard", 1)
    variance = 100 * target.mean()  # 100 counts an electron
    result = bridge.fit(sim, target, np.zeros(3), seed=1, variance=variance, method=method)
    assert result.num_evaluations < 80
    slopes = [
        sim(np.stack((truth + step, truth - step)), np.zeros(2, dtype=np.uint64)).astype(np.float64)
        for step in np.diag([4.0, 0.5, 0.5])
    ]
    jacobian = np.stack([(up - down) / (2 * h) for (up, down), h in zip(slopes, (4.0, 0.5, 0.5), strict=True)])
    bound = np.sqrt(np.diag(np.linalg.inv(np.einsum("ithw,jthw->ij", jacobian, jacobian) / variance)))
    np.testing.assert_allclose(result.standard_error, bound, rtol=0.2)
    assert (np.abs(result.parameters - truth) < 4 * bound).all(), (result.parameters, bound)


def test_a_domains_opening_is_recovered_from_three_counted_images() -> None:
    """By Gauss-Newton with the smooth mode's exact derivatives."""
    sim, true, target = opened("smooth", 1)
    truth = torch.from_numpy(true)
    theta = torch.zeros(3, dtype=torch.float64)
    for _ in range(6):  # Gauss-Newton, residuals in units of the electrons' noise
        jacobian, image = torch.func.jacfwd(lambda t: (sim.image(t),) * 2, has_aux=True)(theta)
        weight = 1 / (100 * image.detach())
        normal = torch.einsum("thwi,thw,thwj->ij", jacobian, weight, jacobian)
        theta = theta + torch.linalg.solve(
            normal, torch.einsum("thwi,thw,thw->i", jacobian, weight, torch.from_numpy(target) - image)
        )
    bound = torch.linalg.inv(normal).diagonal().sqrt()
    assert (bound < torch.tensor([3.0, 0.6, 0.6])).all(), bound
    assert ((theta - truth).abs() < 4 * bound).all(), (theta, bound)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="deformed particles of one specimen, got 2"):
        series(particles=[Particle(clamp()), Particle(clamp(2))])
    for deformed in ([], [2], [-1]):
        with pytest.raises(InputError, match="deformed as numbers of particles, 0 to 1"):
            series(deformed=deformed)
    with pytest.raises(InputError, match=r"Unknown parameter 'mode_angstrom\[0\]'.*need deformation"):
        series(deformation=Deformation())
    with pytest.raises(InputError, match="Unknown chain 'Z'"):
        series(deformation={"domains": [{"hinge": HINGE.hinge, "chain": "Z"}]}, parameters=("defocus_um",), bounds=None)
