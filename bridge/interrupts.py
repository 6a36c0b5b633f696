"""Ctrl-C while a fit runs: heard at once inside the simulator, elsewhere as soon as nothing is half done.

Between runs a model is changed, a record or a checkpoint is written; an exception there would leave halves. So the
first Ctrl-C becomes a `KeyboardInterrupt` at once where the simulator is at work, and else where `look` is called or
the next run would begin. The second one is raised wherever the program is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import final


@final
class _Interrupts:
    """The state of this process; one fit at a time listens."""

    def __init__(self) -> None:
        self.listening = self.asked = self.twice = False
        self.running = 0
        self.said = ""

    def hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            self.twice = True
            raise KeyboardInterrupt
        self.asked = True
        if self.said:
            with contextlib.suppress(OSError):
                os.write(2, f"{self.said}\n".encode())  # not by print, which may be interrupted in the middle itself
        if self.running:
            raise KeyboardInterrupt


_state = _Interrupts()


@contextlib.contextmanager
def listening(said: str = "") -> Iterator[None]:
    """Hears Ctrl-C as the module says; `said` goes to stderr at the first one.

    Does nothing outside the main thread, inside another such block, and where somebody else handles Ctrl-C.
    """
    mine = threading.current_thread() is threading.main_thread() and not _state.listening
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _state.__init__()
    _state.listening, _state.said = True, said
    signal.signal(signal.SIGINT, _state.hear)
    try:
        yield
    finally:
        _state.listening = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


@final
class Held:
    """The context in which last words are written: Ctrl-C is raised at its end; the second one at once.

    Attributes:
        asked: whether one is waiting.
    """

    asked = False

    def __enter__(self) -> Held:
        main = threading.current_thread() is threading.main_thread()
        self._mine = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._mine:
            signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and kind is None:
            raise KeyboardInterrupt


def again() -> bool:
    """Whether this is the second Ctrl-C: nothing is worth waiting for."""
    return _state.listening and _state.twice


def look() -> None:
    """Raises the `KeyboardInterrupt` that has been waiting, if one has."""
    if _state.asked and _state.listening:
        raise KeyboardInterrupt


@final
class Running:
    """The context in which a simulator is at work or waited for. Other threads than the main one enter it in vain."""

    def __enter__(self) -> None:
        if _state.listening and threading.current_thread() is threading.main_thread():
            look()
            _state.running += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if _state.running and threading.current_thread() is threading.main_thread():
            _state.running -= 1


running = Running()
