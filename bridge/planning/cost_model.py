"""What a step costs on a number of ranks before it is run there: a model of what `bridge.dispatch` does.

A step is a forward pass and a gradient. Its parts, on the way of the rank that is last:

    step = (preparation + evaluation + adding + search + agreement + broadcast + reduction) x failures

* preparation: every rank makes the whole design and all weights by itself, whatever the number of ranks.
* evaluation: a rank's share of the units, the longest share, and what uneven runs add to it.
* adding: the weighted sums of a rank's own rows, bound by memory.
* search: a rank whose run is used up looks once at each of the others.
* agreement, broadcast, reduction: messages, each at latency + bytes / bandwidth.
* failures: of nodes, between checkpoints at Daly's interval.

The model has no contention: ranks of a node are taken to share neither memory bandwidth nor their way out.

References: Hockney 1994, Parallel Computing 20, 389 (latency and bandwidth); Thakur, Rabenseifner and Gropp 2005,
IJHPCA 19, 49 (collectives); Graham 1969, SIAM J. Appl. Math. 17, 416 (list scheduling); Young 1974, CACM 17, 530, and
Daly 2006, FGCS 22, 303 (checkpoints).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, special

from bridge.arrays import Array
from bridge.dispatch.tree import run_of, transfers
from bridge.errors import InputError
from bridge.estimators.strategy import default_leaf_size
from bridge.evaluation.layout import units_of_leaf
from bridge.evaluation.rows import CHUNK

# Runs shorter than this are not moved to other ranks: as in `bridge.evaluation.runner`.
_WORTH_MOVING_S = 0.002
# What ranks tell each other of an output's layout, as a pickle.
_LAYOUT_BYTES = 150
# Drawn evaluation times in all, for an average makespan under the dynamic schedule.
_DRAWS = 8192


def _require(good: bool, what: str, got: object) -> None:
    if not good:
        raise InputError(f"Expected {what}, got {got!r}.")


@dataclass(frozen=True)
class Machine:
    """What the machine is; the defaults are of a cluster with a good network. `bench_plan.py` measures them.

    Attributes:
        latency_s: of a message between two ranks, with what Python adds to it [s].
        bandwidth: of a message between two ranks [bytes/s].
        add_s_per_byte: of an addition bound by memory, for each byte read or written [s].
        evaluation_overhead_s: bridge's own time for each evaluation, beside what depends on the outputs' size [s].
        step_overhead_s: that of a step, on every rank alike [s].
        row_overhead_s: that of the design and the weights for each row of a step, on every rank alike [s].
        object_s: to unpickle one small object [s]: in some agreements each rank reads one of every other.
        ranks_per_node: how many ranks fail together.
    """

    latency_s: float = 1e-5
    bandwidth: float = 1e10
    add_s_per_byte: float = 1e-10
    evaluation_overhead_s: float = 1e-4
    step_overhead_s: float = 4e-3
    row_overhead_s: float = 1e-6
    object_s: float = 2e-6
    ranks_per_node: int = 64

    def __post_init__(self) -> None:
        for name in (
            *("latency_s", "add_s_per_byte", "evaluation_overhead_s"),
            *("step_overhead_s", "row_overhead_s", "object_s"),
        ):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"a {name} of at least 0", value)
        _require(self.bandwidth > 0, "a positive bandwidth", self.bandwidth)
        _require(self.ranks_per_node >= 1, "at least one rank for each node", self.ranks_per_node)


@dataclass(frozen=True)
class Workload:
    """What a step is to do.

    Attributes:
        cost_s: mean time of one evaluation [s]. cv: its coefficient of variation; times are lognormal.
        num_samples: N. num_outputs: m. dimension: d. batch: parameter vectors of one call.
        leaf_size: rows of a unit, as in `bridge.Ranks`. schedule: as there. keep_bytes: as `bridge.Memory(keep_mb=)`.
        bytes_per_number: of an output: 4 or 8.
        failure_probability: of one evaluation, which is then repeated.
        node_mtbf_s: mean time between failures of one node [s]; None for nodes that never fail.
        checkpoint_s: to write a checkpoint [s]. restart_s: until a job that failed computes again [s].
    """

    cost_s: float
    num_samples: int = 64
    num_outputs: int = 1
    dimension: int = 8
    cv: float = 0.0
    batch: int = 1
    leaf_size: int | None = None
    schedule: Literal["auto", "static", "dynamic"] = "auto"
    keep_bytes: float = 24e6
    bytes_per_number: int = 4
    failure_probability: float = 0.0
    node_mtbf_s: float | None = None
    checkpoint_s: float = 0.1
    restart_s: float = 60.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.cost_s) and self.cost_s > 0, "a positive cost of an evaluation", self.cost_s)
        for name in ("num_samples", "num_outputs", "dimension", "batch"):
            value = getattr(self, name)
            _require(int(value) == value and value >= 1, f"a positive integer {name}", value)
        _require(math.isfinite(self.cv) and self.cv >= 0, "a coefficient of variation of at least 0", self.cv)
        _require(self.leaf_size is None or self.leaf_size >= 1, "a positive leaf_size", self.leaf_size)
        _require(self.schedule in ("auto", "static", "dynamic"), "schedule auto, static or dynamic", self.schedule)
        _require(self.bytes_per_number in (4, 8), "4 or 8 bytes for each number", self.bytes_per_number)
        _require(
            0 <= self.failure_probability < 1,
            "a probability of failure of at least 0, below 1",
            self.failure_probability,
        )
        _require(self.node_mtbf_s is None or self.node_mtbf_s > 0, "a positive time between failures", self.node_mtbf_s)
        _require(self.checkpoint_s >= 0 and self.restart_s >= 0, "times of at least 0", self.checkpoint_s)

    @property
    def evaluations(self) -> int:
        """All evaluations of a step."""
        return self.batch * self.num_samples

    @property
    def unit_rows(self) -> int:
        """Rows that go to a rank as a whole."""
        return min(self.num_samples, self.leaf_size or default_leaf_size(self.num_samples))

    @property
    def units(self) -> int:
        """Units of a step: ranks beyond are idle."""
        return self.batch * -(-self.num_samples // self.unit_rows)

    @property
    def streamed(self) -> bool:
        """Whether outputs are added to the Jacobian as they come and dropped, see `bridge.evaluation.evaluation`."""
        size = self.evaluations * self.num_outputs * self.bytes_per_number
        return size > self.keep_bytes and 1 + self.dimension < self.num_samples

    @property
    def units_in_leaf(self) -> int:
        """Units that are added up before the tree."""
        return units_of_leaf(self.num_samples, self.unit_rows) if self.streamed else 1

    @property
    def with_repetitions(self) -> tuple[float, float]:
        """(mean, coefficient of variation) of the time until an evaluation has succeeded.

        The number of attempts is geometric, so mean = cost / (1 - p) and cv'^2 = (1 - p) cv^2 + p.
        """
        p = self.failure_probability
        return self.cost_s / (1 - p), math.sqrt((1 - p) * self.cv**2 + p)

    @property
    def dynamic(self) -> bool:
        """Whether idle ranks take units off others: "auto" does where a run takes 2 ms."""
        if self.schedule != "auto":
            return self.schedule == "dynamic"
        return self.cost_s >= _WORTH_MOVING_S


@dataclass(frozen=True)
class StepPrediction:
    """A step on `ranks` ranks; see the module for its parts, all in seconds.

    Attributes:
        useful_s: of the step, what even shares of the simulations alone would take: N cost / ranks.
        repeats_s: what evaluations add that fail and are repeated.
        uneven_s: what shares that cannot be even add: a rank's number of rows is an integer, and units stay whole.
        straggling_s: what runs of uneven length add.
        idle_ranks: ranks without any unit.
        bottleneck: the largest part beside the useful one, in words; "the simulations" above an efficiency of 0.9.
    """

    ranks: int
    useful_s: float
    repeats_s: float
    uneven_s: float
    straggling_s: float
    preparation_s: float
    adding_s: float
    search_s: float
    agreement_s: float
    broadcast_s: float
    reduction_s: float
    failures_s: float
    idle_ranks: int

    @property
    def evaluation_s(self) -> float:
        """Until the last rank has simulated its share."""
        return self.useful_s + self.repeats_s + self.uneven_s + self.straggling_s

    @property
    def step_s(self) -> float:
        """The whole step."""
        return self.useful_s + sum(self._losses().values())

    @property
    def efficiency(self) -> float:
        """N cost / (ranks x step): the part of the ranks' time in which they simulate."""
        return self.useful_s / self.step_s

    @property
    def speed_up(self) -> float:
        """Against nothing but the simulations on one core: ranks x efficiency."""
        return self.ranks * self.efficiency

    @property
    def bottleneck(self) -> str:
        losses = self._losses()
        return "the simulations" if self.efficiency > 0.9 else max(losses, key=lambda name: losses[name])

    def _losses(self) -> dict[str, float]:
        return {
            "failed evaluations": self.repeats_s,
            "more ranks than units" if self.idle_ranks else "uneven shares": self.uneven_s,
            "stragglers": self.straggling_s,
            "preparation of the step": self.preparation_s,
            "adding up outputs": self.adding_s,
            "looking for work": self.search_s,
            "agreement of ranks": self.agreement_s,
            "broadcasts": self.broadcast_s,
            "reduction of sums": self.reduction_s,
            "failures of nodes": self.failures_s,
        }


# --- the parts ------------------------------------------------------------------------------------------------------


def expected_maximum(groups: Iterable[tuple[int, float, float]]) -> float:
    """E[max] of independent lognormal times: the integral of 1 - prod_i F_i(x)^n_i over x > 0.

    Args:
        groups: (how many, mean, coefficient of variation) of each kind.

    Reference: David and Nagaraja 2003, Order Statistics, section 3.1.
    """
    groups = [group for group in groups if group[0] > 0 and group[1] > 0]
    if not groups:
        return 0.0
    least = max((mean for _, mean, cv in groups if cv == 0), default=0.0)
    random = [(n, math.log(mean) - s * s / 2, s) for n, mean, cv in groups if (s := math.sqrt(math.log1p(cv * cv))) > 0]
    if not random:
        return least
    # Over log x the integrand is smooth, and both tails fall like those of a Gaussian; below the grid it is 1.
    low = max(min(mu - 9 * s for _, mu, s in random), math.log(least) if least > 0 else -math.inf)
    high = max(low, *(mu + (9 + s) * s for _, mu, s in random))
    logs = np.linspace(low, high, 1 << 13)
    log_cdf = sum(n * special.log_ndtr((logs - mu) / s) for n, mu, s in random)
    x = np.exp(logs)
    return float(x[0] + integrate.trapezoid(-np.expm1(log_cdf) * x, logs))


def list_schedule(times: Sequence[float] | Array, ranks: int) -> float:
    """The makespan where a rank that is idle takes the next item: at most sum/ranks + (1 - 1/ranks) max (Graham)."""
    if ranks >= len(times):
        return float(max(times))
    free = [0.0] * ranks
    for taken in times:
        heapq.heapreplace(free, free[0] + float(taken))
    return max(free)


def _rows_of_units(workload: Workload) -> NDArray[np.int64]:
    """(units,) how many rows each unit has; the last of each problem may have fewer."""
    starts = np.arange(0, workload.num_samples, workload.unit_rows)
    return np.tile(np.diff(np.append(starts, workload.num_samples)), workload.batch)


def _shares(rows: NDArray[np.int64], ranks: int) -> NDArray[np.int64]:
    """(busy ranks,) rows of each rank's run of units."""
    ends = np.append(0, np.cumsum(rows))
    runs = [run_of(len(rows), rank, ranks) for rank in range(min(ranks, len(rows)))]
    return np.array([ends[run.stop] - ends[run.start] for run in runs])


def _makespan(rows: NDArray[np.int64], ranks: int, mean: float, cv: float, dynamic: bool) -> float:
    """Expected time until the last rank is through its units, of `mean` and `cv` a row.

    The sum of k independent lognormal times is taken to be lognormal of mean k mean and of cv / sqrt(k) (Fenton 1960,
    IRE Trans. 8, 57). Static shares: the expected maximum over ranks. Dynamic: the average makespan of list schedules
    of units whose times are the quantiles of their distribution in random orders, always the same ones.
    """
    shares = _shares(rows, ranks)
    kinds, counts = np.unique(shares, return_counts=True)
    static = expected_maximum((int(n), k * mean, cv / math.sqrt(k)) for k, n in zip(kinds, counts, strict=True))
    if not dynamic or cv == 0 or ranks == 1 or ranks >= len(rows):
        return static
    count = len(rows)
    sigma = np.sqrt(np.log1p(cv**2 / rows))
    spans = []
    for repeat in range(max(1, _DRAWS // count)):
        order = np.random.Generator(np.random.Philox(key=repeat)).permutation(count)
        normal = special.ndtri((order + 0.5) / count)
        times = np.exp(sigma * normal) * rows
        spans.append(list_schedule(times * (mean * rows.sum() / times.sum()), ranks))
    # Ranks that are through at the same time have nothing to give each other.
    return min(static, float(np.mean(spans)))


def _bytes_added(workload: Workload) -> float:
    """Bytes of memory that are read or written for each row to add it up, without the simulator's own.

    Streamed, a chunk of k rows is read once and 1 + d sums are read and written. Kept, a row is copied, checked and
    multiplied in the forward pass, and copied to float64 and multiplied with v in the backward pass.
    """
    m, b = workload.num_outputs, workload.bytes_per_number
    if workload.streamed:
        columns, k = 1 + workload.dimension, min(CHUNK, workload.units_in_leaf * workload.unit_rows)
        in_tree = 3 * columns / (workload.units_in_leaf * workload.unit_rows)
        return m * b * (1 + 2 * columns / k + in_tree)
    return m * (b * (4 + 3 / workload.unit_rows) + b + 8 + 16)


def _log2(ranks: int) -> int:
    return (ranks - 1).bit_length()


def broadcast_time(size: float, ranks: int, machine: Machine) -> float:
    """Of `size` bytes to all ranks: the better of a binomial tree, log2 R messages of the whole, and, for long
    messages, a scatter and an allgather around the ring (Thakur, Rabenseifner and Gropp 2005, section 4.2)."""
    if ranks == 1:
        return 0.0
    tree = _log2(ranks) * (machine.latency_s + size / machine.bandwidth)
    ring = (_log2(ranks) + ranks - 1) * machine.latency_s + 2 * (ranks - 1) / ranks * size / machine.bandwidth
    return min(tree, ring)


def _allreduce_time(size: float, ranks: int, machine: Machine) -> float:
    """Recursive doubling, as for all sums of scalars; long ones by halving and doubling (as above, section 4.5)."""
    latency, rate = machine.latency_s, 1 / machine.bandwidth + 3 * machine.add_s_per_byte
    doubling = _log2(ranks) * (latency + size * rate)
    return min(doubling, 2 * _log2(ranks) * latency + 2 * size * rate) if ranks > 1 else 0.0


def _agreement_time(workload: Workload, ranks: int, machine: Machine) -> float:
    """The small collectives of a step, in the order of `evaluate_problems`: two openings, two agreements on errors, the
    owners of the units, the outputs' layout, the clipped rows; and, where outputs are kept, the N products <v, F_i>."""
    if ranks == 1:
        return 0.0
    gathers = [24.0, 24.0, _LAYOUT_BYTES]
    sums = [8.0, 8.0, 8.0 * workload.units, 8.0]
    sums.append(8.0 * (workload.units if workload.streamed else workload.evaluations))
    gathering = sum(_log2(ranks) * machine.latency_s + (ranks - 1) * size / machine.bandwidth for size in gathers)
    return gathering + machine.object_s * ranks + sum(_allreduce_time(size, ranks, machine) for size in sums)


def _reduction_time(workload: Workload, ranks: int, machine: Machine) -> float:
    """Rows of shared leaves to the rank that adds the leaf, the tree across ranks, and its root to all.

    Followed message by message, as `Stream` and `MPIDispatcher.finish` send them, on one clock a rank; a message takes
    latency + bytes / bandwidth of both ranks, from when both are there.
    """
    if ranks == 1:
        return 0.0
    m, b = workload.num_outputs, workload.bytes_per_number
    size = float(m * b * ((1 + workload.dimension) if workload.streamed else 1))
    in_leaf, rows = workload.units_in_leaf, _rows_of_units(workload)
    per_problem = workload.units // workload.batch
    owner = np.concatenate([[rank] * len(run_of(len(rows), rank, ranks)) for rank in range(min(ranks, len(rows)))])
    clock = np.zeros(min(ranks, len(rows)))

    def send(source: int, dest: int, size: float, then: float) -> None:
        end = max(clock[source], clock[dest]) + machine.latency_s + size / machine.bandwidth
        clock[source], clock[dest] = end, end + then

    for unit in range(len(rows)) if in_leaf > 1 else ():
        home = owner[unit - unit % per_problem % in_leaf]
        if owner[unit] != home:
            then = rows[unit] * _bytes_added(workload) * machine.add_s_per_byte
            send(owner[unit], home, float(rows[unit]) * m * b, then)
    for problem in range(workload.batch):
        leaves = owner[problem * per_problem : (problem + 1) * per_problem : in_leaf]
        for _, source, dest in transfers(leaves):
            send(source, dest, size, 3 * size * machine.add_s_per_byte)
    return float(clock.max()) + workload.batch * broadcast_time(size, ranks, machine)


def daly_interval(checkpoint_s: float, mtbf_s: float) -> float:
    """The time between checkpoints for which a job ends soonest [s].

    It solves e^{(t + c) / M} (1 - t / M) = 1: t = M (1 + W(-e^{-1 - c/M})), W the principal branch of Lambert's
    function; Young's sqrt(2 c M) for c << M. Without cost of a checkpoint it is 0.

    Reference: Daly 2006, equation 20, of which equation 37 is the series.
    """
    if checkpoint_s == 0:
        return 0.0
    return float(mtbf_s * (1 + special.lambertw(-math.exp(-1 - checkpoint_s / mtbf_s)).real))


def daly_slowdown(interval_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float) -> float:
    """Expected wall time with failures over that without: e^{R/M} (e^{(t + c)/M} - 1) M / t; Daly 2006, equation 20."""
    if interval_s == 0:
        return math.exp(restart_s / mtbf_s)  # the limit for t = c -> 0
    growth = math.expm1(min(700.0, (interval_s + checkpoint_s) / mtbf_s))
    return math.exp(min(700.0, restart_s / mtbf_s)) * growth * mtbf_s / interval_s


# --- a step ---------------------------------------------------------------------------------------------------------


def predict(workload: Workload, machine: Machine, ranks: int) -> StepPrediction:
    """What a step takes on `ranks` ranks.

    Failures of nodes cost what Daly's formula says at the best interval; with a store (`bridge.Run`) finished
    evaluations are not lost, so that is more than a long step loses.

    Raises:
        InputError: no positive number of ranks.
    """
    _require(int(ranks) == ranks and ranks >= 1, "a positive integer number of ranks", ranks)
    mean, cv = workload.with_repetitions
    rows = _rows_of_units(workload)
    most = int(_shares(rows, ranks).max())
    each = machine.evaluation_overhead_s + _bytes_added(workload) * machine.add_s_per_byte
    whole = mean + each
    even = most * whole
    evaluation = _makespan(rows, ranks, whole, cv * mean / whole, workload.dynamic)
    useful = workload.evaluations * workload.cost_s / ranks
    vectors = [8.0 * workload.batch * workload.dimension] * 2 + [8.0 * workload.num_outputs] * workload.batch
    prediction = StepPrediction(
        ranks=int(ranks),
        useful_s=useful,
        repeats_s=workload.evaluations * mean / ranks - useful,
        uneven_s=(most - workload.evaluations / ranks) * mean,
        straggling_s=max(0.0, evaluation - even),
        preparation_s=machine.step_overhead_s + machine.row_overhead_s * workload.evaluations,
        adding_s=most * each,
        search_s=2 * machine.latency_s * (ranks - 1) if workload.dynamic else 0.0,
        agreement_s=_agreement_time(workload, ranks, machine),
        broadcast_s=sum(broadcast_time(size, ranks, machine) for size in vectors),
        reduction_s=_reduction_time(workload, ranks, machine),
        failures_s=0.0,
        idle_ranks=max(0, ranks - workload.units),
    )
    if workload.node_mtbf_s is None:
        return prediction
    mtbf = workload.node_mtbf_s / -(-ranks // machine.ranks_per_node)
    slowdown = daly_slowdown(
        daly_interval(workload.checkpoint_s, mtbf), workload.checkpoint_s, workload.restart_s, mtbf
    )
    return replace(prediction, failures_s=prediction.step_s * (slowdown - 1))
