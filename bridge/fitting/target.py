"""The target of a fit and its noise, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import ArrayLike

from bridge.arrays import floating, real_array
from bridge.errors import InputError
from bridge.simulator.protocol import Simulator, simulator_name

LinearMap = Callable[[torch.Tensor], torch.Tensor]


def checked_target(
    target: ArrayLike | torch.Tensor, mask: ArrayLike | torch.Tensor | None, sim: Simulator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The target, 0 where it is masked, and where that is: None where nowhere.

    Args:
        mask: True where a number is no data, as `numpy.ma` has it; besides that of a masked target.
    """
    array = np.array(floating(real_array(target, "as the target", InputError)), dtype=np.float64)
    if sim.output_shape is not None and array.shape != sim.output_shape:
        raise InputError(
            f"Expected a target of shape {sim.output_shape}, as {simulator_name(sim)!r} gives, got {array.shape}."
        )
    if array.size == 0:
        raise InputError(f"Expected a target with numbers, got an empty one, of shape {array.shape}.")
    masked = np.zeros(array.shape, dtype=bool)
    if isinstance(target, np.ma.MaskedArray):
        masked |= np.ma.getmaskarray(target)
    if mask is not None:
        given = real_array(mask, "as the mask", InputError)
        if given.shape != array.shape or not np.isin(given, (0, 1)).all():
            raise InputError(
                f"Expected a mask of the target's shape {array.shape}, True where a number is to be left out, got "
                f"shape {given.shape}, dtype {given.dtype}."
            )
        masked |= given.astype(bool)
    array[masked] = 0.0
    if not np.isfinite(array).all():
        raise InputError(
            "Expected a finite target, got NaN or infinity. Leave such numbers out: "
            "misfit=bridge.LeastSquares(mask=~numpy.isfinite(target)), or a numpy.ma array."
        )
    if masked.all():
        raise InputError("Expected a target with a number that is not masked, got none. In a mask True means no data.")
    return torch.as_tensor(array), torch.as_tensor(masked) if masked.any() else None


def checked_linear(given: LinearMap, shape: tuple[int, ...], what: str) -> torch.Tensor:
    """What a linear map makes of random numbers of a shape: exactly 0 where it makes 0 of all.

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
    return one.abs() + two.abs()


def checked_noise(
    variance: float | ArrayLike | None, whiten: LinearMap | None, goal: torch.Tensor, masked: torch.Tensor | None
) -> tuple[torch.Tensor, LinearMap | None, torch.Tensor | None]:
    """The variance of the residuals, a number or of their shape, the linear map that comes before it, and which of its
    numbers are data: None for all.

    No data are those that depend on a masked number, those that the map makes 0 of all outputs, and those of infinite
    variance.

    Raises:
        InputError: a variance that is not positive, or of neither the residuals' shape nor that of their covariance.
    """
    given = real_array(1.0 if variance is None else variance, "as the variance", InputError)
    tensor = torch.as_tensor(np.array(given, dtype=np.float64))
    if whiten is None:
        size = torch.ones(goal.shape, dtype=torch.float64)
    else:
        size = checked_linear(whiten, tuple(goal.shape), "whiten")
    if tensor.ndim and tensor.shape != size.shape:
        m = goal.numel()
        if whiten is not None or goal.ndim == 0 or tensor.shape not in ((m, m), goal.shape + goal.shape):
            raise InputError(
                f"Expected a variance that is a number, {tuple(size.shape)}, or the covariance of all numbers, "
                f"({m}, {m}), got {tuple(tensor.shape)}."
            )
        return torch.ones((), dtype=torch.float64), _whitening(tensor.reshape(m, m), masked), None
    if not bool((tensor > 0).all()) or (tensor.ndim == 0 and not bool(torch.isfinite(tensor))):
        raise InputError(
            "Expected a positive, finite variance of the target; in an array inf where there are no data; got "
            f"{float(tensor.min()):g}."
        )
    counts = (size > 0) & torch.isfinite(tensor)
    if masked is not None:
        counts &= ~touched(whiten, masked)
    if not bool(counts.any()):
        raise InputError(
            "Expected a number that is compared, got none: whiten= makes 0 of all outputs, or mixes masked numbers "
            "into every one of its results. Leave whiten= out, give variance= as a covariance, or whiten locally."
        )
    return tensor, whiten, None if bool(counts.all()) else counts


def touched(whiten: LinearMap | None, where: torch.Tensor) -> torch.Tensor:
    """Which numbers of T(y) depend on some numbers of y."""
    if whiten is None:
        return where
    rng = np.random.Generator(np.random.Philox(key=2))
    with torch.no_grad():
        made = whiten(torch.as_tensor(rng.normal(size=tuple(where.shape))) * where).abs()
    return made > 1e-9 * float(made.max())


def _whitening(covariance: torch.Tensor, masked: torch.Tensor | None) -> LinearMap:
    """x -> C^-1 x of what is not masked, flattened, with C the Cholesky factor: its covariance is then the identity."""
    keep = None
    if masked is not None:
        keep = torch.nonzero(~masked.reshape(-1)).flatten()
        covariance = covariance[keep][:, keep]
    if not bool(torch.isfinite(covariance).all()):
        raise InputError(
            "Expected a finite covariance of the target. What is to be left out is said by "
            "misfit=bridge.LeastSquares(mask=...)."
        )
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.T, rtol=1e-8, atol=0):
        raise InputError("Expected a covariance of the target that is symmetric and positive definite.")
    return Cholesky(factor, keep)


@final
@dataclass(frozen=True)
class Cholesky:
    """keep: which numbers are data; None for all."""

    factor: torch.Tensor
    keep: torch.Tensor | None = None

    def data(self, x: torch.Tensor) -> torch.Tensor:
        """(m, 1)."""
        flat = x.reshape(-1, 1)
        return flat if self.keep is None else flat[self.keep]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve_triangular(self.factor, self.data(x), upper=False)[:, 0]
