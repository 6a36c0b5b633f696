"""How a descent steps: along smoothed gradients by Adam or any `torch.optim` optimiser, or by Gauss-Newton."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.fitting.methods.descent import Look, Schedule
from bridge.fitting.misfit import Misfit
from bridge.fitting.uncertainty import of_descent
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.smoothed import SmoothedSimulator

MakeOptimiser = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

# Scales that a step of Gauss-Newton may be long; from which part of that on it is at its limit.
LONGEST, _AT_LIMIT = 2.0, 0.95
_BISECTIONS = 12
# A step of less than so many scales makes the next scale so many steps, and no less than so small a part.
_SHORT, _WIDE, _NARROWING = 0.5, 2.0, 4.0


class Mover(Protocol):
    def move(self, x: Array, gradient: Array, width: float, decay: float) -> Array:
        """(k, d) from (k, d) and gradients, natural units."""

    def keep(self, which: NDArray[np.intp]) -> None: ...

    def to_dict(self) -> dict[str, Any]: ...

    def restore(self, saved: Mapping[str, Any]) -> None: ...


@final
@dataclass(frozen=True)
class Seen:
    """What all rules along the smoothed output have in common.

    Attributes:
        natural: (d,) size of a natural unit.
        known_noise: whether the target's variance is known; None where no standard errors are asked for.
    """

    smoothed: SmoothedSimulator
    misfit: Misfit
    natural: Array
    schedule: Schedule
    known_noise: bool | None = None

    def estimate(self, x: Array, step: int, widths: Array | None = None) -> tuple[float, Misfit, Estimate]:
        """The width of this step, its misfit, and the smoothed output of all starts x (k, d). Collective.

        widths: (k,), in place of the schedule's for all.
        """
        width, theta = self.schedule.width(step), torch.as_tensor(x * self.natural)
        if widths is None:
            estimate = self.smoothed.estimate(theta, step, scale=torch.as_tensor(width * self.natural))
        else:
            estimate = self.smoothed.estimate(theta, step, scales=torch.as_tensor(widths[:, None] * self.natural))
        return width, self.schedule.misfit(self.misfit, step), estimate

    def step(self, misfit: Misfit, J: torch.Tensor, y: torch.Tensor, z: Array, longest: float = np.inf) -> Array:
        """The Gauss-Newton step, (J^T W J + P + damping)^-1 times the gradient, downwards.

        Where it is longer than `longest` in a coordinate, that of Levenberg: with the least multiple of the identity
        (of natural units) more that makes it short enough.
        """
        with np.errstate(all="ignore"):
            H, g = misfit.normal(misfit.jacobian(J, self.natural), misfit.residual(y), z)
        if not (np.isfinite(H).all() and np.isfinite(g).all()):
            return np.full(len(g), np.nan)
        damped = H + 1e-3 * np.diag(np.diag(H)) + 1e-12 * max(float(np.trace(H)), 1e-300) * np.eye(len(g))
        try:
            step = -np.linalg.solve(damped, g)
        except np.linalg.LinAlgError:  # numbers too small to be squared
            step = np.zeros(len(g))
        if np.abs(step).max() <= longest:
            return np.asarray(step)
        values, vectors = np.linalg.eigh(damped)
        along = vectors.T @ g

        def shortened(damping: float) -> Array:
            return np.asarray(-vectors @ (along / (np.maximum(values, 0) + damping)))

        low = high = 1e-3 * max(float(values.mean()), 1e-300)
        while np.abs(shortened(high)).max() > longest:
            low, high = high, 4 * high
        for _ in range(_BISECTIONS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if np.abs(shortened(middle)).max() <= longest else (middle, high)
        return shortened(high)

    def known(self, x: Array, estimate: Estimate) -> list[tuple[Array, Array]] | None:
        if self.known_noise is None:
            return None
        told = []
        values, jacobians = estimate.of_replicates()
        for i, (z, y) in enumerate(zip(x, estimate.value, strict=True)):
            stated = of_descent(self.misfit, values[:, i], jacobians[:, i], z, self.natural, self.known_noise)
            told.append((stated.covariance, self.step(self.misfit, jacobians[:, i].mean(dim=0), y, z)))
        return told


@final
class FirstOrder:
    """Steps along the gradient of the loss of the smoothed output."""

    def __init__(self, seen: Seen, mover: Mover) -> None:
        self.seen, self.mover = seen, mover

    def look(self, x: Array, step: int) -> Look:
        seen, schedule = self.seen, self.seen.schedule
        width, misfit, estimate = seen.estimate(x, step)
        told = [misfit.value_and_gradient(y, z) for y, z in zip(estimate.value, x, strict=True)]
        g = estimate.vjp(torch.stack([v for _, v, _ in told])).numpy() * seen.natural
        g = g + np.stack([slope for _, _, slope in told])
        moved = self.mover.move(x, g, width, schedule.decay(step))
        known = seen.known(x, estimate)
        counts = estimate.num_evaluations, estimate.num_failed
        return Look(np.array([v for v, _, _ in told]), moved, width, schedule.settled(step), *counts, known)

    def keep(self, which: NDArray[np.intp]) -> None:
        self.mover.keep(which)

    def to_dict(self) -> dict[str, Any]:
        return self.mover.to_dict()

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.mover.restore(saved)


@final
class GaussNewton:
    """Steps of (J^T W J + P + damping)^-1 times the gradient, no longer than two scales in any coordinate.

    W are the weights of a robust loss, P the precision of the prior (see `Misfit.normal`). Each start has a scale of
    its own: the schedule's, or less where steps have become short against it, for then nothing as far away as that
    matters any more. From coarse to fine on the outputs it is the schedule's.
    """

    def __init__(self, seen: Seen, starts: int) -> None:
        self.seen, schedule = seen, seen.schedule
        self.adapts = schedule.last < schedule.first and len(schedule.stages) == 1
        self.widths = np.full(starts, schedule.first)

    def look(self, x: Array, step: int) -> Look:
        seen, schedule = self.seen, self.seen.schedule
        widths = np.minimum(self.widths, schedule.width(step)) if self.adapts else None
        scheduled, misfit, estimate = seen.estimate(x, step, widths)
        used = np.full(len(x), scheduled) if widths is None else widths
        losses, steps = [], []
        for z, y, J, width in zip(x, estimate.value, estimate.jacobian(), used, strict=True):
            losses.append(misfit.value(y, z))
            steps.append(seen.step(misfit, J, y, z, LONGEST * float(width)))
        lengths = np.abs(np.stack(steps)).max(axis=1)
        settled = schedule.settled(step)
        if self.adapts:
            settled = bool((used <= schedule.last).all())
            narrow = np.maximum(np.minimum(used, _WIDE * lengths), used / _NARROWING)
            narrow = np.where(lengths < _SHORT * used, np.maximum(narrow, schedule.last), used)
            # What is evaluated next depends on it, to the last bit.
            self.widths = seen.smoothed.dispatcher.thinking.broadcast(narrow)
        losses_, counts = np.array(losses), (estimate.num_evaluations, estimate.num_failed)
        return Look(
            *(losses_, x + np.stack(steps), float(used[int(np.argmin(losses_))]), settled, *counts),
            known=seen.known(x, estimate),
            at_limit=lengths > _AT_LIMIT * LONGEST * used,
        )

    def keep(self, which: NDArray[np.intp]) -> None:
        self.widths = self.widths[which]

    def to_dict(self) -> dict[str, Any]:
        return {"widths": self.widths}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.widths = saved["widths"]


@final
class Adam:
    """Adam's direction (Kingma and Ba 2015) in numpy float64, times the scale of the noise and `rate`."""

    def __init__(self, shape: tuple[int, int], rate: float, betas: tuple[float, float] = (0.7, 0.95)) -> None:
        self.rate, self.betas, self.m, self.v, self.t = rate, betas, np.zeros(shape), np.zeros(shape), 0

    def move(self, x: Array, gradient: Array, width: float, decay: float) -> Array:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * gradient
        self.v = b2 * self.v + (1 - b2) * gradient * gradient
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return np.asarray(x - self.rate * width * decay * (m / (np.sqrt(v) + 1e-300)))

    def keep(self, which: NDArray[np.intp]) -> None:
        self.m, self.v = self.m[which], self.v[which]

    def to_dict(self) -> dict[str, Any]:
        return {"m": self.m, "v": self.v, "t": self.t}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.m, self.v, self.t = (saved[key] for key in "mvt")


@final
class TorchMover:
    """Any `torch.optim` optimiser, one for each start, of parameters in natural units.

    Its learning rates are those it was made with, times the scale of the noise over the first scale.

    Args:
        make: as `make_optimiser` gives it. first: the first scale.
    """

    def __init__(self, make: MakeOptimiser, shape: tuple[int, int], first: float) -> None:
        self.parameters = [torch.nn.Parameter(torch.zeros(shape[1], dtype=torch.float64)) for _ in range(shape[0])]
        self.optimisers = [make([p]) for p in self.parameters]
        self.rates = [[group.get("lr") for group in o.param_groups] for o in self.optimisers]
        self.first = first

    def move(self, x: Array, gradient: Array, width: float, decay: float) -> Array:
        moved = []
        for p, optimiser, rates, z, g in zip(self.parameters, self.optimisers, self.rates, x, gradient, strict=True):
            for group, rate in zip(optimiser.param_groups, rates, strict=True):
                if rate is not None:
                    group["lr"] = rate * (width / self.first)
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
        raise InputError(f"Unknown optimiser {what!r}. Known: {', '.join(known)}, or a function of the parameters.")

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
