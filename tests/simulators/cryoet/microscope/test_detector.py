"""Noise of the detector, and what one noisy micrograph can tell: the Cramer-Rao bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from bridge.errors import InputError
from simulators.cryoet import CryoET, Detector, Specimen, cramer_rao
from simulators.cryoet.microscope.detector import mtf_filter, noise, poisson_quantile

pytest.importorskip("gemmi", reason="the cryo-EM simulator needs gemmi")

# Two-sided 1e-6 of the normal distribution.
LIMIT = 4.89


def blob(**options: object) -> CryoET:
    specimen = Specimen.from_atoms([[0, 0, 0], [40, 25, 0], [-35, 50, 0]], [6, 6, 6], weights=120.0, b_factors=400.0)
    settings = {"shape": (48, 48), "mode": "smooth", **options}
    return CryoET(specimen, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["poisson", "full"])
@pytest.mark.parametrize("rate", [0.7, 9.0, 49.0, 51.0, 360.0])
@pytest.mark.parametrize("dqe", [1.0, 0.4])
def test_mean_and_variance_of_the_noise(kind: str, rate: float, dqe: float) -> None:
    """Mean 0 and variance lambda (counting) or lambda / DQE, at alpha = 1e-6; 10 % off would be rejected."""
    detector = Detector(dqe=dqe)
    field = torch.full((300, 300), rate, dtype=torch.float64)
    sample = noise(field, detector, 7, kind).numpy().ravel()
    n = sample.size
    variance = rate / dqe if kind == "full" else rate
    # Excess kurtosis is at most 1 / lambda.
    error = variance * math.sqrt((2 + 1 / rate) / n)

    def z(mean: float, expected: float) -> float:
        return max(abs(sample.mean() - mean) / math.sqrt(variance / n), abs(sample.var() - expected) / error)

    assert z(0.0, variance) < LIMIT
    assert z(0.0, 1.1 * variance) > LIMIT
    assert z(0.1 * math.sqrt(rate), variance) > LIMIT


def quantile(z: np.ndarray, rate: float) -> np.ndarray:
    normal = torch.from_numpy(z)
    return poisson_quantile(normal, torch.full_like(normal, rate)).numpy()


@pytest.mark.parametrize("rate", [0.0, 0.3, 4.0, 30.0, 49.9])
def test_poisson_counts_are_exact_quantiles_at_low_rates(rate: float) -> None:
    z = np.linspace(-5, 5, 4001)
    ours = quantile(z, rate)
    assert np.array_equal(ours, scipy.stats.poisson.ppf(scipy.stats.norm.cdf(z), rate) if rate else 0 * z)


@pytest.mark.parametrize("rate", [50.0, 80.0, 360.0, 5000.0])
def test_poisson_counts_at_high_rates_have_the_moments_of_poisson(rate: float) -> None:
    """By quadrature over z: mean, variance and skewness; and nearly every count is the exact quantile."""
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    counts = quantile(scipy.special.ndtri(u), rate)
    # The smallest k with F(k) >= u from a table of F, since scipy's own inverse takes ten seconds; u is within 5.2
    # standard deviations.
    exact = np.searchsorted(scipy.stats.poisson.cdf(np.arange(int(rate + 8 * math.sqrt(rate))), rate), u)
    assert counts.mean() == pytest.approx(rate, abs=2e-3)
    assert counts.var() == pytest.approx(rate, rel=2e-3)
    assert ((counts - rate) ** 3).mean() == pytest.approx(rate, rel=0.05)
    assert np.abs(counts - exact).mean() < 0.01
    assert np.array_equal(exact[::20_000], scipy.stats.poisson.ppf(u[::20_000], rate))


def test_counts_of_one_seed_rise_with_the_rate() -> None:
    """Common random numbers: a little more dose changes a few counts by one, and lowers none."""
    z = np.random.default_rng(0).normal(size=10_000)
    for rate in (5.0, 200.0):
        difference = quantile(z, rate * 1.001) - quantile(z, rate)
        assert set(np.unique(difference)) <= {0.0, 1.0}
        assert difference.mean() == pytest.approx(rate * 1e-3, rel=0.5)


def test_noise_of_a_whole_image() -> None:
    """Variance lambda / DQE over seeds, filtered by the MTF like the signal."""
    clean = blob(detector=Detector(dqe=0.5, mtf=0.4))
    noisy = clean.replace(noise="full")
    seeds = np.arange(60, dtype=np.uint64)
    inputs = np.tile([1.5, 0.0, 0.0, 0.0], (60, 1))
    deviation = noisy(inputs, seeds) - clean(inputs[:1], seeds[:1])
    transfer = mtf_filter(clean.detector, (48, 48), torch.float64)
    assert transfer is not None
    power = (np.abs(np.fft.rfft2(deviation)) ** 2).mean(axis=0) / 48**2
    expected = 40 * 9 / 0.5 * transfer.numpy() ** 2
    # Each of the 48 x 25 ratios is a mean of 60 exponentials (or chi-squares).
    ratio = power / expected
    assert ratio.mean() == pytest.approx(1.0, abs=0.03)
    assert transfer.numpy()[24, 0] == pytest.approx(0.4)
    low, high = ratio[transfer.numpy() > 0.8].mean(), ratio[transfer.numpy() < 0.35].mean()
    assert low == pytest.approx(high, rel=0.06)


def test_mtf_blurs_but_keeps_the_mean() -> None:
    sharp, soft = (blob(detector=Detector(mtf=m), shape=(64, 64)) for m in (None, 0.3))
    theta = torch.tensor([1.5, 0, 0, 0], dtype=torch.float64)
    a, b = sharp.image(theta), soft.image(theta)
    # The MTF is 1 at zero frequency and keeps the mean of the padded image; across the edges of the image that is cut
    # from it, the blur exchanges at most the contrast (a few counts of 360) of a pixel or two in 64.
    assert float(b.mean()) == pytest.approx(float(a.mean()), rel=1e-3)
    assert b.std() < a.std()
    table = blob(detector=Detector(mtf=((0.0, 1.0), (0.5, 1.0), (0.8, 1.0))), shape=(64, 64))
    assert torch.allclose(table.image(theta), a)


# --- Cramer-Rao ---------------------------------------------------------------------------------------------------


def test_cramer_rao_of_the_dose_in_closed_form() -> None:
    """lambda = dose x I: F = DQE sum lambda / dose^2."""
    sim = blob(parameters=("dose_e_per_angstrom2",), detector=Detector(dqe=0.6))
    theta = torch.tensor([25.0], dtype=torch.float64)
    bound = cramer_rao(sim, theta)
    assert bound.fisher[0, 0] == pytest.approx(0.6 * float(sim.electrons(theta).sum()) / 25.0**2)
    assert bound.standard_deviation[0] == pytest.approx(bound.fisher[0, 0] ** -0.5)


def test_cramer_rao_of_a_place_in_closed_form() -> None:
    """In focus without a lens a weak blob only attenuates, lambda = N exp(-2 mu): F is an integral of Gaussians."""
    b_factor, weight, pixel, dose, w = 800.0, 20.0, 3.0, 10.0, 0.3
    specimen = Specimen.from_atoms([[0, 0, 0]], [6], weights=weight, b_factors=b_factor)
    sim = CryoET(
        specimen,
        shape=(48, 48),
        pixel_size_angstrom=pixel,
        microscope={
            "defocus_um": 0.0,
            "cs_mm": 0.0,
            "amplitude_contrast": w,
            "energy_spread_ev": 0.0,
            "convergence_mrad": 0.0,
            "aperture_um": 0.0,
            "b_factor_angstrom2": 0.0,
        },
        detector=Detector(dose_e_per_angstrom2=dose, dqe=0.7),
        parameters=("x_angstrom", "y_angstrom"),
        mode="smooth",
    )
    from simulators.cryoet.microscope.physics import interaction_constant
    from simulators.cryoet.specimen.potential import displaced_volume, ice_potential, peng_coefficients

    # v is a sum of Gaussians A_i exp(-4 pi^2 r^2 / c_i) 4 pi / c_i; the solvent is the one with c = 4 pi V^(2/3) + B.
    terms = [(47.87765 * a, b + b_factor) for a, b in zip(*peng_coefficients(6), strict=True)]
    volume = displaced_volume(6)
    terms.append((-ice_potential() * volume, 4 * np.pi * volume ** (2 / 3) + b_factor))
    # int (dv/dx)^2 = sum_ij A_i A_j 4 pi^2 int q_x^2 exp(-(c_i + c_j) q^2 / 4) d^2q
    #               = 32 pi^3 sum_ij A_i A_j / (c_i + c_j)^2.
    integral = weight**2 * 32 * np.pi**3 * sum(a * b / (c + d) ** 2 for a, c in terms for b, d in terms)
    slope = 2 * w / math.sqrt(1 - w * w) * interaction_constant(300.0)
    expected = 0.7 * dose * slope**2 * integral
    fisher = cramer_rao(sim, [0.7, -0.4]).fisher
    # To first order in the (weak) attenuation.
    assert np.diag(fisher) == pytest.approx([expected, expected], rel=0.02)
    assert abs(fisher[0, 1]) < 1e-3 * expected


def test_cramer_rao_equals_finite_differences() -> None:
    sim = blob(parameters=("defocus_um", "x_angstrom", "rotation_deg", "dose_e_per_angstrom2"))
    theta = torch.tensor([1.5, 1.0, 5.0, 30.0], dtype=torch.float64)
    bound = cramer_rao(sim, theta)
    step = torch.tensor([1e-4, 1e-3, 1e-3, 1e-3], dtype=torch.float64)
    slopes = torch.stack(
        [(sim.electrons(theta + e) - sim.electrons(theta - e)) / (2 * e.sum()) for e in torch.diag(step)]
    )
    rate = sim.electrons(theta)
    fisher = torch.einsum("ihw,jhw,hw->ij", slopes, slopes, 0.8 / rate).numpy()
    size = np.sqrt(np.diag(fisher))
    assert bound.fisher / np.outer(size, size) == pytest.approx(fisher / np.outer(size, size), abs=1e-4)
    assert bound.standard_deviation == pytest.approx(np.sqrt(np.diag(np.linalg.inv(fisher))), rel=1e-3)
    # More unknowns can only widen a bound.
    alone = cramer_rao(sim.replace(parameters=("defocus_um",)), [1.5])
    assert alone.standard_deviation[0] <= bound.standard_deviation[0] * 1.05


def test_cramer_rao_is_reached_by_a_linear_estimate() -> None:
    """A weighted least-squares step from the truth, with exact derivatives, has the variance of the bound."""
    sim = blob(parameters=("x_angstrom", "defocus_um"), noise="full", detector=Detector(dqe=0.5))
    theta = np.array([0.0, 1.5])
    point = torch.from_numpy(theta)
    bound = cramer_rao(sim, theta)
    slopes = torch.func.jacfwd(sim.electrons)(point).reshape(-1, 2).numpy()
    rate = sim.electrons(point).numpy().ravel()
    images = sim(np.tile(theta, (400, 1)), np.arange(400, dtype=np.uint64)).reshape(400, -1).astype(np.float64)
    estimates = (images - rate) @ (slopes * (0.5 / rate)[:, None]) @ np.linalg.inv(bound.fisher)
    spread = estimates.std(axis=0) / bound.standard_deviation
    # A standard deviation of 400 values is known to 3.5 %.
    assert spread == pytest.approx([1.0, 1.0], abs=LIMIT * 0.0355)
    assert np.abs(estimates.mean(axis=0)).max() < (LIMIT / 20 * bound.standard_deviation).max()


def test_mtf_leaves_the_information_and_dead_pixels_take_theirs() -> None:
    plain = cramer_rao(blob(), [1.5, 0, 0, 0]).fisher
    blurred = cramer_rao(blob(detector=Detector(mtf=0.3)), [1.5, 0, 0, 0]).fisher
    assert np.array_equal(plain, blurred)
    holes = cramer_rao(blob(detector=Detector(dead_pixel_fraction=0.3)), [1.5, 0, 0, 0]).fisher
    assert 0.5 < np.trace(holes) / np.trace(plain) < 0.9


def test_cramer_rao_refuses_what_has_no_bound() -> None:
    with pytest.raises(InputError, match="smooth"):
        cramer_rao(blob(mode="hard"), [1.5, 0, 0, 0])
    with pytest.raises(InputError, match="z_angstrom compensate"):
        cramer_rao(blob(parameters=("defocus_um", "z_angstrom")), [1.5, 0.0])
    with pytest.raises(InputError, match="Expected 4 values"):
        cramer_rao(blob(), [1.5])
    with pytest.raises(InputError, match="does not on astigmatism_angle_deg"):
        cramer_rao(blob(parameters=("defocus_um", "astigmatism_angle_deg")), [1.5, 0.0])
