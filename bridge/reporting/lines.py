"""A fit as plain lines, for logs; and how fast it goes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any, final

from bridge.reporting.result import FitResult, FitStep
from bridge.reporting.text import describe_end, format_rate, printable
from bridge.simulator.space import ParameterSpace


@final
class Pace:
    """How fast a fit goes, over its last steps, and how long it may still take. Times are of one clock [s].

    What comes in the first quarter of a second counts as told again by a resumed fit: it was not paid for now.
    """

    def __init__(self, now: float, max_steps: int | None, max_runs: int | None) -> None:
        self._begin, self._max_steps, self._max_runs = now, max_steps, max_runs
        self._window: deque[tuple[float, int, int]] = deque(maxlen=30)

    def add(self, record: FitStep, now: float) -> None:
        if now - self._begin < 0.25:
            self._window.clear()
        self._window.append((now, record.step + 1, record.num_evaluations))

    def _since(self) -> tuple[float, int, int] | None:
        if len(self._window) < 2 or self._window[-1][0] <= self._window[0][0]:
            return None
        (t0, s0, r0), (t1, s1, r1) = self._window[0], self._window[-1]
        return t1 - t0, s1 - s0, r1 - r0

    @property
    def runs_per_s(self) -> float | None:
        since = self._since()
        return since[2] / since[0] if since else None

    def left_s(self, now: float) -> float | None:
        """The longest that the limits leave; the fit may converge before."""
        since = self._since()
        if since is None:
            return None
        seconds, steps, runs = since
        last, step, num_evaluations = self._window[-1]
        bounds = []
        if self._max_steps is not None and steps > 0:
            bounds.append((self._max_steps - step) * seconds / steps)
        if self._max_runs is not None and runs > 0:
            bounds.append((self._max_runs - num_evaluations) * seconds / runs)
        return max(0.0, min(bounds) - (now - last)) if bounds else None


def is_terminal(stream: Any) -> bool:
    """Whether people read the stream."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # none at all, or closed
        return False


@final
class Lines:
    """A plain line now and then, for logs: about twenty of a fit, and one after each half minute of silence.

    Args:
        file: where to; stderr of the time when the fit starts if left out.
    """

    def __init__(self, file: IO[str] | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._file, self._clock = file, clock

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        self._space, self._max_steps = space, max_steps
        self._out = sys.stderr if self._file is None else self._file
        self._said = self._clock()
        self._pace = Pace(self._said, max_steps, max_runs)

    def step(self, record: FitStep) -> None:
        now = self._clock()
        self._pace.add(record, now)
        if record.step % max(1, (self._max_steps or 200) // 20) and now - self._said < 30 and not record.note:
            return
        self._said = now
        limit = "" if self._max_steps is None else f"/{self._max_steps}"
        parts = [f"step {record.step:4d}{limit}", f"loss {record.loss:.5g}", f"{record.num_evaluations} runs"]
        if (rate := self._pace.runs_per_s) is not None:
            parts[-1] += f" ({format_rate(rate)}/s)"
        if record.num_failed:
            parts.append(f"{record.num_failed} failed")
        if record.num_cached:
            parts.append(f"{record.num_cached} found in the store")
        if record.num_surrogate:
            parts.append(f"{record.num_surrogate} of the surrogate")
        parts += [
            f"{printable(p.name)} {v:.4g}"
            for p, v in tuple(zip(self._space.parameters, record.parameters, strict=True))[:6]
        ]
        if self._space.dimension > 6:
            parts.append(f"and {self._space.dimension - 6} more")
        if record.note:
            parts.append(printable(record.note))
        self._print("  ".join(parts))

    def end(self, result: FitResult | None) -> None:
        if result is not None:
            self._print(f"fit {describe_end(result.stop_reason)}: {result.num_evaluations} runs")

    def _print(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # whoever read it may have gone
            print(line, file=self._out, flush=True)
