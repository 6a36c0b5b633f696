"""What a solver sees of a problem: losses and residuals in natural units; and what is counted meanwhile."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.simulator.protocol import BlockStructure, Structured
from bridge.simulator.space import ParameterSpace

from .problem import Array, Problem

WORST = 1e30  # in place of a loss that is not finite
STRICTEST = 1e-5  # tau beyond which nothing is looked at
OWN_CPU_S = 60.0


class SpentError(Exception):
    """The budget, or the solver's own time, is used up."""


class Counter:
    """Counts runs and rounds, remembers all points, and stops at the budget, or where nothing is left to be solved.

    A round is a batch whose points do not need each other's results. Coordinates z are parameters in natural units;
    points outside the bounds are moved onto them.

    Args:
        budget: of runs.
        design: so many first runs, asked for one by one, count as one round: a design that is known beforehand.
        own_cpu_s: the most CPU time of the solver itself [s].
    """

    def __init__(self, problem: Problem, seed: int, budget: int, own_cpu_s: float = OWN_CPU_S) -> None:
        self.problem, self.seed, self.budget, self.own_cpu_s = problem, seed, budget, own_cpu_s
        self.design = 0
        self.natural = problem.simulator.space.natural_scale
        self.lower = problem.simulator.space.lower / self.natural
        self.upper = problem.simulator.space.upper / self.natural
        self.start = problem.start / self.natural
        self.runs = self.rounds = 0
        self.spent = ""
        self.simulator_cpu_s = 0.0
        self._began = time.process_time()
        self.ends: list[int] = []  # runs at the end of each round, where the solver knows better than the calls tell
        self._points: list[Array] = []
        self._rounds: list[int] = []
        self._distances: list[Array] = []
        self._wanted, self._solved = self._enough(), False

    def _enough(self) -> float:
        """The distance that solves the problem by its strictest test; none where the least loss is not known."""
        problem = self.problem
        if problem.criterion == "fixed":
            return 1.0
        least = problem.least if problem.elsewhere is None else problem.elsewhere
        if least is None:
            return -np.inf
        outputs = problem.simulator(problem.start[None], np.zeros(1, dtype=np.uint64))
        begin = float(problem.distance(problem.start[None], outputs)[0])
        return least + STRICTEST * (begin - least)

    @property
    def dimension(self) -> int:
        return len(self.start)

    @property
    def cpu_s(self) -> float:
        """Of the solver itself."""
        return time.process_time() - self._began - self.simulator_cpu_s

    def outputs(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[Any]:
        """Of parameters inside the bounds, (k, d), as one round; counted."""
        if self._solved:
            self.spent = "solved"
        elif self.runs >= self.budget:
            self.spent = "budget"
        elif self.cpu_s > self.own_cpu_s:
            self.spent = "time"
        if self.spent:
            raise SpentError(self.spent)
        inputs, seeds = inputs[: self.budget - self.runs], seeds[: self.budget - self.runs]
        began = time.process_time()
        outputs = self.problem.simulator(inputs, seeds)
        self.rounds += 1 if self.runs == 0 or self.runs >= self.design else 0
        self.runs += len(inputs)
        self._points.append(inputs.copy())
        self._rounds += [self.rounds] * len(inputs)
        self._distances.append(self.problem.distance(inputs, outputs))
        if self._distances[-1].min() < self._wanted:
            self._solved = True
        self.simulator_cpu_s += time.process_time() - began
        return outputs

    def residuals(self, points: Array) -> Array:
        """(k, m) in units of the noise, of k points (k, d) in natural units."""
        points = np.atleast_2d(np.asarray(points, dtype=np.float64))
        inputs = np.clip(np.nan_to_num(points), self.lower, self.upper) * self.natural
        inputs = np.clip(inputs, self.problem.simulator.space.lower, self.problem.simulator.space.upper)
        seeds = np.uint64(1_000_000 * (self.seed + 1)) + np.arange(self.runs, self.runs + len(inputs), dtype=np.uint64)
        outputs = self.outputs(inputs, seeds)
        began = time.process_time()
        difference = (outputs - self.problem.target).astype(np.float64, copy=False)
        residuals = difference.reshape(len(outputs), -1) / self.problem.variance**0.5
        self.simulator_cpu_s += time.process_time() - began
        if len(outputs) < len(points):
            self.spent = "budget"
            raise SpentError(self.spent)
        return residuals

    def losses(self, points: Array) -> Array:
        """(k,) half the sum of the residuals' squares."""
        residuals = self.residuals(points)
        began = time.process_time()
        losses = 0.5 * np.einsum("km,km->k", residuals, residuals)
        self.simulator_cpu_s += time.process_time() - began
        return np.nan_to_num(losses, nan=WORST, posinf=WORST)

    def loss(self, point: Array) -> float:
        return float(self.losses(np.asarray(point)[None])[0])

    def way(self) -> list[tuple[int, int, float]]:
        """(run, round, distance) of each point that was nearer than all before."""
        if not self._points:
            return []
        points, rounds = np.concatenate(self._points), np.array(self._rounds)
        if self.ends:
            rounds = 1 + np.searchsorted(np.array(self.ends), np.arange(1, len(points) + 1))
        distances, best, way = np.concatenate(self._distances), np.inf, []
        for i, distance in enumerate(distances.tolist()):
            if distance < best:
                best = distance
                way.append((i + 1, int(rounds[i]), distance))
        return way


class Watched:
    """The counter as a `Simulator` of the project."""

    row_by_row = True  # what a solver evaluates together is no affair of the problem's

    def __init__(self, counter: Counter) -> None:
        self.counter, self.name = counter, counter.problem.name

    @property
    def space(self) -> ParameterSpace:
        return self.counter.problem.simulator.space

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.counter.problem.simulator.output_shape

    @property
    def structure(self) -> BlockStructure | None:
        simulator = self.counter.problem.simulator
        return simulator.structure if isinstance(simulator, Structured) else None

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> NDArray[Any]:
        outputs = self.counter.outputs(inputs, seeds)
        if len(outputs) < len(inputs):
            raise SpentError("budget")
        return outputs
