"""What a method of fitting is, to the fit that drives it; and the registry of methods.

A method is a frozen dataclass of its own settings. Given a task it makes a `MethodRun`, whose state is plain data. To
add one: a file with such a class, registered by a name (`register`) and, in a package, announced by it (entry points
`bridge.methods`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.checks import is_number, is_whole
from bridge.errors import InputError
from bridge.fitting.methods.requests import Request
from bridge.fitting.problem import FitProblem
from bridge.fitting.registry import Registry
from bridge.fitting.uncertainty import Stated
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
        max_runs: the budget, with what is run at the end; None for the method's own.
        comm: as in `bridge.smooth`. smoothing: other arguments of `bridge.smooth`, by name.
    """

    problem: FitProblem
    seed: int | None
    max_runs: int | None
    comm: Any
    smoothing: Mapping[str, Any]

    def __post_init__(self) -> None:
        require("max_runs of at least 2", self.max_runs is None or is_whole(self.max_runs, 2), self.max_runs)


class Method(ABC):
    """How a fit goes from its start to its end: a frozen dataclass of settings, each with a default.

    Attributes:
        name: by which it is registered.
        needs_least_squares: whether it has no use for a loss of one's own.
        takes_earlier_runs: whether it can begin with evaluations of earlier fits (it makes a `ModelRun`).
        keeps_runs: whether its runs are few, and each of use to other fits.
        chooses: whether it is none itself, but chooses one of the others.
        scale: of the noise or of the first round, natural units; a setting of those that have one. Left out, the
            default, and natural scales of which nothing is said are guessed.
    """

    name: ClassVar[str]
    needs_least_squares: ClassVar[bool] = False
    takes_earlier_runs: ClassVar[bool] = False
    keeps_runs: ClassVar[bool] = False
    chooses: ClassVar[bool] = False
    scale: float | tuple[float, float] | None = None

    def __init_subclass__(cls) -> None:
        cls.name = cls.__name__  # until it is registered

    @classmethod
    def with_settings(cls, given: Mapping[str, Any]) -> Self:
        """The method with these settings, by name.

        Raises:
            InputError: a setting that it does not have: one that were silently ignored would mislead.
        """
        own = setting_names(cls)
        for name in given:
            if name not in own:
                others = [other for other, kind in METHODS.all().items() if name in setting_names(kind)]
                raise InputError(f"Expected {name} with method {' or '.join(others)} alone, got method={cls.name!r}.")
        return cls(**given)

    def chosen(self, task: FitTask) -> tuple[Method, str]:
        """The method that does it, and why: itself, unless it chooses among others."""
        return self, "as asked"

    @abstractmethod
    def start(self, task: FitTask) -> MethodRun:
        """What carries it out; nothing is run yet.

        Raises:
            InputError: the task has something that the method has no use for, or cannot keep.
        """


METHODS: Registry[Method] = Registry("method", "bridge.methods")


def register(name: str) -> Any:
    """Decorator: makes a method known as `bridge.fit(..., method=name)`."""

    def decorate(kind: type[Method]) -> type[Method]:
        METHODS.register(name)(kind)
        kind.name = name
        return kind

    return decorate


def setting_names(kind: type[Method]) -> list[str]:
    """The settings of a method, which is a dataclass."""
    return [f.name for f in fields(kind)]  # type: ignore[arg-type]


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
    return method.start(task)


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


def require_counts(steps: Any, num_samples: Any, tolerance: Any) -> None:
    """The same of settings that several methods have; None is left to the method."""
    require("at least one step", steps is None or is_whole(steps, 1), steps)
    require("at least one run a step", num_samples is None or is_whole(num_samples, 1), num_samples)
    require("a tolerance of 0 or more", is_number(tolerance) and tolerance >= 0, tolerance)


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
    if len(pair) != 2 or not all(is_number(x) and x > 0 for x in pair):
        raise InputError(f"Expected positive scales, a number or (first, last), got {scale!r}.")
    first, last = pair
    return float(first), float(last)


def error_targets(problem: FitProblem, stop_at_error: float | Mapping[str, float] | None) -> Array | None:
    """(d,) standard errors that suffice, natural units; None where none are given.

    Raises:
        InputError: an unknown name, or an error that is not positive.
    """
    given, free = stop_at_error, problem.free
    if given is None:
        return None
    if isinstance(given, Mapping):
        targets = np.full(free.dimension, np.inf)
        for name, error in given.items():
            targets[free.index(name)] = error / problem.natural[free.index(name)]
    else:
        # In the natural scales that were said: none that are guessed are known to who asks.
        targets = float(given) * problem.said / problem.natural
    if not (targets > 0).all() or not np.isfinite(targets).any():
        raise InputError(f"Expected positive standard errors in stop_at_error, got {given!r}.")
    return targets
