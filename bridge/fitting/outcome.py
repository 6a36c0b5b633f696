"""What is returned of a fit that has come to its end, or was cut short; and how that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.fitting.goodness import Goodness, goodness_of, unexplained
from bridge.fitting.identifiability import identifiability_warnings
from bridge.fitting.methods.base import MethodResult, MethodRun
from bridge.fitting.normal import without
from bridge.fitting.problem import FitProblem
from bridge.reporting.result import FitEnd, FitResult, FitStep
from bridge.simulator.space import ParameterSpace

# A run at the end that is so much worse than the one at the start is not so by its noise; less than this part of the
# target is rounding.
_FAR_WORSE, _EXACT = 1.5, 1e-6
_LEFT_OUT = (
    "The fit was interrupted: what it would run at its end, for errors and outputs, is left out, and the loss is that "
    "of the smoothed output. With the same run= it goes on where it was."
)


def make_result(
    problem: FitProblem,
    end: MethodResult,
    history: Sequence[FitStep],
    *,
    method: str,
    reason: str,
    stop_reason: str,
    wall_s: float,
    num_cached: int,
    num_surrogate: int,
    left_out: bool,
) -> FitResult:
    """What `bridge.fit` returns. left_out: whether the method could not come to its end."""
    stated = end.stated
    good, misses = _goodness(problem, end)
    at_bound = (end.x <= problem.lower) | (end.x >= problem.upper)
    covariance = None if stated is None else problem.covariance(without(stated.covariance, at_bound))
    return FitResult(
        space=problem.space,
        parameters=problem.whole(end.x),
        start=problem.whole(end.start),
        standard_error=_last_errors(history) if left_out else _deviations(covariance),
        loss=good.loss,
        stop_reason=stop_reason,
        history=tuple(history),
        num_evaluations=(history[-1].num_evaluations if history else 0) + end.num_evaluations,
        wall_s=wall_s,
        output=end.output,
        start_output=end.start_output,
        covariance=covariance,
        warnings=(
            *((_LEFT_OUT,) * left_out),
            *end.warnings,
            *_unfinished(end, stop_reason),
            *misses,
            *identifiability_warnings(stated, problem.free, end.x * problem.natural, at_bound),
        ),
        num_reused=end.num_reused,
        num_cached=num_cached,
        num_surrogate=num_surrogate,
        num_failed=end.num_failed,
        method=method,
        method_reason=reason,
        ends=_ends(problem, end) if len(problem.starts) > 1 else (),
        interval_dof=np.inf if stated is None else stated.dof,
        chi_square=good.chi_square,
        dof=good.dof,
        p_value=good.p_value,
        loss_share=good.share,
    )


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
    said = unexplained(good, end.output - target, end.start_output - target)
    return good, (*_worse_than_the_start(problem, end, good.loss, target), *said)


def _worse_than_the_start(
    problem: FitProblem, end: MethodResult, loss: float, target: NDArray[np.float64]
) -> tuple[str, ...]:
    """Where the run at the end misses by far more than that at the start: more than noise and rounding make of it."""
    misfit, miss = problem.misfit, end.output - target
    if not misfit.usable(end.start_output[None]).all() or np.nanmax(np.abs(miss)) < _EXACT * np.nanmax(np.abs(target)):
        return ()
    at_start = misfit.value_there(torch.as_tensor(np.asarray(end.start_output, dtype=np.float64)), end.start)
    if not loss > _FAR_WORSE * at_start:
        return ()
    return (
        f"The start fits better than what was found: its loss is {at_start:.4g}, that of the parameters {loss:.4g}. "
        "The first scale may be too wide: give bounds or natural scales (bridge.as_simulator), a smaller scale= to the "
        "method, or more runs.",
    )


def cut_short(work: MethodRun, problem: FitProblem, history: Sequence[FitStep]) -> MethodResult:
    """The end of a fit that was interrupted: what is known, without another run.

    The parameters are those of the least loss that was seen: of where the last step led none is known.
    """
    unknown = np.full(tuple(problem.misfit.target.shape), np.nan)
    x, loss = work.x, np.nan
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


def plain(result: FitResult) -> dict[str, Any]:
    """What a run keeps of its result: all but what it keeps anyway."""
    kept = {name: value for name, value in vars(result).items() if name not in ("space", "history", "ends")}
    return {**kept, "ends": [dict(vars(end)) for end in result.ends]}


def result_from(kept: Mapping[str, Any], space: ParameterSpace, history: Sequence[FitStep]) -> FitResult:
    ends = tuple(FitEnd(**end) for end in kept["ends"])
    return FitResult(**{**kept, "ends": ends, "space": space, "history": tuple(history)})


def _unfinished(end: MethodResult, stop_reason: str) -> tuple[str, ...]:
    if not end.at_limit or stop_reason not in ("max_steps", "max_runs"):
        return ()
    return (
        f"The last step was still as long as it may be when {stop_reason} ended the fit, two scales: the target is "
        "further away, or the noise of a step is as large as that. Give the method more steps (steps=), a larger "
        "scale (scale=) or more samples (num_samples=), or allow more runs (stop=bridge.Stop(runs=...)).",
    )
