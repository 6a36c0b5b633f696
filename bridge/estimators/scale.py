"""The scale matrix L of x + L eps: a number, a diagonal, a lower-triangular or a full matrix.

A number or a (d,) vector is L's diagonal (standard deviations, not variances); a (d, d) array is L itself, not L L^T.
Inside, only two forms exist: the diagonal (d,) and the matrix (d, d); numbers and triangles become these by ordinary
torch operations, so that their gradients follow by the chain rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.distributions import Distribution

Form = Literal["diagonal", "matrix"]


def as_tensor(values: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor as it is; numbers on the CPU, whatever torch's default device is."""
    if isinstance(values, torch.Tensor):
        return values
    if isinstance(values, np.ndarray) and (not values.dtype.isnative or min(values.strides, default=0) < 0):
        values = values.astype(values.dtype.newbyteorder("="))  # torch has neither another order nor strides below 0
    return torch.as_tensor(values, dtype=dtype, device="cpu")


@dataclass(frozen=True)
class LowerTriangular:
    """L is the lower triangle of a (d, d) tensor, the rest is taken as 0; its gradient is lower-triangular too."""

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", as_tensor(self.tensor))


@dataclass(frozen=True)
class LogScale:
    """L as an exponential, so that it stays positive or invertible while it is learned.

    A number or 0-dim tensor a: exp(a), in the parameters' natural units; (d,): the diagonal exp(a_i), in parameter
    units; (d, d): the matrix exponential of A, in parameter units, whose determinant is exp(tr A) > 0.
    """

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensor", as_tensor(self.tensor))

    def exponential(self) -> torch.Tensor:
        """L, float64, differentiable in the tensor."""
        tensor = self.tensor.to(torch.float64)
        return torch.linalg.matrix_exp(tensor) if tensor.ndim == 2 else torch.exp(tensor)


ScaleLike = float | torch.Tensor | NDArray[np.float64] | LowerTriangular | LogScale | Mapping[str, float]


def parse_scale(scale: ScaleLike, natural: Array, distribution: Distribution) -> tuple[torch.Tensor, Form]:
    """Brings a scale into one of the two inner forms.

    Args:
        scale: number or 0-dim tensor (in the parameters' natural units), (d,) or (d, d) (in parameter units), or
            `LowerTriangular`, or `LogScale`; any tensor may require grad.
        natural: (d,) natural units of the parameters.
        distribution: Cauchy noise takes a diagonal L only.

    Returns:
        L as a (d,) or (d, d) float64 tensor, differentiable in `scale`, and which of the two it is.

    Raises:
        InputError: wrong shape, not finite, not positive (diagonal), singular (matrix).
    """
    d = len(natural)
    if isinstance(scale, LogScale):
        scale = scale.exponential()
    if isinstance(scale, LowerTriangular):
        tensor = scale.tensor.to(torch.float64)
        if tensor.shape != (d, d):
            raise InputError(f"Expected a ({d}, {d}) lower-triangular scale, got shape {tuple(tensor.shape)}.")
        tensor = torch.tril(tensor)
    else:
        # Straight to float64: as_tensor of a Python number would round it to float32.
        try:
            given = as_tensor(scale, torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Expected a scale that is a number, ({d},) or ({d}, {d}), got {scale!r}. Give numbers, in the order "
                "of the parameters."
            ) from error
        tensor = given.to(torch.float64)
        if tensor.ndim == 0:
            tensor = tensor * torch.as_tensor(natural, dtype=torch.float64, device=tensor.device)
        elif tuple(tensor.shape) not in ((d,), (d, d)):
            raise InputError(
                f"Expected a scale that is a number, ({d},) or ({d}, {d}), got shape {tuple(tensor.shape)}. For one "
                "scale a problem of a batch, use torch.func.vmap over the scale."
            )
    form: Form = "diagonal" if tensor.ndim == 1 else "matrix"
    if form == "matrix" and not distribution.cross_moments:
        raise InputError(
            f"Expected a number or a ({d},) diagonal scale for {distribution.name} noise, got a matrix: the moments "
            "E[s_i eps_j] that a full scale matrix needs do not exist. Use a diagonal, or another distribution."
        )
    return tensor, form


def check_scale(scale: Array, form: Form) -> None:
    """Refuses values with which x + L eps is no smoothing. Called where numbers are at hand, not while tracing.

    Args:
        scale: (..., d) diagonals or (..., d, d) matrices, as `parse_scale` gives them.
        form: which of the two.

    Raises:
        InputError: not finite, a diagonal that is not positive, a matrix that is singular.
    """
    if not np.isfinite(scale).all():
        raise InputError(f"Expected a finite scale, got {scale.tolist()}.")
    if form == "diagonal" and (scale <= 0).any():
        raise InputError(
            f"Expected a positive scale for each parameter, got {scale.tolist()}. To keep a parameter fixed, leave it "
            "out of the simulator's parameters; a learned scale stays positive as `bridge.LogScale`."
        )
    if form != "matrix":
        return
    # In rows of one length: parameters may have units of very different sizes.
    lengths = np.linalg.norm(scale, axis=-1, keepdims=True)
    if (condition := float(np.max(np.linalg.cond(scale / np.where(lengths > 0, lengths, 1.0))))) > 1e12:
        raise InputError(
            f"Expected an invertible scale matrix, got one of condition number {condition:.3g}: {scale.tolist()}. "
            "Directions without noise have no smoothed gradient."
        )


def perturb(theta: Array, scale: Array, eps: Array) -> Array:
    """theta + L eps for each row: theta (d,), scale (d,) or (d, d), eps (n, d) -> (n, d)."""
    if scale.ndim == 1:
        return theta + eps * scale
    # A sum of fixed shape, not a matrix product, whose bits would depend on the number of rows.
    return theta + (eps[:, None, :] * scale[None]).sum(axis=2)


def pull_back_theta(scale: Array, g: Array) -> Array:
    """L^-T g: from eps-space gradients (d,) to gradients in x. Mind the transpose (theory, trap 1)."""
    return g / scale if scale.ndim == 1 else np.asarray(np.linalg.solve(scale.T, g), dtype=np.float64)


def pull_back_scale(scale: Array, g: Array) -> Array:
    """L^-T G: from eps-space sums of s eps^T - I, (d,) diagonal or (d, d), to gradients in L (Theorem 7)."""
    return g / scale if scale.ndim == 1 else np.asarray(np.linalg.solve(scale.T, g), dtype=np.float64)


def push_theta(scale: Array, tangent: Array) -> Array:
    """L^-1 t: from a tangent in x (d,) to eps-space, so that <L^-T s, t> = <s, L^-1 t>."""
    return tangent / scale if scale.ndim == 1 else np.asarray(np.linalg.solve(scale, tangent), dtype=np.float64)


def push_scale(scale: Array, tangent: Array) -> Array:
    """L^-1 T: <L^-T G, T> = <G, L^-1 T>; (d,) or (d, d)."""
    return tangent / scale if scale.ndim == 1 else np.asarray(np.linalg.solve(scale, tangent), dtype=np.float64)
