"""What the automatic choice of points and weights is worth: simulations for the same error of the whole Jacobian.

    python tests/benchmarks/bench_auto.py

For each problem the best published strategy within a budget (Monte Carlo, midpoint and jittered Latin, cartesian; no
covariate, f(x), leave-one-out; plain and antithetic) is compared with `auto`, one scramble: the runs that `auto` needs
for the same root mean square error, by lines in the logarithms, as a ratio. A run is a row; f(x) is one more. Cartesian
points have numbers of their own, so budgets among these are looked at too; the first line of five parameters is at 243.
Intervals: 90 %, by the bootstrap over repetitions. Errors are relative to the norm of the truth.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import bridge
from bridge.errors import InputError
from simulators.analytic import Disc, Sines

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from variance_study import COVARIATES, PARTS, POINTS, jacobians, problem, sizes_for

SIZES = (256, 512, 1024)
AUTO_SIZES = (16, 32, 64, 128, 256, 512, 1024)
NOISE = 0.02


@dataclass(frozen=True)
class Noisy:
    """Another simulator with noise of its own on every output, from the seeds."""

    inner: Sines

    @property
    def space(self):
        return None

    @property
    def output_shape(self):
        return self.inner.output_shape

    def __call__(self, inputs, seeds):
        noise = [np.random.Generator(np.random.Philox(key=int(s))).normal(size=self.output_shape) for s in seeds]
        return self.inner(inputs, seeds) + NOISE * np.stack(noise)


def sines() -> Sines:
    rng = np.random.default_rng(0)
    return Sines(rng.normal(size=(20, 6)), rng.uniform(0, 2 * np.pi, 20))


# (name, simulator, theta, scale, density, repetitions, most simulations allowed as a share of the best published)
CASES = [
    *(
        (f"{name}, {density}", problem(name).simulator, tuple(problem(name).theta), 1.0, density, 192, 0.65)
        for name in PARTS["sorting"]
        for density in ("gaussian", "laplace", "logistic")
    ),
    ("disc 64 x 64, gaussian", Disc(64), (0.1, -0.2, 0.5), 0.05, "gaussian", 32, 0.6),
    ("noisy sines, gaussian", Noisy(sines()), (0.0,) * 6, 0.2, "gaussian", 64, 0.15),
]


def truth_of(simulator, theta, scale, density) -> np.ndarray:
    exact = simulator.inner if isinstance(simulator, Noisy) else simulator
    return exact.smoothed(theta, scale, density)[1].reshape(-1, len(theta))


def squares(simulator, theta, scale, density, n, repetitions, points, antithetic, covariate) -> np.ndarray:
    """Squared errors of the Jacobian of each repetition."""
    truth = truth_of(simulator, theta, scale, density)
    smoothed = bridge.smooth(
        simulator,
        seed=0,
        num_samples=n,
        distribution=density,
        scale=scale,
        points=f"antithetic-{points}" if antithetic else points,
        covariate=covariate,
        simulator_seeds="independent",
        on=bridge.Ranks(leaf_size=n),
    )
    whole = [jacobians(smoothed, np.array(theta), 16, step) for step in range(repetitions // 16)]
    return np.sum((np.concatenate(whole) - truth) ** 2, axis=(1, 2))


def published(d: int, budget: int):
    """Feasible strategies of the study with the rows they can have within a budget, and the runs these cost."""
    for points, covariate, antithetic in itertools.product(POINTS, COVARIATES, (False, True)):
        extra, pairs = int(covariate == "f(x)"), 1 + antithetic
        rows = (budget - extra) // pairs * pairs
        if points == "rqmc-cartesian":
            if d > 6 or (d == 5 and antithetic):
                continue
            rows = pairs * int((rows / pairs) ** (1 / d) + 1e-9) ** d
        if rows >= 8:
            yield (points, antithetic, covariate), rows, rows + extra


def lines(case: tuple) -> list[str]:
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    name, simulator, theta, scale, density, repetitions, allowed = case
    d = len(theta)
    common = (simulator, theta, scale, density)
    ours = {n: squares(*common, n, repetitions, "auto", False, "auto") for n in AUTO_SIZES if n > d + 1}
    done: dict[tuple, np.ndarray] = {}
    printed, seen = [], set()
    for budget in sorted({*SIZES, *(k**d for k in range(2, 12) if SIZES[0] <= k**d <= SIZES[-1])}):
        entries = []
        for strategy, rows, runs in published(d, budget):
            if (budget not in SIZES and strategy[0] != "rqmc-cartesian") or runs > budget:
                continue
            if (strategy, rows) not in done:
                try:
                    done[strategy, rows] = squares(*common, rows, repetitions, *strategy)
                except InputError:
                    continue
            entries.append((float(np.sqrt(done[strategy, rows].mean())), strategy, rows, runs))
        error, strategy, rows, runs = min(entries)
        if (strategy, rows) in seen:
            continue
        seen.add((strategy, rows))

        def needed(best: np.ndarray, mine: dict[int, np.ndarray]) -> float:
            return sizes_for([(n, float(np.sqrt(s.mean()))) for n, s in mine.items()], float(np.sqrt(best.mean())))

        best = done[strategy, rows]
        error /= float(np.linalg.norm(truth_of(simulator, theta, scale, density)))
        resampled = []
        for _ in range(200):
            pick = rng.integers(0, len(best), (2, len(best)))
            resampled.append(needed(best[pick[1]], {n: s[pick[0]] for n, s in ours.items()}) / runs)
        low, high = np.quantile(resampled, [0.05, 0.95])
        label = f"{strategy[0]}{' antithetic' if strategy[1] else ''} + {strategy[2]}"
        count = needed(best, ours)
        printed.append(
            f"{name:24} {runs:>5} {error:>7.4f}  {label:34} {count:>10.0f} {count / runs:>6.2f} "
            f"({low:.2f} - {high:.2f}) {allowed:>8}"
        )
    return printed


def main() -> None:
    print(f"{'problem':24} {'runs':>5} {'error':>7}  {'best published':34} auto needs  ratio  (90 %)        allowed")
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for printed in pool.map(lines, CASES):
            print("\n".join(printed), flush=True)


if __name__ == "__main__":
    main()
