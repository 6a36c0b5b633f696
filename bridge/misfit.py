"""The distance of an output from the target, and what each method of fitting needs of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from bridge.robust import Robust
from bridge.simulator import Simulator, simulator_name

Array = NDArray[np.float64]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LinearMap = Callable[[torch.Tensor], torch.Tensor]


def checked_target(target: ArrayLike | torch.Tensor, sim: Simulator) -> torch.Tensor:
    goal = torch.as_tensor(np.asarray(target, dtype=np.float64))
    if sim.output_shape is not None and tuple(goal.shape) != sim.output_shape:
        raise InputError(
            f"Expected a target of shape {sim.output_shape}, as {simulator_name(sim)!r} gives, got {tuple(goal.shape)}."
        )
    if not bool(torch.isfinite(goal).all()):
        raise InputError("Expected a finite target, got NaN or infinity. Mask or fill those pixels first.")
    return goal


def checked_linear(given: LinearMap, shape: tuple[int, ...], what: str) -> torch.Size:
    """The shape of what a map makes of float64 tensors of a shape.

    Raises:
        InputError: it is not linear, or not made of torch operations on real numbers.
    """
    rng = np.random.Generator(np.random.Philox(key=1))
    a, b = (torch.as_tensor(rng.normal(size=shape)) for _ in range(2))
    try:
        results = [given((2 * a + 3 * b).requires_grad_(True)), given(a), given(b)]
    except Exception as error:
        raise InputError(
            f"Expected {what} to map a float64 tensor of shape {shape}, got {type(error).__name__}: {error}."
        ) from error
    if not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in results) or not results[0].requires_grad:
        raise InputError(
            f"Expected {what} to make a real, differentiable tensor of a tensor. Use torch operations; for Fourier "
            "transforms torch.view_as_real, or transform back."
        )
    whole, one, two = (x.detach() for x in results)
    if not bool(((whole - 2 * one - 3 * two).abs() <= 1e-5 * (1 + whole.abs())).all()):
        raise InputError(f"Expected {what} to be linear, T(2a + 3b) = 2 T(a) + 3 T(b), got another result.")
    return whole.shape


def checked_noise(
    variance: float | ArrayLike | None, whiten: LinearMap | None, goal: torch.Tensor
) -> tuple[torch.Tensor, LinearMap | None]:
    """The variance of the residuals, a number or of their shape, and the linear map that comes before it.

    Raises:
        InputError: a variance that is not positive, or of neither the residuals' shape nor that of their covariance.
    """
    tensor = torch.as_tensor(np.asarray(1.0 if variance is None else variance, dtype=np.float64))
    if not bool(torch.isfinite(tensor).all()):
        raise InputError("Expected a positive, finite variance of the target.")
    shape = goal.shape if whiten is None else checked_linear(whiten, tuple(goal.shape), "whiten")
    if tensor.ndim and tensor.shape != shape:
        m = goal.numel()
        if whiten is not None or goal.ndim == 0 or tensor.shape not in ((m, m), goal.shape + goal.shape):
            raise InputError(
                f"Expected a variance that is a number, {tuple(shape)}, or the covariance of all numbers, ({m}, {m}), "
                f"got {tuple(tensor.shape)}."
            )
        return torch.ones((), dtype=torch.float64), _whitening(tensor.reshape(m, m))
    if not bool((tensor > 0).all()):
        raise InputError("Expected a positive, finite variance of the target.")
    return tensor, whiten


def _whitening(covariance: torch.Tensor) -> LinearMap:
    """x -> C^-1 x, flattened, with C the Cholesky factor: its covariance is then the identity."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.T, rtol=1e-8, atol=0):
        raise InputError("Expected a covariance of the target that is symmetric and positive definite.")
    return Cholesky(factor)


@final
@dataclass(frozen=True)
class Cholesky:
    factor: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.factor, x.reshape(-1, 1), upper=False)[:, 0]


@final
@dataclass(frozen=True)
class Prior:
    """A Gaussian: 1/2 sum p_i (z_i - mu_i)^2 of parameters in natural units.

    Attributes:
        precision: p, (d,), 0 where there is none. mean: mu, (d,).
    """

    precision: Array
    mean: Array

    def __call__(self, z: Array) -> tuple[float, Array]:
        away = z - self.mean
        return 0.5 * float(self.precision @ away**2), np.asarray(self.precision * away)


@final
@dataclass(frozen=True)
class Misfit:
    """1/m (sum_j rho(r_j) + prior), r = B(T(y - t) / sigma): the loss, and what each method needs of it.

    With a loss l of one's own, l(B T(y), B T(t)) + prior.

    Attributes:
        target: t. variance: sigma^2 of T(t), a number or of its shape. loss: l, None for least squares.
        prior: of the parameters in natural units. whiten: T. blur: B. robust: rho, r^2 / 2 where None.
    """

    target: torch.Tensor
    variance: torch.Tensor
    loss: Loss | None
    prior: Prior
    whiten: LinearMap | None = None
    robust: Robust | None = None
    blur: LinearMap | None = None

    @property
    def plain(self) -> bool:
        """Whether outputs can be had back from residuals."""
        return self.whiten is None and self.blur is None

    @property
    def deviation(self) -> Array:
        """The noise's standard deviation, (m,) or (1,)."""
        return np.sqrt(self.variance.numpy().reshape(-1))

    def _mapped(self, x: torch.Tensor) -> torch.Tensor:
        """B(T(x) / sigma) of one x of the target's shape; sigma is left out for a loss of one's own."""
        x = x if self.whiten is None else self.whiten(x)
        x = x if self.loss is not None else x / self.variance.sqrt()
        return x if self.blur is None else self.blur(x)

    def residual(self, output: torch.Tensor) -> torch.Tensor:
        """r, flattened: (m,)."""
        self._check(output)
        return self._mapped(output.to(torch.float64) - self.target).reshape(-1)

    def value(self, output: torch.Tensor, z: Array) -> float:
        with torch.no_grad():
            if self.loss is not None:
                self._check(output)
                return (
                    float(self.loss(self._mapped(output.to(torch.float64)), self._mapped(self.target)))
                    + self.prior(z)[0]
                )
            r = self.residual(output).numpy()
        return (self.cost(r) + self.prior(z)[0]) / len(r)

    def cost(self, r: Array) -> float:
        """sum rho(r)."""
        return 0.5 * float(r @ r) if self.robust is None else float(self.robust.rho(r).sum())

    def _check(self, output: torch.Tensor) -> None:
        if output.shape != self.target.shape:
            raise InputError(f"Expected a target of shape {tuple(output.shape)}, got {tuple(self.target.shape)}.")

    def value_and_gradient(self, output: torch.Tensor, z: Array) -> tuple[float, torch.Tensor, Array]:
        """The loss of an output at z, and its derivatives in the output and, by the prior alone, in z."""
        prior, slope = self.prior(z)
        leaf = output.detach().to(torch.float64).requires_grad_(True)
        if self.loss is not None:
            self._check(output)
            value = self.loss(self._mapped(leaf), self._mapped(self.target))
            (gradient,) = torch.autograd.grad(value, leaf)
            return float(value.detach()) + prior, gradient, slope
        residual = self.residual(leaf)
        m = residual.numel()
        r = residual.detach().numpy()
        psi = r if self.robust is None else self.robust.weight(r) * r
        (gradient,) = torch.autograd.grad(residual, leaf, torch.as_tensor(psi / m))
        return (self.cost(r) + prior) / m, gradient, slope / m

    def jacobian(self, jacobian: torch.Tensor, natural: Array) -> torch.Tensor:
        """dr/dz (m, d) in natural units, of the output's (*shape, d) in the parameters' own."""
        J = jacobian.to(torch.float64)
        if self.plain:
            J = (J / self.variance.sqrt()[..., None]).reshape(-1, J.shape[-1])
        else:
            J = torch.stack([self._mapped(column).reshape(-1) for column in J.movedim(-1, 0)], dim=1)
        return J * torch.as_tensor(natural)

    def normal(self, J: torch.Tensor, r: torch.Tensor, z: Array) -> tuple[Array, Array]:
        """J^T W J + prior's precision, (d, d), and the gradient of sum_j rho(r_j) + prior, (d,).

        W = psi(r) / r, 1 for least squares: iteratively reweighted least squares.
        """
        if self.robust is None:
            H, g = J.T @ J, J.T @ r
        else:
            w = torch.as_tensor(self.robust.weight(r.numpy()))
            H, g = (J * w[:, None]).T @ J, J.T @ (w * r)
        return H.numpy() + np.diag(self.prior.precision), g.numpy() + self.prior(z)[1]

    def spread_of(self, deviation: Array) -> Array:
        """(m,) variances of residuals of outputs with independent errors of such standard deviations, (*shape).

        Exact without `whiten` and blur, else the mean over sixteen draws of signs.
        """
        scale = torch.as_tensor(deviation, dtype=torch.float64).reshape(self.target.shape)
        if self.plain:
            return np.asarray((scale**2 / self.variance).reshape(-1).numpy())
        rng = np.random.Generator(np.random.Philox(key=2))
        signs = rng.choice([-1.0, 1.0], size=(16, *self.target.shape))
        return np.asarray(np.mean([self._mapped(scale * torch.as_tensor(x)).numpy() ** 2 for x in signs], axis=0).reshape(-1))

    def residuals_of(self, outputs: Array) -> Array:
        """(n, m) of outputs (n, *shape), not finite where they are not."""
        rows = torch.as_tensor(outputs, dtype=torch.float64)
        if self.plain:
            whitened = (rows - self.target) / self.variance.sqrt()
            return np.asarray(whitened.reshape(len(rows), self.target.numel()).numpy())
        good = np.isfinite(outputs.reshape(len(rows), self.target.numel())).all(axis=1)
        mapped = np.full((len(rows), self.residual(self.target).numel()), np.nan)
        for i in np.flatnonzero(good):
            mapped[i] = self.residual(rows[i]).numpy()
        return mapped


def make_prior(prior: Any, space: Any) -> Prior:
    """From name -> (mean, standard deviation), in natural units.

    Raises:
        InputError: an unknown name, or a standard deviation that is not positive.
    """
    precision, mean = np.zeros(space.dimension), np.zeros(space.dimension)
    for name, (centre, deviation) in (prior or {}).items():
        i, natural = space.index(name), space.parameters[space.index(name)].natural_scale
        if not (np.isfinite(centre) and deviation > 0):
            raise InputError(
                f"Expected prior[{name!r}] = (mean, standard deviation > 0), got ({centre!r}, {deviation!r})."
            )
        precision[i], mean[i] = (natural / deviation) ** 2, centre / natural
    return Prior(precision, mean)
