"""The executor of the example keeps the contract, and is found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
from extending.threads import PatientThreads, simulate

import bridge
from bridge.testing import ExecutorContract
from tests.lab.ranks import OnForkedRanks

SCRIPT = Path(__file__).resolve().parents[3] / "examples" / "extending" / "threads.py"


@pytest.mark.mpi
class TestPatientThreads(OnForkedRanks, ExecutorContract):
    def make(self):
        return PatientThreads(workers=3)


def test_the_name_stands_for_it():
    smoothed = bridge.smooth(simulate, seed=0, num_samples=4, on="patient-threads")
    assert isinstance(smoothed.simulator.executor, PatientThreads)


def test_what_it_prints_is_true(run_alone):
    done = run_alone(SCRIPT)
    assert done.returncode == 0, done.stderr
    assert [float(line.split()[1]) for line in done.stdout.splitlines()[1:3]] == pytest.approx([0.5, 0.3], abs=1e-6)
    assert "the same numbers to the last bit: True" in done.stdout
