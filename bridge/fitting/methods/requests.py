"""What a method of fitting asks for, and what it is told: it evaluates nothing itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import EvaluationError, InputError
from bridge.fitting.methods.plain_runs import last_outputs, plain_outputs, useless_start
from bridge.fitting.problem import FitProblem
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.smoothed import SmoothedSimulator


@final
@dataclass(frozen=True, eq=False)
class Runs:
    """One run of the simulator itself at each point; the answer is a `RunOutputs`.

    Attributes:
        points: (k, d) of the free parameters, natural units.
        step: key of the simulator's seeds; None for the fit's own step.
        may_fail: whether a run that fails is no end of the fit, whatever is said of failures: at the end of one that
            has lived with failed runs.
    """

    points: Array
    step: int | None = None
    may_fail: bool = False


@final
@dataclass(frozen=True, eq=False)
class Smoothed:
    """The smoothed output and its derivatives; the answer is an `Estimate`, or the `EvaluationError` that it gave.

    Attributes:
        x: (k, d) of the free parameters, natural units, all in one dispatch; or (d,).
        scale: of the noise, natural units: a number, or of each place (k, d), (k, 1) or L, (k, d, d).
        step: key of the noise; None for the fit's own step. replicate: another key, see `SmoothedSimulator.estimate`.
        which: number of the smoothed simulator in `MethodRun.smoothed`.
        scale_gradient: whether derivatives in the scale are wanted.
    """

    x: Array
    scale: float | Array
    step: int | None = None
    replicate: int = 0
    which: int = 0
    scale_gradient: bool = False


@final
@dataclass(frozen=True, eq=False)
class RunOutputs:
    """What came of `Runs`, on every rank.

    Attributes:
        points: (k, d) as asked for. values: (k, *shape), NaN where a run failed, unless failures have a penalty.
        failed: (k,) which outputs cannot be compared with the target.
    """

    points: Array
    values: Array
    failed: NDArray[np.bool_]


Request = Runs | Smoothed
Answer = RunOutputs | Estimate | EvaluationError


def answered(request: Request, smoothed: Sequence[SmoothedSimulator], problem: FitProblem, step: int) -> Answer:
    """Evaluates what is asked for. Collective.

    Args:
        smoothed: of the method. step: of the fit.

    Raises:
        InputError: outputs of another shape than the target. EvaluationError: a run failed that must not.
    """
    key = step if request.step is None else request.step
    if isinstance(request, Runs):
        return _outputs(request, smoothed[0], problem, step, key)
    scale = np.asarray(request.scale)
    scales = torch.as_tensor(scale * (problem.natural[:, None] if scale.ndim == 3 else problem.natural))
    try:
        return smoothed[request.which].estimate(
            torch.as_tensor(request.x * problem.natural),
            key,
            scale=scales if scale.ndim == 0 else None,
            scales=scales if scale.ndim else None,
            replicate=request.replicate,
            scale_gradient=request.scale_gradient,
        )
    except EvaluationError as error:  # the same on every rank
        return error


def num_runs(request: Request, answer: Answer, smoothed: Sequence[SmoothedSimulator]) -> int:
    """Runs that an answer has taken; one that is an error as many as there were to be."""
    if isinstance(request, Runs):
        return len(request.points)
    if isinstance(answer, Estimate):
        return answer.num_evaluations
    strategy = smoothed[request.which].strategy
    return len(np.atleast_2d(request.x)) * strategy.num_rows * strategy.replicates


def _outputs(request: Runs, plain: SmoothedSimulator, problem: FitProblem, step: int, key: int) -> RunOutputs:
    theta, misfit = request.points * problem.natural, problem.misfit
    shape = tuple(misfit.target.shape)
    if request.may_fail:
        values = last_outputs(plain, theta, key, shape)
        return RunOutputs(request.points, values, ~misfit.usable(values))
    values = plain_outputs(plain, theta, key)
    if step == 0 and values.shape[1:] != shape:
        raise InputError(f"Expected a target of shape {values.shape[1:]}, got {shape}.")
    failed = ~misfit.usable(values)
    at_start = step == 0 and np.array_equal(request.points[0], problem.free_starts[0])
    if at_start and failed[0] and plain.strategy.errors_raise:
        raise EvaluationError(useless_start(theta[0], values[0], problem.free.names))
    if failed.all():  # and perhaps without a shape
        values = np.full((len(theta), *shape), np.nan)
    return RunOutputs(request.points, values, failed)
