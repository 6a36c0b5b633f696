"""Ground truth and assertions for estimators and adapters; public, so that adapter authors can use them too."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from bridge.arrays import Array, real_array
from bridge.errors import BridgeError, InputError
from bridge.estimators.distributions import Cauchy, Distribution, Gaussian, Gumbel, Triangular
from bridge.estimators.points import Nodes, PointSet
from bridge.evaluation.workers import IsolatedSimulator
from bridge.simulator.function import unwatched
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.repeatability import generators, same


@final
@dataclass(frozen=True)
class Quadrature(PointSet):
    """Gauss-Legendre nodes and weights for a density in place of random points: the estimators without noise.

    Use it with covariate="none" and num_samples=rule.size(distribution, d). Panels end at 0, where densities may have
    kinks, at `breakpoints` (in eps), where f may jump, and where the density falls below 1e-17.

    Args:
        order: nodes of a panel.
        breakpoints: eps values, in every coordinate, at which f is not smooth.
    """

    order: int = 40
    breakpoints: tuple[float, ...] = ()
    name: ClassVar[str] = "quadrature"

    def line(self, distribution: Distribution) -> tuple[Array, Array]:
        """Nodes and weights on the line: sum_i w_i g(e_i) = E[g]."""
        x, w = np.polynomial.legendre.leggauss(self.order)
        heavy = isinstance(distribution, Cauchy)
        if heavy:
            # In the angle t, e = tan t, the density is constant: the infinite support becomes an interval.
            angles = np.arctan([0.5, 1, 2, 4, 8, 16, 32, 64, np.inf])
            edges = np.concatenate([[0], angles, -angles, np.arctan(self.breakpoints)])
        else:
            ladder = (
                [0.25, 0.5, 1, 2, 3, 4.5, 6, 9] if isinstance(distribution, Gaussian) else [0.5, 1, 2, 4, 8, 16, 28, 42]
            )
            if isinstance(distribution, Triangular):
                ladder = [0.5, 1]
            left = [0.5, 1, 1.5, 2, 2.5, 3, 3.4, 3.8] if isinstance(distribution, Gumbel) else ladder
            edges = np.concatenate([[0], ladder, np.negative(left), self.breakpoints])
        edges = np.unique(edges)
        half = 0.5 * np.diff(edges)
        t = (0.5 * (edges[1:] + edges[:-1])[:, None] + half[:, None] * x).ravel()
        weight = (half[:, None] * w).ravel()
        if heavy:
            return np.tan(t), weight / np.pi
        return t, weight * np.exp(distribution.log_prob(t))

    def size(self, distribution: Distribution, d: int) -> int:
        """Number of nodes in d dimensions (a tensor product)."""
        return len(self.line(distribution)[0]) ** d

    def uniform(self, n: int, d: int, rng: np.random.Generator) -> Array:
        raise InputError("Quadrature has nodes and weights, not uniform points.")

    def nodes(self, distribution: Distribution, n: int, d: int, rng: np.random.Generator) -> Nodes:
        e, w = self.line(distribution)
        if n != len(e) ** d:
            raise InputError(f"Expected num_samples={len(e) ** d} for this quadrature in {d} dimensions, got {n}.")
        eps = np.array(list(itertools.product(e, repeat=d)))
        weight = np.prod(np.array(list(itertools.product(w, repeat=d))), axis=1)
        return Nodes(eps, distribution.score(eps), weight, n)


def mean_differs(samples: ArrayLike, truth: ArrayLike, alpha: float = 1e-6) -> bool:
    """Whether a two-sided t-test, over the first axis and Bonferroni-corrected over the others, rejects the truth."""
    rows = np.asarray(samples, dtype=np.float64)
    rows = rows.reshape(len(rows), -1)
    deviation = rows.mean(axis=0) - np.asarray(truth, dtype=np.float64).ravel()
    error = rows.std(axis=0, ddof=1) / np.sqrt(len(rows))
    p = 2 * stats.t.sf(np.abs(deviation) / np.maximum(error, 1e-300), len(rows) - 1)
    return bool((p < alpha / rows.shape[1]).any())


def assert_mean(samples: ArrayLike, truth: ArrayLike, power: float = 0.1, alpha: float = 1e-6) -> None:
    """Asserts that independent estimates have this mean, and that the test would have noticed an error of `power`.

    Args:
        samples: (replicates, ...) independent estimates.
        truth: (...).
        power: the same test must reject truth x (1 + power) and truth x (1 - power); raise replicates if it cannot.
    """
    rows, exact = np.asarray(samples, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if mean_differs(rows, exact, alpha):
        raise AssertionError(f"Expected the mean {exact.tolist()}, got {rows.mean(axis=0).tolist()}.")
    for wrong in (exact * (1 + power), exact * (1 - power)):
        if not mean_differs(rows, wrong, alpha):
            raise AssertionError(f"{len(rows)} replicates cannot tell an error of {power:.0%}: take more.")


def check_simulator(simulator: Simulator, inputs: ArrayLike, seeds: ArrayLike | None = None) -> None:
    """The contract of `bridge.Simulator`: shapes, finite numbers, rows independent of each other, arguments untouched.

    Args:
        simulator: to be checked.
        inputs: (k, d), k >= 2, inside the simulator's bounds.
        seeds: (k,); 0, 1, ... when left out.
    """
    x = np.array(inputs, dtype=np.float64, order="C")
    s = np.arange(len(x), dtype=np.uint64) if seeds is None else np.asarray(seeds, dtype=np.uint64)
    name = simulator_name(simulator)
    if len(x) < 2:
        raise InputError(f"Expected at least two rows to compare, got {len(x)}.")
    given = x.copy()
    together = np.asarray(simulator(given, s.copy()))
    assert (given == x).all(), f"{name} changed its inputs"
    assert len(together) == len(x), f"{name} returned {len(together)} outputs for {len(x)} rows"
    if simulator.output_shape is not None:
        assert together.shape[1:] == simulator.output_shape, (
            f"{name} declares output_shape={simulator.output_shape} and returned {together.shape[1:]}"
        )
    assert np.isfinite(together).all(), f"{name} returned NaN or infinity"
    for i in range(len(x)):
        alone = np.asarray(simulator(x[i : i + 1].copy(), s[i : i + 1].copy()))[0]
        assert np.array_equal(alone, together[i]), f"{name}: row {i} depends on the rows beside it"


@final
@dataclass(frozen=True)
class Finding:
    """One thing that `examine` has looked at.

    Attributes:
        what: it is. good: whether it is as it should be; None for what is only told. words: what was seen, what to do.
    """

    what: str
    good: bool | None
    words: str


def examine(simulator: Simulator, at: ArrayLike, seed: int = 0, elsewhere: bool = True) -> list[Finding]:
    """Looks at whether a simulator keeps to what `bridge.Simulator` asks: the same numbers for the same row and seed.

    Eleven rows about a place are run together, again, in reverse order, one by one, and in another process in reverse.

    Args:
        at: (d,) parameters. seed: of the rows and of the simulator. elsewhere: whether another process is tried.

    Returns:
        what was found, in the order in which it was looked for; it ends early where there is nothing to compare.
    """
    space, centre = simulator.space, np.asarray(at, dtype=np.float64)
    natural = np.ones(len(centre)) if space is None else space.natural_scale
    rng = np.random.Generator(np.random.Philox(key=[seed, 1 << 41]))
    x = centre + 0.1 * natural * rng.normal(size=(11, len(centre)))
    x[0] = centre
    if space is not None:
        x = np.clip(x, space.lower, space.upper)
    looking = _Examination(simulator, x, rng.integers(0, 2**63, size=len(x), dtype=np.uint64))
    unwatched(simulator)
    child: IsolatedSimulator | BridgeError | None = None
    if elsewhere:
        try:
            child = IsolatedSimulator(simulator)  # before it has run: what it keeps does not travel with it
        except BridgeError as error:
            child = error
    folder, here = Path.cwd(), sorted(os.listdir())
    try:
        looking.run_together()
        if not looking.compare_orders():
            return looking.found
        looking.change_seeds(rng.integers(0, 2**63, size=len(x), dtype=np.uint64))
        looking.look_at_folder(folder, here)
    except Exception as error:
        what = str(error) if isinstance(error, BridgeError) else f"{type(error).__name__}: {error}"
        looking.tell("runs", False, what)
        return looking.found
    if child is not None:
        looking.compare_elsewhere(child)
    return looking.found


class _Examination:
    """What `examine` looks at, step by step; `found` grows."""

    def __init__(self, simulator: Simulator, x: Array, seeds: NDArray[np.uint64]) -> None:
        self.simulator, self.x, self.seeds = simulator, x, seeds
        self.every = np.arange(len(x))
        self.found: list[Finding] = []
        self.keep = (
            "Keep nothing between calls, and draw from the seed alone: as_simulator(f, seeded=True) hands it over."
        )
        self.together: NDArray[Any] = np.empty(0)

    def tell(self, what: str, good: bool | None, words: str) -> None:
        self.found.append(Finding(what, good, words))

    def run(self, rows: NDArray[np.intp], seeds: NDArray[np.uint64] | None = None) -> NDArray[Any]:
        with_seeds = self.seeds if seeds is None else seeds
        given, own = self.x[rows].copy(), with_seeds[rows].copy()
        outputs = real_array(self.simulator(given, own), "from the simulator").copy()
        if not (np.array_equal(given, self.x[rows]) and np.array_equal(own, with_seeds[rows])):
            raise InputError("It changed the parameters that it was given. Work on a copy: theta = theta.copy().")
        return outputs

    def compare(self, what: str, rows: NDArray[np.intp], outputs: NDArray[Any], advice: str) -> bool:
        """Whether these are the outputs of the same rows, run together."""
        pairs = [(self.together[i], y) for i, y in zip(rows, outputs, strict=True)]
        alike = [same(first, y) for first, y in pairs]
        if not all(alike):
            self.tell(what, False, f"{len(alike) - sum(alike)} of {len(alike)} outputs are others. {advice}")
            return False
        bits = all(np.array_equal(first, y, equal_nan=y.dtype.kind == "f") for first, y in pairs)
        self.tell(what, True, "the same numbers" if bits else "the same but for the last digits")
        return True

    def run_together(self) -> None:
        """Shape, time, draws from global generators, numbers that are not finite."""
        states, begin = generators(), time.perf_counter()
        together = self.together = self.run(self.every)
        seconds = (time.perf_counter() - begin) / len(self.x)
        self.tell("runs", None, f"outputs of shape {together.shape[1:]} and {together.dtype}, {seconds:.3g} s each")
        declared = self.simulator.output_shape
        if declared is not None and together.shape[1:] != tuple(declared):
            self.tell("shape", False, f"it declares output_shape={declared} and gives {together.shape[1:]}.")
        drawn = [source for source, state in generators().items() if states.get(source, state) != state]
        if drawn:
            self.keep = f"It draws from {' and '.join(drawn)}. {self.keep}"
        bad = int((~np.isfinite(together.reshape(len(self.x), -1))).any(axis=1).sum())
        words = (
            f"{bad} of {len(self.x)} outputs have NaN or infinity. Bound the parameters, or see failures= and missing=."
        )
        self.tell("finite", bad == 0, words if bad else "all numbers are")

    def compare_orders(self) -> bool:
        """Whether there is anything else to compare."""
        every = self.every
        if not self.compare("a second call", every, self.run(every), self.keep):
            return False
        self.compare("in reverse order", every[::-1], self.run(every[::-1]), self.keep)
        alone = np.concatenate([self.run(every[i : i + 1]) for i in every])
        advice = "Rows of one call depend on each other; each is to be run by itself."
        self.compare("one row at a time", every, alone, advice)
        return True

    def change_seeds(self, seeds: NDArray[np.uint64]) -> None:
        """What outputs depend on."""
        others = self.run(self.every, seeds)
        noisy = not all(same(a, b) for a, b in zip(self.together, others, strict=True))
        self.tell("the seed", None, "outputs depend on it" if noisy else "outputs do not depend on it")
        changed = not all(same(self.together[0], y) for y in self.together[1:])
        none = "No output changes. Is the scale too small, or are they not read?"
        self.tell("the parameters", changed, "outputs change with them" if changed else none)

    def look_at_folder(self, folder: Path, before: list[str]) -> None:
        """Whether it left the working directory, or files there; goes back to it."""
        moved = Path.cwd() != folder
        left = sorted(set(os.listdir(folder)) - set(before))
        words = "as it was"
        if moved:
            words = f"It goes to {Path.cwd()}. Give programs their directory instead (cwd=)."
        elif left:
            words = f"It leaves {', '.join(left[:3])}: several runs at once may meet there. "
            words += "See bridge.Workers(own_directory=)."
        self.tell("the working directory", not (moved or left), words)
        os.chdir(folder)

    def compare_elsewhere(self, child: IsolatedSimulator | BridgeError) -> None:
        what = "in another process"
        if isinstance(child, BridgeError):
            self.tell(what, False, str(child))
            return
        try:
            # Begun with another row: what a function keeps of its first call is another there.
            rows = self.every[::-1]
            outputs = real_array(child(self.x[rows], self.seeds[rows]), "from there")
            self.compare(what, rows, outputs, self.keep)
        except BridgeError as error:
            self.tell(what, False, str(error))
        finally:
            child.close()
