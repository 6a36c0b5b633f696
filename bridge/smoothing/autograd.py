"""The five `torch.autograd.Function`s of a smoothed simulator: the value, its VJP, which backward calls, its JVP, and
what their own derivatives call: the product with the Hessian, and the second derivative along two tangents.

Each is its own Function with `setup_context` and `vmap`, because a backward that runs numpy or MPI directly fails under
`torch.func` transforms; the JVP is one for the same reason (jacfwd maps over tangents). They are called by `apply`,
which also takes the batches of torch.autograd's own helpers (`is_grads_batched`, `vectorize`), older than torch.func.

An evaluation is known to the graph by a number, a tensor that batches as the parameters do: `vmap` over parameters,
over upstream vectors or over both then finds, for each, the evaluation and the problem it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad

from bridge.smoothing.call import Call, to_numpy


class _Info(NamedTuple):
    """What a Function's `vmap` is told."""

    batch_size: int


def old_vmap_depth() -> int:
    """How many of torch.autograd's own batchings (`is_grads_batched`, `vectorize`) are under way."""
    depth = int(torch._C._vmapmode_increment_nesting()) - 1
    torch._C._vmapmode_decrement_nesting()
    return depth


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, also where torch.autograd's own helpers have batched the tensors.

    Theirs are batches that know no `vmap` of a Function: here they are unpacked, given to it, and packed again.
    """
    is_batched = torch._C._functorch.is_legacy_batchedtensor
    if not any(isinstance(x, torch.Tensor) and is_batched(x) for x in inputs):
        return function.apply(*inputs)
    for level in range(old_vmap_depth(), 0, -1):
        # A tensor without a batch of this level comes back with one of size 0.
        opened = [torch._remove_batch_dim(x, level, 0, 0) if isinstance(x, torch.Tensor) else x for x in inputs]
        sizes = [len(x) if isinstance(x, torch.Tensor) else 0 for x in opened]
        if not any(sizes):
            continue
        dims = [0 if size else None for size in sizes]
        given = [new if size else old for new, old, size in zip(opened, inputs, sizes, strict=True)]
        outputs, _ = function.vmap(_Info(max(sizes)), tuple(dims), *given)
        if isinstance(outputs, tuple):
            return tuple(torch._add_batch_dim(x, 0, level) for x in outputs)
        return torch._add_batch_dim(outputs, 0, level)
    raise RuntimeError("Expected a batch of a level in use.")


def _front(tensor: torch.Tensor, dim: int | None, size: int, shared: bool = False) -> torch.Tensor:
    """Brings the mapped dimension to the front; an unmapped tensor is repeated, or gets a front of one if shared."""
    if dim is not None:
        return tensor.movedim(dim, 0)
    return tensor[None] if shared else tensor.expand(size, *tensor.shape)


def _fresh(rows: Sequence[Any], shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The rows in memory of their own: what a Function returns must be no view, or it cannot be changed in place."""
    result = torch.empty(shape, dtype=like.dtype, device=like.device)
    for own, row in zip(result.view(len(rows), result.numel() // len(rows)), rows, strict=True):
        own.copy_(torch.as_tensor(row, device=row.device if isinstance(row, torch.Tensor) else "cpu").reshape(-1))
    return result


def _wanted(ctx: Any, *places: int) -> bool:
    """Whether the backward pass under way needs the gradient in one of these (leading, tensor) inputs.

    `ctx.needs_input_grad` says which could be asked for. Derivatives of derivatives are dear, and third ones refused,
    so it matters which are.
    """
    for i in places:
        node = ctx.next_functions[i][0] if ctx.needs_input_grad[i] else None
        if node is None:
            continue
        try:
            if torch._C._will_engine_execute_node(node):
                return True
        except RuntimeError:  # so it says of a leaf whose gradient is asked for by name
            return True
    return False


def _refuse_second_scale(call: Call) -> None:
    if call.need_scale:
        raise NotImplementedError(
            "Second derivatives are available in the parameters, not in a scale that is learned. Detach the scale."
        )


def _refuse_third() -> None:
    raise NotImplementedError(
        "Third derivatives of a smoothed function are not available. Differences of second ones at nearby parameters "
        "and the same step approximate them."
    )


def _sum(*terms: Any) -> Any:
    """The sum of those that are not None; None where none is left."""
    total = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


class Smooth(torch.autograd.Function):
    """(theta (*batch, d), scale (*batch or ones, d[, d]), keys (*batch, 2)) -> (value (*batch, *output_shape), handle
    (*batch, 2))."""

    @staticmethod
    def forward(
        theta: torch.Tensor, scale: torch.Tensor, keys: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number = call.evaluate(theta, scale, keys)
        evaluation = call.evaluations[number]
        batch = theta.shape[:-1]
        values = [evaluation.value(b) for b in range(evaluation.num_vectors)]
        value = _fresh(values, (*batch, *evaluation.output_shape), theta)
        handle = _fresh([(number, b) for b in range(evaluation.num_vectors)], (*batch, 2), keys)
        return value, handle

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        theta, scale, _, call = inputs
        ctx.call = call
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(theta, scale, output[1])
        ctx.save_for_forward(theta, scale, output[1])

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor, _: Any) -> Any:
        theta, scale, handle = ctx.saved_tensors
        g_theta, g_scale = apply(_VJP, v, handle, theta, scale, ctx.call)
        return g_theta, g_scale if ctx.call.need_scale else None, None, None

    @staticmethod
    def jvp(ctx: Any, t_theta: Any, t_scale: Any, *_: Any) -> Any:
        theta, scale, handle = ctx.saved_tensors
        t_theta = torch.zeros_like(theta) if t_theta is None else t_theta
        t_scale = torch.zeros_like(scale) if t_scale is None else t_scale
        return apply(_JVP, t_theta, t_scale, handle, theta, scale, ctx.call), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, theta: Any, scale: Any, keys: Any, call: Call) -> Any:
        # The batch goes to the front and all problems into one dispatch. A scale that is not mapped stays shared, and
        # so do keys: each problem is what it would be in a call of its own.
        n = info.batch_size
        theta, keys = _front(theta, in_dims[0], n), _front(keys, in_dims[2], n)
        scale = _front(scale, in_dims[1], n, shared=True)
        return apply(Smooth, theta, scale, keys, call), (0, 0)


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
        g_theta = _fresh([x.mean(axis=0) for x, _ in results], (*batch, evaluation.dimension), theta)
        core = 1 if call.form == "diagonal" else 2
        if not call.need_scale:
            return g_theta, torch.zeros_like(scale)
        gradients = [L.mean(axis=0) for _, L in results if L is not None]
        g_scale = _fresh(gradients, (*batch, *gradients[0].shape), scale)
        # A scale that several problems share gathers their gradients.
        shared = [i for i in range(len(batch)) if scale.shape[: scale.ndim - core][i] == 1 and batch[i] != 1]
        if shared:
            g_scale = g_scale.sum(dim=shared, keepdim=True)
        return g_theta, g_scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        v, handle, theta, scale, call = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(v, handle, theta, scale)
        ctx.save_for_forward(v, handle, theta, scale)

    @staticmethod
    def backward(ctx: Any, u_theta: torch.Tensor | None, u_scale: torch.Tensor | None) -> Any:
        v, handle, theta, scale = ctx.saved_tensors
        if u_theta is None and (u_scale is None or not ctx.call.need_scale):
            return None, None, None, None, None
        u_theta = torch.zeros_like(theta) if u_theta is None else u_theta
        g_v = g_theta = None
        if _wanted(ctx, 0):
            u_scale = torch.zeros_like(scale) if u_scale is None else u_scale
            g_v = apply(_JVP, u_theta, u_scale, handle, theta, scale, ctx.call)
        if _wanted(ctx, 2, 3):
            _refuse_second_scale(ctx.call)
            g_theta = apply(_HVP, u_theta, v, handle, theta, scale, ctx.call)
        return g_v, None, g_theta, None, None

    @staticmethod
    def jvp(ctx: Any, t_v: Any, _h: Any, t_theta: Any, t_scale: Any, _c: Any) -> Any:
        v, handle, theta, scale = ctx.saved_tensors
        t_gradient = h_theta = None
        more = torch.zeros_like(scale)
        if t_v is not None:
            t_gradient, more = apply(_VJP, t_v, handle, theta, scale, ctx.call)
        if t_theta is not None or t_scale is not None:
            _refuse_second_scale(ctx.call)
        if t_theta is not None:
            # H is symmetric, so the same product serves both modes.
            h_theta = apply(_HVP, t_theta, v, handle, theta, scale, ctx.call)
        total = _sum(t_gradient, h_theta)
        return torch.zeros_like(theta) if total is None else total, more

    @staticmethod
    def vmap(info: Any, in_dims: Any, v: Any, handle: Any, theta: Any, scale: Any, call: Call) -> Any:
        n = info.batch_size
        v, handle, theta = (_front(x, dim, n) for x, dim in zip((v, handle, theta), in_dims, strict=False))
        # Each of the n products has a gradient of its own, also of a scale that is not mapped.
        scale = _front(scale, in_dims[3], n)
        return apply(_VJP, v, handle, theta, scale, call), (0, 0)


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
        return _fresh(products, (*batch, *evaluation.output_shape), theta)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        t_theta, _, handle, theta, scale, call = inputs
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(t_theta, handle, theta, scale)
        ctx.save_for_forward(t_theta, handle, theta, scale)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor | None) -> Any:
        if v is None:
            return None, None, None, None, None, None
        t_theta, handle, theta, scale = ctx.saved_tensors
        g_theta = g_scale = h_theta = None
        if _wanted(ctx, 0, 1):
            g_theta, g_scale = apply(_VJP, v, handle, theta, scale, ctx.call)
        if _wanted(ctx, 3, 4):
            _refuse_second_scale(ctx.call)
            h_theta = apply(_HVP, t_theta, v, handle, theta, scale, ctx.call)
        return g_theta, g_scale if ctx.call.need_scale else None, None, h_theta, None, None

    @staticmethod
    def jvp(ctx: Any, tt_theta: Any, tt_scale: Any, _h: Any, t_theta: Any, t_scale: Any, _c: Any) -> Any:
        t, handle, theta, scale = ctx.saved_tensors
        along = second = None
        if tt_theta is not None or tt_scale is not None:
            tt_theta = torch.zeros_like(theta) if tt_theta is None else tt_theta
            tt_scale = torch.zeros_like(scale) if tt_scale is None else tt_scale
            along = apply(_JVP, tt_theta, tt_scale, handle, theta, scale, ctx.call)
        if t_theta is not None or t_scale is not None:
            _refuse_second_scale(ctx.call)
        if t_theta is not None:
            second = apply(_Curvature, t, t_theta, handle, theta, scale, ctx.call)
        return _sum(along, second)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        n, call = info.batch_size, inputs[5]
        t_theta, t_scale, handle, theta = (_front(x, dim, n) for x, dim in zip(inputs[:4], in_dims, strict=False))
        scale = _front(inputs[4], in_dims[4], n, shared=True)
        return apply(_JVP, t_theta, t_scale, handle, theta, scale, call), 0


class _Second(torch.autograd.Function):
    """What the two second derivatives share: (a, b, handle, theta, scale, call), linear in a and in b."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.call = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @classmethod
    def mapped(cls, info: Any, in_dims: Any, inputs: Any) -> Any:
        rows = [_front(x, dim, info.batch_size) for x, dim in zip(inputs[:4], in_dims, strict=False)]
        scale = _front(inputs[4], in_dims[4], info.batch_size, shared=True)
        return apply(cls, *rows, scale, inputs[5]), 0


class _HVP(_Second):
    """(u, v, handle, theta, scale) -> d^2<v, value>/dx^2 u, by the second score; differentiable in u and v."""

    @staticmethod
    def forward(
        u: torch.Tensor, v: torch.Tensor, handle: torch.Tensor, theta: torch.Tensor, scale: torch.Tensor, call: Call
    ) -> torch.Tensor:
        evaluation, problems = call.find(handle)
        rows = v.reshape(len(problems), evaluation.num_outputs)
        triples = list(zip(problems, rows, to_numpy(u).reshape(len(problems), -1), strict=True))
        return _fresh(call.hvp(call.number(handle), triples), tuple(u.shape), theta)

    @staticmethod
    def backward(ctx: Any, w: torch.Tensor | None) -> Any:
        u, v, *where = ctx.saved_tensors
        if w is None:
            return None, None, None, None, None, None
        if _wanted(ctx, 3, 4):
            _refuse_third()
        g_u = apply(_HVP, w, v, *where, ctx.call) if _wanted(ctx, 0) else None
        g_v = apply(_Curvature, w, u, *where, ctx.call) if _wanted(ctx, 1) else None
        return g_u, g_v, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, t_u: Any, t_v: Any, _h: Any, t_theta: Any, t_scale: Any, _c: Any) -> Any:
        u, v, *where = ctx.saved_tensors
        if t_theta is not None or t_scale is not None:
            _refuse_third()
        along_u = None if t_u is None else apply(_HVP, t_u, v, *where, ctx.call)
        along_v = None if t_v is None else apply(_HVP, u, t_v, *where, ctx.call)
        return _sum(along_u, along_v)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _HVP.mapped(info, in_dims, inputs)


class _Curvature(_Second):
    """(t, u, handle, theta, scale) -> the second derivative of the value along t and u, by the second score."""

    @staticmethod
    def forward(
        t: torch.Tensor, u: torch.Tensor, handle: torch.Tensor, theta: torch.Tensor, scale: torch.Tensor, call: Call
    ) -> torch.Tensor:
        evaluation, problems = call.find(handle)
        rows = [to_numpy(x).reshape(len(problems), -1) for x in (t, u)]
        products = call.curvature(call.number(handle), list(zip(problems, *rows, strict=True)))
        return _fresh(products, (*handle.shape[:-1], *evaluation.output_shape), theta)

    @staticmethod
    def backward(ctx: Any, v: torch.Tensor | None) -> Any:
        t, u, *where = ctx.saved_tensors
        if v is None:
            return None, None, None, None, None, None
        if _wanted(ctx, 3, 4):
            _refuse_third()
        g_t = apply(_HVP, u, v, *where, ctx.call) if _wanted(ctx, 0) else None
        g_u = apply(_HVP, t, v, *where, ctx.call) if _wanted(ctx, 1) else None
        return g_t, g_u, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tt: Any, tu: Any, _h: Any, t_theta: Any, t_scale: Any, _c: Any) -> Any:
        t, u, *where = ctx.saved_tensors
        if t_theta is not None or t_scale is not None:
            _refuse_third()
        along_t = None if tt is None else apply(_Curvature, tt, u, *where, ctx.call)
        along_u = None if tu is None else apply(_Curvature, t, tu, *where, ctx.call)
        return _sum(along_t, along_u)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        return _Curvature.mapped(info, in_dims, inputs)


def has_tangent(*tensors: torch.Tensor) -> bool:
    """Whether forward-mode differentiation is under way and reaches one of the tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
