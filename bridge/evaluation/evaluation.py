"""Evaluates the rows of designs and adds them up by weights: here alone a rank learns of what others have run.

The outputs stay on the rank that computed them. Two ways, chosen from N, d, m and settings, never from the ranks:

* kept: each rank keeps its rows of F. The forward pass reduces m numbers; a VJP exchanges the N scalars <v, F_i>.
* streamed: rows are added to F^T [a, W] as they come and dropped; the sums, (1 + d) m numbers, are reduced once.
"""

from __future__ import annotations

import socket
import zlib
from typing import NamedTuple

import numpy as np
import torch

from bridge.dispatch import ONCE, describe_lost, owner_map
from bridge.errors import BridgeError, EvaluationError, OutputError, SetupError, StoppedError
from bridge.evaluation.kept import Kept, KeptSums, sum_kept
from bridge.evaluation.kept_rows import Keeper
from bridge.evaluation.linear_forms import Known
from bridge.evaluation.request import Drawn, Request, draw
from bridge.evaluation.runner import Runner
from bridge.evaluation.streamed import Stream, Streamed, StreamedSums
from bridge.simulator.function import makes_memory


def evaluate_problems(request: Request) -> Kept | Streamed:
    """Evaluates all rows of all problems, each on one rank. Collective.

    Raises:
        InputError: what is asked for is not finite, or the simulator refuses it.
        EvaluationError, OutputError: a run failed, or gave something unusable; the same on every rank.
    """
    drawn = draw(request)
    ran = _run(drawn)
    sums = _collect(ran)
    return Streamed(drawn, ran.known, sums) if isinstance(sums, StreamedSums) else Kept(drawn, ran.known, sums)


class _Ran(NamedTuple):
    """All rows have been run. rows: this rank's, as far as it has any."""

    drawn: Drawn
    runner: Runner
    rows: Keeper | Stream
    known: Known


class _Own(NamedTuple):
    """What a rank has of the outputs; like: (0, m), None where it has none."""

    rows: Keeper | Stream
    like: torch.Tensor | None = None
    output_shape: tuple[int, ...] = ()
    large: bool = False


def _run(drawn: Drawn) -> _Ran:
    """Runs this rank's rows; then all ranks know who has what, or all have the same error. Collective."""
    request, dispatcher = drawn.request, drawn.request.dispatcher
    runner = Runner(
        request.simulator,
        request.space,
        request.strategy,
        request.execution,
        dispatcher,
        drawn.problems,
        drawn.layout.units,
    )
    own: _Own | None = None
    error: Exception | None = None
    try:
        own = _run_own(drawn, runner)
        if dispatcher.stopping:
            error = StoppedError("A signal has asked the run to stop before all of its evaluations were done.")
    except BridgeError as failure:
        error = failure
    except Exception as failure:
        error = EvaluationError(
            f"Simulator {runner.name!r} raised {type(failure).__name__}: {failure} on {socket.gethostname()}."
        )
        error.__cause__ = failure
    if error is not None:
        dispatcher.give_up()
    known, streams = _agree(drawn, runner, own, error)
    assert own is not None
    rows = own.rows
    if streams and own.like is None:
        rows = Stream(drawn, runner, known.like, known.large)
    return _Ran(drawn, runner, rows, known)


def _run_own(drawn: Drawn, runner: Runner) -> _Own:
    request = drawn.request
    own = _Own(
        Keeper(drawn.layout, request.execution.memory_bytes, makes_memory(request.simulator), runner.check_finite)
    )
    for rows in runner.run():
        F = rows.F
        if F is not None and own.like is None:
            large, streams = _is_large_and_streams(drawn, F)
            collector = Stream(drawn, runner, F, large) if streams else own.rows
            own = _Own(collector, F[:0].clone(), runner.output_shape, large)
        own.rows.add(rows)
        del F, rows  # before the next outputs are made: memory is for one chunk
    return own


def _is_large_and_streams(drawn: Drawn, F: torch.Tensor) -> tuple[bool, bool]:
    """Decides, once the size of an output is known: (whether leaves have several units, whether to stream).

    The first must not depend on which derivatives are wanted, or the value's last bits would.
    """
    strategy, rows = drawn.request.strategy, drawn.request.strategy.num_rows
    if strategy.weights_need_outputs:
        return False, False
    size = len(drawn.problems) * rows * F.shape[1] * F.element_size()
    large = size > drawn.request.execution.keep_bytes and 1 + drawn.dimension < rows
    return large, not drawn.has_derivatives or (large and drawn.num_columns < rows)


def _agree(drawn: Drawn, runner: Runner, own: _Own | None, error: Exception | None) -> tuple[Known, bool]:
    """What ranks tell each other once all runs are done: errors, who has what, what an output is. Collective.

    One sum where all is well.

    Returns:
        what is known, and whether rows are streamed.
    """
    dispatcher, units = drawn.request.dispatcher, len(drawn.layout.units)
    rank, like = dispatcher.rank, None if own is None else own.like
    mine = None
    if own is not None and like is not None:
        # What is kept may be float32 in one row and float64 in the next.
        streams = isinstance(own.rows, Stream)
        mine = (like.shape[1], str(like.dtype) if streams else "", own.output_shape, streams, own.large)
    told = np.zeros(units + 3 + dispatcher.size)
    told[:units] = owner_map(units, runner.own, rank)
    told[units : units + 3] = error is not None, runner.clipped, runner.found
    told[units + 3 + rank] = 0 if mine is None else 1 + zlib.crc32(repr(mine).encode())
    told = dispatcher.scatter_add(told)
    if told[units]:
        dispatcher.agree(error)
    times, owners = np.divmod(told[:units], ONCE)
    if (times != 1).any():  # nobody has failed or stopped, so that is no simulator's fault
        missing, twice = int((times == 0).sum()), int((times > 1).sum())
        raise SetupError(describe_lost(units, missing, twice, dispatcher.library))
    layout = mine
    seen = told[units + 3 :]
    if layout is None or (seen != seen[0]).any():
        # A rank without rows learns from the first that has some what an output looks like.
        layouts = [layout for layout in dispatcher.each(mine) if layout is not None]
        if not layouts:
            why = dispatcher.first(next((f.why for f in runner.failures.values()), None))
            raise EvaluationError(f"Expected an output from simulator {runner.name!r}, got failures only ({why}).")
        layout, other = layouts[0], next((x for x in layouts if x != layouts[0]), None)
        if other is not None:
            raise OutputError(
                f"Expected outputs of shape {layout[2]} and {layout[1]} as on the first rank, got {other[2]} and "
                f"{other[1]} on another. Ranks must run the same simulator."
            )
    num_outputs, dtype, output_shape, streams, large = layout
    if like is None:
        like = torch.empty((0, num_outputs), dtype=getattr(torch, dtype.removeprefix("torch.") or "float64"))
    num_rows = len(drawn.problems) * drawn.request.strategy.num_rows
    known = Known(
        owner=owners.astype(np.int64) - 1,
        output_shape=output_shape,
        like=like[:0],
        large=large,
        clipped_fraction=float(told[units + 1]) / num_rows,
        num_cached=int(told[units + 2]),
    )
    return known, streams


def _collect(ran: _Ran) -> KeptSums | StreamedSums:
    """The sums over all ranks, by trees of one shape. Collective."""
    if isinstance(ran.rows, Stream):
        return ran.rows.finish(ran.known.owner)
    return sum_kept(ran.drawn, ran.known, ran.rows, ran.runner)
