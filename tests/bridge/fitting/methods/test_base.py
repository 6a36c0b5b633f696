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
    ("method", "name"), [(Kriging(), "kriging"), (GaussNewton(), "gauss-newton"), (Adam(), "adam")]
)
def test_a_name_is_the_method_with_its_defaults(method, name):
    one, other = fit(method=method), fit(method=name)
    assert one.method == other.method == name
    assert one.history == other.history
    np.testing.assert_array_equal(one.parameters, other.parameters)


@pytest.mark.parametrize(
    ("method", "runs", "scales"),
    [
        (Kriging(rounds=2, round_size=4, restarts=0), [4, 8], None),
        (GaussNewton(steps=3, num_samples=8, scale=0.4), [8, 16, 24], {0.4}),
        (Adam(steps=4, num_samples=16, scale=0.3), [16, 32, 48, 64], {0.3}),
    ],
)
def test_a_method_does_as_its_settings_say(method, runs, scales):
    history = fit(method=method).history
    assert [h.num_evaluations for h in history] == runs
    assert scales is None or {h.scale for h in history} == scales


def test_the_scale_of_kriging_is_how_far_its_first_round_looks():
    near, far = (fit(method=Kriging(rounds=1, scale=s)).parameters - START for s in (1e-3, 1.0))
    assert 0 < np.abs(near).max() <= 1e-2 < np.abs(far).max()


def test_settings_of_a_method_stand_on_it():
    with pytest.raises(InputError, match=r"'steps' of bridge\.fit\. Give method=bridge\.Adam\(steps=\.\.\.\)"):
        fit(method=Kriging(), steps=3, restarts=2)
    with pytest.raises(InputError, match="halving"):
        Kriging(halving=False)
    with pytest.raises(InputError, match=r"got its class\. Make one: method=Kriging\(\)"):
        fit(method=Kriging)
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
        whole = fit(method=RandomSearch(steps=6))
        assert (whole.method, whole.method_reason, len(whole.history)) == ("random-search", "as asked", 6)
        assert whole.num_evaluations == 6 * 8 + 1  # and the start, which it has not run
        assert whole.loss < whole.history[0].loss
        by_name = fit(method="random-search")
        assert by_name.history == whole.history[:5]
        np.testing.assert_array_equal(whole.output, line(whole.parameters))
        np.testing.assert_array_equal(whole.start_output, line(START))

        def stopped(record):
            if record.step == 2:
                raise RuntimeError("a stop")

        with pytest.raises(RuntimeError, match="a stop"):
            fit(method=RandomSearch(steps=6), run=bridge.Run(tmp_path, every_s=0.0), watch=stopped)
        resumed = fit(method=RandomSearch(steps=6), run=tmp_path)
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


@pytest.mark.parametrize("kind", [bridge.Kriging, bridge.TrustRegion])
def test_a_method_without_a_schedule_has_one_scale(kind):
    assert kind(scale=2).scale == 2
    for wrong in ((1.0, 0.1), [1.0], -1.0, 0, "wide"):
        with pytest.raises(InputError, match="positive scale"):
            kind(scale=wrong)


@dataclass(frozen=True)
class Mistaken(Method):
    """One that starts, asks or reports something else."""

    starts: bool = True
    asks: object = None
    reports: object = None

    def start(self, task):
        return MistakenRun(task, self) if self.starts else None


class MistakenRun(SearchRun):
    def __init__(self, task, method):
        super().__init__(task, method, limit=2)
        self.method = method

    def ask(self, step, spent):
        return self.method.asks

    def tell(self, step, answer):
        return self.method.reports


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Mistaken(starts=False), "to return a bridge.MethodRun, got None"),
        (Mistaken(), r"to ask for bridge.Runs\(points\) or bridge.Smoothed\(x, scale\), got None"),
        (Mistaken(asks=Runs(np.ones(2))), r"points of shape \(k, 2\), .* got \(2,\)"),
        (Mistaken(asks=Runs(np.ones((1, 3)))), r"points of shape \(k, 2\), .* got \(1, 3\)"),
        (Mistaken(asks=Runs(np.ones((1, 2))), reports="good"), "to return a bridge.StepReport, .* got 'good'"),
    ],
)
def test_a_method_of_ones_own_that_says_something_else_is_told(method, words):
    with pytest.raises(InputError, match=words):
        fit(method=method)
