"""Fits by asking and telling: the simulator runs elsewhere, and the result is that of `bridge.fit` to the bit."""

from __future__ import annotations

import numpy as np
import pytest

import bridge
from bridge.errors import EvaluationError, InputError
from bridge.fitting.methods.base import METHODS
from tests.lab.fits import START, TRUTH, Killed, decay

SPACE = bridge.ParameterSpace(
    tuple(bridge.Parameter(name, natural_scale=scale) for name, scale in (("a", 0.3), ("rate", 0.3), ("b", 0.2)))
)
TARGET = decay(TRUTH)
SIMULATOR = bridge.as_simulator(decay, names=SPACE.names, natural_scale=list(SPACE.natural_scale))
KRIGING = bridge.Kriging(rounds=4)
TWO = [{"a": 1.6, "rate": 0.9, "b": 0.7}, {"a": 2.2, "rate": 1.5, "b": 0.4}]


def own_loss(output, target):
    return ((output - target) ** 2).mean()


WALL = 2.1


def walled(theta, wall=WALL):  # no numbers beyond a wall, which the first steps cross
    return np.where(theta[0] > wall, np.nan, decay(theta))


def walled_near(theta):
    return walled(theta, 1.75)


def noisy(theta, seed):
    return decay(theta) + 0.01 * np.random.default_rng(seed).normal(size=TARGET.shape)


def carried_out(session, simulator=decay):
    """Runs what a session asks for; how often it has asked."""
    rounds = 0
    while not session.done:
        points = session.ask()
        session.tell(points, [simulator(p) for p in points])
        rounds += 1
    return rounds


def assert_same(one, other):
    assert one.history == other.history
    for name in ("parameters", "start", "covariance", "standard_error", "output", "start_output"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or a.tobytes() == b.tobytes(), name
    for name in ("loss", "stop_reason", "warnings", "num_evaluations", "num_failed", "method", "method_reason"):
        assert getattr(one, name) == getattr(other, name), name
    assert [e.loss for e in one.ends] == [e.loss for e in other.ends]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("auto", {"stop": 30}),
        (KRIGING, {"variance": 0.01, "prior": {"b": (0.5, 0.1)}}),
        (bridge.TrustRegion(rounds=5), {"misfit": own_loss}),
        (bridge.GaussNewton(steps=4, num_samples=8), {"misfit": bridge.LeastSquares(variance=0.01, robust="huber")}),
        (bridge.GaussNewton(steps=4, num_samples=8), {"start": TWO}),
        (bridge.Adam(steps=5, num_samples=6), {"fixed": ["b"]}),
        (bridge.Torch(steps=4, num_samples=6, optimiser="AdamW"), {"start": TWO}),
        (bridge.Natural(steps=4, num_samples=8), {"tied": {"a": "rate"}, "start": {"a": 1.0, "rate": 1.0, "b": 0.7}}),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_a_session_is_the_fit(method, settings):
    settings = {"start": dict(zip(SPACE.names, START, strict=True)), "method": method, "seed": 0, **settings}
    session = bridge.FitSession(SPACE, TARGET, **settings)
    rounds = carried_out(session)
    assert_same(session.result, bridge.fit(SIMULATOR, TARGET, **settings))
    assert rounds >= len(session.history) > 0


@pytest.mark.parametrize(
    "method", [bridge.Kriging(rounds=4, scale=2.0), bridge.GaussNewton(steps=4, num_samples=16)], ids=lambda m: m.name
)
@pytest.mark.parametrize("failures", ["raise", "drop"])
def test_runs_without_numbers_are_as_in_a_fit(method, failures):
    session = bridge.FitSession(SPACE, TARGET, START, seed=1, method=method, failures=failures)
    carried_out(session, walled)
    simulator = bridge.as_simulator(walled, names=SPACE.names, natural_scale=list(SPACE.natural_scale))
    result = bridge.fit(simulator, TARGET, START, seed=1, method=method, failures=failures)
    assert result.num_failed > 0
    assert_same(session.result, result)
    if failures == "drop":
        told = bridge.FitSession(SPACE, TARGET, START, seed=1, method=method, failures="drop")
        carried_out(told, lambda p: None if p[0] > WALL else decay(p))
        assert_same(told.result, result)


@pytest.mark.parametrize("method", [KRIGING, bridge.Adam(steps=3, num_samples=4)], ids=lambda m: m.name)
def test_a_simulator_with_noise_gets_its_seeds(method):
    session = bridge.FitSession(None, TARGET, START, seed=2, method=method, variance=1e-4, takes_seeds=True)
    while not session.done:
        points, seeds = session.ask(), session.seeds
        order = np.random.default_rng(0).permutation(len(points))
        points, seeds = points[order], seeds[order]
        session.tell(points, [noisy(p, int(s)) for p, s in zip(points, seeds, strict=True)], seeds)
    simulator = bridge.as_simulator(noisy, seeded=True)
    assert_same(session.result, bridge.fit(simulator, TARGET, START, seed=2, method=method, variance=1e-4))


@pytest.mark.parametrize(
    "method",
    [KRIGING, bridge.TrustRegion(rounds=5), bridge.GaussNewton(steps=3, num_samples=8), bridge.Natural(steps=3)],
    ids=lambda m: m.name,
)
def test_a_session_goes_on_after_any_interruption(method, tmp_path):
    def begun():
        return bridge.FitSession(SPACE, TARGET, START, seed=0, method=method)

    whole, session, calls = begun(), begun(), 0
    carried_out(whole)
    while not session.done:
        points = session.ask()
        half = points[: (len(points) + 1) // 2]
        session.tell(half, [decay(p) for p in half])
        session.save(tmp_path / "session")
        assert [path.name for path in tmp_path.iterdir()] == ["session"]
        session = begun()  # as in another process
        session.load(tmp_path / "session")
        calls += 1
    assert calls > len(session.history)
    assert_same(session.result, whole.result)
    again = begun()
    again.restore(session.to_dict())
    assert_same(again.result, whole.result)
    with pytest.raises(InputError, match=r"settings of the one that was kept, got others: seed was 0, is 1"):
        bridge.FitSession(SPACE, TARGET, START, seed=1, method=method).load(tmp_path / "session")
    with pytest.raises(InputError, match=r"a file that FitSession\.save has written, got .*nothing"):
        begun().load(tmp_path / "nothing.npz")


def test_a_session_goes_on_in_the_middle_of_a_step_that_is_tried_again():
    def begun():
        return bridge.FitSession(SPACE, TARGET, START, seed=0, method=method)

    method = bridge.Adam(steps=6, num_samples=16, scale=(1.0, 0.1), learning_rate=1.0)
    session = begun()
    while not session.done:
        points = session.ask()
        session.tell(points, [walled_near(p) for p in points])
        saved, session = session.to_dict(), begun()  # as in another process
        session.restore(saved)
    simulator = bridge.as_simulator(walled_near, names=SPACE.names, natural_scale=list(SPACE.natural_scale))
    result = bridge.fit(simulator, TARGET, START, seed=0, method=method)
    assert any("half of the step is taken back" in record.note for record in result.history)
    assert_same(session.result, result)


def test_what_is_masked_needs_no_number():
    mask = np.arange(25) == 4
    target = np.where(mask, np.nan, TARGET)
    misfit = bridge.LeastSquares(mask=mask)
    session = bridge.FitSession(SPACE, target, START, seed=0, method=KRIGING, misfit=misfit)
    assert carried_out(session) == len(session.history) + 2  # and the best and the start, whose outputs are not kept
    assert_same(session.result, bridge.fit(SIMULATOR, target, START, seed=0, method=KRIGING, misfit=misfit))


def test_in_any_order_and_what_is_refused():
    session = bridge.FitSession(SPACE, TARGET, START, seed=0, method=KRIGING)
    points = session.ask()
    outputs = [decay(p) for p in points]
    assert session.space.mapping(points[0]) == pytest.approx(dict(zip(SPACE.names, START, strict=True)))
    for told, message in (
        ((points + 1e-9, outputs), r"points that ask\(\) has given and that are not told yet"),
        (([points[0], points[0]], outputs[:2]), "Tell them unchanged, each once"),
        ((points, outputs[:-1]), rf"an output for each of {len(points)} points, got {len(points) - 1}"),
        ((points[:, :2], outputs), r"points of shape \(k, 3\), as ask\(\) gives"),
        ((points, [y[1:] for y in outputs]), r"outputs of shape \(25,\), as the target has, got \(24,\)"),
        ((points, [None, *outputs[1:]]), r"got None.*failures='drop'"),
    ):
        with pytest.raises(InputError, match=message):
            session.tell(*told)
    np.testing.assert_array_equal(session.ask(), points)  # nothing was taken
    with pytest.raises(InputError, match=f"a session that is done, got one with {len(points)} points to run"):
        session.result  # noqa: B018
    session.tell(points[::-1][:2], outputs[::-1][:2])
    np.testing.assert_array_equal(session.ask(), points[:-2])
    session.tell(points[:-2], outputs[:-2])
    carried_out(session)
    assert_same(session.result, bridge.fit(SIMULATOR, TARGET, START, seed=0, method=KRIGING))
    with pytest.raises(InputError, match="a session that is not done"):
        session.ask()
    with pytest.raises(InputError, match="a session that is not done"):
        session.tell(points, outputs)


def test_a_useless_start_is_an_error_as_in_a_fit():
    session = bridge.FitSession(SPACE, TARGET, START, seed=0, method=KRIGING)
    points = session.ask()
    for _ in range(2):
        with pytest.raises(EvaluationError, match=r"Expected finite outputs at the start \(a = 1\.6"):
            session.tell(points, [np.full(25, np.nan) for _ in points])
        with pytest.raises(EvaluationError, match=r"Expected finite outputs at the start \(a = 1\.6"):
            session.ask()
        session = bridge.FitSession(SPACE, TARGET, START, seed=0, method=KRIGING)


# --- a method of one's own, by asking and telling alone -----------------------------------------------------------

OWN = """
from dataclasses import dataclass

import numpy as np

import bridge

@bridge.register("one-plus-lambda")
@dataclass(frozen=True)
class OnePlusLambda(bridge.Method):
    '''Children about the parent: the best survives, and steps become longer with success, shorter without.'''

    steps: int = 12
    children: int = 6

    def start(self, task):
        return OnePlusLambdaRun(task, self)


class OnePlusLambdaRun(bridge.SearchRun):
    def __init__(self, task, method):
        super().__init__(task, method, limit=method.steps)
        self.children, self.reach = method.children, 1.0

    def ask(self, step, spent):
        away = self.reach * np.random.default_rng([self.seed, step]).normal(size=(self.children, len(self.x)))
        away[0] *= step > 0  # the start itself
        return bridge.Runs(np.clip(self.x + away, self.problem.lower, self.problem.upper))

    def tell(self, step, answer):
        before = self.least
        losses = self.take(answer)
        self.reach *= 1.5 if losses.min() < before else 0.7
        return self.report(self.reach)

    def to_dict(self):
        return {**super().to_dict(), "reach": self.reach}

    def restore(self, saved):
        super().restore(saved)
        self.reach = saved["reach"]
"""

ON_RANKS = (
    OWN
    + """
import sys

thoughts = []
learns = OnePlusLambdaRun.tell
OnePlusLambda.identity = "with a list that grows, of which no result depends"
OnePlusLambdaRun.tell = lambda self, step, answer: thoughts.append(step) or learns(self, step, answer)
OnePlusLambda.identity = "what it thinks is counted"  # which grows, and would make it another method
X = np.linspace(0, 3, 25)


def decay(theta):
    return theta[0] * np.exp(-theta[1] * X) + theta[2]


def stop(record):
    if record.step == 5:
        raise KeyError("a stop")


def fit(**settings):
    return bridge.fit(
        decay, decay(np.array([2.0, 1.2, 0.5])), [1.6, 0.9, 0.7], seed=0, method="one-plus-lambda", **settings
    )


whole = fit()
try:
    fit(run=bridge.Run(sys.argv[1], every_s=0.0), watch=stop)
except KeyError:
    pass
resumed = fit(run=sys.argv[1])
assert resumed.history == whole.history
assert resumed.output.tobytes() == whole.output.tobytes()
assert bool(thoughts) == bridge.is_root(), thoughts  # one rank thinks, the others are handed the state
if bridge.is_root():
    print(whole.parameters.tobytes().hex(), whole.loss, whole.num_evaluations, whole.stop_reason)
"""
)


@pytest.fixture
def own():
    names = {}
    exec(OWN, names)
    yield names["OnePlusLambda"]
    del METHODS._registered["one-plus-lambda"]


def test_a_method_of_ones_own_has_all_that_ours_have(own, tmp_path):
    result = bridge.fit(SIMULATOR, TARGET, START, seed=0, method=own(steps=40))
    assert result.loss < 0.05 * result.history[0].loss
    assert result.num_evaluations == 40 * 6  # the best and the start have been run
    np.testing.assert_array_equal(result.output, decay(result.parameters))
    np.testing.assert_allclose(result.start_output, decay(np.array(START)), rtol=1e-14)
    assert result.loss == pytest.approx(0.5 * np.sum((result.output - TARGET) ** 2))
    few = bridge.fit(SIMULATOR, TARGET, START, seed=0, method=own(), stop=20)
    assert (few.stop_reason, few.num_evaluations) == ("max_runs", 18)
    session = bridge.FitSession(SPACE, TARGET, START, seed=0, method=own(steps=40))
    carried_out(session)
    assert_same(session.result, result)

    def die(record):
        if record.step == 3:
            raise Killed

    with pytest.raises(Killed):
        bridge.fit(
            SIMULATOR, TARGET, START, seed=0, method=own(steps=40), run=bridge.Run(tmp_path, every_s=0), watch=die
        )
    assert_same(bridge.fit(SIMULATOR, TARGET, START, seed=0, method=own(steps=40), run=tmp_path), result)
    simulator = bridge.as_simulator(walled, names=SPACE.names)
    failing = bridge.fit(simulator, TARGET, START, seed=0, method=own(), fixed=["b"])
    assert failing.num_failed > 0
    assert "were taken for bad ones" in failing.warnings[0]


def test_an_error_of_ones_own_method_is_itself(own, monkeypatch):
    def learns_nothing(self, step, answer):
        raise ZeroDivisionError("a bug of the method")

    monkeypatch.setattr(own.start.__globals__["OnePlusLambdaRun"], "tell", learns_nothing)
    with pytest.raises(ZeroDivisionError, match="a bug of the method"):
        bridge.fit(SIMULATOR, TARGET, START, seed=0, method=own())


@pytest.mark.mpi
def test_a_method_of_ones_own_on_ranks(run_ranks, run_alone, tmp_path):
    alone = run_alone(ON_RANKS, tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    done = run_ranks(2, ON_RANKS, tmp_path / "ranks", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == alone.stdout


def test_what_is_no_path_or_no_outputs_is_told():
    session = bridge.FitSession(SPACE, TARGET, START, seed=0)
    for write in (session.save, session.load):
        for path in (None, ""):
            with pytest.raises(InputError, match="the file of a session as a path, got"):
                write(path)
    with pytest.raises(InputError, match="Expected an output for each of"):
        session.tell(session.ask(), None)
