"""What becomes of runs that fail: the settings of `failures=`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, final

import numpy as np

from bridge.checks import Settings, is_number, is_whole
from bridge.errors import InputError
from bridge.estimators.strategy import FailureRule


@dataclass(frozen=True, kw_only=True)
class Failures(metaclass=Settings):
    """What becomes of runs that raise, take too long, or whose outputs are not finite.

    Attributes:
        retries: further attempts at a run that raises or takes too long, with the same inputs and seed.
        missing: "raise": an output with NaN is a failed run. "ignore": NaN, and masked numbers of a `numpy.ma` output,
            are numbers that the simulator did not get to. Value and derivatives of each number are then those of the
            runs that have it, with weights of their own: biased, unless lacking it is independent of the perturbation.
            A number that too few of the runs have (`Drop(at_least=)`, else half) is NaN in the value and has no part in
            gradients. An output without any number, or with an infinite one, stays a failed run. Needs memory for all
            outputs.
    """

    rule: ClassVar[FailureRule]
    retries: int = 0
    missing: Literal["raise", "ignore"] = "raise"

    def __post_init__(self) -> None:
        if not is_whole(self.retries, 0):
            raise InputError(f"Expected an integer retries of at least 0, got {self.retries!r}.")
        if self.missing not in ("raise", "ignore"):
            raise InputError(f"Unknown missing={self.missing!r}. Known: raise, ignore.")

    @property
    def share(self) -> float:
        """The share of an evaluation's runs that has to succeed."""
        return 0.5

    @property
    def filling(self) -> float | None:
        """What stands in the place of each number of a failed output; None where nothing does."""
        return None


@final
@dataclass(frozen=True, kw_only=True)
class Raise(Failures):
    """A run that fails is the same error on every rank: "raise"."""

    rule: ClassVar[FailureRule] = "raise"


@dataclass(frozen=True, kw_only=True)
class _Tolerant(Failures):
    at_least: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.at_least) and 0 <= self.at_least <= 1):
            raise InputError(f"Expected at_least, a share of the runs, between 0 and 1, got {self.at_least!r}.")

    @property
    def share(self) -> float:
        return float(self.at_least)


@final
@dataclass(frozen=True, kw_only=True)
class Drop(_Tolerant):
    """Runs that fail are left out (pairs as a whole), and the weights are recomputed: "drop".

    The estimate is then that of the runs that succeed: biased, unless failing is independent of the perturbation.
    Needs memory for all outputs.

    Attributes:
        at_least: where a smaller share of an evaluation's runs succeeds, it is an error on every rank.
    """

    rule: ClassVar[FailureRule] = "drop"


@final
@dataclass(frozen=True, kw_only=True)
class Penalty(_Tolerant):
    """A number stands in the place of each number of a failed output. Needs memory for all outputs.

    Attributes:
        value: that number. at_least: as in `Drop`.
    """

    value: float = field(kw_only=False)
    rule: ClassVar[FailureRule] = "penalty"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.value) and np.isfinite(float(self.value))):
            raise InputError(
                f"Expected a finite value, which stands in the place of every number of a failed output, got "
                f"{self.value!r}."
            )

    @property
    def filling(self) -> float:
        return float(self.value)


def make_failures(given: str | Failures) -> Failures:
    """The settings of "raise" and "drop", or those given.

    Raises:
        InputError: something else.
    """
    if isinstance(given, Failures):
        return given
    if given == "raise":
        return Raise()
    if given == "drop":
        return Drop()
    more = " Give its number: bridge.Penalty(value)." if given == "penalty" else ""
    raise InputError(
        f"Unknown failures={given!r}.{more} Known: raise, drop, bridge.Raise(...), bridge.Drop(...), "
        "bridge.Penalty(value, ...)."
    )
