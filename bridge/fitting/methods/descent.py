"""Descents along smoothed gradients, from one start or from several at once.

The noise of a descent shrinks during the run, so that the first steps see a landscape smooth over the distance to the
solution and the last ones the simulator itself (coarse to fine). How a step is made of what has been evaluated is a
`StepRule` (see `bridge.fitting.methods.steps`); everything else is here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import EvaluationError, NonFiniteError
from bridge.fitting.methods.base import SMALL_STEP, MethodResult, MethodRun, StepReport
from bridge.fitting.methods.descent_errors import of_descent
from bridge.fitting.methods.requests import Request, Runs, Smoothed
from bridge.fitting.methods.steps import Schedule, StepOutcome, StepRule
from bridge.fitting.misfit import Misfit
from bridge.fitting.uncertainty import Stated
from bridge.reporting.result import FitEnd
from bridge.simulator.function import may_be_noisy
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.smoothed import SmoothedSimulator

# The share of the steps in which the worse half of several starts is dropped again and again.
_RACE = 0.5
# How often in turn half of a step is taken back where fewer than that share of the runs are of use; with how few there
# is a step all the same.
_RETREATS, _HALF, _LEAST_LEFT = 3, 0.5, 0.1
_NOISY_MARGIN = 1.5


@final
class Descent(MethodRun):
    """Steps by a rule from k starts; the worse half of them is dropped again and again (successive halving).

    Args:
        smoothed: gives the output and its Jacobian at the end.
        starts: (k, d), lower, upper: (d,), natural units; natural: their size.
        halving: whether starts are dropped: in rounds spread evenly over the first half of the steps.
        tolerance: converged when nothing moves by more, over a tenth of the steps, once the rule has settled.
        known_noise: whether the target's variance is known.
        error_targets: (d,) standard errors that suffice, natural units; None to go on.
        newton: how many scales a step of Gauss-Newton may be long; 0 of other steps.
        budget: of runs.

    Reference: successive halving: Jamieson and Talwalkar, "Non-stochastic best arm identification", AISTATS 2016.
    """

    thinks_everywhere: ClassVar[bool] = True

    def __init__(
        self,
        smoothed: SmoothedSimulator,
        misfit: Misfit,
        starts: Array,
        rule: StepRule,
        *,
        natural: Array,
        lower: Array,
        upper: Array,
        schedule: Schedule,
        halving: bool,
        tolerance: float,
        known_noise: bool,
        error_targets: Array | None,
        newton: float,
        budget: int,
    ) -> None:
        self.limit, self.budget, self.described = schedule.steps, budget, {"scale": [schedule.first, schedule.last]}
        self.output, self.misfit, self.starts, self.rule = smoothed, misfit, starts, rule
        self.natural, self.lower, self.upper, self.schedule = natural, lower, upper, schedule
        self.tolerance, self.known_noise, self.error_targets, self.newton = (
            tolerance,
            known_noise,
            error_targets,
            newton,
        )
        self._repeated = 0 if misfit.loss is not None else repeated(smoothed)
        self.window = max(2, schedule.steps // 10)
        rounds = int(np.ceil(np.log2(len(starts)))) if halving else 0
        self.races = {max(0, round(_RACE * schedule.steps * (i + 1) / rounds) - 1) for i in range(rounds)}
        self._x, self.active = starts, np.arange(len(starts))
        self.past: list[Array] = []
        self.dropped: list[tuple[int, Array, float, int]] = []
        self.best, self.stopped = 0, ""
        self.smoothed = [smoothed, *rule.others]
        self.first_loss = self.last_loss = np.inf
        # Whoever has failed runs dropped means them to be no end of the fit, wherever a step leads.
        self.chosen = smoothed.strategy.failures != "raise"
        self.enough = smoothed.strategy.min_ok if self.chosen else _HALF
        self.safe, self.tolerant, self.share = starts, self.chosen, self.enough
        self.strategies = [s.strategy for s in self.smoothed]
        self.said, self.back = "", 0  # of a step that is tried again
        self.calm, self.precise, self.last_runs, self.failed, self.at_limit = 0, 0, 0, 0, False

    @property
    def x(self) -> Array:
        """(d,) natural units: of the start whose loss was the least."""
        return np.asarray(self._x[self.best])

    @property
    def done(self) -> str:
        return self.stopped

    @property
    def next_runs(self) -> int:
        return 2 * self.last_runs + self._repeated + end_runs(self.output, self.misfit, len(self.active))

    def ask(self, step: int, spent: int) -> Smoothed:
        return self.rule.ask(self._x, step)

    def tell(self, step: int, answer: Estimate | EvaluationError) -> StepReport | None:
        """Steps; or, where too few of the outputs are of use, has the step tried again.

        Outputs that are not finite, or enormous, are dropped from the first one on; where most are, or the step comes
        to nothing, x goes half of the way back.
        """
        problem: EvaluationError
        try:
            if isinstance(answer, EvaluationError):
                raise answer
            outcome = self.rule.tell(self._x, step, answer)
            if np.isfinite(outcome.loss).all() and np.isfinite(outcome.x).all():
                self.safe = self.safe if self._ask_for(self.enough) else self._x
                return self._moved(step, outcome)
            problem = EvaluationError(
                f"Expected a finite loss and a finite step at {(self._x * self.natural).tolist()}, got other "
                "numbers: outputs or their changes are too large to be squared. Start nearer, use a smaller scale, "
                "or fit a logarithm of the output."
            )
        except NonFiniteError as error:
            problem = error
            if self._tolerate():
                self.said = "outputs that are not finite, or enormous, are dropped from here on"
                return None
        except EvaluationError as error:
            problem = error
            if not self.tolerant:
                raise
        return self._retreat(step, problem)

    def _moved(self, step: int, outcome: StepOutcome) -> StepReport:
        best = int(np.argmin(outcome.loss))
        before, self.last_loss = self._x[best], float(outcome.loss[best])
        self.last_runs = outcome.num_evaluations
        self.first_loss = min(self.first_loss, float(outcome.loss.min())) if step == 0 else self.first_loss
        self.failed += outcome.num_failed
        self.past = [*self.past, self._x][-self.window :]
        self._x = np.clip(outcome.x, self.lower, self.upper)
        self._judge(outcome, best)
        error = None if outcome.known is None else np.sqrt(np.diag(outcome.known[best][0]))
        self.best, note = best, "; ".join(filter(None, [outcome.note, self.said]))
        self.at_limit = outcome.at_limit is not None and bool(outcome.at_limit[best])
        if step in self.races and len(self.active) > 1:
            note = self._drop(outcome.loss, step)
        self.said, self.back = "", 0
        return StepReport(float(outcome.loss[best]), outcome.width, before, error, self.failed, note)

    def _retreat(self, step: int, problem: EvaluationError) -> StepReport | None:
        """Takes half of the step back, in the end all of it; then makes do with fewer runs, or ends the fit."""
        if self.past and self.back < _RETREATS:
            self.back, self.said = self.back + 1, "most outputs are no use there: half of the step is taken back"
            self._x = self.safe if self.back == _RETREATS else (self._x + self.safe) / 2
        elif not self._ask_for(min(_LEAST_LEFT, self.enough)):
            if not self.past:
                raise problem
            self.stopped, self.said, self.back = "failures", "", 0
            note = "hardly an output is of any use there: the fit ends where it was before"
            return StepReport(
                self.last_loss, self.schedule.width(step), self._x[self.best], num_failed=self.failed, note=note
            )
        return None

    def _ask_for(self, share: float) -> bool:
        """Takes no fewer than this share of the runs for enough, where outputs are dropped; whether that is news."""
        if not self.tolerant or self.share == share:
            return False
        self.share = share
        self._use_tolerance()
        return True

    def _tolerate(self) -> bool:
        """From here on drops outputs that are not finite; whether that is news. Runs that raise end the fit still."""
        if self.tolerant:
            return False
        self.tolerant = True
        self._use_tolerance()
        return True

    def _use_tolerance(self) -> None:
        """Has failures treated as the state says."""
        drops: dict[str, Any] = {} if self.chosen else {"failures": "drop", "errors_raise": True}
        for smoothed, given in zip(self.smoothed, self.strategies, strict=True):
            smoothed.strategy = replace(given, min_ok=self.share, **drops) if self.tolerant else given

    def _rows(self) -> int:
        strategy = self.output.strategy
        return len(self._x) * strategy.num_rows * strategy.replicates

    def _judge(self, outcome: StepOutcome, best: int) -> None:
        """Whether there is nothing more to do."""
        moved = np.abs(np.array(self.past) - self._x)
        self.calm = self.calm + 1 if outcome.settled else 0
        if self.calm > self.window and float(moved.max()) < self.tolerance:
            self.stopped = "converged"
        if self.error_targets is None or outcome.known is None:
            return
        covariance, step = outcome.known[best]
        error = np.sqrt(np.diag(covariance))
        near = outcome.settled or outcome.width <= float(self.error_targets.min())
        small = (np.abs(step) <= SMALL_STEP * self.error_targets).all()
        self.precise = self.precise + 1 if near and small and (error <= self.error_targets).all() else 0
        if self.precise >= 2:
            self.stopped = "standard_error"

    def _drop(self, loss: Array, step: int) -> str:
        order = np.argsort(loss, kind="stable")
        keep, out = np.sort(order[: -(-len(order) // 2)]), np.sort(order[-(-len(order) // 2) :])
        self.dropped += [(int(self.active[i]), self._x[i], float(loss[i]), step) for i in out]
        said = ", ".join(str(self.active[i]) for i in out)
        self.best = int(np.flatnonzero(keep == order[0])[0])
        self._x, self.active, self.past = self._x[keep], self.active[keep], [p[keep] for p in self.past]
        self.safe = self.safe[keep]
        self.rule.keep(keep)
        return f"the starts {said} are dropped: their losses were the largest"

    def finish(self, step: int) -> Generator[Request, Any, MethodResult]:
        """The loss, the Jacobian and the simulator's own outputs where the starts have come to.

        Of the best start once more, by runs of its own: two Jacobians tell how large their noise is.
        """
        final = yield from self._last_look()
        losses = np.full(len(self._x), self.last_loss)
        if final is not None:
            losses = np.array([self.misfit.value(y, z) for y, z in zip(final.value, self._x, strict=True)])
        best = int(np.argmin(losses))
        said: list[str] = []
        runs = self._rows() if final is None else final.num_evaluations
        estimates, repeats = [], False
        if self.misfit.loss is None and final is not None:
            estimates.append(tuple(of[:, best] for of in final.of_replicates()))
            again = (yield from self._once_more(best)) if self._repeated else None
            if again is not None:
                repeats = True
                runs += again.num_evaluations
                estimates.append(again.of_replicates())
        ends = np.vstack([self._x, self.starts[self.active[best]]])
        outputs, noise = (yield Runs(ends, step, may_fail=True)).values, 0.0
        runs += len(ends)
        if measures_noise(self.output, self.misfit):  # once more, with other seeds
            other = (yield Runs(ends[best, None], step + 1, may_fail=True)).values
            noise, runs = self._noise(outputs[best], other[0]), runs + 1
        stated: Stated | None = None
        if estimates:
            values, jacobians = (torch.cat(of) for of in zip(*estimates, strict=True))
            stated = self._errors(best, values, jacobians, repeats, (outputs[best], outputs[-1]), ends[-1])
            if stated is None:
                said.append("No standard errors: the numbers of the Jacobian at the end are too large or too small.")
        worse = self._worse(float(losses[best]), outputs[[best, -1]], ends[[best, -1]])
        if worse:
            said.append(worse)
        if self.stopped == "failures":
            said.append("The fit ended early, at the last place where a fair share of the runs was of use.")
        if self.tolerant and not self.chosen:
            said.append(
                f"{self.failed} runs gave NaN, infinite or enormous outputs and were dropped. If the answer is near to "
                "them, bound the parameters to where the simulator works."
            )
        # What stands in the table is the loss of the simulator itself, as that of the whole fit is.
        plain = [self.misfit.value(torch.as_tensor(y), z) for y, z in zip(outputs[:-1], self._x, strict=True)]
        losses = np.where(np.isfinite(plain), plain, losses)
        table = list(self.dropped)
        table += [(int(a), x, float(v), step) for a, x, v in zip(self.active, self._x, losses, strict=True)]
        return MethodResult(
            *(ends[best], ends[-1], float(losses[best]), stated, outputs[best], outputs[-1]),
            num_evaluations=runs,
            num_failed=self.failed,
            at_limit=self.at_limit,
            warnings=tuple(said),
            no_better=bool(worse),
            ends=tuple(FitEnd(self.starts[i], x, loss, steps) for i, x, loss, steps in sorted(table, key=_number)),
            noise=noise,
        )

    def _errors(
        self,
        best: int,
        values: torch.Tensor,
        jacobians: torch.Tensor,
        repeats: bool,
        outputs: tuple[NDArray[Any], NDArray[Any]],
        start: Array,
    ) -> Stated | None:
        """Errors where the best start has come to, of independent estimates there; None where numerics fail.

        Args:
            repeats: whether the last estimate was made for this alone. outputs: of the simulator at the end and at the
                start. start: (d,).
        """
        try:
            with np.errstate(all="ignore"):
                return of_descent(
                    self.misfit,
                    values,
                    jacobians,
                    self._x[best],
                    self.natural,
                    self.known_noise,
                    (2.0 if repeats else 1.0) if self.newton else 0.0,
                    np.array([p[best] for p in [*self.past, self._x]]),
                    outputs,
                    last=self.schedule.last,
                    longest=self.newton * self.schedule.last,
                    start=start,
                )
        except (np.linalg.LinAlgError, ArithmeticError, ValueError):
            return None

    def _noise(self, one: NDArray[Any], other: NDArray[Any]) -> float:
        """Variance of one run over that of the target, averaged over outputs, of two runs at the same place."""
        apart = self.misfit.residuals_of(np.stack([one, other]))
        squares = (apart[0] - apart[1]) ** 2
        if self.misfit.partial:
            squares = squares[~np.isnan(squares)]
        return float(np.mean(squares) / 2) if squares.size and np.isfinite(squares).all() else 0.0

    def _last_look(self) -> Generator[Request, Any, Estimate | None]:
        """The smoothed outputs where the starts have come to, or where a fair share of the runs was of use; or none."""
        for _ in range(3):
            try:
                final: Estimate = yield self._final(self._x)
                return final
            except NonFiniteError:
                if not self._tolerate():
                    raise
            except EvaluationError:
                if not self.tolerant:
                    raise
                if np.array_equal(self._x, self.safe):
                    return None
                self._x = self.safe
        return None

    def _once_more(self, best: int) -> Generator[Request, Any, Estimate | None]:
        try:
            again: Estimate = yield self._final(self._x[best], replicate=1)
            return again
        except NonFiniteError:
            return None
        except EvaluationError:
            if not self.tolerant:
                raise
            return None

    def _worse(self, loss: float, outputs: NDArray[Any], ends: Array) -> str:
        """What to say of an end that is worse than the start, by the smoothed outputs and by the simulator's own."""
        if not self.misfit.usable(outputs).all():
            return ""
        at_end, at_start = (self.misfit.value(torch.as_tensor(y), z) for y, z in zip(outputs, ends, strict=True))
        # One run of a simulator with noise of its own is not worse for being a little worse.
        margin = _NOISY_MARGIN if may_be_noisy(self.output.simulator) else 1.0
        if not (at_end > margin * at_start and loss > margin * self.first_loss):
            return ""
        return (
            f"The fit has come to a place that is worse than the start: its loss is {at_end:.4g} there, and "
            f"{at_start:.4g} at the start. Give the method more samples (num_samples=) or a smaller scale, "
            "or take method='kriging'."
        )

    def _final(self, x: Array, replicate: int = 0) -> Smoothed:
        return Smoothed(x, self.schedule.last, self.schedule.steps, replicate)

    _KEPT = (
        *("_x", "active", "past", "dropped", "best", "stopped", "calm", "precise", "last_runs", "failed", "at_limit"),
        *("first_loss", "last_loss", "safe", "tolerant", "share", "said", "back"),
    )

    def to_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.to_dict(), **{name: getattr(self, name) for name in self._KEPT}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, saved[name])
        self._use_tolerance()
        self.rule.restore(saved["rule"])


def repeated(smoothed: SmoothedSimulator) -> int:
    """Runs of the second Jacobian at the end: none where there are replicates anyway."""
    return smoothed.strategy.num_rows if smoothed.strategy.replicates == 1 else 0


def measures_noise(smoothed: SmoothedSimulator, misfit: Misfit) -> bool:
    """Whether the best end is run twice: else the simulator's own noise would count as misfit."""
    return misfit.loss is None and may_be_noisy(smoothed.simulator)


def end_runs(smoothed: SmoothedSimulator, misfit: Misfit, starts: int) -> int:
    """Runs of the simulator itself at the end: at the end of each start, where the best one began, and once more."""
    return starts + 1 + measures_noise(smoothed, misfit)


def _number(entry: tuple[int, Array, float, int]) -> int:
    return entry[0]
