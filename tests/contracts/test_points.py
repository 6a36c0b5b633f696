"""Every point set of ours keeps the contract, and sets that break it are told."""

from __future__ import annotations

import numpy as np
import pytest

import bridge
from bridge.errors import InputError
from bridge.estimators.points import POINT_SETS, Auto, get_points
from bridge.testing import PointSetContract
from tests.contracts.failing import failing


class TestMonteCarlo(PointSetContract):
    made = bridge.MonteCarlo()
    feasible = ((8, 2), (400, 2), (1, 1))


class TestLatin(PointSetContract):
    made = bridge.Latin()
    others = (bridge.Latin(jitter=False),)
    stratified = True


class TestLatinMidpoints(PointSetContract):
    made = bridge.Latin(jitter=False)
    randomised = False
    stratified = True
    bias = 0.3


class TestCartesian(PointSetContract):
    made = bridge.Cartesian()
    feasible = ((9, 2), (64, 3), (5, 1))
    infeasible = ((8, 2), (26, 3))


class TestCartesianMidpoints(PointSetContract):
    made = bridge.Cartesian(jitter=False)
    feasible = ((16, 2), (5, 1))
    infeasible = ((8, 2),)
    randomised = False
    bias = 0.4


class TestSobol(PointSetContract):
    made = bridge.Sobol()
    feasible = ((8, 2), (7, 2), (64, 3))
    infeasible = ((2, 21202),)


class TestNet(PointSetContract):
    made = bridge.Net()
    infeasible = ((12, 2),)
    stratified = True


class TestNetMidpoints(PointSetContract):
    made = bridge.Net(jitter=False)
    infeasible = ((12, 2),)
    randomised = False
    stratified = True
    bias = 0.2


class TestHalton(PointSetContract):
    made = bridge.Halton()
    feasible = ((9, 2), (64, 3), (1, 1))


class TestOrthogonal(PointSetContract):
    made = bridge.Orthogonal()
    feasible = ((8, 2), (7, 2), (64, 3))


class TestAuto(PointSetContract):
    made = Auto()
    feasible = ((8, 2), (12, 2), (64, 3), (3, 4))


class TestAntithetic(PointSetContract):
    made = bridge.Antithetic()
    others = (bridge.Antithetic("mc"), bridge.Antithetic(bridge.Net()))
    feasible = ((8, 2), (64, 3), (2, 1))
    infeasible = ((7, 2),)


class TestAntitheticMonteCarlo(PointSetContract):
    made = bridge.Antithetic("mc")
    feasible = ((8, 2), (400, 2), (2, 1))


def test_every_name_of_ours_is_here():
    tested = [suite.made for suite in PointSetContract.__subclasses__() if suite.__module__ == __name__]
    made = [POINT_SETS.make(name) for name in POINT_SETS.names()]
    ours = {repr(points) for points in made if type(points).__module__.startswith("bridge.")}
    assert {repr(points) for points in tested} >= ours


def test_pairs_have_names():
    for name, points in (
        ("antithetic", bridge.Antithetic()),
        ("antithetic-mc", bridge.Antithetic("mc")),
        ("antithetic-qmc-latin", bridge.Antithetic(bridge.Latin(jitter=False))),
    ):
        rng = (np.random.default_rng(3) for _ in range(2))
        one, other = (made.nodes(bridge.Gaussian(), 8, 2, next(rng)) for made in (get_points(name), points))
        assert np.array_equal(one.eps, other.eps)
        assert one.paired
    assert repr(get_points("antithetic")) == "Antithetic(base=Sobol())"
    with pytest.raises(InputError, match=r"Unknown points 'sobl'.*Did you mean 'sobol'"):
        get_points("antithetic-sobl")
    with pytest.raises(InputError, match="no pairs themselves"):
        bridge.Antithetic("antithetic-mc")
    with pytest.raises(InputError, match=r"a name of a point set, or a PointSet, got the class Sobol. Give an inst"):
        get_points(bridge.Sobol)


class Plain(bridge.PointSet):
    """Independent points, of which one thing at a time is broken."""

    def uniform(self, n, d, rng):
        return rng.random((n, d)) + 2.0**-54

    def block(self, n):
        return 1


class Stratified(Plain):
    """Points that depend on each other, and do not say so."""

    def uniform(self, n, d, rng):
        return bridge.Latin().uniform(n, d, rng)


class Closed(Plain):
    def uniform(self, n, d, rng):
        return np.round(rng.random((n, d)), 1)


class OwnGenerator(Plain):
    def uniform(self, n, d, rng):
        return np.random.default_rng().random((n, d))


class Frozen(Plain):
    def uniform(self, n, d, rng):
        return np.random.default_rng(0).random((n, d))


class Skew(Plain):
    def uniform(self, n, d, rng):
        return rng.random((n, d)) ** 1.3


class Heavy(Plain):
    def nodes(self, distribution, n, d, rng):
        nodes = super().nodes(distribution, n, d, rng)
        return bridge.Nodes(nodes.eps, nodes.score, 1.1 * nodes.weight, 1)


class FalsePairs(Plain):
    def nodes(self, distribution, n, d, rng):
        nodes = super().nodes(distribution, n, d, rng)
        return bridge.Nodes(nodes.eps, nodes.score, nodes.weight, 2, paired=True)


class Unscored(Plain):
    def nodes(self, distribution, n, d, rng):
        nodes = super().nodes(distribution, n, d, rng)
        return bridge.Nodes(nodes.eps, 0.5 * nodes.score, nodes.weight, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("broken", "settings", "tests"),
    [
        (Stratified, {}, {"blocks_are_independent_of_each_other"}),
        (Closed, {}, {"points_lie_in_the_open_cube"}),
        (OwnGenerator, {}, {"points_depend_on_the_generator_alone", "a_fit_with_it_is_killed_and_resumed"}),
        (Frozen, {}, {"points_depend_on_the_generator_alone"}),
        (Skew, {}, {"each_coordinate_is_uniform"}),
        (Heavy, {}, {"nodes_are_perturbations_scores_and_weights_of_these_points"}),
        (FalsePairs, {}, {"nodes_are_perturbations_scores_and_weights_of_these_points"}),
        (Unscored, {}, {"nodes_are_perturbations_scores_and_weights_of_these_points"}),
        (Plain, {"stratified": True}, {"each_coordinate_is_uniform"}),
        (Plain, {"infeasible": ((3, 2),)}, {"what_is_infeasible_is_refused"}),
    ],
)
def test_what_is_broken_is_told(broken, settings, tests, tmp_path):
    found = failing(PointSetContract, tmp_path, made=broken(), feasible=((8, 2), (200, 2)), **settings)
    assert tests <= found
    assert broken is not Plain or found == tests
