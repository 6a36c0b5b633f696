"""Small simulators of ours keep the contract, and simulators that break it are told."""

from __future__ import annotations

import numpy as np
import pytest

import bridge
from bridge.testing import SimulatorContract
from tests.contracts.failing import failing

W = np.array([[1.0, 0.3], [0.2, -0.7], [0.5, 0.5]])


def noisy(x, seed):
    return x + np.random.default_rng(seed).normal(size=2)


class TestSines(SimulatorContract):
    made = bridge.Sines(W, np.array([0.1, 0.2, 0.3]))
    others = (bridge.Sines(W, np.array([0.1, 0.2, 0.4])),)
    inputs = ((0.3, 0.1), (0.2, -0.4), (1.0, 0.0))


class TestHardSort(SimulatorContract):
    made = bridge.HardSort(3)
    inputs = ((0.3, 0.1, 0.2), (0.2, -0.4, 0.5))


class TestDisc(SimulatorContract):
    made = bridge.Disc(16)
    inputs = ((0.45, 0.5, 0.2), (0.5, 0.5, 0.3))


class TestShortestPath(SimulatorContract):
    made = bridge.ShortestPath(3)
    inputs = ((0, 0, 0, 0, 0.69, 0, 0, 0, 0), (0, 0, 0, 0.1, 0.7, 0, 0, 0.1, 0))  # where ways cost nearly the same


class TestAFunctionWithNoise(SimulatorContract):
    made = bridge.as_simulator(noisy, seeded=True, names=["a", "b"], bounds=[(0, 1), (0, 1)])
    inputs = ((0.3, 0.1), (0.2, 0.4))


class TestABlurredOne(SimulatorContract):
    made = bridge.as_simulator(lambda x: np.floor(10 * x), output_shape=(2,))
    inputs = ((0.33, 0.12), (0.25, 0.47))
    elsewhere = False


def of_others(x):
    return x - x.mean(axis=0)


def changes(x):
    x += 1
    return x


def draws(x):
    return x + np.random.normal(size=x.shape)  # noqa: NPY002


def wall(x):
    return np.log(x - 0.15)


class Counts:
    """Outputs that go on with each call."""

    space, output_shape = None, (2,)

    def __init__(self):
        self.calls = 0

    def __call__(self, inputs, seeds):
        self.calls += 1
        return inputs * self.calls


class Misshapen:
    space, output_shape = None, (3,)

    def __call__(self, inputs, seeds):
        return inputs.copy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("broken", "tests"),
    [
        (bridge.as_simulator(of_others, vectorized=True), {"rows_are_outputs_of_their_own"}),
        (bridge.as_simulator(wall, vectorized=True), {"rows_are_outputs_of_their_own"}),
        (bridge.as_simulator(draws, vectorized=True), {"outputs_are_a_function_of_parameters_and_seed"}),
        (Counts(), {"outputs_are_a_function_of_parameters_and_seed"}),
        (Misshapen(), {"rows_are_outputs_of_their_own", "a_single_row_has_the_declared_shape"}),
        (
            bridge.as_simulator(np.sin, names=["a", "b"], bounds=[(0.2, 1), (0, 1)]),
            {"its_space_holds_the_inputs"},
        ),
    ],
)
def test_what_is_broken_is_told(broken, tests, tmp_path):
    inputs = ((0.3, 0.5), (0.1, 0.4), (0.2, 0.3))
    assert tests <= failing(SimulatorContract, tmp_path, made=broken, inputs=inputs, elsewhere=False)


def test_the_same_simulator_twice_has_one_identity(tmp_path):
    one, same = bridge.Sines(W, np.zeros(3)), bridge.Sines(W, np.zeros(3))
    found = failing(SimulatorContract, tmp_path, made=one, others=(same,), inputs=((0.3, 0.5), (0.1, 0.4)))
    assert found == {"others_have_other_identities"}
