"""Smoothed functions among PyTorch's own tools: torch.autograd's helpers, torch.func, copies, tracing, surroundings."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch

import bridge
from bridge.errors import InputError
from bridge.estimators.distributions import get_distribution
from bridge.testing import Quadrature

# Frozen noise is what most of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:The parameters changed but step", "ignore:`torch.jit.trace")

F = torch.autograd.functional
X = torch.tensor([0.3, 0.5], dtype=torch.float64)
BATCH = torch.tensor([[0.3, 0.5], [0.1, -0.2], [0.7, 0.4]], dtype=torch.float64)
V = torch.tensor([1.0, -2.0], dtype=torch.float64)
MIXING = np.random.default_rng(0).normal(size=(2, 40)).astype(np.float32)


def three(x):
    return np.array([x[0] ** 2, x[0] * x[1], np.sin(x[1])])


def smooth(**settings):
    return bridge.smooth(three, **({"seed": 0, "num_samples": 16, "scale": 0.3} | settings))


def cubed(smoothed):
    return lambda x: (smoothed(x) ** 3).sum()


# -- values are the user's ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (3, 1)])
@pytest.mark.parametrize("keep", [24.0, 0.0])
def test_values_may_be_changed_in_place(dtype, batch, keep):
    smoothed = smooth(memory=bridge.Memory(keep_mb=keep))
    theta = X.to(dtype).expand(*batch, 2).clone().requires_grad_()
    value = smoothed(theta)
    before = value.detach().clone()
    value -= 5.0
    torch.nn.functional.relu(value, inplace=True)
    assert not value.any()
    value = smoothed(theta)
    assert torch.equal(value, before)
    value *= 2.0
    value.sum().backward()
    jacobian = smoothed.estimate(theta.detach().double()).jacobian().sum(dim=-2)
    np.testing.assert_allclose(theta.grad.double(), 2 * jacobian, rtol=4 * torch.finfo(dtype).eps, atol=1e-12)


def test_gradients_and_losses_may_be_changed_in_place():
    smoothed = smooth()
    theta = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(smoothed(theta).sum(), theta, create_graph=True)
    gradient *= 2.0
    (second,) = torch.autograd.grad(gradient @ V, theta)
    np.testing.assert_allclose(second, 2 * torch.func.hessian(lambda x: smoothed(x).sum())(X) @ V, rtol=1e-12)
    tangent = torch.func.jvp(smoothed, (X,), (V,))[1]
    tangent *= 0.0
    loss = bridge.smooth_loss(three, lambda y: y.sum(), seed=0, num_samples=8)(theta)
    loss -= 1.0
    loss.backward()
    assert theta.grad.any()


def test_what_the_caller_changes_afterwards_is_not_looked_at():
    scale = torch.tensor([0.1, 0.3], dtype=torch.float64)
    theta = X.clone()
    smoothed = smooth(distribution="laplace")
    estimate = smoothed.estimate(theta, scale=scale)
    before = estimate.jacobian().clone()
    scale *= 10
    estimate.value.zero_()
    assert torch.equal(estimate.jacobian(), before)
    # Second derivatives of a density with kinks run the simulator again, at the parameters of the value.
    q = X.clone().requires_grad_()
    moved = q * 1.0
    value = smoothed(moved, scale=torch.tensor([0.1, 0.3], dtype=torch.float64)).sum()
    (gradient,) = torch.autograd.grad(value, q, create_graph=True)
    expected = torch.func.hessian(lambda x: smoothed(x, scale=torch.tensor([0.1, 0.3])).sum())(X)
    np.testing.assert_allclose(torch.autograd.grad(gradient @ V, q)[0], expected @ V, rtol=1e-5)


# -- torch.autograd's own helpers, and torch.func ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"scale": torch.tensor([[0.3, 0.1], [0.0, 0.2]]), "replicates": 2}])
@pytest.mark.parametrize("distribution", ["gaussian", "laplace"])
def test_helpers_of_autograd_agree_with_torch_func(settings, distribution):
    smoothed = smooth(distribution=distribution, **settings)
    f = cubed(smoothed)
    J, H = smoothed.estimate(X).jacobian(), torch.func.hessian(f)(X)
    got = {
        "vectorize": (F.jacobian(smoothed, X, vectorize=True), J),
        "create_graph": (F.jacobian(smoothed, X, vectorize=True, create_graph=True), J),
        "forward-mode": (F.jacobian(smoothed, X, vectorize=True, strategy="forward-mode"), J),
        "jvp": (F.jvp(smoothed, X, V)[1], J @ V),
        "vhp": (F.vhp(f, X, V)[1], H @ V),
        "hvp": (F.hvp(f, X, V)[1], H @ V),
        "hessian": (F.hessian(f, X), H),
        "hessian vectorize": (F.hessian(f, X, vectorize=True), H),
        "hessian forward": (F.hessian(f, X, vectorize=True, outer_jacobian_strategy="forward-mode"), H),
        "jacfwd(jacfwd)": (torch.func.jacfwd(torch.func.jacfwd(f))(X), H),
        "jacrev(jacfwd)": (torch.func.jacrev(torch.func.jacfwd(f))(X), H),
        "jvp of jvp": (torch.func.jvp(lambda x: torch.func.jvp(f, (x,), (V,))[1], (X,), (V,))[1], V @ H @ V),
    }
    for name, (ours, truth) in got.items():
        np.testing.assert_allclose(ours.detach(), truth, rtol=1e-9, atol=1e-12, err_msg=name)


def test_second_derivatives_along_two_tangents_have_the_closed_form():
    """f_L = x^T A x + const for quadratics: the same Hessian 2 A from each of the ways, by quadrature."""
    A = np.array([[0.7, -0.3], [-0.3, 1.1]])
    sim = bridge.as_simulator(lambda x: np.einsum("ni,ij,nj->n", x, A, x), vectorized=True)
    rule = Quadrature(8)
    n = rule.size(get_distribution("gaussian"), 2)
    for scale in (0.4, torch.tensor([[0.5, 0.2], [-0.1, 0.4]])):
        smoothed = bridge.smooth(sim, seed=0, points=rule, num_samples=n, covariate="none", scale=scale)
        for transform in (lambda f: torch.func.jacfwd(torch.func.jacfwd(f)), torch.func.hessian):
            np.testing.assert_allclose(transform(smoothed)(X), 2 * A, atol=1e-6)
        np.testing.assert_allclose(F.hvp(smoothed, X, V)[1], 2 * A @ V.numpy(), atol=1e-6)


def test_batched_gradients_of_batches_and_of_scales():
    smoothed = smooth()
    theta = BATCH.clone().requires_grad_()
    unit = torch.eye(9, dtype=torch.float64).reshape(9, 3, 3)
    (rows,) = torch.autograd.grad(smoothed(theta), theta, unit, is_grads_batched=True)
    np.testing.assert_allclose(rows.reshape(3, 3, 3, 2), torch.func.jacrev(smoothed)(BATCH), rtol=1e-12)
    np.testing.assert_allclose(F.jacobian(smoothed, BATCH, vectorize=True), torch.func.jacrev(smoothed)(BATCH))
    scale = torch.tensor([0.3, 0.2], dtype=torch.float64)

    def both(x, L):
        return smoothed(x, scale=L)

    plain = F.jacobian(both, (X, scale))
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        for ours, truth in zip(F.jacobian(both, (X, scale), **options), plain, strict=True):
            np.testing.assert_allclose(ours, truth, rtol=1e-9, atol=1e-12)


def test_third_derivatives_are_refused_however_they_are_asked_for():
    f = cubed(smooth())
    theta = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="Third derivatives"):
        second.sum().backward()
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match="Third derivatives"):
            outer(torch.func.hessian(f))(X)
    with pytest.raises(NotImplementedError, match="Third derivatives"):
        F.hessian(lambda x: F.hvp(f, x, V, create_graph=True)[1].sum(), X)


def test_products_that_need_no_second_derivative_do_not_ask_for_one():
    """Streamed outputs have none; F.jvp differentiates a VJP, but in the vector only."""
    streamed = bridge.smooth(lambda x: np.full(50, x.sum()), seed=0, num_samples=16, memory=bridge.Memory(keep_mb=0))
    tangent = torch.func.jvp(streamed, (X,), (V,))[1]
    np.testing.assert_allclose(F.jvp(streamed, X, V)[1], tangent, rtol=1e-9)


# -- vmap, steps and problems ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [BATCH, BATCH[:1].expand(5, 2)])
def test_vmap_is_the_call_it_maps_whatever_its_chunks(rows):
    smoothed = smooth()
    whole = torch.func.vmap(smoothed)(rows)
    assert torch.equal(whole, torch.stack([smoothed(x) for x in rows]))
    jacobians = torch.func.vmap(torch.func.jacrev(smoothed))(rows)
    for size in (1, 2, 100):
        assert torch.equal(torch.func.vmap(smoothed, chunk_size=size)(rows), whole)
        assert torch.equal(torch.func.vmap(smoothed, in_dims=1, chunk_size=size)(rows.T), whole)
        assert torch.equal(torch.func.vmap(torch.func.jacrev(smoothed), chunk_size=size)(rows), jacobians)
    nested = torch.func.vmap(torch.func.vmap(smoothed, chunk_size=2), chunk_size=1)(torch.stack([rows, rows]))
    assert torch.equal(nested, torch.stack([whole, whole]))


def test_mapped_problems_have_noise_of_their_own():
    smoothed = smooth()
    rows = BATCH[:1].expand(6, 2)
    batch = smoothed(rows, step=2)
    assert len(batch.unique(dim=0)) == 6
    numbers = torch.arange(6)
    for size in (None, 1, 4):
        mapped = torch.func.vmap(lambda x, b: smoothed(x, step=2, problem=b), chunk_size=size)(rows, numbers)
        assert torch.equal(mapped, batch)
    # Minibatches: a datum keeps its noise in whichever batch it is.
    for part in (torch.tensor([4, 1]), np.array([5, 0, 2])):
        assert torch.equal(smoothed(rows[part], step=2, problem=part), batch[part])
    steps = torch.func.vmap(lambda i: smoothed(X, step=i))(torch.arange(3))
    assert torch.equal(steps, torch.stack([smoothed(X, step=i) for i in range(3)]))


@pytest.mark.parametrize("step", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3).int()])
def test_steps_may_be_any_kind_of_integer(step):
    smoothed = smooth(points="mc")
    assert torch.equal(smoothed(X, step=step), smoothed(X, step=3))
    assert torch.equal(smoothed(X, problem=step), smoothed(X, problem=3))
    assert torch.equal(smoothed.estimate(X, step=step).value, smoothed(X, step=3))
    assert smoothed.squared_error(X, torch.zeros(3), step=step) == smoothed.squared_error(X, torch.zeros(3), step=3)
    adaptive = smoothed.estimate_to(X, step=step, relative_error=0.1, budget=64)
    assert torch.equal(adaptive.value, smoothed.estimate_to(X, step=3, relative_error=0.1, budget=64).value)


@pytest.mark.parametrize(
    "step",
    [
        -1,
        0.5,
        3.0,
        True,
        None,
        "3",
        float("nan"),
        float("inf"),
        2**63,
        np.float64(3),
        torch.tensor(-1),
        torch.tensor(3.0),
        torch.tensor([3]),
        torch.tensor(True),
    ],
)
@pytest.mark.parametrize("name", ["step", "problem"])
def test_what_is_no_step_is_told(step, name):
    smoothed = smooth()
    for call in (smoothed, smoothed.estimate):
        with pytest.raises(InputError, match=f"Expected.*{name}"):
            call(X, **{name: step})


def test_steps_that_are_none_are_told_inside_vmap_too():
    smoothed = smooth()
    with pytest.raises(InputError, match="at least 0"):
        torch.func.vmap(lambda x, i: smoothed(x, step=i))(BATCH, torch.tensor([0, 1, -1]))
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        smoothed(BATCH, problem=torch.arange(2))


# -- what surrounds a call ----------------------------------------------------------------------


def as_torch(x):
    return torch.sin(torch.as_tensor(x, device="cpu").float() @ torch.as_tensor(MIXING, device="cpu"))


@pytest.mark.parametrize("keep", [24.0, 0.0])
@pytest.mark.parametrize("simulator", [lambda x: np.sin(x.astype(np.float32) @ MIXING), as_torch])
@pytest.mark.parametrize("surroundings", ["autocast", "inference_mode", "no_grad", "default_device"])
def test_no_result_depends_on_the_surroundings(keep, simulator, surroundings):
    context = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "default_device": lambda: torch.device("meta"),
    }[surroundings]

    def results(smoothed):
        estimate = smoothed.estimate(X)
        vector = torch.ones(40, device="cpu")
        return smoothed(X), estimate.value, estimate.jacobian(), estimate.vjp(vector), estimate.jvp(V)

    def gradient(smoothed):
        theta = X.clone().requires_grad_()
        return torch.autograd.grad(smoothed(theta).sum(), theta)[0]

    smoothed, fresh = (
        bridge.smooth(simulator, seed=0, num_samples=32, scale=0.1, memory=bridge.Memory(keep_mb=keep))
        for _ in range(2)
    )
    with context():
        inside = results(fresh)
        if surroundings in ("autocast", "default_device"):
            assert torch.equal(gradient(fresh), gradient(smoothed))
    for ours, truth in zip(inside, results(smoothed), strict=True):
        assert torch.equal(ours, truth)
    # Nothing of inside is in the way outside.
    assert torch.equal(gradient(fresh), gradient(smoothed))


def test_simulators_and_losses_may_differentiate_inside():
    net = torch.nn.Linear(2, 3).double()

    def stationary(x):
        z = torch.tensor(x, requires_grad=True)
        return torch.autograd.grad((z**3).sum(), z)[0].numpy()

    def slope(y):
        y = y.clone().requires_grad_()
        return torch.autograd.grad((y**3).sum(), y)[0].sum()

    made = (
        bridge.smooth(stationary, seed=0, num_samples=8),
        bridge.smooth(lambda x: net(torch.as_tensor(x)), seed=0, num_samples=8),
        bridge.smooth(
            lambda x: torch.func.jacrev(lambda z: z**3)(torch.as_tensor(x)).diagonal(), seed=0, num_samples=8
        ),
        bridge.smooth(lambda x: torch.as_tensor(x).to(torch.bfloat16), seed=0, num_samples=8),
        bridge.smooth_loss(three, slope, seed=0, num_samples=8),
    )
    for smoothed in made:
        estimate = smoothed.estimate(X)
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                assert torch.equal(smoothed(X), estimate.value)
        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            np.testing.assert_allclose(jacobian(smoothed)(X), estimate.jacobian(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "theta",
    [
        torch.stack([X, torch.zeros_like(X)], dim=1)[:, 0],
        torch._neg_view(-X),
        -torch.complex(torch.zeros_like(X), X).conj().imag,
        torch.nn.Parameter(X),
        X.numpy(),
    ],
    ids=["strided", "negated", "conjugated", "parameter", "numpy"],
)
def test_parameters_of_any_memory(theta):
    smoothed = smooth()
    assert torch.equal(smoothed(theta).detach(), smoothed(X))
    expanded = X[:1].expand(2)
    assert torch.equal(smoothed(expanded), smoothed(expanded.clone()))
    assert torch.equal(F.jacobian(smoothed, expanded), F.jacobian(smoothed, expanded.clone()))


@pytest.mark.parametrize("theta", [X.to_sparse(), X.to("meta")], ids=["sparse", "meta"])
def test_parameters_without_numbers_are_told(theta):
    with pytest.raises(InputError, match="dense parameters in memory"):
        smooth()(theta)


# -- copies, files and graphs ----------------------------------------------------------------------


class Module(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.log_scale = torch.nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
        self.smoothed = smooth(scale=bridge.LogScale(self.log_scale), **settings)

    def forward(self, x):
        return self.smoothed(x * self.weight)


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        (copy.deepcopy, {}),
        (through_a_file, {}),
        (copy.deepcopy, {"on": 1}),
        (lambda x: pickle.loads(pickle.dumps(x)), {"on": "process"}),
    ],
    ids=["copy", "file", "copy of workers", "pickle of a process"],
)
def test_copies_are_whole_and_by_themselves(how, settings):
    module = Module(**settings)
    value = module(X)
    other = how(module)
    assert torch.equal(other(X), value)
    # The copy's scale is the copy's parameter.
    with torch.no_grad():
        other.log_scale += 1
    assert torch.equal(module(X), value)
    assert not torch.equal(other(X), value)
    other(X).sum().backward()
    assert other.log_scale.grad is not None
    assert module.log_scale.grad is None


def test_functions_of_a_script_can_be_pickled_and_what_cannot_is_told():
    smoothed = bridge.smooth(lambda x: 2 * x, seed=0, num_samples=4)
    assert torch.equal(pickle.loads(pickle.dumps(smoothed))(X), smoothed(X))
    assert torch.equal(copy.copy(smoothed)(X), smoothed(X))
    lock = threading.Lock()

    def holding(x):
        with lock:
            return x

    held = bridge.smooth(holding, seed=0, num_samples=4)
    with pytest.raises(InputError, match=r"pickled, got 'holding'.*lock"):
        pickle.dumps(held)
    assert torch.equal(copy.deepcopy(held)(X), held(X))
    computed = smooth(scale=torch.tensor(0.1, dtype=torch.float64, requires_grad=True) * 2)
    with pytest.raises(InputError, match="at each call"):
        copy.deepcopy(computed)


def test_being_written_into_a_graph_is_refused_with_the_reason():
    from torch.fx.experimental.proxy_tensor import make_fx

    module = Module()
    attempts = {
        "export": lambda: torch.export.export(module, (X,), strict=False),
        "jit.trace": lambda: torch.jit.trace(module, (X,)),
        "make_fx": lambda: make_fx(module.smoothed)(X),
        "fx": lambda: torch.fx.symbolic_trace(module),
        "linearize": lambda: torch.func.linearize(module.smoothed, X),
    }
    for attempt in attempts.values():
        with pytest.raises(InputError, match="cannot be part of a graph"):
            attempt()


@pytest.mark.slow  # the compiler takes its time
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it
def test_compile_goes_round_and_strict_export_says_why():
    module = Module()
    compiled = torch.compile(lambda x, i: module.smoothed(2 * x, step=i).sum(), backend="eager")
    assert torch.equal(compiled(X, torch.tensor(3)), module.smoothed(2 * X, step=3).sum())
    with pytest.raises(Exception, match="cannot be part of a graph"):
        torch.export.export(module, (X,), strict=True)
