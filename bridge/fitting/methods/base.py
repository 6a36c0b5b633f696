"""What a method of fitting is, to the fit that drives it; and the registry of methods.

A method is a frozen dataclass of its own settings. Given a task it makes a `MethodRun`, whose state is plain data. To
add one: a file with such a class, registered by a name (`register`) and, in a package, announced by it (entry points
`bridge.methods`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.checks import Settings, is_number, is_whole
from bridge.errors import InputError
from bridge.evaluation.failures import Failures, Raise
from bridge.evaluation.memory import Memory
from bridge.evaluation.places import Place, Ranks
from bridge.fitting.methods.requests import Request
from bridge.fitting.problem import FitProblem
from bridge.fitting.reuse import Source
from bridge.fitting.stop import Stop
from bridge.fitting.uncertainty import Stated
from bridge.registry import Registry
from bridge.reporting.result import FitEnd
from bridge.smoothing.smoothed import SmoothedSimulator

# Steps of less than this part of the errors asked for are small against them.
SMALL_STEP = 0.25
# Of runs: no limit.
UNLIMITED = 10**15


@final
@dataclass(frozen=True)
class FitTask:
    """What a method is to do.

    Attributes:
        problem: the parameters, from which starts, to which target. seed: of all noise.
        stop: when it ends whatever the method would go on to do.
        failures, place, memory: what becomes of runs that fail, where they are evaluated, and what is kept of them.
    """

    problem: FitProblem
    seed: int | None
    stop: Stop = field(default_factory=Stop)
    failures: Failures = field(default_factory=Raise)
    place: Place = field(default_factory=Ranks)
    memory: Memory = field(default_factory=Memory)


class Method(metaclass=Settings):
    """How a fit goes from its start to its end: a frozen dataclass of settings, each with a default.

    Attributes:
        name: by which it is registered.
        needs_least_squares: whether it has no use for a loss of one's own.
        keeps_runs: whether its runs are few, and each of use to other fits.
        chooses: whether it is none itself, but chooses one of the others.
        states_errors: whether it has standard errors to stop at.
        scale: of the noise or of the first round, natural units; a setting of those that have one. Left out, the
            default, and natural scales of which nothing is said are guessed.
        reuse: evaluations of earlier fits to begin with; a setting of those that can.
    """

    name: ClassVar[str]
    needs_least_squares: ClassVar[bool] = False
    states_errors: ClassVar[bool] = False
    keeps_runs: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    scale: float | tuple[float, float] | None = None
    reuse: Source | Sequence[Source] = ()

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__  # until it is registered

    def chosen(self, task: FitTask) -> tuple[Method, str]:
        """The method that does it, and why: itself, unless it chooses among others."""
        return self, "as asked"

    @abstractmethod
    def start(self, task: FitTask) -> MethodRun:
        """What carries it out; nothing is run yet.

        Raises:
            InputError: the task has something that the method has no use for, or cannot keep.
        """


METHODS: Registry[Method] = Registry("method", "bridge.methods", Method)
register = METHODS.register


def begin(method: Method, task: FitTask) -> MethodRun:
    """What carries a method out.

    Raises:
        InputError: the task has something that the method has no use for, or cannot keep.
    """
    if task.problem.misfit.loss is not None and method.needs_least_squares:
        *others, last = [
            name for name, kind in METHODS.all().items() if not kind.needs_least_squares and name != "auto"
        ]
        raise InputError(
            f"Expected {', '.join(others)} or {last} with a loss of your own: {method.name} needs least squares."
        )
    if task.stop.error is not None and task.problem.misfit.loss is not None:
        raise InputError("Expected least squares with Stop(error=): a loss of your own has no standard errors.")
    if task.stop.error is not None and not method.states_errors:
        those = [name for name, kind in METHODS.all().items() if kind.states_errors and name != "auto"]
        raise InputError(
            f"Expected {' or '.join(those)} with Stop(error=), got {method.name}, which states no standard errors."
        )
    work = method.start(task)
    if not isinstance(work, MethodRun):
        raise InputError(f"Expected start of method {method.name!r} to return a bridge.MethodRun, got {work!r}.")
    return work


@final
@dataclass(frozen=True, eq=False)
class StepReport:
    """What a method says of a step that is done, of the free parameters in natural units.

    Attributes:
        loss: at x. scale: of the noise, or of the points that were looked at.
        x: (d,) the best, or where the step began.
        standard_error: (d,) as far as the method knows it. num_failed: of all runs so far. note: in words.
    """

    loss: float
    scale: float
    x: Array
    standard_error: Array | None = None
    num_failed: int = 0
    note: str = ""


class MethodRun(ABC):
    """A method at work: it asks for evaluations and is told what came of them, and evaluates nothing itself.

    Its state is plain data, `to_dict()`, and all that the next step depends on. One rank thinks for all: sums of its
    linear algebra need not have the same last bits elsewhere. It asks and is told, and hands the others the request and
    then the state (`fitting/driver.py`), so that `ask`, `tell` and `finish` may change nothing else.

    Attributes:
        smoothed: what it has evaluated, the first for its dispatcher.
        limit: of steps, None for no limit. budget: of runs, with those at the end.
        described: settings that the result depends on, for `bridge.Run`, besides those of the method.
        thinks_everywhere: whether every rank is told, since it asks for estimates, whose methods are collective; the
            first rank's state counts all the same.
    """

    smoothed: list[SmoothedSimulator]
    limit: int | None
    budget: int
    described: dict[str, Any]
    thinks_everywhere: ClassVar[bool] = False

    @property
    @abstractmethod
    def x(self) -> Array:
        """(d,) natural units: the best so far."""

    @property
    @abstractmethod
    def done(self) -> str:
        """Why there is nothing more to do, or nothing."""

    @property
    @abstractmethod
    def next_runs(self) -> int:
        """Runs that the next step and the end may take."""

    @property
    def ends_without_runs(self) -> bool:
        """Whether all that `finish` needs has been run."""
        return False

    @abstractmethod
    def ask(self, step: int, spent: int) -> Request:
        """What is to be evaluated next, in the step of this number, after so many runs."""

    @abstractmethod
    def tell(self, step: int, answer: Any) -> StepReport | None:
        """Takes what came of the request (`requests.Answer`); None where the step goes on with another one."""

    @abstractmethod
    def finish(self, step: int) -> Generator[Request, Any, MethodResult]:
        """Yields requests for what is lacking, each of which gives the answer, and returns what has been found."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The state, as plain data."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes a state in place of its own."""

    def for_others(self) -> dict[str, Any]:
        """The state that other ranks are handed: without what they can make of the answer themselves."""
        return self.to_dict()

    def follow(self, handed: Mapping[str, Any], answer: Any) -> None:
        """Takes the state of the rank that thinks, which has been told the answer."""
        self.restore(handed)


class ModelRun(MethodRun):
    """A method with a model of all runs, which can begin with those of earlier fits.

    Attributes:
        most_rows: of so many runs at most the model is made.
    """

    most_rows: int

    @abstractmethod
    def loss_of_rows(self, outputs: Array) -> Array:
        """(n,) losses of single runs, without the prior, of outputs (n, m)."""

    @abstractmethod
    def begin_with(self, parameters: Array, outputs: Array) -> None:
        """Takes earlier runs at (n, d) parameters, with outputs (n, m), into the model."""


@final
@dataclass(frozen=True)
class MethodResult:
    """What a method says at its end, of the free parameters in natural units.

    Attributes:
        x, start: (d,) the best, and where that began. stated: its errors, None with a loss of one's own.
        output, start_output: of the simulator itself at these. num_evaluations: that the end has taken.
        num_failed: of all runs. num_reused: evaluations of earlier fits that it began with.
        ends: of all starts, where there are several that go on side by side.
        at_limit: whether the last step was as long as it might be. warnings: in words.
        noise: variance of one run of the simulator, over that of the target, averaged over outputs; 0 if unknown.
        no_better: whether it is worse than the start.
    """

    x: Array
    start: Array
    loss: float
    stated: Stated | None
    output: NDArray[Any]
    start_output: NDArray[Any]
    num_evaluations: int
    num_failed: int
    num_reused: int = 0
    ends: tuple[FitEnd, ...] = ()
    at_limit: bool = False
    noise: float = 0.0
    no_better: bool = False
    warnings: tuple[str, ...] = ()


def require(what: str, good: bool, given: Any) -> None:
    """Raises InputError unless a setting is good; says what was expected."""
    if not good:
        raise InputError(f"Expected {what}, got {given!r}.")


def require_rounds(rounds: Any, round_size: Any) -> None:
    """The same of settings of methods that go by rounds of runs; None is left to the method."""
    require("at least one round", rounds is None or is_whole(rounds, 1), rounds)
    require("at least one run a round", round_size is None or is_whole(round_size, 1), round_size)


def require_tolerance(tolerance: Any) -> None:
    """The same of a setting that several methods have."""
    require("a tolerance of 0 or more", is_number(tolerance) and tolerance >= 0, tolerance)


def as_reach(scale: Any) -> float:
    """How far from the start a first round looks, natural units; 1 of None.

    Raises:
        InputError: it is no positive number: nothing shrinks from a first to a last one.
    """
    require(
        "one positive scale, that of the first round",
        scale is None or isinstance(scale, Mapping) or is_number(scale),
        scale,
    )
    return as_widths(scale, (1.0, 1.0))[0]


def as_widths(scale: Any, default: tuple[float, float]) -> tuple[float, float]:
    """First and last scale, of a number or a pair; the default of None.

    Raises:
        InputError: it is neither, or not positive.
    """
    if scale is None:
        return default
    if isinstance(scale, Mapping):
        raise InputError(
            f"Expected a scale of a fit in natural units, a number or (first, last), got {scale!r}. Sizes of "
            f"single parameters belong to the simulator: bridge.as_simulator(f, natural_scale={dict(scale)!r})."
        )
    pair: Any = (scale, scale) if is_number(scale) else scale
    if not isinstance(pair, Iterable) or len(pair := tuple(pair)) != 2 or not all(is_number(x) and x > 0 for x in pair):
        raise InputError(f"Expected positive scales, a number or (first, last), got {scale!r}.")
    first, last = pair
    return float(first), float(last)


def error_targets(task: FitTask) -> Array | None:
    """(d,) standard errors that suffice, natural units; None where none are given.

    Raises:
        InputError: an unknown name, or errors that are none.
    """
    given, free, problem = task.stop.error, task.problem.free, task.problem
    if given is None:
        return None
    if isinstance(given, Mapping):
        targets = np.full(free.dimension, np.inf)
        for name, error in given.items():
            targets[free.index(name)] = error / problem.natural[free.index(name)]
    else:
        # In the natural scales that were said: none that are guessed are known to who asks.
        targets = float(given) * problem.said / problem.natural
    if not np.isfinite(targets).any():
        raise InputError(f"Expected positive, finite standard errors in Stop(error=), got {given!r}.")
    return targets
