"""Where runs are evaluated, and by whom: the settings of `on=`. No result depends on them but on `leaf_size`."""

from __future__ import annotations

import concurrent.futures
import os
from abc import abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, final

from bridge.checks import Settings, is_number, is_whole
from bridge.dispatch import Dispatcher
from bridge.errors import InputError
from bridge.evaluation.concurrent import ExecutorSimulator
from bridge.evaluation.execution import Schedule
from bridge.evaluation.workers import IsolatedSimulator, SimulatorPool
from bridge.registry import EXECUTORS
from bridge.simulator.protocol import Parallel, Simulator, simulator_name

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm


class Place(metaclass=Settings):
    """Where runs are evaluated."""

    ranks: Ranks

    @abstractmethod
    def placed(self, simulator: Simulator, dispatcher: Dispatcher) -> Simulator:
        """The simulator, evaluated there."""


@final
@dataclass(frozen=True)
class Ranks(Place):
    """By the ranks of MPI, each in its own process; without a launcher, by this process.

    Attributes:
        comm: an mpi4py communicator; by default all ranks that the launcher started.
        per_evaluation: ranks that evaluate one row together, for a simulator that is itself an MPI program (see
            `as_simulator(..., parallel=True)`); it divides the number of ranks.
        schedule: "static" gives each rank an even share of the rows, "dynamic" lets idle ranks take rows off busy
            ones, "auto" does so where a run takes more than 2 ms.
        leaf_size: rows of one unit that goes to a rank as a whole; default from N alone. Part of the result's last
            bits.
        step_limit_s: when an evaluation, forward or backward, takes longer [s], every rank prints its stack and the
            job ends; by default BRIDGE_STEP_LIMIT_S, or no limit.
    """

    comm: Intracomm | None = None
    per_evaluation: int = 1
    schedule: Schedule = "auto"
    leaf_size: int | None = None
    step_limit_s: float | None = None

    def __post_init__(self) -> None:
        if self.comm is not None and (isinstance(self.comm, type) or not hasattr(self.comm, "Dup")):
            raise InputError(
                f"Expected an mpi4py communicator as comm, such as mpi4py.MPI.COMM_WORLD, got {self.comm!r}. Leave it "
                "out for all ranks."
            )
        if self.schedule not in ("auto", "static", "dynamic"):
            raise InputError(f"Unknown schedule={self.schedule!r}. Known: auto, static, dynamic.")
        if not is_whole(self.per_evaluation, 1):
            raise InputError(f"Expected an integer per_evaluation of at least 1, got {self.per_evaluation!r}.")
        if self.leaf_size is not None and not is_whole(self.leaf_size, 1):
            raise InputError(f"Expected a positive integer leaf_size, got {self.leaf_size!r}.")
        if self.step_limit_s is not None and not (is_number(self.step_limit_s) and self.step_limit_s > 0):
            raise InputError(f"Expected a positive step_limit_s, got {self.step_limit_s!r}.")

    @property
    def ranks(self) -> Ranks:  # type: ignore[override]
        return self

    def placed(self, simulator: Simulator, dispatcher: Dispatcher) -> Simulator:
        if dispatcher.group is None:
            return simulator
        if not isinstance(simulator, Parallel):
            raise InputError(
                f"Expected a simulator that takes a communicator, with per_evaluation, got "
                f"{simulator_name(simulator)!r}. Use as_simulator(f, parallel=True), or give it a method bound(comm)."
            )
        return simulator.bound(dispatcher.group)


@dataclass(frozen=True)
class _OtherProcesses(Place):
    """What children of each rank have in common.

    Attributes:
        timeout_s: seconds that one run may take; a run that takes longer is killed. None for no limit.
        own_directory: gives each child a fresh working directory of its own, removed when it ends: for simulators that
            write files of fixed names. True for one in the system's temporary directory, or a folder. Files that are
            read then need absolute paths.
        ranks: of MPI, whose children these are.
    """

    timeout_s: float | None = field(default=None, kw_only=True)
    own_directory: bool | str | os.PathLike[str] = field(default=False, kw_only=True)
    ranks: Ranks = field(default=Ranks(), kw_only=True)

    def __post_init__(self) -> None:
        if self.timeout_s is not None and not (is_number(self.timeout_s) and self.timeout_s > 0):
            raise InputError(f"Expected a positive timeout_s, got {self.timeout_s!r}.")
        _check_ranks(self.ranks, type(self).__name__)

    @property
    def _folder(self) -> Path | None:
        own = self.own_directory
        return None if own is False else Path(gettempdir() if own is True else own).absolute()


@final
@dataclass(frozen=True)
class Isolated(_OtherProcesses):
    """In a child process of each rank: one that crashes or hangs is a failed run like any other.

    A crash is a segmentation fault, or `exit`. Costs about 0.4 ms a run, and the outputs' way through a pipe.
    """

    def placed(self, simulator: Simulator, dispatcher: Dispatcher) -> Simulator:
        return IsolatedSimulator(simulator, self.timeout_s, self._folder)


@final
@dataclass(frozen=True)
class Workers(_OtherProcesses):
    """In several child processes of each rank, at the same time: a pool that needs no MPI.

    Attributes:
        number: of children.
    """

    number: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.number, 1):
            raise InputError(f"Expected a positive integer of workers, got {self.number!r}.")

    def placed(self, simulator: Simulator, dispatcher: Dispatcher) -> Simulator:
        return SimulatorPool(simulator, self.number, self.timeout_s, self._folder)


@final
@dataclass(frozen=True)
class Executor(Place):
    """By an executor: any `concurrent.futures.Executor`, of threads, processes, loky, Dask (`client.get_executor()`).

    It is the caller's, and is not shut down.

    Attributes:
        executor: the executor.
        at_once: runs that are submitted at the same time; by default as many as it says that it has workers.
        ranks: of MPI, each with such an executor.
    """

    executor: concurrent.futures.Executor
    at_once: int | None = field(default=None, kw_only=True)
    ranks: Ranks = field(default=Ranks(), kw_only=True)

    def __post_init__(self) -> None:
        if not _is_executor(self.executor):
            raise InputError(
                f"Expected an executor, such as concurrent.futures.ThreadPoolExecutor(8), got {self.executor!r}."
            )
        if self.at_once is not None and not is_whole(self.at_once, 1):
            raise InputError(f"Expected a positive integer at_once, got {self.at_once!r}.")
        _check_ranks(self.ranks, "Executor")

    def placed(self, simulator: Simulator, dispatcher: Dispatcher) -> Simulator:
        said: Any = getattr(self.executor, "_max_workers", None)
        known = int(said) if is_whole(said, 1) else os.cpu_count() or 1
        return ExecutorSimulator(simulator, self.executor, self.at_once or known)


def _is_executor(given: Any) -> bool:
    # Dask's has the interface, and another base class.
    return isinstance(given, concurrent.futures.Executor) or (
        not isinstance(given, type) and all(callable(getattr(given, name, None)) for name in ("submit", "shutdown"))
    )


def _check_ranks(ranks: Ranks, what: str) -> None:
    if not isinstance(ranks, Ranks):
        raise InputError(f"Expected ranks=bridge.Ranks(...) in bridge.{what}, got {ranks!r}.")
    if ranks.per_evaluation > 1:
        raise InputError(f"Expected per_evaluation=1 with bridge.{what}: the ranks run the simulator otherwise.")


Where = Place | concurrent.futures.Executor | str | int | None
# Executors by name: one of each for a whole process, which it ends with.
_made: dict[str, concurrent.futures.Executor] = {}


def make_place(given: Any) -> Place:
    """The place that is given: None for the ranks, a number of workers, "process" for a child, an executor or its name.

    Raises:
        InputError: something else.
    """
    if given is None:
        return Ranks()
    if isinstance(given, Place):
        return given
    if given == "process":
        return Isolated()
    if isinstance(given, str):
        if given not in _made:
            _made[given] = EXECUTORS.make(given)
        return Executor(_made[given])
    if is_whole(given, 1):
        return Workers(int(given))
    if hasattr(given, "Get_rank"):
        return Ranks(comm=given)
    if _is_executor(given):
        return Executor(given)
    raise InputError(
        f"Expected a number of workers, 'process', an executor, an mpi4py communicator, or one of bridge.Ranks, "
        f"bridge.Workers, bridge.Isolated and bridge.Executor as on=, got {given!r}."
    )
