"""Every covariate of ours keeps the contract, and covariates that break it are told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

import bridge
from bridge.estimators.covariates import COVARIATES
from bridge.testing import CovariateContract
from tests.contracts.failing import failing
from tests.lab.ranks import OnForkedRanks


class TestAuto(CovariateContract):
    made = bridge.AutoCovariate()
    unbiased = False  # it takes the regression here


class TestNone(CovariateContract):
    made = bridge.NoCovariate()
    ignores_constants = False
    power = 0.3


class TestAtCentre(CovariateContract):
    made = bridge.AtCentre()


class TestLeaveOneOut(CovariateContract):
    made = bridge.LeaveOneOut()


class TestMeanOfRows(CovariateContract):
    made = bridge.MeanOfRows()
    unbiased = False  # short by 1/N


class TestLeaveOneBlockOut(CovariateContract):
    made = bridge.LeaveOneBlockOut()


class TestRegression(CovariateContract):
    made = bridge.Regression()
    unbiased = False


class TestBayesianQuadrature(CovariateContract):
    made = bridge.BayesianQuadrature()
    unbiased = False


def test_every_name_of_ours_is_here():
    tested = {type(suite.made) for suite in CovariateContract.__subclasses__() if suite.__module__ == __name__}
    ours = {kind for kind in COVARIATES.all().values() if kind.__module__.startswith("bridge.")}
    assert tested >= ours


@pytest.mark.parametrize("name", ["auto", "none", "f(x)", "loo", "mean", "block", "regression", "bq"])
def test_a_name_is_the_class(name):
    made = COVARIATES.make(name)
    assert made.name == name
    x = torch.tensor([0.2, -0.3], dtype=torch.float64)
    one, other = (
        bridge.smooth(np.tanh, seed=1, num_samples=16, scale=0.3, points="mc", covariate=given).estimate(x)
        for given in (name, made)
    )
    assert torch.equal(one.jacobian(), other.jacobian())
    assert (one.covariate, one.covariate_reason) == (other.covariate, other.covariate_reason)


@dataclass(frozen=True)
class Shrunk(bridge.Covariate):
    """A covariate with a setting: a part of the mean of the other rows."""

    part: float = 1.0
    unit: float = 1.0

    def centre(self, g, nodes):
        n = len(g)
        return self.unit * (g - self.part * (np.sum(g, axis=0) - g) / max(n - 1, 1)) / n


@pytest.mark.mpi
class TestWithASetting(OnForkedRanks, CovariateContract):
    made = Shrunk(part=0.8)
    others = (Shrunk(part=0.9), Shrunk())
    ignores_constants = False
    power = 0.3


@dataclass(frozen=True)
class Heavy(Shrunk):
    def weights(self, sample, projections):
        value, theta = super().weights(sample, projections)
        return 1.01 * value, theta


@dataclass(frozen=True)
class Peeking(Shrunk):
    """Weights that depend on the outputs, though it does not say so; it is handed none."""

    def weights(self, sample, projections):
        value, theta = super().weights(sample, projections)
        return value, theta + (0.0 if projections is None else projections.mean())


@dataclass(frozen=True)
class Unsure(Shrunk):
    def resolve(self, sample):
        return bridge.AtCentre(), "it is better"


@dataclass(frozen=True)
class Impossible(Shrunk):
    def centre(self, g, nodes):
        return np.full_like(g, np.nan)


@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (Shrunk(part=0.8), {"constants_change_no_gradient"}),
        (Shrunk(unit=1.25), {"gradients_have_the_exact_mean", "errors_fall_with_the_number_of_rows"}),
        (Heavy(), {"weights_of_the_value_sum_to_one_and_those_of_slopes_to_zero"}),
        (Unsure(), {"weights_of_the_value_sum_to_one_and_those_of_slopes_to_zero"}),
        (Impossible(), {"rows_that_are_dropped_have_no_weight"}),
    ],
)
def test_what_is_broken_is_told(broken, tests, tmp_path):
    assert tests <= failing(CovariateContract, tmp_path, made=broken)


def test_weights_see_no_outputs_that_are_not_asked_for():
    class Asking(CovariateContract):
        made = Peeking()

    Asking().test_it_says_before_the_run_what_it_needs()


def test_what_it_needs_has_to_be_said_before_the_run():
    smoothed = bridge.smooth(np.tanh, seed=0, num_samples=8, covariate=Unsure())
    with pytest.raises(bridge.InputError, match=r"needs_centre = True of the covariate Unsure\(.*resolves to AtCentre"):
        smoothed.estimate(torch.zeros(2))


def test_standard_errors_come_from_rows_where_it_says_what_it_subtracts():
    @dataclass(frozen=True)
    class Telling(Shrunk):
        subtracts = "mean"

    x = torch.zeros(2, dtype=torch.float64)
    settings = {"seed": 0, "num_samples": 32, "points": "mc", "scale": 0.2}
    told = bridge.smooth(np.tanh, covariate=Telling(), **settings).estimate(x)
    ours = bridge.smooth(np.tanh, covariate="loo", **settings).estimate(x)
    torch.testing.assert_close(told.jacobian_standard_error(), ours.jacobian_standard_error())
    with pytest.raises(bridge.InputError, match="Expected replicates for a standard error"):
        _ = bridge.smooth(np.tanh, covariate=Shrunk(), **settings).estimate(x).standard_error
    strategy = bridge.smooth(np.tanh, covariate=Telling(), **settings).strategy
    assert replace(strategy, covariate=bridge.NoCovariate()).covariate.name == "none"
