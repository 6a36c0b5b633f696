"""How well an output explains the target: one loss for every method, chi-square, and which outputs it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2

from bridge.arrays import Array
from bridge.fitting.misfit import Misfit

# A target of a known variance counts as unexplained where chance gives as large a chi-square less often than this, and
# where it is more than so many degrees of freedom: the variance itself is hardly ever known better.
_CHANCE, _EXCESS = 1e-4, 1.05
# Neighbours of white noise are correlated by 0 +- 1 / sqrt(m): by so many of these, and by at least so much.
_ALIKE_SIGMA, _ALIKE, _ENOUGH = 3.5, 0.3, 20
# Residuals of less than this part of what the start was off by are those of an exact fit: rounding has any pattern.
_EXACT = 1e-6
# More than this of a prior in chi-square is chance once in a thousand times, for each of some parameters.
_AT_ODDS = 15.0
# A single output that is this much of the loss is named.
_LOUD = 0.5


@final
@dataclass(frozen=True)
class Goodness:
    """What is left of the target at the end of a fit.

    Attributes:
        loss: 1/2 sum r^2, r = T(output - target) / sigma, and 1/2 z^T P z of the prior; with a robust loss sum rho(r),
            with a loss of one's own that.
        dof: numbers of the target, and of the prior, less free parameters. None with a loss of one's own.
        chi_square: sum r^2 and z^T P z, where the variance of the target is known.
        p_value: probability of a chi-square as large, were the target explained; the noise of the simulator itself
            counts as far as it is known. None with a robust loss.
        share: of each output in sum r^2, of the target's shape: e V^-1 e elementwise, e = output - target. None where
            `whiten` mixes outputs. by_prior: what the prior adds to chi-square.
    """

    loss: float
    dof: int | None = None
    chi_square: float | None = None
    p_value: float | None = None
    share: Array | None = None
    by_prior: float = 0.0


def goodness_of(misfit: Misfit, output: NDArray[np.generic], z: Array, known: bool, noise: float = 0.0) -> Goodness:
    """The goodness of one output at z.

    Args:
        output: of the target's shape. z: (d,) natural units. known: whether the variance of the target is given.
        noise: variance of one run of the simulator, over that of the target, averaged over outputs.
    """
    tensor = torch.as_tensor(np.asarray(output, dtype=np.float64))
    loss = misfit.value_there(tensor, z)
    if misfit.loss is not None:
        return Goodness(loss)
    r = misfit.residual(tensor).numpy()
    r = r[~np.isnan(r)]
    dof = max(len(r) + misfit.prior.known - len(z), 0)
    squares = float(r @ r) + 2 * misfit.prior(z)[0]
    p_value = None
    if known and misfit.robust is None and dof > 0:
        p_value = float(chi2.sf(squares / (1 + noise), dof))
    share = misfit.shares(tensor)
    return Goodness(loss, dof, squares if known else None, p_value, share, squares - float(r @ r))


def unexplained(good: Goodness, residual: NDArray[np.generic], start_residual: NDArray[np.generic]) -> tuple[str, ...]:
    """What the end leaves of the target, in words; nothing where the target is explained.

    Args:
        residual: output - target at the end. start_residual: at the start.
    """
    if good.dof is None or not np.isfinite(good.loss):
        return ()
    said, loud = [], _loudest(good)
    if good.p_value is not None and good.chi_square is not None:
        reduced = good.chi_square / max(good.dof, 1)
        if good.p_value < _CHANCE and reduced > _EXCESS:
            prior = ""
            if good.by_prior > _AT_ODDS:
                prior = (
                    f" {good.by_prior:.3g} of it are the prior's, which is at odds with the target: check prior= first."
                )
            said.append(
                f"The target is not explained: chi-square is {good.chi_square:.4g} for {good.dof} degrees of freedom "
                f"({reduced:.3g} each; 1 is expected).{prior}{loud} Look at the residuals; try other starts "
                "(start=bridge.Starts(...), bridge.Kriging(restarts=...)), more runs, a variance that has all noise, "
                "or misfit=bridge.LeastSquares(robust=...) where few outputs are off."
            )
    size, first = _size(residual), _size(start_residual)
    alike = _alike(residual) if size > _EXACT * first else 0.0
    if good.chi_square is None and alike:
        said.append(
            f"Residuals are not noise: those of neighbouring outputs are alike (correlation {alike:+.2f}).{loud} The "
            "simulator misses something, the fit is not at its best, or noise is correlated (give its covariance as "
            "variance=)."
        )
    return tuple(said)


def _size(residual: NDArray[np.generic]) -> float:
    """Root mean square of what is there; 0 where nothing is."""
    r = np.asarray(residual, dtype=np.float64)
    r = r[np.isfinite(r)]
    return float(np.sqrt(np.mean(r**2))) if r.size else 0.0


def _loudest(good: Goodness) -> str:
    """Which outputs are most of the loss, where a few are."""
    share = good.share
    if share is None or share.size < 5 or not np.isfinite(share).all():
        return ""
    flat = share.reshape(-1)
    first = int(np.argmax(flat))
    if flat[first] < max(_LOUD, 5 / share.size):
        return ""
    index = ", ".join(map(str, np.unravel_index(first, share.shape)))
    return f" Output [{index}] alone is {100 * flat[first]:.0f} % of it."


def _alike(residual: NDArray[np.generic]) -> float:
    """The correlation of residuals with their neighbours along the last axis, where it is not that of white noise."""
    r = np.asarray(residual, dtype=np.float64)
    if r.ndim == 0 or r.shape[-1] < 3:
        return 0.0
    r = r - np.nanmean(r)
    a, b = r[..., 1:].reshape(-1), r[..., :-1].reshape(-1)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    size = float(np.sqrt((a @ a) * (b @ b)))
    if len(a) < _ENOUGH or not size > 0:
        return 0.0
    correlation = float(a @ b) / size
    return correlation if correlation > max(_ALIKE, _ALIKE_SIGMA / np.sqrt(len(a))) else 0.0
