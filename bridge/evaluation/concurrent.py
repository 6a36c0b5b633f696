"""Simulators that evaluate several rows at the same time, and the one that has an executor do so.

An executor is anything with the interface of `concurrent.futures.Executor`: threads, processes, loky's, Dask's
(`client.get_executor()`), MPI's (`mpi4py.futures`).
"""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array, real_array
from bridge.errors import EvaluationError, InputError
from bridge.simulator.function import unwatched
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.wrapper import SimulatorWrapper

T = TypeVar("T")
# Simulators that another process keeps ready.
_READY = 4
_ready: OrderedDict[str, Simulator] = OrderedDict()


class ConcurrentSimulator(SimulatorWrapper):
    """A simulator that evaluates several calls at the same time.

    Attributes:
        workers: how many.
    """

    workers: int

    def forwarded(self, inputs: Array) -> Array:
        return inputs

    @abstractmethod
    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        """Calls `work`, which may call this simulator, in one of as many threads as there are workers."""

    @abstractmethod
    def stop(self, waiting: Sequence[Future[Any]]) -> None:
        """Ends the calls that have been submitted as soon as it can: the others never begin."""


@final
class ExecutorSimulator(ConcurrentSimulator):
    """Another simulator, evaluated by an executor; made by `bridge.smooth(..., on=executor)`.

    Args:
        inner: the simulator. Unless the executor has threads of this process, it travels by value (cloudpickle).
        executor: who evaluates. It is the caller's, and is not shut down.
        workers: calls that are submitted at the same time.

    Raises:
        InputError: the simulator cannot be sent to another process.
    """

    def __init__(self, inner: Simulator, executor: Executor, workers: int) -> None:
        self.inner, self.executor, self.workers = inner, executor, workers
        self._pickled: bytes | None = None
        if not isinstance(executor, ThreadPoolExecutor):
            self._pickled = pickled(inner)
            self._digest = hashlib.blake2b(self._pickled, digest_size=16).hexdigest()
            unwatched(inner)  # its calls are elsewhere
        self._first, self._begun = threading.Lock(), False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="bridge-executor")

    def __reduce__(self) -> Any:
        raise InputError(
            "Expected something that can be sent to another process, got what is evaluated by an executor of this one. "
            "Make it there."
        )

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any:
        if not self._begun:
            # The first call is looked at (see `repeatability`): nothing else may run beside it.
            with self._first:
                if not self._begun:
                    outputs = self._submitted(inputs, seeds)
                    self._begun = True
                    return outputs
        return self._submitted(inputs, seeds)

    def _submitted(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> Any:
        try:
            if self._pickled is None:
                return self.executor.submit(self.inner, inputs, seeds).result()
            return self.executor.submit(_evaluate, self._digest, self._pickled, inputs, seeds).result()
        except BrokenExecutor as error:
            raise EvaluationError(
                f"Expected the executor to evaluate {self.name!r} at parameters {inputs[0].tolist()}, got: {error} A "
                "crash ends the executor's process: bridge.Workers(...) begins another one in its place."
            ) from error

    def submit(self, work: Callable[..., T], *arguments: Any) -> Future[T]:
        return self._threads.submit(work, *arguments)

    def stop(self, waiting: Sequence[Future[Any]]) -> None:
        """What runs in somebody else's executor cannot be ended from here: it is waited for."""
        for future in waiting:
            future.cancel()
        wait(waiting)


def pickled(simulator: Simulator) -> bytes:
    """The simulator by value, for another process.

    Raises:
        InputError: it cannot be sent.
    """
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(simulator)
    except Exception as error:
        raise InputError(
            f"Expected a simulator that can be sent to another process, got {simulator_name(simulator)!r}: {error}. "
            "Open files, sockets and libraries inside the simulator's call, not before."
        ) from error
    return data


def _evaluate(digest: str, pickled: bytes, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> NDArray[Any]:
    """What the executor calls: loads a simulator once in its process."""
    simulator = _ready.get(digest)
    if simulator is None:
        import cloudpickle

        simulator = cloudpickle.loads(pickled)
        assert simulator is not None
        unwatched(simulator)
        _ready[digest] = simulator
        while len(_ready) > _READY:
            _ready.popitem(last=False)
    return real_array(simulator(inputs, seeds), f"from simulator {simulator_name(simulator)!r}")
