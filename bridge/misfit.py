"""The distance of an output from the target, and what each method of fitting needs of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.errors import InputError
from bridge.robust import Robust
from bridge.simulator import ParameterSpace, Simulator, simulator_name

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
    """A Gaussian: 1/2 (z - mu)^T P (z - mu) of parameters in natural units.

    Attributes:
        information: P, (d, d), 0 where nothing is known. mean: mu, (d,).
    """

    information: Array
    mean: Array

    def __call__(self, z: Array) -> tuple[float, Array]:
        slope = self.information @ (z - self.mean)
        return 0.5 * float(slope @ (z - self.mean)), np.asarray(slope)

    @property
    def known(self) -> int:
        """How many numbers it says something of."""
        return int(np.linalg.matrix_rank(self.information))


@final
@dataclass(frozen=True)
class Misfit:
    """sum_j rho(r_j) + prior, r = B(T(y - t) / sigma): the loss, and what each method needs of it.

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
        return self.cost(r) + self.prior(z)[0]

    def ordinary_cost(self) -> float:
        """sum rho(r) of an output that is the target's mean everywhere."""
        return self.cost(self.residual(torch.full_like(self.target, float(self.target.mean()))).numpy())

    def cost(self, r: Array) -> float:
        """sum rho(r)."""
        return 0.5 * float(r @ r) if self.robust is None else float(self.robust.rho(r).sum())

    def _check(self, output: torch.Tensor) -> None:
        if output.shape != self.target.shape:
            raise InputError(f"Expected a target of shape {tuple(output.shape)}, got {tuple(self.target.shape)}.")

    def value_and_gradient(self, output: torch.Tensor, z: Array) -> tuple[float, torch.Tensor, Array]:
        """The loss of an output at z, and its derivatives in the output and, by the prior alone, in z.

        With least squares the derivatives are those of the loss over m, so that a learning rate does not depend on m.
        """
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
        return self.cost(r) + prior, gradient, slope / m

    def shares(self, output: torch.Tensor) -> Array | None:
        """The part that each output has in sum r^2, of the target's shape; None where `whiten` mixes outputs.

        With a covariance V they are e V^-1 e elementwise, e = y - t: they add up to 1, and one may be negative.
        """
        e = output.to(torch.float64) - self.target
        if self.whiten is None:
            part = e**2 / self.variance
        elif isinstance(self.whiten, Cholesky):
            part = e * torch.cholesky_solve(e.reshape(-1, 1), self.whiten.factor).reshape(e.shape)
        else:
            return None
        total = float(part.sum())
        return (part / total if total > 0 else torch.zeros_like(part)).numpy()

    def jacobian(self, jacobian: torch.Tensor, natural: Array) -> torch.Tensor:
        """dr/dz (m, d) in natural units, of the output's (*shape, d) in the parameters' own."""
        J = jacobian.to(torch.float64)
        if self.plain:
            J = (J / self.variance.sqrt()[..., None]).reshape(-1, J.shape[-1])
        else:
            J = torch.stack([self._mapped(column).reshape(-1) for column in J.movedim(-1, 0)], dim=1)
        return J * torch.as_tensor(natural)

    def normal(self, J: torch.Tensor, r: torch.Tensor, z: Array) -> tuple[Array, Array]:
        """J^T W J + P of the prior, (d, d), and the gradient of sum_j rho(r_j) + prior, (d,).

        W = psi(r) / r, 1 for least squares: iteratively reweighted least squares.
        """
        if self.robust is None:
            H, g = J.T @ J, J.T @ r
        else:
            w = torch.as_tensor(self.robust.weight(r.numpy()))
            H, g = (J * w[:, None]).T @ J, J.T @ (w * r)
        return H.numpy() + self.prior.information, g.numpy() + self.prior(z)[1]

    def spread_of(self, deviation: Array) -> Array:
        """(m,) variances of residuals of outputs with independent errors of such standard deviations, (*shape).

        Exact without `whiten` and blur, else the mean over sixteen draws of signs.
        """
        scale = torch.as_tensor(deviation, dtype=torch.float64).reshape(self.target.shape)
        if self.plain:
            return np.asarray((scale**2 / self.variance).reshape(-1).numpy())
        rng = np.random.Generator(np.random.Philox(key=2))
        signs = rng.choice([-1.0, 1.0], size=(16, *self.target.shape))
        drawn = [self._mapped(scale * torch.as_tensor(x)).numpy() ** 2 for x in signs]
        return np.asarray(np.mean(drawn, axis=0).reshape(-1))

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


PriorOf = Mapping[Any, tuple[Any, Any]] | tuple[Any, Any]


def make_prior(prior: PriorOf | None, space: ParameterSpace) -> Prior:
    """A prior from what is known of parameters, or of several together.

    Args:
        prior: name -> (mean, standard deviation); several names, in a tuple or with commas between them -> (means,
            covariance) of these together; (means, covariance) of all.

    Raises:
        InputError: an unknown name, one that is named twice, a standard deviation that is not positive, or a covariance
            that is not symmetric and positive definite.
    """
    d, natural = space.dimension, space.natural_scale
    information, mean = np.zeros((d, d)), np.zeros(d)
    seen: set[int] = set()
    for names, (centre, spread) in _by_names(prior, space).items():
        at = [space.index(name) for name in names]
        if len(set(at)) < len(at) or seen & set(at):
            raise InputError(f"Expected each parameter once in prior=, got one of {', '.join(names)} again.")
        seen |= set(at)
        centres, covariance = np.atleast_1d(np.asarray(centre, float)), np.asarray(spread, float)
        what = f"prior[{', '.join(map(repr, names))}]"
        if len(at) == 1 and covariance.ndim == 0:
            if centres.shape != (1,) or not (np.isfinite(centres[0]) and covariance > 0):
                raise InputError(f"Expected {what} = (mean, standard deviation > 0), got ({centre!r}, {spread!r}).")
            information[at[0], at[0]] = (natural[at[0]] / float(covariance)) ** 2
        else:
            information[np.ix_(at, at)] = _inverse_covariance(what, centres, covariance, natural[at])
        mean[at] = centres / natural[at]
    return Prior(information, mean)


def marginal_deviations(prior: PriorOf | None, space: ParameterSpace) -> dict[str, float]:
    """The standard deviation of each parameter of which a prior says something; what is no prior is passed over."""
    found: dict[str, float] = {}
    for names, (_, spread) in _by_names(prior, space).items():
        size = np.asarray(spread, float)
        sizes = size.reshape(-1) if size.ndim == 0 else np.sqrt(np.maximum(np.diag(size), 0)) if size.ndim == 2 else ()
        found |= {name: float(s) for name, s in zip(names, sizes, strict=False) if np.isfinite(s) and s > 0}
    return found


def _inverse_covariance(what: str, means: Array, covariance: Array, unit: Array) -> Array:
    """Of several parameters, in natural units."""
    k = len(unit)
    if means.shape == (k,) and covariance.shape == (k, k):
        sizes = np.sqrt(np.maximum(np.diag(covariance), 0))
        if np.isfinite(means).all() and np.isfinite(covariance).all() and (sizes > 0).all():
            correlation = covariance / np.outer(sizes, sizes)  # parameters may have very different units
            if (
                np.allclose(correlation, correlation.T, rtol=0, atol=1e-8)
                and np.linalg.eigvalsh(correlation)[0] > 1e-12
            ):
                inverse = np.linalg.inv(correlation) / np.outer(sizes / unit, sizes / unit)
                return np.asarray((inverse + inverse.T) / 2)
    raise InputError(
        f"Expected {what} = (means of shape ({k},), covariance ({k}, {k}), symmetric and positive definite), got "
        f"shapes {means.shape} and {covariance.shape}, or numbers that are no covariance."
    )


def _by_names(prior: PriorOf | None, space: ParameterSpace) -> dict[tuple[str, ...], tuple[Any, Any]]:
    if prior is None:
        return {}
    given = prior if isinstance(prior, Mapping) else {space.names: prior}
    named = {}
    for key, value in given.items():
        if isinstance(key, str):
            names = (key,) if key in space.names else tuple(name.strip() for name in key.split(","))
        else:
            names = tuple(key)
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str) or len(value) != 2:
            raise InputError(
                f"Expected prior[{', '.join(names)}] = (mean, standard deviation), or (means, covariance) of several "
                f"parameters, got {value!r}."
            )
        named[names] = (value[0], value[1])
    return named
