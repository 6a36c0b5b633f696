"""Simulators in processes of their own: crashes and hangs are failed evaluations, and nothing is left behind."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import psutil
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.evaluation.workers import IsolatedSimulator
from bridge.simulator.function import as_simulator
from tests.lab.failing import crash, fail, hang, leave, smooth_one

THETA = torch.tensor([0.3, -0.2], dtype=torch.float64)


def isolated(function, **kwargs):
    return IsolatedSimulator(as_simulator(function), **kwargs)


def call(simulator, *rows):
    return simulator(np.array(rows, dtype=np.float64), np.arange(len(rows), dtype=np.uint64))


def test_it_gives_the_same_bits():
    kwargs = {"seed": 0, "num_samples": 24, "scale": 0.5}
    for keep in (24.0, 0.0):
        pair = []
        for on in (None, "process"):
            theta = THETA.clone().requires_grad_()
            value = bridge.smooth(smooth_one, on=on, memory=bridge.Memory(keep_mb=keep), **kwargs)(theta)
            (gradient,) = torch.autograd.grad((value**2).sum(), theta)
            pair.append((value.detach(), gradient))
        assert torch.equal(pair[0][0], pair[1][0])
        assert torch.equal(pair[0][1], pair[1][1])


def test_a_process_serves_many_rows_and_knows_the_simulator():
    seen = as_simulator(lambda x, seed: np.array([os.getpid(), seed]), names=["a"], seeded=True)
    simulator = IsolatedSimulator(seen)
    first, second = call(simulator, [0.0], [1.0]), call(simulator, [2.0])
    assert first[0, 0] == first[1, 0] == second[0, 0] != os.getpid()
    assert first[:, 1].tolist() == [0, 1]
    assert simulator.space is seen.space
    assert simulator.output_shape is None
    assert simulator.structure is None


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        (crash, EvaluationError, "SIGSEGV"),
        (leave, EvaluationError, "exit status 7"),
        (hang, EvaluationTimeoutError, "within 0.5 s"),
        (fail, EvaluationError, "no convergence"),
    ],
)
def test_a_failure_is_an_error_that_says_where_and_the_next_row_runs(function, error, said):
    simulator = isolated(function, timeout_s=0.5)
    with pytest.raises(error, match=r"\[1\.5, 0\.0\]") as raised:
        call(simulator, [0.0, 0.0], [1.5, 0.0])
    assert said in str(raised.value)
    assert function.__name__ in str(raised.value)
    np.testing.assert_array_equal(call(simulator, [0.5, 0.1])[0], smooth_one(np.array([0.5, 0.1])))


@pytest.mark.parametrize("function", [crash, leave, hang, fail])
def test_failures_are_dropped_each_paid_once(function):
    kwargs = {"seed": 3, "num_samples": 16, "points": "mc", "failures": "drop"}
    begin = time.monotonic()
    estimate = bridge.smooth(function, on=bridge.Isolated(timeout_s=0.3), **kwargs).estimate(THETA)
    took = time.monotonic() - begin
    plain = bridge.smooth(fail, **kwargs).estimate(THETA)
    assert estimate.num_failed == plain.num_failed > 1
    assert torch.equal(estimate.jacobian(), plain.jacobian())
    if function is hang:
        assert took > 0.3 * estimate.num_failed  # each waited for


def test_own_errors_stay_what_they_are():
    def refuse(x):
        raise OutputError("no image")

    with pytest.raises(EvaluationError, match="no image"):
        call(isolated(refuse), [0.0])
    with pytest.raises(InputError, match="positive"):
        isolated(smooth_one, timeout_s=0)
    with pytest.raises(InputError, match=r"Unknown on= 'thread'\. Known: ([a-z-]+, )*process"):
        bridge.smooth(smooth_one, seed=0, on="thread")
    lock = threading.Lock()
    with pytest.raises(InputError, match="sent to another process"):
        isolated(lambda x: (lock, x)[1])


class Unloadable:
    def __reduce__(self):
        return (int, ("not a number",))


def test_what_does_not_load_there_is_a_set_up_error():
    thing = Unloadable()
    with pytest.raises(SetupError, match="ValueError"):
        call(isolated(lambda x: (thing, x)[1]), [0.0])


def test_the_child_sees_no_launcher(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")

    def look(x):
        return np.array(["PMI_RANK" in os.environ, "OMPI_ALLOW_RUN_AS_ROOT" in os.environ], dtype=float)

    assert call(isolated(look), [0.0])[0].tolist() == [0.0, 1.0]


def test_children_and_what_they_start_end_with_the_simulator():
    def spawn(x):
        sleeper = subprocess.Popen(["sleep", "600"])
        return np.array([os.getpid(), sleeper.pid])

    simulator = isolated(spawn)
    family = [psutil.Process(int(pid)) for pid in call(simulator, [0.0])[0]]
    simulator.close()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_the_child_ends_when_the_parent_is_killed(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        textwrap.dedent("""
        import os, sys, time
        import numpy as np
        from bridge.evaluation.workers import IsolatedSimulator
        from bridge.simulator.function import as_simulator
        def f(x):
            if x[0] > 0:
                print(os.getpid(), flush=True)
                while True:
                    pass
            return x
        simulator = IsolatedSimulator(as_simulator(f))
        simulator(np.ones((1, 1)), np.zeros(1, dtype=np.uint64))
        """)
    )
    with subprocess.Popen([sys.executable, path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
    assert not psutil.wait_procs([child], timeout=10)[1]


@pytest.mark.mpi
def test_ranks_have_children_of_their_own_which_may_use_mpi(run_ranks):
    program = """
    import numpy as np, torch, bridge, os

    def f(x):
        from mpi4py import MPI  # a world of its own
        if x[0] > 1.0:
            os.abort()
        return np.array([x.sum(), MPI.COMM_WORLD.Get_size()])

    smoothed = bridge.smooth(f, seed=3, num_samples=16, points="mc", failures="drop", on="process")
    e = smoothed.estimate(torch.tensor([0.3, -0.2], dtype=torch.float64))
    jacobian = e.jacobian()
    if bridge.is_root():
        print(e.num_failed, e.value.tolist(), jacobian[0].tolist())
    """
    one, two = (run_ranks(n, program, timeout=60) for n in (1, 2))
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout == two.stdout
    failed, value = one.stdout.split(" ", 1)
    assert int(failed) > 1
    assert ast.literal_eval(value.split("] ")[0] + "]")[1] == pytest.approx(1.0)
