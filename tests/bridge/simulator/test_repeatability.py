"""A function that does not give the same again is noticed, whatever its noise comes from; others are left in peace."""

from __future__ import annotations

import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.simulator.repeatability import NotRepeatableWarning

START = [0.4, 1.2]


def counting():
    calls = []

    def f(x):
        calls.append(1)
        return np.array([x[0] + len(calls), x[1]])

    return f


class Drifting:
    def __init__(self):
        self.state = np.zeros(2)

    def __call__(self, x):
        self.state = 0.9 * self.state + x
        return self.state


def beside_the_last(x, seen=[]):  # noqa: B006 - this is what is to be noticed
    seen.append(x)
    return x - seen[-2] if len(seen) > 1 else x


ACCIDENTS = {
    "numpy's global generator": lambda x: x + 0.1 * np.random.normal(size=2),  # noqa: NPY002
    "Python's global generator": lambda x: x * (1 + 0.1 * random.random()),
    "torch's global generator": lambda x: torch.as_tensor(x) + torch.randn(2),
    "a generator of its own": lambda x: x + 0.1 * np.random.default_rng().normal(size=2),
    "a generator that goes on": (lambda rng: lambda x: x + rng.normal(size=2))(np.random.default_rng(1)),
    "a counter": counting(),
    "a state": Drifting(),
    "a default": beside_the_last,
    "the time": lambda x: x + time.perf_counter(),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_function_that_is_none_is_noticed(accident):
    smoothed = bridge.smooth(ACCIDENTS[accident], seed=0, num_samples=8, scale=0.1)
    with pytest.warns(UserWarning, match="gives other numbers when its first row is run again") as said:
        smoothed.estimate(START)
    (one,) = said
    assert "seeded=True" in str(one.message)
    assert ("global generator" in str(one.message)) == ("global" in accident)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        smoothed.estimate(START, step=1)  # once is enough


def test_fits_notice_too():
    with pytest.warns(UserWarning, match="gives other numbers"):
        bridge.fit(ACCIDENTS["a generator of its own"], [1.0, 2.0], START, seed=0, method=bridge.Kriging(rounds=3))


def seeds_itself(x):
    np.random.seed(0)  # noqa: NPY002
    return x + np.random.normal(size=2)  # noqa: NPY002


def throws_away(x):
    random.random()
    np.random.rand()  # noqa: NPY002
    torch.rand(1)
    return x**2


def seeds_itself_late(x):
    y = x + np.random.normal(size=2)  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    return y


@pytest.mark.parametrize("f", [seeds_itself, throws_away])
@pytest.mark.parametrize("budget", [{"stop": 12}, {"method": bridge.GaussNewton(steps=2)}])
def test_a_generator_that_outputs_do_not_depend_on_is_no_matter(f, budget):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotRepeatableWarning)
        bridge.fit(f, [1.0, 2.0], START, seed=0, **budget)
        bridge.smooth(f, seed=0, num_samples=8, scale=0.1).estimate(START)


def test_where_runs_are_counted_draws_are_noticed_by_one_run_more():
    calls = []

    def f(x):
        calls.append(1)
        return x + 0.1 * np.random.normal(size=2)  # noqa: NPY002

    with pytest.warns(NotRepeatableWarning, match="gives other numbers .*numpy's global generator"):
        result = bridge.fit(f, [1.0, 2.0], START, seed=0, stop=bridge.Stop(runs=12))
    assert len(calls) == result.num_evaluations + 1
    with pytest.warns(NotRepeatableWarning, match="gives other numbers"):
        bridge.fit(seeds_itself_late, [1.0, 2.0], START, seed=0, stop=bridge.Stop(runs=12))


def test_of_dear_functions_it_is_said_what_is_known(monkeypatch):
    monkeypatch.setattr("bridge.simulator.repeatability._CHEAP_S", 0.0)
    with pytest.warns(NotRepeatableWarning, match="draws from numpy's .* If its outputs depend on that, results"):
        bridge.fit(seeds_itself, [1.0, 2.0], START, seed=0, stop=bridge.Stop(runs=12))


def test_fits_that_count_their_runs_make_none_more():
    calls = []

    def f(x):
        calls.append(1)
        return x**2

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = bridge.fit(f, [1.0, 2.0], START, seed=0, stop=bridge.Stop(runs=12))
    assert len(calls) == result.num_evaluations <= 12
    with pytest.warns(UserWarning, match="draws from numpy's global generator"):
        bridge.fit(ACCIDENTS["numpy's global generator"], [1.0, 2.0], START, seed=0, stop=bridge.Stop(runs=12))


@pytest.mark.parametrize("on", [3, "process"])
def test_functions_in_other_processes_are_noticed_too(on):
    with pytest.warns(UserWarning, match="gives other numbers when its first row is run again"):
        bridge.smooth(ACCIDENTS["a generator of its own"], seed=0, num_samples=16, scale=0.1, on=on).estimate(START)


def test_a_seed_that_is_not_all_is_noticed():
    def f(x, seed):
        return x + np.random.default_rng(seed).normal(size=2) + np.random.default_rng().normal(size=2)

    with pytest.warns(UserWarning, match=r"Draw from the seed that it is given alone"):
        bridge.smooth(bridge.as_simulator(f, seeded=True), seed=0, num_samples=4, scale=0.1).estimate(START)


def test_rows_that_depend_on_those_beside_them_are_noticed():
    centred = bridge.as_simulator(lambda X: X - X.mean(axis=0), vectorized=True)
    with pytest.warns(UserWarning, match="gives other numbers when its first row is run again"):
        bridge.smooth(centred, seed=0, num_samples=256, scale=0.1).estimate(START)


def memo():
    known = {}

    def f(x):
        return known.setdefault(x.tobytes(), np.sin(x))

    return f


def in_place(x, out=np.zeros(2)):  # noqa: B008 - a buffer that is handed out every time
    np.multiply(x, 2, out=out)
    return out


def seeds_the_global_one(x, seed):
    np.random.seed(seed % 2**32)  # noqa: NPY002
    return x + np.random.normal(size=2)  # noqa: NPY002


FUNCTIONS = {
    "plain": bridge.as_simulator(lambda x: x**2),
    "seeded": bridge.as_simulator(lambda x, seed: x + np.random.default_rng(seed).normal(size=2), seeded=True),
    "seeds the global generator": bridge.as_simulator(seeds_the_global_one, seeded=True),
    "remembers": bridge.as_simulator(memo()),
    "one buffer": bridge.as_simulator(in_place),
    "float32 product": bridge.as_simulator(
        lambda X: (X @ np.ones((2, 500))).astype(np.float32) @ np.ones((500, 3), np.float32), vectorized=True
    ),
    "with NaN": bridge.as_simulator(lambda x: np.array([x[0], np.nan])),
    "integers": bridge.as_simulator(lambda x: np.floor(10 * x).astype(np.int64)),
    "booleans": bridge.as_simulator(lambda x: x > 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_left_in_peace(name):
    failures = bridge.Drop(at_least=0.0) if name == "with NaN" else "raise"
    smoothed = bridge.smooth(FUNCTIONS[name], seed=0, num_samples=8, scale=0.1, failures=failures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "with NaN":
            with pytest.raises(bridge.EvaluationError, match=r"NaN|non-finite"):
                smoothed.estimate(START)
        else:
            smoothed.estimate(START)


def test_the_second_look_changes_no_number_and_no_generator():
    """The same bits as where nobody has looked, and the caller's next draws are what they were."""

    def f(x):
        return np.sin(x) * np.arange(1, 3)

    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    torch.manual_seed(3)
    looked = bridge.smooth(f, seed=0, num_samples=8, scale=0.1).estimate(START)
    drawn = np.random.normal(), random.random(), float(torch.rand(()))  # noqa: NPY002
    simulator = bridge.as_simulator(f)
    simulator.watch.done = True
    plain = bridge.smooth(simulator, seed=0, num_samples=8, scale=0.1).estimate(START)
    assert torch.equal(looked.value, plain.value)
    assert torch.equal(looked.jacobian(), plain.jacobian())
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    torch.manual_seed(3)
    assert drawn == (np.random.normal(), random.random(), float(torch.rand(())))  # noqa: NPY002


def test_one_run_more_and_no_more():
    calls = []

    def f(x):
        calls.append(x.copy())
        return x

    simulator = bridge.as_simulator(f)
    bridge.smooth(simulator, seed=0, num_samples=8, scale=0.1, points="mc").estimate(START)
    assert len(calls) == 8 + 1
    assert any(np.array_equal(call, calls[0]) for call in calls[2:])  # after another one
    bridge.smooth(simulator, seed=1, num_samples=8, scale=0.1, points="mc").estimate(START)
    assert len(calls) == 8 + 1 + 8


def test_one_run_more_of_vectorised_functions_that_get_rows_singly():
    """And two more once they get several, which may depend on each other."""
    rows = []

    def f(X):
        rows.append(len(X))
        return X

    simulator = bridge.as_simulator(f, vectorized=True)
    for seed in range(4):
        bridge.smooth(simulator, seed=seed, num_samples=8, scale=0.1, points="mc").estimate(START)
    assert rows == [1] * (4 * 8 + 1)
    simulator(np.zeros((5, 2)), np.zeros(5, np.uint64))
    assert rows[33:] == [5, 2]
    simulator(np.zeros((5, 2)), np.zeros(5, np.uint64))
    assert rows[33:] == [5, 2, 5]


def writes_a_file(x):
    """A program that knows one file name only: several at once would read each other's."""
    path = Path("result.txt")
    path.write_text(repr(x.tolist()))
    time.sleep(0.01)
    return np.array(eval(path.read_text()))


def test_processes_have_working_directories_of_their_own(tmp_path):
    smoothed = bridge.smooth(
        writes_a_file, seed=0, num_samples=24, scale=0.1, on=bridge.Workers(3, own_directory=tmp_path / "scratch")
    )
    plain = bridge.smooth(lambda x: x, seed=0, num_samples=24, scale=0.1)
    assert torch.equal(smoothed.estimate(START).value, plain.estimate(START).value)
    assert 1 <= len(list((tmp_path / "scratch").iterdir())) <= 3
    smoothed.simulator.close()
    assert not list((tmp_path / "scratch").iterdir())
    assert not Path("result.txt").exists()
    with pytest.raises(bridge.InputError, match=r"on=bridge\.Workers\(8, own_directory=\.\.\.\)"):
        bridge.smooth(writes_a_file, seed=0, own_directory=True)
