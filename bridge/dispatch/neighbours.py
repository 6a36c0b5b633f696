"""The other ranks of a host, seen as processes: which one has died, and what each is doing.

MPI tells neither. A rank that ends by `os._exit`, or is killed under a launcher that does not notice, leaves the others
waiting for ever; and of a rank that hangs in the script the others, which wait for it, know nothing. So the ranks of a
host form a ring, in which each looks at the next one's process about every second, and each has memory into which the
interpreter writes its stacks at a signal, for another rank to read.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

_LOOK_S = 1.0
# A process must be gone at two looks: ranks that leave together do not leave at the same moment.
_LOOKS = 2
_DUMP_S = 0.5
# Native code cannot keep it from being delivered, no launcher sends it, and programs do not use it.
_SHOW = signal.SIGQUIT


@dataclass(frozen=True)
class Process:
    """A rank's process, as others of its host see it.

    Attributes:
        rank: its number. pid, started: of the process; a number may be given again, with another start.
        namespace: of process numbers; those of another one mean nothing here.
        memory: descriptor, in that process, of the memory for its stacks.
    """

    rank: int
    pid: int
    started: str
    namespace: str
    memory: int

    @property
    def stacks(self) -> str:
        return f"/proc/{self.pid}/fd/{self.memory}"

    def lives(self) -> bool:
        return _started(self.pid) == self.started


def _started(pid: int) -> str | None:
    """When a process began, in the system's units; None where there is none, or only what its parent has not reaped."""
    try:
        # The second field is the program's name, which may have spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def this_process(rank: int) -> Process:
    """This process, ready to show its stacks; call it once."""
    memory = os.memfd_create("bridge-stacks")
    # The interpreter itself writes, without the lock that native code may hold.
    faulthandler.register(_SHOW, file=memory, all_threads=True, chain=False)
    pid = os.getpid()
    return Process(rank, pid, _started(pid) or "", os.readlink("/proc/self/ns/pid"), memory)


@final
class Neighbours:
    """The ranks of this host.

    Args:
        own: this rank's process.
        others: those of all ranks of the host, in the same order on each.
        died: called, in another thread, with a rank whose process has ended.
    """

    def __init__(self, own: Process, others: Sequence[Process], died: Callable[[Process], None]) -> None:
        self._own, self._died = own, died
        self._visible = [p for p in others if p.namespace == own.namespace]
        after = self._visible[(self._visible.index(own) + 1) % len(self._visible)]
        self._left = threading.Event()
        if after != own:
            threading.Thread(target=self._watch, args=(after,), name="bridge-neighbour", daemon=True).start()

    def _watch(self, neighbour: Process) -> None:
        gone = 0
        while not self._left.wait(_LOOK_S):
            gone = 0 if neighbour.lives() else gone + 1
            if gone == _LOOKS:
                self._died(neighbour)
                return

    def leave(self) -> None:
        """Watches no more: from here on ranks may end."""
        self._left.set()

    def stacks(self) -> Iterator[tuple[Process, str]]:
        """What each rank of the host is doing, from the first of them that asks; nothing for the others."""
        try:
            # Never closed: whoever asks later must find it locked until the job has ended.
            first = os.open(self._visible[0].stacks, os.O_RDONLY)
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        for process in self._visible:
            if process.lives():
                os.kill(process.pid, _SHOW)
        time.sleep(_DUMP_S)
        for process in self._visible:
            with contextlib.suppress(OSError):
                yield process, Path(process.stacks).read_text(encoding="utf-8", errors="replace")
