"""The choice among the methods, by what is to be fitted and what is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, final

from bridge.fitting.methods.base import METHODS, FitTask, Method, MethodRun, begin, register
from bridge.fitting.methods.plain_runs import DESIGN
from bridge.simulator.protocol import Structured

# More parameters than this, or a block structure, and a model of all runs takes too long to think.
_MOST_PARAMETERS = 200
# More than this, and a quadratic model of a number has too little to go by.
_MOST_OF_QUADRATIC = 100


@register("auto")
@final
@dataclass(frozen=True)
class Auto(Method):
    """The method that suits a task.

    Attributes:
        given: settings of whichever method it is, by name.
    """

    given: Mapping[str, Any] = field(default_factory=dict)

    chooses: ClassVar[bool] = True

    @property
    def scale(self) -> Any:  # type: ignore[override]
        return self.given.get("scale")

    @classmethod
    def with_settings(cls, given: Mapping[str, Any]) -> Self:
        return cls(given)

    def chosen(self, task: FitTask) -> tuple[Method, str]:
        name, why = self._choice(task)
        return METHODS.find(name).with_settings(self.given), why

    def start(self, task: FitTask) -> MethodRun:
        return begin(self.chosen(task)[0], task)

    def _choice(self, task: FitTask) -> tuple[str, str]:
        given, problem = self.given, task.problem
        dimension, blurs, own_loss = problem.free.dimension, "coarse" in given, problem.misfit.loss is not None
        if "optimiser" in given:
            return "torch", "an optimiser is given"
        if own_loss and (self._smooths(task) or blurs or dimension > _MOST_OF_QUADRATIC):
            return "adam", "a loss of one's own: its smoothed gradient is followed"
        if own_loss:
            return "trust-region", "a loss of one's own: a quadratic model in a trust region takes the fewest runs"
        if isinstance(problem.simulator, Structured) and problem.simulator.structure is not None:
            return "gauss-newton", "the simulator says which outputs depend on which parameters"
        if blurs:
            return "gauss-newton", "outputs are compared from coarse to fine"
        if dimension > _MOST_PARAMETERS:
            many = f"{dimension} parameters: more than the {_MOST_PARAMETERS} that suit a model of all runs"
            return "gauss-newton", many
        several = "s" * (dimension > 1)
        return "kriging", f"least squares, {dimension} parameter{several}: a model of all runs takes the fewest"

    def _smooths(self, task: FitTask) -> bool:
        """Whether settings are given that only smoothing has a use for."""
        scale = self.given.get("scale")
        pair = scale is not None and not isinstance(scale, int | float)
        return "learning_rate" in self.given or pair or bool(set(task.smoothing) & set(DESIGN))
