"""The point set of the example keeps the contract, on one rank and on two, and says what is true."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from extending.rank1_lattice import Rank1Lattice, generating_vector

import bridge
from bridge.estimators.points import get_points
from bridge.testing import PointSetContract
from tests.lab.ranks import OnForkedRanks

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "extending" / "rank1_lattice.py"


@pytest.mark.mpi
class TestRank1Lattice(OnForkedRanks, PointSetContract):
    made = Rank1Lattice()
    others = (Rank1Lattice(decay=0.3),)
    feasible = ((8, 2), (31, 3), (60, 4), (1, 1))
    stratified = True


def test_it_has_a_name_and_pairs():
    assert get_points("rank1-lattice") == Rank1Lattice()
    assert get_points("antithetic-rank1-lattice") == bridge.Antithetic(Rank1Lattice())


@pytest.mark.parametrize("n", [13, 21, 32])
def test_the_second_component_is_the_best_there_is(n):
    """Against a sum over all numbers, in another form: B_2 by its Fourier series."""
    frequencies = np.arange(1, 4000)

    def kernel(x):
        return 1 + 0.8 * 2 * np.sum(np.cos(2 * np.pi * np.outer(x, frequencies)) / frequencies**2, axis=1)

    i = np.arange(n)
    # Of the first coordinate the decay is 1.
    first = 1 + (kernel(i / n) - 1) / 0.8
    error = {z: np.sum(first * kernel(i * z % n / n)) for z in range(1, n) if np.gcd(z, n) == 1}
    z = generating_vector(n, 2, 0.8)
    assert z[0] == 1
    assert error[z[1]] == pytest.approx(min(error.values()), rel=1e-3)
    assert error[z[1]] < 0.9 * error[1]


def test_differences_of_points_are_points():
    n = 21
    u = Rank1Lattice().uniform(n, 3, np.random.default_rng(0))
    lattice = {tuple(np.round((point - u[0]) * n).astype(int) % n) for point in u}
    assert len(lattice) == n
    for a, b in itertools.product(lattice, repeat=2):
        assert tuple((np.array(a) - b) % n) in lattice


def test_what_it_prints_is_true(run_alone):
    done = run_alone(SCRIPT)
    assert done.returncode == 0, done.stderr
    plain, lattice = map(float, re.findall(r"to (\d\.\d+)", done.stdout))
    assert lattice < 0.6 * plain
