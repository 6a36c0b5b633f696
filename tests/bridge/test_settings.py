"""Calls of objects with settings that are nearly right: each is told what is meant."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

import bridge
from bridge.errors import InputError

MISTAKES = {
    "another word": (lambda: bridge.Adam(lr=0.1), "Unknown argument 'lr' of Adam. Did you mean 'learning_rate'?"),
    "rounds": (lambda: bridge.Kriging(steps=3), "Did you mean 'rounds'?"),
    "round size": (lambda: bridge.TrustRegion(num_samples=3), "Did you mean 'round_size'?"),
    "American": (lambda: bridge.Torch(optimizer="SGD"), "Did you mean 'optimiser'?"),
    "a name of torch": (
        lambda: bridge.fit(len, [1.0], [1.0], seed=0, method=bridge.Torch(optimiser="adam")),
        "'Adam'?",
    ),
    "timeout": (lambda: bridge.Workers(2, timeout=3), "Did you mean 'timeout_s'?"),
    "without a name": (lambda: bridge.Drop(0.5), "Expected the settings of Drop (retries, missing, at_least), got"),
    "nothing": (lambda: bridge.Workers(), "missing a required argument: 'number'"),
    "the penalty": (lambda: bridge.Penalty(at_least=0.2), "missing a required argument: 'value'"),
    "a budget": (lambda: bridge.Stop(max_runs=3), "Did you mean 'runs'?"),
    "sigma": (lambda: bridge.LeastSquares(sigma=0.1), "Did you mean 'variance', its square?"),
    "no given start": (lambda: bridge.Starts(3), "missing a required argument: 'given'"),
    "no folder": (lambda: bridge.Run(), "missing a required argument: 'directory'"),
    "a study without a seed": (lambda: bridge.study(lambda x: x, [1.0], budget=100), "Expected a seed, got None"),
    "a study without a budget": (lambda: bridge.study(lambda x: x, [1.0], seed=0), "runs as budget, got None"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told(name):
    call, words = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "made",
    [bridge.Kriging(restarts=2), bridge.Drop(at_least=0.2), bridge.Workers(3), bridge.Stop(runs=4), bridge.Memory(1.0)],
    ids=lambda made: type(made).__name__,
)
def test_objects_are_copied_changed_and_sent(made):
    assert pickle.loads(pickle.dumps(made)) == made
    assert dataclasses.replace(made) == made


def test_a_method_of_ones_own_is_told_the_same():
    @dataclasses.dataclass(frozen=True)
    class Mine(bridge.Method):
        reach: float = 1.0

        def start(self, task): ...

    with pytest.raises(InputError, match=r"Unknown argument 'reech' of Mine\. Did you mean 'reach'"):
        Mine(reech=2.0)
