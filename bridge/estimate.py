"""Evaluates the rows of a design and turns them, by the weights, into values, Jacobians and products with them.

The outputs stay on the rank that computed them. Two ways, chosen from N, d, m and a setting, never from the ranks:

* kept: each rank keeps its rows of F. The forward pass reduces m numbers; a VJP exchanges the N scalars <v, F_i>.
* streamed: rows are added to F^T [a, W] as they come and dropped; the sums, (1 + d) m numbers, are reduced once.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.design import Design, Strategy, make_design
from bridge.dispatch import Dispatcher, TreeSum
from bridge.errors import BridgeError, EvaluationError, InputError, OutputError
from bridge.scale import Form, check_scale, perturb, pull_back_scale, pull_back_theta, push_scale, push_theta
from bridge.simulator import ParameterSpace, Simulator, simulator_name
from bridge.weights import Weights, make_weights, resolve_covariate

Array = NDArray[np.float64]

# Rows handed to the simulator, and to the kernel, at once: more would cost memory and gain no speed.
_CHUNK = 16


@dataclass(frozen=True)
class Problem:
    """One parameter vector with its scale and its draws."""

    theta: Array
    scale: Array
    design: Design
    weights: Weights


@dataclass(frozen=True)
class Leaf:
    """Rows [start, stop) of one problem: the unit that a rank owns, and the leaf of its summation tree."""

    problem: int
    index: int
    start: int
    stop: int


def _leaves(strategy: Strategy) -> list[tuple[int, int]]:
    n, size = strategy.num_samples, strategy.leaf_size
    runs = [(start, min(start + size, n)) for start in range(0, n, size)]
    return [*runs, (n, n + 1)] if strategy.extra_row else runs


def _as_rows(outputs: Any, k: int, shape: tuple[int, ...] | None, name: str) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A simulator's outputs as a (k, m) floating tensor, and the shape of one output; the one place of conversion."""
    if not isinstance(outputs, torch.Tensor):
        array = np.asarray(outputs)
        if array.dtype.kind not in "fiub":
            raise OutputError(
                f"Expected real numbers from simulator {name!r}, got an array of dtype {array.dtype}. Return the real "
                "and imaginary parts, or a numeric array."
            )
        if array.dtype == np.longdouble or not array.dtype.isnative or array.dtype in (np.uint32, np.uint64):
            array = array.astype(np.float64)
        elif array.dtype == np.uint16:
            array = array.astype(np.float32)
        # Read-only memory (a memory map, a broadcast) cannot back a tensor.
        outputs = torch.as_tensor(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    tensor = outputs.detach()
    if tensor.ndim == 0 or tensor.shape[0] != k or (shape is not None and tuple(tensor.shape[1:]) != shape):
        want = f"({k}, {', '.join(map(str, shape))})" if shape else f"({k},)" if shape == () else f"({k}, ...)"
        hint = " If one output is a scalar, declare output_shape=()." if tensor.shape == (k,) else ""
        raise OutputError(
            f"Expected outputs of shape {want} from simulator {name!r} for {k} rows, got {tuple(tensor.shape)}.{hint}"
        )
    if tensor.is_complex():
        raise OutputError(f"Expected real numbers from simulator {name!r}, got a tensor of dtype {tensor.dtype}.")
    if tensor.dtype not in (torch.float32, torch.float64):
        exact = tensor.dtype in (
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.bool,
            torch.float16,
            torch.bfloat16,
        )
        tensor = tensor.to(torch.float32 if exact else torch.float64)
    return tensor.reshape(k, -1), tuple(outputs.shape[1:])


class Evaluation:
    """The outputs of one collective evaluation of one or more problems, and what is linear in them."""

    def __init__(
        self,
        simulator: Simulator,
        space: ParameterSpace,
        strategy: Strategy,
        dispatcher: Dispatcher,
        thetas: Array,
        scales: Array,
        form: Form,
        *,
        step: int,
        first_problem: int,
        need_theta: bool,
        need_scale: bool,
        keep_bytes: int,
    ) -> None:
        """Evaluates everything. Collective.

        Args:
            thetas: (B, d). scales: (B, d) or (B, d, d).
            need_theta, need_scale: which derivatives may be asked for; with neither only the value is computed.
            keep_bytes: outputs up to this size are kept, larger ones streamed where that is smaller.
        """
        self.strategy, self.form, self._dispatcher = strategy, form, dispatcher
        self.num_problems, self.dimension = thetas.shape
        dispatcher.begin(
            "forward",
            f"step {step}, problems {first_problem} to {first_problem + self.num_problems - 1}, d {self.dimension}, "
            f"derivatives {need_theta} {need_scale}, {strategy}",
        )
        thetas, scales = dispatcher.broadcast(thetas), dispatcher.broadcast(scales)
        if not np.isfinite(thetas).all():
            raise InputError(f"Expected finite parameters, got {thetas.tolist()}.")
        check_scale(scales, form)
        self.problems = []
        for b, (theta, scale) in enumerate(zip(thetas, scales, strict=True)):
            design = make_design(strategy, step, first_problem + b, self.dimension)
            weights = make_weights(strategy, design.nodes, form if need_scale else None)
            self.problems.append(Problem(theta, scale, design, weights))

        runs = _leaves(strategy)
        self._num_leaves = len(runs)
        leaves = [Leaf(b, i, start, stop) for b in range(self.num_problems) for i, (start, stop) in enumerate(runs)]
        self._own = leaves[slice(*_bounds(dispatcher.share(len(leaves))))]
        self._derivatives = (need_theta, need_scale)
        self._columns = self._stream_columns(need_theta, need_scale)
        self._kept: dict[Leaf, torch.Tensor] = {}
        self.streamed = True
        self.output_shape: tuple[int, ...] = ()
        sums = [TreeSum(self._num_leaves) for _ in range(self.num_problems)]

        error, like, clipped = None, None, 0
        try:
            like, clipped = self._evaluate_own(simulator, space, sums, keep_bytes)
        except BridgeError as failure:
            error = failure
        except Exception as failure:
            error = EvaluationError(
                f"Simulator {simulator_name(simulator)!r} raised {type(failure).__name__}: {failure} on "
                f"{socket.gethostname()}."
            )
            error.__cause__ = failure
        dispatcher.agree(error)
        # A rank without rows learns from rank 0 what an output looks like.
        mine = None if like is None else (tuple(like.shape), str(like.dtype), self.output_shape, self.streamed)
        layout = dispatcher.broadcast_object(mine)
        if mine is not None and mine != layout:
            error = OutputError(
                f"Expected outputs of shape {layout[2]} and {layout[1]} as on rank 0, got {self.output_shape} and "
                f"{mine[1]}. Ranks must run the same simulator."
            )
        dispatcher.agree(error)
        if like is None:
            shape, dtype, self.output_shape, self.streamed = layout
            like = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        self._sums = dispatcher.finish(sums, like, self._owners(dispatcher, leaves))
        rows = self.num_problems * strategy.num_rows
        self.num_evaluations = rows
        self.clipped_fraction = float(dispatcher.scatter_add(np.array([float(clipped)]))[0]) / rows
        self.num_outputs = like.shape[1]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _stream_columns(self, need_theta: bool, need_scale: bool) -> int:
        columns = 1 + (self.dimension if need_theta else 0)
        if need_scale:
            columns += self.dimension if self.form == "diagonal" else self.dimension**2
        return columns

    def _owners(self, dispatcher: Dispatcher, leaves: Sequence[Leaf]) -> list[list[range]]:
        if dispatcher.size == 1:
            return []
        owners = []
        for rank in range(dispatcher.size):
            start, stop = _bounds(dispatcher.share_of(len(leaves), rank))
            per_problem = []
            for b in range(self.num_problems):
                base = b * self._num_leaves
                lo = min(max(start - base, 0), self._num_leaves)
                per_problem.append(range(lo, min(max(stop - base, lo), self._num_leaves)))
            owners.append(per_problem)
        return owners

    def _evaluate_own(
        self, simulator: Simulator, space: ParameterSpace, sums: list[TreeSum], keep_bytes: int
    ) -> tuple[torch.Tensor | None, int]:
        like, clipped = None, 0
        shape = simulator.output_shape
        matrices: dict[int, torch.Tensor] = {}
        rows: dict[int, Array] = {}
        for leaf in self._own:
            problem = self.problems[leaf.problem]
            if leaf.problem not in rows:
                rows = {leaf.problem: self._inputs(problem)}
            total: torch.Tensor | None = None
            kept = []
            for start in range(leaf.start, leaf.stop, _CHUNK):
                stop = min(start + _CHUNK, leaf.stop)
                inputs, changed = space.admit(rows[leaf.problem][start:stop])
                clipped += int(changed.sum())
                seeds = problem.design.seeds[start:stop]
                # A copy: a simulator that writes into its arguments must not change the design.
                outputs = simulator(np.array(inputs, order="C"), seeds.copy())
                F, shape = _as_rows(outputs, stop - start, shape, simulator_name(simulator))
                self._check_finite(F, inputs, start, simulator, space)
                if like is None:
                    like = self._layout(F, shape, keep_bytes)
                if leaf.problem not in matrices:
                    matrices = {leaf.problem: self._stream_weights(problem.weights, F)}
                part = matrices[leaf.problem][:, start:stop]
                if total is None:
                    total = torch.mm(part, F, out=sums[leaf.problem].buffer(F, len(part)))
                else:
                    total.addmm_(part, F)
                if not self.streamed:
                    # The simulator may use the same memory for its next outputs.
                    kept.append(F.clone())
                del outputs, F  # before the next outputs are made: memory is for one chunk
            assert total is not None
            sums[leaf.problem].add(leaf.index, total)
            if kept:
                self._kept[leaf] = kept[0] if len(kept) == 1 else torch.cat(kept)
        return like, clipped

    def _inputs(self, problem: Problem) -> Array:
        inputs = perturb(problem.theta, problem.scale, problem.design.nodes.eps)
        return np.vstack([inputs, problem.theta]) if self.strategy.extra_row else inputs

    def _layout(self, F: torch.Tensor, shape: tuple[int, ...], keep_bytes: int) -> torch.Tensor:
        """Decides between kept and streamed, once the size of an output is known."""
        self.output_shape = shape
        needed = any(self._derivatives)
        rows = self.strategy.num_rows
        size = self.num_problems * rows * F.shape[1] * F.element_size()
        self.streamed = not needed or (size > keep_bytes and self._columns < rows)
        return F.new_empty((self._columns if self.streamed else 1, F.shape[1]))

    def _stream_weights(self, weights: Weights, like: torch.Tensor) -> torch.Tensor:
        columns = [weights.value[:, None]]
        if self.streamed and self._derivatives[0]:
            columns.append(weights.theta)
        if self.streamed and weights.scale is not None:
            columns.append(weights.scale)
        return torch.as_tensor(np.ascontiguousarray(np.hstack(columns).T)).to(like)

    def _check_finite(
        self, F: torch.Tensor, inputs: Array, start: int, simulator: Simulator, space: ParameterSpace
    ) -> None:
        # One sum finds every NaN and infinity at a fraction of the cost of looking at each number.
        if bool(torch.isfinite(F.sum())):
            return
        bad = torch.nonzero(~torch.isfinite(F).all(dim=1)).flatten()
        if len(bad) == 0:
            return
        row = int(bad[0])
        values = ", ".join(f"{n} = {v:.6g}" for n, v in space.mapping(inputs[row]).items())
        raise EvaluationError(
            f"Expected finite outputs from simulator {simulator_name(simulator)!r}, got "
            f"{int((~torch.isfinite(F[row])).sum())} of {F.shape[1]} numbers NaN or infinite in row {start + row} "
            f"({values}) on {socket.gethostname()}. Bound the parameters to where the simulator works."
        )

    # -- what is linear in the outputs ------------------------------------------------------------------------------

    def value(self, b: int) -> torch.Tensor:
        """F^T a of problem b: (m,)."""
        return self._sums[b][0]

    def _products(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[Array]:
        """<v, F_i> of all rows, for each (problem, v): (num_rows,) float64. Collective."""
        scalars = np.zeros((len(pairs), self.strategy.num_rows))
        for leaf, F in self._kept.items():
            wide = F.to(torch.float64)
            for q, (b, v) in enumerate(pairs):
                if b == leaf.problem:
                    scalars[q, leaf.start : leaf.stop] = torch.mv(wide, v.to(F.device)).cpu().numpy()
        return list(self._dispatcher.scatter_add(scalars))

    def vjp(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[Array, Array | None]]:
        """For each (problem, v in R^m): gradients of <v, value> in theta, (d,), and in L, (d,) or (d, d). Collective.

        VJP(v) = L^-T W^T (F v): never builds m x d (arXiv 2410.08125, Lemma 3 and Theorem 7).
        """
        if not any(self._derivatives):
            raise InputError("This evaluation was made without derivatives; call estimate outside torch.no_grad().")
        self._dispatcher.begin("vjp", f"{len(pairs)} products")
        vectors = [(b, self._broadcast_vector(v)) for b, v in pairs]
        results: list[tuple[Array, Array | None]] = []
        if self.streamed:
            for b, v in vectors:
                # One column at a time: a float64 copy of all of them would be twice the Jacobian.
                g = [torch.dot(c.to(torch.float64), v.to(c.device)).item() for c in self._sums[b][1:]]
                results.append(self._pull_back(b, np.array(g)))
            return results
        for (b, _), c in zip(vectors, self._products(vectors), strict=True):
            weights = self.problems[b].weights
            columns_ = [w for w in (weights.theta, weights.scale) if w is not None]
            # A sum in index order: the same bits whoever owned the rows.
            results.append(self._pull_back(b, np.concatenate([(w * c[:, None]).sum(axis=0) for w in columns_])))
        return results

    def _broadcast_vector(self, v: torch.Tensor) -> torch.Tensor:
        flat = v.detach().reshape(-1).to("cpu", torch.float64)
        return torch.as_tensor(self._dispatcher.broadcast(flat.numpy()))

    def _pull_back(self, b: int, g: Array) -> tuple[Array, Array | None]:
        problem, d = self.problems[b], self.dimension
        x = pull_back_theta(problem.scale, g[:d])
        if problem.weights.scale is None:
            return x, None
        return x, pull_back_scale(problem.scale, g[d:].reshape(problem.scale.shape))

    def jvp(self, triples: Sequence[tuple[int, Array, Array | None]]) -> list[torch.Tensor]:
        """For each (problem, tangent in theta, tangent in L or None): J t, (m,). Collective."""
        if not any(self._derivatives):
            raise InputError("This evaluation was made without derivatives; call estimate outside torch.no_grad().")
        self._dispatcher.begin("jvp", f"{len(triples)} products")
        eps_space = []
        for b, t, T in triples:
            scale = self.problems[b].scale
            parts = [push_theta(scale, self._dispatcher.broadcast(t))]
            if T is not None:
                if self.problems[b].weights.scale is None:
                    raise InputError("This evaluation was made without derivatives in the scale.")
                parts.append(push_scale(scale, self._dispatcher.broadcast(T)).reshape(-1))
            eps_space.append((b, parts))
        if self.streamed:
            results = []
            for b, parts in eps_space:
                columns = self._sums[b][1:]
                t_all = torch.as_tensor(np.concatenate(parts)).to(columns)
                results.append(t_all @ columns[: len(t_all)])
            return results
        rows = []
        for b, parts in eps_space:
            weights = self.problems[b].weights
            w = (weights.theta * parts[0]).sum(axis=1)
            if len(parts) == 2 and weights.scale is not None:
                w = w + (weights.scale * parts[1]).sum(axis=1)
            rows.append((b, w[None, :]))
        return [total[0] for total in self._tree_sums(rows)]

    def _tree_sums(self, weights: Sequence[tuple[int, Array]]) -> list[torch.Tensor]:
        """W F by the same tree as the value, from kept rows, for each (problem, W (c, num_rows)). Collective."""
        sums = [TreeSum(self._num_leaves) for _ in weights]
        for q, (b, w) in enumerate(weights):
            for leaf, F in self._kept.items():
                if leaf.problem == b:
                    part = torch.as_tensor(np.ascontiguousarray(w[:, leaf.start : leaf.stop])).to(F)
                    sums[q].add(leaf.index, part @ F)
        if self._dispatcher.size == 1:
            return [tree.result() for tree in sums]
        leaves = [Leaf(b, i, *run) for b in range(self.num_problems) for i, run in enumerate(_leaves(self.strategy))]
        all_owners = self._owners(self._dispatcher, leaves)
        owners = [[ranges[b] for b, _ in weights] for ranges in all_owners]
        like = self._sums[0].new_empty((weights[0][1].shape[0], self.num_outputs))
        return self._dispatcher.finish(sums, like, owners)

    def jacobian(self, b: int) -> torch.Tensor:
        """J = F^T W L^-1 of problem b: (m, d). Collective."""
        scale = self.problems[b].scale
        if not self._derivatives[0]:
            raise InputError("This evaluation was made without derivatives in the parameters.")
        self._dispatcher.begin("jacobian", f"problem {b}")
        if self.streamed:
            columns = self._sums[b][1 : 1 + self.dimension]
        else:
            (columns,) = self._tree_sums([(b, self.problems[b].weights.theta.T)])
        # Column r of L^-T W^T F^T: J = (L^-T A)^T for A (d, m) in eps-space.
        inverse = np.diag(1 / scale) if scale.ndim == 1 else np.linalg.inv(scale)
        return columns.T @ torch.as_tensor(inverse).to(columns)


def _bounds(run: range) -> tuple[int, int]:
    return run.start, run.stop


class Estimate:
    """What one step tells about the smoothed function at one parameter vector or at a batch of them.

    Attributes:
        value: (*batch, *output_shape), the smoothed value E[f(x + L eps)], or f(x) with forward="unsmoothed".
        num_evaluations: simulator runs paid for, the unperturbed row included.
        clipped_fraction: share of the queries that lay outside the bounds and were moved onto them.
        covariate, covariate_reason: the control variate that was used, and why.
        streamed: whether outputs were added up as they came (True) or are kept.
    """

    def __init__(
        self, evaluation: Evaluation, batch: tuple[int, ...], finish: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self._evaluation, self._batch, self._finish = evaluation, batch, finish
        shape = (*batch, *evaluation.output_shape)
        self.value = finish(torch.stack([evaluation.value(b) for b in self._all]).reshape(shape))
        self.num_evaluations = evaluation.num_evaluations
        self.clipped_fraction = evaluation.clipped_fraction
        self.streamed = evaluation.streamed
        nodes = evaluation.problems[0].design.nodes
        self.covariate, self.covariate_reason = resolve_covariate(evaluation.strategy.covariate, nodes)

    @property
    def _all(self) -> range:
        return range(self._evaluation.num_problems)

    def jacobian(self) -> torch.Tensor:
        """J = E[f (L^-T s)^T]: (*batch, *output_shape, d). Collective under MPI."""
        stacked = torch.stack([self._evaluation.jacobian(b) for b in self._all])
        return self._finish(stacked.reshape((*self._batch, *self._evaluation.output_shape, self._evaluation.dimension)))

    def vjp(self, v: torch.Tensor) -> torch.Tensor:
        """J^T v for v of the value's shape: (*batch, d). Never builds J. Collective under MPI."""
        return self._finish(self._vjp(v, 0))

    def vjp_scale(self, v: torch.Tensor) -> torch.Tensor:
        """d<v, value>/dL for v of the value's shape: (*batch, d) or (*batch, d, d). Collective under MPI.

        Raises:
            InputError: the estimate was made without `scale_gradient=True` and the scale does not require grad.
        """
        if self._evaluation.problems[0].weights.scale is None:
            raise InputError(
                "Expected an estimate with derivatives in the scale; use estimate(..., scale_gradient=True)."
            )
        return self._finish(self._vjp(v, 1))

    def _vjp(self, v: torch.Tensor, which: int) -> torch.Tensor:
        v = torch.as_tensor(v)
        if v.shape != self.value.shape:
            raise InputError(f"Expected a vector of shape {tuple(self.value.shape)}, got {tuple(v.shape)}.")
        rows = v.reshape(self._evaluation.num_problems, self._evaluation.num_outputs)
        gradients = [pair[which] for pair in self._evaluation.vjp(list(enumerate(rows)))]
        stacked = torch.as_tensor(np.stack([g for g in gradients if g is not None]))
        return stacked.reshape((*self._batch, *stacked.shape[1:]))

    def jvp(self, t: torch.Tensor) -> torch.Tensor:
        """J t for t of the parameters' shape (*batch, d): (*batch, *output_shape). Collective under MPI."""
        shape = (*self._batch, self._evaluation.dimension)
        tangent = torch.as_tensor(t).detach().to("cpu", torch.float64)
        if tuple(tangent.shape) != shape:
            raise InputError(f"Expected a tangent of shape {shape}, got {tuple(tangent.shape)}.")
        rows = tangent.reshape(math.prod(self._batch), -1).numpy()
        products = self._evaluation.jvp([(b, row, None) for b, row in enumerate(rows)])
        return self._finish(torch.stack(products).reshape(self.value.shape))
