"""How well the parameters are known where a fit has ended.

The estimate z solves (N + P) (z - z*) = J^T e in first order, N = J^T J of whitened residuals. Its covariance is the
sandwich (N + P)^-1 (J^T V J + P) (N + P)^-1, V the covariance of e: the target's noise, the noise of the
simulator's own runs as far as it is left in the estimate, and what outputs are rounded by. Where the variance of the
target is not given, or is too small for the residuals, V comes from these. Where they do not tell it, none is stated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from scipy.special import chdtrc, chdtri, fdtrc, stdtr

from bridge.arrays import Array
from bridge.fitting.methods.gaussian_process import fit_kriging
from bridge.fitting.methods.kriging_search import Search
from bridge.fitting.misfit import Misfit
from bridge.fitting.robust import Robust
from bridge.fitting.rounding import Lattice
from bridge.reporting.result import Stated

# Standard deviations by which the information on a parameter is to exceed nothing: its error is then good to a sixth.
_CLEAR, _LOST = 3.0, 1.0
_ALIKE = 0.25
# Chance of a chi-square as large as that from which on it scales errors, and from which on that is said; of an outlier,
# and of a step that is no noise.
_MISFIT, _SAID, _OUTLIER, _STEP = 0.01, 2e-3, 1e-3, 0.05
# Of its standard error: how far a parameter may go without an output that is an outlier; how far the expected step may
# be, which counts as an error of the fit, until none is stated.
_INFLUENCE, _UNFINISHED = 1.0, 1.0
_MOST_OUTLIERS = 0.1
# Correlation of neighbouring residuals, times the root of their number, that is said, and with which a variance of
# independent noise is not believed, unless chi-square is more likely than that. Residuals with which it is believed in
# full, and the least degrees of freedom that are left.
_TOO_ALIKE, _FINE, _MANY, _LEAST_DOF = 2.0, 0.3, 15, 2.0
# Of outputs beside their changes in a model, squared: what the least nugget makes of them.
_LEAST_WIDTH = 1e-2
_SPURIOUS = 1e-10
# Of what tells parameters apart, that is left over shorter differences, below which it was their length that told it.
_BENT = 0.25
# Noise of the smoothed output beside the target's, from which on the end of a first-order descent tells no error.
_TOO_NOISY = 2.0
# Chance with which the target's noise is less than what is taken for it there, where residuals alone tell it.
_OWN = 0.025
# Part of a parameter in a direction that is not determined, beside the largest, with which it is not meant.
_BYSTANDER = 0.02
# Least eigenvalue of a normal matrix with a diagonal of 1, below which first-order descents hardly move along it.
_VALLEY = 1e-2
# Steps of the outputs over the last scale, below which slopes are those of a staircase.
_COARSE = 0.7
# Different changes of outputs between two runs, to tell a step by.
_ENOUGH_APART = 5
# Of residuals at the start: those that are left of a target without noise.
_EXACT = 1e-6
# How notes begin: of one output, and of errors, which are dropped where there are none.
_ONE_OUTPUT = "No standard error is stated: output"
_OF_ERRORS = ("Standard errors are", "Residuals of neighbouring outputs")
# Where all outputs have the target's steps: directions, and nodes along each.
_DIRECTIONS, _NODES = 64, 32
_CORRELATIONS = np.append(np.arange(0, 0.95, 0.1), 0.97)
# Chance of noise that seems to grow with the outputs, from which on it does; outputs that tell it; standard deviations
# from which on an output is an outlier all the same; and how far a fit may follow the noisiest one.
_GROWS, _ENOUGH_TO_GROW, _LOUDEST, _DECIDES = 0.2, 10, 4.0, 0.6
# Noise of an output beside the median one, and its share of a parameter, with which one sigma for all is wrong.
_LOUD, _SHARE, _HEARD = 25.0, 0.3, 0.01
# Of a variance that two numbers tell: the largest of many is seldom as far above the median.
_OF_ONE = 0.1


def of_least_squares(normal: Array, variance: float, precision: Array) -> Array:
    """(J^T J / sigma^2 + P)^-1: infinite where a parameter is not determined.

    Args:
        normal: J^T J of whitened residuals, (d, d). variance: sigma^2 of these. precision: the prior's P, (d, d).
    """
    return inverse(normal / variance + precision)


def of_robust(normal: Array, J: Array, residual: Array, robust: Robust, precision: Array) -> Array:
    """The sandwich A^-1 M A^-1, A = b J^T J + P, M = a J^T J + P, with a and b from the residuals themselves.

    So it holds for residuals that are not Gaussian: outliers cost accuracy, in place of lending it (see
    `Robust.spread`).

    Args:
        normal: J^T J, without weights. J: (m, d), for the leverages alone. residual: (m,) in standard deviations.
        precision: the prior's P, (d, d).
    """
    a, b = robust.spread(residual, leverages(J, robust.weight(residual), precision))
    bread = inverse(b * normal + precision)
    open_ = np.isinf(np.diag(bread))
    bread[open_, open_] = 0
    result = bread @ (a * normal + precision) @ bread
    result[open_, open_] = np.inf
    return np.asarray(result)


def leverages(J: Array, weight: Array, precision: Array) -> Array:
    """h_i = w_i J_i (J^T W J + P)^-1 J_i^T, (m,): how far the fit follows each number. They add up to d without P."""
    covariance = inverse((J.T * weight) @ J + precision)
    open_ = np.isinf(np.diag(covariance))
    covariance[open_, open_] = 0
    return np.asarray(weight * ((J @ covariance) * J).sum(axis=1))


@final
@dataclass(frozen=True)
class Normal:
    """J^T J of several independent estimates of one Jacobian, J_1 ... J_R, (d, d).

    Attributes:
        mean: J, (m, d). naive: J^T J, which the noise of J makes too large: by S, on average.
        noise: S = sum_r (J_r - J)^T (J_r - J) / (R (R - 1)), unbiased; 0 where there is but one.
        independent: how many outputs have noise of their own, as far as the columns of J_r - J tell: S_ab^2 is
            S_aa S_bb / independent on average for two columns whose noise is independent.
    """

    mean: Array
    naive: Array
    noise: Array
    independent: float

    @property
    def unbiased(self) -> Array:
        """J^T J - S = sum_{r != s} J_r^T J_s / (R (R - 1)): no estimate meets itself in it."""
        return self.naive - self.noise

    def deviation(self, signal: Array, noise: Array) -> Array:
        """Standard deviation of v^T (J^T J - S) v, whose mean is `signal`, with `noise` = v^T S v.

        With a the signal's vector and n_r the noise of J_r v, of variance R v^T S v in all, the sum over r != s is
        |a|^2 + 2 a . mean n_r + (products of n_r . n_s).
        """
        return np.asarray(2 * np.sqrt(noise * (np.maximum(signal, 0) + noise) / self.independent))

    def told(self, step_noise: float = 0.0) -> Array:
        """The normal matrix from which errors are stated.

        In the directions in which S is diagonal beside `naive` = I, with 1 - mu on S's diagonal and mu left: mu, or
        the standard deviation of mu where that is more (at most 1, as it stands in `naive`): more than that is not
        known of it, and the error is a lower bound.

        Args:
            step_noise: B / S, B the noise of the Jacobian of a single step, where x is what Gauss-Newton's steps
                (N + B)^-1 J^T r have come to; 0 for others. J^T r has noise of covariance B, for residuals of variance
                1 that it is independent of. With beta = B / N a step leaves beta / (1 + beta) of the way and adds
                noise of variance beta / (1 + beta)^2 / N: in the long run beta / (1 + 2 beta) / N, beside the 1 / N
                that the target's own noise makes.
        """
        size = np.sqrt(np.diag(self.naive))
        size[size == 0] = 1
        values, vectors = np.linalg.eigh(self.naive / np.outer(size, size))
        good = values > 1e-10
        root = vectors[:, good] * np.sqrt(values[good])  # scaled: naive = root root^T
        within = vectors[:, good] / np.sqrt(values[good])
        shares, turn = np.linalg.eigh(within.T @ (self.noise / np.outer(size, size)) @ within)
        noise = np.clip(shares, 0, 1)
        left = np.maximum(1 - noise, np.minimum(1.0, self.deviation(1 - noise, noise)))
        beta = step_noise * noise / left
        left = left * (1 + 2 * beta) / (1 + 3 * beta)
        root = root @ turn
        return np.asarray((root * left) @ root.T * np.outer(size, size))


def normal_of(jacobians: Sequence[Array]) -> Normal:
    """Of independent estimates (m, d) of one whitened Jacobian."""
    replicates, mean = len(jacobians), reduce(np.add, jacobians) / len(jacobians)
    d = mean.shape[1]
    # Part of a pair that is quite alike, beside those there are: few columns do not tell that outputs are independent.
    noise, alike, pairs = np.zeros((d, d)), _ALIKE, _ALIKE
    if replicates > 1:
        for J in jacobians:
            noise += (J - mean).T @ (J - mean) / (replicates * (replicates - 1))
        a, b = np.triu_indices(d, 1)
        seen = noise[a, a] * noise[b, b] > 0
        alike += float((noise[a, b] ** 2)[seen] @ (1 / (noise[a, a] * noise[b, b])[seen]))
        pairs += float(seen.sum())
    return Normal(mean, mean.T @ mean, noise, min(pairs / alike, float(len(mean))))


@final
@dataclass(frozen=True)
class Evidence:
    """What errors are stated from, in whitened residuals and natural units.

    Attributes:
        normal: the Jacobian J (m, d) and what is known of its noise. told: N, (d, d). r: (m,) residuals.
        shape: of the outputs, whose neighbours may be alike.
        left: (m,) or number, variance that the simulator's own noise leaves in the estimate of each output.
        seen: the same of that noise in r.
        rounding: (m,) variance that the rounding of outputs at their steps leaves in the estimate; floor: (m,) that of
            the target, 1/12 of the square of a step.
        step: (d,) that is still expected; jitter: variance of its outputs that noise makes.
        wander: (d, d) covariance of where a descent goes about its end.
        within: squared length, in outputs, of steps that noise of the outputs makes.
        bias: (m,) what smoothing adds to the outputs, and noise.
        run_noise: root of the sum of the outputs' variances by the noise of one run.
        spread: root of the sum of squares of the target about its mean.
        first: root of the mean squared residual where the fit began, infinite if unknown.
        output: (m,) size of the outputs, whitened as residuals are.
        own: (m,) variance that noise of the runs has in each output, or less.
        newton: whether it came here by steps of Gauss-Newton. fresh: by other Jacobians.
    """

    normal: Normal
    told: Array
    r: Array
    shape: tuple[int, ...]
    left: Array | float = 0.0
    seen: Array | float = 0.0
    rounding: Array | float = 0.0
    floor: Array | float = 0.0
    step: Array | None = None
    jitter: float = 0.0
    wander: Array | None = None
    bias: Array | None = None
    within: float = 0.0
    first: float = np.inf
    run_noise: float = 0.0
    spread: float = np.inf
    output: Array | None = None
    own: Array | float = 0.0
    newton: bool = True
    fresh: bool = False

    def stated(self, precision: Array, known: bool, robust: Robust | None) -> Stated:
        """Errors, or none and why. known: whether the target's variance is, 1 in these units.

        Parameters that have next to no part in a direction that is not determined have errors all the same: those
        that they have where the one with the largest part is held.
        """
        full = self._stated(precision, known, robust)
        error = np.sqrt(np.diag(full.covariance))
        bad = ~np.isfinite(error) | full.unclear
        worst = int(np.argmax(np.abs(full.open_direction)))
        if len(error) < 2 or not bad[worst] or not (np.isinf(error) | full.unclear).any():
            return full
        keep = np.delete(np.arange(len(error)), worst)
        rest = self._without(worst, precision).stated(precision[np.ix_(keep, keep)], known, robust)
        away = np.abs(full.open_direction[keep]) < _BYSTANDER
        mended = away & bad[keep] & np.isfinite(np.diag(rest.covariance)) & ~rest.unclear
        if not mended.any():
            return full
        covariance, unclear, least = full.covariance.copy(), full.unclear.copy(), full.least.copy()
        i, j = np.ix_(keep[mended], keep[mended])
        covariance[keep[mended]], covariance[:, keep[mended]] = 0.0, 0.0
        covariance[i, j] = rest.covariance[np.ix_(mended, mended)]
        unclear[keep[mended]], least[keep[mended]] = False, rest.least[mended]
        others = np.isfinite(np.diag(covariance)) & ~np.isin(np.arange(len(error)), keep[mended])
        if others.any():  # those that had errors before, beside what is known of them where the worst is held
            at = np.searchsorted(keep, np.flatnonzero(others))
            covariance[np.ix_(others, keep[mended])] = rest.covariance[np.ix_(at, mended)]
            covariance[np.ix_(keep[mended], others)] = rest.covariance[np.ix_(mended, at)]
        return replace(full, covariance=covariance, unclear=unclear, least=least, notes=rest.notes, dof=rest.dof)

    def _without(self, i: int, precision: Array) -> Evidence:
        """Of the other parameters, with this one held."""
        keep = np.delete(np.arange(len(self.told)), i)
        both, normal, metric, step = np.ix_(keep, keep), self.normal, self.told + precision, self.step
        if step is not None:
            step = finite_inverse(metric[both]) @ (metric @ step)[keep]
        return replace(
            self,
            normal=replace(normal, mean=normal.mean[:, keep], naive=normal.naive[both], noise=normal.noise[both]),
            told=self.told[both],
            step=step,
            wander=None if self.wander is None else self.wander[both],
        )

    def _stated(self, precision: Array, known: bool, robust: Robust | None) -> Stated:
        J, r, d = self.normal.mean, self.r, len(self.told)
        step = np.zeros(d) if self.step is None or not np.isfinite(self.step).all() else self.step
        notes: list[str] = []
        if robust is not None:
            covariance, dof = of_robust(self.told, J, r, robust, precision), np.inf
        else:
            covariance, dof, notes = self._least_squares(J, r, precision, known)
        unclear, lost = _unclear(self.normal, self.told, covariance, precision)
        if any(note.startswith(_ONE_OUTPUT) for note in notes):
            # Before the minimum one residual may be the largest by far without being noise.
            free = max(len(r) - d, 1)
            plain = of_least_squares(self.told, 1.0 if known else float(r @ r) / free, precision)
            if unfinished := self._with_steps(plain, step, precision)[1]:
                notes = [note for note in notes if not note.startswith(_ONE_OUTPUT)] + unfinished
        covariance, more = self._with_steps(covariance, step, precision)
        least = np.sqrt(np.diag(covariance))
        # A lower bound is no error. Of Gauss-Newton, whose steps had many Jacobians, it is one.
        lost = lost if self.newton and self.fresh else unclear
        covariance[lost], covariance[:, lost] = np.nan, np.nan
        if not np.isfinite(np.diag(covariance)).any():  # nothing is to be said of errors that are not there
            notes = [note for note in notes if not note.startswith(_OF_ERRORS)]
        signal, noise = np.sqrt(np.diag(self.normal.naive)), np.sqrt(np.diag(self.normal.noise))
        unit = np.where(signal > 0, signal, 1)
        axis = np.linalg.eigh(self.told / np.outer(unit, unit) + precision / np.outer(unit, unit))[1][:, 0] / unit
        axis = axis / np.abs(axis).max(initial=1e-300)
        return Stated(
            covariance,
            dof,
            unclear,
            (*notes, *more),
            signal,
            noise,
            self._size,
            least,
            self.run_noise,
            axis,
        )

    @property
    def _size(self) -> float:
        """Of the target: about its mean, or from where the fit began, where it is one number."""
        first = self.first * float(np.sqrt(len(self.r)))
        return self.spread if 0 < self.spread < np.inf else first if np.isfinite(first) else 0.0

    @property
    def _exact(self) -> bool:
        return _is_exact(self.r, self.first)

    def _least_squares(self, J: Array, r: Array, precision: Array, known: bool) -> tuple[Array, float, list[str]]:
        d, none = len(self.told), np.full((len(self.told), len(self.told)), np.nan)
        # Of a fit to the target alone: what a prior pulls the residuals by is no misfit.
        r = r - J @ (finite_inverse(J.T @ J) @ (J.T @ r))
        h = leverages(J, np.ones(len(r)), 0 * precision)
        dof = float(_data(J, r).sum() - h.sum())
        parts = (self.left, self.seen, self.rounding, self.floor)
        left, seen, rounding, floor = (np.broadcast_to(x, len(r)) for x in parts)
        notes, misfit = [], False
        if known:
            V = 1.0 + rounding
            chi2 = float((r**2 / (V + seen)).sum())
            chance = float(chdtrc(dof, chi2)) if dof >= 1 else 1.0
            if chance < _MISFIT:
                misfit = True
                V = V * (chi2 / dof)
            if chance < _SAID:
                notes.append(
                    f"Standard errors are {np.sqrt(chi2 / dof):.3g} times as large as the variance alone would make "
                    "them, since residuals are larger than it allows: they hold if what is left of the target is as "
                    "good as independent noise."
                )
            elif _MISFIT <= chance < _FINE and not self._exact:
                misfit = max(_alike(r, J, self.shape)[0], default=0.0) > _TOO_ALIKE / np.sqrt(dof)
            V = V + left
        else:
            if dof < 0.5:
                return none, np.nan, [
                    f"No standard error is stated: {int(_data(J, self.r).sum())} outputs do not tell {d} parameters "
                    "and the noise of the target. Give variance=, or more outputs."
                ]  # fmt: skip
            V = np.maximum(float((r**2).sum()) / dof - seen, 0.0) + left
            V = np.maximum(V, rounding + floor)
        rho: list[float] = []
        if self._exact:  # what is left has the pattern of rounding
            pass
        elif not known or misfit:
            least, usual = left + rounding + floor, self._growing(r, h)
            if usual is None:
                V, why = self._outliers(J, r, h, dof, V, left, rounding + floor)
                usual = V
            else:  # each output's own, as HC3 has it (MacKinnon and White 1985)
                V, why = np.maximum((r / np.maximum(1 - h, 1e-3)) ** 2, least), ""
            if not why:
                seen_rho, rho, grown = _alike(r / np.sqrt(np.maximum(usual, 1e-300)), J, self.shape)
                V = V * grown
                # Of the mean square of n numbers of correlation rho^|i - j|: as many independent ones vary as much.
                alike, clear = max(seen_rho, default=0.0), _TOO_ALIKE / np.sqrt(dof)
                less = float(np.prod([(1 - x**2) / (1 + x**2) for x in rho]))
                dof = max(dof * less, min(dof, _LEAST_DOF))
                if alike > clear:
                    notes.append(
                        f"Residuals of neighbouring outputs are alike (correlation {alike:.2f}), as those of "
                        "independent noise hardly ever are. Standard errors and intervals allow for noise that is "
                        "alike. Give variance= as the covariance of the target's noise, or to the simulator what it "
                        "lacks."
                    )
            if why:
                return none, dof, [*notes, why]
        uniform = float(V.mean())
        unit = 1.0 if known else max(uniform, 1e-300)
        if np.ptp(V) <= 1e-12 * uniform and not any(rho) and not self.normal.noise.any() and (unit == uniform):
            return of_least_squares(self.told, unit, precision), dof if not known or misfit else np.inf, notes
        if self.fresh:  # the Jacobians of the steps were others: their noise is not in the estimate as it is in J^T J
            J = J @ _turned(self.normal.naive, self.told)
        root = np.sqrt(V)[:, None] * J / unit
        meat = root.T @ _correlated(root, rho, self.shape) + precision
        bread = inverse(self.told / unit + precision)
        return _sandwich(bread, meat), dof if not known or misfit else np.inf, notes

    def _growing(self, r: Array, h: Array) -> Array | None:
        """(m,) variance a + b |output| where squared residuals grow with the outputs, as those of counts do.

        By the F test of their regression on the size of the outputs (Breusch and Pagan 1979, as Koenker has it).
        """
        if self.output is None or len(r) < _ENOUGH_TO_GROW or np.ptp(self.output) <= 0:
            return None
        squares, A = r**2 / np.maximum(1 - h, 1e-3), np.stack([np.ones(len(r)), self.output], axis=1)
        b = np.linalg.lstsq(A, squares, rcond=None)[0]
        left, all_ = float(((squares - A @ b) ** 2).sum()), float(((squares - squares.mean()) ** 2).sum())
        n = len(r) - 2
        if not (b[1] > 0 and left > 0 and fdtrc(1, n, (all_ - left) * n / left) < _GROWS):
            return None
        usual = np.maximum(A @ b, 0.1 * squares.mean())
        if h[int(np.argmax(usual))] > _DECIDES:
            return None
        return usual if (squares < _LOUDEST**2 * usual).all() else None

    def _outliers(
        self, J: Array, r: Array, h: Array, dof: float, V: Array, noise: Array, least: Array
    ) -> tuple[Array, str]:
        """V with what outliers have of their own, or why one sigma for all outputs is wrong: a single one decides that
        is far noisier than the others."""
        h = np.clip(h, 0, 1 - 1e-12)
        covariance, loo = finite_inverse(J.T @ J), r / (1 - h)
        V, found = V.copy(), np.zeros(len(r), dtype=bool)
        while dof - found.sum() > 2 and found.sum() < _MOST_OUTLIERS * len(r):
            # Of the residuals without those found: r_o^2 / (1 - h_o) is what leaving one out takes off their squares.
            squares = np.where(found, 0, r * loo)
            left = dof - float(found.sum()) - 1
            rest = np.maximum(
                (min(float(r @ r), float(squares.sum()) + 1e-300) - squares) / left, np.maximum(least, 1e-300)
            )
            t = np.where(found, 0, np.abs(r) / np.sqrt(rest * (1 - h)))
            k = int(np.argmax(t))
            if not 2 * len(r) * stdtr(left, -float(t[k])) < _OUTLIER:
                break
            moves = np.abs(covariance @ J[k] * loo[k])
            if (moves > _INFLUENCE * np.sqrt(np.diag(covariance) * rest[k])).any():
                return V, (
                    f"{_ONE_OUTPUT} [{self._name(k)}] fits far worse than the others, and outweighs them: it is far "
                    "noisier than the others, or the fit is not at the minimum yet. Give variance= for each output, "
                    "leave that one out, or allow more steps or runs."
                )
            found[k] = True
            V = np.where(found, np.maximum(loo**2, noise), np.maximum(V * min(1.0, rest[k] / V[~found].mean()), noise))
        noise = np.maximum(noise, self.own)
        k = int(np.argmax(noise))
        if noise[k] > _LOUD * np.median(noise) and noise[k] > _HEARD * np.median(V) and h[k] > _SHARE:
            return V, (
                f"{_ONE_OUTPUT} [{self._name(k)}] is far noisier than the others, and outweighs them. Give variance= "
                "for each output, or leave that one out."
            )
        return V, ""

    def _name(self, k: int) -> str:
        where = np.unravel_index(k, self.shape) if np.prod(self.shape) == len(self.r) else (k,)
        return ", ".join(str(int(i)) for i in where)

    def _with_steps(self, covariance: Array, step: Array, precision: Array) -> tuple[Array, list[str]]:
        """With what the fit itself is still away from the minimum, or none where that is more."""
        d = len(step)
        metric = self.told + precision
        # Gauss-Newton's steps lead to a minimum as far as noise lets them; of others that is not known.
        beta = float(np.linalg.eigvals(finite_inverse(metric) @ self.normal.noise).real.max(initial=0.0))
        by_slopes = 2 * beta / (1 + beta) * float(self.r @ self.r) / max(len(self.r) - d, 1) if self.fresh else 0.0
        expected = max((self.jitter + by_slopes) * chdtri(d, _STEP), self.within) if self.newton else 0.0
        about = np.zeros_like(covariance)
        if not self.newton:
            about = self._about_end(step, metric)
        for s, noise in ((step, expected), self._bias_step(precision)):
            length = float(s @ metric @ s)
            if length <= noise or not np.isfinite(length):
                continue
            error = np.sqrt(np.maximum(np.diag(covariance), 0))
            part = 1 - noise / length
            with np.errstate(invalid="ignore"):
                far = np.abs(s) * np.sqrt(part) > _UNFINISHED * error
            if self.newton or s is not step:
                covariance = covariance + part * np.outer(s, s)
            if far.any() and not self._exact:
                by = np.max(np.abs(s[far]) / np.maximum(error[far], 1e-300))
                return np.full_like(covariance, np.nan), [
                    f"No standard error is stated: by the slopes at the end, the minimum is still {by:.2g} standard "
                    "errors away. Allow more steps or runs (steps=, max_runs=), a smaller last scale (scale=), or "
                    "begin from here. If it stays so, outputs are too rough for slopes to tell."
                ]  # fmt: skip
        return covariance + about, []

    def _about_end(self, step: Array, metric: Array) -> Array:
        """E[(z - z*) (z - z*)^T], z* the minimum, z where a first-order descent has come to.

        Slopes tell z* - z = step with a covariance S, by the noise of outputs and of the Jacobian; the last steps went
        about as far as W. Taken together it is W (W + S)^-1 step, give or take W - W (W + S)^-1 W. Where the step is
        far longer than that allows, the descent was still on its way, and its last steps tell nothing.
        """
        if self.wander is None:
            return np.outer(step, step)
        variance, noise = float(self.r @ self.r) / max(len(self.r) - len(step), 1), self.normal.noise
        own = self.jitter * finite_inverse(metric)
        own = own + 2 * variance * finite_inverse(metric) @ noise @ finite_inverse(metric + noise)
        size = np.sqrt(np.diag(self.wander) + np.diag(own))
        size[size == 0] = 1
        unit = np.outer(size, size)
        both = np.linalg.pinv((self.wander + own) / unit, rcond=1e-12, hermitian=True) / unit
        if float(step @ both @ step) > chdtri(len(step), _STEP):
            return np.outer(step, step) + own
        share = self.wander @ both
        step = share @ step
        return np.outer(step, step) + self.wander - share @ self.wander

    def _bias_step(self, precision: Array) -> tuple[Array, float]:
        """The step by what smoothing adds to the outputs, and how long it is by noise alone."""
        d = len(self.told)
        if self.bias is None or not np.isfinite(self.bias).all() or len(self.r) <= d:
            return np.zeros(d), 0.0
        J = self.normal.mean
        covariance = finite_inverse(J.T @ J + precision)
        s = covariance @ (J.T @ self.bias)
        rest = self.bias - J @ s
        n = max(len(rest) - d, 1)
        within, noise = float(s @ J.T @ J @ s), float(rest @ rest) / n
        if within <= 0 or fdtrc(d, n, within / d / max(noise, 1e-300)) > _STEP:
            return np.zeros(d), 0.0
        return s, max(d * noise, self.within)


def _is_exact(r: Array, first: float) -> bool:
    """Whether residuals are those of a target without noise, met but for rounding.

    Args:
        first: root of the mean squared residual where the fit began.
    """
    return bool(np.isfinite(first) and r @ r < (_EXACT * first) ** 2 * len(r))


def _data(J: Array, r: Array) -> NDArray[np.bool_]:
    """(m,) which numbers are data: not those that are 0 in all runs and in the target."""
    size, least = np.abs(J).max(axis=1, initial=0.0), 1e-12
    return np.asarray((size > least * size.max(initial=0.0)) | (np.abs(r) > least * np.abs(r).max(initial=0.0)))


def _alike(r: Array, J: Array, shape: tuple[int, ...]) -> tuple[list[float], list[float], float]:
    """Correlation rho >= 0 of neighbouring residuals along each axis, and that to reckon with; then growth.

    That is by how much the mean squared residual is larger than it seems, since a fit follows what is alike.

    Moments of residuals M e, M = 1 - J (J^T J)^-1 J^T, with e of correlation R = rho^|i - j|: the rho at which
    tr(M L M R) / tr(M R) is r^T L r / r^T r, L the pairs of neighbours.
    """
    shape = shape if np.prod(shape) == len(r) else (len(r),)
    size = float(r @ r)
    if size <= 0 or len(r) < 4:
        return [0.0] * len(shape), [0.0] * len(shape), 1.0
    q = J @ _root(finite_inverse(J.T @ J))  # H = q q^T
    few = min(1.0, (len(r) - J.shape[1]) / _MANY)  # a handful of numbers tell next to nothing of it
    found, used, grown = [], [], 1.0
    for axis, n in enumerate(shape):
        if n < 4:
            found.append(0.0)
            used.append(0.0)
            continue
        seen = float(r @ _neighbours(r[:, None], shape, axis)[:, 0]) / size
        Lq = _neighbours(q, shape, axis)
        pairs, qLq = len(r) * (n - 1) / n, q.T @ Lq
        at = []
        for rho in _CORRELATIONS:
            alone = [rho if i == axis else 0.0 for i in range(len(shape))]
            Rq = _correlated(q, alone, shape)
            qRq = q.T @ Rq
            total = len(r) - float(np.trace(qRq))
            # tr(L R) = pairs rho; the products with H: tr(H L R), twice, and tr(H L H R).
            alike = pairs * rho - 2 * float((Lq * Rq).sum()) + float((qLq * qRq).sum())
            at.append((alike / max(total, 1e-12), total))
        ratios, totals = np.array(at).T
        ratios = np.maximum.accumulate(ratios)
        rho, error = float(np.interp(seen, ratios, _CORRELATIONS)), 1 / np.sqrt(len(r))
        found.append(rho)
        # Those that go unnoticed are the low ones among estimates: a standard error more, where it is not about 0.
        used.append(few * min(rho + error * min(max(rho / error - 1, 0.0), 1.0), float(_CORRELATIONS[-1])))
        grown *= float(totals[0] / max(np.interp(used[-1], _CORRELATIONS, totals), 0.05 * totals[0]))
    return found, used, grown


def _neighbours(columns: Array, shape: tuple[int, ...], axis: int) -> Array:
    """L x for columns x (m, k), L_ij = 1/2 for neighbours along an axis."""
    x = np.moveaxis(columns.reshape((*shape, columns.shape[1])), axis, 0)
    result = np.zeros_like(x)
    result[1:] += 0.5 * x[:-1]
    result[:-1] += 0.5 * x[1:]
    return np.asarray(np.moveaxis(result, 0, axis).reshape(columns.shape))


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0)))


def _correlated(columns: Array, rho: Sequence[float], shape: tuple[int, ...]) -> Array:
    """R x for columns x (m, k), R_ij = prod over axes of rho^|i - j|."""
    if not any(rho):
        return columns
    shape = shape if np.prod(shape) == len(columns) else (len(columns),)
    x = columns.reshape((*shape, columns.shape[1]))
    for axis, part in enumerate(rho):
        if part > 0:
            part = min(part, 0.99)
            ahead = lfilter([1.0], [1.0, -part], x, axis=axis)
            back = np.flip(lfilter([1.0], [1.0, -part], np.flip(x, axis), axis=axis), axis)
            x = ahead + back - x
    return np.asarray(x.reshape(columns.shape))


def _turned(naive: Array, told: Array) -> Array:
    """M, M^T naive M = told, and 1 where these are the same."""
    values, vectors = np.linalg.eigh(naive)
    good = values > 1e-14 * max(float(values.max()), 1e-300)
    root = (vectors[:, good] * np.sqrt(values[good])) @ vectors[:, good].T
    back = (vectors[:, good] / np.sqrt(values[good])) @ vectors[:, good].T
    part, axes = np.linalg.eigh(back @ told @ back)
    return np.asarray(back @ (axes * np.sqrt(np.maximum(part, 0))) @ axes.T @ root)


def _sandwich(bread: Array, meat: Array) -> Array:
    open_ = np.isinf(np.diag(bread))
    bread = bread.copy()
    bread[open_, open_] = 0
    result = bread @ meat @ bread
    open_ |= (np.diag(result) <= 0) & (np.diag(meat) > 0)  # lost in rounding
    result[open_, open_] = np.inf
    return np.asarray(result)


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
        step_noise: see `Normal.told`; 0 but for Gauss-Newton. past: (n, d), where other descents have been last.
        outputs: of the simulator itself, at z and elsewhere. last: scale of the noise. longest: that a step may be.
        start: (d,) of this descent.
    """
    residuals = np.stack([misfit.residual(v).numpy() for v in values])
    there = ~np.isnan(residuals).any(axis=0)  # outputs may lack numbers
    residuals = residuals[:, there]
    r, R = residuals.mean(axis=0), len(values)
    normal = normal_of([misfit.jacobian(J, natural).numpy()[there] for J in jacobians])
    jitter = float(((residuals - r) ** 2).mean()) / (R - 1) if R > 1 else 0.0
    told = normal.told(step_noise)
    prior = misfit.prior
    slope = normal.mean.T @ r if misfit.robust is None else normal.mean.T @ (misfit.robust.weight(r) * r)
    step = -finite_inverse(told + prior.information) @ (slope + prior(z)[1])
    rounding: Array | float = 0.0
    floor: Array | float = 0.0
    bias, coarse = None, np.inf
    good = [y for y in outputs if np.isfinite(y).all()]
    first = np.inf
    if len(outputs) > 1 and np.isfinite(outputs[1]).all():
        first = float(np.sqrt(np.mean(misfit.residual(torch.as_tensor(outputs[1])).numpy() ** 2)))
    exact = _is_exact(r, first)
    if size := _step_of(good, exact):
        rounding = misfit.spread_of(np.full(misfit.target.shape, size / np.sqrt(12)))[there]
        off = (misfit.target.numpy() - good[0]) / size
        floor = rounding * float((np.abs(off - np.round(off)) < 1e-3).all())
        # Noise averages steps: their first harmonic is left by exp(-2 pi^2 (change / step)^2).
        change = (normal.mean**2).sum(axis=1) * last**2 / np.maximum(12 * rounding, 1e-300)
        h = leverages(normal.mean, np.ones(len(r)), 0 * told)
        coarse = float(np.sqrt(change) @ h / max(float(h.sum()), 1e-300))
        rounding = rounding * np.exp(-4 * np.pi**2 * change)
    if len(outputs) and np.isfinite(outputs[0]).all():
        bias = r - misfit.residual(torch.as_tensor(outputs[0])).numpy()[there]
    noise = np.sqrt(step_noise * jitter * np.diag(finite_inverse(told + prior.information))).max(initial=0.0)
    cut = cut_short(noise / longest) if noise > 0 else 1.0
    newton = bool(step_noise) or past is None
    wander = np.atleast_2d(np.cov(past.T)) if past is not None and not newton and len(past) > 1 else None
    along = normal.mean.T @ (residuals - r).T
    within = float(((finite_inverse(normal.naive) @ along) * along).sum()) / max(R - 1, 1) / R
    evidence = Evidence(
        normal, told, r, tuple(misfit.target.shape), within=3 * (1 + step_noise) * within, bias=bias, first=first,
        left=step_noise * jitter * cut, seen=jitter, rounding=rounding, floor=floor, wander=wander, fresh=True,
        step=step if past is not None else None, jitter=jitter * (1 + step_noise), spread=_spread(misfit),
        own=_OF_ONE * ((residuals - r) ** 2).mean(axis=0) / max(R - 1, 1),
        output=_sizes(misfit, r, there),
        newton=newton,
    )  # fmt: skip
    stated = evidence.stated(prior.information, known, misfit.robust)
    if not newton and start is not None:
        stated = _where_it_began(stated, told + prior.information, z - start)
    # Or the least it may be: else those fits would state errors whose residuals happen to be large, and too large ones.
    own, why = 1.0 if known else max(float(r @ r) / chdtri(len(r), _OWN) - jitter, 0.0), ""
    if not newton and jitter > _TOO_NOISY * own and not exact:
        why = (
            "No standard error is stated: the smoothed output is noisier than the target, and where a descent ends in "
            "such noise says little of the minimum. Take more samples (num_samples=), method='gauss-newton' or "
            "'kriging'."
        )
    if coarse < _COARSE:
        why = (
            f"No standard error is stated: outputs are multiples of {size:.3g}, and over the last scale those that "
            f"tell parameters change by {coarse:.2g} of such steps only. Give a larger last scale (scale=), or take "
            "method='kriging'."
        )
    return replace(stated, covariance=np.full_like(told, np.nan), notes=(why,)) if why else stated


def _where_it_began(stated: Stated, metric: Array, moved: Array) -> Stated:
    """Without errors along a valley that a first-order descent has not moved along: where it began, it ends."""
    size = np.sqrt(np.maximum(np.diag(metric), 1e-300))
    values, vectors = np.linalg.eigh(metric / np.outer(size, size))
    u, covariance = vectors[:, 0], stated.covariance * np.outer(size, size)
    along = float(u @ covariance @ u)
    if not (values[0] < _VALLEY and (u @ (size * moved)) ** 2 < along < np.inf):
        return stated
    part = (covariance @ u) ** 2 / along > 0.5 * np.diag(covariance)
    note = (
        "No standard error is stated along the valley in which the minimum lies: a first-order descent hardly moves "
        "along it, and ends there where it began. Take method='gauss-newton' or 'kriging'."
    )
    return replace(stated, covariance=without(stated.covariance, part), notes=(*stated.notes, note))


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


def _sizes(misfit: Misfit, r: Array, there: NDArray[np.bool_]) -> Array:
    """Of the outputs with these residuals, whitened as they are."""
    return np.abs(r - misfit.residual(torch.zeros_like(misfit.target)).numpy()[there])


def _spread(misfit: Misfit) -> float:
    with torch.no_grad():
        return float(misfit.residual(torch.full_like(misfit.target, float(misfit.target.mean()))).norm())


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


def finite_inverse(normal: Array) -> Array:
    """As `inverse`, 0 in place of infinite."""
    result = inverse(normal)
    result[~np.isfinite(result)] = 0
    return result


def _least_share(normal: Array) -> float:
    """The least eigenvalue of a normal matrix with a diagonal of 1: how far parameters are told apart."""
    size = np.sqrt(np.maximum(np.diag(normal), 1e-300))
    return max(float(np.linalg.eigvalsh(normal / np.outer(size, size))[0]), 0.0)


def _unclear(
    normal: Normal, told: Array, covariance: Array, precision: Array
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(d,) where the information on a parameter, the others being fitted, is not clearly above its own noise; and where
    it is lost in it.

    That information is v^T N v, v = C e_a / C_aa.
    """
    variance = np.diag(covariance)
    finite = np.isfinite(variance) & (variance > 0)
    directions = np.where(np.outer(finite, finite), covariance, 0) / np.where(finite, variance, 1)
    signal, noise = (np.einsum("ia,ij,ja->a", directions, M, directions) for M in (told, normal.noise))
    by_prior = np.where(finite, variance, 0) * np.diag(precision) > 0.5
    deviation = normal.deviation(signal, noise)
    open_ = finite & ~by_prior
    return np.asarray(open_ & (signal < _CLEAR * deviation)), np.asarray(open_ & (signal <= _LOST * deviation))


def of_search(search: Search, misfit: Misfit, known: bool, lattice: Lattice | None = None) -> Stated:
    """Errors in natural units, where a search is now.

    The model's prediction is w^T F, so that noise of the runs is left in it with w^T w of its variance, and dw^T dw of
    it is in J^T J. Each output's noise is that of the runs about the prediction.
    """
    _, z = search.overall
    robust, prior = misfit.robust, misfit.prior
    rows, d = search.rows[~search.failed], len(z)
    if np.linalg.matrix_rank((rows - z) / search.unit, tol=1e-9) < d:
        runs = "1 run does" if len(rows) == 1 else f"{len(rows)} runs do"
        what = "the parameter" if d == 1 else f"{d} parameters apart"
        why = f"No standard error is stated: {runs} not tell {what}. Allow more (max_runs=)."
        return Stated(np.full((d, d), np.nan), np.nan, np.zeros(d, dtype=bool), (why,))
    model, F, at_z, there = search.model_there(z)
    m = F.shape[1]
    rounding, floor = np.zeros(m), np.zeros(m)
    if lattice is not None and len(lattice.first) and lattice.steps.any():
        rounding = misfit.spread_of(lattice.deviation(tuple(misfit.target.shape)))[there]
        on = misfit.of_data(lattice.holds(misfit.target.numpy()))
        floor = rounding * (on.all() if on.shape != there.shape else on[there])
    # Of outputs that have steps the smooth part, for which rounding is noise.
    if rounding.any():
        model = fit_kriging(model.rows, F @ F.T, unit=search.unit, rough=False)
    w = model.at(z)[0]
    r = F.T @ w if robust is None else at_z
    noise = np.maximum(model.residual_noise(F), rounding)
    width, left = 0.1 * search.unit, noise * float(w @ w)
    good = search.residuals[~search.failed]
    first = (
        float(np.sqrt(np.median(np.nanmean(good[: max(len(search.start) + 1, 6)] ** 2, axis=1))))
        if len(good)
        else np.inf
    )
    stepped = rounding > 0
    exact = bool(stepped.any()) and bool((np.abs(at_z) < 1e-3 * np.sqrt(12 * rounding))[stepped].all())
    exact = exact and robust is None and bool((at_z[~stepped] == 0).all())
    total, wide = float(noise.sum()), 2.0 if stepped.any() else 1.0
    independent = float(np.clip(total**2 / max(float((noise**2).sum()), 1e-300), 1.0, m))
    usual = float(np.mean(left + floor))
    variance = 1.0 + usual if known else max(float(r @ r) / max(m - len(z), 1), usual, 1e-300)

    def slopes(width: Array) -> tuple[Array, NDArray[np.bool_], Array]:
        """Weights dw of the differences, which slopes are spurious, and what is told of J^T J."""
        dw = model.differences(z, width)
        gram = dw.T @ model.gram @ dw
        # A slope of less than the model's own rounding is that of others' outputs, and not one.
        spurious = np.diag(gram) <= _SPURIOUS * float(np.diag(model.gram).max()) * (dw**2).sum(axis=0)
        gram[spurious] = gram[:, spurious] = 0
        return dw, spurious, Normal(np.zeros((m, len(z))), gram, total * dw.T @ dw, independent).told()

    # Differences over the errors themselves: the slope between two steps of a staircase is not what counts.
    for _ in range(3):
        dw, spurious, told = slopes(width)
        error = np.sqrt(np.diag(of_least_squares(told, variance, prior.information)))
        # Rows that are next to each other tell slopes no better than their rounding does.
        width = np.clip(wide * error, _LEAST_WIDTH * search.unit, search.unit)
    # Along a valley errors are long, and over these outputs bend: what is told of it may be the bending alone.
    alone = np.sqrt(variance / np.maximum(np.diag(told), 1e-300))
    narrow = np.clip(alone, _LEAST_WIDTH * search.unit, width)
    if not stepped.any() and (narrow < 0.5 * width).any():
        nearer = slopes(narrow)
        if _least_share(nearer[2]) < _BENT * _least_share(told):
            dw, spurious, told = nearer
    J = F.T @ dw
    J[:, spurious] = 0
    weight = 1.0 if robust is None else robust.weight(r)
    step = _step_within(told + prior.information, J.T @ (weight * r) + prior(z)[1], z, search.lower, search.upper)
    evidence = Evidence(
        Normal(J, J.T @ J, total * dw.T @ dw, independent), told, r, tuple(misfit.target.shape), left=left, seen=left,
        floor=floor, step=step, first=first,
        run_noise=float(np.sqrt(total)), spread=_spread(misfit),
        output=_sizes(misfit, r, there),
    )  # fmt: skip
    stated = evidence.stated(prior.information, known, robust)
    if exact:
        covariance = _on_plateau(J[stepped], rounding[stepped], prior.information)
        clear, least = np.zeros(len(z), dtype=bool), np.sqrt(np.diag(covariance))
        stated = replace(stated, covariance=covariance, unclear=clear, least=least, notes=())
    return stated


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


def inverse(normal: Array) -> Array:
    """Infinite variances where a direction is not determined, instead of numbers that mean nothing."""
    size = np.sqrt(np.maximum(np.diag(normal), 0))
    unseen = size <= 1e-9 * max(float(size.max()), 1e-300)
    scaled = normal / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    scaled[unseen] = scaled[:, unseen] = 0
    values, vectors = np.linalg.eigh(scaled)
    good = values > 1e-10
    inverted = (vectors[:, good] / values[good]) @ vectors[:, good].T
    open_ = unseen | ((vectors[:, ~good] ** 2).sum(axis=1) > 1e-6)
    result = inverted / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    result[open_] = result[:, open_] = 0
    result[open_, open_] = np.inf
    return np.asarray(result)


def lifted(covariance: Array, lift: Array) -> Array:
    """E C E^T without inf * 0."""
    free = [int(np.argmax(row)) if row.any() else -1 for row in lift]
    padded = np.zeros((len(covariance) + 1, len(covariance) + 1))
    padded[:-1, :-1] = covariance
    return np.asarray(padded[np.ix_(free, free)])


def in_units(covariance: Array, natural: Array) -> Array:
    """From natural units to the parameters' own."""
    return np.asarray(covariance * np.outer(natural, natural))


def without(covariance: Array, which: NDArray[np.bool_]) -> Array:
    """NaN for parameters whose error is not stated."""
    result = covariance.copy()
    result[which], result[:, which] = np.nan, np.nan
    return result
