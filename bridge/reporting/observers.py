"""Who listens to a fit while it runs: for people a live view or plain lines, for programs JSON lines or TensorBoard.

An observer is told three things: `start`, each `step`, `end`. It looks and never steers: one that fails is dropped
with a warning, and the fit goes on. Observers live on rank 0 alone. A resumed fit tells its history again, step by
step from 0, so that an observer needs no memory of an earlier process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol, final, runtime_checkable

from bridge.checks import did_you_mean
from bridge.errors import InputError
from bridge.registry import Registry
from bridge.reporting.lines import Lines, is_terminal
from bridge.reporting.live import LiveView
from bridge.reporting.result import FitResult, FitStep
from bridge.simulator.space import ParameterSpace

_log = logging.getLogger("bridge")

CHOICES = ("auto", "lines", "off")


@runtime_checkable
class Observer(Protocol):
    """Who is told of a fit.

    `start` comes first; `max_steps` and `max_runs` are None where there is no such limit. `end` comes last, with None
    where the fit ended by an exception. One with a name is derived from this class, takes no arguments that it must
    have, and is made known by `bridge.register("name")`. `bridge.testing.ObserverContract` tests it.
    """

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None: ...

    def step(self, record: FitStep) -> None: ...

    def end(self, result: FitResult | None) -> None: ...


# What has a name of its own, besides the choices.
OBSERVERS: Registry[Observer] = Registry("observer", "bridge.observers", Observer, reserved=CHOICES)
# A function of each step, or an observer, or the name of one.
Watcher = Observer | Callable[[FitStep], Any] | str
Watch = Watcher | Sequence[Watcher]


def watchers(watch: Watch) -> tuple[list[Observer], list[Callable[[FitStep], Any]]]:
    """Those who watch a fit: observers, who live on rank 0 alone, and functions of each step, called on every rank.

    Args:
        watch: "auto", a live view where stderr is a terminal, silent elsewhere; "lines", a plain line now and then
            wherever stderr goes; "off"; the name of a registered observer, with its first argument after a colon
            ("jsonl:steps.jsonl", "tensorboard:runs"); an observer; a function; or several.

    Raises:
        InputError: another word, or something that is none of these.
    """
    observers: list[Observer] = []
    functions: list[Callable[[FitStep], Any]] = []
    several = isinstance(watch, Iterable) and not isinstance(watch, str | Observer)
    for one in watch if several else [watch]:  # type: ignore[union-attr]
        if isinstance(one, str):
            observers += view(one)
        elif isinstance(one, type):
            raise InputError(f"Expected an observer, got its class. Make one: watch={one.__name__}(...).")
        elif isinstance(one, Observer):
            observers.append(one)
        elif callable(one):
            functions.append(one)
        else:
            raise InputError(
                f"Expected watch: {', '.join(CHOICES)}, an observer with start, step and end, a function of a FitStep, "
                f"or a list of these, got {one!r}. bridge.LiveView, bridge.JSONLines and bridge.TensorBoard are some."
            )
    return observers, functions


def make_observers(watch: Watch = "auto", *, root: bool = True) -> Observers:
    """The observers of a loop of one's own, as one.

    Args:
        watch: as in `watchers`, without functions. root: whether this is rank 0; other ranks get none. The choice is
            checked on all of them alike.

    Raises:
        InputError: another word, or something that is no observer.
    """
    observers, functions = watchers(watch)
    if functions:
        raise InputError(f"Expected observers with start, step and end, got the function {functions[0]!r}.")
    return Observers(observers if root else ())


def view(choice: str) -> tuple[Observer, ...]:
    """What "auto", "lines", "off" or the name of a registered observer stands for here.

    Args:
        choice: a name may have the observer's first argument after a colon: "jsonl:steps.jsonl".

    Raises:
        InputError: another word, or an observer that needs an argument and has none.
    """
    if choice == "lines":
        return (Lines(),)
    if choice in CHOICES:
        return (LiveView(),) if choice == "auto" and is_terminal(sys.stderr) else ()
    named = OBSERVERS.names()
    name, colon, argument = choice.partition(":")
    if name not in named:
        known = [*CHOICES, *named]
        raise InputError(
            f"Unknown watch={choice!r}. Known: {', '.join(known)}, or observers.{did_you_mean(choice, known)}"
        )
    kind = OBSERVERS.find(name)
    try:
        return (kind(argument) if colon else kind(),)
    except TypeError as error:
        raise InputError(
            f"Expected what the observer {name!r} needs, such as {name}:FILE, got {choice!r}: {error}."
        ) from error


@final
class Observers:
    """Several observers as one, kept from doing harm; use it as a context, whose end tells them that the fit is over.

    What an observer raises in `start` (a file that cannot be written) is raised, as nothing has been paid for yet. One
    that fails later is dropped with a warning.
    """

    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = list(observers)
        self._begun = False

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        started: list[Observer] = []
        self._begun = True
        try:
            for observer in self._observers:
                observer.start(space, max_steps=max_steps, max_runs=max_runs, title=title)
                started.append(observer)
        except BaseException:
            self._observers = started
            self.end(None)
            raise

    def step(self, record: FitStep) -> None:
        for observer in list(self._observers):
            try:
                observer.step(record)
            except Exception:
                self._observers.remove(observer)
                _log.warning("%s failed and is left out; the fit goes on.", type(observer).__name__, exc_info=True)

    def end(self, result: FitResult | None) -> None:
        """The second call and later ones do nothing."""
        observers, self._observers = self._observers, []
        for observer in observers if self._begun else ():  # they were never told of a fit
            try:
                observer.end(result)
            except Exception:
                _log.warning("%s failed at its end.", type(observer).__name__, exc_info=True)

    def __enter__(self) -> Observers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.end(None)
