"""A fit on its way, from what it has kept to its result: a driver asks a method, evaluates, and tells it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar, final

import numpy as np

from bridge.arrays import Array
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.fitting.fingerprint import fingerprint
from bridge.fitting.methods.base import UNLIMITED, FitTask, Method, MethodResult, MethodRun, ModelRun, StepReport
from bridge.fitting.methods.requests import Answer, Request, Runs, answered, num_runs
from bridge.fitting.outcome import cut_short, make_result, plain, result_from
from bridge.fitting.problem import FitProblem
from bridge.fitting.reuse import Earlier, Source, described, earlier_rows
from bridge.interrupts import again, listening, look
from bridge.reporting.observers import Observers
from bridge.reporting.result import FitResult, FitStep
from bridge.storage.run import Run

_INTERRUPTED = "bridge: interrupted; the fit ends with the best so far. Once more to leave at once."

_log = logging.getLogger("bridge")
T = TypeVar("T")


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
    dispatcher = work.smoothed[0].dispatcher.leader
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
class FitDriver:
    """A method, driven to its end: `ask` says what is to be evaluated, `tell` takes the answer.

    One rank thinks for all, unless the method's answers are for all of them (`MethodRun.thinks_everywhere`).

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
        self.dispatcher, self.cost = work.smoothed[0].dispatcher.leader, work.smoothed[0].spent
        self.history: list[FitStep] = []
        self.stop_reason = ""
        self.cached_before, self.surrogate_before = 0, 0
        self.spent = 0  # runs, with those of the step that is under way
        self.result: FitResult | None = None
        self._asked: Request | None = None
        self._ending: Generator[Request, Any, MethodResult] | None = None

    def carried_out(self, title: str, earlier: Earlier | None) -> FitResult:
        """The whole fit, from what is kept to its result; in one process until it is interrupted. Collective."""
        alone = self.work.smoothed[0].dispatcher.size == 1
        with (
            nullcontext() if self.run is None else self.run,
            self.observers,
            listening(_INTERRUPTED) if alone else nullcontext(),
        ):
            self.start(title, earlier)
            result = self._finished() or self._to_end()
            self.observers.end(result)
        return result

    def start(self, title: str, earlier: Earlier | None) -> None:
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
            self.restore(kept)
        if earlier is not None and isinstance(self.work, ModelRun) and kept is None:
            self._begin_with(*earlier)
            # What it begins with is its own from here on, whatever becomes of those directories.
            self._checkpoint(at_once=True)
        if self.history:
            self.cached_before, self.surrogate_before = self.history[-1].num_cached, self.history[-1].num_surrogate
        for record in self.history:
            self._announce(record)

    def _finished(self) -> FitResult | None:
        """The result that is kept, of a fit that is finished."""
        if self.run is None or self.run.state is None or "result" not in self.run.state:
            return None
        result = result_from(self.run.state["result"], self.problem.space, self.history)
        if self.dispatcher.rank == 0:
            _log.info("the fit in %s is finished: its result is returned again, nothing is run", self.run.directory)
        return result

    def _to_end(self) -> FitResult:
        """Goes on until there is a reason to stop, and has the result. Collective."""
        try:
            while (request := self.ask()) is not None:
                self.tell(self.evaluated(request))
                if not self.stop_reason and self._ending is None:
                    look()
        except KeyboardInterrupt:
            if self.dispatcher.size > 1 or again():
                raise  # ranks are told at different places: this ends them all
            self._interrupted()
        assert self.result is not None
        return self.result

    def _interrupted(self) -> None:
        """Ends the fit with what is known."""
        self.stop_reason = "interrupted"
        if self.run is not None:
            self.run.set_aside()
        if self.work.ends_without_runs:
            self._ending = self.work.finish(len(self.history))
            self._go_to_end(None)
        if self.result is None:
            self.result = self._result(cut_short(self.work, self.problem, self.history), left_out=True)

    # -- what is to be evaluated, and what came of it ---------------------------------------------------------------

    def ask(self) -> Request | None:
        """What is to be evaluated next, the same until its answer is told; None once there is a result. Collective."""
        if self._asked is None and self.result is None:
            if self._over:
                self.stop_reason = self.stop_reason or "max_steps"
                self._ending = self.work.finish(len(self.history))
                self._go_to_end(None)
            else:
                self._asked = self._thought(self._request)
        return self._asked

    @property
    def is_waiting(self) -> bool:
        """Whether an answer is to be told, or the end is under way: what was before is not to be kept anew."""
        return self._asked is not None or self._ending is not None

    @property
    def is_ending(self) -> bool:
        """Whether there is no further step."""
        return self._ending is not None

    def evaluated(self, request: Request) -> Answer:
        """The answer to a request. Collective."""
        return answered(request, self.work.smoothed, self.problem, len(self.history))

    def tell(self, answer: Answer) -> None:
        """Takes the answer to what was asked. Collective."""
        request, self._asked = self._asked, None
        assert request is not None
        if self._ending is not None:
            self._go_to_end(answer)
            return
        self.spent += num_runs(request, answer, self.work.smoothed)
        report = self._told(answer)
        if report is not None:
            self._step(report)

    @property
    def _over(self) -> bool:
        """Whether there is no further step."""
        return bool(self.stop_reason) or (self.work.limit is not None and len(self.history) >= self.work.limit)

    def _request(self) -> Request:
        """What the method asks for, which may be somebody's own."""
        request = self.work.ask(len(self.history), self.spent)
        what, d = f"method {self.method.name!r}", self.problem.free.dimension
        if not isinstance(request, Request):
            raise InputError(
                f"Expected {what} to ask for bridge.Runs(points) or bridge.Smoothed(x, scale), got {request!r}."
            )
        if isinstance(request, Runs) and (np.ndim(request.points) != 2 or np.shape(request.points)[1] != d):
            raise InputError(
                f"Expected {what} to ask for points of shape (k, {d}), the free parameters in natural units, got "
                f"{np.shape(request.points)}."
            )
        return request

    def _thought(self, think: Callable[[], T]) -> T:
        """What the first rank makes of something, on every rank. Collective."""
        found: Any = None
        with np.errstate(all="ignore"):  # what overflows or is no number is looked at where it counts
            if self.work.thinks_everywhere:
                found = think()  # it makes collective calls; their errors are the same on every rank
            else:
                error: Exception | None = None
                if self.dispatcher.rank == 0:
                    try:
                        found = think()
                    except Exception as problem:
                        error = problem
                self.dispatcher.agree(error)
        thought: T = self.dispatcher.broadcast_object(found)
        return thought

    def _told(self, answer: Answer) -> StepReport | None:
        step = len(self.history)
        report, state = self._thought(lambda: (self.work.tell(step, answer), self._for_others()))
        if self.dispatcher.rank != 0 and state is not None:
            self.work.follow(state, answer)
        if not (report is None or isinstance(report, StepReport)):
            raise InputError(
                f"Expected tell of method {self.method.name!r} to return a bridge.StepReport, or None where the step "
                f"goes on, got {report!r}."
            )
        return report

    def _for_others(self) -> dict[str, Any] | None:
        return self.work.for_others() if self.dispatcher.size > 1 else None

    def _begin_with(self, parameters: Array, outputs: Array) -> None:
        """Has the method take earlier runs. Once: all of the state is handed on."""
        work = self.work
        assert isinstance(work, ModelRun)

        def begin() -> dict[str, Any] | None:
            work.begin_with(parameters, outputs)
            return work.to_dict() if self.dispatcher.size > 1 else None

        state = self._thought(begin)
        if self.dispatcher.rank != 0 and state is not None:
            work.restore(state)

    def _go_to_end(self, answer: Answer | None) -> None:
        """Goes on with the method's end: to its next request, or to the result."""
        ending = self._ending
        assert ending is not None

        def go_on() -> Request | MethodResult:
            try:
                return ending.throw(answer) if isinstance(answer, EvaluationError) else ending.send(answer)
            except StopIteration as end:
                found: MethodResult = end.value
                return found

        said = self._thought(go_on)
        if not isinstance(said, MethodResult):
            self._asked = said
            return
        if said.no_better and self.stop_reason in ("converged", "standard_error"):
            self.stop_reason = "no_better"
        self.result = self._result(said, left_out=False)
        if self.stop_reason != "interrupted":
            # Started again, it has nothing to do: not even the runs of its end.
            self._checkpoint(self.result, at_once=True)

    def _step(self, report: StepReport) -> None:
        """Records a step that is done, and finds whether it is the last one. Collective."""
        natural, error = self.problem.natural, report.standard_error
        record = FitStep(
            len(self.history),
            report.loss,
            report.scale,
            tuple((report.x * natural).tolist()),
            self.spent,
            None if error is None else tuple((error * natural).tolist()),
            num_failed=report.num_failed,
            note=report.note,
            num_cached=self._num_cached,
            num_surrogate=self._num_surrogate,
        )
        if not self.history:
            record = replace(record, note="; ".join(filter(None, [record.note, self.first_note])))
        self.history.append(self.problem.record(record))
        self._announce(self.history[-1])
        if self.work.done:
            self.stop_reason = self.work.done
        elif self.spent + self.work.next_runs > self.work.budget:
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

    def _announce(self, record: FitStep) -> None:
        self.observers.step(record)
        for function in self.told:
            function(record)

    def _checkpoint(self, result: FitResult | None = None, at_once: bool = False) -> None:
        if self.run is None:
            return
        state = self.to_dict()
        if result is not None:
            state["result"] = plain(result)
        self.run.checkpoint(len(self.history), state, at_once=at_once)

    def to_dict(self) -> dict[str, Any]:
        """The state before the request that is open, as plain data; at the end that before its first one."""
        entries = [{**vars(h), "parameters": list(h.parameters)} for h in self.history]
        return {
            "history": entries,
            "stop_reason": self.stop_reason,
            "spent": self.spent,
            "method": self.work.to_dict(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes a state in place of its own."""
        self.work.restore(saved["method"])
        self.history = [FitStep(**{**h, "parameters": tuple(h["parameters"])}) for h in saved["history"]]
        self.stop_reason, self.spent = saved["stop_reason"], saved["spent"]
        self.result, self._asked, self._ending = None, None, None

    def _result(self, end: MethodResult, left_out: bool) -> FitResult:
        return make_result(
            self.problem,
            end,
            self.history,
            method=self.method.name,
            reason=self.reason,
            stop_reason=self.stop_reason,
            wall_s=time.monotonic() - self.begin,
            num_cached=self._num_cached,
            num_surrogate=self._num_surrogate,
            left_out=left_out,
        )
