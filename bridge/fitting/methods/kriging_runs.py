"""All runs of a search so far, their residuals, and the model that goes through them.

The model is a Gaussian process of all outputs (`bridge.fitting.methods.gaussian_process`), made of the rows near to the
best one. A robust loss weights outputs; numbers that runs lack are predicted (`bridge.fitting.methods.missing`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.methods.gaussian_process import GaussianProcess, default_kernel, fit_gaussian_process
from bridge.fitting.methods.missing import completed
from bridge.fitting.robust import RobustLoss
from bridge.fitting.soundness import tamed

# Rows that the model is made of: those nearest to the best, at least 2 (d + 1), but for those of a loss so many times
# that of the best 2 (d + 1).
MOST_ROWS, _CLIFF = 150, 30.0
# Errors are stated from rows up to this part of the usual loss at least.
_SLOPES = 1e-4
# Where runs are noisy rows are taken from no farther than this (natural units).
FARTHEST = 1.0


@final
class Runs:
    """Runs at rows (n, d) in natural units, with whitened residuals (n, m).

    Args:
        start: (d,) of the search. prior: z (d,) -> its part of the loss, and the gradient of that.
        robust: rho in place of r^2 / 2. The Gram matrix is that of outputs weighted by psi(r) / r of the best run.
        batch: runs of the first round.

    Attributes:
        unit: (d,) natural units that distances are measured in: 1, but for parameters whose natural scale is a guess.
        failed: (n,) runs without an output. reused: how many of the first are of earlier fits.
        gram: (n, n) of the residuals. offset: what a robust loss is above the weighted squares.
        kernel: of the last model, empty before there is one. completed_by: that which predicts what runs lack.
        round: how many there have been. first_row: of the search since its last restart.
        noisy: whether runs are noisy, as far as the last model tells.
    """

    def __init__(
        self,
        start: Array,
        prior: Callable[[Array], tuple[float, Array]],
        robust: RobustLoss | None,
        batch: int,
    ) -> None:
        d = len(start)
        self.start, self.prior, self.robust, self.batch = start, prior, robust, batch
        self.unit, self.offset = np.ones(d), 0.0
        self.rows, self.residuals = np.zeros((0, d)), np.zeros((0, 0))
        self.failed, self.gram = np.zeros(0, dtype=bool), np.zeros((0, 0))
        self.kernel, self.completed_by = np.zeros(0), np.zeros(0)
        self.round, self.first_row, self.reused = 0, 0, 0
        self.noisy = False

    def begin_with(self, rows: Array, residuals: Array) -> None:
        """Takes runs of earlier fits, before any other."""
        self.rows, self.residuals, self.reused = rows, residuals, len(rows)
        self.failed = np.zeros(len(rows), dtype=bool)
        self.gram = self._gram_with(0)

    def add(self, points: Array, residuals: Array, failed: NDArray[np.bool_]) -> None:
        """Takes the runs of a round."""
        before = len(self.rows)
        self.rows = np.vstack([self.rows, points])
        self.failed = np.concatenate([self.failed, failed])
        self.residuals = self.with_rows(residuals, failed)
        self.gram = self._gram_with(before)
        self.round += 1

    def with_rows(self, residuals: Array, failed: NDArray[np.bool_]) -> Array:
        """The residuals so far and those of new rows, 0 where a run failed."""
        new = np.where(failed[:, None], 0.0, residuals)
        return np.vstack([self.residuals, new]) if len(self.residuals) else new

    def _gram_with(self, before: int) -> Array:
        if np.isnan(self.residuals).any():
            self.completed_by, before = self.kernel if self.kernel.size else default_kernel(self.unit), 0
        residuals, more = self.completed()
        if self.robust is not None:
            own = self.first_row + np.flatnonzero(~self.failed[self.first_row :])
            if not len(own):
                return residuals @ residuals.T
            losses = [self.robust.rho(residuals[i]).sum() + self.prior(self.rows[i])[0] for i in own]
            r = residuals[own[int(np.argmin(losses))]]
            weight = self.robust.weight(r)
            self.offset = float(self.robust.rho(r).sum() - 0.5 * (weight * r) @ r)
            return np.asarray((residuals * weight) @ residuals.T + np.diag(more))
        if self.completed_by.size:
            return np.asarray(residuals @ residuals.T + np.diag(more))
        new = residuals[before:] @ residuals.T
        gram = np.zeros((len(self.rows), len(self.rows)))
        gram[:before, :before] = self.gram
        gram[before:], gram[:, before:] = new, new.T
        return gram

    def completed(self) -> tuple[Array, Array]:
        """The residuals with what stands for numbers that runs lack, and what that adds to their squares."""
        if not self.completed_by.size:
            return self.residuals, np.zeros(len(self.rows))
        return completed(self.rows, self.residuals, self.failed, self.completed_by)

    def residual_at(self, z: Array) -> Array:
        """(m,) of the run at z, which has been made; what it lacks is predicted."""
        return np.asarray(self.completed()[0][self._nearest(z)])

    def _nearest(self, z: Array) -> int:
        return int(np.argmin(((self.rows - z) ** 2).sum(axis=1) + 1e300 * self.failed))

    def losses(self) -> Array:
        """(n,) loss of each run by itself, with the prior; infinite where it failed."""
        losses = 0.5 * np.diag(self.gram) + np.array([self.prior(z)[0] for z in self.rows])
        return np.asarray(np.where(self.failed, np.inf, losses))

    def usual_loss(self) -> float:
        """Of the start, or half of the first runs' where that is more: one run of a huge output says nothing."""
        losses = self.losses()
        at_start = losses[(self.rows == self.start).all(axis=1) & ~self.failed]
        first = float(at_start.min()) if len(at_start) else 0.0
        return max(first, min(self.first_loss(), 1e4 * first) if first > 0 else self.first_loss())

    def first_loss(self) -> float:
        losses = self.losses()
        if not np.isfinite(losses).any():
            return 0.0
        if self.reused:  # many of them may be near to where an earlier fit has ended
            return float(np.percentile(losses[: self.reused], 75))
        return float(np.median(losses[np.isfinite(losses)][: self.batch]))

    def _near(self, centre: Array | None = None) -> NDArray[np.intp]:
        losses, enough, stated = self.losses(), 2 * (len(self.start) + 1), centre is not None
        if centre is None:
            own = np.arange(self.first_row, len(self.rows))
            centre = self.rows[own[int(np.argmin(losses[own]))]]
        distance = (((self.rows - centre) / self.unit) ** 2).sum(axis=1)
        if len(losses) > enough:
            # One kernel cannot do justice to cliffs far off and to what matters here.
            cliff = _CLIFF * np.sort(losses)[enough - 1]
            if stated:  # of an exact target the nearest rows differ by rounding alone, and tell no slopes
                cliff = max(cliff, _SLOPES * self.usual_loss())
            cliffs = np.isfinite(losses) & (losses > cliff)
            if stated:  # rows that are all at a bound say nothing of it: the next ones that are not
                for moved in (self.rows != centre).T:
                    if not (moved & np.isfinite(losses) & ~cliffs).any():
                        there = np.flatnonzero(moved & cliffs)
                        cliffs[there[np.argsort(distance[there], kind="stable")[:enough]]] = False
            distance[cliffs] = np.inf
        order, most = np.argsort(distance, kind="stable"), max(MOST_ROWS, enough)
        if self.noisy and len(order) > most:  # of as many rows, those that are apart tell more
            order = order[: max(most, int((distance <= len(self.start) * (2 * FARTHEST) ** 2).sum()))]
            order = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))]
        order = order[:most]
        return np.sort(order[np.isfinite(distance[order])])

    def rows_of_model(self, centre: Array | None = None) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The numbers of the rows that `model` is made of, and of those whose residuals it takes."""
        near = self._near(centre)
        losses = self.losses()[near]
        worst = near[int(np.argmax(np.where(np.isfinite(losses), losses, -np.inf)))]
        return near, np.where(self.failed[near], worst, near)

    def model(self, centre: Array | None = None, weighted: bool = True) -> GaussianProcess:
        """Of the rows about the best one, or about a centre. A failed run counts as the worst of the others.

        weighted: by the weights of a robust loss.
        """
        near, stand_in = self.rows_of_model(centre)
        gram = tamed(self.gram[np.ix_(stand_in, stand_in)], self.usual_loss())
        if self.robust is not None and not weighted:
            residuals, more = (of[stand_in] for of in self.completed())
            gram = residuals @ residuals.T + np.diag(more)
        return self.fitted(near, gram)

    def fitted(self, near: NDArray[np.intp], gram: Array) -> GaussianProcess:
        thorough = len(self.rows) < 40 or self.round % 4 == 0
        return fit_gaussian_process(
            self.rows[near], gram, self.kernel if self.kernel.size else None, thorough, self.unit
        )

    def model_there(self, z: Array) -> tuple[GaussianProcess, Array, Array, NDArray[np.bool_]]:
        """The model of those outputs that the run at z has, without weights; residuals of its rows (n, m), and of z;
        and which outputs these are.

        It is of the runs that have them all, where these are enough: what stands for a number is no evidence of it.
        """
        stand_in, model = self.rows_of_model(z)[1], self.model(z, weighted=False)
        at = self._nearest(z)
        there = ~np.isnan(self.residuals[at])
        whole = ~np.isnan(self.residuals[stand_in][:, there]).any(axis=1)
        if not whole.all() and whole.sum() > 3 * (len(z) + 1):
            R = self.residuals[stand_in[whole]][:, there]
            return fit_gaussian_process(model.rows[whole], R @ R.T, unit=self.unit), R, self.residuals[at][there], there
        residuals = self.completed()[0]
        if not there.all():
            R = residuals[stand_in][:, there]
            model = replace(model, gram=R @ R.T, amplitude=model.amplitude * float(there.mean()))
        return model, residuals[stand_in][:, there], residuals[at][there], there

    _KEPT = (
        *("rows", "residuals", "failed", "gram", "round", "first_row", "reused", "kernel", "unit", "offset"),
        *("completed_by", "noisy"),
    )

    def to_dict(self) -> dict[str, Any]:
        """The state, as plain data."""
        return {name: getattr(self, name) for name in self._KEPT}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        for name in self._KEPT:
            setattr(self, name, saved[name])


def farthest(outputs: Array) -> float:
    """The largest squared distance of rows (n, m) from the first one; numbers that are lacking do not count."""
    return float(np.nansum((outputs - outputs[0]) ** 2, axis=1).max())
