"""The race's problems: a simulator, a noisy target, a start; and how far from the answer each evaluated point is.

A point is judged by one number, its distance:

fixed       max_i |theta_i - truth_i| / tolerance_i, or another distance in units of what is wanted: solved below 1;
loss        the loss without noise, 1/2 sum (r_i(theta) - target_i)^2 / variance: solved below
            f_L + tau (f_0 - f_L), the test of Moré and Wild, f_0 at the start and f_L the least that is known.

It is judged on every point that a solver evaluates, whatever the solver takes for its answer. A seed changes the start,
the target's noise, and the truth where it is drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import bridge
from bridge.simulator import FunctionSimulator, Parameter, ParameterSpace

from . import more_wild

Array = NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[3]
RUNS_A_DIMENSION = 60


@dataclass(frozen=True)
class Problem:
    """One instance.

    Attributes:
        simulator: of the project's kind; its space has bounds and natural scales.
        target, variance: of the solver's loss, 1/2 sum (simulator - target)^2 / variance.
        start: (d,).
        distance: (inputs (k, d), outputs (k, *shape)) -> (k,), see above.
        from_outputs: the distance is of the outputs, so it is taken as they come; else of the inputs alone.
        criterion: which distance it is.
        tau: of the test on the loss.
        least: the least loss that is known beforehand; None where only the solvers will tell.
        truth: (d,) a point that solves it; None where none is known.
        noisy: the simulator's outputs are noisy (solvers with a flag for noise are told).
        runs_a_dimension: the budget is that times (d + 1).
    """

    name: str
    group: Literal["simulators", "published"]
    seed: int
    simulator: Any
    target: NDArray[Any]
    variance: float
    start: Array
    distance: Callable[[Array, NDArray[Any]], Array]
    criterion: Literal["fixed", "loss"]
    tau: float = 1e-3
    least: float | None = 0.0
    truth: Array | None = None
    noisy: bool = False
    runs_a_dimension: int = RUNS_A_DIMENSION
    from_outputs: bool = False

    @property
    def dimension(self) -> int:
        return len(self.start)

    @property
    def budget(self) -> int:
        return self.runs_a_dimension * (self.dimension + 1)


def rows_of(function: Callable[[Array, int], Array], inputs: Array, seeds: NDArray[np.uint64]) -> Array:
    return np.stack([function(x, int(seed)) for x, seed in zip(inputs, seeds, strict=True)])


def space_of(
    names: list[str], units: str, lower: Any, upper: Any, natural: Any, kind: Any = "continuous"
) -> ParameterSpace:
    low, high, scale = (np.broadcast_to(np.asarray(v, dtype=np.float64), len(names)) for v in (lower, upper, natural))
    return ParameterSpace(
        tuple(
            Parameter(n, units, float(a), float(b), float(s), kind)
            for n, a, b, s in zip(names, low, high, scale, strict=True)
        )
    )


def near(truth: Array, tolerance: Any) -> Callable[[Array, NDArray[Any]], Array]:
    return lambda inputs, outputs: (np.abs(inputs - truth) / tolerance).max(axis=1)


def half_squares(
    clean: Callable[[Array], Array], target: Array, variance: float
) -> Callable[[Array, NDArray[Any]], Array]:
    """Of the outputs (k, m) that the simulator would give without noise, and the target without its noise."""
    return lambda inputs, outputs: 0.5 * ((clean(inputs) - target) ** 2).sum(axis=1) / variance


def within(space: ParameterSpace, start: Array) -> Array:
    return np.clip(start, space.lower, space.upper)


# --- simulators of this file --------------------------------------------------------------------------------------


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
    return Problem("disc", "simulators", seed, simulator, target, 0.09, start, near(truth, 0.5), "fixed", truth=truth)


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
    return Problem("noisy-sines", "simulators", seed, simulator, target, 2 * 0.02**2, start, near(truth, 0.03),
                   "fixed", truth=truth, noisy=True)  # fmt: skip


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
    return Problem("staircase", "simulators", seed, simulator, np.zeros(2 * d - 1), 1.0, start, near(truth, 0.1),
                   "fixed", truth=truth)  # fmt: skip


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
    variance = float(np.mean([(populations(truth[None], np.array([910_000_000 + 40 * seed + i], dtype=np.uint64))[0] - clean) ** 2
                              for i in range(20)])) * 2  # fmt: skip
    simulator = FunctionSimulator(populations, space, (2 * TIMES,), vectorized=True, seeded=True)
    loss = half_squares(lambda inputs: populations(inputs, None), clean, variance)
    return Problem("predators", "simulators", seed, simulator, target, variance, start,
                   lambda inputs, outputs: loss(inputs, outputs) / 4, "fixed", truth=truth, noisy=True)  # fmt: skip


# --- the project's simulators -------------------------------------------------------------------------------------


def _example(name: str) -> Any:
    path = str(ROOT / "examples")
    if path not in sys.path:
        sys.path.insert(0, path)
    return __import__(name)


@dataclass(frozen=True)
class White:
    """Micrographs divided by the detector's MTF and the noise's standard deviation: a `Simulator` of white noise."""

    problem: Any
    row_by_row = True

    @property
    def space(self) -> ParameterSpace:
        return self.problem.simulator.space

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.problem.simulator.output_shape

    def white(self, image: NDArray[Any]) -> Array:
        import torch

        return self.problem._white(torch.as_tensor(image, dtype=torch.float64)).numpy()

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return np.stack([self.white(image) for image in self.problem.simulator(inputs, seeds)])


@lru_cache(maxsize=2)
def _temsim(parameters: int) -> Any:
    experiment = _example("published_experiment")
    return experiment.make_temsim(experiment.parser().parse_args(["--parameters", str(parameters), "--size", "200"]))


def _microscope(parameters: int, seed: int) -> Problem:
    experiment = _example("published_experiment")
    arguments = experiment.parser().parse_args(["--parameters", str(parameters), "--size", "200"])
    made = experiment.make_problem(arguments, "clean" if parameters == 4 else str(1000 + seed), _temsim(parameters))
    simulator, space = White(made), made.simulator.space
    names = space.names
    truth = made.simulator.coordinates(np.array([experiment.TRUTH[n] for n in names]))
    start = within(space, made.simulator.coordinates(experiment.start_of(made.simulator.inner, 5000 + seed)))
    # One noisy micrograph tells x to 0.08 nm: 0.1 nm would be asking for luck.
    tolerance = np.array([experiment.NEAR[n] if parameters == 4 or n == "voltage_kv" else 0.25 for n in names])
    aim = made.simulator.parameters(truth)

    def distance(inputs: Array, outputs: NDArray[Any]) -> Array:
        return (np.abs(np.stack([made.simulator.parameters(u) for u in inputs]) - aim) / tolerance).max(axis=1)

    target = simulator.white(made.target.numpy())
    return Problem(f"microscope-{parameters}", "simulators", seed, simulator, target, 1.0, start, distance,
                   "fixed", truth=truth)  # fmt: skip


def microscope_2(seed: int) -> Problem:
    """The published experiment: voltage (6 kV) and place (0.25 nm) from one noisy micrograph; starts in all the box."""
    return _microscope(2, seed)


def microscope_4(seed: int) -> Problem:
    """... voltage (6 kV), focal length (0.1 mm) and place (0.1 nm) from one clean micrograph."""
    return _microscope(4, seed)


@dataclass(frozen=True)
class Silhouettes:
    """Hard silhouettes of 64 x 64 pixels in four pose parameters, with the example's units; a `Simulator`."""

    task: Any
    space: ParameterSpace
    row_by_row = True
    output_shape = (64, 64)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[np.float32]:
        return self.task.render(inputs)


def teapot(seed: int) -> Problem:
    """The pose of a teapot from its silhouette: the direction within 5 degrees."""
    example = _example("pose_of_a_teapot")
    task = example.Task(20_000 + seed)
    inner = task.space
    lower = np.maximum(inner.lower, [-3, -360, -360, np.log(1.2)])
    upper = np.minimum(inner.upper, [3, 360, 360, np.log(12)])
    space = space_of(list(inner.names), "", lower, upper, example.UNIT)

    def distance(inputs: Array, outputs: NDArray[Any]) -> Array:
        return np.hypot(inputs[:, 1], inputs[:, 2]) / example.SUCCESS_DEG

    return Problem("teapot", "simulators", seed, Silhouettes(task, space), task.target, 1.0, within(space, task.start),
                   distance, "fixed", truth=task.truth)  # fmt: skip


@lru_cache(maxsize=1)
def _layout() -> Any:
    from simulators.cryoet import Specimen

    example = _example("align_tilt_series")
    return example.Layout(Specimen.helix(16), example.MIDDLE, 11, size=64, pixel=6.0)


@dataclass(frozen=True)
class Tilts:
    """Images of a small tilt series with the example's natural scales; a `Simulator`."""

    series: Any
    space: ParameterSpace
    row_by_row = True

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.series.output_shape

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[Any]:
        return self.series(inputs, seeds).astype(np.float64)


def tilt_series(seed: int) -> Problem:
    """Shifts, defocus and axis of 11 images of 64 x 64 pixels, 34 parameters: the loss without noise, tau = 0.01.

    Starts are off by up to half of what the example's are: 1.5 nm, 0.15 um, 1 degree.
    """
    example, layout = _example("align_tilt_series"), _layout()
    series = layout.series()
    truth = example.truth(layout, 30_000 + seed)
    inner = series.space
    lower, upper = inner.lower.copy(), inner.upper.copy()
    lower[-1], upper[-1] = layout.axis_deg - 10, layout.axis_deg + 10
    space = space_of(list(inner.names), "", lower, upper, 0.25 * layout.spread(example.START))
    start = within(space, 0.5 * (truth + example.coarse(layout, truth, 30_000 + seed)))
    clean = series(truth[None], np.zeros(1, dtype=np.uint64))[0].astype(np.float64)
    spread = 2.0 * layout.gain  # two electrons a pixel: as of a sum of a dozen such series
    target = clean + spread * np.random.default_rng([105, seed]).standard_normal(clean.shape)

    def distance(inputs: Array, outputs: NDArray[Any]) -> Array:
        return np.array([0.5 * ((y - clean) ** 2).sum() / spread**2 for y in outputs])

    return Problem("tilt-series", "simulators", seed, Tilts(series, space), target, spread**2, start, distance, "loss",
                   tau=0.01, truth=truth, runs_a_dimension=20, from_outputs=True)  # fmt: skip


# --- the published test set ---------------------------------------------------------------------------------------


def published(name: str, variant: str, seed: int) -> Problem:
    """A function of `more_wild`; the start is the published one, moved by about a natural scale."""
    function = more_wild.FUNCTIONS[name]
    begin = np.array(function.start)
    d, size = len(begin), max(1.0, float(np.abs(begin).max()))
    # Radius of the trust region that DFO-LS and Py-BOBYQA start with by default; a wide box for those who need one.
    space = space_of([f"x{i}" for i in range(d)], "", -10 * size, 10 * size, 0.1 * size)
    start = begin + 0.1 * size * np.random.default_rng([106, seed]).standard_normal(d)

    def outputs(inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        return rows_of(lambda x, s: more_wild.residuals(function, variant, x, s), inputs, seeds)

    m = len(function.residuals(begin))
    simulator = FunctionSimulator(outputs, space, (m,), vectorized=True, seeded=True)

    def clean(inputs: Array) -> Array:
        return np.stack([more_wild.true_residuals(function, variant, x) for x in inputs])

    distance = half_squares(clean, np.zeros(m), 1.0)
    # The least sum of absolute values is another one, unless all residuals vanish.
    least = None if variant == "nonsmooth" and function.minimum > 0 else function.minimum
    return Problem(f"{name}:{variant}", "published", seed, simulator, np.zeros(m), 1.0, start, distance, "loss", least=least,
                   noisy=variant in ("deterministic", "stochastic"))  # fmt: skip


SIMULATORS: dict[str, Callable[[int], Problem]] = {
    "disc": disc,
    "noisy-sines": noisy_sines,
    "microscope-2": microscope_2,
    "microscope-4": microscope_4,
    "teapot": teapot,
    "staircase": staircase,
    "predators": predators,
    "tilt-series": tilt_series,
}
PUBLISHED = tuple(f"{name}:{variant}" for name in more_wild.FUNCTIONS for variant in more_wild.VARIANTS)
NAMES = (*SIMULATORS, *PUBLISHED)


def make(name: str, seed: int) -> Problem:
    """A problem of `NAMES`.

    Raises:
        InputError: an unknown name.
    """
    if name not in NAMES:
        raise bridge.errors.InputError(f"Unknown problem {name!r}. Known: {', '.join(NAMES)}.")
    return SIMULATORS[name](seed) if name in SIMULATORS else published(*name.split(":"), seed)
