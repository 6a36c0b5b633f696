"""Runs in threads of this process, by an executor of one's own, known by a name.

    python examples/extending/threads.py

For simulators that wait (for a licence, a queue, an instrument) or release Python's lock (NumPy, most compiled codes).
An executor is a class derived from `concurrent.futures.Executor`, with `submit` and `shutdown`: so are those of
threads and processes in Python itself, of loky and of Dask. Whichever it is, results are the same to the last bit.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np

import bridge


@bridge.register("patient-threads")
class PatientThreads(Executor):
    """So many threads, each of which takes the next run when it is free."""

    def __init__(self, workers: int = 4) -> None:
        self._max_workers = workers  # how many runs `bridge` submits at the same time
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **settings: Any) -> Future[Any]:
        """Has a thread call a function; the future gets what it returns or raises."""
        future: Future[Any] = Future()
        self._waiting.put((future, lambda: function(*arguments, **settings)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Ends the threads, after what is waiting."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads if wait else []:
            thread.join()

    def _serve(self) -> None:
        while (work := self._waiting.get()) is not None:
            future, call = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # also what ends a process: it is for who asked
                future.set_exception(error)


def simulate(theta: np.ndarray) -> np.ndarray:
    """A simulator that waits most of the time, as one that asks an instrument does."""
    time.sleep(0.02)
    return np.array([np.exp(-theta[0]), theta[0] * theta[1], np.sin(theta[1])])


def main() -> None:
    target, start = simulate(np.array([0.5, 0.3])), {"rate": 0.2, "angle": 0.6}
    simulator = bridge.as_simulator(simulate, names=["rate", "angle"])
    found, seconds = [], []
    for on in (None, "patient-threads"):
        begin = time.perf_counter()
        found.append(bridge.fit(simulator, target, start, seed=0, on=on))
        seconds.append(time.perf_counter() - begin)
    print(found[1])
    print("the same numbers to the last bit:", found[0].parameters.tobytes() == found[1].parameters.tobytes())
    print(f"{seconds[0]:.1f} s in turn, {seconds[1]:.1f} s in four threads")


if __name__ == "__main__":
    main()
