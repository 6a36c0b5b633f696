"""Simulators as PyTorch functions: smoothing of the algorithm, f_L(x) = E[f(x + L eps)], and of a loss of it."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import forward_ad

from bridge.arrays import one_number
from bridge.checks import is_whole, known_keywords, refuse_unknown
from bridge.dispatch import Dispatcher, get_dispatcher
from bridge.environment import step_limit
from bridge.errors import InputError
from bridge.estimators.design import Strategy, make_strategy, whole_number
from bridge.estimators.distributions import Distribution
from bridge.estimators.points import PointSet
from bridge.estimators.scale import Form, LogScale, LowerTriangular, ScaleLike, as_tensor, check_scale, parse_scale
from bridge.evaluation.runner import Execution
from bridge.evaluation.streamed import as_rows
from bridge.evaluation.workers import IsolatedSimulator, SimulatorPool
from bridge.simulator.protocol import (
    Parallel,
    ParameterSpace,
    Simulator,
    as_simulator,
    computes_row_by_row,
    counts_runs,
    makes_memory,
    simulator_name,
    unwatched,
)
from bridge.smoothing.adaptive import AdaptiveEstimate, Quantity, estimate_to
from bridge.smoothing.autograd import Call, Smooth, apply, has_tangent, make_keys, old_vmap_depth, to_numpy
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.surrogate import Surrogate, make_surrogate
from bridge.storage.store import Store

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm

P = ParamSpec("P")
T = TypeVar("T")


_NO_GRAPH = (
    "Expected parameters with numbers, got traced ones: a smoothed function cannot be part of a graph that is written "
    "down (torch.export, torch.jit.trace, torch.fx, make_fx, torch.func.linearize), because its value comes from runs "
    "of the simulator. Export what comes before and after it by itself; torch.compile leaves it out, and "
    "torch.func.jvp or estimate(theta).jvp stand in for linearize."
)


def _exporting() -> bool:
    # Newer than the oldest torch that is taken.
    return bool(getattr(torch.compiler, "is_exporting", bool)())


def _outside_graphs(method: Callable[P, T]) -> Callable[P, T]:
    """Keeps torch.compile out of a method: the graph breaks there, what is before and after it is compiled.

    `torch.compiler.disable` does so at once, but costs every import two seconds.
    """

    @wraps(method)
    def inner(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():
            if _exporting():
                raise InputError(_NO_GRAPH)
            result: T = torch.compiler.disable(method)(*args, **kwargs)
            return result
        return method(*args, **kwargs)

    return inner


@dataclass
class Spent:
    """What a smoothed simulator has cost so far, on all ranks together.

    Attributes:
        cached: runs of the simulator whose outputs were found in the store. surrogate: runs of its surrogate.
    """

    cached: int = 0
    surrogate: int = 0


class SmoothedSimulator:
    """A simulator as a differentiable function; made by `bridge.smooth` and `bridge.smooth_loss`."""

    def __init__(
        self,
        simulator: Simulator,
        strategy: Strategy,
        scale: ScaleLike,
        dispatcher: Dispatcher,
        execution: Execution,
        surrogate: Surrogate | None = None,
    ) -> None:
        self.simulator, self.strategy, self.scale = simulator, strategy, scale
        self.dispatcher, self.execution, self.surrogate = dispatcher, execution, surrogate
        self.spare: list[torch.Tensor] = []
        self.spent = Spent()
        self._last: tuple[bytes, bytes] | None = None
        self._warned = False

    def __repr__(self) -> str:
        s = self.strategy
        return (
            f"SmoothedSimulator({simulator_name(self.simulator)}, {s.distribution.name}, {s.points.name}, "
            f"num_samples={s.num_samples}, covariate={s.covariate!r}, seed={s.seed})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SmoothedSimulator:
        """A copy with a scale of its own, as a copy of a module needs it; the simulator is shared."""
        tensor = self.scale.tensor if isinstance(self.scale, (LowerTriangular, LogScale)) else self.scale
        if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
            raise InputError(
                "Expected a scale that is no result of other tensors to copy a smoothed function, got one that hangs "
                "in a graph. Give the computed scale at each call: smoothed(theta, scale=...)."
            )
        return self._with(copy.deepcopy(self.scale, memo))

    def __copy__(self) -> SmoothedSimulator:
        return self._with(self.scale)

    def _with(self, scale: ScaleLike) -> SmoothedSimulator:
        return SmoothedSimulator(self.simulator, self.strategy, scale, self.dispatcher, self.execution, self.surrogate)

    def __reduce__(self) -> Any:
        # By value, as simulators travel to other processes. Not the scale: a module may hold the same tensor.
        parts = (self.simulator, self.strategy, self.dispatcher, self.execution, self.surrogate)
        try:
            data = cloudpickle.dumps(parts)
        except Exception as error:
            raise InputError(
                f"Expected a simulator that can be pickled, got {simulator_name(self.simulator)!r}: {error}. Open "
                "files, sockets and libraries inside the simulator's call; or make the smoothed function anew in the "
                "other process."
            ) from error
        return _restored, (data, self.scale)

    def with_strategy(self, strategy: Strategy) -> SmoothedSimulator:
        """The same, estimated in another way; a surrogate has its rows of each replicate."""
        other = SmoothedSimulator(self.simulator, strategy, self.scale, self.dispatcher, self.execution, self.surrogate)
        other.spent = self.spent
        return other

    @_outside_graphs
    def __call__(
        self,
        theta: torch.Tensor,
        step: int | torch.Tensor = 0,
        *,
        scale: ScaleLike | None = None,
        problem: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """The smoothed value f_L(theta), differentiable in theta and in the scale.

        Under `torch.func.vmap` each problem is what a call of its own would be, whatever `chunk_size` is: all have the
        same noise. `vmap(lambda x, b: smoothed(x, problem=b))(X, torch.arange(len(X)))` gives each its own, that of
        `smoothed(X)`.

        Args:
            theta: (*batch, d) parameters; a batch is one dispatch of batch x num_samples runs, with independent noise.
            step: part of the key of the noise: pass the iteration. The same (seed, step) and theta give the same bits.
                An integer, or an integer tensor: one number, or one for each problem of the batch.
            scale: in place of the one given to `smooth`, for a schedule or under `torch.func.vmap`.
            problem: key of the first row of the batch; `problem=b` reproduces row b of a batched call. An integer
                tensor of shape `batch` has a key for each: with the numbers of the data of a minibatch, a datum has the
                same noise in whichever batch it is.

        Returns:
            (*batch, *output_shape), dtype and device of theta. Collective under MPI.

        Raises:
            InputError: theta or scale of the wrong shape or not finite.
            EvaluationError, OutputError: a run failed or gave something unusable.
        """
        theta, tensor, form, space = self._prepare(theta, scale)
        transformed = torch._C._functorch.maybe_current_level() is not None
        keys = _make_keys(step, problem, theta.shape[:-1])
        tangents = has_tangent(theta, tensor)
        need = torch.is_grad_enabled() or tangents
        # Values alone, as of the items of a data set, are no optimiser's.
        if not transformed and not old_vmap_depth() and need and (tangents or theta.requires_grad):
            self._notice_frozen_noise(theta, keys)
        call = Call(
            self,
            0,
            space,
            form,
            need_theta=need and (transformed or tangents or theta.requires_grad or tensor.requires_grad),
            need_scale=need and (tensor.requires_grad or has_tangent(tensor)),
        )
        core = 1 if form == "diagonal" else 2
        shared = tensor.reshape((1,) * (theta.ndim - 1) + tuple(tensor.shape[tensor.ndim - core :]))
        value: torch.Tensor = apply(Smooth, theta, shared, keys, call)[0]
        return value

    @_outside_graphs
    def estimate(
        self,
        theta: torch.Tensor,
        step: int | torch.Tensor = 0,
        *,
        scale: ScaleLike | None = None,
        problem: int | torch.Tensor = 0,
        replicate: int = 0,
        scale_gradient: bool = False,
        scales: torch.Tensor | None = None,
    ) -> Estimate:
        """Value, Jacobian and products with it, outside autograd.

        Args:
            theta, step, scale, problem: as in a call.
            replicate: key of the first replicate: other ones are independent of these.
            scale_gradient: also prepare derivatives in L (`Estimate.vjp_scale`).
            scales: one L for each problem of the batch, (*batch, d) diagonals or (*batch, d, d), in parameter units.

        Returns:
            an `Estimate`. Collective under MPI, as are its methods.
        """
        own = None if scales is None else as_tensor(scales).to(torch.float64)
        first = scale if own is None else own.reshape(-1, *own.shape[as_tensor(theta).ndim - 1 :])[0]
        theta, tensor, form, space = self._prepare(theta, first)
        keys = _make_keys(step, problem, theta.shape[:-1])
        call = Call(self, whole_number("replicate", replicate), space, form, need_theta=True, need_scale=scale_gradient)
        core = 1 if form == "diagonal" else 2
        shared = tensor.reshape((1,) * (theta.ndim - 1) + tuple(tensor.shape[tensor.ndim - core :]))
        if own is not None:
            if own.shape != (*theta.shape[:-1], *tensor.shape):
                raise InputError(
                    f"Expected a scale for each problem, {(*theta.shape[:-1], *tensor.shape)}, got {tuple(own.shape)}."
                )
            shared = own
        number = call.evaluate(theta, shared, keys)
        return Estimate(call.evaluations[number], tuple(theta.shape[:-1]), lambda x: x.to(theta))

    @_outside_graphs
    def squared_error(
        self,
        theta: torch.Tensor,
        target: torch.Tensor,
        step: int | torch.Tensor = 0,
        *,
        weight: torch.Tensor | float = 1.0,
        scale: ScaleLike | None = None,
        problem: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """mean_j w_j (f_L(theta)_j - target_j)^2, unbiased in value and gradient: (*batch,), differentiable once.

        In place of `((smoothed(theta) - target)**2).mean()`, whose expectation is larger by tr C / N. Needs
        points="mc"; `covariate="auto"` is taken as leave-one-out. See `Estimate.squared_error`.
        """
        centred = self
        if self.strategy.covariate == "auto":
            centred = self.with_strategy(replace(self.strategy, covariate="loo"))
        given, tensor, _, _ = centred._prepare(theta, scale)
        estimate = centred.estimate(
            given.detach(), step, scale=scale, problem=problem, scale_gradient=tensor.requires_grad
        )
        result = estimate.squared_error(target, weight)
        # A tangent plane with this value and these gradients: autograd needs no more to differentiate once.
        value = result.value + ((given - given.detach()) * result.gradient).sum(dim=-1)
        if result.scale_gradient is not None and tensor.requires_grad:
            core = tensor.ndim
            product = (tensor - tensor.detach()) * result.scale_gradient.to(tensor)
            value = value + product.sum(dim=tuple(range(-core, 0))).to(value)
        return value

    @_outside_graphs
    def estimate_to(
        self,
        theta: torch.Tensor,
        step: int | torch.Tensor = 0,
        *,
        relative_error: float,
        budget: int,
        of: Quantity = "jacobian",
        scale: ScaleLike | None = None,
    ) -> AdaptiveEstimate:
        """An estimate with as many simulations as its accuracy needs; see `adaptive`. Collective under MPI."""
        return estimate_to(self, theta, step, relative_error=relative_error, budget=budget, of=of, scale=scale)

    def _prepare(
        self, theta: torch.Tensor, scale: ScaleLike | None
    ) -> tuple[torch.Tensor, torch.Tensor, Form, ParameterSpace]:
        _refuse_graphs(theta)
        try:
            theta = as_tensor(theta)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Expected a tensor of parameters, (d,) or (*batch, d), got {theta!r}. Give numbers in the order of "
                "the parameters: torch.tensor([...])."
            ) from error
        if not theta.is_floating_point():
            raise InputError(f"Expected floating-point parameters, got dtype {theta.dtype}. Use theta.double().")
        if theta.ndim == 0:
            raise InputError("Expected parameters of shape (d,) or (*batch, d), got a scalar. Use theta.reshape(1).")
        if math.prod(theta.shape) == 0:
            raise InputError(f"Expected at least one parameter and one problem, got shape {tuple(theta.shape)}.")
        d = theta.shape[-1]
        space = self.simulator.space or ParameterSpace.unnamed(d)
        if space.dimension != d:
            raise InputError(
                f"Expected parameters of shape (..., {space.dimension}) ({', '.join(space.names)}), got "
                f"{tuple(theta.shape)}."
            )
        tensor, form = parse_scale(
            self.scale if scale is None else _by_name(scale, self.simulator),
            space.natural_scale,
            self.strategy.distribution,
        )
        return theta, tensor, form, space

    def _notice_frozen_noise(self, theta: torch.Tensor, keys: torch.Tensor) -> None:
        if forward_ad._current_level >= 0:
            theta = forward_ad.unpack_dual(theta).primal
        numbers, values = keys.numpy().tobytes(), to_numpy(theta).tobytes()
        last, self._last = self._last, (numbers, values)
        if self._warned or last is None or last[0] != numbers or last[1] == values or len(last[1]) != len(values):
            return
        self._warned = True
        step = int(keys.reshape(-1, 2)[0, 0])
        warnings.warn(
            f"The parameters changed but step={step} did not: the noise is frozen, so an optimiser fits it. Pass the "
            "iteration, smoothed(theta, step=i). (Shown once; frozen noise on purpose is fine.)",
            stacklevel=3,
        )


def _restored(data: bytes, scale: ScaleLike) -> SmoothedSimulator:
    simulator, strategy, dispatcher, execution, surrogate = pickle.loads(data)
    return SmoothedSimulator(simulator, strategy, scale, dispatcher, execution, surrogate)


def _refuse_graphs(theta: Any) -> None:
    """Refuses tensors without numbers, and being written into a graph: a simulator's runs cannot be in one."""
    known = torch._C._TorchDispatchModeKey
    modes = (known.PROXY, known.FAKE, known.FUNCTIONAL)
    traced = torch._C._get_tracing_state() is not None or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in modes
    )
    if traced or type(theta).__name__ in ("Proxy", "FakeTensor"):
        raise InputError(_NO_GRAPH)
    if isinstance(theta, torch.Tensor) and (theta.is_meta or theta.layout != torch.strided):
        raise InputError(
            f"Expected dense parameters in memory, got a tensor on {theta.device} of layout {theta.layout}. Use "
            "theta.to_dense(), or a tensor that has numbers."
        )


def _make_keys(step: int | torch.Tensor, problem: int | torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
    return make_keys(_key("step", step, batch), _key("problem", problem, batch), batch)


def _key(name: str, value: Any, batch: Sequence[int]) -> int | torch.Tensor:
    """A number, or a tensor of them, whose values are looked at where the mapping of `torch.func.vmap` is undone."""
    if isinstance(value, np.ndarray) and value.ndim and value.dtype.kind in "iu":
        if value.size and int(value.max()) >= 1 << 63:
            raise InputError(f"Expected {name} to be integers from 0 to 2^63 - 1, got {value.max()}.")
        value = torch.as_tensor(value.astype(np.int64))  # in this machine's byte order
    if not isinstance(value, torch.Tensor):
        return whole_number(name, value)
    exact = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not exact or tuple(value.shape) not in ((), tuple(batch)):
        shapes = "one number" if len(batch) == 0 else f"one number, or one for each problem, of shape {tuple(batch)}"
        raise InputError(
            f"Expected {name} to be an integer of at least 0, or an integer tensor ({shapes}), got a tensor of shape "
            f"{tuple(value.shape)} and {value.dtype}."
        )
    return value


@known_keywords
def smooth(
    simulator: Callable[..., Any] | Simulator,
    *,
    seed: int | None = None,
    num_samples: int = 64,
    distribution: str | Distribution = "gaussian",
    scale: ScaleLike = 1.0,
    points: str | PointSet = "auto",
    antithetic: bool = False,
    covariate: str = "auto",
    replicates: int = 1,
    forward: str = "smoothed",
    simulator_seeds: str = "common",
    failures: str = "raise",
    penalty: float | None = None,
    min_ok: float = 0.5,
    missing: str = "raise",
    retries: int = 0,
    isolate: str | None = None,
    timeout_s: float | None = None,
    workers: int | None = None,
    own_directory: bool | str | PathLike[str] = False,
    ranks_per_evaluation: int = 1,
    schedule: str = "auto",
    store: Store | None = None,
    leaf_size: int | None = None,
    keep_megabytes: float = 24.0,
    memory_megabytes: float | None = None,
    step_limit_s: float | None = None,
    surrogate: Callable[..., Any] | Simulator | None = None,
    surrogate_samples: int = 1024,
    surrogate_weight: float | Literal["auto"] = 1.0,
    comm: Intracomm | None = None,
) -> SmoothedSimulator:
    """Makes a black box differentiable by smoothing the algorithm: f_L(x) = E[f(x + L eps)].

    Its Jacobian is E[f(x + L eps) (L^-T s(eps))^T], s the score of the density; f itself is never differentiated and
    may be discontinuous. Unbiased for independent rows with covariate none, f(x), loo or auto, and for randomised
    quasi-Monte Carlo points with none; see `bridge.estimators.covariates` for the others.

    Args:
        simulator: f: a function of a (d,) float64 array, or a `Simulator`.
        seed: of all noise; required.
        num_samples: N, simulator runs for each parameter vector; powers of two suit Sobol' points.
        distribution: gaussian, logistic, gumbel, cauchy, laplace, triangular, or a `Distribution`.
        scale: L: a number (in the parameters' natural units), (d,) (its diagonal), or name -> its entry there, (d, d)
            (L itself) or `LowerTriangular`, or `LogScale`; tensors that require grad are learned.
        points: auto, mc, qmc-latin, rqmc-latin, qmc-cartesian, rqmc-cartesian, sobol, qmc-net, rqmc-net, halton,
            orthogonal, or a `PointSet`. "auto" chooses by N, d and the distribution; `Estimate.points_reason` says why.
        antithetic: pairs eps, -eps; symmetric densities and even N.
        covariate: auto, none, f(x), loo, mean, block, regression, bq: see `bridge.estimators.covariates`; what "auto"
            took, and why, is in `Estimate.covariate_reason`.
        replicates: R independent parts of num_samples / R rows each, whose spread gives standard errors of any point
            set; 4 to 8 suit. With 1 only independent rows have standard errors.
        forward: "smoothed" returns the mean; "unsmoothed" returns f(x) (one run more), with the smoothed gradient.
        simulator_seeds: "common" hands all perturbations of a step the same seed (common random numbers), "independent"
            each row its own. Replicates always have seeds of their own.
        failures: what becomes of runs that raise, take too long, or are not finite. "raise": the same error on every
            rank. "drop": they are left out (pairs as a whole) and the weights recomputed; the estimate is then that of
            the runs that succeed: biased, unless failing is independent of the perturbation. "penalty": `penalty`
            stands in the place of each number of their outputs. The latter two need memory for all outputs.
        penalty: for failures="penalty".
        min_ok: with drop or penalty: an error on every rank where a smaller share of an evaluation's runs succeeds.
        missing: "raise": an output with NaN is a failed run. "ignore": NaN, and masked numbers of a `numpy.ma` output,
            are numbers that the simulator did not get to. Value and derivatives of each number are then those of the
            runs that have it, with weights of their own: biased, unless lacking it is independent of the perturbation.
            A number that fewer than `min_ok` of the runs have is NaN in the value and has no part in gradients. An
            output without any number, or with an infinite one, stays a failed run. Needs memory for all outputs.
        retries: further attempts at a run that raises or takes too long, with the same inputs and seed.
        isolate: "process" runs the simulator in a child process of each rank: one that crashes (a segmentation fault,
            `exit`) or hangs is then a failed evaluation like any other. Costs about 0.4 ms a run, and the outputs'
            way through a pipe.
        timeout_s: seconds that one run may take, with isolate="process" or workers; a run that takes longer is killed.
        workers: child processes of each rank, which evaluate at the same time: a pool that needs no MPI.
        own_directory: gives each of these processes a fresh working directory of its own, removed when it ends: for
            simulators that write files of fixed names. True for one in the system's temporary directory, or a folder.
            Files that are read then need absolute paths.
        ranks_per_evaluation: ranks that evaluate one row together, for a simulator that is itself an MPI program (see
            `as_simulator(..., parallel=True)`); it divides the number of ranks.
        schedule: "static" gives each rank an even share of the rows, "dynamic" lets idle ranks take rows off busy ones,
            "auto" does so where a run takes more than 2 ms. No result depends on it.
        store: a `Store`: finished evaluations are kept on disk and found again. No result depends on it.
        leaf_size: rows of one unit that goes to a rank as a whole; default from N alone. Part of the result's last
            bits.
        keep_megabytes: outputs up to this size, over all ranks, are kept for backward; larger ones are streamed into
            the Jacobian where that is smaller.
        memory_megabytes: outputs that a rank keeps beyond this are written to its local disk (TMPDIR).
        step_limit_s: when an evaluation, forward or backward, takes longer, every rank prints its stack and the job
            ends; by default BRIDGE_STEP_LIMIT_S, or no limit.
        surrogate: g, a cheap stand-in for f (the same code on a coarser grid, an emulator): the estimate becomes that
            of f - alpha g at the same num_samples rows plus alpha times that of g at others. As unbiased as without,
            whatever g is; see `bridge.smoothing.surrogate`. Same parameters and shape of output; runs as f does
            (isolate, store).
        surrogate_samples: M, runs of g at rows of its own; it runs at the num_samples rows as well.
        surrogate_weight: alpha. 1 suits a g close to f in value. "auto" estimates for each replicate, from the others,
            the one of least variance, and so needs replicates (8, or 4).
        comm: an mpi4py communicator; by default all ranks that the launcher started.

    Returns:
        a `SmoothedSimulator`: call it as `smoothed(theta, step=i)`, or ask `smoothed.estimate(theta)`.

    Raises:
        InputError: no seed, an unknown name, an infeasible combination.
        SetupError: a launcher was used but MPI does not work.

    Reference: arXiv 2410.08125, Lemma 3 and Theorem 7.
    """
    strategy = make_strategy(
        seed=seed,
        num_samples=num_samples,
        replicates=replicates,
        distribution=distribution,
        points=points,
        antithetic=antithetic,
        covariate=covariate,
        forward=forward,
        simulator_seeds=simulator_seeds,
        failures=failures,
        penalty=penalty,
        min_ok=min_ok,
        missing=missing,
        leaf_size=leaf_size,
    )
    wrapped = as_simulator(simulator)
    if schedule not in ("auto", "static", "dynamic"):
        raise InputError(f"Unknown schedule={schedule!r}. Known: auto, static, dynamic.")
    for name, number, least in (("retries", retries, 0), ("ranks_per_evaluation", ranks_per_evaluation, 1)):
        if not is_whole(number, least):
            raise InputError(f"Expected an integer {name} of at least {least}, got {number!r}.")
    for name, limit in (("memory_megabytes", memory_megabytes), ("step_limit_s", step_limit_s)):
        if limit is not None and not limit > 0:
            raise InputError(f"Expected a positive {name}, got {limit!r}.")
    if store is not None and not isinstance(store, Store):
        raise InputError(f"Expected a store, got {store!r}. Give store=bridge.Store({store!r}).")
    dispatcher = get_dispatcher(comm, ranks_per_evaluation)
    if ranks_per_evaluation > 1 and (isolate is not None or workers is not None):
        raise InputError("Expected ranks_per_evaluation without isolate and workers: the ranks run the simulator.")
    if isolate not in (None, "process"):
        raise InputError(f"Unknown isolate={isolate!r}. Known: process, or None.")
    if own_directory is not False and isolate is None and workers is None:
        raise InputError(
            "Expected isolate='process' or workers with own_directory: this process's own directory is not changed."
        )
    if timeout_s is not None and isolate is None and workers is None:
        raise InputError(
            "Expected isolate='process' or workers with timeout_s: a run inside this process cannot be ended."
        )
    if dispatcher.rank > 0:  # one rank tells enough
        unwatched(wrapped)
    if store is not None:  # no run is paid for twice
        counts_runs(wrapped)
    place = (
        None if own_directory is False else Path(gettempdir() if own_directory is True else own_directory).absolute()
    )
    stand_in = None
    if surrogate is not None:
        cheap = as_simulator(surrogate)
        stand_in = make_surrogate(cheap, wrapped, strategy, surrogate_samples, surrogate_weight)
        stand_in = replace(stand_in, simulator=_placed(cheap, dispatcher, isolate, workers, timeout_s, place))
    scale = _by_name(scale, wrapped)
    wrapped = _placed(wrapped, dispatcher, isolate, workers, timeout_s, place)
    if wrapped.space is not None:
        _validate_scale(scale, wrapped.space, strategy)
    if not keep_megabytes >= 0:
        raise InputError(f"Expected keep_megabytes >= 0, got {keep_megabytes!r}.")
    execution = Execution(
        keep_bytes=int(keep_megabytes * 1e6),
        memory_bytes=math.inf if memory_megabytes is None else memory_megabytes * 1e6,
        schedule=schedule,  # type: ignore[arg-type]
        retries=int(retries),
        store=store,
        step_limit_s=step_limit() if step_limit_s is None else float(step_limit_s),
    )
    if store is not None:  # refused now, not at the first call
        for one in (wrapped, *(() if stand_in is None else (stand_in.simulator,))):
            execution.filing(one)
    return SmoothedSimulator(wrapped, strategy, scale, dispatcher, execution, stand_in)


def _placed(
    simulator: Simulator,
    dispatcher: Dispatcher,
    isolate: str | None,
    workers: int | None,
    timeout_s: float | None,
    directory: Path | None,
) -> Simulator:
    """The simulator where it is to run: in this process, in others, or over several ranks."""
    if dispatcher.group is not None:
        if not isinstance(simulator, Parallel):
            raise InputError(
                f"Expected a simulator that takes a communicator, with ranks_per_evaluation, got "
                f"{simulator_name(simulator)!r}. Use as_simulator(f, parallel=True), or give it a method bound(comm)."
            )
        return simulator.bound(dispatcher.group)
    if workers is not None:
        return SimulatorPool(simulator, workers, timeout_s, directory)
    return simulator if isolate is None else IsolatedSimulator(simulator, timeout_s, directory)


def _by_name(scale: ScaleLike, simulator: Simulator) -> ScaleLike:
    """A scale of single parameters as L's diagonal."""
    if not isinstance(scale, Mapping):
        return scale
    if simulator.space is None:
        raise InputError(
            f"Expected a scale that is a number or (d,), as the simulator does not name its parameters, got {scale!r}. "
            f"Name them: bridge.as_simulator(f, names={list(scale)})."
        )
    return simulator.space.vector(scale)


def _validate_scale(scale: ScaleLike, space: ParameterSpace, strategy: Strategy) -> None:
    tensor, form = parse_scale(scale, space.natural_scale, strategy.distribution)
    check_scale(to_numpy(tensor), form)


@dataclass(frozen=True)
class LossSimulator:
    """loss(f(x)) as a simulator with one number as output; the loss runs where the output is."""

    inner: Simulator
    loss: Callable[[torch.Tensor], torch.Tensor]

    @property
    def name(self) -> str:
        return f"loss of {simulator_name(self.inner)}"

    @property
    def space(self) -> ParameterSpace | None:
        return self.inner.space

    @property
    def output_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def row_by_row(self) -> bool:
        return computes_row_by_row(self.inner)

    def bound(self, comm: Any) -> LossSimulator:
        if not isinstance(self.inner, Parallel):
            raise InputError(f"Expected a simulator that takes a communicator, got {simulator_name(self.inner)!r}.")
        return replace(self, inner=self.inner.bound(comm))

    def __call__(self, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> torch.Tensor:
        rows = floating_rows(self.inner, inputs, seeds)
        with torch.enable_grad():  # a loss may differentiate inside
            # Numbers, not tensors: a loss may return the same memory every time.
            losses = [one_number(self.loss(row), "from the loss", InputError) for row in rows]
        return torch.tensor(losses, dtype=torch.float64)


def floating_rows(simulator: Simulator, inputs: NDArray[np.float64], seeds: NDArray[np.uint64]) -> torch.Tensor:
    """What a loss gets of a simulator, (k, *output_shape): float32 where outputs are, else float64; never integers,
    which wrap. In memory that the loss may write to."""
    name = simulator_name(simulator)
    rows, shape = as_rows(simulator(inputs, seeds), len(inputs), simulator.output_shape, name, torch.float64)
    rows = rows.reshape(len(inputs), *shape)
    return rows if makes_memory(simulator) else rows.clone()


def smooth_loss(
    simulator: Callable[..., Any] | Simulator, loss: Callable[[torch.Tensor], torch.Tensor], **settings: Any
) -> SmoothedSimulator:
    """Smoothing of the loss: E[l(f(x + L eps))], a number for each parameter vector.

    Unbiased, also where l cannot be differentiated; under MPI no output ever travels. For squared error it equals the
    smoothed algorithm's loss plus the trace of the output covariance.

    Args:
        simulator: as in `smooth`.
        loss: l: a tensor of one output -> one number; called without gradients. The tensor is float32 where outputs
            are, else float64: integers and booleans never wrap. Numbers that an output lacks are NaN.
        **settings: the other arguments of `smooth`; the loss is taken of a surrogate's outputs, too.
    """
    refuse_unknown("bridge.smooth_loss", settings, list(signature(smooth).parameters)[1:])
    if not callable(loss):
        raise InputError(f"Expected a function of one output as the loss, got {loss!r}. Give lambda y: ...")
    if settings.get("surrogate") is not None:
        settings["surrogate"] = LossSimulator(as_simulator(settings["surrogate"]), loss)
    return smooth(LossSimulator(as_simulator(simulator), loss), **settings)
