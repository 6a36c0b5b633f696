"""A fit as a view at the bottom of a terminal."""

from __future__ import annotations

import atexit
import contextlib
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO, final

from bridge.reporting.lines import Lines, Pace, is_terminal
from bridge.reporting.result import FitResult, FitStep
from bridge.reporting.text import (
    ASCII_BLOCKS,
    BLOCKS,
    describe_end,
    format_duration,
    format_rate,
    format_value,
    gauge,
    printable,
    sparkline,
)
from bridge.simulator.space import ParameterSpace

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live
    from rich.table import Table

_NOTES = 3


@final
class _Terminal:
    """A stream whose reader may go away at any time: what cannot be written is lost, and nobody is bothered."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        return is_terminal(self._stream)

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:
        return self._stream.encoding


@final
class LiveView:
    """A view of the fit at the bottom of the terminal, renewed four times a second; what is printed scrolls above it.

    Loss and its course, standard error of the gradient, parameters with standard errors and their place between
    bounds, runs a second, failures, the longest time that is left, and the last notes. It fits itself to the size of
    the terminal, follows NO_COLOR, and keeps to plain `Lines` where there is no terminal or a dumb one.

    Args:
        console: of rich; stderr if left out.
        refresh_per_second: how often it is renewed between steps, by a thread; 0 renews at steps only.
        clock: seconds.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        refresh_per_second: float = 4.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._given, self._per_second, self._clock = console, refresh_per_second, clock
        self._lock = threading.RLock()
        self._live: Live | None = None
        self._lines: Lines | None = None

    def start(self, space: ParameterSpace, *, max_steps: int | None, max_runs: int | None, title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        stream = sys.stderr
        console = self._given
        if console is None:
            # Not rich's own judgement, which FORCE_COLOR turns: a log must not be filled with cursor movements.
            console = Console(
                file=_Terminal(stream),  # type: ignore[arg-type]  # the part of a stream that rich uses
                force_terminal=is_terminal(stream),
                force_jupyter=False,
                highlight=False,
            )
        if not console.is_terminal or console.is_dumb_terminal:
            self._lines = Lines(console.file if self._given is not None else stream, clock=self._clock)
            self._lines.start(space, max_steps=max_steps, max_runs=max_runs, title=title)
            return
        self._space, self._max_steps, self._max_runs, self._title = space, max_steps, max_runs, printable(title)
        self._console = console
        self._ascii = not console.encoding.lower().startswith("utf")
        self._begin = self._drawn = self._clock()
        self._pace = Pace(self._begin, max_steps, max_runs)
        self._losses: list[float] = []
        self._last: FitStep | None = None
        self._notes: deque[str] = deque(maxlen=_NOTES)
        self._end: str | None = None
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=self._per_second > 0,
            refresh_per_second=self._per_second or 1.0,
            redirect_stdout=is_terminal(sys.stdout),  # stdout in a file is none of the terminal's business
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)
        atexit.register(self._stop)  # a terminal without its cursor is a poor farewell

    def step(self, record: FitStep) -> None:
        if self._lines is not None:
            self._lines.step(record)
            return
        now = self._clock()
        with self._lock:
            self._pace.add(record, now)
            self._losses.append(record.loss)
            self._last = record
            if record.note:
                self._notes.append(f"step {record.step}: {printable(record.note)}")
        # A simulator that keeps Python's lock leaves the thread no time.
        if self._live is not None and now - self._drawn >= 0.2:
            self._drawn = now
            self._live.refresh()

    def end(self, result: FitResult | None) -> None:
        if self._lines is not None:
            self._lines.end(result)
            return
        with self._lock:
            if result is None:
                self._end = "ended early"
            else:
                self._end = f"{describe_end(result.stop_reason)}, {result.num_evaluations:,} runs"
        self._stop()

    def _stop(self) -> None:
        live, self._live = self._live, None
        atexit.unregister(self._stop)
        if live is not None:
            live.stop()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        with self._lock:
            width, height = self._console.size
            now = self._clock()
            record, rows = self._last, self._head(width, now)
            done = self._done(record)
            bar: list[RenderableType] = []
            if done is not None:
                cells = max(10, min(width - 1, 80))
                filled = round(done * cells)
                full, empty = ("#", ".") if self._ascii else ("━", "─")
                bar.append(Text.assemble((full * filled, "cyan"), (empty * (cells - filled), "dim"), no_wrap=True))
            notes = [Text("  " + n, style="dim", no_wrap=True, overflow="ellipsis") for n in self._notes]
            space_left = height - len(rows) - len(bar) - len(notes) - 2
            table = [] if record is None else [self._table(record, width, max(1, space_left))]
            return Group(*rows[:1], *bar, *rows[1:], *table, *notes)

    def _done(self, record: FitStep | None) -> float | None:
        """The fraction of the limit that will be met first."""
        if self._max_steps is None and self._max_runs is None:
            return None
        if record is None:
            return 0.0
        steps = (record.step + 1) / self._max_steps if self._max_steps else 0.0
        runs = record.num_evaluations / self._max_runs if self._max_runs else 0.0
        return min(1.0, max(steps, runs))

    def _head(self, width: int, now: float) -> list[RenderableType]:
        from rich.text import Text

        record = self._last
        title = Text(self._title or "fit", style="bold", no_wrap=True, overflow="ellipsis")
        elapsed = format_duration(now - self._begin)
        if record is None:
            return [title, *_packed([(f"{elapsed}, first step", "dim")], width)]
        limit = "" if self._max_steps is None else f" of {self._max_steps}"
        pieces = [(f"step {record.step + 1}{limit}", ""), (elapsed, "")]
        if self._end is not None:
            pieces.append((self._end, "bold"))
        elif (left := self._pace.left_s(now)) is not None:
            pieces.append((f"at most {format_duration(left)} left", "cyan"))
        loss = [(f"loss {record.loss:.5g}", "bold" if math.isfinite(record.loss) else "bold red")]
        if trace := sparkline(self._losses, max(8, min(40, width - 60)), ASCII_BLOCKS if self._ascii else BLOCKS):
            loss.append((trace, "cyan"))
        if record.gradient_error is not None:
            noisy = record.gradient_error > 1
            sign = "+-" if self._ascii else "±"
            loss.append((f"gradient {sign}{100 * record.gradient_error:.2g} %", "yellow" if noisy else ""))
        loss.append((f"scale {record.scale:.3g}", "dim"))
        limit = "" if self._max_runs is None else f" of {self._max_runs:,}"
        runs = [(f"{record.num_evaluations:,}{limit} runs", "")]
        if (rate := self._pace.runs_per_s) is not None:
            runs.append((f"{format_rate(rate)} runs/s", ""))
        if record.num_failed:
            runs.append((f"{record.num_failed:,} failed", "red"))
        if record.num_cached:
            runs.append((f"{record.num_cached:,} found in the store", "dim"))
        if record.num_surrogate:
            runs.append((f"{record.num_surrogate:,} of the surrogate", "dim"))
        return [title, *_packed(pieces, width), *_packed(loss, width), *_packed(runs, width)]

    def _table(self, record: FitStep, width: int, rows: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, overflow="ellipsis", min_width=4, max_width=max(8, width // 3))
        table.add_column(justify="right", no_wrap=True)
        for _ in range(3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        shown = self._space.dimension if self._space.dimension <= rows else max(1, rows - 1)
        for i, parameter in enumerate(self._space.parameters[:shown]):
            value, error = record.parameters[i], None
            if record.standard_error is not None and math.isfinite(record.standard_error[i]):
                error = record.standard_error[i]
            cells = [Text(printable(parameter.name)), Text(format_value(value, error), style="bold")]
            sign = "+-" if self._ascii else "±"
            cells.append(Text("" if error is None or width < 40 else f"{sign} {format_value(error, error)}"))
            cells.append(Text(printable(parameter.unit), style="dim"))
            at_bound = value <= parameter.lower or value >= parameter.upper
            place = gauge(value, parameter, 11, self._ascii) if width >= 60 else ""
            cells.append(Text(place, style="yellow" if at_bound else "dim"))
            table.add_row(*cells)
        if shown < self._space.dimension:
            table.add_row(Text(f"{self._space.dimension - shown} more", style="dim"))
        return table


def _packed(pieces: Sequence[tuple[str, str]], width: int) -> list[RenderableType]:
    """Pieces of (text, style), two blanks apart, on as few lines as they need."""
    from rich.text import Text

    lines: list[Text] = []
    for text, style in pieces:
        if not lines or lines[-1].cell_len + 2 + len(text) > width:
            lines.append(Text(no_wrap=True, overflow="ellipsis"))
        elif lines[-1].cell_len:
            lines[-1].append("  ")
        lines[-1].append(text, style=style or None)
    return list(lines)
