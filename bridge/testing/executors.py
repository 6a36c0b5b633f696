"""What is asked of an executor of runs."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch

from bridge.errors import EvaluationError
from bridge.evaluation import places
from bridge.evaluation.failures import Drop
from bridge.evaluation.places import Place
from bridge.simulator.function import as_simulator
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.smooth import smooth
from bridge.testing.common import Contract, simulate

_ROWS, _X = 24, torch.tensor([0.3, 0.6], dtype=torch.float64)


class ExecutorContract(Contract):
    """The contract of `bridge.Executor`, for a test class that makes executors.

        class TestMine(bridge.testing.ExecutorContract):
            def make(self):
                return Mine(workers=2)

    Whoever evaluates, results are those of this process, to the last bit; so are those of a fit that is killed under
    one executor and goes on under another, or on other ranks.
    """

    made = None

    def make(self) -> Executor:
        """An executor; each test makes one, and shuts it down."""
        raise NotImplementedError("Write make(self), which returns an executor.")

    def fit_settings(self, made: Any) -> dict[str, Any]:
        return {"on": _ByAnother(self)}

    def test_its_identity_says_what_it_is(self) -> None:
        """No result depends on it: it has none."""

    def test_results_are_those_of_this_process(self) -> None:
        # Linear outputs would not tell one row from another.
        alone, elsewhere = self._estimate(simulate), self._estimate(simulate, place=True)
        assert elsewhere.value.numpy().tobytes() == alone.value.numpy().tobytes()
        assert elsewhere.jacobian().numpy().tobytes() == alone.jacobian().numpy().tobytes()
        assert elsewhere.num_evaluations == alone.num_evaluations

    def test_runs_have_the_seeds_of_their_rows(self) -> None:
        noisy = as_simulator(_noisy, seeded=True)
        assert torch.equal(self._estimate(noisy).value, self._estimate(noisy, place=True).value)

    def test_what_a_run_raises_is_told(self) -> None:
        said = ""
        try:
            self._estimate(_raises, place=True)
        except EvaluationError as error:
            said = str(error)
        assert "no mesh at" in said, f"expected an error that tells what a run has raised, got {said!r}"

    def test_runs_that_fail_can_be_dropped(self) -> None:
        drop = Drop(at_least=0.1)
        alone = self._estimate(_raises_now_and_then, failures=drop)
        elsewhere = self._estimate(_raises_now_and_then, place=True, failures=drop)
        assert 0 < alone.num_failed < _ROWS
        assert elsewhere.num_failed == alone.num_failed
        assert elsewhere.value.numpy().tobytes() == alone.value.numpy().tobytes()

    def test_it_can_be_used_again_after_a_failure(self) -> None:
        with self.make() as executor:
            smoothed = smooth(_raises, seed=0, num_samples=4, on=executor)
            for _ in range(2):
                try:
                    smoothed.estimate(_X)
                except EvaluationError:
                    continue
                raise AssertionError("a run has raised, and nothing is said")
            good = smooth(simulate, seed=0, num_samples=_ROWS, scale=0.1, on=executor).estimate(_X)
        assert torch.equal(good.value, self._estimate(simulate).value)

    def _estimate(self, simulator: Any, place: bool = False, failures: Any = "raise") -> Estimate:
        if not place:
            return smooth(simulator, seed=0, num_samples=_ROWS, scale=0.1, failures=failures).estimate(_X)
        with self.make() as executor:
            estimate = smooth(simulator, seed=0, num_samples=_ROWS, scale=0.1, failures=failures, on=executor)
            return estimate.estimate(_X)


class _ByAnother(Place):
    """An executor that is made where it is needed, by the suite: it cannot travel itself."""

    ranks = places.Ranks()

    def __init__(self, suite: ExecutorContract) -> None:
        self.suite = suite

    def placed(self, simulator: Any, dispatcher: Any) -> Any:
        return places.Executor(self.suite.make()).placed(simulator, dispatcher)


def _noisy(theta: Any, seed: int) -> Any:
    return theta + np.random.default_rng(seed).normal(size=len(theta))


def _raises(theta: Any) -> Any:
    raise ValueError(f"no mesh at {theta.tolist()}")


def _raises_now_and_then(theta: Any) -> Any:
    if theta[0] > 0.35:
        raise ValueError("no mesh there")
    return theta
