"""Evaluates the rows of designs and adds them up by weights: the only module in which other ranks exist.

The outputs stay on the rank that computed them. Two ways, chosen from N, d, m and settings, never from the ranks:

* kept: each rank keeps its rows of F. The forward pass reduces m numbers; a VJP exchanges the N scalars <v, F_i>.
* streamed: rows are added to F^T [a, W] as they come and dropped; the sums, (1 + d) m numbers, are reduced once.

A *unit* is a run of rows that one rank evaluates; a *leaf* of the summation tree is one unit where outputs are kept,
and several where they are streamed, because the kernel that adds rows to (1 + d) m numbers is bound by memory. The
rows of a leaf that several ranks share travel to the rank that has its first: at most one leaf's worth for each rank,
and the rows that a rank has taken off another one.
"""

from __future__ import annotations

import functools
import logging
import math
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bridge.arrays import Array
from bridge.dispatch import ONCE, Dispatcher, TreeSum, describe_lost, owner_map
from bridge.errors import BridgeError, EvaluationError, InputError, OutputError, SetupError, StoppedError
from bridge.estimators.covariates import Weights, enough, in_pairs, make_weights, second_weights, survivors
from bridge.estimators.design import make_design
from bridge.estimators.scale import Form, check_scale, pull_back_scale, pull_back_theta, push_scale, push_theta
from bridge.estimators.strategy import Strategy
from bridge.evaluation.execution import STATUSES, Execution, Problem, ordinary_torch
from bridge.evaluation.rows import Outputs, Unit, aligned, spilled
from bridge.evaluation.runner import Runner
from bridge.evaluation.streamed import Stream, accumulate, units_of_leaf
from bridge.simulator.function import makes_memory
from bridge.simulator.protocol import BlockStructure, Simulator, Structured, simulator_name
from bridge.simulator.space import ParameterSpace

# A unit's outputs as they came: (rows, outputs), None for a chunk of which every row failed.
Chunks = list[tuple[int, torch.Tensor | None]]
# Rows whose bits a float64 holds exactly.
_BITS = 48
# Numbers that are multiplied at once: with those of a vector they stay in a cache, whatever the number of outputs.
_PIECE = 1 << 15
P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("bridge")


def collective(method: Callable[Concatenate[Evaluation, P], T]) -> Callable[Concatenate[Evaluation, P], T]:
    """A method that all ranks call together; where one of them leads (`bridge.driver`), the others follow it."""

    @functools.wraps(method)
    def call(self: Evaluation, *args: P.args, **kwargs: P.kwargs) -> T:
        watched = self.dispatcher.watched(self._execution.step_limit_s)
        with watched, ordinary_torch(), self.dispatcher.led(self, method.__name__, args, kwargs):
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class Group(NamedTuple):
    """Outputs of a problem that the same rows have.

    columns: their numbers; None for all outputs. valid: (num_rows,) which rows count. weights: None where too few do.
    """

    columns: torch.Tensor | None
    valid: NDArray[np.bool_]
    weights: Weights | None

    def times(self, factor: float) -> Group:
        w = self.weights
        if w is None:
            return self
        scale = None if w.scale is None else w.scale * factor
        return self._replace(weights=Weights(w.value * factor, w.theta * factor, scale))


class Evaluation:
    """The outputs of one collective evaluation of one or more problems, and what is linear in them.

    Attributes:
        num_vectors: B, parameter vectors; each has `strategy.replicates` problems, R of them, one after another.
        num_failed: rows that failed, over all problems; `failures` counts them by how: error, timeout, non-finite.
        num_cached: rows whose outputs were in the store.
        owner: (units,) the rank that has each unit.
        factors: (problems,) what `multiply` has multiplied the outputs by.
        lacks: whether outputs of some rows lack numbers that others have.
    """

    lacks: bool = False

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
        keys: Sequence[tuple[int, int]],
        first_replicate: int,
        need_theta: bool,
        need_scale: bool,
        execution: Execution,
        spare: list[torch.Tensor],
        atom: tuple[int, float] | None = None,
    ) -> None:
        """Evaluates everything. Collective.

        Args:
            thetas: (B, d). scales: (B, d) or (B, d, d).
            keys: (step, problem) of each, with which its noise is drawn.
            need_theta, need_scale: which derivatives may be asked for; with neither only the value is computed.
            execution: how the runs are carried out.
            spare: memory left by earlier evaluations; what this one leaves is added.
            atom: (coordinate, value) at which eps is held, for second derivatives of densities with kinks.
        """
        self.strategy, self.form, self.dispatcher, self._space = strategy, form, dispatcher, space
        self._simulator, self._name = simulator, simulator_name(simulator)
        self.owns_outputs = makes_memory(simulator)
        self.num_vectors, self.dimension = thetas.shape
        dispatcher.begin(
            "forward",
            f"{_describe_keys(keys)}, d {self.dimension}, derivatives {need_theta} {need_scale}, {strategy}",
        )
        thetas, scales = dispatcher.broadcast(thetas), dispatcher.broadcast(scales)
        if not np.isfinite(thetas).all():
            raise InputError(f"Expected finite parameters, got {thetas.tolist()}.")
        check_scale(scales, form)
        # Problems with the same key share their draws.
        designs = {
            (*key, r): make_design(strategy, *key, self.dimension, r, atom)
            for key in dict.fromkeys(keys)
            for r in range(first_replicate, first_replicate + strategy.replicates)
        }
        self.problems = [
            Problem(theta, scale, designs[*key, r])
            for theta, scale, key in zip(thetas, scales, keys, strict=True)
            for r in range(first_replicate, first_replicate + strategy.replicates)
        ]
        self.structure = _structure(simulator, self.dimension, form)
        self.factors = np.ones(len(self.problems))

        self.runs = _unit_runs(strategy)
        self.units = [Unit(p, i, *run) for p in range(len(self.problems)) for i, run in enumerate(self.runs)]
        self.runner = Runner(simulator, space, strategy, execution, dispatcher, self.problems, self.units)
        self._execution = execution
        self._derivatives = (need_theta, need_scale)
        self.num_columns = self._stream_columns(need_theta, need_scale)
        chunks: dict[Unit, Chunks] = {}
        self._kept: list[list[tuple[Unit, torch.Tensor]]] = [[] for _ in self.problems]
        self.num_failed = 0
        self.failures: dict[str, int] = {}
        self.output_shape: tuple[int, ...] = ()
        self.large = False

        stream: Stream | None = None
        like: torch.Tensor | None = None
        error: Exception | None = None
        try:
            like, stream = self._evaluate_own(spare, chunks)
            if dispatcher.stopping:
                error = StoppedError("A signal has asked the run to stop before all of its evaluations were done.")
        except BridgeError as failure:
            error = failure
        except Exception as failure:
            error = EvaluationError(
                f"Simulator {self._name!r} raised {type(failure).__name__}: {failure} on {socket.gethostname()}."
            )
            error.__cause__ = failure
        if error is not None:
            dispatcher.give_up()
        self._exchange(error, like, stream is not None)
        self.num_evaluations = len(self.problems) * strategy.num_rows
        if self.streamed:
            self._groups: list[list[Group]] = []
            self._sums, self._values = (stream or Stream(self, self._like, spare)).finish()
        else:
            for unit, parts in chunks.items():
                self._kept[unit.problem].append((unit, self._assemble(parts)))
            self._valid = self._agree_on_failures()
            self._groups = self._agree_on_groups()
            sums = self._group_sums([(p, _value_weights) for p in range(len(self.problems))], spare)
            self._sums, self._values = [], [total[0] for total in sums]

    def _exchange(self, error: Exception | None, like: torch.Tensor | None, streams: bool) -> None:
        """What ranks tell each other once all runs are done: errors, who has what, what an output is. Collective.

        One sum where all is well.
        """
        dispatcher, rank, units = self.dispatcher, self.dispatcher.rank, len(self.units)
        mine = None
        if like is not None:
            # What is kept may be float32 in one row and float64 in the next.
            mine = (like.shape[1], str(like.dtype) if streams else "", self.output_shape, streams, self.large)
        told = np.zeros(units + 3 + dispatcher.size)
        told[:units] = owner_map(units, self.runner.own, rank)
        told[units : units + 3] = error is not None, self.runner.clipped, self.runner.found
        told[units + 3 + rank] = 0 if mine is None else 1 + zlib.crc32(repr(mine).encode())
        told = dispatcher.scatter_add(told)
        if told[units]:
            dispatcher.agree(error)
        times, owners = np.divmod(told[:units], ONCE)
        if (times != 1).any():  # nobody has failed or stopped, so that is no simulator's fault
            missing, twice = int((times == 0).sum()), int((times > 1).sum())
            raise SetupError(describe_lost(units, missing, twice, dispatcher.library))
        self.owner = owners.astype(np.int64) - 1
        self.clipped_fraction = float(told[units + 1]) / (len(self.problems) * self.strategy.num_rows)
        self.num_cached = int(told[units + 2])
        layout = mine
        seen = told[units + 3 :]
        if layout is None or (seen != seen[0]).any():
            # A rank without rows learns from the first that has some what an output looks like.
            layouts = [layout for layout in dispatcher.each(mine) if layout is not None]
            if not layouts:
                why = dispatcher.first(next((f.why for f in self.runner.failures.values()), None))
                raise EvaluationError(f"Expected an output from simulator {self._name!r}, got failures only ({why}).")
            layout, other = layouts[0], next((x for x in layouts if x != layouts[0]), None)
            if other is not None:
                raise OutputError(
                    f"Expected outputs of shape {layout[2]} and {layout[1]} as on the first rank, got {other[2]} and "
                    f"{other[1]} on another. Ranks must run the same simulator."
                )
        self.num_outputs, dtype, self.output_shape, self.streamed, self.large = layout
        if like is None:
            like = torch.empty((0, layout[0]), dtype=getattr(torch, dtype.removeprefix("torch.") or "float64"))
        self._like = like[:0]

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _stream_columns(self, need_theta: bool, need_scale: bool) -> int:
        columns = 1 + (self.dimension if need_theta else 0)
        if need_scale:
            columns += self.dimension if self.form == "diagonal" else self.dimension**2
        return columns

    def _evaluate_own(
        self, spare: list[torch.Tensor], chunks: dict[Unit, Chunks]
    ) -> tuple[torch.Tensor | None, Stream | None]:
        like, stream, held = None, None, 0
        for out in self.runner.run():
            F = out.F
            if F is not None and like is None:
                like, self.output_shape = F[:0].clone(), self.runner.output_shape
                self.large, streams = self._layout(F, self._execution.keep_bytes)
                if streams:
                    stream = Stream(self, F, spare)
            if stream is not None:
                stream.add(out)
                del F, out  # before the next outputs are made: memory is for one chunk
                continue
            if F is not None:
                self.runner.check_finite(out)
                held += F.numel() * F.element_size()
                if held > self._execution.memory_bytes and F.device.type == "cpu":
                    F = spilled(F)
                # The simulator may use the same memory for its next outputs, unless it was made for this call.
                elif not self.owns_outputs:
                    F = F.clone()
                out = out._replace(F=F)
            for unit, part in self.by_unit(out):
                G = None if part.F is None else aligned(part.F)
                chunks.setdefault(unit, []).append((len(part.inputs), G))
            del F, out
        return like, stream

    def by_unit(self, out: Outputs) -> Iterator[tuple[Unit, Outputs]]:
        """Rows of one unit or several, by unit."""
        start, stop = out.start, out.start + len(out.inputs)
        while start < stop:
            index = self.unit_of(start)
            end = min(stop, self.runs[index][1])
            yield self.units[out.problem * len(self.runs) + index], out.part(start, end)
            start = end

    def unit_of(self, row: int) -> int:
        """The unit of a problem that has a row; the unperturbed row is a unit of its own."""
        return min(row, self.strategy.num_samples - 1) // self.strategy.leaf_size + (row == self.strategy.num_samples)

    def _assemble(self, parts: Chunks) -> torch.Tensor:
        """The outputs of a unit, filled in where all of a chunk failed."""
        filling = self.runner.filling
        filled = [self._like.new_full((k, self.num_outputs), filling) if F is None else F for k, F in parts]
        return filled[0] if len(filled) == 1 else torch.cat(filled)

    def _layout(self, F: torch.Tensor, keep_bytes: int) -> tuple[bool, bool]:
        """Decides, once the size of an output is known: (whether leaves have several units, whether to stream).

        The first must not depend on which derivatives are wanted, or the value's last bits would.
        """
        rows = self.strategy.num_rows
        if self.strategy.weights_need_outputs:
            return False, False
        large = len(self.problems) * rows * F.shape[1] * F.element_size() > keep_bytes and 1 + self.dimension < rows
        return large, not any(self._derivatives) or (large and self.num_columns < rows)

    @property
    def units_in_leaf(self) -> int:
        """Units that are added up before the tree."""
        return units_of_leaf(self.strategy.num_samples, self.strategy.leaf_size) if self.large else 1

    def stream_weights(self, p: int) -> Array:
        """[a, W] of problem p as the streamed kernel takes it: (columns, num_rows)."""
        weights = self._make_weights(p, None)
        columns = [weights.value[:, None]]
        if self._derivatives[0]:
            columns.append(weights.theta)
        if weights.scale is not None:
            columns.append(weights.scale)
        return np.hstack(columns).T

    def _make_weights(self, p: int, valid: NDArray[np.bool_] | None) -> Weights:
        nodes = self.problems[p].design.nodes
        projections = None
        if self.strategy.covariate == "bq":
            projections = self._projections(p)
        form = self.form if self._derivatives[1] else None
        weights = make_weights(self.strategy, nodes, form, valid, projections)
        if projections is None:
            return weights
        # Fitted numbers: the same bits on every rank.
        share = self.dispatcher.broadcast
        return replace(weights, value=share(weights.value), theta=share(weights.theta))

    def _projections(self, p: int) -> Array:
        """(N, 4) projections of the outputs on random signs, from which hyperparameters are fitted. Collective."""
        signs = np.random.Generator(np.random.Philox(key=self.num_outputs)).integers(0, 2, (4, self.num_outputs))
        vectors = [aligned(torch.as_tensor(row)) for row in 2.0 * signs - 1.0]
        return np.stack(self._products([(p, v) for v in vectors]), axis=1)[: self.strategy.num_samples]

    def _agree_on_failures(self) -> NDArray[np.bool_]:
        """Which rows of which problem count: (P, num_rows). Collective."""
        strategy = self.strategy
        valid = np.ones((len(self.problems), strategy.num_rows), dtype=bool)
        if strategy.failures == "raise":
            return valid
        codes = np.zeros(valid.size)
        for row, failure in self.runner.failures.items():
            codes[row] = STATUSES.index(failure.status)
        codes = self.dispatcher.scatter_add(codes).reshape(valid.shape)
        self.failures = dict(Counter(STATUSES[int(code)] for code in codes[codes > 0]))
        self.num_failed = sum(self.failures.values())
        if self.num_failed == 0:
            return valid
        why = self.dispatcher.first(next((f.why for f in self.runner.failures.values()), None))
        counts = ", ".join(f"{count} {status}" for status, count in sorted(self.failures.items()))
        least = 1 - self.num_failed / valid.size
        if least < strategy.min_ok:
            raise EvaluationError(
                f"Expected at least {strategy.min_ok:.0%} of the runs to succeed (min_ok), got {least:.0%}: "
                f"{self.num_failed} of {valid.size} runs of {self._name!r} failed ({counts}). One of them: {why}"
            )
        if self.dispatcher.rank == 0:
            one = _one_line(str(why))
            _log.warning("%d of %d evaluations failed: %s; one: %s", self.num_failed, valid.size, counts, one)
        if strategy.failures == "penalty":
            return valid  # the penalty is their output
        for p, problem in enumerate(self.problems):
            valid[p] = survivors(strategy, problem.design.nodes, codes[p] == 0, str(why))
        return valid

    def _agree_on_groups(self) -> list[list[Group]]:
        """The outputs of each problem, in groups that lack the same rows, with weights of their own. Collective.

        What travels is a bit for each number, and only where some are lacking. In the rows these become 0, which has no
        weight.
        """
        lacking = [np.zeros((0, 0))] * len(self.problems)
        if self.strategy.missing == "ignore":
            lacking = self._agree_on_lacking()
        groups = []
        for p, packed in enumerate(lacking):
            if not packed.size:
                groups.append([Group(None, self._valid[p], self._make_weights(p, self._valid[p]))])
                continue
            patterns, own = np.unique(packed, axis=1, return_inverse=True)
            rows = np.arange(self.strategy.num_rows)
            mine = []
            for g, bits in enumerate(patterns.T.astype(np.int64)):
                good = self._valid[p] & (bits[rows // _BITS] >> (rows % _BITS) & 1 == 0)
                valid = in_pairs(self.strategy, self.problems[p].design.nodes, good)
                usable = enough(self.strategy, valid) and bool(valid[self.strategy.num_samples :].all())
                columns = torch.as_tensor(np.flatnonzero(own.reshape(-1) == g))
                mine.append(Group(columns, valid, self._make_weights(p, valid) if usable else None))
            groups.append(mine)
        self.lacks = any(group.columns is not None for mine in groups for group in mine)
        return groups

    def _agree_on_lacking(self) -> list[Array]:
        """(words, m) for each problem: bit i of a column is whether that output lacks row i; empty where all have all.
        Collective."""
        found: list[tuple[Unit, torch.Tensor]] = []
        for kept in self._kept:
            for i, (unit, F) in enumerate(kept):
                nan = torch.isnan(F)
                if bool(nan.any()):
                    found.append((unit, nan.cpu()))
                    kept[i] = unit, torch.where(nan, 0.0, F)
        counts = np.zeros(len(self.problems))
        for unit, _ in found:
            counts[unit.problem] += 1
        counts = self.dispatcher.scatter_add(counts)
        words = -(-self.strategy.num_rows // _BITS)
        lacking = [np.zeros((words, self.num_outputs) if count else (0, 0)) for count in counts]
        for unit, nan in found:
            for i, row in zip(range(unit.start, unit.stop), nan.numpy(), strict=True):
                lacking[unit.problem][i // _BITS][row] += 2.0 ** (i % _BITS)
        return [self.dispatcher.scatter_add(packed) if packed.size else packed for packed in lacking]

    def _group_sums(
        self,
        asked: Sequence[tuple[int, Callable[[Weights], Array]]],
        spare: list[torch.Tensor] | None = None,
        only: Sequence[torch.Tensor | None] | None = None,
    ) -> list[torch.Tensor]:
        """W F for each (problem, weights -> W (c, num_rows)): (c, m) float64, NaN where too few rows have a number.
        Collective.

        Args:
            only: for each, the outputs that are asked for; the others are left NaN.
        """
        requests: list[tuple[int, Array, torch.Tensor | None]] = []
        for q, (p, of) in enumerate(asked):
            index = None if only is None else only[q]
            for group in self._groups[p]:
                if group.weights is not None:
                    columns = group.columns if index is None else index
                    if index is not None and group.columns is not None:
                        columns = index[torch.isin(index, group.columns)]
                    requests.append((q, of(group.weights), columns))
        requests = [r for r in requests if r[2] is None or len(r[2])]
        wanted = [(asked[q][0], W) for q, W, _ in requests]
        totals = self._tree_sums(wanted, columns=[columns for *_, columns in requests], spare=spare)
        results: list[torch.Tensor | None] = [None] * len(asked)
        for (q, _, columns), total in zip(requests, totals, strict=True):
            if columns is None:
                results[q] = total
                continue
            whole = results[q]
            if whole is None:
                whole = results[q] = total.new_full((len(total), self.num_outputs), torch.nan)
            whole[:, columns.to(whole.device)] = total
        shape = 1, self.num_outputs
        return [self._like.new_full(shape, torch.nan, dtype=torch.float64) if x is None else x for x in results]

    def _group_products(self, p: int, v: torch.Tensor) -> list[tuple[Group, Array]]:
        """<v, F_i> of all rows over the outputs of each group that has weights, (num_rows,), or, where there is block
        structure, over each block of them, (num_rows, blocks). Collective."""
        groups = self._groups[p]
        structure = None if self.structure is None else torch.as_tensor(self.structure.outputs(self.output_shape))
        if groups[0].columns is None:
            return [(groups[0], self._products([(p, v)], block_of=structure)[0])]
        of_group = torch.zeros(self.num_outputs, dtype=torch.int64)
        for g, group in enumerate(groups):
            assert group.columns is not None
            of_group[group.columns] = g
            if group.weights is None:  # nothing is known of them, whatever is asked
                v = v.index_fill(0, group.columns, 0.0)
        blocks = 1 if structure is None else int(structure.max()) + 1
        combined = of_group if structure is None else of_group * blocks + structure
        last = len(groups) * blocks
        sums = self._products([(p, v)], block_of=combined)[0]
        sums = np.pad(sums, ((0, 0), (0, last - sums.shape[1]))).reshape(len(sums), len(groups), blocks)
        return [
            (group, sums[:, g, 0] if structure is None else sums[:, g])
            for g, group in enumerate(groups)
            if group.weights is not None
        ]

    # -- what is linear in the outputs ------------------------------------------------------------------------------

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
            if self.streamed:
                self._sums[p] *= factor
            else:
                self._groups[p] = [group.times(factor) for group in self._groups[p]]

    def value(self, b: int) -> torch.Tensor:
        """F^T a of vector b, the mean over its replicates: (m,)."""
        return _mean([self._values[p] for p in self.replicates(b)])

    @property
    def has_scale(self) -> bool:
        """Whether derivatives in L were asked for."""
        return self._derivatives[1]

    @collective
    def unperturbed(self, p: int) -> torch.Tensor:
        """f(x), where it was evaluated as one more row of a kept problem: (m,). Collective."""
        last = np.zeros((1, self.strategy.num_rows))
        last[0, -1] = 1.0
        return self._tree_sums([(p, last)])[0][0]

    @collective
    def mean_of_rows(self, p: int) -> torch.Tensor:
        """The mean of the surviving perturbed rows of a kept problem: (m,). Collective."""
        good = np.zeros((1, self.strategy.num_rows))
        good[0, : self.strategy.num_samples] = self.surviving(p) / self.surviving(p).sum()
        return self._tree_sums([(p, good)])[0][0]

    def replicate_values(self, b: int) -> torch.Tensor:
        """(R, m): the values of the replicates."""
        return torch.stack([self._values[p] for p in self.replicates(b)])

    def replicates(self, b: int) -> range:
        """The problems of vector b."""
        return range(b * self.strategy.replicates, (b + 1) * self.strategy.replicates)

    def require_rows(self, what: str) -> None:
        """Refuses what needs the rows themselves where they were streamed."""
        if self.streamed:
            size = len(self.problems) * self.strategy.num_rows * self.num_outputs * self._like.element_size() / 1e6
            raise InputError(
                f"Expected kept outputs for {what}, got streamed ones: pass keep_megabytes={int(size) + 1} "
                "(over all ranks)."
            )

    def _products(
        self, pairs: Sequence[tuple[int, torch.Tensor]], square: bool = False, block_of: torch.Tensor | None = None
    ) -> list[Array]:
        """<v, F_i> of all rows, for each (problem, v): (num_rows,) float64. Collective.

        Args:
            square: <v, F_i^2> instead.
            block_of: (m,) which block each output belongs to, in [0, blocks): (num_rows, blocks) sums of each block.
        """
        blocks = 1 if block_of is None else int(block_of.max()) + 1
        scalars = np.zeros((len(pairs), self.strategy.num_rows, blocks))
        asked: dict[int, list[tuple[int, torch.Tensor]]] = {}
        for q, (p, v) in enumerate(pairs):
            asked.setdefault(p, []).append((q, v))
        width = self.num_outputs
        if self._like.device.type == "cpu":
            width = max(_PIECE // 16, _PIECE // self.strategy.leaf_size)
        for p, mine in asked.items():
            own = [row for unit, _ in self._kept[p] for row in range(unit.start, unit.stop)]
            for piece in (slice(left, left + width) for left in range(0, self.num_outputs, width)):
                wide = torch.empty(0, dtype=torch.float64)
                there = [v[piece] for _, v in mine]
                sums: list[list[torch.Tensor]] = [[] for _ in mine]
                for _, F in self._kept[p]:
                    F = F[:, piece]
                    if wide.shape != F.shape or wide.device != F.device:
                        wide = torch.empty_like(F, dtype=torch.float64, memory_format=torch.contiguous_format)
                        there = [part.to(F.device) for part in there]
                    wide.copy_(F)
                    if square:
                        wide.square_()
                    for part, found in zip(there, sums, strict=True):
                        if block_of is None:
                            found.append(torch.mv(wide, part)[:, None])
                        else:
                            of_blocks = wide.new_zeros((wide.shape[0], blocks))
                            found.append(of_blocks.index_add_(1, block_of[piece].to(F.device), wide * part))
                for (q, _), parts in zip(mine, sums, strict=True):
                    if parts:
                        scalars[q, own] += torch.cat([part.cpu() for part in parts]).numpy()
        total = self.dispatcher.scatter_add(scalars)
        return list(total[:, :, 0] if block_of is None else total)

    def surviving(self, p: int) -> NDArray[np.bool_]:
        """(N,) which perturbed rows of problem p count."""
        return np.asarray(self._valid[p][: self.strategy.num_samples])

    @collective
    def row_products(self, b: int, v: torch.Tensor) -> list[Array]:
        """<v, F_i> of the perturbed rows of each replicate of vector b: R arrays (N,). Collective."""
        self.require_rows("products with each row")
        self.dispatcher.begin("products", f"vector {b}")
        v = self._broadcast_vector(v)
        return [c[: self.strategy.num_samples] for c in self._products([(p, v) for p in self.replicates(b)])]

    @collective
    def vjp(self, pairs: Sequence[tuple[int, torch.Tensor]]) -> list[tuple[Array, Array | None]]:
        """For each (vector, v in R^m): gradients of <v, value> in theta, (R, d), and in L, (R, d) or (R, d, d), one for
        each replicate; the estimate is their mean. Collective.

        VJP(v) = L^-T W^T (F v): never builds m x d (arXiv 2410.08125, Lemma 3 and Theorem 7).
        """
        self.require_derivatives()
        self.dispatcher.begin("vjp", f"{len(pairs)} products")
        vectors = [(p, self._broadcast_vector(v)) for b, v in pairs for p in self.replicates(b)]
        if self.streamed:
            results = [self._pull_back(p, self._streamed_products(p, v)) for p, v in vectors]
        else:
            results = []
            for p, v in vectors:
                total: Array | float = 0.0
                for group, c in self._group_products(p, v):
                    weights = group.weights
                    assert weights is not None
                    columns = [w for w in (weights.theta, weights.scale) if w is not None]
                    # A sum in index order: the same bits whoever owned the rows.
                    if self.structure is None:
                        parts = [(w * c[:, None]).sum(axis=0) for w in columns]
                    else:
                        seen = self.structure.seen(c)
                        parts = [(w * seen).sum(axis=0) for w in columns]
                    total = total + np.concatenate(parts)
                results.append(self._pull_back(p, np.zeros(self.num_columns - 1) + total))
        R = self.strategy.replicates
        groups = [results[i : i + R] for i in range(0, len(results), R)]
        return [
            (np.stack([x for x, _ in group]), None if group[0][1] is None else np.stack([L for _, L in group]))  # type: ignore[misc]
            for group in groups
        ]

    def _streamed_products(self, p: int, v: torch.Tensor) -> Array:
        # One column at a time: a float64 copy of all of them would be twice the Jacobian.
        columns = self._sums[p][1:]
        v = v.to(columns.device)
        if self.structure is None:
            return np.array([torch.dot(c.to(torch.float64), v).item() for c in columns])
        mask = torch.as_tensor(self.structure.mask(self.output_shape), device=columns.device)
        return np.array(
            [torch.dot(c.to(torch.float64), v * mask[j % self.dimension]).item() for j, c in enumerate(columns)]
        )

    def require_derivatives(self) -> None:
        if not any(self._derivatives):
            raise InputError("This evaluation was made without derivatives; call estimate outside torch.no_grad().")

    def _broadcast_vector(self, v: torch.Tensor) -> torch.Tensor:
        flat = v.detach().reshape(-1).to("cpu", torch.float64)
        return aligned(torch.as_tensor(self.dispatcher.broadcast(flat.numpy())))

    def _pull_back(self, p: int, g: Array) -> tuple[Array, Array | None]:
        problem, d = self.problems[p], self.dimension
        x = pull_back_theta(problem.scale, g[:d])
        if not self._derivatives[1]:
            return x, None
        return x, pull_back_scale(problem.scale, g[d:].reshape(problem.scale.shape))

    @collective
    def hvp(self, triples: Sequence[tuple[int, torch.Tensor, Array]]) -> list[Array]:
        """For each (vector, v in R^m, u in R^d): d^2<v, value>/dx^2 u, (d,), from the second score. Collective.

        H = L^-T E[<v, f> (s s^T - diag(s'))] L^-1, without what a density with kinks has at its atoms.
        """
        self.require_derivatives()
        self.require_rows("second derivatives")
        self.dispatcher.begin("hvp", f"{len(triples)} products")
        vectors, tangents = [], []
        for b, v, u in triples:
            v, u = self._broadcast_vector(v), self.dispatcher.broadcast(u)
            vectors += [(p, v) for p in self.replicates(b)]
            tangents += [u] * self.strategy.replicates
        results = []
        for (p, v), u in zip(vectors, tangents, strict=True):
            scale, nodes, total = self.problems[p].scale, self.problems[p].design.nodes, np.zeros(self.dimension)
            for group, c in self._group_products(p, v):
                c = c if c.ndim == 1 else c.sum(axis=1)
                W = second_weights(self.strategy, nodes, group.valid, push_theta(scale, u))
                total = total + (W * c[:, None]).sum(axis=0)
            results.append(pull_back_theta(scale, self.factors[p] * total))
        R = self.strategy.replicates
        return [np.mean(results[i : i + R], axis=0) for i in range(0, len(results), R)]

    @collective
    def curvature(self, triples: Sequence[tuple[int, Array, Array]]) -> list[torch.Tensor]:
        """For each (vector, t in R^d, u in R^d): the second derivative of the value along t and u, (m,). Collective.

        From the second score, without what a density with kinks has at its atoms.
        """
        self.require_derivatives()
        self.require_rows("second derivatives")
        self.dispatcher.begin("curvature", f"{len(triples)} products")
        rows = []
        for b, t, u in triples:
            t, u = self.dispatcher.broadcast(t), self.dispatcher.broadcast(u)
            for p in self.replicates(b):
                scale, nodes = self.problems[p].scale, self.problems[p].design.nodes
                W = second_weights(self.strategy, nodes, self._valid[p], push_theta(scale, u))
                along = self.factors[p] * (W * push_theta(scale, t)).sum(axis=1)
                rows.append((p, along[None, :]))
        sums = [total[0] for total in self._tree_sums(rows)]
        R = self.strategy.replicates
        return [_mean(sums[i : i + R]) for i in range(0, len(sums), R)]

    @collective
    def jvp(self, triples: Sequence[tuple[int, Array, Array | None]]) -> list[torch.Tensor]:
        """For each (vector, tangent in theta, tangent in L or None): J t, (m,). Collective."""
        self.require_derivatives()
        self.dispatcher.begin("jvp", f"{len(triples)} products")
        eps_space = []
        for b, t, T in triples:
            scale = self.problems[b * self.strategy.replicates].scale
            parts = [push_theta(scale, self.dispatcher.broadcast(t))]
            if T is not None:
                if not self._derivatives[1]:
                    raise InputError("This evaluation was made without derivatives in the scale.")
                parts.append(push_scale(scale, self.dispatcher.broadcast(T)).reshape(-1))
            eps_space.append((b, parts))
        if self.streamed:
            results = []
            for b, parts in eps_space:
                replicates = []
                for p in self.replicates(b):
                    columns = self._sums[p][1:]
                    t_all = torch.as_tensor(np.concatenate(parts)).to(columns)
                    replicates.append(t_all @ self._masked(columns[: len(t_all)]))
                results.append(_mean(replicates))
            return results
        R = self.strategy.replicates
        wanted = []
        for b, parts in eps_space:
            for p in self.replicates(b):
                for own, index in self._blocks():
                    wanted.append((p, functools.partial(_along, parts, own), index))
        only = [index for *_, index in wanted]
        sums = [total[0] for total in self._group_sums([(p, of) for p, of, _ in wanted], only=only)]
        blocks = len(self._blocks())
        results = []
        for q in range(len(eps_space)):
            replicates = []
            for r in range(R):
                pieces = range((q * R + r) * blocks, (q * R + r + 1) * blocks)
                whole = sums[pieces[0]]
                for piece in pieces:
                    index = wanted[piece][2]
                    if index is not None:
                        whole[index] = sums[piece][index]
                replicates.append(whole)
            results.append(_mean(replicates))
        return results

    def _blocks(self) -> list[tuple[Any, torch.Tensor | None]]:
        """(parameters that touch it, its outputs) for each block of outputs; one block of all without structure."""
        if self.structure is None:
            return [(None, None)]
        block_of = self.structure.outputs(self.output_shape)
        touched = self.structure.touched(int(block_of.max()) + 1)
        return [(touched[g], torch.as_tensor(np.flatnonzero(block_of == g))) for g in np.unique(block_of)]

    def _masked(self, columns: torch.Tensor) -> torch.Tensor:
        if self.structure is None:
            return columns
        mask = torch.as_tensor(self.structure.mask(self.output_shape), device=columns.device)
        return columns * mask.repeat(len(columns) // self.dimension, 1)

    def _tree_sums(
        self,
        weights: Sequence[tuple[int, Array]],
        *,
        columns: Sequence[torch.Tensor | None] | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        spare: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """W F from kept rows in float64, for each (problem, W (c, num_rows)), by a tree over the units. Collective.

        Args:
            columns: for each, the outputs to sum; all where None.
            transform: applied to the rows first.
        """
        sums = [TreeSum(len(self.runs), spare, weight=self._exact_weight(w)) for _, w in weights]
        for tree, q, (p, w) in zip(sums, range(len(sums)), weights, strict=True):
            index = None if columns is None else columns[q]
            for unit, F in self._kept[p]:
                G = F if transform is None else transform(F)
                G = G if index is None else G[:, index.to(G.device)]
                if tree.weight is not None and G.dtype == torch.float32 and G.device.type == "cpu":
                    tree.add(unit.index, G)
                    continue
                part = aligned(torch.as_tensor(np.ascontiguousarray(w[:, unit.start : unit.stop])).to(G.device))
                total = tree.buffer(G if G.dtype == torch.float64 else G[:0].to(torch.float64), len(part))
                accumulate(total, part, G, first=True)
                tree.add(unit.index, total)
            tree.widen()
        if self.dispatcher.size == 1:
            return [tree.result() for tree in sums]
        owners = [self.leaf_owner(p, 1) for p, _ in weights]
        like = [
            self._like.new_empty(
                (len(w), self.num_outputs if columns is None or c is None else len(c)), dtype=torch.float64
            )
            for (_, w), c in zip(weights, columns or [None] * len(weights), strict=True)
        ]
        return self.dispatcher.finish(sums, like, owners)

    def _exact_weight(self, w: Array) -> float | None:
        """The weight of all rows, where they are leaves and it is a power of two: w a + w b is then w (a + b)."""
        one = self.strategy.leaf_size == 1 and len(w) == 1 and bool((w == w[0, 0]).all())
        return float(w[0, 0]) if one and math.frexp(w[0, 0])[0] == 0.5 else None

    def leaf_owner(self, p: int, units_in_leaf: int) -> NDArray[np.int64]:
        """(leaves,) the rank that adds each leaf of a problem: the one that has its first unit."""
        first = p * len(self.runs)
        leaves = self.leaf_of(len(self.runs), units_in_leaf)
        return self.owner[[first + self.leaf_start(leaf, units_in_leaf) for leaf in range(leaves)]]

    def leaf_of(self, index: int, units_in_leaf: int) -> int:
        """The leaf of a problem's unit; the unperturbed row is a leaf of its own. `index` may be one past the end."""
        regular = len(self.runs) - self.strategy.extra_row
        if index >= regular:
            return -(-regular // units_in_leaf) + (index - regular)
        return index // units_in_leaf

    def leaf_start(self, leaf: int, units_in_leaf: int) -> int:
        """The first unit of a leaf."""
        regular = len(self.runs) - self.strategy.extra_row
        leaves = -(-regular // units_in_leaf)
        return leaf * units_in_leaf if leaf < leaves else regular + (leaf - leaves)

    @collective
    def replicate_jacobians(self, b: int) -> list[torch.Tensor]:
        """J = F^T W L^-1 of each replicate of vector b: R tensors (m, d). Collective."""
        if not self._derivatives[0]:
            raise InputError("This evaluation was made without derivatives in the parameters.")
        self.dispatcher.begin("jacobian", f"vector {b}")
        problems = self.replicates(b)
        if self.streamed:
            all_columns = [self._sums[p][1 : 1 + self.dimension] for p in problems]
        else:
            all_columns = self._group_sums([(p, _theta_weights) for p in problems])
            for i, columns in enumerate(all_columns):
                if len(columns) < self.dimension:  # no number that enough rows have
                    all_columns[i] = columns.expand(self.dimension, -1)
        scale = self.problems[problems[0]].scale
        # Column r of L^-T W^T F^T: J = (L^-T A)^T for A (d, m) in eps-space.
        if scale.ndim == 1:
            return [self._masked(columns).T * torch.as_tensor(1 / scale).to(columns) for columns in all_columns]
        inverse = torch.as_tensor(np.linalg.inv(scale))
        return [self._masked(columns).T @ aligned(inverse.to(columns)) for columns in all_columns]

    @collective
    def second_moments(self, b: int, weights: Sequence[Array], centres: torch.Tensor) -> list[torch.Tensor]:
        """W (F - centre)^2 for each W (c, N), from kept rows of a single replicate: (c, m) each. Collective."""
        self.dispatcher.begin("second moments", f"vector {b}")
        (p,) = self.replicates(b)
        extra = self.strategy.num_rows - self.strategy.num_samples
        padded = [(p, np.pad(w, ((0, 0), (0, extra)))) for w in weights]
        return self._tree_sums(padded, transform=lambda F: (F.to(torch.float64) - centres.to(F.device)).square())

    @collective
    def row_scalars(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> Array:
        """function(F) of the perturbed rows of a kept problem, computed where the rows are: (N,). Collective.

        `function` maps (k, m) float64 to (k,) and treats each row by itself.
        """
        self.dispatcher.begin("row scalars", f"problem {p}")
        scalars = np.zeros(self.strategy.num_rows)
        for unit, F in self._kept[p]:
            scalars[unit.start : unit.stop] = function(F.to("cpu", torch.float64)).numpy()
        return self.dispatcher.scatter_add(scalars)[: self.strategy.num_samples]

    @collective
    def by_columns(self, p: int, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """function(F) of all perturbed rows of a kept problem, each rank taking a part of the outputs: (n, m) float64.

        `function` maps (N, width) float64 to (n, width) and treats each output by itself. The row blocks are
        transposed: each rank gives every other one a part of its rows, nobody holds all. Collective.
        """
        mine = sorted(
            ((unit.start, F) for unit, F in self._kept[p] if unit.start < self.strategy.num_samples),
            key=lambda pair: pair[0],
        )
        block = torch.cat([F for _, F in mine]) if mine else self._like
        columns = self.dispatcher.transpose(block.to("cpu", torch.float64))
        # They come in the order of ranks: back into that of rows.
        regular = len(self.runs) - self.strategy.extra_row
        owner = self.owner[p * len(self.runs) :][:regular]
        order = np.concatenate([np.arange(*self.runs[i]) for i in np.argsort(owner, kind="stable")])
        return self.dispatcher.concatenate(function(columns[np.argsort(order)]))

    def gather_rows(self, p: int) -> torch.Tensor:
        """All perturbed rows on every rank, (N, m) float64. Collective; for looking and for small outputs."""
        return self.by_columns(p, lambda columns: columns)


def _describe_keys(keys: Sequence[tuple[int, int]]) -> str:
    (step, first), count = keys[0], len(keys)
    if list(keys) == [(step, first + b) for b in range(count)]:
        return f"step {step}, problems {first} to {first + count - 1}"
    return f"{count} problems from step {step}, problem {first} on (digest {zlib.crc32(repr(keys).encode()):08x})"


def _value_weights(weights: Weights) -> Array:
    return weights.value[None]


def _theta_weights(weights: Weights) -> Array:
    return weights.theta.T


def _along(parts: Sequence[Array], own: Any, weights: Weights) -> Array:
    """The weights of the derivative along a tangent in eps-space, of some parameters: (1, num_rows)."""
    columns = [weights.theta * parts[0]]
    if len(parts) == 2:
        assert weights.scale is not None
        columns.append(weights.scale * parts[1])
    return np.asarray(sum((c if own is None else c[:, own]).sum(axis=1) for c in columns))[None, :]


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).mean(dim=0)


def _unit_runs(strategy: Strategy) -> list[tuple[int, int]]:
    n, size = strategy.num_samples, strategy.leaf_size
    runs = [(start, min(start + size, n)) for start in range(0, n, size)]
    return [*runs, (n, n + 1)] if strategy.extra_row else runs


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


def _one_line(why: str) -> str:
    """What a log has room for, a round: the first line, and where the run's directory is."""
    first, *more = why.splitlines() or [""]
    return first + "".join(f" ({line.strip()})" for line in more if line.startswith("  directory: "))
