"""How a smoothed value and its gradients are estimated, as one object: what `bridge.study` recommends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, final

from bridge.checks import Settings
from bridge.errors import InputError
from bridge.estimators.covariates import Covariate
from bridge.estimators.distributions import Distribution
from bridge.estimators.points import PointSet
from bridge.estimators.scale import ScaleLike
from bridge.simulator.protocol import Simulator
from bridge.smoothing.surrogate import Surrogate

SurrogateLike = Callable[..., Any] | Simulator | Surrogate | None


@final
@dataclass(frozen=True)
class Smoothing(metaclass=Settings):
    """The settings of an estimator, to be kept and handed on: `bridge.smooth(simulator, smoothing, seed=0)`.

    Each attribute is the argument of that name of `bridge.smooth`.
    """

    num_samples: int = 64
    scale: ScaleLike = 1.0
    distribution: str | Distribution = "gaussian"
    points: str | PointSet = "auto"
    covariate: str | Covariate = "auto"
    replicates: int = 1
    simulator_seeds: str = "common"
    surrogate: SurrogateLike = None

    def or_given(self, whole: Smoothing | None) -> Smoothing:
        """These settings, or `whole` where that is given.

        Raises:
            InputError: both are given.
        """
        if whole is None:
            return self
        if not isinstance(whole, Smoothing):
            raise InputError(f"Expected bridge.Smoothing(...) as the second argument, got {whole!r}.")
        if changed := [f.name for f in fields(self) if not _is_default(getattr(self, f.name), f.default)]:
            raise InputError(
                f"Expected the settings of the estimator in the object alone, got {', '.join(changed)} beside it. "
                f"Change the object: dataclasses.replace(smoothing, {changed[0]}=...)."
            )
        return whole

    def __str__(self) -> str:
        """As the arguments of a call."""
        changed = [f.name for f in fields(self) if not _is_default(getattr(self, f.name), f.default)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (
        type(value) is type(default) and isinstance(value, int | float | str) and value == default
    )
