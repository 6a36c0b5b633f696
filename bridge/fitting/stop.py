"""When a fit ends before its method would end it: the settings of `stop=`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from bridge.checks import Settings, as_whole, is_number, is_whole
from bridge.errors import InputError


@final
@dataclass(frozen=True)
class Stop(metaclass=Settings):
    """When a fit ends, whatever its method would go on to do.

    Attributes:
        runs: the budget, with what is run at the end; by default the method's own.
        seconds: ends after the step in which so much time has passed since the call. The result then depends on the
            machine.
        error: natural units, or name -> in its unit: ends when, twice in turn, all standard errors are at most these
            and the next step is less than a quarter of them; descents at the last scale, or where the scale is smaller
            than these.
    """

    runs: int | None = None
    seconds: float | None = None
    error: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", as_whole(self.runs))
        if self.runs is not None and not is_whole(self.runs, 2):
            raise InputError(f"Expected runs of at least 2, got {self.runs!r}.")
        if self.seconds is not None and not (is_number(self.seconds) and self.seconds > 0):
            raise InputError(f"Expected positive seconds, got {self.seconds!r}.")
        each = list(self.error.values()) if isinstance(self.error, Mapping) else [self.error]
        if self.error is not None and not all(is_number(e) and float(e or 0) > 0 for e in each):
            raise InputError(f"Expected positive standard errors in error=, got {self.error!r}.")


def make_stop(given: Any) -> Stop:
    """The settings given; a number stands for runs.

    Raises:
        InputError: something else.
    """
    if given is None:
        return Stop()
    if isinstance(given, Stop):
        return given
    if is_number(given):
        return Stop(runs=given)
    raise InputError(f"Expected bridge.Stop(runs=, seconds=, error=) or a number of runs as stop=, got {given!r}.")
