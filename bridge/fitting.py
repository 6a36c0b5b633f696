"""A fit: the parameters of a simulator from a target output, by descent along smoothed gradients.

The module is not called `fit`, because the function `bridge.fit` is: a package attribute cannot be both.

The noise shrinks geometrically during the run, so that the first steps see a landscape smooth over the distance to the
solution and the last ones the simulator itself (coarse to fine).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import EvaluationError, InputError
from bridge.runs import Run
from bridge.simulator import ParameterSpace, Simulator, as_simulator, simulator_name
from bridge.smoothing import SmoothedSimulator, smooth

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

Array = NDArray[np.float64]
Method = Literal["adam", "gauss-newton"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FitStep:
    """One line of the history.

    Attributes:
        step: its number. loss: at `parameters`, of the smoothed output. scale: of the noise, in natural units.
        parameters: (d,) before the update. num_evaluations: simulator runs so far.
        standard_error: of the parameters so far, as far as the method knows it.
        gradient_error: standard error of the loss's gradient over its norm, as far as the method knows it.
        num_failed: failed runs so far. note: what the method did, in words.
    """

    step: int
    loss: float
    scale: float
    parameters: tuple[float, ...]
    num_evaluations: int
    standard_error: tuple[float, ...] | None = None
    gradient_error: float | None = None
    num_failed: int = 0
    note: str = ""


@dataclass(frozen=True)
class FitResult:
    """How a fit ended.

    Attributes:
        space: names and units of the parameters.
        parameters: (d,) recovered values. start: (d,) where it began.
        standard_error: (d,) statistical error of the recovered values, from the smoothed Jacobian J at the end and
            the variance of the target: sqrt(diag((J^T V^-1 J)^-1)); None where a parameter does not act, or with a
            loss of one's own.
        loss: final value, smoothed at the last scale.
        stop_reason: "converged", "max_steps" or "interrupted".
        history: one `FitStep` a step.
        num_evaluations: simulator runs, all ranks together.
        wall_s: duration [s].
        output, start_output: the simulator's (unperturbed) output at `parameters` and at `start`; NaN where that run
            failed and failures are not raised.
    """

    space: ParameterSpace
    parameters: Array
    start: Array
    standard_error: Array | None
    loss: float
    stop_reason: str
    history: tuple[FitStep, ...] = field(repr=False)
    num_evaluations: int
    wall_s: float
    output: NDArray[Any] = field(repr=False)
    start_output: NDArray[Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each parameter with unit, start and standard error, and how the run ended."""
        parameters = {}
        for i, p in enumerate(self.space.parameters):
            entry: dict[str, Any] = {
                "value": float(self.parameters[i]),
                "unit": p.unit,
                "start": float(self.start[i]),
            }
            if self.standard_error is not None:
                entry["standard_error"] = float(self.standard_error[i])
            parameters[p.name] = entry
        return {
            "parameters": parameters,
            "stop_reason": self.stop_reason,
            "loss": self.loss,
            "steps": len(self.history),
            "num_evaluations": self.num_evaluations,
            "wall_s": round(self.wall_s, 3),
        }


def _geometric(first: float, last: float, fraction: float) -> float:
    return float(first * (last / first) ** min(1.0, fraction))


def fit(
    simulator: Callable[..., Any] | Simulator,
    target: ArrayLike | torch.Tensor,
    start: Mapping[str, float] | ArrayLike,
    *,
    seed: int | None = None,
    method: Method = "adam",
    steps: int | None = None,
    num_samples: int = 32,
    scale: float | tuple[float, float] = (2.0, 0.1),
    learning_rate: float = 0.25,
    variance: float | ArrayLike | None = None,
    loss: Loss | None = None,
    tolerance: float = 0.01,
    on_step: Callable[[FitStep], None] | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    every_s: float = 10.0,
    comm: Intracomm | None = None,
    **smoothing: Any,
) -> FitResult:
    """Fits a simulator's parameters to a target by descent along smoothed gradients.

    The default loss is 1/2 mean((f_L(x) - target)^2 / variance), of the smoothed output.

    Args:
        simulator: as in `bridge.smooth`; its parameter space gives bounds and natural units.
        target: of the simulator's output shape.
        start: name -> value, or (d,).
        seed: of all noise; required.
        method: "adam" descends the gradient with Adam, at a rate of `learning_rate` times the current scale;
            "gauss-newton" solves with J^T V^-1 J of the smoothed Jacobian: fewer simulations, least squares only.
        steps: at most so many; default 150 for adam, 24 for gauss-newton.
        num_samples: perturbations a step.
        scale: of the noise in natural units, from the first to the last step; a number keeps it.
        learning_rate: of adam, in units of the scale; decays by a cosine to a fifth.
        variance: of the target's noise, a number or an array of its shape; 1 when left out.
        loss: l(output, target) -> number, in place of least squares (adam only).
        tolerance: converged when, at the last scale, the parameters move by less than this (natural units) over a
            tenth of the steps.
        on_step: called with each `FitStep`, on every rank.
        directory: where the run is kept, so that it can go on after any interruption, on any number of ranks, to
            bitwise the same result; see `bridge.Run`, also for `resume`, `overwrite` and `every_s`.
        comm, **smoothing: as in `bridge.smooth`.

    Returns:
        a `FitResult`, the same on every rank. Collective under MPI. In one process an interrupt (Ctrl-C)
        ends the fit in good order.

    Raises:
        InputError: target of another shape or not finite, start outside the bounds, unknown method.
        EvaluationError: a simulation failed.
        SystemExit: with code 75, with a directory: stopped by a signal; start it again.
    """
    sim = as_simulator(simulator)
    begin = time.monotonic()
    if method not in ("adam", "gauss-newton"):
        raise InputError(f"Unknown method {method!r}. Known: adam, gauss-newton.")
    if method == "gauss-newton" and loss is not None:
        raise InputError("Expected method='adam' with a loss of your own: Gauss-Newton needs least squares.")
    if sim.space is None and isinstance(start, Mapping):
        raise InputError("Expected start values as a vector: the simulator does not name its parameters.")
    space = sim.space or ParameterSpace.unnamed(len(np.atleast_1d(np.asarray(start))))
    theta = space.vector(start)
    if outside := space.describe_outside(theta):
        raise InputError(f"Expected a start inside the bounds, got {outside}.")
    first, last = (scale, scale) if isinstance(scale, int | float) else scale
    if not (first > 0 and last > 0):
        raise InputError(f"Expected positive scales, got {scale!r}.")
    if steps is None:
        steps = 150 if method == "adam" else 24
    if steps < 1:
        raise InputError(f"Expected at least one step, got {steps!r}.")
    goal = _target(target, sim)
    misfit = _Misfit(goal, _variance(variance, goal), loss)
    # First, since it checks its settings: a fit that is refused leaves nothing behind.
    smoothed = smooth(sim, seed=seed, num_samples=num_samples, scale=first, comm=comm, **smoothing)
    run: Run | None = None
    if directory is not None:
        settings = {
            "simulator": simulator_name(sim), "seed": seed, "method": method, "steps": steps,
            "num_samples": num_samples, "scale": [first, last], "learning_rate": learning_rate,
            "tolerance": tolerance, "start": theta.tolist(), "target": _digest(goal),
            "variance": _digest(misfit.variance), "smoothing": {k: repr(v) for k, v in sorted(smoothing.items())},
        }  # fmt: skip
        run = Run(directory, settings=settings, every_s=every_s, resume=resume, overwrite=overwrite, comm=comm)
        if smoothed.execution.store is None:
            smoothed.execution = replace(smoothed.execution, store=run.store)
    natural = space.natural_scale
    lower, upper = space.lower / natural, space.upper / natural
    window = max(2, steps // 10)
    with nullcontext() if run is None else run:
        now = _State.restored(run.state) if run is not None and run.state is not None else _State(theta / natural)
        if on_step is not None:
            for record in now.history:
                on_step(record)
        stop_reason = now.stop_reason
        try:
            while now.step < steps and now.stop_reason is None:
                step = now.step
                # The last fifth of the run stays at the last scale.
                width = _geometric(first, last, step / max(1.0, 0.8 * (steps - 1)))
                estimate = smoothed.estimate(torch.as_tensor(now.x * natural), step, scale=width)
                value, gradient = misfit.value_and_gradient(estimate.value)
                if method == "adam":
                    g = estimate.vjp(gradient).numpy() * natural
                    decay = 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi * step / steps))
                    x = now.x - learning_rate * width * decay * now.adam.direction(g)
                else:
                    x = now.x - misfit.gauss_newton(estimate.jacobian(), estimate.value, natural, limit=2 * width)
                runs = now.num_evaluations + estimate.num_evaluations
                record = FitStep(step, value, width, tuple((now.x * natural).tolist()), runs)
                now.advance(record, np.clip(x, lower, upper))
                if on_step is not None:
                    on_step(record)
                past = [np.array(h.parameters) / natural for h in now.history[-window:]]
                if step >= 0.8 * (steps - 1) + window and np.max(np.abs(np.array(past) - now.x)) < tolerance:
                    now.stop_reason = "converged"
                if run is not None:
                    run.checkpoint(now.step, now.to_dict())
            stop_reason = now.stop_reason or "max_steps"
        except KeyboardInterrupt:
            if smoothed.dispatcher.size > 1:
                raise  # ranks are told at different places: this ends them all
            stop_reason = "interrupted"
            if run is not None:
                run.set_aside()
        theta_end = now.x * natural
        final = smoothed.estimate(torch.as_tensor(theta_end), steps, scale=last)
        outputs, runs = _plain_outputs(smoothed, np.stack([theta_end, space.vector(start)]), tuple(goal.shape))
        error = misfit.standard_error(final.jacobian()) if loss is None else None
    return FitResult(
        space=space,
        parameters=theta_end,
        start=space.vector(start),
        standard_error=error,
        loss=misfit.value_and_gradient(final.value)[0],
        stop_reason=stop_reason,
        history=tuple(now.history),
        num_evaluations=now.num_evaluations + final.num_evaluations + runs,
        wall_s=time.monotonic() - begin,
        output=outputs[0],
        start_output=outputs[1],
    )


class _State:
    """What a fit carries from step to step, and nothing else."""

    def __init__(self, x: Array) -> None:
        self.x, self.adam = x, _Adam(len(x))
        self.history: list[FitStep] = []
        self.stop_reason: str | None = None

    @property
    def step(self) -> int:
        return len(self.history)

    @property
    def num_evaluations(self) -> int:
        return self.history[-1].num_evaluations if self.history else 0

    def advance(self, record: FitStep, x: Array) -> None:
        self.history.append(record)
        self.x = x

    def to_dict(self) -> dict[str, Any]:
        steps = [(h.loss, h.scale, list(h.parameters), h.num_evaluations) for h in self.history]
        adam = {"m": self.adam.m, "v": self.adam.v, "t": self.adam.t}
        return {"x": self.x, "adam": adam, "history": steps, "stop_reason": self.stop_reason}

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> _State:
        state = cls(saved["x"])
        state.adam.m, state.adam.v, state.adam.t = (saved["adam"][key] for key in "mvt")
        state.history = [FitStep(i, a, b, tuple(c), n) for i, (a, b, c, n) in enumerate(saved["history"])]
        state.stop_reason = saved["stop_reason"]
        return state


def _digest(tensor: torch.Tensor) -> str:
    array = tensor.contiguous().numpy()
    return hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()


def _target(target: ArrayLike | torch.Tensor, sim: Simulator) -> torch.Tensor:
    goal = torch.as_tensor(np.asarray(target, dtype=np.float64))
    if sim.output_shape is not None and tuple(goal.shape) != sim.output_shape:
        raise InputError(
            f"Expected a target of shape {sim.output_shape}, as {simulator_name(sim)!r} gives, got {tuple(goal.shape)}."
        )
    if not bool(torch.isfinite(goal).all()):
        raise InputError("Expected a finite target, got NaN or infinity. Mask or fill those pixels first.")
    return goal


def _variance(variance: float | ArrayLike | None, goal: torch.Tensor) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(1.0 if variance is None else variance, dtype=np.float64))
    if tensor.ndim and tensor.shape != goal.shape:
        raise InputError(f"Expected a variance that is a number or {tuple(goal.shape)}, got {tuple(tensor.shape)}.")
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise InputError("Expected a positive, finite variance of the target.")
    return tensor


@dataclass
class _Misfit:
    """The loss and what the two methods need of it."""

    target: torch.Tensor
    variance: torch.Tensor
    loss: Loss | None

    def value_and_gradient(self, output: torch.Tensor) -> tuple[float, torch.Tensor]:
        if output.shape != self.target.shape:
            raise InputError(f"Expected a target of shape {tuple(output.shape)}, got {tuple(self.target.shape)}.")
        if self.loss is None:
            residual = (output - self.target) / self.variance
            value = 0.5 * torch.mean(residual * (output - self.target))
            return float(value), residual / self.target.numel()
        leaf = output.detach().requires_grad_(True)
        value = self.loss(leaf, self.target)
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient

    def _normal(self, jacobian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = jacobian.shape[-1]
        J = jacobian.reshape(-1, d).to(torch.float64)
        V = torch.broadcast_to(self.variance, self.target.shape).reshape(-1, 1)
        return J, (J / V).T @ J

    def gauss_newton(self, jacobian: torch.Tensor, output: torch.Tensor, natural: Array, limit: float) -> Array:
        """(J^T V^-1 J + lambda diag)^-1 J^T V^-1 r in natural units, no longer than `limit` in any coordinate."""
        J, normal = self._normal(jacobian)
        residual = ((output - self.target) / self.variance).reshape(-1).to(torch.float64)
        N = torch.as_tensor(natural)
        H = normal.numpy() * np.outer(natural, natural)
        g = (J.T @ residual * N).numpy()
        damped = H + 1e-3 * np.diag(np.diag(H)) + 1e-12 * max(float(np.trace(H)), 1e-300) * np.eye(len(g))
        direction = np.linalg.solve(damped, g)
        return np.asarray(direction * min(1.0, limit / max(float(np.max(np.abs(direction))), 1e-300)))

    def standard_error(self, jacobian: torch.Tensor) -> Array | None:
        _, normal = self._normal(jacobian)
        try:
            variances = np.diag(np.linalg.inv(normal.numpy()))
        except np.linalg.LinAlgError:
            return None
        return np.sqrt(variances) if (variances > 0).all() else None


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


def _plain_outputs(smoothed: SmoothedSimulator, thetas: Array, shape: tuple[int, ...]) -> tuple[NDArray[Any], int]:
    """The simulator itself at some parameters, through the same dispatch, and how many runs that cost.

    NaN where a run failed, unless failures="raise".
    """
    once = smooth(
        smoothed.simulator,
        seed=smoothed.strategy.seed,
        num_samples=1,
        points="mc",
        covariate="none",
        forward="unsmoothed",
    )
    once.dispatcher, once.execution = smoothed.dispatcher, smoothed.execution
    try:
        estimate = once.estimate(torch.as_tensor(thetas))
    except EvaluationError:  # the same on every rank
        if smoothed.strategy.failures == "raise":
            raise
        # A fit that has lived with failed runs must not end by one.
        if len(thetas) > 1:
            parts = [_plain_outputs(smoothed, thetas[i : i + 1], shape) for i in range(len(thetas))]
            return np.concatenate([outputs for outputs, _ in parts]), len(thetas)
        return np.full((1, *shape), np.nan), 1
    return np.asarray(estimate.value.numpy()), estimate.num_evaluations
