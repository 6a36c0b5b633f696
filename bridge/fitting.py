"""A fit: the parameters of a simulator from a target output.

The module is not called `fit`, because the function `bridge.fit` is: a package attribute cannot be both.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from bridge.descent import FAILED, Descent, Method, Searching, plain_outputs
from bridge.dispatch import SerialDispatcher
from bridge.errors import BridgeError, EvaluationError, InputError
from bridge.fit_result import FitResult, FitStep
from bridge.misfit import Loss, Misfit, checked_target, checked_variance
from bridge.progress import Observer, make_observers
from bridge.reduced import ReducedSimulator, reduced
from bridge.reuse import Earlier, Source, described, earlier_rows, sources
from bridge.runs import Run
from bridge.search import MOST_ROWS, Search
from bridge.simulator import ParameterSpace, Simulator, Structured, as_simulator, simulator_name
from bridge.smoothing import SmoothedSimulator, smooth

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

__all__ = ["FitResult", "FitStep", "fit"]

Array = NDArray[np.float64]
MethodName = Literal["auto", "kriging", "adam", "gauss-newton"]
_METHODS = ("auto", "kriging", "adam", "gauss-newton")
# More parameters than this, or a block structure, and a model of all runs has too little to go by.
_MOST_PARAMETERS = 40
_RUNS_A_PARAMETER = 60
_DESIGN = ("distribution", "points", "antithetic", "covariate", "replicates", "forward", "surrogate")


def fit(
    simulator: Callable[..., Any] | Simulator,
    target: ArrayLike | torch.Tensor,
    start: Mapping[str, float] | ArrayLike,
    *,
    seed: int | None = None,
    method: MethodName = "auto",
    steps: int | None = None,
    num_samples: int | None = None,
    scale: float | tuple[float, float] | None = None,
    learning_rate: float = 0.25,
    variance: float | ArrayLike | None = None,
    loss: Loss | None = None,
    prior: Mapping[str, tuple[float, float]] | None = None,
    fixed: Sequence[str] = (),
    tied: Mapping[str, str] | None = None,
    max_runs: int | None = None,
    max_seconds: float | None = None,
    restarts: int = 10,
    tolerance: float | None = None,
    reuse: Source | Sequence[Source] = (),
    on_step: Callable[[FitStep], None] | None = None,
    progress: str | Sequence[Observer] = "off",
    title: str = "",
    directory: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    every_s: float = 10.0,
    comm: Intracomm | None = None,
    **smoothing: Any,
) -> FitResult:
    """Fits a simulator's parameters to a target, in few runs of the simulator.

    Least squares: 1/2 sum((f(x) - target)^2 / variance), or a loss of one's own.

    Methods:
        "kriging" models all outputs by one Gaussian process through every run so far (`bridge.kriging`), and runs, a
            round at a time, where the loss is or may be least (`bridge.search`). Rounds of a few runs, least squares
            only, up to some forty parameters. It restarts where it ends in a minimum that does not explain the
            target: by chi-square where `variance` is given, else if more than a fiftieth of the first loss is left.
        "gauss-newton" solves with J^T V^-1 J of the smoothed Jacobian: many parameters, block structure, many runs at
            once.
        "adam" descends the smoothed gradient, of any loss, at `learning_rate` times the current scale.
        "auto" takes adam with a loss of one's own, gauss-newton with a block structure or more than forty
            parameters, and kriging otherwise; the result says which.

    Args:
        simulator: as in `bridge.smooth`; its parameter space gives bounds and natural units.
        target: of the simulator's output shape.
        start: name -> value, or (d,).
        seed: of all noise; required.
        steps: at most so many; default 150 for adam, 24 for gauss-newton, no limit for kriging.
        num_samples: runs a step. Descents: 32. Kriging: max(4, d / 2 + 1), and d + 1 in the first round; give what can
            run at the same time if that is more.
        scale: natural units. Descents: of the noise, from the first to the last step, default (2, 0.1); a number keeps
            it. Kriging: how far from the start the first round looks, default 1.
        learning_rate: of adam, in units of the scale; decays by a cosine to a fifth.
        variance: of the target's noise, a number or an array of its shape. Left out, 1 in the loss, and standard errors
            come from the mean squared residual.
        loss: l(output, target) -> number, in place of least squares (adam only).
        prior: name -> (mean, standard deviation), Gaussian (kriging only).
        fixed: names of parameters that keep their start. tied: name -> another that it is to equal.
        max_runs: the budget, with what is run at the end; kriging's default is 60 (d + 1).
        max_seconds: stops after the step in which so much time has passed since this call. The result then depends on
            the machine.
        restarts: at most so many (kriging).
        tolerance: descents: converged when, at the last scale, parameters move by less than this (natural units) over a
            tenth of the steps, default 0.01. Kriging: when two rounds in turn promise less than this many
            standard errors, default 0.1; without `variance` it goes on until steps are below 1e-4 natural scales.
        reuse: earlier evaluations of the same simulator to begin with (kriging): directories of earlier fits by
            kriging, or `bridge.Store`s (which earlier fits by any method were given as `store=`) or their directories.
            They become part of this run, which does not need them again.
        on_step: called with each `FitStep`, on every rank; when resumed with the earlier ones first.
        progress: what can be watched meanwhile, as in `bridge.progress.make_observers`: "auto", "lines", "off" or
            observers. title: for these.
        directory: where the run is kept, so that it can go on after any interruption, on any number of ranks, to
            bitwise the same result; see `bridge.Run`, also for `resume`, `overwrite` and `every_s`.
        comm, **smoothing: as in `bridge.smooth`. Kriging smooths nothing and takes those that say how runs are
            carried out; by default each of its runs has simulator seeds of its own, and failed ones
            (failures="drop") count as bad.

    Returns:
        a `FitResult`, the same on every rank. Collective under MPI. In one process an interrupt (Ctrl-C)
        ends the fit in good order.

    Raises:
        InputError: target of another shape or not finite, start outside the bounds, unknown method, or outputs that do
            not change with the parameters.
        EvaluationError: a simulation failed; with failures="drop", all did.
        SystemExit: with code 75, with a directory: stopped by a signal; start it again.
    """
    whole = as_simulator(simulator)
    begin = time.monotonic()
    if method not in _METHODS:
        raise InputError(f"Unknown method {method!r}. Known: {', '.join(_METHODS)}.")
    if whole.space is None and isinstance(start, Mapping):
        raise InputError("Expected start values as a vector: the simulator does not name its parameters.")
    space = whole.space or ParameterSpace.unnamed(len(np.atleast_1d(np.asarray(start))))
    theta = space.vector(start)
    if outside := space.describe_outside(theta):
        raise InputError(f"Expected a start inside the bounds, got {outside}. Move the start, or widen the bounds.")
    sim = reduced(whole, space, theta, fixed, tied or {}) if fixed or tied else whole
    free = sim.space if isinstance(sim, ReducedSimulator) else space
    if method == "auto":
        blocks = isinstance(sim, Structured) and sim.structure is not None
        large = blocks or free.dimension > _MOST_PARAMETERS
        method = "adam" if loss is not None else "gauss-newton" if large else "kriging"
    if loss is not None and method != "adam":
        raise InputError(f"Expected method='adam' with a loss of your own: {method} needs least squares.")
    if prior and method != "kriging":
        raise InputError(f"Expected method='kriging' with a prior, got {method!r}. Add it to a loss of your own.")
    known = sources(reuse)
    if known and method != "kriging":
        raise InputError(
            f"Expected method='kriging' with reuse, got {method!r}: a smoothed gradient takes rows drawn about where "
            "it is, and earlier ones count for next to nothing there. To find the very same runs again, pass store=."
        )
    _check_limits(steps, max_runs, max_seconds, restarts, tolerance)
    goal = checked_target(target, sim)
    misfit = Misfit(goal, checked_variance(variance, goal), loss)
    natural = free.natural_scale
    origin = theta[[space.index(name) for name in free.names]] / natural
    lower, upper = free.lower / natural, free.upper / natural
    widths = (1.0, 1.0) if scale is None and method == "kriging" else (2.0, 0.1) if scale is None else scale
    first, last = (widths, widths) if isinstance(widths, int | float) else widths
    if not (first > 0 and last > 0):
        raise InputError(f"Expected positive scales, got {scale!r}.")
    limit = steps
    way: Method
    # First, since it checks its settings: a fit that is refused leaves nothing behind.
    if method == "kriging":
        smoothed = _plain(sim, seed, comm, smoothing)
        budget = max_runs or _RUNS_A_PARAMETER * (free.dimension + 1)
        search = Search(
            *(origin, lower, upper),
            spread=first,
            seed=int(seed or 0),
            batch=num_samples or max(4, free.dimension // 2 + 1),
            prior=_prior(prior or {}, free),
            known_noise=variance is not None,
            tolerance=0.1 if tolerance is None else tolerance,
            restarts=restarts,
        )
        way = Searching(smoothed, misfit, search, natural, budget)
    else:
        samples = num_samples or 32
        smoothed = smooth(sim, seed=seed, num_samples=samples, scale=first, comm=comm, **smoothing)
        limit = steps or (150 if method == "adam" else 24)
        budget = max_runs or 10**15
        if budget < (least := 2 * smoothed.strategy.num_rows * smoothed.strategy.replicates + 2):
            raise InputError(
                f"Expected max_runs of at least {least}, for a step and what is run at the end, got {max_runs}."
            )
        way = Descent(
            *(smoothed, misfit, origin),
            natural=natural, lower=lower, upper=upper, scale=(first, last), steps=limit,
            learning_rate=learning_rate if method == "adam" else None,
            tolerance=0.01 if tolerance is None else tolerance,
        )  # fmt: skip

    # Under a driver the other ranks follow its evaluations, not what it thinks of them.
    dispatcher = smoothed.dispatcher if smoothed.dispatcher.driver is None else SerialDispatcher()

    def earlier() -> Earlier | None:
        if not isinstance(way, Searching):
            return None
        found, refused = None, None
        if dispatcher.rank == 0:
            try:
                shape = tuple(goal.shape)
                found = earlier_rows(known, sim, free, shape, way.loss_of_rows, MOST_ROWS, but=directory)
            except BridgeError as problem:
                refused = problem
        dispatcher.agree(refused)
        return dispatcher.broadcast_object(found)

    run: Run | None = None
    # Before there is a run: one that is refused leaves nothing behind.
    begun = directory is not None and resume and any(Path(directory).glob("checkpoint-*.npz"))
    already = None if not known or dispatcher.broadcast_object(begun) else earlier()
    if directory is not None:
        settings = {
            "simulator": simulator_name(sim), "seed": seed, "method": method, "steps": limit,
            "num_samples": num_samples, "scale": [first, last], "learning_rate": learning_rate,
            "tolerance": tolerance, "start": theta.tolist(), "target": _digest(goal), "max_runs": max_runs,
            "restarts": restarts, "prior": {k: list(v) for k, v in sorted((prior or {}).items())},
            "variance": _digest(misfit.variance), "smoothing": _described(smoothing),
            "reuse": list(map(described, known)),
        }  # fmt: skip
        # Few runs, each of use to other fits: not to be thrown away.
        keep = method == "kriging"
        run = Run(
            directory, settings=settings, every_s=every_s, resume=resume, overwrite=overwrite, comm=comm,
            keep_evaluations=keep, journal_above_s=0.0 if keep else 0.01,
        )  # fmt: skip
        if smoothed.execution.store is None:
            smoothed.execution = replace(smoothed.execution, store=run.store)
    history: list[FitStep] = []
    stop_reason: str | None = None

    def whole_vector(x: Array) -> Array:
        return sim.base + sim.lift @ (x * natural) if isinstance(sim, ReducedSimulator) else x * natural

    def spent() -> int:
        return history[-1].num_evaluations if history else 0

    observers = make_observers(progress, root=dispatcher.rank == 0)
    with nullcontext() if run is None else run, observers:
        problem: BridgeError | None = None
        try:
            observers.start(space, max_steps=limit, max_runs=budget if budget < 10**15 else None, title=title)
        except BridgeError as refused:  # on rank 0 alone
            problem = refused
        dispatcher.agree(problem)
        if run is not None and run.state is not None:
            history = [FitStep(**{**entry, "parameters": tuple(entry["parameters"])}) for entry in run.state["history"]]
            stop_reason = run.state["stop_reason"]
            way.restore(run.state["method"])
        elif isinstance(way, Searching) and already is not None:
            way.begin_with(*already)
            if run is not None:  # what it begins with is its own from here on, whatever becomes of those directories
                run.checkpoint(0, _state(history, None, way), at_once=True)
        before = history[-1] if history else None
        for record in history:
            observers.step(record)
            if on_step is not None:
                on_step(record)
        try:
            while stop_reason is None and (limit is None or len(history) < limit):
                record = way.advance(len(history), spent())
                if isinstance(sim, ReducedSimulator):
                    record = replace(record, parameters=tuple(whole_vector(np.array(record.parameters) / natural)))
                cost = smoothed.spent
                record = replace(
                    record,
                    num_cached=cost.cached + (before.num_cached if before else 0),
                    num_surrogate=cost.surrogate + (before.num_surrogate if before else 0),
                )
                history.append(record)
                observers.step(record)
                if on_step is not None:
                    on_step(record)
                last_cost = spent() - (history[-2].num_evaluations if len(history) > 1 else 0)
                if way.converged:
                    stop_reason = "converged"
                elif spent() + (2 if method == "kriging" else 2 * last_cost + 2) > budget:
                    stop_reason = "max_runs"
                elif max_seconds is not None and dispatcher.first(time.monotonic() - begin > max_seconds):
                    stop_reason = "max_time"
                if run is not None:
                    run.checkpoint(len(history), _state(history, stop_reason, way))
            stop_reason = stop_reason or "max_steps"
        except KeyboardInterrupt:
            if dispatcher.size > 1:
                raise  # ranks are told at different places: this ends them all
            stop_reason = "interrupted"
            if run is not None:
                run.set_aside()
        theta_end = whole_vector(way.x)
        ends = np.stack([way.x, origin])
        if isinstance(way, Searching) and history:
            outputs, runs = way.outputs_at(ends, len(history))
        else:
            outputs, runs = _last_outputs(smoothed, ends * natural, len(history), tuple(goal.shape))
        runs += spent()
        covariance: Array | None = None
        reused = 0
        if isinstance(way, Searching):
            end_loss, covariance = way.search.overall[0], _of_search(way, misfit, variance is not None)
            covariance = dispatcher.broadcast(covariance)
            reused = way.search.reused
        else:
            final = smoothed.estimate(torch.as_tensor(way.x * natural), limit or 0, scale=last)
            end_loss = misfit.value_and_gradient(final.value)[0]
            runs += final.num_evaluations
            if loss is None:
                covariance = misfit.covariance(final.jacobian(), None if variance is not None else final.value)
        warnings = _doubts(covariance, free, way.x * natural, method)
        error = None
        if covariance is not None:
            if isinstance(sim, ReducedSimulator):
                covariance = _lifted(covariance, sim.lift)
            error = np.sqrt(np.diag(covariance))
        result = FitResult(
            space=space,
            parameters=theta_end,
            start=theta,
            standard_error=error,
            loss=end_loss,
            stop_reason=stop_reason,
            history=tuple(history),
            num_evaluations=runs,
            wall_s=time.monotonic() - begin,
            output=outputs[0],
            start_output=outputs[1],
            covariance=covariance,
            warnings=warnings,
            num_reused=reused,
            num_cached=smoothed.spent.cached + (before.num_cached if before else 0),
            num_surrogate=smoothed.spent.surrogate + (before.num_surrogate if before else 0),
            num_failed=sum(h.num_failed for h in history)
            if method != "kriging"
            else history[-1].num_failed
            if history
            else 0,
            method=method,
        )
        observers.end(result)
    return result


def _check_limits(
    steps: int | None, max_runs: int | None, max_seconds: float | None, restarts: int, tolerance: float | None
) -> None:
    if steps is not None and steps < 1:
        raise InputError(f"Expected at least one step, got {steps!r}.")
    if max_runs is not None and max_runs < 2:
        raise InputError(f"Expected max_runs of at least 2, got {max_runs!r}.")
    if max_seconds is not None and not max_seconds > 0:
        raise InputError(f"Expected a positive max_seconds, got {max_seconds!r}.")
    if restarts < 0:
        raise InputError(f"Expected restarts of 0 or more, got {restarts!r}.")
    if tolerance is not None and not tolerance >= 0:
        raise InputError(f"Expected a tolerance of 0 or more, got {tolerance!r}.")


def _prior(prior: Mapping[str, tuple[float, float]], space: ParameterSpace) -> tuple[Array, Array]:
    """Precisions and means in natural units."""
    precision, mean = np.zeros(space.dimension), np.zeros(space.dimension)
    for name, (centre, deviation) in prior.items():
        i, natural = space.index(name), space.parameters[space.index(name)].natural_scale
        if not (np.isfinite(centre) and deviation > 0):
            raise InputError(
                f"Expected prior[{name!r}] = (mean, standard deviation > 0), got ({centre!r}, {deviation!r})."
            )
        precision[i], mean[i] = (natural / deviation) ** 2, centre / natural
    return precision, mean


def _plain(sim: Simulator, seed: int | None, comm: Intracomm | None, smoothing: Mapping[str, Any]) -> SmoothedSimulator:
    """The simulator itself through the dispatch of a smoothed one: the one midpoint of a Latin set has eps = 0."""
    if given := sorted(set(smoothing) & set(_DESIGN)):
        raise InputError(f"Expected none of {given} with method='kriging', which smooths nothing. Leave them out.")
    carried = {"simulator_seeds": "independent", **smoothing}
    if carried.get("failures") == "drop":
        carried.update(failures="penalty", penalty=FAILED, min_ok=0.0)
    return smooth(sim, seed=seed, num_samples=1, points="qmc-latin", covariate="none", comm=comm, **carried)


def _of_search(way: Searching, misfit: Misfit, known: bool) -> Array:
    """Covariance of the free parameters, in their units: (J^T J / sigma^2 + prior)^-1.

    sigma^2 has what the simulator's own noise leaves open, and is otherwise 1 where the variance is known, else the
    mean squared residual.
    """
    search = way.search
    z = search.overall[1]
    model = search.model(z)
    m, d = search.residuals.shape[1], len(z)
    weights = model.at(z)[0]
    noise = model.noise / m
    sigma2 = 1.0 if known else max(2 * search.overall[0] / max(m - d, 1) - noise, 0.0)
    variance = max(sigma2 + noise * float(weights @ weights), 1e-300)
    covariance, width = np.eye(d), np.full(d, 0.1)
    # Differences over the errors themselves: the slope between two steps of a staircase is not what counts.
    for _ in range(3):
        covariance = _inverse(model.normal_matrix(z, width) / variance + np.diag(search.prior[0]))
        width = np.clip(np.sqrt(np.diag(covariance)), 1e-4, 1.0)
    return np.asarray(covariance * np.outer(way.natural, way.natural))


def _inverse(normal: Array) -> Array:
    """Infinite variances where a direction is not determined, instead of numbers that mean nothing."""
    size = np.sqrt(np.maximum(np.diag(normal), 0))
    unseen = size <= 1e-9 * max(float(size.max()), 1e-300)
    scaled = normal / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    scaled[unseen] = scaled[:, unseen] = 0
    values, vectors = np.linalg.eigh(scaled)
    good = values > 1e-10
    inverse = (vectors[:, good] / values[good]) @ vectors[:, good].T
    open_ = unseen | ((vectors[:, ~good] ** 2).sum(axis=1) > 1e-6)
    result = inverse / np.outer(np.where(unseen, 1, size), np.where(unseen, 1, size))
    result[open_] = result[:, open_] = 0
    result[open_, open_] = np.inf
    return np.asarray(result)


def _lifted(covariance: Array, lift: Array) -> Array:
    """E C E^T without inf * 0."""
    free = [int(np.argmax(row)) if row.any() else -1 for row in lift]
    padded = np.zeros((len(covariance) + 1, len(covariance) + 1))
    padded[:-1, :-1] = covariance
    return np.asarray(padded[np.ix_(free, free)])


def _doubts(covariance: Array | None, space: ParameterSpace, theta: Array, method: str) -> tuple[str, ...]:
    """What the target does not determine, and what to do about it."""
    if covariance is None:
        return ()
    said = []
    error = np.sqrt(np.diag(covariance))
    advice = "Fix it (fixed=), give it a prior, or add data that depend on it."
    for p, value, e in zip(space.parameters, theta, error, strict=True):
        unit = f" {p.unit}" if p.unit else ""
        if not np.isfinite(e):
            said.append(f"{p.name} is not determined by the target: outputs do not depend on it by itself. {advice}")
        elif e > 0.5 * min(p.upper - p.lower, 20 * p.natural_scale):
            said.append(f"{p.name} is hardly determined by the target: its standard error is {e:.3g}{unit}. {advice}")
        if value in (p.lower, p.upper):
            said.append(f"{p.name} ended at its bound {value:g}{unit}: its standard error does not count there.")
    if np.isfinite(error).all() and (error > 0).all():
        correlation = covariance / np.outer(error, error)
        for i, j in zip(*np.triu_indices(len(error), 1), strict=True):
            if abs(correlation[i, j]) > 0.98:
                a, b = space.names[i], space.names[j]
                said.append(f"{a} and {b} are known together only: their correlation is {correlation[i, j]:+.3f}.")
    return tuple(said)


def _last_outputs(
    smoothed: SmoothedSimulator, thetas: Array, step: int, shape: tuple[int, ...]
) -> tuple[NDArray[Any], int]:
    """(2, *shape) of the simulator itself at the end and at the start, and how many runs that took.

    NaN where a run failed, unless failures="raise": a fit that has lived with failed runs must not end by one.
    """
    strategy = smoothed.strategy
    once = smooth(
        smoothed.simulator, seed=strategy.seed, num_samples=1, points="qmc-latin", covariate="none",
        failures="raise" if strategy.failures == "raise" else "penalty",
        penalty=None if strategy.failures == "raise" else FAILED, min_ok=0.0,
    )  # fmt: skip
    once.dispatcher, once.execution, once.spent = smoothed.dispatcher, smoothed.execution, smoothed.spent
    try:
        outputs = plain_outputs(once, thetas, step)
    except EvaluationError:
        if strategy.failures == "raise":
            raise
        outputs = np.full((2, *shape), np.nan)
    return outputs, len(thetas)


def _state(history: Sequence[FitStep], stop_reason: str | None, way: Method) -> dict[str, Any]:
    entries = [{**vars(h), "parameters": list(h.parameters)} for h in history]
    return {"history": entries, "stop_reason": stop_reason, "method": way.to_dict()}


def _described(smoothing: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text that is the same in another process; where finished evaluations are kept is none of them."""
    words = {k: repr(v) for k, v in sorted(smoothing.items()) if k != "store"}
    if smoothing.get("surrogate") is not None:
        words["surrogate"] = simulator_name(as_simulator(smoothing["surrogate"]))
    return words


def _digest(tensor: torch.Tensor) -> str:
    array = tensor.contiguous().numpy()
    return hashlib.blake2b(f"{array.shape}".encode() + array.tobytes(), digest_size=16).hexdigest()
