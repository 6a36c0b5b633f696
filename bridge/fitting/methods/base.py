"""What a method of fitting is, to the fit that drives it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.fitting.uncertainty import Stated
from bridge.reporting.result import FitEnd

# Steps of less than this part of the errors asked for are small against them.
SMALL_STEP = 0.25


@dataclass(frozen=True)
class MethodResult:
    """What a method says at its end, of the free parameters in natural units.

    Attributes:
        x, start: (d,) the best, and where that began. stated: its errors, None with a loss of one's own.
        output, start_output: of the simulator itself at these. num_evaluations: that the end has taken.
        num_failed: of all runs. num_reused: evaluations of earlier fits that it began with.
        ends: of all starts, where there are several that go on side by side.
        at_limit: whether the last step was as long as it might be. warnings: in words.
        noise: variance of one run of the simulator, over that of the target, averaged over outputs; 0 if unknown.
        no_better: whether it is worse than the start.
    """

    x: Array
    start: Array
    loss: float
    stated: Stated | None
    output: NDArray[Any]
    start_output: NDArray[Any]
    num_evaluations: int
    num_failed: int
    num_reused: int = 0
    ends: tuple[FitEnd, ...] = ()
    at_limit: bool = False
    noise: float = 0.0
    no_better: bool = False
    warnings: tuple[str, ...] = ()
