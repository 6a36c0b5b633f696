"""What every dispatcher can do."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch.tree import TreeSum, run_of

T = TypeVar("T")

# Between the stacks of a rank and its end: time for the other ranks to show theirs.
_LAST_WORDS_S = 3.0


class Mirror(ABC):
    """Makes objects on all ranks, and repeats the calls of their collective methods there, see `bridge.driver`."""

    @property
    @abstractmethod
    def alone(self) -> Dispatcher:
        """For what the leading rank makes of results by itself."""

    @abstractmethod
    def make(
        self, kind: Callable[..., T], arguments: Sequence[Any], settings: dict[str, Any], once: Sequence[Any]
    ) -> T:
        """`kind(*arguments, **settings)`, on every rank."""

    @abstractmethod
    def mirrored(self, target: Any, name: str, arguments: Sequence[Any], settings: Any) -> AbstractContextManager[None]:
        """The context of a call that the others make as well."""


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

    @property
    def is_leader(self) -> bool:
        """Whether the outputs of what this rank evaluates count: not where it helps another one (see `group`)."""
        return True

    @property
    def group(self) -> Any:
        """The communicator of the ranks that evaluate one row together; None where each evaluates its own."""
        return None

    driver: Mirror | None = None
    """On rank 0 of a job in which the others only follow, see `bridge.driver`."""

    @property
    def leader(self) -> Dispatcher:
        """Whose ranks run the program itself: under a driver the others follow its evaluations, not what it makes of
        them."""
        return self if self.driver is None else self.driver.alone

    @property
    def local_rank(self) -> int:
        """This rank's number among those on the same host."""
        return 0

    @property
    def local_size(self) -> int:
        """How many ranks are on this host."""
        return 1

    @property
    def library(self) -> str:
        """The MPI library and its version."""
        return "not in use: one process"

    def each(self, value: T) -> list[T]:
        """Every rank's small Python object, on every rank. Collective."""
        return [value]

    def first(self, value: T | None) -> T | None:
        """A small Python object on every rank: that of the first rank where it is not None. Collective."""
        return next((x for x in self.each(value) if x is not None), None)

    def make(self, kind: Callable[..., T], *arguments: Any, once: Sequence[Any] = (), **settings: Any) -> T:
        """`kind(*arguments, **settings)`, on every rank: an object with collective methods.

        Args:
            once: those of the arguments that are the same objects in many calls.
        """
        if self.driver is None:
            return kind(*arguments, **settings)
        return self.driver.make(kind, arguments, settings, once)

    def mirrored(self, target: Any, name: str, arguments: Sequence[Any], settings: Any) -> AbstractContextManager[None]:
        """The context of a collective method of an object that was made by `make`."""
        return nullcontext() if self.driver is None else self.driver.mirrored(target, name, arguments, settings)

    @contextmanager
    def watched(self, limit_s: float | None) -> Iterator[None]:
        """Ends the job if the block takes longer: each rank shows what it is doing, and one aborts.

        Nested blocks belong to the outermost.
        """
        if limit_s is None or self._watched:
            yield
            return
        self._watched = True
        timer = threading.Timer(limit_s, self._show_stacks, (limit_s,))
        timer.daemon = True
        # Native code that keeps other threads from running keeps the timer, too; this one does not need them.
        faulthandler.dump_traceback_later(limit_s + 1.0, exit=True)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()
            self._watched = False

    _watched: bool = False

    def _show_stacks(self, limit_s: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        sys.stderr.write(
            f"bridge: rank {self.rank} of {self.size} on {socket.gethostname()}: no end after {limit_s:g} s "
            "(step_limit_s); what it is doing:\n"
        )
        sys.stderr.flush()
        self.show_stacks()
        time.sleep(_LAST_WORDS_S)
        self.abort(70)

    def show_stacks(self) -> None:
        """Prints what this process is doing, and what others are where it can be seen."""
        faulthandler.dump_traceback(all_threads=True)

    def abort(self, code: int) -> None:
        """Ends every rank, at once."""
        os._exit(code)

    stopping: bool = False
    """Set, on the class, by a signal handler to end the evaluations of this process early: see `claims`."""

    @abstractmethod
    def claims(self, count: int, steal: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        """The items of `count` that this rank is to work on, one by one: (item, whether it is another rank's).

        Each item goes to one rank. A rank takes its own run from the front; when that is done, and if `steal()`, it
        takes from the end of the run of the rank that has most left. Ends early once a rank is `stopping` or has
        called `give_up`. Any schedule gives the same results, since everything is indexed.
        """

    @abstractmethod
    def give_up(self) -> None:
        """Tells all ranks to claim no more items of the evaluation in progress; not collective."""

    def agree_in_group(self, error: Exception | None) -> Exception | None:
        """The error that a rank of the group has, if any has one; collective over `group` only."""
        return error

    def share(self, count: int) -> range:
        """The run of `count` columns that this rank takes."""
        return run_of(count, self.rank, self.size)

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
    def finish(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[NDArray[np.int64]]
    ) -> list[torch.Tensor]:
        """Completes trees of which each rank holds a part; the results come to every rank.

        Args:
            sums: this rank's part of each tree.
            like: for each, a tensor of the shape, dtype and device of the sum.
            owners: for each, (leaves,) the rank that added each leaf.
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
