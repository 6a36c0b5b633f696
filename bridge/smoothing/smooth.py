"""Simulators as PyTorch functions: smoothing of the algorithm, f_L(x) = E[f(x + L eps)], and of a loss of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Literal

import torch

from bridge.checks import is_whole, known_keywords, refuse_unknown
from bridge.dispatch import Dispatcher, get_dispatcher
from bridge.environment import step_limit
from bridge.errors import InputError
from bridge.estimators.distributions import Distribution
from bridge.estimators.points import PointSet
from bridge.estimators.scale import ScaleLike, check_scale, parse_scale
from bridge.estimators.strategy import Strategy, make_strategy
from bridge.evaluation.execution import Execution
from bridge.evaluation.workers import IsolatedSimulator, SimulatorPool
from bridge.simulator.function import as_simulator, counts_runs, unwatched
from bridge.simulator.protocol import Parallel, Simulator, simulator_name
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.call import to_numpy
from bridge.smoothing.loss import LossSimulator
from bridge.smoothing.smoothed import SmoothedSimulator, scale_by_name
from bridge.smoothing.surrogate import make_surrogate
from bridge.storage.store import Store

if TYPE_CHECKING:
    from bridge.dispatch.mpi import Intracomm


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
    scale = scale_by_name(scale, wrapped)
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


def _validate_scale(scale: ScaleLike, space: ParameterSpace, strategy: Strategy) -> None:
    tensor, form = parse_scale(scale, space.natural_scale, strategy.distribution)
    check_scale(to_numpy(tensor), form)


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
