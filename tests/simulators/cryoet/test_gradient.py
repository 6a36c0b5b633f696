"""The smoothed gradient of the cryo-EM simulator's smooth mode against its exact one, by automatic differentiation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bridge
from simulators.cryoet import PARAMETER_NAMES, CryoET, Deformation, Detector, Domain, Microscope, Pose, Specimen

THETA = torch.tensor([1.5, 2.0, -3.0, 4.0], dtype=torch.float64)
REPLICATES = 16


@pytest.fixture(scope="module")
def case():
    sim = CryoET(Specimen.helix(), shape=(48, 48), pixel_size_angstrom=5.0, mode="smooth")
    box = bridge.as_simulator(
        lambda x: sim.image(torch.as_tensor(x)).numpy(),
        names=sim.space.names,
        natural_scale=sim.space.natural_scale,
        vectorized=True,
    )
    exact = torch.func.jacfwd(sim.image)(THETA)
    # One question a parameter: how much of its own derivative image does the estimate see?
    directions = exact.movedim(-1, 0) / exact.square().sum(dim=(0, 1))[:, None, None]
    return box, exact, directions


def replicates(box, directions, scale, num_samples=64, covariate="auto", points="auto"):
    """<direction_k, estimated dI/dtheta_k>, whose exact value is 1: (REPLICATES, 4), independent scrambles."""
    smoothed = bridge.smooth(box, seed=9, num_samples=num_samples, scale=scale, covariate=covariate, points=points)
    jacobian = smoothed.estimate(THETA.expand(REPLICATES, 4)).jacobian()
    return torch.einsum("khw,rhwk->rk", directions, jacobian)


def test_agrees_within_four_standard_errors_of_at_most_two_per_cent(case):
    """Without regression, whose standard errors, 0.005 % here, show the smoothing's own bias of 0.05 % instead."""
    box, _, directions = case
    samples = replicates(box, directions, 0.02, covariate="block")
    error = samples.std(0) / np.sqrt(REPLICATES)
    deviation = (samples.mean(0) - 1).abs()
    assert (error < 0.02).all(), error
    assert (deviation < 4 * error + 1e-4).all(), (deviation, error)
    # The same comparison notices a gradient that is off by a tenth.
    assert ((samples.mean(0) - 1.1).abs() > 4 * error).all()


def test_regression_is_nearer_than_a_per_cent_with_one_set_of_64_sobol_points(case):
    box, _, directions = case
    assert ((replicates(box, directions, 0.02, points="sobol")[0] - 1).abs() < 0.01).all()


def test_regression_is_nearer_with_one_set_of_64_runs(case):
    """Root mean square errors of single sets: 2 % for defocus, which hardly changes this image, else below 0.1 %."""
    box, _, directions = case
    plain, regression = (
        (replicates(box, directions, 0.02, covariate=c) - 1).square().mean(0).sqrt() for c in ("block", "auto")
    )
    assert (regression < torch.tensor([0.04, 0.001, 0.001, 0.001])).all(), regression
    assert (regression < 0.5 * plain).all(), (regression, plain)


def test_the_bias_falls_by_four_when_the_scale_is_halved(case):
    """f_L - f = scale^2 / 2 f'' + O(scale^4), and likewise for the gradients."""
    box, _, directions = case
    wide, half = (replicates(box, directions, scale, 128) for scale in (0.5, 0.25))
    bias_wide, bias_half = wide.mean(0) - 1, half.mean(0) - 1
    noise = (half.std(0) + wide.std(0) / 4) / np.sqrt(REPLICATES)
    ratio = bias_wide / bias_half
    visible = bias_half.abs() > 12 * noise
    assert int(visible.sum()) >= 2, (bias_half, noise)
    assert ((ratio[visible] > 3.0) & (ratio[visible] < 5.0)).all(), ratio


def test_the_gradient_of_a_loss_agrees(case):
    box, exact, _ = case
    away = np.array([[0.02, 1.0, -1.0, 0.5]])
    target = torch.as_tensor(np.asarray(box(THETA.numpy() + away, np.zeros(1, np.uint64))[0]))
    smoothed = bridge.smooth(box, seed=1, num_samples=256, scale=0.02)
    theta = THETA.clone().requires_grad_()
    image = smoothed(theta)
    loss = 0.5 * (image - target).square().sum()
    loss.backward()
    here = torch.as_tensor(np.asarray(box(THETA.numpy()[None], np.zeros(1, np.uint64))[0]))
    truth = torch.einsum("hw,hwk->k", here - target, exact)
    np.testing.assert_allclose(theta.grad, truth, rtol=0.02, atol=0.02 * float(truth.abs().max()) * 0.05)


# --- every parameter ----------------------------------------------------------------------------------------------

NODES = np.array([(-32, -8, 6), (-18, 12, -12), (-4, -10, -3), (10, 9, 12), (22, -12, 4), (34, 10, -9)], dtype=float)
BENDING = Deformation(2, 60.0, [Domain(((0.0, 0.0, 0.0), (10.0, 9.0, 12.0)), residues=(5, 6))], (0.4, -0.3), (5.0,))


@pytest.fixture(scope="module")
def everything():
    """A simulator of every parameter there is, each with an effect that can be seen: (box, exact Jacobian, theta)."""
    specimen = Specimen.from_atoms(NODES, [6] * len(NODES), weights=120.0, b_factors=60.0)
    sim = CryoET(
        specimen,
        shape=(32, 32),
        pixel_size_angstrom=4.0,
        parameters=(*PARAMETER_NAMES, *BENDING.values),
        mode="smooth",
        # An aperture within the band; a beam so poor and a spherical aberration so large that they show at 8 angstrom.
        microscope=Microscope(
            voltage_kv=120.0,
            defocus_um=1.0,
            astigmatism_um=0.1,
            astigmatism_angle_deg=20.0,
            cs_mm=5.0,
            energy_spread_ev=5.0,
            convergence_mrad=0.3,
            aperture_um=25.0,
        ),
        detector=Detector(mtf=0.6, gain=1.3),
        pose=Pose(3.1, -2.2, 100.0, 11.0, 15.0, -25.0),
        deformation=BENDING,
        margin_pixels=16,
    )
    theta = torch.from_numpy(sim.reference)
    box = bridge.as_simulator(
        lambda x: sim.image(torch.as_tensor(x)).numpy(),
        names=sim.space.names,
        natural_scale=sim.space.natural_scale,
        vectorized=True,
    )
    return box, torch.func.jacfwd(sim.image)(theta), theta


def test_the_smoothed_gradient_is_the_exact_one_within_its_stated_error_for_every_parameter(everything):
    """<exact_k / |exact_k|^2, J_k> = 1 for each parameter k, from one estimate and the standard errors that it states.

    Eight replicates of 64 runs: Student's t with 7 degrees of freedom exceeds 8 once in 10^4.
    """
    box, exact, theta = everything
    directions = exact.movedim(-1, 0) / exact.square().sum(dim=(0, 1))[:, None, None]
    names = box.space.names
    smoothed = bridge.smooth(box, seed=4, num_samples=512, replicates=8, scale=0.005, covariate="regression")
    estimate = smoothed.estimate(theta)
    for k, name in enumerate(names):
        vjp, error = estimate.vjp(directions[k])[k], estimate.vjp_standard_error(directions[k])[k]
        # 1e-3 covers the bias of the smoothing itself, which falls with the square of the scale.
        assert abs(vjp - 1) < 8 * error + 1e-3, (name, float(vjp), float(error))
        # The test would notice a gradient that is off by a tenth, or that is not there.
        assert 8 * error < 0.1, (name, float(error))
        assert exact[..., k].abs().max() * box.space.natural_scale[k] > 0.01, name
