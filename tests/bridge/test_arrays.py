"""What simulators, losses and targets may be made of: the same numbers whatever holds them, or a word about it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bridge

THETA = torch.tensor([0.3, 0.5], dtype=torch.float64)
DTYPES = ("?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "g")


def levels(x: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 2000 or so, which change with the parameters."""
    return np.floor(np.array([[900 * x[0] ** 2, 600 * x[1], 40.0], [7.0, 300 * x[0], 200 * x[1] ** 2]]).clip(0, 2000))


def of_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    y = levels(x)
    return y % 2 if dtype == "?" else y % 100 if dtype in ("i1", "u1") else y


def held(y: np.ndarray, dtype: str, order: str, layout: str, container: str) -> Any:
    """The numbers in an array of a kind, in a container."""
    array = y.astype(np.dtype(dtype).newbyteorder(order))
    if layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "reversed":
        array = array[:, ::-1].copy()[:, ::-1]
    elif layout == "gaps":
        array = np.repeat(array, 3, axis=1)[:, ::3]
    elif layout == "unaligned":
        data = bytearray(1 + array.nbytes)
        data[1:] = array.tobytes()
        array = np.frombuffer(data, array.dtype, offset=1).reshape(array.shape)
    elif layout == "read-only":
        array.flags.writeable = False
    if container == "list":
        return array.tolist()
    if container == "masked":
        return np.ma.masked_array(array, np.zeros(array.shape, bool))
    if container == "tensor":
        native = torch.as_tensor(array.astype(array.dtype.newbyteorder("="), order="C", copy=True))
        return native.requires_grad_(native.is_floating_point())
    if container == "rows":  # a list of tensors
        return [torch.as_tensor(row.astype(array.dtype.newbyteorder("="))) for row in array]
    return array


def squares(y: torch.Tensor) -> torch.Tensor:
    return ((y - 150) ** 2).sum()


def of_smooth(simulator: Any) -> list[Any]:
    estimate = bridge.smooth(simulator, seed=0, num_samples=8, scale=0.1).estimate(THETA)
    return [estimate.value, estimate.jacobian()]


def of_smooth_loss(simulator: Any) -> list[Any]:
    estimate = bridge.smooth_loss(simulator, squares, seed=0, num_samples=8, scale=0.1).estimate(THETA)
    return [estimate.value, estimate.jacobian()]


def of_squared_error(simulator: Any) -> list[Any]:
    smoothed = bridge.smooth(simulator, seed=0, num_samples=8, scale=0.1, points="mc", covariate="loo")
    error = smoothed.estimate(THETA).squared_error(torch.full((2, 3), 150.0, dtype=torch.float64))
    return [error.value, error.gradient]


def of_surrogate(simulator: Any) -> list[Any]:
    estimate = bridge.smooth(
        levels, seed=0, num_samples=8, scale=0.1, surrogate=bridge.Surrogate(simulator, samples=16)
    ).estimate(THETA)
    return [estimate.value, estimate.jacobian()]


METHODS: dict[str, str | bridge.Method] = {
    "kriging": "kriging",
    "gauss-newton": bridge.GaussNewton(steps=2, num_samples=6),
    "adam": bridge.Adam(steps=2, num_samples=6),
    "natural": bridge.Natural(steps=2, num_samples=6),
}


def of_fit(method: str | bridge.Method) -> Callable[[Any], list[Any]]:
    def run(simulator: Any) -> list[Any]:
        stop = 14 if method == "kriging" else None
        result = bridge.fit(
            simulator, np.full((2, 3), 150.0), [0.3, 0.5], seed=0, method=method, variance=1.0, stop=stop
        )
        return [result.parameters, result.loss, result.output]

    return run


PATHS: dict[str, Callable[[Any], list[Any]]] = {
    "smooth": of_smooth,
    "smooth_loss": of_smooth_loss,
    "squared_error": of_squared_error,
    "surrogate": of_surrogate,
    **{f"fit {name}": of_fit(method) for name, method in METHODS.items()},
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    dtype=st.sampled_from(DTYPES),
    order=st.sampled_from("<>"),
    layout=st.sampled_from(("plain", "fortran", "reversed", "gaps", "unaligned", "read-only")),
    container=st.sampled_from(("array", "list", "masked", "tensor", "rows")),
    path=st.sampled_from(sorted(PATHS)),
    vectorized=st.booleans(),
)
def test_numbers_are_the_same_whatever_holds_them(
    dtype: str, order: str, layout: str, container: str, path: str, vectorized: bool
) -> None:
    if dtype == "g" and container in ("tensor", "rows"):
        dtype = "f8"  # torch has no long double
    if path == "surrogate" and dtype in ("?", "i1", "u1"):
        dtype = "i2"  # the numbers are those of the simulator

    def simulate(x: np.ndarray) -> Any:
        return held(of_dtype(x, dtype), dtype, order, layout, container)

    def plain(x: np.ndarray) -> np.ndarray:
        return of_dtype(x, dtype)

    def rows(X: np.ndarray) -> Any:
        y = np.stack([of_dtype(x, dtype) for x in X]).reshape(len(X), 6)
        made = held(y, dtype, order, layout, container)
        if container == "rows":
            return [row.reshape(2, 3) for row in made]
        return np.reshape(made, (-1, 2, 3)).tolist() if container == "list" else made.reshape(-1, 2, 3)

    simulator = bridge.as_simulator(rows, vectorized=True) if vectorized else simulate
    reference = bridge.as_simulator(lambda X: np.stack([plain(x) for x in X]), vectorized=True) if vectorized else plain
    # Losses see float32 where outputs are; all else is the same to the last digits.
    tolerance = 1e-4 if dtype == "f4" and path == "smooth_loss" else 1e-11
    for got, want in zip(PATHS[path](simulator), PATHS[path](reference), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("on", [None, 2, "process"])
def test_other_processes_hand_over_the_same_numbers(on: Any, tmp_path: Path) -> None:
    def simulate(x: np.ndarray) -> Any:
        y = levels(x)
        return [torch.tensor(row, requires_grad=True) for row in y] if x[0] > 0.3 else y.astype(">u2")

    store = bridge.Store(tmp_path / "store", above_s=0.0)
    for _ in range(2):  # the second time out of the store
        got = bridge.smooth(simulate, seed=0, num_samples=8, scale=0.1, memory=store, on=on).estimate(THETA)
        want = bridge.smooth(levels, seed=0, num_samples=8, scale=0.1).estimate(THETA)
        assert torch.allclose(got.value, want.value, rtol=1e-13)
        assert torch.allclose(got.jacobian(), want.jacobian(), rtol=1e-10)


def test_the_dtype_may_change_from_run_to_run() -> None:
    def simulate(x: np.ndarray) -> Any:
        y = levels(x)
        kinds: tuple[type[Any], ...] = (np.float32, np.int64, np.float64, np.uint16)
        return y.astype(kinds[int(1e6 * x[0]) % 4])

    for path in (of_smooth, of_smooth_loss):
        for got, want in zip(path(simulate), path(levels), strict=True):
            assert torch.allclose(got, want, rtol=1e-6)


def test_streamed_sums_ask_for_one_dtype() -> None:
    count = 0

    def simulate(x: np.ndarray) -> Any:
        nonlocal count
        count += 1
        return (np.ones(3) * x[0]).astype(np.float32 if count < 17 else np.float64)

    smoothed = bridge.smooth(simulate, seed=0, num_samples=64, scale=0.1, memory=bridge.Memory(keep_mb=0))
    with pytest.raises(bridge.BridgeError, match=r"one dtype .*float32 first and then .*float64"):
        smoothed(THETA.clone().requires_grad_())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (None, "got None. Return an array"),
        ({"lift": 1.0}, r"dict with the keys 'lift'. Return its values as one array"),
        ("1.5", "text, '1.5'. Return the number"),
        (np.array(["1", "2"]), "text .dtype <U1"),
        (np.array([1j, 2.0]), "complex numbers .dtype complex128.. Return the real and imaginary parts"),
        (torch.tensor([1j]), "complex numbers .dtype torch.complex64"),
        ([1.0, [2.0, 3.0]], "parts of different shapes"),
        (np.array([Fraction(1, 2)]), "Python objects .*Fraction"),
        (np.array([(1, 2.0)], dtype=[("a", int), ("b", float)]), "records"),
        (np.array(["2020-01-01"], dtype="M8[D]"), "times"),
        ({1.0}, "got a set"),
        ((x for x in (1.0, 2.0)), "got a generator"),
        (np.zeros(0), "at least one number"),
    ],
)
def test_what_is_no_array_of_numbers_is_told_by_name(wrong: Any, said: str) -> None:
    for make in (bridge.smooth, lambda f, **kw: bridge.smooth_loss(f, squares, **kw)):
        with pytest.raises(bridge.OutputError, match=said):
            make(lambda x: wrong, seed=0, num_samples=4, scale=0.1)(THETA)
    with pytest.raises(bridge.OutputError, match=said):
        bridge.fit(lambda x: wrong, [1.0, 2.0], [0.3, 0.5], seed=0)


def test_a_sparse_output_is_told() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(bridge.OutputError, match=r"sparse .*toarray\(\)"):
        bridge.smooth(lambda x: sparse.eye(2), seed=0, num_samples=4, scale=0.1)(THETA)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (np.array([1j, 2]), "complex"),
        (torch.tensor([1j, 2]), "complex"),
        (np.array(["1", "2"]), "dtype <U1"),
        ({"a": 1.0}, "dict"),
        (None, "got None"),
        ([1.0, np.nan], r"mask=~numpy.isfinite"),
        (np.ma.masked_array([1.0, 2.0], [True, True]), "not masked, got none"),
    ],
)
def test_a_target_that_is_none_is_told(target: Any, said: str) -> None:
    with pytest.raises(bridge.InputError, match=said):
        bridge.fit(lambda x: x, target, [0.3, 0.5], seed=0)


# -- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [
        lambda y: float(y.sum()),
        lambda y: np.float32(y.sum()),
        lambda y: y.sum().reshape(1, 1),
        lambda y: y.sum().requires_grad_(False).clone().requires_grad_(True),
        lambda y: [y.sum()],
        lambda y: y.mul_(2).sum() / 2,  # what it is given is its own
    ],
)
def test_losses_may_return_any_number(loss: Callable[[torch.Tensor], Any]) -> None:
    cached = np.array([[0.5, 0.25]])
    for f in (lambda x: x.astype(np.float32), bridge.as_simulator(lambda X: cached.repeat(len(X), 0), vectorized=True)):
        got = bridge.smooth_loss(f, loss, seed=0, num_samples=8, scale=0.1)(THETA)
        want = bridge.smooth_loss(f, lambda y: y.sum(), seed=0, num_samples=8, scale=0.1)(THETA)
        assert float(got) == pytest.approx(float(want), rel=1e-7)
    assert cached.tolist() == [[0.5, 0.25]]


def test_losses_may_return_the_same_memory() -> None:
    total = torch.zeros((), dtype=torch.float64)

    def in_place(y: torch.Tensor) -> torch.Tensor:
        return total.zero_().add_(y.sum())

    got, want = (
        bridge.smooth_loss(levels, loss, seed=0, num_samples=8, scale=0.1)(THETA)
        for loss in (in_place, lambda y: y.sum())
    )
    assert float(got) == float(want)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda y: y, r"one number from the loss, got shape \(2, 3\)"),
        (lambda y: None, "from the loss, got None"),
        (lambda y: y.sum() * 1j, "complex"),
        (lambda y: {"loss": y.sum()}, "dict"),
    ],
)
def test_losses_of_no_number_are_told(loss: Any, said: str) -> None:
    with pytest.raises(bridge.InputError, match=said):
        bridge.smooth_loss(levels, loss, seed=0, num_samples=4, scale=0.1)(THETA)
    for method in (bridge.Adam(steps=1, num_samples=4), bridge.Natural(steps=1, num_samples=4)):
        with pytest.raises(bridge.InputError, match=said):
            bridge.fit(levels, np.zeros((2, 3)), [0.3, 0.5], seed=0, method=method, misfit=lambda y, t: loss(y))


def test_bytes_do_not_wrap_in_losses() -> None:
    def image(x: np.ndarray) -> np.ndarray:
        return np.clip(np.array([200 * x[0], 50.0, 240 * x[1]]), 0, 255).astype(np.uint8)

    target = torch.tensor([70, 60, 130], dtype=torch.uint8)
    for loss, want in ((lambda y: ((y - 100) ** 2).sum(), 5589.625), (lambda y: ((y - target) ** 2).sum(), 1314.625)):
        assert float(bridge.smooth_loss(image, loss, seed=0, num_samples=16, scale=0.1)(THETA)) == want


# -- sums --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [24.0, 0.0])
@pytest.mark.parametrize("samples", [8, 100, 1024])
def test_float32_outputs_lose_nothing_in_sums(keep: float, samples: int) -> None:
    def narrow(X: np.ndarray) -> np.ndarray:
        return (1e6 + X @ np.array([[1.0, -2.0], [0.5, 0.0]])).astype(np.float32)

    def wide(X: np.ndarray) -> np.ndarray:
        return narrow(X).astype(np.float64)

    got, want = (
        bridge.smooth(
            bridge.as_simulator(f, vectorized=True),
            seed=0,
            num_samples=samples,
            scale=0.1,
            points="mc",
            covariate="loo",
            memory=bridge.Memory(keep_mb=keep),
        ).estimate(THETA)
        for f in (narrow, wide)
    )
    assert got.streamed == (keep == 0 and samples > 3)
    assert torch.allclose(got.value, want.value, rtol=1e-13, atol=0)
    assert torch.allclose(got.jacobian(), want.jacobian(), rtol=1e-5, atol=1e-4)
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(got.vjp(v), want.vjp(v), rtol=1e-5, atol=1e-4)


def test_the_same_float32_number_from_all_runs_is_the_value() -> None:
    constant = np.full((100, 5), 123456.78, dtype=np.float32)
    smoothed = bridge.smooth(
        bridge.as_simulator(lambda X: constant[: len(X)], vectorized=True),
        seed=0,
        num_samples=100,
        scale=0.1,
        points="mc",
        memory=bridge.Memory(keep_mb=0),
    )
    estimate = smoothed.estimate(THETA)
    assert float((estimate.value - float(constant[0, 0])).abs().max()) <= 1e-10
    assert float(estimate.jacobian().abs().max()) <= 1e-3


# -- masks -------------------------------------------------------------------------------------------------------------

X = np.linspace(0, 1, 40)
TRUTH = np.array([1.0, 2.0, -0.5])
BAD = np.zeros(40, dtype=bool)
BAD[[3, *range(10, 15), 39]] = True
NOISY = TRUTH[0] + TRUTH[1] * X + TRUTH[2] * X**2 + 0.05 * np.random.default_rng(0).normal(size=40)


def quadratic(p: np.ndarray) -> np.ndarray:
    return p[0] + p[1] * X + p[2] * X**2


def described(f: Callable[[np.ndarray], Any]) -> bridge.Simulator:
    return bridge.as_simulator(f, names=["a", "b", "c"], natural_scale=[0.3, 0.3, 0.3])


CORRELATED = 0.0025 * np.exp(-np.abs(np.subtract.outer(np.arange(40), np.arange(40))))
# How outputs are compared, and by which method.
FORMS: dict[str, tuple[bridge.LeastSquares, str | bridge.Method]] = {
    "a number": (bridge.LeastSquares(0.0025), "auto"),
    "of its shape": (bridge.LeastSquares(np.linspace(0.001, 0.004, 40)), "auto"),
    "unknown": (bridge.LeastSquares(), "auto"),
    "a covariance": (bridge.LeastSquares(CORRELATED), "auto"),
    "robust": (bridge.LeastSquares(0.0025, robust="huber"), "auto"),
    "whitened": (bridge.LeastSquares(0.01, whiten=lambda y: 2 * y), "auto"),
    "gauss-newton": (bridge.LeastSquares(0.0025), bridge.GaussNewton(num_samples=8)),
    "blurred": (bridge.LeastSquares(0.0025), bridge.GaussNewton(num_samples=8, blur=[2.0])),
}


def selected(misfit: bridge.LeastSquares) -> bridge.LeastSquares:
    variance = np.asarray(1.0 if misfit.variance is None else misfit.variance)
    if variance.ndim == 1:
        return replace(misfit, variance=variance[~BAD])
    return replace(misfit, variance=variance[~BAD][:, ~BAD]) if variance.ndim == 2 else misfit


@pytest.mark.parametrize("form", FORMS)
def test_what_is_masked_counts_nowhere(form: str) -> None:
    spoiled = np.where(BAD, np.nan, NOISY)
    spoiled[12] = -99.0
    misfit, method = FORMS[form]

    def fitted(f: Any, target: Any, misfit: bridge.LeastSquares) -> bridge.FitResult:
        return bridge.fit(described(f), target, [0.0, 0, 0], seed=0, method=method, misfit=misfit)

    got = fitted(quadratic, np.ma.masked_array(spoiled, BAD), misfit)
    other = fitted(quadratic, NOISY, replace(misfit, mask=BAD.tolist()))
    want = fitted(lambda p: quadratic(p)[~BAD], NOISY[~BAD], selected(misfit))
    assert got.parameters.tolist() == other.parameters.tolist()
    assert got.standard_error is not None
    np.testing.assert_allclose(got.parameters, want.parameters, atol=0.1 * want.standard_error.min())
    np.testing.assert_allclose(got.standard_error, want.standard_error, rtol=0.02)
    assert got.dof == want.dof
    assert got.loss == pytest.approx(want.loss, rel=1e-3)
    if got.loss_share is not None:
        assert float(np.abs(got.loss_share[BAD]).max()) == 0


def test_infinite_variance_and_zeros_of_a_map_are_no_data() -> None:
    spoiled = np.where(BAD, 50.0, NOISY)
    weights = torch.as_tensor(np.where(BAD, 0.0, 1.0))
    results = [
        bridge.fit(described(quadratic), spoiled, [0.0, 0, 0], seed=0, misfit=misfit)
        for misfit in (
            bridge.LeastSquares(0.0025, mask=BAD),
            bridge.LeastSquares(np.where(BAD, np.inf, 0.0025)),
            bridge.LeastSquares(0.0025, whiten=lambda y: y * weights),
        )
    ]
    for result in results[1:]:
        np.testing.assert_allclose(result.parameters, results[0].parameters, rtol=1e-3)
        np.testing.assert_allclose(result.standard_error, results[0].standard_error, rtol=1e-3)
        assert result.dof == results[0].dof == 40 - 7 - 3


def test_masks_that_cannot_be_are_told() -> None:
    for mask, said in (
        (BAD[:-1], r"mask of the target's shape \(40,\), True where .* left out, got shape \(39,\)"),
        (np.where(BAD, 0.0, 0.7), "True where a number is to be left out"),
        (np.ones(40, bool), "In a mask True means no data"),
    ):
        with pytest.raises(bridge.InputError, match=said):
            bridge.fit(described(quadratic), NOISY, [0.0, 0, 0], seed=0, misfit=bridge.LeastSquares(mask=mask))
    with pytest.raises(bridge.InputError, match="mixes masked numbers into every one"):
        bridge.fit(
            described(quadratic),
            NOISY,
            [0.0, 0, 0],
            seed=0,
            misfit=bridge.LeastSquares(mask=BAD, whiten=lambda y: torch.fft.rfft(y).real),
        )


def test_a_loss_of_ones_own_gets_nothing_of_what_is_masked() -> None:
    seen = []

    def loss(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((y.detach()[BAD].abs().max(), t[BAD].abs().max()))
        return ((y - t) ** 2).mean()

    masked = np.ma.masked_array(np.where(BAD, 1e20, NOISY), BAD)
    for method in (bridge.Adam(steps=2, num_samples=4), bridge.Natural(steps=2, num_samples=4)):
        bridge.fit(described(quadratic), masked, [0.0, 0, 0], seed=0, method=method, misfit=loss)
    assert seen
    assert all(float(y) == float(t) == 0 for y, t in seen)


def test_a_job_file_names_a_mask(tmp_path: Path) -> None:
    from bridge.cli.job import load_job, run_job
    from bridge.reporting.page import write_report

    np.save(tmp_path / "target.npy", np.where(BAD, 7.0, NOISY))
    np.save(tmp_path / "bad.npy", BAD)
    (tmp_path / "mine.py").write_text(
        "import numpy as np, bridge\n"
        "x = np.linspace(0, 1, 40)\n"
        "def quadratic():\n"
        "    return bridge.as_simulator(lambda p: p[0] + p[1] * x + p[2] * x**2, names=['a', 'b', 'c'],\n"
        "                               natural_scale=[0.3, 0.3, 0.3])\n"
    )
    job = tmp_path / "job.toml"
    job.write_text(
        '[simulator]\nname = "mine.py:quadratic"\n[target]\nfile = "target.npy"\nmask = "bad.npy"\n'
        "[start]\na = 0.0\nb = 0.0\nc = 0.0\n[fit]\nseed = 0\nvariance = 0.0025\n"
    )
    loaded = load_job(job, tmp_path / "results")
    result, _ = run_job(loaded, "off")
    want = bridge.fit(
        described(quadratic), NOISY, [0.0, 0, 0], seed=0, variance=0.0025, misfit=bridge.LeastSquares(mask=BAD)
    )
    np.testing.assert_allclose(result.parameters, want.parameters, rtol=1e-3)
    assert result.dof == 30
    page = write_report(result, loaded.target, tmp_path / "report.html").read_text()
    assert "<svg" in page
    np.save(tmp_path / "bad.npy", BAD[1:])
    with pytest.raises(bridge.InputError, match="mask of the target's shape"):
        load_job(job)


# -- outputs that lack numbers -----------------------------------------------------------------------------------------


def lacking(x: np.ndarray) -> np.ndarray:
    y = np.array([x[0] ** 2 + 3, x[0] * x[1], np.sin(x[1]), 5.0 + x[0]])
    y[1] = np.nan if x[0] > 0.35 else y[1]
    y[2] = np.nan if x[1] > 0.7 else y[2]
    return y


@pytest.mark.parametrize(
    "how",
    [
        {"points": "mc", "covariate": "loo"},
        {"covariate": "regression"},
        {"points": "antithetic-mc"},
        {"points": "mc", "covariate": "f(x)"},
        {},
    ],
)
def test_each_number_is_estimated_from_the_runs_that_have_it(how: dict[str, Any]) -> None:
    common: dict[str, Any] = {"seed": 0, "num_samples": 64, "scale": 0.1, **how}
    failures = bridge.Drop(at_least=0.2, missing="ignore")
    whole = bridge.smooth(lacking, failures=failures, **common).estimate(THETA, scale_gradient=True)
    t = torch.tensor([0.3, 0.2], dtype=torch.float64)
    for j in range(4):
        one = bridge.smooth(lambda x, j=j: lacking(x)[j], failures=bridge.Drop(at_least=0.2), **common).estimate(
            THETA, scale_gradient=True
        )
        v = torch.zeros(4, dtype=torch.float64)
        v[j] = 1.0
        unit = torch.ones((), dtype=torch.float64)
        assert torch.allclose(whole.value[j], one.value, rtol=1e-14)
        assert torch.allclose(whole.jacobian()[j], one.jacobian(), rtol=1e-13)
        assert torch.allclose(whole.vjp(v), one.jacobian(), rtol=1e-11)
        assert torch.allclose(whole.jvp(t)[j], one.jvp(t), rtol=1e-11)
        assert torch.allclose(whole.vjp_scale(v), one.vjp_scale(unit), rtol=1e-11)


def test_a_number_that_few_runs_have_is_nan_and_has_no_gradient() -> None:
    smoothed = bridge.smooth(
        lacking, seed=0, num_samples=64, scale=0.1, replicates=4, failures=bridge.Raise(missing="ignore")
    )
    at = torch.tensor([0.9, 0.2], dtype=torch.float64, requires_grad=True)
    value = smoothed(at)
    assert torch.isnan(value).tolist() == [False, True, False, False]
    torch.nansum(value).backward()
    assert at.grad is not None
    assert bool(torch.isfinite(at.grad).all())
    others = bridge.smooth(lambda x: lacking(x)[[0, 2, 3]], seed=0, num_samples=64, scale=0.1, replicates=4)
    again = at.detach().clone().requires_grad_()
    others(again).sum().backward()
    assert torch.allclose(at.grad, again.grad, rtol=1e-10)
    estimate = smoothed.estimate(at.detach())
    assert torch.isfinite(estimate.standard_error).tolist() == [True, False, True, True]


def test_infinite_numbers_and_nothing_at_all_stay_failures() -> None:
    for bad in (np.array([np.inf, 1.0]), np.array([np.nan, np.nan])):
        smoothed = bridge.smooth(
            lambda x, bad=bad: bad, seed=0, num_samples=8, scale=0.1, failures=bridge.Raise(missing="ignore")
        )
        with pytest.raises(bridge.EvaluationError, match="NaN or infinite"):
            smoothed(THETA)
    with pytest.raises(bridge.EvaluationError, match=r'failures=bridge\.Raise\(missing="ignore"\)'):
        bridge.smooth(lacking, seed=0, num_samples=64, scale=0.1)(THETA)
    with pytest.raises(bridge.InputError, match="Unknown missing='drop'"):
        bridge.smooth(lacking, seed=0, num_samples=64, scale=0.1, failures=bridge.Raise(missing="drop"))
    for what in ({"covariate": "bq"}, {"surrogate": lacking}):
        with pytest.raises(bridge.InputError, match="missing='"):
            bridge.smooth(lacking, seed=0, num_samples=64, scale=0.1, failures=bridge.Raise(missing="ignore"), **what)
    loo = {"points": "mc", "covariate": "loo"}
    whole = bridge.smooth(
        lacking, seed=0, num_samples=64, scale=0.1, failures=bridge.Raise(missing="ignore"), **loo
    ).estimate(THETA)
    with pytest.raises(bridge.InputError, match=r"lack no numbers .*replicates=8"):
        whole.standard_error.sum()


def test_masked_outputs_lack_what_is_masked() -> None:
    def masked(x: np.ndarray) -> Any:
        y = lacking(x)
        return np.ma.masked_array(np.where(np.isnan(y), -99.0, y), np.isnan(y))

    got, want = (
        bridge.smooth(f, seed=0, num_samples=32, scale=0.1, failures=bridge.Raise(missing="ignore")).estimate(THETA)
        for f in (masked, lacking)
    )
    assert torch.equal(got.value.nan_to_num(), want.value.nan_to_num())


def short(p: np.ndarray) -> np.ndarray:
    """The end of the curve lacks, the more of it the steeper it is there."""
    y = quadratic(p)
    y[40 - int(np.clip(6 + 8 * (p[1] - 2), 0, 25)) :] = np.nan
    return y


@pytest.mark.parametrize(
    "method",
    ["kriging", bridge.GaussNewton(num_samples=12), bridge.Natural(num_samples=12)],
    ids=["kriging", "gauss-newton", "natural"],
)
def test_fits_of_outputs_that_lack_numbers(method: str | bridge.Method) -> None:
    result = bridge.fit(
        described(short),
        NOISY,
        [0.5, 1.0, 0.0],
        seed=0,
        variance=0.0025,
        failures=bridge.Raise(missing="ignore"),
        method=method,
        stop=90 if method == "kriging" else None,
    )
    there = ~np.isnan(result.output)
    exact = np.linalg.lstsq(np.stack([X, X, X**2], axis=1)[there] ** [0, 1, 1], NOISY[there], rcond=None)[0]
    assert result.standard_error is not None
    assert float((np.abs(result.parameters - exact) / result.standard_error).max()) < 1.0
    assert result.dof == int(there.sum()) - 3
    assert result.num_failed == 0
    chi = float((((result.output - NOISY) ** 2)[there] / 0.0025).sum())
    assert result.loss == pytest.approx(chi / 2)
    assert result.chi_square == pytest.approx(chi)
    design = np.stack([X**0, X, X**2], axis=1)[there] / 0.05
    error = np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    assert (result.standard_error > 0.7 * error).all()


@pytest.mark.parametrize("method", [bridge.Kriging(), bridge.Natural(num_samples=16)], ids=["kriging", "natural"])
def test_no_run_looks_better_for_what_it_lacks(method: bridge.Method) -> None:
    def escapes(p: np.ndarray) -> np.ndarray:
        """Where a is too large, all that tells so is lacking."""
        y = quadratic(p)
        if p[0] > 1.3:
            y[5:] = np.nan
        return y

    start = [1.6, 1.5, 0.0]
    result = bridge.fit(
        described(escapes),
        NOISY,
        start,
        seed=0,
        variance=0.0025,
        failures=bridge.Raise(missing="ignore"),
        method=method,
    )
    assert math.isclose(result.parameters[0], 1.0, abs_tol=0.1)
    assert not np.isnan(result.output).any()


def test_what_a_covariance_cannot_do_is_told() -> None:
    with pytest.raises(bridge.InputError, match="missing='ignore', got a covariance"):
        bridge.fit(
            described(short),
            NOISY,
            [0.5, 1.0, 0.0],
            seed=0,
            variance=CORRELATED,
            failures=bridge.Raise(missing="ignore"),
        )


def test_runs_that_lack_numbers_are_kept_and_taken_up(tmp_path: Path) -> None:
    def go(directory: str, method: str | bridge.Method = "auto") -> bridge.FitResult:
        return bridge.fit(
            described(short),
            NOISY,
            [0.5, 1.0, 0.0],
            seed=0,
            method=method,
            variance=0.0025,
            failures=bridge.Raise(missing="ignore"),
            stop=40,
            run=tmp_path / directory,
        )

    first = go("a")
    again = go("b", bridge.Kriging(reuse=tmp_path / "a"))
    assert again.num_reused == first.num_evaluations
    assert again.loss <= 1.01 * first.loss
