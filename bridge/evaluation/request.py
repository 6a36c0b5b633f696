"""What is asked of one collective evaluation, and what is drawn for it: all of it fixed before anything is run."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bridge.arrays import Array
from bridge.dispatch import Dispatcher
from bridge.errors import InputError
from bridge.estimators.design import make_design
from bridge.estimators.scale import Form, check_scale, perturb
from bridge.estimators.strategy import Strategy
from bridge.estimators.weights import make_weights
from bridge.evaluation.execution import Execution, Problem, Tolerance
from bridge.evaluation.layout import Layout
from bridge.evaluation.runner import Task
from bridge.simulator.protocol import BlockStructure, Simulator, Structured, simulator_name
from bridge.simulator.space import ParameterSpace


@dataclass(frozen=True, eq=False)
class Request:
    """One collective evaluation: of which problems, how they are estimated, and where.

    Attributes:
        thetas: (B, d), parameter vectors. scales: (B, d) or (B, d, d), as `form` says.
        keys: (step, problem) of each vector, with which its noise is drawn.
        first_replicate: each vector has `strategy.replicates` problems, numbered from here.
        need_theta, need_scale: which derivatives may be asked for; with neither only the value is computed.
        execution: how the runs are carried out.
        spare: memory left by earlier evaluations; what this one leaves is added.
        atom: (coordinate, value) at which eps is held, for second derivatives of densities with kinks.
    """

    simulator: Simulator
    space: ParameterSpace
    strategy: Strategy
    execution: Execution
    dispatcher: Dispatcher
    thetas: Array
    scales: Array
    form: Form
    keys: Sequence[tuple[int, int]]
    first_replicate: int
    need_theta: bool
    need_scale: bool
    spare: list[torch.Tensor]
    atom: tuple[int, float] | None = None


@dataclass(frozen=True, eq=False)
class Drawn:
    """The problems of a request and their rows.

    Attributes:
        problems: of each vector its replicates, one vector after another.
        structure: which outputs each parameter touches, where the simulator knows.
    """

    request: Request
    problems: list[Problem]
    layout: Layout
    structure: BlockStructure | None

    @property
    def dimension(self) -> int:
        """d, parameters."""
        return int(self.request.thetas.shape[1])

    @property
    def num_columns(self) -> int:
        """Of the weights of a row: one for the value, and one for each derivative that may be asked for."""
        request, d = self.request, self.dimension
        of_scale = d if request.form == "diagonal" else d**2
        return 1 + (d if request.need_theta else 0) + (of_scale if request.need_scale else 0)

    @property
    def has_derivatives(self) -> bool:
        """Whether any derivatives may be asked for."""
        return self.request.need_theta or self.request.need_scale

    @property
    def task(self) -> Task:
        """The rows of all problems, to be run."""
        request = self.request
        return Task(
            request.simulator,
            request.space,
            request.execution,
            request.dispatcher,
            Tolerance.of(request.strategy),
            self.layout,
            inputs=self.inputs,
            seeds=lambda p: self.problems[p].design.seeds,
        )

    def inputs(self, p: int) -> Array:
        """x + L eps of problem p, and x itself where it is one more row: (num_rows, d)."""
        problem = self.problems[p]
        perturbed = perturb(problem.theta, problem.scale, problem.design.nodes.eps)
        return np.vstack([perturbed, problem.theta]) if self.request.strategy.extra_row else perturbed

    def is_large_and_streams(self, num_outputs: int, itemsize: int) -> tuple[bool, bool]:
        """Decides, once the size of an output is known: (whether leaves have several units, whether to stream).

        The first must not depend on which derivatives are wanted, or the value's last bits would.
        """
        rows = self.layout.num_rows
        if self.request.strategy.weights_need_outputs:
            return False, False
        size = len(self.problems) * rows * num_outputs * itemsize
        large = size > self.request.execution.keep_bytes and 1 + self.dimension < rows
        return large, not self.has_derivatives or (large and self.num_columns < rows)

    def weights(self, p: int) -> Array:
        """[a, W] of all rows of problem p, where they do not depend on the outputs: (num_columns, num_rows)."""
        request = self.request
        form = request.form if request.need_scale else None
        weights = make_weights(request.strategy, self.problems[p].design.nodes, form)
        columns = [weights.value[:, None]]
        if request.need_theta:
            columns.append(weights.theta)
        if weights.scale is not None:
            columns.append(weights.scale)
        return np.hstack(columns).T


def draw(request: Request) -> Drawn:
    """Draws the rows of all problems, alike on every rank: rank 0's parameters count. Collective.

    Raises:
        InputError: parameters or scales that are not finite, or that the simulator's structure does not allow.
        CollectiveError: the ranks do not ask for the same.
    """
    strategy, dispatcher, dimension = request.strategy, request.dispatcher, request.thetas.shape[1]
    dispatcher.begin(
        "forward",
        f"{_describe_keys(request.keys)}, d {dimension}, derivatives {request.need_theta} {request.need_scale}, "
        f"{strategy}",
    )
    thetas, scales = dispatcher.broadcast(request.thetas), dispatcher.broadcast(request.scales)
    if not np.isfinite(thetas).all():
        raise InputError(f"Expected finite parameters, got {thetas.tolist()}.")
    check_scale(scales, request.form)
    replicates = range(request.first_replicate, request.first_replicate + strategy.replicates)
    # Problems with the same key share their draws.
    designs = {
        (*key, r): make_design(strategy, *key, dimension, r, request.atom)
        for key in dict.fromkeys(request.keys)
        for r in replicates
    }
    problems = [
        Problem(theta, scale, designs[*key, r])
        for theta, scale, key in zip(thetas, scales, request.keys, strict=True)
        for r in replicates
    ]
    structure = _structure(request.simulator, dimension, request.form)
    layout = Layout(len(problems), strategy.num_samples, strategy.leaf_size, strategy.extra_row)
    return Drawn(request, problems, layout, structure)


def _describe_keys(keys: Sequence[tuple[int, int]]) -> str:
    (step, first), count = keys[0], len(keys)
    if list(keys) == [(step, first + b) for b in range(count)]:
        return f"step {step}, problems {first} to {first + count - 1}"
    return f"{count} problems from step {step}, problem {first} on (digest {zlib.crc32(repr(keys).encode()):08x})"


def _structure(simulator: Simulator, dimension: int, form: Form) -> BlockStructure | None:
    structure = simulator.structure if isinstance(simulator, Structured) else None
    if structure is None:
        return None
    if len(structure.parameter_block) != dimension:
        raise InputError(
            f"Expected a block for each of {dimension} parameters, got {len(structure.parameter_block)} from "
            f"{simulator_name(simulator)!r}."
        )
    if form != "diagonal":
        raise InputError(
            "Expected a number or a diagonal scale for a simulator with block structure, got a matrix: it would mix "
            "parameters of different blocks. Use a diagonal."
        )
    return structure
