"""The distance of an output from the target, and what each method of fitting needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from bridge.simulator import Simulator, simulator_name

Array = NDArray[np.float64]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def checked_target(target: ArrayLike | torch.Tensor, sim: Simulator) -> torch.Tensor:
    goal = torch.as_tensor(np.asarray(target, dtype=np.float64))
    if sim.output_shape is not None and tuple(goal.shape) != sim.output_shape:
        raise InputError(
            f"Expected a target of shape {sim.output_shape}, as {simulator_name(sim)!r} gives, got {tuple(goal.shape)}."
        )
    if not bool(torch.isfinite(goal).all()):
        raise InputError("Expected a finite target, got NaN or infinity. Mask or fill those pixels first.")
    return goal


def checked_variance(variance: float | ArrayLike | None, goal: torch.Tensor) -> torch.Tensor:
    tensor = torch.as_tensor(np.asarray(1.0 if variance is None else variance, dtype=np.float64))
    if tensor.ndim and tensor.shape != goal.shape:
        raise InputError(f"Expected a variance that is a number or {tuple(goal.shape)}, got {tuple(tensor.shape)}.")
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise InputError("Expected a positive, finite variance of the target.")
    return tensor


@dataclass
class Misfit:
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

    def normal(self, jacobian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        d = jacobian.shape[-1]
        J = jacobian.reshape(-1, d).to(torch.float64)
        V = torch.broadcast_to(self.variance, self.target.shape).reshape(-1, 1)
        return J, (J / V).T @ J

    def gauss_newton(self, jacobian: torch.Tensor, output: torch.Tensor, natural: Array, limit: float) -> Array:
        """(J^T V^-1 J + lambda diag)^-1 J^T V^-1 r in natural units, no longer than `limit` in any coordinate."""
        J, normal = self.normal(jacobian)
        residual = ((output - self.target) / self.variance).reshape(-1).to(torch.float64)
        N = torch.as_tensor(natural)
        H = normal.numpy() * np.outer(natural, natural)
        g = (J.T @ residual * N).numpy()
        damped = H + 1e-3 * np.diag(np.diag(H)) + 1e-12 * max(float(np.trace(H)), 1e-300) * np.eye(len(g))
        direction = np.linalg.solve(damped, g)
        return np.asarray(direction * min(1.0, limit / max(float(np.max(np.abs(direction))), 1e-300)))

    @property
    def deviation(self) -> Array:
        """The noise's standard deviation, (m,) or (1,): residuals are whitened by it."""
        return np.sqrt(self.variance.numpy().reshape(-1))

    def covariance(self, jacobian: torch.Tensor, output: torch.Tensor | None) -> Array | None:
        """(J^T V^-1 J)^-1; None where a parameter does not act.

        Args:
            output: where V is not known: its size then comes from the residuals of this output.
        """
        J, normal = self.normal(jacobian)
        size = 1.0
        if output is not None:
            size = float(((output - self.target) ** 2 / self.variance).sum()) / max(J.shape[0] - J.shape[1], 1)
        try:
            covariance = np.linalg.inv(normal.numpy()) * size
        except np.linalg.LinAlgError:
            return None
        return np.asarray(covariance) if (np.diag(covariance) >= 0).all() else None
