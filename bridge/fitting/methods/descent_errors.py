"""Errors that are stated where a descent has ended, from independent estimates of its Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import chdtri

from bridge.arrays import Array
from bridge.fitting.misfit import Misfit
from bridge.fitting.normal import Normal, finite_inverse, leverages, normal_of, without
from bridge.fitting.residuals import is_exact, output_sizes, target_spread
from bridge.fitting.rounding import Lattice
from bridge.fitting.uncertainty import Evidence, Note, NoteKind, Stated

# Noise of the smoothed output beside the target's, from which on the end of a first-order descent tells no error.
_TOO_NOISY = 2.0
# Chance with which the target's noise is less than what is taken for it there, where residuals alone tell it.
_OWN = 0.025
# Eigenvalues of the normal matrix in natural units, in which descents move, beside the largest, below which there are
# valleys; how far the minimum is along one, by the slopes at the end, from which on it is not found: in standard
# errors, and in standard deviations of what noise makes of those slopes.
_VALLEY, _FOUND, _SHOWN = 1e-2, 0.1, 2.0
# Steps of the outputs over the last scale, below which slopes are those of a staircase.
_COARSE = 0.7
# Different changes of outputs between two runs, to tell a step by.
_ENOUGH_APART = 5
# Of a variance that two numbers tell: the largest of many is seldom as far above the median.
_OF_ONE = 0.1
_NOISE = (
    "No standard error is stated: the smoothed output is noisier than the target, and where a descent ends in such "
    "noise says little of the minimum. Give the method more samples (num_samples=), or take "
    "method='gauss-newton' or 'kriging'."
)


def of_descent(
    misfit: Misfit,
    values: torch.Tensor,
    jacobians: torch.Tensor,
    z: Array,
    natural: Array,
    known: bool,
    step_noise: float = 0.0,
    past: Array | None = None,
    outputs: Sequence[NDArray[np.float64]] = (),
    last: float = 0.0,
    longest: float = np.inf,
    start: Array | None = None,
) -> Stated:
    """Errors at z, in natural units.

    Args:
        values, jacobians: independent estimates (R, *shape) and (R, *shape, d). With R = 1 nothing is known of noise.
        natural: (d,). known: whether the target's variance is; else the mean squared residual takes its place.
        step_noise: see `Normal.information`; 0 but for Gauss-Newton. past: (n, d), where other descents have been last.
        outputs: of the simulator itself, at z and elsewhere. last: scale of the noise. longest: that a step may be.
        start: (d,) of this descent.
    """
    residuals = np.stack([misfit.residual(v).numpy() for v in values])
    there = ~np.isnan(residuals).any(axis=0)  # outputs may lack numbers
    residuals = residuals[:, there]
    r, R, prior = residuals.mean(axis=0), len(values), misfit.prior
    normal = normal_of([misfit.jacobian(J, natural).numpy()[there] for J in jacobians])
    jitter = float(((residuals - r) ** 2).mean()) / (R - 1) if R > 1 else 0.0
    information = normal.information(step_noise)
    slope = normal.mean.T @ r if misfit.robust is None else normal.mean.T @ (misfit.robust.weight(r) * r)
    metric = information + prior.information
    step = -finite_inverse(metric) @ (slope + prior(z)[1])
    first = _first_residual(misfit, outputs)
    exact = is_exact(r, first)
    stairs = _staircase([y for y in outputs if np.isfinite(y).all()], exact, misfit, normal, there, last)
    noise = np.sqrt(step_noise * jitter * np.diag(finite_inverse(metric))).max(initial=0.0)
    cut = cut_short(noise / longest) if noise > 0 else 1.0
    newton = bool(step_noise) or past is None
    wander = np.atleast_2d(np.cov(past.T)) if past is not None and not newton and len(past) > 1 else None
    along = normal.mean.T @ (residuals - r).T
    within = float(((finite_inverse(normal.naive) @ along) * along).sum()) / max(R - 1, 1) / R
    evidence = Evidence(
        normal,
        information,
        r,
        tuple(misfit.target.shape),
        left=step_noise * jitter * cut,
        seen=jitter,
        rounding=stairs.rounding,
        floor=stairs.floor,
        step=step if past is not None else None,
        jitter=jitter * (1 + step_noise),
        wander=wander,
        bias=_bias(misfit, outputs, r, there),
        within=3 * (1 + step_noise) * within,
        first=first,
        spread=target_spread(misfit),
        output=output_sizes(misfit, r, there),
        own=_OF_ONE * ((residuals - r) ** 2).mean(axis=0) / max(R - 1, 1),
        newton=newton,
        fresh=True,
    )
    stated = evidence.stated(prior.information, known, misfit.robust)
    if not newton and start is not None:
        stated = _along_valleys(stated, evidence, prior.information, z - start)
    # Or the least it may be: else those fits would state errors whose residuals happen to be large, and too large ones.
    own = 1.0 if known else max(float(r @ r) / chdtri(len(r), _OWN) - jitter, 0.0)
    return _withheld(stated, stairs.why() or (_NOISE if not newton and jitter > _TOO_NOISY * own and not exact else ""))


def _withheld(stated: Stated, why: str) -> Stated:
    """The same without errors, where there is a reason."""
    if not why:
        return stated
    return replace(stated, covariance=np.full_like(stated.covariance, np.nan), notes=(Note(NoteKind.NONE, why),))


def _first_residual(misfit: Misfit, outputs: Sequence[NDArray[np.float64]]) -> float:
    """The root of the mean squared residual of the simulator itself at the start; infinite where it is not known."""
    if len(outputs) < 2 or not np.isfinite(outputs[1]).all():
        return np.inf
    return float(np.sqrt(np.mean(misfit.residual(torch.as_tensor(outputs[1])).numpy() ** 2)))


def _bias(misfit: Misfit, outputs: Sequence[NDArray[np.float64]], r: Array, there: NDArray[np.bool_]) -> Array | None:
    """What smoothing changes of the residuals at the end; None where the simulator's own are not known."""
    if not len(outputs) or not np.isfinite(outputs[0]).all():
        return None
    return np.asarray(r - misfit.residual(torch.as_tensor(outputs[0])).numpy()[there])


class _Staircase(NamedTuple):
    """What outputs that are multiples of a step do to residuals and slopes.

    size: of the step, 0 where there is none. rounding, floor: as `Evidence` has them.
    climbed: steps over the last scale, infinite where there are none.
    """

    size: float = 0.0
    rounding: Array | float = 0.0
    floor: Array | float = 0.0
    climbed: float = np.inf

    def why(self) -> str:
        """Why no error is stated, where slopes are those of the staircase."""
        if not self.climbed < _COARSE:
            return ""
        return (
            f"No standard error is stated: outputs are multiples of {self.size:.3g}, and over the last scale those "
            f"that tell parameters change by {self.climbed:.2g} of such steps only. Give the method a larger last "
            "scale (scale=), or take method='kriging'."
        )


def _staircase(
    outputs: Sequence[Array], exact: bool, misfit: Misfit, normal: Normal, there: NDArray[np.bool_], last: float
) -> _Staircase:
    """The step of outputs of the simulator itself, and what it does at the last scale of the noise."""
    size = _step_of(outputs, exact)
    if not size:
        return _Staircase()
    rounding = misfit.spread_of(np.full(misfit.target.shape, size / np.sqrt(12)))[there]
    off = (misfit.target.numpy() - outputs[0]) / size
    floor = rounding * float((np.abs(off - np.round(off)) < 1e-3).all())
    # Noise averages steps: their first harmonic is left by exp(-2 pi^2 (change / step)^2).
    change = (normal.mean**2).sum(axis=1) * last**2 / np.maximum(12 * rounding, 1e-300)
    m, d = normal.mean.shape
    h = leverages(normal.mean, np.ones(m), np.zeros((d, d)))
    climbed = float(np.sqrt(change) @ h / max(float(h.sum()), 1e-300))
    return _Staircase(size, rounding * np.exp(-4 * np.pi**2 * change), floor, climbed)


def _along_valleys(stated: Stated, evidence: Evidence, precision: Array, moved: Array) -> Stated:
    """Without errors along valleys where a first-order descent still is where it began, as far as errors tell.

    There it has moved by less than the error, and slopes show, beyond their noise, that it is short of the minimum.
    Such an end says as much of the start as of the target. A descent that has found the minimum comes to it from any
    start: it has errors however little it has moved.

    Args:
        precision: of the prior: no valley is what it tells alone. moved: (d,).
    """
    metric, step = evidence.information + precision, evidence.step
    assert step is not None
    values, vectors = np.linalg.eigh(metric)
    covariance, noise = stated.covariance, evidence.noise_of_step(metric)
    begun = np.zeros(len(moved), dtype=bool)
    for value, u in zip(values, vectors.T, strict=True):
        along = float(u @ covariance @ u)
        short = (u @ step) ** 2 > max(_FOUND**2 * along, _SHOWN**2 * float(u @ noise @ u))
        if value < _VALLEY * values[-1] and u @ precision @ u < 0.5 * value and short:
            begun |= ((u @ moved) ** 2 < along < np.inf) & ((covariance @ u) ** 2 > 0.5 * along * np.diag(covariance))
    if not begun.any():
        return stated
    note = (
        "No standard error is stated along the valley in which the minimum lies: along it the first-order descent has "
        "moved by less than that error and has not found the minimum, so that its end says as much of the start as of "
        "the target. Take method='gauss-newton' or 'kriging', or give a prior."
    )
    return replace(
        stated, covariance=without(stated.covariance, begun), notes=(*stated.notes, Note(NoteKind.NONE, note))
    )


def _step_of(outputs: Sequence[NDArray[np.float64]], exact: bool) -> float:
    """Of which two runs' differences are multiples, or the first one's numbers themselves; 0 where there is none.

    Two runs of a few outputs may be whole numbers apart by chance, such as at a round start. So may the numbers of an
    exact target at a round truth.
    """
    between = [outputs[0] - outputs[1]] if len(outputs) > 1 else []
    for numbers in between if exact else [*between, *outputs[:1]]:
        lattice, apart = Lattice(), np.unique(np.abs(numbers))
        lattice.add(np.append(0.0, apart)[:, None])
        if (size := float(lattice.steps[0])) and len(apart) > _ENOUGH_APART:
            return size
    return 0.0


def cut_short(noise: float) -> float:
    """Variance that x -> x + clip(n - x, -1, 1) comes to, over that of the noise n, of this standard deviation.

    It is 1 for little noise and 0.63 / noise for much; between them this is some tenth too large at most.
    """
    return float((1 + (1.5 * noise) ** 3) ** (-1 / 3))
