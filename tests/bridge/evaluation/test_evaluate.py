"""Runs without noise of ours: `bridge.evaluation.evaluate.evaluate`."""

from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.dispatch import get_dispatcher
from bridge.errors import EvaluationError, InputError, NonFiniteError
from bridge.estimators.design import single_seeds
from bridge.evaluation.evaluate import Outputs, evaluate
from bridge.evaluation.execution import Execution, Tolerance
from bridge.simulator.function import as_simulator

POINTS = np.array([[1.0, -2.0], [0.5, -0.0], [3.0, 0.25]])


def run(f, points=POINTS, tolerance=None, step=0, execution=None, **settings) -> Outputs:
    return evaluate(
        as_simulator(f, **settings),
        points,
        single_seeds(7, step, len(points)),
        execution=execution or Execution(),
        dispatcher=get_dispatcher(),
        tolerance=tolerance,
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_outputs_are_the_simulators_own_in_the_order_of_the_points(dtype):
    outputs = run(lambda x: (10 * np.outer(x, x)).astype(dtype))
    expected = np.stack([(10 * np.outer(x, x)).astype(dtype) for x in POINTS])
    assert outputs.values.dtype == np.float64
    np.testing.assert_array_equal(outputs.values, expected)
    assert not outputs.failed.any()


def test_a_run_has_the_seed_that_a_smoothing_has_there():
    def f(x, seed):
        return float(seed % 1_000_003)

    plain = run(f, step=5, seeded=True).values
    smoothed = bridge.smooth(as_simulator(f, seeded=True), seed=7, num_samples=4, scale=0.1, covariate="none")
    assert plain.tolist() == smoothed(torch.as_tensor(POINTS), step=5).tolist()


def test_a_call_has_one_row():
    rows = []

    def f(inputs):
        rows.append(len(inputs))
        return inputs.sum(axis=1)

    run(f, vectorized=True, repeatable=True)
    assert rows == [1, 1, 1]


def fails(x):
    if x[0] > 2:
        raise RuntimeError("too far")
    return np.array([x[0], np.inf if x[0] < 0.75 else 1.0])


def test_failed_runs_are_told_and_have_no_numbers():
    outputs = run(fails, tolerance=Tolerance("drop"))
    assert outputs.failed.tolist() == [False, True, True]
    np.testing.assert_array_equal(outputs.values, [[1.0, 1.0], [np.nan] * 2, [np.nan] * 2])


def test_a_penalty_stands_in_the_place_of_failed_outputs():
    outputs = run(fails, tolerance=Tolerance("penalty", penalty=-5.0))
    np.testing.assert_array_equal(outputs.values, [[1.0, 1.0], [-5.0] * 2, [-5.0] * 2])
    assert outputs.failed.tolist() == [False, True, True]


def test_numbers_that_an_output_lacks_are_no_failure_where_that_is_said():
    def f(x):
        return np.array([x[0], np.nan])

    outputs = run(f, tolerance=Tolerance("drop", missing="ignore"))
    assert not outputs.failed.any()
    np.testing.assert_array_equal(outputs.values[:, 0], POINTS[:, 0])
    assert np.isnan(outputs.values[:, 1]).all()


def test_what_is_not_tolerated_is_an_error():
    with pytest.raises(NonFiniteError, match="finite outputs"):
        run(fails, POINTS[:2])
    with pytest.raises(EvaluationError, match="too far"):
        run(fails, tolerance=Tolerance("drop", errors_raise=True))
    with pytest.raises(EvaluationError, match="at least 50% of the runs"):
        run(fails, tolerance=Tolerance("drop", min_ok=0.5))
    with pytest.raises(EvaluationError, match="failures only"):
        run(fails, POINTS[2:], tolerance=Tolerance("drop"))
    with pytest.raises(InputError, match="finite parameters"):
        run(fails, np.array([[np.nan, 0.0]]))
    with pytest.raises(InputError, match=r"Expected points of shape \(k, 1\)"):
        run(fails, names=["a"])


def test_a_store_has_a_run_once(tmp_path: Path):
    calls = []

    def f(x):
        calls.append(1)
        return x.sum()

    execution = Execution(store=bridge.Store(tmp_path, above_s=0.0))
    simulator = as_simulator(f, identity="sum", repeatable=True)
    first, second = (run(simulator, execution=execution) for _ in range(2))
    assert (len(calls), first.num_cached, second.num_cached) == (3, 0, 3)
    np.testing.assert_array_equal(first.values, second.values)


RANKS = """
import numpy as np
from bridge.dispatch import get_dispatcher
from bridge.estimators.design import single_seeds
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.execution import Execution, Tolerance
from bridge.simulator.function import as_simulator

def f(x, seed):
    if x[0] == 3:
        raise RuntimeError("no")
    return x[0] + np.arange(3) / (1 + seed % 11)

dispatcher = get_dispatcher()
points = np.arange(7.0)[:, None]
outputs = evaluate(
    as_simulator(f, seeded=True), points, single_seeds(0, 1, 7),
    execution=Execution(), dispatcher=dispatcher, tolerance=Tolerance("drop"),
)
seen = dispatcher.each((outputs.values.tobytes().hex(), tuple(outputs.failed.tolist())))
if dispatcher.rank == 0:
    print(len(set(seen)), *seen[0])
"""


@pytest.mark.mpi
def test_every_rank_has_all_outputs(run_ranks):
    alone, three = run_ranks(1, RANKS), run_ranks(3, RANKS)
    assert alone.returncode == three.returncode == 0, alone.stderr + three.stderr
    assert alone.stdout == three.stdout
    assert three.stdout.startswith("1 ")
    assert three.stdout.endswith("(False, False, False, True, False, False, False)\n")
