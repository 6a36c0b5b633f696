"""The search by a quadratic model of the loss (`quadratic_search`) as a method of `bridge.fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch

from bridge.arrays import Array
from bridge.checks import as_whole, is_whole
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.fitting.methods.base import (
    FitTask,
    Method,
    MethodResult,
    MethodRun,
    as_widths,
    register,
    require,
    require_tolerance,
)
from bridge.fitting.methods.plain_runs import plain_outputs, plain_simulator, useless_start
from bridge.fitting.methods.quadratic_search import QuadraticSearch
from bridge.fitting.misfit import Misfit
from bridge.fitting.soundness import HUGE
from bridge.reporting.result import FitStep
from bridge.smoothing.smoothed import SmoothedSimulator

# Runs of a whole fit, for each parameter and one more.
_RUNS_A_PARAMETER = 100


@register("trust-region")
@final
@dataclass(frozen=True)
class TrustRegion(Method):
    """A loss of any kind by a quadratic model of the runs about the best one; without standard errors.

    Attributes:
        rounds: at most so many, None for no limit.
        round_size: runs a round, by default a quarter of the number of parameters, at least 2.
        scale: of the first round's points about the start, natural units, by default 1.
        tolerance: the radius, natural units, at which it ends.
    """

    rounds: int | None = None
    round_size: int | None = None
    scale: float | tuple[float, float] | None = None
    tolerance: float = 1e-6

    keeps_runs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rounds", "round_size"):
            object.__setattr__(self, name, as_whole(getattr(self, name)))
        require("at least one round", self.rounds is None or is_whole(self.rounds, 1), self.rounds)
        require("at least one run a round", self.round_size is None or is_whole(self.round_size, 1), self.round_size)
        require_tolerance(self.tolerance)

    def start(self, task: FitTask) -> TrustRegionRun:
        problem = task.problem
        plain = plain_simulator(task)
        d, starts, widths = problem.free.dimension, problem.free_starts, as_widths(self.scale, (1.0, 1.0))
        search = QuadraticSearch(
            starts[0],
            problem.lower,
            problem.upper,
            spread=widths[0],
            seed=int(task.seed or 0),
            batch=self.round_size or max(2, d // 4),
            tolerance=self.tolerance,
        )
        budget = task.stop.runs or _RUNS_A_PARAMETER * (d + 1)
        return TrustRegionRun(
            plain,
            problem.misfit,
            search,
            problem.natural,
            budget,
            starts,
            problem.free.names,
            limit=self.rounds,
            described={"scale": list(widths)},
        )


@final
class TrustRegionRun(MethodRun):
    """`QuadraticSearch` on a simulator.

    Args:
        plain: the simulator itself, as a smoothed one of one run a point.
        budget: of runs. starts: (k, d) natural units, the search's own first: all are run in the first round.
        names: of the parameters.
    """

    def __init__(
        self,
        plain: SmoothedSimulator,
        misfit: Misfit,
        search: QuadraticSearch,
        natural: Array,
        budget: int,
        starts: Array,
        names: Sequence[str],
        *,
        limit: int | None,
        described: dict[str, Any],
    ) -> None:
        self.smoothed, self.limit, self.described = [plain], limit, described
        self.plain, self.misfit, self.search, self.natural = plain, misfit, search, natural
        self.budget, self.names = budget, tuple(names)
        self.output: Array | None = None  # of the run of least loss
        self.start_output: Array | None = None
        self.least = np.inf
        more = [z for z in starts[1:] if not (search.points == z).all(axis=1).any()]
        search.points = np.vstack([search.points[:1], *[z[None] for z in more], search.points[1:]])

    @property
    def x(self) -> Array:
        return np.asarray(self.search.best)

    @property
    def done(self) -> str:
        return self.search.stopped

    @property
    def next_runs(self) -> int:
        return 2  # where runs are noisy, the output of the best may have to be had again

    def advance(self, step: int, num_evaluations: int) -> FitStep:
        search = self.search
        points = search.ask(self.budget - num_evaluations - 1)
        outputs = plain_outputs(self.plain, points * self.natural, step)
        shape = tuple(self.misfit.target.shape)
        if step == 0 and outputs.shape[1:] != shape:
            raise InputError(f"Expected a target of shape {outputs.shape[1:]}, got {shape}.")
        failed = ~self.misfit.usable(outputs)
        losses = np.array([np.inf if f else self._loss(y, z) for f, y, z in zip(failed, outputs, points, strict=True)])
        if step == 0:
            if not np.isfinite(losses[0]) and self.plain.strategy.errors_raise:
                raise EvaluationError(useless_start(points[0] * self.natural, outputs[0], self.names))
            self.start_output = outputs[0]
        self._on_leader(losses)
        best = int(np.argmin(losses))
        if np.isfinite(losses[best]) and losses[best] < self.least:
            self.least, self.output = float(losses[best]), outputs[best]
        return FitStep(
            step,
            search.best_loss,
            search.scale,
            tuple((search.best * self.natural).tolist()),
            num_evaluations + len(points),
            num_failed=int((~np.isfinite(search.losses)).sum()),
            note=search.note,
        )

    def _loss(self, output: Array, z: Array) -> float:
        with np.errstate(all="ignore"):
            value = self.misfit.value(torch.as_tensor(output), z)
        return value if abs(value) < HUGE else np.inf

    def _on_leader(self, losses: Array) -> None:
        """One rank thinks for all: sums of its linear algebra need not have the same last bits elsewhere."""
        thinking = self.plain.dispatcher.thinking
        losses = thinking.broadcast(losses)
        error, saved = None, None
        if thinking.rank == 0:
            try:
                with np.errstate(all="ignore"):
                    self.search.tell(losses)
            except BridgeError as problem:
                error = problem
            saved = self.search.to_dict()
        thinking.agree(error)
        saved = thinking.broadcast_object(saved)
        if thinking.rank != 0 and saved is not None:
            self.search.restore(saved)

    def finish(self, step: int) -> MethodResult:
        search, runs = self.search, 0
        output = self.output
        known = len(search.rows) and np.array_equal(search.rows[int(np.argmin(search.losses))], search.best)
        if output is None or not known:  # where runs are noisy the best is not the one of least loss
            output, runs = plain_outputs(self.plain, search.best[None] * self.natural, step)[0], 1
        first = self.start_output
        if first is None:
            first, runs = plain_outputs(self.plain, search.start[None] * self.natural, step + 1)[0], runs + 1
        failed, said = int((~np.isfinite(search.losses)).sum()), []
        if failed and self.plain.strategy.errors_raise:
            said.append(
                f"{failed} of {len(search.rows)} runs gave NaN, infinite or enormous outputs or losses and were taken "
                "for bad ones. If the best run is near to them, bound the parameters to where the simulator works."
            )
        if search.stopped == "numerics":
            said.append(
                "The fit ended early: its model of the loss failed numerically several times in turn. The parameters "
                "are those of the best run so far. Check the natural scales and the bounds."
            )
        return MethodResult(
            *(search.best, search.start, search.best_loss, None, output, first),
            num_evaluations=runs,
            num_failed=failed,
            warnings=tuple(said),
        )

    _OWN = ("output", "start_output", "least")

    def to_dict(self) -> dict[str, Any]:
        return {**self.search.to_dict(), **{name: getattr(self, name) for name in self._OWN}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.search.restore(saved)
        for name in self._OWN:
            setattr(self, name, saved[name])
