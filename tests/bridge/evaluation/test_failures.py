"""Failures are data: how a run ended, and what becomes of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, InputError, OutputError

ZERO = torch.zeros(2, dtype=torch.float64)


def fragile(x):
    if x[0] > 1.0:
        raise ValueError("too hot")
    return np.where(x[1] > 1.2, np.nan, np.array([x.sum(), x[0] ** 2, 1.0]))


def which(smoothed):
    """Rows that `fragile` fails, by how, from the design alone."""
    eps = smoothed._evaluation.problems[0].design.nodes.eps
    error = eps[:, 0] > 1.0
    return error, ~error & (eps[:, 1] > 1.2)


def test_each_way_of_failing_is_counted_and_told(caplog):
    with caplog.at_level(logging.WARNING, logger="bridge"):
        e = bridge.smooth(fragile, seed=0, num_samples=64, points="mc", failures="drop").estimate(ZERO)
    error, nan = which(e)
    assert e.failures == {"error": int(error.sum()), "non-finite": int(nan.sum())}
    assert min(e.failures.values()) > 2
    assert e.num_failed == sum(e.failures.values())
    (record,) = caplog.records
    assert f"{e.num_failed} of 64 evaluations failed" in record.getMessage()


@pytest.mark.parametrize("leaf_size", [1, 16])
def test_a_penalty_stands_in_the_place_of_a_failed_output(leaf_size):
    settings = {"seed": 0, "num_samples": 64, "points": "mc", "on": bridge.Ranks(leaf_size=leaf_size)}
    e = bridge.smooth(fragile, failures=bridge.Penalty(7.0), **settings).estimate(ZERO)
    error, nan = which(e)

    def repaired(x):
        try:
            y = fragile(x)
        except ValueError:
            y = np.full(3, np.nan)
        return np.where(np.isfinite(y), y, 7.0) if np.isfinite(y).all() else np.full(3, 7.0)

    truth = bridge.smooth(repaired, **settings).estimate(ZERO)
    assert e.num_failed == int((error | nan).sum())
    assert torch.equal(e.value, truth.value)
    assert torch.equal(e.jacobian(), truth.jacobian())


def test_too_few_successes_are_an_error():
    settings = {"seed": 0, "num_samples": 64, "points": "mc"}
    e = bridge.smooth(fragile, failures=bridge.Drop(at_least=0.5), **settings).estimate(ZERO)
    share = 1 - e.num_failed / 64
    with pytest.raises(EvaluationError, match=r"Expected at least 95% of the runs to succeed \(at_least\), got"):
        bridge.smooth(fragile, failures=bridge.Drop(at_least=0.95), **settings).estimate(ZERO)
    bridge.smooth(fragile, failures=bridge.Drop(at_least=share), **settings).estimate(ZERO)


def test_the_quorum_is_the_one_that_was_asked_for():
    """Also below a half, and for each parameter vector of a batch."""

    def rare(x):
        return np.where(x[0] > -0.6, np.nan, x)

    settings = {"seed": 0, "num_samples": 64, "points": "mc"}
    e = bridge.smooth(rare, failures=bridge.Drop(at_least=0.1), **settings).estimate(torch.stack([ZERO, ZERO]))
    assert e.num_failed > 64
    assert torch.isfinite(e.value).all()
    with pytest.raises(EvaluationError, match="at_least"):
        bridge.smooth(rare, failures="drop", **settings).estimate(ZERO)


def test_a_run_is_tried_again_with_the_same_seed():
    seen = []

    def flaky(x, seed):
        seen.append((x.tobytes(), seed))
        if len(seen) % 3:
            raise OSError("licence server busy")
        return x

    sim = bridge.as_simulator(flaky, seeded=True, repeatable=True)
    value = bridge.smooth(sim, seed=0, num_samples=4, failures=bridge.Raise(retries=2), on=bridge.Ranks(leaf_size=1))(
        ZERO
    )
    assert len(seen) == 12
    assert len(set(seen)) == 4
    assert torch.equal(value, bridge.smooth(lambda x: x, seed=0, num_samples=4, on=bridge.Ranks(leaf_size=1))(ZERO))
    seen.clear()
    with pytest.raises(EvaluationError, match="licence server busy"):
        bridge.smooth(sim, seed=0, num_samples=4, failures=bridge.Raise(retries=1), on=bridge.Ranks(leaf_size=1))(ZERO)


def test_what_is_no_failure_of_a_run_is_never_dropped():
    """A wrong shape is a mistake in the program, and so is wrong input: they are raised under every policy."""
    sizes = iter([3, 3, 3, 2, 3])  # the first row is run twice, to see whether the function is one
    with pytest.raises(OutputError, match="Expected outputs of shape"):
        bridge.smooth(lambda x: np.zeros(next(sizes)), seed=0, num_samples=4, failures="drop", points="mc")(ZERO)

    def refuses(x):
        raise InputError("Expected positive mass.")

    with pytest.raises(InputError, match="positive mass"):
        bridge.smooth(bridge.as_simulator(refuses, vectorized=True), seed=0, failures=bridge.Penalty(0.0))(ZERO)


@pytest.mark.mpi
def test_a_quorum_missed_ends_every_rank_with_code_3(run_ranks):
    done = run_ranks(
        3,
        """
        import sys
        import numpy as np, torch, bridge

        def f(x):
            if x[0] > -0.5:
                raise ValueError("no licence")
            return x

        try:
            bridge.smooth(f, seed=0, num_samples=32, points="mc", failures="drop")(torch.zeros(1))
        except bridge.BridgeError as error:
            sys.stdout.write(f"caught {type(error).__name__}: {error}\\n")
            sys.stdout.flush()
            raise
        """,
        timeout=60,
    )
    assert done.returncode == 3, (done.returncode, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("caught")]
    assert len(lines) == 3
    assert len(set(lines)) == 1
    assert "at_least" in lines[0]
    assert "no licence" in lines[0]


def test_a_step_without_end_shows_where_it_is(run_alone):
    program = """
        import time, torch, bridge
        def stuck_here(x):
            time.sleep(60)
        bridge.smooth(stuck_here, seed=0, num_samples=2)(torch.zeros(1))
    """
    done = run_alone(program, timeout=60, env={"BRIDGE_STEP_LIMIT_S": "0.5"})
    assert done.returncode == 70
    assert "no end after 0.5 s" in done.stderr
    assert "in stuck_here" in done.stderr


def test_a_step_that_ends_in_time_is_not_disturbed(run_alone):
    program = """
        import time, torch, bridge
        smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=2, on=bridge.Ranks(step_limit_s=0.5))
        for step in range(3):
            smoothed(torch.zeros(1), step=step)
            time.sleep(0.8)
        print('done')
    """
    done = run_alone(program, timeout=60)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_a_fit_that_drops_failed_runs_does_not_end_by_one():
    """The runs at the end, of the simulator itself, are no exception."""
    target = np.array([0.25, 0.5])

    def f(x):
        if np.array_equal(x, [0.0, 0.0]):
            raise ValueError("the start")
        return x**2

    method = bridge.Adam(steps=20, num_samples=16, scale=0.3, tolerance=0.0)
    result = bridge.fit(f, target, [0.0, 0.0], seed=0, method=method, failures="drop")
    assert np.isnan(result.start_output).all()
    assert np.isfinite(result.output).all()
    assert result.start_output.shape == target.shape
    with pytest.raises(EvaluationError, match="the start"):
        bridge.fit(f, target, [0.0, 0.0], seed=0, method=method)
