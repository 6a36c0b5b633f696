"""Runs a simulator where it is told to, once a point: without noise of ours, and without derivatives."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.dispatch import Dispatcher
from bridge.errors import InputError
from bridge.evaluation.execution import Execution, Tolerance, ordinary_torch
from bridge.evaluation.groups import agree_on_failures
from bridge.evaluation.kept_rows import KeptRows
from bridge.evaluation.layout import Layout
from bridge.evaluation.run_rows import run_rows
from bridge.evaluation.runner import Task
from bridge.simulator.protocol import Simulator
from bridge.simulator.space import ParameterSpace


@dataclass(frozen=True, eq=False)
class Outputs:
    """What came of some runs, on every rank.

    Attributes:
        values: (k, *output_shape) float64; of a failed run NaN, or the penalty.
        failed: (k,) which runs failed.
        num_cached: runs whose outputs were in the store.
    """

    values: Array
    failed: NDArray[np.bool_]
    num_cached: int


def evaluate(
    simulator: Simulator,
    points: Array,
    seeds: NDArray[np.uint64],
    *,
    execution: Execution,
    dispatcher: Dispatcher,
    tolerance: Tolerance | None = None,
) -> Outputs:
    """Runs a simulator at each point, on one rank, in a call of its own. Collective.

    Args:
        points: (k, d), in the parameters' units; rank 0's count.
        seeds: (k,) the simulator's own.
        execution: how runs are carried out. dispatcher: who carries them out.
        tolerance: which runs count as failed; by default one that fails is an error on every rank.

    Raises:
        InputError: points that are not finite, not of the simulator's dimension, or that it refuses.
        EvaluationError, OutputError: a run failed that must not, too few succeeded, or none, so that the shape of an
            output is not known; the same on every rank.
    """
    once = simulator, execution.store, execution
    with dispatcher.watched(execution.step_limit_s), ordinary_torch():
        return dispatcher.make(
            _evaluate, simulator, points, seeds, execution, dispatcher, tolerance or Tolerance(), once=once
        )


def _evaluate(
    simulator: Simulator,
    points: Array,
    seeds: NDArray[np.uint64],
    execution: Execution,
    dispatcher: Dispatcher,
    tolerance: Tolerance,
) -> Outputs:
    k, d = points.shape
    space = simulator.space or ParameterSpace.unnamed(d)
    if space.dimension != d or seeds.shape != (k,):
        raise InputError(
            f"Expected points of shape (k, {space.dimension}) ({', '.join(space.names)}) and seeds of shape (k,), got "
            f"{points.shape} and {seeds.shape}."
        )
    dispatcher.begin("evaluate", f"{k} points, d {d}, seeds {zlib.crc32(seeds.tobytes()):08x}, {tolerance}")
    points = dispatcher.broadcast(np.ascontiguousarray(points, dtype=np.float64))
    if not np.isfinite(points).all():
        raise InputError(f"Expected finite parameters, got {points.tolist()}.")
    points = points + 0.0  # no -0, which the store takes for another number
    task = Task(
        simulator,
        space,
        execution,
        dispatcher,
        tolerance,
        Layout(num_problems=k, num_samples=1),
        inputs=lambda p: points[p, None],
        seeds=lambda p: seeds[p, None],
    )
    ran = run_rows(task)
    assert isinstance(ran.rows, KeptRows)
    good, *_ = agree_on_failures(task, ran.runner.failures)
    # A sum of one row: that row, on every rank.
    sums = ran.rows.tree_sums([(p, np.ones((1, 1))) for p in range(k)])
    values = np.stack([total[0].to("cpu").numpy() for total in sums]).reshape(k, *ran.known.output_shape)
    failed = ~good[:, 0]
    if tolerance.penalty is None:
        values[failed] = np.nan
    return Outputs(values, failed, ran.known.num_cached)
