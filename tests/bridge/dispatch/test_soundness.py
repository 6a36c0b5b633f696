"""An MPI whose one-sided operations are wrong is refused before anything runs, and rows are counted all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.dispatch import SerialDispatcher
from bridge.dispatch.soundness import find_fault, known_crash
from bridge.errors import SetupError


class Right:
    """Words as they should be, for ranks that are threads."""

    def __init__(self, rank, memory, lock):
        self.rank, self.size, self.memory, self.lock = rank, len(memory), memory, lock

    def get(self, rank):
        with self.lock:
            return self.memory[rank]

    def put(self, rank, word):
        with self.lock:
            self.memory[rank] = word

    def swap(self, rank, old, new):
        with self.lock:
            found = self.memory[rank]
            if found == old:
                self.memory[rank] = new
            return found


class OneWordForTwo(Right):
    """As MPICH 4.0.2 of Debian 12 has it: two ranks of a host have the same memory."""

    def get(self, rank):
        return super().get(rank // 2)

    def put(self, rank, word):
        super().put(rank // 2, word)

    def swap(self, rank, old, new):
        return super().swap(rank // 2, old, new)


class Raises(Right):
    """As Open MPI 4.1.4 over TCP."""

    def swap(self, rank, old, new):
        raise OSError("MPI_ERR_WIN: invalid window")


class AlwaysWrites(Right):
    def swap(self, rank, old, new):
        with self.lock:
            found, self.memory[rank] = self.memory[rank], new
            return found


class NeverWrites(Right):
    def swap(self, rank, old, new):
        return old


class NeverFinds(Right):
    def swap(self, rank, old, new):
        return -1 if rank == 0 else super().swap(rank, old, new)


class LosesSome(Right):
    """Says that it has written and has not, now and then, to another rank's word."""

    def swap(self, rank, old, new):
        return old if rank != self.rank and old % 7 == 0 else super().swap(rank, old, new)


class ReadsOld(Right):
    def get(self, rank):
        return 0 if rank != self.rank else super().get(rank)


def ask_all(kind, size):
    memory, lock, barrier = [0] * size, threading.Lock(), threading.Barrier(size, timeout=30)
    faults = [None] * size

    def one(rank):
        faults[rank] = find_fault(kind(rank, memory, lock), barrier.wait)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return faults


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_words_that_are_right_are_taken(size):
    assert ask_all(Right, size) == [None] * size


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("kind", [OneWordForTwo, Raises, AlwaysWrites, NeverWrites, NeverFinds, LosesSome, ReadsOld])
def test_words_that_are_wrong_are_found_and_no_rank_is_left_waiting(kind, size):
    assert any(fault is not None for fault in ask_all(kind, size))


DEBIAN = "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022"


@pytest.mark.parametrize(
    ("library", "osc", "refused"),
    [
        (DEBIAN, None, True),
        (DEBIAN, "", True),
        (DEBIAN, "^ucx", True),
        (DEBIAN, "rdma,sm", True),
        (DEBIAN, "^rdma", False),
        (DEBIAN, "^ucx,rdma", False),
        (DEBIAN, "ucx", False),
        ("Open MPI v4.0.3, package: Debian OpenMPI", None, True),
        ("Open MPI v4.1.5, package: Debian OpenMPI", None, False),
        ("Open MPI v5.0.11, package: x", None, False),
        ("MPICH Version: 4.0.2", None, False),  # its fault is found by trying
        ("Intel(R) MPI Library 2021.18 for Linux* OS", None, False),
    ],
)
def test_a_library_that_would_crash_is_not_tried(library, osc, refused):
    assert (known_crash(library, osc) is not None) == refused


@pytest.mark.parametrize(
    ("claimed", "missing", "twice"), [([0, 1, 3], 1, 0), ([0, 1, 2, 2, 3], 0, 1), ([3, 0, 0, 1, 1], 1, 2)]
)
@pytest.mark.parametrize("keep", [24.0, 0.0])
def test_rows_that_were_lost_or_done_twice_are_an_error(monkeypatch, claimed, missing, twice, keep):
    """Whatever the library does later on: each unit is counted where ranks exchange who has what."""
    smoothed = bridge.smooth(lambda x: np.full(9, x.sum()), seed=0, num_samples=4, memory=bridge.Memory(keep_mb=keep))
    theta = torch.zeros(2, dtype=torch.float64)
    smoothed(theta)
    monkeypatch.setattr(SerialDispatcher, "claims", lambda self, count, steal: ((i, False) for i in claimed))
    with pytest.raises(SetupError, match=rf"got {missing} that nobody has evaluated and {twice} that were"):
        smoothed(theta)


WRONG = """
import numpy as np
import torch
import bridge
from bridge.dispatch import mpi

right = mpi._Runs.{method}

def wrong(self, rank, *words):
    return right(self, {rank}, *words)

mpi._Runs.{method} = wrong
smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=8)
print("never said", smoothed(torch.zeros(2)))
"""


@pytest.mark.mpi
@pytest.mark.parametrize(("method", "rank"), [("put", "0"), ("swap", "0"), ("get", "self.rank")])
def test_a_job_with_wrong_words_does_not_start(run_ranks, method, rank):
    done = run_ranks(2, WRONG.format(method=method, rank=rank))
    assert done.returncode not in (0, -9)
    assert "never said" not in done.stdout
    assert "Expected an MPI whose one-sided operations work" in done.stderr
    assert "nothing is started" in done.stderr


# -- the libraries of Debian 12 themselves, where they are installed ---------------------------------------------------

JOB = """
import torch
import bridge
print("value", bridge.smooth(lambda x: x, seed=0, num_samples=64)(torch.zeros(2)).tolist())
"""


def of_distribution(name, directory):
    """(launcher, environment) of Debian's MPICH or Open MPI; the mpi4py wheel takes the library it is told to."""
    launcher = shutil.which(f"mpirun.{name}")
    found = sorted(Path("/usr/lib").glob("*/libmpich.so.12" if name == "mpich" else "*/libmpi.so.40"))
    if launcher is None or not found:
        pytest.skip(f"no {name} of the distribution")
    library = found[0]
    environment = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    if name == "mpich":
        # Debian's name of it is not the one the wheel asks for.
        library = directory / "libmpi.so.12"
        library.symlink_to(found[0])
        environment["LD_LIBRARY_PATH"] = str(directory)
    return launcher, environment | {"MPI4PY_LIBMPI": str(library)}


@pytest.mark.slow  # ranks are started afresh
@pytest.mark.mpi
@pytest.mark.parametrize("name", ["mpich", "openmpi"])
@pytest.mark.parametrize("command", ["script", "doctor"])
def test_mpis_of_debian_12_are_refused(tmp_path, name, command):
    launcher, environment = of_distribution(name, tmp_path)
    script = tmp_path / "job.py"
    script.write_text(JOB, encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI_", "HYDI_", "MPI_LOCAL"))}

    def run(*arguments, **more):
        return subprocess.run(
            [launcher, "-n", "2", sys.executable, *arguments],
            env=kept | environment | more,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = run("-c", "from mpi4py import MPI; print(MPI.Get_library_version().split(chr(10))[0])")
    if not ("Open MPI v4.1.4" in done.stdout or ("MPICH" in done.stdout and "4.0.2" in done.stdout)):
        pytest.skip(f"another version, or none that starts: {done.stdout or done.stderr}")
    done = run(script) if command == "script" else run("-m", "bridge", "doctor")
    assert done.returncode != 0
    assert "value" not in done.stdout
    assert "Expected an MPI whose one-sided operations work" in done.stderr
    assert ("MPICH Version: 4.0.2" if name == "mpich" else "Open MPI v4.1.4") in done.stderr
    if name == "openmpi" and command == "script":
        # The way out that the message names.
        done = run(script, OMPI_MCA_osc="^rdma")
        alone = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, env=kept)
        assert done.returncode == 0
        # A launcher may put what two write on one line.
        assert done.stdout.count(alone.stdout.removeprefix("value ").strip()) == 2
