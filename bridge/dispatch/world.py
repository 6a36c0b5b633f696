"""Which dispatcher there is: one process, or the ranks that a launcher has started; and one rank that drives others."""

from __future__ import annotations

import contextlib
import copyreg
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import threadpoolctl
import torch

from bridge.dispatch.base import Dispatcher
from bridge.dispatch.driver import Driver, follow
from bridge.dispatch.serial import SerialDispatcher
from bridge.environment import device_index, thread_count
from bridge.errors import BridgeError, InputError, exit_code

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm, MPIDispatcher

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS", "SLURM_STEP_NUM_TASKS")


def launched_size() -> int:
    """How many ranks the launcher says it has started; 1 without a launcher."""
    sizes = [int(os.environ[v]) for v in _LAUNCHER_SIZES if os.environ.get(v, "").isdigit()]
    return max(sizes, default=1)


def limit_threads() -> None:
    """Sets torch's and BLAS's threads to BRIDGE_THREADS (default 1), alike with and without a launcher.

    Ranks then do not oversubscribe a node, and the user's own loss has the same last bits under `python` (where torch
    would take every core) and under `mpirun` (where it takes one).
    """
    threads = thread_count()
    torch.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads)


_worlds: dict[int, Dispatcher] = {}


def get_dispatcher(comm: Intracomm | None = None, ranks_per_evaluation: int = 1) -> Dispatcher:
    """The dispatcher of a communicator; without one, MPI if a launcher has started us, else one process.

    Args:
        ranks_per_evaluation: how many ranks evaluate one row together.

    Raises:
        SetupError: launched as several ranks, but MPI cannot be loaded or sees only one.
        InputError: the number of ranks is no multiple of `ranks_per_evaluation`.
    """
    if not _worlds:
        limit_threads()
    led = any(world.driver is not None for world in _worlds.values())
    if led and (comm is not None or ranks_per_evaluation > 1):
        raise InputError("Expected bridge.Ranks without comm and per_evaluation where one rank drives the others.")
    if comm is not None:
        from bridge.dispatch.mpi import MPIDispatcher

        copyreg.pickle(MPIDispatcher, _of_that_process)
        return MPIDispatcher(comm, ranks_per_evaluation)
    if ranks_per_evaluation not in _worlds:
        if launched_size() > 1:
            from bridge.dispatch.mpi import MPIDispatcher, world

            copyreg.pickle(MPIDispatcher, _of_that_process)
            _worlds[ranks_per_evaluation] = world(launched_size(), ranks_per_evaluation)
        elif ranks_per_evaluation == 1:
            _worlds[1] = SerialDispatcher()
            _exit_by_code()
        else:
            raise InputError(
                f"Expected several ranks for per_evaluation={ranks_per_evaluation}, got one process. Start the "
                f"script as `mpirun -n {ranks_per_evaluation} python script.py`, or with a multiple of that."
            )
    return _worlds[ranks_per_evaluation]


def _of_that_process(dispatcher: MPIDispatcher) -> tuple[Any, tuple[()]]:
    """Where a dispatcher travels (`bridge.driver`), what is meant is the one over there."""
    return get_dispatcher, ()


def _exit_by_code() -> None:
    """An uncaught error of ours ends the process with its exit code, as it does under `bridge run` and on ranks."""
    before = sys.excepthook

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        before(kind, value, trace)
        if issubclass(kind, BridgeError):
            raise SystemExit(exit_code(kind))

    sys.excepthook = hook


def is_root() -> bool:
    """True on rank 0, and without MPI: the rank that prints and writes files."""
    return get_dispatcher().rank == 0


def local_device() -> torch.device:
    """The device of this rank: one GPU for each rank of a host, in turn, or the CPU where there is none.

    A launcher that shows each rank one GPU only is respected: that one is then number 0.
    """
    index = device_index(get_dispatcher().local_rank, torch.cuda.device_count())
    return torch.device("cpu") if index is None else torch.device("cuda", index)


@contextlib.contextmanager
def driver() -> Iterator[bool]:
    """Lets rank 0 run a serial program, and the other ranks help it: `with bridge.driver() as main: if main: ...`.

    Yields:
        True on rank 0, and in a single process; False on the others, after rank 0 has left the block. There is no need
        for `bridge.is_root()` inside.
    """
    dispatcher = get_dispatcher()
    if dispatcher.size == 1:
        yield True
        return
    from bridge.dispatch.mpi import MPIDispatcher

    assert isinstance(dispatcher, MPIDispatcher)
    if dispatcher.rank != 0:
        follow(dispatcher)
        yield False
        return
    dispatcher.driver = Driver(dispatcher)
    # An exception is not our affair here: uncaught, it ends the job; caught, the program goes on by itself.
    try:
        yield True
    finally:
        dispatcher.driver.dismiss()
        dispatcher.driver = None
