"""How a smoothed value and its gradients are estimated: the settings of `bridge.smooth`, checked at the door."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from bridge.checks import is_whole
from bridge.errors import InputError
from bridge.estimators.covariates import Covariate, get_covariate
from bridge.estimators.distributions import Distribution, fisher_information, get_distribution
from bridge.estimators.points import PointSet, get_points

Failures = Literal["raise", "drop", "penalty"]
Forward = Literal["smoothed", "unsmoothed"]
SimulatorSeeds = Literal["common", "independent"]


@dataclass(frozen=True)
class Strategy:
    """How a smoothed value and its gradients are estimated; see `bridge.smooth` for the meaning of each field.

    `num_samples` counts the rows of one replicate. The rows of `stream` 1 are independent of those of 0. Where
    `errors_raise`, a run that raises ends the evaluation whatever `failures` says, which is then about numbers alone:
    those that are not finite, or not smaller than `largest`.
    """

    seed: int
    num_samples: int
    replicates: int
    distribution: Distribution
    information: float
    points: PointSet
    covariate: Covariate
    forward: Forward
    simulator_seeds: SimulatorSeeds
    failures: Failures
    leaf_size: int
    penalty: float | None = None
    min_ok: float = 0.5
    errors_raise: bool = False
    largest: float = np.inf
    missing: Literal["raise", "ignore"] = "raise"
    stream: Literal[0, 1] = 0

    @property
    def extra_row(self) -> bool:
        """Whether the unperturbed f(x) is evaluated as one more row."""
        return self.covariate.needs_centre or self.forward == "unsmoothed"

    @property
    def num_rows(self) -> int:
        """Rows of one replicate, the unperturbed one included."""
        return self.num_samples + self.extra_row

    @property
    def weights_need_outputs(self) -> bool:
        """Whether weights are known only once all rows are evaluated; outputs are then kept."""
        return self.covariate.needs_outputs or self.failures != "raise" or self.missing == "ignore"


def default_leaf_size(num_samples: int) -> int:
    """Rows of one unit, which a rank evaluates as a whole: from N alone, so that sums have one shape.

    One row up to 64, so that each simulation can go to its own rank; beyond, 32 units or fewer, so that a streamed
    Jacobian holds at most six partial sums at once.
    """
    return 1 if num_samples <= 64 else 1 << (-(-num_samples // 32) - 1).bit_length()


def make_strategy(
    *,
    seed: int | None,
    num_samples: int,
    replicates: int,
    distribution: str | Distribution,
    points: str | PointSet,
    antithetic: bool,
    covariate: str | Covariate,
    forward: str,
    simulator_seeds: str,
    failures: str,
    leaf_size: int | None,
    penalty: float | None = None,
    min_ok: float = 0.5,
    missing: str = "raise",
) -> Strategy:
    """Checks the settings of `bridge.smooth` at the door.

    Raises:
        InputError: no seed, an unknown name, or a combination that is not feasible.
    """
    if seed is None:
        raise InputError("Expected a seed, got None. Results are a function of the seed: give one, say seed=0.")
    if not is_whole(seed, 0):
        raise InputError(f"Expected a non-negative integer seed, got {seed!r}.")
    if not is_whole(num_samples, 1):
        raise InputError(f"Expected at least one sample, got num_samples={num_samples!r}.")
    centring = get_covariate(covariate)
    if forward not in ("smoothed", "unsmoothed"):
        raise InputError(f"Unknown forward={forward!r}. Known: smoothed, unsmoothed.")
    if simulator_seeds not in ("common", "independent"):
        raise InputError(f"Unknown simulator_seeds={simulator_seeds!r}. Known: common, independent.")
    if failures not in ("raise", "drop", "penalty"):
        raise InputError(f"Unknown failures={failures!r}. Known: raise, drop, penalty.")
    if (penalty is None) == (failures == "penalty") or not np.isfinite(0.0 if penalty is None else penalty):
        raise InputError(
            f"Expected a finite penalty with failures='penalty', and only then, got failures={failures!r} and "
            f"penalty={penalty!r}. It stands in the place of every number of a failed output."
        )
    if missing not in ("raise", "ignore"):
        raise InputError(f"Unknown missing={missing!r}. Known: raise, ignore.")
    if missing == "ignore" and centring.needs_outputs:
        raise InputError(
            f"Expected a covariate other than {centring.name!r} with missing='ignore': its weights need whole outputs."
        )
    if not 0 <= min_ok <= 1:
        raise InputError(f"Expected min_ok, a share of the runs, between 0 and 1, got {min_ok!r}.")
    if not is_whole(replicates, 1) or num_samples % replicates:
        raise InputError(
            f"Expected replicates to divide num_samples={num_samples}, got {replicates!r}. Four to eight suit."
        )
    if leaf_size is not None and not is_whole(leaf_size, 1):
        raise InputError(f"Expected a positive integer leaf_size, got {leaf_size!r}.")
    each = int(num_samples) // int(replicates)
    density = get_distribution(distribution)
    information = fisher_information(density)
    centring.check(density, information, each)
    strategy = Strategy(
        seed=int(seed),
        num_samples=each,
        replicates=int(replicates),
        distribution=density,
        information=information,
        points=get_points(points, antithetic),
        covariate=centring,
        forward=forward,  # type: ignore[arg-type]  # checked above
        simulator_seeds=simulator_seeds,  # type: ignore[arg-type]
        failures=failures,  # type: ignore[arg-type]
        penalty=None if penalty is None else float(penalty),
        min_ok=float(min_ok),
        missing=missing,  # type: ignore[arg-type]
        leaf_size=min(each, int(leaf_size) if leaf_size else default_leaf_size(int(num_samples))),
    )
    # Infeasible combinations are refused here, before the first simulation, not at the first step.
    strategy.points.check(density, strategy.num_samples)
    return strategy
