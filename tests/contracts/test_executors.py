"""Executors of Python's own keep the contract, and some that break it are told."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor

import pytest

from bridge.testing import ExecutorContract
from tests.contracts.failing import failing
from tests.lab.ranks import OnForkedRanks


@pytest.mark.mpi
class TestThreads(OnForkedRanks, ExecutorContract):
    def make(self):
        return ThreadPoolExecutor(3)


class TestProcesses(ExecutorContract):
    def make(self):
        return ProcessPoolExecutor(2)


@pytest.mark.filterwarnings("ignore")  # Dask's own
class TestDask(ExecutorContract):
    @pytest.fixture(autouse=True, scope="class")
    def client(self):
        distributed = pytest.importorskip("distributed", reason="dask.distributed is not installed")
        with distributed.Client(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0") as client:
            type(self).dask = client
            yield

    def make(self):
        return self.dask.get_executor()


class AtOnce(Executor):
    """Runs at once, in the thread that submits."""

    def submit(self, function, /, *arguments, **settings):
        future = Future()
        try:
            future.set_result(function(*arguments, **settings))
        except Exception as error:
            future.set_exception(error)
        return future


class TestAtOnce(ExecutorContract):
    def make(self):
        return AtOnce()


class Swapped(AtOnce):
    """Gives the first run's outputs to all that come later."""

    def __init__(self):
        self.first = None

    def submit(self, function, /, *arguments, **settings):
        future = super().submit(function, *arguments, **settings)
        if future.exception() is None:
            self.first = self.first or future
            return self.first
        return future


class Silent(AtOnce):
    """Says of each failure that it was something else."""

    def submit(self, function, /, *arguments, **settings):
        future = super().submit(function, *arguments, **settings)
        if future.exception() is not None:
            future = Future()
            future.set_exception(RuntimeError("a worker failed"))
        return future


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Swapped, "results_are_those_of_this_process"), (Silent, "what_a_run_raises_is_told")],
)
def test_broken_ones_are_told(kind, told, tmp_path):
    assert told in failing(ExecutorContract, tmp_path, make=lambda suite: kind())
