"""Methods and robust losses as classes: settings on them, found by name, and added by anybody."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError
from bridge.fitting.methods.base import METHODS, FitTask, Method, MethodResult, MethodRun, register
from bridge.fitting.methods.first_order import Adam
from bridge.fitting.methods.gauss_newton import GaussNewton
from bridge.fitting.methods.kriging import Kriging
from bridge.fitting.robust import ROBUST_LOSSES, RobustLoss, make_robust
from bridge.reporting.result import FitStep
from bridge.smoothing.smooth import smooth

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
        return RandomRun(self, task)


@final
class RandomRun(MethodRun):
    def __init__(self, method: RandomSearch, task: FitTask) -> None:
        problem = task.problem
        self.method, self.problem, self.seed = method, problem, task.seed
        self.smoothed = [smooth(problem.simulator, seed=task.seed, num_samples=1, on=bridge.Ranks(comm=task.comm))]
        self.limit, self.budget, self.described = method.steps, task.max_runs or 10**6, {}
        self.best, self.loss = problem.free_starts[0], np.inf

    @property
    def x(self):
        return self.best

    @property
    def done(self):
        return ""

    @property
    def next_runs(self):
        return self.method.num_samples + 2

    def advance(self, step, num_evaluations):
        rng = np.random.default_rng([self.seed, step])
        points = self.best + self.method.reach * rng.normal(size=(self.method.num_samples, len(self.best)))
        for z, y in zip(points, self._outputs(points), strict=True):
            value = self.problem.misfit.value(torch.as_tensor(y), z)
            if value < self.loss:
                self.best, self.loss = z, value
        x = tuple((self.best * self.problem.natural).tolist())
        return FitStep(step, self.loss, self.method.reach, x, num_evaluations + len(points))

    def finish(self, step):
        start = self.problem.free_starts[0]
        outputs = self._outputs(np.stack([self.best, start]))
        return MethodResult(self.best, start, self.loss, None, *outputs, num_evaluations=2, num_failed=0)

    def _outputs(self, points):
        return self.problem.simulator(points * self.problem.natural, np.zeros(len(points), dtype=np.uint64))

    def to_dict(self):
        return {"best": self.best, "loss": self.loss}

    def restore(self, saved):
        self.best, self.loss = saved["best"], saved["loss"]


def test_a_method_of_ones_own_is_found_by_its_name_and_goes_on_after_an_interruption(tmp_path):
    register("random-search")(RandomSearch)
    try:
        whole = fit(method="random-search", steps=6)
        assert (whole.method, whole.method_reason, len(whole.history)) == ("random-search", "as asked", 6)
        assert whole.num_evaluations == 6 * 8 + 2
        assert whole.loss < whole.history[0].loss
        np.testing.assert_array_equal(fit(method=RandomSearch(steps=6)).parameters, whole.parameters)
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
