"""What every dispatcher can do, and the choice between them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import threadpoolctl
import torch
from numpy.typing import NDArray

from bridge.dispatch.tree import TreeSum
from bridge.environment import thread_count

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


class Dispatcher(ABC):
    """Shares leaves among ranks and reduces sums. It never draws random numbers and never sees a simulator.

    Every method but the properties and the shares is collective: all ranks call it, in the same order.
    """

    @property
    @abstractmethod
    def rank(self) -> int: ...

    @property
    @abstractmethod
    def size(self) -> int: ...

    @abstractmethod
    def begin(self, kind: str, signature: str) -> None:
        """Opens a collective operation: all ranks must be at the same one, else `CollectiveError` on all of them."""

    def share(self, count: int) -> range:
        """The run of `count` items that this rank owns."""
        return self.share_of(count, self.rank)

    def share_of(self, count: int, rank: int) -> range:
        """The run that `rank` owns: even runs, the first ranks taking the remainder, so rank 0 has row 0."""
        small, more = divmod(count, self.size)
        start = rank * small + min(rank, more)
        return range(start, start + small + (rank < more))

    @abstractmethod
    def agree(self, error: Exception | None) -> None:
        """Raises on every rank the first rank's error, if any rank has one."""

    @abstractmethod
    def broadcast(self, array: NDArray[Any]) -> NDArray[Any]:
        """Rank 0's array on every rank; shape and dtype are the same everywhere."""

    @abstractmethod
    def broadcast_object(self, value: Any) -> Any:
        """A small Python object (a shape, a name) of rank 0's on every rank."""

    @abstractmethod
    def first(self, value: Any) -> Any:
        """A small Python object on every rank: that of the first rank where it is not None; None if it is on all."""

    @abstractmethod
    def finish(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[Sequence[range]]
    ) -> list[torch.Tensor]:
        """Completes trees of which each rank holds a part; the results come to every rank.

        Args:
            sums: this rank's part of each tree.
            like: for each, a tensor of the shape, dtype and device of the sum.
            owners: for each rank, the run of leaves of each tree that it added.
        """

    @abstractmethod
    def transfer(self, tensor: torch.Tensor, source: int, dest: int) -> torch.Tensor:
        """Sends a tensor (on `source`) into one of the same shape and dtype (on `dest`), which is returned there.

        Only these two ranks call it.
        """

    @abstractmethod
    def transpose(self, rows: torch.Tensor) -> torch.Tensor:
        """Row blocks to column blocks: each rank has (own rows, m), float64 on the CPU, in the order of ranks, and gets
        all rows of its share of the m columns. No rank holds all."""

    @abstractmethod
    def concatenate(self, columns: torch.Tensor) -> torch.Tensor:
        """(n, own width) column blocks in the order of ranks to (n, m) on every rank; float64 on the CPU."""

    @abstractmethod
    def scatter_add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fills in numbers of which each rank has its own and zeros elsewhere; exact, being sums with zeros."""


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


_default: Dispatcher | None = None


def get_dispatcher(comm: Intracomm | None = None) -> Dispatcher:
    """The dispatcher of a communicator; without one, MPI if a launcher has started us, else one process.

    Raises:
        SetupError: launched as several ranks, but MPI cannot be loaded or sees only one.
    """
    global _default
    if _default is None:
        limit_threads()
    if comm is not None:
        from bridge.dispatch.mpi import MPIDispatcher

        return MPIDispatcher(comm)
    if _default is None:
        if launched_size() > 1:
            from bridge.dispatch.mpi import world

            _default = world(launched_size())
        else:
            from bridge.dispatch.serial import SerialDispatcher

            _default = SerialDispatcher()
    return _default


def is_root() -> bool:
    """True on rank 0, and without MPI: the rank that prints and writes files."""
    return get_dispatcher().rank == 0
