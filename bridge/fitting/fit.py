"""The door to fitting: it checks what is given, finds the method, and hands both to a driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from numpy.typing import ArrayLike

from bridge.arrays import real_array
from bridge.checks import is_number, is_whole, known_keywords
from bridge.errors import InputError
from bridge.evaluation.failures import Failures, make_failures
from bridge.evaluation.memory import Memory, make_memory
from bridge.evaluation.places import Where, make_place
from bridge.fitting.comparison import Comparison, make_comparison
from bridge.fitting.driver import FitDriver, earlier_runs, kept_run
from bridge.fitting.methods.base import METHODS, FitTask, Method, begin
from bridge.fitting.prior import PriorOf
from bridge.fitting.problem import Start, make_problem
from bridge.fitting.reuse import sources
from bridge.fitting.stop import Stop, make_stop
from bridge.reporting.observers import Observers, Watch, watchers
from bridge.reporting.result import FitResult
from bridge.simulator.function import counts_runs
from bridge.simulator.protocol import Simulator
from bridge.smoothing.smoothed import SmoothedSimulator
from bridge.storage.run import Run
from bridge.storage.store import Store


@known_keywords
def fit(
    simulator: Callable[..., Any] | Simulator,
    target: ArrayLike | torch.Tensor,
    start: Start,
    *,
    seed: int | None = None,
    method: str | Method = "auto",
    variance: float | ArrayLike | None = None,
    misfit: Comparison | Callable[..., Any] | None = None,
    prior: PriorOf | None = None,
    fixed: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    stop: Stop | int | None = None,
    run: Run | str | os.PathLike[str] | None = None,
    watch: Watch = "off",
    failures: str | Failures = "raise",
    on: Where = None,
    memory: Memory | Store | None = None,
) -> FitResult:
    """Fits a simulator's parameters to a target, in few runs of the simulator.

    Least squares: 1/2 sum((f(x) - target)^2 / variance), or a loss of one's own.

    Args:
        simulator: as in `bridge.smooth`; its parameter space gives bounds and natural units. Where it says nothing of
            natural scales, they come from the bounds, the start and the first runs (`docs/fitting.md`).
        target: of the simulator's output shape. What is masked in a `numpy.ma` array is no data.
        start: name -> value, or (d,); or several: a list of mappings, (k, d), or `bridge.Starts(number, given)`.
            Descents go on from all of them side by side, all runs of a step in one dispatch; kriging runs all in its
            first round.
        seed: of all noise; required.
        method: a name, for the method with its defaults, or the method with its settings, `bridge.Kriging(restarts=3)`:

            auto: kriging, or what suits better: trust-region with a loss of one's own, gauss-newton with a block
                structure or more than two hundred parameters. The result says which and why.
            kriging: `bridge.Kriging`, least squares by one Gaussian process through every run so far, in rounds of a
                few runs; up to two hundred parameters.
            trust-region: `bridge.TrustRegion`, a loss of any kind by a quadratic model of the runs about the best one;
                no standard errors.
            gauss-newton: `bridge.GaussNewton`, least squares by the smoothed Jacobian: many parameters, block
                structure, many runs at once.
            adam: `bridge.Adam`, the smoothed gradient, of any loss. `bridge.Torch` takes any optimiser of torch.
            natural: `bridge.Natural`, the smoothed loss, of any kind, by natural gradients in mean and scale: an
                evolution strategy.
        variance: of the target's noise: a number, an array of its shape, or the covariance (m, m) of its m numbers.
            Left out, 1 in the loss, and standard errors come from the mean squared residual.
        misfit: how outputs are compared: `bridge.LeastSquares` with a mask, a linear map, a robust loss; or a loss of
            one's own, l(output, target) -> number (`bridge.CustomLoss`).
        prior: name -> (mean, standard deviation), Gaussian; several names in a tuple -> (means, covariance) of these
            together, and (means, covariance) of all. It counts against `variance`. A loss of one's own is taken for a
            negative log likelihood.
        fixed: names of parameters that keep their start. tied: name -> another that it is to equal.
        stop: `bridge.Stop(runs, seconds, error)`, or a number of runs: the budget, with what is run at the end.
        run: a directory, or `bridge.Run(directory, ...)`: the fit is kept there, so that it can go on after any
            interruption, on any number of ranks, to bitwise the same result.
        watch: who is told meanwhile: "auto" (a live view on a terminal), "lines", "off", an observer or its name, or a
            list. A function is called with each `FitStep`, on every rank; when resumed with the earlier ones first.
        failures, on, memory: as in `bridge.smooth`. Outputs that are not finite, or beyond 1e100, are bad runs with
            every method; with "drop" so are runs that raise. `bridge.Drop(missing="ignore")` or
            `bridge.Raise(missing="ignore")`: NaN are numbers that the simulator did not get to, and the others count;
            where runs are compared, no run looks better for what it lacks.

    Returns:
        a `FitResult`, the same on every rank. Collective under MPI. In one process an interrupt (Ctrl-C)
        ends the fit in good order.

    Raises:
        InputError: target of another shape or not finite, start outside the bounds, unknown method, a setting that the
            method has no use for, or outputs that do not change with the parameters.
        EvaluationError: a simulation failed; with failures="drop", all did.
        SystemExit: with code 75, with a run: stopped by a signal; start it again.
    """
    begun = time.monotonic()
    chooses, kept = make_method(method), _as_run(run)
    prepared = prepare(
        simulator,
        target,
        start,
        chooses,
        seed=seed,
        variance=variance,
        misfit=misfit,
        prior=prior,
        fixed=fixed,
        tied=tied,
        stop=stop,
        failures=failures,
        on=on,
        memory=memory,
    )
    task, chosen = prepared.task, prepared.method
    if task.stop.runs is not None or kept is not None:
        counts_runs(task.problem.simulator)
    observers, told = watchers(watch)
    earlier_fits = sources(chosen.reuse)
    # All settings are checked here: a fit that is refused leaves nothing behind.
    work = begin(chosen, task)
    earlier = earlier_runs(earlier_fits, task.problem, work, kept)
    driver = FitDriver(
        task.problem,
        chosen,
        prepared.reason,
        work,
        begin=begun,
        run=kept_run(task, chosen, work, kept, earlier_fits),
        observers=Observers(observers if work.smoothed[0].dispatcher.leader.rank == 0 else ()),
        told=told,
        announced=chosen.name != chooses.name,
        max_seconds=task.stop.seconds,
    )
    return driver.carried_out("" if kept is None else kept.title, earlier)


@final
@dataclass(frozen=True)
class Prepared:
    """What is to be done, by which method, and why by that one, in words."""

    task: FitTask
    method: Method
    reason: str


def prepare(
    simulator: Any,
    target: ArrayLike | torch.Tensor,
    start: Start,
    chooses: Method,
    *,
    seed: int | None,
    variance: Any,
    misfit: Any,
    prior: PriorOf | None,
    fixed: Sequence[str],
    tied: Mapping[str, str] | None,
    stop: Any,
    failures: Any,
    on: Where = None,
    memory: Any = None,
) -> Prepared:
    """The problem and its method, of `fit` and of `FitSession`. Nothing is run yet.

    Raises:
        InputError: something is unknown, of the wrong shape, or contradicts something else.
    """
    if isinstance(simulator, SmoothedSimulator):
        raise InputError(
            "Expected a function or a Simulator, got a smoothed one: a fit would have its bias, and smooths by itself. "
            "Give the simulator; settings of the smoothing are those of a method: method=bridge.Adam(num_samples=...)."
        )
    if is_whole(seed, 2**64):
        raise InputError(f"Expected a seed below 2**64, got {seed}.")
    target = _as_numbers(target)
    _check_kinds(target, start, variance, fixed, tied)
    tolerated = make_failures(failures)
    problem = make_problem(
        simulator,
        target,
        start,
        make_comparison(misfit, variance),
        seed=seed,
        spread=_spread(chooses.scale),
        prior=prior,
        fixed=fixed,
        tied=tied,
        guess=chooses.scale is None,
        missing=tolerated.missing,
    )
    task = FitTask(problem, seed, make_stop(stop), tolerated, make_place(on), make_memory(memory))
    method, reason = chooses.chosen(task)
    return Prepared(task, method, reason)


def make_method(method: str | Method) -> Method:
    """The method of a name, with its defaults, or the one that is given.

    Raises:
        InputError: an unknown name, or something else.
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise InputError(f"Expected a method, got its class. Make one: method={method.__name__}().")
    return METHODS.find(method)()


def _as_run(run: Run | str | os.PathLike[str] | None) -> Run | None:
    return run if run is None or isinstance(run, Run) else Run(run)


def _as_numbers(target: ArrayLike | torch.Tensor) -> ArrayLike:
    """A tensor as an array, real ones in double precision; anything else as it is."""
    if not isinstance(target, torch.Tensor):
        return target
    return target.detach().cpu().numpy() if target.is_complex() else target.detach().cpu().double().numpy()


def _check_kinds(target: Any, start: Any, variance: Any, fixed: Any, tied: Any) -> None:
    """Refuses what is of another kind altogether, and says what is expected there."""
    for name, value in (("target", target), ("start", start), ("variance", variance)):
        if isinstance(value, str | os.PathLike):
            load = f" Load the file first: numpy.load({os.fspath(value)!r})." if name == "target" else ""
            raise InputError(f"Expected numbers as {name}, got the text {os.fspath(value)!r}.{load}")
        if name == "target":
            real_array(value, "as the target", InputError)
    if isinstance(fixed, Mapping):
        raise InputError(
            f"Expected a list of names as fixed, got {fixed!r}: they keep their start. Give {list(fixed)}."
        )
    if tied is not None and not isinstance(tied, Mapping):
        raise InputError(f"Expected tied as name -> the name that it is to equal, got {tied!r}.")


def _spread(scale: float | tuple[float, float] | None) -> float:
    """Of starts that are drawn about a given one, natural units."""
    first: Any = scale[0] if isinstance(scale, Sequence) else scale
    return float(first) if is_number(first) else 1.0  # what is no scale is refused where the method is made
