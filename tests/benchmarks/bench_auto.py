"""What the automatic choice of points and weights is worth: simulations for the same error of the whole Jacobian.

    python tests/benchmarks/bench_auto.py

For each problem the best published strategy at each number of rows (Monte Carlo, midpoint and jittered Latin, cartesian;
no covariate, f(x), leave-one-out; plain and antithetic) is compared with `auto`, one scramble: the rows that `auto` needs
for the same root mean square error, by lines in the logarithms, as a ratio. A simulation is a row, f(x) one more.
Intervals: 90 %, by the bootstrap over repetitions, of the published strategy chosen.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import bridge
from bridge.errors import InputError
from simulators.analytic import Disc, HardSort, Sines

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from variance_study import COVARIATES, POINTS, jacobians, sizes_for

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
        (f"sorting {n}, {density}", HardSort(n), theta, 1.0, density, 400, 0.65)
        for n, theta in ((3, (-0.41, 0.08, 0.57)), (5, (-0.71, -0.29, 0.04, 0.36, 0.82)))
        for density in ("gaussian", "laplace", "logistic")
    ),
    ("disc 64 x 64, gaussian", Disc(64), (0.1, -0.2, 0.5), 0.05, "gaussian", 32, 0.6),
    ("noisy sines, gaussian", Noisy(sines()), (0.0,) * 6, 0.2, "gaussian", 64, 0.15),
]


def squares(simulator, theta, scale, density, n, repetitions, points, antithetic, covariate) -> np.ndarray:
    """Squared errors of the Jacobian of each repetition."""
    exact = simulator.inner if isinstance(simulator, Noisy) else simulator
    truth = exact.smoothed(theta, scale, density)[1].reshape(-1, len(theta))
    smoothed = bridge.smooth(
        simulator,
        seed=0,
        num_samples=n,
        distribution=density,
        scale=scale,
        points=points,
        antithetic=antithetic,
        covariate=covariate,
        simulator_seeds="independent",
        leaf_size=n,
    )
    whole = [jacobians(smoothed, np.array(theta), 16, step) for step in range(repetitions // 16)]
    return np.sum((np.concatenate(whole) - truth) ** 2, axis=(1, 2))


def published(d: int, n: int):
    """(strategy, rows) that the study allows with up to n rows, f(x) included; cartesian at its own numbers, n among
    them."""
    for points, covariate, antithetic in itertools.product(POINTS, COVARIATES, (False, True)):
        extra = covariate == "f(x)"
        pairs = 1 + antithetic
        rows = (n - extra) // pairs * pairs
        if points == "rqmc-cartesian":
            if d > 5 or (d == 5 and antithetic):
                continue
            rows = pairs * int(((n - extra) / pairs) ** (1 / d) + 1e-9) ** d
        yield (points, antithetic, covariate), rows, rows + extra


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    print(
        "problem                   runs   error  best published                      auto needs  ratio (90 %)    allowed"
    )
    for name, simulator, theta, scale, density, repetitions, allowed in CASES:
        d = len(theta)
        common = (simulator, theta, scale, density)
        ours = {n: squares(*common, n, repetitions, "auto", False, "auto") for n in AUTO_SIZES if n > d + 1}
        done: dict[tuple, np.ndarray] = {}
        # Cartesian points at numbers of their own: the frontier is looked at there too.
        own = {k**d for k in range(2, 12)} if d <= 5 else set()
        budgets = sorted(set(SIZES) | {n for n in own if SIZES[0] <= n <= SIZES[-1]})
        for budget in budgets:
            entries = []
            for strategy, rows, runs in published(d, budget):
                if rows < 8:
                    continue
                key = (strategy, rows)
                if key not in done:
                    try:
                        done[key] = squares(*common, rows, repetitions, *strategy)
                    except InputError:
                        continue
                entries.append((float(np.sqrt(done[key].mean())), strategy, rows, runs))
            error, strategy, rows, runs = min(entries)
            if runs < SIZES[0] or (runs < budget and budget not in own):
                continue  # a size of its own, counted there

            def ratio(best: np.ndarray, mine: dict[int, np.ndarray], runs: int = runs) -> tuple[float, float]:
                curve = [(n, float(np.sqrt(s.mean()))) for n, s in mine.items()]
                needed = sizes_for(curve, float(np.sqrt(best.mean())))
                return needed, needed / runs

            needed, value = ratio(done[strategy, rows], ours)
            resampled = []
            for _ in range(200):
                pick = rng.integers(0, repetitions // 16 * 16, (2, repetitions // 16 * 16))
                again = {n: s[pick[0]] for n, s in ours.items()}
                resampled.append(ratio(done[strategy, rows][pick[1]], again)[1])
            low, high = np.quantile(resampled, [0.05, 0.95])
            label = f"{strategy[0]}{' antithetic' if strategy[1] else ''} + {strategy[2]}"
            print(
                f"{name:24} {runs:>6} {error:>7.4f}  {label:34} {needed:>11.0f} {value:>6.2f} "
                f"({low:.2f} - {high:.2f}) {allowed:>6}"
            )


if __name__ == "__main__":
    main()
