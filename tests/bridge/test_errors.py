"""Bad input: a clear error at the door that says what was expected, what came, what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import EvaluationError, InputError, OutputError

X = torch.zeros(2)
PAIRS = bridge.Antithetic(bridge.Sobol())


def identity(x):
    return x


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seed": None}, "Expected a seed"),
        ({"seed": -1}, "non-negative"),
        ({"num_samples": 0}, "at least one sample"),
        ({"distribution": "uniform"}, "absolutely continuous"),
        ({"distribution": "normal"}, "Known: gaussian, logistic, gumbel, cauchy, laplace, triangular"),
        ({"points": "hammersley"}, "Known: mc"),
        ({"covariate": "baseline"}, "Known: auto, none"),
        ({"covariate": "loo", "num_samples": 1}, "at least two"),
        ({"points": PAIRS, "num_samples": 7}, "even number of samples .* got 7. Use 6 or 8"),
        ({"points": PAIRS, "distribution": "gumbel"}, "symmetric density"),
        ({"simulator_seeds": "same"}, "Known: common"),
        ({"failures": "skip"}, "Known: raise, drop, bridge.Raise"),
        ({"on": 0}, "a number of workers"),
        ({"memory": 24}, "bridge.Memory"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(InputError, match=words):
        bridge.smooth(identity, **{"seed": 0, "num_samples": 8, **settings})


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (bridge.Ranks, {"leaf_size": 0}, "positive integer leaf_size, got 0"),
        (bridge.Ranks, {"schedule": "even"}, "Known: auto, static, dynamic"),
        (bridge.Ranks, {"per_evaluation": 0}, "per_evaluation of at least 1, got 0"),
        (bridge.Memory, {"keep_mb": -1}, "keep_mb >= 0, got -1"),
        (bridge.Memory, {"rank_mb": 0}, "positive rank_mb, got 0"),
        (bridge.Isolated, {"timeout_s": 0}, "positive timeout_s, got 0"),
        (bridge.Drop, {"at_least": 2}, "between 0 and 1, got 2"),
        (bridge.Penalty, {"value": np.inf}, "finite value"),
        (bridge.Raise, {"missing": "skip"}, "Known: raise, ignore"),
        (bridge.Adam, {"steps": 0}, "at least one step, got 0"),
    ],
)
def test_an_object_is_refused_where_it_is_made(kind, settings, words):
    with pytest.raises(InputError, match=words):
        kind(**settings)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (0.0, "positive scale"),
        (-1.0, "positive scale"),
        (float("nan"), "finite scale"),
        (torch.tensor([1.0, 0.0]), "positive scale"),
        (torch.ones(3), r"\(2,\) or \(2, 2\), got shape \(3,\)"),
        (torch.ones(2, 2), "invertible"),
        (bridge.LowerTriangular(torch.ones(3, 3)), r"\(2, 2\) lower-triangular"),
    ],
)
def test_scales(scale, words):
    with pytest.raises(InputError, match=words):
        bridge.smooth(identity, seed=0, num_samples=8, scale=scale)(X)
    sim = bridge.as_simulator(identity, names=["a", "b"])
    with pytest.raises(InputError, match=words):  # with a known space, before the first call
        bridge.smooth(sim, seed=0, num_samples=8, scale=scale)


def test_cauchy_takes_no_scale_matrix():
    with pytest.raises(InputError, match="diagonal scale for cauchy"):
        bridge.smooth(identity, seed=0, distribution="cauchy", scale=torch.eye(2))(X)


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        (torch.tensor(1.0), "got a scalar"),
        (torch.zeros(2, dtype=torch.int64), "floating-point"),
        (torch.zeros(0, 2), "at least one"),
        (torch.tensor([1.0, float("inf")]), "finite parameters"),
    ],
)
def test_parameters(theta, words):
    with pytest.raises(InputError, match=words):
        bridge.smooth(identity, seed=0)(theta)


def test_number_of_parameters_is_that_of_the_space():
    sim = bridge.as_simulator(identity, names=["defocus_um", "x_nm"])
    with pytest.raises(InputError, match=r"defocus_um, x_nm"):
        bridge.smooth(sim, seed=0)(torch.zeros(3))


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (lambda x: np.nan, EvaluationError, "1 of 1 numbers NaN or infinite in row 0 .p0 = "),
        (lambda x: [1.0, np.inf], EvaluationError, "1 of 2 numbers"),
        (lambda x: "text", OutputError, "Expected real numbers"),
        (lambda x: 1j, OutputError, "Expected real numbers"),
        (lambda x: np.zeros(1 + (x[0] > 0)), OutputError, "outputs of one shape"),
        (lambda x: 1 / 0, EvaluationError, "ZeroDivisionError"),
    ],
)
def test_bad_simulators(function, kind, words):
    with pytest.raises(kind, match=words):
        bridge.smooth(function, seed=0, num_samples=8, on=bridge.Ranks(leaf_size=8))(X)


def test_declared_and_vectorised_shapes():
    wide = bridge.as_simulator(identity, vectorized=True, output_shape=(3,))
    smoothed = bridge.smooth(wide, seed=0, num_samples=8, on=bridge.Ranks(leaf_size=8))
    with pytest.raises(OutputError, match=r"Expected outputs of shape \(8, 3\) .* got \(8, 2\)"):
        smoothed(X)
    scalar = bridge.as_simulator(lambda x: x[:, 0], vectorized=True, output_shape=(1,))
    smoothed = bridge.smooth(scalar, seed=0, num_samples=8, on=bridge.Ranks(leaf_size=8))
    with pytest.raises(OutputError, match=r"declare output_shape=\(\)"):
        smoothed(X)


def test_parameter_spaces():
    with pytest.raises(InputError, match="Known parameters: a, b"):
        bridge.as_simulator(identity, names=["a", "b"]).space.vector({"a": 1, "c": 2})
    with pytest.raises(InputError, match="got none for b"):
        bridge.as_simulator(identity, names=["a", "b"]).space.vector({"a": 1})
    with pytest.raises(InputError, match="one length"):
        bridge.as_simulator(identity, names=["a", "b"], units=["nm"])
    with pytest.raises(InputError, match="distinct"):
        bridge.as_simulator(identity, names=["a", "a"])
    with pytest.raises(InputError, match="lower < upper"):
        bridge.as_simulator(identity, names=["a"], bounds=[(1, 1)])
    with pytest.raises(InputError, match="got the class"):
        bridge.as_simulator(dict)


def test_registry():
    @bridge.register("test-registry-double")
    class Double:
        def __init__(self, factor=2):
            self.factor = factor

    assert bridge.make("test-registry-double", factor=3).factor == 3
    assert "test-registry-double" in bridge.list_simulators()
    assert "cryoet" in bridge.list_simulators()
    with pytest.raises(InputError, match=r"Unknown simulator 'cryo'. Known simulators: .*cryoet"):
        bridge.make("cryo")
    with pytest.raises(InputError, match=r"which .*Double has"):
        bridge.register("test-registry-double")(dict)


def test_fit_checks_its_arguments():
    sim = bridge.as_simulator(identity, names=["a", "b"], bounds=[(0, 1), (0, 1)])
    good = {"target": [0.5, 0.5], "start": {"a": 0.1, "b": 0.2}, "seed": 0}
    for change, words in (
        ({"target": [1.0, np.nan]}, "finite target"),
        ({"target": [1.0]}, r"target of shape \(2,\), got \(1,\)"),
        ({"start": {"a": 2.0, "b": 0.2}}, r"a = 2 outside \[0, 1\]"),
        ({"start": {"a": 0.1}}, "got none for b"),
        ({"method": "newton"}, "Known: auto, kriging, trust-region, gauss-newton, adam, torch, natural"),
        ({"method": "gauss-newton", "misfit": torch.nn.functional.mse_loss}, "least squares"),
        ({"variance": -1.0}, "positive, finite variance"),
        ({"method": bridge.Adam(scale=(1.0, 0.0))}, "positive scales"),
        ({"seed": None}, "Expected a seed"),
        ({"seed": 2**64}, r"a seed below 2\*\*64"),
        ({"simulator": bridge.smooth(sim, seed=0)}, "got a smoothed one.*Give the simulator"),
        ({"simulator": "ode.py:decay"}, "from ode import decay"),
        ({"min_ok": 0.5}, r"bridge.Drop\(at_least=...\)"),
        ({"starts": 4}, r"start=bridge.Starts\("),
        ({"target_error": 0.1}, r"stop=bridge.Stop\(error=...\)"),
        ({"checkpoint": "a"}, r"run=bridge.Run\("),
        ({"ranks": 2}, r"on=bridge.Ranks\("),
    ):
        with pytest.raises(InputError, match=words):
            bridge.fit(**{"simulator": sim, **good, **change})
