"""The executor of the example keeps the contract, and is found by its name."""

from __future__ import annotations

import bridge
from bridge.testing import ExecutorContract
from examples.extending.threads import PatientThreads, simulate


class TestPatientThreads(ExecutorContract):
    ranks = (2,)

    def make(self):
        return PatientThreads(workers=3)


def test_the_name_stands_for_it():
    smoothed = bridge.smooth(simulate, seed=0, num_samples=4, on="patient-threads")
    assert isinstance(smoothed.simulator.executor, PatientThreads)
