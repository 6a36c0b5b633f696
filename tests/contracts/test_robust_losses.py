"""Every robust loss of ours keeps the contract, and losses that break it are told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import bridge
from bridge.fitting.robust import ROBUST_LOSSES, Cauchy, make_robust
from bridge.testing import RobustLossContract
from tests.contracts.failing import failing


class TestHuber(RobustLossContract):
    made = bridge.Huber()
    others = (bridge.Huber(2.0), bridge.SoftL1())
    convex = True


class TestCauchy(RobustLossContract):
    made = Cauchy()


class TestSoftL1(RobustLossContract):
    made = bridge.SoftL1()
    convex = True


def test_every_name_of_ours_is_here():
    tested = {type(suite.made) for suite in RobustLossContract.__subclasses__() if suite.__module__ == __name__}
    assert tested >= {kind for kind in ROBUST_LOSSES.all().values() if kind.__module__.startswith("bridge.")}


@dataclass(frozen=True)
class Welsch(bridge.RobustLoss):
    width: float = 2.9846

    def rho(self, r):
        return 0.5 * self.width**2 * (1 - np.exp(-((r / self.width) ** 2)))

    def weight(self, r):
        return np.exp(-((r / self.width) ** 2))

    def curvature(self, r):
        u = (r / self.width) ** 2
        return (1 - 2 * u) * np.exp(-u)


class TestWelsch(RobustLossContract):
    made = Welsch()
    others = (Welsch(2.0),)


@dataclass(frozen=True)
class Heavy(Welsch):
    def weight(self, r):
        return 2 * super().weight(r)


@dataclass(frozen=True)
class Bent(Welsch):
    def curvature(self, r):
        return self.weight(r)


@dataclass(frozen=True)
class Squares(Welsch):
    def rho(self, r):
        return 0.5 * r * r

    def weight(self, r):
        return np.ones_like(r)

    def curvature(self, r):
        return np.ones_like(r)


@dataclass(frozen=True)
class Lopsided(Welsch):
    def rho(self, r):
        return super().rho(np.maximum(r, 0))


@dataclass(frozen=True)
class Fixed(Welsch):
    """A width that counts for nothing."""

    def rho(self, r):
        return Welsch(2.0).rho(r)

    def weight(self, r):
        return Welsch(2.0).weight(r)

    def curvature(self, r):
        return Welsch(2.0).curvature(r)


@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (Heavy, {"the_weight_times_the_residual_is_the_slope", "it_is_half_the_square_of_small_residuals"}),
        (Bent, {"the_curvature_is_the_slope_of_the_slope"}),
        (Squares, {"large_residuals_count_for_less", "a_fit_with_it_is_not_led_astray_by_an_outlier"}),
        (Lopsided, {"it_does_not_know_signs"}),
        (Fixed, {"the_width_is_a_setting"}),
    ],
)
def test_what_is_broken_is_told(broken, tests, tmp_path):
    assert tests <= failing(RobustLossContract, tmp_path, made=broken())


def test_a_claim_of_convexity_is_looked_at(tmp_path):
    assert failing(RobustLossContract, tmp_path, made=Welsch(), convex=True) == {
        "the_curvature_is_the_slope_of_the_slope"
    }


def test_a_robust_loss_is_registered_by_the_one_decorator():
    bridge.register("test-welsch")(Welsch)
    try:
        assert make_robust("test-welsch") == Welsch()
        assert make_robust(("test-welsch", 2.0)) == Welsch(2.0)
    finally:
        del ROBUST_LOSSES._registered["test-welsch"]
