"""What `digests.py` takes digests of: black boxes, and everything that can be asked of them. Not to be run by itself.

Only what `bridge` exports is used, and in the few functions under "the surface" alone. To add a case, add an entry to
the tables `SMOOTHING` or `FITS`, or a function with `@case`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

# --- the surface: what is said to bridge, and what is asked of it ---------------------------------------------------


@dataclass
class Place:
    """Where runs are carried out: by so many children (None: in this process), with files in this directory."""

    workers: int | None = None
    directory: Path | None = None
    kept: Path | None = None  # of a run that goes on


HERE = Place()


def simulator(function: Callable[..., Any], box: Box) -> Any:
    import bridge

    names = [f"p{i}" for i in range(box.d)]
    bounds = [(-1.0, 2.0 if i else 1.0) for i in range(box.d)]
    return bridge.as_simulator(
        function,
        **({"names": names, "units": ["nm"] * box.d, "bounds": bounds} if box.named else {}),
        vectorized=box.vectorized,
        seeded=box.seeded,
        structure=bridge.BlockStructure(np.arange(box.d) % 2, np.arange(box.m) * 2 // box.m) if box.blocks else None,
        identity=f"digests of {box}",
    )


def smoothed(box: Box, loss: Callable[[Any], Any] | None = None, **settings: Any) -> Any:
    """`bridge.smooth` of a black box, or `bridge.smooth_loss`."""
    import bridge

    settings = {"seed": 3, "num_samples": 16, "scale": 0.3, **settings}
    if "surrogate" in settings:
        settings["surrogate"] = settings["surrogate"].simulator()
    if HERE.workers is not None and "isolate" not in settings:
        settings["workers"] = HERE.workers
    if settings.pop("stored", False):
        settings["store"] = bridge.Store(HERE.directory / "store")
    sim = box.simulator()
    return bridge.smooth(sim, **settings) if loss is None else bridge.smooth_loss(sim, loss, **settings)


def fitted(box: Box, target: Any, start: Any, **settings: Any) -> Any:
    import bridge

    if "surrogate" in settings:
        settings["surrogate"] = settings["surrogate"].simulator()
    if HERE.workers is not None:
        settings["workers"] = HERE.workers
    if HERE.kept is not None:
        settings |= {"directory": HERE.kept, "every_s": 0.0}
    return bridge.fit(box.simulator(), target, start, seed=5, **settings)


def studied(box: Box, theta: Any, **settings: Any) -> Any:
    import bridge

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
    out.number("recommended", [dataclasses.astuple(result.recommended), dict(result.settings)])
    out.number("num_evaluations", result.num_evaluations)
    out.say("table", result.table())
    out.say("csv", result.csv())


# --- black boxes ------------------------------------------------------------------------------------------------------

# Runs until this process kills itself.
LIVES = {"left": math.inf}


@dataclass(frozen=True)
class Box:
    """d parameters -> m numbers (0: one number, without an axis): waves, and steps of height 0.2.

    Attributes:
        failing: "raise" or "nan": what a fifth of the runs do. lacking: whether a third lack some of their numbers.
        blocks: whether each half of the outputs depends on half of the parameters, and the simulator says so.
        named: whether parameters have names, units and bounds. rough: how much of the steps there is.
    """

    d: int = 3
    m: int = 12
    dtype: str = "float64"
    vectorized: bool = False
    seeded: bool = False
    failing: str = ""
    lacking: bool = False
    blocks: bool = False
    named: bool = False
    rough: float = 1.0

    def simulator(self) -> Any:
        box = self

        def seeded_waves(inputs: Any, seeds: Any) -> Any:
            return box.outputs(inputs, seeds)

        def waves(inputs: Any) -> Any:
            return box.outputs(inputs, None)

        return simulator(seeded_waves if self.seeded else waves, self)

    def outputs(self, inputs: Any, seeds: Any = None) -> Any:
        X, m = np.atleast_2d(inputs), max(1, self.m)
        LIVES["left"] -= len(X)
        if LIVES["left"] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        i, j = np.arange(self.d)[:, None], np.arange(m)
        touches = (i % 2 == j * 2 // m) if self.blocks else np.ones((self.d, m), dtype=bool)
        Y = np.sin(X @ (touches * np.cos(0.2 * (i + 1) * j + i))) + self.rough * 0.2 * np.floor(2 * X @ touches)
        if self.seeded:
            Y += [0.05 * np.random.default_rng(int(s)).normal(size=m) for s in np.atleast_1d(seeds)]
        odd = np.sin(1e3 * X[:, 0])
        if self.lacking:
            Y[np.ix_(odd > 0.5, j > 0.7 * m)] = np.nan
        if self.failing == "raise" and (odd > 0.8).any():
            raise ValueError("it does not converge")
        Y[odd > (0.8 if self.failing else 2.0)] = np.nan
        Y = (10 * Y).astype(self.dtype) if self.dtype.startswith("int") else Y.astype(self.dtype)
        Y = Y if self.m else Y[:, 0]
        return Y if self.vectorized else Y[0]


def wave(shape: Sequence[int], about: float = 0.0, size: float = 1.0) -> Any:
    """Numbers that are no two alike."""
    return about + size * np.cos(1.0 + 0.7 * np.arange(math.prod(shape))).reshape(tuple(shape))


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
        import bridge

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

    import bridge

    numbers = {"number": np.array(0.3), "diagonal": wave((d,), 0.4, 0.1)}
    L = numbers.get(kind.split()[-1], 0.4 * np.eye(d) + wave((d, d), 0.0, 0.05))
    tensor = torch.tensor(np.log(L) if kind in ("log number", "log diagonal") else L, requires_grad=True)
    if kind.startswith("log"):
        return bridge.LogScale(tensor), tensor
    return (bridge.LowerTriangular(tensor) if kind == "lower" else tensor), tensor


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
    "kept on disk": (Box(m=500), {"memory_megabytes": 0.001}),
    "streamed": (Box(m=60), {"num_samples": 32, "keep_megabytes": 0}),
    "streamed float32": (Box(m=60, dtype="float32"), {"num_samples": 32, "keep_megabytes": 0}),
    "streamed vectorised": (Box(m=60, vectorized=True), {"num_samples": 200, "keep_megabytes": 0, "batch": (2,)}),
    "streamed vectorised float32": (
        Box(m=60, vectorized=True, dtype="float32"),
        {"num_samples": 200, "keep_megabytes": 0},
    ),
    "streamed batch, full scale": (
        Box(m=40),
        {"num_samples": 64, "keep_megabytes": 0, "batch": (2,), "learned": "full"},
    ),
    "streamed replicates": (Box(m=40), {"num_samples": 64, "keep_megabytes": 0, "replicates": 4, "points": "sobol"}),
    "streamed f(x)": (Box(m=40), {"num_samples": 32, "keep_megabytes": 0, "covariate": "f(x)"}),
    "streamed blocks": (Box(d=4, m=40, blocks=True), {"num_samples": 64, "keep_megabytes": 0}),
    "leaf size": (Box(vectorized=True), {"num_samples": 48, "leaf_size": 8}),
    "schedule static": (Box(), {"schedule": "static"}),
    "schedule dynamic": (Box(), {"schedule": "dynamic"}),
    "parameters float32": (Box(), {"theta": "float32"}),
    "bounds": (Box(named=True), {"scale": 1.0}),
    "seeds common": (Box(seeded=True), {}),
    "seeds independent": (Box(seeded=True), {"simulator_seeds": "independent", "batch": (2,)}),
    "seeds vectorised": (Box(seeded=True, vectorized=True), {"num_samples": 80, "replicates": 4}),
    "unsmoothed": (Box(), {"forward": "unsmoothed"}),
    "replicates": (Box(), {"replicates": 4, "points": "mc", "num_samples": 32}),
    "replicates sobol": (Box(), {"replicates": 4, "points": "sobol", "num_samples": 32, "batch": (2,)}),
    "antithetic": (Box(), {"antithetic": True, "points": "mc"}),
    "antithetic sobol": (Box(), {"antithetic": True}),
    "blocks": (Box(d=4, blocks=True), {"points": "mc", "covariate": "loo"}),
    "drop": (Box(failing="raise"), {"failures": "drop", "points": "mc", "num_samples": 32, "min_ok": 0.3}),
    "drop pairs": (Box(failing="nan"), {"failures": "drop", "points": "mc", "num_samples": 40, "antithetic": True}),
    "drop vectorised": (
        Box(failing="nan", vectorized=True, dtype="float32"),
        {"failures": "drop", "num_samples": 96, "batch": (2,)},
    ),
    "penalty": (Box(failing="raise"), {"failures": "penalty", "penalty": 3.0, "num_samples": 32, "retries": 1}),
    "missing": (Box(lacking=True), {"missing": "ignore", "points": "mc", "num_samples": 32, "min_ok": 0.2}),
    "missing and drop": (
        Box(lacking=True, failing="nan"),
        {"missing": "ignore", "failures": "drop", "num_samples": 32, "min_ok": 0.2},
    ),
    "surrogate": (Box(), {"surrogate": Box(rough=0.0), "surrogate_samples": 64}),
    "surrogate auto": (
        Box(m=30),
        {
            "surrogate": Box(rough=0.5, m=30),
            "surrogate_samples": 128,
            "surrogate_weight": "auto",
            "replicates": 8,
            "num_samples": 32,
            "points": "sobol",
        },
    ),
    "surrogate streamed": (
        Box(m=40),
        {"surrogate": Box(rough=0.0, m=40), "surrogate_samples": 64, "num_samples": 32, "keep_megabytes": 0},
    ),
    "store": (Box(), {"stored": True}),
    "isolated": (Box(), {"isolate": "process"}),
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
    function = smoothed(box, **settings)
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
        ("streamed", smoothed(Box(m=40), num_samples=32, keep_megabytes=0)),
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
    "gauss-newton": {"method": "gauss-newton", "steps": 5, "num_samples": 16},
    "adam": {"method": "adam", "steps": 10, "num_samples": 8},
    "torch": {"method": "torch", "optimiser": momentum, "steps": 9, "num_samples": 8},
    "natural": {"method": "natural", "steps": 8, "num_samples": 12},
    "kriging": {"method": "kriging", "max_runs": 28, "restarts": 1},
    "trust-region": {"method": "trust-region", "max_runs": 50, "loss": absolute},
}
LEAST_SQUARES = ("kriging", "gauss-newton")
ROBUST = {"kriging": "huber", "gauss-newton": "cauchy", "adam": ("soft-l1", 2.0), "natural": "huber"}
NEWTON, ADAM, KRIGING = SHORT["gauss-newton"], SHORT["adam"], SHORT["kriging"]
# name: (black box, settings); "start" and "target" (added to the true one) besides.
FITS: dict[str, tuple[Box, dict[str, Any]]] = {
    **{name: (FITTING, settings) for name, settings in SHORT.items()},
    **{f"{n} variance": (NOISY, {**s, "variance": V}) for n, s in SHORT.items() if n != "trust-region"},
    **{f"{n} starts": (FITTING, {**s, "start": STARTS}) for n, s in SHORT.items()},
    **{f"{n} prior": (FITTING, {**s, "prior": {"p0": (0.2, 0.1)}}) for n, s in SHORT.items()},
    **{f"{n} fixed, tied": (FITTING, {**s, "fixed": ["p0"], "tied": {"p2": "p1"}}) for n, s in SHORT.items()},
    **{
        f"{n} robust": (FITTING, {**SHORT[n], "robust": loss, "variance": V, "target": OUTLIER})
        for n, loss in ROBUST.items()
    },
    **{f"{n} own loss": (FITTING, {**SHORT[n], "loss": absolute}) for n in ("adam", "torch", "natural")},
    **{f"{n} coarse": (FITTING, {**SHORT[n], "coarse": [2.0, 1.0]}) for n in ("gauss-newton", "adam")},
    **{
        f"{n} drop": (replace(FITTING, failing="nan"), {**s, "failures": "drop", "min_ok": 0.1})
        for n, s in SHORT.items()
        if n != "torch"
    },  # whose end is a run that fails
    **{
        f"{n} missing": (
            replace(FITTING, lacking=True),
            {**SHORT[n], "missing": "ignore", "variance": V, "min_ok": 0.1},
        )
        for n in ("kriging", "gauss-newton", "adam")
    },
    **{f"{n} mask": (FITTING, {**SHORT[n], "mask": OUTLIER > 0, "target": OUTLIER}) for n in LEAST_SQUARES},
    **{f"{n} covariance": (FITTING, {**SHORT[n], "variance": V * (np.eye(12) + 0.3)}) for n in LEAST_SQUARES},
    **{f"{n} stop at error": (NOISY, {**SHORT[n], "variance": V, "stop_at_error": 0.05}) for n in LEAST_SQUARES},
    "kriging noise": (NOISY, KRIGING),
    "kriging float32 vectorised": (replace(FITTING, vectorized=True, dtype="float32"), KRIGING),
    "kriging steps": (replace(FITTING, rough=1.0), KRIGING),
    "kriging rounds of five": (FITTING, {**KRIGING, "num_samples": 5, "num_starts": 4, "tolerance": 0.01}),
    "gauss-newton replicates": (FITTING, {**NEWTON, "replicates": 4, "num_samples": 32, "points": "sobol"}),
    "gauss-newton streamed": (replace(FITTING, m=60), {**NEWTON, "keep_megabytes": 0, "num_samples": 32}),
    "gauss-newton one scale": (FITTING, {**NEWTON, "scale": 0.3}),
    "gauss-newton surrogate": (
        replace(FITTING, rough=1.0),
        {**NEWTON, "surrogate": FITTING, "surrogate_samples": 32},
    ),
    "adam without halving": (FITTING, {**ADAM, "start": STARTS, "halving": False, "learning_rate": 0.5}),
    "torch by name": (FITTING, {**SHORT["torch"], "optimiser": "SGD", "learning_rate": 0.01}),
    "natural diagonal": (FITTING, {**SHORT["natural"], "full_scale": False}),
    "auto": (FITTING, {"max_runs": 40}),
    "auto blocks": (replace(FITTING, d=4, blocks=True), {"steps": 4, "num_samples": 16}),
    "auto coarse": (FITTING, {"coarse": [1.0], "steps": 4, "num_samples": 16}),
    "auto own loss": (FITTING, {"loss": absolute, "max_runs": 40}),
    "auto own loss, smoothed": (FITTING, {"loss": absolute, "steps": 4, "num_samples": 8, "points": "mc"}),
    "auto optimiser": (FITTING, {"optimiser": "SGD", "steps": 4, "num_samples": 8}),
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
    fitted(FITTING, target, [0.0, 0.0, 0.0], max_runs=20, directory=HERE.directory / "earlier")
    read_fit(out, fitted(FITTING, target, [0.1, 0.1, 0.0], max_runs=30, reuse=HERE.directory / "earlier"))


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
