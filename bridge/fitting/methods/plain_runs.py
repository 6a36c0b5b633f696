"""Runs of the simulator itself, without noise of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bridge.arrays import Array
from bridge.errors import EvaluationError
from bridge.estimators.design import single_seeds
from bridge.evaluation.evaluate import evaluate
from bridge.evaluation.execution import Tolerance
from bridge.evaluation.failures import Drop, Failures
from bridge.evaluation.memory import Memory
from bridge.evaluation.places import Place
from bridge.fitting.soundness import HUGE
from bridge.simulator.protocol import Simulator
from bridge.smoothing.smooth import smooth
from bridge.smoothing.smoothed import SmoothedSimulator


def plain_simulator(
    simulator: Simulator, seed: int | None, failures: Failures, place: Place, memory: Memory
) -> SmoothedSimulator:
    """The simulator itself, for `plain_outputs`: of the smoothed one that it comes in only what runs it counts."""
    raises = failures.rule == "raise"
    if failures.rule != "penalty":
        failures = Drop(at_least=0.0, retries=failures.retries, missing=failures.missing)
    plain = smooth(simulator, seed=seed, num_samples=1, covariate="none", failures=failures, on=place, memory=memory)
    # A run that raises ends the fit, unless it is told otherwise; one of NaN or enormous numbers is a bad one.
    plain.strategy = replace(plain.strategy, errors_raise=raises, largest=HUGE)
    return plain


def last_outputs(smoothed: SmoothedSimulator, thetas: Array, step: int, shape: tuple[int, ...]) -> Array:
    """(k, *shape) of the simulator itself.

    NaN where a run failed, unless failures="raise": a fit that has lived with failed runs must not end by one.
    """
    strategy = smoothed.strategy
    raises = strategy.failures == "raise" or strategy.errors_raise
    tolerance = Tolerance("drop", errors_raise=raises, largest=strategy.largest, missing=strategy.missing)
    try:
        return _outputs(smoothed, thetas, step, tolerance)
    except EvaluationError:
        if raises:
            raise
        return np.full((len(thetas), *shape), np.nan)


def plain_outputs(plain: SmoothedSimulator, thetas: Array, step: int) -> Array:
    """(k, *shape) outputs at (k, d) parameters, one run each, on every rank; NaN where a run failed."""
    try:
        return _outputs(plain, thetas, step, Tolerance.of(plain.strategy))
    except EvaluationError:
        # Where every single run fails there is no output at all, and no shape of one.
        if plain.strategy.errors_raise or step == 0:
            raise
        return np.full((len(thetas), 1), np.nan)


def _outputs(smoothed: SmoothedSimulator, thetas: Array, step: int, tolerance: Tolerance) -> Array:
    outputs = evaluate(
        smoothed.simulator,
        thetas,
        single_seeds(smoothed.strategy.seed, step, len(thetas)),
        execution=smoothed.execution,
        dispatcher=smoothed.dispatcher,
        tolerance=tolerance,
    )
    smoothed.spent.cached += outputs.num_cached
    return outputs.values


def useless_start(theta: Array, output: Array, names: Sequence[str]) -> str:
    """What to say of a start whose output is not finite, or enormous."""
    values = ", ".join(f"{name} = {value:.6g}" for name, value in zip(names, theta, strict=True))
    return (
        f"Expected finite outputs at the start ({values}), got NaN, infinite numbers or such as are larger than "
        f"{HUGE:g}: a fit has nothing to compare with. Run the simulator there by itself, and start where it works; "
        "where outputs only lack some numbers (NaN), give failures=bridge.Raise(missing='ignore')."
    )
