"""Robust losses: what a residual costs that is many standard deviations long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from bridge.arrays import Array
from bridge.errors import InputError

# Widths at which the estimate of a mean keeps 95 % of its efficiency under Gaussian noise.
_WIDTHS = {"huber": 1.345, "cauchy": 2.3849, "soft-l1": 1.2871}
# Of a residual, that the fit leaves.
_LEAST_LEFT = 0.05


@final
@dataclass(frozen=True)
class Robust:
    """rho(r) of a residual r in standard deviations, r^2 / 2 for small ones; c the width, u = (r / c)^2.

    | name | rho | weight psi / r |
    | --- | --- | --- |
    | huber | r^2 / 2, beyond c: c abs(r) - c^2 / 2 | min(1, c / abs(r)) |
    | soft-l1 | c^2 (sqrt(1 + u) - 1) | (1 + u)^(-1/2) |
    | cauchy | c^2 / 2 log(1 + u) | 1 / (1 + u) |

    Of these only cauchy lets go of an outlier altogether; the others are convex.

    Reference: Huber and Ronchetti, *Robust Statistics* (2009), sections 4.5 and 7.6.
    """

    name: str
    width: float

    def rho(self, r: Array) -> Array:
        u = (r / self.width) ** 2
        if self.name == "huber":
            return np.asarray(np.where(u <= 1, 0.5 * r * r, self.width * np.abs(r) - 0.5 * self.width**2))
        if self.name == "soft-l1":
            return np.asarray(self.width**2 * (np.sqrt(1 + u) - 1))
        return np.asarray(0.5 * self.width**2 * np.log1p(u))

    def weight(self, r: Array) -> Array:
        """w = psi / r, psi the derivative of rho: of the least squares that touch the loss at r from above."""
        u = (r / self.width) ** 2
        if self.name == "huber":
            return np.asarray(1 / np.sqrt(np.maximum(u, 1.0)))
        return np.asarray((1 + u) ** -0.5 if self.name == "soft-l1" else 1 / (1 + u))

    def curvature(self, r: Array) -> Array:
        """The second derivative of rho."""
        u = (r / self.width) ** 2
        if self.name == "huber":
            return np.asarray((u <= 1).astype(np.float64))
        return np.asarray((1 + u) ** -1.5 if self.name == "soft-l1" else (1 - u) / (1 + u) ** 2)

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


def make_robust(given: Any) -> Robust | None:
    """From a name, or (name, width in standard deviations).

    Raises:
        InputError: an unknown name, or a width that is not positive.
    """
    if given is None or isinstance(given, Robust):
        return given
    name, width = (given, None) if isinstance(given, str) else tuple(given)
    if name not in _WIDTHS:
        raise InputError(f"Unknown robust loss {name!r}. Known: {', '.join(_WIDTHS)}, or (name, width).")
    width = _WIDTHS[name] if width is None else float(width)
    if not (np.isfinite(width) and width > 0):
        raise InputError(f"Expected a positive width of the robust loss, in standard deviations, got {width!r}.")
    return Robust(name, width)
