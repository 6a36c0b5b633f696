"""Gauss-Newton on the smoothed Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.methods.base import FitTask, error_targets, register
from bridge.fitting.methods.descent import Descent
from bridge.fitting.methods.descent_method import DescentMethod, start_descent
from bridge.fitting.methods.requests import Smoothed
from bridge.fitting.methods.steps import SmoothedProblem, StepOutcome, StepRule
from bridge.fitting.target import LinearMap
from bridge.smoothing.estimate import Estimate

# Scales that a step of Gauss-Newton may be long; from which part of that on it is at its limit.
LONGEST, _AT_LIMIT = 2.0, 0.95
# A step of less than so many scales makes the next scale so many steps, and no less than so small a part.
_SHORT, _WIDE, _NARROWING = 0.5, 2.0, 4.0


@register("gauss-newton")
@final
@dataclass(frozen=True)
class GaussNewton(DescentMethod):
    """Least squares by J^T V^-1 J of the smoothed Jacobian: many parameters, block structure, many runs at once.

    The scale goes down sooner than the schedule's, where steps are short against it.

    Attributes:
        blur: widths [pixels] of Gaussian blurs of what is compared, along the last two axes, or linear maps, from
            coarse to fine: equal shares of the first four fifths of the steps, then none.
    """

    steps: int = 24
    blur: Sequence[float | LinearMap] | None = None

    needs_least_squares: ClassVar[bool] = True
    states_errors: ClassVar[bool] = True

    def start(self, task: FitTask) -> Descent:
        count = len(task.problem.starts)
        targets = error_targets(task)
        return start_descent(
            task, self, lambda seen: GaussNewtonRule(seen, count), blur=self.blur, targets=targets, newton=LONGEST
        )


@final
class GaussNewtonRule(StepRule):
    """Steps of (J^T W J + P + damping)^-1 times the gradient, no longer than two scales in any coordinate.

    W are the weights of a robust loss, P the precision of the prior (see `Misfit.normal`). Each start has a scale of
    its own: the schedule's, or less where steps have become short against it, for then nothing as far away as that
    matters any more. From coarse to fine on the outputs it is the schedule's.
    """

    def __init__(self, problem: SmoothedProblem, starts: int) -> None:
        self.problem, schedule = problem, problem.schedule
        self.adapts = schedule.last < schedule.first and len(schedule.blurs) == 1
        self.widths = np.full(starts, schedule.first)

    def _widths(self, step: int) -> Array | None:
        return np.minimum(self.widths, self.problem.schedule.width(step)) if self.adapts else None

    def ask(self, x: Array, step: int) -> Smoothed:
        return self.problem.request(x, step, self._widths(step))

    def tell(self, x: Array, step: int, estimate: Estimate) -> StepOutcome:
        problem, schedule, widths = self.problem, self.problem.schedule, self._widths(step)
        misfit = problem.misfit_at(step)
        used = np.full(len(x), schedule.width(step)) if widths is None else widths
        losses, steps = [], []
        for z, y, J, width in zip(x, estimate.value, estimate.jacobian(), used, strict=True):
            losses.append(misfit.value(y, z))
            steps.append(problem.step(misfit, J, y, z, LONGEST * float(width)))
        lengths = np.abs(np.stack(steps)).max(axis=1)
        settled = schedule.settled(step)
        if self.adapts:
            settled = bool((used <= schedule.last).all())
            narrow = np.maximum(np.minimum(used, _WIDE * lengths), used / _NARROWING)
            self.widths = np.where(lengths < _SHORT * used, np.maximum(narrow, schedule.last), used)
        losses_, counts = np.array(losses), (estimate.num_evaluations, estimate.num_failed)
        return StepOutcome(
            *(losses_, x + np.stack(steps), float(used[int(np.argmin(losses_))]), settled, *counts),
            known=problem.known(x, estimate),
            at_limit=lengths > _AT_LIMIT * LONGEST * used,
        )

    def keep(self, which: NDArray[np.intp]) -> None:
        self.widths = self.widths[which]

    def to_dict(self) -> dict[str, Any]:
        return {"widths": self.widths}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.widths = saved["widths"]
