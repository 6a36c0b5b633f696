"""A fit on its way, from what it has kept to its result: it drives a method, step by step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.errors import BridgeError
from bridge.fitting.fingerprint import fingerprint
from bridge.fitting.goodness import Goodness, goodness_of, unexplained
from bridge.fitting.identifiability import identifiability_warnings
from bridge.fitting.methods.base import UNLIMITED, FitTask, Method, MethodResult, MethodRun, ModelRun
from bridge.fitting.normal import without
from bridge.fitting.problem import FitProblem
from bridge.fitting.reuse import Earlier, Source, described, earlier_rows
from bridge.interrupts import again, listening, look
from bridge.reporting.observers import Observers
from bridge.reporting.result import FitEnd, FitResult, FitStep
from bridge.simulator.space import ParameterSpace
from bridge.storage.run import Run

_INTERRUPTED = "bridge: interrupted; the fit ends with the best so far. Once more to leave at once."
_LEFT_OUT = (
    "The fit was interrupted: what it would run at its end, for errors and outputs, is left out, and the loss is that "
    "of the smoothed output. With the same run= it goes on where it was."
)

_log = logging.getLogger("bridge")


def kept_run(task: FitTask, method: Method, work: MethodRun, run: Run | None, reuse: Sequence[Source]) -> Run | None:
    """The run on disk of a fit, if it has one, begun: its evaluations are kept there from here on. Collective."""
    if run is None:
        return None
    run.begin(
        {**fingerprint(task, method, work), "reuse": list(map(described, reuse))},
        # Few runs, each of use to other fits: not to be thrown away.
        keep_evaluations=method.keeps_runs,
        journal_above_s=0.0 if method.keeps_runs else 0.01,
        comm=task.place.ranks.comm,
    )
    for smoothed in work.smoothed:
        if smoothed.execution.store is None:
            smoothed.execution = replace(smoothed.execution, store=run.store)
    return run


def earlier_runs(reuse: Sequence[Source], problem: FitProblem, work: MethodRun, run: Run | None) -> Earlier | None:
    """Evaluations of earlier fits; nothing where this one has begun already. Collective."""
    if run is not None or reuse:
        _see_simulators(work)
    if not reuse or not isinstance(work, ModelRun):
        return None
    dispatcher = work.smoothed[0].dispatcher.thinking
    begun = run is not None and run.resume and any(run.directory.glob("checkpoint-*.npz"))
    if dispatcher.broadcast_object(begun):
        return None
    found, refused = None, None
    if dispatcher.rank == 0:
        try:
            found = earlier_rows(
                reuse,
                problem.simulator,
                problem.free,
                tuple(problem.misfit.target.shape),
                work.loss_of_rows,
                work.most_rows,
                name=work.smoothed[0].execution.filing(work.smoothed[0].simulator).name,
                but=None if run is None else run.directory,
            )
        except BridgeError as refusal:
            refused = refusal
    dispatcher.agree(refused)
    return dispatcher.broadcast_object(found)


def _see_simulators(work: MethodRun) -> None:
    """Files all simulators once, before there is a run: one that cannot be is refused, and leaves nothing behind."""
    for smoothed in work.smoothed:
        smoothed.execution.filing(smoothed.simulator)
        if smoothed.surrogate is not None:
            smoothed.execution.filing(smoothed.surrogate.simulator)


@final
class FitSession:
    """A method, driven to its end.

    Args:
        problem: what is fitted. method: by which. reason: why that one, in words.
        work: the method at work. begin: when the fit began, of `time.monotonic`.
        run: where it is kept, None for nowhere. observers: who is told of each step. told: functions that are, on every
            rank.
        announced: whether the first step says which method it is, and why.
        max_seconds: stops after the step in which so much time has passed.
    """

    def __init__(
        self,
        problem: FitProblem,
        method: Method,
        reason: str,
        work: MethodRun,
        *,
        begin: float,
        run: Run | None = None,
        observers: Observers,
        told: Sequence[Callable[[FitStep], Any]] = (),
        announced: bool = False,
        max_seconds: float | None = None,
    ) -> None:
        self.problem, self.method, self.reason, self.work, self.begin = problem, method, reason, work, begin
        self.run, self.observers, self.told = run, observers, tuple(told)
        self.max_seconds = max_seconds
        chosen_so = f"{method.name}: {reason}" if announced else ""
        self.first_note = "; ".join(filter(None, [chosen_so, problem.scales_in_words]))
        self.dispatcher, self.cost = work.smoothed[0].dispatcher.thinking, work.smoothed[0].spent
        self.history: list[FitStep] = []
        self.stop_reason = ""
        self.cached_before, self.surrogate_before = 0, 0

    def carried_out(self, title: str, earlier: Earlier | None) -> FitResult:
        """The whole fit, from what is kept to its result; in one process until it is interrupted. Collective."""
        alone = self.work.smoothed[0].dispatcher.size == 1
        with (
            nullcontext() if self.run is None else self.run,
            self.observers,
            listening(_INTERRUPTED) if alone else nullcontext(),
        ):
            self._start(title, earlier)
            result = self._finished() or self._to_end()
            self.observers.end(result)
        return result

    def _start(self, title: str, earlier: Earlier | None) -> None:
        """Tells observers, goes on from what is kept, and takes in earlier runs. Collective."""
        refusal: BridgeError | None = None
        try:
            max_runs = self.work.budget if self.work.budget < UNLIMITED else None
            self.observers.start(self.problem.space, max_steps=self.work.limit, max_runs=max_runs, title=title)
        except BridgeError as refused:  # on rank 0 alone
            refusal = refused
        self.dispatcher.agree(refusal)
        kept = None if self.run is None else self.run.state
        if kept is not None:
            self.work.restore(kept["method"])
            self.history = [FitStep(**{**h, "parameters": tuple(h["parameters"])}) for h in kept["history"]]
            self.stop_reason = kept["stop_reason"]
        if earlier is not None and isinstance(self.work, ModelRun) and kept is None:
            self.work.begin_with(*earlier)
            # What it begins with is its own from here on, whatever becomes of those directories.
            self._checkpoint(at_once=True)
        if self.history:
            self.cached_before, self.surrogate_before = self.history[-1].num_cached, self.history[-1].num_surrogate
        for record in self.history:
            self._tell(record)

    def _finished(self) -> FitResult | None:
        """The result that is kept, of a fit that is finished."""
        if self.run is None or self.run.state is None or "result" not in self.run.state:
            return None
        result = _result_from(self.run.state["result"], self.problem.space, self.history)
        if self.dispatcher.rank == 0:
            _log.info("the fit in %s is finished: its result is returned again, nothing is run", self.run.directory)
        return result

    def _to_end(self) -> FitResult:
        """Goes on until there is a reason to stop, and has the result. Collective."""
        end: MethodResult | None = None
        try:
            while not self.stop_reason and (self.work.limit is None or len(self.history) < self.work.limit):
                self.advance()
                if not self.stop_reason:
                    look()
            self.stop_reason = self.stop_reason or "max_steps"
            end = self.work.finish(len(self.history))
        except KeyboardInterrupt:
            if self.dispatcher.size > 1 or again():
                raise  # ranks are told at different places: this ends them all
            self.stop_reason = "interrupted"
            if self.run is not None:
                self.run.set_aside()
            if self.work.ends_without_runs:
                end = self.work.finish(len(self.history))
        if end is not None and end.no_better and self.stop_reason in ("converged", "standard_error"):
            self.stop_reason = "no_better"
        result = self._result(_cut_short(self.work, self.problem, self.history) if end is None else end, end is None)
        if self.stop_reason != "interrupted":
            # Started again, it has nothing to do: not even the runs of its end.
            self._checkpoint(result, at_once=True)
        return result

    def advance(self) -> None:
        """One step, and whether it is the last one. Collective."""
        spent = self.history[-1].num_evaluations if self.history else 0
        record = self.problem.record(self.work.advance(len(self.history), spent))
        record = replace(record, num_cached=self._num_cached, num_surrogate=self._num_surrogate)
        if not self.history:
            record = replace(record, note="; ".join(filter(None, [record.note, self.first_note])))
        self.history.append(record)
        self._tell(record)
        if self.work.done:
            self.stop_reason = self.work.done
        elif record.num_evaluations + self.work.next_runs > self.work.budget:
            self.stop_reason = "max_runs"
        elif self.max_seconds is not None and self.dispatcher.first(time.monotonic() - self.begin > self.max_seconds):
            self.stop_reason = "max_time"
        self._checkpoint()

    @property
    def _num_cached(self) -> int:
        return self.cached_before + self.cost.cached

    @property
    def _num_surrogate(self) -> int:
        return self.surrogate_before + self.cost.surrogate

    def _tell(self, record: FitStep) -> None:
        self.observers.step(record)
        for function in self.told:
            function(record)

    def _checkpoint(self, result: FitResult | None = None, at_once: bool = False) -> None:
        if self.run is None:
            return
        entries = [{**vars(h), "parameters": list(h.parameters)} for h in self.history]
        state = {"history": entries, "stop_reason": self.stop_reason, "method": self.work.to_dict()}
        if result is not None:
            state["result"] = _plain(result)
        self.run.checkpoint(len(self.history), state, at_once=at_once)

    def _result(self, end: MethodResult, left_out: bool) -> FitResult:
        """What is returned. left_out: whether the method could not come to its end."""
        problem, history, stated = self.problem, self.history, end.stated
        good, misses = _goodness(problem, end)
        at_bound = (end.x <= problem.lower) | (end.x >= problem.upper)
        covariance = None if stated is None else problem.covariance(without(stated.covariance, at_bound))
        return FitResult(
            space=problem.space,
            parameters=problem.whole(end.x),
            start=problem.whole(end.start),
            standard_error=_last_errors(history) if left_out else _deviations(covariance),
            loss=good.loss,
            stop_reason=self.stop_reason,
            history=tuple(history),
            num_evaluations=(history[-1].num_evaluations if history else 0) + end.num_evaluations,
            wall_s=time.monotonic() - self.begin,
            output=end.output,
            start_output=end.start_output,
            covariance=covariance,
            warnings=(
                *((_LEFT_OUT,) * left_out),
                *end.warnings,
                *_unfinished(end, self.stop_reason),
                *misses,
                *identifiability_warnings(stated, problem.free, end.x * problem.natural, at_bound),
            ),
            num_reused=end.num_reused,
            num_cached=self._num_cached,
            num_surrogate=self._num_surrogate,
            num_failed=end.num_failed,
            method=self.method.name,
            method_reason=self.reason,
            ends=_ends(problem, end) if len(problem.starts) > 1 else (),
            interval_dof=np.inf if stated is None else stated.dof,
            chi_square=good.chi_square,
            dof=good.dof,
            p_value=good.p_value,
            loss_share=good.share,
        )


def _goodness(problem: FitProblem, end: MethodResult) -> tuple[Goodness, tuple[str, ...]]:
    """How well the target is explained at the end, and what to say of it."""
    misfit = problem.misfit
    # A loss of one's own, of noisy runs, is what the method makes of many; of a run that failed nothing else is known.
    if misfit.loss is not None or not misfit.usable(end.output[None]).all():
        return Goodness(end.loss), ()
    good = goodness_of(problem.misfit, end.output, end.x, problem.known_noise, end.noise)
    target = misfit.target.numpy()
    if misfit.masked is not None:
        target = np.where(misfit.masked.numpy(), np.nan, target)
    return good, unexplained(good, end.output - target, end.start_output - target)


def _cut_short(work: MethodRun, problem: FitProblem, history: Sequence[FitStep]) -> MethodResult:
    """The end of a fit that was interrupted: what is known, without another run.

    The parameters are those of the least loss that was seen: of where the last step led none is known.
    """
    unknown = np.full(tuple(problem.misfit.target.shape), np.nan)
    x, loss = work.x, np.nan
    if seen := [record for record in history if np.isfinite(record.loss)]:
        best = min(seen, key=lambda record: record.loss)
        at = [problem.space.index(name) for name in problem.free.names]
        x, loss = np.array(best.parameters)[at] / problem.natural, best.loss
    failed = history[-1].num_failed if history else 0
    return MethodResult(x, problem.free_starts[0], loss, None, unknown, unknown, num_evaluations=0, num_failed=failed)


def _ends(problem: FitProblem, end: MethodResult) -> tuple[FitEnd, ...]:
    """Where all starts have come to, of all parameters in their units."""
    return tuple(FitEnd(problem.whole(e.start), problem.whole(e.parameters), e.loss, e.steps) for e in end.ends)


def _deviations(covariance: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    return None if covariance is None else np.sqrt(np.diag(covariance))


def _last_errors(history: Sequence[FitStep]) -> NDArray[np.float64] | None:
    known = history[-1].standard_error if history else None
    return None if known is None else np.array(known)


def _plain(result: FitResult) -> dict[str, Any]:
    """What a run keeps of its result: all but what it keeps anyway."""
    kept = {name: value for name, value in vars(result).items() if name not in ("space", "history", "ends")}
    return {**kept, "ends": [dict(vars(end)) for end in result.ends]}


def _result_from(kept: Mapping[str, Any], space: ParameterSpace, history: Sequence[FitStep]) -> FitResult:
    ends = tuple(FitEnd(**end) for end in kept["ends"])
    return FitResult(**{**kept, "ends": ends, "space": space, "history": tuple(history)})


def _unfinished(end: MethodResult, stop_reason: str) -> tuple[str, ...]:
    if not end.at_limit or stop_reason not in ("max_steps", "max_runs"):
        return ()
    return (
        f"The last step was still as long as it may be when {stop_reason} ended the fit, two scales: the target is "
        "further away, or the noise of a step is as large as that. Give the method more steps (steps=), a larger "
        "scale (scale=) or more samples (num_samples=), or allow more runs (stop=bridge.Stop(runs=...)).",
    )
