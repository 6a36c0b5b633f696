"""First-order descents: along smoothed gradients, by Adam or by any optimiser of `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.checks import did_you_mean, is_number
from bridge.errors import InputError
from bridge.fitting.methods.base import FitTask, error_targets, register, require
from bridge.fitting.methods.descent import Descent
from bridge.fitting.methods.descent_method import DescentMethod, start_descent
from bridge.fitting.methods.requests import Smoothed
from bridge.fitting.methods.steps import SmoothedProblem, StepOutcome, StepRule
from bridge.fitting.target import LinearMap
from bridge.smoothing.estimate import Estimate

MakeOptimiser = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

# Of Adam: gradients of few samples are new in each step, and a descent is short.
_BETAS = (0.7, 0.95)


@dataclass(frozen=True)
class FirstOrderMethod(DescentMethod):
    """What the settings of all first-order descents have in common.

    Attributes:
        blur: widths [pixels] of Gaussian blurs of what is compared, along the last two axes, or linear maps, from
            coarse to fine: equal shares of the first four fifths of the steps, then none.
        learning_rate: in units of the scale.
    """

    blur: Sequence[float | LinearMap] | None = None
    learning_rate: float = 0.25

    states_errors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.learning_rate
        require("a positive learning_rate", is_number(rate) and rate > 0, rate)

    def _started(self, task: FitTask, mover: Mover) -> Descent:
        targets = error_targets(task)
        return start_descent(task, self, lambda seen: FirstOrder(seen, mover), blur=self.blur, targets=targets)


@register("adam")
@final
@dataclass(frozen=True)
class Adam(FirstOrderMethod):
    """The smoothed gradient, of any loss, by Adam at `learning_rate` times the current scale.

    The rate decays by a cosine to a fifth.
    """

    def start(self, task: FitTask) -> Descent:
        rate = self.learning_rate * self.widths[0]

        def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=rate, betas=_BETAS, eps=1e-300)

        return self._started(task, Mover(make, task.problem.free_starts.shape, self.widths[0], decays=True))


@register("torch")
@final
@dataclass(frozen=True)
class Torch(FirstOrderMethod):
    """The smoothed gradient, of any loss, by any optimiser of `torch.optim`, or one like them.

    Attributes:
        optimiser: a class or its name, or a function that makes an optimiser of a list of parameters.
    """

    optimiser: str | Callable[..., torch.optim.Optimizer] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimiser is None:
            raise InputError(
                "Expected an optimiser for method 'torch', got none. Give method=bridge.Torch(optimiser='SGD')."
            )

    def start(self, task: FitTask) -> Descent:
        assert self.optimiser is not None
        shape, first = task.problem.free_starts.shape, self.widths[0]
        make = make_optimiser(self.optimiser, self.learning_rate * first, shape[1])
        run = self._started(task, Mover(make, shape, first))
        run.described["optimiser"] = describe(make)
        return run


@final
class FirstOrder(StepRule):
    """Steps along the gradient of the loss of the smoothed output."""

    def __init__(self, problem: SmoothedProblem, mover: Mover) -> None:
        self.problem, self.mover = problem, mover

    def ask(self, x: Array, step: int) -> Smoothed:
        return self.problem.request(x, step)

    def tell(self, x: Array, step: int, estimate: Estimate) -> StepOutcome:
        problem, schedule = self.problem, self.problem.schedule
        width, misfit = schedule.width(step), problem.misfit_at(step)
        values = [misfit.value_and_gradient(y, z) for y, z in zip(estimate.value, x, strict=True)]
        g = estimate.vjp(torch.stack([v for _, v, _ in values])).numpy() * problem.natural
        g = g + np.stack([slope for _, _, slope in values])
        moved = self.mover.move(x, g, width, schedule.decay(step))
        known = problem.known(x, estimate)
        counts = estimate.num_evaluations, estimate.num_failed
        return StepOutcome(np.array([v for v, _, _ in values]), moved, width, schedule.settled(step), *counts, known)

    def keep(self, which: NDArray[np.intp]) -> None:
        self.mover.keep(which)

    def to_dict(self) -> dict[str, Any]:
        return self.mover.to_dict()

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.mover.restore(saved)


@final
class Mover:
    """Any `torch.optim` optimiser, one for each start, of parameters in natural units.

    Its learning rates are those it was made with, times the scale of the noise over the first scale.

    Args:
        make: as `make_optimiser` gives it. first: the first scale.
        decays: whether rates go down with the schedule's decay as well.
    """

    def __init__(self, make: MakeOptimiser, shape: tuple[int, int], first: float, decays: bool = False) -> None:
        self.make, self.dimension, self.first, self.decays = make, shape[1], first, decays
        self._begin(shape[0])

    def _begin(self, count: int) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(self.dimension, dtype=torch.float64)) for _ in range(count)]
        self.optimisers = [self.make([p]) for p in self.parameters]
        self.rates = [[group.get("lr") for group in o.param_groups] for o in self.optimisers]

    def move(self, x: Array, gradient: Array, width: float, decay: float) -> Array:
        moved = []
        for p, optimiser, rates, z, g in zip(self.parameters, self.optimisers, self.rates, x, gradient, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                if rate is not None:
                    group["lr"] = rate * (width / self.first) * (decay if self.decays else 1.0)
            with torch.no_grad():
                p.copy_(torch.as_tensor(z))
            p.grad = torch.as_tensor(g).clone()
            optimiser.step()
            moved.append(p.detach().numpy().copy())
        return np.stack(moved)

    def keep(self, which: NDArray[np.intp]) -> None:
        self.parameters, self.optimisers = [self.parameters[i] for i in which], [self.optimisers[i] for i in which]
        self.rates = [self.rates[i] for i in which]

    def to_dict(self) -> dict[str, Any]:
        return {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        if len(saved["optimisers"]) != len(self.optimisers):
            self._begin(len(saved["optimisers"]))
        for optimiser, state in zip(self.optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)


def make_optimiser(given: str | Callable[..., torch.optim.Optimizer], rate: float, d: int) -> MakeOptimiser:
    """What makes an optimiser of a list with one parameter (d,); one is made, and tried, at once.

    Args:
        given: a class of `torch.optim`, or its name: it gets lr=rate; or a function of that list.

    Raises:
        InputError: it is none, or its steps need more than a gradient.
    """
    what = given if isinstance(given, str) else getattr(given, "__name__", repr(given))
    kind: Any = getattr(torch.optim, given, None) if isinstance(given, str) else given
    if kind is None or not callable(kind):
        known = [n for n in dir(torch.optim) if _is_optimiser(getattr(torch.optim, n))]
        raise InputError(
            f"Unknown optimiser {what!r}. Known: {', '.join(known)}, or a function of the parameters."
            f"{did_you_mean(str(what), known)}"
        )

    def make(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = kind(parameters, lr=rate) if _is_optimiser(kind) else kind(parameters)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"it makes a {type(made).__name__}")
        if isinstance(made, torch.optim.LBFGS):
            raise TypeError("LBFGS asks for several values of a loss without noise in each step")
        return made

    try:
        trial = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
        optimiser = make([trial])
        trial.grad = torch.ones_like(trial)
        optimiser.step()
    except Exception as error:
        raise InputError(
            f"Expected an optimiser that steps along a gradient (d,), such as torch.optim.SGD or lambda parameters: "
            f"torch.optim.SGD(parameters, lr=0.1), got {what!r}: {error}. For second-order steps use "
            "method='gauss-newton'."
        ) from error
    return make


def _is_optimiser(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer


def describe(make: MakeOptimiser) -> str:
    """What an optimiser is and its settings, by which a run is known again."""
    optimiser = make([torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))])
    groups: Sequence[dict[str, Any]] = optimiser.state_dict()["param_groups"]
    return f"{type(optimiser).__module__}.{type(optimiser).__qualname__} {groups}"
