"""The density of the example keeps the contract, on one rank and on two, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from extending.epanechnikov import Epanechnikov

import bridge
from bridge.estimators.distributions import get_distribution
from bridge.testing import DistributionContract
from tests.lab.ranks import OnForkedRanks

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "extending" / "epanechnikov.py"


@pytest.mark.mpi
class TestEpanechnikov(OnForkedRanks, DistributionContract):
    made = Epanechnikov()


def test_it_has_a_name():
    assert isinstance(get_distribution("epanechnikov"), Epanechnikov)
    assert Epanechnikov.name == "epanechnikov"


def test_icdf_is_the_root_of_the_cubic():
    u = np.linspace(0.001, 0.999, 41)
    e = Epanechnikov().icdf(u)
    np.testing.assert_allclose((2 + 3 * e - e**3) / 4, u, atol=1e-15)


def test_no_run_leaves_the_box():
    asked = []

    def f(theta):
        asked.append(theta.copy())
        return theta

    bridge.smooth(f, seed=0, num_samples=512, scale=0.1, distribution=Epanechnikov())([0.3, 0.6])
    away = np.abs(np.array(asked) - [0.3, 0.6])
    assert 0.09 < away.max() < 0.1


def test_what_it_prints_is_true(run_alone):
    done = run_alone(SCRIPT)
    assert done.returncode == 0, done.stderr
    value, exactly, slope, exact_slope, least, most = map(float, re.findall(r"-?\d\.\d+", done.stdout))
    assert (exactly, exact_slope) == (0.784, 1.26)
    assert abs(value - exactly) < 0.002
    assert abs(slope - exact_slope) < 0.05
    assert -0.3 < least < most < 0.7
