"""Shortest paths: against enumeration, Dijkstra's algorithm, and the exact smoothed choice between three paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, sparse, stats
from scipy.sparse.csgraph import dijkstra

import bridge
from bridge.errors import InputError
from bridge.simulator.protocol import Simulator
from simulators.paths import TERRAIN_COSTS, ShortestPath, shortest_paths, terrain


def neighbours(cell, size):
    i, j = divmod(cell, size)
    steps = [(a, b) for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0)]
    return [(i + a) * size + j + b for a, b in steps if 0 <= i + a < size and 0 <= j + b < size]


def simple_paths(size):
    """All paths without repeated cells from the first to the last cell."""
    stack, paths = [(0,)], []
    while stack:
        path = stack.pop()
        if path[-1] == size * size - 1:
            paths.append(path)
            continue
        stack += [(*path, cell) for cell in neighbours(path[-1], size) if cell not in path]
    return paths


def run(simulator, inputs):
    return simulator(np.asarray(inputs, dtype=np.float64), np.zeros(len(inputs), dtype=np.uint64))


@pytest.mark.parametrize("size", [2, 3])
def test_no_simple_path_is_cheaper(size):
    inputs = np.random.default_rng(0).normal(size=(300, size * size))
    masks = run(ShortestPath(size), inputs).reshape(300, -1)
    paths = simple_paths(size)
    visits = np.zeros((len(paths), size * size))
    for row, path in zip(visits, paths, strict=True):
        row[list(path)] = 1
    cheapest = (visits @ np.exp(inputs).T).argmin(axis=0)
    np.testing.assert_array_equal(masks, visits[cheapest])


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_costs_equal_those_of_dijkstra(spread):
    size = 12
    inputs = np.clip(terrain(size) + spread * np.random.default_rng(1).normal(size=(40, size * size)), -12, 12)
    masks = run(ShortestPath(size), inputs).reshape(40, -1)
    pairs = np.array([(a, b) for a in range(size * size) for b in neighbours(a, size)])
    for mask, cost in zip(masks, np.exp(inputs), strict=True):
        # A step costs the cell that it enters; the first cell is paid at the start.
        graph = sparse.csr_matrix((cost[pairs[:, 1]], (pairs[:, 0], pairs[:, 1])))
        expected = cost[0] + dijkstra(graph, indices=0)[-1]
        assert mask @ cost == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("spread", [0.0, 0.5, 8.0])
def test_a_mask_is_one_chain_of_neighbours(size, spread):
    """On a cheapest path each end touches one cell of the path, each inner cell two: a third would be a short cut."""
    inputs = np.clip(terrain(size) + spread * np.random.default_rng(2).normal(size=(200, size * size)), -12, 12)
    masks = run(ShortestPath(size), inputs)
    assert set(np.unique(masks)) == {0.0, 1.0}
    assert (masks[:, 0, 0] == 1).all()
    assert (masks[:, -1, -1] == 1).all()
    wide = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    touching = sum(wide[:, a : a + size, b : b + size] for a in range(3) for b in range(3)) - 1
    expected = np.full((size, size), 2.0)
    expected[0, 0] = expected[-1, -1] = 1
    np.testing.assert_array_equal(touching[masks == 1], np.broadcast_to(expected, masks.shape)[masks == 1])
    for mask in masks[:20].reshape(20, -1):
        seen, front = {0}, [0]
        while front:
            front = [c for cell in front for c in neighbours(cell, size) if mask[c] and c not in seen]
            seen.update(front)
        assert len(seen) == mask.sum()


def test_a_row_does_not_depend_on_its_neighbours():
    simulator = ShortestPath(8)
    inputs = terrain(8) + 0.5 * np.random.default_rng(3).normal(size=(50, 64))
    inputs[7] = 0.0  # all ties
    together = run(simulator, inputs)
    for i in range(50):
        np.testing.assert_array_equal(run(simulator, inputs[i : i + 1])[0], together[i])
    np.testing.assert_array_equal(together[7], np.eye(8))


def test_landscapes_are_functions_of_size_and_seed():
    for size in (8, 12):
        np.testing.assert_array_equal(terrain(size), terrain(size))
        assert set(np.round(np.exp(terrain(size)), 12)) == set(TERRAIN_COSTS)
    assert (terrain(8) != terrain(8, seed=0)).any()


def test_it_is_a_simulator_that_refuses_bad_inputs():
    simulator = ShortestPath(3)
    assert isinstance(simulator, Simulator)
    assert simulator.space.dimension == 9
    assert simulator.output_shape == (3, 3)
    for size in (1, 2.5, True):
        with pytest.raises(InputError, match="at least 2 x 2"):
            ShortestPath(size)
    with pytest.raises(InputError, match="shape"):
        run(simulator, np.zeros((2, 8)))
    for bad in (np.nan, np.inf, 13.0, -13.0):
        inputs = np.zeros((2, 9))
        inputs[1, 4] = bad
        with pytest.raises(InputError, match=r"in \[-12, 12\]"):
            run(simulator, inputs)


def test_heavy_tails_are_clipped_and_solved():
    smoothed = bridge.smooth(ShortestPath(8), seed=0, num_samples=256, distribution="cauchy", scale=2.0)
    estimate = smoothed.estimate(torch.as_tensor(terrain(8)))
    assert estimate.value[0, 0] == pytest.approx(1)
    assert torch.isfinite(estimate.jacobian()).all()


def centre_probability(x, scale):
    """The chance that the path through 3 x 3 cells crosses the middle: that it costs less than each of two detours.

    Only three paths can be cheapest: through the middle, or through the two cells above or below the diagonal. Given
    the middle's cost c, the detours are independent, and P(two cells cost more than c) is an integral over one of them.
    """
    z = np.linspace(-8, 8, 801)
    weight = stats.norm.pdf(z) * (z[1] - z[0])
    middle = np.exp(x[4] + scale * z)
    chance = weight.copy()
    for first, second in ((1, 5), (3, 7)):
        one = np.exp(x[first] + scale * z)
        rest = middle[:, None] - one
        positive = rest > 0
        above = (np.log(np.where(positive, rest, 1.0)) - x[second]) / scale
        chance *= np.where(positive, stats.norm.sf(above), 1.0) @ weight
    return float(chance.sum())


def test_smoothed_choice_between_three_paths():
    x = np.array([0.2, -0.3, 1.0, 0.1, 0.6, 0.0, 0.8, -0.4, 0.3])
    scale = 0.5
    smoothed = bridge.smooth(
        ShortestPath(3), seed=5, num_samples=4096, scale=scale, points="sobol", on=bridge.Ranks(leaf_size=4096)
    )
    estimate = smoothed.estimate(torch.as_tensor(x).expand(8, 9))
    values, jacobians = estimate.value[:, 1, 1].double().numpy(), estimate.jacobian()[:, 1, 1].double().numpy()
    exact = centre_probability(x, scale)
    h = 1e-3
    slopes = [
        (centre_probability(x + h * e, scale) - centre_probability(x - h * e, scale)) / (2 * h) for e in np.eye(9)
    ]
    assert 0.2 < exact < 0.8
    assert values.mean() == pytest.approx(exact, abs=4.5 * values.std(ddof=1) / 8**0.5 + 1e-6)
    error = jacobians.std(axis=0, ddof=1) / 8**0.5
    assert (np.abs(jacobians.mean(axis=0) - slopes) < 6 * error + 1e-5).all()
    assert np.abs(slopes).max() > 50 * error.max()  # it has the power to see a wrong one


def test_the_reference_probability_is_right():
    """By another road: adaptive quadrature over the middle and one cell of a detour, the other detour out of reach."""
    x = np.array([0.0, 0.2, 0.0, 11.0, 0.9, -0.1, 0.0, 11.0, 0.0])
    got = centre_probability(x, 0.5)
    above = integrate.dblquad(
        lambda b, a: (
            stats.norm.pdf(a)
            * stats.norm.pdf(b)
            * stats.norm.cdf((np.log(np.exp(x[1] + 0.5 * a) + np.exp(x[5] + 0.5 * b)) - x[4]) / 0.5)
        ),
        -7,
        7,
        -7,
        7,
        epsabs=1e-7,
    )[0]
    assert got == pytest.approx(above, abs=1e-4)


def test_many_rows_at_once_are_the_same_as_few():
    costs = np.exp(np.random.default_rng(4).normal(size=(100, 12, 12)))
    whole = shortest_paths(costs)
    np.testing.assert_array_equal(np.concatenate([shortest_paths(c) for c in np.split(costs, 20)]), whole)
