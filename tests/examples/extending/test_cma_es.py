"""The method of the example keeps the contract, on one rank and on two, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("cma", reason="pycma is not installed")

from extending.cma_es import CMAES

import bridge
from bridge.fitting.methods.base import METHODS
from bridge.testing import MethodContract
from tests.lab.ranks import OnForkedRanks

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "extending" / "cma_es.py"


@pytest.mark.mpi
class TestCMAES(OnForkedRanks, MethodContract):
    made = CMAES()
    others = (CMAES(population=9), CMAES(scale=0.5))


def test_it_has_a_name():
    assert METHODS.find("cma-es") is CMAES
    assert CMAES.name == "cma-es"


def test_one_parameter_is_refused():
    with pytest.raises(bridge.InputError, match="at least two parameters"):
        bridge.fit(lambda x: x, [1.0], [0.0], seed=0, method=CMAES())


def test_what_it_prints_is_true(run_alone):
    done = run_alone(SCRIPT)
    assert done.returncode == 0, done.stderr
    found = [float(line.split()[1]) for line in done.stdout.splitlines()[1:4]]
    assert found == pytest.approx([2.0, 0.4, 5.0], rel=5e-3)
    assert re.search(r"\(cma-es\)", done.stdout)
