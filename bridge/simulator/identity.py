"""Which simulator it is: what finished evaluations are filed under.

A name is not enough, as two functions may both be called `simulate`. The identity has, besides, a digest of all that
can be seen of what does the work (`bridge.simulator.digest`). Where something cannot be seen, a text has to be given
for it.
"""

from __future__ import annotations

from typing import Any, Protocol, final, runtime_checkable

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.simulator.digest import digest_of
from bridge.simulator.digest_walk import UnseenError, given_identity
from bridge.simulator.function import FunctionSimulator
from bridge.simulator.protocol import Simulator, simulator_name

_DIGITS = 16
# Identities that calls have changed, by which they have become: a simulator that counts stays the one it was.
_became: dict[str, str] = {}


@runtime_checkable
class Forwarding(Protocol):
    """A simulator that lets another one do the work: what it evaluates are evaluations of the inner one."""

    @property
    def inner(self) -> Simulator: ...

    def forwarded(self, inputs: Array) -> Array:
        """(k, d) of this simulator -> (k, d') of the inner one."""
        ...


def innermost(simulator: Simulator, inputs: Array) -> tuple[Simulator, Array]:
    """The simulator that does the work, and its (k, d') inputs for those (k, d) of `simulator`."""
    while isinstance(simulator, Forwarding):
        inputs = simulator.forwarded(inputs)
        simulator = simulator.inner
    return simulator, inputs


def identity_of(simulator: Simulator) -> str:
    """Name and digest of the simulator that does the work, or the text that it gives itself; the same in every process.

    Raises:
        InputError: something in it cannot be seen, and it has no attribute `identity`.
    """
    return Filing(simulator).name


def identity_of_function(function: Any, argument: str) -> str:
    """The same of a function, or of another setting, that a fit is given, such as its loss.

    Raises:
        InputError: something in it cannot be seen, and it has no attribute `identity`.
    """
    name = str(getattr(function, "__name__", type(function).__name__))
    if (text := given_identity(function)) is not None:
        return text
    try:
        return f"{name}-{digest_of(function, name)[:_DIGITS]}"
    except UnseenError as error:
        raise InputError(
            f"Expected {argument}= of which all can be seen, so that the run goes on under the same one alone, got "
            f"{error}. Give it an attribute `identity`, a text, and change that whenever its results change."
        ) from error


@final
class Filing:
    """The name under which a simulator's evaluations are filed.

    What calls change in the simulator does not change the name: neither in this object, nor for one that is made of the
    same simulator later in this process. What is changed between calls does; large arrays are looked at only once.

    Raises:
        InputError: something in it cannot be seen, and it has no attribute `identity`.
    """

    def __init__(self, simulator: Simulator) -> None:
        while isinstance(simulator, Forwarding):
            simulator = simulator.inner
        self._simulator = simulator
        self._kept: dict[int, tuple[Any, str]] = {}
        self.name = self._now = ""
        seen = simulator.function if isinstance(simulator, FunctionSimulator) else simulator
        for one in (simulator, seen):
            if (text := given_identity(one)) is not None:
                self.name = text
                return
        try:
            self._now = self._taken(self._kept)
        except UnseenError as error:
            raise InputError(
                f"Expected a simulator of which all can be seen, so that its evaluations can be filed, got {error}. "
                "Give it an identity, a text that you change whenever its outputs change: bridge.as_simulator(f, "
                'identity="engine 2.1, mesh B"), or an attribute `identity`; or do without a store, '
                "reuse and run=."
            ) from error
        self.name = _became.get(self._now, self._now)

    def _taken(self, kept: dict[int, tuple[Any, str]]) -> str:
        simulator = self._simulator
        name = simulator_name(simulator)
        seen = simulator.identity_parts if isinstance(simulator, FunctionSimulator) else (simulator,)
        if len(seen) == 1:
            seen = seen[0]
        return f"{name}-{digest_of(seen, name, kept)[:_DIGITS]}"

    def before_calls(self) -> None:
        """Takes the name anew where the simulator has been changed since, by other hands than its calls'."""
        if self._now and (now := self._taken(dict(self._kept))) != self._now:
            self.name, self._now = _became.get(now, now), now

    def after_calls(self) -> None:
        """Takes note of what calls have changed."""
        if not self._now:
            return
        try:
            now = self._taken(dict(self._kept))
        except UnseenError:
            return
        if now != self._now:
            _became.pop(self._now, None)  # it will not be that again
            _became[now] = self.name
            self._now = now
