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

FailureRule = Literal["raise", "drop", "penalty"]
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
    failures: FailureRule
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
    covariate: str | Covariate,
    simulator_seeds: str,
    failures: FailureRule,
    leaf_size: int | None,
    penalty: float | None = None,
    min_ok: float = 0.5,
    missing: Literal["raise", "ignore"] = "raise",
) -> Strategy:
    """Checks the settings of an estimator at the door; what becomes of runs that fail has been checked.

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
    if simulator_seeds not in ("common", "independent"):
        raise InputError(f"Unknown simulator_seeds={simulator_seeds!r}. Known: common, independent.")
    if missing == "ignore" and centring.needs_outputs:
        raise InputError(
            f"Expected a covariate other than {centring.name!r} with missing='ignore': its weights need whole outputs."
        )
    if not is_whole(replicates, 1) or num_samples % replicates:
        raise InputError(
            f"Expected replicates to divide num_samples={num_samples}, got {replicates!r}. Four to eight suit."
        )
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
        points=get_points(points),
        covariate=centring,
        forward="smoothed",
        simulator_seeds=simulator_seeds,  # type: ignore[arg-type]
        failures=failures,
        penalty=None if penalty is None else float(penalty),
        min_ok=float(min_ok),
        missing=missing,
        leaf_size=min(each, int(leaf_size) if leaf_size else default_leaf_size(int(num_samples))),
    )
    # Infeasible combinations are refused here, before the first simulation, not at the first step.
    strategy.points.check(density, strategy.num_samples)
    return strategy
