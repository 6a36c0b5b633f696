"""The four `torch.autograd.Function`s of a smoothed simulator: the value, its VJP, which backward calls, its JVP, and
the product with the Hessian, which the VJP's own derivatives call.

Each is its own Function with `setup_context` and `vmap`, because a backward that runs numpy or MPI directly fails under
`torch.func` transforms; the JVP is one for the same reason (jacfwd maps over tangents).

An evaluation is known to the graph by a number, a tensor that batches as the parameters do: `vmap` over parameters,
over upstream vectors or over both then finds, for each, the evaluation and the problem it belongs to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.autograd import forward_ad

from bridge.design import Strategy
from bridge.evaluation import Evaluation
from bridge.fidelity import Corrected
from bridge.running import Execution
from bridge.scale import Form, pull_back_theta, push_theta
from bridge.simulator import ParameterSpace, Simulator

if TYPE_CHECKING:
    from bridge.smoothing import SmoothedSimulator


def to_numpy(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.detach().to("cpu", torch.float64).contiguous().numpy()


@dataclass
class Call:
    """One use of a smoothed function at one step: what the Functions need besides tensors."""

    smoothed: SmoothedSimulator
    step: int
    problem: int
    replicate: int
    space: ParameterSpace
    form: Form
    need_theta: bool
    need_scale: bool
    evaluations: list[Evaluation | Corrected] = field(default_factory=list)
    atoms: dict[tuple[int, int, float], Evaluation | Corrected] = field(default_factory=dict)

    def evaluate(self, theta: torch.Tensor, scale: torch.Tensor) -> int:
        """Evaluates theta (*batch, d); returns the number by which the evaluation is found again."""
        rows = to_numpy(theta).reshape(-1, theta.shape[-1])
        core = 1 if self.form == "diagonal" else 2
        scales = np.broadcast_to(to_numpy(scale), (*theta.shape[:-1], *scale.shape[scale.ndim - core :]))
        scales = np.ascontiguousarray(scales.reshape(len(rows), *scales.shape[scales.ndim - core :]))
        self.evaluations.append(self._evaluation(rows, scales, None))
        return len(self.evaluations) - 1

    def _evaluation(
        self,
        thetas: NDArray[np.float64],
        scales: NDArray[np.float64],
        atom: tuple[int, float] | None,
        weights: NDArray[np.float64] | None = None,
    ) -> Evaluation | Corrected:
        """Args: weights: those of the surrogate, where they are known."""
        smoothed = self.smoothed
        # The weights of a surrogate come from Jacobians, whether or not anybody asks for derivatives.
        need_theta = self.need_theta or (smoothed.surrogate is not None and smoothed.surrogate.weight == "auto")

        def evaluate(simulator: Simulator, strategy: Strategy, execution: Execution) -> Evaluation:
            return smoothed.dispatcher.make(
                Evaluation,
                simulator,
                self.space,
                strategy,
                smoothed.dispatcher,
                thetas,
                scales,
                self.form,
                step=self.step,
                first_problem=self.problem,
                first_replicate=self.replicate,
                need_theta=need_theta and atom is None,
                need_scale=self.need_scale and atom is None,
                execution=execution,
                spare=smoothed.spare,
                atom=atom,
                once=(simulator, smoothed.execution.store, smoothed.execution, smoothed.spare),
            )

        made: Evaluation | Corrected
        with smoothed.dispatcher.watched(smoothed.execution.step_limit_s):
            given = smoothed.simulator, smoothed.strategy, smoothed.execution
            if smoothed.surrogate is None:
                made = evaluate(*given)
            else:
                made = Corrected(*given, smoothed.surrogate, evaluate, weights)
                smoothed.spent.surrogate += made.num_surrogate_evaluations
        smoothed.spent.cached += made.num_cached
        return made

    def hvp(self, number: int, triples: list[tuple[int, torch.Tensor, NDArray[np.float64]]]) -> list[NDArray[Any]]:
        """d^2<v, value>/dx^2 u for each (vector, v, u). Collective.

        Where the density has kinks, f is also evaluated with one eps_i held at each of them: num_samples runs more for
        each parameter and kink, once for an evaluation.
        """
        evaluation = self.evaluations[number]
        products = evaluation.hvp(triples)
        atoms = self.smoothed.strategy.distribution.atoms
        if not atoms:
            return products
        weights = evaluation.weights if isinstance(evaluation, Corrected) else None
        results = []
        replicates = self.smoothed.strategy.replicates
        scales = np.stack([p.scale for p in evaluation.problems[::replicates]])
        thetas = np.stack([p.theta for p in evaluation.problems[::replicates]])
        for (b, v, u), product in zip(triples, products, strict=True):
            pushed, more = push_theta(scales[b], u), np.zeros(evaluation.dimension)
            for i in range(evaluation.dimension):
                for place, mass in atoms:
                    key = (number, i, place)
                    if key not in self.atoms:
                        self.atoms[key] = self._evaluation(thetas, scales, (i, place), weights)
                    value = self.atoms[key].value(b).to("cpu", torch.float64)
                    more[i] += mass * float(torch.dot(v.reshape(-1).to("cpu", torch.float64), value)) * pushed[i]
            results.append(product + pull_back_theta(scales[b], more))
        return results

    def find(self, handle: torch.Tensor) -> tuple[Evaluation | Corrected, list[int]]:
        """The evaluation and the problems behind a (*batch, 2) handle."""
        pairs = handle.detach().to("cpu", torch.int64).reshape(-1, 2)
        return self.evaluations[self.number(handle)], pairs[:, 1].tolist()

    @staticmethod
    def number(handle: torch.Tensor) -> int:
        """The evaluation behind a handle."""
        (number,) = set(handle.detach().to("cpu", torch.int64).reshape(-1, 2)[:, 0].tolist())
        return int(number)


def _front(tensor: torch.Tensor, dim: int | None, size: int, shared: bool = False) -> torch.Tensor:
    """Brings the mapped dimension to the front; an unmapped tensor is repeated, or gets a front of one if shared."""
    if dim is not None:
        return tensor.movedim(dim, 0)
    return tensor[None] if shared else tensor.expand(size, *tensor.shape)


class Smooth(torch.autograd.Function):
    """(theta (*batch, d), scale (*batch or ones, d[, d])) -> (value (*batch, *output_shape), handle (*batch, 2))."""

    @staticmethod
    def forward(theta: torch.Tensor, scale: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        number = call.evaluate(theta, scale)
        evaluation = call.evaluations[number]
        batch = theta.shape[:-1]
        values = torch.stack([evaluation.value(b) for b in range(evaluation.num_vectors)])
        value = values.reshape((*batch, *evaluation.output_shape)).to(theta)
        problems = torch.arange(evaluation.num_vectors)
        handle = torch.stack([torch.full_like(problems, number), problems], dim=-1).reshape((*batch, 2))
        return value, handle

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        theta, scale, call = inputs
        ctx.call = call
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(theta, scale, output[1])
        ctx.save_for_forward(theta, scale, output[1])

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor, _: Any) -> Any:
        theta, scale, handle = ctx.saved_tensors
        g_theta, g_scale = _VJP.apply(v, handle, theta, scale, ctx.call)
        return g_theta, g_scale if ctx.call.need_scale else None, None

    @staticmethod
    def jvp(ctx: Any, t_theta: Any, t_scale: Any, _: Any) -> Any:
        theta, scale, handle = ctx.saved_tensors
        t_theta = torch.zeros_like(theta) if t_theta is None else t_theta
        t_scale = torch.zeros_like(scale) if t_scale is None else t_scale
        return _JVP.apply(t_theta, t_scale, handle, theta, scale, ctx.call), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, theta: torch.Tensor, scale: torch.Tensor, call: Call) -> Any:
        # The batch goes to the front and all problems into one dispatch. A scale that is not mapped stays shared.
        theta = _front(theta, in_dims[0], info.batch_size)
        scale = _front(scale, in_dims[1], info.batch_size, shared=True)
        return Smooth.apply(theta, scale, call), (0, 0)


class _VJP(torch.autograd.Function):
    """(v, handle, theta, scale) -> gradients of <v, value> in theta and in scale; linear in v."""

    @staticmethod
    def forward(
        v: torch.Tensor, handle: torch.Tensor, theta: torch.Tensor, scale: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        evaluation, problems = call.find(handle)
        rows = v.reshape(len(problems), evaluation.num_outputs)
        results = evaluation.vjp(list(zip(problems, rows, strict=True)))
        batch = handle.shape[:-1]
        g_theta = torch.as_tensor(np.stack([x.mean(axis=0) for x, _ in results])).reshape(
            (*batch, evaluation.dimension)
        )
        core = 1 if call.form == "diagonal" else 2
        if not call.need_scale:
            return g_theta.to(theta), torch.zeros_like(scale)
        stacked = torch.as_tensor(np.stack([L.mean(axis=0) for _, L in results if L is not None]))
        g_scale = stacked.reshape((*batch, *stacked.shape[1:]))
        # A scale that several problems share gathers their gradients.
        shared = [i for i in range(len(batch)) if scale.shape[: scale.ndim - core][i] == 1 and batch[i] != 1]
        if shared:
            g_scale = g_scale.sum(dim=shared, keepdim=True)
        return g_theta.to(theta), g_scale.to(scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        v, handle, theta, scale, call = inputs
        ctx.call = call
        ctx.save_for_backward(v, handle, theta, scale)
        ctx.save_for_forward(v, handle, theta, scale)

    @staticmethod
    def backward(ctx: Any, u_theta: torch.Tensor, u_scale: torch.Tensor) -> Any:
        v, handle, theta, scale = ctx.saved_tensors
        g_v = g_theta = None
        if ctx.needs_input_grad[0]:
            g_v = _JVP.apply(u_theta, u_scale, handle, theta, scale, ctx.call)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            _refuse_second_scale(ctx.call)
            g_theta = _HVP.apply(u_theta, v, handle, theta, scale, ctx.call)
        return g_v, None, g_theta, None, None

    @staticmethod
    def jvp(ctx: Any, t_v: Any, _h: Any, t_theta: Any, t_scale: Any, _c: Any) -> Any:
        v, handle, theta, scale = ctx.saved_tensors
        _refuse_second_scale(ctx.call)
        total = torch.zeros_like(theta)
        if t_v is not None:
            total = total + _VJP.apply(t_v, handle, theta, scale, ctx.call)[0]
        if t_theta is not None:
            # H is symmetric, so the same product serves both modes.
            total = total + _HVP.apply(t_theta, v, handle, theta, scale, ctx.call)
        return total, torch.zeros_like(scale)

    @staticmethod
    def vmap(info: Any, in_dims: Any, v: Any, handle: Any, theta: Any, scale: Any, call: Call) -> Any:
        n = info.batch_size
        v, handle, theta = (_front(x, dim, n) for x, dim in zip((v, handle, theta), in_dims, strict=False))
        # Each of the n products has a gradient of its own, also of a scale that is not mapped.
        scale = _front(scale, in_dims[3], n)
        return _VJP.apply(v, handle, theta, scale, call), (0, 0)


def _refuse_second_scale(call: Call) -> None:
    if call.need_scale:
        raise NotImplementedError(
            "Second derivatives are available in the parameters, not in a scale that is learned. Detach the scale."
        )


class _HVP(torch.autograd.Function):
    """(u, v, handle, theta, scale) -> d^2<v, value>/dx^2 u, by the second score; not differentiable again."""

    @staticmethod
    def forward(
        u: torch.Tensor, v: torch.Tensor, handle: torch.Tensor, theta: torch.Tensor, scale: torch.Tensor, call: Call
    ) -> torch.Tensor:
        evaluation, problems = call.find(handle)
        rows = v.reshape(len(problems), evaluation.num_outputs)
        triples = list(zip(problems, rows, to_numpy(u).reshape(len(problems), -1), strict=True))
        products = call.hvp(call.number(handle), triples)
        return torch.as_tensor(np.stack(products)).reshape(u.shape).to(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError("Third derivatives of a smoothed function are not available.")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        rows = [_front(x, dim, info.batch_size) for x, dim in zip(inputs[:4], in_dims, strict=False)]
        scale = _front(inputs[4], in_dims[4], info.batch_size, shared=True)
        return _HVP.apply(*rows, scale, inputs[5]), 0


class _JVP(torch.autograd.Function):
    """(tangents, handle, theta, scale) -> the derivative of the value along the tangents; linear in them."""

    @staticmethod
    def forward(
        t_theta: torch.Tensor,
        t_scale: torch.Tensor,
        handle: torch.Tensor,
        theta: torch.Tensor,
        scale: torch.Tensor,
        call: Call,
    ) -> torch.Tensor:
        evaluation, problems = call.find(handle)
        batch = handle.shape[:-1]
        core = 1 if call.form == "diagonal" else 2
        t_rows = to_numpy(t_theta).reshape(len(problems), -1)
        T_rows: list[Any] = [None] * len(problems)
        if call.need_scale:
            T = np.broadcast_to(to_numpy(t_scale), (*batch, *t_scale.shape[t_scale.ndim - core :]))
            T_rows = list(T.reshape(len(problems), *T.shape[T.ndim - core :]))
        products = evaluation.jvp(list(zip(problems, t_rows, T_rows, strict=True)))
        return torch.stack(products).reshape((*batch, *evaluation.output_shape)).to(theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        t_theta, _, handle, theta, scale, call = inputs
        ctx.call = call
        ctx.save_for_backward(t_theta, handle, theta, scale)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor) -> Any:
        t_theta, handle, theta, scale = ctx.saved_tensors
        g_theta, g_scale = _VJP.apply(v, handle, theta, scale, ctx.call)
        h_theta = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            _refuse_second_scale(ctx.call)
            h_theta = _HVP.apply(t_theta, v, handle, theta, scale, ctx.call)
        return g_theta, g_scale if ctx.call.need_scale else None, None, h_theta, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        n, call = info.batch_size, inputs[5]
        t_theta, t_scale, handle, theta = (_front(x, dim, n) for x, dim in zip(inputs[:4], in_dims, strict=False))
        scale = _front(inputs[4], in_dims[4], n, shared=True)
        return _JVP.apply(t_theta, t_scale, handle, theta, scale, call), 0


def has_tangent(*tensors: torch.Tensor) -> bool:
    """Whether forward-mode differentiation is under way and reaches one of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
