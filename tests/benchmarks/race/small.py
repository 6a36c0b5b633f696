"""Small simulators of the race: a disc, noisy sines, a staircase, and counts of predators and prey."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.simulator.function import FunctionSimulator

from .problem import Array, Problem, half_squares, near, rows_of, space_of, within


def disc(seed: int) -> Problem:
    """A hard disc in 64 x 64 pixels: middle and radius within half a pixel; the image has noise."""
    rng = np.random.default_rng([101, seed])
    y, x = np.mgrid[0:64, 0:64] + 0.5

    def image(inputs: Array) -> NDArray[Any]:
        a, b, r = (inputs[:, k, None, None] for k in range(3))
        return ((x - a) ** 2 + (y - b) ** 2 < r * r).astype(np.float64)

    space = space_of(["x", "y", "radius"], "pixel", [0, 0, 1], [64, 64, 32], [4, 4, 2])
    truth = np.array([*rng.uniform(22, 42, 2), rng.uniform(6, 14)])
    start = within(space, truth + rng.uniform(-1, 1, 3) * [10, 10, 4])
    target = image(truth[None])[0] + 0.3 * rng.standard_normal((64, 64))
    simulator = FunctionSimulator(image, space, (64, 64), vectorized=True)
    return Problem(
        "disc",
        "simulators",
        seed,
        simulator,
        target,
        0.09,
        start,
        near(truth, 0.5),
        "fixed",
        truth=truth,
        noisy_target=True,
    )


def noisy_sines(seed: int) -> Problem:
    """Twenty sines of six parameters, with noise of 0.02 in each run and in the target: each within 0.03."""
    rng = np.random.default_rng([102, seed])
    w, b = rng.normal(0, 0.8, (20, 6)), rng.uniform(0, 2 * np.pi, 20)
    truth = rng.uniform(-1, 1, 6)

    def sines(inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return rows_of(
            lambda x, s: np.sin(w @ x + b) + 0.02 * np.random.default_rng(s).standard_normal(20), inputs, seeds
        )

    space = space_of([f"x{i}" for i in range(6)], "", -3, 3, 0.3)
    start = within(space, truth + rng.normal(0, 0.4, 6))
    target = np.sin(w @ truth + b) + 0.02 * rng.standard_normal(20)
    simulator = FunctionSimulator(sines, space, (20,), vectorized=True, seeded=True)
    # Noise of the run and of the target.
    return Problem(
        "noisy-sines",
        "simulators",
        seed,
        simulator,
        target,
        2 * 0.02**2,
        start,
        near(truth, 0.03),
        "fixed",
        truth=truth,
        noisy=True,
        noisy_target=True,
    )


def staircase(seed: int) -> Problem:
    """A chain of Rosenbrock's valleys in 20 parameters that act by steps of 1/50: each within 0.1 of 1."""
    rng = np.random.default_rng([103, seed])

    def valleys(inputs: Array) -> Array:
        q = np.round(50 * inputs) / 50
        return np.concatenate([10 * (q[:, 1:] - q[:, :-1] ** 2), 1 - q], axis=1)

    d, truth = 20, np.ones(20)
    space = space_of([f"x{i}" for i in range(d)], "", -3, 3, 0.2, "staircase")
    start = truth + rng.uniform(-0.8, 0.8, d)
    simulator = FunctionSimulator(valleys, space, (2 * d - 1,), vectorized=True)
    return Problem(
        "staircase",
        "simulators",
        seed,
        simulator,
        np.zeros(2 * d - 1),
        1.0,
        start,
        near(truth, 0.1),
        "fixed",
        truth=truth,
    )


TIMES, LEAPS = 30, 5  # observations, and steps of tau-leaping between them
SIZE = 1000.0  # of the predators' and the prey's populations


def populations(theta: Array, seeds: NDArray[np.uint64] | None) -> Array:
    """(k, 60) counts of prey and predators, by tau-leaping; without seeds each draw is its mean.

    theta: (k, 8) logarithms, relative to typical values, of: births of prey, predation, yield, deaths of predators,
    room for prey, immigration of prey, and both populations at the beginning.
    """
    birth, hunt, gain, death, room, arrive, prey, predators = np.exp(theta).T
    dt = 15.0 / (TIMES * LEAPS)
    x, y = SIZE * prey, 0.5 * SIZE * predators
    draws = [] if seeds is None else [np.random.default_rng(int(s)) for s in seeds]

    def draw(mean: Array) -> Array:
        mean = np.minimum(mean, 1e7)
        return (
            mean
            if seeds is None
            else np.array([r.poisson(m) for r, m in zip(draws, mean, strict=True)], dtype=np.float64)
        )

    if seeds is not None:
        x, y = np.round(x), np.round(y)
    seen = []
    for _ in range(TIMES):
        for _ in range(LEAPS):
            born = draw(dt * (birth * x + 50.0 * arrive))
            crowded = draw(dt * birth * x * x / (5 * SIZE * room))
            eaten = draw(dt * 1.2 * hunt * x * y / SIZE)
            young = draw(dt * 0.8 * gain * hunt * x * y / SIZE)
            dead = draw(dt * 0.6 * death * y)
            x, y = np.clip(x + born - crowded - eaten, 0, 1e6), np.clip(y + young - dead, 0, 1e6)
        seen += [x, y]
    return np.stack(seen, axis=1)


def predators(seed: int) -> Problem:
    """Counts of prey and predators, drawn anew in each run: the loss of the counts' means below d / 2.

    A perfect fit to the target's noise, half of the variance, would have d / 4.
    """
    rng = np.random.default_rng([104, seed])
    names = ["birth", "predation", "yield", "death", "room", "immigration", "prey", "predators"]
    space = space_of([f"log_{n}" for n in names], "", -2.5, 2.5, 0.2)
    truth = rng.uniform(-0.2, 0.2, 8)
    start = within(space, truth + rng.normal(0, 0.3, 8))
    target = populations(truth[None], np.array([900_000_000 + seed], dtype=np.uint64))[0]
    clean = populations(truth[None], None)[0]
    again = np.arange(910_000_000 + 40 * seed, 910_000_000 + 40 * seed + 20, dtype=np.uint64)
    # Of the target's counts and of a run's.
    variance = 2 * float(np.mean((populations(np.tile(truth, (20, 1)), again) - clean) ** 2))
    simulator = FunctionSimulator(populations, space, (2 * TIMES,), vectorized=True, seeded=True)
    loss = half_squares(lambda inputs: populations(inputs, None), clean, variance)
    return Problem(
        "predators",
        "simulators",
        seed,
        simulator,
        target,
        variance,
        start,
        lambda inputs, outputs: loss(inputs, outputs) / 4,
        "fixed",
        truth=truth,
        noisy=True,
        noisy_target=True,
    )
