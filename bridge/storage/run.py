"""A run on disk: what it needs to go on after any interruption, on any number of ranks, to bitwise the same end.

A run directory holds `status.json` (how the run stands, for people and scripts), `checkpoint-*.npz` (the state between
two steps: plain arrays and JSON, never a pickle) and `evaluations/` (what has been finished since, see
    `bridge.storage.store`).
There is no random state in it: noise is a function of (seed, step, row).
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.checks import Settings
from bridge.dispatch import Dispatcher, get_dispatcher
from bridge.errors import BridgeError, InputError, SetupError, StoppedError, exit_code, exit_status
from bridge.interrupts import Held
from bridge.storage import checkpoint
from bridge.storage.files import write_json
from bridge.storage.store import Store

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm

_log = logging.getLogger("bridge")
_KEEP = 2
# Evaluations written since the last checkpoint beyond this many bytes make another one due.
_MUCH = 256e6


@final
class Run(metaclass=Settings):
    """A resumable run; use it as a context, on every rank.

        with bridge.Run("runs/a", settings={"seed": 0}) as run:
            smoothed = bridge.smooth(simulator, seed=0, memory=run.store)
            theta, optimiser = ...
            if run.state is not None:
                theta.data.copy_(run.state["theta"])
                optimiser.load_state_dict(run.state["optimiser"])
            for step in range(run.step, 100):
                ...
                run.checkpoint(step + 1, {"theta": theta, "optimiser": optimiser.state_dict()})

    Interrupted by a signal or near the end of the allocation, the block ends with `SystemExit(75)` after the state has
    been written; killed in any other way, the run goes on from the last checkpoint, and finished evaluations are not
    paid for again. Of a process that was killed `status.json` still says that it is running: it has `pid` and `host`
    to look for. Started again on any number of ranks it ends with bitwise the result of an uninterrupted run.

    Args:
        directory: of this run alone.
        settings: what the result depends on (JSON); a run is resumed under the same settings only.
        every_s: a checkpoint is written when the last one is older [s]; 0 writes each. Also at the end, at a signal,
            and when much has been journalled.
        signals: names of those that ask to stop. USR1 is what batch systems can be told to send in time; TERM may
            leave 0.2 s.
        resume: True goes on with what is there, if anything is. False begins anew, and refuses where a run that is not
            done would be lost, unless `overwrite`.
        journal_above_s: evaluations that took less [s] are not journalled.
        keep_evaluations: for other fits to use again (`bridge.Kriging(reuse=...)`); else those of a step are removed
            with the checkpoint after it.
        title: for those who watch it. comm: as in `bridge.Ranks`.

    Attributes:
        step: where to go on: 0, or that of the last checkpoint.
        state: of the last checkpoint, None where there is none. Tensors are on the CPU.
        store: the journal of evaluations, for `bridge.smooth(memory=...)`.

    Raises:
        InputError: another job is running in the directory, its settings differ, or it would be overwritten.
        SetupError: the directory cannot be made, or there is no readable checkpoint among several.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        settings: Mapping[str, Any] | None = None,
        every_s: float = 10.0,
        signals: Sequence[str] = ("USR1", "TERM"),
        resume: bool = True,
        overwrite: bool = False,
        journal_above_s: float = 0.01,
        keep_evaluations: bool = False,
        title: str = "",
        comm: Intracomm | None = None,
    ) -> None:
        if not isinstance(directory, str | os.PathLike) or directory == "":
            raise InputError(f"Expected the directory of a run as a path, got {directory!r}.")
        self.directory, self.every_s, self._keep = Path(directory), every_s, keep_evaluations
        self.title, self.resume, self._overwrite = title, resume, overwrite
        self._settings: Mapping[str, Any] = settings or {}
        self._above_s, self._comm = journal_above_s, comm
        unknown = [name for name in signals if not hasattr(signal, f"SIG{name.removeprefix('SIG')}")]
        if unknown:
            raise InputError(f"Unknown signals {unknown}. Expected names such as USR1, USR2, TERM.")
        self._signals = [signal.Signals[f"SIG{name.removeprefix('SIG')}"] for name in signals]
        self._unfinished, self._died, self._begun = False, "", False
        self._lock: IO[str] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._written_at = time.monotonic()
        self._longest, self._last_step_at = 0.0, time.monotonic()

    # -- beginning --------------------------------------------------------------------------------------------------

    def begin(
        self,
        settings: Mapping[str, Any] | None = None,
        *,
        keep_evaluations: bool | None = None,
        journal_above_s: float | None = None,
        comm: Intracomm | None = None,
    ) -> None:
        """Looks at what is in the directory, takes it for this run, and has `step`, `state` and `store`. Collective.

        Entering the block does so by itself; a fit does before, with settings of its own in place of those given.

        Raises:
            InputError: it has begun, or as in the class. SetupError: as in the class.
        """
        if self._begun:
            raise InputError(f"Expected a run that has not begun, got that in {self.directory}, which is in use.")
        given = {**self._settings, **(settings or {})}
        self._settings = json.loads(json.dumps(given, sort_keys=True, default=str))
        self._keep = self._keep if keep_evaluations is None else keep_evaluations
        self._dispatcher = get_dispatcher(self._comm if comm is None else comm)
        # Under a driver the other ranks follow its evaluations, not its checkpoints.
        self._all = self._dispatcher.leader
        error: Exception | None = None
        found: tuple[int, Any] | None = None
        if self._all.rank == 0:
            try:
                found = self._open(self.resume, self._overwrite)
            except BridgeError as refused:
                error = refused
            except OSError as failure:
                error = SetupError(f"Expected a directory for the run that can be written, got: {failure}.")
        if error is not None:
            self._unlock()
        self._all.agree(error)
        found = self._all.broadcast_object(found)
        packed = None if found is None else found[1]
        self.step = 0 if found is None else int(found[0])
        self.state: Any = None if packed is None else checkpoint.unpacked(*packed)
        self._snapshot: tuple[int, Any] | None = None if packed is None else (self.step, packed)
        self._written: int | None = None if packed is None else self.step
        self._behind = False
        self.store = Store(
            self.directory / "evaluations", above_s=self._above_s if journal_above_s is None else journal_above_s
        )
        self.store.advance(self.step)
        if self._died and self._all.rank == 0:
            _log.warning(
                "the last job in %s %s ended without a word: killed, or its machine failed; this one goes on from "
                "step %d with %d evaluations finished since",
                *(self.directory, self._died, self.step, self.store.count(self.step)),
            )
        if self.store.damaged and self._all.rank == 0:
            _log.warning("%d bytes of torn records in %s are ignored", self.store.damaged, self.store.directory)
        self._begun = True

    def _open(self, resume: bool, overwrite: bool) -> tuple[int, Any] | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self.directory / ".lock").open("w")
        try:
            # Gone with this process, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"Expected {self.directory} for this run alone, got one that is running in it.") from error
        except OSError as error:
            _log.warning("no locks on the file system of %s (%s): see that no two runs use it", self.directory, error)
        status = self.status()
        checkpoints = sorted(self.directory.glob("checkpoint-*.npz"), reverse=True)
        if not resume:
            if (
                not overwrite
                and status.get("state") not in (None, "done")
                and (checkpoints or any(self.directory.glob("evaluations/*")))
            ):
                raise InputError(
                    f"Expected a directory without an unfinished run, got {self.directory} with one at step "
                    f"{status.get('step')}. Resume it, or begin anew and lose it: bridge.Run(directory, resume=False, "
                    "overwrite=True), or --fresh."
                )
            for path in checkpoints:
                path.unlink()
            for path in self.directory.glob("evaluations/*.journal"):
                path.unlink()
            return None
        if status and status.get("settings") != self._settings:
            then, now = status.get("settings") or {}, self._settings
            differ = sorted(key for key in {*then, *now} if then.get(key) != now.get(key))
            listing = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in differ)
            raise InputError(
                f"Expected the settings of the run in {self.directory}, got others: {listing}. Use them again, or "
                "another directory, or begin anew and lose that run: bridge.Run(directory, resume=False, "
                "overwrite=True), or --fresh."
                f"{_hint(differ)}"
            )
        if status.get("state") == "running":
            self._died = "(process {pid} on {host}, {ranks} ranks)".format_map(status)
        for path in checkpoints:
            try:
                return checkpoint.read(path)
            except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
                _log.warning("checkpoint %s is damaged (%s): the one before is taken", path, error)
        if checkpoints:
            raise SetupError(
                f"Expected a readable checkpoint among {len(checkpoints)} in {self.directory}, got damaged ones only. "
                "Remove them to begin anew; finished evaluations are found again."
            )
        return None

    def _unlock(self) -> None:
        if self._lock is not None:
            # Not by closing alone: a child that was forked meanwhile, of a pool say, has the same file open.
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._lock.close()

    def __getattr__(self, name: str) -> Any:
        if name in ("step", "state", "store"):
            raise InputError(
                f"Expected `with bridge.Run(...) as run:` before run.{name}, which is known from there on."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __enter__(self) -> Run:
        if not self._begun:
            self.begin()
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                self._before[number] = signal.signal(number, self._ask_to_stop)
        Dispatcher.stopping = False
        self._tell("running", None)
        return self

    def _ask_to_stop(self, number: int, frame: FrameType | None) -> None:
        Dispatcher.stopping = True

    # -- going on ---------------------------------------------------------------------------------------------------

    def checkpoint(self, step: int, state: Any, at_once: bool = False) -> None:
        """Hands over the state after `step` steps; written when that is due, or at once. Collective.

        Args:
            step: where to go on.
            state: numbers, strings, arrays, tensors, and lists, tuples and dictionaries of them.

        Raises:
            StoppedError: on every rank, after a signal to any, or where the allocation ends before another step would:
                let it pass to the end of the block.
        """
        packed = checkpoint.packed(state)
        self._snapshot, self._behind = (step, packed), True
        with self._dispatcher.mirrored(self.store, "advance", (step,), {}):
            self.store.advance(step)
        now = time.monotonic()
        self._longest, self._last_step_at = max(self._longest, now - self._last_step_at), now
        ends = _seconds_left()
        flags = np.zeros(3)
        flags[0] = Dispatcher.stopping
        flags[1] = self._all.rank == 0 and ends is not None and ends < 1.5 * self._longest + 5.0
        flags[2] = self._all.rank == 0 and (
            at_once or now - self._written_at >= self.every_s or self.store.written * self._all.size > _MUCH
        )
        flags = self._all.scatter_add(flags)
        if flags[2] or flags[:2].any():
            self._write()
        if flags[:2].any():
            Dispatcher.stopping = False
            why = "a signal" if flags[0] else "the end of the allocation, which leaves no time for another step"
            raise StoppedError(f"Stopped after step {step} by {why}.")

    def set_aside(self) -> None:
        """Says that the end of the block is not that of the run, which can be resumed."""
        self._unfinished = True

    def _write(self, between_steps: bool = True) -> None:
        """Writes the snapshot and, between steps, forgets the evaluations, which came before it. Collective."""
        if self._snapshot is None or not self._behind:
            return
        step, packed = self._snapshot
        failed = np.zeros(1)
        if self._all.rank == 0:
            try:
                self._save(step, packed)
            except OSError as error:
                # What is on disk is whole, only older; the run itself has lost nothing.
                failed[0] = 1
                _log.warning("no checkpoint at step %d: %s", step, error)
        self._written_at = time.monotonic()
        if self._all.scatter_add(failed)[0]:
            return
        self._written, self._behind = step, False
        if between_steps and not self._keep:
            with self._dispatcher.mirrored(self.store, "clear", (step,), {}):
                self.store.clear(step)
        else:
            with self._dispatcher.mirrored(self.store, "sync", (), {}):
                self.store.sync()
        self._tell("running", None)

    def _save(self, step: int, packed: tuple[str, list[NDArray[Any]]]) -> None:
        checkpoint.write(self.directory / f"checkpoint-{step:09d}.npz", step, packed)
        for old in sorted(self.directory.glob("checkpoint-*.npz"))[:-_KEEP]:
            old.unlink()

    # -- ending -----------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with Held() as held:
            self._end(kind, error)
            if held.asked:
                self._tell("done" if kind is None and not self._unfinished else "stopped", 130, KeyboardInterrupt())
        if kind is not None and issubclass(kind, StoppedError):
            if self._all.rank == 0:
                print(f"bridge: {error} Started again, the run in {self.directory} goes on.", file=sys.stderr)
            raise SystemExit(exit_code(StoppedError)) from error

    def _end(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Writes what is to be kept, and how the run has ended."""
        try:
            if kind is None or issubclass(kind, StoppedError):
                # The other ranks are here as well. What was evaluated since the last step may be asked for again.
                self._write(between_steps=False)
            elif self._all.rank == 0 and self._snapshot is not None and self._behind:
                with contextlib.suppress(OSError):
                    self._save(*self._snapshot)
        finally:
            for number, before in self._before.items():
                signal.signal(number, before)
            self._before.clear()
        if kind is None:
            self._tell("stopped" if self._unfinished else "done", 0)
        elif issubclass(kind, StoppedError):
            self._tell("stopped", 75, error)
        elif issubclass(kind, KeyboardInterrupt):
            self._tell("stopped", 130, error)
        elif isinstance(error, SystemExit):
            code = exit_status(error)
            self._tell("failed" if code else "stopped", code, error)
        else:
            code = exit_code(kind) if issubclass(kind, BridgeError) else 1
            self._tell("failed", code, error)
        self._unlock()

    def status(self) -> dict[str, Any]:
        """What `status.json` says; empty where there is none."""
        try:
            found = json.loads((self.directory / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _tell(self, state: str, code: int | None, error: BaseException | None = None) -> None:
        if self._all.rank != 0:
            return
        status = {
            "state": state,
            "exit_code": code,
            "step": self._written or 0,
            "message": "" if error is None else f"{type(error).__name__}: {error}",
            "ranks": self._dispatcher.size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": self._settings,
        }
        try:
            write_json(self.directory / "status.json", status)
        except OSError as failure:
            _log.warning("no status.json: %s", failure)


def correct_status(directory: Path, code: int) -> None:
    """Makes `status.json` say how this process ends, where that is not how its run has ended."""
    path = directory / "status.json"
    with contextlib.suppress(OSError, ValueError):
        status = json.loads(path.read_text(encoding="utf-8"))
        mine = (status["pid"], status["host"]) == (os.getpid(), socket.gethostname())
        if mine and status["state"] != "running" and status["exit_code"] != code:
            write_json(path, {**status, "exit_code": code})


def _hint(differ: Sequence[str]) -> str:
    if not any(key == "identity" or key.startswith("code of") for key in differ):
        return ""
    return (
        " Code counts with all that it uses, and packages with their versions: where only text was changed and results "
        "are the same, give the function an attribute `identity`, a text, from the first run on."
    )


def _seconds_left() -> float | None:
    """Until the batch system ends the job, where it says so."""
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return float(text) - time.time() if text.isdigit() else None
