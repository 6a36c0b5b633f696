"""Problems that settings of ours are chosen with: none of them is in the race, and none of the race's is here.

Functions of Moré, Garbow and Hillstrom (ACM TOMS 7 (1981) 17) in the variants of `more_wild`, two of our own, and
seven simulators: a hard rectangle, noisy decays, an epidemic's counts, a tone, a staircase, a body's pose from its
silhouette, and a spectrum of three lines.

    python tests/benchmarks/race/run.py --journal practice.jsonl --solvers ours,DFO-LS --problems practice --seeds 0:4
    python tests/benchmarks/race/compare.py practice.jsonl changed.jsonl
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from bridge.simulator.function import FunctionSimulator

from .more_wild import Function
from .problem import Array, Problem, half_squares, near, rows_of, space_of, within


def beale(x: Array) -> Array:
    return np.array([1.5, 2.25, 2.625]) - x[0] * (1 - x[1] ** np.arange(1, 4))


def jennrich_sampson(x: Array) -> Array:
    i = np.arange(1, 11)
    return 2 + 2 * i - (np.exp(i * x[0]) + np.exp(i * x[1]))


KOWALIK = np.array([0.1957, 0.1947, 0.1735, 0.16, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
KOWALIK_U = np.array([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])


def kowalik_osborne(x: Array) -> Array:
    u = KOWALIK_U
    return KOWALIK - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def biggs(x: Array) -> Array:
    t = np.arange(1, 14) / 10
    y = np.exp(-t) - 5 * np.exp(-10 * t) + 3 * np.exp(-4 * t)
    return x[2] * np.exp(-t * x[0]) - x[3] * np.exp(-t * x[1]) + x[5] * np.exp(-t * x[4]) - y


def wood(x: Array) -> Array:
    return np.array(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


def trigonometric(x: Array) -> Array:
    i = np.arange(1, len(x) + 1)
    return len(x) - np.cos(x).sum() + i * (1 - np.cos(x)) - np.sin(x)


def brown_almost_linear(x: Array) -> Array:
    f = x + x.sum() - (len(x) + 1)
    f[-1] = np.prod(x) - 1
    return f


def broyden_tridiagonal(x: Array) -> Array:
    before, after = np.append(0.0, x[:-1]), np.append(x[1:], 0.0)
    return (3 - 2 * x) * x - before - 2 * after + 1


def broyden_banded(x: Array) -> Array:
    n, f = len(x), x * (2 + 5 * x**2) + 1
    for i in range(n):
        f[i] -= sum(x[j] * (1 + x[j]) for j in range(max(0, i - 5), min(n, i + 2)) if j != i)
    return f


GAUSSIAN = np.array([0.0009, 0.0044, 0.0175, 0.054, 0.1295, 0.242, 0.3521, 0.3989])
GAUSSIAN = np.append(GAUSSIAN, GAUSSIAN[-2::-1])


def gaussian(x: Array) -> Array:
    t = (8 - np.arange(1, 16)) / 2
    return x[0] * np.exp(-x[1] * (t - x[2]) ** 2 / 2) - GAUSSIAN


def variably_dimensioned(x: Array) -> Array:
    s = (np.arange(1, len(x) + 1) * (x - 1)).sum()
    return np.append(x - 1, [s, s * s])


def gulf(x: Array) -> Array:
    t = np.arange(1, 21) / 100
    return np.exp(-(np.abs(25 + (-50 * np.log(t)) ** (2 / 3) - x[1]) ** x[2]) / x[0]) - t


PEAKS = np.array([1, 1.0, 0.4, 0.7, 2.6, 0.5, 0.1])


def peaks(x: Array) -> Array:
    """Our own: two peaks on a slope."""
    t = np.linspace(0, 4, 25)

    def curve(p: Array) -> Array:
        one, two = (p[3 * k] * np.exp(-((t - p[3 * k + 1]) ** 2) / (2 * p[3 * k + 2] ** 2)) for k in (0, 1))
        return np.asarray(one + two + p[6] * t)

    return curve(x) - curve(PEAKS)


def three_curves(x: Array) -> Array:
    """Our own: three curves that do not quite meet."""
    return np.array([x[0] * x[1] - 1 + x[0] ** 2, np.exp(-x[0]) + np.exp(-x[1]) - 1.2, x[0] - x[1] ** 3 + 0.4])


# Minima, halved: published, or for our own found by scipy's least_squares.
FUNCTIONS = {
    "beale": Function(beale, (1.0, 1.0), 0.0),
    "jennrich-sampson": Function(jennrich_sampson, (0.3, 0.4), 124.362182 / 2),
    "kowalik-osborne": Function(kowalik_osborne, (0.25, 0.39, 0.415, 0.39), 3.0750561e-4 / 2),
    "biggs": Function(biggs, (1.0, 2.0, 1.0, 1.0, 1.0, 1.0), 0.0),
    "wood": Function(wood, (-3.0, -1.0, -3.0, -1.0), 0.0),
    "trigonometric": Function(trigonometric, (0.2,) * 5, 0.0),
    "brown-almost-linear": Function(brown_almost_linear, (0.5,) * 6, 0.0),
    "broyden-tridiagonal": Function(broyden_tridiagonal, (-1.0,) * 7, 0.0),
    "broyden-banded": Function(broyden_banded, (-1.0,) * 6, 0.0),
    "gaussian": Function(gaussian, (0.4, 1.0, 0.0), 1.12793e-8 / 2),
    "variably-dimensioned": Function(variably_dimensioned, (0.8, 0.6, 0.4, 0.2, 0.0), 0.0),
    "gulf": Function(gulf, (5.0, 2.5, 0.15), 0.0),
    "peaks": Function(peaks, (0.7, 0.8, 0.5, 1.0, 2.9, 0.4, 0.0), 0.0),
    "three-curves": Function(three_curves, (2.0, -1.0), 0.0399976865),
}


def rectangle(seed: int) -> Problem:
    """A turned rectangle with hard edges in 48 x 48 pixels, with noise."""
    rng = np.random.default_rng([301, seed])
    y, x = np.mgrid[0:48, 0:48] + 0.5

    def image(inputs: Array) -> Array:
        a, b, size, angle = (inputs[:, k, None, None] for k in range(4))
        u = np.cos(angle) * (x - a) + np.sin(angle) * (y - b)
        v = np.cos(angle) * (y - b) - np.sin(angle) * (x - a)
        return ((np.abs(u) < size) & (np.abs(v) < 0.6 * size)).astype(np.float64)

    space = space_of(["x", "y", "size", "angle"], "", [0, 0, 3, -1.5], [48, 48, 20, 1.5], [3, 3, 1.5, 0.15])
    truth = np.array([*rng.uniform(18, 30, 2), rng.uniform(7, 12), rng.uniform(-0.5, 0.5)])
    start = within(space, truth + space.natural_scale * rng.uniform(-2, 2, 4))
    target = image(truth[None])[0] + 0.3 * rng.standard_normal((48, 48))
    simulator = FunctionSimulator(image, space, (48, 48), vectorized=True)
    return Problem(
        "rectangle",
        "simulators",
        seed,
        simulator,
        target,
        0.09,
        start,
        near(truth, np.array([0.4, 0.4, 0.4, 0.05])),
        "fixed",
        truth=truth,
        noisy_target=True,
    )


def decays(seed: int) -> Problem:
    """Two decays, with noise in each run and in the target."""
    rng = np.random.default_rng([302, seed])
    t = np.linspace(0, 3, 30)

    def clean(inputs: Array) -> Array:
        a, b, c, d = np.exp(inputs).T[..., None]
        return np.asarray(a * np.exp(-t * b) + 0.6 * c * np.exp(-4 * t * d))

    def noisy(inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return rows_of(
            lambda x, s: clean(x[None])[0] + 0.005 * np.random.default_rng(s).standard_normal(30), inputs, seeds
        )

    space = space_of(["log_a", "log_rate_a", "log_b", "log_rate_b"], "", -3, 3, 0.2)
    truth = rng.uniform(-0.2, 0.2, 4)
    start = within(space, truth + rng.normal(0, 0.4, 4))
    target, variance = clean(truth[None])[0] + 0.005 * rng.standard_normal(30), 2 * 0.005**2
    loss = half_squares(clean, clean(truth[None])[0], variance)
    simulator = FunctionSimulator(noisy, space, (30,), vectorized=True, seeded=True)
    return Problem(
        "decays",
        "simulators",
        seed,
        simulator,
        target,
        variance,
        start,
        lambda z, y: loss(z, y) / 4,
        "fixed",
        truth=truth,
        noisy=True,
        noisy_target=True,
    )


def infections(theta: Array, seed: int | None) -> Array:
    """(80,) counts of ill and susceptible; without a seed each draw is its mean."""
    infect, recover, ill, wane = np.exp(theta) * np.array([1.2, 0.4, 20, 0.05])
    rng, size = None if seed is None else np.random.default_rng(seed), 2000.0
    well, seen = size - ill, []
    for _ in range(40):
        for _ in range(2):
            means = np.clip([infect * well * ill / size, recover * ill, wane * (size - well - ill)], 0, 4e6) / 4
            new, gone, again = means if rng is None else rng.poisson(means)
            well, ill = np.clip([well - new + again, ill + new - gone], 0, size)
        seen += [ill, well]
    return np.array(seen)


def epidemic(seed: int) -> Problem:
    """Counts of an epidemic, drawn anew in each run."""
    rng = np.random.default_rng([303, seed])
    space = space_of(["log_infection", "log_recovery", "log_first", "log_waning"], "", -2, 2, 0.25)
    truth = rng.uniform(-0.2, 0.2, 4)
    start = within(space, truth + rng.normal(0, 0.3, 4))
    clean = infections(truth, None)
    variance = 2 * float(np.mean([(infections(truth, 10**6 + k) - clean) ** 2 for k in range(15)]))
    simulator = FunctionSimulator(
        lambda inputs, seeds: rows_of(infections, inputs, seeds), space, (80,), vectorized=True, seeded=True
    )
    loss = half_squares(lambda inputs: np.stack([infections(x, None) for x in inputs]), clean, variance)
    return Problem(
        "epidemic",
        "simulators",
        seed,
        simulator,
        infections(truth, 9 * 10**6 + seed),
        variance,
        start,
        lambda z, y: loss(z, y) / 1.5,
        "fixed",
        truth=truth,
        noisy=True,
        noisy_target=True,
    )


def tone(seed: int) -> Problem:
    """Frequency, phase and loudness of a tone in noise: many minima."""
    rng = np.random.default_rng([304, seed])
    t = np.linspace(0, 1, 40)

    def wave(inputs: Array) -> Array:
        frequency, phase, loud = inputs.T[..., None]
        return np.asarray(np.sin(2 * np.pi * (2 + frequency) * t + phase) * np.exp(loud))

    space = space_of(["frequency", "phase", "log_amplitude"], "", [-2.5, -4, -2], [2.5, 4, 2], [0.25, 0.4, 0.2])
    truth = space.natural_scale * rng.uniform(-2, 2, 3)
    start = within(space, truth + space.natural_scale * rng.normal(0, 2.5, 3))
    target = wave(truth[None])[0] + 0.1 * rng.standard_normal(40)
    loss = half_squares(wave, wave(truth[None])[0], 0.01)
    simulator = FunctionSimulator(wave, space, (40,), vectorized=True)
    return Problem(
        "tone",
        "simulators",
        seed,
        simulator,
        target,
        0.01,
        start,
        lambda z, y: loss(z, y) / 3,
        "fixed",
        truth=truth,
        noisy_target=True,
    )


def stairs(seed: int) -> Problem:
    """A chain of sines in ten parameters that act by steps of 1/50."""
    rng = np.random.default_rng([305, seed])

    def chain(inputs: Array) -> Array:
        q = np.round(50 * inputs) / 50
        return np.concatenate([5 * (q[:, 1:] - np.sin(q[:, :-1])), q - 0.5], axis=1)

    # The minimum of the chain without its steps.
    truth = np.array([0.5604, 0.5344, 0.5142, 0.4982, 0.4849, 0.4734, 0.463, 0.4528, 0.4423, 0.4308])
    space = space_of([f"x{i}" for i in range(10)], "", -3, 3, 0.2, "staircase")
    simulator = FunctionSimulator(chain, space, (19,), vectorized=True)
    return Problem(
        "stairs",
        "simulators",
        seed,
        simulator,
        np.zeros(19),
        1.0,
        truth + rng.uniform(-1, 1, 10),
        near(truth, 0.1),
        "fixed",
        truth=truth,
    )


ELLIPSOIDS = np.array(
    [
        # middle, half axes
        [0, 0, 0, 1.0, 0.7, 0.55],
        [1.1, 0.3, 0.1, 0.5, 0.2, 0.2],
        [-0.9, 0.5, -0.3, 0.3, 0.45, 0.2],
    ]
)


def body(seed: int) -> Problem:
    """The pose of three ellipsoids from their common silhouette in 48 x 48 pixels: many minima."""
    rng = np.random.default_rng([306, seed])
    y, x = (np.mgrid[0:48, 0:48] + 0.5 - 24) / 12

    def silhouette(theta: Array) -> Array:
        turn, seen = Rotation.from_rotvec(theta[:3]).as_matrix(), np.zeros((48, 48), dtype=bool)
        for part in ELLIPSOIDS * np.exp(theta[3]):
            u, v = (turn @ part[:3])[:2]
            # Its shadow: the ellipse of the covariance without the line of sight.
            a, b, c = np.linalg.inv((turn * part[3:] ** 2 @ turn.T)[:2, :2])[[0, 0, 1], [0, 1, 1]]
            seen |= a * (x - u) ** 2 + 2 * b * (x - u) * (y - v) + c * (y - v) ** 2 < 1
        return seen.astype(np.float64)

    def image(inputs: Array) -> Array:
        return np.stack([silhouette(theta) for theta in inputs])

    truth = np.append(Rotation.random(random_state=rng).as_rotvec() * 0.5, rng.uniform(-0.1, 0.1))
    axis = rng.standard_normal(3)
    away = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.deg2rad(rng.uniform(40, 90)))
    space = space_of(["x", "y", "z", "log_size"], "", [-6, -6, -6, -0.6], [6, 6, 6, 0.6], [0.1, 0.1, 0.1, 0.05])
    start = np.append((away * Rotation.from_rotvec(truth[:3])).as_rotvec(), truth[3] + rng.uniform(-0.2, 0.2))

    def distance(inputs: Array, outputs: NDArray[Any]) -> Array:
        off = Rotation.from_rotvec(inputs[:, :3]) * Rotation.from_rotvec(truth[:3]).inv()
        return np.asarray(np.rad2deg(off.magnitude()) / 5)

    simulator = FunctionSimulator(image, space, (48, 48), vectorized=True)
    return Problem(
        "body",
        "simulators",
        seed,
        simulator,
        image(truth[None])[0],
        1.0,
        within(space, start),
        distance,
        "fixed",
        truth=truth,
    )


def spectrum(seed: int) -> Problem:
    """Heights, places and widths of three lines in noise, from a guess that may take one for another."""
    rng = np.random.default_rng([307, seed])
    t = np.linspace(0, 10, 60)

    def lines(inputs: Array) -> Array:
        high, place, wide = (inputs[:, k : k + 3, None] for k in (0, 3, 6))
        return np.asarray((np.exp(high) / (1 + ((t - place) / np.exp(wide)) ** 2)).sum(axis=1))

    space = space_of(
        [f"x{i}" for i in range(9)],
        "",
        [-3] * 3 + [0] * 3 + [-3] * 3,
        [3] * 3 + [10] * 3 + [2] * 3,
        [0.2] * 3 + [0.3] * 3 + [0.2] * 3,
    )
    truth = np.concatenate([rng.uniform(-0.5, 0.5, 3), rng.uniform([1, 4, 7], [3, 6, 9]), rng.uniform(-1, 0, 3)])
    start = within(space, truth + space.natural_scale * rng.normal(0, 3, 9))
    target = lines(truth[None])[0] + 0.02 * rng.standard_normal(60)
    loss = half_squares(lines, lines(truth[None])[0], 0.02**2)
    simulator = FunctionSimulator(lines, space, (60,), vectorized=True)
    return Problem(
        "spectrum",
        "simulators",
        seed,
        simulator,
        target,
        0.02**2,
        start,
        lambda z, y: loss(z, y) / 9,
        "fixed",
        truth=truth,
        noisy_target=True,
    )


SIMULATORS: dict[str, Callable[[int], Problem]] = {
    "rectangle": rectangle,
    "decays": decays,
    "epidemic": epidemic,
    "tone": tone,
    "stairs": stairs,
    "body": body,
    "spectrum": spectrum,
}
