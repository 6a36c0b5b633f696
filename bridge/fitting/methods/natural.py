"""Natural gradients in mean and scale: descents that learn where to look and how wide.

The loss itself is smoothed, E[l(x + L eps)] with Gaussian eps, and both gradients come from the same runs (theory:
Theorem 7). In the coordinates x + L delta and L exp(S), S symmetric, the Fisher information is 1 for delta and 2 for S,
so that the natural gradients are

    delta: L^T dE/dx = E[l eps],    S: 1/2 sym(L^T dE/dL) = 1/2 E[l (eps eps^T - 1)].

Divided by the standard deviation of l over the rows they do not depend on the units of the loss, and are small where
the loss is mostly noise: delta is then the vector of correlations of the loss with eps, no longer than 1.

Reference: Wierstra et al., "Natural evolution strategies", JMLR 15 (2014); the exponential map is that of Glasmachers
et al., "Exponential natural evolution strategies", GECCO 2010. Those rank the losses; here they are themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.checks import is_number
from bridge.errors import InputError
from bridge.estimators.distributions import Gaussian, get_distribution
from bridge.fitting.methods.base import FitTask, register, require
from bridge.fitting.methods.descent import Descent
from bridge.fitting.methods.descent_method import DescentMethod, start_descent
from bridge.fitting.methods.requests import Smoothed
from bridge.fitting.methods.steps import Schedule, SmoothedProblem, StepOutcome, StepRule
from bridge.fitting.misfit import Misfit
from bridge.simulator.function import as_simulator
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.loss import LossWrapper, floating_rows
from bridge.smoothing.smooth import smooth
from bridge.smoothing.smoothed import SmoothedSimulator
from bridge.smoothing.surrogate import as_surrogate

# A scale is changed by no more than this factor's logarithm in one step.
_MOST = 0.5
# More parameters than this, and a full L has more numbers than there are runs to learn from.
_MOST_OF_FULL = 20
# Of L, beside 1 for x.
_FULL_RATE, _DIAGONAL_RATE = 0.4, 0.2


@final
@dataclass(frozen=True)
class LossAndSquare(LossWrapper):
    """(l, l^2) of a simulator's output, the prior included: a simulator of two numbers.

    Attributes:
        natural: (d,) units of the prior.
    """

    misfit: Misfit
    natural: Array

    @property
    def output_shape(self) -> tuple[int, ...]:
        return (2,)

    def __call__(self, inputs: Array, seeds: NDArray[np.uint64]) -> Array:
        outputs = floating_rows(self.inner, inputs, seeds).to("cpu", torch.float64)
        good = self.misfit.usable(outputs.numpy()).tolist()
        with np.errstate(all="ignore"):  # a loss that overflows is none
            losses = [
                self.misfit.value(y, x / self.natural) if fine else np.nan
                for y, x, fine in zip(outputs, inputs, good, strict=True)
            ]
            return np.stack([losses, np.square(losses)], axis=1)


def natural_step(
    scale: Array, gradient: Array, scale_gradient: Array, deviation: float, rates: tuple[float, float]
) -> tuple[Array, Array]:
    """The step in x and the new L, from dE/dx (d,) and dE/dL.

    Args:
        scale: L, (d, d), or its diagonal (d,). deviation: of the loss over the noise. rates: of x and of L.
    """
    unit = max(deviation, 1e-300)
    if scale.ndim == 1:
        S = -0.5 * rates[1] * scale * scale_gradient / unit
        return -rates[0] * scale**2 * gradient / unit, scale * np.exp(np.clip(S, -_MOST, _MOST))
    G = scale.T @ scale_gradient
    values, vectors = np.linalg.eigh(-0.25 * rates[1] * (G + G.T) / unit)
    grown = (vectors * np.exp(np.clip(values, -_MOST, _MOST))) @ vectors.T
    return -rates[0] * scale @ (scale.T @ gradient) / unit, scale @ grown


@register("natural")
@final
@dataclass(frozen=True)
class Natural(DescentMethod):
    """The smoothed loss, of any kind, by natural gradients in the mean and in the scale matrix L of the noise.

    An evolution strategy that learns which parameters go together.

    Attributes:
        scale: the first, and the least that is learned.
        learning_rate: of x, and times a smaller one of L.
        full_scale: whether L is a full matrix or diagonal; by default full up to twenty parameters.
    """

    learning_rate: float = 1.0
    full_scale: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rate = self.learning_rate
        require("a positive learning_rate", is_number(rate) and rate > 0, rate)

    def start(self, task: FitTask) -> Descent:
        if not isinstance(get_distribution(self.distribution), Gaussian):
            raise InputError(
                f"Expected Gaussian noise with method='natural', whose steps are natural for it, got "
                f"{self.distribution!r}."
            )
        starts = task.problem.free_starts
        full = starts.shape[1] <= _MOST_OF_FULL if self.full_scale is None else self.full_scale

        def rule(seen: SmoothedProblem) -> NaturalRule:
            of_loss = self._smoothed_loss(task, seen)
            return NaturalRule(of_loss, seen.natural, seen.schedule, len(starts), full, self.learning_rate)

        run = start_descent(task, self, rule)
        run.described["full_scale"] = full
        return run

    def _smoothed_loss(self, task: FitTask, seen: SmoothedProblem) -> SmoothedSimulator:
        """The loss and its square, smoothed by the same noise and ranks as the output."""
        problem, smoothing = task.problem, self.smoothing(seen.schedule.first * task.problem.natural)
        if (given := self.surrogate) is not None:
            cheap = as_surrogate(given)
            of_cheap = LossAndSquare(as_simulator(cheap.simulator), problem.misfit, problem.natural)
            smoothing = replace(smoothing, surrogate=replace(cheap, simulator=of_cheap))
        of_loss = smooth(
            LossAndSquare(problem.simulator, problem.misfit, problem.natural),
            smoothing,
            seed=task.seed,
            failures=task.failures,
            on=task.place,
            memory=task.memory,
        )
        of_loss.dispatcher, of_loss.spent = seen.smoothed.dispatcher, seen.smoothed.spent
        return of_loss


@final
class NaturalRule(StepRule):
    """Natural-gradient steps of each start's x and L.

    Args:
        smoothed: of a `LossAndSquare`, Gaussian.
        schedule: its first scale is that of the first step; a scale below the last one is not made smaller.
        full: whether L is a full matrix, or diagonal. rate: of x, and times a smaller one of L.
    """

    def __init__(
        self, smoothed: SmoothedSimulator, natural: Array, schedule: Schedule, starts: int, full: bool, rate: float
    ) -> None:
        self.smoothed, self.natural, self.schedule = smoothed, natural, schedule
        d = len(natural)
        first = schedule.first * (np.eye(d) if full else np.ones(d))
        self.scales = np.repeat(first[None], starts, axis=0)
        rows = smoothed.strategy.num_samples * smoothed.strategy.replicates
        # A full L is learned faster, since one that cannot turn along a valley only shrinks before its end.
        self.rates = (rate, rate * (_FULL_RATE if full else _DIAGONAL_RATE) * min(1.0, rows / (2 * d)))

    @property
    def others(self) -> tuple[SmoothedSimulator, ...]:
        return (self.smoothed,)

    def ask(self, x: Array, step: int) -> Smoothed:
        return Smoothed(x, self.scales, which=1, scale_gradient=True)

    def tell(self, x: Array, step: int, estimate: Estimate) -> StepOutcome:
        unit = self.natural if self.scales.ndim == 2 else self.natural[:, None]
        value = estimate.value.numpy()
        first = torch.zeros_like(estimate.value)
        first[:, 0] = 1.0
        g = estimate.vjp(first).numpy() * self.natural
        G = estimate.vjp_scale(first).numpy() * unit
        deviation = np.sqrt(np.maximum(value[:, 1] - value[:, 0] ** 2, 0))
        moved, scales = [], []
        for i, z in enumerate(x):
            shift, L = natural_step(self.scales[i], g[i], G[i], float(deviation[i]), self.rates)
            moved.append(z + shift)
            scales.append(self._kept_wide(L))
        widths = np.array([_width(L) for L in self.scales])
        best = int(np.argmin(value[:, 0]))
        self.scales = np.stack(scales)
        settled = bool((np.array([_width(L) for L in self.scales]) <= 1.01 * self.schedule.last).all())
        counts = estimate.num_evaluations, estimate.num_failed
        return StepOutcome(value[:, 0], np.stack(moved), float(widths[best]), settled, *counts)

    def _kept_wide(self, L: Array) -> Array:
        """No direction narrower than the last scale."""
        least = self.schedule.last
        if L.ndim == 1:
            return np.maximum(L, least)
        u, s, v = np.linalg.svd(L)
        return np.asarray((u * np.maximum(s, least)) @ v)

    def keep(self, which: NDArray[np.intp]) -> None:
        self.scales = self.scales[which]

    def to_dict(self) -> dict[str, Any]:
        return {"scales": self.scales}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.scales = saved["scales"]


def _width(L: Array) -> float:
    """The widest scale: of a start that has come to its end all are at the last one."""
    return float(L.max() if L.ndim == 1 else np.linalg.norm(L, 2))
