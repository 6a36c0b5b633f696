"""Robust losses: what a residual costs that is many standard deviations long."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from bridge.arrays import Array
from bridge.checks import is_number
from bridge.errors import InputError
from bridge.registry import Registry

# Of a residual, that the fit leaves.
_LEAST_LEFT = 0.05


@dataclass(frozen=True)
class RobustLoss(ABC):
    """A loss rho(r) of a residual r in standard deviations: r^2 / 2 for small ones, less for large ones.

    A subclass is a frozen dataclass with a default of `width`, registered by a name (`register`). It gives rho, its
    weight and its curvature, all three of arrays, element by element.

    Attributes:
        width: c, from which on a residual counts for less, in standard deviations of the target's noise.

    Reference: Huber and Ronchetti, *Robust Statistics* (2009), sections 4.5 and 7.6.
    """

    width: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.width) and self.width > 0):
            raise InputError(
                f"Expected a positive width of the robust loss, in standard deviations, got {self.width!r}."
            )

    @abstractmethod
    def rho(self, r: Array) -> Array:
        """The loss of each residual."""

    @abstractmethod
    def weight(self, r: Array) -> Array:
        """w = psi / r, psi the derivative of rho: of the least squares that touch the loss at r from above."""

    @abstractmethod
    def curvature(self, r: Array) -> Array:
        """The second derivative of rho."""

    def spread(self, r: Array, leverage: Array) -> tuple[float, float]:
        """(a, b): the covariance of parameters fitted to residuals r (m,) is a / b^2 (J^T J)^-1, whatever their law.

        b = mean psi', a = K^2 mean (psi / (1 - h))^2, K = 1 + sum h / m var psi' / b^2 (Huber and Ronchetti, equation
        7.81). A number with leverage h pulls the fit towards itself, which leaves 1 - h of its residual; what is more
        than psi^2 / (1 - h) stands for the noise of the estimate itself, as in the jackknife.

        Args:
            leverage: h, (m,), the diagonal of the hat matrix of the weighted fit.

        Reference: for HC3: MacKinnon and White, J. Econometrics 29 (1985) 305.
        """
        curvature = self.curvature(r)
        b = max(float(curvature.mean()), 1e-3)
        k = 1 + float(leverage.mean()) * float(curvature.var()) / b**2
        # Where a parameter has a number for itself there is no residual to tell by.
        left = np.maximum(1 - leverage, _LEAST_LEFT)
        return k**2 * float(((self.weight(r) * r / left) ** 2).mean()), b


ROBUST_LOSSES: Registry[RobustLoss] = Registry(
    "robust loss", "bridge.robust_losses", RobustLoss, or_else=", or (name, width)"
)
register = ROBUST_LOSSES.register

# Default widths are those at which the estimate of a mean keeps 95 % of its efficiency under Gaussian noise.


@register("huber")
@final
@dataclass(frozen=True)
class Huber(RobustLoss):
    """rho = r^2 / 2, beyond c: c abs(r) - c^2 / 2. Convex."""

    width: float = 1.345

    def rho(self, r: Array) -> Array:
        u = (r / self.width) ** 2
        return np.asarray(np.where(u <= 1, 0.5 * r * r, self.width * np.abs(r) - 0.5 * self.width**2))

    def weight(self, r: Array) -> Array:
        """min(1, c / abs(r))."""
        return np.asarray(1 / np.sqrt(np.maximum((r / self.width) ** 2, 1.0)))

    def curvature(self, r: Array) -> Array:
        return np.asarray(((r / self.width) ** 2 <= 1).astype(np.float64))


@register("cauchy")
@final
@dataclass(frozen=True)
class Cauchy(RobustLoss):
    """rho = c^2 / 2 log(1 + u), u = (r / c)^2. Lets go of an outlier altogether, and is not convex."""

    width: float = 2.3849

    def rho(self, r: Array) -> Array:
        return np.asarray(0.5 * self.width**2 * np.log1p((r / self.width) ** 2))

    def weight(self, r: Array) -> Array:
        """1 / (1 + u)."""
        return np.asarray(1 / (1 + (r / self.width) ** 2))

    def curvature(self, r: Array) -> Array:
        u = (r / self.width) ** 2
        return np.asarray((1 - u) / (1 + u) ** 2)


@register("soft-l1")
@final
@dataclass(frozen=True)
class SoftL1(RobustLoss):
    """rho = c^2 (sqrt(1 + u) - 1), u = (r / c)^2. Convex."""

    width: float = 1.2871

    def rho(self, r: Array) -> Array:
        return np.asarray(self.width**2 * (np.sqrt(1 + (r / self.width) ** 2) - 1))

    def weight(self, r: Array) -> Array:
        """(1 + u)^(-1/2)."""
        return np.asarray((1 + (r / self.width) ** 2) ** -0.5)

    def curvature(self, r: Array) -> Array:
        return np.asarray((1 + (r / self.width) ** 2) ** -1.5)


def make_robust(given: Any) -> RobustLoss | None:
    """A robust loss from itself, its name, or (name, width in standard deviations); None from None.

    Raises:
        InputError: something else, an unknown name, or a width that is not positive.
    """
    if given is None or isinstance(given, RobustLoss):
        return given
    name, width = given if isinstance(given, tuple | list) and len(given) == 2 else (given, None)
    if not isinstance(name, str) or not (width is None or is_number(width)):
        hint = f" Give an instance, {given.__name__}(...)." if isinstance(given, type) else ""
        raise InputError(
            f"Expected the name of a robust loss, (name, width in standard deviations), or a bridge.RobustLoss, got "
            f"{given!r}.{hint}"
        )
    kind: Any = ROBUST_LOSSES.find(name)
    made: RobustLoss = kind() if width is None else kind(float(width))
    return made
