"""Ranks of an MPI job; the only file that imports mpi4py.

Every rank runs the same script (SPMD), evaluates its own rows and keeps their outputs; only sums travel. Buffers go
by upper-case calls, uncompressed; nothing but small Python objects is pickled.

Who evaluates what is settled by one-sided messages, without a master: each rank's own run of items is a pair of numbers
in a window, (next item, end), in one 64-bit word. The rank itself takes from the front, idle ones from the end, both by
compare-and-swap. What a rank owns is then its own run but for the last few items, and sums stay cheap.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge import errors
from bridge.dispatch.base import Dispatcher
from bridge.dispatch.neighbours import Neighbours, Process, this_process
from bridge.dispatch.soundness import describe_unusable, find_fault, known_crash
from bridge.dispatch.tree import TreeSum, run_of, subtrees, transfers

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm as Intracomm  # for the signatures of others

try:
    import mpi4py
    from mpi4py import MPI
except ImportError as error:
    raise errors.SetupError(
        f"Expected a working MPI, because a launcher has started this process as one of several, got: {error}. "
        "Install one (`pip install mpi4py mpich` on a single machine; on a cluster load the site's MPI, then "
        "`pip install mpi4py`), or start the script without a launcher."
    ) from error

T = TypeVar("T")

_ABORT = 70
# Messages below 2^31 bytes, which every MPI can count.
_PIECE = 1 << 28
_LOW = (1 << 32) - 1
_ANSWER_S = 1e-3
# Bytes of partial sums up to which every rank gets all of them.
_SMALL = 1 << 18
# Words of the window that say: claim no more; not begun.
_STOP, _NOT_YET = -1, -2


# A wait sleeps for a fiftieth of what it has waited already, so it comes no later than that.
_SLEEP_SHARE, _BUSY_S, _LONGEST_SLEEP_S = 0.02, 2e-4, 1e-3


def _wait(*requests: MPI.Request) -> None:
    """Completes messages and collectives; in the libraries' own waits a rank takes a core that a simulation needs."""
    begin = time.perf_counter()
    for request in requests:
        while not request.Test():
            waited = time.perf_counter() - begin
            if waited > _BUSY_S:
                time.sleep(min(_SLEEP_SHARE * waited, _LONGEST_SLEEP_S))


def _pieces(array: NDArray[Any]) -> list[NDArray[Any]]:
    flat = array.reshape(-1).view(np.uint8)
    return [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]


def _left(word: int) -> int:
    """How many items a word of the window has left."""
    return max(0, (word & _LOW) - (word >> 32)) if word >= 0 else 0


def _error(kind: str, message: str) -> errors.BridgeError:
    known: type[errors.BridgeError] = getattr(errors, kind, errors.EvaluationError)
    return known(message)


class _Runs:
    """A window with one word a rank: what is left of its run, (next item) 2^32 + end.

    Making one is collective, and tries it out; it is freed when the program ends, because freeing is collective, too.

    Raises:
        SetupError: on every rank, where the library's one-sided operations do not work.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        library = library_name()
        crash = known_crash(library, os.environ.get("OMPI_MCA_osc"))  # noqa: SIM112  (as Open MPI spells it)
        crash = next((x for x in comm.allgather(crash) if x is not None), None)
        if crash is not None:
            raise errors.SetupError(describe_unusable(library, crash))
        self._window = MPI.Win.Allocate(8, 8, comm=comm)
        self._window.Lock_all()
        _windows.append(self)
        faults = comm.allgather(find_fault(self, lambda: _wait(comm.Ibarrier())))
        fault = next((x for x in faults if x is not None), None)
        if fault is not None:
            raise errors.SetupError(describe_unusable(library, fault))
        self.put(self.rank, _NOT_YET)
        comm.Barrier()

    def get(self, rank: int) -> int:
        # All memory that a message is made of is kept until it has arrived.
        result, unused = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
        self._window.Fetch_and_op(unused, result, rank, op=MPI.NO_OP)
        self._window.Flush(rank)
        return int(result[0])

    def put(self, rank: int, word: int) -> None:
        # Not `Put`, which need not be atomic with the others.
        sent = np.array([word], dtype=np.int64)
        self._window.Accumulate(sent, rank, op=MPI.REPLACE)
        self._window.Flush(rank)

    def free(self) -> None:
        self._window.Unlock_all()
        self._window.Free()

    def set(self, rank: int, run: range) -> int:
        """Writes what a rank has left; the word for it."""
        word = run.start << 32 | run.stop
        self.put(rank, word)
        return word

    def swap(self, rank: int, old: int, new: int) -> int:
        """Writes `new` if the word still is `old`; what it was."""
        found = np.zeros(1, dtype=np.int64)
        both = np.array([new], dtype=np.int64), np.array([old], dtype=np.int64)
        self._window.Compare_and_swap(*both, found, rank)
        self._window.Flush(rank)
        return int(found[0])


def library_name() -> str:
    """The MPI library and its version, in one line."""
    return " ".join(MPI.Get_library_version().splitlines()[0].strip("\0 ").split())


@final
class MPIDispatcher(Dispatcher):
    """Dispatch over a communicator (a duplicate, so that the user's own messages never meet ours)."""

    def __init__(self, comm: MPI.Intracomm, ranks_per_evaluation: int = 1) -> None:
        self._comm = comm.Dup()
        self._sequence = 0
        self._each = ranks_per_evaluation
        if self.size % ranks_per_evaluation:
            raise errors.InputError(
                f"Expected per_evaluation to divide the number of ranks, {self.size}, got {ranks_per_evaluation}."
            )
        self._group: Any = None
        self._leaders: Any = self._comm
        if ranks_per_evaluation > 1:
            self._group = self._comm.Split(self.rank // self._each)
            self._leaders = self._comm.Split(self.rank % self._each)
        node = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._here = (int(node.Get_rank()), int(node.Get_size()))
        self._hosts = int(self._comm.allreduce(int(node.Get_rank() == 0)))
        node.Free()
        _abort_on_uncaught_exceptions()
        # Before anything is evaluated: with a library that shares out rows wrongly, no job starts.
        self._runs = _Runs(self._leaders) if self.size > 1 else None

    @property
    def rank(self) -> int:
        return int(self._comm.Get_rank())

    @property
    def size(self) -> int:
        return int(self._comm.Get_size())

    @property
    def local_rank(self) -> int:
        return self._here[0]

    @property
    def local_size(self) -> int:
        return self._here[1]

    @property
    def library(self) -> str:
        return f"{library_name()}; mpi4py {mpi4py.__version__}"

    def each(self, value: T) -> list[T]:
        return self._comm.allgather(value)

    def abort(self, code: int) -> None:
        _abort(code)

    def show_stacks(self) -> None:
        if _neighbours is None:
            super().show_stacks()
            return
        for process, stacks in _neighbours.stacks():
            sys.stderr.write(f"bridge: {_describe(process)} is here:\n{stacks}\n")
        sys.stderr.flush()

    def message(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank. Collective."""
        length = np.array([0 if data is None else len(data)], dtype=np.int64)
        _wait(self._comm.Ibcast(length, root=0))
        array = np.frombuffer(data, dtype=np.uint8).copy() if data is not None else np.empty(length[0], dtype=np.uint8)
        self._broadcast_from(0, array)
        return array.tobytes()

    @property
    def is_leader(self) -> bool:
        return self.rank % self._each == 0

    @property
    def group(self) -> MPI.Intracomm | None:
        return self._group

    def begin(self, kind: str, signature: str) -> None:
        if threading.current_thread() is not threading.main_thread() and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise errors.SetupError(
                "Expected an MPI that other threads may call, as the backward pass of CUDA tensors does, got one for "
                "the main thread only. Leave mpi4py.rc.thread_level as it is, or compute the loss on the CPU."
            )
        if self._runs is not None:
            self._runs.put(self._runs.rank, _NOT_YET)
        self._sequence += 1
        mine = np.array([self._sequence, zlib.crc32(kind.encode()), zlib.crc32(signature.encode())], dtype=np.int64)
        all_ranks = np.empty((self.size, 3), dtype=np.int64)
        _wait(self._comm.Iallgather(mine, all_ranks))
        if (all_ranks == all_ranks[0]).all():
            return
        calls = self._comm.allgather(f"{kind} (call {self._sequence}; {signature})")
        ranks = {call: [r for r, other in enumerate(calls) if other == call] for call in calls}
        listing = "; ".join(f"on ranks {where}: {call}" for call, where in ranks.items())
        raise errors.CollectiveError(
            "Expected all ranks to make the same call of bridge with the same settings, got "
            f"{listing}. Forward, backward and estimate are collective: never call them inside `if is_root():`, and "
            "give every rank the same seed, step and settings."
        )

    def agree(self, error: Exception | None) -> None:
        failed = np.array([error is not None], dtype=np.int64)
        total = np.empty_like(failed)
        _wait(self._comm.Iallreduce(failed, total))
        if total[0] == 0:
            return
        mine = None if error is None else (type(error).__name__, str(error))
        reports = self._comm.allgather(mine)
        first = next(rank for rank, report in enumerate(reports) if report is not None)
        if error is not None and first == self.rank and self.size == 1:
            raise error
        kind, message = reports[first]
        others = sum(report is not None for report in reports) - 1
        more = f" ({others} more ranks failed too)" if others else ""
        raise _error(kind, f"{message} [rank {first}{more}]") from error

    def broadcast(self, array: NDArray[Any]) -> NDArray[Any]:
        array = np.array(array, order="C")  # a copy: the caller's memory may belong to the user
        self._broadcast_from(0, array)
        return array

    def broadcast_object(self, value: Any) -> Any:
        return self._comm.bcast(value, root=0)

    # -- who does what ----------------------------------------------------------------------------------------------

    def claims(self, count: int, steal: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        if self._group is not None:
            # The group's first rank claims, and tells the others.
            claimed = self._claims(count, steal) if self.is_leader else iter(())
            while (item := self._group.bcast(next(claimed, None))) is not None:
                yield item
        elif self.size > 1:
            yield from self._claims(count, steal)
        else:
            for item in range(count):
                if self.stopping:
                    return
                yield item, False

    def _claims(self, count: int, steal: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        runs = self._runs
        assert runs is not None
        word = runs.set(runs.rank, run_of(count, runs.rank, runs.size))
        with self._answering(steal()):
            yield from self._taken(runs, word, steal)

    @contextmanager
    def _answering(self, wanted: bool) -> Iterator[None]:
        """Lets ranks of other hosts read this one's run while it simulates.

        Between hosts a one-sided message may wait until its target calls MPI; over TCP it does, so that an idle rank
        would wait for the busy one's run to end. A thread that calls MPI every millisecond answers.
        """
        if not wanted or self._hosts == 1 or MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            yield
            return
        done = threading.Event()

        def answer() -> None:
            while not done.wait(_ANSWER_S):
                self._comm.Iprobe()

        thread = threading.Thread(target=answer, name="bridge-answers", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _taken(self, runs: _Runs, word: int, steal: Callable[[], bool]) -> Iterator[tuple[int, bool]]:
        while _left(word):
            if self.stopping:
                self.give_up()
            found = runs.swap(runs.rank, word, word + (1 << 32))
            if found == _STOP:
                return
            if found == word:
                yield word >> 32, False
                found += 1 << 32
            word = found
        others = [rank for rank in range(runs.size) if rank != runs.rank]
        while others and steal():
            if self.stopping:
                self.give_up()
            if runs.get(runs.rank) == _STOP:
                return
            words = {rank: runs.get(rank) for rank in others}
            # A run that is used up stays so: all begin the next evaluation together.
            others = [rank for rank, word in words.items() if word == _NOT_YET or _left(word)]
            richest = max(others, key=lambda r: _left(words[r]), default=runs.rank)
            if not others or not _left(words[richest]):
                time.sleep(1e-4)
            elif runs.swap(richest, words[richest], words[richest] - 1) == words[richest]:
                yield (words[richest] & _LOW) - 1, True

    def give_up(self) -> None:
        if self._runs is not None:
            for rank in range(self._runs.size):
                self._runs.put(rank, _STOP)

    def agree_in_group(self, error: Exception | None) -> Exception | None:
        if self._group is None:
            return error
        reports = self._group.allgather(None if error is None else (type(error).__name__, str(error)))
        return error or next((_error(*report) for report in reports if report is not None), None)

    # -- sums -------------------------------------------------------------------------------------------------------

    def finish(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[NDArray[np.int64]]
    ) -> list[torch.Tensor]:
        subtree_bytes = [
            len(list(subtrees(leaves))) * shape.numel() * shape.element_size()
            for shape, leaves in zip(like, owners, strict=True)
        ]
        if sum(subtree_bytes) <= _SMALL:
            return self._finish_everywhere(sums, like, owners)
        for tree, shape, leaves in zip(sums, like, owners, strict=True):
            for node, source, dest in transfers(leaves):
                if self.rank == source:
                    sent = tree.pop(node)
                    self.transfer(sent, source, dest)
                    tree.reuse(sent)
                elif self.rank == dest:
                    tree.add_node(node, self.transfer(tree.buffer(shape, len(shape)), source, dest))
        results = []
        for tree, shape, leaves in zip(sums, like, owners, strict=True):
            root = int(leaves[0])
            total = tree.result() if self.rank == root else tree.buffer(shape, len(shape))
            total = total.to("cpu").contiguous()
            self._broadcast_from(root, total.numpy())
            results.append(total.to(shape.device))
        return results

    def _finish_everywhere(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[NDArray[np.int64]]
    ) -> list[torch.Tensor]:
        """Every rank gets all subtrees, by one collective, and adds them itself: less waiting where they are small."""
        parts, places = [], []
        for tree, shape, leaves in zip(sums, like, owners, strict=True):
            for node, owner in subtrees(leaves):
                part = np.zeros(shape.numel() * shape.element_size(), dtype=np.uint8)
                if owner == self.rank:
                    part[:] = tree.pop(node).to("cpu").contiguous().reshape(-1).numpy().view(np.uint8)
                parts.append(part)
                places.append((tree, shape, node))
        mine = np.concatenate(parts)
        whole = np.empty_like(mine)
        # Bits, not numbers: a sum with zeros would lose the sign of a zero.
        _wait(self._comm.Iallreduce(mine, whole, op=MPI.BOR))
        start = 0
        for tree, shape, node in places:
            value = torch.empty(shape.shape, dtype=shape.dtype)
            size = value.numel() * value.element_size()
            value.reshape(-1).numpy().view(np.uint8)[:] = whole[start : start + size]
            tree.add_node(node, value.to(shape.device))
            start += size
        return [tree.result() for tree in sums]

    def transfer(self, tensor: torch.Tensor, source: int, dest: int) -> torch.Tensor:
        array = tensor.to("cpu").contiguous().numpy()
        if self.rank == source:
            _wait(*self._send(array, dest))
        elif self.rank == dest:
            _wait(*self._receive(array, source))
        return torch.as_tensor(array).to(tensor.device)

    def transpose(self, rows: torch.Tensor) -> torch.Tensor:
        counts = self._comm.allgather(len(rows))
        shares = [run_of(rows.shape[1], rank, self.size) for rank in range(self.size)]
        own = shares[self.rank]
        parts = [torch.empty((count, len(own)), dtype=torch.float64) for count in counts]
        # In rounds, so that everybody sends and receives at once.
        for shift in range(self.size):
            dest, source = (self.rank + shift) % self.size, (self.rank - shift) % self.size
            outgoing = rows[:, shares[dest].start : shares[dest].stop].contiguous()
            if shift == 0:
                parts[self.rank] = outgoing
                continue
            _wait(*self._send(outgoing.numpy(), dest), *self._receive(parts[source].numpy(), source))
        return torch.cat(parts)

    def concatenate(self, columns: torch.Tensor) -> torch.Tensor:
        widths = self._comm.allgather(columns.shape[1])
        parts = []
        for rank, width in enumerate(widths):
            part = (
                columns.contiguous() if rank == self.rank else torch.empty((len(columns), width), dtype=torch.float64)
            )
            self._broadcast_from(rank, part.numpy())
            parts.append(part)
        return torch.cat(parts, dim=1)

    def scatter_add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.empty_like(values)
        _wait(self._comm.Iallreduce(np.ascontiguousarray(values), total))
        return total

    def _broadcast_from(self, root: int, array: NDArray[Any]) -> None:
        _wait(*(self._comm.Ibcast(piece, root=root) for piece in _pieces(array)))

    def _send(self, array: NDArray[Any], dest: int) -> list[MPI.Request]:
        return [self._comm.Isend(piece, dest=dest) for piece in _pieces(array)]

    def _receive(self, array: NDArray[Any], source: int) -> list[MPI.Request]:
        return [self._comm.Irecv(piece, source=source) for piece in _pieces(array)]


def world(launched: int, ranks_per_evaluation: int = 1) -> Dispatcher:
    """The dispatcher of all ranks, after a check that the launcher and the MPI library know each other.

    Raises:
        SetupError: the launcher started several ranks, but each believes itself alone.
    """
    if MPI.COMM_WORLD.Get_size() == 1 and launched > 1:
        raise errors.SetupError(
            f"Expected {launched} ranks, as the launcher says, got {launched} separate worlds of one rank: the "
            f"launcher and the MPI library that mpi4py loaded do not belong together. Loaded: "
            f"{MPI.Get_library_version().splitlines()[0].strip()}. Use the mpirun of that library, by its full path."
        )
    dispatcher = MPIDispatcher(MPI.COMM_WORLD, ranks_per_evaluation)
    if dispatcher.size > 1 and _neighbours is None:
        _end_together(dispatcher)
    return dispatcher


_neighbours: Neighbours | None = None


def _describe(process: Process) -> str:
    size, host = MPI.COMM_WORLD.Get_size(), MPI.Get_processor_name()
    return f"rank {process.rank} of {size} (process {process.pid} on {host})"


def _end_together(world: MPIDispatcher) -> None:
    """A rank that dies ends the job, also where the launcher does not; one at its end waits for the others. Collective.

    Without the second, a rank that calls `sys.exit` would leave the others in a collective for ever.
    """
    global _neighbours
    own = this_process(world.rank)
    node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    others = node.allgather(own)
    node.Free()

    def died(process: Process) -> None:
        sys.stderr.write(
            f"bridge: {_describe(process)} has ended without a word: killed by a signal (as happens when memory "
            f"runs out), or by _exit in native code. Rank {world.rank} ends the job.\n"
        )
        world.abort(_ABORT)

    _neighbours = Neighbours(own, others, died)
    if not faulthandler.is_enabled():
        faulthandler.enable()  # a crash in native code shows where in the script it was
    ends_at_once = os._exit

    def tell_and_end(status: int) -> NoReturn:
        if os.getpid() == own.pid:  # not in what a rank has forked
            where = "".join(traceback.format_stack(limit=8)[:-1])
            sys.stderr.write(f"bridge: {_describe(own)} calls os._exit({status}), which ends all ranks:\n{where}")
            world.abort(status or _ABORT)
        ends_at_once(status)

    # Hydra, the launcher of MPICH, ends a job of which a rank does so without a word, and with that rank's status: 0,
    # a success, for 0.
    os._exit = tell_and_end
    _world.append(world)


_world: list[MPIDispatcher] = []
_windows: list[_Runs] = []


@atexit.register
def _leave() -> None:
    """What ranks do together before MPI is finalised."""
    if MPI.Is_finalized():
        return
    if _neighbours is not None:
        _neighbours.leave()
    for world in _world:
        try:
            world.begin("end of the script", "")
        except errors.BridgeError as error:
            sys.excepthook(type(error), error, error.__traceback__)
    for window in reversed(_windows):  # some libraries complain of windows that are left
        window.free()


def _abort(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # The launcher forwards what the ranks print, and some launchers drop the rest once a rank aborts.
    time.sleep(0.5)
    MPI.COMM_WORLD.Abort(code)


_installed = False


def _abort_on_uncaught_exceptions() -> None:
    """One rank's traceback ends the job; otherwise the others wait for it in a collective for ever."""
    global _installed
    if _installed or MPI.COMM_WORLD.Get_size() == 1:
        return
    _installed = True

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        rank = MPI.COMM_WORLD.Get_rank()
        if issubclass(kind, errors.BridgeError) and rank != 0:
            # Most of these are raised alike on every rank: rank 0 shows it and ends the job before we do.
            time.sleep(1.0)
        code = _ABORT
        if issubclass(kind, errors.BridgeError):
            code = errors.exit_code(kind)
        # One write, so that the tracebacks of several ranks do not interleave.
        where = f"rank {rank} of {MPI.COMM_WORLD.Get_size()} on {MPI.Get_processor_name()}:\n"
        sys.stderr.write(where + "".join(traceback.format_exception(kind, value, trace)))
        _abort(code)

    sys.excepthook = hook
