"""The fewest simulations to a least-squares solution: rounds of runs, chosen by a model of all runs so far.

Each round has one point where the model (see `bridge.fitting.methods.gaussian_process`) expects the least loss inside a
trust region; another in a region four times as large, where the first is at the edge, so that a region which is too
small costs no round; one where the loss would be least without the rough part of the outputs, which sees over the edges
of pixels and steps; and
else points where draws from the model are least: as far apart as the model does not know where the minimum is, along
valleys, not across them (Thompson sampling; Kandasamy et al., *Parallelised Bayesian optimisation via Thompson
sampling*, 2018). Draws of many rough outputs miss the target by more the farther they are from the base, all of them,
and so stay there: where outputs are rough, up to a third of a round are minima of draws from a model of the loss alone.

A search that is stuck, with a loss which noise does not explain, begins again elsewhere.

The file is long, since what a round chooses and whether it is the last hang on the same few numbers.

Nothing here evaluates anything. Parameters are in natural units throughout. Everything is a function of the seed and of
the outputs seen, so that a search that is restored goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
from numpy.linalg import LinAlgError
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.fitting.methods.gaussian_process import GaussianProcess, fit_gaussian_process, levenberg_marquardt
from bridge.fitting.methods.kriging_runs import FARTHEST, Runs, farthest
from bridge.fitting.robust import RobustLoss
from bridge.fitting.soundness import corrected_units, looks_like_noise, sensitivities, tamed

# How much of the variance counts against the first point.
_CAUTION = 0.3
_FIRST_RADIUS, _LEAST_RADIUS, _FAR = 4.0, 0.02, 4.0
_PROBES = 128
# Share of the rough part, of the smooth one, from which on a round has a point that goes by the latter alone, and of
# the round's points those that go by the loss alone: one number tells little about more than a few parameters.
_ROUGH, _BY_LOSS, _FEW = 0.02, 1 / 3, 4
# Points nearer to each other than this part of the first one's step tell the same: draws become twice as wide.
_SAME, _WIDER = 0.05, 3
# Rounds of the first size; a search that is not done by then has larger ones.
_SMALL_ROUNDS = 4
# A step of less than this (natural units) that promises less than this part of the loss: nothing more to find.
_STILL_STEP, _STILL_GAIN, _STILL_HOPE = 1e-4, 1e-6, 0.01
# Stuck: less gained than this part of the loss in so many rounds and 3 (d + 1) runs, and no more expected of the next,
# or a trust region smaller than this; or as near to an earlier end. Twice as many where there is no restart.
_STUCK_GAIN, _STUCK_ROUNDS, _STUCK_NEAR = 3e-4, 4, 0.1
# Restarts are about the start, at so many spreads the first two, at twice that the next two, and so on.
_SCATTER = 3.0
# Without a known noise: a loss of less than this part of the first runs' is no reason to look elsewhere; neither is one
# of less than that part of the target's own variance, where residuals look like noise.
_LITTLE, _LIKE_NOISE = 0.02, 0.5
# Nor one that so many earlier searches have come to as well, where most of the target is explained.
_AGREE, _AGREED = 2, 0.2
# A loss of less than this part of the start's, and of the target's own variance, is nothing: ten digits agree. One of
# less than that part may have come to the last digits. A model that fails so often in turn ends the search.
_NOTHING, _RELATIVELY_NOTHING, _MOST_MISHAPS = 1e-20, 1e-9, 4
_RESCALINGS = 3
# Of the further points of a round, where runs are noisy: those at a standard error's distance, which tell the slopes.
# The region shrinks there where noise breaks promises.
_FOR_SLOPES = 0.5


@final
class KrigingSearch:
    """The state between two rounds.

    Args:
        start: (d,) natural units. lower, upper: (d,) bounds. spread: of the first round's points about the start.
        seed: of the points. batch: runs a round. later: from the fifth round on.
        prior: z (d,) -> its part of the loss, and the gradient of that.
        known_noise: whether residuals are in units of the target's noise, so that chi-square tells when to stop.
        restarts: begin again from another place, at most so many times, where a search has ended and the loss does not
            say that the target is explained.
        robust: rho in place of r^2 / 2. Each round takes the least squares that touch this loss from above at the best
            run so far: outputs are weighted by psi(r) / r of that run, and the Gram matrix is made anew.
        ordinary: the loss of the target's own mean.
        guessed: (d,) of which parameters nothing was said of natural scales. unknown: nor known from start or bounds.

    Attributes:
        runs: all so far.
        best: (d,) where the loss is least as far as is known. step: (d,) from there to where it is expected to be.
        note: what the last round did, in words.
        stopped: "" or why there is nothing more to do.
    """

    def __init__(
        self,
        start: Array,
        lower: Array,
        upper: Array,
        *,
        spread: float,
        seed: int,
        batch: int,
        later: int,
        prior: Callable[[Array], tuple[float, Array]],
        known_noise: bool,
        tolerance: float,
        restarts: int,
        robust: RobustLoss | None = None,
        ordinary: float = 0.0,
        guessed: NDArray[np.bool_] | None = None,
        unknown: NDArray[np.bool_] | None = None,
    ) -> None:
        self.start, self.lower, self.upper = start, lower, upper
        self.runs = Runs(start, prior, robust, batch)
        self.spread, self.seed, self.batch, self.later, self.prior = spread, seed, batch, later, prior
        self.known_noise, self.tolerance, self.ordinary = known_noise, tolerance, ordinary
        self.restarts = self.restarts_left = restarts
        d = len(start)
        self.guessed = np.zeros(d, dtype=bool) if guessed is None else guessed
        self.unknown = np.zeros(d, dtype=bool) if unknown is None else unknown
        self.mishaps, self.whole = 0, True  # in turn; whether all of the numerics have gone well
        self._length = np.sqrt(min(d, 4))
        self.radius = _FIRST_RADIUS
        self.promise: tuple[float, float] | None = None  # loss at the base, and the gain expected of the next point
        self.at_edge, self.still = False, 0
        self.rounding = 0.0  # variance of one run, summed over outputs, that steps of the outputs make
        self.step = np.full(d, np.inf)  # to where the least loss is expected
        self.ends: list[tuple[float, Array]] = []
        self.path: list[tuple[int, float]] = []  # runs and the least loss after each round since the last restart
        self.best, self.best_loss, self.scale = start, np.inf, spread
        self.note, self.stopped = "", ""
        self.points = self._first(start)

    def ask(self, most: int) -> Array:
        """(k, d) the points of the next round, no more than so many of them, and at least one."""
        self.points = self.points[: max(1, most)]
        return self.points

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _rng(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, self.runs.round]))

    def _directions(self, rng: np.random.Generator, count: int) -> Array:
        """Unit directions, orthogonal as far as they go."""
        d = len(self.start)
        blocks = [np.linalg.qr(rng.normal(size=(d, d)))[0].T for _ in range(-(-count // d))]
        return np.concatenate(blocks)[:count] if blocks else np.zeros((0, d))

    def _first(self, start: Array) -> Array:
        d = len(start)
        count = max(self.batch, min(d + 1, 2 * self.batch)) - 1
        rng = self._rng()
        away = self._directions(rng, count) * (self.spread * self._length * rng.choice([-1.0, 1.0], size=(count, 1)))
        away = away * self.runs.unit
        points = start + away
        # Away from a bound, not onto it: two rows at the same place tell nothing.
        outside = (points < self.lower) | (points > self.upper)
        return np.clip(np.vstack([start, np.where(outside, start - away, points)]), self.lower, self.upper)

    def begin_with(self, rows: Array, residuals: Array) -> None:
        """Takes runs that were made before, (n, d) and their whitened residuals (n, m), before the first round.

        Where they tell enough about the outputs, the first round is one of the model's, with the start in it; else it
        is smaller by as many runs.
        """
        if len(rows) == 0:
            return
        self.runs.begin_with(rows, residuals)
        squared = np.diag(self.runs.gram)
        changes = squared[:, None] + squared[None] - 2 * self.runs.gram > 1e-24 * max(float(squared.max()), 1e-300)
        if len(rows) <= len(self.start) or not changes.any():
            self.points = self.points[: max(1, len(self.points) - len(rows))]
            return
        known = (rows == self.start).all(axis=1).any()
        self._balance()
        self._chosen(len(rows))
        if self.stopped:
            # Nothing is left of the target: one run confirms it.
            self.stopped, self.points = "", self.best[None] if known else self.start[None]
        elif not known and len(self.points) > 1:
            self.points[-1] = self.start

    def tell(self, residuals: Array, failed: NDArray[np.bool_]) -> None:
        """Takes the whitened residuals (k, m) of `points`, and finds the next `points`.

        Raises:
            EvaluationError: all runs so far have failed.
            InputError: the outputs do not change.
        """
        before = len(self.runs.rows)
        self.runs.add(self.points, residuals, failed)
        self.note = ""
        if self._rescaled():
            return
        if self.runs.failed[self.runs.first_row :].all():
            if self.runs.first_row:
                self._restart("nothing but failures there")
                return
            raise EvaluationError(
                f"Expected outputs, got none: all {len(self.runs.rows)} runs about the start failed. "
                "Try the start by itself, and bounds that keep away from where the simulator fails."
            )
        if self.runs.round == 1:
            self._balance()
        self._chosen(before)

    def _chosen(self, before: int) -> None:
        """The next points; where the model's numerics fail, random ones nearer to the best run."""
        try:
            self._choose(before)
            self.mishaps = 0
        except BridgeError:
            raise
        except (LinAlgError, ValueError, ArithmeticError) as problem:
            self._retreat(problem)

    def _retreat(self, problem: Exception) -> None:
        self.mishaps += 1
        losses = self.runs.losses()
        best = int(np.argmin(losses))
        self.best, self.best_loss = self.runs.rows[best], float(losses[best]) + self.runs.offset
        self.radius, self.promise, self.at_edge, self.runs.kernel = 0.25 * self.radius, None, False, np.zeros(0)
        self.step = np.full(len(self.start), np.inf)
        self.path.append((len(self.runs.rows), self.best_loss))
        self.note = f"the model of all runs has failed ({problem}): points at random, nearer to the best run"
        if self.mishaps >= _MOST_MISHAPS:
            self.stopped, self.whole = "numerics", False
            return
        away = self._rng().uniform(-1.0, 1.0, (self._size, len(self.start))) * self.radius * self.runs.unit
        self.points = np.clip(self.best + away, self.lower, self.upper)

    def _balance(self) -> None:
        """Corrects guessed natural scales by how much the first outputs change with each parameter."""
        good = np.flatnonzero(~self.runs.failed)
        if not self.guessed.any() or len(good) < 2:
            return
        gram = tamed(self.runs.gram[np.ix_(good, good)], self.runs.usual_loss())
        seen = sensitivities(self.runs.rows[good], gram)
        if seen is not None:
            residual = float(np.sqrt(gram[0, 0]))
            self.runs.unit = corrected_units(seen, self.guessed, self.unknown, residual)

    def _rescaled(self) -> bool:
        """Whether the first round has to be repeated with another spread, since its outputs do not change."""
        if self.runs.round > 1 + _RESCALINGS or self.runs.first_row or self.runs.kernel.size:
            return False
        if self.runs.reused and (self.runs.residuals[~self.runs.failed] != self.runs.residuals[0]).any():
            return False
        good = np.flatnonzero(~self.runs.failed)
        if len(good) < 2:
            return False
        outputs = self.runs.residuals[good]  # not by G, in which rows of two rounds differ by rounding
        least = 1e-24 * max(float(np.nansum(outputs**2, axis=1).max()), 1e-300)
        if farthest(outputs) <= least:
            factor, what = 10.0, "too small, or the simulator is constant there: nothing changes"
        else:
            others = good[good > 0]
            last = others[others >= len(self.runs.rows) - len(self.points)]
            if len(last) < 3 or self.runs.failed[0] or farthest(self.runs.residuals[last]) > least:
                return False
            factor, what = 0.25, "too large: all of its runs give the same output, the start another"
        if self.runs.round > _RESCALINGS:
            raise InputError(
                f"Expected outputs that change with the parameters, got the same output from all runs, also at "
                f"{self.spread:.3g} natural scales from the start: the scale of the first round is {what}. Check the "
                "natural scales of the parameters, the start, and that the simulator reads its parameters."
            )
        self.spread *= factor
        self.note = f"the first scale was {what}; trying {self.spread:.3g}"
        self.points = self._first(self.start)[1:]
        return True

    def _least(
        self, of: Callable[[Array], tuple[float, Array, Array]], begin: Array, lower: Array, upper: Array
    ) -> tuple[Array, float]:
        """Where a loss of the model or of a draw, with the prior, is least within a box, and that."""

        def objective(z: Array) -> tuple[float, Array, Array]:
            value, slope, normal = of(z)
            more, slope_of_prior = self.prior(z)
            return value + more, slope + slope_of_prior, normal

        return levenberg_marquardt(objective, begin, lower, upper)

    def _box(self, base: Array, radius: float) -> tuple[Array, Array]:
        reach = radius * self.runs.unit
        return np.maximum(self.lower, base - reach), np.minimum(self.upper, base + reach)

    def _far(self, step: Array) -> float:
        """The largest coordinate of a step, in units."""
        return float(np.abs(step / self.runs.unit).max())

    def _choose(self, before: int) -> None:
        losses = self.runs.losses()
        if losses.min() <= _NOTHING * self._much(self.runs.usual_loss()):
            self.best, self.best_loss = self.runs.rows[int(np.argmin(losses))], float(losses.min())
            self.step, self.stopped = np.zeros(len(self.start)), "converged"
            return
        near, stand_in = self.runs.rows_of_model()
        model = self.runs.fitted(near, tamed(self.runs.gram[np.ix_(stand_in, stand_in)], self.runs.usual_loss()))
        self.runs.kernel = model.kernel
        expected = np.array([model.loss(z, 1.0)[0] + self.prior(z)[0] for z in self.runs.rows[near]])
        expected[self.runs.failed[near]] = np.inf
        own = np.arange(self.runs.first_row, len(self.runs.rows))
        best = own[int(np.argmin(losses[own]))]
        # Where runs are noisy the least of many is too low: what the model makes of all of them counts.
        noisy = model.noise > 0.1 * losses[best]
        self.runs.noisy = bool(noisy)
        if noisy:
            base, loss = self.runs.rows[near][int(np.argmin(expected))], float(expected.min())
        else:
            base, loss = self.runs.rows[best], float(losses[best])
        if self.promise is not None:
            was, promised = self.promise[0] - self.runs.offset, self.promise[1]
            new = near >= before
            got = float(expected[new].min(initial=np.inf)) if noisy else float(losses[before:].min())
            ratio = (was - got) / max(promised, 1e-300)
            if ratio < 0.1:
                self.radius *= 0.5
            elif ratio > 0.5 and self.at_edge:
                found = self.runs.rows[before + int(np.argmin(losses[before:]))]
                self.radius = max(2.0 * self.radius, 0.0 if noisy else self._far(found - self.best))
                self.note = "the trust region grows"
        self.radius = float(np.clip(self.radius, _LEAST_RADIUS, 1e3))
        points, gain, hope = self._round(model, base, loss, noisy or self.rounding > 0.1 * losses[best])
        step = self._far(points[0] - base)
        self.promise, self.step = (loss + self.runs.offset, max(gain, 1e-12 * loss)), points[0] - base
        self.best, self.best_loss, self.scale = base, loss + self.runs.offset, max(step, 1e-12)
        self.points = np.array(points)
        self._maybe_stop(step, gain, max(hope, gain), noisy)

    def _round(self, model: GaussianProcess, base: Array, loss: float, noisy: bool) -> tuple[list[Array], float, float]:
        """Points of a round, the gain that is expected of the first, and the most that a draw promises."""
        box = self._box(base, self.radius)

        def cautious(z: Array) -> tuple[float, Array, Array]:
            return model.loss(z, _CAUTION)

        target, _ = self._least(cautious, base, *box)
        gain = loss - model.loss(target, 0.0)[0] - self.prior(target)[0]
        step = self._far(target - base)
        self.at_edge = step > 0.9 * self.radius
        points, hope, by_loss = [target], 0.0, 0
        if self.at_edge and self._size > 1:
            points.append(self._least(cautious, target, *self._box(base, _FAR * self.radius))[0])
        if model.roughness > _ROUGH:
            if len(model.rows) > 2 * (len(base) + 1):
                by_loss = round(_BY_LOSS * min(1.0, _FEW / len(base)) * self._size)
            if self._size > len(points):
                smooth, _ = self._least(lambda z: model.loss(z, _CAUTION, rough=False), base, *box)
                if self._far(smooth - target) > _SAME * step:
                    points.append(smooth)
        rng = self._rng()
        for_slopes = round(_FOR_SLOPES * max(self._size - by_loss - len(points), 0)) if noisy else 0
        points += self._for_slopes(rng, model, base, loss, for_slopes)
        while len(points) < self._size - by_loss:
            point, promised = self._drawn(rng, model, base, points, box)
            points.append(point)
            hope = max(hope, promised)
        if by_loss:
            of_loss = _of_loss(model, self.runs.unit)
            points += [self._drawn(rng, of_loss, base, points, box)[0] for _ in range(self._size - len(points))]
        return points, gain, hope

    def _for_slopes(
        self, rng: np.random.Generator, model: GaussianProcess, base: Array, loss: float, count: int
    ) -> list[Array]:
        """Points a standard error of the fit away, where the slopes of noisy outputs can be told."""
        if count == 0:
            return []
        d = len(base)
        dw = model.differences(base, 0.1 * self.runs.unit) * self.runs.unit
        noise = max(model.noise, self.rounding)
        values, axes = np.linalg.eigh(dw.T @ model.gram @ dw - noise * dw.T @ dw)
        variance = 1.0 if self.known_noise else 2 * max(loss, 0.0) / self.runs.residuals.shape[1]
        sizes = np.minimum(np.sqrt(variance / np.maximum(values, 1e-300)), FARTHEST)
        turned = self._directions(rng, count) * (np.sqrt(d) * rng.choice([-1.0, 1.0], size=(count, 1)))
        away = turned @ (axes * sizes).T * self.runs.unit
        outside = (base + away < self.lower) | (base + away > self.upper)
        return list(np.clip(np.where(outside, base - away, base + away), self.lower, self.upper))

    @property
    def _size(self) -> int:
        """Of the next round."""
        return self.batch if self.runs.round < _SMALL_ROUNDS else self.later

    def _drawn(
        self,
        rng: np.random.Generator,
        model: GaussianProcess,
        base: Array,
        others: list[Array],
        box: tuple[Array, Array],
    ) -> tuple[Array, float]:
        """A point where a draw is least, apart from the others, and how much less than at the base it promises."""
        target, step = others[0], others[0] - base
        reach = max(float(np.linalg.norm(step / self.runs.unit)), (1e-3 + 0.1 * self.radius) * self._length)
        apart = _SAME * max(self._far(step), 1e-9)
        wide = 1.0
        for _ in range(1 + _WIDER):
            draw = model.draw(rng, wide)
            away = rng.normal(size=(_PROBES, len(base)))
            away *= (reach * np.geomspace(0.05, 8.0, _PROBES) / np.linalg.norm(away, axis=1))[:, None]
            away *= self.runs.unit
            probes = np.vstack([np.clip(target + away, *box), target])
            losses = draw.losses(probes) + np.array([self.prior(z)[0] for z in probes])
            begins = {int(np.argmin(losses)), _PROBES}
            ends = [self._least(draw.loss, probes[i], *box) for i in sorted(begins)]
            point, value = min(ends, key=lambda end: end[1])
            if min(self._far(point - other) for other in others) > apart:
                break
            wide *= 2.0
        return point, draw.loss(base)[0] + self.prior(base)[0] - value

    # -- the end ---------------------------------------------------------------------------------------------------

    def _maybe_stop(self, step: float, gain: float, hope: float, noisy: bool) -> None:
        """Ends or restarts where neither what is expected of the next point nor what is hoped for is worth a round."""
        much = self._much(self.runs.usual_loss())
        nothing, little = _NOTHING * much, self.best_loss < _RELATIVELY_NOTHING * much
        still = gain < max(_STILL_GAIN * self.best_loss, nothing) and hope < max(_STILL_HOPE * self.best_loss, nothing)
        still &= step < _STILL_STEP or self.best_loss < nothing
        if self.known_noise:
            # The step in standard errors: sqrt(2 gain) is its length in the metric of the normal matrix.
            still |= gain < 0.5 * self.tolerance**2 and hope < 0.5 and not self.at_edge
        self.still = self.still + 1 if still else 0
        self.path.append((len(self.runs.rows), self.best_loss))
        explained = self._explained()
        if explained or self.restarts_left == 0:
            # Runs that average noise gain no loss, but precision.
            # So little is left that what looks like noise are the last digits.
            last_digits = noisy and little and not self.known_noise
            over = self.still >= 2 or (last_digits and self._stuck(gain))
            over |= not noisy and not self.known_noise and self._stuck(gain, 2)
        else:
            over = self.still >= 2 or self._stuck(gain)
        if not over:
            return
        self.ends.append((self.best_loss, self.best))
        if explained:
            self._end()
        else:
            self._restart(f"a minimum with loss {self.best_loss:.4g} is found, and kept")

    def _stuck(self, gain: float, patience: int = 1) -> bool:
        """Whether rounds gain hardly anything any more, or lead to where another search has ended.

        A region that shrinks, since what the model expects does not come true, is given the time to.
        """
        enough = len(self.runs.rows) - 3 * patience * (len(self.start) + 1)
        past = [loss for rows, loss in self.path[: -patience * _STUCK_ROUNDS] if rows <= enough]
        least = min(loss for _, loss in self.path)
        little = _STUCK_GAIN * least
        if past and min(past) - least < little and (gain < little or self.radius < _STUCK_NEAR):
            return True
        return any(
            self._far(self.best - end) < _STUCK_NEAR and self.best_loss > (1 - _STUCK_GAIN) * loss
            for loss, end in self.ends
        )

    def _end(self) -> None:
        self.best_loss, self.best = min(self.ends, key=lambda end: end[0])
        self.stopped = "converged"

    def _restart(self, why: str) -> None:
        """From a place about the start, farther away after every other one."""
        if self.restarts_left == 0:
            self._end()
            return
        far = _SCATTER * self.spread * 2.0 ** ((self.restarts - self.restarts_left) // 2)
        self.restarts_left -= 1
        away = far * self.runs.unit * self._rng().normal(size=len(self.start))
        self.runs.first_row = len(self.runs.rows)
        self.radius, self.promise, self.still, self.path = _FIRST_RADIUS, None, 0, []
        self.points = self._first(np.clip(self.start + away, self.lower, self.upper))
        self.note = f"restart {self.restarts - self.restarts_left}: {why}"

    def _explained(self) -> bool:
        """Whether the loss is that of noise: by chi-square where its size is known, else if little of the start's is
        left, or residuals look like noise."""
        if self.known_noise:
            m = self.runs.residuals.shape[1]
            return bool(2 * self.best_loss < m + 5 * np.sqrt(2 * m))
        if self.best_loss < _LITTLE * self._much(self.runs.first_loss()):
            return True
        if self.best_loss < _LIKE_NOISE * self.ordinary and looks_like_noise(self.runs.residual_at(self.best)):
            return True
        alike = [self.best_loss > (1 - _STUCK_GAIN) * loss for loss, z in self.ends if self._far(self.best - z) < 1]
        return self.best_loss < _AGREED * self.ordinary and len(alike) >= _AGREE and all(alike)

    def _much(self, usual: float) -> float:
        """A loss that counts for much: one that is usual among the first runs, or that of the target's mean."""
        return min(usual, self.ordinary) if self.ordinary > 0 else usual

    @property
    def overall(self) -> tuple[float, Array]:
        """The least loss and where, over all restarts."""
        return min([*self.ends, (self.best_loss, self.best)], key=lambda end: end[0])

    # -- between two jobs --------------------------------------------------------------------------------------------

    _KEPT = (
        *("radius", "promise", "at_edge", "still", "ends", "best", "best_loss", "scale", "note", "stopped", "points"),
        *("spread", "restarts_left", "step", "path", "mishaps", "whole", "rounding"),
    )

    def to_dict(self) -> dict[str, Any]:
        return {**self.runs.to_dict(), **{name: getattr(self, name) for name in self._KEPT}}

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.runs.restore(saved)
        for name in self._KEPT:
            setattr(self, name, saved[name])
        self.promise = None if saved["promise"] is None else (saved["promise"][0], saved["promise"][1])
        self.ends = [(float(loss), np.asarray(z)) for loss, z in saved["ends"]]
        self.path = [(int(rows), float(loss)) for rows, loss in saved["path"]]


def _of_loss(model: GaussianProcess, unit: Array) -> GaussianProcess:
    """A model of the same rows as if there were one output, the root of twice the loss without its prior."""
    root = np.sqrt(np.diag(model.gram))
    return fit_gaussian_process(model.rows, np.outer(root, root), unit=unit)
