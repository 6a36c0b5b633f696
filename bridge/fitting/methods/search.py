"""What methods have in common that run the simulator itself, at points of their own choice, and go by single losses."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch

from bridge.arrays import Array
from bridge.errors import EvaluationError
from bridge.fitting.methods.base import FitTask, Method, MethodResult, MethodRun, StepReport
from bridge.fitting.methods.plain_runs import plain_simulator, useless_start
from bridge.fitting.methods.requests import Request, RunOutputs, Runs
from bridge.fitting.soundness import HUGE

# Runs of a whole fit, for each parameter and one more.
_RUNS_A_PARAMETER = 100


class SearchRun(MethodRun):
    """A method that asks for runs of the simulator itself, and keeps the best.

    A method of one's own needs `ask`, which returns `Runs(points)`, and `tell`, which begins with `take`:

        def tell(self, step, answer):
            losses = self.take(answer)  # (k,), infinite where a run failed
            ...                         # learns from answer.points and these
            return self.report(scale)

    and, where it has a state of its own, `to_dict` and `restore` that add it to those here.

    Args:
        task, method: as `Method.start` has them. limit: of steps, None for no limit.
        budget: of runs, where the task has none; by default 100 (d + 1).

    Attributes:
        problem: with `free_starts`, `lower`, `upper` and `misfit`, natural units. seed: of all noise.
        best: (d,) of the run of least loss, the start before there is one. least: that loss.
        output, start_output: of that run and of the start; None where there is none.
    """

    def __init__(self, task: FitTask, method: Method, *, limit: int | None = None, budget: int | None = None) -> None:
        self.problem, self.seed = task.problem, int(task.seed or 0)
        self.plain = plain_simulator(task.problem.simulator, task.seed, task.failures, task.place, task.memory)
        self.smoothed, self.limit, self.described = [self.plain], limit, {}
        self.start: Array = task.problem.free_starts[0]
        self.budget = task.stop.runs or budget or _RUNS_A_PARAMETER * (len(self.start) + 1)
        self.best, self.least = self.start, np.inf
        self.output: Array | None = None
        self.start_output: Array | None = None
        self.num_runs, self.num_failed, self.last_round = 0, 0, 0

    @property
    def x(self) -> Array:
        return np.asarray(self.best)

    @property
    def loss(self) -> float:
        """What is stated of x."""
        return self.least

    @property
    def done(self) -> str:
        return ""

    @property
    def next_runs(self) -> int:
        return self.last_round + (self.start_output is None)

    @property
    def ends_without_runs(self) -> bool:
        return self._knows_x and self.start_output is not None

    @property
    def _knows_x(self) -> bool:
        return self.output is not None and np.array_equal(self.best, self.x)

    def take(self, answer: RunOutputs) -> Array:
        """The losses (k,) of runs, infinite where one failed; the best run so far is kept.

        Raises:
            EvaluationError: the start, which comes first, is of no use.
        """
        runs = list(zip(answer.failed, answer.values, answer.points, strict=True))
        losses = np.array([np.inf if failed else self._loss(y, z) for failed, y, z in runs])
        at_start = np.flatnonzero((answer.points == self.start).all(axis=1))
        begins = self.num_runs == 0 and 0 in at_start
        if begins and not np.isfinite(losses[0]) and self.plain.strategy.errors_raise:
            theta = self.start * self.problem.natural
            raise EvaluationError(useless_start(theta, answer.values[0], self.problem.free.names))
        if self.start_output is None and len(at_start):
            self.start_output = answer.values[at_start[0]]
        best = int(np.argmin(losses))
        if np.isfinite(losses[best]) and losses[best] < self.least:
            self.best, self.least, self.output = answer.points[best], float(losses[best]), answer.values[best]
        self.num_runs, self.last_round = self.num_runs + len(losses), len(losses)
        self.num_failed += int((~np.isfinite(losses)).sum())
        return losses

    def _loss(self, output: Array, z: Array) -> float:
        value = self.problem.misfit.value(torch.as_tensor(output), z)
        return value if abs(value) < HUGE else np.inf

    def report(self, scale: float, note: str = "") -> StepReport:
        """What `tell` returns. scale: of the points that were looked at, natural units."""
        return StepReport(self.loss, scale, self.x, num_failed=self.num_failed, note=note)

    def finish(self, step: int) -> Generator[Request, Any, MethodResult]:
        """The best, with the output there and at the start: of runs that there have been, else of one more."""
        output, first, runs = self.output, self.start_output, 0
        if output is None or not self._knows_x:
            output, runs = (yield Runs(self.x[None], step)).values[0], 1
        if first is None:
            first, runs = (yield Runs(self.start[None], step + 1)).values[0], runs + 1
        return MethodResult(
            *(self.x, self.start, self.loss, None, output, first),
            num_evaluations=runs,
            num_failed=self.num_failed,
            warnings=self.warnings(),
        )

    def warnings(self) -> tuple[str, ...]:
        """What there is to say at the end."""
        if not (self.num_failed and self.plain.strategy.errors_raise):
            return ()
        return (
            f"{self.num_failed} of {self.num_runs} runs gave NaN, infinite or enormous outputs or losses and were "
            "taken for bad ones. If the best run is near to them, bound the parameters to where the simulator works.",
        )

    _OWN = ("best", "least", "output", "start_output", "num_runs", "num_failed", "last_round")

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._OWN}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in self._OWN:
            setattr(self, name, saved[name])
