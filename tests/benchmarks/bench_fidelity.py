"""What a cheap surrogate is worth: the error of the smoothed Jacobian at equal cost, with one and without.

    python tests/benchmarks/bench_fidelity.py [pendulum pendulum-wrong teapot teapot-large cryoet cryoet-coarse]

f and g are a simulator and a coarser run of it. The budget is the processor time of `num_samples` runs of f; with a
surrogate it is spent on N runs of f and N + M of g, N and M by trial on seeds of their own (M a power of two; what is
then left is not used). Errors: root mean square over `repeats` other seeds, of the whole Jacobian in natural units,
relative to the norm of a reference with many more rows. Cost ratios: processor time a run, both interleaved, least of
several. "equal error at" is the square of the ratio of errors: how many times more runs of f the plain
estimate would need if its error fell as one over the root of the runs (it falls faster with nets: then fewer).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import bridge
from adapters.render.raster import RasterSimulator
from simulators.cryoet import CryoET

TUNING, TEST, REFERENCE = 1000, 0, 9


@dataclass(frozen=True)
class Problem:
    """f, g, where they are looked at, the budget in runs of f, and the rows of the reference."""

    fine: Any
    coarse: Any
    theta: torch.Tensor
    natural: torch.Tensor
    budget: int
    reference: int


@dataclass(frozen=True)
class Enlarged:
    """A simulator of small images, brought to a larger grid, with its numbers times a factor."""

    inner: Any
    times: int
    factor: float = 1.0
    name: str = "enlarged"

    @property
    def space(self):
        return self.inner.space

    @property
    def output_shape(self):
        *lead, h, w = self.inner.output_shape
        return (*lead, h * self.times, w * self.times)

    def __call__(self, inputs, seeds):
        small = torch.as_tensor(np.asarray(self.inner(inputs, seeds)) * np.float32(self.factor))
        flat = small.reshape(-1, 1, *small.shape[-2:])
        large = torch.nn.functional.interpolate(flat, scale_factor=self.times, mode="bilinear", align_corners=False)
        return large.reshape(len(inputs), *self.output_shape).numpy()


def pendulum(steps: int) -> Callable[[np.ndarray], np.ndarray]:
    """A pendulum with dry friction, read by an encoder of 256 lines at 20 times: a staircase of its 4 parameters."""

    def run(x):
        angle, speed = x[:, 0].copy(), np.zeros(len(x))
        frequency, damping, friction = x[:, 1], x[:, 2], x[:, 3]
        dt, seen = 10.0 / steps, []
        for i in range(steps):
            speed = speed - dt * (frequency**2 * np.sin(angle) + damping * speed)
            drop = dt * friction
            speed = np.sign(speed) * np.maximum(np.abs(speed) - drop, 0)
            angle = angle + dt * speed
            if (i + 1) % (steps // 20) == 0:
                seen.append(np.round(angle * 256 / (2 * np.pi)) * 2 * np.pi / 256)
        return np.stack(seen, axis=1)

    return run


def problems() -> dict[str, Callable[[], Problem]]:
    def swing() -> Problem:
        fine, coarse = (bridge.as_simulator(pendulum(n), vectorized=True, output_shape=(20,)) for n in (4000, 100))
        theta = torch.tensor([1.0, 2.0, 0.1, 0.05], dtype=torch.float64)
        return Problem(fine, coarse, theta, torch.tensor([0.1, 0.1, 0.03, 0.02], dtype=torch.float64), 256, 16384)

    def teapot(large: int, small: int, budget: int, reference: int) -> Problem:
        fine, coarse = (RasterSimulator(size=(n, n), outputs="rgb") for n in (large, small))
        theta = torch.tensor([30.0, 40.0, 3.0, 15.0][: fine.space.dimension], dtype=torch.float64)
        natural = torch.as_tensor(fine.space.natural_scale)
        return Problem(fine, Enlarged(coarse, large // small), theta, natural, budget, reference)

    def micrograph(small: int) -> Problem:
        fine = CryoET(shape=(128, 128), pixel_size_angstrom=3.0, mode="hard")
        times = 128 // small
        coarse = CryoET(shape=(small, small), pixel_size_angstrom=3.0 * times, mode="hard", bounds=_bounds(fine))
        enlarged = Enlarged(coarse, times, times**-2.0)
        return Problem(
            fine, enlarged, torch.as_tensor(fine.reference), torch.as_tensor(fine.space.natural_scale), 64, 2048
        )

    def wrong() -> Problem:
        """A surrogate that has little to do with the simulator: a pendulum of another frequency, let go elsewhere."""
        p, run = swing(), pendulum(100)
        other = bridge.as_simulator(
            lambda x: run(np.stack([0.3 - x[:, 0], 1.5 * x[:, 2] + 3, x[:, 3], 0 * x[:, 0]], axis=1)),
            vectorized=True,
            output_shape=(20,),
        )
        return replace(p, coarse=other)

    return {
        "pendulum": swing,
        "pendulum-wrong": wrong,
        "teapot": lambda: teapot(64, 16, 256, 8192),
        "teapot-large": lambda: teapot(256, 32, 64, 2048),
        "cryoet": lambda: micrograph(64),
        "cryoet-coarse": lambda: micrograph(32),
    }


def _bounds(simulator: CryoET) -> dict[str, tuple[float, float]]:
    space = simulator.space
    return {p.name: (p.lower, p.upper) for p in space.parameters}


def seconds(simulator: Any, rows: np.ndarray) -> float:
    begin = time.process_time()
    simulator(rows, np.zeros(len(rows), dtype=np.uint64))
    return (time.process_time() - begin) / len(rows)


def cost_ratio(p: Problem) -> float:
    rng = np.random.default_rng(0)
    rows = p.theta.numpy() + p.natural.numpy() * rng.normal(size=(32, len(p.theta)))
    pairs = [(seconds(p.fine, rows), seconds(p.coarse, rows)) for _ in range(8)][1:]
    return min(c for _, c in pairs) / min(f for f, _ in pairs)


def jacobian(p: Problem, seed: int, step: int, num_samples: int, **settings: Any) -> tuple[torch.Tensor, Any]:
    smoothed = bridge.smooth(
        p.fine, seed=seed, num_samples=num_samples, scale=p.natural, on=bridge.Ranks(leaf_size=32), **settings
    )
    estimate = smoothed.estimate(p.theta, step)
    return estimate.jacobian().to(torch.float64) * p.natural, estimate.surrogate_weight


def error(p: Problem, truth: torch.Tensor, seed: int, repeats: int, num_samples: int, **settings: Any) -> np.ndarray:
    """(repeats,) squared errors relative to the squared norm of the truth."""
    squares = []
    for step in range(repeats):
        J, _ = jacobian(p, seed, step, num_samples, **settings)
        squares.append(float((J - truth).square().sum() / truth.square().sum()))
    return np.array(squares)


def splits(p: Problem, ratio: float, parts: int) -> list[tuple[int, int]]:
    """(N, M) that cost no more than the budget, M a power of two."""
    found = []
    for share in (0.125, 0.25, 0.5, 0.75):
        n = int(p.budget * share) // parts * parts
        left = (p.budget - n) / ratio - n
        if n >= 2 * parts and left >= 2 * n:
            found.append((n, 1 << int(math.log2(left))))
    return found


def main() -> None:
    known = problems()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(known))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        p = known[name]()
        ratio = cost_ratio(p)
        truth, _ = jacobian(p, REFERENCE, 0, p.reference, covariate="block")
        floor = error(p, truth, REFERENCE + 1, 1, p.reference, covariate="block").mean() ** 0.5
        print(f"\n{name}: a run of g costs {ratio:.3f} of one of f; budget {p.budget} runs of f; ", end="")
        print(f"two references differ by {floor:.4f}", flush=True)
        for replicates in (1, 8):
            plain = error(p, truth, TEST, options.repeats, p.budget, replicates=replicates)
            print(f"  replicates {replicates}: none          error {plain.mean() ** 0.5:.4f}", flush=True)
            for weight in (1.0, "auto") if replicates > 1 else (1.0,):

                def with_surrogate(m: int, weight: Any = weight, replicates: int = replicates) -> dict[str, Any]:
                    return {"replicates": replicates, "surrogate": bridge.Surrogate(p.coarse, m, weight)}  # noqa: B023

                tried = [
                    (error(p, truth, TUNING, 4, n, **with_surrogate(m)).mean(), n, m)
                    for n, m in splits(p, ratio, replicates)
                ]
                if not tried:
                    print(f"  replicates {replicates}: weight {weight!s:5}  no split fits into the budget")
                    continue
                _, n, m = min(tried)
                got = error(p, truth, TEST, options.repeats, n, **with_surrogate(m))
                _, alpha = jacobian(p, TEST, 0, n, **with_surrogate(m))
                gain = plain.mean() / got.mean()
                rng = np.random.default_rng(0)
                draws = [(rng.integers(0, len(got), len(got)), rng.integers(0, len(got), len(got))) for _ in range(999)]
                low, high = np.percentile([plain[a].mean() / got[b].mean() for a, b in draws], [5, 95])
                same = error(p, truth, TEST, options.repeats, n, replicates=replicates)
                print(
                    f"  replicates {replicates}: weight {weight!s:5}  error {got.mean() ** 0.5:.4f}  N {n}, M {m}, "
                    f"weight {float(alpha.mean()):.2f}; equal error at x {gain:.2f} (90 %: {low:.2f}-{high:.2f})"
                    f"; the same N without: {same.mean() ** 0.5:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
