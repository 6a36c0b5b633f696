"""Estimates with as many simulations as their accuracy needs: replicates are added until the error is small enough.

Each round adds independent replicates of the strategy's own size, so that points stay as good as they were chosen, and
the spread of the replicates is the standard error whatever the point set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from scipy import stats

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.strategy import Strategy
from bridge.smoothing.estimate import Estimate

Quantity = Literal["value", "jacobian"]

# Fewer replicates tell too little about their own spread (Student's t has a factor of 12.7 with two).
_LEAST_REPLICATES = 4


@dataclass(frozen=True)
class AdaptiveEstimate:
    """A smoothed value and Jacobian with their standard errors; made by `SmoothedSimulator.estimate_to`.

    Attributes:
        value: (*batch, *output_shape). jacobian: (*batch, *output_shape, d).
        standard_error, jacobian_standard_error: of each entry, from the spread of the replicates.
        relative_error: |standard errors| / |estimate| (root of sums of squares, all entries together) of what was
            asked for, the Jacobian's with parameters in natural units; the noise's part of |estimate| is subtracted.
        reached: whether that is as small as was asked for; else the budget ended first.
        replicates: how many there are. num_evaluations: simulator runs.
    """

    value: torch.Tensor
    jacobian: torch.Tensor
    standard_error: torch.Tensor
    jacobian_standard_error: torch.Tensor
    relative_error: float
    reached: bool
    replicates: int
    num_evaluations: int

    def interval(self, standard_error: torch.Tensor, level: float = 0.95) -> torch.Tensor:
        """Half the width of the confidence interval that belongs to a standard error of this estimate."""
        return standard_error * float(stats.t.ppf(0.5 + level / 2, self.replicates - 1))


class _Moments:
    """Mean and spread of tensors that come in groups (R, ...); Chan, Golub and LeVeque's update."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros((), device="cpu"), torch.zeros((), device="cpu")

    def add(self, group: torch.Tensor) -> None:
        group = group.to(torch.float64)
        n, mean = len(group), group.mean(dim=0)
        squares = (group - mean).square().sum(dim=0)
        if self.count:
            shift, total = mean - self.mean, self.count + n
            mean = self.mean + shift * (n / total)
            squares = self.squares + squares + shift.square() * (self.count * n / total)
        self.count, self.mean, self.squares = self.count + n, mean, squares

    @property
    def standard_error(self) -> torch.Tensor:
        return (self.squares / (self.count * (self.count - 1))).sqrt()

    def relative_error(self, unit: torch.Tensor) -> float:
        noise = float((self.standard_error * unit).square().sum())
        signal = float((self.mean * unit).square().sum()) - noise
        return math.sqrt(noise / signal) if signal > 0 else 0.0 if noise == 0 else math.inf


def estimate_to(
    independent: Callable[[Strategy], Callable[[int], Estimate]],
    strategy: Strategy,
    theta: torch.Tensor,
    natural: Array | None,
    *,
    relative_error: float,
    budget: int,
    of: Quantity = "jacobian",
) -> AdaptiveEstimate:
    """Adds replicates until a relative error is reached or the next round would exceed the budget.

    Args:
        independent: of a strategy, the estimates at theta by their first replicate's number.
        strategy: its num_samples is the size of a replicate; a round is its replicates, but at least 4.
        theta: (*batch, d). natural: (d,) the parameters' natural units, 1 where None.
        relative_error: to reach, for example 0.1.
        budget: simulator runs that may be spent, over all of the batch.
        of: whose error: the value's or the Jacobian's.

    Returns:
        an `AdaptiveEstimate`, which says whether the error was reached. Stopping at the first round that looks good
        enough makes the stated error a little too small: some percent of it with few replicates.

    Raises:
        InputError: a budget below one round, or a relative error that is not positive.
    """
    if of not in ("value", "jacobian"):
        raise InputError(f"Unknown quantity of={of!r}. Known: value, jacobian.")
    if not relative_error > 0:
        raise InputError(f"Expected a positive relative error, got {relative_error!r}.")
    if strategy.forward != "smoothed":
        raise InputError("Expected a smoothed value for an adaptive estimate, got one of straight_through().")
    per_round = max(_LEAST_REPLICATES, strategy.replicates)
    estimate_from = independent(replace(strategy, replicates=per_round))
    batch = tuple(theta.shape[:-1])
    cost = per_round * strategy.num_rows * math.prod(batch)
    if budget < cost:
        raise InputError(
            f"Expected a budget of at least one round of {cost} runs ({per_round} replicates of {strategy.num_rows} "
            f"rows at {math.prod(batch)} parameter vectors), got {budget!r}."
        )
    one = torch.ones((), device="cpu")
    unit = one if natural is None or of == "value" else torch.as_tensor(natural, device="cpu")
    value, jacobian = _Moments(), _Moments()
    spent = 0
    while True:
        estimate = estimate_from(value.count)
        spent += estimate.num_evaluations
        values, jacobians = estimate.of_replicates()
        value.add(values)
        jacobian.add(jacobians)
        error = (value if of == "value" else jacobian).relative_error(unit)
        if error <= relative_error or spent + cost > budget:
            break
    tensors = (value.mean, jacobian.mean, value.standard_error, jacobian.standard_error)
    a, b, c, d = (t.to(theta) for t in tensors)
    return AdaptiveEstimate(a, b, c, d, error, error <= relative_error, value.count, spent)
