"""Every row is run, on one rank: then all ranks know who has which, what an output is, and what went wrong."""

from __future__ import annotations

import socket
import zlib
from typing import NamedTuple

import numpy as np
import torch

from bridge.dispatch import ONCE, describe_lost, owner_map
from bridge.errors import BridgeError, EvaluationError, OutputError, SetupError, StoppedError
from bridge.evaluation.kept_rows import Keeper, KeptRows
from bridge.evaluation.request import Drawn
from bridge.evaluation.rows import Known
from bridge.evaluation.runner import Runner, Task
from bridge.evaluation.streamed import Stream
from bridge.simulator.function import makes_memory


class Ran(NamedTuple):
    """All rows have been run: what this rank has of them, and what all know."""

    runner: Runner
    rows: KeptRows | Stream
    known: Known


class _Own(NamedTuple):
    """What a rank has of the outputs; like: (0, m), None where it has none."""

    rows: Keeper | Stream
    like: torch.Tensor | None = None
    output_shape: tuple[int, ...] = ()
    large: bool = False


def run_rows(task: Task, drawn: Drawn | None = None) -> Ran:
    """Runs this rank's rows, and exchanges what all have to know. Collective.

    Args:
        drawn: the problems that the rows are of, where sums may be made of them as they come; else they are kept.

    Raises:
        EvaluationError, OutputError, InputError: a run failed, or gave something unusable; the same on every rank.
        StoppedError: a signal has asked for that.
    """
    dispatcher, runner = task.dispatcher, Runner(task)
    own: _Own | None = None
    error: Exception | None = None
    try:
        own = _run_own(task, drawn, runner)
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
    known, streams = _agree(task, runner, own, error)
    assert own is not None
    if isinstance(own.rows, Stream):
        return Ran(runner, own.rows, known)
    if streams:  # on others: this rank has had no rows
        assert drawn is not None
        return Ran(runner, Stream(drawn, runner, known.like, known.large), known)
    kept = own.rows.rows(known.like, task.tolerance.filling)
    return Ran(runner, KeptRows(task.layout, kept, known.owner, known.like, dispatcher), known)


def _run_own(task: Task, drawn: Drawn | None, runner: Runner) -> _Own:
    memory_bytes, owns_outputs = task.execution.memory_bytes, makes_memory(task.simulator)
    own = _Own(Keeper(task.layout, memory_bytes, owns_outputs, runner.check_finite))
    for rows in runner.run():
        F = rows.F
        if F is not None and own.like is None:
            large = streams = False
            if drawn is not None:
                large, streams = drawn.is_large_and_streams(F.shape[1], F.element_size())
            stream = Stream(drawn, runner, F, large) if drawn is not None and streams else None
            own = _Own(stream or own.rows, F[:0].clone(), runner.output_shape, large)
        own.rows.add(rows)
        del F, rows  # before the next outputs are made: memory is for one chunk
    return own


def _agree(task: Task, runner: Runner, own: _Own | None, error: Exception | None) -> tuple[Known, bool]:
    """What ranks tell each other once all runs are done: errors, who has what, what an output is. Collective.

    One sum where all is well.

    Returns:
        what is known, and whether rows are streamed.
    """
    dispatcher, units = task.dispatcher, len(task.layout.units)
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
    known = Known(
        owner=owners.astype(np.int64) - 1,
        output_shape=output_shape,
        like=like[:0],
        large=large,
        clipped_fraction=float(told[units + 1]) / task.num_runs,
        num_cached=int(told[units + 2]),
    )
    return known, streams
