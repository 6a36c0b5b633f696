"""The settings that all descents have in common, and a descent made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.fitting.blur import make_blur_schedule
from bridge.fitting.methods.base import UNLIMITED, FitTask, Method, as_widths, require_counts
from bridge.fitting.methods.descent import Descent, end_runs, repeated
from bridge.fitting.methods.steps import Schedule, SmoothedProblem, StepRule
from bridge.fitting.soundness import HUGE
from bridge.fitting.target import LinearMap
from bridge.smoothing.smooth import smooth


@dataclass(frozen=True)
class DescentMethod(Method):
    """What the settings of all descents have in common.

    Attributes:
        steps: of the whole run.
        num_samples: runs a step, of each start.
        scale: of the noise, from the first to the last step, natural units, by default (2, 0.1); a number keeps it.
        halving: whether the worse half of several starts is dropped again and again.
        tolerance: converged when, at the last scale, parameters move by less, over a tenth of the steps.
    """

    steps: int = 150
    num_samples: int = 32
    scale: float | tuple[float, float] | None = None
    halving: bool = True
    tolerance: float = 0.01

    def __post_init__(self) -> None:
        require_counts(self.steps, self.num_samples, self.tolerance)

    @property
    def widths(self) -> tuple[float, float]:
        """The first and the last scale."""
        return as_widths(self.scale, (2.0, 0.1))


def start_descent(
    task: FitTask,
    method: DescentMethod,
    make_rule: Callable[[SmoothedProblem], StepRule],
    *,
    coarse: Sequence[float | LinearMap] | None = None,
    targets: Array | None = None,
    newton: float = 0.0,
) -> Descent:
    """A descent by a rule, from the settings of its method.

    Args:
        coarse: blurs of what is compared, from coarse to fine. targets: (d,) standard errors that suffice.
        newton: how many scales a step of Gauss-Newton may be long; 0 of other steps.

    Raises:
        InputError: a budget that is too small for a step and the end, or blurs that are none.
    """
    problem, misfit = task.problem, task.problem.misfit
    (first, last), natural, starts = method.widths, problem.natural, problem.free_starts
    smoothed = smooth(
        problem.simulator,
        seed=task.seed,
        num_samples=method.num_samples,
        scale=first * natural,
        comm=task.comm,
        **task.smoothing,
    )
    smoothed.strategy = replace(smoothed.strategy, largest=HUGE)
    budget = task.max_runs or UNLIMITED
    rows = len(starts) * smoothed.strategy.num_rows * smoothed.strategy.replicates
    least = 2 * rows + end_runs(smoothed, misfit, len(starts))
    least += 0 if misfit.loss is not None else repeated(smoothed)
    if budget < least:
        raise InputError(
            f"Expected max_runs of at least {least}, for a step and what is run at the end, got {task.max_runs}."
        )
    compared = misfit.target if misfit.whiten is None else misfit.whiten(misfit.target)
    keeps = "noise" if misfit.loss is None else "mean"
    schedule = Schedule(first, last, method.steps, make_blur_schedule(coarse, tuple(compared.shape), keeps))
    known = None if targets is None else problem.known_noise
    return Descent(
        smoothed,
        misfit,
        starts,
        make_rule(SmoothedProblem(smoothed, misfit, natural, schedule, known)),
        natural=natural,
        lower=problem.lower,
        upper=problem.upper,
        schedule=schedule,
        halving=method.halving,
        tolerance=method.tolerance,
        known_noise=problem.known_noise,
        error_targets=targets,
        newton=newton,
        budget=budget,
    )
