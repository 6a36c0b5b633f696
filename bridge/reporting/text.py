"""Numbers and reasons in words and characters, for terminals and pages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bridge.simulator.space import Parameter

BLOCKS, ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "._-=+*%#"


def printable(text: str) -> str:
    """Text of others on one line of a terminal: escape sequences and other control characters become `?`."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def format_value(value: float, error: float | None = None) -> str:
    """A number to six digits; with a standard error to the second digit of that error."""
    if error is None or not (math.isfinite(error) and error > 0 and math.isfinite(value)):
        return f"{value:.6g}"
    decimals = 1 - math.floor(math.log10(float(f"{error:.1e}")))
    if -3 <= decimals <= 9 and abs(value) < 1e9:
        return f"{value:.{max(0, decimals)}f}"
    digits = max(0, min(15, decimals + math.floor(math.log10(abs(value))))) if value else 0
    return f"{value:.{digits}e}"


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 12 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    for size, name, small, small_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {name}" + (f" {rest} {small_name}" if rest else "")
    return f"{whole} s"


def format_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def describe_end(stop_reason: str) -> str:
    """The reason for which a fit ended, in words."""
    known = {
        "max_steps": "stopped at the largest number of steps",
        "max_runs": "stopped at the largest number of runs",
        "max_time": "stopped at the time limit",
        "standard_error": "ended with standard errors as small as asked",
        "interrupted": "was interrupted",
    }
    return known.get(stop_reason, printable(stop_reason).replace("_", " "))


def sparkline(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """A series as `width` characters at most, each the mean over a stretch of it; blank where nothing is finite.

    Heights are logarithmic where all values are positive and differ by more than a factor of 20.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite or width < 1:
        return ""
    logarithmic = min(finite) > 0 and max(finite) > 20 * min(finite)
    n = min(width, len(values))
    means: list[float | None] = []
    for i in range(n):
        part = [v for v in values[i * len(values) // n : (i + 1) * len(values) // n] if math.isfinite(v)]
        heights = [math.log(v) if logarithmic else v for v in part]
        means.append(math.fsum(h / len(heights) for h in heights) if heights else None)
    known = [m for m in means if m is not None]
    low, high = min(known), max(known)
    span = high / 2 - low / 2  # halved: the difference itself may overflow
    top = len(blocks) - 1
    return "".join(
        " " if m is None else blocks[round(top * ((m / 2 - low / 2) / span)) if span > 0 else 0] for m in means
    )


def gauge(value: float, parameter: Parameter, width: int = 11, ascii_only: bool = False) -> str:
    """Where a value lies between its bounds, as a small scale; "" where a bound is missing."""
    lower, upper = parameter.lower, parameter.upper
    if not (math.isfinite(lower) and math.isfinite(upper) and math.isfinite(value)):
        return ""
    line, left, right, mark = ("-", "|", "|", "o") if ascii_only else ("─", "├", "┤", "●")
    fraction = (value / 2 - lower / 2) / (upper / 2 - lower / 2)
    cells = [left, *line * (width - 2), right]
    cells[max(0, min(width - 1, round(fraction * (width - 1))))] = mark
    return "".join(cells)
