"""CMA-ES, as the package `cma` (pycma) has it, as a method of `bridge.fit`, with a name.

    pip install cma
    python examples/extending/cma_es.py

A method is two classes: its settings, a frozen dataclass, and its run, which asks for points and is told what came of
them. Ranks, failed runs, budgets, resuming, reports and the best run so far are none of its affair. All it owes is a
state of plain data: here the losses of every generation, since what the strategy does is a function of these and the
seed. tests/examples/extending/test_cma_es.py inherits all that is asked of a method.

Reference: N. Hansen, "The CMA evolution strategy: a tutorial", arXiv 1604.00772.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import cma
import numpy as np

import bridge

_BAD = 1e30  # of a run that failed: the strategy goes by ranks


@bridge.register("cma-es")
@final
@dataclass(frozen=True)
class CMAES(bridge.Method):
    """A population about a mean, whose covariance learns the shape of the loss; of any loss, without standard errors.

    Attributes:
        population: runs of a generation; by default 4 + 3 log(d), rounded down.
        scale: standard deviation of the first generation, natural units.
        generations: at most so many, None for no limit.
    """

    population: int | None = None
    scale: float = 1.0
    generations: int | None = None

    def start(self, task: bridge.FitTask) -> CMAESRun:
        return CMAESRun(task, self)


@final
class CMAESRun(bridge.SearchRun):
    """A strategy, and the losses that it has been told."""

    def __init__(self, task: bridge.FitTask, method: CMAES) -> None:
        super().__init__(task, method, limit=method.generations)
        if len(self.start) < 2:
            raise bridge.InputError("Expected at least two parameters with method 'cma-es', got one.")
        self.method = method
        self._begin()

    def _begin(self) -> None:
        self.told: list[np.ndarray] = []
        self._asked: list[np.ndarray] | None = None
        options = {
            "bounds": [self.problem.lower.tolist(), self.problem.upper.tolist()],
            "seed": np.nan,  # the package leaves numpy's global generator alone
            "randn": lambda *shape: self._rng.standard_normal(shape),
            "verbose": -9,
        }
        if self.method.population is not None:
            options["popsize"] = self.method.population
        self.strategy = cma.CMAEvolutionStrategy(self.start, self.method.scale, options)

    def _generation(self) -> list[np.ndarray]:
        """The next points; their noise is a function of the seed and the number of the generation."""
        if self._asked is None:
            self._rng = np.random.default_rng([self.seed, len(self.told)])
            self._asked = self.strategy.ask()
        return self._asked

    def _learn(self, losses: np.ndarray) -> None:
        self.strategy.tell(self._generation(), np.where(np.isfinite(losses), losses, _BAD).tolist())
        self.told.append(losses)
        self._asked = None

    @property
    def done(self) -> str:
        return "converged" if self.strategy.stop() else ""

    def ask(self, step: int, spent: int) -> bridge.Runs:
        return bridge.Runs(np.array(self._generation()))

    def tell(self, step: int, answer: bridge.RunOutputs) -> bridge.StepReport:
        self._learn(self.take(answer))
        return self.report(float(self.strategy.sigma))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "told": self.told}

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        known = len(self.told)
        if len(saved["told"]) < known:
            self._begin()
            known = 0
        for losses in saved["told"][known:]:
            self._learn(np.asarray(losses))


def main() -> None:
    def ringing(theta: np.ndarray) -> np.ndarray:
        """A damped oscillation, rounded as an instrument rounds it."""
        t = np.linspace(0, 4, 60)
        return np.round(theta[0] * np.exp(-theta[1] * t) * np.cos(theta[2] * t), 2)

    simulator = bridge.as_simulator(
        ringing,
        names=["amplitude", "decay", "frequency"],
        bounds={"amplitude": (0.1, 5.0), "decay": (0.05, 2.0), "frequency": (1.0, 9.0)},
    )
    target = ringing(np.array([2.0, 0.4, 5.0]))
    start = {"amplitude": 1.0, "decay": 1.0, "frequency": 4.0}
    print(bridge.fit(simulator, target, start, seed=0, method="cma-es", stop=1500))


if __name__ == "__main__":
    main()
