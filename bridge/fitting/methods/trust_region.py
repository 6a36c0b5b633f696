"""The search by a quadratic model of the loss (`quadratic_search`) as a method of `bridge.fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from bridge.arrays import Array
from bridge.checks import as_whole
from bridge.fitting.methods.base import (
    FitTask,
    Method,
    StepReport,
    as_reach,
    register,
    require_rounds,
    require_tolerance,
)
from bridge.fitting.methods.quadratic_search import QuadraticSearch
from bridge.fitting.methods.requests import RunOutputs, Runs
from bridge.fitting.methods.search import SearchRun


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
    scale: float | None = None
    tolerance: float = 1e-6

    keeps_runs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rounds", "round_size"):
            object.__setattr__(self, name, as_whole(getattr(self, name)))
        require_rounds(self.rounds, self.round_size)
        require_tolerance(self.tolerance)
        as_reach(self.scale)

    def start(self, task: FitTask) -> TrustRegionRun:
        return TrustRegionRun(task, self)


@final
class TrustRegionRun(SearchRun):
    """`QuadraticSearch` on a simulator: all starts are run in the first round, the search's own first."""

    def __init__(self, task: FitTask, method: TrustRegion) -> None:
        super().__init__(task, method, limit=method.rounds)
        reach = as_reach(method.scale)
        self.described = {"scale": reach}
        self.search = search = QuadraticSearch(
            self.start,
            self.problem.lower,
            self.problem.upper,
            spread=reach,
            seed=self.seed,
            batch=method.round_size or max(2, len(self.start) // 4),
            tolerance=method.tolerance,
        )
        more = [z for z in self.problem.free_starts[1:] if not (search.points == z).all(axis=1).any()]
        search.points = np.vstack([search.points[:1], *[z[None] for z in more], search.points[1:]])

    @property
    def x(self) -> Array:
        return np.asarray(self.search.best)  # where runs are noisy it is not the one of least loss

    @property
    def loss(self) -> float:
        return self.search.best_loss

    @property
    def done(self) -> str:
        return self.search.stopped

    @property
    def next_runs(self) -> int:
        return 2  # where runs are noisy, the output of the best may have to be had again

    def ask(self, step: int, spent: int) -> Runs:
        return Runs(self.search.ask(self.budget - spent - 1))

    def tell(self, step: int, answer: RunOutputs) -> StepReport:
        self.search.tell(self.take(answer))
        return self.report(self.search.scale, self.search.note)

    def warnings(self) -> tuple[str, ...]:
        said = super().warnings()
        if self.search.stopped != "numerics":
            return said
        return (
            *said,
            "The fit ended early: its model of the loss failed numerically several times in turn. The parameters "
            "are those of the best run so far. Check the natural scales and the bounds.",
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "search": self.search.to_dict()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self.search.restore(saved["search"])
