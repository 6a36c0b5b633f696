"""From the name of a method and its settings to what carries it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, final

import numpy as np
import torch

from bridge.arrays import Array
from bridge.checks import did_you_mean, is_number, is_whole
from bridge.errors import InputError
from bridge.fitting.blur import make_blur_schedule
from bridge.fitting.methods.base import MethodResult
from bridge.fitting.methods.descent import Descent, end_runs, repeated
from bridge.fitting.methods.first_order import Adam, FirstOrder, TorchMover, describe, make_optimiser
from bridge.fitting.methods.gauss_newton import LONGEST, GaussNewton
from bridge.fitting.methods.kriging import Searching
from bridge.fitting.methods.kriging_search import KrigingSearch
from bridge.fitting.methods.natural import LossAndSquare, Natural
from bridge.fitting.methods.plain_runs import plain_simulator
from bridge.fitting.methods.quadratic_search import QuadraticSearch
from bridge.fitting.methods.steps import Schedule, SmoothedProblem
from bridge.fitting.methods.trust_region import TrustRegion
from bridge.fitting.problem import FitProblem
from bridge.fitting.soundness import HUGE
from bridge.fitting.target import LinearMap
from bridge.reporting.result import FitStep
from bridge.simulator.function import as_simulator
from bridge.simulator.protocol import Simulator, Structured
from bridge.smoothing.smooth import smooth
from bridge.smoothing.smoothed import SmoothedSimulator

MethodName = Literal["auto", "kriging", "trust-region", "gauss-newton", "adam", "torch", "natural"]
METHODS = ("auto", "kriging", "trust-region", "gauss-newton", "adam", "torch", "natural")
# More parameters than this, or a block structure, and a model of all runs takes too long to think.
_MOST_PARAMETERS = 200
# More than this, and a quadratic model of a number has too little to go by.
_MOST_OF_QUADRATIC = 100
_RUNS_A_PARAMETER, _RUNS_OF_QUADRATIC = 60, 100
# More parameters than this, and the full L of a natural gradient has more numbers than there are runs to learn from.
_MOST_OF_FULL = 20
_STEPS = {"gauss-newton": 24, "adam": 150, "torch": 150, "natural": 150}
_RATES = {"adam": 0.25, "torch": 0.25, "natural": 1.0}


class Way(Protocol):
    """What `bridge.fit` asks of a method. Its state is plain data, and all that the next step depends on."""

    @property
    def x(self) -> Array:
        """(d,) natural units: the best so far."""

    @property
    def done(self) -> str:
        """Why there is nothing more to do, or nothing."""

    @property
    def next_runs(self) -> int:
        """Runs that the next step and the end may take."""

    def advance(self, step: int, num_evaluations: int) -> FitStep:
        """One step: evaluates, moves x. Collective."""

    def finish(self, step: int) -> MethodResult:
        """Collective."""

    def to_dict(self) -> dict[str, Any]: ...

    def restore(self, saved: Mapping[str, Any]) -> None: ...


@final
@dataclass(frozen=True)
class MethodSettings:
    """The arguments of `bridge.fit` that belong to a method; see there."""

    method: str
    steps: int | None
    num_samples: int | None
    scale: float | tuple[float, float] | None
    learning_rate: float | None
    optimiser: str | Callable[..., torch.optim.Optimizer] | None
    full_scale: bool | None
    coarse: Sequence[float | LinearMap] | None
    halving: bool
    stop_at_error: float | Mapping[str, float] | None
    restarts: int | None
    tolerance: float | None
    max_runs: int | None

    def widths(self) -> tuple[float, float]:
        """First and last scale."""
        default = (1.0, 1.0) if self.method in ("kriging", "trust-region") else (2.0, 0.1)
        given = default if self.scale is None else self.scale
        if isinstance(given, Mapping):
            raise InputError(
                f"Expected a scale of a fit in natural units, a number or (first, last), got {given!r}. Sizes of "
                f"single parameters belong to the simulator: bridge.as_simulator(f, natural_scale={dict(given)!r})."
            )
        pair: Any = (given, given) if is_number(given) else given
        if len(pair) != 2 or not all(is_number(x) and x > 0 for x in pair):
            raise InputError(f"Expected positive scales, a number or (first, last), got {self.scale!r}.")
        first, last = pair
        return float(first), float(last)


@final
@dataclass(frozen=True)
class Chosen:
    """A method ready to go.

    Attributes:
        smoothed: what it evaluates, the first for its dispatcher. limit: of steps. budget: of runs.
        described: settings that the result depends on, for `bridge.Run`.
    """

    way: Way
    smoothed: list[SmoothedSimulator]
    limit: int | None
    budget: int
    described: dict[str, Any]


def choose(
    method: str, simulator: Simulator, dimension: int, *, loss: bool, optimiser: bool, coarse: bool, smooths: bool
) -> tuple[str, str]:
    """The method that "auto" stands for, and why.

    smooths: whether settings are given that only smoothing has a use for.
    """
    if method not in METHODS:
        raise InputError(f"Unknown method {method!r}. Known: {', '.join(METHODS)}.{did_you_mean(str(method), METHODS)}")
    if method != "auto":
        return method, "as asked"
    if optimiser:
        return "torch", "an optimiser is given"
    if loss and (smooths or coarse or dimension > _MOST_OF_QUADRATIC):
        return "adam", "a loss of one's own: its smoothed gradient is followed"
    if loss:
        return "trust-region", "a loss of one's own: a quadratic model in a trust region takes the fewest runs"
    if isinstance(simulator, Structured) and simulator.structure is not None:
        return "gauss-newton", "the simulator says which outputs depend on which parameters"
    if coarse:
        return "gauss-newton", "outputs are compared from coarse to fine"
    if dimension > _MOST_PARAMETERS:
        return "gauss-newton", f"{dimension} parameters: more than the {_MOST_PARAMETERS} that suit a model of all runs"
    return (
        "kriging",
        f"least squares, {dimension} parameter{'s' * (dimension > 1)}: a model of all runs takes the fewest",
    )


def make_method(
    problem: FitProblem, settings: MethodSettings, seed: int | None, comm: Any, smoothing: Mapping[str, Any]
) -> Chosen:
    """Makes what carries out a method.

    Raises:
        InputError: a setting that the method has no use for, or cannot keep.
    """
    _check(problem, settings, smoothing)
    if settings.method == "kriging":
        return _kriging(problem, settings, seed, comm, smoothing)
    if settings.method == "trust-region":
        return _trust_region(problem, settings, seed, comm, smoothing)
    return _descent(problem, settings, seed, comm, smoothing)


def _kriging(
    problem: FitProblem, s: MethodSettings, seed: int | None, comm: Any, smoothing: Mapping[str, Any]
) -> Chosen:
    plain = plain_simulator(problem.simulator, seed, comm, smoothing, s.method)
    d, starts, misfit = problem.free.dimension, problem.free_starts, problem.misfit
    budget, batch = s.max_runs or _RUNS_A_PARAMETER * (d + 1), max(6, d // 2 + 1)
    search = KrigingSearch(
        *(starts[0], problem.lower, problem.upper),
        spread=s.widths()[0],
        seed=int(seed or 0),
        batch=s.num_samples or batch,
        later=s.num_samples or 3 * batch // 2,
        prior=misfit.prior,
        known_noise=problem.known_noise,
        tolerance=0.1 if s.tolerance is None else s.tolerance,
        restarts=10 if s.restarts is None else s.restarts,
        robust=misfit.robust,
        ordinary=misfit.ordinary_cost(),
        guessed=problem.guessed,
        unknown=problem.unknown,
    )
    way = Searching(
        plain,
        misfit,
        search,
        problem.natural,
        budget,
        problem.known_noise,
        starts,
        problem.free.names,
        error_targets(problem, s),
    )
    return Chosen(way, [plain], s.steps, budget, {"scale": list(s.widths())})


def _trust_region(
    problem: FitProblem, s: MethodSettings, seed: int | None, comm: Any, smoothing: Mapping[str, Any]
) -> Chosen:
    plain = plain_simulator(problem.simulator, seed, comm, smoothing, s.method)
    d, starts = problem.free.dimension, problem.free_starts
    budget = s.max_runs or _RUNS_OF_QUADRATIC * (d + 1)
    search = QuadraticSearch(
        *(starts[0], problem.lower, problem.upper),
        spread=s.widths()[0],
        seed=int(seed or 0),
        batch=s.num_samples or max(2, d // 4),
        tolerance=1e-6 if s.tolerance is None else s.tolerance,
    )
    way = TrustRegion(plain, problem.misfit, search, problem.natural, budget, starts, problem.free.names)
    return Chosen(way, [plain], s.steps, budget, {"scale": list(s.widths())})


def _descent(
    problem: FitProblem, s: MethodSettings, seed: int | None, comm: Any, smoothing: Mapping[str, Any]
) -> Chosen:
    steps, samples = s.steps or _STEPS[s.method], s.num_samples or 32
    first, last = s.widths()
    misfit, natural, starts = problem.misfit, problem.natural, problem.free_starts
    smoothed = smooth(problem.simulator, seed=seed, num_samples=samples, scale=first * natural, comm=comm, **smoothing)
    smoothed.strategy = replace(smoothed.strategy, largest=HUGE)
    budget = s.max_runs or 10**15
    rows = len(starts) * smoothed.strategy.num_rows * smoothed.strategy.replicates
    least = 2 * rows + end_runs(smoothed, misfit, len(starts))
    least += 0 if misfit.loss is not None else repeated(smoothed)
    if budget < least:
        raise InputError(
            f"Expected max_runs of at least {least}, for a step and what is run at the end, got {s.max_runs}."
        )
    compared = misfit.target if misfit.whiten is None else misfit.whiten(misfit.target)
    keeps = "noise" if misfit.loss is None else "mean"
    schedule = Schedule(first, last, steps, make_blur_schedule(s.coarse, tuple(compared.shape), keeps))
    targets = error_targets(problem, s)
    known = None if targets is None else problem.known_noise
    rate = _RATES.get(s.method, 0.0) if s.learning_rate is None else s.learning_rate
    described: dict[str, Any] = {"scale": [first, last], "learning_rate": rate}
    smoothed_problem, used = SmoothedProblem(smoothed, misfit, natural, schedule, known), [smoothed]
    if s.method == "gauss-newton":
        rule: Any = GaussNewton(smoothed_problem, len(starts))
    elif s.method == "adam":
        rule = FirstOrder(smoothed_problem, Adam(starts.shape, rate))
    elif s.method == "torch":
        assert s.optimiser is not None
        make = make_optimiser(s.optimiser, rate * first, starts.shape[1])
        rule = FirstOrder(smoothed_problem, TorchMover(make, starts.shape, first))
        described["optimiser"] = describe(make)
    else:
        full = starts.shape[1] <= _MOST_OF_FULL if s.full_scale is None else s.full_scale
        carried = {**smoothing, "surrogate": _loss_of(smoothing.get("surrogate"), problem)}
        of_loss = smooth(
            LossAndSquare(problem.simulator, misfit, natural),
            seed=seed, num_samples=samples, scale=first * natural, comm=comm, **carried,
        )  # fmt: skip
        of_loss.dispatcher, of_loss.spent = smoothed.dispatcher, smoothed.spent
        used.append(of_loss)
        rule = Natural(of_loss, natural, schedule, len(starts), full, rate)
        described["full_scale"] = full
    way = Descent(
        *(smoothed, misfit, starts, rule),
        natural=natural, lower=problem.lower, upper=problem.upper, schedule=schedule, halving=s.halving,
        tolerance=0.01 if s.tolerance is None else s.tolerance, known_noise=problem.known_noise, error_targets=targets,
        newton=LONGEST if s.method == "gauss-newton" else 0.0, others=used[1:],
    )  # fmt: skip
    return Chosen(way, used, steps, budget, described)


def _loss_of(surrogate: Any, problem: FitProblem) -> LossAndSquare | None:
    if surrogate is None:
        return None
    return LossAndSquare(as_simulator(surrogate), problem.misfit, problem.natural)


def error_targets(problem: FitProblem, s: MethodSettings) -> Array | None:
    """(d,) standard errors that suffice, natural units."""
    given, free = s.stop_at_error, problem.free
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


def _check(problem: FitProblem, s: MethodSettings, smoothing: Mapping[str, Any]) -> None:
    """Refuses what a method has no use for: a setting that is silently ignored misleads."""
    method, own_loss = s.method, problem.misfit.loss is not None
    limits = (
        ("at least one step", s.steps is None or is_whole(s.steps, 1), s.steps),
        ("at least one run a step", s.num_samples is None or is_whole(s.num_samples, 1), s.num_samples),
        ("max_runs of at least 2", s.max_runs is None or is_whole(s.max_runs, 2), s.max_runs),
        ("restarts of 0 or more", s.restarts is None or is_whole(s.restarts, 0), s.restarts),
        ("a tolerance of 0 or more", s.tolerance is None or (is_number(s.tolerance) and s.tolerance >= 0), s.tolerance),
        (
            "a positive learning_rate",
            s.learning_rate is None or (is_number(s.learning_rate) and s.learning_rate > 0),
            s.learning_rate,
        ),
    )
    for what, good, given in limits:
        if not good:
            raise InputError(f"Expected {what}, got {given!r}.")
    if own_loss and (problem.known_noise or problem.misfit.robust is not None):
        what = "variance=" if problem.known_noise else "robust="
        raise InputError(f"Expected no {what} with a loss of your own, which has no use for it. Leave it out.")
    if own_loss and method in ("kriging", "gauss-newton"):
        raise InputError(
            f"Expected trust-region, adam, torch or natural with a loss of your own: {method} needs least squares."
        )
    if (s.optimiser is not None) != (method == "torch"):
        raise InputError(
            f"Expected optimiser= with method='torch', and only then, got method={method!r} and {s.optimiser!r}."
        )
    if s.stop_at_error is not None and own_loss:
        raise InputError("Expected least squares with stop_at_error: a loss of your own has no standard errors.")
    unused = (
        ("learning_rate", s.learning_rate is not None, ("adam", "torch", "natural")),
        ("full_scale", s.full_scale is not None, ("natural",)),
        ("restarts", s.restarts is not None, ("kriging",)),
        ("coarse", s.coarse is not None, ("gauss-newton", "adam", "torch")),
        ("stop_at_error", s.stop_at_error is not None, ("kriging", "gauss-newton", "adam", "torch")),
    )
    for name, given, methods in unused:
        if given and method not in methods:
            raise InputError(f"Expected {name} with method {' or '.join(methods)} alone, got method={method!r}.")
    if method == "natural":
        if smoothing.get("distribution", "gaussian") != "gaussian":
            raise InputError(
                f"Expected Gaussian noise with method='natural', whose steps are natural for it, got "
                f"{smoothing['distribution']!r}."
            )
        if smoothing.get("forward", "smoothed") != "smoothed":
            raise InputError("Expected forward='smoothed' with method='natural', which needs the spread of the losses.")
