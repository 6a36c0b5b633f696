"""A fit: the parameters of a simulator from a target output.

The module is not called `fit`, because the function `bridge.fit` is: a package attribute cannot be both.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.arrays import real_array
from bridge.checks import as_whole, can_be_called_with, is_number, refuse_unknown
from bridge.errors import BridgeError, InputError
from bridge.fitting.goodness import Goodness, goodness_of, unexplained
from bridge.fitting.identifiability import identifiability_warnings
from bridge.fitting.methods.auto import Chosen, MethodName, MethodSettings, Way, choose, make_method
from bridge.fitting.methods.base import MethodResult
from bridge.fitting.methods.kriging import Searching
from bridge.fitting.methods.kriging_search import MOST_ROWS
from bridge.fitting.methods.plain_runs import DESIGN
from bridge.fitting.misfit import Loss
from bridge.fitting.normal import without
from bridge.fitting.prior import PriorOf
from bridge.fitting.problem import FitProblem, Start, make_problem
from bridge.fitting.reuse import Earlier, Source, described, earlier_rows, sources
from bridge.fitting.target import LinearMap
from bridge.interrupts import again, listening, look
from bridge.reporting.observers import Observer, Observers, make_observers
from bridge.reporting.result import FitEnd, FitResult, FitStep
from bridge.simulator.function import as_simulator, counts_runs
from bridge.simulator.identity import identity_of, identity_of_function
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.smooth import smooth
from bridge.storage.run import Run

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm

__all__ = ["FitEnd", "FitResult", "FitStep", "fit"]

_UNLIMITED = 10**15
_INTERRUPTED = "bridge: interrupted; the fit ends with the best so far. Once more to leave at once."
_LEFT_OUT = (
    "The fit was interrupted: what it would run at its end, for errors and outputs, is left out, and the loss is that "
    "of the smoothed output. With the same directory= it goes on where it was."
)

_log = logging.getLogger("bridge")


def fit(
    simulator: Callable[..., Any] | Simulator,
    target: ArrayLike | torch.Tensor,
    start: Start,
    *,
    seed: int | None = None,
    method: MethodName = "auto",
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
    robust: str | tuple[str, float] | None = None,
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
    begin = time.monotonic()
    if isinstance(target, torch.Tensor):
        target = target.detach().cpu().numpy() if target.is_complex() else target.detach().cpu().double().numpy()
    refuse_unknown("bridge.fit", smoothing, fit_settings())
    smoothing = {**smoothing, "missing": missing} if missing != "raise" else smoothing
    _check_kinds(target, start, variance, fixed, tied, loss, on_step)
    steps, num_samples, num_starts = as_whole(steps), as_whole(num_samples), as_whole(num_starts)
    max_runs, restarts = as_whole(max_runs), as_whole(restarts)
    if directory is not None and not isinstance(directory, str | os.PathLike):
        raise InputError(f"Expected directory as a path, got {directory!r}.")
    if max_seconds is not None and not (is_number(max_seconds) and max_seconds > 0):
        raise InputError(f"Expected a positive max_seconds, got {max_seconds!r}.")
    problem = make_problem(
        *(simulator, target, start),
        seed=seed, num_starts=num_starts, spread=_spread(scale), variance=variance, whiten=whiten, loss=loss,
        robust=robust, prior=prior, fixed=fixed, tied=tied, guess=scale is None,
        mask=mask, missing=missing,
    )  # fmt: skip
    if max_runs is not None or directory is not None:
        counts_runs(problem.simulator)
    method_, reason = choose(
        *(method, problem.simulator, problem.free.dimension),
        loss=loss is not None, optimiser=optimiser is not None, coarse=coarse is not None,
        smooths=_smooths(learning_rate, scale, smoothing),
    )  # fmt: skip
    if sources(reuse) and method_ != "kriging":
        raise InputError(
            f"Expected method='kriging' with reuse, got {method_!r}, for which earlier runs count for next to nothing: "
            "it goes by those about where it is. To find the very same runs again, pass store=."
        )
    settings = MethodSettings(
        method_, steps, num_samples, scale, learning_rate, optimiser, full_scale, coarse, halving, stop_at_error,
        restarts, tolerance, max_runs,
    )  # fmt: skip
    # It checks its settings: a fit that is refused leaves nothing behind.
    chosen = make_method(problem, settings, seed, comm, smoothing)
    # Before there is a run: one that is refused leaves nothing behind.
    if directory is not None or sources(reuse):
        for smoothed in chosen.smoothed:
            smoothed.execution.filing(smoothed.simulator)
            if smoothed.surrogate is not None:
                smoothed.execution.filing(smoothed.surrogate.simulator)
    described_ = {} if directory is None else _described(problem, settings, chosen, seed, smoothing)
    begun = directory is not None and resume and any(Path(directory).glob("checkpoint-*.npz"))
    earlier = _earlier(sources(reuse), problem, chosen, directory, begun)
    run: Run | None = None
    if directory is not None:
        described_["reuse"] = list(map(described, sources(reuse)))
        # Few runs, each of use to other fits: not to be thrown away.
        keep = method_ in ("kriging", "trust-region")
        run = Run(
            directory, settings=described_, every_s=every_s, resume=resume, overwrite=overwrite, comm=comm,
            keep_evaluations=keep, journal_above_s=0.0 if keep else 0.01,
        )  # fmt: skip
        for smoothed in chosen.smoothed:
            if smoothed.execution.store is None:
                smoothed.execution = replace(smoothed.execution, store=run.store)
    way, dispatcher = chosen.way, chosen.smoothed[0].dispatcher.thinking
    observers = make_observers(progress, root=dispatcher.rank == 0)
    alone = chosen.smoothed[0].dispatcher.size == 1
    with nullcontext() if run is None else run, observers, listening(_INTERRUPTED) if alone else nullcontext():
        _start(observers, problem, chosen, title)
        history, stop_reason = _restored(run, chosen)
        if earlier is not None and isinstance(way, Searching) and (run is None or run.state is None):
            way.begin_with(*earlier)
            if run is not None:  # what it begins with is its own from here on, whatever becomes of those directories
                run.checkpoint(0, _state(history, stop_reason, way), at_once=True)
        found, ran = (history[-1].num_cached, history[-1].num_surrogate) if history else (0, 0)
        cost = chosen.smoothed[0].spent
        for record in history:
            observers.step(record)
            if on_step is not None:
                on_step(record)
        end: MethodResult | None = None
        try:
            if run is not None and run.state is not None and "result" in run.state:
                result = _result_from(run.state["result"], problem.space, history)
                if dispatcher.rank == 0:
                    _log.info("the fit in %s is finished: its result is returned again, nothing is run", run.directory)
                observers.end(result)
                return result
            while not stop_reason and (chosen.limit is None or len(history) < chosen.limit):
                spent = history[-1].num_evaluations if history else 0
                record = problem.record(way.advance(len(history), spent))
                record = replace(record, num_cached=found + cost.cached, num_surrogate=ran + cost.surrogate)
                if not history:
                    chosen_so = f"{method_}: {reason}" if method == "auto" else ""
                    notes = filter(None, [record.note, chosen_so, problem.scales_in_words])
                    record = replace(record, note="; ".join(notes))
                history.append(record)
                observers.step(record)
                if on_step is not None:
                    on_step(record)
                if way.done:
                    stop_reason = way.done
                elif record.num_evaluations + way.next_runs > chosen.budget:
                    stop_reason = "max_runs"
                elif max_seconds is not None and dispatcher.first(time.monotonic() - begin > max_seconds):
                    stop_reason = "max_time"
                if run is not None:
                    run.checkpoint(len(history), _state(history, stop_reason, way))
                if not stop_reason:
                    look()
            stop_reason = stop_reason or "max_steps"
            end = way.finish(len(history))
        except KeyboardInterrupt:
            if dispatcher.size > 1 or again():
                raise  # ranks are told at different places: this ends them all
            stop_reason = "interrupted"
            if run is not None:
                run.set_aside()
            if isinstance(way, Searching) and way.ends_without_runs:
                end = way.finish(len(history))
        left_out = end is None
        end = _cut_short(way, problem, history) if end is None else end
        if end.no_better and stop_reason in ("converged", "standard_error"):
            stop_reason = "no_better"
        good, misses = _goodness(problem, end)
        stated = end.stated
        at_bound = (end.x <= problem.lower) | (end.x >= problem.upper)
        covariance = None if stated is None else problem.covariance(without(stated.covariance, at_bound))
        result = FitResult(
            space=problem.space,
            parameters=problem.whole(end.x),
            start=problem.whole(end.start),
            standard_error=_last_errors(history) if left_out else _deviations(covariance),
            loss=good.loss,
            stop_reason=stop_reason,
            history=tuple(history),
            num_evaluations=(history[-1].num_evaluations if history else 0) + end.num_evaluations,
            wall_s=time.monotonic() - begin,
            output=end.output,
            start_output=end.start_output,
            covariance=covariance,
            warnings=(
                *((_LEFT_OUT,) * left_out),
                *end.warnings,
                *_unfinished(end, stop_reason),
                *misses,
                *identifiability_warnings(
                    stated, problem.free, end.x * problem.natural, at_bound, method_ == "kriging"
                ),
            ),
            num_reused=end.num_reused,
            num_cached=found + cost.cached,
            num_surrogate=ran + cost.surrogate,
            num_failed=end.num_failed,
            method=method_,
            method_reason=reason,
            ends=_ends(problem, end) if len(problem.starts) > 1 else (),
            interval_dof=np.inf if stated is None else stated.dof,
            chi_square=good.chi_square,
            dof=good.dof,
            p_value=good.p_value,
            loss_share=good.share,
        )
        if run is not None and stop_reason != "interrupted":
            # Started again, it has nothing to do: not even the runs of its end.
            run.checkpoint(len(history), {**_state(history, stop_reason, way), "result": _plain(result)}, at_once=True)
        observers.end(result)
    return result


def _goodness(problem: FitProblem, end: MethodResult) -> tuple[Goodness, tuple[str, ...]]:
    """How well the target is explained at the end, and what to say of it."""
    misfit = problem.misfit
    # A loss of one's own, of noisy runs, is what the method makes of many; of a run that failed nothing else is known.
    if misfit.loss is not None or not misfit.usable(end.output[None]).all():
        return Goodness(end.loss), ()
    good = goodness_of(problem.misfit, end.output, end.x, problem.known_noise, end.noise)
    target = misfit.target.numpy()
    if misfit.masked is not None:
        target = np.where(misfit.masked.numpy(), np.nan, target)
    return good, unexplained(good, end.output - target, end.start_output - target)


def _cut_short(way: Way, problem: FitProblem, history: Sequence[FitStep]) -> MethodResult:
    """The end of a fit that was interrupted: what is known, without another run.

    The parameters are those of the least loss that was seen: of where the last step led none is known.
    """
    unknown = np.full(tuple(problem.misfit.target.shape), np.nan)
    x, loss = way.x, np.nan
    if seen := [record for record in history if np.isfinite(record.loss)]:
        best = min(seen, key=lambda record: record.loss)
        at = [problem.space.index(name) for name in problem.free.names]
        x, loss = np.array(best.parameters)[at] / problem.natural, best.loss
    failed = history[-1].num_failed if history else 0
    return MethodResult(x, problem.free_starts[0], loss, None, unknown, unknown, num_evaluations=0, num_failed=failed)


def _ends(problem: FitProblem, end: MethodResult) -> tuple[FitEnd, ...]:
    """Where all starts have come to, of all parameters in their units."""
    return tuple(FitEnd(problem.whole(e.start), problem.whole(e.parameters), e.loss, e.steps) for e in end.ends)


def _deviations(covariance: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if covariance is None else np.sqrt(np.diag(covariance))


def _last_errors(history: Sequence[FitStep]) -> NDArray[np.float64] | None:
    known = history[-1].standard_error if history else None
    return None if known is None else np.array(known)


def _plain(result: FitResult) -> dict[str, Any]:
    """What a run keeps of its result: all but what it keeps anyway."""
    kept = {name: value for name, value in vars(result).items() if name not in ("space", "history", "ends")}
    return {**kept, "ends": [dict(vars(end)) for end in result.ends]}


def _result_from(kept: Mapping[str, Any], space: ParameterSpace, history: Sequence[FitStep]) -> FitResult:
    ends = tuple(FitEnd(**end) for end in kept["ends"])
    return FitResult(**{**kept, "ends": ends, "space": space, "history": tuple(history)})


def fit_settings() -> list[str]:
    """The keywords that `fit` takes: its own, and those of `bridge.smooth`."""
    own = [name for name in signature(fit).parameters if name != "smoothing"]
    return list(dict.fromkeys([*own, *list(signature(smooth).parameters)[1:]]))


def _check_kinds(target: Any, start: Any, variance: Any, fixed: Any, tied: Any, loss: Any, on_step: Any) -> None:
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
    if on_step is not None and not callable(on_step):
        raise InputError(f"Expected on_step as a function of a FitStep, got {on_step!r}.")


def _unfinished(end: MethodResult, stop_reason: str) -> tuple[str, ...]:
    if not end.at_limit or stop_reason not in ("max_steps", "max_runs"):
        return ()
    return (
        f"The last step was still as long as it may be when {stop_reason} ended the fit, two scales: the target is "
        "further away, or the noise of a step is as large as that. Allow more steps (steps=, max_runs=), a larger "
        "scale, or take more samples (num_samples=).",
    )


def _smooths(learning_rate: float | None, scale: Any, smoothing: Mapping[str, Any]) -> bool:
    """Whether settings are given that only smoothing has a use for."""
    pair = scale is not None and not isinstance(scale, int | float)
    return learning_rate is not None or pair or bool(set(smoothing) & set(DESIGN))


def _spread(scale: float | tuple[float, float] | None) -> float:
    """Of starts that are drawn about a given one, natural units."""
    first: Any = scale[0] if isinstance(scale, Sequence) else scale
    return float(first) if is_number(first) else 1.0  # what is no scale is refused where the method is made


def _start(observers: Observers, problem: FitProblem, chosen: Chosen, title: str) -> None:
    refusal: BridgeError | None = None
    try:
        max_runs = chosen.budget if chosen.budget < _UNLIMITED else None
        observers.start(problem.space, max_steps=chosen.limit, max_runs=max_runs, title=title)
    except BridgeError as refused:  # on rank 0 alone
        refusal = refused
    chosen.smoothed[0].dispatcher.thinking.agree(refusal)


def _restored(run: Run | None, chosen: Chosen) -> tuple[list[FitStep], str]:
    """The history so far and why it has stopped, if it has; the method goes on from there."""
    if run is None or run.state is None:
        return [], ""
    chosen.way.restore(run.state["method"])
    history = [FitStep(**{**entry, "parameters": tuple(entry["parameters"])}) for entry in run.state["history"]]
    return history, run.state["stop_reason"]


def _state(history: Sequence[FitStep], stop_reason: str, way: Way) -> dict[str, Any]:
    entries = [{**vars(h), "parameters": list(h.parameters)} for h in history]
    return {"history": entries, "stop_reason": stop_reason, "method": way.to_dict()}


def _earlier(
    reuse: Sequence[Source],
    problem: FitProblem,
    chosen: Chosen,
    directory: str | os.PathLike[str] | None,
    begun: bool,
) -> Earlier | None:
    """Evaluations of earlier fits; nothing where this one has begun already. Collective."""
    way, dispatcher = chosen.way, chosen.smoothed[0].dispatcher.thinking
    if not reuse or not isinstance(way, Searching):
        return None
    if dispatcher.broadcast_object(begun):
        return None
    found, refused = None, None
    if dispatcher.rank == 0:
        try:
            shape = tuple(problem.misfit.target.shape)
            found = earlier_rows(
                *(reuse, problem.simulator, problem.free, shape, way.loss_of_rows, MOST_ROWS),
                name=chosen.smoothed[0].execution.filing(chosen.smoothed[0].simulator).name,
                but=directory,
            )
        except BridgeError as problem_:
            refused = problem_
    dispatcher.agree(refused)
    return dispatcher.broadcast_object(found)


def _described(
    problem: FitProblem, s: MethodSettings, chosen: Chosen, seed: int | None, smoothing: Mapping[str, Any]
) -> dict[str, Any]:
    """What the result depends on: a run goes on under the same settings alone."""
    misfit, prior = problem.misfit, problem.misfit.prior
    probe = torch.linspace(-1.0, 1.0, misfit.target.numel(), dtype=torch.float64).reshape(misfit.target.shape)
    stages: list[Any] = []
    for given in s.coarse or ():
        stages.append(given if isinstance(given, int | float) else _digest(given(_whitened(misfit.whiten, probe))))
    functions: dict[str, Any] = {"loss": misfit.loss, "whiten": misfit.whiten, "optimiser": s.optimiser}
    functions |= {f"coarse[{i}]": given for i, given in enumerate(s.coarse or ())}
    plain = chosen.smoothed[0]
    return {
        "simulator": simulator_name(problem.simulator),
        "identity": plain.execution.filing(plain.simulator).name,
        **{f"code of {k}": identity_of_function(f, k) for k, f in functions.items() if callable(f)},
        "seed": seed, "method": s.method, "steps": chosen.limit,
        "num_samples": s.num_samples, "tolerance": s.tolerance, "start": problem.starts.tolist(),
        "halving": s.halving, "target": _digest(misfit.target), "partial": misfit.partial,
        "mask": None if misfit.masked is None else _digest(misfit.masked),
        "max_runs": s.max_runs, "restarts": s.restarts,
        "prior": [prior.information.tolist(), prior.mean.tolist()], "robust": repr(misfit.robust),
        "variance": _digest(misfit.variance), "whiten": _digest(_whitened(misfit.whiten, probe)), "coarse": stages,
        "stop_at_error": s.stop_at_error, "smoothing": _words(smoothing), "natural_scale": problem.natural.tolist(),
        **chosen.described,
    }  # fmt: skip


def _words(smoothing: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text that is the same in another process; where finished evaluations are kept is none of them."""
    words = {}
    for name, value in sorted(smoothing.items()):
        if name == "surrogate" and value is not None:
            words[name] = identity_of(as_simulator(value))
        elif value is None or isinstance(value, bool | int | float | str):
            words[name] = repr(value)
        elif name != "store":
            words[name] = identity_of_function(value, name)
    return words


def _whitened(whiten: LinearMap | None, x: torch.Tensor) -> torch.Tensor:
    return x if whiten is None else whiten(x)


def _digest(tensor: torch.Tensor) -> str:
    array = tensor.detach().contiguous().numpy()
    return hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()
