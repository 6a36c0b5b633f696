"""The search by a model of all runs (`kriging_search`) as a method of `bridge.fit`: it evaluates what is asked for."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.checks import as_whole, is_whole
from bridge.errors import BridgeError
from bridge.fitting.methods.base import (
    SMALL_STEP,
    FitTask,
    Method,
    MethodResult,
    ModelRun,
    StepReport,
    as_reach,
    error_targets,
    register,
    require,
    require_rounds,
    require_tolerance,
)
from bridge.fitting.methods.kriging_errors import of_search
from bridge.fitting.methods.kriging_runs import MOST_ROWS
from bridge.fitting.methods.kriging_search import KrigingSearch
from bridge.fitting.methods.plain_runs import plain_simulator
from bridge.fitting.methods.requests import Request, RunOutputs, Runs
from bridge.fitting.misfit import Misfit
from bridge.fitting.reuse import Source
from bridge.fitting.rounding import Lattice
from bridge.fitting.uncertainty import Stated
from bridge.simulator.function import may_be_noisy
from bridge.smoothing.smoothed import SmoothedSimulator

# What every rank makes of the outputs itself, which are as many numbers.
_EVERYWHERE = ("residuals", "lattice")


# Runs of a whole fit, for each parameter and one more.
_RUNS_A_PARAMETER = 60


@register("kriging")
@final
@dataclass(frozen=True)
class Kriging(Method):
    """Least squares by one Gaussian process through every run so far, in rounds of a few runs.

    Attributes:
        rounds: at most so many, None for no limit.
        round_size: runs a round; by default max(6, d / 2 + 1), in the first round at least d + 1, from the fifth on
            half as many more. Give what can run at the same time, and it is that in all of them (for d + 1 up to twice
            that in the first).
        scale: how far from the start the first round looks, natural units, by default 1.
        restarts: at most so many, elsewhere, where it ends, or is stuck, and the target is not explained.
        tolerance: ends when two rounds in turn promise less than this many standard errors. Without `variance` it goes
            on until steps are below 1e-4 natural scales, or, in simulators without noise, until ten digits of the
            target agree or eight rounds and 6 (d + 1) runs have gained less than 3e-4 of the loss.
        reuse: earlier evaluations of the same simulator to begin with: directories of earlier fits by kriging, or
            `bridge.Store`s (which earlier fits by any method kept) or their directories. They become part of this
            run, which does not need them again.
    """

    rounds: int | None = None
    round_size: int | None = None
    scale: float | None = None
    restarts: int = 10
    tolerance: float = 0.1
    reuse: Source | Sequence[Source] = ()

    needs_least_squares: ClassVar[bool] = True
    states_errors: ClassVar[bool] = True
    keeps_runs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rounds", "round_size", "restarts"):
            object.__setattr__(self, name, as_whole(getattr(self, name)))
        require_rounds(self.rounds, self.round_size)
        require_tolerance(self.tolerance)
        as_reach(self.scale)
        require("restarts of 0 or more", is_whole(self.restarts, 0), self.restarts)

    def start(self, task: FitTask) -> KrigingRun:
        problem = task.problem
        plain = plain_simulator(problem.simulator, task.seed, task.failures, task.place, task.memory)
        d, starts, misfit = problem.free.dimension, problem.free_starts, problem.misfit
        batch, reach = max(6, d // 2 + 1), as_reach(self.scale)
        search = KrigingSearch(
            starts[0],
            problem.lower,
            problem.upper,
            spread=reach,
            seed=int(task.seed or 0),
            batch=self.round_size or batch,
            later=self.round_size or 3 * batch // 2,
            prior=misfit.prior,
            known_noise=problem.known_noise,
            tolerance=self.tolerance,
            restarts=self.restarts,
            robust=misfit.robust,
            ordinary=misfit.ordinary_cost(),
            guessed=problem.guessed,
            unknown=problem.unknown,
        )
        return KrigingRun(
            plain,
            misfit,
            search,
            problem.natural,
            task.stop.runs or _RUNS_A_PARAMETER * (d + 1),
            problem.known_noise,
            starts,
            error_targets(task),
            limit=self.rounds,
            described={"scale": reach},
        )


@final
class KrigingRun(ModelRun):
    """`bridge.fitting.methods.kriging_search.KrigingSearch` on a simulator.

    Args:
        plain: the simulator itself, as a smoothed one of one run a point.
        budget: of runs, those at the end included. known_noise: whether the target's variance is known.
        starts: (k, d) natural units, the search's own among them: all are run in the first round.
        error_targets: (d,) standard errors that suffice, natural units; None to go on.
    """

    def __init__(
        self,
        plain: SmoothedSimulator,
        misfit: Misfit,
        search: KrigingSearch,
        natural: Array,
        budget: int,
        known_noise: bool,
        starts: Array,
        error_targets: Array | None,
        *,
        limit: int | None,
        described: dict[str, Any],
    ) -> None:
        self.smoothed, self.limit, self.described, self.most_rows = [plain], limit, described, MOST_ROWS
        self.plain, self.misfit, self.search, self.natural = plain, misfit, search, natural
        self.budget, self.known_noise, self.starts, self.error_targets = budget, known_noise, starts, error_targets
        self.precise = 0
        self.error: Array | None = None
        self.lattice = Lattice()
        self._add_starts()

    @property
    def x(self) -> Array:
        return self.search.overall[1]

    @property
    def done(self) -> str:
        return self.search.stopped or ("standard_error" if self.precise >= 2 else "")

    @property
    def last_runs(self) -> int:
        """Runs that the end may take: outputs are had back from residuals where these are the outputs' own."""
        return 1 if self.misfit.plain else 2

    @property
    def next_runs(self) -> int:
        return 1 + self.last_runs

    def ask(self, step: int, spent: int) -> Runs:
        return Runs(self.search.ask(self.budget - self.last_runs - spent))

    def tell(self, step: int, answer: RunOutputs) -> StepReport:
        search = self.search
        self.lattice.add(answer.values)
        search.rounding = float(self.misfit.spread_of(self.lattice.deviation(tuple(self.misfit.target.shape))).sum())
        search.tell(self.misfit.residuals_of(answer.values), answer.failed)
        self._judge()
        note = search.note
        if step == 0 and search.runs.reused:
            note = "; ".join(filter(None, [f"begins with {search.runs.reused} evaluations of earlier runs", note]))
        loss, best = search.overall
        failed = int(search.runs.failed.sum())
        return StepReport(loss, search.scale, best, self.error, failed, note)

    def for_others(self) -> dict[str, Any]:
        return {name: value for name, value in self.to_dict().items() if name not in _EVERYWHERE}

    def follow(self, handed: Mapping[str, Any], answer: RunOutputs) -> None:
        self.lattice.add(answer.values)
        residuals = self.search.runs.with_rows(self.misfit.residuals_of(answer.values), answer.failed)
        self.restore({**handed, "residuals": residuals, "lattice": self.lattice.to_dict()})

    def loss_of_rows(self, outputs: Array) -> Array:
        return np.array([self.misfit.cost(r) for r in self._residuals(outputs)])

    def begin_with(self, parameters: Array, outputs: Array) -> None:
        self.lattice.add(outputs)
        self.search.begin_with(parameters / self.natural, self._residuals(outputs))
        self._add_starts()

    def _residuals(self, outputs: Array) -> Array:
        return self.misfit.residuals_of(outputs.reshape(len(outputs), *self.misfit.target.shape))

    def _add_starts(self) -> None:
        """All starts into the first round."""
        points = self.search.points
        new = [z for z in self.starts[1:] if not (np.vstack([self.search.runs.rows, points]) == z).all(axis=1).any()]
        self.search.points = np.vstack([points[:1], *new, points[1:]])

    def _judge(self) -> None:
        """Whether the standard errors are those asked for, and what is expected of the next round small beside them."""
        if self.error_targets is None or not self.search.runs.kernel.size:
            return
        stated = self._stated()
        if stated is None:
            return
        self.error = np.sqrt(np.diag(stated.covariance))
        current = np.array_equal(self.search.overall[1], self.search.best)
        small = (np.abs(self.search.step) <= SMALL_STEP * self.error_targets).all() and not self.search.at_edge
        self.precise = self.precise + 1 if current and small and (self.error <= self.error_targets).all() else 0

    def finish(self, step: int) -> Generator[Request, Any, MethodResult]:
        loss, best = self.search.overall
        stated, noise = None, 0.0
        if len(self.search.runs.rows):
            stated, noise = self._stated(), self._noise()
        outputs, runs = [], 0
        for z in (best, self.search.start):
            output = self._output_of(z)
            if output is None:
                output = (yield Runs(z[None], step + runs)).values[0]
                runs += 1
            outputs.append(output)
        return MethodResult(
            *(best, self.search.start, loss, stated, outputs[0], outputs[1]),
            num_evaluations=runs,
            num_failed=int(self.search.runs.failed.sum()),
            num_reused=self.search.runs.reused,
            noise=noise,
            warnings=self._said(stated is not None),
        )

    def _noise(self) -> float:
        """Variance of one run, over that of the target, averaged over outputs, as far as the model tells."""
        if not may_be_noisy(self.plain.simulator):
            return 0.0
        try:
            model = self.search.runs.model(self.search.overall[1], weighted=False)
        except (np.linalg.LinAlgError, ValueError, ArithmeticError):
            return 0.0
        return model.noise / self.search.runs.residuals.shape[1]

    @property
    def ends_without_runs(self) -> bool:
        needed = (self.search.overall[1], self.search.start)
        return self.misfit.plain and all((self.search.runs.rows == z).all(axis=1).any() for z in needed)

    def _stated(self) -> Stated | None:
        """None where the numerics of the model fail."""
        try:
            with np.errstate(all="ignore"):
                return of_search(self.search, self.misfit, self.known_noise, self.lattice)
        except BridgeError:
            raise
        except (np.linalg.LinAlgError, ValueError, ArithmeticError):
            return None

    def _said(self, has_errors: bool) -> tuple[str, ...]:
        search, said = self.search, []
        failed = int(search.runs.failed.sum())
        if failed and not self.plain.strategy.errors_raise and self.plain.strategy.failures == "drop":
            said.append(
                f"{failed} of {len(search.runs.rows)} runs failed, and were taken for as bad as the worst: the fit "
                "stays away from where runs fail. If failing has nothing to do with the parameters, have them tried "
                "again, failures=bridge.Drop(retries=2), or give a number for them, failures=bridge.Penalty(value)."
            )
        if failed and self.plain.strategy.errors_raise:
            said.append(
                f"{failed} of {len(search.runs.rows)} runs gave NaN, infinite or enormous outputs and were taken for "
                "bad ones. If the best run is near to them, bound the parameters to where the simulator works; where "
                "outputs only lack some numbers (NaN), give failures=bridge.Raise(missing='ignore')."
            )
        if not search.whole:
            said.append(
                "The fit ended early: its model of the runs failed numerically several times in turn. The parameters "
                "are those of the best run so far. Check the natural scales, the bounds, and outputs that are outliers."
            )
        if not has_errors and len(search.runs.rows):
            said.append("No standard errors: the model of the runs is numerically singular at the end.")
        return tuple(said)

    def _output_of(self, z: Array) -> NDArray[Any] | None:
        """(*shape) of the run at z, where there has been one and outputs can be had back from residuals."""
        known, misfit = self.search.runs, self.misfit
        rows = np.flatnonzero((known.rows == z).all(axis=1))
        if not (len(rows) and misfit.plain):
            return None
        row = known.residuals[rows[0]] * misfit.deviation + misfit.target.numpy().reshape(-1)
        return np.asarray(np.where(known.failed[rows[0]], np.nan, row).reshape(misfit.target.shape))

    def to_dict(self) -> dict[str, Any]:
        own = {"precise": self.precise, "error": self.error, "lattice": self.lattice.to_dict()}
        return {**self.search.to_dict(), **own}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.search.restore(saved)
        self.precise, self.error = saved["precise"], saved["error"]
        self.lattice.restore(saved["lattice"])
