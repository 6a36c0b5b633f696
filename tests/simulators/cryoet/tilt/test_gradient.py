"""Smoothed gradients of a tilt series' smooth mode against its exact ones, for every kind of parameter."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import bridge
from bridge.simulator.protocol import Simulator
from simulators.cryoet import (
    SERIES_PARAMETER_NAMES,
    Deformation,
    Detector,
    Domain,
    Microscope,
    Particle,
    Residues,
    Specimen,
    TiltScheme,
    TiltSeries,
)
from simulators.cryoet.specimen.deformation import STRUCTURE
from simulators.cryoet.tilt.parameters import IMAGE, LENS, PARTICLE, SERIES

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

REPLICATES = 8
CLUSTER = Specimen.from_atoms(
    [[10, 0, 3], [-5, 8, 0], [0, -11, -4], [3, 3, 12], [-8, -3, 5]],
    [6, 8, 16, 7, 6],
    weights=[60, 40, 30, 50, 70],
    b_factors=300.0,
    residues=Residues(np.arange(5), np.array(list("AAABB")), np.arange(5), np.ones(5, dtype=bool)),
)
BENDING = Deformation(1, 40.0, [Domain(((3.0, 3.0, 12.0), (-5.0, 8.0, 0.0)), chain="B")], [1.0], [10.0])
PIXEL = 4.0
# Names, and the scale of the smoothing in natural units: an aperture's edge is a fiftieth of its radius wide.
GROUPS = {
    "aperture": (("aperture_um", "focal_length_mm"), 0.002),
    "envelopes": (("energy_spread_ev", "cc_mm", "convergence_mrad", "b_factor"), 0.02),
    "phases": (tuple(n for n in LENS if n.endswith(("kv", "defocus_um", "cs_mm", "contrast", "shift_deg"))), 0.02),
    "astigmatism": (("astigmatism_um", "astigmatism_angle_deg"), 0.02),
    "series": ((*SERIES, "dose_e_per_angstrom2"), 0.02),
    # Image 1 is the first taken: its dose acts on both.
    "images": (tuple(f"{name}[1]" for name in IMAGE), 0.01),
    "particles": (tuple(f"{name}[1]" for name in PARTICLE), 0.01),
    "structure": (("mode_angstrom[0]", "domain_deg[0]"), 0.1),
}
# Settings at which every one of them acts, also on so coarse an image: an envelope that is felt.
OPTICS = Microscope(
    defocus_um=2.5,
    astigmatism_um=0.3,
    astigmatism_angle_deg=20.0,
    phase_shift_deg=30.0,
    energy_spread_ev=2.0,
    cc_mm=4.0,
    convergence_mrad=0.1,
    cs_mm=5.0,
    b_factor_angstrom2=100.0,
)


class Case(NamedTuple):
    names: tuple[str, ...]
    scale: float
    box: Simulator
    theta: torch.Tensor
    directions: torch.Tensor  # (d, images, rows, columns), each exact derivative over its square


@pytest.fixture(scope="module", params=list(GROUPS))
def case(request: pytest.FixtureRequest) -> Case:
    names, scale = GROUPS[request.param]
    optics = replace(OPTICS, aperture_um=11.0) if request.param == "aperture" else OPTICS
    # Places that are not between two pixels in either image: there the box of a projection moves on by one.
    particles = [Particle(CLUSTER, 5.0, 2.0, 40.0, 10, 20, 30), Particle(CLUSTER, 17.0, -2.0, -60.0, 70, 80, 90)]
    series = TiltSeries(
        particles,
        TiltScheme((-30.0, 20.0), (1, 0)),
        (24, 24),
        PIXEL,
        optics,
        Detector(dose_e_per_angstrom2=3.0),
        names,
        mode="smooth",
        tilt_axis_deg=20.0,
        x_tilt_deg=3.0,
        pre_tilt_deg=4.0,
        margin_pixels=8,
        shifts_angstrom=[[-3.1, -3.0], [-3.0, 5.4]],
        bounds={n: (-40, 40) for n in names if n.startswith(("tilt_deg", "pre_tilt"))},
        deformation=BENDING if request.param == "structure" else Deformation(),
    )
    box = bridge.as_simulator(
        lambda x: series.image(torch.as_tensor(x)).numpy(),
        names=names,
        natural_scale=series.space.natural_scale,
        vectorized=True,
    )
    theta = torch.from_numpy(series.reference)
    exact = torch.func.jacfwd(series.image)(theta).movedim(-1, 0)
    # One question a parameter: how much of its own derivative does the estimate see?
    return Case(names, scale, box, theta, exact / exact.square().sum(dim=(1, 2, 3), keepdim=True))


def shares(case: Case, scale: float, replicates: int) -> torch.Tensor:
    """<direction_k, estimated d image / d theta_k>, whose exact value is 1: (replicates, d), independent draws."""
    smoothed = bridge.smooth(
        case.box,
        seed=5,
        num_samples=4 * len(case.names),
        scale=scale,
        points="antithetic-orthogonal",
        covariate="regression",
    )
    estimate = smoothed.estimate(case.theta.expand(replicates, -1))
    assert estimate.covariate == "regression"
    return torch.einsum("kthw,rthwk->rk", case.directions, estimate.jacobian())


def test_every_kind_of_parameter_is_here() -> None:
    kinds, known = (
        {re.sub(r"\[\w\]", "[*]", name) for name in names}
        for names in (
            [name for names, _ in GROUPS.values() for name in names],
            (*SERIES_PARAMETER_NAMES, *(p.name for p in STRUCTURE.values())),
        )
    )
    assert kinds == known


def test_the_smoothed_gradient_is_the_exact_one_within_its_standard_error(case: Case) -> None:
    samples = shares(case, case.scale, REPLICATES)
    error = samples.std(0) / np.sqrt(REPLICATES)
    deviation = (samples.mean(0) - 1).abs()
    # What the smoothing itself adds, of the order of its scale squared.
    bias = 1e-3
    for k, name in enumerate(case.names):
        assert error[k] < 0.005, (name, error[k])
        assert deviation[k] < 4 * error[k] + bias, (name, deviation[k], error[k])
        # The same comparison notices a gradient that is off by a thirtieth.
        assert (samples.mean(0)[k] - 31 / 30).abs() > 4 * error[k] + bias, name


def test_what_the_smoothing_adds_falls_by_four_when_the_scale_is_halved(case: Case) -> None:
    """f_L - f = scale^2 / 2 f'' + O(scale^4), and likewise for the gradients; the draws are the same."""
    wide, half = (shares(case, k * case.scale, 1)[0] - 1 for k in (4, 2))
    visible = half.abs() > 1e-7
    assert int(visible.sum()) >= min(2, len(case.names))
    ratio = wide[visible] / half[visible]
    assert ((ratio > 3.8) & (ratio < 4.2)).all(), dict(zip(case.names, (wide / half).tolist(), strict=True))
