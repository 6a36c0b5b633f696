"""The door to fitting: it checks what is given, finds the method, and hands both to a driver."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, final

import torch
from numpy.typing import ArrayLike

from bridge.arrays import real_array
from bridge.checks import as_whole, can_be_called_with, is_number, refuse_unknown
from bridge.errors import InputError
from bridge.fitting.driver import FitDriver, earlier_runs, kept_run
from bridge.fitting.methods.base import METHODS, FitTask, Method, begin
from bridge.fitting.misfit import Loss
from bridge.fitting.prior import PriorOf
from bridge.fitting.problem import Start, make_problem
from bridge.fitting.reuse import Source, sources
from bridge.fitting.robust import RobustLoss
from bridge.fitting.target import LinearMap
from bridge.reporting.observers import Observer, make_observers
from bridge.reporting.result import FitResult, FitStep
from bridge.simulator.function import counts_runs
from bridge.simulator.protocol import Simulator
from bridge.smoothing.smooth import smooth

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm


def fit(
    simulator: Callable[..., Any] | Simulator,
    target: ArrayLike | torch.Tensor,
    start: Start,
    *,
    seed: int | None = None,
    method: str | Method = "auto",
    steps: int | None = None,
    num_samples: int | None = None,
    num_starts: int | None = None,
    halving: bool = True,
    scale: float | tuple[float, float] | None = None,
    full_scale: bool | None = None,
    learning_rate: float | None = None,
    optimiser: str | Callable[..., torch.optim.Optimizer] | None = None,
    variance: float | ArrayLike | None = None,
    mask: ArrayLike | torch.Tensor | None = None,
    missing: str = "raise",
    whiten: LinearMap | None = None,
    robust: str | tuple[str, float] | RobustLoss | None = None,
    coarse: Sequence[float | LinearMap] | None = None,
    loss: Loss | None = None,
    prior: PriorOf | None = None,
    fixed: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    max_runs: int | None = None,
    max_seconds: float | None = None,
    restarts: int | None = None,
    tolerance: float | None = None,
    reuse: Source | Sequence[Source] = (),
    stop_at_error: float | Mapping[str, float] | None = None,
    on_step: Callable[[FitStep], None] | None = None,
    progress: str | Sequence[Observer] = "off",
    title: str = "",
    directory: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    every_s: float = 10.0,
    comm: Intracomm | None = None,
    **smoothing: Any,
) -> FitResult:
    """Fits a simulator's parameters to a target, in few runs of the simulator.

    Least squares: 1/2 sum((f(x) - target)^2 / variance), or a loss of one's own.

    Methods:
        "kriging" models all outputs by one Gaussian process through every run so far
            (`bridge.fitting.methods.gaussian_process`), and runs, a round at a time, where the loss is or may be least
            (`bridge.fitting.methods.kriging_search`). Rounds of a few runs, least squares only, up to two hundred
            parameters. It restarts elsewhere where it ends, or is stuck, and the target is not
            explained: by chi-square where `variance` is given, else if more than a fiftieth of the first loss is left
            and residuals do not look like noise.
        "trust-region" minimises a loss of any kind by a quadratic model of the runs about the best one
            (`bridge.fitting.methods.trust_region`), in few runs; it has no standard errors.
        "gauss-newton" solves with J^T V^-1 J of the smoothed Jacobian: many parameters, block structure, many runs at
            once.
        "adam" descends the smoothed gradient, of any loss, at `learning_rate` times the current scale.
        "torch" does so by any optimiser of `torch.optim`, or one like them: `optimiser`.
        "natural" descends the smoothed loss, of any kind, by natural gradients in the mean and in the scale matrix L of
            the noise (`bridge.fitting.methods.natural`): an evolution strategy that learns which parameters go
            together.
        "auto" takes torch where an optimiser is given, trust-region with a loss of one's own (adam where settings of
            smoothing are given with it, or beyond a hundred parameters), gauss-newton with a block structure, with
            `coarse` or with more than two hundred parameters, and kriging otherwise; the result says which
            and why.

    Args:
        simulator: as in `bridge.smooth`; its parameter space gives bounds and natural units. Where it says nothing of
            natural scales, they come from the bounds, the start and the first runs (`docs/fitting.md`).
        target: of the simulator's output shape.
        start: name -> value, or (d,); or several: a list of mappings, or (k, d). Descents go on from all of them side
            by side, all runs of a step in one dispatch; kriging runs all in its first round.
        seed: of all noise; required.
        method: a name of the above, or of one that is registered (`bridge.fitting.methods.base`); or an instance with
            its settings, `Kriging(restarts=3)`, which are then not given here.
        steps: at most so many; default 150 for descents, 24 for gauss-newton, no limit for kriging.
        num_samples: runs a step, of each start. Descents: 32. Kriging: max(6, d / 2 + 1), in the first round at
            least d + 1, from the fifth on half as many more; give what can run at the same time, and it is that in all
            of them (for d + 1 up to twice that in the first).
        num_starts: so many starts: those given, and others uniform in the bounds (about the first start where there are
            none). halving: the worse half of several starts is dropped again and again, until one is left at half of
            the steps; False keeps all to the end.
        scale: natural units. Descents: of the noise, from the first to the last step, default (2, 0.1); a number keeps
            it; gauss-newton goes down sooner, where steps are short against it. natural: the first, and the least that
            is learned. Kriging: how far from the start the first round looks, default 1.
        full_scale: of natural: whether L is a full matrix or diagonal; default full up to twenty parameters.
        learning_rate: of adam, in units of the scale, default 0.25; decays by a cosine to a fifth. Of a class given as
            `optimiser` likewise, without that decay. Of natural, default 1.
        optimiser: a class of `torch.optim` or its name, or a function that makes an optimiser of a list of parameters:
            `lambda p: torch.optim.SGD(p, lr=0.1)`. They are in natural units, and the rate goes down with the scale.
        variance: of the target's noise: a number, an array of its shape, or the covariance (m, m) of its m numbers.
            Left out, 1 in the loss, and standard errors come from the mean squared residual.
        mask: True where a number of the target is no data, as in `numpy.ma`, whose masked arrays are targets as well.
            What is masked counts nowhere, nor do numbers of infinite variance, and those that `whiten` makes of masked
            ones or makes 0 of all outputs. A loss of one's own gets 0 there for both.
        missing: "raise": an output with NaN is a failed run. "ignore": NaN, and masked numbers of a `numpy.ma` output,
            are numbers that the simulator did not get to, and the others count; infinite ones stay a failure. Where
            runs are compared, kriging puts there what its other runs predict (`bridge.fitting.methods.missing`), and
            the other methods
            what is there on average: no run looks better for what it lacks. Loss, chi-square and errors of the result
            count what its output has.
        whiten: a linear map of torch tensors, of one output and of the target before they are compared; `variance` is
            then that of its result.
        robust: "huber", "cauchy" or "soft-l1", or (name, width in standard deviations), in place of squares of
            residuals; needs `variance`.
        coarse: from coarse to fine, widths [pixels] of Gaussian blurs of what is compared, along the last two axes, or
            linear maps; equal shares of the first four fifths of the steps, then none (gauss-newton, adam, torch).
        loss: l(output, target) -> number, in place of least squares (trust-region, adam, torch, natural).
        prior: name -> (mean, standard deviation), Gaussian; several names in a tuple -> (means, covariance) of these
            together, and (means, covariance) of all. It counts against `variance`. A loss of one's own is taken for a
            negative log likelihood.
        fixed: names of parameters that keep their start. tied: name -> another that it is to equal.
        max_runs: the budget, with what is run at the end; default 60 (d + 1) for kriging, 100 (d + 1) for trust-region.
        max_seconds: stops after the step in which so much time has passed since this call. The result then depends on
            the machine.
        restarts: at most so many (kriging), default 10.
        tolerance: descents: converged when, at the last scale, parameters move by less than this (natural units) over a
            tenth of the steps, default 0.01. Kriging: when two rounds in turn promise less than this many
            standard errors, default 0.1; without `variance` it goes on until steps are below 1e-4 natural scales, or,
            in simulators without noise, until ten digits of the target agree or eight rounds and 6 (d + 1) runs have
            gained less than 3e-4 of the loss. Trust-region: the radius, in natural scales, at which it ends, 1e-6.
        reuse: earlier evaluations of the same simulator to begin with (kriging): directories of earlier fits by
            kriging, or `bridge.Store`s (which earlier fits by any method were given as `store=`) or their directories.
            They become part of this run, which does not need them again.
        stop_at_error: natural units, or name -> in its unit: stops when, twice in turn, all standard errors are at most
            these and the next step is less than a quarter of them; descents at the last scale, or where the scale is
            smaller than these.
        on_step: called with each `FitStep`, on every rank; when resumed with the earlier ones first.
        progress: what can be watched meanwhile, as in `bridge.reporting.observers.make_observers`: "auto", "lines",
            "off" or observers. title: for these.
        directory: where the run is kept, so that it can go on after any interruption, on any number of ranks, to
            bitwise the same result; see `bridge.Run`, also for `resume`, `overwrite` and `every_s`.
        comm, **smoothing: as in `bridge.smooth`. Kriging smooths nothing and takes those that say how runs are
            carried out; by default each of its runs has simulator seeds of its own, and failed ones
            (failures="drop") count as bad. Outputs that are not finite, or beyond 1e100, are bad
            runs with every method.

    Returns:
        a `FitResult`, the same on every rank. Collective under MPI. In one process an interrupt (Ctrl-C)
        ends the fit in good order.

    Raises:
        InputError: target of another shape or not finite, start outside the bounds, unknown method, a setting that the
            method has no use for, or outputs that do not change with the parameters.
        EvaluationError: a simulation failed; with failures="drop", all did.
        SystemExit: with code 75, with a directory: stopped by a signal; start it again.
    """
    begun = time.monotonic()
    refuse_unknown("bridge.fit", smoothing, fit_settings())
    smoothing = {**smoothing, "missing": missing} if missing != "raise" else smoothing
    _check_limits(directory, max_seconds, loss, stop_at_error, on_step)
    given = _given(
        steps=as_whole(steps),
        num_samples=as_whole(num_samples),
        scale=scale,
        halving=None if halving is True else halving,
        full_scale=full_scale,
        learning_rate=learning_rate,
        optimiser=optimiser,
        coarse=coarse,
        stop_at_error=stop_at_error,
        restarts=as_whole(restarts),
        tolerance=tolerance,
    )
    chooses = as_method(method, given)
    prepared = prepare(
        simulator,
        target,
        start,
        chooses,
        seed=seed,
        num_starts=as_whole(num_starts),
        variance=variance,
        whiten=whiten,
        loss=loss,
        robust=robust,
        prior=prior,
        fixed=fixed,
        tied=tied,
        mask=mask,
        missing=missing,
        max_runs=as_whole(max_runs),
        comm=comm,
        smoothing=smoothing,
    )
    problem, chosen = prepared.task.problem, prepared.method
    if max_runs is not None or directory is not None:
        counts_runs(problem.simulator)
    earlier_fits = _earlier_fits(reuse, chosen)
    # All settings are checked here: a fit that is refused leaves nothing behind.
    work = begin(chosen, prepared.task)
    earlier = earlier_runs(earlier_fits, problem, work, directory, resume)
    driver = FitDriver(
        problem,
        chosen,
        prepared.reason,
        work,
        begin=begun,
        run=kept_run(prepared.task, chosen, work, directory, earlier_fits, every_s, resume, overwrite),
        observers=make_observers(progress, root=work.smoothed[0].dispatcher.thinking.rank == 0),
        on_step=on_step,
        announced=chosen.name != chooses.name,
        max_seconds=max_seconds,
    )
    return driver.carried_out(title, earlier)


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
    num_starts: int | None,
    variance: float | ArrayLike | None,
    whiten: LinearMap | None,
    loss: Loss | None,
    robust: str | tuple[str, float] | RobustLoss | None,
    prior: PriorOf | None,
    fixed: Sequence[str],
    tied: Mapping[str, str] | None,
    mask: ArrayLike | torch.Tensor | None,
    missing: str,
    max_runs: int | None,
    comm: Any,
    smoothing: Mapping[str, Any],
) -> Prepared:
    """The problem and its method, of `fit` and of `FitSession`. Nothing is run yet.

    Raises:
        InputError: something is unknown, of the wrong shape, or contradicts something else.
    """
    target = _as_numbers(target)
    _check_kinds(target, start, variance, fixed, tied, loss)
    problem = make_problem(
        simulator,
        target,
        start,
        seed=seed,
        num_starts=num_starts,
        spread=_spread(chooses.scale),
        variance=variance,
        whiten=whiten,
        loss=loss,
        robust=robust,
        prior=prior,
        fixed=fixed,
        tied=tied,
        guess=chooses.scale is None,
        mask=mask,
        missing=missing,
    )
    task = FitTask(problem, seed, max_runs, comm, smoothing)
    method, reason = chooses.chosen(task)
    return Prepared(task, method, reason)


def _given(**settings: Any) -> dict[str, Any]:
    """Those settings of a method that are given."""
    return {name: value for name, value in settings.items() if value is not None}


def as_method(method: str | Method, given: Mapping[str, Any]) -> Method:
    """The method of a name with its settings, or the one that is given."""
    if not isinstance(method, Method):
        return METHODS.find(method).with_settings(given)
    if given:
        raise InputError(
            f"Expected the settings of the method on it, got {', '.join(f'{name}=' for name in given)} beside "
            f"{method!r}. Give them to {type(method).__name__}(...)."
        )
    return method


def _earlier_fits(reuse: Source | Sequence[Source], method: Method) -> list[Source]:
    """What `reuse=` names; refused where the method has no use for it."""
    earlier_fits = sources(reuse)
    if earlier_fits and not method.takes_earlier_runs:
        those = " or ".join(repr(name) for name, kind in METHODS.all().items() if kind.takes_earlier_runs)
        raise InputError(
            f"Expected method={those} with reuse, got {method.name!r}, for which earlier runs count for next to "
            "nothing: it goes by those about where it is. To find the very same runs again, pass store=."
        )
    return earlier_fits


def _as_numbers(target: ArrayLike | torch.Tensor) -> ArrayLike:
    """A tensor as an array, real ones in double precision; anything else as it is."""
    if not isinstance(target, torch.Tensor):
        return target
    return target.detach().cpu().numpy() if target.is_complex() else target.detach().cpu().double().numpy()


def fit_settings() -> list[str]:
    """The keywords that `fit` takes: its own, and those of `bridge.smooth`."""
    own = [name for name in signature(fit).parameters if name != "smoothing"]
    return list(dict.fromkeys([*own, *list(signature(smooth).parameters)[1:]]))


def _check_kinds(target: Any, start: Any, variance: Any, fixed: Any, tied: Any, loss: Any) -> None:
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
    if loss is not None and not callable(loss):
        raise InputError(
            f"Expected loss as a function of output and target, got {loss!r}. Least squares need none: leave it out."
        )
    if loss is not None and not can_be_called_with(loss, 2):
        raise InputError(
            "Expected loss as a function of two arguments, loss(output, target), got one of other arguments."
        )


def _check_limits(directory: Any, max_seconds: Any, loss: Any, stop_at_error: Any, on_step: Any) -> None:
    if on_step is not None and not callable(on_step):
        raise InputError(f"Expected on_step as a function of a FitStep, got {on_step!r}.")
    if directory is not None and not isinstance(directory, str | os.PathLike):
        raise InputError(f"Expected directory as a path, got {directory!r}.")
    if max_seconds is not None and not (is_number(max_seconds) and max_seconds > 0):
        raise InputError(f"Expected a positive max_seconds, got {max_seconds!r}.")
    if stop_at_error is not None and loss is not None:
        raise InputError("Expected least squares with stop_at_error: a loss of your own has no standard errors.")


def _spread(scale: float | tuple[float, float] | None) -> float:
    """Of starts that are drawn about a given one, natural units."""
    first: Any = scale[0] if isinstance(scale, Sequence) else scale
    return float(first) if is_number(first) else 1.0  # what is no scale is refused where the method is made
