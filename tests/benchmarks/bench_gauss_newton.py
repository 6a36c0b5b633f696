"""Runs of the simulator that `bridge.fit(method="gauss-newton")` takes to a solution, on ten problems.

    python tests/benchmarks/bench_gauss_newton.py [SEEDS]

Each seed has a start of its own, up to 0.3 natural scales beside the given one. Printed are, for the loss of the
simulator itself above its least (of the start's): how many seeds came below 1e-2 and 1e-4 for good, the median of the
runs that took, and of the runs of the whole fit; for the default settings, for 12 runs a step, and for 16 with scales
from 1 to 0.03. Wood's, Beale's, Jennrich and Sampson's function, the helical valley and Biggs's of six parameters are
those of More, Garbow and Hillstrom, ACM TOMS 7 (1981) 17.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares

import bridge

ROWS, COLUMNS = np.mgrid[0:48, 0:48] + 0.5
T, W, COUNT, BIGGS = np.linspace(0, 3, 40), np.linspace(0, 10, 120), np.arange(1, 11.0), 0.1 * np.arange(1, 14)
MATRIX = np.random.default_rng(3).normal(size=(160, 48)) / 7
RNG = np.random.default_rng(42)
PEAKS = np.array([1, 2.5, 0.5, 1.5, 5, 0.8, 0.8, 7.5, 0.4])
MANY = RNG.normal(size=48)
BOX = np.array([24.3, 22.1, 13.2, 7.1, -0.1])


def beale(x):
    return np.array([x[0] * (1 - x[1] ** i) for i in (1, 2, 3)])


def wood(x):
    a, b, c, d = x
    last = np.sqrt(10) * (b + d - 2), (b - d) / np.sqrt(10)
    return np.array([10 * (b - a * a), 1 - a, np.sqrt(90) * (d - c * c), 1 - c, *last])


def jennrich(x):
    return np.exp(np.clip(COUNT * x[0], -50, 8)) + np.exp(np.clip(COUNT * x[1], -50, 8))


def biggs(x):
    e = np.exp(-np.clip(np.outer(x[[0, 1, 4]], BIGGS), -20, 20))
    return x[2] * e[0] - x[3] * e[1] + x[5] * e[2]


def box(x):
    c, s = np.cos(x[4]), np.sin(x[4])
    u, v = (COLUMNS - x[0]) * c + (ROWS - x[1]) * s, (ROWS - x[1]) * c - (COLUMNS - x[0]) * s
    return ((np.abs(u) < x[2]) & (np.abs(v) < x[3])).astype(float)


def exponential(x):
    return x[0] * np.exp(-x[1] * T) + x[2]


def noisy(x, seed):
    return exponential(x) + 0.05 * np.random.default_rng(seed).normal(size=40)


def peaks(x):
    return sum(h * np.exp(-0.5 * ((W - c) / w) ** 2) for h, c, w in x.reshape(3, 3))


def many(x):
    return np.tanh(MATRIX @ x) + 0.3 * (MATRIX @ x)


def helix(x):
    turn = np.arctan2(x[1], x[0]) / (2 * np.pi)
    return np.array([10 * (x[2] - 10 * turn), 10 * (np.hypot(x[0], x[1]) - 1), x[2]])


def stairs(x):
    return np.floor(6 * (x[0] * np.exp(-x[1] * T) + x[2] * np.cos(2 * T + x[3]))) / 6


class Problem(NamedTuple):
    function: Callable[..., Any]
    start: list[float]
    natural: list[float]
    target: Any
    clean: Callable[..., Any] | None = None


PROBLEMS = {
    "beale": Problem(beale, [1, 1], [1, 0.3], np.array([1.5, 2.25, 2.625])),
    "wood": Problem(wood, [-3, -1, -3, -1], [1] * 4, np.zeros(6)),
    "jennrich": Problem(jennrich, [0.3, 0.4], [0.1] * 2, 2 + 2 * COUNT),
    "biggs": Problem(biggs, [1, 2, 1, 1, 1, 1], [1, 4, 1, 2, 2, 2], biggs(np.array([1, 10, 1, 5, 4, 3.0]))),
    "box": Problem(box, [18, 29, 9, 11, 0.3], [3, 3, 2, 2, 0.3], box(BOX)),
    "noisy": Problem(noisy, [1, 2.5, 0], [0.5, 0.5, 0.3], exponential([2, 1.2, 0.5]), exponential),
    "peaks": Problem(
        peaks,
        [0.6, 3.1, 0.9, 0.9, 4.3, 0.5, 1.2, 8.2, 0.7],
        [0.3, 0.4, 0.2] * 3,
        peaks(PEAKS) + 0.03 * RNG.normal(size=120),
    ),
    "many": Problem(many, [0] * 48, [1] * 48, many(MANY)),
    "helix": Problem(helix, [-1, 0.1, 0], [0.5, 0.5, 2], np.zeros(3)),
    "stairs": Problem(stairs, [1, 2, 0.5, 0.8], [0.5, 0.5, 0.4, 0.4], stairs([2, 1.2, 1, 0.2])),
}
DEFAULT = bridge.GaussNewton()
METHODS = {
    "default": DEFAULT,
    "12 runs": bridge.GaussNewton(num_samples=12),
    "16 runs": bridge.GaussNewton(num_samples=16, scale=(1.0, 0.03)),
}
LEAST = {
    "jennrich": 2 * least_squares(lambda x: jennrich(x) - 2 - 2 * COUNT, [0.25, 0.25]).cost,
    "peaks": 2 * least_squares(lambda x: peaks(x) - PROBLEMS["peaks"].target, PEAKS).cost,
}


def runs_to(name: str, seed: int, method: bridge.GaussNewton) -> tuple[float, float, int]:
    """Runs after which the loss stays below 1e-2 and 1e-4 of the start's, and of the whole fit."""
    p = PROBLEMS[name]
    names = [f"p{i}" for i in range(len(p.start))]
    simulator = bridge.as_simulator(p.function, names=names, natural_scale=p.natural, seeded=p.clean is not None)
    away = 0.3 * np.array(p.natural) * np.random.default_rng(seed).uniform(-1, 1, len(p.start))
    if name == "many":
        method = replace(method, num_samples=64)
    if name == "noisy":
        method = replace(method, simulator_seeds="independent")
    result = bridge.fit(simulator, p.target, np.array(p.start) + away, seed=seed, method=method)
    visited = [np.array(h.parameters) for h in result.history] + [result.parameters]
    cost = [0] + [h.num_evaluations for h in result.history]
    losses = np.array([((np.asarray((p.clean or p.function)(x)) - p.target) ** 2).sum() for x in visited])
    losses -= LEAST.get(name, 0.0)
    found = []
    for part in (1e-2, 1e-4):
        above = np.flatnonzero(~(losses < part * losses[0]))
        first = above[-1] + 1 if len(above) else 0
        found.append(float(cost[first]) if first < len(cost) else np.inf)
    return found[0], found[1], result.num_evaluations


def main(seeds: int) -> None:
    for words, method in METHODS.items():
        for name in PROBLEMS:
            if name == "many" and method != DEFAULT:  # 48 parameters: 64 runs a step
                continue
            told = np.array([runs_to(name, seed, method) for seed in range(seeds)])
            found, median = np.isfinite(told).sum(axis=0), np.median(told, axis=0)
            print(
                f"{words:8s} {name:9s} {found[0]:2d} below 1e-2 after {median[0]:4.0f}, {found[1]:2d} below 1e-4 after "
                f"{median[1]:4.0f}, all {median[2]:4.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
