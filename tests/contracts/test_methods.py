"""Every method of ours keeps the contract, and some that break it are told."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

import bridge
from bridge.fitting.methods.base import METHODS
from bridge.testing import MethodContract
from tests.contracts.failing import failing


class TestAuto(MethodContract):
    made = bridge.Auto()


class TestKriging(MethodContract):
    made = bridge.Kriging()
    others = (bridge.Kriging(restarts=3), bridge.Kriging(scale=0.5))
    budget = 80
    own_loss = False


class TestTrustRegion(MethodContract):
    made = bridge.TrustRegion()
    others = (bridge.TrustRegion(round_size=5),)
    budget = 200


class TestGaussNewton(MethodContract):
    made = bridge.GaussNewton(steps=12, num_samples=8)
    others = (bridge.GaussNewton(steps=12, num_samples=8, points="mc"),)
    own_loss = False


class TestAdam(MethodContract):
    made = bridge.Adam(steps=60, num_samples=6)
    others = (bridge.Adam(steps=60, num_samples=6, learning_rate=0.3),)
    budget = 600


class TestTorch(MethodContract):
    made = bridge.Torch(steps=60, num_samples=6, optimiser="AdamW")
    others = (bridge.Torch(steps=60, num_samples=6, optimiser="SGD"),)
    budget = 600


class TestNatural(MethodContract):
    made = bridge.Natural(steps=60, num_samples=10)
    others = (bridge.Natural(steps=60, num_samples=10, full_scale=False),)
    budget = 900


def test_every_name_of_ours_is_here():
    tested = {type(suite.made) for suite in MethodContract.__subclasses__() if suite.__module__ == __name__}
    assert tested >= {kind for kind in METHODS.all().values() if kind.__module__.startswith("bridge.")}


@dataclass(frozen=True)
class Random(bridge.Method):
    """Draws points about the best one; what is broken is said by a word."""

    broken: str = ""
    steps: int = 40

    def start(self, task):
        return RandomRun(task, self)


class RandomRun(bridge.SearchRun):
    def __init__(self, task, method):
        super().__init__(task, method, limit=method.steps)
        self.broken, self.drawn, self.reach = method.broken, 0, 1.0
        self.rng = np.random.default_rng(0)

    def ask(self, step, spent):
        rng = self.rng if self.broken == "state" else np.random.default_rng([self.seed, step])
        if self.broken == "seed":
            rng = np.random.default_rng()
        points = self.x + self.reach * rng.normal(size=(8, len(self.x)))
        if self.broken != "bounds":
            points = np.clip(points, self.problem.lower, self.problem.upper)
        return bridge.Runs(points)

    def tell(self, step, answer):
        before = self.least
        losses = self.take(answer)
        self.reach *= 1.3 if losses.min() < before else 0.8
        return self.report(self.reach)

    def to_dict(self):
        return super().to_dict() if self.broken == "forgets" else {**super().to_dict(), "reach": self.reach}

    def restore(self, saved):
        super().restore(saved)
        self.reach = saved.get("reach", 1.0)


class TestRandom(MethodContract):
    made = Random()


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        ("seed", "the_same_seed_gives_the_same_fit"),
        ("state", "a_fit_with_it_is_killed_and_resumed"),
        ("forgets", "a_fit_with_it_is_killed_and_resumed"),
        ("bounds", "nothing_leaves_the_bounds"),
    ],
)
def test_broken_ones_are_told(broken, told, tmp_path):
    assert told in failing(MethodContract, tmp_path, made=Random(broken))
