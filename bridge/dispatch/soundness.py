"""Whether an MPI's one-sided operations do what ranks need them for: to share out rows without doing any twice.

Two libraries of distributions do not. A job must not start there: with one it would end well, with wrong numbers.
Nothing here imports MPI.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

# How often each word is counted up by each of the two ranks that do so at once.
_TIMES = 16
# Attempts at one exchange of a word, of which each can lose against the other rank's.
_ATTEMPTS = 10_000


class Words(Protocol):
    """One 64-bit word a rank, which all ranks read and write."""

    rank: int
    size: int

    def get(self, rank: int) -> int: ...

    def put(self, rank: int, word: int) -> None: ...

    def swap(self, rank: int, old: int, new: int) -> int: ...


def find_fault(words: Words, barrier: Callable[[], None]) -> str | None:
    """What is wrong with the words, as this rank sees it; None where all is well. Collective, a few messages a rank.

    Args:
        barrier: returns once all ranks have called it.
    """
    rank, neighbour = words.rank, (words.rank + 1) % words.size
    fault: str | None = None

    def written(owner: int) -> int:
        return owner + 1 << 32 | owner + 2

    def write() -> str | None:
        words.put(rank, written(rank))
        return None

    def read() -> str | None:
        for owner in (rank, neighbour):
            if (found := words.get(owner)) != written(owner):
                return f"rank {rank} reads {found} in rank {owner}'s word, into which {written(owner)} was written"
        return None

    def count() -> str | None:
        for owner in (rank, neighbour):
            for _ in range(_TIMES):
                old = words.get(owner)
                for _ in range(_ATTEMPTS):
                    if (found := words.swap(owner, old, old + 1)) == old:
                        break
                    old = found
                else:
                    return f"rank {rank} cannot exchange rank {owner}'s word by compare-and-swap"
        return None

    def read_again() -> str | None:
        # Each word has been counted up by its rank and by the one before.
        total = written(rank) + 2 * _TIMES
        if (found := words.get(rank)) != total:
            return f"compare-and-swap by two ranks at once has made {found} of rank {rank}'s word, in place of {total}"
        found = words.swap(rank, total + 1, 0)
        if found != total or words.get(rank) != total:
            return f"compare-and-swap with another value has changed rank {rank}'s word, or misread it"
        return None

    for stage in (write, read, count, read_again):
        if fault is None:
            try:
                fault = stage()
            except Exception as error:
                fault = f"rank {rank}: {type(error).__name__}: {error}"
        barrier()
    return fault


def known_crash(library: str, osc: str | None) -> str | None:
    """Why this library must not even be tried: it ends the process. None where nothing is known against it.

    Args:
        library: as MPI_Get_library_version has it.
        osc: OMPI_MCA_osc, which of Open MPI's components for one-sided operations may be used.
    """
    version = re.search(r"Open MPI v?(\d+)\.(\d+)\.(\d+)", library)
    if version is None or tuple(map(int, version.groups())) >= (4, 1, 5):
        return None
    named = set((osc or "").strip().lstrip("^").split(","))
    excluded = "rdma" in named if (osc or "").strip().startswith("^") else bool(osc) and "rdma" not in named
    if excluded:
        return None
    return (
        "compare-and-swap of 64 bits between ranks of one host is a segmentation fault in its component osc/rdma, as "
        "seen in 4.1.4 and reported of older ones (OMPI_MCA_osc=^rdma in the environment leaves the component out)"
    )


def describe_unusable(library: str, why: str) -> str:
    """What a user is told of an MPI that shares out rows wrongly."""
    return (
        f"Expected an MPI whose one-sided operations work, got {library}: {why}. Rows would be lost or done twice, and "
        "results wrong without a word, so nothing is started. Use another MPI: a newer one of the site's modules; or, "
        "on one machine, the wheels (`pip install mpi4py mpich` in an environment of its own, and that environment's "
        "mpirun). Without a launcher, one process works with any, and on=N uses N cores."
    )


def describe_lost(units: int, missing: int, twice: int, library: str) -> str:
    """What a user is told where rows were not shared out as they should have been."""
    return (
        f"Expected each of {units} units of rows to be evaluated once, got {missing} that nobody has evaluated and "
        f"{twice} that were evaluated more than once. The one-sided operations of the MPI library are at fault "
        f"({library}): use another one, or one process with on=N."
    )
