"""What a fit says while it runs, and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.simulator import ParameterSpace

Array = NDArray[np.float64]


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
class FitResult:
    """How a fit ended.

    Attributes:
        space: names and units of the parameters.
        parameters: (d,) recovered values. start: (d,) where it began.
        standard_error: (d,) statistical error of the recovered values: the square roots of the covariance's diagonal;
            None with a loss of one's own, or where a parameter does not act on the smoothed output; with
            method="kriging" that parameter's error is infinite. 0 where a parameter was fixed.
        loss: final value: of the smoothed output at the last scale, 1/2 mean, or with method="kriging" of the model at
            the end, 1/2 sum.
        stop_reason: "converged", "max_steps", "max_runs", "max_time" or "interrupted".
        history: one `FitStep` a step.
        num_evaluations: simulator runs, all ranks together, those of the surrogate apart (`num_surrogate`).
        num_cached: of these, found in a store instead of run anew: what was finished before an interruption, or is in a
            `store=` of one's own. The result does not depend on it.
        wall_s: duration [s].
        covariance: (d, d) of the recovered values, (J^T V^-1 J)^-1, V the variance of the target: the one given, or
            else the mean squared residual.
        warnings: what the target does not determine, in words.
        num_reused: evaluations of earlier runs that it began with (`reuse=`), not among `num_evaluations`.
        num_failed: runs that failed.
        method: that was used.
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
            "loss": self.loss,
            "steps": len(self.history),
            "num_evaluations": self.num_evaluations,
            "num_failed": self.num_failed,
            "num_reused": self.num_reused,
            "num_cached": self.num_cached,
            "num_surrogate": self.num_surrogate,
            "method": self.method,
            "warnings": list(self.warnings),
            "wall_s": round(self.wall_s, 3),
        }
