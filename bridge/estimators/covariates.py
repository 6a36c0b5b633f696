"""Covariates (control variates): ways of centring the score functions.

Since E[s] = 0 and E[s eps^T] = I, constants may be subtracted from f in both gradients. Write g_i for a score function
of row i (a column of s, or of s eps^T - I), w_i for the weights of the mean (1/N but for quadrature rules). The
estimators are sum_i w_i (F_i - b_i) g_i with

    none    b = 0
    f(x)    b = f(x), one more row: weight -sum_i w_i g_i on it
    mean    b = the mean of all rows
    loo     b_i = the mean of the other rows; the literal one, (1/(N-1)) sum_i (F_i - avg) g_i
    block   b_i = the mean of the other independent blocks of rows (leave one block out): `loo` for independent rows,
            whole pairs for antithetic ones; where all rows depend on each other, `mean`

Leaving out blocks is exactly unbiased. `mean` under dependent rows is nearly unbiased in x, short by O(1/N) in L. The
literal `loo` under dependent rows is biased up by up to N/(N-1).

Two estimators of the gradient in x are not of that form; they use more of the design, and are biased by O(1/N):

    regression  least squares of F on [1, s], times the known E[s s^T] = I_F: W = I_F S~ (S~^T S~)^-1, S~ the centred
                scores. Exact for f linear in s, that is for a linear f and Gaussian noise.
    bq          Bayesian quadrature: the gradient of a Gaussian-process fit of F on eps, see `bayesian_quadrature`;
                length and noise by maximum likelihood on projections of F.

`auto` takes the regression where the rows suffice for it and the density is symmetric, else, and where replicates are
asked for, `block`.

Reference: arXiv 2410.08125, section on covariates; Berahas, Cao, Choromanski, Scheinberg, FoCM 22 (2022) 507, for
regression; O'Hagan, J. Stat. Plan. Inference 29 (1991) 245, for Bayesian quadrature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np
import torch

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.distributions import Distribution, Gaussian
from bridge.estimators.points import Nodes
from bridge.estimators.quadrature import bayesian_quadrature
from bridge.registry import Registry

# Regression wants so many rows for each column, and so well-conditioned scores; below, its variance explodes.
_ROWS_PER_COLUMN = 4
_LEAST_EIGENVALUE = 0.1


@dataclass(frozen=True)
class Sample:
    """The rows of one problem that count, as a covariate sees them.

    Attributes:
        nodes: eps, scores and weights of the N perturbed rows.
        distribution: of eps. information: E[s^2] of it, inf where it does not exist.
        replicates: independent samples of this kind, whose spread gives standard errors.
    """

    nodes: Nodes
    distribution: Distribution
    information: float
    replicates: int = 1


@dataclass(frozen=True)
class Covariate(ABC):
    """A way of centring the score functions; a frozen dataclass of its settings.

    A new one needs `centre`. Where it is of another form than sum_i w_i (F_i - b_i) g_i, it overrides `weights`, too.
    `bridge.register("name")` makes it known by a name; `bridge.testing.CovariateContract` tests it.

    Attributes:
        name: as users write it.
        needs_centre: whether f(x), without a perturbation, is run as one more row.
        needs_outputs: whether weights depend on the outputs: all of these are then kept, and none may lack numbers.
        subtracts: what b is: "nothing"; "f(x)"; "mean", of all rows or of some; "fit" for estimators of another form,
            whose error single rows do not tell.
        leaves_own_out: whether b_i is the mean of rows that are independent of row i.
    """

    name: ClassVar[str] = "custom"
    needs_centre: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False
    subtracts: ClassVar[Literal["nothing", "f(x)", "mean", "fit"]] = "fit"
    leaves_own_out: ClassVar[bool] = False

    def check(self, distribution: Distribution, information: float, num_samples: int) -> None:  # noqa: B027  (all is)
        """Raises InputError where it is not possible with this density and so many rows."""

    def resolve(self, sample: Sample) -> tuple[Covariate, str]:
        """The covariate that is used with these rows, and why, in words: itself, unless it chooses or is not possible.

        What it returns is not asked again.
        """
        return self, "as asked"

    @abstractmethod
    def centre(self, g: Array, nodes: Nodes) -> Array:
        """Weights W (N, c) of score functions g (N, c): sum_i F_i W_i estimates E[f g]."""

    def centre_weight(self, g: Array, nodes: Nodes) -> Array:
        """The weights (c,) of f(x) beside those of `centre`, where it is run."""
        return np.asarray(-np.sum(nodes.weight[:, None] * g, axis=0))

    def weights(self, sample: Sample, projections: Array | None) -> tuple[Array, Array]:
        """Weights (N,) of the value, which sum to 1, and (N, d) of the gradient in x, in eps-space.

        Args:
            projections: (N, c) projections of the outputs on random signs, where it `needs_outputs`.
        """
        return sample.nodes.weight, self.centre(sample.nodes.score, sample.nodes)


COVARIATES: Registry[Covariate] = Registry("covariate", "bridge.covariates", Covariate)


def get_covariate(covariate: str | Covariate) -> Covariate:
    """The covariate of that name, or the one given. Raises InputError for an unknown name."""
    return COVARIATES.make(covariate)


def _uncentred(g: Array, nodes: Nodes) -> Array:
    return nodes.weight[:, None] * g


def _less_the_mean(g: Array, nodes: Nodes) -> Array:
    if len(g) == 1:  # a single row cannot be centred on others
        return _uncentred(g, nodes)
    w = nodes.weight[:, None]
    return w * (g - np.sum(w * g, axis=0))


def _less_other_blocks(g: Array, nodes: Nodes) -> Array:
    n, block = len(g), nodes.block
    if block >= n:
        return _less_the_mean(g, nodes)
    # Leave one block out: b_i = mean of the rows outside i's block.
    total = np.sum(g, axis=0)
    own = np.repeat(np.add.reduceat(g, np.arange(0, n, block), axis=0), block, axis=0)
    return (g - (total - own) / (n - block)) / n


@COVARIATES.register("auto")
@final
@dataclass(frozen=True)
class AutoCovariate(Covariate):
    """Chooses by N, d, the density and the replicates; `resolve` says what and why."""

    def resolve(self, sample: Sample) -> tuple[Covariate, str]:
        nodes, distribution = sample.nodes, sample.distribution
        n, d = nodes.eps.shape
        if np.ptp(nodes.weight) > 0:
            return NoCovariate(), "quadrature weights are exact without a covariate"
        if n == 1:
            return NoCovariate(), "a single row cannot be centred on others"
        block = LeaveOneBlockOut()
        if sample.replicates > 1:
            # Each regression is biased alike, by O(1/N), which the spread of the replicates does not show: 95 %
            # intervals then cover 81 to 93 % (16 and 64 rows of a smooth function).
            return block, "replicates give standard errors, which hold for unbiased weights"
        if _is_skew(distribution):
            return block, "the score of a skew density is far from linear: least squares on it gain nothing"
        # Pairs of Gaussian rows are central differences: they suffice as soon as they span the space well.
        pairs = nodes.paired and isinstance(distribution, Gaussian)
        if (pairs or n >= _ROWS_PER_COLUMN * (d + 1)) and _regression_is_safe(sample)[0]:
            return Regression(), f"{n} rows suffice for least squares on {d} scores"
        if nodes.block == 1:
            return block, "rows are independent: leave-one-out is unbiased"
        if nodes.block < n:
            return block, f"blocks of {nodes.block} rows are independent: whole blocks are left out, unbiased"
        return block, "rows depend on each other: the mean, without N/(N-1), is nearly unbiased"

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _less_other_blocks(g, nodes)


@COVARIATES.register("none")
@final
@dataclass(frozen=True)
class NoCovariate(Covariate):
    """b = 0. Unbiased, and exact for quadrature rules; a constant in f is noise in the gradient."""

    subtracts = "nothing"

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _uncentred(g, nodes)


@COVARIATES.register("f(x)")
@final
@dataclass(frozen=True)
class AtCentre(Covariate):
    """b = f(x), one more run. Unbiased for any randomised points."""

    needs_centre = True
    subtracts = "f(x)"

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _uncentred(g, nodes)


@COVARIATES.register("loo")
@final
@dataclass(frozen=True)
class LeaveOneOut(Covariate):
    """b_i = the mean of all other rows. Unbiased for independent rows alone."""

    subtracts = "mean"
    leaves_own_out = True

    def check(self, distribution: Distribution, information: float, num_samples: int) -> None:
        if num_samples < 2:
            raise InputError("Expected at least two samples for covariate='loo', got 1. Use more, or 'f(x)'.")

    def centre(self, g: Array, nodes: Nodes) -> Array:
        if len(g) == 1:
            return _uncentred(g, nodes)
        return (g - np.mean(g, axis=0)) / (len(g) - 1)


@COVARIATES.register("mean")
@final
@dataclass(frozen=True)
class MeanOfRows(Covariate):
    """b = the mean of all rows, each one's own included: short by the factor (N - 1) / N for independent rows."""

    subtracts = "mean"

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _less_the_mean(g, nodes)


@COVARIATES.register("block")
@final
@dataclass(frozen=True)
class LeaveOneBlockOut(Covariate):
    """b_i = the mean of the rows outside the block of row i. Unbiased where there are several independent blocks."""

    subtracts = "mean"
    leaves_own_out = True

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _less_other_blocks(g, nodes)


@COVARIATES.register("regression")
@final
@dataclass(frozen=True)
class Regression(Covariate):
    """Least squares of the outputs on the scores; derivatives in the scale are centred block by block."""

    def check(self, distribution: Distribution, information: float, num_samples: int) -> None:
        if not np.isfinite(information):
            raise InputError(
                f"Expected a density of finite Fisher information for covariate='regression', got "
                f"{distribution.name!r}. Use 'auto', or another distribution."
            )

    def resolve(self, sample: Sample) -> tuple[Covariate, str]:
        good, why = _regression_is_safe(sample)
        return (self, "as asked") if good else (LeaveOneBlockOut(), f"regression is not possible: {why}")

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _less_other_blocks(g, nodes)

    def weights(self, sample: Sample, projections: Array | None) -> tuple[Array, Array]:
        score = sample.nodes.score
        # In torch's memory, whose alignment is the same on every rank: the last bits of a solution depend on it.
        centred = torch.as_tensor(score - np.mean(score, axis=0)).clone()
        solved = torch.linalg.solve(centred.T @ centred, centred.T)
        return sample.nodes.weight, np.ascontiguousarray(sample.information * solved.T.numpy())


@COVARIATES.register("bq")
@final
@dataclass(frozen=True)
class BayesianQuadrature(Covariate):
    """Value and gradient of a Gaussian-process fit; derivatives in the scale are centred block by block."""

    needs_outputs = True

    def centre(self, g: Array, nodes: Nodes) -> Array:
        return _less_other_blocks(g, nodes)

    def weights(self, sample: Sample, projections: Array | None) -> tuple[Array, Array]:
        assert projections is not None
        return bayesian_quadrature(sample.distribution, sample.nodes.eps, projections)


def _is_skew(distribution: Distribution) -> bool:
    low, middle, high = distribution.icdf(np.array([0.1, 0.5, 0.9]))
    return bool(abs(low + high - 2 * middle) > 1e-3 * (high - low))


def _regression_is_safe(sample: Sample) -> tuple[bool, str]:
    nodes = sample.nodes
    n, d = nodes.eps.shape
    if not np.isfinite(sample.information) or np.ptp(nodes.weight) > 0:
        return False, f"the Fisher information of {sample.distribution.name} is not finite, or rows have weights"
    if (n // 2 if nodes.paired else n - 1) < d:
        return False, f"{n} rows for {d} scores"
    centred = nodes.score - np.mean(nodes.score, axis=0)
    least = float(np.linalg.eigvalsh(centred.T @ centred / n)[0]) / sample.information
    return least >= _LEAST_EIGENVALUE, f"the scores' least eigenvalue is {least:.2g} of what is expected"
