"""How well the parameters are known where a fit has ended.

The estimate z solves (N + P) (z - z*) = J^T e in first order, N = J^T J of whitened residuals. Its covariance is the
sandwich (N + P)^-1 (J^T V J + P) (N + P)^-1, V the covariance of e: the target's noise, the noise of the
simulator's own runs as far as it is left in the estimate, and what outputs are rounded by. Where the variance of the
target is not given, or is too small for the residuals, V comes from these. Where they do not tell it, none is stated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtrc, chdtri, fdtrc

from bridge.arrays import Array
from bridge.fitting.normal import (
    Normal,
    finite_inverse,
    inverse,
    leverages,
    of_least_squares,
    of_robust,
    sandwich,
    turned,
    unclear_of,
)
from bridge.fitting.residuals import alike_neighbours, are_data, correlated, growing_variance, is_exact, with_outliers
from bridge.fitting.robust import RobustLoss

# Chance of a chi-square as large as that from which on it scales errors, and from which on that is said; and of a step
# that is no noise.
_MISFIT, _SAID, _STEP = 0.01, 2e-3, 0.05
# How far the expected step may be, which counts as an error of the fit, until none is stated: in standard errors.
_UNFINISHED = 1.0
# Correlation of neighbouring residuals, times the root of their number, that is said, and with which a variance of
# independent noise is not believed, unless chi-square is more likely than that; the least degrees of freedom left.
_TOO_ALIKE, _FINE, _LEAST_DOF = 2.0, 0.3, 2.0
# Part of a parameter in a direction that is not determined, beside the largest, with which it is not meant.
_BYSTANDER = 0.02


class NoteKind(Enum):
    """What a note is about."""

    NONE = "why no error is stated"
    ONE_OUTPUT = "why none is stated: a single output outweighs the others"
    BASIS = "what the errors rest on, which is nothing to say where there are none"


class Note(NamedTuple):
    """What is to be said of errors."""

    kind: NoteKind
    text: str


@dataclass(frozen=True)
class Stated:
    """Errors in natural units, and what is to be said of them.

    Attributes:
        covariance: (d, d), NaN where no error is stated. dof: of Student's t of intervals, infinite where V is known.
        unclear: (d,) of which parameters the variance is a lower bound. notes: why none is stated, or what it rests on.
        sensitivity: (d,) root of the squared change of all outputs over a natural unit, in whitened residuals, and
            `hidden`, (d,) how large it is by noise alone.
        target_norm: root of the sum of squares of the target about its mean.
        least: (d,) of unclear parameters, the error or less.
        run_noise: root of the sum of the outputs' variances by the noise of one run.
        open_direction: (d,) in which outputs change the least, natural units.
        by_model: whether slopes are those of a model of all runs, else of samples about the end.
    """

    covariance: Array
    dof: float = np.inf
    unclear: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    notes: tuple[Note, ...] = ()
    sensitivity: Array = field(default_factory=lambda: np.zeros(0))
    hidden: Array = field(default_factory=lambda: np.zeros(0))
    target_norm: float = np.nan
    least: Array = field(default_factory=lambda: np.zeros(0))
    run_noise: float = 0.0
    open_direction: Array = field(default_factory=lambda: np.zeros(0))
    by_model: bool = False


@final
@dataclass(frozen=True)
class Evidence:
    """What errors are stated from, in whitened residuals and natural units.

    Attributes:
        normal: the Jacobian J (m, d) and what is known of its noise. information: N, (d, d). r: (m,) residuals.
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
    information: Array
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

    def stated(self, precision: Array, known: bool, robust: RobustLoss | None) -> Stated:
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
        keep = np.delete(np.arange(len(self.information)), i)
        both, normal, metric, step = np.ix_(keep, keep), self.normal, self.information + precision, self.step
        if step is not None:
            step = finite_inverse(metric[both]) @ (metric @ step)[keep]
        return replace(
            self,
            normal=replace(normal, mean=normal.mean[:, keep], naive=normal.naive[both], noise=normal.noise[both]),
            information=self.information[both],
            step=step,
            wander=None if self.wander is None else self.wander[both],
        )

    def _stated(self, precision: Array, known: bool, robust: RobustLoss | None) -> Stated:
        J, r, d = self.normal.mean, self.r, len(self.information)
        step = np.zeros(d) if self.step is None or not np.isfinite(self.step).all() else self.step
        notes: list[Note] = []
        if robust is not None:
            covariance, dof = of_robust(self.information, J, r, robust, precision), np.inf
        else:
            covariance, dof, notes = self._least_squares(precision, known)
        unclear, lost = unclear_of(self.normal, self.information, covariance, precision)
        if any(note.kind is NoteKind.ONE_OUTPUT for note in notes):
            # Before the minimum one residual may be the largest by far without being noise.
            free = max(len(r) - d, 1)
            plain = of_least_squares(self.information, 1.0 if known else float(r @ r) / free, precision)
            if unfinished := self._with_steps(plain, step, precision)[1]:
                notes = [note for note in notes if note.kind is not NoteKind.ONE_OUTPUT] + unfinished
        covariance, more = self._with_steps(covariance, step, precision)
        least = np.sqrt(np.diag(covariance))
        # A lower bound is no error. Of Gauss-Newton, whose steps had many Jacobians, it is one.
        lost = lost if self.newton and self.fresh else unclear
        covariance[lost], covariance[:, lost] = np.nan, np.nan
        if not np.isfinite(np.diag(covariance)).any():  # nothing is to be said of errors that are not there
            notes = [note for note in notes if note.kind is not NoteKind.BASIS]
        signal, noise = np.sqrt(np.diag(self.normal.naive)), np.sqrt(np.diag(self.normal.noise))
        unit = np.where(signal > 0, signal, 1)
        axis = (
            np.linalg.eigh(self.information / np.outer(unit, unit) + precision / np.outer(unit, unit))[1][:, 0] / unit
        )
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
        return is_exact(self.r, self.first)

    def _least_squares(self, precision: Array, known: bool) -> tuple[Array, float, list[Note]]:
        """The covariance of least squares, degrees of freedom, and notes."""
        J, d = self.normal.mean, len(self.information)
        none = np.full((d, d), np.nan)
        # Of a fit to the target alone: what a prior pulls the residuals by is no misfit.
        r = self.r - J @ (finite_inverse(J.T @ J) @ (J.T @ self.r))
        h = leverages(J, np.ones(len(r)), 0 * precision)
        dof = float(are_data(J, r).sum() - h.sum())
        if not known and dof < 0.5:
            few = (
                f"No standard error is stated: {int(are_data(J, self.r).sum())} outputs do not tell {d} parameters "
                "and the noise of the target. Give variance=, or more outputs."
            )
            return none, np.nan, [Note(NoteKind.NONE, few)]
        V, certain, notes = self._given_variance(J, r, dof) if known else (*self._found_variance(r, dof), [])
        rho: list[float] = []
        # What is left of an exact target has the pattern of rounding.
        if not (self._exact or certain):
            V, rho, dof, more = self._with_residuals(J, r, h, dof, V)
            notes += more
            if any(note.kind is NoteKind.ONE_OUTPUT for note in more):
                return none, dof, notes
        stated_dof = np.inf if certain else dof
        uniform = float(V.mean())
        unit = 1.0 if known else max(uniform, 1e-300)
        if np.ptp(V) <= 1e-12 * uniform and not any(rho) and not self.normal.noise.any() and (unit == uniform):
            return of_least_squares(self.information, unit, precision), stated_dof, notes
        if self.fresh:  # the Jacobians of the steps were others: their noise is not in the estimate as it is in J^T J
            J = J @ turned(self.normal.naive, self.information)
        root = np.sqrt(V)[:, None] * J / unit
        meat = root.T @ correlated(root, rho, self.shape) + precision
        bread = inverse(self.information / unit + precision)
        return sandwich(bread, meat), stated_dof, notes

    def _parts(self) -> tuple[Array, Array, Array, Array]:
        """(m,) each of what the simulator's noise and rounding add: left, seen, rounding, floor."""
        left, seen, rounding, floor = (
            np.broadcast_to(x, len(self.r)) for x in (self.left, self.seen, self.rounding, self.floor)
        )
        return left, seen, rounding, floor

    def _given_variance(self, J: Array, r: Array, dof: float) -> tuple[Array, bool, list[Note]]:
        """(m,) V where the target's variance is known, 1 here; whether residuals allow it; and notes."""
        left, seen, rounding, _ = self._parts()
        notes, misfit = [], False
        V = 1.0 + rounding
        chi2 = float((r**2 / (V + seen)).sum())
        chance = float(chdtrc(dof, chi2)) if dof >= 1 else 1.0
        if chance < _MISFIT:
            misfit = True
            V = V * (chi2 / dof)
        if chance < _SAID:
            larger = (
                f"Standard errors are {np.sqrt(chi2 / dof):.3g} times as large as the variance alone would make "
                "them, since residuals are larger than it allows: they hold if what is left of the target is as "
                "good as independent noise."
            )
            notes.append(Note(NoteKind.BASIS, larger))
        elif _MISFIT <= chance < _FINE and not self._exact:
            misfit = max(alike_neighbours(r, J, self.shape)[0], default=0.0) > _TOO_ALIKE / np.sqrt(dof)
        return V + left, not misfit, notes

    def _found_variance(self, r: Array, dof: float) -> tuple[Array, bool]:
        """(m,) V where residuals alone tell the target's variance; and whether it is certain.

        It is where the target is a run like others, whose rounding explains the residuals: it has no other noise.
        """
        left, seen, rounding, floor = self._parts()
        by_steps = rounding + floor
        if dof >= 1 and (floor > 0).all() and chdtrc(dof, float((r**2 / (by_steps + seen)).sum())) > _FINE:
            return left + by_steps, True
        V = np.maximum(float((r**2).sum()) / dof - seen, 0.0) + left
        return np.maximum(V, by_steps), False

    def _with_residuals(
        self, J: Array, r: Array, h: Array, dof: float, V: Array
    ) -> tuple[Array, list[float], float, list[Note]]:
        """V with what residuals say of it, the correlation of neighbours along each axis, dof with that, and notes."""
        left, _, rounding, floor = self._parts()
        least, usual = left + rounding + floor, growing_variance(r, h, self.output)
        if usual is None:
            V, one = with_outliers(J, r, h, dof, V, left, rounding + floor, self.own)
            usual = V
            if one is not None:
                text = f"No standard error is stated: output [{self._name(one.output)}] {one.why}"
                return V, [], dof, [Note(NoteKind.ONE_OUTPUT, text)]
        else:  # each output's own, as HC3 has it (MacKinnon and White 1985)
            V = np.maximum((r / np.maximum(1 - h, 1e-3)) ** 2, least)
        found, rho, grown = alike_neighbours(r / np.sqrt(np.maximum(usual, 1e-300)), J, self.shape)
        V = V * grown
        # Of the mean square of n numbers of correlation rho^|i - j|: as many independent ones vary as much.
        alike, clear = max(found, default=0.0), _TOO_ALIKE / np.sqrt(dof)
        less = float(np.prod([(1 - x**2) / (1 + x**2) for x in rho]))
        dof = max(dof * less, min(dof, _LEAST_DOF))
        if not alike > clear:
            return V, rho, dof, []
        text = (
            f"Residuals of neighbouring outputs are alike (correlation {alike:.2f}), as those of independent noise "
            "hardly ever are. Standard errors and intervals allow for noise that is alike. Give variance= as the "
            "covariance of the target's noise, or to the simulator what it lacks."
        )
        return V, rho, dof, [Note(NoteKind.BASIS, text)]

    def _name(self, k: int) -> str:
        where = np.unravel_index(k, self.shape) if np.prod(self.shape) == len(self.r) else (k,)
        return ", ".join(str(int(i)) for i in where)

    def _with_steps(self, covariance: Array, step: Array, precision: Array) -> tuple[Array, list[Note]]:
        """With what the fit itself is still away from the minimum, or none where that is more."""
        d = len(step)
        metric = self.information + precision
        # Gauss-Newton's steps lead to a minimum as far as noise lets them; of others that is not known.
        expected, about = 0.0, np.zeros_like(covariance)
        if self.newton:
            beta = float(np.linalg.eigvals(finite_inverse(metric) @ self.normal.noise).real.max(initial=0.0))
            by_slopes = 2 * beta / (1 + beta) * float(self.r @ self.r) / max(len(self.r) - d, 1) if self.fresh else 0.0
            expected = max((self.jitter + by_slopes) * chdtri(d, _STEP), self.within)
        else:
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
                unfinished = (
                    f"No standard error is stated: by the slopes at the end, the minimum is still {by:.2g} standard "
                    "errors away. Allow more runs (stop=bridge.Stop(runs=...)), give the method more steps (steps=) "
                    "or a smaller last scale (scale=), or begin from here. If it stays so, outputs are too "
                    "rough for slopes to tell."
                )
                return np.full_like(covariance, np.nan), [Note(NoteKind.NONE, unfinished)]
        return covariance + about, []

    def _about_end(self, step: Array, metric: Array) -> Array:
        """E[(z - z*) (z - z*)^T], z* the minimum, z where a first-order descent has come to.

        Slopes tell z* - z = step with a covariance S, by the noise of outputs and of the Jacobian; the last steps went
        about as far as W. Taken together it is W (W + S)^-1 step, give or take W - W (W + S)^-1 W. Where the step is
        far longer than that allows, the descent was still on its way, and its last steps tell nothing.
        """
        if self.wander is None:
            return np.outer(step, step)
        own = self.noise_of_step(metric)
        size = np.sqrt(np.diag(self.wander) + np.diag(own))
        size[size == 0] = 1
        unit = np.outer(size, size)
        both = np.linalg.pinv((self.wander + own) / unit, rcond=1e-12, hermitian=True) / unit
        if float(step @ both @ step) > chdtri(len(step), _STEP):
            return np.outer(step, step) + own
        share = self.wander @ both
        step = share @ step
        return np.outer(step, step) + self.wander - share @ self.wander

    def noise_of_step(self, metric: Array) -> Array:
        """(d, d) covariance of the step, by the noise of outputs and of the Jacobian."""
        variance, noise = float(self.r @ self.r) / max(len(self.r) - len(metric), 1), self.normal.noise
        own = self.jitter * finite_inverse(metric)
        return np.asarray(own + 2 * variance * finite_inverse(metric) @ noise @ finite_inverse(metric + noise))

    def _bias_step(self, precision: Array) -> tuple[Array, float]:
        """The step by what smoothing adds to the outputs, and how long it is by noise alone."""
        d = len(self.information)
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
