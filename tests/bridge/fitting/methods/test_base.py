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
    with pytest.raises(TypeError, match="halving"):
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
        return RandomRun(self, task)


@final
class RandomRun(MethodRun):
    def __init__(self, method: RandomSearch, task: FitTask) -> None:
        problem = task.problem
        self.method, self.problem, self.seed = method, problem, task.seed
        self.smoothed = [smooth(problem.simulator, seed=task.seed, num_samples=1, on=task.place)]
        self.limit, self.budget, self.described = method.steps, task.stop.runs or 10**6, {}
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
        whole = fit(method=RandomSearch(steps=6))
        assert (whole.method, whole.method_reason, len(whole.history)) == ("random-search", "as asked", 6)
        assert whole.num_evaluations == 6 * 8 + 2
        assert whole.loss < whole.history[0].loss
        by_name = fit(method="random-search")
        assert by_name.history == whole.history[:5]

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
