"""A run goes on under the same settings alone: also where a name stands for code of somebody's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import bridge
from bridge.estimators.covariates import COVARIATES
from bridge.estimators.distributions import DISTRIBUTIONS
from bridge.estimators.points import POINT_SETS
from bridge.fitting.robust import ROBUST_LOSSES
from bridge.registry import Registry
from tests.lab.fits import Killed


def simulate(x):
    return np.array([np.exp(-x[0]), x[0] * x[1], np.sin(x[1])])


def fit(folder, at=None, robust=None, **settings):
    def die(record):
        if record.step == at:
            raise Killed

    return bridge.fit(
        simulate,
        simulate([0.5, 0.3]),
        [0.2, 0.6],
        seed=0,
        method=bridge.Adam(steps=3, num_samples=8, **settings),
        misfit=bridge.LeastSquares(variance=0.1, robust=robust),
        run=bridge.Run(folder, every_s=0.0),
        watch=die,
    )


def density(power):
    class Mine(bridge.Distribution):
        symmetric = True

        def icdf(self, u):
            return np.log(u) - np.log1p(-u)

        def log_prob(self, e):
            return power * -np.abs(e) / power - 2 * np.log1p(np.exp(-np.abs(e)))

    return Mine


def points(offset):
    class Mine(bridge.PointSet):
        def uniform(self, n, d, rng):
            return (rng.random((n, d)) + offset) % 1 + 2.0**-54

    return Mine


def covariate(part):
    @dataclass(frozen=True)
    class Mine(bridge.Covariate):
        def centre(self, g, nodes):
            return (g - part * np.mean(g, axis=0)) / len(g)

    return Mine


def robust(factor):
    @dataclass(frozen=True)
    class Mine(bridge.RobustLoss):
        width: float = 2.0

        def rho(self, r):
            return factor * (np.sqrt(1 + r * r) - 1)

        def weight(self, r):
            return factor * (1 + r * r) ** -0.5

        def curvature(self, r):
            return factor * (1 + r * r) ** -1.5

    return Mine


@pytest.mark.parametrize("given", ["test-mine", "antithetic-test-mine", "the class"])
@pytest.mark.parametrize(
    ("setting", "registry", "made"),
    [
        ("distribution", DISTRIBUTIONS, density),
        ("points", POINT_SETS, points),
        ("covariate", COVARIATES, covariate),
        ("robust", ROBUST_LOSSES, robust),
    ],
)
def test_other_code_under_the_same_name_is_noticed(
    setting: str, registry: Registry, made, given: str, tmp_path, monkeypatch
):
    if given.startswith("antithetic") and setting != "points":
        return
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    def settings(number: float) -> dict:
        registry._registered.pop("test-mine", None)
        kind = registry.register("test-mine")(made(number))
        return {setting: kind() if given == "the class" else given}

    with pytest.raises(Killed):
        fit(tmp_path, at=1, **settings(1.0))
    with pytest.raises(bridge.InputError, match=setting):
        fit(tmp_path, **settings(0.5))
    assert len(fit(tmp_path, **settings(1.0)).history) == 3


def test_ours_are_named_by_their_names(tmp_path):
    """So that runs of before go on: what a name of ours stands for has this package's version."""
    with pytest.raises(Killed):
        fit(tmp_path, at=1, points="sobol", distribution="logistic", covariate="block")
    with pytest.raises(bridge.InputError, match=r"'sobol'.*'halton'"):
        fit(tmp_path, points="halton", distribution="logistic", covariate="block")


def test_a_variance_of_one_is_not_none_given(tmp_path):
    """The same misfit, but other errors, and a chi-square."""

    def fit(**settings):
        return bridge.fit(simulate, [0.5, 0.2, 0.3], [0.2, 0.6], seed=0, stop=12, run=tmp_path / "run", **settings)

    assert fit().chi_square is None
    with pytest.raises(bridge.InputError, match="variance was None"):
        fit(variance=1.0)
