"""Ranks of an MPI job; the only file that imports mpi4py.

Every rank runs the same script (SPMD), evaluates its own leaves and keeps their outputs; only sums travel. Buffers go
by upper-case calls, uncompressed; nothing but error messages is pickled.
"""

from __future__ import annotations

import sys
import time
import traceback
import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge import errors
from bridge.dispatch.base import Dispatcher
from bridge.dispatch.tree import Node, TreeSum, owned_nodes

try:
    from mpi4py import MPI
except ImportError as error:
    raise errors.SetupError(
        f"Expected a working MPI, because a launcher has started this process as one of several, got: {error}. "
        "Install one (`pip install mpi4py mpich` on a single machine; on a cluster load the site's MPI, then "
        "`pip install mpi4py`), or start the script without a launcher."
    ) from error

_ABORT = 70
# Messages below 2^31 bytes, which every MPI can count.
_PIECE = 1 << 28


@final
class MPIDispatcher(Dispatcher):
    """Dispatch over a communicator (a duplicate, so that the user's own messages never meet ours)."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm.Dup()
        self._sequence = 0
        _abort_on_uncaught_exceptions()

    @property
    def rank(self) -> int:
        return int(self._comm.Get_rank())

    @property
    def size(self) -> int:
        return int(self._comm.Get_size())

    def begin(self, kind: str, signature: str) -> None:
        self._sequence += 1
        mine = np.array([self._sequence, zlib.crc32(kind.encode()), zlib.crc32(signature.encode())], dtype=np.int64)
        all_ranks = np.empty((self.size, 3), dtype=np.int64)
        self._comm.Allgather(mine, all_ranks)
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
        self._comm.Allreduce(failed, total)
        if total[0] == 0:
            return
        mine = None if error is None else (type(error).__name__, str(error))
        reports = self._comm.allgather(mine)
        first = next(rank for rank, report in enumerate(reports) if report is not None)
        if error is not None and first == self.rank and self.size == 1:
            raise error
        kind, message = reports[first]
        known = getattr(errors, kind, errors.EvaluationError)
        others = sum(report is not None for report in reports) - 1
        more = f" ({others} more ranks failed too)" if others else ""
        raise known(f"{message} [rank {first}{more}]") from error

    def broadcast(self, array: NDArray[Any]) -> NDArray[Any]:
        array = np.array(array, order="C")  # a copy: the caller's memory may belong to the user
        self._in_pieces(array, lambda piece: self._comm.Bcast(piece, root=0))
        return array

    def broadcast_object(self, value: Any) -> Any:
        return self._comm.bcast(value, root=0)

    def first(self, value: Any) -> Any:
        return next((x for x in self._comm.allgather(value) if x is not None), None)

    def finish(
        self, sums: Sequence[TreeSum], like: Sequence[torch.Tensor], owners: Sequence[Sequence[range]]
    ) -> list[torch.Tensor]:
        # Rank 0 takes one partial after another, in leaf order, straight into the tree: it never holds more than
        # O(log leaves) of them.
        for problem, tree in enumerate(sums):
            for rank in range(1, self.size):
                own = owners[rank][problem]
                nodes: list[Node] = list(owned_nodes(own.start, own.stop, tree.num_leaves))
                if self.rank == rank:
                    partials = tree.partials
                    for node in nodes:
                        self.transfer(partials[node], rank, 0)
                elif self.rank == 0:
                    for node in nodes:
                        tree.add_node(node, self.transfer(torch.empty_like(like[problem]), rank, 0))
        results = []
        for problem, tree in enumerate(sums):
            device = like[problem].device
            root = tree.result() if self.rank == 0 else torch.empty_like(like[problem])
            total = root.to("cpu").contiguous()
            self._in_pieces(total.numpy(), lambda piece: self._comm.Bcast(piece, root=0))
            results.append(total.to(device))
        return results

    def transfer(self, tensor: torch.Tensor, source: int, dest: int) -> torch.Tensor:
        array = tensor.to("cpu").contiguous().numpy()
        if self.rank == source:
            self._in_pieces(array, lambda piece: self._comm.Send(piece, dest=dest))
        elif self.rank == dest:
            self._in_pieces(array, lambda piece: self._comm.Recv(piece, source=source))
        return torch.as_tensor(array).to(tensor.device)

    def transpose(self, rows: torch.Tensor) -> torch.Tensor:
        counts = self._comm.allgather(len(rows))
        shares = [self.share_of(rows.shape[1], rank) for rank in range(self.size)]
        own = shares[self.rank]
        parts = [torch.empty((count, len(own)), dtype=torch.float64) for count in counts]
        # In rounds, so that everybody sends and receives at once.
        for shift in range(self.size):
            dest, source = (self.rank + shift) % self.size, (self.rank - shift) % self.size
            outgoing = rows[:, shares[dest].start : shares[dest].stop].contiguous()
            if shift == 0:
                parts[self.rank] = outgoing
                continue
            requests: list[MPI.Request] = []
            self._in_pieces(
                outgoing.numpy(), lambda piece, to=dest, sent=requests: sent.append(self._comm.Isend(piece, dest=to))
            )
            self._in_pieces(parts[source].numpy(), lambda piece, at=source: self._comm.Recv(piece, source=at))
            MPI.Request.Waitall(requests)
        return torch.cat(parts)

    def concatenate(self, columns: torch.Tensor) -> torch.Tensor:
        widths = self._comm.allgather(columns.shape[1])
        parts = []
        for rank, width in enumerate(widths):
            part = (
                columns.contiguous() if rank == self.rank else torch.empty((len(columns), width), dtype=torch.float64)
            )
            self._in_pieces(part.numpy(), lambda piece, root=rank: self._comm.Bcast(piece, root=root))
            parts.append(part)
        return torch.cat(parts, dim=1)

    def scatter_add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.empty_like(values)
        self._comm.Allreduce(np.ascontiguousarray(values), total)
        return total

    @staticmethod
    def _in_pieces(array: NDArray[Any], transfer: Any) -> None:
        flat = array.reshape(-1).view(np.uint8)
        for start in range(0, flat.size, _PIECE):
            transfer(flat[start : start + _PIECE])


def world(launched: int) -> Dispatcher:
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
    return MPIDispatcher(MPI.COMM_WORLD)


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
        # One write, so that the tracebacks of several ranks do not interleave.
        where = f"rank {rank} of {MPI.COMM_WORLD.Get_size()} on {MPI.Get_processor_name()}:\n"
        sys.stderr.write(where + "".join(traceback.format_exception(kind, value, trace)))
        sys.stdout.flush()
        sys.stderr.flush()
        # The launcher forwards what the ranks print, and some launchers drop the rest once a rank aborts.
        time.sleep(0.5)
        MPI.COMM_WORLD.Abort(_ABORT)

    sys.excepthook = hook
