"""What a fit says while it runs, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from bridge.arrays import Array
from bridge.checks import is_number
from bridge.errors import InputError
from bridge.reporting.text import describe_end, format_duration, format_value, printable
from bridge.simulator.space import ParameterSpace


@dataclass(frozen=True)
class FitStep:
    """One line of the history.

    Attributes:
        step: its number. loss: at `parameters`, of the smoothed output. scale: of the noise, in natural units.
        parameters: (d,) before the update. num_evaluations: simulator runs so far.
        standard_error: of the parameters so far, as far as the method knows it.
        gradient_error: standard error of the loss's gradient over its norm, as far as the method knows it.
        num_failed: failed runs so far. num_cached: of `num_evaluations`, found in a store instead of run anew.
        num_surrogate: runs of the surrogate so far. note: what the method did, in words.
    """

    step: int
    loss: float
    scale: float
    parameters: tuple[float, ...]
    num_evaluations: int
    standard_error: tuple[float, ...] | None = None
    gradient_error: float | None = None
    num_failed: int = 0
    note: str = ""
    num_cached: int = field(default=0, compare=False)  # another cost, not another fit
    num_surrogate: int = 0


@dataclass(frozen=True)
class FitEnd:
    """Where one of several starts has come to.

    Attributes:
        start, parameters: (d,). loss: of those that were kept to the end that of the simulator's output there, as
            of the whole fit; of others that of the last smoothed output.
        steps: that it was given.
    """

    start: Array
    parameters: Array
    loss: float
    steps: int


@dataclass(frozen=True)
class FitResult:
    """How a fit ended.

    Attributes:
        space: names and units of the parameters.
        parameters: (d,) recovered values. start: (d,) where it began; of several starts, that of the best.
        standard_error: (d,) statistical error of the recovered values: the square roots of the covariance's diagonal;
            None with a loss of one's own; infinite where a parameter is not determined; 0 where it was fixed.
        loss: of `output`, the same for every method: 1/2 sum (output - target)^2 / variance (variance 1 where none is
            given), and the prior's 1/2 sum (parameter - mean)^2 / deviation^2. See `bridge.fitting.goodness.Goodness`,
            also for chi_square, dof, p_value and loss_share (of each output, of the target's shape).
        stop_reason: "converged", "standard_error" (they are as small as was asked), "max_steps", "max_runs",
            "max_time", "interrupted", "numerics" (the method's own arithmetic failed; these are the best so far),
            "failures" (hardly a run is of any use where it was going) or "no_better" (than the start).
        history: one `FitStep` a step.
        num_evaluations: simulator runs, all ranks together, those of the surrogate apart (`num_surrogate`).
        num_cached: of these, found in a store instead of run anew: what was finished before an interruption, or is in a
            `Store` of one's own. The result does not depend on it.
        wall_s: duration [s].
        covariance: (d, d) of the recovered values, (J^T V^-1 J + P)^-1, V the variance of the target: the one given,
            or else the mean squared residual; P the precision of the prior. With a robust loss the sandwich of
            `bridge.fitting.normal.of_robust`.
            Of descents J^T V^-1 J without what the noise of the estimated J adds to it, as far as two Jacobians tell,
            and with what that noise adds to the errors of Gauss-Newton's steps (`bridge.fitting.normal.Normal`).
            In V is also what the simulator's own noise leaves in the estimate, and 1/12 of the square of the step of
            outputs that have one. Residuals too large for the variance scale it. NaN where no error is stated, and
            for a parameter at its bound; `warnings` says why.
        interval_dof: degrees of freedom of Student's t in `interval`, infinite where the variance is known.
        warnings: what the target does not determine, and why errors are not stated, in words.
        num_reused: evaluations of earlier runs that it began with (`reuse=`), not among `num_evaluations`.
        num_failed: runs that failed.
        method: that was used. method_reason: why.
        ends: one `FitEnd` for each of several starts, in the order given; empty for one, and for kriging, whose one
            model takes the runs of all.
        output, start_output: the simulator's (unperturbed) output at `parameters` and at `start`; NaN where that run
            failed and failures are not raised.
    """

    space: ParameterSpace
    parameters: Array
    start: Array
    standard_error: Array | None
    loss: float
    stop_reason: str
    history: tuple[FitStep, ...] = field(repr=False)
    num_evaluations: int
    wall_s: float
    output: NDArray[Any] = field(repr=False)
    start_output: NDArray[Any] = field(repr=False)
    covariance: Array | None = field(default=None, repr=False)
    warnings: tuple[str, ...] = ()
    num_reused: int = 0
    num_failed: int = 0
    method: str = ""
    num_cached: int = 0
    num_surrogate: int = 0
    method_reason: str = ""
    ends: tuple[FitEnd, ...] = field(default=(), repr=False)
    chi_square: float | None = None
    dof: int | None = None
    p_value: float | None = None
    loss_share: Array | None = field(default=None, repr=False)
    interval_dof: float = np.inf

    def interval(self, level: float = 0.95) -> tuple[Array, Array]:
        """Lower and upper ends, (d,) each, of intervals that hold the true value with this probability.

        Student's t times the standard error about the value, where the variance of the target comes from the
        residuals, else the normal distribution's quantile; cut at the parameter's bounds. NaN where no error is stated.
        """
        if not is_number(level) or not 0 < level < 1:
            raise InputError(f"Expected a level between 0 and 1, such as 0.95, got {level!r}.")
        if self.standard_error is None:
            nothing = np.full(len(self.parameters), np.nan)
            return nothing, nothing.copy()
        p = 0.5 + level / 2
        reach = float(ndtri(p) if np.isinf(self.interval_dof) else stdtrit(self.interval_dof, p))
        away = reach * self.standard_error
        lower, upper = self.parameters - away, self.parameters + away
        return np.maximum(lower, self.space.lower), np.minimum(upper, self.space.upper)

    def __getitem__(self, name: str) -> float:
        """The recovered value of a parameter, by its name."""
        if name not in self.space.names:
            raise InputError(f"Expected one of the parameters {', '.join(self.space.names)}, got {name!r}.")
        return float(self.parameters[self.space.names.index(name)])

    def __str__(self) -> str:
        """The table that `bridge fit` prints: parameters, how well the target is explained, cost, and warnings."""
        rows = [("parameter", "recovered", "std. error", "start", "unit")]
        for i, p in enumerate(self.space.parameters):
            value, error = float(self.parameters[i]), None
            if self.standard_error is not None:
                error = float(self.standard_error[i])
            shown = "-" if error is None or np.isnan(error) else format_value(error, error)
            rows.append((printable(p.name), format_value(value, error), shown, f"{self.start[i]:.6g}", p.unit))
        widths = [max(len(row[k]) for row in rows) for k in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        ]
        lines += [self.how_good(), self.how_dear()]
        for text in self.warnings:
            lines += wrap(printable(text), 100, initial_indent="! ", subsequent_indent="  ")
        return "\n".join(lines)

    def how_good(self) -> str:
        """How well the target is explained, in one line."""
        if self.chi_square is not None:
            words = f"chi-square {self.chi_square:.4g} for {self.dof} degrees of freedom"
            return words + ("" if self.p_value is None else f" (p {_probability(self.p_value)})")
        words = f"loss {self.loss:.5g}"
        if self.dof is None:
            return words
        return f"{words}, half the sum of squared residuals, of {self.dof} degrees of freedom"

    def how_dear(self) -> str:
        """How the fit ended and what it took, in one line."""
        words = (
            f"{describe_end(self.stop_reason)} after {len(self.history)} steps, {self.num_evaluations:,} simulations"
        )
        counts = "".join(f", {text}" for text in self.counts())
        return f"{words}{counts}, {format_duration(self.wall_s)}" + (f" ({self.method})" if self.method else "")

    def largest_shares(self, count: int = 5) -> list[tuple[tuple[int, ...], float]]:
        """The outputs that are most of the sum of squared residuals: their indices and shares, largest first."""
        share = self.loss_share
        if share is None or not np.isfinite(share).all() or not share.any():
            return []
        flat = np.argsort(-share.reshape(-1), kind="stable")[:count]
        at = [tuple(int(k) for k in np.unravel_index(i, share.shape)) for i in flat]
        return [(index, float(share[index])) for index in at]

    def counts(self) -> list[str]:
        """What there is to say of the runs besides their number."""
        found = self.num_cached
        words = (
            (self.num_failed, f"{self.num_failed:,} failed"),
            (found, f"{found:,} found in the store, {self.num_evaluations - found:,} carried out"),
            (self.num_reused, f"{self.num_reused:,} of earlier runs used again"),
            (self.num_surrogate, f"{self.num_surrogate:,} of the surrogate besides"),
        )
        return [text for number, text in words if number]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: each parameter with unit, start and standard error, and how the run ended."""
        parameters = {}
        for i, p in enumerate(self.space.parameters):
            entry: dict[str, Any] = {
                "value": float(self.parameters[i]),
                "unit": p.unit,
                "start": float(self.start[i]),
            }
            if self.standard_error is not None:
                error = float(self.standard_error[i])
                entry["standard_error"] = error if np.isfinite(error) else None
            parameters[p.name] = entry
        return {
            "parameters": parameters,
            "stop_reason": self.stop_reason,
            "loss": _number(self.loss),
            "chi_square": _number(self.chi_square),
            "dof": self.dof,
            "p_value": _number(self.p_value),
            "largest_shares": [{"index": list(i), "share": share} for i, share in self.largest_shares()],
            "steps": len(self.history),
            "num_evaluations": self.num_evaluations,
            "num_failed": self.num_failed,
            "num_reused": self.num_reused,
            "num_cached": self.num_cached,
            "num_surrogate": self.num_surrogate,
            "method": self.method,
            "method_reason": self.method_reason,
            "warnings": list(self.warnings),
            "ends": [
                {"start": e.start.tolist(), "parameters": e.parameters.tolist(), "loss": e.loss, "steps": e.steps}
                for e in self.ends
            ],
            "wall_s": round(self.wall_s, 3),
        }


def _probability(p: float) -> str:
    if p > 0.99:
        return "> 0.99"
    return f"= {p:.2g}" if p >= 1e-12 else "< 1e-12"


def _number(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if value is not None and np.isfinite(value) else None
