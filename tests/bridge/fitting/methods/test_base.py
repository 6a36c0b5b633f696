"""Methods and robust losses as classes: settings on them, found by name, and added by anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import pytest

import bridge
from bridge.errors import InputError
from bridge.fitting.methods.base import METHODS, FitTask, Method, MethodRun, register
from bridge.fitting.methods.first_order import Adam
from bridge.fitting.methods.gauss_newton import GaussNewton
from bridge.fitting.methods.kriging import Kriging
from bridge.fitting.methods.requests import Runs
from bridge.fitting.methods.search import SearchRun
from bridge.fitting.robust import ROBUST_LOSSES, RobustLoss, make_robust

X = np.linspace(0, 1, 12)
TARGET, START = 2.0 + 0.5 * X, [1.0, 1.0]


def line(theta):
    return theta[0] + theta[1] * X


def fit(**settings):
    return bridge.fit(line, TARGET, START, seed=0, **settings)


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        (Kriging(num_samples=3, restarts=0), "kriging", {"num_samples": 3, "restarts": 0}),
        (Kriging(scale=0.5), "kriging", {"scale": 0.5}),
        (GaussNewton(steps=3, num_samples=8), "gauss-newton", {"steps": 3, "num_samples": 8}),
        (Adam(steps=4, num_samples=8, scale=0.3), "adam", {"steps": 4, "num_samples": 8, "scale": 0.3}),
    ],
)
def test_a_method_is_the_same_as_its_name_with_settings(method, name, settings):
    one, other = fit(method=method), fit(method=name, **settings)
    assert one.method == other.method == name
    assert one.history == other.history
    np.testing.assert_array_equal(one.parameters, other.parameters)


def test_settings_of_a_method_stand_on_it():
    with pytest.raises(InputError, match=r"got steps=, restarts= beside Kriging\(.*Give them to Kriging"):
        fit(method=Kriging(), steps=3, restarts=2)
    with pytest.raises(InputError, match=r"halving with method gauss-newton or adam or torch or natural alone"):
        fit(method=bridge.Kriging(halving=False))
    with pytest.raises(InputError, match=r"Unknown method 'krigin'.*Did you mean 'kriging'"):
        fit(method="krigin")


@final
@dataclass(frozen=True)
class RandomSearch(Method):
    """Points at random about the best one so far."""

    steps: int = 5
    num_samples: int = 8
    reach: float = 0.5

    def start(self, task: FitTask) -> MethodRun:
        return RandomRun(task, self)


@final
class RandomRun(SearchRun):
    def __init__(self, task: FitTask, method: RandomSearch) -> None:
        super().__init__(task, method, limit=method.steps)
        self.method = method

    def ask(self, step, spent):
        rng = np.random.default_rng([self.seed, step])
        return Runs(self.x + self.method.reach * rng.normal(size=(self.method.num_samples, len(self.x))))

    def tell(self, step, answer):
        self.take(answer)
        return self.report(self.method.reach)


def test_a_method_of_ones_own_is_found_by_its_name_and_goes_on_after_an_interruption(tmp_path):
    register("random-search")(RandomSearch)
    try:
        whole = fit(method="random-search", steps=6)
        assert (whole.method, whole.method_reason, len(whole.history)) == ("random-search", "as asked", 6)
        assert whole.num_evaluations == 6 * 8 + 1  # and the start, which it has not run
        assert whole.loss < whole.history[0].loss
        np.testing.assert_array_equal(fit(method=RandomSearch(steps=6)).parameters, whole.parameters)
        np.testing.assert_array_equal(whole.output, line(whole.parameters))
        np.testing.assert_array_equal(whole.start_output, line(START))
        with pytest.raises(InputError, match="restarts with method kriging alone, got method='random-search'"):
            fit(method="random-search", restarts=2)

        def stopped(record):
            if record.step == 2:
                raise RuntimeError("a stop")

        with pytest.raises(RuntimeError, match="a stop"):
            fit(steps=6, method="random-search", run=bridge.Run(tmp_path, every_s=0.0), watch=stopped)
        resumed = fit(steps=6, method="random-search", run=tmp_path)
        assert resumed.history == whole.history
        with pytest.raises(InputError, match=r"reach was 0\.5, is 0\.4"):
            fit(method=RandomSearch(steps=6, reach=0.4), run=tmp_path)
    finally:
        del METHODS._registered["random-search"]


def test_a_robust_loss_of_ones_own_is_found_by_its_name():
    @ROBUST_LOSSES.register("welsch")
    @final
    @dataclass(frozen=True)
    class Welsch(RobustLoss):
        width: float = 2.9846

        def rho(self, r):
            return 0.5 * self.width**2 * (1 - np.exp(-((r / self.width) ** 2)))

        def weight(self, r):
            return np.exp(-((r / self.width) ** 2))

        def curvature(self, r):
            u = (r / self.width) ** 2
            return (1 - 2 * u) * np.exp(-u)

    try:
        assert make_robust(("welsch", 2.0)) == Welsch(2.0)
        spiked = TARGET + 100.0 * (np.arange(12) == 4)
        result = bridge.fit(
            line,
            spiked,
            [1.9, 0.6],
            seed=0,
            variance=0.01,
            misfit=bridge.LeastSquares(robust="welsch"),
            stop=bridge.Stop(runs=60),
        )
        np.testing.assert_allclose(result.parameters, [2.0, 0.5], atol=0.05)
    finally:
        del ROBUST_LOSSES._registered["welsch"]
    with pytest.raises(InputError, match=r"Unknown robust loss 'welsch'\. Known: huber, cauchy, soft-l1"):
        make_robust("welsch")


def test_a_name_is_taken_once():
    with pytest.raises(InputError, match=r"Expected a new name of a method, got 'kriging', which .*Kriging has"):
        register("kriging")(RandomSearch)
    assert METHODS.find("kriging") is Kriging
