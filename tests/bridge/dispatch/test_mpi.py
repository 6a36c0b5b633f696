"""Ranks: bitwise the same value, gradient and fit on 1, 2, 3, 4 and 7; errors and misuse end on every rank."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.mpi

GRADIENTS = """
import hashlib
import numpy as np
import torch
import bridge

A = np.random.default_rng(0).normal(size=(2, 500))

def f(x):
    return np.sin(x @ A).astype(np.float32)

theta = torch.tensor([[0.1, 0.4], [0.2, 0.3], [0.5, 0.6]], dtype=torch.float64, requires_grad=True)
matrix = torch.tensor([[0.5, 0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
digest = hashlib.sha256()
for keep in (40, 0):
    for n, covariate, leaf in ((5, "auto", None), (64, "f(x)", None), (200, "loo", None), (99, "mean", 7)):
        smoothed = bridge.smooth(
            f, seed=0, num_samples=n, covariate=covariate, points="rqmc-latin",
            on=bridge.Ranks(leaf_size=leaf), memory=bridge.Memory(keep_mb=keep),
        )
        y = smoothed(theta, step=n, scale=matrix)
        gradients = torch.autograd.grad((y**2).sum(), (theta, matrix))
        e = smoothed.estimate(theta[0])
        forward = torch.func.jvp(smoothed, (theta.detach(),), (torch.ones_like(theta),))[1]
        per_problem = torch.func.vmap(torch.func.grad(lambda t: smoothed(t).sum()))(theta.detach())
        if keep:
            hessian = torch.func.hessian(lambda t: smoothed(t).sum())(theta[0].detach())
            digest.update(hessian.numpy().tobytes())
        loss = bridge.smooth_loss(f, lambda out: (out**2).sum(), seed=1, num_samples=n)(theta)
        for t in (y, *gradients, e.jacobian(), e.jvp(torch.tensor([1.0, 2.0])), forward, per_problem, loss):
            digest.update(t.detach().numpy().tobytes())
# Large outputs are streamed in leaves of several units, which ranks share; small ones transposed, for sorts.
for n, kwargs in ((16, {}), (40, {"replicates": 4}), (96, {"covariate": "f(x)"}), (256, {})):
    smoothed = bridge.smooth(f, seed=0, num_samples=n, memory=bridge.Memory(keep_mb=0), **kwargs)
    e = smoothed.estimate(theta, step=n)
    assert e.streamed
    digest.update(e.jacobian().numpy().tobytes())
    y = smoothed(theta.detach(), step=n)
    assert torch.equal(e.value, y)
    if kwargs.get("replicates"):
        digest.update(e.standard_error.numpy().tobytes())

def fragile(x):
    if x[0] > 1.2:
        raise ValueError("outside")
    return np.where(x[1] > 1.4, np.nan, f(x))

for n, points, covariate in ((24, "mc", "auto"), (32, "mc", "loo"), (30, "halton", "bq")):
    smoothed = bridge.smooth(fragile, seed=2, num_samples=n, points=points, covariate=covariate, failures="drop")
    e = smoothed.estimate(theta[0], step=n, scale_gradient=True)
    assert e.num_failed > 0, n
    digest.update(bytes([e.num_failed]))
    results = [e.value, e.vjp(e.value), e.vjp_scale(e.value), e.jacobian()]
    if covariate == "loo":
        V = torch.eye(500)
        results += [e.covariance(), e.covariance_vjp(V), e.covariance_vjp_scale(V), e.variance_vjp(e.value)]
        results += [e.median(3), e.median_jacobian(5), e.standard_error, e.jacobian_standard_error()]
        results += [e.vjp_standard_error(e.value)]
    for t in results:
        digest.update(t.numpy().tobytes())
if bridge.is_root():
    print("digest", digest.hexdigest())
"""

FIT = """
import hashlib
import json
import numpy as np
import torch
import bridge

grid = np.linspace(-1, 1, 48)

def f(x):
    return np.floor(50 * np.exp(-((grid[:, None] - x[0]) ** 2 + (grid - x[1]) ** 2) / x[2] ** 2))

bounds = [(-1, 1), (-1, 1), (0.05, 1)]
sim = bridge.as_simulator(f, names=["a", "b", "w"], bounds=bounds, natural_scale=[0.1, 0.1, 0.05])
target = f([0.3, -0.2, 0.3])
digest = hashlib.sha256()
for method in (bridge.Adam(steps=60), bridge.GaussNewton(steps=12), bridge.Kriging(rounds=12)):
    result = bridge.fit(sim, target, {"a": 0.0, "b": 0.1, "w": 0.4}, seed=0, method=method)
    digest.update(json.dumps([h.parameters for h in result.history]).encode())
    digest.update(result.parameters.tobytes() + result.standard_error.tobytes() + result.output.tobytes())
    assert np.abs(result.parameters - [0.3, -0.2, 0.3]).max() < 0.01, result
variance, start = 4.0, [[0.0, 0.1, 0.4], [0.2, 0.0, 0.3], [0.5, -0.5, 0.3]]
robust = lambda name: bridge.LeastSquares(robust=name)
few = {"steps": 4, "num_samples": 6}
for settings in (
    {"method": bridge.Natural(**few), "misfit": robust("huber")},
    {"method": bridge.Torch(optimiser="AdamW", blur=[2], **few)},
    {"method": bridge.GaussNewton(blur=[2], **few), "misfit": robust("cauchy"), "prior": {"w": (0.3, 0.1)},
     "stop": bridge.Stop(error=0.1)},
    {"method": bridge.Kriging(rounds=4, round_size=6), "misfit": robust("huber"),
     "stop": bridge.Stop(error=0.01, runs=24)},
):
    result = bridge.fit(sim, target, start, seed=0, variance=variance, **settings)
    digest.update(json.dumps([(h.parameters, h.standard_error) for h in result.history]).encode())
    digest.update(result.parameters.tobytes() + result.covariance.tobytes() + result.output.tobytes())
def scalar(x):  # not a number beyond a wall: outputs that do not count
    return np.array([np.sum((x - 0.3) ** 2 * [1, 10]) if x[0] < 0.9 else np.nan])
result = bridge.fit(
    scalar, [0.0], [0.6, 0.5], seed=0, method=bridge.TrustRegion(round_size=3), misfit=lambda y, t: y.sum(), stop=30
)
assert result.method == "trust-region" and np.abs(result.parameters - 0.3).max() < 1e-3, result
digest.update(json.dumps([(h.parameters, h.num_failed) for h in result.history]).encode() + result.output.tobytes())
gaps = lambda x: np.where(np.arange(4) * x[0] > 1.2, np.nan, np.append(x, [x @ x, x[0] * x[1]])).astype(np.float32)
theta = torch.tensor([0.45, 0.5], dtype=torch.float64, requires_grad=True)
smoothed = bridge.smooth(gaps, seed=0, num_samples=48, scale=0.1, failures=bridge.Drop(at_least=0.2, missing="ignore"))
torch.nansum(smoothed(theta) ** 2).backward()
digest.update(theta.grad.numpy().tobytes() + smoothed.estimate(theta.detach()).jacobian().numpy().tobytes())
lacking = bridge.Raise(missing="ignore")
result = bridge.fit(gaps, [0.4, 0.5, 0.41, 0.2], [0.7, 0.3], seed=0, stop=20, failures=lacking, variance=1e-4)
digest.update(result.parameters.tobytes() + result.output.tobytes())
walled = bridge.as_simulator(lambda x: np.append(x, np.nan if x[0] < 0.2 else 1.0), natural_scale=[0.3, 0.3])
result = bridge.fit(walled, [1.0, 1.0, 1.0], [0.5, 0.5], seed=0, method=bridge.Adam(num_samples=8, steps=6))
assert result.num_failed > 0
digest.update(json.dumps([(h.parameters, h.num_failed) for h in result.history]).encode())
if bridge.is_root():
    print("digest", digest.hexdigest())
"""


@pytest.mark.every_mpi
@pytest.mark.parametrize("script", [GRADIENTS, FIT], ids=["gradients", "fit"])
@pytest.mark.parametrize("numbers", [(2, 3), pytest.param((1, 4, 7), marks=pytest.mark.slow)], ids=["few", "more"])
def test_bitwise_the_same_on_any_number_of_ranks(numbers, script, run_ranks, run_alone):
    alone = run_alone(script)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.startswith("digest ")
    for ranks in numbers:
        done = run_ranks(ranks, script, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout == alone.stdout, f"{ranks} ranks"


def test_a_failing_rank_raises_the_same_error_on_all(run_ranks):
    done = run_ranks(
        3,
        """
        import numpy as np, torch, bridge

        def f(x):
            return np.nan if x[0] > 1 else x.sum()

        try:
            bridge.smooth(f, seed=0, num_samples=64)(torch.zeros(2))
        except bridge.BridgeError as error:
            from mpi4py import MPI

            texts = MPI.COMM_WORLD.allgather(f"{type(error).__name__} {error}")
            if bridge.is_root():
                assert len(set(texts)) == 1, texts
                print(texts[0])
        """,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NonFiniteError Expected finite outputs")
    assert "(p0 = " in done.stdout
    assert "[rank " in done.stdout


def test_ranks_in_different_places_get_an_error_not_a_deadlock(run_ranks):
    done = run_ranks(
        2,
        """
        import torch, bridge

        smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=4)
        smoothed(torch.zeros(2), step=1 if bridge.is_root() else 2)
        """,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Expected all ranks to make the same call" in done.stderr
    assert "step 1" in done.stderr
    assert "step 2" in done.stderr


def test_a_bug_on_one_rank_ends_the_job_with_its_traceback(run_ranks):
    done = run_ranks(
        3,
        """
        import torch, bridge

        smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=4)
        smoothed(torch.zeros(2))
        if smoothed.dispatcher.rank == 1:
            raise KeyError("a bug of the script")
        smoothed(torch.zeros(2), step=1)
        """,
        timeout=60,
    )
    assert done.returncode != 0
    assert "rank 1 of 3" in done.stderr
    assert "a bug of the script" in done.stderr


LEAVING = """
import sys, time
import torch, bridge

smoothed = bridge.smooth(lambda x: x, seed=0, num_samples=4)
smoothed(torch.zeros(2))
if sys.argv[1] == "exit" and smoothed.dispatcher.rank == 1:
    sys.exit(3)
if sys.argv[1] == "late" and bridge.is_root():
    time.sleep(4)  # longer than a rank that has died would go unnoticed
if sys.argv[1] == "exit":
    smoothed(torch.zeros(2), step=1)
print("end", flush=True)
"""


@pytest.mark.every_mpi
def test_ranks_of_a_bare_script_end_together(run_ranks):
    """Without `bridge run`: one that leaves before the others ends them, one that takes longer is waited for."""
    left = run_ranks(3, LEAVING, "exit", timeout=60)
    assert left.returncode == 70, (left.returncode, left.stderr)
    assert "on ranks [1]: end of the script" in left.stderr
    assert left.stdout == ""
    late = run_ranks(3, LEAVING, "late", timeout=60)
    assert late.returncode == 0, late.stderr
    assert late.stdout.count("end") == 3  # launchers may put them on one line
    assert late.stderr == ""


def test_ranks_cannot_drift(run_ranks):
    """Rank 0's parameters count: a rank that differs in a last bit is brought back."""
    done = run_ranks(
        2,
        """
        import torch, bridge

        smoothed = bridge.smooth(lambda x: x**2, seed=0, num_samples=4)
        rank = smoothed.dispatcher.rank
        theta = torch.tensor([1.0 + rank], dtype=torch.float64, requires_grad=True)
        y = smoothed(theta)
        (g,) = torch.autograd.grad(y, theta)
        values = smoothed.dispatcher.broadcast_object((y.item(), g.item()))
        assert values == (y.item(), g.item()), (rank, values, y, g)
        assert theta.item() == 1.0 + rank
        """,
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_launcher_is_detected(run_alone):
    """The launcher says four, MPI sees one: N silent worlds of size one."""
    program = "import bridge, torch\nbridge.smooth(lambda x: x, seed=0)(torch.zeros(1))\n"
    done = run_alone(program, env={"OMPI_COMM_WORLD_SIZE": "4"})
    assert done.returncode != 0
    assert "4 separate worlds of one rank" in done.stderr


def test_without_mpi_nothing_of_it_is_imported(run_alone):
    done = run_alone("""
        import sys
        sys.modules["mpi4py"] = None  # as if it were not installed
        import torch, bridge
        theta = torch.zeros(2, requires_grad=True)
        bridge.smooth(lambda x: x, seed=0)(theta).sum().backward()
        print(bool((theta.grad - 1).abs().max() < 0.2))
    """)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
