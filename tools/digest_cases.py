"""What `digests.py` takes digests of: black boxes, and everything that can be asked of them. Not to be run by itself.

Only what `bridge` exports is used. To add a case, add an entry to the tables `SMOOTHING` or `FITS`, or a function with
`@case`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from digest_boxes import Box, wave

import bridge

# --- the surface: what is said to bridge, and what is asked of it ---------------------------------------------------


@dataclass
class Place:
    """Where runs are carried out: by so many children (None: in this process), with files in this directory."""

    workers: int | None = None
    directory: Path | None = None
    kept: Path | None = None  # of a run that goes on


HERE = Place()


def place(given: Any = None) -> Any:
    """Where a case is evaluated: where it says, or by the children that it is to have."""
    if HERE.workers is None or given == "process":
        return given
    return bridge.Workers(HERE.workers, ranks=given or bridge.Ranks())


def smoothed(
    box: Box, loss: Callable[[Any], Any] | None = None, *, on: Any = None, stored: bool = False, **settings: Any
) -> Any:
    """`bridge.smooth` of a black box, or `bridge.smooth_loss`."""
    settings = {"seed": 3, "num_samples": 16, "scale": 0.3, "on": place(on), **settings}
    if stored:
        settings["memory"] = bridge.Store(HERE.directory / "store")
    sim = box.simulator()
    return bridge.smooth(sim, **settings) if loss is None else bridge.smooth_loss(sim, loss, **settings)


def fitted(box: Box, target: Any, start: Any, **settings: Any) -> Any:
    if HERE.kept is not None:
        settings["run"] = bridge.Run(HERE.kept, every_s=0.0)
    return bridge.fit(box.simulator(), target, start, seed=5, on=place(), **settings)


def studied(box: Box, theta: Any, **settings: Any) -> Any:
    return bridge.study(box.simulator(), theta, seed=2, **settings)


def ask_estimate(out: Parts, e: Any, weight: Callable[[tuple[int, ...]], Any], d: int, batch: tuple[int, ...]) -> None:
    """All that an estimate can be asked for; what it refuses counts by the words of the refusal."""
    v, m = weight(tuple(e.value.shape)), math.prod(e.value.shape[len(batch) :])
    t, V = weight((*batch, d)), weight((*batch, m, m))
    counts = ("num_evaluations", "num_failed", "num_surrogate_evaluations", "clipped_fraction", "surrogate_weight")
    out.number("value", e.value)
    out.number("counts", [getattr(e, name) for name in (*counts, "streamed", "failures")])
    out.say("choices", [e.points, e.points_reason, e.covariate, e.covariate_reason])
    out.ask("jacobian", lambda: e.jacobian())
    out.ask("vjp", lambda: e.vjp(v))
    out.ask("jvp", lambda: e.jvp(t))
    out.ask("vjp_scale", lambda: e.vjp_scale(v))
    out.ask("of_replicates", lambda: e.of_replicates())
    out.ask("standard_error", lambda: e.standard_error)
    out.ask("jacobian_standard_error", lambda: e.jacobian_standard_error())
    out.ask("vjp_standard_error", lambda: e.vjp_standard_error(v))
    if m > 12:
        return
    out.ask("covariance", lambda: e.covariance())
    out.ask("covariance_vjp", lambda: e.covariance_vjp(V))
    out.ask("covariance_vjp_scale", lambda: e.covariance_vjp_scale(V))
    out.ask("variance_vjp", lambda: e.variance_vjp(v))
    out.ask("squared_error", lambda: tuple(e.squared_error(v)))
    out.ask("median", lambda: e.median(3))
    out.ask("median_jacobian", lambda: e.median_jacobian(3))
    out.ask("median_vjp", lambda: e.median_vjp(v, 5))


def read_fit(out: Parts, result: Any) -> None:
    """All that a fit says, but for durations and for what was found in a store."""
    for name in (
        *("parameters", "start", "standard_error", "loss", "stop_reason", "num_evaluations", "num_failed"),
        *("num_reused", "num_surrogate", "output", "start_output", "covariance", "method", "chi_square", "dof"),
        *("p_value", "loss_share", "interval_dof"),
    ):
        out.number(name, getattr(result, name))
    numbers = ("step", "loss", "scale", "parameters", "num_evaluations", "standard_error", "gradient_error")
    out.number("history", [[getattr(s, n) for n in (*numbers, "num_failed", "num_surrogate")] for s in result.history])
    out.number("ends", [[end.start, end.parameters, end.loss, end.steps] for end in result.ends])
    out.number("interval", result.interval(0.9))
    out.say("warnings", list(result.warnings))
    out.say("notes", [result.method_reason, *(s.note for s in result.history)])
    out.say("printed", str(replace(result, wall_s=0.0, num_cached=0)))


def read_study(out: Parts, result: Any) -> None:
    out.number("rows", [dataclasses.astuple(row) for row in result.rows])
    recommended, said = result.recommended, ("points", "covariate", "distribution", "scale", "num_samples")
    out.number("recommended", [dataclasses.astuple(result.best), {name: getattr(recommended, name) for name in said}])
    out.number("num_evaluations", result.num_evaluations)
    out.say("table", result.table())
    out.say("csv", result.csv())


# --- digests ----------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """What came out of a case: digest and size of each of its numbers, and digests of its words."""

    numbers: dict[str, list[Any]] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    def number(self, name: str, value: Any) -> None:
        arrays, sha = [], hashlib.sha256()
        for leaf in _leaves(value):
            array = np.asarray(leaf)
            if array.dtype.kind == "f":
                array = np.where(np.isnan(array), np.nan, array).astype(array.dtype)
            if array.dtype.kind in "iuf":
                arrays.append(array.astype(np.float64))
            sha.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        # The sum of sizes says, where digests differ, how much.
        size = math.fsum(float(np.abs(a[np.isfinite(a)]).sum()) for a in arrays)
        self.numbers[name] = [sha.hexdigest()[:12], size]

    def say(self, name: str, value: Any) -> None:
        text = json.dumps(value)
        if HERE.directory is not None:
            text = text.replace(str(HERE.directory), "DIRECTORY")
        self.words[name] = hashlib.sha256(text.encode()).hexdigest()[:12]

    def ask(self, name: str, question: Callable[[], Any]) -> None:
        try:
            self.number(name, question())
        except bridge.InputError as refusal:
            self.say(name, str(refusal))


def _leaves(value: Any) -> Iterable[Any]:
    if hasattr(value, "detach"):
        yield value.detach().cpu().numpy()
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield key
            yield from _leaves(value[key])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} of them"
        for item in value:
            yield from _leaves(item)
    else:
        yield "none" if value is None else value


# --- cases ------------------------------------------------------------------------------------------------------------

CASES: dict[str, Callable[[Parts], None]] = {}
FITTING = Box(named=True, rough=0.0)
NOISY = replace(FITTING, seeded=True)


def case(name: str) -> Callable[[Callable[[Parts], None]], Callable[[Parts], None]]:
    def enter(function: Callable[[Parts], None]) -> Callable[[Parts], None]:
        CASES[name] = function
        return function

    return enter


def square(y: Any) -> Any:
    return (y * y).sum()


def made_scale(kind: str, d: int) -> tuple[Any, Any]:
    """A scale, and the tensor in it that is learned."""
    import torch

    numbers = {"number": np.array(0.3), "diagonal": wave((d,), 0.4, 0.1)}
    L = numbers.get(kind.split()[-1], 0.4 * np.eye(d) + wave((d, d), 0.0, 0.05))
    tensor = torch.tensor(np.log(L) if kind in ("log number", "log diagonal") else L, requires_grad=True)
    if kind.startswith("log"):
        return bridge.LogScale(tensor), tensor
    return (bridge.LowerTriangular(tensor) if kind == "lower" else tensor), tensor


STREAMED = bridge.Memory(keep_mb=0)
IGNORED = bridge.Drop(missing="ignore", at_least=0.2)
PAIRS = bridge.Antithetic(bridge.MonteCarlo())
# name: (black box, settings); "batch" is a shape of parameter vectors, "learned" a kind of scale.
SMOOTHING: dict[str, tuple[Box, dict[str, Any]]] = {
    "kept": (Box(), {}),
    "kept float32": (Box(dtype="float32"), {}),
    "kept integers": (Box(dtype="int32"), {}),
    "kept vectorised": (Box(vectorized=True, m=300), {"num_samples": 100, "batch": (2,)}),
    "kept vectorised float32": (Box(vectorized=True, dtype="float32", m=300), {"num_samples": 100}),
    "kept batch": (Box(), {"batch": (2, 2)}),
    "kept one number": (Box(m=0), {"batch": (3,)}),
    "kept one parameter": (Box(d=1, m=1), {}),
    "kept many parameters": (Box(d=9, m=40), {"num_samples": 24}),
    "kept on disk": (Box(m=500), {"memory": bridge.Memory(rank_mb=0.001)}),
    "streamed": (Box(m=60), {"num_samples": 32, "memory": STREAMED}),
    "streamed float32": (Box(m=60, dtype="float32"), {"num_samples": 32, "memory": STREAMED}),
    "streamed vectorised": (Box(m=60, vectorized=True), {"num_samples": 200, "memory": STREAMED, "batch": (2,)}),
    "streamed vectorised float32": (
        Box(m=60, vectorized=True, dtype="float32"),
        {"num_samples": 200, "memory": STREAMED},
    ),
    "streamed batch, full scale": (
        Box(m=40),
        {"num_samples": 64, "memory": STREAMED, "batch": (2,), "learned": "full"},
    ),
    "streamed replicates": (Box(m=40), {"num_samples": 64, "memory": STREAMED, "replicates": 4, "points": "sobol"}),
    "streamed f(x)": (Box(m=40), {"num_samples": 32, "memory": STREAMED, "covariate": "f(x)"}),
    "streamed blocks": (Box(d=4, m=40, blocks=True), {"num_samples": 64, "memory": STREAMED}),
    "leaf size": (Box(vectorized=True), {"num_samples": 48, "on": bridge.Ranks(leaf_size=8)}),
    "schedule static": (Box(), {"on": bridge.Ranks(schedule="static")}),
    "schedule dynamic": (Box(), {"on": bridge.Ranks(schedule="dynamic")}),
    "parameters float32": (Box(), {"theta": "float32"}),
    "bounds": (Box(named=True), {"scale": 1.0}),
    "seeds common": (Box(seeded=True), {}),
    "seeds independent": (Box(seeded=True), {"simulator_seeds": "independent", "batch": (2,)}),
    "seeds vectorised": (Box(seeded=True, vectorized=True), {"num_samples": 80, "replicates": 4}),
    "unsmoothed": (Box(), {"straight_through": True}),
    "replicates": (Box(), {"replicates": 4, "points": "mc", "num_samples": 32}),
    "replicates sobol": (Box(), {"replicates": 4, "points": "sobol", "num_samples": 32, "batch": (2,)}),
    "antithetic": (Box(), {"points": PAIRS}),
    "antithetic sobol": (Box(), {"points": bridge.Antithetic(bridge.Sobol())}),
    "blocks": (Box(d=4, blocks=True), {"points": "mc", "covariate": "loo"}),
    "drop": (Box(failing="raise"), {"failures": bridge.Drop(at_least=0.3), "points": "mc", "num_samples": 32}),
    "drop pairs": (Box(failing="nan"), {"failures": "drop", "points": PAIRS, "num_samples": 40}),
    "drop vectorised": (
        Box(failing="nan", vectorized=True, dtype="float32"),
        {"failures": "drop", "num_samples": 96, "batch": (2,)},
    ),
    "penalty": (Box(failing="raise"), {"failures": bridge.Penalty(3.0, retries=1), "num_samples": 32}),
    "missing": (Box(lacking=True), {"failures": IGNORED, "points": "mc", "num_samples": 32}),
    "missing and drop": (
        Box(lacking=True, failing="nan"),
        {"failures": IGNORED, "num_samples": 32},
    ),
    "surrogate": (Box(), {"surrogate": bridge.Surrogate(Box(rough=0.0).simulator(), samples=64)}),
    "surrogate auto": (
        Box(m=30),
        {
            "surrogate": bridge.Surrogate(Box(rough=0.5, m=30).simulator(), samples=128, weight="auto"),
            "replicates": 8,
            "num_samples": 32,
            "points": "sobol",
        },
    ),
    "surrogate streamed": (
        Box(m=40),
        {
            "surrogate": bridge.Surrogate(Box(rough=0.0, m=40).simulator(), samples=64),
            "num_samples": 32,
            "memory": STREAMED,
        },
    ),
    "store": (Box(), {"stored": True}),
    "isolated": (Box(), {"on": "process"}),
    "loss": (Box(), {"loss": square, "points": "mc"}),
    "loss float32 batch": (Box(dtype="float32"), {"loss": square, "batch": (2,), "learned": "diagonal"}),
    "loss drop": (Box(failing="nan"), {"loss": square, "failures": "drop", "num_samples": 32}),
    **{
        f"distribution {name}": (Box(d=2), {"distribution": name, "num_samples": 32, "learned": "diagonal"})
        for name in ("gaussian", "logistic", "gumbel", "cauchy", "laplace", "triangular")
    },
    **{
        f"points {name}": (Box(d=2, m=5), {"points": name})
        for name in (
            "auto",
            "mc",
            "qmc-latin",
            "rqmc-latin",
            "qmc-cartesian",
            "rqmc-cartesian",
            "sobol",
            "qmc-net",
            "rqmc-net",
            "halton",
            "orthogonal",
        )
    },
    **{
        f"covariate {name} {points}": (Box(d=2, m=5), {"covariate": name, "points": points, "learned": "full"})
        for name in ("auto", "none", "f(x)", "loo", "mean", "block", "regression", "bq")
        for points in ("mc", "sobol")
    },
    **{
        f"scale {kind}": (Box(named=True), {"learned": kind, "points": "mc"})
        for kind in ("number", "diagonal", "full", "lower", "log number", "log diagonal", "log full")
    },
}


def run_smoothing(out: Parts, box: Box, given: Mapping[str, Any]) -> None:
    import torch

    settings = dict(given)
    batch, kind = settings.pop("batch", ()), settings.pop("learned", "")
    dtype = getattr(torch, settings.pop("theta", "float64"))
    learned = None
    if kind:
        settings["scale"], learned = made_scale(kind, box.d)
    straight_through = settings.pop("straight_through", False)
    function = smoothed(box, **settings)
    if straight_through:
        function = function.straight_through()
    theta = torch.tensor(wave((*batch, box.d), 0.1, 0.3), dtype=dtype)

    def weight(shape: tuple[int, ...]) -> Any:
        return torch.as_tensor(wave(shape)).to(dtype)

    estimate = function.estimate(theta, step=1, scale_gradient=True)
    ask_estimate(out, estimate, weight, box.d, batch)
    with torch.no_grad():
        out.number("value alone", function(theta, step=1))
    theta.requires_grad_()
    y = function(theta, step=2)
    (y * weight(tuple(y.shape))).sum().backward()
    out.number("backward", [y, theta.grad, None if learned is None else learned.grad])


@case("smooth/vmap")
def vmap(out: Parts) -> None:
    import torch

    X = torch.tensor(wave((3, 3), 0.1, 0.3))
    for label, f in both():
        out.number(f"vmap {label}", torch.func.vmap(f)(X))
        out.number(f"vmap of grad {label}", torch.func.vmap(torch.func.grad(lambda x, f=f: square(f(x))))(X))


@case("smooth/transforms")
def transforms(out: Parts) -> None:
    import torch

    X = torch.tensor(wave((3, 3), 0.1, 0.3))
    for label, f in both():
        out.number(f"jacrev {label}", torch.func.jacrev(f)(X[0]))
        out.number(f"forward mode {label}", torch.func.jvp(f, (X[0],), (X[1],)))


def both() -> Iterable[tuple[str, Callable[[Any], Any]]]:
    """Functions that keep and that stream their outputs."""
    for label, function in (
        ("kept", smoothed(Box())),
        ("streamed", smoothed(Box(m=40), num_samples=32, memory=STREAMED)),
    ):
        yield label, lambda x, function=function: function(x, step=1)


@case("smooth/keys and scales of each problem")
def keys(out: Parts) -> None:
    import torch

    function = smoothed(Box())
    X, numbers = torch.tensor(wave((3, 3), 0.1, 0.3)), torch.tensor([4, 0, 7])
    with torch.no_grad():
        out.number("keys", function(X, step=numbers, problem=numbers + 1))
        out.number("scale of a call", function(X, step=5, scale=0.7))
    e = function.estimate(X, replicate=2, scales=torch.tensor(wave((3, 3), 0.5, 0.2)))
    out.number("scales", [e.value, e.jacobian()])


@case("smooth/squared error")
def squared_error(out: Parts) -> None:
    import torch

    scale, learned = made_scale("full", 3)
    function = smoothed(Box(), points="mc", scale=scale)
    theta = torch.tensor(wave((2, 3), 0.1, 0.3), requires_grad=True)
    value = function.squared_error(theta, torch.tensor(wave((12,))), step=3, weight=2.0)
    value.sum().backward()
    out.number("squared error", [value, theta.grad, learned.grad])


@case("smooth/adaptive")
def adaptive(out: Parts) -> None:
    import torch

    theta = torch.tensor(wave((2, 3), 0.1, 0.3))
    for of in ("value", "jacobian"):
        e = smoothed(Box(), points="sobol").estimate_to(theta, relative_error=0.05, budget=1000, of=of)
        for name in ("value", "jacobian", "standard_error", "jacobian_standard_error"):
            out.number(f"{name} for {of}", getattr(e, name))
        out.number(f"costs for {of}", [e.relative_error, e.reached, e.replicates, e.num_evaluations])


def absolute(output: Any, target: Any) -> Any:
    return (output - target).abs().sum()


def momentum(parameters: Any) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=0.05, momentum=0.5)


STARTS = np.array([[0.0, 0.1, -0.1], [0.6, 0.9, 1.2], [-0.3, 0.4, 0.2]])
OUTLIER = np.where(np.arange(12) == 5, 1.0, 0.0)
V = 1e-4
SHORT: dict[str, dict[str, Any]] = {
    "gauss-newton": {"method": bridge.GaussNewton(steps=5, num_samples=16)},
    "adam": {"method": bridge.Adam(steps=10, num_samples=8)},
    "torch": {"method": bridge.Torch(optimiser=momentum, steps=9, num_samples=8)},
    "natural": {"method": bridge.Natural(steps=8, num_samples=12)},
    "kriging": {"method": bridge.Kriging(restarts=1), "stop": bridge.Stop(runs=28)},
    "trust-region": {"method": "trust-region", "stop": bridge.Stop(runs=50), "misfit": absolute},
}
LEAST_SQUARES = ("kriging", "gauss-newton")
ROBUST = {"kriging": "huber", "gauss-newton": "cauchy", "adam": ("soft-l1", 2.0), "natural": "huber"}


def with_method(name: str, **settings: Any) -> dict[str, Any]:
    """A short fit with other settings of its method."""
    return {**SHORT[name], "method": replace(SHORT[name]["method"], **settings)}


# name: (black box, settings); "target" is added to the true one.
FITS: dict[str, tuple[Box, dict[str, Any]]] = {
    **{name: (FITTING, settings) for name, settings in SHORT.items()},
    **{f"{n} variance": (NOISY, {**s, "variance": V}) for n, s in SHORT.items() if n != "trust-region"},
    **{f"{n} starts": (FITTING, {**s, "start": STARTS}) for n, s in SHORT.items()},
    **{f"{n} prior": (FITTING, {**s, "prior": {"p0": (0.2, 0.1)}}) for n, s in SHORT.items()},
    **{f"{n} fixed, tied": (FITTING, {**s, "fixed": ["p0"], "tied": {"p2": "p1"}}) for n, s in SHORT.items()},
    **{
        f"{n} robust": (
            FITTING,
            {**SHORT[n], "misfit": bridge.LeastSquares(robust=loss), "variance": V, "target": OUTLIER},
        )
        for n, loss in ROBUST.items()
    },
    **{f"{n} own loss": (FITTING, {**SHORT[n], "misfit": absolute}) for n in ("adam", "torch", "natural")},
    **{f"{n} coarse": (FITTING, with_method(n, blur=[2.0, 1.0])) for n in ("gauss-newton", "adam")},
    **{
        f"{n} drop": (replace(FITTING, failing="nan"), {**s, "failures": bridge.Drop(at_least=0.1)})
        for n, s in SHORT.items()
        if n != "torch"
    },  # whose end is a run that fails
    **{
        f"{n} missing": (
            replace(FITTING, lacking=True),
            {**SHORT[n], "failures": bridge.Drop(missing="ignore", at_least=0.1), "variance": V},
        )
        for n in ("kriging", "gauss-newton", "adam")
    },
    **{
        f"{n} mask": (FITTING, {**SHORT[n], "misfit": bridge.LeastSquares(mask=OUTLIER > 0), "target": OUTLIER})
        for n in LEAST_SQUARES
    },
    **{f"{n} covariance": (FITTING, {**SHORT[n], "variance": V * (np.eye(12) + 0.3)}) for n in LEAST_SQUARES},
    "kriging stop at error": (NOISY, {**SHORT["kriging"], "variance": V, "stop": bridge.Stop(runs=28, error=0.05)}),
    "gauss-newton stop at error": (
        NOISY,
        {**SHORT["gauss-newton"], "variance": V, "stop": bridge.Stop(error=0.05)},
    ),
    "kriging noise": (NOISY, SHORT["kriging"]),
    "kriging float32 vectorised": (replace(FITTING, vectorized=True, dtype="float32"), SHORT["kriging"]),
    "kriging steps": (replace(FITTING, rough=1.0), SHORT["kriging"]),
    "kriging rounds of five": (
        FITTING,
        {**with_method("kriging", round_size=5, tolerance=0.01), "start": bridge.Starts(4, wave((3,), 0.0, 0.1))},
    ),
    "gauss-newton replicates": (FITTING, with_method("gauss-newton", replicates=4, num_samples=32, points="sobol")),
    "gauss-newton streamed": (
        replace(FITTING, m=60),
        {**with_method("gauss-newton", num_samples=32), "memory": STREAMED},
    ),
    "gauss-newton one scale": (FITTING, with_method("gauss-newton", scale=0.3)),
    "gauss-newton surrogate": (
        replace(FITTING, rough=1.0),
        with_method("gauss-newton", surrogate=bridge.Surrogate(FITTING.simulator(), samples=32)),
    ),
    "adam without halving": (
        FITTING,
        {**with_method("adam", halving=False, learning_rate=0.5), "start": STARTS},
    ),
    "torch by name": (FITTING, with_method("torch", optimiser="SGD", learning_rate=0.01)),
    "natural diagonal": (FITTING, with_method("natural", full_scale=False)),
    # "auto" with a budget; then what suits it, asked for by name.
    "auto": (FITTING, {"stop": 40}),
    "auto own loss": (FITTING, {"misfit": absolute, "stop": 40}),
    "auto blocks": (
        replace(FITTING, d=4, blocks=True),
        {"method": bridge.GaussNewton(steps=4, num_samples=16)},
    ),
    "auto coarse": (FITTING, {"method": bridge.GaussNewton(blur=[1.0], steps=4, num_samples=16)}),
    "auto own loss, smoothed": (
        FITTING,
        {"misfit": absolute, "method": bridge.Adam(steps=4, num_samples=8, points="mc")},
    ),
    "auto optimiser": (FITTING, {"method": bridge.Torch(optimiser="SGD", steps=4, num_samples=8)}),
}
# Cases for a pool, whose children take a while to start where they need torch; for a driver; and what one number of
# ranks is enough for, as torch imports much for it.
_PLAIN = "|".join(SHORT)
POOLED = re.compile(
    "smooth/(?!loss [fd]|distr|points|covar|scale|kept b|stre.* f|transf)"
    f"|fit/({_PLAIN}|auto blocks|(kriging|gauss-newton) drop)$"
)
DRIVEN = re.compile(f"smooth/(kept|streamed|drop|loss|surrogate|vmap|adaptive)|fit/({_PLAIN})$|study/some")
ON_TWO_RANKS = re.compile("smooth/transforms")
# Fits that are killed, and the runs after which a process kills itself: in the middle of a step.
KILLED = {"fit/" + name: runs for name, runs in zip(SHORT, (50, 45, 45, 50, 15, 15), strict=True)}


def run_fit(out: Parts, box: Box, given: Mapping[str, Any]) -> None:
    settings = dict(given)
    start = settings.pop("start", wave((box.d,), 0.0, 0.1))
    target = replace(box, seeded=False, lacking=False, failing="", vectorized=False).outputs(wave((box.d,), 0.3, 0.2))
    target = target + 0.01 * wave(target.shape) + settings.pop("target", 0.0)
    read_fit(out, fitted(box, target, start, **settings))


@case("fit/kriging reuse")
def reuse(out: Parts) -> None:
    target = FITTING.outputs(wave((3,), 0.3, 0.2))
    assert HERE.directory is not None
    fitted(FITTING, target, [0.0, 0.0, 0.0], stop=20, run=HERE.directory / "earlier")
    method = bridge.Kriging(reuse=HERE.directory / "earlier")
    read_fit(out, fitted(FITTING, target, [0.1, 0.1, 0.0], method=method, stop=30))


@case("study/all")
def study_all(out: Parts) -> None:
    read_study(out, studied(Box(d=2), wave((2,), 0.1, 0.3), budget=1200, scale=0.3))


@case("study/some")
def study_some(out: Parts) -> None:
    of_these = {"strategies": ["mc + loo", "sobol + regression"], "distributions": ["gaussian"], "factors": [1.0, 2.0]}
    read_study(out, studied(Box(named=True, vectorized=True), wave((3,), 0.1, 0.3), budget=800, **of_these))


for _kind, _table, _run in (("smooth", SMOOTHING, run_smoothing), ("fit", FITS, run_fit)):
    for _name, (_box, _given) in _table.items():
        CASES[f"{_kind}/{_name}"] = lambda out, run=_run, box=_box, given=_given: run(out, box, given)


def run_case(name: str, place: Place) -> dict[str, Any]:
    global HERE
    HERE, out = place, Parts()
    if place.directory is not None:
        place.directory.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            CASES[name](out)
        except Exception as error:  # a finding, not the end: the other cases are still to come
            return {"error": f"{type(error).__name__}: {error}"}
    if texts := [str(w.message) for w in told if not issubclass(w.category, DeprecationWarning)]:
        out.say("told", texts)
    return {"numbers": out.numbers, "words": out.words}
