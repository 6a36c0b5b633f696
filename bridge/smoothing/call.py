"""One use of a smoothed function: its evaluations, and where the graph finds them again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.dispatch import Dispatcher
from bridge.errors import InputError
from bridge.estimators.scale import Form, pull_back_theta, push_theta
from bridge.estimators.strategy import Strategy
from bridge.evaluation.evaluation import evaluate_problems
from bridge.evaluation.execution import Execution, ordinary_torch
from bridge.evaluation.linear_forms import Evaluated, LinearForms
from bridge.evaluation.request import Request
from bridge.simulator.protocol import Simulator
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.surrogate import Corrected, StandIn


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float64]:
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to("cpu", torch.float64).contiguous().numpy()


def make_keys(step: int | torch.Tensor, problem: int | torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
    """Keys of the noise, (*batch, 2) int64: the step of each problem, and its number.

    Args:
        step, problem: a number, or an integer tensor: 0-dimensional, or of shape `batch`. One problem is the number of
            the first of the batch, several are the numbers themselves.
    """
    shape = tuple(batch)
    columns = []
    for value, place in ((step, torch.zeros(shape, dtype=torch.int64, device="cpu")), (problem, _places(shape))):
        tensor = torch.as_tensor(value, dtype=torch.int64, device="cpu")
        columns.append(tensor.expand(shape) + (place if tensor.ndim == 0 else 0))
    return torch.stack(columns, dim=-1)


def _places(batch: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(batch), device="cpu").reshape(batch)


@dataclass
class Spent:
    """What a smoothed simulator has cost so far, on all ranks together.

    Attributes:
        cached: runs of the simulator whose outputs were found in the store. surrogate: runs of its surrogate.
    """

    cached: int = 0
    surrogate: int = 0


@dataclass
class Estimator:
    """A simulator, how its smoothed value is estimated, and where.

    Attributes:
        buffers: memory left by evaluations for later ones.
    """

    simulator: Simulator
    strategy: Strategy
    dispatcher: Dispatcher
    execution: Execution
    surrogate: StandIn | None = None
    buffers: list[torch.Tensor] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)


@dataclass
class Call:
    """One use of a smoothed function: what the Functions need besides tensors."""

    estimator: Estimator
    replicate: int
    space: ParameterSpace
    form: Form
    need_theta: bool
    need_scale: bool
    evaluations: list[LinearForms] = field(default_factory=list)
    keys: list[list[tuple[int, int]]] = field(default_factory=list)
    atoms: dict[tuple[int, int, float], LinearForms] = field(default_factory=dict)

    def evaluate(self, theta: torch.Tensor, scale: torch.Tensor, keys: torch.Tensor) -> int:
        """Evaluates theta (*batch, d); returns the number by which the evaluation is found again.

        Args:
            keys: (*batch, 2), as `make_keys` gives them.
        """
        # A copy, also of the scales: the caller may change his own in place before he asks for more.
        rows = to_numpy(theta).reshape(-1, theta.shape[-1]).copy()
        core = 1 if self.form == "diagonal" else 2
        scales = np.broadcast_to(to_numpy(scale), (*theta.shape[:-1], *scale.shape[scale.ndim - core :]))
        scales = scales.reshape(len(rows), *scales.shape[scales.ndim - core :]).copy()
        pairs: list[tuple[int, int]] = [(a, b) for a, b in keys.to("cpu").reshape(-1, 2).tolist()]
        wrong = next((pair for pair in pairs if min(pair) < 0), None)
        if wrong is not None:
            raise InputError(f"Expected step and problem of at least 0, got {wrong[0]} and {wrong[1]}.")
        self.keys.append(pairs)
        self.evaluations.append(self._evaluation(rows, scales, pairs, None))
        return len(self.evaluations) - 1

    def _evaluation(
        self,
        thetas: NDArray[np.float64],
        scales: NDArray[np.float64],
        keys: list[tuple[int, int]],
        atom: tuple[int, float] | None,
        weights: NDArray[np.float64] | None = None,
    ) -> LinearForms:
        """Args: weights: those of the surrogate, where they are known."""
        source = self.estimator
        # The weights of a surrogate come from Jacobians, whether or not anybody asks for derivatives.
        need_theta = self.need_theta or (source.surrogate is not None and source.surrogate.weight == "auto")

        def evaluate(simulator: Simulator, strategy: Strategy, execution: Execution) -> Evaluated:
            request = Request(
                simulator,
                self.space,
                strategy,
                execution,
                source.dispatcher,
                thetas,
                scales,
                self.form,
                keys,
                first_replicate=self.replicate,
                need_theta=need_theta and atom is None,
                need_scale=self.need_scale and atom is None,
                buffers=source.buffers,
                atom=atom,
            )
            once = simulator, source.execution.store, source.execution, source.buffers
            return source.dispatcher.make(evaluate_problems, request, once=once)

        made: LinearForms
        with source.dispatcher.watched(source.execution.step_limit_s), ordinary_torch():
            given = source.simulator, source.strategy, source.execution
            if source.surrogate is None:
                made = evaluate(*given)
            else:
                made = Corrected(*given, source.surrogate, evaluate, weights)
                source.spent.surrogate += made.account.num_surrogate_evaluations
        source.spent.cached += made.account.num_cached
        return made

    def hvp(self, number: int, triples: list[tuple[int, torch.Tensor, NDArray[np.float64]]]) -> list[NDArray[Any]]:
        """d^2<v, value>/dx^2 u for each (vector, v, u). Collective."""
        evaluation = self.evaluations[number]
        results = []
        for (b, v, u), product in zip(triples, evaluation.hvp(triples), strict=True):
            scale, more = self._scale(number, b), np.zeros(evaluation.dimension)
            for i, mass, value in self._atoms(number, b):
                dot = torch.dot(v.detach().reshape(-1).to("cpu", torch.float64), value)
                more[i] += mass * float(dot) * push_theta(scale, u)[i]
            results.append(product + pull_back_theta(scale, more))
        return results

    def curvature(
        self, number: int, triples: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]]
    ) -> list[torch.Tensor]:
        """d^2 value/dx^2 along t and u, (m,), for each (vector, t, u). Collective."""
        results = []
        for (b, t, u), product in zip(triples, self.evaluations[number].curvature(triples), strict=True):
            scale = self._scale(number, b)
            for i, mass, value in self._atoms(number, b):
                product = product + (mass * push_theta(scale, t)[i] * push_theta(scale, u)[i] * value).to(product)
            results.append(product)
        return results

    def _scale(self, number: int, b: int) -> NDArray[np.float64]:
        evaluation = self.evaluations[number]
        return evaluation.problems[b * self.estimator.strategy.replicates].scale

    def _atoms(self, number: int, b: int) -> Iterator[tuple[int, float, torch.Tensor]]:
        """(coordinate, mass, value of vector b with eps held there) for each kink of the density. Collective.

        That is num_samples runs more for each parameter and kink, once for an evaluation.
        """
        evaluation = self.evaluations[number]
        atoms = self.estimator.strategy.distribution.atoms
        if not atoms:
            return
        weights = evaluation.weights if isinstance(evaluation, Corrected) else None
        first = evaluation.problems[:: self.estimator.strategy.replicates]
        for i in range(evaluation.dimension):
            for place, mass in atoms:
                key = (number, i, place)
                if key not in self.atoms:
                    thetas, scales = np.stack([p.theta for p in first]), np.stack([p.scale for p in first])
                    self.atoms[key] = self._evaluation(thetas, scales, self.keys[number], (i, place), weights)
                yield i, mass, self.atoms[key].value(b).to("cpu", torch.float64)

    def find(self, handle: torch.Tensor) -> tuple[LinearForms, list[int]]:
        """The evaluation and the problems behind a (*batch, 2) handle."""
        pairs = handle.detach().to("cpu", torch.int64).reshape(-1, 2)
        return self.evaluations[self.number(handle)], pairs[:, 1].tolist()

    @staticmethod
    def number(handle: torch.Tensor) -> int:
        """The evaluation behind a handle."""
        (number,) = set(handle.detach().to("cpu", torch.int64).reshape(-1, 2)[:, 0].tolist())
        return int(number)
