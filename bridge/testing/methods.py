"""What is asked of a method of fitting."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bridge.errors import InputError
from bridge.evaluation.failures import Drop
from bridge.fitting.fit import fit
from bridge.fitting.methods.base import Method
from bridge.fitting.session import FitSession
from bridge.fitting.stop import Stop
from bridge.reporting.result import FitResult
from bridge.simulator.function import as_simulator
from bridge.storage.run import Run
from bridge.testing.common import Contract

_T = np.linspace(0.0, 2.0, 12)
_TRUTH, _BOUNDS = np.array([1.5, 0.8]), {"height": (0.2, 4.0), "rate": (0.1, 3.0)}
_START = {"height": 0.8, "rate": 1.6}


class MethodContract(Contract):
    """The contract of `bridge.Method`, for a test class that names one.

        class TestMine(bridge.testing.MethodContract):
            made = Mine(population=8)
            budget = 300

    Besides being killed and resumed, on one rank and on others, to the last bit.

    Attributes:
        made: the method, with settings under which it finds the minimum of an easy problem of two parameters.
        budget: runs within which it has come at least to a hundredth of the first loss.
        own_loss: whether it takes losses of one's own.
    """

    made: ClassVar[Method]
    budget: ClassVar[int] = 400
    own_loss: ClassVar[bool] = True

    def fit_settings(self, made: Any) -> dict[str, Any]:
        return {"method": made, "stop": Stop(runs=self.budget)}

    def test_its_settings_are_a_frozen_dataclass_with_defaults(self) -> None:
        kind = type(self.made)
        assert dataclasses.is_dataclass(kind), "expected a dataclass of settings"
        for setting in dataclasses.fields(kind):
            missing = dataclasses.MISSING
            assert setting.default is not missing or setting.default_factory is not missing, f"{setting.name} has none"
            try:
                setattr(self.made, setting.name, None)
            except dataclasses.FrozenInstanceError:
                continue
            raise AssertionError(f"{setting.name} can be changed: expected @dataclass(frozen=True)")

    def test_it_finds_the_minimum_within_its_budget(self) -> None:
        result, first = self._fit(), self._loss(np.array(list(_START.values())))
        assert result.loss < 0.01 * first, f"the loss is {result.loss:.3g}, at the start {first:.3g}"
        assert result.num_evaluations <= self.budget
        assert self.made.chooses or result.method == self.made.name
        np.testing.assert_allclose(result.output, _curve(result.parameters), rtol=1e-12)
        np.testing.assert_allclose(result.start_output, _curve(result.start), rtol=1e-12)
        np.testing.assert_allclose(result.loss, self._loss(result.parameters), rtol=1e-9, atol=1e-12)

    def test_the_same_seed_gives_the_same_fit(self) -> None:
        one, other = self._fit(), self._fit()
        assert one.history == other.history
        assert one.parameters.tobytes() == other.parameters.tobytes()

    def test_nothing_leaves_the_bounds(self) -> None:
        beyond = np.array([4.4, 0.05])  # the minimum is at a corner of the bounds
        result = fit(_named(_curve), _curve(beyond), _START, seed=1, method=self.made, stop=self.budget)
        lower, upper = np.array(list(_BOUNDS.values())).T
        for place in (result.parameters, *(np.array(step.parameters) for step in result.history)):
            assert (place >= lower * (1 - 1e-12)).all(), f"{place} is below {lower}"
            assert (place <= upper * (1 + 1e-12)).all(), f"{place} is above {upper}"

    def test_it_spends_no_more_than_it_may(self) -> None:
        for most in (self.budget // 2, self.budget // 4):
            asked: list[Any] = []

            def noted(theta: Any, asked: list[Any] = asked) -> Any:
                asked.append(theta)
                return _curve(theta)

            try:
                result = fit(_named(noted), _curve(_TRUTH), _START, seed=0, method=self.made, stop=most)
            except InputError:  # too few for a step and the end, which is said
                continue
            assert result.num_evaluations <= most
            # A few calls are made twice at the beginning, to see whether they give the same.
            assert len(asked) <= most + 2, f"{len(asked)} runs of {most}"

    def test_asking_and_telling_is_the_same_fit(self) -> None:
        simulator = _named(_curve)
        assert simulator.space is not None
        session = FitSession(
            simulator.space, _curve(_TRUTH), _START, seed=0, method=self.made, stop=Stop(runs=self.budget)
        )
        while not session.done:
            points = session.ask()
            session.tell(points, [_curve(point) for point in points])
        whole = self._fit()
        assert session.result.history == whole.history
        assert session.result.parameters.tobytes() == whole.parameters.tobytes()

    def test_runs_that_fail_are_no_end(self) -> None:
        def breaks(theta: Any) -> Any:
            if theta[0] > 2.2:
                raise RuntimeError("no mesh")
            return _curve(theta)

        result = fit(
            _named(breaks),
            _curve(_TRUTH),
            _START,
            seed=3,
            method=self.made,
            stop=self.budget,
            failures=Drop(at_least=0.1),
        )
        assert np.isfinite(result.parameters).all()
        assert np.isfinite(result.loss)

    def test_a_fit_that_is_finished_is_not_run_again(self, tmp_path: Path) -> None:
        whole = self._fit(run=Run(tmp_path / "run"))
        before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").glob("evaluations/*"))
        again = self._fit(run=Run(tmp_path / "run"))
        after = sorted(path.stat().st_mtime_ns for path in (tmp_path / "run").glob("evaluations/*"))
        assert again.parameters.tobytes() == whole.parameters.tobytes()
        assert again.num_evaluations == whole.num_evaluations
        assert after == before, "evaluations were written"

    def test_losses_of_ones_own(self) -> None:
        def loss(output: Any, target: Any) -> Any:
            return (output - target).abs().sum()

        settings: dict[str, Any] = {"seed": 0, "method": self.made, "misfit": loss, "stop": self.budget}
        if not self.own_loss:
            try:
                fit(_named(_curve), _curve(_TRUTH), _START, **settings)
            except InputError:
                return
            raise AssertionError("a loss of one's own is taken: set own_loss = True")
        result = fit(_named(_curve), _curve(_TRUTH), _START, **settings)
        first = float(np.abs(_curve(np.array(list(_START.values()))) - _curve(_TRUTH)).sum())
        assert result.loss < 0.5 * first
        assert result.standard_error is None

    def _fit(self, **settings: Any) -> FitResult:
        return fit(
            _named(_curve), _curve(_TRUTH), _START, seed=0, method=self.made, stop=Stop(runs=self.budget), **settings
        )

    def _loss(self, theta: Any) -> float:
        return 0.5 * float(np.square(_curve(theta) - _curve(_TRUTH)).sum())


def _curve(theta: Any) -> Any:
    return theta[0] * np.exp(-theta[1] * _T) + 0.2 * theta[1] * _T


def _named(function: Any) -> Any:
    return as_simulator(function, names=list(_BOUNDS), bounds=_BOUNDS)
