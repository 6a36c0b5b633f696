"""Gauss-Newton on the smoothed Jacobian."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.methods.steps import SmoothedProblem, StepOutcome

# Scales that a step of Gauss-Newton may be long; from which part of that on it is at its limit.
LONGEST, _AT_LIMIT = 2.0, 0.95
# A step of less than so many scales makes the next scale so many steps, and no less than so small a part.
_SHORT, _WIDE, _NARROWING = 0.5, 2.0, 4.0


@final
class GaussNewton:
    """Steps of (J^T W J + P + damping)^-1 times the gradient, no longer than two scales in any coordinate.

    W are the weights of a robust loss, P the precision of the prior (see `Misfit.normal`). Each start has a scale of
    its own: the schedule's, or less where steps have become short against it, for then nothing as far away as that
    matters any more. From coarse to fine on the outputs it is the schedule's.
    """

    def __init__(self, problem: SmoothedProblem, starts: int) -> None:
        self.problem, schedule = problem, problem.schedule
        self.adapts = schedule.last < schedule.first and len(schedule.blurs) == 1
        self.widths = np.full(starts, schedule.first)

    def take(self, x: Array, step: int) -> StepOutcome:
        problem, schedule = self.problem, self.problem.schedule
        widths = np.minimum(self.widths, schedule.width(step)) if self.adapts else None
        scheduled, misfit, estimate = problem.estimate(x, step, widths)
        used = np.full(len(x), scheduled) if widths is None else widths
        losses, steps = [], []
        for z, y, J, width in zip(x, estimate.value, estimate.jacobian(), used, strict=True):
            losses.append(misfit.value(y, z))
            steps.append(problem.step(misfit, J, y, z, LONGEST * float(width)))
        lengths = np.abs(np.stack(steps)).max(axis=1)
        settled = schedule.settled(step)
        if self.adapts:
            settled = bool((used <= schedule.last).all())
            narrow = np.maximum(np.minimum(used, _WIDE * lengths), used / _NARROWING)
            narrow = np.where(lengths < _SHORT * used, np.maximum(narrow, schedule.last), used)
            # What is evaluated next depends on it, to the last bit.
            self.widths = problem.smoothed.dispatcher.thinking.broadcast(narrow)
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
