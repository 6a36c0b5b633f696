"""Every density of ours keeps the contract, and densities that break it are told."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from scipy import special, stats

import bridge
from bridge.estimators.distributions import DISTRIBUTIONS
from bridge.testing import DistributionContract
from tests.contracts.failing import failing


class TestGaussian(DistributionContract):
    made = bridge.Gaussian()


class TestLogistic(DistributionContract):
    made = bridge.Logistic()


class TestGumbel(DistributionContract):
    made = bridge.Gumbel()


class TestCauchy(DistributionContract):
    made = bridge.Cauchy()


class TestLaplace(DistributionContract):
    made = bridge.Laplace()


class TestTriangular(DistributionContract):
    made = bridge.Triangular()


def test_every_name_of_ours_is_here():
    tested = {type(suite.made) for suite in DistributionContract.__subclasses__() if suite.__module__ == __name__}
    ours = {kind for kind in DISTRIBUTIONS.all().values() if kind.__module__.startswith("bridge.")}
    assert tested >= ours


class Normal(bridge.Distribution):
    """The Gaussian again, of which one thing at a time is broken."""

    symmetric = True

    def icdf(self, u):
        return special.ndtri(u)

    def log_prob(self, e):
        return -0.5 * e * e - 0.5 * np.log(2 * np.pi)


class TestWithoutAScoreOfItsOwn(DistributionContract):
    made = Normal()


class Wide(Normal):
    def icdf(self, u):
        return 1.01 * special.ndtri(u)


class Unnormalised(Normal):
    def log_prob(self, e):
        return -0.5 * e * e - 0.9


class WrongSign(Normal):
    def score(self, e):
        return -np.asarray(e)


class Steep(Normal):
    def score_from_uniform(self, u):
        return 1.1 * self.icdf(u)


class Lopsided(bridge.Distribution):
    symmetric = True

    def icdf(self, u):
        return stats.gumbel_r.ppf(u)

    def log_prob(self, e):
        return stats.gumbel_r.logpdf(e)


class Kinked(bridge.Distribution):
    """Laplace's density, without the word of its kink."""

    symmetric = True

    def icdf(self, u):
        return stats.laplace.ppf(u)

    def log_prob(self, e):
        return -np.abs(e) - np.log(2)

    def score(self, e):
        return np.sign(e)

    def second_score(self, e):
        return np.ones_like(e)


class Informed(Normal):
    fisher_information = 2.0


class Bent(Normal):
    def second_score(self, e):
        return e * e


class Endless(Normal):
    def icdf(self, u):
        return np.where(u < 1e-15, -np.inf, special.ndtri(u))


class Fixed(Normal):
    """Numbers that depend on those beside them."""

    def icdf(self, u):
        return special.ndtri(u) + (1e-3 if np.size(u) > 5 else 0.0)


class OfAFile(Normal):
    def __init__(self, file):
        self.file = file


@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (Wide, {"icdf_inverts_the_integral_of_the_density"}),
        (Unnormalised, {"icdf_inverts_the_integral_of_the_density"}),
        (WrongSign, {"score_is_minus_the_slope_of_log_prob", "the_score_has_the_moments_that_gradients_need"}),
        (Steep, {"numbers_stay_finite_at_both_ends", "smoothing_with_it_is_the_integral"}),
        (Lopsided, {"it_is_symmetric_where_it_says_so"}),
        (Kinked, {"second_score_is_that_of_the_density"}),
        (Informed, {"fisher_information_is_as_stated"}),
        (Bent, {"second_score_is_that_of_the_density"}),
        (Endless, {"numbers_stay_finite_at_both_ends"}),
        (Fixed, {"many_numbers_at_once_are_each_its_own"}),
    ],
)
def test_what_is_broken_is_told(broken, tests, tmp_path):
    assert tests <= failing(DistributionContract, tmp_path, made=broken())


def test_what_cannot_be_seen_is_told(tmp_path):
    with (tmp_path / "open.txt").open("w") as file:
        suite = type("TestOpen", (DistributionContract,), {"made": OfAFile(file)})()
        with pytest.raises((bridge.InputError, pickle.PicklingError)):
            suite.test_its_identity_says_what_it_is()


class Scaled(Normal):
    """A density with a setting: the width of a Gaussian."""

    def __init__(self, width=1.0):
        self.width = width

    def icdf(self, u):
        return self.width * special.ndtri(u)

    def log_prob(self, e):
        return -0.5 * (e / self.width) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(self.width)


class TestWithASetting(DistributionContract):
    made = Scaled(0.7)
    others = (Scaled(0.8), Scaled())
