"""The settings that all descents have in common, and a descent made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bridge.arrays import Array
from bridge.checks import as_whole, is_whole
from bridge.errors import InputError
from bridge.estimators.covariates import Covariate
from bridge.estimators.distributions import Distribution
from bridge.estimators.points import PointSet
from bridge.fitting.blur import make_blur_schedule
from bridge.fitting.methods.base import UNLIMITED, FitTask, Method, as_widths, require, require_tolerance
from bridge.fitting.methods.descent import Descent, end_runs, repeated
from bridge.fitting.methods.steps import Schedule, SmoothedProblem, StepRule
from bridge.fitting.soundness import HUGE
from bridge.fitting.target import LinearMap
from bridge.smoothing.settings import Smoothing, SurrogateLike
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
        distribution, points, covariate, replicates, simulator_seeds, surrogate: as in `bridge.smooth`.
    """

    steps: int = 150
    num_samples: int = 32
    scale: float | tuple[float, float] | None = None
    halving: bool = True
    tolerance: float = 0.01
    distribution: str | Distribution = "gaussian"
    points: str | PointSet = "auto"
    covariate: str | Covariate = "auto"
    replicates: int = 1
    simulator_seeds: str = "common"
    surrogate: SurrogateLike = None

    def __post_init__(self) -> None:
        for name in ("steps", "num_samples"):
            object.__setattr__(self, name, as_whole(getattr(self, name)))
        require("at least one step", is_whole(self.steps, 1), self.steps)
        require("at least one run a step", is_whole(self.num_samples, 1), self.num_samples)
        require_tolerance(self.tolerance)

    def smoothing(self, scale: Array) -> Smoothing:
        """How outputs are smoothed, with noise of this scale."""
        return Smoothing(
            self.num_samples,
            scale,
            self.distribution,
            self.points,
            self.covariate,
            self.replicates,
            self.simulator_seeds,
            self.surrogate,
        )

    @property
    def widths(self) -> tuple[float, float]:
        """The first and the last scale."""
        return as_widths(self.scale, (2.0, 0.1))


def start_descent(
    task: FitTask,
    method: DescentMethod,
    make_rule: Callable[[SmoothedProblem], StepRule],
    *,
    blur: Sequence[float | LinearMap] | None = None,
    targets: Array | None = None,
    newton: float = 0.0,
) -> Descent:
    """A descent by a rule, from the settings of its method.

    Args:
        blur: blurs of what is compared, from coarse to fine. targets: (d,) standard errors that suffice.
        newton: how many scales a step of Gauss-Newton may be long; 0 of other steps.

    Raises:
        InputError: a budget that is too small for a step and the end, or blurs that are none.
    """
    problem, misfit = task.problem, task.problem.misfit
    (first, last), natural, starts = method.widths, problem.natural, problem.free_starts
    smoothed = smooth(
        problem.simulator,
        method.smoothing(first * natural),
        seed=task.seed,
        failures=task.failures,
        on=task.place,
        memory=task.memory,
    )
    smoothed.strategy = replace(smoothed.strategy, largest=HUGE)
    budget = task.stop.runs or UNLIMITED
    rows = len(starts) * smoothed.strategy.num_rows * smoothed.strategy.replicates
    least = 2 * rows + end_runs(smoothed, misfit, len(starts))
    least += 0 if misfit.loss is not None else repeated(smoothed)
    if budget < least:
        raise InputError(
            f"Expected at least {least} runs, for a step and what is run at the end, got Stop(runs={task.stop.runs})."
        )
    compared = misfit.target if misfit.whiten is None else misfit.whiten(misfit.target)
    keeps = "noise" if misfit.loss is None else "mean"
    schedule = Schedule(first, last, method.steps, make_blur_schedule(blur, tuple(compared.shape), keeps))
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
