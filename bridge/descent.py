"""The methods of a fit, one step at a time: descents along smoothed gradients, and the search by a model of all runs.

The noise of a descent shrinks geometrically during the run, so that the first steps see a landscape smooth over the
distance to the solution and the last ones the simulator itself (coarse to fine).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch import SerialDispatcher
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.fit_result import FitStep
from bridge.misfit import Misfit
from bridge.search import Search
from bridge.smoothing import SmoothedSimulator

Array = NDArray[np.float64]

# What stands for a failed run until it is told apart: no simulator's output.
FAILED = 1e300


class Method(Protocol):
    """What `bridge.fit` asks of a method. Its state is plain data, and all that the next step depends on."""

    @property
    def x(self) -> Array:
        """(d,) natural units: the best so far."""

    def advance(self, step: int, num_evaluations: int) -> FitStep:
        """One step: evaluates, moves x. Collective."""

    @property
    def converged(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...

    def restore(self, saved: Mapping[str, Any]) -> None: ...


class Descent:
    """Adam, or Gauss-Newton, on the smoothed output.

    Args:
        start, lower, upper: (d,) natural units; natural: their size.
        scale: of the noise, first and last. learning_rate: of Adam; None for Gauss-Newton.
    """

    def __init__(
        self,
        smoothed: SmoothedSimulator,
        misfit: Misfit,
        start: Array,
        *,
        natural: Array,
        lower: Array,
        upper: Array,
        scale: tuple[float, float],
        steps: int,
        learning_rate: float | None,
        tolerance: float,
    ) -> None:
        self.smoothed, self.misfit, self.natural = smoothed, misfit, natural
        self.lower, self.upper, self.scale, self.steps = lower, upper, scale, steps
        self.learning_rate, self.tolerance = learning_rate, tolerance
        self._x, self.adam = start, _Adam(len(start))
        self.window = max(2, steps // 10)
        self.past: list[Array] = []
        self._converged = False

    @property
    def x(self) -> Array:
        return self._x

    @property
    def converged(self) -> bool:
        return self._converged

    def width(self, step: int) -> float:
        """The last fifth of the run stays at the last scale."""
        first, last = self.scale
        return float(first * (last / first) ** min(1.0, step / max(1.0, 0.8 * (self.steps - 1))))

    def advance(self, step: int, num_evaluations: int) -> FitStep:
        width = self.width(step)
        estimate = self.smoothed.estimate(torch.as_tensor(self._x * self.natural), step, scale=width)
        value, gradient = self.misfit.value_and_gradient(estimate.value)
        if self.learning_rate is not None:
            g = estimate.vjp(gradient).numpy() * self.natural
            decay = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * step / self.steps))
            x = self._x - self.learning_rate * width * decay * self.adam.direction(g)
        else:
            x = self._x - self.misfit.gauss_newton(estimate.jacobian(), estimate.value, self.natural, limit=2 * width)
        before = tuple((self._x * self.natural).tolist())
        runs = num_evaluations + estimate.num_evaluations
        self.past = [*self.past, self._x][-self.window :]
        self._x = np.clip(x, self.lower, self.upper)
        still = float(np.max(np.abs(np.array(self.past) - self._x))) < self.tolerance
        self._converged = still and step >= 0.8 * (self.steps - 1) + self.window
        return FitStep(step, value, width, before, runs, num_failed=estimate.num_failed)

    def to_dict(self) -> dict[str, Any]:
        adam = {"m": self.adam.m, "v": self.adam.v, "t": self.adam.t}
        return {"x": self._x, "adam": adam, "past": self.past, "converged": self._converged}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._x, self.past, self._converged = saved["x"], saved["past"], saved["converged"]
        self.adam.m, self.adam.v, self.adam.t = (saved["adam"][key] for key in "mvt")


class Searching:
    """`bridge.search.Search` on a simulator: evaluates what it asks for.

    Attributes:
        plain: the simulator itself, as a smoothed one of one run a point, see `as_plain`.
    """

    def __init__(self, plain: SmoothedSimulator, misfit: Misfit, search: Search, natural: Array, budget: int) -> None:
        self.plain, self.misfit, self.search, self.natural, self.budget = plain, misfit, search, natural, budget

    @property
    def x(self) -> Array:
        return self.search.overall[1]

    @property
    def converged(self) -> bool:
        return bool(self.search.stopped)

    def advance(self, step: int, num_evaluations: int) -> FitStep:
        search = self.search
        # One run is kept for the end.
        search.points = search.points[: max(1, self.budget - 1 - num_evaluations)]
        points = search.points
        outputs = plain_outputs(self.plain, points * self.natural, step)
        shape = tuple(self.misfit.target.shape)
        if step == 0 and outputs.shape[1:] != shape:
            raise InputError(f"Expected a target of shape {outputs.shape[1:]}, got {shape}.")
        outputs = outputs.reshape(len(points), -1)
        failed = np.asarray(~np.isfinite(outputs).all(axis=1))
        if failed.all():  # and perhaps without a shape
            outputs = np.full((len(points), int(np.prod(shape))), np.nan)
        residuals = self.residuals(outputs)
        self._think(lambda: search.told(residuals, failed), lambda: search.with_rows(residuals, failed))
        note = search.note
        if step == 0 and search.reused:
            note = "; ".join(filter(None, [f"begins with {search.reused} evaluations of earlier runs", note]))
        loss, best = search.overall
        place = tuple((best * self.natural).tolist())
        runs = num_evaluations + len(points)
        return FitStep(step, loss, search.scale, place, runs, None, None, int(search.failed.sum()), note)

    def residuals(self, outputs: Array) -> Array:
        """(k, m) whitened, of outputs (k, m)."""
        return np.asarray((outputs - self.misfit.target.numpy().reshape(1, -1)) / self.misfit.deviation)

    def loss_of_rows(self, outputs: Array) -> Array:
        """(k,) losses of single runs, without the prior, of outputs (k, m)."""
        return np.asarray(0.5 * (self.residuals(outputs) ** 2).sum(axis=1))

    def begin_with(self, parameters: Array, outputs: Array) -> None:
        """Takes earlier runs at (n, d) parameters, with outputs (n, m), into the model. Collective."""
        rows, residuals = parameters / self.natural, self.residuals(outputs)
        self._think(lambda: self.search.begin_with(rows, residuals), lambda: residuals)

    def _think(self, change: Callable[[], None], residuals: Callable[[], Array]) -> None:
        """Changes the search on one rank and hands it to the others, which know all `residuals` afterwards.

        One rank thinks for all: sums of its linear algebra need not have the same last bits elsewhere.
        """
        dispatcher = self.plain.dispatcher
        if dispatcher.driver is not None:
            dispatcher = SerialDispatcher()  # the other ranks follow its evaluations alone
        error, saved = None, None
        if dispatcher.rank == 0:
            try:
                change()
            except BridgeError as problem:
                error = problem
            saved = {name: value for name, value in self.search.to_dict().items() if name != "residuals"}
        dispatcher.agree(error)
        saved = dispatcher.broadcast_object(saved)
        if dispatcher.rank != 0 and saved is not None:
            self.search.restore({**saved, "residuals": residuals()})

    def outputs_at(self, points: Array, step: int) -> tuple[Array, int]:
        """(k, *shape) outputs at points: of rows that have been run, else of a run more; and how many of these."""
        outputs, runs = [], 0
        for z in points:
            rows = np.flatnonzero((self.search.rows == z).all(axis=1))
            if len(rows):
                row = self.search.residuals[rows[0]] * self.misfit.deviation + self.misfit.target.numpy().reshape(-1)
                outputs.append(np.where(self.search.failed[rows[0]], np.nan, row).reshape(self.misfit.target.shape))
            else:
                outputs.append(plain_outputs(self.plain, z[None] * self.natural, step + runs)[0])
                runs += 1
        return np.stack(outputs), runs

    def to_dict(self) -> dict[str, Any]:
        return self.search.to_dict()

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.search.restore(saved)


def plain_outputs(plain: SmoothedSimulator, thetas: Array, step: int) -> Array:
    """(k, *shape) outputs at (k, d) parameters, one run each, on every rank; NaN where a run failed."""
    try:
        value = plain.estimate(torch.as_tensor(thetas), step).value
    except EvaluationError:
        # Where every single run fails there is no output at all, and no shape of one.
        if plain.strategy.failures == "raise" or step == 0:
            raise
        return np.full((len(thetas), 1), np.nan)
    outputs = value.to("cpu", torch.float64).numpy().copy()
    outputs[outputs >= FAILED] = np.nan
    return np.asarray(outputs)


class _Adam:
    """Adam's direction (Kingma and Ba 2015) in numpy float64: the same bits on every rank and thread count."""

    def __init__(self, d: int, betas: tuple[float, float] = (0.7, 0.95)) -> None:
        self.betas, self.m, self.v, self.t = betas, np.zeros(d), np.zeros(d), 0

    def direction(self, g: Array) -> Array:
        b1, b2 = self.betas
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t)
        return np.asarray(m / (np.sqrt(v) + 1e-300))
