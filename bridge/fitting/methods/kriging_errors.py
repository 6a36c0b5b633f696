"""Errors that are stated where a search by a model of all runs has come to."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.methods.gaussian_process import GaussianProcess, fit_gaussian_process
from bridge.fitting.methods.kriging_search import KrigingSearch
from bridge.fitting.misfit import Misfit
from bridge.fitting.normal import Normal, finite_inverse, least_share, of_least_squares
from bridge.fitting.residuals import output_sizes, target_spread
from bridge.fitting.rounding import Lattice
from bridge.fitting.uncertainty import Evidence, Note, NoteKind, Stated

# Of outputs beside their changes in a model, squared: what the least nugget makes of them.
_LEAST_WIDTH = 1e-2
_SPURIOUS = 1e-10
# Of what tells parameters apart, that is left over shorter differences, below which it was their length that told it.
_BENT = 0.25
# Where all outputs have the target's steps: directions, and nodes along each.
_DIRECTIONS, _NODES = 64, 32


def of_search(search: KrigingSearch, misfit: Misfit, known: bool, lattice: Lattice | None = None) -> Stated:
    """Errors in natural units, where a search is now.

    The model's prediction is w^T F, so that noise of the runs is left in it with w^T w of its variance, and dw^T dw of
    it is in J^T J. Each output's noise is that of the runs about the prediction.
    """
    _, z = search.overall
    robust, prior = misfit.robust, misfit.prior
    if why := _too_few(search, z):
        d = len(z)
        return Stated(
            np.full((d, d), np.nan), np.nan, np.zeros(d, dtype=bool), (Note(NoteKind.NONE, why),), by_model=True
        )
    model, F, at_z, there = search.runs.model_there(z)
    m = F.shape[1]
    rounding, floor = _rounding(lattice, misfit, there)
    # Of outputs that have steps the smooth part, for which rounding is noise.
    if rounding.any():
        model = fit_gaussian_process(model.rows, F @ F.T, unit=search.runs.unit, rough=False)
    w = model.at(z)[0]
    r = F.T @ w if robust is None else at_z
    noise = np.maximum(model.residual_noise(F), rounding)
    left = noise * float(w @ w)
    stepped = rounding > 0
    total = float(noise.sum())
    independent = float(np.clip(total**2 / max(float((noise**2).sum()), 1e-300), 1.0, m))
    usual = float(np.mean(left + floor))
    variance = 1.0 + usual if known else max(float(r @ r) / max(m - len(z), 1), usual, 1e-300)
    slopes = _slopes_over_errors(
        model, search.runs.unit, z, variance, prior.information, total, independent, bool(stepped.any())
    )
    J = F.T @ slopes.weights
    J[:, slopes.spurious] = 0
    weight = 1.0 if robust is None else robust.weight(r)
    slope = J.T @ (weight * r) + prior(z)[1]
    evidence = Evidence(
        Normal(J, J.T @ J, total * slopes.weights.T @ slopes.weights, independent),
        slopes.information,
        r,
        tuple(misfit.target.shape),
        left=left,
        seen=left,
        floor=floor,
        step=_step_within(slopes.information + prior.information, slope, z, search.lower, search.upper),
        first=_first_residual(search),
        run_noise=float(np.sqrt(total)),
        spread=target_spread(misfit),
        output=output_sizes(misfit, r, there),
    )
    stated = replace(evidence.stated(prior.information, known, robust), by_model=True)
    exact = bool(stepped.any()) and bool((np.abs(at_z) < 1e-3 * np.sqrt(12 * rounding))[stepped].all())
    exact = exact and robust is None and bool((at_z[~stepped] == 0).all())
    if exact:
        covariance = _on_plateau(J[stepped], rounding[stepped], prior.information)
        clear, least = np.zeros(len(z), dtype=bool), np.sqrt(np.diag(covariance))
        stated = replace(stated, covariance=covariance, unclear=clear, least=least, notes=())
    return stated


def _too_few(search: KrigingSearch, z: Array) -> str:
    """Why no error is stated, where the runs do not span all directions."""
    rows, d = search.runs.rows[~search.runs.failed], len(z)
    if np.linalg.matrix_rank((rows - z) / search.runs.unit, tol=1e-9) >= d:
        return ""
    runs = "1 run does" if len(rows) == 1 else f"{len(rows)} runs do"
    what = "the parameter" if d == 1 else f"{d} parameters apart"
    return f"No standard error is stated: {runs} not tell {what}. Allow more: stop=bridge.Stop(runs=...)."


def _rounding(lattice: Lattice | None, misfit: Misfit, there: NDArray[np.bool_]) -> tuple[Array, Array]:
    """(m,) variances by the outputs' own steps, and by those of the target."""
    m = int(there.sum())
    if lattice is None or not len(lattice.first) or not lattice.steps.any():
        return np.zeros(m), np.zeros(m)
    rounding = misfit.spread_of(lattice.deviation(tuple(misfit.target.shape)))[there]
    on = misfit.of_data(lattice.holds(misfit.target.numpy()))
    return rounding, rounding * (on.all() if on.shape != there.shape else on[there])


def _first_residual(search: KrigingSearch) -> float:
    """Root of the mean squared residual of the first runs, infinite if unknown."""
    good = search.runs.residuals[~search.runs.failed]
    if not len(good):
        return np.inf
    return float(np.sqrt(np.median(np.nanmean(good[: max(len(search.start) + 1, 6)] ** 2, axis=1))))


class _Slopes(NamedTuple):
    """J = F^T dw: the weights dw (n, d), which slopes are spurious, and what is known of J^T J."""

    weights: Array
    spurious: NDArray[np.bool_]
    information: Array


def _slopes(model: GaussianProcess, z: Array, width: Array, noise: float, independent: float) -> _Slopes:
    """Of differences over some width (d,)."""
    dw = model.differences(z, width)
    gram = dw.T @ model.gram @ dw
    # A slope of less than the model's own rounding is that of others' outputs, and not one.
    spurious = np.diag(gram) <= _SPURIOUS * float(np.diag(model.gram).max()) * (dw**2).sum(axis=0)
    gram[spurious] = gram[:, spurious] = 0
    normal = Normal(np.zeros((1, len(z))), gram, noise * dw.T @ dw, independent)
    return _Slopes(dw, spurious, normal.information())


def _slopes_over_errors(
    model: GaussianProcess,
    unit: Array,
    z: Array,
    variance: float,
    precision: Array,
    noise: float,
    independent: float,
    stepped: bool,
) -> _Slopes:
    """Slopes over the errors themselves: that between two steps of a staircase is not what counts.

    Args:
        variance: of residuals. precision: the prior's, (d, d). noise: variance of one run, summed over outputs.
        independent: how many outputs have noise of their own. stepped: whether outputs have steps.
    """
    width, wide = 0.1 * unit, 2.0 if stepped else 1.0
    for _ in range(3):
        slopes = _slopes(model, z, width, noise, independent)
        error = np.sqrt(np.diag(of_least_squares(slopes.information, variance, precision)))
        # Rows that are next to each other tell slopes no better than their rounding does.
        width = np.clip(wide * error, _LEAST_WIDTH * unit, unit)
    # Along a valley errors are long, and over these outputs bend: what is told of it may be the bending alone.
    alone = np.sqrt(variance / np.maximum(np.diag(slopes.information), 1e-300))
    narrow = np.clip(alone, _LEAST_WIDTH * unit, width)
    if not stepped and (narrow < 0.5 * width).any():
        nearer = _slopes(model, z, narrow, noise, independent)
        if least_share(nearer.information) < _BENT * least_share(slopes.information):
            return nearer
    return slopes


def _step_within(metric: Array, slope: Array, z: Array, lower: Array, upper: Array) -> Array:
    """The step (d,) to the minimum of a quadratic, of those parameters that no bound holds at z."""
    held, step = np.zeros(len(z), dtype=bool), np.zeros(len(z))
    while not held.all():
        free = np.flatnonzero(~held)
        step = np.zeros(len(z))
        step[free] = -finite_inverse(metric[np.ix_(free, free)]) @ slope[free]
        out = ((z <= lower) & (step < 0)) | ((z >= upper) & (step > 0))
        if not out.any():
            break
        held |= out
        step[held] = 0.0
    return np.asarray(np.clip(z + step, lower, upper) - z)


def _on_plateau(J: Array, rounding: Array, precision: Array) -> Array:
    """Covariance where all outputs that have steps are those of the target.

    An output keeps its step over dz with probability p = 1 - |J_o dz| / step_o, so that the product of these is the
    density of the truth about z. Its second moment is taken as the same in all directions of J^T J: it is integrated
    along some of them, chosen evenly.
    """
    J = J / np.sqrt(12 * rounding)[:, None]
    left, size, _ = np.linalg.svd(J, full_matrices=False)
    left = left[:, size > 1e-5 * size.max(initial=0.0)]
    k = left.shape[1]
    if k == 0:
        return of_least_squares(J.T @ J, 1.0, precision)
    directions = np.random.Generator(np.random.Philox(key=k)).normal(size=(_DIRECTIONS, k))
    x, w = np.polynomial.legendre.leggauss(_NODES)
    unit, moments = k / float(np.abs(left).sum()), np.zeros(2)
    for u in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        slope = np.abs(left @ u)
        # Until one output has surely another step, or all together nearly so.
        end = min(1 / float(slope.max()), (40 + 2 * k) / float(slope.sum()))
        distance = 0.5 * end * (x + 1)
        density = (distance / unit) ** (k - 1) * np.exp(np.log1p(-np.outer(distance, slope)).sum(axis=1))
        moments += 0.5 * end * (w * density) @ np.stack([np.ones(_NODES), distance**2], axis=1)
    return of_least_squares(J.T @ J, float(moments[1] / moments[0]) / k, precision)
