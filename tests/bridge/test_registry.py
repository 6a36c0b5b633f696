"""What is found by name: by a decorator, and by the entry points of packages that are really there."""

from __future__ import annotations

import sys
from concurrent.futures import Executor
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError, SetupError
from bridge.estimators.covariates import COVARIATES, get_covariate
from bridge.estimators.distributions import DISTRIBUTIONS, get_distribution
from bridge.estimators.points import POINT_SETS, get_points
from bridge.fitting.methods.base import METHODS
from bridge.fitting.robust import ROBUST_LOSSES
from bridge.registry import SIMULATORS, Registry
from bridge.reporting.observers import OBSERVERS

MODULE = """
import numpy as np
import bridge

class Wide(bridge.Logistic if False else bridge.Distribution):
    symmetric = True

    def icdf(self, u):
        return np.log(u) - np.log1p(-u)

    def log_prob(self, e):
        return -np.abs(e) - 2 * np.log1p(np.exp(-np.abs(e)))

class Rows(bridge.PointSet):
    def uniform(self, n, d, rng):
        return rng.random((n, d)) + 2.0**-54

class Needy(Rows):
    def __init__(self, vector):
        self.vector = vector

def simulate(factor=2.0):
    return bridge.as_simulator(lambda x: factor * x)
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(name, groups, module)`: puts a package with entry points on the path, and takes it away afterwards."""
    registries = list(Registry._all)
    before = [dict(registry._registered) for registry in registries]
    modules = set(sys.modules)

    def put(name: str, groups: dict[str, dict[str, str]], text: str = MODULE) -> None:
        place: Path = tmp_path / name
        info = place / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        (place / f"{name.replace('-', '_')}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(place))

    yield put
    for registry, members in zip(registries, before, strict=True):
        registry._registered = members
    for name in set(sys.modules) - modules:
        if name.startswith("plug"):
            del sys.modules[name]


def test_each_kind_has_its_group():
    groups = {registry.group: registry for registry in Registry._all}
    for registry, kind in (
        (DISTRIBUTIONS, "distributions"),
        (POINT_SETS, "point_sets"),
        (COVARIATES, "covariates"),
        (METHODS, "methods"),
        (ROBUST_LOSSES, "robust_losses"),
        (OBSERVERS, "observers"),
        (SIMULATORS, "simulators"),
    ):
        assert groups[f"bridge.{kind}"] is registry


def test_a_package_adds_names(install):
    install(
        "plug-one",
        {
            "bridge.distributions": {"wide": "plug_one:Wide"},
            "bridge.point_sets": {"rows": "plug_one:Rows"},
            "bridge.simulators": {"double": "plug_one:simulate"},
        },
    )
    assert "plug_one" not in sys.modules
    assert "wide" in DISTRIBUTIONS.names()
    assert "double" in bridge.list_simulators()
    assert "plug_one" not in sys.modules, "a list of names imports nothing"
    x = torch.tensor([0.2, 0.1], dtype=torch.float64)
    estimate = bridge.smooth(np.tanh, seed=0, num_samples=16, distribution="wide", points="rows").estimate(x)
    assert estimate.points == "Rows()"
    assert get_distribution("wide").name == "wide"
    assert get_points("antithetic-rows").base.name == "rows"
    assert bridge.make("double", factor=3.0)(np.ones((1, 2)), np.zeros(1, np.uint64)).tolist() == [[3.0, 3.0]]


def test_a_known_name_looks_at_no_package(monkeypatch):
    def never(**_):
        raise AssertionError("packages were looked through")

    monkeypatch.setattr(metadata, "entry_points", never)
    bridge.smooth(np.tanh, seed=0, num_samples=8, distribution="laplace", points="antithetic-mc", covariate="loo")


def test_a_broken_package_is_named(install):
    install("plug-two", {"bridge.covariates": {"odd": "plug_two:Odd", "gone": "plug_gone:Odd"}}, "import nothing_such")
    with pytest.raises(SetupError, match=r"Covariate 'odd' of plug-two \(plug_two:Odd\) cannot be imported: No module"):
        get_covariate("odd")
    with pytest.raises(SetupError, match=r"'gone' of plug-two .*plug_gone"):
        get_covariate("gone")
    install("plug-three", {"bridge.covariates": {"raises": "plug_three:Odd"}}, "raise RuntimeError('no licence')")
    with pytest.raises(SetupError, match=r"'raises' of plug-three .* cannot be imported: no licence"):
        get_covariate("raises")
    install("plug-four", {"bridge.covariates": {"rows": "plug_four:Rows"}})
    with pytest.raises(InputError, match=r"Expected a subclass of Covariate as the covariate 'rows', got plug_four\."):
        get_covariate("rows")


def test_a_broken_package_is_in_nobodys_way(install):
    install("plug-nine", {"bridge.methods": {"odd": "plug_nine:Odd"}}, "raise RuntimeError('no licence')")
    with pytest.raises(InputError, match="with a loss of your own: kriging needs least squares"):
        bridge.fit(np.tanh, [0.0], [0.3], seed=0, method="kriging", misfit=lambda a, b: (a - b).square().sum())
    assert "odd" in METHODS.names()
    assert "odd" not in METHODS.all()


def test_a_name_that_two_packages_have_is_refused(install):
    for name in ("plug-five", "plug-six"):
        install(name, {"bridge.distributions": {"wide": f"{name.replace('-', '_')}:Wide"}})
    with pytest.raises(SetupError, match=r"one package with the distribution 'wide', got plug-five, plug-six"):
        get_distribution("wide")


def test_an_unknown_name_is_told_with_the_known_ones_and_what_is_meant(install):
    install("plug-seven", {"bridge.distributions": {"wide": "plug_seven:Wide"}})
    with pytest.raises(InputError, match=r"Unknown distribution 'wid'. Known: gaussian, .*, wide, or a Distribution\."):
        get_distribution("wid")
    assert "plug_seven" not in sys.modules
    with pytest.raises(InputError, match=r"Known simulators: .*cryoet.*Did you mean 'cryoet'\? One of your own is"):
        bridge.make("cryoett")
    with pytest.raises(InputError, match=r"Expected a name of a covariate, or a Covariate, got 3\."):
        get_covariate(3)
    with pytest.raises(InputError, match=r"got the class LeaveOneOut. Give an instance, LeaveOneOut\(\.\.\.\)"):
        bridge.smooth(np.tanh, seed=0, covariate=bridge.LeaveOneOut)


def test_a_name_wants_defaults(install):
    install("plug-eight", {"bridge.point_sets": {"needy": "plug_eight:Needy", "none": "plug_eight:simulate"}})
    with pytest.raises(InputError, match=r"with defaults for all its settings behind the name 'needy'.*Give an inst"):
        get_points("needy")
    with pytest.raises(SetupError, match=r"Expected a PointSet behind the point set 'none'"):
        get_points("none")


def test_the_decorator_finds_the_kind(install):
    class Mine(bridge.PointSet):
        def uniform(self, n, d, rng):
            return rng.random((n, d))

    class Another(Mine):
        pass

    assert bridge.register("test-mine")(Mine) is Mine
    assert isinstance(get_points("test-mine"), Mine)
    assert Mine.name == "test-mine"
    with pytest.raises(InputError, match=r"Expected a class or a function that makes one .*Register its class"):
        bridge.register("test-instance")(Mine())
    bridge.register("test-mine")(Mine)  # as where a cell is run again
    with pytest.raises(InputError, match=r"Expected a new name of a point set, got 'test-mine', which .*Mine has"):
        bridge.register("test-mine")(Another)
    with pytest.raises(InputError, match=r"Expected a new name of a distribution, got 'gaussian'"):

        @bridge.register("gaussian")
        class Mistaken(bridge.Distribution): ...

    with pytest.raises(InputError, match=r"Expected a name in quotation marks, .*, got <class"):

        @bridge.register
        class Unnamed: ...

    assert "test-mine" not in bridge.list_simulators()


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("off", bridge.Observer, "means nothing else, got 'off'"),
        ("process", Executor, "means nothing else, got 'process'"),
        ("a:b", Executor, "without a colon"),
        (" ", Executor, "in quotation marks"),
    ],
)
def test_names_that_could_not_be_used_are_refused(name, kind, words):
    with pytest.raises(InputError, match=words):
        bridge.register(name)(type("Mine", (kind,), {}))
