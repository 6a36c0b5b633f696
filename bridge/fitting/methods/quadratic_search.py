"""Minimises a number, a loss of one's own, in few runs: rounds of runs by a quadratic model inside a trust region.

The model goes through the runs about the best one, m(y) = c + g . y + 1/2 y . H y, and of all such models its H is
nearest to the one before in Frobenius' norm: so few runs suffice, and many determine it. With the runs' differences y
this is the linear system

    [A + D  P] [lambda]   [l - m_before(y)]
    [P^T    0] [c, g  ] = [0              ],   A_ij = (y_i . y_j)^2 / 2,   P = [1 y],

and H = H_before + sum lambda_i y_i y_i^T.

D, a diagonal, lets runs be missed: by noise, the same of all, and by what a quadratic cannot follow, which grows as
|y|^6. How much of both is chosen by leaving out one run after the other.

Each round has the point where the model is least in the trust region; at its edge that of a region four times as large;
and others where the runs say least about the model, which is where its system leaves most open.

Nothing here depends on anything but the seed and the losses seen. One rank thinks for all.

References: Powell, "Least Frobenius norm updating of quadratic models that satisfy interpolation conditions",
Mathematical Programming 100 (2004); Conn, Scheinberg and Vicente, *Introduction to derivative-free optimization*
(2009), chapters 5 and 10; leaving one out: Dubrule, "Cross validation of kriging in a unique neighborhood", 1983.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from bridge.arrays import Array
from bridge.errors import BridgeError, EvaluationError, InputError

# Radii, natural units: the first, how far it may grow; the point beyond an edge is in a region so many times as large.
_FIRST_RADIUS, _LARGEST, _FAR = 1.0, 1e6, 4.0
# A step is at the edge from this part of the radius on; a step that is shorter than that part lets the radius shrink.
_EDGE, _SHORT, _SHRINK = 0.9, 0.25, 0.3
# Runs that a model is made of: so many times the numbers that a quadratic has, at most.
_RUNS_OF_MODEL, _MOST_RUNS = 1.5, 250
# What D may be beside A, whose largest numbers are about 1: noise, and what a quadratic cannot follow.
_NOISES, _BENDS = (1e-12, 1e-8, 1e-5, 1e-3, 1e-1, 10.0), (1e-12, 1e-6, 1e-3)
_CANDIDATES = 64
_RESCALINGS = 3
# Rounds in turn that promise less than the noise of the runs, or than the loss's last digits.
_CALM, _DIGITS = 5, 1e-13
_MOST_MISHAPS = 4
# A loss so many times as far above the best as most others are counts as failed.
_TAMED = 1e3


@final
class QuadraticSearch:
    """The state between two rounds.

    Args:
        start: (d,) natural units. lower, upper: (d,) bounds. spread: of the first round's points about the start.
        seed: of the points. batch: runs a round. tolerance: the radius, natural units, at which there is nothing more.

    Attributes:
        rows: (n, d). losses: (n,), infinite where a run failed. best: (d,) and best_loss: of the run of least loss, or
            where runs are noisy of the one that the model says so of.
        note: what the last round did, in words. stopped: "" or why there is nothing more to do.
    """

    def __init__(
        self, start: Array, lower: Array, upper: Array, *, spread: float, seed: int, batch: int, tolerance: float
    ) -> None:
        self.start, self.lower, self.upper = start, lower, upper
        self.spread, self.seed, self.batch, self.tolerance = spread, seed, batch, tolerance
        d = len(start)
        self.rows, self.losses = np.zeros((0, d)), np.zeros(0)
        self.hessian = np.zeros((d, d))
        self.round, self.radius, self.calm, self.mishaps = 0, _FIRST_RADIUS * spread, 0, 0
        self.promise: tuple[float, float] | None = None  # loss at the base, and what the first point is to gain
        self.at_edge, self.noise = False, 0.0
        self.best, self.best_loss, self.scale = start, np.inf, spread
        self.note, self.stopped = "", ""
        self.points = self._first()

    def ask(self, most: int) -> Array:
        """(k, d) the points of the next round, no more than so many of them, and at least one."""
        self.points = self.points[: max(1, most)]
        return self.points

    def _rng(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, self.round]))

    def _first(self) -> Array:
        """The start, and one point along each of some orthogonal directions; away from a bound, not onto it."""
        d, rng = len(self.start), self._rng()
        count = max(d, self.batch - 1)
        turned = [np.linalg.qr(rng.normal(size=(d, d)))[0].T for _ in range(-(-count // d))]
        away = np.concatenate(turned)[:count] * self.spread * np.sqrt(min(d, 4))
        away *= rng.choice([-1.0, 1.0], size=(count, 1))
        points = self.start + away
        outside = (points < self.lower) | (points > self.upper)
        return np.clip(np.vstack([self.start, np.where(outside, self.start - away, points)]), self.lower, self.upper)

    def tell(self, losses: Array) -> None:
        """Takes the losses (k,) of `points`, infinite where a run failed, and finds the next `points`.

        Raises:
            EvaluationError: all runs so far have failed. InputError: the loss does not change.
        """
        before = len(self.rows)
        self.rows, self.losses = np.vstack([self.rows, self.points]), np.append(self.losses, losses)
        self.round += 1
        self.note = ""
        good = np.isfinite(self.losses)
        if not good.any():
            raise EvaluationError(
                f"Expected losses, got none: all {len(self.rows)} runs about the start failed. Try the start by "
                "itself, and bounds that keep away from where the simulator fails."
            )
        if self._flat(good):
            return
        try:
            self._choose(before)
            self.mishaps = 0
        except BridgeError:
            raise
        except (np.linalg.LinAlgError, ValueError, ArithmeticError) as problem:
            self._retreat(problem)

    def _flat(self, good: NDArray[np.bool_]) -> bool:
        """Whether the first round is repeated ten times as wide, since nothing changes."""
        if good.sum() < 2 or np.ptp(self.losses[good]) > 0:
            return False
        if self.round > _RESCALINGS:
            raise InputError(
                f"Expected a loss that changes with the parameters, got the same from all runs, also at "
                f"{self.spread:.3g} natural scales from the start. Check the natural scales of the parameters, the "
                "start, and that the simulator reads its parameters."
            )
        self.spread *= 10.0
        self.radius = _FIRST_RADIUS * self.spread
        self.best, self.best_loss = self.start, float(self.losses[good].min())
        self.note = f"the first scale was too small: nothing changes; trying {self.spread:.3g}"
        self.points = self._first()[1:]
        return True

    # -- the model -------------------------------------------------------------------------------------------------

    def _near(self, base: Array) -> NDArray[np.intp]:
        d = len(base)
        most = min(int(_RUNS_OF_MODEL * (d + 1) * (d + 2) / 2) + 1, max(_MOST_RUNS, 2 * d + 2))
        distance = np.abs(self.rows - base).max(axis=1)
        order = np.argsort(distance, kind="stable")
        # Far ones say nothing about what is here, once there are enough.
        enough = order[: d + 2]
        order = order[: max(len(enough), int((distance <= 8 * self.radius).sum()))][:most]
        return np.sort(order)

    def _values(self, near: NDArray[np.intp]) -> Array:
        """Losses, where failed runs and enormous losses stand for bad ones."""
        losses = self.losses[near]
        finite = losses[np.isfinite(losses)]
        least = float(finite.min())
        usual = float(np.median(finite)) - least
        most = least + _TAMED * usual if usual > 0 else float(finite.max())
        worst = min(float(finite.max()), most)
        return np.where(np.isfinite(losses), np.minimum(losses, most), worst + 0.5 * (worst - least))

    def _system(self, y: Array, noise: float, bend: float) -> Array:
        """The inverse of the model's system for differences y (n, d) of length 1 or less."""
        n, d = y.shape
        system = np.zeros((n + d + 1, n + d + 1))
        far = (y**2).sum(axis=1) ** 3
        system[:n, :n] = 0.5 * (y @ y.T) ** 2 + np.diag(noise + bend * far)
        system[:n, n], system[:n, n + 1 :] = 1.0, y
        system[n:, :n] = system[:n, n:].T
        inverse = np.linalg.inv(system)
        if not np.isfinite(inverse).all():
            raise np.linalg.LinAlgError("the model's system is singular")
        return np.asarray(inverse)

    def _fitted(self, base: Array) -> tuple[float, Array, Array, float]:
        """c, g and H about the base, and the standard deviation of the runs' noise."""
        near = self._near(base)
        away = self.rows[near] - base
        unit = float(np.sqrt((away**2).sum(axis=1)).max())
        if not unit > 0:
            raise np.linalg.LinAlgError("all runs are at one place")
        y, values = away / unit, self._values(near)
        before = self.hessian * unit**2
        middle = float(values.min())
        size = max(float(np.abs(values - middle).max()), 1e-300)
        left = (values - middle - 0.5 * np.einsum("ij,jk,ik->i", y, before, y)) / size
        n, d = y.shape
        trust = 1 / (1 + ((away / self.radius) ** 2).sum(axis=1)) ** 2
        best, chosen = np.inf, (_NOISES[0], _BENDS[0])
        if n > d + 2:
            for bend in _BENDS:
                for noise in _NOISES if d <= 10 else _NOISES[::2]:
                    try:
                        inverse = self._system(y, noise, bend)
                    except np.linalg.LinAlgError:
                        continue
                    own = np.maximum(np.diag(inverse)[:n], 1e-300)
                    missed = (inverse[:n, :n] @ left) / own
                    score = float(trust @ missed**2)
                    if np.isfinite(score) and score < 0.98 * best:
                        best, chosen = score, (noise, bend)
        inverse = self._system(y, *chosen)
        solution = inverse[:, :n] @ left
        H = before / size + (y * solution[:n, None]).T @ y
        predicted = solution[n] + y @ solution[n + 1 :] + 0.5 * np.einsum("ij,jk,ik->i", y, H, y)
        missed = (values - middle) / size - predicted
        open_ = max(n - min(n - 1, (d + 1) * (d + 2) // 2), 1)
        noise = float(np.sqrt((trust @ missed**2) / max(trust.sum(), 1e-300) * n / open_)) if chosen[0] > 1e-4 else 0.0
        c, g = middle + size * float(solution[n]), size * solution[n + 1 :] / unit
        return c, g, size * H / unit**2, noise * size

    def _least(self, g: Array, H: Array, base: Array, radius: float) -> Array:
        """The step, from the base, to the least value of the model in a box."""
        lower, upper = np.maximum(self.lower - base, -radius), np.minimum(self.upper - base, radius)
        lower, upper = np.minimum(lower, 0.0), np.maximum(upper, 0.0)
        size = max(float(np.abs(g).max()) * radius, float(np.abs(H).max()) * radius**2, 1e-300)

        def model(s: Array) -> tuple[float, Array]:
            slope = H @ (s * radius)
            return float((g + 0.5 * slope) @ s) * radius / size, (g + slope) * radius / size

        curvature = np.linalg.eigvalsh(H)
        newton = -np.linalg.solve(H + (max(1e-9 * float(np.abs(curvature).max()), 1e-300)) * np.eye(len(g)), g)
        best, value = np.zeros(len(g)), 0.0
        for begin in (np.zeros(len(g)), -np.sign(g) * radius, newton):
            begin = np.clip(begin, lower, upper)
            found = minimize(
                model,
                begin / radius,
                jac=True,
                method="L-BFGS-B",
                bounds=list(zip(lower / radius, upper / radius, strict=True)),
                options={"maxiter": 200, "ftol": 1e-15, "gtol": 1e-12},
            )
            for s in (np.clip(found.x * radius, lower, upper), begin):
                after = model(s / radius)[0]
                if np.isfinite(after) and after < value:
                    best, value = s, after
        return best

    # -- rounds ----------------------------------------------------------------------------------------------------

    def _choose(self, before: int) -> None:
        least = int(np.argmin(self.losses))
        base, loss = self.rows[least], float(self.losses[least])
        self._resize(before, loss)
        c, g, H, noise = self._fitted(base)
        if noise > 0:
            base, c, g = self._smoothed_base(base, c, g, H)
            loss = c
        self.hessian, self.noise = H, noise
        step = self._least(g, H, base, self.radius)
        gain = -float(g @ step + 0.5 * step @ H @ step)
        length = float(np.abs(step).max())
        self.at_edge = length > _EDGE * self.radius
        self.best, self.best_loss, self.scale = base, loss, max(length, 1e-300)
        self.promise = (loss, gain)
        if length < _SHORT * self.radius and self._filled_up(base):
            # The model is to be right where the next steps are.
            self.radius = max(_SHRINK * self.radius, 2 * length, 0.5 * self.tolerance)
        points = [base + step] if length > 0 else []
        if self.at_edge and self.batch > len(points):
            points.append(base + self._least(g, H, base, _FAR * self.radius))
        points = self._apart([np.clip(p, self.lower, self.upper) for p in points])
        self.points = self._filled(points, base)
        self._maybe_stop(gain, loss)

    def _resize(self, before: int, loss: float) -> None:
        if self.promise is None:
            return
        was, promised = self.promise
        got = was - float(self.losses[before:].min())
        ratio = got / promised if promised > 0 and np.isfinite(got) else -1.0
        if ratio < 0.1 and self._filled_up(self.best):
            self.radius *= 0.5
        elif ratio > 0.5 and self.at_edge:
            found = self.rows[before + int(np.argmin(self.losses[before:]))]
            self.radius = max(2.0 * self.radius, float(np.abs(found - self.best).max()))
            self.note = "the trust region grows"
        self.radius = float(np.clip(self.radius, 0.5 * self.tolerance, _LARGEST * self.spread))

    def _filled_up(self, base: Array) -> bool:
        """Whether so many runs are near that it is the region that is too large, not the model too poor."""
        d = len(base)
        near = int((np.abs(self.rows - base).max(axis=1) <= 2 * self.radius).sum())
        return near >= min(2 * d + 1, (d + 1) * (d + 2) // 2)

    def _smoothed_base(self, base: Array, c: float, g: Array, H: Array) -> tuple[Array, float, Array]:
        """The run within the region that the model finds least: where runs are noisy the least of many is luck."""
        within = np.flatnonzero((np.abs(self.rows - base).max(axis=1) <= self.radius) & np.isfinite(self.losses))
        away = self.rows[within] - base
        said = c + away @ g + 0.5 * np.einsum("ij,jk,ik->i", away, H, away)
        i = int(np.argmin(said))
        return self.rows[within[i]], float(said[i]), g + H @ away[i]

    def _apart(self, points: list[Array]) -> list[Array]:
        kept: list[Array] = []
        for p in points:
            others = np.vstack([self.rows, *[k[None] for k in kept]])
            if self.noise > 0 or float(np.abs(others - p).max(axis=1).min()) > 1e-3 * min(self.radius, self.scale):
                kept.append(p)
        return kept

    def _filled(self, points: list[Array], base: Array) -> Array:
        """The round's other points: where the model's system, which does not know of losses, leaves most open."""
        rng, d = self._rng(), len(base)
        near = self._near(base)
        lower, upper = np.maximum(self.lower, base - self.radius), np.minimum(self.upper, base + self.radius)
        while len(points) < self.batch:
            rows = np.vstack([self.rows[near], *[p[None] for p in points]]) - base
            unit = float(np.sqrt((rows**2).sum(axis=1)).max())
            candidates = lower + (upper - lower) * rng.uniform(size=(_CANDIDATES, d))
            z = (candidates - base) / unit
            try:
                inverse = self._system(rows / unit, 1e-9, 1e-6)
                features = np.hstack([0.5 * (z @ (rows / unit).T) ** 2, np.ones((len(z), 1)), z])
                open_ = 0.5 * (z**2).sum(axis=1) ** 2 - np.einsum("ij,jk,ik->i", features, inverse, features)
            except np.linalg.LinAlgError:
                open_ = np.abs(candidates - base).min(axis=1)
            points.append(candidates[int(np.argmax(np.where(np.isfinite(open_), open_, -np.inf)))])
        return np.array(points[: max(self.batch, 1)])

    def _maybe_stop(self, gain: float, loss: float) -> None:
        digits = _DIGITS * abs(loss) + 1e-300
        small = max(0.1 * self.noise / np.sqrt(len(self.rows)), digits)
        if gain > small or self.at_edge:
            self.calm = 0
        elif self._filled_up(self.best):
            # What a quadratic misses is no noise if it goes away nearer by.
            self.calm += 1
            self.radius *= 0.5 if self.noise > 0 else 0.1
        if self.radius <= self.tolerance or self.calm >= _CALM:
            self.stopped = "converged"

    def _retreat(self, problem: Exception) -> None:
        self.mishaps += 1
        least = int(np.argmin(self.losses))
        self.best, self.best_loss = self.rows[least], float(self.losses[least])
        self.hessian, self.promise, self.at_edge = np.zeros_like(self.hessian), None, False
        self.radius *= 0.5
        self.note = f"the model of the loss has failed ({problem}): points at random, nearer to the best run"
        if self.mishaps >= _MOST_MISHAPS:
            self.stopped = "numerics"
            return
        away = self._rng().uniform(-1.0, 1.0, (max(self.batch, len(self.start)), len(self.start))) * self.radius
        self.points = np.clip(self.best + away, self.lower, self.upper)

    # -- between two jobs --------------------------------------------------------------------------------------------

    _KEPT = (
        *("rows", "losses", "hessian", "round", "radius", "calm", "mishaps", "promise", "at_edge", "noise", "best"),
        *("best_loss", "scale", "note", "stopped", "points", "spread"),
    )

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._KEPT}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, saved[name])
        self.promise = None if saved["promise"] is None else (saved["promise"][0], saved["promise"][1])
