"""Runs a simulator on the rows of a rank: in which calls, in which order, what failed, and what is known already.

A *unit* is a run of rows that one rank evaluates. A simulator that computes its rows one by one may get any number of
them in a call; any other one gets calls that depend on N alone, because a batched product differs in its last bits
from the same rows in other batches.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.dispatch import Dispatcher
from bridge.errors import BridgeError, EvaluationError, EvaluationTimeoutError, InputError, NonFiniteError
from bridge.evaluation.concurrent import ConcurrentSimulator
from bridge.evaluation.execution import Execution, Failure, Tolerance, torch_of_simulators
from bridge.evaluation.layout import Layout
from bridge.evaluation.rows import CHUNK, Rows, Unit, as_rows, rows_at_once
from bridge.evaluation.workers import IsolatedSimulator
from bridge.interrupts import running
from bridge.simulator.identity import innermost
from bridge.simulator.protocol import Simulator, computes_row_by_row, simulator_name
from bridge.simulator.space import ParameterSpace

_log = logging.getLogger("bridge")
# Below, moving the output of a run costs as much as the run.
_WORTH_MOVING_S = 0.002
# Calls that a pool may be ahead of the one whose outputs are added next.
_AHEAD = 8


@dataclass
class _Call:
    problem: int
    stolen: bool
    start: int
    inputs: Array
    seeds: NDArray[np.uint64]
    shape: tuple[int, ...] = ()
    failures: dict[int, Failure] = field(default_factory=dict)
    seconds: float = 0.0
    found: int = 0


@dataclass(frozen=True, eq=False)
class Task:
    """Rows to be run, whatever is made of their outputs.

    Attributes:
        inputs: of a problem's number, where its rows are run: (num_rows, d), before any clipping.
        seeds: of a problem's number, the simulator's own: (num_rows,).
    """

    simulator: Simulator
    space: ParameterSpace
    execution: Execution
    dispatcher: Dispatcher
    tolerance: Tolerance
    layout: Layout
    inputs: Callable[[int], Array]
    seeds: Callable[[int], NDArray[np.uint64]]

    @property
    def num_runs(self) -> int:
        return self.layout.num_problems * self.layout.num_rows


class Runner:
    """The rows of a task that fall to this rank.

    Attributes:
        own: numbers of the units that this rank has evaluated.
        failures: row (over all problems) -> how it failed.
        clipped: rows that lay outside the bounds. found: rows whose outputs were in the store.
        output_shape: of one output, once one is there.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._simulator, self._space = task, task.simulator, task.space
        self._execution, self._dispatcher, self._tolerance = task.execution, task.dispatcher, task.tolerance
        self.name = simulator_name(task.simulator)
        self._row_by_row = computes_row_by_row(task.simulator)
        self.own: list[int] = []
        self.failures: dict[int, Failure] = {}
        self.clipped = self.found = 0
        self._filing = None if task.execution.store is None else task.execution.filing(task.simulator)
        self.output_shape: tuple[int, ...] = ()
        self._shape = task.simulator.output_shape
        self._rows_done = 0
        self._seconds = 0.0

    def run(self) -> Iterator[Rows]:
        """Evaluates unit after unit; outputs come in the order of the claims.

        Raises:
            EvaluationError: a run failed and failures="raise".
        """
        if self._filing is not None:
            self._filing.before_calls()
        try:
            yield from self._run()
        finally:
            if self._filing is not None:
                self._filing.after_calls()

    def _run(self) -> Iterator[Rows]:
        done = (
            self._in_turn() if not isinstance(self._simulator, ConcurrentSimulator) else self._at_once(self._simulator)
        )
        for call, F in done:
            self._rows_done, self._seconds = self._rows_done + len(call.inputs), self._seconds + call.seconds
            if not self._dispatcher.is_leader:
                continue
            self.found += call.found
            first = call.problem * self._task.layout.num_rows + call.start
            self.failures |= {first + i: failure for i, failure in call.failures.items()}
            if F is not None:
                self.output_shape = self._shape = call.shape
            yield Rows(call.problem, call.stolen, call.start, call.inputs, F)
            del F  # its memory is used for the next

    def _in_turn(self) -> Iterator[tuple[_Call, torch.Tensor | None]]:
        for call in self._planned():
            yield call, self._carry_out(call)

    def _at_once(self, pool: ConcurrentSimulator) -> Iterator[tuple[_Call, torch.Tensor | None]]:
        planned = self._planned()
        waiting: deque[tuple[_Call, Future[torch.Tensor | None]]] = deque()
        more = True
        try:
            while True:
                busy = [future for _, future in waiting if not future.done()]
                while more and len(busy) < pool.workers and len(waiting) < _AHEAD * pool.workers:
                    call = next(planned, None)
                    if call is None:
                        more = False
                        break
                    busy.append(pool.submit(self._carry_out, call))
                    waiting.append((call, busy[-1]))
                if not waiting:
                    return
                if waiting[0][1].done():
                    call, future = waiting.popleft()
                    yield call, future.result()
                else:
                    with running:
                        wait(busy, return_when=FIRST_COMPLETED)
        except BaseException as error:
            if not isinstance(error, Exception):  # an interrupt must not wait for what is running
                pool.stop([future for _, future in waiting])
            raise
        finally:
            wait([future for _, future in waiting])

    @property
    def _cheap(self) -> bool:
        """Whether runs take so little time, as far as is known, that moving one costs as much."""
        return self._rows_done > 0 and self._seconds < _WORTH_MOVING_S * self._rows_done

    def _steal(self) -> bool:
        schedule = self._execution.schedule
        return schedule == "dynamic" or (schedule == "auto" and not self._cheap)

    def _planned(self) -> Iterator[_Call]:
        rows: dict[int, Array] = {}
        for unit, stop, stolen in self._claimed():
            if unit.problem not in rows:
                rows = {unit.problem: self._task.inputs(unit.problem)}
            end = unit.start
            while end < stop:
                start, end = end, min(end + self._rows_of_call(), stop)
                inputs, changed = self._space.admit(rows[unit.problem][start:end])
                if self._dispatcher.is_leader:
                    self.clipped += int(changed.sum())
                seeds = self._task.seeds(unit.problem)[start:end]
                yield _Call(unit.problem, stolen, start, inputs, seeds)

    def _claimed(self) -> Iterator[tuple[Unit, int, bool]]:
        """What to evaluate next: (first unit, last row + 1, whether it is another rank's).

        A simulator that computes row by row gets several small units at once where its runs are cheap: then a call
        costs as much as a run. Not where rows go singly: to be found again, or because one that fails is no reason to
        end.
        """
        execution = self._execution
        singly = self._tolerance.tolerates_errors or execution.retries > 0 or execution.store is not None
        gathers = self._row_by_row and execution.schedule != "dynamic" and not singly
        first: Unit | None = None
        stop = 0
        for number, stolen in self._dispatcher.claims(len(self._task.layout.units), self._steal):
            unit = self._task.layout.units[number]
            if self._dispatcher.is_leader:
                self.own.append(number)
            if first is not None and (stolen or unit.problem != first.problem or unit.start != stop):
                yield first, stop, False
                first = None
            first, stop = first or unit, unit.stop
            if stolen or not (gathers and self._cheap) or stop % CHUNK == 0:
                yield first, stop, stolen
                first = None
        if first is not None:
            yield first, stop, False

    def _rows_of_call(self) -> int:
        # What the simulator says of its outputs is the same on every rank; what has been seen is not.
        shape = self._shape if self._row_by_row else self._simulator.output_shape
        return CHUNK if shape is None else rows_at_once(math.prod(shape))

    def _carry_out(self, call: _Call) -> torch.Tensor | None:
        """The outputs of a call; None where every row failed. May run in a thread of a pool."""
        begin = time.perf_counter()
        k = len(call.inputs)
        # To repeat a call for the sake of one row that failed may mean to wait for it again.
        isolated = isinstance(self._simulator, IsolatedSimulator | ConcurrentSimulator)
        singly = (
            self._row_by_row
            and k > 1
            and (self._execution.store is not None or (self._tolerance.tolerates_errors and isolated))
        )
        F: torch.Tensor | None = None
        try:
            if not singly:
                F = self._obtain(call, slice(0, k))
        except _RunFailedError as failure:
            if k == 1:
                call.failures[0] = failure.failure
            singly = k > 1
        if singly:
            parts: list[torch.Tensor | None] = []
            for i in range(k):
                try:
                    # The simulator may hand out the same memory every time.
                    parts.append(self._obtain(call, slice(i, i + 1)).clone())
                except _RunFailedError as failure:
                    call.failures[i] = failure.failure
                    parts.append(None)
            good = [part for part in parts if part is not None]
            if good:
                F = torch.cat([torch.full_like(good[0], torch.nan) if x is None else x for x in parts])
        call.seconds = time.perf_counter() - begin
        return F

    def _obtain(self, call: _Call, rows: slice) -> torch.Tensor:
        """Some rows of a call, from the store or the simulator: (k, m)."""
        inputs, seeds = call.inputs[rows], call.seeds[rows]
        store = self._execution.store
        k, key = len(inputs), None
        if store is not None and self._filing is not None:
            key = store.key(self._execution.role + self._filing.name, innermost(self._simulator, inputs)[1], seeds)
            known = store.get(key) if self._dispatcher.is_leader else None
            if known is not None and not self._is_whole(known.reshape(k, -1)):
                known = None  # a run where numbers may be lacking, and none here
            if self._dispatcher.group is not None:
                # What the group's first rank has, none needs to evaluate; which file it is in is its own affair.
                if self._dispatcher.group.bcast(known is not None):
                    known = known if known is not None else torch.full((k, 1), torch.nan)
                else:
                    known = None
            if known is not None:
                call.found += k
                F, call.shape = as_rows(known, k, None, self.name)
                return F
        begin = time.perf_counter()
        outputs = self._attempt(inputs, seeds)
        F, call.shape = as_rows(outputs, k, self._shape, self.name)
        # A run that failed is not finished: what made it fail, a full disk or a bad node, may be gone the next time.
        if store is not None and key is not None and self._dispatcher.is_leader and self._is_whole(F):
            store.put(key, F.reshape(k, *call.shape), time.perf_counter() - begin)
        return F

    def _is_whole(self, F: torch.Tensor) -> bool:
        """Whether outputs (k, m) are worth keeping: finite, but for numbers that may be lacking."""
        if bool(torch.isfinite(F).all()):
            return True
        if self._tolerance.missing == "raise":
            return False
        lacking = torch.isnan(F)
        return bool((lacking | torch.isfinite(F)).all()) and not bool(lacking.all(dim=1).any())

    def _attempt(self, inputs: Array, seeds: NDArray[np.uint64]) -> object:
        for left in range(self._execution.retries, -1, -1):
            outputs: object = None
            error: Exception | None = None
            try:
                # Copies: a simulator that writes into its arguments must not change the design.
                inputs_, seeds_ = np.array(inputs, order="C"), seeds.copy()
                with running, torch_of_simulators():
                    outputs = self._simulator(inputs_, seeds_)
            except SystemExit as leaving:
                # Meant for a program of its own; here it would take a rank away from the others.
                error = EvaluationError(f"Simulator {self.name!r} called sys.exit({leaving.code!r}).")
            except Exception as failure:
                error = failure
            error = self._dispatcher.agree_in_group(error)
            if error is None:
                return outputs
            if isinstance(error, InputError):
                raise error
            if left == 0:
                if not self._tolerance.tolerates_errors:
                    raise error
                raise _RunFailedError(error) from error
            _log.info("simulator %r failed and is tried again: %s", self.name, error)
        raise AssertionError("unreachable")

    # -- numbers that are none --------------------------------------------------------------------------------------

    def check_finite_sum(self, total: torch.Tensor, out: Rows) -> None:
        """Refuses outputs that are not finite; a weighted sum of them shows every NaN, a weight of zero included."""
        if not math.isfinite(total.sum().item()):
            self._refuse(out)

    def check_finite(self, out: Rows) -> None:
        """Refuses outputs that are not finite, or marks their rows as failed and fills them in."""
        # One sum finds every NaN and infinity at a fraction of the cost of looking at each number.
        assert out.F is not None
        if not abs(out.F.sum().item()) < self._tolerance.largest:
            self._refuse(out)

    def _refuse(self, out: Rows) -> None:
        F = out.F
        assert F is not None
        good = F.abs() < self._tolerance.largest
        if self._tolerance.missing == "ignore":
            lacking = torch.isnan(F)
            good = (good | lacking) & ~lacking.all(dim=1, keepdim=True)
        bad = ~good.all(dim=1)
        if not bool(bad.any()):
            return  # finite numbers whose sum overflows, or numbers that are lacking
        row = int(torch.nonzero(bad)[0])
        if self._tolerance.failures != "raise":
            first = out.problem * self._task.layout.num_rows + out.start
            for i in torch.nonzero(bad).flatten().tolist():
                why = f"{self._name_row(out, i)}: NaN or infinite"
                nan = torch.isnan(F[i])
                if self._tolerance.missing == "raise" and bool(nan.any()) and not bool(nan.all()):
                    why += " (bridge.Drop(missing='ignore') takes single NaN for numbers that an output lacks)"
                self.failures.setdefault(first + i, Failure("non-finite", why))
            # A weight of zero does not undo a NaN.
            F[bad] = self._tolerance.filling
            return
        largest = self._tolerance.largest
        what = "NaN or infinite" if math.isinf(largest) else f"NaN, infinite or beyond {largest:g}"
        raise NonFiniteError(
            f"Expected finite outputs from simulator {self.name!r}, got "
            f"{int((~(F[row].abs() < largest)).sum())} of {F.shape[1]} numbers {what} in row {out.start + row} "
            f"({self._name_row(out, row)}) on {socket.gethostname()}. Bound the parameters to where the simulator "
            'works; if NaN are numbers that it did not get to, give failures=bridge.Raise(missing="ignore"); if '
            'failing has nothing to do with the parameters, drop such rows with failures="drop".'
        )

    def _name_row(self, out: Rows, row: int) -> str:
        return ", ".join(f"{n} = {v:.6g}" for n, v in self._space.mapping(out.inputs[row]).items())


class _RunFailedError(Exception):
    """A run that counts as data."""

    def __init__(self, error: Exception) -> None:
        status = "timeout" if isinstance(error, EvaluationTimeoutError) else "error"
        said = str(error) if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}"
        super().__init__(said)
        self.failure = Failure(status, said)
