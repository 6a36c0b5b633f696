"""A simulator as a differentiable function."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import cloudpickle
import numpy as np
import torch
from torch.autograd import forward_ad

from bridge.dispatch import Dispatcher
from bridge.errors import InputError
from bridge.estimators.covariates import AutoCovariate, LeaveOneOut
from bridge.estimators.design import whole_number
from bridge.estimators.scale import Form, LogScale, LowerTriangular, ScaleLike, as_tensor, parse_scale
from bridge.estimators.strategy import Strategy
from bridge.evaluation.execution import Execution
from bridge.simulator.protocol import Simulator, simulator_name
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.adaptive import AdaptiveEstimate, Quantity, estimate_to
from bridge.smoothing.autograd import Smooth, apply, has_tangent, old_vmap_depth
from bridge.smoothing.call import Call, Estimator, Spent, make_keys, to_numpy
from bridge.smoothing.estimate import Estimate
from bridge.smoothing.surrogate import StandIn

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


class SmoothedSimulator:
    """A simulator as a differentiable function; made by `bridge.smooth` and `bridge.smooth_loss`."""

    def __init__(
        self,
        simulator: Simulator,
        strategy: Strategy,
        scale: ScaleLike,
        dispatcher: Dispatcher,
        execution: Execution,
        surrogate: StandIn | None = None,
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
            f"num_samples={s.num_samples}, covariate={s.covariate.name!r}, seed={s.seed})"
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

    @property
    def _estimator(self) -> Estimator:
        """What the calls of this moment need."""
        return Estimator(
            self.simulator, self.strategy, self.dispatcher, self.execution, self.surrogate, self.spare, self.spent
        )

    def with_strategy(self, strategy: Strategy) -> SmoothedSimulator:
        """The same, estimated in another way; a surrogate has its rows of each replicate."""
        other = SmoothedSimulator(self.simulator, strategy, self.scale, self.dispatcher, self.execution, self.surrogate)
        other.spent = self.spent
        return other

    def straight_through(self) -> SmoothedSimulator:
        """The same with f(x) itself as its value, beside the smoothed gradient: one run more.

        Raises:
            InputError: it has a surrogate.
        """
        if self.surrogate is not None:
            raise InputError("Expected no surrogate for straight_through(): f(x) needs no correction.")
        return self.with_strategy(replace(self.strategy, forward="unsmoothed"))

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
            self._estimator,
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
        call = Call(
            self._estimator,
            whole_number("replicate", replicate),
            space,
            form,
            need_theta=True,
            need_scale=scale_gradient,
        )
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
        if isinstance(self.strategy.covariate, AutoCovariate):
            centred = self.with_strategy(replace(self.strategy, covariate=LeaveOneOut()))
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
        given = as_tensor(theta)
        space = self.simulator.space

        def independent(strategy: Strategy) -> Callable[[int], Estimate]:
            parts = self.with_strategy(strategy)
            return lambda first: parts.estimate(given.detach(), step, scale=scale, replicate=first)

        natural = None if space is None else space.natural_scale
        return estimate_to(
            independent, self.strategy, given, natural, relative_error=relative_error, budget=budget, of=of
        )

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
            self.scale if scale is None else scale_by_name(scale, self.simulator),
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


def scale_by_name(scale: ScaleLike, simulator: Simulator) -> ScaleLike:
    """A scale of single parameters as L's diagonal."""
    if not isinstance(scale, Mapping):
        return scale
    if simulator.space is None:
        raise InputError(
            f"Expected a scale that is a number or (d,), as the simulator does not name its parameters, got {scale!r}. "
            f"Name them: bridge.as_simulator(f, names={list(scale)})."
        )
    return simulator.space.vector(scale)
