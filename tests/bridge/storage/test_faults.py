"""Faults, injected for real: nothing that was paid for is lost, and every end says why.

A fit is stopped by a fault on one of two ranks, in the middle of a step. Whatever the fault, the fit must then go on,
in one process, to bitwise the end of a fit that nothing has stopped, and pay twice at most for what was being simulated
at that moment.
"""

from __future__ import annotations

import functools
import json
import random
import signal
import subprocess
from pathlib import Path

import pytest

from tests.lab.ended_ranks import until_the_run_is_free

pytestmark = [pytest.mark.mpi, pytest.mark.every_mpi]

SCRIPT = """
import ctypes, hashlib, json, os, re, resource, signal, sys, time
import numpy as np
import bridge

fault, directory, method = sys.argv[1:]
if fault:
    from mpi4py import MPI

    here = MPI.COMM_WORLD.Get_rank() == 1
METHODS = {"adam": bridge.Adam, "gauss-newton": bridge.GaussNewton}
grid = np.linspace(-1, 1, 24)
count = 0

def hangs_in_python():
    while True:
        time.sleep(0.1)

FAULTS = {
    "raise": lambda: 1 / 0,
    "sys.exit": lambda: sys.exit(3),
    "os._exit(7)": lambda: os._exit(7),
    "os._exit(0)": lambda: os._exit(0),
    "_exit(0)": lambda: ctypes.CDLL(None)._exit(0),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": hangs_in_python,
    "native hang": lambda: re.match("(a+)+$", 60 * "a" + "b"),  # for ever, with the interpreter's lock
    "USR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "TERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "NaN": lambda: np.full((24, 24), np.nan),
    "shape": lambda: np.zeros(24),
}

def f(x):
    global count
    count += 1
    with open(os.environ["PAID"], "a") as paid:
        paid.write("x")  # one for each simulation begun
    time.sleep(0.012)
    if fault == "file size":  # not before: MPI has files of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    if fault in FAULTS and here and count == 22:
        instead = FAULTS[fault]()
        if instead is not None:
            return instead
    return np.floor(50 * np.exp(-((grid[:, None] - x[0]) ** 2 + (grid - x[1]) ** 2) / 0.1))

# What it is to suffer is another thing when it goes on.
simulator = bridge.as_simulator(f, bounds=[(-1, 1), (-1, 1)], natural_scale=[0.1, 0.1], identity="f")
target = np.floor(50 * np.exp(-((grid[:, None] - 0.3) ** 2 + (grid + 0.2) ** 2) / 0.1))
result = bridge.fit(
    simulator, target, [0.0, 0.1], seed=0, method=METHODS[method](steps=6, num_samples=16, scale=(2.0, 0.5)),
    run=bridge.Run(directory, every_s=0.2),
)
digest = hashlib.sha256(json.dumps([h.parameters for h in result.history]).encode())
digest.update(result.parameters.tobytes() + result.standard_error.tobytes() + result.output.tobytes())
if bridge.is_root():
    print("digest", digest.hexdigest())
"""
RUNS = 6 * 16 + 2 * 16 + 2


class Fit:
    """One fit in a directory, with what it has paid."""

    def __init__(self, folder: Path, run_ranks, run_alone, method: str = "adam") -> None:
        self.method, self._run_ranks, self._run_alone = method, run_ranks, run_alone
        self.directory, self.paid_file = folder / "run", folder / "paid"
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT, encoding="utf-8")

    @property
    def paid(self) -> int:
        return self.paid_file.stat().st_size if self.paid_file.exists() else 0

    @property
    def status(self) -> dict:
        return json.loads((self.directory / "status.json").read_text())

    def start(self, ranks, fault="", env=None, **kwargs) -> subprocess.CompletedProcess[str]:
        environment = {"PAID": str(self.paid_file), **(env or {})}
        arguments = (self.script, fault, self.directory, self.method)
        if ranks:
            done = self._run_ranks(ranks, *arguments, env=environment, timeout=90, **kwargs)
            until_the_run_is_free(self.directory)
            return done
        return self._run_alone(*arguments, env=environment, timeout=90)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, run_alone):
    """What a fit by some method prints that nothing stops."""

    @functools.cache
    def prints(method):
        fit = Fit(tmp_path_factory.mktemp("whole"), None, run_alone, method)
        done = fit.start(0)
        assert done.returncode == 0, done.stderr
        assert fit.paid == RUNS
        return done.stdout

    return prints


@pytest.fixture
def whole(undisturbed):
    return undisturbed("adam")


@pytest.fixture
def fit(tmp_path, run_ranks, run_alone):
    return Fit(tmp_path, run_ranks, run_alone)


def goes_on(fit, whole, ranks=0, twice=2):
    done = fit.start(ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout == whole
    assert fit.paid <= RUNS + twice
    assert fit.status["state"] == "done"
    return done


@pytest.mark.parametrize(
    ("fault", "said", "code"),
    [
        ("raise", "ZeroDivisionError: division by zero", 3),
        ("sys.exit", "called sys.exit(3)", 3),
        ("shape", "Expected outputs of shape", 3),
        ("hang", "in hangs_in_python", 70),
        ("USR1", "A signal has asked", 75),
        ("TERM", "A signal has asked", 75),
    ],
)
def test_an_end_that_bridge_sees_is_told_by_every_means(fit, whole, fault, said, code):
    stopped = fit.start(2, fault, env={"BRIDGE_STEP_LIMIT_S": "4"} if fault == "hang" else None)
    assert stopped.returncode == code, (stopped.returncode, stopped.stderr)
    assert said in stopped.stderr
    if fault == "hang":
        assert "no end after 4 s" in stopped.stderr
        assert "bridge: rank 0 of 2" in stopped.stderr
        assert "bridge: rank 1 of 2" in stopped.stderr
    else:
        assert code == 75 or "[rank 1" in stopped.stderr
        state = "stopped" if code == 75 else "failed"
        assert (fit.status["state"], fit.status["exit_code"]) == (state, code)
        assert said in fit.status["message"]
    assert 24 < fit.paid < RUNS
    goes_on(fit, whole)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("os._exit(7)", "os._exit(7)"),
        ("os._exit(0)", "os._exit(0)"),
        ("SIGKILL", ""),
        ("_exit(0)", None),
        ("SIGSEGV", "Segmentation fault"),
        ("native hang", "in <lambda>"),
    ],
)
def test_a_rank_that_vanishes_ends_the_job(fit, whole, fault, said):
    """Nobody can say in `status.json` why; the launcher does, or another rank, and the run that goes on says that."""
    limit = {"BRIDGE_STEP_LIMIT_S": "4"} if fault == "native hang" else None
    stopped = fit.start(2, fault, env=limit, fresh=True)  # the launcher's own processes must vanish
    told = stopped.stdout + stopped.stderr  # some launchers print to one, some to the other
    if said is not None:  # else a rank ends from native code: MPICH's launcher takes that for a success
        assert stopped.returncode == {"os._exit(7)": 7, "os._exit(0)": 70}.get(fault, stopped.returncode) != 0
        assert said in told
        assert "rank" in told or "APPLICATION PROCESSES" in told
    if said:
        assert "script.py" in told  # where it was
    assert fit.status["state"] == "running"
    assert 24 < fit.paid < RUNS
    done = goes_on(fit, whole)
    assert "ended without a word" in done.stderr


def full_disk(directory):
    """Mounts a file system of 64 kB; whether that is allowed."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "bridge-test", str(directory)], capture_output=True, check=False
    )
    return mounted.returncode == 0


@pytest.mark.parametrize("kind", ["file size", "disk"])
def test_a_full_disk_costs_the_journal_not_the_fit(fit, whole, kind):
    """Files may not grow beyond 2 kB, less than one evaluation; or the disk has room for a few evaluations only."""
    if kind == "disk" and not full_disk(fit.directory):
        pytest.skip("a small file system can be mounted by root only, and not in every container")
    try:
        done = fit.start(2, kind)
        assert done.returncode == 0, done.stderr
        assert done.stdout == whole
        assert fit.paid == RUNS
        assert "evaluations are no longer journalled" in done.stderr
        assert ("File too large" if kind == "file size" else "No space left on device") in done.stderr
    finally:
        if kind == "disk":
            subprocess.run(["umount", str(fit.directory)], check=True)


def test_journals_that_are_torn_and_damaged_cost_their_records_only(fit, whole):
    before = 30
    stopped = fit.start(2, kill_when=lambda: fit.paid > before)
    assert stopped.returncode == -9
    draw = random.Random(0)
    journals = sorted(fit.directory.glob("evaluations/*.journal"))
    assert len(journals) == 2
    records = sum(path.stat().st_size for path in journals) // (24 * 24 * 8)
    assert records > 4
    for path in journals:
        content = bytearray(path.read_bytes())
        content[draw.randrange(len(content))] ^= 0xFF
        path.write_bytes(content[: draw.randrange(len(content) // 2, len(content))])
    paid = fit.paid
    done = goes_on(fit, whole, twice=2 + records)
    assert fit.paid - paid < RUNS  # something was still good
    assert "torn records" in done.stderr


def test_a_launcher_that_is_told_usr1_tells_the_ranks(fit, whole):
    """The one signal that every launcher hands on: "write your state and end", before the batch system ends the job."""
    stopped = fit.start(2, kill_when=lambda: fit.paid > 30, kill_with=signal.SIGUSR1)
    assert stopped.returncode == 75, (stopped.returncode, stopped.stderr)
    assert (fit.status["state"], fit.status["exit_code"]) == ("stopped", 75)
    goes_on(fit, whole, ranks=3)


@pytest.mark.parametrize(
    ("method", "kills"), [("adam", 3), ("gauss-newton", 3), pytest.param("adam", 20, marks=pytest.mark.slow)]
)
def test_the_whole_job_is_killed_at_random_moments(tmp_path, run_ranks, run_alone, undisturbed, method, kills):
    """Launcher and ranks at once, as a power cut would, each time on another number of ranks."""
    fit = Fit(tmp_path, run_ranks, run_alone, method)
    draw = random.Random(f"{method} {kills}")
    twice = killed = 0
    for i in range(kills):
        ranks = 1 + (i + 1) % 3
        at = fit.paid + draw.randrange(1, max(2, 2 * RUNS // kills))
        stopped = fit.start(ranks, kill_when=lambda at=at: fit.paid >= at)
        if stopped.returncode == 0:  # it was faster
            assert stopped.stdout == undisturbed(method)
            break
        assert stopped.returncode == -9, stopped.stderr
        killed, twice = killed + 1, twice + ranks
    assert killed > kills // 2
    goes_on(fit, undisturbed(method), ranks=2, twice=twice)


ISOLATED = """
import ctypes, hashlib, os, time
import numpy as np, torch, bridge

def f(x):
    if x[0] > 1.3:
        os._exit(7)
    if x[0] < -1.3:
        ctypes.string_at(0)
    if x[1] > 1.5:
        raise ValueError("too cold")
    if x[1] < -1.7:
        time.sleep(100)
    if abs(x[1]) < 0.1:
        return np.nan * x
    return np.sin(x)

smoothed = bridge.smooth(
    f, seed=1, num_samples=64, points="mc", failures="drop",
    on=bridge.Isolated(timeout_s=1.0, ranks=bridge.Ranks(schedule="dynamic")),
)
e = smoothed.estimate(torch.zeros(2, dtype=torch.float64))
x = e._evaluation.problems[0].design.nodes.eps[:64]
crash = abs(x[:, 0]) > 1.3
error = crash | (x[:, 1] > 1.5)
timeout = ~error & (x[:, 1] < -1.7)
nan = ~error & ~timeout & (abs(x[:, 1]) < 0.1)
assert min(crash.sum(), error.sum() - crash.sum(), timeout.sum(), nan.sum()) > 0
assert e.failures == {"error": error.sum(), "timeout": timeout.sum(), "non-finite": nan.sum()}, e.failures
digest = hashlib.sha256(e.value.numpy().tobytes() + e.jacobian().numpy().tobytes())
if bridge.is_root():
    print(digest.hexdigest())
"""


def test_isolated_runs_fail_in_every_way_and_the_ranks_live(run_ranks, run_alone, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ISOLATED, encoding="utf-8")
    alone = run_alone(script)
    assert alone.returncode == 0, alone.stderr
    done = run_ranks(2, script, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
