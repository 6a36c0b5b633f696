"""A simulator in a process of its own, so that one which crashes or hangs costs an evaluation, not the rank.

The child is started once and serves one row after another over a pipe. When it dies, or a row takes too long and it is
killed, that row has failed, and the next one gets a new child. It sees none of the launcher's variables, so it may use
an MPI of its own; it ends when this process does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import math
import os
import pickle
import queue
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from bridge import errors
from bridge.arrays import real_array
from bridge.checks import is_whole
from bridge.children import marked, own_directory
from bridge.environment import child_environment, describe_status, thread_count
from bridge.errors import EvaluationError, EvaluationTimeoutError, InputError, OutputError, SetupError
from bridge.evaluation.concurrent import ConcurrentSimulator, pickled
from bridge.simulator.function import unwatched
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.repeatability import NotRepeatableWarning
from bridge.simulator.wrapper import SimulatorWrapper

T = TypeVar("T")

_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)
_START_SECONDS = 120.0
_LOOK_SECONDS = 1.0
_AGAIN_SECONDS = 0.05
_UNWATCHED = "BRIDGE_UNWATCHED"


@final
class IsolatedSimulator(SimulatorWrapper):
    """Another simulator, run in a child process; made by `bridge.smooth(..., on="process")`.

    Args:
        inner: the simulator; it travels by value (cloudpickle), so functions of a script are fine.
        timeout_s: seconds that one row may take; None for no limit. Starting the child does not count.
        directory: where the child gets a fresh working directory of its own, removed when it ends; None for this
            process's.

    Raises:
        InputError: the simulator cannot be sent to another process, or the limit is not positive.
    """

    def __init__(self, inner: Simulator, timeout_s: float | None = None, directory: Path | None = None) -> None:
        if timeout_s is not None and not timeout_s > 0:
            raise InputError(f"Expected a positive timeout_s, got {timeout_s!r}.")
        self.inner, self.timeout_s = inner, timeout_s
        self._directory = directory
        self._pickled = pickled(inner)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def __reduce__(self) -> Any:
        # A copy has a child of its own, once it needs one.
        return type(self), (self.inner, self.timeout_s)

    def forwarded(self, inputs: NDArray[np.float64]) -> NDArray[np.float64]:
        return inputs

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        if not self.row_by_row:
            return self._rows(inputs, seeds)
        rows = [self._rows(inputs[i : i + 1], seeds[i : i + 1]) for i in range(len(inputs))]
        if len(shapes := {row.shape[1:] for row in rows}) > 1:
            raise OutputError(f"Expected outputs of one shape from {self.name!r}, got {sorted(shapes)}.")
        return np.concatenate(rows)

    def _rows(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        where = f"at parameters {inputs[0].tolist()}, seed {int(seeds[0])}"
        if len(inputs) > 1:
            where += f" and {len(inputs) - 1} more rows of the same call"
        limit = None if self.timeout_s is None else self.timeout_s * len(inputs)
        status, result = self._ask((inputs, seeds), limit, where)
        if status == "told":  # the same of each child: Python shows it once
            words, result = result
            warnings.warn(words, stacklevel=2)
        if status in ("ok", "told"):
            return np.asarray(result)
        kind, message, trace = result
        # What the simulator raised on purpose stays what it was.
        known = getattr(errors, kind, None)
        if known is not None:
            raise known(message)
        raise EvaluationError(f"Simulator {self.name!r} raised {kind}: {message} {where}.\n{trace}")

    def _ask(self, question: Any, timeout_s: float | None, where: str) -> Any:
        """Sends, and waits for the answer; whatever goes wrong, the child is ended."""
        assert self._pipe is not None
        assert self._process is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died: reading says so
                self._pipe.send(question)
            deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
            while (left := deadline - time.monotonic()) > 0:
                if self._pipe.poll(min(left, _LOOK_SECONDS)):
                    return self._pipe.recv()
                # Something that it has started may hold its end of the pipe open.
                if self._process.poll() is not None and not self._pipe.poll(0):
                    raise EOFError
        except (EOFError, ConnectionResetError):
            status = self._process.wait()
            self.close()
            raise EvaluationError(
                f"Simulator {self.name!r} ended its process, {describe_status(status)} {where}. What it said is on "
                "standard error."
            ) from None
        except BaseException:
            self.close()
            raise
        self.close()
        raise EvaluationTimeoutError(
            f"Expected simulator {self.name!r} to end within {timeout_s:g} s, got no answer {where}; its process was "
            "killed."
        )

    def _start(self) -> None:
        self.close()
        ours, theirs = Pipe()
        environment = marked(child_environment(thread_count()))
        if self.timeout_s is not None:  # which two calls might exceed
            environment[_UNWATCHED] = "1"
        program = "import sys; from bridge.evaluation.workers import serve; serve(int(sys.argv[1]), int(sys.argv[2]))"
        # Where this process finds its modules, the child must: a script's folder, above all.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(path) for path in sys.path)
        own = None if self._directory is None else _fresh(self._directory)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=own,
                start_new_session=True,
            )
        self._pipe = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours, own)
        status, result = self._ask(self._pickled, _START_SECONDS, "while it was started")
        if status != "ok":
            self.close()
            raise SetupError(
                f"Expected simulator {self.name!r} to load in another process, got {result[0]}: {result[1]}."
            )

    def kill(self) -> None:
        """Kills the child and its session, from another thread than the one that waits for it and notices."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the child, and all that it has started in its session; a later call starts another one."""
        if self._process is not None:
            self._finalizer()
        self._process = self._pipe = None


@final
class SimulatorPool(ConcurrentSimulator):
    """Several child processes that evaluate at the same time; made by `bridge.smooth(..., on=bridge.Workers(8))`.

    Args:
        inner, timeout_s, directory: as in `IsolatedSimulator`.
        workers: how many.
    """

    def __init__(
        self, inner: Simulator, workers: int, timeout_s: float | None = None, directory: Path | None = None
    ) -> None:
        if not is_whole(workers, 1):
            raise InputError(f"Expected a positive integer of workers, got {workers!r}.")
        self.inner, self.workers = inner, int(workers)
        self._children = [IsolatedSimulator(inner, timeout_s, directory) for _ in range(self.workers)]
        self._free: queue.SimpleQueue[IsolatedSimulator] = queue.SimpleQueue()
        for child in self._children:
            self._free.put(child)
        self._stopped = False
        # The same threads for ever: a child is told to end when the thread that has started it does.
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="bridge-worker")

    def __reduce__(self) -> Any:
        return type(self), (self.inner, self.workers, self._children[0].timeout_s)

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Evaluates in whichever child is free; waits for one."""
        child = self._free.get()
        try:
            if self._stopped:
                raise EvaluationError(f"Simulator {self.name!r} was interrupted.")
            return child(inputs, seeds)
        finally:
            self._free.put(child)

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        self._stopped = False
        return self._threads.submit(work, *arguments)

    def stop(self, waiting: Sequence[Future[Any]]) -> None:
        """Ends the calls that have been submitted, at once: those that run fail, the others never begin."""
        self._stopped = True
        for future in waiting:
            future.cancel()
        while waiting:
            for child in self._children:
                child.kill()
            waiting = list(wait(waiting, _AGAIN_SECONDS).not_done)

    def close(self) -> None:
        """Ends the children; a later call starts others."""
        for child in self._children:
            child.close()


def _fresh(folder: Path) -> Path:
    try:
        return own_directory("worker", folder)
    except OSError as error:
        raise SetupError(
            f"Expected a folder in which working directories can be made, got {error}. Give another own_directory."
        ) from error


def _end(process: subprocess.Popen[bytes], pipe: Connection, own: Path | None) -> None:
    # Before it is reaped: until then its number, which is the group's, cannot be anybody else's.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pipe.close()
    if own is not None:
        shutil.rmtree(own, ignore_errors=True)


def serve(descriptor: int, parent: int) -> None:
    """The child: loads a simulator, then answers rows until the pipe closes."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
        if os.getppid() != parent:
            return  # it died before we could ask to be told
    faulthandler.enable()
    os.set_inheritable(descriptor, False)
    with Connection(descriptor) as pipe:
        simulator: Any = None
        words = ""
        reply: tuple[str, Any]
        answer: Any
        with contextlib.suppress(EOFError):
            while True:
                question = pipe.recv()
                try:
                    if simulator is None:
                        simulator, answer = pickle.loads(question), None
                        if os.environ.pop(_UNWATCHED, ""):
                            unwatched(simulator)
                    else:
                        answer, words = _called(simulator, question)
                    reply = ("told", (words, answer)) if words else ("ok", answer)
                except Exception as error:
                    trace = "".join(traceback.format_exception(error)[-6:])
                    reply = ("error", (type(error).__name__, str(error), trace))
                pipe.send(reply)


def _called(simulator: Any, question: Any) -> tuple[NDArray[Any], str]:
    """The outputs, and what is to be told of a function that does not give the same again."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotRepeatableWarning)
        source = f"from simulator {simulator_name(simulator)!r}"
        try:
            return real_array(simulator(*question), source), ""
        except NotRepeatableWarning as told:
            return real_array(told.outputs, source), str(told)
