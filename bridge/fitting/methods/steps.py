"""What the steps of descents have in common: their schedule, what they are made of, and the smoothed problem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.blur import stage_at
from bridge.fitting.methods.descent_errors import of_descent
from bridge.fitting.methods.requests import Smoothed
from bridge.fitting.misfit import Misfit
from bridge.fitting.target import LinearMap
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.smoothed import SmoothedSimulator

_BISECTIONS = 12


@final
@dataclass(frozen=True)
class Schedule:
    """What changes with the step alone.

    Attributes:
        first, last: scale of the noise, natural units. steps: of the whole run.
        blurs: maps of the outputs, from coarse to fine; None in the last.
    """

    first: float
    last: float
    steps: int
    blurs: tuple[LinearMap | None, ...] = (None,)

    def width(self, step: int) -> float:
        """Geometric; the last fifth of the run stays at the last scale."""
        return float(self.first * (self.last / self.first) ** min(1.0, step / max(1.0, 0.8 * (self.steps - 1))))

    def decay(self, step: int) -> float:
        """Of learning rates: a cosine from 1 to a fifth."""
        return float(0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * step / self.steps)))

    def misfit(self, misfit: Misfit, step: int) -> Misfit:
        blur = self.blurs[stage_at(len(self.blurs), step, self.steps)]
        return misfit if blur is None else replace(misfit, blur=blur)

    def settled(self, step: int) -> bool:
        return step >= 0.8 * (self.steps - 1)


class StepOutcome(NamedTuple):
    """One step of k starts.

    loss: (k,) where they were. x: (k, d) where they go. width: scale of the noise, natural units. settled: whether
    that and the outputs' stage are the last ones. known: of each start, natural units, where asked for: the covariance
    (d, d), and the step (d,) to where the loss is expected to be least. at_limit: (k,) whether steps are as long as
    they may be, where there is a limit.
    """

    loss: Array
    x: Array
    width: float
    settled: bool
    num_evaluations: int
    num_failed: int
    known: list[tuple[Array, Array]] | None = None
    note: str = ""
    at_limit: NDArray[np.bool_] | None = None


class StepRule(ABC):
    """What a step is made of. Its state is plain data."""

    @property
    def others(self) -> tuple[SmoothedSimulator, ...]:
        """Smoothed simulators that it evaluates besides that of the output."""
        return ()

    @abstractmethod
    def ask(self, x: Array, step: int) -> Smoothed:
        """What is to be evaluated at all starts x (k, d), natural units."""

    @abstractmethod
    def tell(self, x: Array, step: int, estimate: Estimate) -> StepOutcome:
        """Steps. Collective, as the methods of the estimate are."""

    @abstractmethod
    def keep(self, which: NDArray[np.intp]) -> None:
        """Forgets the other starts."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The state, as plain data."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a state."""


@final
@dataclass(frozen=True)
class SmoothedProblem:
    """What all step rules along the smoothed output have in common.

    Attributes:
        natural: (d,) size of a natural unit.
        known_noise: whether the target's variance is known; None where no standard errors are asked for.
    """

    smoothed: SmoothedSimulator
    misfit: Misfit
    natural: Array
    schedule: Schedule
    known_noise: bool | None = None

    def request(self, x: Array, step: int, widths: Array | None = None) -> Smoothed:
        """The smoothed output of all starts x (k, d), at the scale of this step. widths: (k,), in place of that."""
        return Smoothed(x, self.schedule.width(step) if widths is None else widths[:, None])

    def misfit_at(self, step: int) -> Misfit:
        """What a step compares by."""
        return self.schedule.misfit(self.misfit, step)

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
        found = []
        values, jacobians = estimate.of_replicates()
        for i, (z, y) in enumerate(zip(x, estimate.value, strict=True)):
            stated = of_descent(self.misfit, values[:, i], jacobians[:, i], z, self.natural, self.known_noise)
            found.append((stated.covariance, self.step(self.misfit, jacobians[:, i].mean(dim=0), y, z)))
        return found
