"""The project's simulators in the race: the microscope, the teapot and a small tilt series, as in their examples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.simulator.protocol import BlockStructure
from bridge.simulator.space import ParameterSpace

from .problem import Array, Problem, space_of, within

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def _example(name: str) -> Any:
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return import_module(name)


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
    return Problem(
        f"microscope-{parameters}",
        "simulators",
        seed,
        simulator,
        target,
        1.0,
        start,
        distance,
        "fixed",
        truth=truth,
        noisy_target=parameters == 2,
    )


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

    return Problem(
        "teapot",
        "simulators",
        seed,
        Silhouettes(task, space),
        task.target,
        1.0,
        within(space, task.start),
        distance,
        "fixed",
        truth=task.truth,
    )


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

    @property
    def structure(self) -> BlockStructure | None:
        return self.series.structure

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

    return Problem(
        "tilt-series",
        "simulators",
        seed,
        Tilts(series, space),
        target,
        spread**2,
        start,
        distance,
        "loss",
        tau=0.01,
        truth=truth,
        noisy_target=True,
        runs_a_dimension=20,
    )
