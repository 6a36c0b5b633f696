"""One rank drives, the others follow: an unchanged serial script on many ranks.

Every object with collective methods is made on all ranks, and every collective call of the driver's is repeated on
them: the same calls as if all ran the script, so the same numbers. What travels is pickled (between ranks of one job,
never from a file); a simulator and the like go once.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import cloudpickle

from bridge.dispatch.base import Dispatcher, Mirror
from bridge.dispatch.serial import SerialDispatcher
from bridge.errors import BridgeError

if TYPE_CHECKING:
    from bridge.dispatch.mpi import MPIDispatcher

T = TypeVar("T")


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, sent: dict[int, int]) -> None:
        super().__init__(file)
        self._sent = sent

    def persistent_id(self, item: Any) -> int | None:
        return self._sent.get(id(item))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, known: dict[int, Any]) -> None:
        super().__init__(file)
        self._known = known

    def persistent_load(self, number: int) -> Any:
        return self._known[number]


class Driver(Mirror):
    """Rank 0's side."""

    def __init__(self, dispatcher: MPIDispatcher) -> None:
        self._dispatcher = dispatcher
        self._numbers = itertools.count()
        # Kept alive here, so that no other object can get its id.
        self._sent: dict[int, tuple[int, Any]] = {}
        self._made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._gone: list[int] = []
        self._inside = False

    @property
    def alone(self) -> Dispatcher:
        return SerialDispatcher()

    def _tell(self, *message: Any) -> None:
        file = io.BytesIO()
        _Pickler(file, {key: number for key, (number, _) in self._sent.items()}).dump((self._gone, *message))
        self._gone = []
        self._dispatcher.message(file.getvalue())

    def make(
        self, kind: Callable[..., T], arguments: Sequence[Any], settings: dict[str, Any], once: Sequence[Any]
    ) -> T:
        for item in once:
            if item is not None and id(item) not in self._sent:
                number = next(self._numbers)
                self._tell("keep", number, item)
                self._sent[id(item)] = (number, item)
        number = next(self._numbers)
        self._tell("make", number, kind, tuple(arguments), settings)
        with self._alone():
            made = kind(*arguments, **settings)
        self._made[made] = number
        weakref.finalize(made, self._gone.append, number)
        return made

    @contextlib.contextmanager
    def mirrored(self, target: Any, name: str, arguments: Sequence[Any], settings: Any) -> Iterator[None]:
        number = self._sent[id(target)][0] if id(target) in self._sent else self._made.get(target)
        if self._inside or number is None:  # what the others have never seen is ours alone
            yield
            return
        self._tell("call", number, name, tuple(arguments), dict(settings))
        with self._alone():
            yield

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What is called meanwhile is called by the followers, too."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def dismiss(self) -> None:
        """Lets the followers go."""
        self._tell("end", 0)


def follow(dispatcher: MPIDispatcher) -> None:
    """The other ranks' side: does as rank 0 does, until it lets them go."""
    known: dict[int, Any] = {}
    while True:
        gone, kind, number, *rest = _Unpickler(io.BytesIO(dispatcher.message(None)), known).load()
        for old in gone:
            known.pop(old, None)
        if kind == "end":
            return
        with contextlib.suppress(BridgeError):  # rank 0 has it as well, and decides
            if kind == "keep":
                (known[number],) = rest
            elif kind == "make":
                make, arguments, settings = rest
                known[number] = make(*arguments, **settings)
            else:
                name, arguments, settings = rest
                getattr(known[number], name)(*arguments, **settings)
        del rest
