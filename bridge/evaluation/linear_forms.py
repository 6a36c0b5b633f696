"""What can be asked of an evaluation: the value and products with its derivatives, all linear in the outputs."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch

from bridge.arrays import Array
from bridge.errors import InputError
from bridge.estimators.scale import pull_back_scale, pull_back_theta, push_scale, push_theta
from bridge.estimators.strategy import Strategy
from bridge.evaluation.execution import Problem, ordinary_torch
from bridge.evaluation.request import Drawn
from bridge.evaluation.rows import Known, aligned

P = ParamSpec("P")
T = TypeVar("T")
E = TypeVar("E", bound="Evaluated")


@dataclass(frozen=True)
class Account:
    """What an evaluation has cost, and how its runs went.

    Attributes:
        num_evaluations: runs, over all problems. num_cached: those whose outputs were in the store.
        clipped_fraction: share of the rows that lay outside the bounds and were moved onto them.
        failures: how many runs failed how: "error", "timeout", "non-finite".
        num_surrogate_evaluations, num_surrogate_failed: runs of the surrogate.
    """

    num_evaluations: int
    num_cached: int
    clipped_fraction: float
    failures: dict[str, int]
    num_surrogate_evaluations: int = 0
    num_surrogate_failed: int = 0

    @property
    def num_failed(self) -> int:
        return sum(self.failures.values())


class LinearForms(ABC):
    """What is linear in the outputs of some problems.

    Attributes:
        strategy: how they are estimated; each parameter vector has `strategy.replicates` problems, one after another.
        has_scale: whether derivatives in L may be asked for.
        streamed: whether rows were added up as they came.
    """

    def __init__(
        self,
        strategy: Strategy,
        problems: Sequence[Problem],
        output_shape: tuple[int, ...],
        account: Account,
        has_scale: bool,
        streamed: bool,
    ) -> None:
        self.strategy, self.problems, self.output_shape, self.account = strategy, problems, output_shape, account
        self.has_scale, self.streamed = has_scale, streamed

    @property
    def num_vectors(self) -> int:
        """B, parameter vectors."""
        return len(self.problems) // self.strategy.replicates

    @property
    def dimension(self) -> int:
        """d, parameters."""
        return len(self.problems[0].theta)

    @property
    def num_outputs(self) -> int:
        """m, numbers of an output."""
        return prod(self.output_shape)

    def replicates(self, b: int) -> range:
        """The problems of vector b."""
        return range(b * self.strategy.replicates, (b + 1) * self.strategy.replicates)

    @abstractmethod
    def value(self, b: int) -> torch.Tensor:
        """F^T a of vector b, the mean over its replicates: (m,)."""

    @abstractmethod
    def replicate_values(self, b: int) -> torch.Tensor:
        """(R, m): the values of the replicates."""

    @abstractmethod
    def replicate_jacobians(self, b: int) -> list[torch.Tensor]:
        """J = F^T W L^-1 of each replicate of vector b: R tensors (m, d). Collective."""

    @abstractmethod
    def vjp(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[Array, Array | None]]:
        """For each (vector, v in R^m): gradients of <v, value> in theta, (R, d), and in L, (R, d) or (R, d, d), one for
        each replicate; the estimate is their mean. Collective."""

    @abstractmethod
    def jvp(self, triples: Sequence[tuple[int, Array, Array | None]]) -> list[torch.Tensor]:
        """For each (vector, tangent in theta, tangent in L or None): J t, (m,). Collective."""

    @abstractmethod
    def hvp(self, triples: Sequence[tuple[int, torch.Tensor, Array]]) -> list[Array]:
        """For each (vector, v in R^m, u in R^d): d^2<v, value>/dx^2 u, (d,), from the second score. Collective.

        H = L^-T E[<v, f> (s s^T - diag(s'))] L^-1, without what a density with kinks has at its atoms.

        Raises:
            InputError: the rows were streamed.
        """

    @abstractmethod
    def curvature(self, triples: Sequence[tuple[int, Array, Array]]) -> list[torch.Tensor]:
        """For each (vector, t in R^d, u in R^d): the second derivative of the value along t and u, (m,). Collective.

        From the second score, without what a density with kinks has at its atoms.

        Raises:
            InputError: the rows were streamed.
        """


def collective(method: Callable[Concatenate[E, P], T]) -> Callable[Concatenate[E, P], T]:
    """A method that all ranks call together; where one of them leads (`bridge.driver`), the others follow it."""

    @functools.wraps(method)
    def call(self: E, *args: P.args, **kwargs: P.kwargs) -> T:
        watched = self.dispatcher.watched(self.step_limit_s)
        with watched, ordinary_torch(), self.dispatcher.mirrored(self, method.__name__, args, kwargs):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class Evaluated(LinearForms):
    """The forms of one collective evaluation, whether its rows are kept or were streamed.

    Attributes:
        factors: (problems,) what `multiply` has multiplied the outputs by.
    """

    def __init__(
        self, drawn: Drawn, known: Known, values: list[torch.Tensor], failures: dict[str, int], streamed: bool
    ) -> None:
        """Args:
        values: F^T a of each problem, (m,).
        failures: how many runs failed how.
        """
        request, problems = drawn.request, drawn.problems
        runs = len(problems) * request.strategy.num_rows
        account = Account(runs, known.num_cached, known.clipped_fraction, failures)
        super().__init__(request.strategy, problems, known.output_shape, account, request.need_scale, streamed)
        self.dispatcher, self.step_limit_s = request.dispatcher, request.execution.step_limit_s
        self.structure, self.factors = drawn.structure, np.ones(len(problems))
        self._drawn, self._known, self._values = drawn, known, values

    def value(self, b: int) -> torch.Tensor:
        return mean_of([self._values[p] for p in self.replicates(b)])

    def replicate_values(self, b: int) -> torch.Tensor:
        return torch.stack([self._values[p] for p in self.replicates(b)])

    @collective
    def multiply(self, factors: Array) -> None:
        """Multiplies all that is linear in the outputs by a number for each problem, (problems,). Collective.

        Not the rows themselves. The numbers are the first rank's.
        """
        self.dispatcher.begin("multiply", f"{len(factors)} problems")
        factors = self.dispatcher.broadcast(factors)
        self.factors = self.factors * factors
        for p, factor in enumerate(factors.tolist()):
            self._values[p] = self._values[p] * factor
            self._multiply(p, factor)

    @abstractmethod
    def _multiply(self, p: int, factor: float) -> None:
        """Multiplies what derivatives of problem p are made of."""

    @collective
    def vjp(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[Array, Array | None]]:
        # VJP(v) = L^-T W^T (F v): never builds m x d (arXiv 2410.08125, Lemma 3 and Theorem 7).
        self.require_derivatives()
        self.dispatcher.begin("vjp", f"{len(pairs)} products")
        vectors = [(p, self._broadcast_vector(v)) for b, v in pairs for p in self.replicates(b)]
        results = [self._pull_back(p, self._gradient(p, v)) for p, v in vectors]
        R = self.strategy.replicates
        groups = [results[i : i + R] for i in range(0, len(results), R)]
        return [
            (np.stack([x for x, _ in group]), None if group[0][1] is None else np.stack([L for _, L in group]))  # type: ignore[misc]
            for group in groups
        ]

    @abstractmethod
    def _gradient(self, p: int, v: torch.Tensor) -> Array:
        """W^T (F v) of problem p, in eps-space: one number for each column of W. Collective."""

    def _pull_back(self, p: int, g: Array) -> tuple[Array, Array | None]:
        problem, d = self.problems[p], self.dimension
        x = pull_back_theta(problem.scale, g[:d])
        if not self.has_scale:
            return x, None
        return x, pull_back_scale(problem.scale, g[d:].reshape(problem.scale.shape))

    @collective
    def jvp(self, triples: Sequence[tuple[int, Array, Array | None]]) -> list[torch.Tensor]:
        self.require_derivatives()
        self.dispatcher.begin("jvp", f"{len(triples)} products")
        tangents = []
        for b, t, T in triples:
            scale = self.problems[b * self.strategy.replicates].scale
            parts = [push_theta(scale, self.dispatcher.broadcast(t))]
            if T is not None:
                if not self.has_scale:
                    raise InputError("This evaluation was made without derivatives in the scale.")
                parts.append(push_scale(scale, self.dispatcher.broadcast(T)).reshape(-1))
            tangents += [(p, parts) for p in self.replicates(b)]
        products, R = self._along(tangents), self.strategy.replicates
        return [mean_of(products[i : i + R]) for i in range(0, len(products), R)]

    @abstractmethod
    def _along(self, tangents: Sequence[tuple[int, list[Array]]]) -> list[torch.Tensor]:
        """F^T (W t), (m,), for each (problem, parts of t in eps-space: in theta, and in L or not). Collective."""

    @collective
    def replicate_jacobians(self, b: int) -> list[torch.Tensor]:
        if not self._drawn.request.need_theta:
            raise InputError("This evaluation was made without derivatives in the parameters.")
        self.dispatcher.begin("jacobian", f"vector {b}")
        problems = self.replicates(b)
        all_columns = self._jacobian_columns(problems)
        scale = self.problems[problems[0]].scale
        # Column r of L^-T W^T F^T: J = (L^-T A)^T for A (d, m) in eps-space.
        if scale.ndim == 1:
            return [self._masked(columns).T * torch.as_tensor(1 / scale).to(columns) for columns in all_columns]
        inverse = torch.as_tensor(np.linalg.inv(scale))
        return [self._masked(columns).T @ aligned(inverse.to(columns)) for columns in all_columns]

    @abstractmethod
    def _jacobian_columns(self, problems: Sequence[int]) -> list[torch.Tensor]:
        """W^T F of each problem, in eps-space: (d, m). Collective."""

    def require_derivatives(self) -> None:
        """Refuses where no derivatives may be asked for."""
        if not self._drawn.has_derivatives:
            raise InputError("This evaluation was made without derivatives; call estimate outside torch.no_grad().")

    def _broadcast_vector(self, v: torch.Tensor) -> torch.Tensor:
        """Rank 0's v, (m,) float64, in memory of torch's own. Collective."""
        flat = v.detach().reshape(-1).to("cpu", torch.float64)
        return aligned(torch.as_tensor(self.dispatcher.broadcast(flat.numpy())))

    def _masked(self, columns: torch.Tensor) -> torch.Tensor:
        """Derivatives (c d, m) without those that the simulator's structure says are zero."""
        if self.structure is None:
            return columns
        mask = torch.as_tensor(self.structure.mask(self.output_shape), device=columns.device)
        return columns * mask.repeat(len(columns) // self.dimension, 1)


def mean_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their mean; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(dim=0)
