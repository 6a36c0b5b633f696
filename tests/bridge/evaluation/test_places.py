"""Where runs are evaluated, what becomes of those that fail, what is kept: the objects, and executors of any kind."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, InputError
from bridge.evaluation.failures import make_failures
from bridge.evaluation.memory import make_memory
from bridge.evaluation.places import make_place
from tests.lab.failing import fail, leave, smooth_one

THETA = torch.tensor([0.3, -0.2], dtype=torch.float64)


# -- at the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: bridge.Raise(retries=-1), "integer retries of at least 0, got -1"),
        (lambda: bridge.Drop(retries=0.5), "integer retries of at least 0, got 0.5"),
        (lambda: bridge.Raise(missing="drop"), "Unknown missing='drop'. Known: raise, ignore"),
        (lambda: bridge.Drop(at_least=50), "share of the runs, between 0 and 1, got 50"),
        (lambda: bridge.Penalty(np.nan), "finite value.*got nan"),
        (lambda: bridge.Penalty("1"), "finite value.*got '1'"),
        (lambda: bridge.Ranks(schedule="even"), "Unknown schedule='even'. Known: auto, static, dynamic"),
        (lambda: bridge.Ranks(per_evaluation=0), "integer per_evaluation of at least 1, got 0"),
        (lambda: bridge.Ranks(leaf_size=0), "positive integer leaf_size, got 0"),
        (lambda: bridge.Ranks(step_limit_s=0), "positive step_limit_s, got 0"),
        (lambda: bridge.Isolated(timeout_s=0), "positive timeout_s, got 0"),
        (lambda: bridge.Isolated(ranks=2), r"ranks=bridge.Ranks\(...\) in bridge.Isolated, got 2"),
        (lambda: bridge.Workers(0), "positive integer of workers, got 0"),
        (lambda: bridge.Workers(2, ranks=bridge.Ranks(per_evaluation=2)), "per_evaluation=1 with bridge.Workers"),
        (lambda: bridge.Executor("threads"), "Expected an executor, such as .*, got 'threads'"),
        (lambda: bridge.Executor(ThreadPoolExecutor), "Expected an executor, such as"),
        (lambda: bridge.Executor(ThreadPoolExecutor(1), at_once=0), "positive integer at_once, got 0"),
        (lambda: bridge.Memory(keep_mb=-1), "keep_mb >= 0, got -1"),
        (lambda: bridge.Memory(rank_mb=0), "positive rank_mb, got 0"),
        (lambda: bridge.Memory(store="runs"), r"Give store=bridge.Store\('runs'\)"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_where_it_is_made(make, said):
    with pytest.raises(InputError, match=said):
        make()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"failures": "ignore"}, r"Unknown failures='ignore'. Known: raise, drop, bridge.Raise"),
        ({"failures": "penalty"}, r"Give its number: bridge.Penalty\(value\)"),
        ({"on": 0}, "number of workers, 'process', an executor.* got 0"),
        ({"on": ThreadPoolExecutor}, "number of workers, 'process', an executor"),
        ({"memory": "runs"}, r"bridge.Memory\(...\) or a bridge.Store as memory, got 'runs'"),
    ],
)
def test_what_is_no_such_object_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        bridge.smooth(smooth_one, seed=0, **settings)


def test_short_forms_stand_for_objects(tmp_path):
    executor, store = ThreadPoolExecutor(1), bridge.Store(tmp_path)
    assert (make_failures("raise"), make_failures("drop")) == (bridge.Raise(), bridge.Drop())
    assert [make_place(given) for given in (None, 3, "process", executor)] == [
        bridge.Ranks(),
        bridge.Workers(3),
        bridge.Isolated(),
        bridge.Executor(executor),
    ]
    assert (make_memory(None), make_memory(store)) == (bridge.Memory(), bridge.Memory(store=store))


# -- executors ---------------------------------------------------------------------------------------------------------


class Threads:
    """The interface of an executor, and nothing else: Dask's, say, is of another class."""

    def __init__(self, count: int = 2) -> None:
        self._pool, self.submitted = ThreadPoolExecutor(count), 0

    def submit(self, function, /, *args, **kwargs) -> Future:
        self.submitted += 1
        return self._pool.submit(function, *args, **kwargs)

    def shutdown(self, wait=True) -> None:
        raise AssertionError("it is the caller's")


def everything(function, **settings):
    """Value, gradient, Jacobian and failures."""
    smoothed = bridge.smooth(function, seed=3, num_samples=24, points="mc", **settings)
    theta = THETA.clone().requires_grad_()
    value = smoothed(theta)
    (gradient,) = torch.autograd.grad((value**2).sum(), theta)
    estimate = smoothed.estimate(THETA)
    return value.detach(), gradient, estimate.jacobian(), estimate.failures


def same(got, want):
    return all(torch.equal(a, b) for a, b in zip(got[:3], want[:3], strict=True)) and got[3] == want[3]


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(3), lambda: ProcessPoolExecutor(2), Threads])
@pytest.mark.parametrize("failures", [bridge.Drop(), bridge.Drop(retries=1), bridge.Penalty(2.0)], ids=str)
def test_an_executor_gives_the_bits_of_one_process_also_where_runs_fail(make, failures):
    executor = make()
    got = everything(fail, failures=failures, on=executor)
    assert same(got, everything(fail, failures=failures))
    assert got[3]["error"] > 1
    # It is the caller's, and goes on.
    assert executor.submit(int, "7").result() == 7


def test_executors_of_other_packages():
    loky = pytest.importorskip("loky")
    executor = loky.get_reusable_executor(max_workers=2)
    assert same(everything(fail, failures="drop", on=executor), everything(fail, failures="drop"))


def test_dask():
    distributed = pytest.importorskip("distributed")
    with distributed.Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        on = client.get_executor()
        assert same(everything(fail, failures="drop", on=on), everything(fail, failures="drop"))


def test_so_many_runs_are_under_way_as_the_executor_says():
    """After the first, four runs wait for each other: with fewer at once none would end."""
    meeting, lock, seen = threading.Barrier(4, timeout=20), threading.Lock(), []

    def meets(x):
        with lock:
            seen.append(1)
            waits = 1 < len(seen) <= 5
        if waits:
            meeting.wait()
        return x

    simulator = bridge.as_simulator(meets, repeatable=True)
    # Where runs may fail rows go singly, however fast the first one was: else several are one call, in one thread.
    value = bridge.smooth(simulator, seed=0, num_samples=16, failures="drop", on=ThreadPoolExecutor(4))(THETA)
    assert torch.equal(value, bridge.smooth(lambda x: x, seed=0, num_samples=16)(THETA))
    assert len(seen) == 16


def test_the_first_call_is_alone():
    """What looks at it (two runs of the first row) must not meet others."""
    lock, inside, most = threading.Lock(), [], []

    def counts(x):
        with lock:
            inside.append(1)
            most.append(len(inside))
        threading.Event().wait(0.01)
        with lock:
            inside.pop()
        return x

    bridge.smooth(counts, seed=0, num_samples=16, on=ThreadPoolExecutor(4))(THETA)
    assert most[:2] == [1, 1]
    assert 1 < max(most) <= 4
    most.clear()
    bridge.smooth(counts, seed=0, num_samples=16, on=bridge.Executor(ThreadPoolExecutor(4), at_once=1))(THETA)
    assert max(most) == 1


def test_a_crash_that_breaks_the_executor_says_what_to_do():
    with pytest.raises(EvaluationError, match=r"evaluate 'leave' at parameters .*bridge\.Workers"):
        bridge.smooth(leave, seed=3, num_samples=24, points="mc", on=ProcessPoolExecutor(1))(THETA)


def test_what_cannot_be_sent_is_told_and_stays_with_threads():
    lock = threading.Lock()

    def holds(x):
        with lock:
            return x

    with pytest.raises(InputError, match="sent to another process, got 'holds'"):
        bridge.smooth(holds, seed=0, on=ProcessPoolExecutor(1))
    with pytest.raises(InputError, match="sent to another process"):
        bridge.smooth(holds, seed=0, on=Threads())
    smoothed = bridge.smooth(holds, seed=0, on=ThreadPoolExecutor(2))
    assert torch.equal(smoothed(THETA), bridge.smooth(lambda x: x, seed=0)(THETA))


def test_an_interrupt_begins_no_further_run():
    begun = []

    def interrupts(x):
        begun.append(os.getpid())
        if len(begun) == 3:
            raise KeyboardInterrupt
        return x

    simulator = bridge.as_simulator(interrupts, repeatable=True)
    with pytest.raises(KeyboardInterrupt):
        bridge.smooth(simulator, seed=0, num_samples=64, on=ThreadPoolExecutor(1))(THETA)
    assert len(begun) < 16  # of 64: no more than had been submitted


def test_a_fit_goes_on_under_another_executor(tmp_path):
    target = smooth_one(np.array([0.35, -0.25]))

    def fitted(run, on, stop=None, watch="off"):
        return bridge.fit(
            smooth_one,
            target,
            [0.3, -0.2],
            seed=0,
            method=bridge.Kriging(rounds=4),
            stop=stop,
            run=run,
            on=on,
            watch=watch,
        )

    class Killed(Exception):  # noqa: N818
        pass

    def die(step):
        if step.step == 1:
            raise Killed

    with pytest.raises(Killed):
        fitted(bridge.Run(tmp_path, every_s=0), ThreadPoolExecutor(2), watch=die)
    result = fitted(bridge.Run(tmp_path, every_s=0), Threads())
    assert result.history == fitted(None, None).history
    assert result.parameters.tolist() == fitted(None, 2).parameters.tolist()
