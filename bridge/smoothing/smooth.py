"""Simulators as PyTorch functions: smoothing of the algorithm, f_L(x) = E[f(x + L eps)], and of a loss of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bridge.checks import known_keywords
from bridge.dispatch import Dispatcher, get_dispatcher
from bridge.environment import step_limit
from bridge.errors import InputError
from bridge.estimators.covariates import Covariate
from bridge.estimators.distributions import Distribution
from bridge.estimators.points import PointSet
from bridge.estimators.scale import ScaleLike, check_scale, parse_scale
from bridge.estimators.strategy import Strategy, make_strategy
from bridge.evaluation.execution import Execution
from bridge.evaluation.failures import Failures, make_failures
from bridge.evaluation.memory import Memory, make_memory
from bridge.evaluation.places import Place, Ranks, Where, make_place
from bridge.simulator.function import as_simulator, counts_runs, unwatched
from bridge.simulator.protocol import Simulator
from bridge.simulator.space import ParameterSpace
from bridge.smoothing.call import to_numpy
from bridge.smoothing.loss import LossSimulator
from bridge.smoothing.settings import Smoothing, SurrogateLike
from bridge.smoothing.smoothed import SmoothedSimulator, scale_by_name
from bridge.smoothing.surrogate import StandIn, as_surrogate, make_stand_in
from bridge.storage.store import Store


@known_keywords
def smooth(
    simulator: Callable[..., Any] | Simulator,
    smoothing: Smoothing | None = None,
    *,
    seed: int | None = None,
    num_samples: int = 64,
    scale: ScaleLike = 1.0,
    distribution: str | Distribution = "gaussian",
    points: str | PointSet = "auto",
    covariate: str | Covariate = "auto",
    replicates: int = 1,
    simulator_seeds: str = "common",
    failures: str | Failures = "raise",
    surrogate: SurrogateLike = None,
    on: Where = None,
    memory: Memory | Store | None = None,
) -> SmoothedSimulator:
    """Makes a black box differentiable by smoothing the algorithm: f_L(x) = E[f(x + L eps)].

    Its Jacobian is E[f(x + L eps) (L^-T s(eps))^T], s the score of the density; f itself is never differentiated and
    may be discontinuous. Unbiased for independent rows with covariate none, f(x), loo or auto, and for randomised
    quasi-Monte Carlo points with none; see `bridge.estimators.covariates` for the others.

    Args:
        simulator: f: a function of a (d,) float64 array, or a `Simulator`.
        smoothing: settings of the estimator as one object, from num_samples to simulator_seeds and surrogate, such as
            `bridge.study` recommends; in place of these.
        seed: of all noise; required.
        num_samples: N, simulator runs for each parameter vector; powers of two suit Sobol' points.
        scale: L: a number (in the parameters' natural units), (d,) (its diagonal), or name -> its entry there, (d, d)
            (L itself) or `LowerTriangular`, or `LogScale`; tensors that require grad are learned.
        distribution: gaussian, logistic, gumbel, cauchy, laplace, triangular, or a `Distribution`.
        points: auto, mc, qmc-latin, rqmc-latin, qmc-cartesian, rqmc-cartesian, sobol, qmc-net, rqmc-net, halton,
            orthogonal, or a `PointSet`. "auto" chooses by N, d and the distribution; `Estimate.points_reason` says why.
            "antithetic", or "antithetic-" before a name: pairs eps, -eps; symmetric densities and even N.
        covariate: auto, none, f(x), loo, mean, block, regression, bq, or a `Covariate`: see
            `bridge.estimators.covariates`; what "auto" took, and why, is in `Estimate.covariate_reason`.
        replicates: R independent parts of num_samples / R rows each, whose spread gives standard errors of any point
            set; 4 to 8 suit. With 1 only independent rows have standard errors.
        simulator_seeds: "common" hands all perturbations of a step the same seed (common random numbers), "independent"
            each row its own. Replicates always have seeds of their own.
        failures: what becomes of runs that raise, take too long, or are not finite: "raise", the same error on every
            rank; "drop", they are left out; or `bridge.Raise`, `bridge.Drop`, `bridge.Penalty` with their settings
            (retries, missing numbers, how many must succeed).
        surrogate: g, a cheap stand-in for f, or `bridge.Surrogate(g, samples, weight)`.
        on: where runs are evaluated: None for this process and the ranks of MPI, a number of workers, "process" for a
            child process, any `concurrent.futures.Executor` or the name of one; or `bridge.Ranks`, `bridge.Workers`,
            `bridge.Isolated`, `bridge.Executor` with their settings.
        memory: what is kept of outputs: `bridge.Memory`, or a `bridge.Store` alone.

    Returns:
        a `SmoothedSimulator`: call it as `smoothed(theta, step=i)`, or ask `smoothed.estimate(theta)`.

    Raises:
        InputError: no seed, an unknown name, an infeasible combination.
        SetupError: a launcher was used but MPI does not work.

    Reference: arXiv 2410.08125, Lemma 3 and Theorem 7.
    """
    settings = Smoothing(
        num_samples, scale, distribution, points, covariate, replicates, simulator_seeds, surrogate
    ).or_given(smoothing)
    tolerated, place, kept = make_failures(failures), make_place(on), make_memory(memory)
    strategy = make_strategy(
        seed=seed,
        num_samples=settings.num_samples,
        replicates=settings.replicates,
        distribution=settings.distribution,
        points=settings.points,
        covariate=settings.covariate,
        simulator_seeds=settings.simulator_seeds,
        failures=tolerated.rule,
        penalty=tolerated.filling,
        min_ok=tolerated.share,
        missing=tolerated.missing,
        leaf_size=place.ranks.leaf_size,
    )
    wrapped = as_simulator(simulator)
    dispatcher = get_dispatcher(place.ranks.comm, place.ranks.per_evaluation)
    if dispatcher.rank > 0:  # one rank tells enough
        unwatched(wrapped)
    if kept.store is not None:  # no run is paid for twice
        counts_runs(wrapped)
    stand_in = _stand_in(settings.surrogate, wrapped, strategy, place, dispatcher)
    of_parameters = scale_by_name(settings.scale, wrapped)
    wrapped = place.placed(wrapped, dispatcher)
    if wrapped.space is not None:
        _validate_scale(of_parameters, wrapped.space, strategy)
    execution = make_execution(place.ranks, kept, tolerated)
    if kept.store is not None:  # refused now, not at the first call
        for one in (wrapped, *(() if stand_in is None else (stand_in.simulator,))):
            execution.filing(one)
    return SmoothedSimulator(wrapped, strategy, of_parameters, dispatcher, execution, stand_in)


def make_execution(ranks: Ranks, memory: Memory, failures: Failures) -> Execution:
    """How runs are carried out, of the settings that say so."""
    return Execution(
        keep_bytes=int(memory.keep_mb * 1e6),
        memory_bytes=math.inf if memory.rank_mb is None else memory.rank_mb * 1e6,
        schedule=ranks.schedule,
        retries=int(failures.retries),
        store=memory.store,
        step_limit_s=step_limit() if ranks.step_limit_s is None else float(ranks.step_limit_s),
    )


def _stand_in(
    given: SurrogateLike, simulator: Simulator, strategy: Strategy, place: Place, dispatcher: Dispatcher
) -> StandIn | None:
    """The surrogate where it is to run, checked; the loss is taken of its outputs, too, where that is smoothed."""
    if given is None:
        return None
    surrogate = as_surrogate(given)
    if isinstance(simulator, LossSimulator) and not isinstance(surrogate.simulator, LossSimulator):
        surrogate = replace(surrogate, simulator=LossSimulator(as_simulator(surrogate.simulator), simulator.loss))
    checked = make_stand_in(surrogate, simulator, strategy)
    return replace(checked, simulator=place.placed(checked.simulator, dispatcher))


def _validate_scale(scale: ScaleLike, space: ParameterSpace, strategy: Strategy) -> None:
    tensor, form = parse_scale(scale, space.natural_scale, strategy.distribution)
    check_scale(to_numpy(tensor), form)


@known_keywords
def smooth_loss(
    simulator: Callable[..., Any] | Simulator,
    loss: Callable[[torch.Tensor], torch.Tensor],
    smoothing: Smoothing | None = None,
    *,
    seed: int | None = None,
    num_samples: int = 64,
    scale: ScaleLike = 1.0,
    distribution: str | Distribution = "gaussian",
    points: str | PointSet = "auto",
    covariate: str | Covariate = "auto",
    replicates: int = 1,
    simulator_seeds: str = "common",
    failures: str | Failures = "raise",
    surrogate: SurrogateLike = None,
    on: Where = None,
    memory: Memory | Store | None = None,
) -> SmoothedSimulator:
    """Smoothing of the loss: E[l(f(x + L eps))], a number for each parameter vector.

    Unbiased, also where l cannot be differentiated; under MPI no output ever travels. For squared error it equals the
    smoothed algorithm's loss plus the trace of the output covariance.

    Args:
        simulator: as in `smooth`.
        loss: l: a tensor of one output -> one number; called without gradients. The tensor is float32 where outputs
            are, else float64: integers and booleans never wrap. Numbers that an output lacks are NaN.

    The others are as in `smooth`; the loss is taken of a surrogate's outputs, too.
    """
    if not callable(loss):
        raise InputError(f"Expected a function of one output as the loss, got {loss!r}. Give lambda y: ...")
    return smooth(
        LossSimulator(as_simulator(simulator), loss),
        smoothing,
        seed=seed,
        num_samples=num_samples,
        scale=scale,
        distribution=distribution,
        points=points,
        covariate=covariate,
        replicates=replicates,
        simulator_seeds=simulator_seeds,
        failures=failures,
        surrogate=surrogate,
        on=on,
        memory=memory,
    )
