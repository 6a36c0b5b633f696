"""The choice among the methods, by what is to be fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from bridge.fitting.methods.base import METHODS, FitTask, Method, MethodRun, begin, register
from bridge.simulator.protocol import Structured

# More parameters than this, or a block structure, and a model of all runs takes too long to think.
_MOST_PARAMETERS = 200
# More than this, and a quadratic model of a number has too little to go by.
_MOST_OF_QUADRATIC = 100


@register("auto")
@final
@dataclass(frozen=True)
class Auto(Method):
    """The method that suits a task, with its defaults."""

    chooses: ClassVar[bool] = True
    states_errors: ClassVar[bool] = True

    def chosen(self, task: FitTask) -> tuple[Method, str]:
        name, why = self._choice(task)
        return METHODS.find(name)(), why

    def start(self, task: FitTask) -> MethodRun:
        return begin(self.chosen(task)[0], task)

    def _choice(self, task: FitTask) -> tuple[str, str]:
        problem = task.problem
        dimension, own_loss = problem.free.dimension, problem.misfit.loss is not None
        if own_loss and dimension > _MOST_OF_QUADRATIC:
            return "adam", "a loss of one's own: its smoothed gradient is followed"
        if own_loss:
            return "trust-region", "a loss of one's own: a quadratic model in a trust region takes the fewest runs"
        if isinstance(problem.simulator, Structured) and problem.simulator.structure is not None:
            return "gauss-newton", "the simulator says which outputs depend on which parameters"
        if dimension > _MOST_PARAMETERS:
            many = f"{dimension} parameters: more than the {_MOST_PARAMETERS} that suit a model of all runs"
            return "gauss-newton", many
        several = "s" * (dimension > 1)
        return "kriging", f"least squares, {dimension} parameter{several}: a model of all runs takes the fewest"
