"""Evaluations of earlier runs used again: less to pay, the same answer, and nothing that depends on how they lay."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError
from bridge.simulator.function import as_simulator
from bridge.simulator.identity import identity_of
from bridge.storage.store import Store
from tests.lab.fits import Killed

A = np.random.default_rng(0).normal(size=(30, 3))
NOISE = 0.1 * np.random.default_rng(1).normal(size=30)
TRUTH, OTHER = np.array([2.0, 1.2, 0.5]), np.array([2.4, 0.7, 0.8])
START = [0.0, 0.0, 0.0]
SETTINGS = {"seed": 0, "variance": 0.01, "stop": bridge.Stop(runs=25)}
ROUND = 6
EARLIER = 3 * ROUND  # runs of the earlier fit


def linear(theta):
    return A @ theta


def exact(target):
    return np.linalg.lstsq(A, target, rcond=None)[0]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The directory of a fit to another target."""
    directory = tmp_path_factory.mktemp("earlier")
    result = bridge.fit(linear, A @ TRUTH + NOISE, START, run=directory, **SETTINGS)
    assert (result.num_reused, result.num_cached, result.num_evaluations) == (0, 0, EARLIER)
    return directory


def refit(target=A @ OTHER + NOISE, simulator=linear, start=START, reuse=(), **settings):
    return bridge.fit(simulator, target, start, **{**SETTINGS, "method": bridge.Kriging(reuse=reuse), **settings})


def same(a, b):
    assert a.history == b.history
    for one, other in ((a.parameters, b.parameters), (a.covariance, b.covariance), (a.output, b.output)):
        assert one.tobytes() == other.tobytes()


def counted(function=linear):
    """A simulator that is `function` and knows how often it was called."""

    def simulator(theta):
        simulator.calls += 1
        return function(theta)

    simulator.calls, simulator.identity = 0, identity_of(as_simulator(function))
    return simulator


# --- what it saves ------------------------------------------------------------------------------------------------


def test_a_linear_simulator_known_from_elsewhere_needs_runs_only_to_confirm(earlier):
    target = A @ OTHER + NOISE
    least = 0.5 * ((A @ exact(target) - target) ** 2).sum() / 0.01
    simulator = counted()
    known = refit(simulator=simulator, stop=6, reuse=earlier)
    assert known.num_evaluations == simulator.calls <= 6
    assert (known.num_reused, known.num_cached, known.num_failed) == (EARLIER, 0, 0)
    assert known.history[0].note.startswith(f"begins with {EARLIER} evaluations of earlier runs")
    alone = refit(stop=6)
    assert known.history[0].loss < least + 1 < least + 10 < alone.loss
    assert known.loss < least + 0.01
    np.testing.assert_allclose(known.parameters, exact(target), atol=2e-3)
    # The same target once more: the best of them is the answer already.
    again = refit(A @ TRUTH + NOISE, reuse=earlier, stop=6)
    np.testing.assert_allclose(again.parameters, exact(A @ TRUTH + NOISE), atol=1e-3)
    assert json.loads(json.dumps(known.to_dict()))["num_reused"] == EARLIER


def test_few_runs_make_the_first_round_smaller_and_runs_that_tell_nothing_do_no_harm(tmp_path):
    few = Store(tmp_path / "few", above_s=0.0)
    bridge.smooth(linear, seed=0, num_samples=2, memory=few)(torch.zeros(3))
    alone, helped = refit(), refit(reuse=few)
    assert (helped.num_reused, alone.num_reused) == (2, 0)
    assert helped.history[0].num_evaluations == alone.history[0].num_evaluations - 2
    for result in (alone, helped):
        np.testing.assert_allclose(result.parameters, exact(A @ OTHER + NOISE), atol=2e-3)

    def steps(theta):
        return np.floor(theta + 0.5)

    flat = Store(tmp_path / "flat", above_s=0.0)
    bridge.smooth(steps, seed=0, num_samples=8, scale=1e-3, memory=flat)(torch.zeros(3))
    result = bridge.fit(
        steps,
        [3.0, -2.0, 1.0],
        START,
        seed=0,
        method=bridge.Kriging(scale=1e-3, reuse=flat),
        stop=bridge.Stop(runs=120),
    )
    assert result.num_reused == 8
    assert "too small" in result.history[0].note
    np.testing.assert_array_equal(steps(result.parameters), [3.0, -2.0, 1.0])


def test_runs_of_a_smoothed_fit_count_where_they_were_made(tmp_path):
    store = Store(tmp_path, above_s=0.0)
    refit(method=bridge.GaussNewton(steps=3, num_samples=8, scale=1.0), stop=None, memory=store)
    result = refit(stop=6, reuse=store)
    assert result.num_reused == 3 * 8 + 2 * 8 + 2
    np.testing.assert_allclose(result.parameters, exact(A @ OTHER + NOISE), atol=2e-3)


def test_more_runs_than_a_model_is_made_of_are_those_nearest_to_the_best(tmp_path):
    store = Store(tmp_path, above_s=0.0)
    bridge.smooth(linear, seed=0, num_samples=256, scale=3.0, points="mc", memory=store)(torch.zeros(3))
    result = refit(stop=6, reuse=store)
    assert result.num_reused == 150
    np.testing.assert_allclose(result.parameters, exact(A @ OTHER + NOISE), atol=2e-3)


# --- what counts --------------------------------------------------------------------------------------------------


def bounded(lower=-10.0, upper=10.0):
    return bridge.as_simulator(linear, names=["a", "b", "c"], bounds=[(lower, upper)] * 3)


def test_runs_off_what_is_fixed_or_tied_or_out_of_bounds_are_left_out(tmp_path):
    store = Store(tmp_path, above_s=0.0)

    def put(*theta):
        key = store.key(identity_of(bounded()), np.array([theta]), np.zeros(1, dtype=np.uint64))
        store.put(key, torch.as_tensor(A @ np.array(theta))[None], 1.0)

    put(1.0, 1.0, 0.0)
    put(1.0, 1.0, 0.5)
    put(2.0, 2.0, 0.5)
    put(2.0, 1.0, 0.5)
    put(3.0, 9.0, 0.5)

    def used(**settings):
        return refit(simulator=bounded(), reuse=store, stop=4, **settings).num_reused

    assert used() == 5
    assert used(fixed=["c"], start=[0.0, 0.0, 0.5]) == 4
    assert used(tied={"b": "a"}) == 3
    assert used(tied={"b": "a"}, fixed=["c"], start=[0.0, 0.0, 0.5]) == 2
    narrow = bridge.as_simulator(linear, names=["a", "b", "c"], bounds=[(-10.0, 2.0)] * 3)
    assert refit(simulator=narrow, reuse=store, stop=4).num_reused == 4


def test_fits_of_some_parameters_and_of_all_serve_each_other(tmp_path):
    settings = {"simulator": bounded(), "start": [1.0, 1.0, 0.5], "stop": 13}
    part = refit(fixed=["c"], run=tmp_path / "part", **settings)
    whole = refit(reuse=tmp_path / "part", run=tmp_path / "whole", **settings)
    assert (whole.num_reused, part.num_evaluations) == (12, 12)
    again = refit(fixed=["c"], reuse=[tmp_path / "part", tmp_path / "whole"], **settings)
    made = Store(tmp_path / "whole" / "evaluations").records(identity_of(bounded()))
    there = [record.inputs[0, 2] == 0.5 for record in made]
    assert len(there) == whole.num_evaluations
    assert 0 < sum(there) < len(there)  # with seeds of their own, the same parameters or not
    assert again.num_reused == 12 + sum(there)


def two(theta):
    return A[:2] @ theta


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"simulator": two, "target": [1.0, 2.0]}, r"Expected evaluations of 'two-.*' in .*, got those of 'linear-"),
        ({"simulator": counted(two), "target": np.ones(30)}, r"got those of 'linear-.*attribute `identity`"),
        ({"simulator": bounded().function, "target": np.ones((5, 6))}, r"outputs of shape \(5, 6\).*got \(30,\)"),
        ({"reuse": "nowhere"}, "Expected the directory of an earlier run or of a store in reuse, got 'nowhere'"),
        (
            {"misfit": lambda y, t: ((y - t) ** 2).sum(), "variance": None},
            "with a loss of your own: kriging needs least squares",
        ),
    ],
)
def test_what_is_none_of_the_simulators_is_refused_and_nothing_is_left_behind(earlier, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        refit(**{"reuse": earlier, "run": tmp_path / "run", **settings})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [bridge.GaussNewton, bridge.Adam, bridge.TrustRegion])
def test_only_kriging_has_a_use_for_earlier_runs(earlier, kind):
    with pytest.raises(InputError, match="Unknown argument 'reuse'"):
        kind(reuse=earlier)


def test_a_run_does_not_begin_with_itself_and_nothing_is_told(earlier, tmp_path, caplog):
    with pytest.raises(InputError, match="the fit's own directory"):
        refit(run=bridge.Run(earlier, resume=False), reuse=earlier)
    (tmp_path / "empty").mkdir()
    with caplog.at_level("WARNING", logger="bridge"):
        assert refit(reuse=tmp_path / "empty", stop=4).num_reused == 0
    assert "no evaluations to use again" in caplog.text


# --- on what it does not depend -----------------------------------------------------------------------------------


def test_order_and_duplicates_of_what_is_used_again_do_not_matter(earlier, tmp_path):
    expected = refit(reuse=earlier)
    (journal,) = (earlier / "evaluations").glob("*.journal")
    content = journal.read_bytes()
    size = len(content) // EARLIER
    assert len(content) == EARLIER * size
    records = [content[i * size : (i + 1) * size] for i in range(EARLIER)]
    order = np.random.default_rng(2).permutation(EARLIER)
    for name, some in (("a", order[:9]), ("b", order[5:]), ("c", order[:3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.journal").write_bytes(b"".join(records[i] for i in some))
    (tmp_path / "c" / "more.journal").write_bytes(b"torn" + records[0] + records[1][:-1])
    result = refit(reuse=[tmp_path / "c", tmp_path / "b", tmp_path / "a"])
    assert result.num_reused == EARLIER
    same(result, expected)


@pytest.mark.parametrize("at", [1, 3, 10])
def test_a_run_that_is_killed_needs_the_earlier_one_no_more(earlier, tmp_path, at):
    """Killed in its first run, within its first round, and later: what it began with has been its own since then."""
    shutil.copytree(earlier, tmp_path / "earlier")
    expected = refit(reuse=tmp_path / "earlier", run=tmp_path / "whole")

    def dies(theta):
        dies.calls += 1
        if dies.calls == at:
            raise Killed
        return linear(theta)

    dies.calls, dies.identity, dies.__name__ = 0, identity_of(as_simulator(linear)), "linear"
    settings = {"reuse": tmp_path / "earlier", "run": tmp_path / "killed"}
    with pytest.raises(Killed):
        refit(simulator=dies, **settings)
    shutil.rmtree(tmp_path / "earlier")
    result = refit(**settings)
    assert result.num_cached == (at - 1) % ROUND  # of the round that it was killed in
    assert [h.parameters for h in result.history] == [h.parameters for h in expected.history]
    assert [h.loss for h in result.history] == [h.loss for h in expected.history]
    for one, other in ((result.parameters, expected.parameters), (result.covariance, expected.covariance)):
        assert one.tobytes() == other.tobytes()
    assert (result.num_reused, result.num_evaluations) == (expected.num_reused, expected.num_evaluations)


@pytest.mark.parametrize(
    ("method", "runs"),
    [("kriging", 24), (bridge.GaussNewton(steps=2, num_samples=8, covariate="loo", points="mc"), None)],
    ids=["kriging", "gauss-newton"],
)
def test_a_store_changes_what_a_fit_costs_never_what_it_finds(tmp_path, method, runs):
    settings = {"method": method, "stop": runs}
    simulator = counted()
    plain = refit(simulator=bridge.as_simulator(simulator, repeatable=True), **settings)
    spent = plain.num_evaluations
    assert (simulator.calls, plain.num_cached) == (spent, 0)
    for cached, calls in ((0, 2 * spent), (spent, 2 * spent), (0, 3 * spent)):
        result = refit(simulator=simulator, memory=Store(tmp_path / "store", above_s=0.0), **settings)
        assert (result.num_cached, result.num_evaluations, simulator.calls) == (cached, spent, calls)
        assert [h.loss for h in result.history] == [h.loss for h in plain.history]
        assert result.parameters.tobytes() == plain.parameters.tobytes()
        assert result.covariance.tobytes() == plain.covariance.tobytes()
        if cached:
            assert [h.num_cached for h in result.history] == [h.num_evaluations for h in result.history]
            shutil.rmtree(tmp_path / "store")


def test_a_run_with_a_store_of_ones_own_goes_on_with_it(tmp_path):
    def die(record):
        if record.step == 2:
            raise Killed

    def fit(**settings):
        run = bridge.Run(tmp_path / "run", every_s=0)
        return refit(memory=Store(tmp_path / "store", above_s=0.0), run=run, **settings)

    with pytest.raises(Killed):
        fit(watch=die)
    result = fit()
    same(result, refit())
    assert result.num_cached == result.history[2].num_cached == ROUND


def test_runs_of_a_surrogate_are_counted_for_themselves():
    def rough(theta):
        return A @ np.round(theta, 1)

    surrogate = bridge.Surrogate(rough, samples=16)
    result = refit(method=bridge.GaussNewton(steps=3, num_samples=8, scale=1.0, surrogate=surrogate), stop=None)
    assert result.num_surrogate == 5 * (8 + 16)
    assert [h.num_surrogate for h in result.history] == [24, 48, 72]
    assert result.num_evaluations == 5 * 8 + 2


SCRIPT = """
import hashlib, os, sys, time
import numpy as np, torch, bridge

A = np.random.default_rng(0).normal(size=(30, 3))

def linear(theta):
    time.sleep(0.001)
    return A @ theta

def told(result):
    numbers = [result.parameters, result.covariance, result.output, np.array([h.loss for h in result.history])]
    digest = hashlib.sha256(b"".join(x.tobytes() for x in numbers)).hexdigest()
    if bridge.is_root():
        print(digest, result.num_evaluations, result.num_cached, result.num_reused)

store = bridge.Store(sys.argv[1], above_s=0.0)
smoothed = bridge.smooth(linear, seed=3, num_samples=40, points="mc", memory=store, on=bridge.Ranks(schedule="dynamic"))
smoothed(torch.zeros(3))
target, settings = A @ np.array([2.4, 0.7, 0.8]) + 0.1, {"seed": 0, "stop": 11, "variance": 0.01}
told(bridge.fit(linear, target, [0.0, 0.0, 0.0], method=bridge.Kriging(reuse=sys.argv[1]), **settings))
for _ in range(2):
    told(bridge.fit(linear, target, [0.0, 0.0, 0.0], memory=bridge.Store(sys.argv[1], above_s=0.0), **settings))
"""


@pytest.mark.mpi
def test_many_writers_and_any_number_of_ranks(run_ranks, run_alone, tmp_path):
    """Each rank writes evaluations of its own; rank 0 reads all of them, and hands on what it has read."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    alone = run_alone(script, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    first, second, third = (line.split() for line in alone.stdout.splitlines())
    assert (first[1:], second[1:], third[1:]) == (["10", "0", "40"], ["10", "0", "0"], ["10", "10", "0"])
    assert second[0] == third[0]
    done = run_ranks(3, script, tmp_path / "three")
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout
    assert len(list((tmp_path / "three").glob("*.journal"))) >= 3


# --- which simulator it is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lens:
    strength: float
    shape: np.ndarray
    name: str = "lens"
    space = None
    output_shape = (2,)

    def __call__(self, inputs, seeds):
        return inputs[:, :2] * self.strength


def scaled(factor):
    return lambda theta: factor * theta


def summing():
    total, calls = 0.0, []

    def simulator(theta):
        nonlocal total
        total += theta.sum()
        calls.append(1)
        return 2 * theta

    return simulator


def shifted(theta, by):
    return theta + by


def test_the_identity_is_what_can_be_seen_of_a_simulator():
    one = np.ones(3)
    different = [
        linear,
        two,
        np.sin,
        scaled(1.0),
        scaled(2.0),
        scaled(one),
        scaled(2 * one),
        lambda t: t + 1,
        lambda t: t + 2,
        functools.partial(shifted, by=1),
        functools.partial(shifted, by=2),
        Lens(1.0, one),
        Lens(2.0, one),
        Lens(1.0, 2 * one),
        bridge.smooth_loss(linear, torch.sum, seed=0).simulator,
        bridge.smooth_loss(linear, torch.mean, seed=0).simulator,
        bridge.smooth_loss(two, torch.sum, seed=0).simulator,
    ]
    identities = [identity_of(as_simulator(f)) for f in different]
    assert len(set(identities)) == len(different)
    assert identities == [identity_of(as_simulator(f)) for f in different]
    assert identity_of(as_simulator(scaled(1.0))) == identities[3]
    assert identity_of(Lens(1.0, np.ones(3))) == identities[11]
    # What it has counted is none of it.
    simulator = summing()
    before = identity_of(as_simulator(simulator))
    simulator(one)
    assert identity_of(as_simulator(simulator)) == before
    # Nor is how it is run, and on which of its parameters.
    for on in ("process", 2):
        placed = bridge.smooth(bounded(), seed=0, on=on).simulator
        assert identity_of(placed) == identity_of(bounded()) == identities[0]
        placed.close()


def test_the_identity_is_the_same_in_every_process():
    program = "import tests.bridge.fitting.test_reuse as t; "
    program += "print(t.identity_of(t.Lens(1.0, t.A)), t.identity_of(t.as_simulator(t.within)))"
    environment = {**os.environ, "PYTHONHASHSEED": "17"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [identity_of(Lens(1.0, A)), identity_of(as_simulator(within))]


def within(theta):
    return theta if "a" in {"a", "b", "c", "d"} else -theta
