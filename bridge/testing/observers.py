"""What is asked of an observer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bridge.fitting.fit import fit
from bridge.reporting.observers import Observer
from bridge.reporting.result import FitResult, FitStep
from bridge.simulator.space import Parameter, ParameterSpace
from bridge.storage.run import Run
from bridge.testing.common import short_descent, simulate

_TARGET, _START, _STEPS = simulate(np.array([0.5, 0.3])), [0.2, 0.6], 4


class ObserverContract:
    """The contract of `bridge.Observer`, for a test class that makes them.

        class TestMine(bridge.testing.ObserverContract):
            def make(self, folder):
                return Mine(folder / "steps.txt")

    Each test makes new ones. `told` may say what one has taken note of; a resumed fit must then leave the same behind.
    """

    def make(self, folder: Path) -> Observer:
        """An observer that writes, if at all, into this folder; several are made for the same."""
        raise NotImplementedError("Write make(self, folder), which returns an observer.")

    def told(self, observer: Observer, folder: Path) -> Any:
        """What it has taken note of, without times; None where there is nothing to compare."""
        return None

    def test_it_is_an_observer(self, tmp_path: Path) -> None:
        assert isinstance(self.make(tmp_path), Observer), "expected the methods start, step and end"

    def test_it_is_told_of_a_fit_and_changes_nothing(self, tmp_path: Path) -> None:
        alone, watched = self._fit(), self._fit(_Strict(self.make(tmp_path)))
        assert watched.history == alone.history
        assert watched.parameters.tobytes() == alone.parameters.tobytes()

    def test_a_resumed_fit_tells_it_the_history_again(self, tmp_path: Path) -> None:
        whole = tmp_path / "whole"
        whole.mkdir()
        first = self.make(whole)
        self._fit(_Strict(first))
        cut = tmp_path / "cut"
        cut.mkdir()
        stop = _Stop(after=1)
        self._fit(_Strict(self.make(cut)), stop, run=Run(tmp_path / "run", every_s=0.0))
        again = self.make(cut)
        result = self._fit(_Strict(again), run=Run(tmp_path / "run"))
        assert len(result.history) == _STEPS
        assert self.told(again, cut) == self.told(first, whole)

    def test_it_survives_a_fit_that_fails(self, tmp_path: Path) -> None:
        observer = self.make(tmp_path)
        observer.start(_SPACE, max_steps=None, max_runs=None, title="")
        observer.end(None)

    def test_numbers_that_are_not_finite_and_odd_names_do_no_harm(self, tmp_path: Path) -> None:
        observer = self.make(tmp_path)
        observer.start(_SPACE, max_steps=3, max_runs=100, title="a title: [bold] \u03b8, \x1b[2J")
        for step, number in enumerate((1.0, float("nan"), float("inf"))):
            observer.step(
                FitStep(step, number, 0.1, (number, 1.0), 8 * (step + 1), (number, 0.1), number, 1, "a note", 2, 3)
            )
        observer.end(None)

    def _fit(self, *observers: Observer, run: Run | None = None) -> FitResult:
        method = short_descent(steps=_STEPS)
        return fit(simulate, _TARGET, _START, seed=0, method=method, run=run, watch=observers)


_SPACE = ParameterSpace((Parameter("[red]\x1b[2Jx", "\u00b5m", natural_scale=0.1), Parameter("b")))


class _Strict:
    """An observer whose errors end the fit, in place of being logged."""

    def __init__(self, inner: Observer) -> None:
        self.inner = inner

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        self.inner.start(space, max_steps=max_steps, max_runs=max_runs, title=title)

    def step(self, record: FitStep) -> None:
        try:
            self.inner.step(record)
        except Exception as error:
            raise _Failed("step", record) from error

    def end(self, result: FitResult | None) -> None:
        try:
            self.inner.end(result)
        except Exception as error:
            raise _Failed("end", result) from error


class _Failed(BaseException):
    """What an observer has raised; no Exception, or it would be a warning."""


class _Stop:
    """Ends a fit in good order, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None: ...

    def step(self, record: FitStep) -> None:
        if record.step == self.after:
            raise KeyboardInterrupt

    def end(self, result: FitResult | None) -> None: ...
