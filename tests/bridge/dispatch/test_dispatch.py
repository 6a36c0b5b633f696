"""Who evaluates what, and where: schedules, pools, drivers, groups of ranks; never a bit of the result."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.environment import device_index
from bridge.errors import InputError
from bridge.evaluation.rows import spilled

ENTRY = Path(__file__).resolve().parents[3] / "bridge" / "__main__.py"

# Runs of very different lengths, a vectorised simulator whose rows depend in their last bits on the others of a call,
# and everything that is kept, streamed, transposed or differentiated.
SCHEDULES = """
import hashlib, sys, time
import numpy as np, torch, bridge

schedule, workers = sys.argv[1], int(sys.argv[2])
A = np.random.default_rng(0).normal(size=(2, 300))

def uneven(x):
    time.sleep(0.02 if x[0] > 0.9 else 0.0004)
    return np.sin(x @ A).astype(np.float32)

def batched(x):
    return np.tanh(x @ A[:, :40])

def on(**more):
    ranks = bridge.Ranks(schedule=schedule, **more)
    return bridge.Workers(workers, ranks=ranks) if workers else ranks

streams = bridge.Memory(keep_mb=0)
theta = torch.tensor([[0.1, 0.4], [0.5, 0.6]], dtype=torch.float64, requires_grad=True)
digest = hashlib.sha256()
for n, more in (
    (24, {"points": "mc"}),
    (48, {"memory": streams, "covariate": "f(x)"}),
    (128, {"memory": streams}),
    (96, {"memory": streams, "on": on(leaf_size=1), "covariate": "f(x)"}),
    (24, {"points": "mc", "memory": bridge.Memory(rank_mb=0.001)}),
):
    smoothed = bridge.smooth(uneven, seed=0, num_samples=n, **{"on": on(), **more})
    y = smoothed(theta, step=n)
    (gradient,) = torch.autograd.grad((y**2).sum(), theta)
    e = smoothed.estimate(theta[0].detach())
    results = [y, gradient, e.jacobian()]
    if n == 24:
        results += [e.median(3), e.covariance(), e.median_jacobian(3)]
    for t in results:
        digest.update(t.detach().numpy().tobytes())
smoothed = bridge.smooth(bridge.as_simulator(batched, vectorized=True), seed=0, num_samples=300, on=on())
for step in range(2):
    digest.update(smoothed(theta.detach(), step=step).numpy().tobytes())
if bridge.is_root():
    print("digest", digest.hexdigest())
"""


@pytest.fixture(scope="module")
def serial_digest(run_alone):
    @functools.cache
    def run(*arguments):
        done = run_alone(SCHEDULES, *arguments, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_pool_gives_the_bits_of_one_process(serial_digest):
    one = serial_digest("auto", "0")
    assert one.startswith("digest ")
    assert serial_digest("auto", "3") == one


@pytest.mark.mpi
@pytest.mark.every_mpi
def test_any_schedule_gives_the_bits_of_one_process(serial_digest, run_ranks):
    one = serial_digest("auto", "0")
    for ranks, schedule, workers in ((2, "static", 0), (2, "dynamic", 2), (3, "dynamic", 0), (7, "dynamic", 0)):
        done = run_ranks(ranks, SCHEDULES, schedule, workers, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == one, (ranks, schedule, workers)


@pytest.mark.mpi
def test_idle_ranks_take_rows_off_busy_ones(run_ranks):
    """All long runs are in the first rank's share; evaluated by it alone they would take 16 x 60 ms."""
    done = run_ranks(
        2,
        """
        import time
        import numpy as np, torch, bridge

        began = []

        def f(x):
            began.append(time.monotonic())
            time.sleep(0.06 if len(x) and x[0] < 0.5 else 0.0)
            return x

        f = bridge.as_simulator(f, repeatable=True)
        theta = torch.zeros((2, 1), dtype=torch.float64)
        theta[1] = 1.0  # problem 1, short runs, is the second rank's share
        share = {}
        for schedule in ("static", "dynamic"):
            began.clear()
            ranks = bridge.Ranks(schedule=schedule, leaf_size=1)
            smoothed = bridge.smooth(f, seed=0, num_samples=16, scale=1e-3, on=ranks)
            smoothed(theta)
            share[schedule] = len(began)
        # By one rank: a launcher may put what two write on one line.
        shares = smoothed.dispatcher.each(f"{smoothed.dispatcher.rank} {share['static']} {share['dynamic']}")
        if bridge.is_root():
            print(*shares, sep=chr(10))
        """,
    )
    assert done.returncode == 0, done.stderr
    shares = {int(a): (int(b), int(c)) for a, b, c in map(str.split, done.stdout.splitlines())}
    assert shares[0][0] == shares[1][0] == 16
    assert shares[0][1] + shares[1][1] == 32
    assert shares[1][1] >= 22  # 16 of its own, and about half of the others


def test_the_pool_evaluates_at_the_same_time_and_survives_a_crash(tmp_path):
    def f(x):
        import os
        import time

        begin = time.monotonic()
        time.sleep(0.1)
        if x[0] > 1.0:
            os._exit(3)
        (tmp_path / f"{begin}").write_text(f"{os.getpid()} {begin} {time.monotonic()}", encoding="utf-8")
        return x

    simulator = bridge.as_simulator(f, repeatable=True)
    smoothed = bridge.smooth(simulator, seed=3, num_samples=16, points="mc", failures="drop", on=4)
    e = smoothed.estimate(torch.zeros(2, dtype=torch.float64), step=1)
    crashed = int((e._evaluation.problems[0].design.nodes.eps[:, 0] > 1.0).sum())
    assert crashed > 0
    assert e.failures == {"error": crashed}
    runs = [path.read_text(encoding="utf-8").split() for path in tmp_path.iterdir()]
    assert len(runs) == 16 - crashed
    assert len({process for process, *_ in runs}) >= 4
    spans = sorted((float(begin), float(end)) for _, begin, end in runs)
    assert any(later < end for (_, end), (later, _) in itertools.pairwise(spans))
    smoothed.simulator.close()


@pytest.mark.mpi
def test_a_serial_script_is_driven_to_the_same_bits(tmp_path, run_ranks, run_alone):
    text = """
import hashlib
import numpy as np, torch, bridge

def f(x):
    return np.sin(x @ np.arange(20.0).reshape(2, 10))

smoothed = bridge.smooth(f, seed=0, num_samples=32, points="mc")
theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
y = smoothed(theta)
(y**2).sum().backward()
e = smoothed.estimate(theta.detach(), 1)
digest = hashlib.sha256(y.detach().numpy().tobytes() + theta.grad.numpy().tobytes())
for t in (e.jacobian(), e.covariance(), e.median(3), e.jvp(torch.ones(2))):
    digest.update(t.numpy().tobytes())
del e
try:
    bridge.smooth(lambda x: np.nan * x, seed=0)(theta)
except bridge.BridgeError as error:
    digest.update(type(error).__name__.encode())
result = bridge.fit(f, f(np.array([0.3, 0.2])), [0.0, 0.0], seed=0, method=bridge.Kriging(rounds=5), run="run")
digest.update(result.parameters.tobytes())
print("digest", digest.hexdigest())
"""
    path = tmp_path / "script.py"
    path.write_text(text, encoding="utf-8")
    alone = run_alone(path)
    assert alone.stdout.startswith("digest "), alone.stderr
    done = run_ranks(3, ENTRY, "run", "--driver", path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    path.write_text("import bridge\nraise KeyError('mine')\n", encoding="utf-8")
    failed = run_ranks(2, ENTRY, "run", "--driver", path, timeout=60)
    assert failed.returncode != 0
    assert "KeyError: 'mine'" in failed.stderr


GROUPS = """
import sys
import numpy as np, torch, bridge

def parallel(x, comm):
    # Each rank of the group has a part of the numbers.
    part, whole = np.zeros(6), np.zeros(6)
    part[comm.Get_rank() :: comm.Get_size()] = np.sin(np.arange(6) + x.sum())[comm.Get_rank() :: comm.Get_size()]
    comm.Allreduce(part, whole)
    if x[0] > 2 and comm.Get_rank() == comm.Get_size() - 1:
        raise ValueError("too far")
    return whole

each = int(sys.argv[1])
simulator = bridge.as_simulator(parallel, parallel=True)
smoothed = bridge.smooth(
    simulator, seed=0, num_samples=64, points="mc", failures="drop",
    on=bridge.Ranks(per_evaluation=each, schedule="dynamic"),
)
e = smoothed.estimate(torch.zeros(2, dtype=torch.float64))
jacobian = e.jacobian()
if bridge.is_root():
    print(e.failures, e.value.tolist(), jacobian.tolist())
"""


@pytest.mark.mpi
def test_groups_of_ranks_evaluate_a_parallel_simulator(run_ranks):
    results = [run_ranks(n, GROUPS, each, timeout=120) for n, each in ((2, 2), (4, 2), (3, 3))]
    for done in results:
        assert done.returncode == 0, done.stderr
    assert len({done.stdout for done in results}) == 1
    assert results[0].stdout.startswith("{'error': 1}")
    uneven = run_ranks(3, GROUPS, 2, timeout=60)
    assert "to divide the number of ranks, 3" in uneven.stderr


def test_a_parallel_simulator_needs_ranks():
    simulator = bridge.as_simulator(lambda x, comm: x, parallel=True)
    with pytest.raises(InputError, match="mpirun -n 2"):
        bridge.smooth(simulator, seed=0, on=bridge.Ranks(per_evaluation=2))
    with pytest.raises(InputError, match=r"on=bridge\.Ranks\(per_evaluation=\.\.\.\)"):
        bridge.smooth(simulator, seed=0)(torch.zeros(1))
    with pytest.raises(InputError, match="schedule"):
        bridge.smooth(lambda x: x, seed=0, on=bridge.Ranks(schedule="random"))
    with pytest.raises(InputError, match="workers"):
        bridge.smooth(lambda x: x, seed=0, on=0)


def test_what_does_not_fit_in_memory_is_on_disk_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    F = torch.randn(8, 1000)
    copy = spilled(F)
    assert torch.equal(copy, F)
    assert copy.data_ptr() % 64 == 0
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(tmp_path) in maps
    assert list(tmp_path.iterdir()) == []
    del copy
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_gpus_go_round_the_ranks_of_a_host():
    assert [device_index(rank, 2) for rank in range(4)] == [0, 1, 0, 1]
    assert device_index(3, 1) == 0  # the launcher has given this rank its own
    assert device_index(3, 0) is None
    assert bridge.local_device() == torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def test_a_simulator_is_called_with_the_same_rows_whoever_calls():
    """How many rows a call has must not depend on what a rank has seen before, unless rows are computed singly."""
    calls = []

    def f(x):
        calls.append(len(x))
        return np.sin(x)

    simulator = bridge.as_simulator(f, vectorized=True, repeatable=True)
    smoothed = bridge.smooth(simulator, seed=0, num_samples=1024)
    for step in range(2):
        smoothed(torch.zeros(3, dtype=torch.float64), step=step)
    assert set(calls) == {8}
    calls.clear()
    declared = bridge.as_simulator(f, vectorized=True, output_shape=(3,), repeatable=True)
    bridge.smooth(declared, seed=0, num_samples=1024)(torch.zeros(3, dtype=torch.float64))
    assert set(calls) == {32}
